"""The privileged teacher: the same model, shown the reference solution, scoring the student's own tokens.

Here are the prompts of both contexts (paper Appendix H) and the choice of the teacher's weights: `fixed` (the weights
before training, the paper's choice), `ema` (their running average), `live` (the student's own) or another model's.
"""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chat import Chat, encode_turn, render_turn, template_notes
from errors import InputError, require
from model import LoRALinear, adapter_disabled, adapter_dropout, held, lora_layers, lora_parameters, trained_parameters
from problems import Problem

# --- The prompts of both contexts, quoted from the paper: single user turn, no system message of ours -----------

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
    """The templates, whether the two contexts of training think, and what the chat template is told besides."""

    student: str = STUDENT_PROMPT
    teacher: str = TEACHER_PROMPT
    evaluation: str = EVALUATION_PROMPT
    diagnostic: str = DIAGNOSTIC_PROMPT
    student_thinking: bool = False
    teacher_thinking: bool = True
    chat: Chat = field(default_factory=Chat)


PAPER_PROMPTS = Prompts()
# Fields that a template must show, and fields that it must not: only the teachers may see solution and answer.
REQUIRED = {name: {"problem"} for name in ("student", "teacher", "evaluation")} | {"diagnostic": {"problem", "answer"}}
NOT_KWARGS = {"chat_template", "enable_thinking", "thinking"}
FORBIDDEN = {"student": {"solution", "answer"}, "evaluation": {"solution", "answer"}}


def load_prompts(path: str | None, chat_template_kwargs: str | None = None, date: str | None = None) -> Prompts:
    """The paper's templates, or those that a JSON file puts in their place: {"student": "... {problem} ...", ...}.

    Fields are {problem}, {solution} and {answer}, each filled wherever it stands; any other brace is text. The other
    two are for the chat template (chat.py::Chat). Raises InputError, naming file and template.
    """
    flag, value = "chat_template_kwargs", chat_template_kwargs
    try:
        kwargs = json.loads(chat_template_kwargs or "{}")
        flag, value = "prompts", path
        given = json.loads(Path(path).read_text(encoding="utf-8-sig")) if path else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--{flag} {value}: cannot be read as JSON ({error})") from None
    is_fine = isinstance(kwargs, dict) and not kwargs.keys() & NOT_KWARGS
    others = f"be an object, without {', '.join(sorted(NOT_KWARGS))} (the thinking mode has flags of its own)"
    require(is_fine, "chat_template_kwargs", chat_template_kwargs, others)
    is_fine = isinstance(given, dict) and given.keys() <= REQUIRED.keys()
    require(is_fine, "prompts", path, f"be an object with some of {', '.join(REQUIRED)}")
    for name, template in given.items():
        shown = set(FIELD.findall(template)) if isinstance(template, str) else set()
        if missing := REQUIRED[name] - shown:
            raise InputError(f"--prompts {path}, {name}: {{{min(missing)}}} is missing")
        if leaked := FORBIDDEN.get(name, set()) & shown:
            raise InputError(f"--prompts {path}, {name}: must not show {{{min(leaked)}}}")
    return replace(PAPER_PROMPTS, **given, chat=Chat(kwargs, date))


def student_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, prompts: Prompts = PAPER_PROMPTS) -> list[int]:
    """x_stu: the problem alone, thinking off by default."""
    return encode_prompt(tokenizer, prompts.student, problem, prompts.student_thinking, prompts.chat)


def teacher_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, prompts: Prompts = PAPER_PROMPTS) -> list[int]:
    """x_tch: the problem and its reference solution, thinking on by default."""
    return encode_prompt(tokenizer, prompts.teacher, problem, prompts.teacher_thinking, prompts.chat)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, problem: Problem, enable_thinking: bool, chat=PAPER_PROMPTS.chat
) -> list[int]:
    """Token ids of one user turn with the problem in the template, ready for the response to follow (chat.py)."""
    return encode_turn(tokenizer, fill(template, problem), enable_thinking, chat)


def fill(template: str, problem: Problem) -> str:
    """Put a problem's fields into a template, in one pass, so that braces inside the fields stay what they are."""
    return FIELD.sub(lambda match: getattr(problem, match[1]), template)


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, contexts: tuple[str, ...] = ("student", "teacher")
) -> list[str]:
    """Raise InputError where the chat template drops what a prompt shows; else what to say of it (template_notes)."""
    probe = Problem("PROBLEM", "SOLUTION", "ANSWER")
    for context in contexts:
        template = getattr(prompts, context)
        turns = [render_turn(tokenizer, fill(template, probe), thinking, prompts.chat)[0] for thinking in (False, True)]
        lost = [name for name in FIELD.findall(template) if any(getattr(probe, name) not in turn for turn in turns)]
        if lost:
            where = f"{{{lost[0]}}} of the {context}'s prompt"
            raise InputError(f"{tokenizer.name_or_path}: the chat template does not show the text of a turn: {where}")
    is_blind = "teacher" in contexts and not {"solution", "answer"} & {*FIELD.findall(prompts.teacher)}
    note = "the teacher is shown neither solution nor answer"
    return [note] * is_blind + template_notes(tokenizer, prompts.chat)


REFERENCES = ("own", "other", "none", "answer")


def choose_reference(
    kind: str, problems: list[Problem], prompts: Prompts, draw: np.random.Generator
) -> tuple[list[Problem], Prompts]:
    """What the teacher is shown: problems with the reference in place of their solution, and the prompts to use.

    `own` is the paper's. `other`: the solution of another problem, each used once, drawn as one cycle through all.
    `answer`: the final answer alone. `none`: the student's prompt, in the teacher's thinking mode. Problem and answer
    stay what they are, so neither the student's context nor grading changes.
    """
    require(kind in REFERENCES, "reference", kind, f"be one of {', '.join(REFERENCES)}")
    references = [problem.solution for problem in problems]
    if kind == "other":
        require(len(problems) > 1, "reference", kind, "have another problem, and there is only one")
        cycle = draw.permutation(len(problems))
        for here, there in zip(cycle, np.roll(cycle, 1), strict=True):
            references[here] = problems[there].solution
    elif kind == "answer":
        references = [problem.answer for problem in problems]
    elif kind == "none":
        references = [""] * len(problems)
        prompts = replace(prompts, teacher=prompts.student)
    if kind in ("other", "answer") and "solution" not in FIELD.findall(prompts.teacher):
        raise InputError(f"--prompts: the teacher's shows no {{solution}}, where --reference {kind} puts it")
    answers = [problem.answer for problem in problems]
    if "" in answers and (kind == "answer" or "answer" in FIELD.findall(prompts.teacher)):
        raise InputError(f"--reference, --prompts: the teacher is shown answers; problem {answers.index('')} has none")
    shown = [replace(problem, solution=text) for problem, text in zip(problems, references, strict=True)]
    return shown, prompts


# --- Whose weights score ----------------------------------------------------------------------------------------

KINDS = ("fixed", "ema", "live")


class Teacher:
    """Whose weights score the rollout.

    Paper: "fixed teacher" = base weights. Authors: bf16 merge and unmerge of the adapter at each step, which makes
    that base drift. Here: nothing is ever merged in place.
    """

    def __init__(
        self, model: PreTrainedModel, kind: str = "fixed", ema_decay: float = 0.99, other: PreTrainedModel | None = None
    ) -> None:
        """`other`: the model that scores where the kind is `other`, made fit by runtime/loading.py::load_other."""
        self.model, self.kind, self.ema_decay = model, kind, ema_decay
        self.trained, lora = trained_parameters(model), bool(lora_parameters(model))
        copied = kind in ("fixed", "ema") and not lora
        self.scorer = other or (copy.deepcopy(model).requires_grad_(False) if copied else model)
        self.average: list[Tensor] = []  # for `ema`, one for each of `trained`; where there is a copy, its own weights
        if kind == "ema":
            self.average = list(self.scorer.parameters()) if copied else [p.detach().clone() for p in self.trained]
        states = {"fixed": partial(adapter_disabled, model), "ema": self._averaged} if lora else {}
        self.state = states.get(kind, nullcontext)  # that the model is in while it scores

    @contextmanager
    def scoring(self) -> Iterator[PreTrainedModel]:
        """Yield the model that scores, without gradients or dropout; the student is what it was on leaving."""
        with torch.no_grad(), adapter_dropout(self.model, False), self.state():
            yield self.scorer

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: average <- decay * average + (1 - decay) * student (only for `ema`)."""
        if self.kind == "ema":
            for average, parameter in zip(self.average, self.trained, strict=True):
                average.lerp_(parameter.detach().to(average.dtype), 1.0 - self.ema_decay)

    def _averaged(self) -> AbstractContextManager:
        """Inside, the adapter works with its running average. What is trained stays in its place, so that a signal may
        leave this block anywhere."""
        pairs = zip(self.average[::2], self.average[1::2], strict=True)
        of_layer = dict(zip(lora_layers(self.model).values(), pairs, strict=True))

        def cast(layer: LoRALinear) -> tuple[Tensor, ...]:
            return tuple(average.to(layer.base.weight.dtype) for average in of_layer[layer])

        return held(self.model, "cast", cast)
