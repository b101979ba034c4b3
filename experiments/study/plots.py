"""A page of some solutions of a run, token by token, and where matplotlib is installed a picture of the first.

python -m experiments.study.plots RUN...
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import experiments.study.rules  # noqa: F401  (registers its rows: a run of one can be drawn)
from errors import InputError
from experiments.token_page import RolloutView, TokenView, render, shade, view_rollouts, visible
from runtime.flags import run_script
from runtime.records import make_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    try:
        config = json.loads((run / "config.json").read_text())["config"]
        parts = [config["method"], *(config[key] for key in ("schedule", "reduction") if config.get(key))]
        return ", ".join([*map(str, parts), f"clip {config['tau_clip']:g}", f"{config['teacher']} teacher"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{run}: no config.json of a run of train.py ({type(error).__name__})") from None


def repair(before: RolloutView, after: RolloutView) -> Figure:
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
    strip.set_title(
        f"colour: divergence x weight, from 0 to {top:.2f} nats, square-root scale", loc="right", fontsize=8
    )
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
        bars(axes[name], view.tokens[part], f"token {part + 1}, {name} training: {view.tokens[part].text}")
    axes["before"].legend(fontsize=8, frameon=False)
    return drawn


def bars(axis, token: TokenView, title: str) -> None:
    """Both contexts' probabilities of a token's likeliest alternatives."""
    student, teacher = dict(token.student), dict(token.teacher)
    names = sorted({*student, *teacher}, key=lambda name: -max(student.get(name, 0), teacher.get(name, 0)))[:3]
    for shift, chances, label in ((-0.2, student, "student"), (0.2, teacher, "teacher")):
        places = [place + shift for place in range(len(names))]
        drawn = axis.barh(places, [chances.get(name, 0.0) for name in names], height=0.4, label=label)
        axis.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    axis.set(xlim=(0, 1.1), ylim=(len(names) - 0.5, -0.5), xlabel="probability")
    axis.set_yticks(range(len(names)), labels=names, family="monospace", fontsize=11)
    axis.set_title(title, fontsize=10)


def save(pictures: dict[str, Figure], output: Path) -> list[Path]:
    make_folder(output)
    for name, drawn in pictures.items():
        drawn.savefig(output / f"{name}.png")
    return [output / f"{name}.png" for name in pictures]


def write_page(run: Path, output: Path) -> list[Path]:
    """The page of tokens of a run, and where matplotlib is installed the picture of its first problem."""
    views = view_rollouts(run)
    path = make_folder(output) / f"tokens-{run.name}.html"
    path.write_text(render(views, f"{run.name}: {run_label(run)}"), encoding="utf-8")
    drawable = importlib.util.find_spec("matplotlib") is not None
    return [path, *(save({f"tokens-{run.name}": repair(*views[:2])}, output) if drawable else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of train.py")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/plots"), help="where pictures and pages go")
    args = parser.parse_args()
    print(*(path for run in args.runs for path in write_page(run, args.output_dir)), sep="\n")


if __name__ == "__main__":
    run_script(main)
