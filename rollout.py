"""On-policy sampling: y ~ pi_theta(. | x_stu) on token ids, each row with its own random stream.

A row's uniform numbers depend on its key alone: not on the batch it is sampled in, nor on the number of processes.
`sample` is plain `generate`, in which StreamSampler puts our choice before its argmax; a server (runtime/server.py)
gets a seed made from the key instead.
Axes: B sequences, P prompt tokens (padded on the left), T response tokens, X = P + T, V vocabulary, K candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from chat import eos_ids
from errors import require
from model import cast_adapter

StreamKey = tuple[int, ...]  # (seed, purpose, step or problem, slot or sample): what a row's random numbers depend on
LEAST_TEMPERATURE = 0.01  # vLLM raises what lies between 0 and this; logits over a far lower one overflow


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off. Raises InputError out of range."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    context: int | None = None  # of prompt and response together, where each row has a limit of its own

    def limit(self, prompt: list[int]) -> int:
        """New tokens of a row at most."""
        return self.max_new_tokens if self.context is None else min(self.max_new_tokens, self.context - len(prompt))

    def __post_init__(self) -> None:
        T = self.temperature
        is_fine = T == 0.0 or LEAST_TEMPERATURE <= T < inf
        require(is_fine, "temperature", T, f"be 0 (greedy) or at least {LEAST_TEMPERATURE}")
        require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "lie in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "be at least 0 (0 is off)")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "be at least 1")


@dataclass(frozen=True)
class Response:
    """One sampled row, y_1..y_L. Its length L_i of Eq. (5) counts the EOS, also where the pad id is the EOS id."""

    ids: list[int]
    finished: bool  # True: ended with EOS, which `ids` include; False: cut at max_new_tokens
    logprobs: list[float] | None = None  # of `ids` at temperature 1, where the engine tells them


OnFinished = Callable[[int, Response], None]  # (row, response), called once a row, or its batch, is done


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], keys: Sequence[StreamKey],
    settings: Sampling, on_token: Callable[[], object] = lambda: None,
) -> list[Response]:  # fmt: skip
    """Sample one response per prompt from the model as it stands (adapter on), all prompts in one batch.

    Leaves the model in the mode it was in. `on_token` is called before each token of the batch. Raises
    FloatingPointError where the model's logits are not numbers.
    """
    device, pad = model.get_input_embeddings().weight.device, tokenizer.pad_token_id
    ends, limits = eos_ids(model.generation_config, tokenizer), [settings.limit(prompt) for prompt in prompts]
    width, was_training = max(map(len, prompts)), model.training
    ids_BP = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask_BP = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampler = StreamSampler(uniforms(keys, max(limits)).to(device), width, settings, on_token)
    model.eval()
    try:
        with cast_adapter(model):
            output_BX = model.generate(
                input_ids=ids_BP, attention_mask=mask_BP, logits_processor=[sampler], do_sample=False, use_cache=True,
                max_new_tokens=max(limits), eos_token_id=ends, pad_token_id=pad,
            )  # fmt: skip
    finally:
        model.train(was_training)
    if not bool(sampler.finite):
        raise FloatingPointError("sampling: the model's logits are not finite")
    rows = zip(output_BX[:, width:].tolist(), limits, strict=True)
    return [until_eos(row[:limit], ends) for row, limit in rows]


def until_eos(ids: list[int], ends: list[int]) -> Response:
    """A row of generated ids up to and with its first EOS."""
    end = next((t for t, token in enumerate(ids) if token in ends), None)
    return Response(ids if end is None else ids[: end + 1], finished=end is not None)


CANDIDATES = 1024  # that a nucleus is looked for among, before a row is sorted whole


def choose_tokens(logits_BV: Tensor, uniform_B: Tensor, settings: Sampling, candidates: int = CANDIDATES) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution at `uniform_B` in [0, 1); returns ids [B].

    In the field's order: temperature, then the top_k most likely, then the smallest set of those that holds top_p of
    their mass: K candidates, most likely first. A row whose set does not end within `candidates` is drawn from all.
    """
    if settings.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    scaled_BV = logits_BV.float() / settings.temperature
    count = settings.top_k or (candidates if settings.top_p < 1.0 else scaled_BV.shape[-1])
    values_BK, ids_BK = _most_likely(scaled_BV, count)
    is_part = not settings.top_k and values_BK.shape != scaled_BV.shape
    p_BK = scaled_BV.softmax(dim=-1).gather(-1, ids_BK) if is_part else values_BK.softmax(dim=-1)
    before_BK = p_BK.cumsum(dim=-1) - p_BK  # mass of the more likely ones
    kept_BK = p_BK if settings.top_p == 1.0 else p_BK.masked_fill(before_BK >= settings.top_p, 0.0)
    cumulative_BK = kept_BK.cumsum(dim=-1)
    index_B1 = (cumulative_BK <= uniform_B[:, None] * cumulative_BK[:, -1:]).sum(dim=-1, keepdim=True)
    # Rounding must not reach a token that top_p has cut. Logits that are NaN keep none: `sample` then raises.
    last_B1 = (kept_BK > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    chosen_B = ids_BK.gather(-1, torch.minimum(index_B1, last_B1)).squeeze(-1)
    # A token beyond the candidates may be as likely as their last: a set that keeps none such is whole.
    open_B = ((kept_BK > 0) & (values_BK == values_BK[:, -1:])).any(dim=-1)
    if is_part and open_B.any():
        chosen_B[open_B] = choose_tokens(logits_BV[open_B], uniform_B[open_B], settings, scaled_BV.shape[-1])
    return chosen_B


def _most_likely(values_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their ids; the largest first, and of equal ones that of the lowest id.

    Which of those as large as the last are among the `count` is torch.topk's choice.
    """
    if count >= values_BV.shape[-1]:
        return values_BV.sort(dim=-1, descending=True, stable=True)
    ids_BK = values_BV.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    values_BK, order_BK = values_BV.gather(-1, ids_BK).sort(dim=-1, descending=True, stable=True)
    return values_BK, ids_BK.gather(-1, order_BK)


def uniforms(keys: Sequence[StreamKey], count: int) -> Tensor:
    """[B, count] float32 in [0, 1): row b is drawn from its key's own counter-based generator."""
    rows = [np.random.Generator(np.random.Philox(key)).random(count, np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))


class StreamSampler(LogitsProcessor):
    """Puts our choice in front of generate's argmax: all scores -inf but the chosen token's."""

    def __init__(self, uniform_BT: Tensor, prompt_width: int, settings: Sampling, on_token: Callable) -> None:
        self.uniform_BT, self.prompt_width, self.settings, self.on_token = uniform_BT, prompt_width, settings, on_token
        self.finite = torch.ones((), dtype=torch.bool, device=uniform_BT.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.on_token()
        self.finite &= scores.amax(dim=-1).isfinite().all()  # also False where one is NaN
        chosen_B = choose_tokens(scores, self.uniform_BT[:, input_ids.shape[1] - self.prompt_width], self.settings)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B[:, None], 0.0)
