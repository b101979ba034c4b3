"""What fits: problems into the context, and a step into the memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from problems import InputError, Problem
from runtime.memory import MemoryPlan, available_memory, plan_memory
from runtime.ranks import gather_objects, world_size
from teacher import Prompts, Teacher, student_prompt, teacher_prompt


def fitting_problems(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, prompts: Prompts, context: int, config
) -> list[Problem]:
    """The problems whose longer prompt leaves room for a response; others are an error or dropped, never cut."""
    limit = min(config.max_length, context)
    kept = []
    for number, problem in enumerate(problems):
        longest = max(prompt_lengths(tokenizer, problem, prompts))
        if longest + config.max_new_tokens <= limit:
            kept.append(problem)
        elif config.long_prompts == "error":
            raise InputError(
                f"{config.data}, problem {number}: a prompt of {longest} tokens and --max_new_tokens "
                f"{config.max_new_tokens} exceed {limit} (the smaller of --max_length {config.max_length} and the "
                f"context of {context}); --long_prompts drop leaves such problems out"
            )
    if not kept:
        raise InputError(f"{config.data}: no problem fits into {limit} tokens with its response")
    return kept


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, problem: Problem, prompts: Prompts) -> tuple[int, int]:
    return len(student_prompt(tokenizer, problem, prompts)), len(teacher_prompt(tokenizer, problem, prompts))


def plan_run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher: Teacher, problems: list[Problem],
    prompts: Prompts, config, device: torch.device,
) -> MemoryPlan:  # fmt: skip
    """What a step takes on this rank; decides `--micro_batch_size auto`. Raises InputError where it cannot fit."""
    longest = max(problems, key=lambda problem: len(problem.problem) + len(problem.solution))
    student_tokens, teacher_tokens = prompt_lengths(tokenizer, longest, prompts)
    sharing = 1 if device.type == "cuda" else world_size()  # ranks on a CPU share its memory
    free = available_memory(device)
    memory = plan_memory(
        model, teacher, student_tokens=student_tokens, teacher_tokens=teacher_tokens,
        max_new_tokens=config.max_new_tokens, local_batch=-(-config.batch_size // world_size()),
        micro_batch_size=config.micro_batch_size or None, gradient_checkpointing=config.gradient_checkpointing,
        available=None if free is None else free // sharing,
    )  # fmt: skip
    return min(gather_objects(memory), key=lambda memory: memory.micro_batch_size)
