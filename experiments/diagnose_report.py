"""Phase G of the diagnostic: Table 1 with the controls and the null beside it, Figure 1, and the schedule they support.

Everything is a function of the rows of F_labels.jsonl. A score is oriented beforehand: a higher value is more suspect.

Axes: C candidates, K children of a candidate, P problems, R bootstrap resamples.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import write_atomically
from experiments.diagnose_statistics import (
    DIVERSITY,
    GRAY,
    LABELS,
    S_GRID,
    TAU_GRID,
    UNCERTAIN,
    LabelRule,
    auprc,
    auroc,
    bootstrap_auroc,
    bootstrap_mean,
    centre,
    fit_schedule,
    fit_survival,
    interval,
    midranks,
    resamples,
    simulate_null,
)
from weighting import SIGMOIDS

ARMS = ("teacher", "student", "unforced")
SIMULATIONS = 1000  # worlds drawn for the null

# ---------------------------------------------------------------------------------------------------------------
# The analysis of one set of candidates


POSITION, REMAINING, INDEX = "1 - r", "remaining length", "absolute index"
# Paper, Table 1: AUROC and its interval.
PAPER = {"H(p)": "0.51 [.50,.84]", "MI": "0.51 [.50,.62]", "log kappa": "0.54 [.50,.69]", "h_trunc": "0.57 [.51,.72]",
         POSITION: "0.83 [.66,.95]"}  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """Columns over C candidates, and the resamples that all intervals share."""

    problem: np.ndarray  # [C], 0..P-1
    r: np.ndarray  # [C], r~ = (position + 0.5) / L
    score: dict[str, np.ndarray]  # each [C], higher is more suspect
    viability: dict[str, np.ndarray]  # arm -> [C, K]
    label: dict[str, np.ndarray]  # arm -> [C]
    counts: np.ndarray  # [R, P], how often a resample holds each problem


def to_columns(rows: list[dict], bootstraps: int, seed: int) -> Candidates:
    _, problem_C = np.unique([row["problem"] for row in rows], return_inverse=True)
    position_C, length_C = np.array([row["position"] for row in rows]), np.array([row["length"] for row in rows])
    r_C = (position_C + 0.5) / length_C
    score = {
        "H(p)": np.array([row["entropy"] for row in rows]),
        "MI": np.array([row["mutual_information"] for row in rows]),
        "log kappa": -np.array([row["log_kappa"] for row in rows]),  # a low precision is suspect
        "h_trunc": np.array([row["h_trunc"] for row in rows]),
        POSITION: 1.0 - r_C,
        REMAINING: (length_C - position_C).astype(float),
        INDEX: -position_C.astype(float),
    }
    return Candidates(
        problem_C, r_C, score,
        {arm: np.array([row["viability"][arm] for row in rows]) for arm in ARMS},
        {arm: np.array([LABELS.index(row["label"][arm]) for row in rows]) for arm in ARMS},
        resamples(problem_C.max() + 1, bootstraps, seed),
    )  # fmt: skip


def auroc_of(data: Candidates, name: str, arm: str = "teacher") -> tuple[dict, np.ndarray] | None:
    """A row of Table 1 and its AUROC per resample, from the labels of an arm; None where a class has no candidate."""
    used = data.label[arm] != GRAY
    label, problem_C = data.label[arm][used], data.problem[used]
    if not ((label == UNCERTAIN).any() and (label == DIVERSITY).any()):
        return None
    score = centre(data.score[name][used], problem_C)
    point, values_R = auroc(score, label), bootstrap_auroc(score, label, problem_C, data.counts)
    return {
        "auroc": point,
        "interval": interval(values_R),
        "interval_reoriented": interval(np.maximum(values_R, 1.0 - values_R)),
        "auprc": auprc(score, label),
    }, values_R


def difference(one: tuple[dict, np.ndarray] | None, other: tuple[dict, np.ndarray] | None) -> dict | None:
    """AUROC of one minus AUROC of the other, paired by resample."""
    if one is None or other is None:
        return None
    return {"difference": one[0]["auroc"] - other[0]["auroc"], "interval": interval(one[1] - other[1])}


def mean_with_interval(value_C: np.ndarray, data: Candidates, where_C: np.ndarray) -> dict | None:
    if not where_C.any():
        return None
    values_R = bootstrap_mean(value_C[where_C], data.problem[where_C], data.counts)
    return {"mean": float(value_C[where_C].mean()), "interval": interval(values_R), "n": int(where_C.sum())}


def analyse_arm(data: Candidates, arm: str) -> dict:
    """Viability of an arm, the paired difference teacher - arm, and position's AUROC on the arm's own labels."""
    mean_C = data.viability[arm].mean(axis=1)
    paired_C = data.viability["teacher"].mean(axis=1) - mean_C
    parts = {"all": data.r < 1.0, "early": data.r < 0.5, "late": data.r >= 0.5}
    position, teacher = auroc_of(data, POSITION, arm), auroc_of(data, POSITION)
    return {
        "viability": {part: mean_with_interval(mean_C, data, where_C) for part, where_C in parts.items()},
        "teacher_minus_arm": {part: mean_with_interval(paired_C, data, where_C) for part, where_C in parts.items()},
        "labels": {name: int((data.label[arm] == code).sum()) for code, name in enumerate(LABELS)},
        "position": position and position[0],
        "position_teacher_minus_arm": difference(teacher, position),
    }


def analyse_null(data: Candidates, rule: LabelRule, seed: int) -> dict:
    """Survival per remaining token fitted to the unforced arm, and position's AUROC in the null world that it makes."""
    remaining_C = data.score[REMAINING]
    survival = fit_survival(remaining_C, data.viability["unforced"].mean(axis=1))
    values = simulate_null(survival**remaining_C, data.score[POSITION], data.problem, rule, SIMULATIONS, seed)
    has_both = np.isfinite(values)
    return {
        "survival_per_token": survival,
        "auroc": float(values[has_both].mean()) if has_both.any() else None,
        "range": interval(values),
        "worlds_with_both_classes": float(has_both.mean()),
    }


def analyse_fit(data: Candidates, arm: str) -> dict:
    """(w_min, tau, s) of Eq. (5) fitted to an arm's mean viability, gray candidates included, with intervals."""
    once = np.ones((1, data.counts.shape[1]))
    fits = fit_schedule(data.r, data.viability[arm].mean(axis=1), data.problem, np.vstack([once, data.counts]))
    columns = dict(zip(("w_min", "tau", "s"), fits.T, strict=True))
    edges = {"w_min": (0.0, 1.0), "tau": (TAU_GRID[0], TAU_GRID[-1]), "s": (S_GRID[0], S_GRID[-1])}
    return {
        **{name: float(column[0]) for name, column in columns.items()},
        "at_the_edge": [name for name, column in columns.items() if column[0] in edges[name]],
        "intervals": {name: interval(column[1:]) for name, column in columns.items()},
    }


def analyse(data: Candidates, rule: LabelRule, seed: int) -> dict:
    """Everything that is reported about one set of candidates."""
    table = {name: auroc_of(data, name) for name in data.score}
    return {
        "problems": int(data.counts.shape[1]),
        "candidates": len(data.r),
        "labels": {name: int((data.label["teacher"] == code).sum()) for code, name in enumerate(LABELS)},
        "table1": {name: row and row[0] for name, row in table.items()},
        "position_minus_remaining": difference(table[POSITION], table[REMAINING]),
        "position_minus_index": difference(table[POSITION], table[INDEX]),
        "arms": {arm: analyse_arm(data, arm) for arm in ARMS},
        "null": analyse_null(data, rule, seed),
        "schedule": {arm: analyse_fit(data, arm) for arm in ("teacher", "unforced")},
    }


# ---------------------------------------------------------------------------------------------------------------
# In words


def number(value: float | None, bounds: list[float] | None = None, signed: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def cell(entry: dict | None, key: str = "mean", signed: bool = False) -> str:
    return number(entry[key], entry["interval"], signed) if entry else "-"


def table_lines(result: dict) -> list[str]:
    """Table 1 and the table of controls, as text."""
    labels = result["labels"]
    counts = ", ".join(f"{labels[name]} {name}" for name in ("real-uncertain", "diversity", "gray"))
    lines = [
        f"{result['candidates']} candidates in {result['problems']} problems: {counts} (left out)",
        "",
        f"{'Table 1':18s} {'AUROC [95 %, fixed]':22s} {'[re-oriented]':15s} {'AUPRC':7s} paper (8 / 271)",
    ]
    for name, row in result["table1"].items():
        if row is None:
            lines.append(f"{name:18s} no candidate of one class: no number")
            continue
        low, high = row["interval_reoriented"]
        again = f"[{low:.2f}, {high:.2f}]"
        lines.append(f"{name:18s} {cell(row, 'auroc'):22s} {again:15s} {row['auprc']:.3f}   {PAPER.get(name, '')}")
    for rival, key in ((REMAINING, "position_minus_remaining"), (INDEX, "position_minus_index")):
        lines.append(f"AUROC of {POSITION} minus {rival}: {cell(result[key], 'difference', signed=True)}")
    lines += [
        "",
        f"{'Controls':9s} {'viability':19s} {'teacher - arm':21s} {'early (r < 0.5)':21s} {'late':21s} "
        f"{'uncertain/div./gray':19s} AUROC of {POSITION}",
    ]
    for arm, row in result["arms"].items():
        cells = [cell(entry, signed=True) if arm != "teacher" else "" for entry in row["teacher_minus_arm"].values()]
        triple = " / ".join(str(row["labels"][name]) for name in ("real-uncertain", "diversity", "gray"))
        lines.append(
            f"{arm:9s} {cell(row['viability']['all']):19s} {cells[0]:21s} {cells[1]:21s} {cells[2]:21s} "
            f"{triple:19s} {cell(row['position'], 'auroc')}"
        )
    return lines


def null_lines(result: dict) -> list[str]:
    """The null's AUROC and the fitted schedules, as text."""
    null = result["null"]
    lines = [
        "",
        f"Null (teacher = student, survival {null['survival_per_token']:.4f} per remaining token, fitted to the "
        f"unforced arm): AUROC of {POSITION} {number(null['auroc'], null['range'])} on these candidates",
    ]
    for arm, fit in result["schedule"].items():
        parts = [f"{name} {number(fit[name], fit['intervals'][name])}" for name in ("w_min", "tau", "s")]
        edge = f" (at the edge of what was tried: {', '.join(fit['at_the_edge'])})" if fit["at_the_edge"] else ""
        lines.append(f"Eq. (5) fitted to the viability of the {arm} arm: {', '.join(parts)}{edge}")
    return lines


def verdict(result: dict) -> str:
    """What the evidence supports, in sentences that follow from the intervals alone."""
    position, arms = result["table1"][POSITION], result["arms"]
    if position is None:
        return "One class has no candidate: this run says nothing about any score."
    low, high = position["interval"]
    if low > 0.5:
        found = "Early candidates are real-uncertain more often than late ones"
    elif high < 0.5:
        found = "Late candidates are real-uncertain more often than early ones"
    else:
        found = "Position does not separate the classes"
    sentences = [f"{found} (AUROC {cell(position, 'auroc')})."]
    null = result["null"]
    if null["range"] and null["range"][0] <= position["auroc"] <= null["range"][1]:
        sentences.append(
            "A teacher that is just the student would give as much: the AUROC lies inside the null's range."
        )
    elif null["range"]:
        side = "above" if position["auroc"] > null["range"][1] else "below"
        sentences.append(f"The AUROC lies {side} the range of a teacher that is just the student.")
    for arm, what in (("unforced", "no token was forced"), ("student", "the student's own tokens were forced")):
        gap = arms[arm]["position_teacher_minus_arm"]
        if gap is None:
            sentences.append(f"Where {what}, one class has no candidate, so position cannot be compared.")
        elif gap["interval"][0] <= 0.0 <= gap["interval"][1]:
            sentences.append(
                f"Where {what}, position separates as well, as far as can be told ({cell(gap, 'difference', True)})."
            )
        else:
            word = "worse" if gap["difference"] > 0.0 else "better"
            sentences.append(
                f"Where {what}, position separates {word} (AUROC difference {cell(gap, 'difference', True)})."
            )
    for arm, what in (("unforced", "going on unforced"), ("student", "forcing the student's own tokens")):
        parts = arms[arm]["teacher_minus_arm"]
        effects = [f"{part} {_effect(parts[part])}" for part in ("early", "late")]
        sentences.append(f"Against {what}, the teacher's tokens {_effect(parts['all'])}; {', '.join(effects)}.")
    rival = result["position_minus_remaining"]
    if rival["interval"][0] <= 0.0 <= rival["interval"][1]:
        sentences.append("Position cannot be told from remaining length.")
    else:
        word = "beats" if rival["difference"] > 0.0 else "loses to"
        sentences.append(f"Position {word} remaining length (difference {cell(rival, 'difference', True)}).")
    return " ".join(sentences)


def _effect(paired: dict | None) -> str:
    if paired is None:
        return "no candidate"
    low, high = paired["interval"]
    word = "hurt" if high < 0.0 else "help" if low > 0.0 else "have no effect that can be shown"
    return f"{word} ({cell(paired, signed=True)})"


# ---------------------------------------------------------------------------------------------------------------
# Figure 1


def figure(data: Candidates, result: dict, run: Path) -> str:
    """Figure 1 as PNG and SVG; returns a line that says where, or what is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return "figure1: needs `pip install matplotlib`"
    drawing = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = drawing.subplots(1, 2)
    draw_ranks(left, data)
    draw_reliability(right, data, result)
    with matplotlib.rc_context({"svg.hashsalt": "figure1"}):
        for kind in ("png", "svg"):
            drawing.savefig(run / f"figure1.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return f"figure1: {run}/figure1.png, {run}/figure1.svg"


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


# ---------------------------------------------------------------------------------------------------------------


def report(rows: list[dict], run: Path, rule: LabelRule, bootstraps: int, seed: int) -> str:
    """Phase G: write table1.json, schedule.json and Figure 1 into the run folder and return the text for the screen."""
    parts = {
        "right spines": [row for row in rows if row["spine_correct"]],
        "wrong spines": [row for row in rows if not row["spine_correct"]],
    }
    results, lines = {}, []
    for name, members in parts.items():
        if not members:
            continue
        data = to_columns(members, bootstraps, seed)
        result = results[name] = analyse(data, rule, seed)
        result["verdict"] = verdict(result)
        lines += ["", f"== {name}", *table_lines(result), *null_lines(result), "", result["verdict"]]
        if name == "right spines":
            write_atomically(run / "schedule.json", json.dumps(result["schedule"]["teacher"], indent=2) + "\n")
            lines += ["", f"schedule: train.py --schedule {run}/schedule.json", figure(data, result, run)]
    write_atomically(run / "table1.json", json.dumps(results, indent=2) + "\n")
    return "\n".join(lines) if results else "no candidate: nothing to report"
