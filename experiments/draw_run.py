"""One picture of a run of train.py, finished or under way: RUN/run.png. Needs matplotlib.

    python -m experiments.draw_run runs/RUN
    python -m experiments.draw_run runs/RUN --tokens     also tokens.png: a solution before and after, token by token

docs/metrics.md has the formulas of what is drawn over the steps done. No axis is cut, and all are linear; the colours
are not and say so. The solution is of a held-out problem that training repaired, coloured by weighted divergence.
Axes: M tokens of one rollout, V vocabulary, K alternatives.
"""

import argparse
import json
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch

import experiments.study.rules  # noqa: F401  (registers its rows: a run of one can be shown)
from errors import InputError
from grading import make_grader
from loss import log_probabilities, of_rows, resolve_method, score_tokens
from model import adapter_disabled, head_logits, response_hidden
from problems import Problem, load_problems
from rollout import sample
from runtime.checkpoint import load_adapter, newest_checkpoint
from runtime.flags import run_script
from runtime.loading import load_model, load_tokenizer
from runtime.records import read_record, read_rows
from teacher import Teacher, student_prompt, teacher_prompt
from train import TrainConfig, choose_prompts
from weighting import relative_position

PANELS = {  # columns of metrics.jsonl by what they have in common
    "loss": ["loss", "divergence"],
    "tokens of a solution": ["mean_length"],
    "share of the rollouts": ["accuracy", "eos_rate", "repetition"],
    "nats": ["student_entropy", "teacher_entropy", "forward_kl"],
    "gradient norm before clipping": ["grad_norm"],
}
HELD_OUT, TENTHS = "held-out accuracy", "relative position"
LAYOUT = [[HELD_OUT, *[*PANELS][:2]], [*PANELS][2:], [TENTHS] * 3]
SHOWN = 100  # characters of a solution in a picture
ALTERNATIVES = 3
VIEW_STREAM = 102  # second entry of the rollouts' stream key, apart from those of train.py


def figure(width: float, height: float, layout: list[list[str]]) -> tuple:
    """An empty figure and its axes by name, drawn without a screen. Raises InputError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    drawn = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = drawn.subplot_mosaic(layout)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
    return drawn, axes


def run_config(run: Path) -> TrainConfig:
    """What a run of train.py was asked for. Raises InputError where there is none of this version."""
    try:
        return TrainConfig(**read_record(run)["config"])
    except TypeError:  # no record, or options of another script or version
        raise InputError(f"{run}: no run folder of this version of train.py") from None


# --- A run ------------------------------------------------------------------------------------------------------


def draw(run: Path):
    """The picture of a run. Raises InputError where it has no step yet."""
    columns = {name for names in PANELS.values() for name in names} - {"forward_kl"}  # which older runs lack
    rows = read_rows(run / "metrics.jsonl", ("step", "by_decile", *columns))
    if not rows:
        raise InputError(f"{run}: no step in its metrics.jsonl")
    drawn, axes = figure(11, 8, LAYOUT)
    from matplotlib.colors import PowerNorm

    steps, scored = [row["step"] for row in rows], run / "evaluation.json"
    for title, names in PANELS.items():
        for name in names:
            axes[title].plot(steps, np.array([row.get(name) for row in rows], dtype=float), label=name)  # None: NaN
    held_out = json.loads(scored.read_text()) if scored.exists() else {}
    for name in ("sampled", "greedy"):
        axes[HELD_OUT].plot([*map(int, held_out)], [value[name] for value in held_out.values()], "o-", label=name)
    for title, axis in axes.items():
        axis.set(xlabel="steps done", ylabel=title)
        if title != TENTHS:
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))  # no axis is cut
            axis.legend(fontsize=8, frameon=False)
    for title in (HELD_OUT, "share of the rollouts"):
        axes[title].set_ylim(-0.02, 1.02)
    tenths = np.array([row["by_decile"]["divergence"] for row in rows], dtype=float).T
    extent = (steps[0] - 0.5, steps[-1] + 0.5, 0, 1)
    axes[TENTHS].grid(visible=False)
    image = axes[TENTHS].imshow(tenths, origin="lower", aspect="auto", extent=extent, norm=PowerNorm(0.5, vmin=0))
    drawn.colorbar(image, label="divergence (nats, square-root scale)")
    config = run_config(run)
    method = ", ".join(filter(None, (config.method, config.schedule, config.reduction)))
    drawn.suptitle(f"{run.name}: {method}, clip {config.tau_clip:g}, {config.teacher} teacher", fontsize=11)
    return drawn


# --- Solutions, token by token ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenView:
    """What is shown of one token; an alternative is (text, student's probability, teacher's), the likeliest first."""

    text: str
    divergence: float  # the token's loss before weighting
    weight: float
    alternatives: list[tuple[str, float, float]]


@dataclass(frozen=True)
class RolloutView:
    title: str
    problem: Problem
    correct: bool
    tokens: list[TokenView]


@torch.no_grad()
def view_rollouts(run: Path) -> list[RolloutView]:
    """A problem solved before training and from the newest checkpoint, scored as trained.

    It is a held-out problem that the run repaired, solved greedily; where it has none with a reference solution, the
    first problem of its data, sampled as in training and both times with the same random numbers. Raises InputError
    where the run has no adapter checkpoint, another teacher than the two, or a method that is not known here.
    """
    config = run_config(run)
    if config.teacher not in ("fixed", "live"):
        raise InputError(f"{run}: --tokens scores by a fixed or a live teacher, not by --teacher {config.teacher}")
    try:
        resolve_method(config.method, config)
    except InputError as error:
        raise InputError(f"{run}: --tokens does not know the method of a script of yours ({error})") from None
    checkpoint = newest_checkpoint(run)
    if checkpoint is None or config.lora_rank == 0:
        raise InputError(f"{run}: no checkpoint with an adapter to sample from")
    model, tokenizer = load_model(config.model, config.dtype), load_tokenizer(config.model)
    load_adapter(model, checkpoint)
    model.eval()
    source, name, settings = config.eval_data, "held-out problem", replace(config.sampling, temperature=0.0)
    problems = load_problems(source, False, config.columns) if source else []
    index = next((index for index in repaired(run) if problems[index].solution), None)
    if index is None:
        problems, name, settings = load_problems(config.data, columns=config.columns), "problem", config.sampling
        index = 0
    problems, prompts = choose_prompts(config, problems, read_record(run).get("date"))
    times = [("before training", 0, partial(adapter_disabled, model)),
             (checkpoint.name, int(checkpoint.name.rpartition("-")[2]), nullcontext)]  # fmt: skip
    views = []
    with closing(make_grader(config.grader, [])) as grader:
        for when, step, state in times:
            shown = (model, tokenizer, problems[index], index, step, prompts, settings, config, grader)
            with state():
                views.append(_view(f"{name} {index}, {when}", *shown))
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


def _view(
    title: str, model, tokenizer, problem: Problem, index: int, step: int, prompts, settings, config, grader
) -> RolloutView:
    prompt = student_prompt(tokenizer, problem, prompts)
    (sampled,) = sample(model, tokenizer, [prompt], [(config.seed, VIEW_STREAM, index)], settings)
    response, head_VD = sampled.ids, model.get_output_embeddings().weight

    def in_context(context: list[int]) -> torch.Tensor:
        hidden_MD = response_hidden(model, [context], [response])[0]
        return log_probabilities(head_logits(hidden_MD, head_VD), config.distill_temperature)

    student_logp_MV = in_context(prompt)
    with Teacher(model, config.teacher).scoring():
        teacher_logp_MV = in_context(teacher_prompt(tokenizer, problem, prompts))
    method, L = resolve_method(config.method, config), [len(response)]
    ids_M = torch.tensor(response, device=head_VD.device)
    scores = score_tokens(method, student_logp_MV, teacher_logp_MV, ids_M, config)
    correct = grader.grade(tokenizer.decode(response, skip_special_tokens=True), problem.answer)
    scores = of_rows(scores, L, correct=[correct], finished=[sampled.finished])
    w_M = method.token_weight(relative_position(L).to(ids_M.device), scores, L, step, config)
    best_MK = torch.maximum(student_logp_MV, teacher_logp_MV).topk(ALTERNATIVES, dim=-1).indices
    both = [logp_MV.gather(-1, best_MK).exp().tolist() for logp_MV in (student_logp_MV, teacher_logp_MV)]
    texts_MK = [[tokenizer.decode([token]) for token in ids] for ids in best_MK.tolist()]
    alternatives = [list(zip(*columns, strict=True)) for columns in zip(texts_MK, *both, strict=True)]
    columns = ([tokenizer.decode([y]) for y in response], scores.loss.tolist(), w_M.tolist(), alternatives)
    return RolloutView(title, problem, correct, list(map(TokenView, *columns)))


def visible(text: str) -> str:
    return "\u2423" if text == " " else text.replace("\n", "\u21b5") or "\u2205"


# --- The picture of a solution ----------------------------------------------------------------------------------


def draw_tokens(before: RolloutView, after: RolloutView):
    """A problem's solution before and after training, and what both contexts say at the token where the two part.

    Of long solutions the SHOWN characters around that token.
    """
    pairs = list(zip(before.tokens, after.tokens, strict=False))
    part = next((t for t, (a, b) in enumerate(pairs) if a.text != b.text), len(pairs) - 1)  # else the last they share
    drawn, axes = figure(9, 4.4, [["tokens", "tokens"], ["before", "after"]])
    strip, top = axes["tokens"], max(abs(t.divergence * t.weight) for v in (before, after) for t in v.tokens) or 1.0
    length = max(sum(len(t.text) for t in v.tokens) for v in (before, after))
    first = max(0, min(sum(len(t.text) for t in before.tokens[:part]) - SHOWN // 2, length - SHOWN))
    strip.set(xlim=(first, first + min(length, SHOWN)), ylim=(-0.2, 3.9))
    legend = f"colour: divergence x weight, from 0 to {top:.2f} nats, square-root scale"
    strip.set_title(legend, loc="right", fontsize=8)
    strip.axis("off")
    centred = {"family": "monospace", "ha": "center", "va": "center", "parse_math": False, "clip_on": True}
    for y, view in ((2, before), (0, after)):
        problem = shorten(view.problem.problem, SHOWN // 2, placeholder=" ...")
        label = f"{view.title}: {problem}, {'right' if view.correct else 'wrong'}"
        strip.text(first, y + 1.15, label, color="C2" if view.correct else "C3", fontsize=10)
        x = 0
        for token in view.tokens:
            size, opacity = len(token.text), 0.85 * (abs(token.divergence * token.weight) / top) ** 0.5
            strip.broken_barh([(x, size)], (y, 0.9), color=(0.84, 0.27, 0.0, opacity), linewidth=0)
            strip.text(x + size / 2, y + 0.45, visible(token.text), **centred)
            x += size
    for name, view in (("before", before), ("after", after)):
        draw_alternatives(axes[name], view.tokens[part], f"token {part + 1}, {name} training: {view.tokens[part].text}")
    axes["before"].legend(fontsize=8, frameon=False)
    return drawn


def draw_alternatives(axis, token: TokenView, title: str) -> None:
    """Both contexts' probabilities of a token's likeliest alternatives."""
    names, student, teacher = zip(*token.alternatives, strict=True)
    for shift, chances, label in ((-0.2, student, "student"), (0.2, teacher, "teacher")):
        drawn = axis.barh([place + shift for place in range(len(names))], chances, height=0.4, label=label)
        axis.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    axis.set(xlim=(0, 1.1), ylim=(len(names) - 0.5, -0.5), xlabel="probability")
    axis.set_yticks(range(len(names)), labels=names, family="monospace", fontsize=11)
    axis.set_title(title, fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--tokens", action="store_true", help="sample a solution from its newest checkpoint, too")
    args = parser.parse_args()
    draw(args.run).savefig(args.run / "run.png")
    if args.tokens:
        draw_tokens(*view_rollouts(args.run)).savefig(args.run / "tokens.png")
    print(f"wrote {args.run}/run.png" + ", tokens.png" * args.tokens)


if __name__ == "__main__":
    run_script(main)
