"""Accuracy of a model on math problems: N samples a problem, graded by the last \\boxed{}, counted by Eqs. (9)-(11).

    python evaluate.py --model Qwen/Qwen3-4B --adapter runs/qwen3-4b/checkpoint-100 --benchmark aime24.jsonl

Defaults are the paper's protocol (Section 4.1). Axes: N samples of one problem.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model import context_length, load_adapter, load_model, load_tokenizer
from problems import FlagParser, InputError, Problem, answers_match, extract_boxed, load_problems
from rollout import check_sampling, sample
from teacher import EVALUATION_PROMPT, encode_prompt


@dataclass
class EvaluationConfig:
    """Options of evaluate.py; defaults are the paper's."""

    benchmark: str = field(default="tiny:heldout", metadata={"help": "tiny:heldout, a .jsonl path or a hub name"})
    model: str = field(default="tiny", metadata={"help": "directory or hub name; `tiny` is the embedded model"})
    adapter: str | None = field(default=None, metadata={"help": "adapter directory in PEFT's format"})
    num_samples: int = field(default=12, metadata={"help": "N, samples per problem"})
    seed: int = field(default=0, metadata={"help": "independent samples per seed"})
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = field(default=0, metadata={"help": "0 is off"})
    max_new_tokens: int = 38912
    enable_thinking: bool = True
    batch_size: int = field(default=256, metadata={"help": "sequences sampled at once"})
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


@dataclass(frozen=True)
class Sample:
    """One sampled solution, as it is written to samples.jsonl."""

    problem: int  # index in the benchmark
    sample: int  # 0..N-1
    seed: int
    text: str
    tokens: int
    finish_reason: str  # "eos" or "length"


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
) -> list[Sample]:
    """Sample the (problem index, sample index) pairs of `jobs` in one batch; each pair has its own random stream."""
    prompts = [encode_prompt(tokenizer, EVALUATION_PROMPT, problems[index], enable_thinking) for index, _ in jobs]
    keys = [(seed, index, number) for index, number in jobs]
    rollout = sample(
        model, tokenizer, prompts, keys,
        temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    return [
        Sample(index, number, seed, text, len(response), "eos" if finished else "length")
        for (index, number), text, response, finished in zip(
            jobs, texts, rollout.responses, rollout.finished, strict=True
        )
    ]


def is_correct(sample_: Sample, problems: list[Problem]) -> bool:
    return answers_match(extract_boxed(sample_.text), problems[sample_.problem].answer)


def summarise(samples: list[Sample], problems: list[Problem]) -> dict[str, float]:
    """Means over problems of Eqs. (9)-(11), with the shares of answers that could be read and of samples cut short."""
    by_problem: dict[int, list[Sample]] = {}
    for item in sorted(samples, key=lambda item: (item.problem, item.sample)):
        by_problem.setdefault(item.problem, []).append(item)
    rows = []
    for items in by_problem.values():
        answers, correct = [extract_boxed(item.text) for item in items], [is_correct(item, problems) for item in items]
        rows.append((avg_at_n(correct), pass_at_n(correct), maj_at_n(answers, correct)))
    averages = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return {
        "avg": averages[0],
        "pass": averages[1],
        "maj": averages[2],
        "parseable": sum(extract_boxed(item.text) is not None for item in samples) / len(samples),
        "cut_at_limit": sum(item.finish_reason == "length" for item in samples) / len(samples),
        "mean_tokens": sum(item.tokens for item in samples) / len(samples),
    }


def main() -> None:
    (config,) = FlagParser(EvaluationConfig).parse_args_into_dataclasses()
    if config.num_samples < 1 or config.batch_size < 1:
        raise InputError("--num_samples and --batch_size must be at least 1")
    check_sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
    problems = load_problems(config.benchmark, need_solution=False)
    model, tokenizer = load_model(config.model, config.dtype, device=config.device), load_tokenizer(config.model)
    if config.adapter:
        load_adapter(model, config.adapter)
    limit = min(config.max_new_tokens, context_length(model) - 128)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    jobs = [(index, number) for index in range(len(problems)) for number in range(config.num_samples)]
    samples: list[Sample] = []
    with (output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for start in tqdm(range(0, len(jobs), config.batch_size), desc="sampling", unit="batch"):
            batch = sample_solutions(
                model, tokenizer, problems, jobs[start : start + config.batch_size], seed=config.seed,
                temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_new_tokens=limit,
                enable_thinking=config.enable_thinking,
            )  # fmt: skip
            file.writelines(json.dumps(asdict(item)) + "\n" for item in batch)
            samples += batch
    summary = summarise(samples, problems)
    (output / "summary.json").write_text(json.dumps({"config": asdict(config), **summary}, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name:14s} {value:8.4f}" if name != "mean_tokens" else f"{name:14s} {value:8.1f}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
