"""Accuracy of a model on math problems: N samples a problem, graded by the last \\boxed{}, counted by Eqs. (9)-(11).

    python evaluate.py --model Qwen/Qwen3-4B --adapter runs/qwen3-4b/checkpoint-100 --benchmark aime24 --seeds 0 1 2

Defaults are the paper's protocol (Section 4.1). Every sample is on the disk before anything is graded: the same command
goes on where a killed one stopped. Axes: N samples of one problem, P problems, S seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from checkpoint import Sample, check_regime, open_samples, versions, weights_digest, write_atomically
from experiments.server import complete_all, prompt_text
from model import ADAPTER_CONFIG, find_checkpoint, load_adapter, load_model, load_tokenizer, pick_device
from problems import (
    FlagParser,
    InputError,
    Problem,
    answers_match,
    extract_boxed,
    load_problems,
    make_grader,
    normalise_answer,
    parse_number,
)
from rollout import StreamKey, check_sampling, sample, sample_continuous
from teacher import EVALUATION_PROMPT, encode_prompt


@dataclass
class EvaluationConfig:
    """Options of evaluate.py; defaults are the paper's."""

    benchmark: str = field(
        default="tiny",
        metadata={"help": "math500, aime24, aime25, hmmt25, tiny, a .jsonl path or a hub name owner/name:split"},
    )
    model: str = field(default="tiny", metadata={"help": "directory or hub name; `tiny` is the embedded model"})
    adapter: str | None = field(default=None, metadata={"help": "adapter directory in PEFT's format"})
    num_samples: int = field(default=12, metadata={"help": "N, samples per problem and seed"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "each adds N independent samples"})
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = field(default=0, metadata={"help": "0 is off"})
    max_new_tokens: int = field(
        default=38912, metadata={"help": "lowered to what the model's context leaves behind the longest prompt"}
    )
    enable_thinking: bool = True
    engine: str = field(default="generate", metadata={"help": "generate, or continuous: continuous batching (GPU)"})
    server: str | None = field(
        default=None, metadata={"help": "URL of an OpenAI-compatible server of --model; replaces --engine"}
    )
    batch_size: int = field(default=256, metadata={"help": "sequences sampled at once, or requests in flight"})
    grader: str = field(default="auto", metadata={"help": "math-verify, exact, or auto: by the benchmark's answers"})
    grade_only: bool = field(default=False, metadata={"help": "grade the samples in --output_dir, sample none"})
    output_dir: str = "runs/evaluation"
    device: str = "auto"
    dtype: str = "auto"


# ---------------------------------------------------------------------------------------------------------------
# Metrics of one problem. `correct` and `answers` are in the order of sampling.


def avg_at_n(correct: Sequence[bool]) -> float:
    """Eq. (9): Avg@N = 1/N sum_i c_i."""
    return sum(correct) / len(correct)


def pass_at_n(correct: Sequence[bool]) -> float:
    """Eq. (10): Pass@N = 1[sum_i c_i >= 1]."""
    return float(any(correct))


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Pass@k = 1 - C(N - c, k) / C(N, k), the unbiased estimate for k <= N from all N samples (arXiv 2107.03374)."""
    N, c = len(correct), sum(correct)
    return 1.0 - math.comb(N - c, k) / math.comb(N, k)


def maj_at_n(answers: Sequence[str | None], correct: Sequence[bool], match: Callable = answers_match) -> float:
    """Eq. (11): Maj@N = c of the first member of the largest cluster of equivalent answers.

    Answers that cannot be parsed (None) form one cluster that takes part in the vote and is wrong if it wins. Ties go
    to the cluster seen first.
    """
    firsts: list[int] = []
    sizes: list[int] = []
    for index, answer in enumerate(answers):
        for cluster, first in enumerate(firsts):
            other = answers[first]
            if (answer is None and other is None) or (None not in (answer, other) and match(answer, other)):
                sizes[cluster] += 1
                break
        else:
            firsts.append(index)
            sizes.append(1)
    winner = firsts[sizes.index(max(sizes))]
    return float(answers[winner] is not None and correct[winner])


# ---------------------------------------------------------------------------------------------------------------
# Sampling


def sample_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    jobs: list[tuple[int, int]],
    *,
    seed: int,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    enable_thinking: bool = True,
    engine: str = "generate",
    on_sample: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Sample the (problem index, sample index) pairs of `jobs` in one batch; each pair has its own random stream.

    `on_sample` sees each sample as soon as the engine is done with it.
    """
    prompts = [encode_prompt(tokenizer, EVALUATION_PROMPT, problems[index], enable_thinking) for index, _ in jobs]
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
    keys = stream_keys(problems, jobs, seed)
    samples: dict[int, Sample] = {}

    def keep(row: int, response: list[int], finished: bool) -> None:
        text = tokenizer.decode(response, skip_special_tokens=True)
        samples[row] = Sample(*jobs[row], seed, text, len(response), "eos" if finished else "length")
        if on_sample is not None:
            on_sample(samples[row])

    if engine == "continuous":
        sample_continuous(model, tokenizer, prompts, keys, **settings, on_finished=keep)
    else:
        rollout = sample(model, tokenizer, prompts, keys, **settings)
        for row, (response, finished) in enumerate(zip(rollout.responses, rollout.finished, strict=True)):
            keep(row, response, finished)
    return [samples[row] for row in range(len(jobs))]


def stream_keys(problems: list[Problem], jobs: list[tuple[int, int]], seed: int) -> list[StreamKey]:
    """(seed, benchmark, problem, sample): seeds, benchmarks and samples share no random numbers.

    Authors: child seed = seed + index, so that seeds 0, 1, 2 share most of their samples.
    """
    benchmark = int(benchmark_digest(problems)[:8], 16)
    return [(seed, benchmark, index, number) for index, number in jobs]


def benchmark_digest(problems: list[Problem], part: str = "problem") -> str:
    """SHA-256 of the benchmark's problems, or of its answers."""
    return hashlib.sha256(json.dumps([getattr(item, part) for item in problems]).encode()).hexdigest()


def is_correct(sample_: Sample, problems: list[Problem], match: Callable = answers_match) -> bool:
    return match(extract_boxed(sample_.text), problems[sample_.problem].answer)


def generate_missing(
    config: EvaluationConfig, problems: list[Problem], tokenizer, limit: int, missing: dict, write: Callable
) -> None:
    """Sample what is missing, `{seed: [(problem, sample)]}`; every sample goes to `write` as soon as it is there."""
    bar = tqdm(total=sum(map(len, missing.values())), desc="sampling", unit="sample")

    def keep(item: Sample) -> None:
        write(item)
        bar.update()

    if config.server:
        return _from_server(config, problems, tokenizer, limit, missing, keep)
    model = load_model(config.model, config.dtype, device=config.device)
    if config.adapter:
        load_adapter(model, config.adapter)
    for seed, jobs in missing.items():
        size = config.batch_size if config.engine == "generate" else max(len(jobs), 1)
        for start in range(0, len(jobs), size):
            try:
                sample_solutions(
                    model, tokenizer, problems, jobs[start : start + size], seed=seed, temperature=config.temperature,
                    top_p=config.top_p, top_k=config.top_k, max_new_tokens=limit, engine=config.engine,
                    enable_thinking=config.enable_thinking, on_sample=keep,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                raise InputError(
                    f"out of GPU memory at --batch_size {config.batch_size}: lower it (finished samples are kept), "
                    "or use --engine continuous with another --output_dir"
                ) from None
    return None


def _from_server(config: EvaluationConfig, problems: list[Problem], tokenizer, limit: int, missing, keep) -> None:
    jobs = [(seed, *job) for seed, pairs in missing.items() for job in pairs]
    ids = [encode_prompt(tokenizer, EVALUATION_PROMPT, item, config.enable_thinking) for item in problems]
    texts = [prompt_text(tokenizer, prompt) for prompt in ids]
    keys = [stream_keys(problems, [(index, number)], seed)[0] for seed, index, number in jobs]
    seeds = [int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1 for key in keys]  # 31 bits fit every server
    settings = {
        "temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k, "max_tokens": limit,
        "eos_token_id": _eos_ids(config, tokenizer),
    }  # fmt: skip
    prompts = [texts[index] for _, index, _ in jobs]
    model = find_checkpoint(config.model)
    for done in complete_all(config.server, model, prompts, seeds, settings, config.batch_size):
        seed, index, number = jobs[done.row]
        keep(Sample(index, number, seed, done.text, done.tokens, done.finish_reason))


def _eos_ids(config: EvaluationConfig, tokenizer) -> list[int]:
    try:
        own = GenerationConfig.from_pretrained(find_checkpoint(config.model)).eos_token_id
    except OSError:  # a checkpoint need not have one
        own = None
    return sorted({*(own if isinstance(own, list) else [] if own is None else [own]), tokenizer.eos_token_id})


# ---------------------------------------------------------------------------------------------------------------
def regime(config: EvaluationConfig, problems: list[Problem], prompts: list[list[int]], limit: int) -> dict:
    """Everything that a sample depends on besides its seed and number."""
    checkpoint = Path(find_checkpoint(config.model))
    return {
        "model": config.model,
        "model_sha256": weights_digest(checkpoint) if checkpoint.is_dir() else None,
        "model_revision": getattr(AutoConfig.from_pretrained(str(checkpoint)), "_commit_hash", None),
        "adapter": config.adapter,
        "adapter_sha256": weights_digest(Path(config.adapter)) if config.adapter else None,
        "benchmark": config.benchmark,
        "benchmark_sha256": benchmark_digest(problems),
        "prompt": EVALUATION_PROMPT,
        "prompt_tokens_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "enable_thinking": config.enable_thinking,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "max_new_tokens": limit,
        "engine": "server" if config.server else config.engine,
        "dtype": _dtype_name(config),
    }


def _dtype_name(config: EvaluationConfig) -> str | None:
    """What `auto` stands for on this machine (model.load_model); None where the server decides."""
    if config.server:
        return None
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if pick_device(config.device).type == "cuda" else "float32"


# ---------------------------------------------------------------------------------------------------------------
# Counting


def score(items: list[Sample], problem: Problem, match: Callable) -> dict[str, float]:
    """All metrics of one problem from its N samples of one seed, in their order."""
    answers = [extract_boxed(item.text) for item in items]
    correct = [match(answer, problem.answer) for answer in answers]
    N = len(items)
    return {
        "avg": avg_at_n(correct),
        "pass": pass_at_n(correct),
        "maj": maj_at_n(answers, correct, match),
        **{f"pass_at_{k}": pass_at_k(correct, k) for k in (2, 4, 8) if k < N},
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
    metrics, per_problem = {}, {}
    for name in scores[seeds[0], indices[0]]:
        values_SP = np.array([[scores[seed, index][name] for index in indices] for seed in seeds])
        by_seed = values_SP.mean(axis=1)
        metrics[name] = {
            "mean": float(values_SP.mean()),
            "interval": bootstrap_interval(values_SP.mean(axis=0)),
            "by_seed": by_seed.tolist(),
            "std_over_seeds": float(by_seed.std(ddof=1)) if len(seeds) > 1 else None,
        }
        if name in ("avg", "pass", "maj"):
            per_problem[name] = values_SP.tolist()
    return {"metrics": metrics, "seeds": seeds, "problems": indices, "per_problem": per_problem}


def bootstrap_interval(values_P: np.ndarray, resamples: int = 10_000, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean over problems, drawn with replacement."""
    draw = np.random.default_rng(seed)
    P, chunk = len(values_P), 500  # resamples at once, to bound the memory
    means = [values_P[draw.integers(0, P, (chunk, P))].mean(axis=1) for _ in range(resamples // chunk)]
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def needs_latex(problems: list[Problem]) -> bool:
    """Whether some answer is neither an integer nor a decimal nor a fraction."""
    return any(parse_number(normalise_answer(item.answer)) is None for item in problems)


# ---------------------------------------------------------------------------------------------------------------


def check_config(config: EvaluationConfig) -> None:
    check_sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
    for name in ("num_samples", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least 1")
    if config.engine not in ("generate", "continuous"):
        raise InputError(f"--engine {config.engine}: choose generate or continuous")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise InputError(f"--seeds {config.seeds}: must be different and not negative")
    if config.adapter and not (Path(config.adapter) / ADAPTER_CONFIG).is_file():
        raise InputError(f"--adapter {config.adapter}: no {ADAPTER_CONFIG} there")
    if config.server and config.adapter:
        raise InputError("--server takes no --adapter: merge it (python model.py export) and serve the result")


def token_limit(config: EvaluationConfig, prompts: list[list[int]]) -> int:
    """min(--max_new_tokens, context - longest prompt): one limit for all problems, none leaves the context."""
    context = AutoConfig.from_pretrained(find_checkpoint(config.model)).get_text_config().max_position_embeddings
    longest = max(map(len, prompts))
    if longest >= context:
        raise InputError(f"--benchmark {config.benchmark}: a prompt of {longest} tokens fills the context of {context}")
    return min(config.max_new_tokens, context - longest)


def print_table(summary: dict) -> None:
    print(f"{summary['benchmark']}: {len(summary['problems'])} problems, N {summary['num_samples']}, "
          f"seeds {summary['seeds']}, grader {summary['grader']['name']} {summary['grader']['version']}")  # fmt: skip
    for name, value in summary["metrics"].items():
        scale, digits = (1, 1) if name == "tokens" else (100, 2)
        low, high = (f"{scale * end:.{digits}f}" for end in value["interval"])
        spread = value["std_over_seeds"]
        over_seeds = "" if spread is None else f"   +- {scale * spread:.{digits}f} over seeds"
        print(f"{name:13s} {scale * value['mean']:8.{digits}f}   95 % [{low}, {high}]{over_seeds}")
    if summary["grader"]["stopped"]:
        print(f"{summary['grader']['stopped']} comparisons were stopped at a limit and count as not equal")


def main() -> None:
    disable_progress_bar()
    (config,) = FlagParser(EvaluationConfig, description=__doc__).parse_args_into_dataclasses()
    check_config(config)
    problems = load_problems(config.benchmark, need_solution=False)
    grader = make_grader(config.grader, needs_latex(problems))
    path = Path(config.output_dir) / "samples.jsonl"
    if config.grade_only and not path.is_file():
        raise InputError(f"--grade_only: no {path}")

    with open_samples(path) as (header, samples, append):
        if config.grade_only:
            check_regime(header or {}, {"benchmark_sha256": benchmark_digest(problems)}, path)
        else:
            tokenizer = load_tokenizer(config.model)
            prompts = [encode_prompt(tokenizer, EVALUATION_PROMPT, p, config.enable_thinking) for p in problems]
            limit = token_limit(config, prompts)
            if limit < config.max_new_tokens:
                print(f"--max_new_tokens {config.max_new_tokens}: the model's context leaves {limit}")
            wanted = regime(config, problems, prompts, limit)
            is_new = header is None
            header = header or wanted
            check_regime(header, wanted, path)
        present = {(item.seed, item.problem, item.sample): item for item in samples}
        every = [(s, i, n) for s in config.seeds for i in range(len(problems)) for n in range(config.num_samples)]
        missing = {s: [key[1:] for key in every if key[0] == s and key not in present] for s in config.seeds}
        count = sum(map(len, missing.values()))
        if config.grade_only and count:
            raise InputError(
                f"--grade_only: {path} lacks {count} of {len(every)} samples; sample them without --grade_only, "
                "or ask for fewer with --num_samples and --seeds"
            )
        if count:

            def write(item: Sample) -> None:
                nonlocal is_new
                if is_new:  # with the first sample, so that a server that is not there claims no folder
                    append({"regime": header})
                    is_new = False
                append(asdict(item))
                present[item.seed, item.problem, item.sample] = item

            start = time.perf_counter()
            generate_missing(config, problems, tokenizer, limit, missing, write)
            seconds = time.perf_counter() - start
            tokens = sum(present[s, *job].tokens for s, jobs in missing.items() for job in jobs)
            print(f"sampled {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second (loading included)")

    summary = {
        "benchmark": config.benchmark, "num_samples": config.num_samples, "regime": header,
        "answers_sha256": benchmark_digest(problems, "answer"),
        "versions": versions(),
        **summarise([present[key] for key in every], problems, grader.match),
        "grader": {"name": grader.name, "version": grader.version, "stopped": grader.stopped},
    }  # fmt: skip
    grader.close()
    write_atomically(path.with_name("summary.json"), json.dumps(summary, indent=1) + "\n")
    print_table(summary)


if __name__ == "__main__":
    try:
        main()
    except (InputError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
