"""Pictures of runs, with the optional package matplotlib.

    python -m experiments.study.plots RUN...         learning curves, divergence by position
    python -m experiments.study.plots RUN --html     a page of some solutions, token by token (needs no matplotlib),
                                                     and a picture of the first (where matplotlib is installed)
    python -m experiments.study.plots --study DIR    the study's differences with intervals

Runs that differ only in their seed share a colour; their mean is drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch

import experiments.study.rules  # noqa: F401  (registers its rows: a run of one can be drawn)
from errors import InputError
from experiments.study.grids import GRIDS, Grid
from experiments.study.report import LEVEL, collect, paired_difference, t_quantile
from experiments.study.run import read_cells, read_grid
from experiments.token_page import RolloutView, TokenView, render, shade, view_rollouts
from runtime.flags import run_script
from runtime.records import make_folder
from weighting import SCHEDULES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 5  # steps; a step's accuracy is a mean over few rollouts
TICKS = [-50, -20, -10, -5, 0, 5, 10, 20, 50]  # points


def figure(width: float, height: float, columns: int = 1, rows: int = 1):
    """An empty figure and its axes, drawn without a screen. Raises InputError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    drawn = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = drawn.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
    return drawn, axes


# ---------------------------------------------------------------------------------------------------------------
# Reading


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. Raises InputError where there are none."""
    try:
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{run}: no run with a readable metrics.jsonl ({type(error).__name__})") from None
    if not steps:
        raise InputError(f"{run}: metrics.jsonl is empty")
    return steps


def run_label(run: Path) -> str:
    """What a run is, by its options; equal for runs that differ in their seed only."""
    try:
        config = json.loads((run / "config.json").read_text())["config"]
        parts = [config["method"], *(config[key] for key in ("schedule", "reduction") if config.get(key))]
        return ", ".join([*map(str, parts), f"clip {config['tau_clip']:g}", f"{config['teacher']} teacher"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{run}: no config.json of a run of train.py ({type(error).__name__})") from None


def smooth(values: list[float], width: int = SMOOTHING) -> list[float]:
    """Running mean over the last `width` values."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


# ---------------------------------------------------------------------------------------------------------------
# Pictures


def learning_curves(runs: dict[str, list[list[dict]]]) -> Figure:
    """Rollout accuracy and divergence over the steps, mean over the runs of each label."""
    drawn, (left, right) = figure(10, 4, columns=2)
    for label, members in runs.items():
        steps = range(1, min(map(len, members)) + 1)
        for axis, name in ((left, "accuracy"), (right, "divergence")):
            rows = [[step[name] if step[name] is not None else float("nan") for step in member] for member in members]
            means = [sum(column) / len(column) for column in zip(*rows, strict=False)]
            axis.plot(steps, smooth(means), label=f"{label} ({len(members)})" if len(members) > 1 else label)
    left.set(xlabel="step", ylabel="accuracy of the rollouts", ylim=(0, 1))
    right.set(xlabel="step", ylabel="token loss before weighting (nats)")
    left.legend(fontsize=8, frameon=False)
    drawn.suptitle(f"Learning curves, running mean over {SMOOTHING} steps", fontsize=11)
    return drawn


def schedule_weights() -> Figure:
    """Figure 2 of the paper, w(r) of Eq. (5), with all other schedules drawn dashed."""
    drawn, (axis,) = figure(7, 4)
    paper = ("mild", "moderate", "sharp", "aggressive")
    r = torch.linspace(0, 1, 501)
    for name, schedule in SCHEDULES.items():
        style = {"linewidth": 2} if name in paper else {"linewidth": 1, "linestyle": "--"}
        axis.plot(r.numpy(), schedule(r).numpy(), label=name, **style)
    axis.set(xlabel="relative position r = (t - 0.5) / L", ylabel="weight w(r)", xlim=(0, 1), ylim=(0, 1.05))
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def divergence_by_position(metrics: list[dict], label: str) -> Figure:
    """Token loss by tenth of the solution (upwards) and step (to the right)."""
    drawn, (axis,) = figure(7, 3.6)
    tenths = [step["by_decile"]["divergence"] for step in metrics]
    values = torch.tensor([[float("nan") if v is None else v for v in row] for row in tenths]).T.numpy()
    axis.grid(visible=False)
    image = axis.imshow(
        values, origin="lower", aspect="auto", cmap="viridis", extent=(0.5, len(metrics) + 0.5, 0, 1), vmin=0
    )
    axis.set(xlabel="step", ylabel="relative position", title=label)
    axis.title.set_size(10)
    drawn.colorbar(image, label="token loss (nats)")
    return drawn


def study_figure(grid: Grid, records: list[dict]) -> Figure:
    """Each row's paired difference to the baseline with its 95 % interval, held out, sampled and greedy."""
    rows = {row.name: row for row in collect(grid, records)}
    baseline = rows.pop(grid.baseline)
    rows = {name: row for name, row in rows.items() if row.at}
    drawn, axes = figure(11, 1.2 + 0.27 * len(rows), columns=2)
    for axis, column in zip(axes, ("sampled", "greedy"), strict=True):
        axis.axvline(0, color="0.4", linewidth=1)
        for place, row in enumerate(rows.values()):
            d = paired_difference(row.after(column), baseline.after(column))
            if d is not None:
                axis.errorbar(d.mean, place, xerr=d.half, fmt="o", color="C0", markersize=4, capsize=2)
        axis.set(
            title=f"held-out accuracy, {column}", xlabel=f"points, minus {grid.baseline}", ylim=(len(rows) - 0.5, -0.5)
        )
        axis.set_xscale("symlog", linthresh=10)  # a collapse must not squeeze the rows that can be compared
        ticks = [tick for tick in TICKS if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, labels=map(str, ticks))
        axis.title.set_size(10)
        axis.set_yticks(range(len(rows)), labels=list(rows) if axis is axes[0] else [""] * len(rows), fontsize=8)
    return drawn


def study_along(grid: Grid, records: list[dict]) -> Figure:
    """Held-out accuracy and leaps along training, a line a row: with a 95 % band, or dashed where it has one seed."""
    rows = [row for row in collect(grid, records) if row.at]
    drawn, axes = figure(12, 4.6, columns=3)
    for axis, measure in zip(axes, ("sampled", "greedy", "leaps"), strict=True):
        for number, row in enumerate(rows):
            values, color = [list(row.after(measure, step).values()) for step in row.at], f"C{number % 10}"
            means, seeds = [mean(of_seeds) for of_seeds in values], len(values[0])
            style = "-" if seeds > 1 else "--"
            axis.plot(list(row.at), means, style, color=color, label=f"{row.name} ({seeds})")
            if seeds > 1:
                halves = [t_quantile(LEVEL, seeds - 1) * stdev(of_seeds) / sqrt(seeds) for of_seeds in values]
                low, high = ([m + sign * half for m, half in zip(means, halves, strict=True)] for sign in (-1, 1))
                axis.fill_between(list(row.at), low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(title={"leaps": "greedy solutions that leap, %"}.get(measure, f"held-out accuracy, {measure}, %"))
        axis.set(xlabel="steps", ylim=(-2, 102))
        axis.title.set_size(10)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return drawn


def repair(before: RolloutView, after: RolloutView) -> Figure:
    """A problem's solution before and after training, and what both contexts say at the token where the two part."""
    drawn, _ = figure(9, 4.4)
    drawn.clear()
    axes = drawn.subplot_mosaic([["tokens", "tokens"], ["before", "after"]], height_ratios=(1, 1.1))
    top = max(abs(t.divergence * t.weight) for view in (before, after) for t in view.tokens) or 1.0
    width = max(sum(len(token.text) for token in view.tokens) for view in (before, after))
    axes["tokens"].set(xlim=(0, width), ylim=(-0.2, 3.9))
    axes["tokens"].axis("off")
    for y, view in ((2, before), (0, after)):
        verdict = "right" if view.correct else "wrong"
        label = f"{view.title}: {view.problem.problem}, {verdict}"
        axes["tokens"].text(0, y + 1.15, label, color="C2" if view.correct else "C3", fontsize=10)
        x = 0
        for token in view.tokens:
            size = len(token.text)
            axes["tokens"].broken_barh([(x, size)], (y, 0.9), color=(0.84, 0.27, 0.0, shade(token, top)), linewidth=0)
            axes["tokens"].text(
                x + size / 2, y + 0.45, token.text, family="monospace", ha="center", va="center", parse_math=False
            )
            x += size
    pairs = enumerate(zip(before.tokens, after.tokens, strict=False))
    part = next((t for t, (a, b) in pairs if a.text != b.text), 0)
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
    axis.set(xlim=(0, 1.1), ylim=(len(names) - 0.5, -0.5), title=title, xlabel="probability")
    axis.set_yticks(range(len(names)), labels=names, family="monospace", fontsize=11)
    axis.title.set_size(10)


# ---------------------------------------------------------------------------------------------------------------


def plot_runs(runs: list[Path], output: Path) -> list[Path]:
    metrics = {run: read_metrics(run) for run in runs}
    groups: dict[str, list[list[dict]]] = {}
    for run in runs:
        groups.setdefault(run_label(run), []).append(metrics[run])
    pictures = {"learning_curves": learning_curves(groups), "schedules": schedule_weights()}
    for run in runs:
        pictures[f"divergence-{run.name}"] = divergence_by_position(metrics[run], f"{run_label(run)}, {run.name}")
    return save(pictures, output)


def study_pictures(grid: Grid, records: list[dict]) -> dict[str, Figure]:
    """The differences to the baseline, and where the grid scores along training, the curves of that."""
    pictures = {"study": study_figure(grid, records)}
    if "eval_steps" in grid.common:
        pictures["study_along"] = study_along(grid, records)
    return pictures


def save(pictures: dict[str, Figure], output: Path) -> list[Path]:
    make_folder(output)
    paths = [output / f"{name}.png" for name in pictures]
    for path, drawn in zip(paths, pictures.values(), strict=True):
        drawn.savefig(path)
    return paths


def write_page(run: Path, output: Path) -> list[Path]:
    """The page of tokens of a run, and where matplotlib is installed the picture of its first problem."""
    views = view_rollouts(run)
    make_folder(output)
    path = output / f"tokens-{run.name}.html"
    path.write_text(render(views, f"{run.name}: {run_label(run)}"), encoding="utf-8")
    drawable = importlib.util.find_spec("matplotlib") is not None
    return [path, *(save({f"tokens-{run.name}": repair(*views[:2])}, output) if drawable else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders of train.py")
    parser.add_argument("--html", action="store_true", help="write a page of tokens per run instead of pictures")
    parser.add_argument("--study", type=Path, help="a folder with the cells.jsonl of experiments.study")
    parser.add_argument("--grid", default="embedded", help=f"the study's grid: {', '.join(GRIDS)}, or a JSON file")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/plots"), help="where pictures and pages go")
    args = parser.parse_args()
    if not args.runs and not args.study:
        raise InputError("name at least one run folder, or --study DIR")
    paths = []
    if args.study:
        records = read_cells(args.study / "cells.jsonl")
        if not records:
            raise InputError(f"--study {args.study}: no cells have been measured there")
        grid = GRIDS[args.grid] if args.grid in GRIDS else read_grid(Path(args.grid))
        paths += save(study_pictures(grid, records), args.output_dir)
    if args.html:
        paths += [path for run in args.runs for path in write_page(run, args.output_dir)]
    elif args.runs:
        paths += plot_runs(args.runs, args.output_dir)
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    run_script(main)
