"""The losses: a method is a row (token loss l, token weight w, reduction in place of its 1/|M| sum) of Eq. (8).

    L = reduce_t( w_t * l_t ),   l_t from p_t = pi_theta(. | x_stu, y_<t) and p^opsd_t = p_tch(. | x_tch, y_<t)

Both distributions are softmax(float32 logits / T_distill) over the full vocabulary; the teacher carries no gradient.
`method_loss` is the form to read: whole logits in, a scalar out. Training (train.py::train_step) does the same on
hidden states: `score_tokens_from_hidden` meets the vocabulary a chunk of tokens at a time.

Axes: B sequences, T response tokens, V vocabulary, D hidden, K alternatives, M valid tokens (the paper's set M) row
after row. The paper's y_t is `ids_M`, w_{i,t} `w_M`, log p_t `student_logp_MV`, log p^opsd_t `teacher_logp_MV`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial, wraps
from math import inf, log, nan

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from errors import InputError, require
from model import head_logits
from weighting import get_schedule, relative_position

# --- OPSD and PW-OPSD: Eqs. (1) and (6) -------------------------------------------------------------------------


def clipped_divergence(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """Eq. (1), one token: d_t = sum_j min( p^opsd(j) log(p^opsd(j) / p(j)), tau_clip ); [M].

    The clip is per vocabulary entry and from above only, before the sum, so a token's value may be negative.
    """
    entries_MV = divergence_entries(student_logp_MV, teacher_logp_MV, options.beta)
    return entries_MV.clamp(max=options.tau_clip).sum(dim=-1)


def divergence_entries(student_logp_MV: Tensor, teacher_logp_MV: Tensor, beta: float = 0.0) -> Tensor:
    """Eq. (1), one entry: p^opsd(j) log(p^opsd(j) / p(j)), the forward KL; [M, V].

    OPSD's general form (arXiv 2601.18734), with p_T the teacher's and p_S the student's distribution:
    JSD_beta = beta p_T log(p_T / m) + (1 - beta) p_S log(p_S / m), m = beta p_T + (1 - beta) p_S.
    By definition beta = 0 is the forward KL and beta = 1 the reverse p_S log(p_S / p_T).
    """
    if beta == 0.0:
        return teacher_logp_MV.exp() * (teacher_logp_MV - student_logp_MV)
    if beta == 1.0:
        return student_logp_MV.exp() * (student_logp_MV - teacher_logp_MV)
    mixture_logp_MV = torch.logaddexp(teacher_logp_MV + log(beta), student_logp_MV + log(1.0 - beta))
    teacher_part = teacher_logp_MV.exp() * (teacher_logp_MV - mixture_logp_MV)
    student_part = student_logp_MV.exp() * (student_logp_MV - mixture_logp_MV)
    return beta * teacher_part + (1.0 - beta) * student_part


def token_mean(l_M: Tensor, w_M: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Eqs. (1), (8): 1/|M| sum_t w_t l_t, over all valid tokens of the batch; (numerator, denominator)."""
    return (w_M * l_M).sum(), l_M.new_tensor(float(sum(lengths)))


def sequence_mean(l_M: Tensor, w_M: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Eq. (6): 1/B sum_i 1/L_i sum_t w_{i,t} l_{i,t}, by sequence, then over them; (numerator, denominator)."""
    rows = (w_M * l_M).split(lengths)
    return torch.stack([row.mean() for row in rows]).sum(), l_M.new_tensor(float(len(lengths)))


# --- EOPD (arXiv 2603.07079) and REOPOLD (arXiv 2603.11137) -----------------------------------------------------

ENTROPY_GATE = 0.8  # nats: EOPD adds the forward KL where the teacher's entropy is above it
GATE_TOP_K = 16  # teacher's most likely tokens in that KL
RATIO_CLIP = 0.2  # eps, of the importance ratio


def gated_loss(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """EOPD: l = l_opd + 1[H(p_T) > ENTROPY_GATE] l_fkl; [M].

    l_opd = max(-rho A, -clip(rho, 1 - eps, 1 + eps) A), A = sg(log p_T(y) - log p_S(y)), rho = p_S(y) / sg(p_S(y)).
    l_fkl = sum over the teacher's top K of q (log q - log p_S), q = p_T renormalised on those K.
    """
    student_M, teacher_M = _at(student_logp_MV, ids_M), _at(teacher_logp_MV, ids_M)
    A = (teacher_M - student_M).detach()
    rho = (student_M - student_M.detach()).exp()
    clipped = rho.clamp(1.0 - RATIO_CLIP, 1.0 + RATIO_CLIP)
    l_opd = torch.maximum(-rho * A, -clipped * A)
    K = min(GATE_TOP_K, teacher_logp_MV.shape[-1])
    top_logp_MK, top_MK = teacher_logp_MV.topk(K, dim=-1)
    logq_MK = top_logp_MK.log_softmax(dim=-1)
    l_fkl = (logq_MK.exp() * (logq_MK - student_logp_MV.gather(-1, top_MK))).sum(dim=-1)
    return l_opd + (entropy(teacher_logp_MV) > ENTROPY_GATE) * l_fkl


REWARD_LAMBDA = 0.1
REWARD_FLOOR = log(REWARD_LAMBDA) / (1.0 - REWARD_LAMBDA)  # -2.5584
ENTROPY_QUANTILE = 0.2  # that paper's beta: share of a micro-batch's tokens that the later mask keeps


def policy_gradient(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """REOPOLD: l = -R^ log p_S(y), R^ = max(R, log(lambda) / (1 - lambda)), R = sg(log p_T(y) - log p_S(y)); [M]."""
    student_M = _at(student_logp_MV, ids_M)
    R = (_at(teacher_logp_MV, ids_M) - student_M).detach()
    return -R.clamp(min=REWARD_FLOOR) * student_M


def phase_mask(r_M: Tensor, scores: TokenScores, lengths: list[int], step: int, options: LossOptions) -> Tensor:
    """REOPOLD's weight: before `switch_step` 1[R >= floor], then 1[H(p_S) >= its (1 - ENTROPY_QUANTILE) quantile]; [M].

    The quantile is over one call's tokens: a micro-batch in training, as in that paper, here of rows of like length.
    """
    if step < options.switch_step:
        return (scores.teacher_logprob - scores.student_logprob >= REWARD_FLOOR).float()
    threshold = torch.quantile(scores.student_entropy, 1.0 - ENTROPY_QUANTILE)
    return (scores.student_entropy >= threshold).float()


def weighted_mean(l_M: Tensor, w_M: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """REOPOLD: sum_t w_t l_t / sum_t w_t; (numerator, denominator)."""
    return (w_M * l_M).sum(), w_M.sum()


def entropy(logp_MV: Tensor) -> Tensor:
    """H = -sum_j p(j) log p(j) in nats, [M]. For gates and logs: carries no gradient."""
    logp_MV = logp_MV.detach()
    return -logp_MV.exp().mul_(logp_MV).sum(dim=-1)


def _at(logp_MV: Tensor, ids_M: Tensor) -> Tensor:
    return logp_MV.gather(-1, ids_M[:, None]).squeeze(-1)


# --- The methods ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One row of Eq. (8). In METHODS a weight may be a schedule's name; `resolve_method` puts its function there."""

    # (student_logp_MV, teacher_logp_MV, ids_M, options) -> l_M, each from its own token's rows alone. Rounding may
    # leave a divergence just below 0: what divides by one clamps it first, or the token's gradient turns around.
    token_loss: Callable
    # A schedule's name (weighting.py: w = w(r)), or (r_M, scores, lengths, step, options) -> w_M
    token_weight: str | Callable
    # (l_M, w_M, lengths) -> (numerator, denominator)
    reduction: Callable
    # Whether the token loss cuts entries at tau_clip, for the logged clipped mass
    clips: bool = False
    # Whether a token's weight depends on other rows of its micro-batch, whose size is then part of the method
    over_batch: bool = False


METHODS: dict[str, Method] = {
    "opsd": Method(clipped_divergence, "uniform", token_mean, clips=True),  # Eq. (1)
    "pwopsd": Method(clipped_divergence, "moderate", sequence_mean, clips=True),  # Eq. (6)
    "eopd": Method(gated_loss, "uniform", token_mean),
    "reopold": Method(policy_gradient, phase_mask, weighted_mean, over_batch=True),
}
REDUCTIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "weighted_mean": weighted_mean}


# --- From two contexts to one number ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenScores:
    """What the valid tokens of a batch bring; each [M] float32. Only `loss` carries a gradient. Entropies in nats."""

    loss: Tensor  # l_t
    student_logprob: Tensor  # log p_t(y_t)
    teacher_logprob: Tensor  # log p^opsd_t(y_t)
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor  # sum_j p^opsd(j) log(p^opsd(j) / p(j)), whatever the loss: Eq. (1) without its clip
    clipped_mass: Tensor  # teacher's probability on the entries that tau_clip cuts; 0 for losses without that clip
    correct: Tensor  # of the token's row: 1 right, 0 wrong, NaN where that is not known (`of_rows`)
    finished: Tensor  # of the token's row: 1 if it ended with EOS, 0 if it was cut, NaN where that is not known


def log_probabilities(logits_MV: Tensor, temperature: float) -> Tensor:
    """log softmax(float32 logits / T_distill), the log of p_t or p^opsd_t."""
    return (logits_MV.float() / temperature).log_softmax(dim=-1)


def score_tokens(
    method: Method, student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions
) -> TokenScores:
    """l_t and the statistics that weights and logs need.

    Statistics first: their memory is free again when the loss begins to keep what its gradient needs.
    """
    with torch.no_grad():
        entries_MV = divergence_entries(student_logp_MV, teacher_logp_MV)
        forward_kl_M, clipped_mass_M = entries_MV.sum(dim=-1), torch.zeros_like(ids_M, dtype=torch.float32)
        if method.clips and options.tau_clip < inf:
            if options.beta != 0.0:
                entries_MV = divergence_entries(student_logp_MV, teacher_logp_MV, options.beta)
            clipped_mass_M = torch.where(entries_MV > options.tau_clip, teacher_logp_MV.exp(), 0.0).sum(dim=-1)
        del entries_MV
        statistics = {
            "student_logprob": _at(student_logp_MV, ids_M),
            "teacher_logprob": _at(teacher_logp_MV, ids_M),
            "student_entropy": entropy(student_logp_MV),
            "teacher_entropy": entropy(teacher_logp_MV),
            "forward_kl": forward_kl_M,
            "clipped_mass": clipped_mass_M,
            "correct": torch.full_like(clipped_mass_M, nan),
            "finished": torch.full_like(clipped_mass_M, nan),
        }
    return TokenScores(loss=method.token_loss(student_logp_MV, teacher_logp_MV, ids_M, options), **statistics)


def of_rows(scores: TokenScores, lengths: list[int], **outcomes: list[bool | None]) -> TokenScores:
    """The scores with `correct` and `finished`, one of each a row, at each of the row's tokens; NaN for None."""
    count = torch.tensor(lengths, device=scores.loss.device)
    values = {name: count.new_tensor([nan if v is None else v for v in rows], dtype=torch.float32)
              for name, rows in outcomes.items()}  # fmt: skip
    return replace(scores, **{name: rows.repeat_interleave(count) for name, rows in values.items()})


def reduce_tokens(method: Method, scores: TokenScores, lengths: list[int], step: int, options: LossOptions) -> Tensor:
    """Eq. (8): reduce_t( w_t * l_t ), a scalar."""
    r_M = relative_position(lengths).to(scores.loss.device)
    w_M = method.token_weight(r_M, scores, lengths, step, options).detach()
    numerator, denominator = method.reduction(scores.loss, w_M, lengths)
    return numerator / denominator.masked_fill(denominator == 0, torch.finfo(torch.float32).tiny)  # an empty mask


def method_loss(
    name: str, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, response_ids_BT: Tensor, mask_BT: Tensor, *,
    step: int = 0, correct: list[bool | None] | None = None, finished: list[bool] | None = None, **overrides,
) -> Tensor:  # fmt: skip
    """Eq. (8) of a method on whole logits: the plain form, for readers, forks and tests.

    `mask_BT` is True on each row's response tokens, a prefix of the row; `correct` and `finished` are the rows'
    outcomes, for weights that look at them. `overrides` are fields of LossOptions, with `clip` (None for none) and
    `temperature` short for tau_clip and distill_temperature. The gradient flows into the student's logits only. Raises
    InputError (a ValueError) for an unknown method, options out of range, or tensors whose shapes do not fit.
    """
    options = _options(overrides)
    method = resolve_method(name, options)
    lengths = valid_lengths(mask_BT, response_ids_BT, student_logits_BTV, teacher_logits_BTV)
    student_logp_MV = log_probabilities(student_logits_BTV[mask_BT], options.distill_temperature)
    teacher_logp_MV = log_probabilities(teacher_logits_BTV[mask_BT].detach(), options.distill_temperature)
    scores = score_tokens(method, student_logp_MV, teacher_logp_MV, response_ids_BT[mask_BT], options)
    unknown = [None] * len(lengths)
    scores = of_rows(scores, lengths, correct=correct or unknown, finished=finished or unknown)
    return reduce_tokens(method, scores, lengths, step, options)


# --- Options, and the method as it runs -------------------------------------------------------------------------


def _option(default: object, text: str) -> object:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LossOptions:
    """The numbers inside the losses, with the papers' defaults. None means the method's own.

    Raises InputError, naming the flag, for a number out of range.
    """

    distill_temperature: float = _option(1.1, "T_distill, divides both contexts' logits")
    tau_clip: float = _option(0.05, "clip of Eq. (1), per vocabulary entry; inf for none")
    beta: float = _option(0.0, "0: KL(teacher||student), 1: KL(student||teacher), between: JSD")
    schedule: str | None = _option(None, "weights by position, by name, in place of the method's own")
    w_min: float | None = _option(None, "Eq. (5): weight before the rise")
    tau: float | None = _option(None, "Eq. (5): relative position of the rise")
    s: float | None = _option(None, "Eq. (5): width of the rise")
    reduction: str | None = _option(None, "token_mean, sequence_mean or weighted_mean")
    switch_step: int = _option(50, "REOPOLD: step from which the entropy mask is used")

    def __post_init__(self) -> None:
        T = self.distill_temperature
        require(0.0 < T < inf, "distill_temperature", T, "be positive and finite")
        require(self.tau_clip > 0.0, "tau_clip", self.tau_clip, "be positive (inf for none)")
        require(0.0 <= self.beta <= 1.0, "beta", self.beta, "lie in [0, 1]")


def resolve_method(name: str, options: LossOptions) -> Method:
    """The method as it runs: the row's functions, with --schedule and --reduction in place of its own.

    Raises InputError for unknown names and numbers out of range.
    """
    require(name in METHODS, "method", name, f"be one of {', '.join(METHODS)}")
    row, numbers = METHODS[name], {"w_min": options.w_min, "tau": options.tau, "s": options.s}
    if options.reduction is not None:
        require(options.reduction in REDUCTIONS, "reduction", options.reduction, f"be one of {', '.join(REDUCTIONS)}")
        row = replace(row, reduction=REDUCTIONS[options.reduction])
    weight = options.schedule or row.token_weight
    if isinstance(weight, str):
        schedule = get_schedule(weight, **numbers)
        row = replace(row, token_weight=lambda r_M, *_: schedule(r_M), over_batch=False)
    elif set(numbers.values()) != {None}:
        raise InputError(f"--w_min, --tau and --s: {name} weights by no schedule; add --schedule")
    loss_M, weight_M = _one_a_token("loss", row.token_loss, 2), _one_a_token("weight", row.token_weight, 0)
    return replace(row, token_loss=loss_M, token_weight=weight_M)


def _one_a_token(what: str, function: Callable, like: int) -> Callable:
    """The function, whose value must have the shape [M] of its argument number `like`.

    Any other would be spread over the tokens without a word: the gradient of a mean over them would be too small.
    """

    @wraps(function)
    def checked(*given: object) -> Tensor:
        x, wanted = function(*given), list(given[like].shape)
        if (shape := list(getattr(x, "shape", ()))) != wanted:
            raise InputError(f"the method's token {what} has shape {shape}, not one number a token, {wanted}")
        return x

    return checked


def _options(overrides: dict) -> LossOptions:
    renamed = {"clip": "tau_clip", "temperature": "distill_temperature"}
    given = {renamed.get(name, name): value for name, value in overrides.items()}
    if given.get("tau_clip", 1.0) is None:
        given["tau_clip"] = inf
    return LossOptions(**given)


# --- The same from hidden states, a chunk of tokens at a time: whole logits of a step would take many GiB -------

# Of one float32 tensor of logits, by device: at Qwen3's vocabulary 58 tokens on a CPU, 256 on a GPU. Above 32 MiB the C
# library maps a tensor for itself, which costs time; below, it is cut from a heap that small results then keep in
# pieces, so that it grows by a tenth of a GiB a chunk.
CHUNK_BYTES = {"cpu": 34 * 2**20, "cuda": 4 * 256 * 151_936}


def chunk_rows(head_VD: Tensor) -> int:
    """Tokens whose logits CHUNK_BYTES hold on the head's device."""
    return max(1, CHUNK_BYTES.get(head_VD.device.type, CHUNK_BYTES["cpu"]) // (4 * head_VD.shape[0]))


def score_tokens_from_hidden(
    method: Method, student_MD: Tensor, teacher_MD: Tensor, head_VD: Tensor, teacher_head_VD: Tensor, ids_M: Tensor,
    options: LossOptions, chunk_tokens: int | None = None,
) -> TokenScores:  # fmt: skip
    """`score_tokens` of the valid tokens' hidden states, a chunk of them at a time.

    A chunk's logits are not kept for its gradient: with the loss comes dl_t/dh_t, [M, D], at once. Where the head is
    trained too, they are made again (torch.utils.checkpoint). At most `chunk_tokens` rows of logits exist at any time;
    by default as many as CHUNK_BYTES hold.
    """
    size, score = chunk_tokens or chunk_rows(head_VD), _score_chunk
    if head_VD.requires_grad:
        score = partial(checkpoint, _score_chunk, use_reentrant=False, preserve_rng_state=False)
    elif student_MD.requires_grad and torch.is_grad_enabled():
        score = _score_chunk_with_gradient
    parts = [
        score(method, *chunk, head_VD, teacher_head_VD, options)
        for chunk in zip(student_MD.split(size), teacher_MD.split(size), ids_M.split(size), strict=True)
    ]
    return TokenScores(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenScores)})


def _score_chunk_with_gradient(method, student_MD, teacher_MD, ids_M, head_VD, teacher_head_VD, options) -> TokenScores:
    """Value l_t, gradient g_t = dl_t/dh_t, as l_t + h_t g_t - sg(h_t g_t): backward then needs no logits.

    One autograd call gives every token's g_t: a token loss looks at its own rows alone, so the gradient of the sum at
    h_t is that of l_t.
    """
    leaf_MD = student_MD.detach().requires_grad_()
    scores = _score_chunk(method, leaf_MD, teacher_MD, ids_M, head_VD, teacher_head_VD, options)
    (g_MD,) = torch.autograd.grad(scores.loss.sum(), leaf_MD)
    along_M = (student_MD.float() * g_MD.float()).sum(dim=-1)
    return replace(scores, loss=scores.loss.detach() + (along_M - along_M.detach()))


def _score_chunk(method, student_MD, teacher_MD, ids_M, head_VD, teacher_head_VD, options) -> TokenScores:
    # The logits have no name here on purpose: each is freed as soon as its logarithms are there.
    student_logp_MV = log_probabilities(head_logits(student_MD, head_VD), options.distill_temperature)
    with torch.no_grad():
        teacher_logp_MV = log_probabilities(head_logits(teacher_MD, teacher_head_VD), options.distill_temperature)
    return score_tokens(method, student_logp_MV, teacher_logp_MV, ids_M, options)


def valid_lengths(mask_BT: Tensor, response_ids_BT: Tensor, student_BTX: Tensor, teacher_BTX: Tensor) -> list[int]:
    """Valid lengths L_i of the rows; InputError unless each row's mask is a prefix of at least one token."""
    shapes = [tuple(x.shape) for x in (mask_BT, response_ids_BT, student_BTX, teacher_BTX)]
    if mask_BT.dtype != torch.bool or len({shape[:2] for shape in shapes}) > 1 or shapes[2] != shapes[3]:
        raise InputError(f"mask (bool), ids and both contexts must agree in shape: {mask_BT.dtype}, {shapes}")
    lengths_B = mask_BT.sum(dim=1)
    prefix_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) < lengths_B[:, None]
    if not torch.equal(mask_BT, prefix_BT) or (lengths_B == 0).any():
        raise InputError("each row of the mask must be True on a prefix of at least one token")
    return lengths_B.tolist()
