"""The privileged teacher: the same model, shown the reference solution, scoring the student's own tokens.

Here are the prompts of both contexts (paper Appendix H) and the choice of the teacher's weights: `fixed` (the weights
before training, the paper's choice), `ema` (their running average) or `live` (the student's own).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errors import InputError
from model import adapter_disabled, lora_parameters, trained_parameters
from problems import SURROGATE, Problem

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


@dataclass(frozen=True)
class Prompts:
    """The templates, and whether the two contexts of training think; the paper's by default."""

    student: str = STUDENT_PROMPT
    teacher: str = TEACHER_PROMPT
    evaluation: str = EVALUATION_PROMPT
    diagnostic: str = DIAGNOSTIC_PROMPT
    student_thinking: bool = False
    teacher_thinking: bool = True


PAPER_PROMPTS = Prompts()
# Fields that a template must show, and fields that it must not: only the teachers may see solution and answer.
REQUIRED = {
    "student": {"problem"},
    "teacher": {"problem"},
    "evaluation": {"problem"},
    "diagnostic": {"problem", "answer"},
}
FORBIDDEN = {"student": {"solution", "answer"}, "evaluation": {"solution", "answer"}}


def load_prompts(path: str | None) -> Prompts:
    """The paper's templates, or those that a JSON file puts in their place: {"student": "... {problem} ...", ...}.

    Fields are {problem}, {solution} and {answer}; any other brace is text. Raises InputError, naming file and template.
    """
    if path is None:
        return PAPER_PROMPTS
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {path}: cannot be read as JSON ({error})") from None
    if not isinstance(given, dict) or not given or not given.keys() <= REQUIRED.keys():
        raise InputError(f"--prompts {path}: expected an object with some of {', '.join(REQUIRED)}")
    for name, template in given.items():
        if not isinstance(template, str):
            raise InputError(f"--prompts {path}, {name}: must be a text")
        if SURROGATE.search(template):
            raise InputError(f"--prompts {path}, {name}: holds half of a surrogate pair, which is no text")
        shown = set(FIELD.findall(template))
        if missing := REQUIRED[name] - shown:
            raise InputError(f"--prompts {path}, {name}: {{{min(missing)}}} is missing")
        if leaked := FORBIDDEN.get(name, set()) & shown:
            raise InputError(f"--prompts {path}, {name}: must not show {{{min(leaked)}}}")
    return replace(PAPER_PROMPTS, **given)


def student_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, prompts: Prompts = PAPER_PROMPTS) -> list[int]:
    """x_stu: the problem alone, thinking off by default."""
    return encode_prompt(tokenizer, prompts.student, problem, prompts.student_thinking)


def teacher_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, prompts: Prompts = PAPER_PROMPTS) -> list[int]:
    """x_tch: the problem and its reference solution, thinking on by default."""
    return encode_prompt(tokenizer, prompts.teacher, problem, prompts.teacher_thinking)


REFERENCES = ("own", "other", "none", "answer")


def choose_reference(
    kind: str, problems: list[Problem], prompts: Prompts, draw: np.random.Generator
) -> tuple[list[Problem], Prompts]:
    """What the teacher is shown: problems with the reference in place of their solution, and the prompts to use.

    `own` is the paper's. `other`: the solution of another problem, each used once, drawn as one cycle through all.
    `answer`: the final answer alone. `none`: the student's prompt, in the teacher's thinking mode. Problem and answer
    stay what they are, so neither the student's context nor grading changes.
    """
    if kind not in REFERENCES:
        raise InputError(f"--reference {kind}: choose one of {', '.join(REFERENCES)}")
    references = [problem.solution for problem in problems]
    if kind == "other":
        if len(problems) < 2:
            raise InputError("--reference other: there is only one problem")
        cycle = draw.permutation(len(problems))
        for here, there in zip(cycle, np.roll(cycle, 1), strict=True):
            references[here] = problems[there].solution
    elif kind == "answer":
        references = [problem.answer for problem in problems]
        if "" in references:
            raise InputError(f"--reference answer: problem {references.index('')} has no answer")
    elif kind == "none":
        references = [""] * len(problems)
        prompts = replace(prompts, teacher=prompts.student)
    shown = [replace(problem, solution=text) for problem, text in zip(problems, references, strict=True)]
    return shown, prompts


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, problem: Problem, enable_thinking: bool
) -> list[int]:
    """Token ids of one user turn in the model's chat template, ready for the response to follow.

    The template alone decides on a BOS: the tokenizer must not add a second one. A control token that the problem
    spells stays text. Raises InputError for a template that is missing or fails.
    """
    text, cut = render_prompt(tokenizer, template, problem, enable_thinking)
    ids = [token for part in text.split(cut) for token in tokenizer.encode(part, add_special_tokens=False)]
    if cut in text:  # with the cut and without, the ids must read the same
        whole = tokenizer.encode(text.replace(cut, ""), add_special_tokens=False)
        if tokenizer.decode(ids) != tokenizer.decode(whole):
            where = f"in the problem {problem.problem[:80]!r}"
            raise InputError(f"{tokenizer.name_or_path}: cannot encode a control token as text, {where}")
    return ids


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, problem: Problem, enable_thinking: bool
) -> tuple[str, str]:
    """The turn's text, and the character at which it is cut before encoding, if it occurs.

    Think-closure: with thinking off, a template that opens `<think>` regardless is closed again, at the end of the
    prompt only.
    """
    if tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template, which the prompts need")
    content, cut = cut_control_tokens(tokenizer, fill(template, problem))
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True,
            enable_thinking=enable_thinking,
        )  # fmt: skip
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(
            f"{tokenizer.name_or_path}: the chat template fails ({type(error).__name__}: {error})"
        ) from error
    if not enable_thinking and text.rstrip().endswith("<think>"):
        text += "</think>\n\n"
    return text, cut


MARKUP = re.compile(r"\s*<.+>\s*", re.DOTALL)  # <think> and <｜User｜> steer a model too, though not declared special


def cut_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    """The user's text, cut within every control token that it spells (`<|im_end|>`), and the character of the cut.

    Encoded part by part, the user's spelling stays text: only the template may open and close turns.
    """
    cut = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)  # a private-use character
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content in text]
    controls = [token.content for token in added if token.special or MARKUP.fullmatch(token.content)]
    if not controls:
        return text, cut
    starts = re.compile(f"(?={'|'.join(map(re.escape, controls))}).", re.DOTALL)
    return starts.sub(lambda match: match[0] + cut, text), cut


def fill(template: str, problem: Problem) -> str:
    """Put a problem's fields into a template, in one pass, so that braces inside the fields stay what they are."""
    return FIELD.sub(lambda match: getattr(problem, match[1]), template)


# ---------------------------------------------------------------------------------------------------------------
# Whose weights score


KINDS = ("fixed", "ema", "live")


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
        self.trained = trained_parameters(model)
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
        if self.kind == "live" or self.copy is not None:
            switched = nullcontext()  # the model, or the copy, scores as it stands
        elif self.kind == "fixed":
            switched = adapter_disabled(self.model)
        else:
            switched = self._averaged()
        model, was_training = self.copy or self.model, self.model.training
        model.eval()
        try:
            with torch.no_grad(), switched:
                yield model
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: average <- decay * average + (1 - decay) * student (only for `ema`)."""
        if self.kind == "ema":
            for average, parameter in zip(self.average, self.trained, strict=True):
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
