"""One picture of a run of train.py, finished or under way: RUN/run.png. Needs matplotlib.

    python -m experiments.draw_run runs/RUN

Held-out accuracy, loss, length, how rollouts end, the entropies of both contexts, gradient norm, and the divergence by
tenth of the solution, over the steps done; docs/metrics.md has the formulas. All axes start at 0 and are
linear; the colours are not and say so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import experiments.study.rules  # noqa: F401  (registers its rows: a run of one can be drawn)
from errors import InputError
from experiments.study.plots import figure, run_label
from runtime.flags import run_script
from runtime.records import read_rows

PANELS = {  # columns of metrics.jsonl by what they have in common
    "loss": ["loss", "divergence"],
    "tokens of a solution": ["mean_length"],
    "share of the rollouts": ["accuracy", "eos_rate", "repetition"],
    "entropy (nats)": ["student_entropy", "teacher_entropy"],
    "gradient norm before clipping": ["grad_norm"],
}
HELD_OUT, TENTHS = "held-out accuracy", "relative position"
LAYOUT = [[HELD_OUT, *[*PANELS][:2]], [*PANELS][2:], [TENTHS] * 3]


def draw(run: Path) -> Path:
    rows = read_rows(
        run / "metrics.jsonl", ("step", "by_decile", *(name for names in PANELS.values() for name in names))
    )
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
    drawn.suptitle(f"{run.name}: {run_label(run)}", fontsize=11)
    drawn.savefig(run / "run.png")
    return run / "run.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    print(draw(parser.parse_args().run))


if __name__ == "__main__":
    run_script(main)
