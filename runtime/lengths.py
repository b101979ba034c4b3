"""Which prompts fit into the model's context: counted in tokens before anything is sampled, never cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from errors import InputError, some
from problems import Problem
from runtime.loading import context_length
from runtime.ranks import gather_objects, progress, rank, say, world_size
from teacher import encode_prompt, student_prompt, teacher_prompt


def count_tokens(encode: Callable[[Problem], list[int]], problems: list[Problem]) -> list[int]:
    """Tokens of each problem's prompt; ranks share the work."""
    mine = progress(range(rank(), len(problems), world_size()), desc="prompts measured", leave=False)
    parts = gather_objects([(index, len(encode(problems[index]))) for index in mine])
    return [tokens for _, tokens in sorted(pair for part in parts for pair in part)]


def check_room(flag: str, problems: list[Problem], tokens: list[int], max_new_tokens: int, context: int) -> None:
    """Raise InputError, naming the first row of the data whose prompt and response exceed the model's context."""
    for problem, count in zip(problems, tokens, strict=True):
        if count + max_new_tokens > context:
            room = f"a prompt of {count} tokens and a response of {max_new_tokens} exceed the context of {context}"
            raise InputError(f"{flag}, row {problem.row}: {room}")


def fitting_problems(
    run, data: list[Problem], held_out: list[Problem], config
) -> tuple[list[Problem], list[list[int]]]:
    """The problems of `run` (train.Training) whose longer prompt leaves room for a response, the others told by row;
    and the longest prompt of each context.

    Raises InputError where no problem fits, or one of `held_out` does not.
    """
    contexts = [partial(prompt, run.tokenizer, prompts=run.prompts) for prompt in (student_prompt, teacher_prompt)]
    context = min(map(context_length, (run.model.config, run.teacher.scorer.config)))
    limit = min(config.max_length, context)
    counts = list(zip(*(count_tokens(encode, data) for encode in contexts), strict=True))
    kept = [index for index, tokens in enumerate(counts) if max(tokens) + config.max_new_tokens <= limit]
    if not kept:
        room = f"room for {config.max_new_tokens} new tokens in {limit}"
        raise InputError(f"--data {config.data}: no prompt leaves {room}")
    left = [str(data[index].row) for index in sorted(set(range(len(data))) - set(kept))]
    note = f"; {len(left)} left out, with a response longer than {limit} tokens: row {some(left)}" if left else ""
    say(f"{len(kept)} problems of {config.data}{note}")
    longest = [encode(data[max(kept, key=lambda i: counts[i][n])]) for n, encode in enumerate(contexts)]
    template, chat = run.prompts.evaluation, run.prompts.chat
    tokens = count_tokens(lambda each: encode_prompt(run.tokenizer, template, each, True, chat), held_out)
    check_room(f"--eval_data {config.eval_data}", held_out, tokens, config.max_new_tokens, context)
    return [data[index] for index in kept], longest
