"""The branch-viability diagnostic (paper Section 3.2, Appendices A and B): where can the teacher's tokens be trusted?

    python diagnose.py                                     the embedded model, a few minutes on two cores
    python diagnose.py --preset qwen3-4b                   the paper's protocol

At uncertain positions of a student's right solution, the teacher's top tokens are forced one by one and the student
goes on alone: does it still get there? Phases A to F each leave a JSONL file in the run folder and take up what they
find there, so --resume goes on after an interruption; G, the statistics, is experiments/diagnose_report.py.

Beyond the paper, the same positions also get the student's own top tokens, and nothing at all (the student simply goes
on), with equal budgets: what a prefix has already cost is not the teacher's fault.

Axes: T response tokens, V vocabulary, K children of a candidate, N rollouts of a child, M dropout passes, C candidates.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from model import context_length, eos_ids, load_model, load_tokenizer, response_hidden
from problems import InputError, Problem, extract_boxed, load_problems
from rollout import Sampling
from runtime.engines import Engine, choose_engine, make_engine
from runtime.flags import FlagParser, option, run_script
from runtime.grading import answers_match, make_grader
from runtime.run_folder import claimed, record_run, run_folder, write_atomically
from teacher import DIAGNOSTIC_PROMPT, encode_prompt, student_prompt
from viability import LABELS, LabelRule, label_children, table1

# Streams of random numbers, told apart by the second entry of their key (rollout.py); train.py uses 1 to 3.
PICK_STREAM, SPINE_STREAM, DROPOUT_STREAM, CONTINUATION_STREAM = 11, 12, 13, 14


@dataclass
class DiagnoseConfig(LabelRule):
    """Options of diagnose.py. Defaults are the paper's (Appendices A, B); presets change what they name."""

    preset: str | None = field(default=None, metadata={"help": "tiny (default without --model) or qwen3-4b"})
    model: str = field(default="tiny", metadata={"help": "directory or hub name; `tiny` is the embedded model"})
    data: list[str] = field(
        default_factory=lambda: ["tiny:heldout"],
        metadata={"help": "one or more sources: .jsonl, hub name, tiny:heldout"},
    )
    num_problems: list[int] = field(
        default_factory=lambda: [84], metadata={"help": "problems drawn from each source, without replacement"}
    )
    output_dir: str | None = field(default=None, metadata={"help": "run folder; default runs/diagnose-PRESET"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in the folder, if there is one"})
    seed: int = 42
    context: int = field(default=32768, metadata={"help": "tokens of prompt, prefix and continuation together"})
    spine_tokens: int = field(default=16384, metadata={"help": "A: tokens of a spine"})
    fallback_temperature: float = field(default=0.7, metadata={"help": "A: used where the greedy spine has no box"})
    incorrect_spines: bool = field(default=False, metadata={"help": "B: also wrong spines, reported apart"})
    top_valid: int = field(default=16, metadata={"help": "B: teacher's top valid tokens in h_trunc"})
    candidates: int = field(default=5, metadata={"help": "C: at most this many per problem"})
    min_p2: float = field(default=0.02, metadata={"help": "C: least teacher probability of the second token"})
    min_ratio: float = field(default=0.10, metadata={"help": "C: least p2 / p1"})
    min_spacing: int = field(default=64, metadata={"help": "C: least distance of two candidates, in tokens"})
    dropout_passes: int = field(default=5, metadata={"help": "D: M"})
    dropout: float = field(default=0.1, metadata={"help": "D: p"})
    dropout_layers: int = field(default=4, metadata={"help": "D: the last layers, whose outputs are dropped out"})
    temperature: float = field(default=1.0, metadata={"help": "E: of the continuations"})
    top_p: float = field(default=0.95, metadata={"help": "E: of the continuations (and of the fallback in A)"})
    bootstraps: int = field(default=2000, metadata={"help": "G: resamples of whole problems"})
    bootstrap_seed: int = field(default=0, metadata={"help": "G: seed of the resamples"})
    engine: str = field(default="generate", metadata={"help": "generate, or continuous: continuous batching (GPU)"})
    batch_size: int = field(default=32, metadata={"help": "sequences sampled between two writes to the run folder"})
    grader: str = field(default="auto", metadata={"help": "math-verify, exact, or auto: by the problems' answers"})
    device: str = "auto"
    dtype: str = field(default="auto", metadata={"help": "auto (bfloat16 on a GPU, else float32) or its name"})


PRESETS: dict[str, dict] = {
    # A solution has about 35 tokens with a choice every 7 to 8: spacing 4 lets each choice be a candidate.
    "tiny": {
        "num_problems": [300], "children": 2, "min_spacing": 2, "context": 96, "spine_tokens": 72, "batch_size": 500,
    },
    # Continuous batching holds as many rows as fit at a time: the larger the batch, the rarer its thin end.
    "qwen3-4b": {
        "model": "Qwen/Qwen3-4B", "num_problems": [24, 30, 30], "engine": "continuous", "batch_size": 512,
        "data": ["HuggingFaceH4/MATH-500:test", "HuggingFaceH4/aime_2024:train", "yentinglin/aime_2025:train"],
    },
}  # fmt: skip
ENGINES = {"generate": sample, "continuous": sample_continuous}
# What may differ when a run is taken up again: how it is computed, and phases F and G, which are always done anew.
FREE_ON_RESUME = {
    "resume", "output_dir", "device", "engine", "batch_size", "bootstraps", "bootstrap_seed",
    "diversity_viability", "diversity_children", "uncertain_viability",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Phase A


def spines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    config: DiagnoseConfig,
    path: Path,
    match: Callable = answers_match,
) -> list[dict]:
    """Greedy solutions in the student's context; where one boxes no answer, another at the fallback temperature."""

    def solve(indices: list[int], temperature: float) -> dict[int, dict]:
        prompts = [student_prompt(tokenizer, problems[i]) for i in indices]
        rollout = ENGINES[config.engine](
            model, tokenizer, prompts, [(config.seed, SPINE_STREAM, i) for i in indices],
            temperature=temperature, top_p=config.top_p, top_k=0,
            max_new_tokens=config.spine_tokens,
        )  # fmt: skip
        texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        rows = zip(indices, texts, rollout.responses, strict=True)
        return {
            i: {"problem": i, "temperature": temperature, "answer": extract_boxed(text), "text": text, "ids": ids,
                "correct": match(extract_boxed(text), problems[i].answer)}
            for i, text, ids in rows
        }  # fmt: skip

    def work(jobs: list[tuple]) -> list[dict]:
        indices = [i for (i,) in jobs]
        rows = solve(indices, 0.0)
        unboxed = [i for i in indices if rows[i]["answer"] is None]
        if unboxed:
            rows |= solve(unboxed, config.fallback_temperature)
        return [rows[i] for i in indices]

    return run_phase(path, ("problem",), [(i,) for i in range(len(problems))], work, config.batch_size)


# ---------------------------------------------------------------------------------------------------------------
# Phase B


def valid_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[V] True for tokens that can be an alternative step in a solution. Left out, since forcing one tests nothing:

    - ids behind the tokenizer's last (padding of the embedding matrix), special tokens and every EOS;
    - added tokens in angle brackets (`<think>`, `<tool_call>`): markup of the chat, not of the solution;
    - junk: text without a printing character (spaces, line breaks, controls), or a broken piece of a UTF-8 character.
    """
    V = model.get_output_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *eos_ids(model, tokenizer)}
    added = tokenizer.get_added_vocab()
    markup = {i for text, i in added.items() if text.strip().startswith("<") and text.strip().endswith(">")}
    valid_V = torch.zeros(V, dtype=torch.bool)
    for i in range(min(V, len(tokenizer))):
        text = tokenizer.decode([i])
        is_junk = "\ufffd" in text or not any(c.isprintable() and not c.isspace() for c in text)
        valid_V[i] = not is_junk and i not in special and i not in markup
    return valid_V


def truncated_entropy(probability_TV: Tensor, valid_V: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """h_trunc = -sum_j q_j log q_j in nats, q the `top` most likely valid tokens renormalised.

    Returns h [T] with those tokens' probabilities in the full vocabulary and their ids, both [T, top], likeliest first.
    """
    top_TK, ids_TK = probability_TV.masked_fill(~valid_V, 0.0).topk(min(top, int(valid_V.sum())), dim=-1)
    q_TK = top_TK / top_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.special.entr(q_TK).sum(dim=-1), top_TK, ids_TK


POSITIONS_AT_ONCE = 256  # bounds the memory of [T, V] probabilities


@torch.no_grad()
def teacher_pass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    spine_rows: list[dict],
    config: DiagnoseConfig,
    path: Path,
) -> list[dict]:
    """Score each kept spine in both contexts: h_trunc and the teacher's top valid tokens, and the student's own.

    The plausibility test of phase C uses the first two probabilities. Paper: silent on whether they are renormalised;
    here they are those of the full vocabulary.
    """
    model.eval()
    valid_V = valid_tokens(model, tokenizer).to(model.device)
    kept = {row["problem"]: row for row in spine_rows if row["correct"] or config.incorrect_spines}
    keep = config.children

    def score(prompt: list[int], ids: list[int]) -> tuple[list[float], list[list[float]], list[list[int]]]:
        hidden_TD = response_hidden(model, [prompt], [ids])[0]
        columns: tuple[list, list, list] = ([], [], [])
        for part_TD in hidden_TD.split(POSITIONS_AT_ONCE):
            probability_TV = model.get_output_embeddings()(part_TD).float().softmax(dim=-1)
            h_T, p_TK, ids_TK = truncated_entropy(probability_TV, valid_V, config.top_valid)
            for column, tensor in zip(columns, (h_T, p_TK[:, :keep], ids_TK[:, :keep]), strict=True):
                column.extend(tensor.tolist())
        return columns

    def work(jobs: list[tuple]) -> list[dict]:
        ((i,),) = jobs
        h, p, teacher_ids = score(diagnostic_prompt(tokenizer, problems[i]), kept[i]["ids"])
        _, _, student_ids = score(student_prompt(tokenizer, problems[i]), kept[i]["ids"])
        return [{"problem": i, "h_trunc": h, "teacher_p": p, "teacher_ids": teacher_ids, "student_ids": student_ids}]

    return run_phase(path, ("problem",), [(i,) for i in kept], work, 1)


def diagnostic_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    return encode_prompt(tokenizer, DIAGNOSTIC_PROMPT, problem, enable_thinking=True)


# ---------------------------------------------------------------------------------------------------------------
# Phase C


def first_boxed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """The smallest t such that the first t tokens contain `\\boxed`; len(ids) + 1 where none do."""
    return bisect_left(range(len(ids) + 1), True, key=lambda t: "\\boxed" in tokenizer.decode(ids[:t]))


def pick_positions(h: list[float], p: list[list[float]], end: int, config: DiagnoseConfig) -> list[int]:
    """Positions before `end` of highest h_trunc that pass p2 >= min_p2 and p2/p1 >= min_ratio, min_spacing apart."""
    picked: list[int] = []
    for t in sorted(range(min(end, len(h))), key=lambda t: (-h[t], t)):
        p1, p2 = p[t][:2]
        is_plausible = p2 >= config.min_p2 and p2 >= config.min_ratio * p1
        if is_plausible and all(abs(t - other) >= config.min_spacing for other in picked):
            picked.append(t)
        if len(picked) == config.candidates:
            break
    return sorted(picked)


def candidates(
    tokenizer: PreTrainedTokenizerBase,
    spine_rows: list[dict],
    teacher_rows: list[dict],
    config: DiagnoseConfig,
    path: Path,
) -> list[dict]:
    """The most uncertain positions of each spine, none behind a `\\boxed`, with the tokens to force there."""
    spine_of = {row["problem"]: row for row in spine_rows}
    teacher_of = {row["problem"]: row for row in teacher_rows}

    def work(jobs: list[tuple]) -> list[dict]:
        ((i,),) = jobs
        row, spine = teacher_of[i], spine_of[i]
        end = first_boxed(tokenizer, spine["ids"])
        found = [
            {"position": t, "length": len(spine["ids"]), "h_trunc": row["h_trunc"][t], "teacher_p": row["teacher_p"][t],
             "teacher": row["teacher_ids"][t], "student": row["student_ids"][t], "spine_correct": spine["correct"]}
            for t in pick_positions(row["h_trunc"], row["teacher_p"], end, config)
        ]  # fmt: skip
        return [{"problem": i, "candidates": found}]

    return run_phase(path, ("problem",), [(i,) for i in teacher_of], work, 1)


# ---------------------------------------------------------------------------------------------------------------
# Phase D


@contextmanager
def dropout_hooks(model: PreTrainedModel, layers: int, p: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, the outputs of the last `layers` blocks pass through dropout; the hooks are removed in every case."""

    def drop(module: torch.nn.Module, inputs: tuple, output):
        hidden = output[0] if isinstance(output, tuple) else output
        kept = torch.rand(hidden.shape, generator=generator, device=hidden.device) >= p
        dropped = hidden * kept / (1.0 - p)
        return (dropped.to(hidden.dtype), *output[1:]) if isinstance(output, tuple) else dropped.to(hidden.dtype)

    handles = []
    try:
        handles += [layer.register_forward_hook(drop) for layer in model.get_decoder().layers[-layers:]]
        yield
    finally:
        for handle in handles:
            handle.remove()


def uncertainty(probability_MCV: Tensor) -> dict[str, Tensor]:
    """Scores of M dropout passes at C candidates, each [C], in nats.

    H_full = H(mean_m p^m);  MI = H(mean_m p^m) - mean_m H(p^m);
    kappa = sum_j mu_j (1 - mu_j) / sum_j var_j - 1: the precision of the Dirichlet whose marginal variances
    mu_j (1 - mu_j) / (kappa + 1) sum to the measured ones (unbiased over m); log kappa = log max(kappa, 1e-6).
    Paper: "moment matching" only; summing over j weights each entry by its own size.
    """
    mean_CV = probability_MCV.mean(dim=0)
    H_full = torch.special.entr(mean_CV).sum(dim=-1)
    H_each = torch.special.entr(probability_MCV).sum(dim=-1).mean(dim=0)
    variance = probability_MCV.var(dim=0).sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    kappa = (mean_CV * (1.0 - mean_CV)).sum(dim=-1) / variance - 1.0
    return {"entropy": H_full, "mutual_information": H_full - H_each, "log_kappa": kappa.clamp(min=1e-6).log()}


@torch.no_grad()
def dropout_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    spine_rows: list[dict],
    candidate_rows: list[dict],
    config: DiagnoseConfig,
    path: Path,
) -> list[dict]:
    """MC-dropout scores of the teacher at each candidate: M passes of a problem in one batch and stream."""
    model.eval()
    spine_of = {row["problem"]: row["ids"] for row in spine_rows}
    positions_of = {row["problem"]: [c["position"] for c in row["candidates"]] for row in candidate_rows}

    def work(jobs: list[tuple]) -> list[dict]:
        ((i,),) = jobs
        positions = positions_of[i]
        prompt, ids = diagnostic_prompt(tokenizer, problems[i]), spine_of[i][: max(positions) + 1]
        M, key = config.dropout_passes, np.random.SeedSequence((config.seed, DROPOUT_STREAM, i))
        generator = torch.Generator(model.device).manual_seed(int(key.generate_state(1)[0]))
        with dropout_hooks(model, config.dropout_layers, config.dropout, generator):
            hidden_MCD = response_hidden(model, [prompt] * M, [ids] * M)[:, positions]
        probability_MCV = model.get_output_embeddings()(hidden_MCD).float().softmax(dim=-1)
        scores = {name: score_C.tolist() for name, score_C in uncertainty(probability_MCV).items()}
        return [{"problem": i, "positions": positions, **scores}]

    return run_phase(path, ("problem",), [(i,) for i, found in positions_of.items() if found], work, 1)


# ---------------------------------------------------------------------------------------------------------------
# Phase E


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    spine_rows: list[dict],
    candidate_rows: list[dict],
    config: DiagnoseConfig,
    path: Path,
    match: Callable = answers_match,
) -> list[dict]:
    """Student continuations behind each forced token, and as many with none forced (`token` null), for all arms.

    A token that both teacher and student propose is sampled once and counts in both arms: the same experiment. A row
    may use the context up to its last token, whatever it is batched with.
    """
    spine_of = {row["problem"]: row["ids"] for row in spine_rows}
    prompt_of = {row["problem"]: student_prompt(tokenizer, problems[row["problem"]]) for row in candidate_rows}
    jobs = []
    for row in candidate_rows:
        for c in row["candidates"]:
            forced = dict.fromkeys([*c["teacher"], *c["student"]])
            jobs += [(row["problem"], c["position"], token, n) for token in forced for n in range(config.rollouts)]
            jobs += [(row["problem"], c["position"], None, n) for n in range(config.children * config.rollouts)]

    def prefix(job: tuple) -> tuple[list[int], list[int]]:
        problem, position, token, _ = job
        return prompt_of[problem], spine_of[problem][:position] + ([] if token is None else [token])

    def work(jobs: list[tuple]) -> list[dict]:
        pieces = [prefix(job) for job in jobs]
        prompts = [prompt + start for prompt, start in pieces]
        keys = [(config.seed, CONTINUATION_STREAM, i, t, 0 if v is None else v + 1, n) for i, t, v, n in jobs]
        rooms = [config.context - len(prompt) for prompt in prompts]
        rollout = ENGINES[config.engine](
            model, tokenizer, prompts, keys,
            temperature=config.temperature, top_p=config.top_p, top_k=0, max_new_tokens=max(rooms),
        )  # fmt: skip
        responses = [response[:room] for response, room in zip(rollout.responses, rooms, strict=True)]
        texts = tokenizer.batch_decode(
            [start + response for (_, start), response in zip(pieces, responses, strict=True)], skip_special_tokens=True
        )
        return [
            {"problem": i, "position": t, "token": v, "sample": n, "answer": extract_boxed(text),
             "correct": match(extract_boxed(text), problems[i].answer), "tokens": len(response), "text": text}
            for (i, t, v, n), text, response in zip(jobs, texts, responses, strict=True)
        ]  # fmt: skip

    jobs.sort(key=lambda job: sum(map(len, prefix(job))))  # so that little is padded
    return run_phase(path, ("problem", "position", "token", "sample"), jobs, work, config.batch_size)


# ---------------------------------------------------------------------------------------------------------------
# Phase F


def labels(
    candidate_rows: list[dict], dropout_rows: list[dict], continuation_rows: list[dict], config: DiagnoseConfig
) -> list[dict]:
    """One row per candidate: its scores, and for each arm the viability of every child and the label by the same rule.

    The unforced arm has no children: its rollouts, in their order, form as many groups of the same size.
    """
    correct: dict[tuple, list[bool]] = {}
    for row in sorted(continuation_rows, key=lambda row: row["sample"]):
        correct.setdefault((row["problem"], row["position"], row["token"]), []).append(row["correct"])
    scores = {
        (row["problem"], t): {name: row[name][c] for name in ("entropy", "mutual_information", "log_kappa")}
        for row in dropout_rows
        for c, t in enumerate(row["positions"])
    }
    rows = []
    for problem, c in ((row["problem"], c) for row in candidate_rows for c in row["candidates"]):
        at = (problem, c["position"])
        free_KN = np.reshape(correct[*at, None], (config.children, config.rollouts))
        viability = {arm: [float(np.mean(correct[*at, v])) for v in c[arm]] for arm in ("teacher", "student")}
        viability["unforced"] = free_KN.mean(axis=1).tolist()
        label = {arm: LABELS[int(label_children(np.array(values), config))] for arm, values in viability.items()}
        rows.append({"problem": problem, **c, **scores[at], "viability": viability, "label": label})
    return rows


# ---------------------------------------------------------------------------------------------------------------
# The run


def run_phase(
    path: Path, fields: tuple[str, ...], jobs: list[tuple], work: Callable[[list[tuple]], list[dict]], batch_size: int
) -> list[dict]:
    """The rows of a phase in the order of its jobs: those in its file, and the others, computed and appended by batch.

    A job is the tuple of the values that its row has under `fields`; `work` turns jobs into one row each.
    """
    done = {tuple(row[name] for name in fields): row for row in read_rows(path)}
    left = [job for job in jobs if job not in done]
    with path.open("a", encoding="utf-8") as file:
        for start in tqdm(range(0, len(left), batch_size), desc=path.stem, disable=not left):
            batch = left[start : start + batch_size]
            try:
                rows = work(batch)
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{path}: out of GPU memory with {len(batch)} of its rows at once: lower --batch_size, use "
                    "--engine continuous or a larger GPU; --resume goes on behind the finished rows"
                ) from None
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            done |= dict(zip(batch, rows, strict=True))
    return [done[job] for job in jobs]


def read_rows(path: Path) -> list[dict]:
    """Rows of a phase's file, none if it is not there yet. A last line torn by an interruption is cut off."""
    if not path.is_file():
        return []
    *whole, torn = path.read_text(encoding="utf-8").split("\n")
    if torn:
        write_atomically(path, "".join(line + "\n" for line in whole))
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not a file of this program ({error}); remove it to repeat the phase") from None


def parse_config(arguments: list[str] | None = None) -> DiagnoseConfig:
    """Flags over the preset over the paper's defaults; without --model and --preset the preset is `tiny`."""
    config = FlagParser(DiagnoseConfig, description=__doc__).parse_with_presets(PRESETS, arguments)
    check_config(config)
    return config


def check_config(config: DiagnoseConfig) -> None:
    """Raise InputError, naming the flag, for values that cannot work."""
    check_sampling(config.temperature, config.top_p, 0, config.spine_tokens)
    at_least = {
        "children": 2, "rollouts": 1, "candidates": 1, "min_spacing": 1, "dropout_passes": 2, "dropout_layers": 1,
        "bootstraps": 1, "batch_size": 1, "diversity_children": 1, "context": 2,
    }  # fmt: skip
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least {least}")
    if config.engine not in ENGINES:
        raise InputError(f"--engine {config.engine}: choose one of {', '.join(ENGINES)}")
    for name in ("min_p2", "min_ratio", "dropout", "diversity_viability", "uncertain_viability"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise InputError(f"--{name} {getattr(config, name)}: must lie in [0, 1]")
    if config.top_valid < config.children:
        raise InputError(f"--top_valid {config.top_valid}: must be at least --children, here {config.children}")
    if not 0.0 < config.dropout < 1.0:
        raise InputError(f"--dropout {config.dropout}: must lie strictly between 0 and 1")
    if not config.fallback_temperature > 0.0:
        raise InputError(f"--fallback_temperature {config.fallback_temperature}: must be positive")
    if len(config.data) != len(config.num_problems):
        raise InputError("--num_problems needs one number for each source of --data")


def draw_problems(config: DiagnoseConfig) -> list[Problem]:
    """`num_problems` from each source, without replacement, a function of the seed and the source's place in --data."""
    drawn = []
    for place, (source, count) in enumerate(zip(config.data, config.num_problems, strict=True)):
        problems = load_problems(source, need_solution=False)
        if not 1 <= count <= len(problems):
            raise InputError(f"--num_problems {count}: {source} has {len(problems)} problems")
        key = np.random.SeedSequence((config.seed, PICK_STREAM, place))
        drawn += [problems[i] for i in np.random.default_rng(key).choice(len(problems), count, replace=False)]
    return drawn


def main() -> None:
    disable_progress_bar()  # of loading weights
    config = parse_config()
    problems = draw_problems(config)
    grader = make_grader(config.grader, needs_latex(problems))
    config.grader = f"{grader.name} {grader.version}"  # what graded the rows of the run; checked on resuming
    model, tokenizer = load_model(config.model, config.dtype, device=config.device), load_tokenizer(config.model)
    if config.context > context_length(model):
        raise InputError(f"--context {config.context}: the model's is {context_length(model)}")
    longest = max(len(prompt(tokenizer, p)) for p in problems for prompt in (student_prompt, diagnostic_prompt))
    if longest + config.spine_tokens >= config.context:
        raise InputError(
            f"--context {config.context}: no room behind a prompt of {longest} and {config.spine_tokens} spine tokens"
        )
    run = Path(config.output_dir or f"runs/diagnose-{config.preset or Path(config.model).name}")
    open_run(run, asdict(config), FREE_ON_RESUME, config.resume, {})
    common = model, tokenizer, problems
    spine_rows = spines(*common, config, run / "A_spines.jsonl", grader.match)
    teacher_rows = teacher_pass(*common, spine_rows, config, run / "B_teacher.jsonl")
    candidate_rows = candidates(tokenizer, spine_rows, teacher_rows, config, run / "C_candidates.jsonl")
    dropout_rows = dropout_scores(*common, spine_rows, candidate_rows, config, run / "D_dropout.jsonl")
    continuation_rows = continuations(
        *common, spine_rows, candidate_rows, config, run / "E_continuations.jsonl", grader.match
    )
    grader.close()
    rows = labels(candidate_rows, dropout_rows, continuation_rows, config)
    write_atomically(run / "F_labels.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    right = sum(row["correct"] for row in spine_rows)
    print(f"{len(spine_rows)} problems, {right} spines right, {len(continuation_rows)} continuations, "
          f"grader {config.grader}, {grader.stopped} comparisons stopped at a limit")  # fmt: skip
    print(report(rows, run, config, config.bootstraps, config.bootstrap_seed))


if __name__ == "__main__":
    try:
        main()
    except (InputError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
