"""What the diagnostic's Table 1 leaves open, in numbers: controls, competing scores, the null, Eq. (5) fitted.

- Controls: is it the teacher's token, or the prefix, that costs viability? The student's own tokens forced, and nothing
  forced, at the same positions with the same budget, compared by candidate.
- The null: in a world where only what remains to be done matters, early candidates fail more often with no fault of
  the teacher's at all.
- The children: how viable they are by rank and by token, which names a culprit.
- The fit: the schedule that the measured viability supports.

Axes: C candidates, K children of a candidate, N rollouts of a child, P problems, R bootstrap resamples, G grid points.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from math import comb

import numpy as np

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
    centre,
    interval,
    label_children,
    table1,
    to_columns,
)

REMAINING, INDEX = "remaining length", "absolute index"
SIMULATIONS = 1000  # worlds drawn for the null
COMMON = 5  # tokens whose children are counted apart


# ---------------------------------------------------------------------------------------------------------------
# The analysis of one set of candidates


def analyse(rows: list[dict], rule: LabelRule) -> tuple[Candidates, dict]:
    """The candidates in columns, competing scores among them, and everything that is reported about them."""
    data = to_columns(rows, rule)
    rivals = {REMAINING: (data.length - data.position).astype(float), INDEX: -data.position.astype(float)}
    data = replace(data, score=data.score | rivals)
    position = auroc_of(data, data.score[POSITION])
    return data, {
        **table1(data),
        "position_minus": {name: difference(position, auroc_of(data, score_C)) for name, score_C in rivals.items()},
        "arms": {arm: analyse_arm(data, arm) for arm in ARMS},
        "children": analyse_children(rows, data, rule),
        "null": analyse_null(data, rule),
        "schedule": {arm: analyse_fit(data, arm) for arm in ("teacher", "unforced")},
    }


def analyse_arm(data: Candidates, arm: str) -> dict:
    """Viability of an arm, the paired difference teacher - arm, and position's AUROC on the arm's own labels."""
    mean_C = data.viability[arm].mean(axis=1)
    paired_C = data.viability["teacher"].mean(axis=1) - mean_C
    parts = {"all": data.r < 1.0, "early": data.r < 0.5, "late": data.r >= 0.5}
    teacher, position = (auroc_of(data, data.score[POSITION], which) for which in ("teacher", arm))
    return {
        "viability": {part: mean_with_interval(mean_C, data, where_C) for part, where_C in parts.items()},
        "teacher_minus_arm": {part: mean_with_interval(paired_C, data, where_C) for part, where_C in parts.items()},
        "labels": {name: int((data.label[arm] == code).sum()) for code, name in enumerate(LABELS)},
        "position": position and position[0],
        "position_teacher_minus_arm": difference(teacher, position),
    }


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
