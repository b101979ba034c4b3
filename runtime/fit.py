"""What fits: problems into the context, and a step into the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from errors import InputError
from problems import Problem
from runtime.fake_step import StepShape
from runtime.memory import MemoryPlan, Planned, available_memory, plan_memory
from runtime.ranks import gather_objects, hide_bar, rank, world_size
from teacher import Prompts, encode_prompt, fill, render_prompt

LONGEST = 32  # problems that are tokenised although they fit: one of them has the longest prompt
BATCH = 256  # problems encoded together


@dataclass(frozen=True)
class Fit:
    """The problems that fit, and the tokens of the longest prompts of both contexts."""

    problems: list[Problem]
    student_tokens: int
    teacher_tokens: int


def fitting_problems(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, prompts: Prompts, context: int, config
) -> Fit:
    """The problems whose longer prompt leaves room for a response; others are an error or dropped, never cut.

    Only what may be too long is tokenised, shared over the ranks (`token_bounds` says why the rest cannot be).
    """
    limit = min(config.max_length, context)
    room = limit - config.max_new_tokens
    bounds = token_bounds(tokenizer, prompts, problems)
    doubtful = [i for i, bound in enumerate(bounds) if bound is None or bound > room]
    sure = sorted(set(range(len(problems))) - set(doubtful), key=lambda i: -bounds[i])[:LONGEST]
    lengths = count_tokens(tokenizer, prompts, problems, [*doubtful, *sure])
    too_long = {i for i in doubtful if max(lengths[i]) > room}
    if too_long and config.long_prompts == "error":
        first = min(too_long)
        raise InputError(
            f"{config.data}, problem {first}: a prompt of {max(lengths[first])} tokens and --max_new_tokens "
            f"{config.max_new_tokens} exceed {limit} (the smaller of --max_length {config.max_length} and the "
            f"context of {context}); --long_prompts drop leaves such problems out"
        )
    kept = [problem for i, problem in enumerate(problems) if i not in too_long]
    if not kept:
        raise InputError(f"{config.data}: no problem fits into {limit} tokens with its response")
    students, teachers = zip(*(pair for i, pair in lengths.items() if i not in too_long), strict=True)
    return Fit(kept, max(students), max(teachers))


def token_bounds(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, problems: list[Problem]) -> list[int | None]:
    """For each problem a number that the tokens of its longer prompt do not exceed; None where there is no such bound.

    Every token of a tokenizer of the `tokenizers` library stands for at least one byte of the normalised text: a token
    of a byte-level BPE is a string of bytes, any other one is at least a character, or a single byte of one. Where it
    puts a space in front, each part between control tokens, which have two bytes at least, may get one more. The chat
    template's bytes come on top, where it shows the user's text once and as it is; a template that does not, or a
    tokenizer of another kind, has no bound here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    message = [{"role": "user", "content": PROBE}]
    frames = [
        tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        for thinking in (prompts.student_thinking, prompts.teacher_thinking)
    ]
    if backend is None or any(frame.count(PROBE) != 1 for frame in frames):
        return [None] * len(problems)
    frame_bytes = max(len(frame.replace(PROBE, CLOSURE).encode()) for frame in frames)
    normalise = backend.normalizer.normalize_str if backend.normalizer is not None else str
    puts_space = backend.encode("x", add_special_tokens=False).tokens[:1] != ["x"]
    bounds = []
    for problem in problems:
        texts = [normalise(fill(template, problem)) for template in (prompts.student, prompts.teacher)]
        size = frame_bytes + max(len(text.encode()) for text in texts)
        bounds.append(size + size // 2 + 1 if puts_space else size)
    return bounds


PROBE = "A <b> & \"c\" 'd' \\frac{1}{2} end"  # a template that escapes, cuts or repeats changes it
CLOSURE = "</think>\n\n"  # what teacher.encode_prompt may add


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, problems: list[Problem], wanted: list[int]
) -> dict[int, tuple[int, int]]:
    """Tokens of the student's and the teacher's prompt of the wanted problems; ranks share the work, cores a batch."""
    mine = wanted[rank() :: world_size()]
    counted: dict[int, tuple[int, int]] = {}
    with tqdm(total=len(mine), desc="measuring prompts", unit="problem", disable=hide_bar()) as bar:
        for start in range(0, len(mine), BATCH):
            batch = [problems[i] for i in mine[start : start + BATCH]]
            pairs = zip(
                _lengths(tokenizer, prompts.student, batch, prompts.student_thinking),
                _lengths(tokenizer, prompts.teacher, batch, prompts.teacher_thinking),
                strict=True,
            )
            counted |= dict(zip(mine[start : start + BATCH], pairs, strict=True))
            bar.update(len(batch))
    return {i: pair for part in gather_objects(counted) for i, pair in part.items()}


def _lengths(tokenizer, template: str, problems: list[Problem], thinking: bool) -> list[int]:
    """Tokens of each prompt, together where none of them spells a control token."""
    texts, cuts = zip(*(render_prompt(tokenizer, template, problem, thinking) for problem in problems), strict=True)
    lengths = [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    return [
        len(encode_prompt(tokenizer, template, problem, thinking)) if cut in text else length
        for problem, text, cut, length in zip(problems, texts, cuts, lengths, strict=True)
    ]


def plan_run(run, fit: Fit, config, device: torch.device) -> MemoryPlan:
    """What a step of `run` (train.Training) takes on this rank; decides `--micro_batch_size auto`.

    Raises InputError where it cannot fit.
    """
    local_batch = -(-config.batch_size // world_size())
    sampled = min(local_batch, run.engine.batch_size or local_batch) if run.engine.name == "generate" else 0
    shape = StepShape(fit.student_tokens, fit.teacher_tokens, config.max_new_tokens, sampled, config.micro_batch_size)
    planned = Planned(
        run.model, run.teacher, run.method, config, config.sampling, config.gradient_checkpointing, world_size()
    )
    free = available_memory(device)
    sharing = 1 if device.type == "cuda" else world_size()  # ranks on a CPU share its memory
    memory = plan_memory(planned, shape, local_batch, None if free is None else free // sharing)
    return min(gather_objects(memory), key=lambda memory: memory.micro_batch_size)
