"""On-policy sampling: all prompts of a step in one batched call, on token ids, each row with its own random stream.

A row's stream depends on its key alone, (seed, step, slot) in training and (seed, problem, sample) in evaluation: not
on the batch it is sampled in, nor on the number of processes. Axes: B sequences, T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from model import eos_ids
from problems import InputError

StreamKey = tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. A response includes the EOS that ended it, also where the pad id is the EOS id."""

    prompts: list[list[int]]  # x_stu as token ids
    responses: list[list[int]]  # y_1..y_L
    finished: list[bool]  # True: ended with EOS; False: cut at max_new_tokens

    @property
    def lengths(self) -> list[int]:
        """L_i of Eq. (5): valid tokens of each row, EOS counted."""
        return [len(response) for response in self.responses]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    keys: Sequence[StreamKey],
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
) -> Rollout:
    """Sample one response per prompt from the model as it stands (adapter on). temperature 0 is greedy; top_k 0 is off.

    Leaves the model in the mode it was in. Raises InputError for settings out of range and FloatingPointError where
    the model's logits are not numbers.
    """
    check_sampling(temperature, top_p, top_k, max_new_tokens)
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    pad, ends = tokenizer.pad_token_id, eos_ids(model, tokenizer)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampler = _StreamSampler(_uniforms(keys, max_new_tokens).to(device), width, temperature, top_p, top_k)
    output = model.generate(
        input_ids=ids, attention_mask=seen, logits_processor=[sampler], do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=ends, pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    model.train(was_training)
    if not bool(sampler.finite):
        raise FloatingPointError("sampling: the model's logits are not finite")
    responses, finished = [], []
    for row in output[:, width:].tolist():
        end = next((t for t, token in enumerate(row) if token in ends), None)
        responses.append(row if end is None else row[: end + 1])
        finished.append(end is not None)
    return Rollout(prompts, responses, finished)


def check_sampling(temperature: float, top_p: float, top_k: int, max_new_tokens: int) -> None:
    """Raise InputError, naming the flag, for a sampling setting out of range."""
    if not 0.0 <= temperature < float("inf"):
        raise InputError(f"--temperature {temperature}: must be at least 0")
    if not 0.0 < top_p <= 1.0:
        raise InputError(f"--top_p {top_p}: must lie in (0, 1]")
    if top_k < 0:
        raise InputError(f"--top_k {top_k}: must be at least 0 (0 is off)")
    if max_new_tokens < 1:
        raise InputError(f"--max_new_tokens {max_new_tokens}: must be at least 1")


def choose_tokens(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution at `uniform_B` in [0, 1); returns ids [B].

    In the field's order: temperature, then the top_k most likely, then the smallest set of those that holds top_p of
    their mass.
    """
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    scaled_BV = logits_BV.float() / temperature
    if 0 < top_k < scaled_BV.shape[-1]:
        values, ids = scaled_BV.topk(top_k, dim=-1)
    else:
        values, ids = scaled_BV.sort(dim=-1, descending=True)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = kept.cumsum(dim=-1)
    rank = (cumulative <= uniform_B[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    last = (kept > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    return ids.gather(-1, torch.minimum(rank, last)).squeeze(-1)


def _uniforms(keys: Sequence[StreamKey], count: int) -> Tensor:
    """[B, count] float32 in [0, 1): row b is drawn from its key's own counter-based generator."""
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(count, np.float32) for key in keys
    ]
    return torch.from_numpy(np.stack(rows))


class _StreamSampler(LogitsProcessor):
    """Puts our choice in front of generate's argmax: all scores -inf but the chosen token's."""

    def __init__(self, uniform_BT: Tensor, prompt_width: int, temperature: float, top_p: float, top_k: int) -> None:
        self.uniform_BT, self.prompt_width = uniform_BT, prompt_width
        self.settings = (temperature, top_p, top_k)
        self.finite = torch.ones((), dtype=torch.bool, device=uniform_BT.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finite &= scores.isfinite().any(dim=-1).all() & ~scores.isnan().any()
        chosen_B = choose_tokens(scores, self.uniform_BT[:, input_ids.shape[1] - self.prompt_width], *self.settings)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B[:, None], 0.0)
