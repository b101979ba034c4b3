"""Figure 1 of the diagnostic, one row of two panels for each run. Axes: C candidates."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from errors import InputError
from experiments.diagnose_controls import INDEX, REMAINING, mean_with_interval
from viability import POSITION, Candidates, centre, midranks
from weighting import SIGMOIDS


def figure(runs: dict[str, tuple[Candidates, dict]], path: Path) -> None:
    """Write Figure 1 of each run, {title: (its candidates, their analysis)}, one below the other, as PNG and SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"{path}.png needs `pip install matplotlib`; the numbers are written") from None
    drawing = Figure(figsize=(11, 4.2 * len(runs)), layout="constrained")
    for row, (title, (data, result)) in enumerate(runs.items()):
        panels = drawing.add_subplot(len(runs), 2, 2 * row + 1), drawing.add_subplot(len(runs), 2, 2 * row + 2)
        draw_ranks(panels[0], data)
        draw_reliability(panels[1], data, result)
        if len(runs) > 1:
            for panel in panels:
                panel.set_title(f"{panel.get_title(loc='left')}: {title}", loc="left", fontsize=10)
    with matplotlib.rc_context({"svg.hashsalt": "figure1"}):
        for kind in ("png", "svg"):
            drawing.savefig(f"{path}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)


def draw_ranks(axes, data: Candidates) -> None:
    """(A) Wrong-answer rate of the teacher's children against the rank by each score, in fifths."""
    wrong_C = 1.0 - data.viability["teacher"].mean(axis=1)
    for name, score_C in data.score.items():
        rank_C = midranks(centre(score_C, data.problem)) / len(score_C)
        fifth_C = np.minimum((rank_C * 5).astype(int), 4)
        held = [i for i in range(5) if (fifth_C == i).any()]
        rates = [wrong_C[fifth_C == i].mean() for i in held]
        dashes = {REMAINING: "--", INDEX: ":"}.get(name, "-")  # on top: they may coincide with position
        width = 3.0 if name == POSITION else 1.4
        axes.plot([20 * i + 10 for i in held], rates, dashes, marker="o", markersize=4, label=name, linewidth=width)
    axes.set(
        xlabel="percentile of the score (right: more suspect)",
        ylabel="wrong-answer rate",
        xlim=(0, 100),
        ylim=(0, None),
    )
    axes.set_title("A  Forced teacher tokens, ranked by each score", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=2)


def draw_reliability(axes, data: Candidates, result: dict) -> None:
    """(B) Viability against r by tenths, teacher's children and unforced, with the fitted and the default weight."""
    tenth_C = np.minimum((data.r * 10).astype(int), 9)
    for arm, colour, shift in (("teacher", "C0", -0.006), ("unforced", "C1", 0.006)):
        value_C = data.viability[arm].mean(axis=1)
        for i in np.unique(tenth_C):
            where_C = tenth_C == i
            entry, r = mean_with_interval(value_C, data, where_C), data.r[where_C].mean() + shift
            size = 12.0 + 60.0 * where_C.mean()
            axes.plot([r, r], entry["interval"], color=colour, linewidth=1.2)
            axes.scatter(r, entry["mean"], s=size, color=colour, label=arm if i == tenth_C.min() else None, zorder=3)
    r = np.linspace(0.0, 1.0, 201)
    fit = result["schedule"]["teacher"]
    curves = {"Eq. (5), fitted": (fit["w_min"], fit["tau"], fit["s"]), "Eq. (5), Moderate": SIGMOIDS["moderate"]}
    for (name, (w_min, tau, s)), dashes in zip(curves.items(), ("-", ":"), strict=True):
        w = w_min + (1.0 - w_min) / (1.0 + np.exp(-(r - tau) / s))
        axes.plot(r, w, dashes, color="0.3", label=name)
    axes.set(xlabel="relative position r", ylabel="viability; weight", xlim=(0, 1), ylim=(0, 1.03))
    axes.set_title("B  Reliability against position (95 %)", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
