"""Statistics of the diagnostic: the label rule, AUROC with a bootstrap of problems, the null world, the fit of Eq. (5).

Pure numpy. In every AUROC label 1 is real-uncertain and 0 diversity; gray candidates take no part.

Axes: C candidates, K children of a candidate, N rollouts of a child, P problems, R bootstrap resamples, G grid points.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from math import comb

import numpy as np

LABELS = ("diversity", "real-uncertain", "gray")  # by the integers of label_children
DIVERSITY, UNCERTAIN, GRAY = range(3)


@dataclass
class LabelRule:
    """Phase F: how a candidate is labelled from the viability of its children. Defaults are the paper's."""

    children: int = field(default=3, metadata={"help": "C: K, tokens forced at a candidate"})
    rollouts: int = field(default=6, metadata={"help": "E: N, continuations of each child"})
    diversity_viability: float = field(default=0.75, metadata={"help": "F: least viability of a good child"})
    diversity_children: int = field(default=2, metadata={"help": "F: good children that make a candidate `diversity`"})
    uncertain_viability: float = field(
        default=0.40, metadata={"help": "F: `real-uncertain` if all children and their mean stay below"}
    )


def label_children(viability_CK: np.ndarray, rule: LabelRule) -> np.ndarray:
    """diversity: >= 2 children with viability >= 0.75; real-uncertain: every child and the mean < 0.40; else gray."""
    good = (viability_CK >= rule.diversity_viability).sum(axis=-1) >= rule.diversity_children
    bad = (viability_CK < rule.uncertain_viability).all(axis=-1)  # the mean is then below, too
    return np.where(good, DIVERSITY, np.where(bad, UNCERTAIN, GRAY))


# ---------------------------------------------------------------------------------------------------------------
# Statistics


def centre(score_C: np.ndarray, problem_C: np.ndarray) -> np.ndarray:
    """Subtract each problem's mean over its candidates; rounded, so that equal values stay equal and tie."""
    sums, counts = np.bincount(problem_C, score_C), np.bincount(problem_C)
    return np.round(score_C - (sums / np.maximum(counts, 1))[problem_C], 10)


def midranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1..n; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    """Mann-Whitney: AUROC = (R_1 - n_1 (n_1 + 1) / 2) / (n_1 n_0), R_1 the mid-rank sum of label 1."""
    n1, n0 = int((label == 1).sum()), int((label == 0).sum())
    R1 = midranks(score)[label == 1].sum()
    return float((R1 - n1 * (n1 + 1) / 2.0) / (n1 * n0))


def auprc(score: np.ndarray, label: np.ndarray) -> float:
    """Average precision: sum over distinct thresholds, from the highest, of (recall gained) * precision."""
    _, inverse = np.unique(-score, return_inverse=True)
    positives, sizes = np.bincount(inverse, label == 1), np.bincount(inverse)
    precision = np.cumsum(positives) / np.cumsum(sizes)
    return float((positives / positives.sum() * precision).sum())


def resamples(num_problems: int, count: int, seed: int) -> np.ndarray:
    """[R, P] how often each problem is drawn, in `count` bootstraps of whole problems."""
    drawn = np.random.default_rng(seed).integers(num_problems, size=(count, num_problems))
    return np.stack([np.bincount(row, minlength=num_problems) for row in drawn])


def bootstrap_auroc(score: np.ndarray, label: np.ndarray, problem_C: np.ndarray, counts_RP: np.ndarray) -> np.ndarray:
    """AUROC in each resample, [R]; nan where a resample lacks a class. Scores come centred.

    Whole problems are drawn, so a problem's mean is the same in every resample that holds it: centring anew changes
    nothing. Pairs won are summed once for each pair of problems, and a resample weights them by its counts.
    """
    P = counts_RP.shape[1]
    one, zero = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    wins = (score[one, None] > score[zero]) + 0.5 * (score[one, None] == score[zero])
    by_one_P = np.zeros((P, len(zero)))
    np.add.at(by_one_P, problem_C[one], wins)
    wins_PP = np.zeros((P, P))
    np.add.at(wins_PP.T, problem_C[zero], by_one_P.T)
    n1_R = counts_RP @ np.bincount(problem_C[one], minlength=P)
    n0_R = counts_RP @ np.bincount(problem_C[zero], minlength=P)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((counts_RP @ wins_PP) * counts_RP).sum(axis=1) / (n1_R * n0_R)


def bootstrap_mean(value_C: np.ndarray, problem_C: np.ndarray, counts_RP: np.ndarray) -> np.ndarray:
    """Mean over candidates in each resample, [R]; nan where none is left."""
    P = counts_RP.shape[1]
    sums, sizes = np.bincount(problem_C, value_C, minlength=P), np.bincount(problem_C, minlength=P)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts_RP @ sums) / (counts_RP @ sizes)


def interval(values_R: np.ndarray) -> list[float] | None:
    """95 % percentile interval over the resamples that have a value; None where none has."""
    values = values_R[np.isfinite(values_R)]
    return [float(x) for x in np.percentile(values, [2.5, 97.5])] if len(values) else None


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
