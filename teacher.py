"""The privileged teacher: the same model, shown the reference solution, scoring the student's own tokens.

Here are the prompts of both contexts (paper Appendix H) and the choice of the teacher's weights: `fixed` (the weights
before training, the paper's choice), `ema` (their running average) or `live` (the student's own).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model import adapter_disabled, lora_parameters
from problems import InputError, Problem

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
TRANSITION = (
    "\n\nAfter reading the reference solution above, make sure you truly understand the reasoning behind each step — "
    "do not copy or paraphrase it. Now, using your own words and independent reasoning, derive the same final answer "
    "to the problem above. Think step by step, explore different approaches, and don't be afraid to backtrack or "
    "reconsider if something doesn't work out:\n"
)
STUDENT_PROMPT = "Problem: {problem}" + INSTRUCTION
TEACHER_PROMPT = (
    "Problem: {problem}\n\nHere is a reference solution to this problem:\n=== Reference Solution Begin ===\n{solution}"
    "\n=== Reference Solution End ===\n" + TRANSITION + INSTRUCTION.removeprefix("\n")
)
EVALUATION_PROMPT = "{problem}" + INSTRUCTION
DIAGNOSTIC_PROMPT = (
    "You are a privileged teacher. Solve the problem and end your solution with the correct boxed answer. "
    "Problem: {problem} Privileged ground-truth final answer: {answer} Use the ground-truth answer above. "
    "Produce a complete step-by-step solution that ends with \\boxed{ answer }."
)


FIELD = re.compile(r"\{(problem|solution|answer)\}")


def fill(template: str, problem: Problem) -> str:
    """Put a problem's fields into a template, in one pass, so that braces inside the fields stay what they are."""
    return FIELD.sub(lambda match: getattr(problem, match[1]), template)


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


def student_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """x_stu: the problem alone, thinking off."""
    return encode_prompt(tokenizer, STUDENT_PROMPT, problem, enable_thinking=False)


def teacher_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """x_tch: the problem and its reference solution, thinking on."""
    return encode_prompt(tokenizer, TEACHER_PROMPT, problem, enable_thinking=True)


class Teacher:
    """Whose weights score the rollout: `fixed`, `ema` or `live`.

    With LoRA, `fixed` is the base model with the adapter off and `ema` a second set of adapter weights, so no copy of
    the model is held. Under full fine-tuning both are a frozen copy.

    Paper: "fixed teacher" = base weights. Authors: bf16 merge and unmerge of the adapter at each step, which makes
    that base drift. Here: nothing is ever merged in place.
    """

    def __init__(self, model: PreTrainedModel, kind: str = "fixed", ema_decay: float = 0.99) -> None:
        if kind not in ("fixed", "ema", "live"):
            raise InputError(f"--teacher {kind}: choose one of fixed, ema, live")
        self.model, self.kind, self.ema_decay = model, kind, ema_decay
        self.uses_lora = bool(lora_parameters(model))
        self.copy: PreTrainedModel | None = None
        self.average: list[torch.Tensor] = []
        if kind != "live" and not self.uses_lora:
            self.copy = copy.deepcopy(model).requires_grad_(False).eval()
        if kind == "ema":
            self.average = [p.detach().clone() for p in self._trained()]

    @contextmanager
    def scoring(self) -> Iterator[PreTrainedModel]:
        """Yield the model that scores, in evaluation mode and without gradients; restores the student on leaving."""
        model = self.copy if self.copy is not None else self.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if self.kind == "fixed" and self.uses_lora:
                    with adapter_disabled(model):
                        yield model
                elif self.kind == "ema":
                    self._swap(model)
                    try:
                        yield model
                    finally:
                        self._swap(model)
                else:
                    yield model
        finally:
            model.train(was_training)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: average <- decay * average + (1 - decay) * student (only for `ema`)."""
        for average, parameter in zip(self.average, self._trained(), strict=self.kind == "ema"):
            average.lerp_(parameter.detach().to(average.dtype), 1.0 - self.ema_decay)

    def _trained(self) -> list[torch.nn.Parameter]:
        return lora_parameters(self.model) or list(self.model.parameters())

    def _swap(self, model: PreTrainedModel) -> None:
        parameters = lora_parameters(model) if self.uses_lora else list(model.parameters())
        for index, parameter in enumerate(parameters):
            parameter.data, self.average[index] = self.average[index], parameter.data
