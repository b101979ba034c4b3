"""Rules of later work as rows of the table: how else to weight tokens, and how else to clip.

    python -m experiments.study.rules --method scgate ...   train.py, with these rows known to it; also torchrun -m
    import experiments.study.rules                          the rows, and `--schedule suffix`, for your own script

Written as a fork would write it: the functions, then the rows that name them, at the end. A weight that keeps some
tokens and drops the others (0 or 1) is divided by the number kept (`weighted_mean`), as in the sources; the others are
averaged over all tokens (`token_mean`), as in Eq. (1). Scores are at T_distill.

Axes: M valid tokens of a batch, row after row; L one row's tokens; V vocabulary. Weights have the signature of every
token weight, (r_M, scores, lengths, step, options) -> [M], the last two unused here; a keyword is a source's number.
"""

from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

import loss
import weighting
from loss import LossOptions, Method, TokenScores

# --- Weights by position ----------------------------------------------------------------------------------------


def prefix(r: Tensor, share: float = 0.3) -> Tensor:
    """1[r <= share]: the first tokens only.

    On-policy distillation from prefixes (arXiv 2602.15260) and TOPD (arXiv 2605.31490) also stop sampling there, which
    saves the rollout; here the whole solution is sampled.
    """
    return (r <= share).float()


def suffix(r: Tensor, share: float = 0.3) -> Tensor:
    """1[r >= 1 - share]: the last tokens only, the limit of Eq. (5) at w_min = 0, tau = 1 - share, s -> 0."""
    return (r >= 1.0 - share).float()


def skip(r_M: Tensor, scores: TokenScores, lengths: list[int], *_, first: int = 3) -> Tensor:
    """1[t > first], t = 1..L: all but a row's first tokens, where the teacher's own prompt shows most.

    TRL's SDFT trainer, `num_loss_tokens_to_skip` (default 0; 3 in the scripts of SDFT), on a top-k JSD, mean over the
    tokens kept in each row, then over rows; here over all tokens kept.
    """
    return (token_index(r_M, lengths) > first).float()


def token_index(r_M: Tensor, lengths: list[int]) -> Tensor:
    """t - 1/2 = r L, t = 1..L."""
    return r_M * torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)).to(r_M.device)


def by_index(r_M: Tensor, scores: TokenScores, lengths: list[int], *_, typical: float = 52.0) -> Tensor:
    """Moderate at (t - 1/2) / typical, whatever the row's own length: a control in which r cannot hold the outcome."""
    return weighting.SCHEDULES["moderate"](token_index(r_M, lengths) / typical)


def shuffled(r_M: Tensor, scores: TokenScores, lengths: list[int], *_) -> Tensor:
    """Moderate's weights in a random order within each row: a control with Eq. (5)'s weights and without its positions.

    Drawn from torch's generator, which train.py seeds at each step.
    """
    rows = weighting.SCHEDULES["moderate"](r_M).split(lengths)
    return torch.cat([row[torch.randperm(len(row))] for row in rows])


# --- Weights by score, within each row, or by its outcome -------------------------------------------------------


def iw_opd(r_M: Tensor, scores: TokenScores, lengths: list[int], *_, gamma: float = 0.5) -> Tensor:
    """w_t = 1 + gamma (1 - sum_{k<t} |A_k| / sum_k |A_k|), A = log p_T(y) - log p_S(y), never rising.

    IW-OPD (arXiv 2606.22600; its authors' code, `iw_opd_weight_max` = 1 + gamma; TRL's IW-OPD trainer), there on the
    loss of row `iw_opd_pg`. Where A = 0 in the whole row, there is nothing to divide by: its weights are 1 + gamma.
    """
    gap_M = (scores.teacher_logprob - scores.student_logprob).abs()
    before = [(gap_L.cumsum(0) - gap_L) / gap_L.sum().clamp(min=1e-8) for gap_L in gap_M.split(lengths)]
    return 1.0 + gamma * (1.0 - torch.cat(before))


def dash(r_M: Tensor, scores: TokenScores, lengths: list[int], *_, kappa: float = 5.0) -> Tensor:
    """w_1 = 1, w_t = 1 + lambda_{t-1} w_{t-1}, lambda_t = sigmoid(-kappa (d_t - mean d)), d the row's token losses.

    DASH (arXiv 2608.06243; its published summaries, which agree): the loss 1/T sum_t A_t of the backward recursion
    A_t = d_t + sg(lambda_t) A_{t+1}, A_T = d_T, in which d_t stands w_t times, d clipped as here (tau_clip 0.05). There
    the mean over a rollout's tokens; here over all tokens.
    """
    rows = []
    for loss_L in scores.loss.split(lengths):
        lambda_L = torch.sigmoid(-kappa * (loss_L - loss_L.mean())).tolist()
        rows.append(torch.tensor(list(accumulate(lambda_L[:-1], lambda w, gate: 1.0 + gate * w, initial=1.0))))
    return torch.cat(rows).to(scores.loss)


def scgate(r_M: Tensor, scores: TokenScores, lengths: list[int], *_, most: float = 0.99) -> Tensor:
    """1[p_S(y_t) <= most]: not where the student is sure of its token.

    Neighborhood OPSD (arXiv 2609.39687), Eq. (13), the online gate, on the entry-clipped forward KL (clip 0.06 there).
    """
    return (scores.student_logprob.exp() <= most).float()


def keep_top(score_M: Tensor, lengths: list[int], share: float) -> Tensor:
    """1 for the floor(share L) tokens of each row with the largest score (of equal ones the first), else 0."""
    rows = []
    for score_L in score_M.split(lengths):
        best = score_L.argsort(descending=True, stable=True)[: int(share * len(score_L))]
        rows.append(torch.zeros_like(score_L).index_fill(0, best, 1.0))
    return torch.cat(rows)


def tip(r_M: Tensor, scores: TokenScores, lengths: list[int], *_, share: float = 0.5) -> Tensor:
    """1 for the `share` of a row with the largest s = h + d - h d ("soft or"), else 0.

    TIP (arXiv 2604.14084; what was read of it: docs/later-work.md): h is the student's entropy cut at its 0.98
    quantile, d the row's own token loss, both scaled to [0, 1] by their minimum and maximum over the tokens given (a
    micro-batch in training). The source's loss is that of row `tip_reverse`. In row `tip` it is Eq. (1), and tau_clip
    bounds what one entry adds to d: where the teacher insists on one other token, d saturates unless the clip is inf.
    """
    entropy_M = scores.student_entropy
    h_M = _to_unit_range(entropy_M.clamp(max=torch.quantile(entropy_M, 0.98)))
    d_M = _to_unit_range(scores.loss)
    return keep_top(h_M + d_M - h_M * d_M, lengths, share)


def dial(r_M: Tensor, scores: TokenScores, lengths: list[int], *_, share: float = 0.4, b: float = 1.0) -> Tensor:
    """1 for the `share` of a row with the largest |log p_T(y) - log p_S(y)|^(1-b) |p_T(y) - p_S(y)|^b, else 0.

    DIAL (arXiv 2610.11659; b from 1 to 1.2), on the sampled token's loss.
    """
    gap_M = (scores.teacher_logprob - scores.student_logprob).abs().clamp(min=1e-8)
    apart_M = (scores.teacher_logprob.exp() - scores.student_logprob.exp()).abs()
    return keep_top(gap_M ** (1.0 - b) * apart_M**b, lengths, share)


def _to_unit_range(value_M: Tensor) -> Tensor:
    """(x - min) / (max - min); 0 where all are equal."""
    low, high = value_M.aminmax()
    return (value_M - low) / (high - low).clamp(min=1e-12)


# --- The losses of these sources; where they have a reference policy, the student stands here -------------------


def sampled_token(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """-A log p_S(y), A = sg(log p_T(y) - log p_S(y)): the policy gradient of on-policy distillation, no clip."""
    student_M, teacher_M = (logp.gather(-1, ids_M[:, None]).squeeze(-1) for logp in (student_logp_MV, teacher_logp_MV))
    return -(teacher_M - student_M).detach() * student_M


def reverse_divergence(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """KL(p_S || p_T) = sum_j p_S(j) (log p_S(j) - log p_T(j)), no clip."""
    return loss.divergence_entries(student_logp_MV, teacher_logp_MV, beta=1.0).sum(dim=-1)


def beta_opsd(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """Eq. (1) towards q proportional to p_S^.5 p_T^.5, p_S without gradient: beta-OPSD (arXiv 2607.28582)."""
    between_MV = (0.5 * (student_logp_MV.detach() + teacher_logp_MV)).log_softmax(dim=-1)
    return loss.clipped_divergence(student_logp_MV, between_MV, ids_M, options)


# ---------------------------------------------------------------------------------------------------------------
# Clips of a whole token's divergence d_t, the unclipped sum over its entries (options.beta), at options.tau_clip.
# At beta = 0, with A the entries below the clip and P_A the teacher's mass on them, the clip by entry of Eq. (1) has
#     T_distill d(loss)/d(student logit i) = P_A p_S(i) - p_T(i) 1[i in A],
# which pushes a clipped entry down although the teacher wants it up (arXiv 2609.38995, Eq. (5)). The two below do not:
# a token under the clip has the plain gradient p_S(i) - p_T(i). Users of OPSD asked for the first (docs/later-work.md);
# the second is this project's own.


def token_clip(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """min(d_t, tau_clip): a token above the clip has no gradient.

    At beta = 0, T_distill d(loss)/d(student logit i) = (p_S(i) - p_T(i)) 1[d_t <= tau_clip].
    """
    entries_MV = loss.divergence_entries(student_logp_MV, teacher_logp_MV, options.beta)
    return entries_MV.sum(dim=-1).clamp(max=options.tau_clip)


def scaled_clip(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """d_t sg(min(1, tau_clip / d_t)): the value of `token_clip`; above the clip the plain direction, scaled down.

    At beta = 0, T_distill d(loss)/d(student logit i) = (p_S(i) - p_T(i)) min(1, tau_clip / d_t). Rounding can leave d_t
    just below 0; the factor is 1 there.
    """
    d_M = loss.divergence_entries(student_logp_MV, teacher_logp_MV, options.beta).sum(dim=-1)
    return d_M * (options.tau_clip / d_M.detach().clamp(min=torch.finfo(d_M.dtype).tiny)).clamp(max=1.0)


# --- The rows ---------------------------------------------------------------------------------------------------

weighting.SCHEDULES |= {"prefix": prefix, "suffix": suffix}
# Rules that differ from OPSD in the weight alone train on Eq. (1), whatever loss their source uses: the clip is theirs.
on_eq_1 = partial(Method, loss.clipped_divergence, clips=True)
loss.METHODS |= {
    "prefix": on_eq_1("prefix", loss.weighted_mean),
    "suffix": on_eq_1("suffix", loss.weighted_mean),
    "skip": on_eq_1(skip, loss.weighted_mean),
    "shuffled": on_eq_1(shuffled, loss.sequence_mean),
    "by_index": on_eq_1(by_index, loss.sequence_mean),
    "iw_opd": on_eq_1(iw_opd, loss.token_mean),
    "dash": on_eq_1(dash, loss.token_mean),
    "scgate": on_eq_1(scgate, loss.weighted_mean),
    "tip": on_eq_1(tip, loss.weighted_mean, over_batch=True),
    "opd": Method(sampled_token, "uniform", loss.token_mean),  # what `iw_opd_pg` is to be compared with
    "iw_opd_pg": Method(sampled_token, iw_opd, loss.token_mean),
    "tip_reverse": Method(reverse_divergence, tip, loss.weighted_mean, over_batch=True),
    "dial": Method(sampled_token, dial, loss.weighted_mean),
    "beta_opsd": Method(beta_opsd, "uniform", loss.token_mean),
    "opsd_token_clip": Method(token_clip, "uniform", loss.token_mean),
    "opsd_scaled_clip": Method(scaled_clip, "uniform", loss.token_mean),
}

if __name__ == "__main__":
    import train  # finds the rows in loss.METHODS, where they stand by now

    train.cli()
