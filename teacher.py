"""The privileged teacher: the same model, shown the reference solution, scoring the student's own tokens.

Here are the prompts of both contexts (paper Appendix H) and the choice of the teacher's weights: `fixed` (the weights
before training, the paper's choice), `ema` (their running average) or `live` (the student's own).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model import adapter_disabled, lora_parameters
from problems import InputError, Problem

# ---------------------------------------------------------------------------------------------------------------
# The prompts of both contexts, quoted from the paper: single user turn, no system message of ours

STUDENT_PROMPT = "Problem: {problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
TEACHER_PROMPT = (
    "Problem: {problem}\n\nHere is a reference solution to this problem:\n=== Reference Solution Begin ===\n{solution}"
    "\n=== Reference Solution End ===\n\n\nAfter reading the reference solution above, make sure you truly understand "
    "the reasoning behind each step — do not copy or paraphrase it. Now, using your own words and independent "
    "reasoning, derive the same final answer to the problem above. Think step by step, explore different approaches, "
    "and don't be afraid to backtrack or reconsider if something doesn't work out:\n\nPlease reason step by step, and "
    "put your final answer within \\boxed{}."
)
EVALUATION_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
DIAGNOSTIC_PROMPT = (
    "You are a privileged teacher. Solve the problem and end your solution with the correct boxed answer. "
    "Problem: {problem} Privileged ground-truth final answer: {answer} Use the ground-truth answer above. "
    "Produce a complete step-by-step solution that ends with \\boxed{ answer }."
)
FIELD = re.compile(r"\{(problem|solution|answer)\}")


def student_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """x_stu: the problem alone, thinking off."""
    return encode_prompt(tokenizer, STUDENT_PROMPT, problem, enable_thinking=False)


def teacher_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """x_tch: the problem and its reference solution, thinking on."""
    return encode_prompt(tokenizer, TEACHER_PROMPT, problem, enable_thinking=True)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, problem: Problem, enable_thinking: bool
) -> list[int]:
    """Token ids of one user turn in the model's chat template, ready for the response to follow.

    Think-closure: with thinking off, a template that opens `<think>` regardless is closed again, at the end of the
    prompt only. The template alone decides on a BOS: the tokenizer must not add a second one.
    """
    if tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template, which the prompts need")
    messages = [{"role": "user", "content": fill(template, problem)}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
    )
    if not enable_thinking and text.rstrip().endswith("<think>"):
        text += "</think>\n\n"
    return tokenizer.encode(text, add_special_tokens=False)


def fill(template: str, problem: Problem) -> str:
    """Put a problem's fields into a template, in one pass, so that braces inside the fields stay what they are."""
    return FIELD.sub(lambda match: getattr(problem, match[1]), template)


# ---------------------------------------------------------------------------------------------------------------
# Whose weights score


class Teacher:
    """Whose weights score the rollout: `fixed`, `ema` or `live`.

    | weights | with LoRA | all weights trained |
    |---|---|---|
    | fixed | the model with its adapter switched off | a frozen copy |
    | ema | the model with its adapter's running average | a frozen copy that follows the average |
    | live | the model | the model |

    Paper: "fixed teacher" = base weights. Authors: bf16 merge and unmerge of the adapter at each step, which makes
    that base drift. Here: nothing is ever merged in place.
    """

    def __init__(self, model: PreTrainedModel, kind: str = "fixed", ema_decay: float = 0.99) -> None:
        if kind not in ("fixed", "ema", "live"):
            raise InputError(f"--teacher {kind}: choose one of fixed, ema, live")
        self.model, self.kind, self.ema_decay = model, kind, ema_decay
        self.trained = lora_parameters(model) or list(model.parameters())
        self.copy: PreTrainedModel | None = None
        self.average: list[Tensor] = []  # for `ema`: one tensor for each of `trained`
        if kind != "live" and not lora_parameters(model):
            self.copy = copy.deepcopy(model).requires_grad_(False).eval()
        if kind == "ema":
            self.average = (
                [p.detach().clone() for p in self.trained] if self.copy is None else list(self.copy.parameters())
            )

    @contextmanager
    def scoring(self) -> Iterator[PreTrainedModel]:
        """Yield the model that scores, in evaluation mode and without gradients; restores the student on leaving."""
        if self.copy is not None or self.kind == "live":
            weights = nullcontext()
        else:
            weights = adapter_disabled(self.model) if self.kind == "fixed" else self._averaged()
        model, was_training = self.copy or self.model, self.model.training
        model.eval()
        try:
            with torch.no_grad(), weights:
                yield model
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: average <- decay * average + (1 - decay) * student (only for `ema`)."""
        for average, parameter in zip(self.average, self.trained, strict=self.kind == "ema"):
            average.lerp_(parameter.detach().to(average.dtype), 1.0 - self.ema_decay)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the adapter holds its running average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self.trained):
            parameter.data, self.average[index] = self.average[index], parameter.data
