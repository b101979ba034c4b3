"""A page that shows solutions token by token, coloured by weighted divergence, with both contexts' top 5 at a glance.

The problems are held-out ones that training repaired; in the embedded model's world each of them holds a belief. One
HTML file with no references to anything outside of it; `python -m experiments.draw_run RUN --tokens` writes it.
Axes: M tokens of one rollout, V vocabulary, K alternatives.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from string import Template

import torch

import experiments.study.rules  # noqa: F401  (registers its rows: a run of one can be shown)
from errors import InputError
from grading import answers_match, extract_boxed
from loss import log_probabilities, resolve_method, score_tokens
from model import adapter_disabled, response_hidden
from problems import Problem, load_problems
from rollout import sample
from runtime.checkpoint import load_adapter, newest_checkpoint
from runtime.loading import load_model, load_tokenizer
from runtime.records import read_record, read_rows
from teacher import student_prompt, teacher_prompt
from train import TrainConfig, choose_prompts
from weighting import relative_position

ALTERNATIVES = 5
PAGE_STREAM = 102  # second entry of the rollouts' stream key, apart from those of train.py


@dataclass(frozen=True)
class TokenView:
    """What the page shows of one token; the alternatives are (text, probability), most likely first."""

    text: str
    divergence: float  # the token's loss before weighting
    weight: float
    student: list[tuple[str, float]]
    teacher: list[tuple[str, float]]


@dataclass(frozen=True)
class RolloutView:
    title: str
    problem: Problem
    correct: bool
    tokens: list[TokenView]


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def run_config(run: Path) -> TrainConfig:
    """What a run of train.py was asked for. Raises InputError where there is none of this version."""
    try:
        return TrainConfig(**read_record(run)["config"])
    except TypeError:  # no record, or options of another script or version
        raise InputError(f"{run}: no run folder of this version of train.py") from None


@torch.no_grad()
def view_rollouts(run: Path, count: int = 3) -> list[RolloutView]:
    """`count` problems, each solved before training and from the newest checkpoint, scored as trained.

    They are held-out problems that the run repaired, solved greedily; where it has none with a reference solution, the
    first problems of its data, sampled as in training and both times with the same random numbers. Raises InputError
    where the run has no adapter checkpoint.
    """
    config = run_config(run)
    checkpoint = newest_checkpoint(run)
    if checkpoint is None or config.lora_rank == 0:
        raise InputError(f"{run}: no checkpoint with an adapter to sample from")
    model, tokenizer = load_model(config.model, config.dtype, device=config.device), load_tokenizer(config.model)
    load_adapter(model, checkpoint)
    model.eval()
    source, name, settings = config.eval_data, "held-out problem", replace(config.sampling, temperature=0.0)
    problems = load_problems(source, False, config.columns) if source else []
    chosen = [index for index in repaired(run) if problems[index].solution][:count]
    if not chosen:
        problems, name, settings = load_problems(config.data, columns=config.columns), "problem", config.sampling
        chosen = list(range(len(problems)))[:count]
    problems, prompts = choose_prompts(config, problems)
    views = []
    for index in chosen:
        shown = (model, tokenizer, problems[index], index, prompts, settings, config)
        with adapter_disabled(model):
            views.append(_view(f"{name} {index}, before training", *shown))
        views.append(_view(f"{name} {index}, {checkpoint.name}", *shown))
    return views


def repaired(run: Path) -> list[int]:
    """Held-out problems that greedy decoding solves at the run's end and not at its start, by index.

    Those come first whose two solutions differ in the fewest characters. Empty where the run scored none.
    """
    rows = read_rows(run / "heldout.jsonl", ("step", "problem", "text", "correct", "decoding"))
    greedy = {(row["step"], row["problem"]): row for row in rows if row["decoding"] == "greedy"}
    steps, differing = {step for step, _ in greedy}, {}
    for index in [index for step, index in greedy if step == max(steps)]:
        before, after = greedy[min(steps), index], greedy[max(steps), index]
        if after["correct"] and not before["correct"]:
            differing[index] = sum(a != b for a, b in zip_longest(before["text"], after["text"]))
    return sorted(differing, key=lambda index: (differing[index], index))


def _view(title: str, model, tokenizer, problem: Problem, index: int, prompts, settings, config) -> RolloutView:
    prompt = student_prompt(tokenizer, problem, prompts)
    (sampled,) = sample(model, tokenizer, [prompt], [(config.seed, PAGE_STREAM, index)], settings)
    response, head_VD = sampled.ids, model.get_output_embeddings().weight

    def in_context(context: list[int]) -> torch.Tensor:
        hidden_MD = response_hidden(model, [context], [response])[0]
        return log_probabilities(hidden_MD @ head_VD.T, config.distill_temperature)

    def top(logp_MV: torch.Tensor) -> list[list[tuple[str, float]]]:
        values_MK, ids_MK = logp_MV.exp().topk(ALTERNATIVES, dim=-1)
        texts_MK = [[tokenizer.decode([token]) for token in ids] for ids in ids_MK.tolist()]
        return [list(zip(*row, strict=True)) for row in zip(texts_MK, values_MK.tolist(), strict=True)]

    student_logp_MV = in_context(prompt)
    with adapter_disabled(model):
        teacher_logp_MV = in_context(teacher_prompt(tokenizer, problem, prompts))
    method, L = resolve_method(config.method, config), [len(response)]
    ids_M = torch.tensor(response, device=head_VD.device)
    scores = score_tokens(method, student_logp_MV, teacher_logp_MV, ids_M, config)
    w_M = method.token_weight(relative_position(L).to(ids_M.device), scores, L, 0, config)
    texts = [tokenizer.decode([token]) for token in response]
    columns = (texts, scores.loss.tolist(), w_M.tolist(), top(student_logp_MV), top(teacher_logp_MV))
    answer = extract_boxed(tokenizer.decode(response, skip_special_tokens=True))
    return RolloutView(title, problem, answers_match(answer, problem.answer), list(map(TokenView, *columns)))


# ---------------------------------------------------------------------------------------------------------------
# The page


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { margin: 0 auto; padding: 1.2rem 1rem 60vh; max-width: 64rem; overflow-wrap: anywhere }
h1 { font-size: 1.35rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .2rem } p { margin: .2rem 0 .5rem }
.rollout { font: 1.05rem/2.1 ui-monospace, monospace }
.t { background: rgb(214 69 0 / var(--a)); border-radius: .2rem; padding: .12rem .06rem; color: inherit;
  white-space: pre-wrap; cursor: pointer }
.t:is(:hover, :focus) { outline: 2px solid LinkText }
#key { display: inline-block; width: 9rem; height: .8rem; border: 1px solid; vertical-align: middle;
  background: linear-gradient(90deg, transparent, rgb(214 69 0 / .85)) }
.t:is(:hover, :focus)::after { content: attr(data-shown); position: fixed; inset: auto 0 0; padding: .6rem 1rem;
  max-height: 55vh; overflow: auto; background: Canvas; border-top: 1px solid; line-height: 1.5 }
.t:hover::after { z-index: 1 }
</style></head><body>
<h1>$title</h1>
<p>Each token of a student's solution, coloured by its divergence from the teacher times its weight. Point at a token,
or move to it with Tab, for the five most likely tokens in both contexts.</p>
<p>0 <span id="key"></span> $top nats, a square-root scale: the middle of the bar is $middle; negative numbers count by
their size.</p>
$sections
</body></html>
""")


def render(rollouts: list[RolloutView], title: str) -> str:
    """The whole page. Model text reaches it escaped, in text and in attributes, and is only ever shown as text."""
    top = max(abs(t.divergence * t.weight) for view in rollouts for t in view.tokens) or 1.0
    sections = []
    for view in rollouts:
        verdict, problem = "right" if view.correct else "wrong", view.problem
        marks = (
            f'<mark class="t" tabindex="0" style="--a:{shade(token, top):.3f}" '
            f'data-shown="{html.escape(panel(view, t))}">{html.escape(token.text) or "&#8709;"}</mark><wbr>'
            for t, token in enumerate(view.tokens)
        )
        sections.append(
            f"<h2>{html.escape(view.title)}: {verdict}</h2>\n"
            f"<p>{html.escape(problem.problem)} &nbsp; answer {html.escape(problem.answer)}</p>\n"
            f'<div class="rollout">{"".join(marks)}</div>'
        )
    scale = {"top": f"{top:.3f}", "middle": f"{top / 4:.3f}"}
    return PAGE.substitute(title=html.escape(title), sections="\n".join(sections), **scale)


def panel(view: RolloutView, t: int) -> str:
    """What is said of token t (from 0): its loss and both contexts' likeliest tokens, a star at the token itself."""
    token = view.tokens[t]
    product = f"{token.divergence:.4f} \u00d7 weight {token.weight:.3f} = {token.divergence * token.weight:.4f}"
    lines = [f"token {t + 1} of {len(view.tokens)}: {visible(token.text)} \u00b7 divergence {product}"]
    lines.append(f"{'student':30}teacher")
    for pair in zip(token.student, token.teacher, strict=True):
        cells = (f"{'*' if text == token.text else ' '} {visible(text):16} {p:6.1%}" for text, p in pair)
        lines.append("     ".join(cells))
    return "\n".join(lines)


def visible(text: str) -> str:
    return "\u2423" if text == " " else text.replace("\n", "\u21b5") or "\u2205"


def shade(token: TokenView, top: float) -> float:
    """Opacity of the colour: a square root, so that small divergences show beside large ones."""
    return 0.85 * (abs(token.divergence * token.weight) / top) ** 0.5
