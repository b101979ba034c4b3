"""Accuracy of a model on math problems: N samples a problem, graded by the last \\boxed{}, counted by Eqs. (9)-(11).

    python evaluate.py --model Qwen/Qwen3-4B --adapter runs/qwen3-4b/checkpoint-100 --benchmark aime24 --seeds 0 1 2

Sampling defaults are the paper's (Section 4.1), for one of its three seeds. Every sample is on the disk before anything
is graded: the same command goes on where a killed one stopped. Axes: N samples of one problem, P problems, S seeds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from errors import InputError
from grading import answers_match, extract_boxed, make_grader
from problems import Problem, load_problems
from rollout import Response, Sampling, StreamKey
from runtime import records
from runtime.checkpoint import load_adapter
from runtime.engines import Engine, GenerateEngine, connect
from runtime.flags import FlagParser, option, run_script
from runtime.loading import ADAPTER_CONFIG, check_room, context_length, load_config, load_model, load_tokenizer
from runtime.ranks import progress, rank, say, start_ranks, stop_ranks, world_size
from teacher import PAPER_PROMPTS, Prompts, check_prompts, encode_prompt, load_prompts

# --- Metrics of one problem. `correct` and `answers` are in the order of sampling. ------------------------------


def avg_at_n(correct: Sequence[bool]) -> float:
    """Eq. (9): Avg@N = 1/N sum_i c_i."""
    return sum(correct) / len(correct)


def pass_at_n(correct: Sequence[bool]) -> float:
    """Eq. (10): Pass@N = 1[sum_i c_i >= 1]."""
    return float(any(correct))


def maj_at_n(answers: Sequence[str | None], correct: Sequence[bool], match: Callable = answers_match) -> float:
    """Eq. (11): Maj@N = c of the first member of the largest cluster of equivalent answers.

    Answers that cannot be parsed (None) form one cluster that takes part in the vote and is wrong if it wins. Ties go
    to the cluster seen first.
    """
    clusters: list[list[int]] = []  # members by their place
    for index, answer in enumerate(answers):
        for members in clusters:
            other = answers[members[0]]
            alike = answer is other if None in (answer, other) else match(answer, other)
            if alike:
                members.append(index)
                break
        else:
            clusters.append([index])
    winner = max(clusters, key=len)[0]  # of equal ones the first
    return float(correct[winner])


# --- Sampling ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One sampled solution, as it is written to samples.jsonl before anything is graded."""

    problem: int  # its row in the benchmark
    sample: int  # 0..N-1
    seed: int
    text: str
    tokens: int
    finish_reason: str  # "eos" or "length"


Job = tuple[int, int, int]  # (seed, problem index, sample index)


def solve(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], jobs: list[Job], settings: Sampling,
    enable_thinking: bool = True, on_sample: Callable = lambda sample: None, prompts: Prompts = PAPER_PROMPTS,
) -> list[Sample]:  # fmt: skip
    """Sample the jobs, each with its own random stream; `on_sample` sees each sample as soon as the engine is done."""
    encoded = encode(tokenizer, [problems[index] for _, index, _ in jobs], enable_thinking, prompts)
    samples: dict[int, Sample] = {}

    def keep(row: int, response: Response) -> None:
        text = tokenizer.decode(response.ids, skip_special_tokens=True)
        (seed, index, number), end = jobs[row], "eos" if response.finished else "length"
        samples[row] = Sample(index, number, seed, text, len(response.ids), end)
        on_sample(samples[row])

    engine.sample(encoded, stream_keys(problems, jobs), settings, keep)
    return [samples[row] for row in range(len(jobs))]


def encode(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], enable_thinking: bool, prompts: Prompts
) -> list[list[int]]:
    """Token ids of the problems' evaluation prompts."""
    return [encode_prompt(tokenizer, prompts.evaluation, each, enable_thinking, prompts.chat) for each in problems]


def stream_keys(problems: list[Problem], jobs: list[Job]) -> list[StreamKey]:
    """(seed, benchmark, problem, sample): seeds, benchmarks and samples share no random numbers.

    Authors: child seed = seed + index, so that seeds 0, 1, 2 share most of their samples.
    """
    benchmark = int(benchmark_digest(problems)[:8], 16)
    return [(seed, benchmark, index, number) for seed, index, number in jobs]


def benchmark_digest(problems: list[Problem], part: str = "problem") -> str:
    """SHA-256 of the benchmark's problems, or of its answers."""
    return hashlib.sha256(json.dumps([getattr(item, part) for item in problems]).encode()).hexdigest()


def sample_missing(
    config: "EvaluationConfig", problems: list[Problem], tokenizer: PreTrainedTokenizerBase, prompts: Prompts,
    missing: list[Job], file: records.RowFile,
) -> None:  # fmt: skip
    """Sample this rank's share of `missing`; each sample is on the disk as soon as it is there."""
    mine, start = missing[rank() :: world_size()], time.perf_counter()
    bar = progress(total=len(mine), desc="samples")

    def keep(item: Sample) -> None:
        file.add([asdict(item)])
        bar.update()

    settings = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
    with closing(open_engine(config, tokenizer)) as engine, bar:
        solve(engine, tokenizer, problems, mine, settings, config.enable_thinking, keep, prompts)
    file.collect()
    seconds, tokens = time.perf_counter() - start, sum(file.rows[job]["tokens"] for job in missing)
    say(f"sampled {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second (loading included)")


def open_engine(config: "EvaluationConfig", tokenizer: PreTrainedTokenizerBase) -> Engine:
    """An engine in this process, with the model and its adapter, or the one of --server."""
    if config.server:
        return connect(config.server, config.model, tokenizer, config.batch_size, config.adapter)
    model = load_model(config.model, config.dtype, device=config.device)
    if config.adapter:
        load_adapter(model, config.adapter)
    return GenerateEngine(model, tokenizer, config.batch_size)


# --- Counting ---------------------------------------------------------------------------------------------------


def score(items: list[Sample], problem: Problem, match: Callable) -> dict[str, float]:
    """All metrics of one problem from its N samples of one seed, in their order."""
    answers = [extract_boxed(item.text) for item in items]
    correct = [answer is not None and match(answer, problem.answer) for answer in answers]
    N = len(items)
    return {
        "avg": avg_at_n(correct),
        "pass": pass_at_n(correct),
        "maj": maj_at_n(answers, correct, match),
        "parseable": sum(answer is not None for answer in answers) / N,
        "cut_at_limit": sum(item.finish_reason == "length" for item in items) / N,
        "tokens": sum(item.tokens for item in items) / N,
    }


def summarise(samples: list[Sample], problems: list[Problem], match: Callable = answers_match) -> dict:
    """Means over problems and seeds, their 95 % bootstrap interval over problems and their spread over seeds."""
    groups: dict[tuple[int, int], list[Sample]] = {}
    for item in sorted(samples, key=lambda item: (item.seed, item.problem, item.sample)):
        groups.setdefault((item.seed, item.problem), []).append(item)
    seeds, indices = sorted({seed for seed, _ in groups}), sorted({index for _, index in groups})
    scores = {key: score(items, problems[key[1]], match) for key, items in groups.items()}
    names = list(scores[seeds[0], indices[0]])
    values = {name: np.array([[scores[s, i][name] for i in indices] for s in seeds]) for name in names}
    metrics = {}
    for name, values_SP in values.items():
        by_seed, interval = values_SP.mean(axis=1), bootstrap_interval if name == "tokens" else share_interval
        metrics[name] = {
            "mean": float(values_SP.mean()), "interval": interval(values_SP.mean(axis=0)), "by_seed": by_seed.tolist(),
            "std_over_seeds": float(by_seed.std(ddof=1)) if len(seeds) > 1 else None,
        }  # fmt: skip
    per_problem = {name: values[name].tolist() for name in ("avg", "pass", "maj")}
    return {"metrics": metrics, "seeds": seeds, "problems": indices, "per_problem": per_problem}


def share_interval(shares_P: np.ndarray) -> list[float]:
    """`bootstrap_interval` of shares; where all are 0 or all 1, and every resample is alike, the exact binomial
    (Clopper-Pearson) interval of 0 of P or P of P: [0, 1 - b] or [b, 1], b = .025 ** (1 / P)."""
    bound = 0.025 ** (1 / len(shares_P))
    if np.all(shares_P == 1.0):
        return [bound, 1.0]
    return [0.0, 1.0 - bound] if np.all(shares_P == 0.0) else bootstrap_interval(shares_P)


def bootstrap_interval(values_P: np.ndarray, resamples: int = 10_000, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean over problems, drawn with replacement."""
    draw = np.random.default_rng(seed)
    P, chunk = len(values_P), 500  # resamples at once, to bound the memory
    means = [values_P[draw.integers(0, P, (chunk, P))].mean(axis=1) for _ in range(resamples // chunk)]
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


# --- Options ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationConfig:
    """Options of evaluate.py; sampling defaults are the paper's, for one of its three seeds."""

    benchmark: str = option("tiny", "math500, aime24, aime25, hmmt25, tiny, or a file, folder or hub name", "data")
    columns: str | None = option(None, "unusual columns: problem=...,solution=...,answer=...", "data")
    limit: int | None = option(None, "only the first problems, so many", "data", least=1)
    model: str = option("tiny", "directory or hub name; `tiny` is the embedded model", "data")
    adapter: str | None = option(None, "adapter directory in PEFT's format", "data")
    num_samples: int = option(12, "N, samples per problem and seed", "sampling", within=(1, 1e4))
    seeds: list[int] = option([0], "each adds N independent samples", "sampling", within=(0, 2**63))
    temperature: float = option(1.0, "0 is greedy", "sampling")
    top_p: float = option(0.95, "1 is off", "sampling")
    top_k: int = option(0, "0 is off", "sampling")
    max_new_tokens: int = option(38912, "at most what the model's context leaves for the longest prompt", "sampling")
    enable_thinking: bool = option(True, "of the chat template", "sampling")
    prompts: str | None = option(None, "JSON file with a template of your own: evaluation", "sampling")
    chat_template_kwargs: str | None = option(None, "JSON of further arguments for the chat template", "sampling")
    server: str | None = option(None, "address of a vLLM that serves --model", "sampling")
    batch_size: int = option(256, "sequences sampled at once, or requests in flight", "sampling", least=1)
    grader: str = option("auto", "math-verify, exact, or auto: math-verify where it is installed")
    output_dir: str = option("runs/evaluation", "samples.jsonl and summary.json; the same command goes on there")
    device: str = option("auto", "auto, cpu, cuda, ...")
    dtype: str = option("auto", "auto (bfloat16 on a GPU, else float32) or its name")


# What may differ when an evaluation is taken up again: how many samples are asked for, how they are computed, graded.
FREE_ON_RESUME = {"num_samples", "seeds", "batch_size", "grader", "output_dir", "device"}


def check_config(config: EvaluationConfig) -> None:
    Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)  # checks itself
    load_prompts(config.prompts, config.chat_template_kwargs)
    if config.server and config.dtype != "auto":
        raise InputError(f"--dtype {config.dtype}: with --server that of the server holds")
    if len(set(config.seeds)) < max(len(config.seeds), 1):
        raise InputError(f"--seeds {config.seeds}: must be different")
    if config.adapter and not (Path(config.adapter) / ADAPTER_CONFIG).is_file():
        raise InputError(f"--adapter {config.adapter}: no {ADAPTER_CONFIG} there")


# --- The run ----------------------------------------------------------------------------------------------------


def main() -> None:
    config = FlagParser(EvaluationConfig, __doc__).parse()
    device = start_ranks(config.device)
    check_config(config)
    if config.dtype == "auto" and not config.server:  # a server decides itself
        config = replace(config, dtype="bfloat16" if device.type == "cuda" else "float32")
    config = replace(config, device=str(device))
    benchmark, folder = load_problems(config.benchmark, False, config.columns), Path(config.output_dir)
    problems = benchmark[: config.limit]
    if again := len(problems) - len({item.problem for item in problems}):
        say(f"--benchmark {config.benchmark}: {again} problems repeat another; means and intervals count each of them")
    grader = make_grader(config.grader, [problem.answer for problem in problems])
    if grader.note:
        say(grader.note)
    jobs = [(s, i, n) for s in config.seeds for i in range(len(problems)) for n in range(config.num_samples)]

    with closing(grader), records.open_run(folder, "evaluate", resume=True) as record:
        key = ("seed", "problem", "sample")
        file = records.RowFile(folder / "samples.jsonl", key, ("text", "tokens", "finish_reason"))
        missing = [job for job in jobs if job not in file.rows]
        tokenizer = load_tokenizer(config.model)
        prompts = load_prompts(config.prompts, config.chat_template_kwargs, records.first_day(record))
        for note in check_prompts(tokenizer, prompts, ("evaluation",)):
            say(note)
        config = begin(config, benchmark, tokenizer, prompts, folder, record)
        if missing:
            sample_missing(config, benchmark, tokenizer, prompts, missing, file)  # whose whole digest keys the draws
        if rank() == 0:
            report(config, problems, [Sample(**file.rows[job]) for job in jobs], folder, grader)
    stop_ranks()


def begin(
    config: EvaluationConfig, benchmark: list[Problem], tokenizer: PreTrainedTokenizerBase, prompts: Prompts,
    folder: Path, record: dict | None,
) -> EvaluationConfig:  # fmt: skip
    """Write config.json, or check that the samples in the folder were asked for in the same way.

    Returns the options with one limit for all problems, min(--max_new_tokens, context - longest prompt).
    """
    problems = benchmark[: config.limit]
    encoded = encode(tokenizer, problems, config.enable_thinking, prompts)
    model_config, on_server = load_config(config.model).get_text_config(), bool(config.server)
    lengths, context = [len(ids) for ids in encoded], context_length(model_config, on_server)
    check_room(f"--benchmark {config.benchmark}", problems, lengths, 1, context)
    if (room := context - max(lengths)) < config.max_new_tokens:
        say(f"--max_new_tokens {config.max_new_tokens}: the model's context leaves {room}")
        config = replace(config, max_new_tokens=room)
    inputs = records.fingerprints({"model": config.model, "adapter": config.adapter}) | {
        "benchmark": benchmark_digest(benchmark), "prompts": hashlib.sha256(json.dumps(encoded).encode()).hexdigest(),
        "server": "a server" if config.server else "this process",
    }  # fmt: skip
    records.record_run(folder, "evaluate", record, asdict(config), FREE_ON_RESUME, inputs,
                       {"hardware": config.device, "date": prompts.chat.date})  # fmt: skip
    return config


def report(config: EvaluationConfig, problems: list[Problem], samples: list[Sample], folder: Path, grader) -> None:
    """Grade, count, write summary.json and print it."""
    record = records.read_record(folder)
    regime = {name: value for name, value in record["config"].items() if name not in FREE_ON_RESUME}
    results = summarise(samples, problems, grader.match)
    summary = {
        "benchmark": config.benchmark, "num_samples": config.num_samples,
        "regime": regime | {"benchmark_sha256": benchmark_digest(problems)}, "inputs": record["inputs"],
        "answers_sha256": benchmark_digest(problems, "answer"), "versions": records.versions(), **results,
        "grader": {part: getattr(grader, part) for part in ("name", "version", "asked", "stopped", "refused")},
    }  # fmt: skip
    records.write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"{config.benchmark}: {len(results['problems'])} problems, N {config.num_samples}, seeds {results['seeds']}, "
          f"grader {grader.name} {grader.version}")  # fmt: skip
    for name, value in results["metrics"].items():
        scale, digits = (1, 1) if name == "tokens" else (100, 2)
        low, high = (f"{scale * end:.{digits}f}" for end in value["interval"])
        spread = value["std_over_seeds"]
        over_seeds = "" if spread is None else f"   +- {scale * spread:.{digits}f} over seeds"
        print(f"{name:13s} {scale * value['mean']:8.{digits}f}   95 % [{low}, {high}]{over_seeds}")
    not_equal = f"{grader.stopped} stopped at a limit and {grader.refused} refused count as not equal"
    print(f"{grader.asked} comparisons needed {grader.name}; {not_equal}")


if __name__ == "__main__":
    run_script(main)
