"""The losses: a method is a row (token loss, token weight, reduction) of one template, Eq. (8).

    L = reduce_t( w_t * l_t ),   l_t from p_t = pi_theta(. | x_stu, y_<t) and p^opsd_t = p_tch(. | x_tch, y_<t)

Both distributions are softmax(float32 logits / T_distill) over the full vocabulary; the teacher carries no gradient.
The loss of a token depends on that token's two hidden states only. `loss_terms_from_hidden` uses that: it meets the
vocabulary a chunk of tokens at a time and keeps, instead of logits, each token's gradient at its hidden state.

Axes: B sequences, T response tokens, V vocabulary, D hidden, K alternatives, M valid tokens (the paper's set M) row
after row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from problems import InputError
from weighting import get_schedule, relative_position, rescale_to_mean_one


@dataclass
class LossOptions:
    """The numbers inside the losses, with the papers' defaults. None means the method's own."""

    temperature: float = field(default=1.1, metadata={"help": "T_distill, divides both contexts' logits"})
    clip: float = field(default=0.05, metadata={"help": "tau_clip of Eq. (1), per vocabulary entry; inf for none"})
    beta: float = field(
        default=0.0, metadata={"help": "0: KL(teacher||student), 1: KL(student||teacher), between: JSD"}
    )
    schedule: str | None = field(
        default=None, metadata={"help": "weights of Eq. (5): a name of weighting.py or a .json"}
    )
    w_min: float | None = field(default=None, metadata={"help": "Eq. (5): weight before the rise"})
    tau: float | None = field(default=None, metadata={"help": "Eq. (5): relative position of the rise"})
    s: float | None = field(default=None, metadata={"help": "Eq. (5): width of the rise"})
    reduction: str | None = field(default=None, metadata={"help": "token_mean, sequence_mean or weighted_mean"})
    entropy_gate: float = field(
        default=0.8, metadata={"help": "EOPD: teacher entropy (nats) above which forward KL is added"}
    )
    gate_top_k: int = field(default=16, metadata={"help": "EOPD: teacher's top tokens in the forward KL"})
    ratio_clip: float = field(default=0.2, metadata={"help": "EOPD: clip of the importance ratio"})
    reward_lambda: float = field(default=0.1, metadata={"help": "REOPOLD: lambda, sets the floor of the reward"})
    switch_step: int = field(default=50, metadata={"help": "REOPOLD: step from which the entropy mask is used"})
    entropy_quantile: float = field(default=0.2, metadata={"help": "REOPOLD: share of tokens kept by the entropy mask"})


# Logits of this many tokens exist at a time: five float32 tensors of 28 MiB at Qwen3's vocabulary. More gains nothing
# on a CPU, where the allocator returns larger tensors to the system each time (experiments/benchmark.py).
CHUNK_TOKENS = 48


@dataclass(frozen=True)
class TokenScores:
    """What the valid tokens of a batch bring; each [M] float32. Only `loss` carries a gradient. Entropies in nats."""

    loss: Tensor
    student_logprob: Tensor  # log p_t(y_t)
    teacher_logprob: Tensor  # log p^opsd_t(y_t)
    student_entropy: Tensor
    teacher_entropy: Tensor
    clipped_mass: Tensor  # teacher's probability on the entries that tau_clip cuts; 0 for losses without a clip


@dataclass(frozen=True)
class LossTerms:
    """A loss as a fraction. Numerators and denominators of micro-batches and ranks add up to the exact step's loss."""

    numerator: Tensor  # scalar, carries the gradient
    denominator: Tensor  # scalar, no gradient
    weight: Tensor  # [M]
    relative_position: Tensor  # [M]
    scores: TokenScores

    @property
    def loss(self) -> Tensor:
        return self.numerator / self.denominator.clamp(min=torch.finfo(torch.float32).tiny)


# ---------------------------------------------------------------------------------------------------------------
# Token losses: (student log-probabilities [M, V], teacher's [M, V], sampled ids [M], options) -> [M]


def divergence_entries(student_logp_MV: Tensor, teacher_logp_MV: Tensor, beta: float) -> Tensor:
    """JSD_beta by entry, [M, V]: beta p_T log(p_T / m) + (1 - beta) p_S log(p_S / m), m = beta p_T + (1 - beta) p_S.

    By definition beta = 0 is the forward p_T log(p_T / p_S) of Eq. (1) and beta = 1 the reverse p_S log(p_S / p_T).
    """
    if beta == 0.0:
        return teacher_logp_MV.exp() * (teacher_logp_MV - student_logp_MV)
    if beta == 1.0:
        return student_logp_MV.exp() * (student_logp_MV - teacher_logp_MV)
    beta_tensor = torch.tensor(beta, device=student_logp_MV.device)
    mixture_logp_MV = torch.logaddexp(teacher_logp_MV + beta_tensor.log(), student_logp_MV + (1 - beta_tensor).log())
    teacher_part = teacher_logp_MV.exp() * (teacher_logp_MV - mixture_logp_MV)
    student_part = student_logp_MV.exp() * (student_logp_MV - mixture_logp_MV)
    return beta * teacher_part + (1.0 - beta) * student_part


def clipped_divergence(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """Eq. (1), one token: d_t = sum_j min( p^opsd(j) log(p^opsd(j) / p(j)), tau_clip ).

    The clip is per vocabulary entry and from above only, before the sum, so a token's value may be negative.
    """
    entries_MV = divergence_entries(student_logp_MV, teacher_logp_MV, options.beta)
    return entries_MV.clamp(max=options.clip).sum(dim=-1)


def gated_loss(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """EOPD (arXiv 2603.07079): l = l_opd + 1[H(p_T) > 0.8] l_fkl.

    l_opd = max(-rho A, -clip(rho, 1 - eps, 1 + eps) A), A = sg(log p_T(y) - log p_S(y)), rho = p_S(y) / sg(p_S(y)).
    l_fkl = sum over the teacher's top K of q (log q - log p_S), q = p_T renormalised on those K.
    """
    student_M, teacher_M = _at(student_logp_MV, ids_M), _at(teacher_logp_MV, ids_M)
    A = (teacher_M - student_M).detach()
    rho = (student_M - student_M.detach()).exp()
    clipped = rho.clamp(1.0 - options.ratio_clip, 1.0 + options.ratio_clip)
    l_opd = torch.maximum(-rho * A, -clipped * A)
    K = min(options.gate_top_k, teacher_logp_MV.shape[-1])
    top_logp_MK, top_MK = teacher_logp_MV.topk(K, dim=-1)
    logq_MK = top_logp_MK.log_softmax(dim=-1)
    l_fkl = (logq_MK.exp() * (logq_MK - student_logp_MV.gather(-1, top_MK))).sum(dim=-1)
    return l_opd + (entropy(teacher_logp_MV) > options.entropy_gate) * l_fkl


def reward_floor(options: LossOptions) -> float:
    """REOPOLD: log(lambda) / (1 - lambda), -2.5584 at lambda = 0.1."""
    return float(torch.tensor(options.reward_lambda).log()) / (1.0 - options.reward_lambda)


def policy_gradient(student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions) -> Tensor:
    """REOPOLD (arXiv 2603.11137): l = -R^ log p_S(y), R^ = max(R, log(lambda) / (1 - lambda)).

    R = sg(log p_T(y) - log p_S(y)).
    """
    student_M = _at(student_logp_MV, ids_M)
    R = (_at(teacher_logp_MV, ids_M) - student_M).detach()
    return -R.clamp(min=reward_floor(options)) * student_M


def entropy(logp_MV: Tensor) -> Tensor:
    """H = -sum_j p(j) log p(j) in nats, [M]. For gates and logs: carries no gradient."""
    logp_MV = logp_MV.detach()
    return -logp_MV.exp().mul_(logp_MV).sum(dim=-1)


def _at(logp_MV: Tensor, ids_M: Tensor) -> Tensor:
    return logp_MV.gather(-1, ids_M[:, None]).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------
# Token weights: (scores, lengths, step, options) -> [M], no gradient


def scheduled(default: str) -> Callable[..., Tensor]:
    """Weights of Eq. (5), from the position alone; `options.schedule` replaces the method's default schedule."""

    def weight(scores: TokenScores, lengths: list[int], step: int, options: LossOptions) -> Tensor:
        schedule, rescale = get_schedule(options.schedule or default, options.w_min, options.tau, options.s)
        weight_M = schedule(relative_position(lengths))
        weight_M = rescale_to_mean_one(weight_M, lengths) if rescale else weight_M
        return weight_M.to(scores.loss.device)

    weight.schedule = default
    return weight


def phase_mask(scores: TokenScores, lengths: list[int], step: int, options: LossOptions) -> Tensor:
    """REOPOLD: before `switch_step`, 1[R >= floor]; from then on, 1[H(p_S) >= its (1 - beta) quantile].

    The quantile is over the tokens given in one call: a micro-batch in training, as in that paper.
    """
    if options.schedule is not None:
        return scheduled("uniform")(scores, lengths, step, options)
    if step < options.switch_step:
        return (scores.teacher_logprob - scores.student_logprob >= reward_floor(options)).float()
    threshold = torch.quantile(scores.student_entropy, 1.0 - options.entropy_quantile)
    return (scores.student_entropy >= threshold).float()


# ---------------------------------------------------------------------------------------------------------------
# Reductions: (loss [M], weight [M], lengths) -> (numerator, denominator); the name says what it divides by


def token_mean(loss_M: Tensor, weight_M: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Eq. (8): 1/|M| sum_t w_t l_t, over all valid tokens of the batch."""
    return (weight_M * loss_M).sum(), loss_M.new_tensor(float(sum(lengths)))


def sequence_mean(loss_M: Tensor, weight_M: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Eq. (6): 1/B sum_i 1/L_i sum_t w_{i,t} l_{i,t}, the mean within each sequence, then over sequences."""
    rows = (weight_M * loss_M).split(lengths)
    return torch.stack([row.mean() for row in rows]).sum(), loss_M.new_tensor(float(len(lengths)))


def weighted_mean(loss_M: Tensor, weight_M: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """REOPOLD: sum_t w_t l_t / sum_t w_t."""
    return (weight_M * loss_M).sum(), weight_M.sum()


REDUCTIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "weighted_mean": weighted_mean}


# ---------------------------------------------------------------------------------------------------------------
# The methods


@dataclass(frozen=True)
class Method:
    """One row of Eq. (8)."""

    token_loss: Callable[[Tensor, Tensor, Tensor, LossOptions], Tensor]
    token_weight: Callable[[TokenScores, list[int], int, LossOptions], Tensor]
    reduction: str


METHODS: dict[str, Method] = {
    "opsd": Method(clipped_divergence, scheduled("uniform"), "token_mean"),  # Eq. (1)
    "pwopsd": Method(clipped_divergence, scheduled("moderate"), "sequence_mean"),  # Eq. (6)
    "eopd": Method(gated_loss, scheduled("uniform"), "token_mean"),
    "reopold": Method(policy_gradient, phase_mask, "weighted_mean"),
}


def get_method(name: str, options: LossOptions) -> tuple[Method, Callable]:
    """A row by name and its reduction function. Raises InputError for unknown names and numbers out of range."""
    if name not in METHODS:
        raise InputError(f"--method {name}: choose one of {', '.join(METHODS)}")
    reduction = options.reduction or METHODS[name].reduction
    if reduction not in REDUCTIONS:
        raise InputError(f"--reduction {reduction}: choose one of {', '.join(REDUCTIONS)}")
    if not options.temperature > 0.0:
        raise InputError(f"--temperature {options.temperature}: must be positive")
    if not options.clip > 0.0:
        raise InputError(f"--clip {options.clip}: must be positive (inf for none)")
    if not 0.0 <= options.beta <= 1.0:
        raise InputError(f"--beta {options.beta}: must lie in [0, 1]")
    if not 0.0 < options.reward_lambda < 1.0:
        raise InputError(f"--reward_lambda {options.reward_lambda}: must lie in (0, 1)")
    if not 0.0 <= options.entropy_quantile <= 1.0:
        raise InputError(f"--entropy_quantile {options.entropy_quantile}: must lie in [0, 1]")
    schedule = options.schedule or getattr(METHODS[name].token_weight, "schedule", None)
    if schedule is not None:
        get_schedule(schedule, options.w_min, options.tau, options.s)
    elif (options.w_min, options.tau, options.s) != (None, None, None):
        raise InputError(f"--w_min, --tau and --s: {name} weights by no schedule; add --schedule")
    return METHODS[name], REDUCTIONS[reduction]


def log_probabilities(logits_MV: Tensor, temperature: float) -> Tensor:
    """log softmax(float32 logits / T_distill), the log of p_t or p^opsd_t."""
    return (logits_MV.float() / temperature).log_softmax(dim=-1)


def score_tokens(
    method: Method, student_logp_MV: Tensor, teacher_logp_MV: Tensor, ids_M: Tensor, options: LossOptions
) -> TokenScores:
    """The statistics that weights and logs need, and the token loss.

    The loss comes last: what it keeps for its gradient is then not yet there while the statistics take their memory.
    """
    with torch.no_grad():
        clipped_mass_M = torch.zeros_like(ids_M, dtype=torch.float32)
        if method.token_loss is clipped_divergence and options.clip < float("inf"):
            is_clipped_MV = divergence_entries(student_logp_MV, teacher_logp_MV, options.beta) > options.clip
            clipped_mass_M = torch.where(is_clipped_MV, teacher_logp_MV.exp(), 0.0).sum(dim=-1)
            del is_clipped_MV
        statistics = {
            "student_logprob": _at(student_logp_MV, ids_M),
            "teacher_logprob": _at(teacher_logp_MV, ids_M),
            "student_entropy": entropy(student_logp_MV),
            "teacher_entropy": entropy(teacher_logp_MV),
            "clipped_mass": clipped_mass_M,
        }
    return TokenScores(loss=method.token_loss(student_logp_MV, teacher_logp_MV, ids_M, options), **statistics)


def combine(
    method: Method, reduce: Callable, scores: TokenScores, lengths: list[int], step: int, options: LossOptions
) -> LossTerms:
    """Eq. (8): the tokens' losses and weights as one fraction."""
    with torch.no_grad():
        weight_M = method.token_weight(scores, lengths, step, options)
    numerator, denominator = reduce(scores.loss, weight_M, lengths)
    r_M = relative_position(lengths).to(weight_M.device)
    return LossTerms(numerator, denominator, weight_M, r_M, scores)


def method_loss(
    name: str,
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    response_ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    step: int = 0,
    **overrides,
) -> Tensor:
    """The loss of a method on whole logits: the plain form, for tests, forks and readers.

    `mask_BT` is True on each row's response tokens, a prefix of the row. `overrides` are fields of LossOptions.
    Returns a scalar whose gradient flows into the student's logits only. Raises InputError (a ValueError) for unknown
    names, options out of range, or tensors whose shapes do not fit.
    """
    options = _options(overrides)
    method, reduce = get_method(name, options)
    if student_logits_BTV.shape != teacher_logits_BTV.shape:
        raise InputError(
            f"logits differ in shape: {tuple(student_logits_BTV.shape)}, {tuple(teacher_logits_BTV.shape)}"
        )
    lengths = _lengths(mask_BT, response_ids_BT, student_logits_BTV)
    student_logp_MV = log_probabilities(student_logits_BTV[mask_BT], options.temperature)
    teacher_logp_MV = log_probabilities(teacher_logits_BTV[mask_BT].detach(), options.temperature)
    scores = score_tokens(method, student_logp_MV, teacher_logp_MV, response_ids_BT[mask_BT], options)
    return combine(method, reduce, scores, lengths, step, options).loss


def method_loss_from_hidden(
    name: str,
    student_hidden_BTD: Tensor,
    teacher_hidden_BTD: Tensor,
    lm_head_weight_VD: Tensor,
    response_ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    step: int = 0,
    teacher_head_weight_VD: Tensor | None = None,
    **overrides,
) -> Tensor:
    """`method_loss` of the two contexts' hidden states, with at most `chunk_tokens` rows of logits at any time.

    The same value and gradient as `method_loss(name, hidden @ head.T, ...)`; also for the head where it is trained.
    """
    return loss_terms_from_hidden(
        name, student_hidden_BTD, teacher_hidden_BTD, lm_head_weight_VD, response_ids_BT, mask_BT,
        options=_options(overrides), chunk_tokens=chunk_tokens, step=step,
        teacher_head_weight_VD=teacher_head_weight_VD,
    ).loss  # fmt: skip


def loss_terms_from_hidden(
    name: str,
    student_hidden_BTD: Tensor,
    teacher_hidden_BTD: Tensor,
    lm_head_weight_VD: Tensor,
    response_ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    options: LossOptions,
    chunk_tokens: int = CHUNK_TOKENS,
    step: int = 0,
    teacher_head_weight_VD: Tensor | None = None,
) -> LossTerms:
    """The fraction behind `method_loss_from_hidden`, with the statistics of the same pass; used by train.py."""
    method, reduce = get_method(name, options)
    lengths = _lengths(mask_BT, response_ids_BT, student_hidden_BTD)
    teacher_head = lm_head_weight_VD if teacher_head_weight_VD is None else teacher_head_weight_VD
    values = _ChunkedScores.apply(
        student_hidden_BTD.flatten(0, 1), teacher_hidden_BTD.detach().flatten(0, 1), lm_head_weight_VD,
        teacher_head.detach(), mask_BT.flatten().nonzero().squeeze(1), response_ids_BT[mask_BT], method, options,
        chunk_tokens,
    )  # fmt: skip
    return combine(method, reduce, TokenScores(*values), lengths, step, options)


class _ChunkedScores(torch.autograd.Function):
    """`score_tokens` of hidden states, a chunk of tokens at a time. N = B x T rows, of which `rows_M` are valid tokens.

    Forward keeps d loss_m / d hidden_m, [N, D], so that backward is a product with the incoming [M] and no logits are
    computed twice. Only where the head itself is trained does backward go through the chunks again.
    """

    @staticmethod
    def forward(ctx, student_ND, teacher_ND, head_VD, teacher_head_VD, rows_M, ids_M, method, options, chunk_tokens):
        trains_states, trains_head = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        keep_gradient = trains_states and not trains_head
        gradient_ND = torch.zeros_like(student_ND) if keep_gradient else None
        ctx.settings = (method, options, chunk_tokens)
        parts = []
        for rows, ids in zip(rows_M.split(chunk_tokens), ids_M.split(chunk_tokens), strict=True):
            with torch.set_grad_enabled(keep_gradient):
                states = student_ND[rows].requires_grad_(keep_gradient)
                scores = _score_chunk(states, head_VD, teacher_ND[rows], teacher_head_VD, ids, method, options)
                if keep_gradient:
                    (gradient_ND[rows],) = torch.autograd.grad(scores.loss.sum(), states)
            parts.append(torch.stack([value.detach() for value in vars(scores).values()]))
            del scores  # with it goes the chunk's graph, before the next one is built
        values = torch.cat(parts, dim=1).unbind(0)
        ctx.mark_non_differentiable(*values[1:])
        recomputed = (student_ND, teacher_ND, head_VD, teacher_head_VD, ids_M) if trains_head else ()
        ctx.save_for_backward(rows_M, gradient_ND, *recomputed)
        return values

    @staticmethod
    def backward(ctx, upstream_M, *_):
        rows_M, gradient_ND, *recomputed = ctx.saved_tensors
        if not recomputed:
            upstream_N = gradient_ND.new_zeros(len(gradient_ND))
            upstream_N[rows_M] = upstream_M.to(gradient_ND.dtype)
            return (gradient_ND * upstream_N[:, None], *[None] * 8)
        student_ND, teacher_ND, head_VD, teacher_head_VD, ids_M = recomputed
        method, options, chunk_tokens = ctx.settings
        gradient_ND, gradient_VD = torch.zeros_like(student_ND), torch.zeros_like(head_VD, dtype=torch.float32)
        chunks = (x.split(chunk_tokens) for x in (rows_M, ids_M, upstream_M))
        for rows, ids, upstream in zip(*chunks, strict=True):
            with torch.enable_grad():
                states, head = student_ND[rows].requires_grad_(), head_VD.detach().requires_grad_()
                scores = _score_chunk(states, head, teacher_ND[rows], teacher_head_VD, ids, method, options)
            gradients = torch.autograd.grad(scores.loss, (states, head), grad_outputs=upstream)
            gradient_ND[rows] = gradients[0]
            gradient_VD += gradients[1]
            del scores, gradients
        return (gradient_ND, None, gradient_VD.to(head_VD.dtype), *[None] * 6)


def _score_chunk(states, head, teacher_states, teacher_head, ids, method: Method, options: LossOptions) -> TokenScores:
    # The logits have no name here on purpose: each is freed as soon as its logarithms are there.
    student_logp = log_probabilities(F.linear(states, head), options.temperature)
    with torch.no_grad():
        teacher_logp = log_probabilities(F.linear(teacher_states, teacher_head), options.temperature)
    return score_tokens(method, student_logp, teacher_logp, ids, options)


def _options(overrides: dict) -> LossOptions:
    if "clip" in overrides and overrides["clip"] is None:
        overrides = {**overrides, "clip": float("inf")}
    try:
        return LossOptions(**overrides)
    except TypeError as error:
        raise InputError(f"unknown loss option ({error})") from None


def _lengths(mask_BT: Tensor, response_ids_BT: Tensor, values_BTX: Tensor) -> list[int]:
    """Valid lengths L_i of the rows; InputError unless each row's mask is a prefix of at least one token."""
    if mask_BT.dtype != torch.bool or mask_BT.shape != response_ids_BT.shape or mask_BT.shape != values_BTX.shape[:2]:
        shapes = [tuple(x.shape) for x in (mask_BT, response_ids_BT, values_BTX)]
        raise InputError(f"mask (bool), response ids and states must agree on [B, T]: {mask_BT.dtype}, {shapes}")
    lengths_B = mask_BT.sum(dim=1)
    is_prefix = torch.equal(mask_BT, torch.arange(mask_BT.shape[1], device=mask_BT.device) < lengths_B[:, None])
    lengths = lengths_B.tolist()
    if not is_prefix or 0 in lengths:
        raise InputError("each row of the mask must be True on a prefix of at least one token")
    return lengths
