"""A page that shows solutions token by token, coloured by weighted divergence, with both contexts' top 5 at a glance.

The problems are held-out ones that training repaired; in the embedded model's world each of them holds a belief. One
HTML file with no references to anything outside of it; it is written by `python -m experiments.study.plots RUN --html`.
Axes: M tokens of one rollout, V vocabulary, K alternatives.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import experiments.study.rules  # noqa: F401  (registers its rows: a run of one can be shown)
from errors import InputError
from grading import answers_match, extract_boxed
from loss import log_probabilities, resolve_method, score_tokens
from model import adapter_disabled, response_hidden
from problems import Problem, load_problems
from rollout import Sampling, sample
from runtime.checkpoint import load_adapter, newest_checkpoint
from runtime.loading import load_model, load_tokenizer
from teacher import Prompts, student_prompt, teacher_prompt
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


@torch.no_grad()
def view_rollouts(run: Path, count: int = 3) -> list[RolloutView]:
    """`count` problems, each solved before training and from the newest checkpoint, scored as trained.

    They are held-out problems that the run repaired, solved greedily; where it has none with a reference solution, the
    first problems of its data, sampled as in training and both times with the same random numbers. Raises InputError
    where the run has no adapter checkpoint.
    """
    from train import TrainConfig, choose_prompts

    try:
        config = TrainConfig(**json.loads((run / "config.json").read_text())["config"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{run}: not a run folder ({type(error).__name__})") from None
    except TypeError as error:
        raise InputError(f"{run}: its config.json is of another version of train.py ({error})") from None
    checkpoint, _ = newest_checkpoint(run)
    if checkpoint is None or config.lora_rank == 0:
        raise InputError(f"{run}: no checkpoint with an adapter to sample from")
    model, tokenizer = load_model(config.model, config.dtype, device=config.device), load_tokenizer(config.model)
    load_adapter(model, checkpoint)
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
    path = run / "heldout.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    greedy = {(row["step"], row["problem"]): row for row in rows if row["decoding"] == "greedy"}
    first, last = min((step for step, _ in greedy), default=0), max((step for step, _ in greedy), default=0)
    differing = {}
    for step, index in greedy:
        before, after = greedy[first, index], greedy[last, index]
        if step == last and after["correct"] and not before["correct"]:
            pairs = zip(before["text"].ljust(len(after["text"])), after["text"].ljust(len(before["text"])), strict=True)
            differing[index] = sum(a != b for a, b in pairs)
    return sorted(differing, key=lambda index: (differing[index], index))


def _view(
    title: str, model, tokenizer, problem: Problem, index: int, prompts: Prompts, settings: Sampling, config
) -> RolloutView:
    prompt = student_prompt(tokenizer, problem, prompts)
    (sampled,) = sample(model, tokenizer, [prompt], [(config.seed, PAGE_STREAM, index)], settings)
    response, head_VD = sampled.ids, model.get_output_embeddings().weight
    model.eval()

    def in_context(context: list[int]) -> torch.Tensor:
        hidden_MD = response_hidden(model, [context], [response])[0]
        return log_probabilities(hidden_MD @ head_VD.T, config.distill_temperature)

    student_logp_MV = in_context(prompt)
    with adapter_disabled(model):
        teacher_logp_MV = in_context(teacher_prompt(tokenizer, problem, prompts))
    method = resolve_method(config.method, config)
    ids = torch.tensor(response, device=head_VD.device)
    scores = score_tokens(method, student_logp_MV, teacher_logp_MV, ids, config)
    L = [len(response)]
    r_M = relative_position(L).to(ids.device)
    weights = method.token_weight(r_M, scores, L, 0, config).tolist()
    alternatives = [_top(logp_MV, tokenizer) for logp_MV in (student_logp_MV, teacher_logp_MV)]
    tokens = [
        TokenView(tokenizer.decode([token]), divergence, weight, student, teacher)
        for token, divergence, weight, student, teacher in zip(
            response, scores.loss.tolist(), weights, *alternatives, strict=True
        )
    ]
    text = tokenizer.decode(response, skip_special_tokens=True)
    return RolloutView(title, problem, answers_match(extract_boxed(text), problem.answer), tokens)


def _top(logp_MV: torch.Tensor, tokenizer) -> list[list[tuple[str, float]]]:
    values_MK, ids_MK = logp_MV.exp().topk(ALTERNATIVES, dim=-1)
    return [
        [(tokenizer.decode([token]), probability) for token, probability in zip(ids, values, strict=True)]
        for ids, values in zip(ids_MK.tolist(), values_MK.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------
# The page

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --soft: #5f6368; --page: #ffffff; --card: #f4f4f6; --line: #c9c9ce;
  --heat: 214, 69, 0; --accent: #0b57d0; --good: #19713a; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --text: #ececf0; --soft: #a6a8ad; --page: #16171a; --card: #222429;
  --line: #43464d; --heat: 255, 132, 48; --accent: #8ab4f8; --good: #6dd58c; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem 1rem 60vh; max-width: 64rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.35rem; margin: 0 0 .3rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .2rem }
p { margin: .2rem 0 .5rem; color: var(--soft); overflow-wrap: anywhere }
.good { color: var(--good) } .bad { color: var(--bad) }
.rollout { font: 1.05rem/2.1 ui-monospace, monospace; background: var(--card); padding: .5rem .7rem;
  border-radius: .5rem; overflow-wrap: anywhere }
.t { background: rgba(var(--heat), var(--a)); border: 0; border-radius: .2rem; padding: .12rem .06rem; margin: 0;
  color: inherit; font: inherit; white-space: pre-wrap; cursor: pointer }
.t:hover, .t:focus-visible, .t.on { outline: 2px solid var(--accent); outline-offset: 0 }
#key { display: inline-block; width: 9rem; height: .8rem; border-radius: .2rem; vertical-align: middle;
  background: linear-gradient(90deg, rgba(var(--heat), 0), rgba(var(--heat), .85)); border: 1px solid var(--line) }
#panel { position: fixed; left: 0; right: 0; bottom: 0; background: var(--page); border-top: 1px solid var(--line);
  padding: .6rem 1rem; max-height: 55vh; overflow: auto }
#panel > div { max-width: 62rem; margin: 0 auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .1rem .8rem .1rem 0; font-weight: 400; white-space: nowrap }
th { color: var(--soft) }
td.c { font-family: ui-monospace, monospace } td.n { font-variant-numeric: tabular-nums }
.same { color: var(--accent); font-weight: 600 }
"""

SCRIPT = """
const rollouts = JSON.parse(document.getElementById('data').textContent), panel = document.getElementById('panel');
const visible = text => text === ' ' ? '\\u2423' : text.replaceAll('\\n', '\\u21b5') || '\\u2205';
const cell = (row, text, kind) => { const td = row.insertCell(); td.textContent = text; td.className = kind; };
let chosen = null;
function show(button) {
  const token = rollouts[button.dataset.r][button.dataset.t];
  if (chosen) chosen.classList.remove('on');
  (chosen = button).classList.add('on');
  const line = document.createElement('div'), table = document.createElement('table');
  const place = `token ${+button.dataset.t + 1} of ${rollouts[button.dataset.r].length}: ${visible(token.text)}`;
  line.textContent = `${place} \\u00b7 divergence ${token.divergence.toFixed(4)} \\u00d7 weight ` +
    `${token.weight.toFixed(3)} = ${(token.divergence * token.weight).toFixed(4)}`;
  table.innerHTML = '<tr><th>student<th><th>teacher<th></tr>';
  token.student.forEach((alternative, k) => {
    const row = table.insertRow();
    for (const [text, p] of [alternative, token.teacher[k]]) {
      cell(row, visible(text), text === token.text ? 'c same' : 'c');
      cell(row, (100 * p).toFixed(1) + ' %', 'n');
    }
  });
  panel.firstElementChild.replaceChildren(line, table);
}
for (const kind of ['mouseover', 'focusin', 'click'])
  document.addEventListener(kind, event => { if (event.target.classList?.contains('t')) show(event.target); });
const heat = button => +button.style.getPropertyValue('--a');
show([...document.querySelectorAll('.t')].reduce((a, b) => heat(b) > heat(a) ? b : a));
"""


def render(rollouts: list[RolloutView], title: str) -> str:
    """The whole page. Model text reaches it escaped, in the markup and in the data, and is only ever shown as text."""
    top = max(abs(t.divergence * t.weight) for view in rollouts for t in view.tokens) or 1.0
    data = [[vars(token) for token in view.tokens] for view in rollouts]
    as_json = json.dumps(data).replace("<", "\\u003c")  # a token `</script>` must not end the script
    sections = "\n".join(_section(number, view, top) for number, view in enumerate(rollouts))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
        f"<h1>{html.escape(title)}</h1>\n<p>Each token of a student's solution, coloured by its divergence from the "
        "teacher times its weight. Point at a token, or move to it with Tab, for the five most likely tokens in both "
        f'contexts. 0 <span id="key"></span> {top:.3f}</p>\n{sections}\n'
        '<div id="panel" aria-live="polite"><div></div></div>\n'
        f'<script type="application/json" id="data">{as_json}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _section(number: int, view: RolloutView, top: float) -> str:
    verdict = '<span class="good">right</span>' if view.correct else '<span class="bad">wrong</span>'
    buttons = "".join(
        f'<button class="t" data-r="{number}" data-t="{index}" style="--a:{shade(token, top):.3f}">'
        f"{html.escape(token.text) or '&#8709;'}</button><wbr>"
        for index, token in enumerate(view.tokens)
    )
    return (
        f"<h2>{html.escape(view.title)}: {verdict}</h2>\n<p>{html.escape(view.problem.problem)} "
        f'&nbsp; answer {html.escape(view.problem.answer)}</p>\n<div class="rollout">{buttons}</div>'
    )


def shade(token: TokenView, top: float) -> float:
    """Opacity of the colour: a square root, so that small divergences show beside large ones."""
    return 0.85 * (abs(token.divergence * token.weight) / top) ** 0.5
