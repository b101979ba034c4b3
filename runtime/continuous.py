"""Sampling by transformers' continuous batching: a finished row makes room for the next, nothing is padded.

The one place that knows the library's private names for it. The engine for long responses on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from model import eos_ids
from rollout import OnFinished, Response, Sampling, StreamKey, choose_tokens, uniforms


class ContinuousEngine:
    """`rollout.sample` by continuous batching.

    Determinism: a row draws the same uniform numbers as under `generate`, whatever rows run beside it. Its logits
    depend on the attention kernel and on the batch the scheduler puts together, in their last bits; so a row repeats
    exactly in float32 on a CPU, and on a GPU only until a draw falls within that rounding error of a boundary.
    """

    name = "continuous"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        keys: Sequence[StreamKey],
        settings: Sampling,
        on_finished: OnFinished | None = None,
    ) -> list[Response]:
        model, ends, was_training = self.model, eos_ids(self.model, self.tokenizer), self.model.training
        sampler = RowSampler(prompts, keys, settings, model.device)
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        processors.tensors_required = 1  # one number per row; the list counts only what it converted itself
        limit = settings.max_new_tokens
        generation = GenerationConfig(do_sample=False, eos_token_id=ends, max_new_tokens=limit)
        manager = model.init_continuous_batching(generation, _cache_size(model, prompts, limit))
        manager.logit_processor = processors
        done: dict[int, Response] = {}
        try:
            manager.warmup()
            manager.start()
            for row, prompt in enumerate(prompts):
                manager.add_request(prompt, f"row {row}", max_new_tokens=limit, eos_token_id=ends, row=row)
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
                row, ids = int(output.request_id.removeprefix("row ")), output.generated_tokens
                done[row] = Response(ids, finished=ids[-1] in ends)
                sampler.forget(row)
                if on_finished is not None:
                    on_finished(row, done[row])
        finally:
            manager.stop(block=True, hard_stop=len(done) < len(prompts))
            manager.destroy()
            model.train(was_training)
        return [done[row] for row in range(len(prompts))]

    def close(self) -> None:
        pass


def _cache_size(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> ContinuousBatchingConfig:
    """On a GPU, transformers' choice where logits are processed (0.8), which it cannot see before our sampler is in.

    On a CPU that would be most of the machine's memory: room for 32 rows at a time does.
    """
    if model.device.type != "cpu":
        return ContinuousBatchingConfig(max_memory_percent=0.8)
    pages_per_row = (max(map(len, prompts)) + max_new_tokens) // 256 + 1  # 256 tokens a page by default
    return ContinuousBatchingConfig(num_blocks=pages_per_row * min(len(prompts), 32) + 1, max_batch_tokens=256)


class RowSampler(ContinuousBatchingLogitsProcessor):
    """Our choice of tokens, where row and position come with each request instead of the batch's layout."""

    supported_kwargs: ClassVar = {"row": int}
    ignored_kwargs: ClassVar = ()

    def __init__(
        self, prompts: list[list[int]], keys: Sequence[StreamKey], settings: Sampling, device: torch.device
    ) -> None:
        self.prompt_lengths, self.keys, self.settings = [len(prompt) for prompt in prompts], keys, settings
        self.under_way: dict[int, Tensor] = {}  # the uniform numbers of the rows under way
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.copy_(torch.full_like(int32_tensor, -1.0, dtype=torch.float32).view(torch.int32))

    def prepare_tensor_args(self, requests_with_new_token: list) -> Tensor:
        """One uniform number a row, as the bits of an int32; -1 for the engine's own warm-up rows."""
        return torch.tensor([self._uniform(request.state) for request in requests_with_new_token]).view(torch.int32)

    def _uniform(self, state) -> float:
        row, count = state.logit_processor_kwargs.get("row"), self.settings.max_new_tokens
        if row is None:
            return -1.0
        if row not in self.under_way:
            self.under_way[row] = uniforms([self.keys[row]], count)[0]
        t = state.position_offset - self.prompt_lengths[row]  # holds also for a row that was evicted and prefilled anew
        return float(self.under_way[row][min(t, count - 1)])

    def forget(self, row: int) -> None:
        self.under_way.pop(row, None)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        uniform_B = tensor_arg[: scores.shape[0]].view(torch.float32)
        broken_B = ~scores.isfinite().any(dim=-1) | scores.isnan().any(dim=-1)
        self.finite &= ~(broken_B & (uniform_B >= 0.0)).any()
        chosen_B = choose_tokens(scores, uniform_B, self.settings)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B[:, None], 0.0)
