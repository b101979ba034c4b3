"""What a run of diagnose.py says: Table 1 beside its controls, Figure 1, and a fitted schedule.

    python -m experiments.diagnose_report runs/diagnose-tiny
    python -m experiments.diagnose_report RUN RUN --output_dir runs/diagnose-report       runs side by side

- Controls, compared by candidate: the student's own tokens forced, and nothing forced. The unforced arm is the null of
  all scores: early candidates fail more often there, too, because more remains to be done.
- Centrings: a score minus its problem's mean over the labelled candidates, or over all of them. The paper does not say.

Each run's folder gets controls.json (all numbers); --output_dir, by default the folder of a single run, gets report.md,
with train.py's flags for the fitted schedule, and Figure 1. Needs `pip install matplotlib` for the figure alone.
Axes: C candidates, K children of a candidate, N rollouts of a child, P problems, R bootstrap resamples, G grid points.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import viability
from errors import InputError
from experiments.draw_run import figure
from experiments.study.report import markdown
from runtime.flags import run_script
from runtime.records import make_folder, read_rows, write_atomically
from viability import ARMS, DIVERSITY, LABELS, POSITION, UNCERTAIN, Candidates, LabelRule, auroc_of, centre, interval
from weighting import SIGMOIDS

REMAINING = "remaining length"
TAU_GRID, S_GRID = np.linspace(-0.5, 1.0, 76), np.geomspace(0.01, 1.0, 41)  # of Eq. (5), searched
CENTRINGS = {"labelled": False, "all": True}  # over which candidates a problem's mean is taken
Measured = tuple[dict, np.ndarray] | None  # a row of `viability.auroc_of`


# --- The analysis of one set of candidates ----------------------------------------------------------------------


def analyse(rows: list[dict], rule: LabelRule) -> tuple[Candidates, dict]:
    """The candidates in columns, a competing score among them, and everything that is reported about them.

    Remaining length competes with position; a token's index does not: within a problem the two differ by a constant.
    """
    data = viability.to_columns(rows, rule)
    rival_C = (data.length - data.position).astype(float)
    data = replace(data, score=data.score | {REMAINING: rival_C})
    return data, {
        **viability.table1(data),
        "position_minus_remaining": difference(auroc_of(data, data.score[POSITION]), auroc_of(data, rival_C)),
        "arms": {arm: analyse_arm(data, arm) for arm in ARMS},
        "schedule": {arm: analyse_fit(data, arm) for arm in ("teacher", "unforced")},
    }


def analyse_arm(data: Candidates, arm: str) -> dict:
    """Viability of an arm, the paired difference teacher - arm, and each score's AUROC on the arm's own labels."""
    mean_C = data.viability[arm].mean(axis=1)
    paired_C = data.viability["teacher"].mean(axis=1) - mean_C
    parts = {"all": data.r < 1.0, "early": data.r < 0.5, "late": data.r >= 0.5}
    teacher, position = (auroc_of(data, data.score[POSITION], which) for which in ("teacher", arm))
    uncertain, diverse = (set(data.problem[data.label[arm] == label]) for label in (UNCERTAIN, DIVERSITY))
    return {
        "viability": {part: mean_with_interval(mean_C, data, where_C) for part, where_C in parts.items()},
        "teacher_minus_arm": {part: mean_with_interval(paired_C, data, where_C) for part, where_C in parts.items()},
        "slope": slope(mean_C, data),
        "slope_teacher_minus_arm": slope(paired_C, data),
        "labels": {name: int((data.label[arm] == code).sum()) for code, name in enumerate(LABELS)},
        "problems_labelled": len(uncertain | diverse),
        "problems_with_both_classes": len(uncertain & diverse),
        "auroc": {
            name: {s: (row := auroc_of(data, score_C, arm, over_all)) and row[0] for s, score_C in data.score.items()}
            for name, over_all in CENTRINGS.items()
        },
        "position_teacher_minus_arm": difference(teacher, position),
    }


def analyse_fit(data: Candidates, arm: str) -> dict:
    """(w_min, tau, s) of Eq. (5) fitted to an arm's mean viability, gray candidates included, with intervals."""
    counts_RP = np.vstack([np.ones((1, data.counts.shape[1])), data.counts])
    fits = fit_schedule(data.r, data.viability[arm].mean(axis=1), data.problem, counts_RP)
    edges = {"w_min": (0.0, 1.0), "tau": (TAU_GRID[0], TAU_GRID[-1]), "s": (S_GRID[0], S_GRID[-1])}
    columns = dict(zip(edges, fits.T, strict=True))
    return {
        **{name: float(column[0]) for name, column in columns.items()},
        "at_the_edge": [name for name, column in columns.items() if column[0] in edges[name]],
        "intervals": {name: interval(column[1:]) for name, column in columns.items()},
    }


def difference(one: Measured, other: Measured) -> dict | None:
    """AUROC of one minus AUROC of the other, paired by resample."""
    if one is None or other is None:
        return None
    return {"difference": one[0]["auroc"] - other[0]["auroc"], "interval": interval(one[1] - other[1])}


def mean_with_interval(value_C: np.ndarray, data: Candidates, where_C: np.ndarray) -> dict | None:
    """The mean over some candidates, each of the same weight in every resample; None over none."""
    if not where_C.any():
        return None
    P, value_C, problem_C = data.counts.shape[1], value_C[where_C], data.problem[where_C]
    sums, sizes = np.bincount(problem_C, value_C, minlength=P), np.bincount(problem_C, minlength=P)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold none
        values_R = (data.counts @ sums) / (data.counts @ sizes)
    return {"mean": float(value_C.mean()), "interval": interval(values_R), "n": len(value_C)}


def slope(value_C: np.ndarray, data: Candidates) -> dict | None:
    """How much a value rises from r = 0 to 1 within a problem (least squares), None where each has one candidate."""
    r_C, value_C = (centre(x_C, data.problem) for x_C in (data.r, value_C))
    rises_P, squares_P = (np.bincount(data.problem, r_C * x_C) for x_C in (value_C, r_C))
    if not squares_P.any():
        return None
    with np.errstate(invalid="ignore"):  # a resample may hold none with two
        values_R = (data.counts @ rises_P) / (data.counts @ squares_P)
    return {"mean": float(rises_P.sum() / squares_P.sum()), "interval": interval(values_R)}


# --- The schedule that fits ------------------------------------------------------------------------------------


def fit_schedule(
    r_C: np.ndarray, reliability_C: np.ndarray, problem_C: np.ndarray, counts_RP: np.ndarray
) -> np.ndarray:
    """Least squares of Eq. (5), w = w_min + (1 - w_min) * sigmoid((r - tau) / s), to a reliability; [R, 3].

    Columns w_min, tau, s. The ideal weight of Eqs. (2)-(3) is the reliability itself, so no scale is fitted. For given
    tau and s the squared error is a parabola in w_min, solved exactly; tau and s are searched on a grid, which no
    local optimum can trap.
    """
    tau_G, s_G = (grid.ravel() for grid in np.meshgrid(TAU_GRID, S_GRID))
    sigmoid_GC = 1.0 / (1.0 + np.exp(-np.clip((r_C - tau_G[:, None]) / s_G[:, None], -50.0, 50.0)))
    # error = sum_C (rest + w_min * down)^2 with down = 1 - sigmoid, rest = sigmoid - reliability: a sum over problems.
    down_GC, rest_GC = 1.0 - sigmoid_GC, sigmoid_GC - reliability_C
    in_problem_CP = np.eye(counts_RP.shape[1])[problem_C]
    A, B, C = ((x_GC @ in_problem_CP) @ counts_RP.T for x_GC in (down_GC**2, down_GC * rest_GC, rest_GC**2))
    w_min_GR = np.clip(-B / np.maximum(A, 1e-12), 0.0, 1.0)
    best_R = (A * w_min_GR**2 + 2.0 * B * w_min_GR + C).argmin(axis=0)
    return np.stack([w_min_GR[best_R, np.arange(len(best_R))], tau_G[best_R], s_G[best_R]], axis=1)


# --- In tables --------------------------------------------------------------------------------------------------


def number(value: float | None, bounds: list[float] | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"


def cell(entry: dict | None, key: str = "mean", sign: str = "") -> str:
    return number(entry[key], entry["interval"], sign) if entry else "-"


def counts(labels: dict[str, int]) -> str:
    return " / ".join(str(labels[name]) for name in ("real-uncertain", "diversity", "gray"))


def table1_beside_control(result: dict) -> str:
    """Table 1 of a run by both centrings, on the teacher's labels and where no token was forced."""
    head = ["AUROC", "teacher's tokens forced", "- centred over all", "no token forced", "- centred over all"]
    arms = [result["arms"][arm] for arm in ("teacher", "unforced")]
    columns = [arm["auroc"][centring] for arm in arms for centring in CENTRINGS]
    rows = [[name, *(cell(column[name], "auroc") for column in columns)] for name in columns[0]]
    for name, key in (("problems with a label", "problems_labelled"), ("- with both", "problems_with_both_classes")):
        rows.append([name, *(str(arm[key]) for arm in arms for _ in CENTRINGS)])
    return markdown(head, rows)


def column(result: dict) -> dict[str, str]:
    """One run's other numbers with their 95 % intervals, by the name of their row."""
    arms = result["arms"]
    rows = {
        "problems, candidates": f"{result['problems']}, {result['candidates']}",
        "real-uncertain / diversity / gray": counts(result["labels"]),
        f"AUROC of {POSITION} minus {REMAINING}": cell(result["position_minus_remaining"], "difference", "+"),
        **{f"viability, {arm}": cell(arms[arm]["viability"]["all"]) for arm in ARMS},
        **{f"- its rise from r = 0 to 1 within a problem, {arm}": cell(arms[arm]["slope"], sign="+") for arm in ARMS},
    }
    for arm in ARMS[1:]:
        for part, what in (("all", ""), ("early", ", early (r < 0.5)"), ("late", ", late")):
            rows[f"- teacher minus {arm}{what}"] = cell(arms[arm]["teacher_minus_arm"][part], sign="+")
        rows[f"- rise, teacher minus {arm}"] = cell(arms[arm]["slope_teacher_minus_arm"], sign="+")
    for arm in ARMS[1:]:
        own = arms[arm]["auroc"]["labelled"][POSITION]
        rows[f"labels of the {arm} arm"] = counts(arms[arm]["labels"])
        rows[f"- AUROC of {POSITION} on the {arm} arm's labels"] = cell(own, "auroc")
        apart = arms[arm]["position_teacher_minus_arm"]
        rows[f"- the teacher's minus the {arm} arm's"] = cell(apart, "difference", "+")
    for arm, fit in result["schedule"].items():
        for name, bounds in fit["intervals"].items():
            edge = ", at the edge of the grid" if name in fit["at_the_edge"] else ""
            rows[f"Eq. (5) fitted to {arm}, {name}"] = number(fit[name], bounds) + edge
    return rows


# --- Figure 1 ---------------------------------------------------------------------------------------------------


def figure1(runs: dict[str, tuple[Candidates, dict]], path: Path) -> None:
    """Write Figure 1 of each run, {title: (candidates, analysis)}, one below the other."""
    drawn, axes = figure(11, 4.2 * len(runs), [[f"A {title}", f"B {title}"] for title in runs])
    for title, (data, result) in runs.items():
        draw_ranks(axes[f"A {title}"], data)
        draw_reliability(axes[f"B {title}"], data, result)
        behind = f": {title}" if len(runs) > 1 else ""
        axes[f"A {title}"].set_title(f"A  Forced teacher tokens, ranked by each score{behind}", loc="left", fontsize=10)
        axes[f"B {title}"].set_title(f"B  Reliability against position (95 %){behind}", loc="left", fontsize=10)
    drawn.savefig(path)


def draw_ranks(axes, data: Candidates) -> None:
    """(A) Wrong-answer rate of the teacher's children against the rank by each score, in fifths."""
    wrong_C = 1.0 - data.viability["teacher"].mean(axis=1)
    for name, score_C in data.score.items():
        rank_C = viability.midranks(viability.centre(score_C, data.problem)) / len(score_C)
        fifth_C = np.minimum((rank_C * 5).astype(int), 4)
        held = np.unique(fifth_C)
        rates = [wrong_C[fifth_C == i].mean() for i in held]
        dashes = "--" if name == REMAINING else "-"  # on top: the two may coincide
        width = 3.0 if name == POSITION else 1.4
        axes.plot(20 * held + 10, rates, dashes, marker="o", markersize=4, label=name, linewidth=width)
    axes.set(xlabel="percentile of the score (right: more suspect)", ylabel="wrong-answer rate")
    axes.set(xlim=(0, 100), ylim=(0, None))
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
    fit, r = result["schedule"]["teacher"], np.linspace(0.0, 1.0, 201)
    fitted = (fit["w_min"], fit["tau"], fit["s"])
    for name, (w_min, tau, s), dashes in (("fitted", fitted, "-"), ("Moderate", SIGMOIDS["moderate"], ":")):
        w = w_min + (1.0 - w_min) / (1.0 + np.exp(-(r - tau) / s))
        axes.plot(r, w, dashes, color="0.3", label=f"Eq. (5), {name}")
    axes.set(xlabel="relative position r", ylabel="viability; weight", xlim=(0, 1), ylim=(0, 1.03))
    axes.legend(fontsize=8, frameon=False, loc="lower right")


# --- The script -------------------------------------------------------------------------------------------------


def analyse_run(run: Path) -> tuple[Candidates, dict]:
    """The analysis of a run folder, written there as controls.json."""
    try:
        rows = read_rows(run / "F_labels.jsonl")
        rule = LabelRule(**json.loads((run / "table1.json").read_text(encoding="utf-8"))["rule"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run}: no finished run of diagnose.py ({type(error).__name__}: {error})") from None
    if not rows:
        raise InputError(f"{run}: its run found no candidate")
    data, result = analyse(rows, rule)
    write_atomically(run / "controls.json", json.dumps(result, indent=2) + "\n")
    return data, result


def write_report(runs: list[Path], output_dir: Path) -> str:
    """OUTPUT_DIR/report.md on all runs; returns its text. Figure 1 is drawn last: it needs matplotlib."""
    if output_dir not in runs:  # a folder named wrongly is not made
        make_folder(output_dir)
        theirs = output_dir / "report.md"
        if theirs.is_file() and not theirs.read_bytes().startswith(b"| run |"):
            raise InputError(f"--output_dir {output_dir}: holds a report.md of another program")
    titled = {str(run): analyse_run(run) for run in runs}
    columns = [column(result) for _, result in titled.values()]
    parts = [markdown(["run", *titled], [[name, *(entry[name] for entry in columns)] for name in columns[0]])]
    for title, (_, result) in titled.items():
        fit = result["schedule"]["teacher"]
        flags = " ".join(["--schedule moderate", *(f"--{name} {fit[name]:.4g}" for name in ("w_min", "tau", "s"))])
        parts += [f"**{title}**, to train with the fit: `{flags}`.", table1_beside_control(result)]
    text = "\n\n".join(parts) + "\n"
    write_atomically(output_dir / "report.md", text)
    print(text)
    figure1(titled, output_dir / "figure1.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of diagnose.py")
    parser.add_argument("--output_dir", type=Path, help="of report.md and Figure 1; default: that of a single run")
    args = parser.parse_args()
    if len(args.runs) > 1 and args.output_dir is None:
        raise InputError("several runs need --output_dir")
    output_dir = args.output_dir or args.runs[0]
    write_report(args.runs, output_dir)
    print(f"{output_dir}/report.md, {output_dir}/figure1.png")


if __name__ == "__main__":
    run_script(main)
