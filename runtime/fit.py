"""What fits: problems into the context, and a step into the memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from problems import InputError, Problem
from runtime.fake_step import StepShape
from runtime.memory import MemoryPlan, Planned, available_memory, plan_memory
from runtime.ranks import gather_objects, world_size
from teacher import Prompts, student_prompt, teacher_prompt


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


def plan_run(run, problems: list[Problem], config, device: torch.device) -> MemoryPlan:
    """What a step of `run` (train.Training) takes on this rank; decides `--micro_batch_size auto`.

    Raises InputError where it cannot fit.
    """
    longest = max(problems, key=lambda problem: len(problem.problem) + len(problem.solution))
    student_tokens, teacher_tokens = prompt_lengths(run.tokenizer, longest, run.prompts)
    local_batch = -(-config.batch_size // world_size())
    sampled = min(local_batch, run.engine.batch_size) if run.engine.name == "generate" else 0
    shape = StepShape(student_tokens, teacher_tokens, config.max_new_tokens, sampled, config.micro_batch_size)
    planned = Planned(
        run.model, run.teacher, run.method, config, config.sampling, config.gradient_checkpointing, world_size()
    )
    free = available_memory(device)
    sharing = 1 if device.type == "cuda" else world_size()  # ranks on a CPU share its memory
    memory = plan_memory(planned, shape, local_batch, None if free is None else free // sharing)
    return min(gather_objects(memory), key=lambda memory: memory.micro_batch_size)
