"""On-policy sampling: all prompts of a step in one batched call, on token ids, each row with its own random stream.

A row's stream depends on its key alone (train.py and evaluate.py say what is in it): not on the batch it is sampled in,
nor on the number of processes, nor on the engine. Axes: B sequences, T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from model import eos_ids
from problems import InputError

StreamKey = tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class Response:
    """One sampled row: token ids y_1..y_L with the EOS that ended it; logprobs are the engine's, at temperature 1."""

    ids: list[int]
    finished: bool  # True: ended with EOS; False: cut at max_new_tokens
    logprobs: list[float] | None = None
    text: str | None = None  # only from a server that returns no token ids; `ids` is then empty
    tokens: int | None = None  # with `text`: the server's count of tokens


OnFinished = Callable[[int, Response], None]  # (row, response), called as soon as a row is done


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


@torch.no_grad()
def sample_continuous(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    keys: Sequence[StreamKey],
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    on_finished: Callable[[int, list[int], bool], None] | None = None,
) -> Rollout:
    """`sample` by transformers' continuous batching: a finished row makes room for the next, nothing is padded.

    The one for long responses on a GPU. `on_finished(row, response, finished)` is called as soon as a row is done.

    Determinism: a row draws the same uniform numbers as under `sample`, whatever rows run beside it. Its logits depend
    on the attention kernel and on the batch the scheduler puts together, in their last bits; so a row repeats exactly
    in float32 on a CPU, and on a GPU only until a draw falls within that rounding error of a boundary.
    """
    check_sampling(temperature, top_p, top_k, max_new_tokens)
    was_training = model.training
    ends = eos_ids(model, tokenizer)
    sampler = _ContinuousSampler(prompts, keys, max_new_tokens, temperature, top_p, top_k, model.device)
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    processors.tensors_required = 1  # one number per row; the list counts only what it converted itself
    settings = GenerationConfig(do_sample=False, eos_token_id=ends, max_new_tokens=max_new_tokens)
    manager = model.init_continuous_batching(settings, _cache_size(model, prompts, max_new_tokens))
    manager.logit_processor = processors
    done: dict[int, list[int]] = {}
    try:
        manager.warmup()
        manager.start()
        for row, prompt in enumerate(prompts):
            manager.add_request(prompt, f"row {row}", max_new_tokens=max_new_tokens, eos_token_id=ends, row=row)
        while len(done) < len(prompts):
            output = manager.get_result(timeout=1.0)
            if output is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped before all rows were done (its log says why)")
            if output is None or not output.is_finished():
                continue
            if output.error is not None:
                raise RuntimeError(f"continuous batching failed: {output.error}")
            if not bool(sampler.finite):
                raise FloatingPointError("sampling: the model's logits are not finite")
            row = int(output.request_id.removeprefix("row "))
            done[row] = output.generated_tokens
            sampler.forget(row)
            if on_finished is not None:
                on_finished(row, done[row], done[row][-1] in ends)
    finally:
        manager.stop(block=True, hard_stop=len(done) < len(prompts))
        manager.destroy()
        model.train(was_training)
    responses = [done[row] for row in range(len(prompts))]
    return Rollout(prompts, responses, [response[-1] in ends for response in responses])


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


def _cache_size(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> ContinuousBatchingConfig:
    """On a GPU, transformers' choice where logits are processed (0.8), which it cannot see before our sampler is in.

    On a CPU that would be most of the machine's memory: room for 32 rows at a time does.
    """
    if model.device.type != "cpu":
        return ContinuousBatchingConfig(max_memory_percent=0.8)
    pages_per_row = (max(map(len, prompts)) + max_new_tokens) // 256 + 1  # 256 tokens a page by default
    return ContinuousBatchingConfig(num_blocks=pages_per_row * min(len(prompts), 32) + 1, max_batch_tokens=256)


class _ContinuousSampler(ContinuousBatchingLogitsProcessor):
    """The same for continuous batching, where row and position come with each request instead of the batch's layout."""

    supported_kwargs: ClassVar = {"row": int}
    ignored_kwargs: ClassVar = ()

    def __init__(
        self,
        prompts: list[list[int]],
        keys: Sequence[StreamKey],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        device: torch.device,
    ) -> None:
        self.prompt_lengths, self.keys, self.count = [len(prompt) for prompt in prompts], keys, max_new_tokens
        self.settings = (temperature, top_p, top_k)
        self.uniforms: dict[int, Tensor] = {}  # of the rows under way
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.copy_(torch.full_like(int32_tensor, -1.0, dtype=torch.float32).view(torch.int32))

    def prepare_tensor_args(self, requests_with_new_token: list) -> Tensor:
        """One uniform number a row, as the bits of an int32; -1 for the engine's own warm-up rows."""
        return torch.tensor([self._uniform(request.state) for request in requests_with_new_token]).view(torch.int32)

    def _uniform(self, state) -> float:
        row = state.logit_processor_kwargs.get("row")
        if row is None:
            return -1.0
        if row not in self.uniforms:
            self.uniforms[row] = _uniforms([self.keys[row]], self.count)[0]
        t = state.position_offset - self.prompt_lengths[row]  # holds also for a row that was evicted and prefilled anew
        return float(self.uniforms[row][min(t, self.count - 1)])

    def forget(self, row: int) -> None:
        self.uniforms.pop(row, None)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        uniform_B = tensor_arg[: scores.shape[0]].view(torch.float32)
        broken_B = ~scores.isfinite().any(dim=-1) | scores.isnan().any(dim=-1)
        self.finite &= ~(broken_B & (uniform_B >= 0.0)).any()
        chosen_B = choose_tokens(scores, uniform_B, *self.settings)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B[:, None], 0.0)
