"""Viability: which branches of a solution still reach the answer, and which scores foretell it (paper Appendix B).

Pure functions of the diagnostic's phases: the scores of B and D, the labels of F, which come from the viability of a
candidate's children, and Table 1 (G): how well each score tells the labels apart. In every AUROC label 1 is
real-uncertain and 0 diversity; gray candidates take no part. A score is oriented beforehand: higher is more suspect.

Axes: T response tokens, V vocabulary, M dropout passes, C candidates, K children of a candidate, N rollouts of a child,
P problems, R bootstrap resamples, U candidates of label 1, D of label 0.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ARMS = ("teacher", "student", "unforced")  # whose tokens are forced; the paper has the first alone
LABELS = ("diversity", "real-uncertain", "gray")  # by the integers of label_children
DIVERSITY, UNCERTAIN, GRAY = range(3)


def truncated_entropy(probability_TV: Tensor, valid_V: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """h_trunc = -sum_j q_j log q_j in nats, q the `top` most likely valid tokens renormalised.

    Returns h [T] with those tokens' probabilities in the full vocabulary and their ids, both [T, top], likeliest first.
    """
    top_TK, ids_TK = probability_TV.masked_fill(~valid_V, 0.0).topk(min(top, int(valid_V.sum())), dim=-1)
    q_TK = top_TK / top_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.special.entr(q_TK).sum(dim=-1), top_TK, ids_TK


def uncertainty(probability_MCV: Tensor) -> dict[str, Tensor]:
    """Scores of M dropout passes at C candidates, each [C], in nats.

    H_full = H(mean_m p^m);  MI = H(mean_m p^m) - mean_m H(p^m);
    kappa = sum_j mu_j (1 - mu_j) / sum_j var_j - 1: the precision of the Dirichlet whose marginal variances
    mu_j (1 - mu_j) / (kappa + 1) sum to the measured ones (unbiased over m); log kappa = log max(kappa, 1e-6).
    Paper: "moment matching" only; summing over j weights each entry by its own size.
    """
    mean_CV = probability_MCV.mean(dim=0)
    H_full = torch.special.entr(mean_CV).sum(dim=-1)
    H_each = torch.special.entr(probability_MCV).sum(dim=-1).mean(dim=0)
    variance = probability_MCV.var(dim=0).sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    kappa = (mean_CV * (1.0 - mean_CV)).sum(dim=-1) / variance - 1.0
    return {"entropy": H_full, "mutual_information": H_full - H_each, "log_kappa": kappa.clamp(min=1e-6).log()}


@dataclass(frozen=True)
class LabelRule:
    """How a candidate is labelled from its children, and resampled. Defaults are the paper's."""

    children: int = 3  # K, tokens forced at a candidate
    rollouts: int = 6  # continuations of each child
    diversity_viability: float = 0.75  # least viability of a good child
    diversity_children: int = 2  # good children that make a candidate `diversity`
    uncertain_viability: float = 0.40  # `real-uncertain` if all children and their mean stay below
    bootstraps: int = 2000  # resamples of whole problems
    bootstrap_seed: int = 0


def label_children(viability_CK: np.ndarray, rule: LabelRule) -> np.ndarray:
    """diversity: >= 2 children with viability >= 0.75; real-uncertain: every child and the mean < 0.40; else gray."""
    good = (viability_CK >= rule.diversity_viability).sum(axis=-1) >= rule.diversity_children
    bad = (viability_CK < rule.uncertain_viability).all(axis=-1)  # the mean is then below, too
    return np.where(good, DIVERSITY, np.where(bad, UNCERTAIN, GRAY))


def labels(
    candidate_rows: list[dict], dropout_rows: list[dict], continuation_rows: list[dict], rule: LabelRule
) -> list[dict]:
    """One row per candidate: its scores, and for each arm the viability of every child and the label by the same rule.

    The unforced arm has no children: its rollouts, in their order, form as many groups of the same size.
    """
    correct: dict[tuple, list[bool]] = {}
    for row in sorted(continuation_rows, key=lambda row: row["sample"]):
        correct.setdefault((row["problem"], row["position"], row["token"]), []).append(row["correct"])
    scores = {
        (row["problem"], t): {name: row[name][c] for name in ("entropy", "mutual_information", "log_kappa")}
        for row in dropout_rows
        for c, t in enumerate(row["positions"])
    }
    rows = []
    for problem, c in ((row["problem"], c) for row in candidate_rows for c in row["candidates"]):
        at = (problem, c["position"])
        free_KN = np.reshape(correct[*at, None], (rule.children, rule.rollouts))
        viability = {arm: [float(np.mean(correct[*at, v])) for v in c[arm]] for arm in ("teacher", "student")}
        viability["unforced"] = free_KN.mean(axis=1).tolist()
        label = {arm: LABELS[int(label_children(np.array(values), rule))] for arm, values in viability.items()}
        rows.append({"problem": problem, **c, **scores[at], "viability": viability, "label": label})
    return rows


@dataclass(frozen=True)
class Candidates:
    """Columns over C candidates, and the resamples that all intervals share."""

    problem: np.ndarray  # [C], 0..P-1
    position: np.ndarray  # [C], tokens of the spine before the candidate
    length: np.ndarray  # [C], L of the spine
    r: np.ndarray  # [C], (position + 0.5) / length
    score: dict[str, np.ndarray]  # each [C], higher is more suspect
    viability: dict[str, np.ndarray]  # arm -> [C, K]
    label: dict[str, np.ndarray]  # arm -> [C]
    counts: np.ndarray  # [R, P], how often a resample holds each problem


POSITION = "1 - r"
# Paper, Table 1: AUROC and its interval.
PAPER = {"H(p)": "0.51 [.50,.84]", "MI": "0.51 [.50,.62]", "log kappa": "0.54 [.50,.69]", "h_trunc": "0.57 [.51,.72]",
         POSITION: "0.83 [.66,.95]"}  # fmt: skip


def to_columns(rows: list[dict], rule: LabelRule) -> Candidates:
    """Rows of phase F as columns, with the five scores of Table 1."""

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    _, problem_C = np.unique(column("problem"), return_inverse=True)
    position_C, length_C = column("position"), column("length")
    r_C = (position_C + 0.5) / length_C
    score = {
        "H(p)": column("entropy"), "MI": column("mutual_information"),
        "log kappa": -column("log_kappa"),  # a low precision is suspect
        "h_trunc": column("h_trunc"), POSITION: 1.0 - r_C,
    }  # fmt: skip
    viability = {arm: np.array([row["viability"][arm] for row in rows]) for arm in ARMS}
    label = {arm: np.array([LABELS.index(row["label"][arm]) for row in rows]) for arm in ARMS}
    counts = resamples(problem_C.max() + 1, rule.bootstraps, rule.bootstrap_seed)
    return Candidates(problem_C, position_C, length_C, r_C, score, viability, label, counts)


def centre(score_C: np.ndarray, problem_C: np.ndarray) -> np.ndarray:
    """Subtract each problem's mean over its candidates; rounded, so that equal values stay equal and tie."""
    sums, counts = np.bincount(problem_C, score_C), np.bincount(problem_C)
    return np.round(score_C - (sums / np.maximum(counts, 1))[problem_C], 10)


def midranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1..n; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]


def wins(score: np.ndarray, label: np.ndarray) -> np.ndarray:
    """[U, D] 1 where a candidate of label 1 scores above one of label 0, 1/2 where they tie."""
    one_U1, zero_D = score[label == 1, None], score[label == 0]
    return (one_U1 > zero_D) + 0.5 * (one_U1 == zero_D)


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    """Mann-Whitney: AUROC = mean_{u, d} wins[u, d]."""
    return float(wins(score, label).mean())


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
    belongs_CP = problem_C[:, None] == np.arange(counts_RP.shape[1])
    one_UP, zero_DP = belongs_CP[label == 1], belongs_CP[label == 0]
    wins_PP = one_UP.T @ wins(score, label) @ zero_DP
    pairs_PP = np.outer(one_UP.sum(axis=0), zero_DP.sum(axis=0))
    won_R, of_R = (((counts_RP @ per_PP) * counts_RP).sum(axis=1) for per_PP in (wins_PP, pairs_PP))
    with np.errstate(invalid="ignore"):
        return won_R / of_R


def interval(values_R: np.ndarray) -> list[float] | None:
    """95 % percentile interval over the resamples that have a value; None where none has."""
    return np.nanpercentile(values_R, [2.5, 97.5]).tolist() if np.isfinite(values_R).any() else None


def auroc_of(
    data: Candidates, score_C: np.ndarray, arm: str = "teacher", over_all: bool = False
) -> tuple[dict, np.ndarray] | None:
    """A row of Table 1 and its AUROC per resample, from the labels of an arm; None where a class has no candidate.

    A score loses its problem's mean, over the labelled candidates or `over_all`; the paper does not say. Its lower ends
    are .50, as if each resample were oriented anew. Here: the orientation is fixed; the interval of max(a, 1 - a)
    stands beside it, for comparison.
    """
    used = data.label[arm] != GRAY
    label, problem_C = data.label[arm][used], data.problem[used]
    if not ((label == UNCERTAIN).any() and (label == DIVERSITY).any()):
        return None
    score = centre(score_C, data.problem)[used] if over_all else centre(score_C[used], problem_C)
    point, values_R = auroc(score, label), bootstrap_auroc(score, label, problem_C, data.counts)
    either_way = interval(np.maximum(values_R, 1.0 - values_R))
    row = {"auroc": point, "interval": interval(values_R), "interval_reoriented": either_way}
    return row | {"auprc": auprc(score, label)}, values_R


def table1(data: Candidates) -> dict:
    """Table 1 with its counts; a row is None where a class has no candidate."""
    rows = {name: auroc_of(data, score_C) for name, score_C in data.score.items()}
    return {
        "problems": int(data.counts.shape[1]),
        "candidates": len(data.problem),
        "labels": {name: int((data.label["teacher"] == code).sum()) for code, name in enumerate(LABELS)},
        "table1": {name: row and row[0] for name, row in rows.items()},
    }


def table1_lines(result: dict) -> list[str]:
    """Table 1 as text."""
    counts = ", ".join(f"{result['labels'][name]} {name}" for name in ("real-uncertain", "diversity", "gray"))
    lines = [
        f"{result['candidates']} candidates in {result['problems']} problems: {counts} (left out)",
        f"{'Table 1':18s} {'AUROC [95 %, fixed]':22s} {'[re-oriented]':15s} {'AUPRC':7s} paper (8 / 271)",
    ]
    for name, row in result["table1"].items():
        if row is None:
            lines.append(f"{name:18s} no candidate of one class: no number")
            continue
        fixed, again = ("[{:.2f}, {:.2f}]".format(*row[part]) for part in ("interval", "interval_reoriented"))
        lines.append(f"{name:18s} {row['auroc']:.3f} {fixed:16s} {again:15s} {row['auprc']:.3f}   {PAPER[name]}")
    return lines
