"""What a run of diagnose.py says: Table 1 beside its controls, in words, Figure 1, and a fitted schedule.

    python -m experiments.diagnose_report runs/diagnose-tiny
    python -m experiments.diagnose_report RUN RUN --output_dir runs/diagnose-report       runs side by side

- Controls: is it the teacher's token, or the prefix, that costs viability? The student's own tokens forced, and nothing
  forced, at the same positions with the same budget, compared by candidate.
- Centrings: a score minus its problem's mean over the labelled candidates, or over all of them. The paper does not say.
- The null: in a world where only what remains to be done matters, early candidates fail more often with no fault of
  the teacher's at all.
- The children: how viable they are by rank and by token, which names a culprit.
- The fit: the schedule that the measured viability supports.

Each run's folder gets controls.json (all numbers); --output_dir, by default the folder of a single run, gets report.md,
with train.py's flags for the fitted schedule, and Figure 1. Needs `pip install matplotlib` for the figure alone.
Axes: C candidates, K children of a candidate, N rollouts of a child, P problems, R bootstrap resamples, G grid points.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from itertools import product
from math import comb
from pathlib import Path

import numpy as np

from errors import InputError
from runtime.flags import run_script
from runtime.records import make_folder, write_atomically
from viability import (
    ARMS,
    DIVERSITY,
    GRAY,
    LABELS,
    POSITION,
    UNCERTAIN,
    Candidates,
    LabelRule,
    auroc,
    auroc_of,
    bootstrap_auroc,
    by_spine,
    centre,
    interval,
    label_children,
    midranks,
    table1,
    to_columns,
)
from weighting import SIGMOIDS

REMAINING = "remaining length"
SIMULATIONS = 1000  # worlds drawn for the null
COMMON = 5  # tokens whose children are counted apart


# ---------------------------------------------------------------------------------------------------------------
# The analysis of one set of candidates


def analyse(rows: list[dict], rule: LabelRule) -> tuple[Candidates, dict]:
    """The candidates in columns, a competing score among them, and everything that is reported about them.

    Remaining length competes with position; a token's index does not: within a problem the two differ by a constant.
    """
    data = to_columns(rows, rule)
    rival_C = (data.length - data.position).astype(float)
    data = replace(data, score=data.score | {REMAINING: rival_C})
    return data, {
        **table1(data),
        "position_minus_remaining": difference(auroc_of(data, data.score[POSITION]), auroc_of(data, rival_C)),
        "arms": {arm: analyse_arm(data, arm) for arm in ARMS},
        "children": analyse_children(rows, data, rule),
        "null": analyse_null(data, rule),
        "schedule": {arm: analyse_fit(data, arm) for arm in ("teacher", "unforced")},
    }


def analyse_arm(data: Candidates, arm: str) -> dict:
    """Viability of an arm, the paired difference teacher - arm, and each score's AUROC on the arm's own labels."""
    mean_C = data.viability[arm].mean(axis=1)
    paired_C = data.viability["teacher"].mean(axis=1) - mean_C
    parts = {"all": data.r < 1.0, "early": data.r < 0.5, "late": data.r >= 0.5}
    teacher, position = (auroc_of(data, data.score[POSITION], which) for which in ("teacher", arm))
    auroc_by = {"labelled": auroc_of, "all": auroc_centred_over_all}
    classes = [set(data.problem[data.label[arm] == label]) for label in (UNCERTAIN, DIVERSITY)]
    return {
        "viability": {part: mean_with_interval(mean_C, data, where_C) for part, where_C in parts.items()},
        "teacher_minus_arm": {part: mean_with_interval(paired_C, data, where_C) for part, where_C in parts.items()},
        "labels": {name: int((data.label[arm] == code).sum()) for code, name in enumerate(LABELS)},
        "problems_labelled": len(classes[0] | classes[1]),
        "problems_with_both_classes": len(classes[0] & classes[1]),
        "auroc": {
            centring: {name: (row := by(data, score_C, arm)) and row[0] for name, score_C in data.score.items()}
            for centring, by in auroc_by.items()
        },
        "position_teacher_minus_arm": difference(teacher, position),
    }


def auroc_centred_over_all(data: Candidates, score_C: np.ndarray, arm: str) -> tuple[dict, np.ndarray] | None:
    """`viability.auroc_of` with each problem's mean over all of its candidates, gray ones too."""
    used = data.label[arm] != GRAY
    label, problem_C = data.label[arm][used], data.problem[used]
    if not ((label == UNCERTAIN).any() and (label == DIVERSITY).any()):
        return None
    score = centre(score_C, data.problem)[used]
    values_R = bootstrap_auroc(score, label, problem_C, data.counts)
    return {"auroc": auroc(score, label), "interval": interval(values_R)}, values_R


def analyse_children(rows: list[dict], data: Candidates, rule: LabelRule) -> dict:
    """Counts behind the means: who forced what where, and the viability behind it by child's rank and by token id.

    By token: the COMMON most frequent of an arm's children there, each beside the mean of all its other children.
    """
    first = {row["problem"]: row["length"] for row in rows}
    forced = sum(len({*row["teacher"], *row["student"]}) for row in rows)
    result = {
        "continuations": (forced + rule.children * len(rows)) * rule.rollouts,
        "mean_spine_tokens": sum(first.values()) / len(first),
        "candidates_behind_0.6": int((data.r > 0.6).sum()),
    }
    for part, where_C in (("early", data.r < 0.5), ("late", data.r >= 0.5)):
        here = [row for row, inside in zip(rows, where_C, strict=True) if inside]
        same = sum({*row["teacher"]} == {*row["student"]} for row in here)
        result[part] = {"candidates": len(here), "same_tokens_in_both_arms": same}
        for arm in ("teacher", "student"):
            by_rank = [row["viability"][arm] for row in here]
            children = [child for row in here for child in zip(row[arm], row["viability"][arm], strict=True)]
            tokens = [token for token, _ in Counter(token for token, _ in children).most_common(COMMON)]
            result[part][arm] = {
                "by_rank": [float(mean) for mean in np.mean(by_rank, axis=0)] if here else [],
                "by_token": {
                    str(token): {
                        "n": sum(child == token for child, _ in children),
                        "mean": _mean([value for child, value in children if child == token]),
                        "others": _mean([value for child, value in children if child != token]),
                    }
                    for token in tokens
                },
            }
    return result


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def analyse_null(data: Candidates, rule: LabelRule) -> dict:
    """Survival per remaining token fitted to the unforced arm, and position's AUROC in the null world that it makes."""
    remaining_C = data.score[REMAINING]
    survival = fit_survival(remaining_C, data.viability["unforced"].mean(axis=1))
    values = simulate_null(
        survival**remaining_C, data.score[POSITION], data.problem, rule, SIMULATIONS, rule.bootstrap_seed
    )
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


def difference(one: tuple[dict, np.ndarray] | None, other: tuple[dict, np.ndarray] | None) -> dict | None:
    """AUROC of one minus AUROC of the other, paired by resample."""
    if one is None or other is None:
        return None
    return {"difference": one[0]["auroc"] - other[0]["auroc"], "interval": interval(one[1] - other[1])}


def mean_with_interval(value_C: np.ndarray, data: Candidates, where_C: np.ndarray) -> dict | None:
    """The mean over some candidates; None over none."""
    if not where_C.any():
        return None
    values_R = bootstrap_mean(value_C[where_C], data.problem[where_C], data.counts)
    return {"mean": float(value_C[where_C].mean()), "interval": interval(values_R), "n": int(where_C.sum())}


def bootstrap_mean(value_C: np.ndarray, problem_C: np.ndarray, counts_RP: np.ndarray) -> np.ndarray:
    """Mean over candidates in each resample, [R]; nan where none is left."""
    P = counts_RP.shape[1]
    sums, sizes = np.bincount(problem_C, value_C, minlength=P), np.bincount(problem_C, minlength=P)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts_RP @ sums) / (counts_RP @ sizes)


# ---------------------------------------------------------------------------------------------------------------
# The null: a teacher as good as the student, in a world where only what remains to be done matters


def null_probabilities(viability_C: np.ndarray, rule: LabelRule) -> tuple[np.ndarray, np.ndarray]:
    """P(real-uncertain) and P(diversity) of a candidate whose K children all reach the answer with this probability.

    Exact: each outcome of K children with N rollouts, labelled by the run's own rule, times its binomial probability.
    """
    K, N = rule.children, rule.rollouts
    pmf_NC = np.array([comb(N, k) * viability_C**k * (1.0 - viability_C) ** (N - k) for k in range(N + 1)])
    totals = {UNCERTAIN: np.zeros_like(viability_C), DIVERSITY: np.zeros_like(viability_C), GRAY: 0.0}
    for outcome in product(range(N + 1), repeat=K):
        label = int(label_children(np.array(outcome) / N, rule))
        totals[label] = totals[label] + pmf_NC[list(outcome)].prod(axis=0)
    return totals[UNCERTAIN], totals[DIVERSITY]


def fit_survival(remaining_C: np.ndarray, viability_C: np.ndarray) -> float:
    """The survival q of one remaining token, by maximum likelihood of viability = q^remaining."""
    q_G = np.exp(-np.geomspace(1e-6, 3.0, 2000))
    p_GC = np.clip(q_G[:, None] ** remaining_C, 1e-12, 1.0 - 1e-12)
    likelihood_G = (viability_C * np.log(p_GC) + (1.0 - viability_C) * np.log(1.0 - p_GC)).sum(axis=1)
    return float(q_G[likelihood_G.argmax()])


def simulate_null(
    viability_C: np.ndarray, score_C: np.ndarray, problem_C: np.ndarray, rule: LabelRule, count: int, seed: int
) -> np.ndarray:
    """AUROC of a score in `count` null worlds on the given candidates; nan where a world lacks a class."""
    uncertain_C, diversity_C = null_probabilities(viability_C, rule)
    draw, values = np.random.default_rng(seed), []
    for _ in range(count):
        u_C = draw.random(len(viability_C))
        label_C = np.where(u_C < uncertain_C, UNCERTAIN, np.where(u_C >= 1.0 - diversity_C, DIVERSITY, GRAY))
        values.append(centred_auroc(score_C, label_C, problem_C))
    return np.array(values)


def centred_auroc(score_C: np.ndarray, label_C: np.ndarray, problem_C: np.ndarray) -> float:
    used = label_C != GRAY
    label = label_C[used]
    if not ((label == UNCERTAIN).any() and (label == DIVERSITY).any()):
        return float("nan")
    return auroc(centre(score_C[used], problem_C[used]), label)


# ---------------------------------------------------------------------------------------------------------------
# From the diagnostic to a schedule


TAU_GRID, S_GRID = np.linspace(-0.5, 1.0, 76), np.geomspace(0.01, 1.0, 41)


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


def schedule_flags(result: dict) -> str:
    """The flags of train.py that weight by the schedule fitted to the teacher's children."""
    fit = result["schedule"]["teacher"]
    return " ".join(["--schedule moderate", *(f"--{name} {fit[name]:.4g}" for name in ("w_min", "tau", "s"))])


# ---------------------------------------------------------------------------------------------------------------
# In tables


def number(value: float | None, bounds: list[float] | None = None, signed: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def cell(entry: dict | None, key: str = "mean", signed: bool = False) -> str:
    return number(entry[key], entry["interval"], signed) if entry else "-"


def counts(labels: dict[str, int]) -> str:
    return " / ".join(str(labels[name]) for name in ("real-uncertain", "diversity", "gray"))


def table1_beside_control(result: dict) -> list[str]:
    """Table 1 of a run by both centrings, on the teacher's labels and where no token was forced."""
    head = ["AUROC", "teacher's tokens forced", "- centred over all", "no token forced", "- centred over all"]
    columns = [result["arms"][arm]["auroc"][by] for arm in ("teacher", "unforced") for by in ("labelled", "all")]
    body = [[name, *(cell(column[name], "auroc") for column in columns)] for name in columns[0]]
    for name, key in (("problems with a label", "problems_labelled"), ("- with both", "problems_with_both_classes")):
        body.append([name, *(str(result["arms"][arm][key]) for arm in ("teacher", "unforced") for _ in range(2))])
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def column(result: dict) -> dict[str, str]:
    """One run's other numbers with their 95 % intervals, by the name of their row."""
    rows = {
        "problems, candidates": f"{result['problems']}, {result['candidates']}",
        "real-uncertain / diversity / gray": counts(result["labels"]),
        f"AUROC of {POSITION}, re-oriented": "-",
    }
    if position := result["table1"][POSITION]:
        low, high = position["interval_reoriented"]
        rows[f"AUROC of {POSITION}, re-oriented"] = f"[{low:.2f}, {high:.2f}]"
    rows[f"- of {POSITION} if teacher = student (null)"] = number(result["null"]["auroc"], result["null"]["range"])
    rows[f"- of {POSITION} minus {REMAINING}"] = cell(result["position_minus_remaining"], "difference", signed=True)
    rows |= {f"viability, {arm}": cell(result["arms"][arm]["viability"]["all"]) for arm in ARMS}
    for arm in ARMS[1:]:
        for part, what in (("all", ""), ("early", ", early (r < 0.5)"), ("late", ", late")):
            rows[f"- teacher minus {arm}{what}"] = cell(result["arms"][arm]["teacher_minus_arm"][part], signed=True)
    for arm in ARMS[1:]:
        rows[f"labels of the {arm} arm"] = counts(result["arms"][arm]["labels"])
        own = result["arms"][arm]["auroc"]["labelled"][POSITION]
        rows[f"- AUROC of {POSITION} on the {arm} arm's labels"] = cell(own, "auroc")
    for arm, fit in result["schedule"].items():
        for name in ("w_min", "tau", "s"):
            edge = ", at the edge of the grid" if name in fit["at_the_edge"] else ""
            rows[f"Eq. (5) fitted to {arm}, {name}"] = number(fit[name], fit["intervals"][name]) + edge
    return rows


def table(results: dict[str, dict]) -> list[str]:
    """Markdown, a column for each run."""
    columns = [column(result) for result in results.values()]
    head = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    return head + [f"| {name} | " + " | ".join(entry[name] for entry in columns) + " |" for name in columns[0]]


# ---------------------------------------------------------------------------------------------------------------
# In words


def verdict(result: dict) -> str:
    """What the evidence supports, in sentences that follow from the intervals alone."""
    position, null = result["table1"][POSITION], result["null"]["range"]
    if position is None:
        return "One class has no candidate: this run says nothing about any score."
    found = by_sign(
        position["interval"], 0.5,
        "Late candidates are real-uncertain more often than early ones",
        "Position does not separate the classes",
        "Early candidates are real-uncertain more often than late ones",
    )  # fmt: skip
    sentences = [f"{found} (AUROC {cell(position, 'auroc')})."]
    if null is not None:
        side = "inside" if null[0] <= position["auroc"] <= null[1] else "outside"
        sentences.append(f"That lies {side} the range of a teacher that is just the student.")
    for arm, what in (("unforced", "no token was forced"), ("student", "the student's own tokens were forced")):
        parts, gap = result["arms"][arm]["teacher_minus_arm"], result["arms"][arm]["position_teacher_minus_arm"]
        if gap is None:
            sentences.append(f"Where {what}, one class has no candidate, so position cannot be compared.")
        else:
            how = by_sign(gap["interval"], 0.0, "better", "as well, as far as can be told", "worse")
            shown = cell(gap, "difference", signed=True)
            sentences.append(f"Where {what}, position separates {how} (AUROC difference {shown}).")
        effects = [f"{part} {_effect(parts[part])}" for part in ("early", "late")]
        sentences.append(f"Beside that, the teacher's tokens {_effect(parts['all'])}; {', '.join(effects)}.")
    return " ".join(sentences)


def by_sign(bounds: list[float], zero: float, below: str, around: str, above: str) -> str:
    """The word for an interval that lies below, around or above `zero`."""
    return below if bounds[1] < zero else above if bounds[0] > zero else around


def _effect(paired: dict | None) -> str:
    if paired is None:
        return "no candidate"
    word = by_sign(paired["interval"], 0.0, "hurt", "have no effect that can be shown", "help")
    return f"{word} ({cell(paired, signed=True)})"


# ---------------------------------------------------------------------------------------------------------------
# Figure 1


def figure(runs: dict[str, tuple[Candidates, dict]], path: Path) -> None:
    """Write Figure 1 of each run, {title: (candidates, analysis)}, one below the other, as PNG and SVG."""
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
        dashes = "--" if name == REMAINING else "-"  # on top: the two may coincide
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
# The script


def analyse_run(run: Path) -> dict[str, tuple[Candidates, dict]]:
    """Analyses of a run folder, by kind of spine, written there as controls.json."""
    try:
        rows = [json.loads(line) for line in (run / "F_labels.jsonl").read_text(encoding="utf-8").splitlines()]
        rule = LabelRule(**json.loads((run / "table1.json").read_text(encoding="utf-8"))["rule"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run}: no finished run of diagnose.py ({type(error).__name__}: {error})") from None
    if not rows:
        raise InputError(f"{run}: its run found no candidate")
    analyses = {name: analyse(members, rule) for name, members in by_spine(rows).items()}
    results = {name: {**result, "verdict": verdict(result)} for name, (_, result) in analyses.items()}
    write_atomically(run / "controls.json", json.dumps(results, indent=2) + "\n")
    return analyses


def write_report(runs: list[Path], output_dir: Path) -> str:
    """OUTPUT_DIR/report.md on all runs; returns its text. Figure 1 is drawn last: it needs matplotlib."""
    titled: dict[str, tuple[Candidates, dict]] = {}
    if output_dir not in runs:  # a folder named wrongly is not made
        make_folder(output_dir)
    for run in runs:
        name = run.resolve().name
        if name in titled:
            raise InputError(f"{run}: another of the runs is in a folder named {name}, too; give it a name of its own")
        for kind, analysis in analyse_run(run).items():
            titled[name if kind == "right spines" else f"{name}, {kind}"] = analysis
    lines = table({title: result for title, (_, result) in titled.items()})
    for title, (_, result) in titled.items():
        lines += ["", f"**{title}**: {verdict(result)} To train with the fit: `{schedule_flags(result)}`.", ""]
        lines += table1_beside_control(result)
    text = "\n".join(lines) + "\n"
    write_atomically(output_dir / "report.md", text)
    print(text)
    figure(titled, output_dir / "figure1")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of diagnose.py")
    parser.add_argument("--output_dir", type=Path, help="where report.md and Figure 1 go; needed for several runs")
    args = parser.parse_args()
    if len(args.runs) > 1 and args.output_dir is None:
        raise InputError("several runs need --output_dir")
    output_dir = args.output_dir or args.runs[0]
    write_report(args.runs, output_dir)
    print(f"{output_dir}/report.md, {output_dir}/figure1.png")


if __name__ == "__main__":
    run_script(main)
