"""One picture of a run of train.py, finished or under way: RUN/run.png. Needs matplotlib.

    python -m experiments.draw_run runs/RUN
    python -m experiments.draw_run runs/RUN --tokens     also tokens.html and tokens.png: solutions, token by token

Held-out accuracy, loss, length, how rollouts end, the entropies of both contexts, gradient norm, and the divergence by
tenth of the solution, over the steps done; docs/metrics.md has the formulas. All axes start at 0 and are
linear; the colours are not and say so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from errors import InputError
from experiments.token_page import RolloutView, TokenView, render, run_config, shade, view_rollouts, visible
from runtime.flags import run_script
from runtime.records import read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {  # columns of metrics.jsonl by what they have in common
    "loss": ["loss", "divergence"],
    "tokens of a solution": ["mean_length"],
    "share of the rollouts": ["accuracy", "eos_rate", "repetition"],
    "entropy (nats)": ["student_entropy", "teacher_entropy"],
    "gradient norm before clipping": ["grad_norm"],
}
HELD_OUT, TENTHS = "held-out accuracy", "relative position"
LAYOUT = [[HELD_OUT, *[*PANELS][:2]], [*PANELS][2:], [TENTHS] * 3]
SHOWN = 100  # characters of a solution in a picture


def figure(width: float, height: float, layout: list[list[str]]) -> tuple[Figure, dict]:
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


def run_label(run: Path) -> str:
    """What a run is, by its options."""
    config = run_config(run)
    parts = [part for part in (config.method, config.schedule, config.reduction) if part]
    return f"{run.name}: {', '.join(parts)}, clip {config.tau_clip:g}, {config.teacher} teacher"


# ---------------------------------------------------------------------------------------------------------------
# A run


def draw(run: Path) -> Figure:
    """The picture of a run. Raises InputError where it has no step yet."""
    columns = [name for names in PANELS.values() for name in names]
    rows = read_rows(run / "metrics.jsonl", ("step", "by_decile", *columns))
    if not rows:
        raise InputError(f"{run}: no step in its metrics.jsonl")
    drawn, axes = figure(11, 8, LAYOUT)
    from matplotlib.colors import PowerNorm

    steps, scored = [row["step"] for row in rows], run / "evaluation.json"
    for title, names in PANELS.items():
        for name in names:
            axes[title].plot(steps, np.array([row[name] for row in rows], dtype=float), label=name)  # None becomes NaN
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
    drawn.suptitle(run_label(run), fontsize=11)
    return drawn


# ---------------------------------------------------------------------------------------------------------------
# A solution


def draw_tokens(before: RolloutView, after: RolloutView) -> Figure:
    """A problem's solution before and after training, and what both contexts say at the token where the two part.

    Of long solutions the SHOWN characters around that token.
    """
    pairs = enumerate(zip(before.tokens, after.tokens, strict=False))
    part = next((t for t, (a, b) in pairs if a.text != b.text), 0)
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
            size = len(token.text)
            strip.broken_barh([(x, size)], (y, 0.9), color=(0.84, 0.27, 0.0, shade(token, top)), linewidth=0)
            strip.text(x + size / 2, y + 0.45, visible(token.text), **centred)
            x += size
    for name, view in (("before", before), ("after", after)):
        draw_alternatives(axes[name], view.tokens[part], f"token {part + 1}, {name} training: {view.tokens[part].text}")
    axes["before"].legend(fontsize=8, frameon=False)
    return drawn


def draw_alternatives(axis, token: TokenView, title: str) -> None:
    """Both contexts' probabilities of a token's three likeliest alternatives."""
    student, teacher = dict(token.student), dict(token.teacher)
    names = sorted({*student, *teacher}, key=lambda name: -max(student.get(name, 0), teacher.get(name, 0)))[:3]
    for shift, chances, label in ((-0.2, student, "student"), (0.2, teacher, "teacher")):
        places = [place + shift for place in range(len(names))]
        drawn = axis.barh(places, [chances.get(name, 0.0) for name in names], height=0.4, label=label)
        axis.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    axis.set(xlim=(0, 1.1), ylim=(len(names) - 0.5, -0.5), xlabel="probability")
    axis.set_yticks(range(len(names)), labels=names, family="monospace", fontsize=11)
    axis.set_title(title, fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--tokens", action="store_true", help="sample solutions from its newest checkpoint, too")
    args = parser.parse_args()
    if args.tokens:
        views = view_rollouts(args.run)
        (args.run / "tokens.html").write_text(render(views, run_label(args.run)), encoding="utf-8")
        draw_tokens(*views[:2]).savefig(args.run / "tokens.png")
    draw(args.run).savefig(args.run / "run.png")
    print(f"wrote {args.run}/run.png" + ", tokens.html, tokens.png" * args.tokens)


if __name__ == "__main__":
    run_script(main)
