"""Sampling by transformers' continuous batching: a finished row makes room for the next, nothing is padded.

The one place that knows the library's private names for it. The engine for long responses on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
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
from transformers.dependency_versions_table import deps
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from errors import InputError
from model import eos_ids
from rollout import OnFinished, Response, Sampling, StreamKey, choose_tokens, uniforms
from runtime.ranks import say


class ContinuousEngine:
    """`rollout.sample` by continuous batching.

    Determinism: a row draws the same uniform numbers as under `generate`, whatever rows run beside it. Its logits
    depend on the attention kernel and on the batch the scheduler puts together, in their last bits; so a row repeats
    exactly in float32 on a CPU, and on a GPU only until a draw falls within that rounding error of a boundary.
    """

    name = "continuous"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.has_said = model, tokenizer, False

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        keys: Sequence[StreamKey],
        settings: Sampling,
        on_finished: OnFinished | None = None,
    ) -> list[Response]:
        """One manager serves all of `prompts`; its cache is freed at the end.

        It does not outlive the call: training needs the memory of its cache, and what its cache holds of a prompt is
        out of date after an update. So give it all rows at once.
        """
        model, was_training, attention = self.model, self.model.training, self.model.config._attn_implementation
        sampler = RowSampler(prompts, keys, settings, model.device)
        try:
            with self._manager(prompts, sampler, settings) as manager:
                done = self._collect(manager, prompts, sampler, settings, on_finished)
        except torch.OutOfMemoryError as error:
            raise InputError(
                "--engine continuous: out of GPU memory; free some of it, lower --max_new_tokens, or use --server"
            ) from error
        finally:
            if model.config._attn_implementation != attention:  # where the manager has failed before its own clean-up
                model.set_attn_implementation(attention)
            model.train(was_training)
        return [done[row] for row in range(len(prompts))]

    @contextmanager
    def _manager(self, prompts: list[list[int]], sampler: RowSampler, settings: Sampling) -> Iterator:
        """A running manager for this workload; stopped at once where the body fails."""
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        processors.tensors_required = 1  # one number per row; the list counts only what it converted itself
        ends, limit = eos_ids(self.model.generation_config, self.tokenizer), settings.max_new_tokens
        generation = GenerationConfig(do_sample=False, eos_token_id=ends, max_new_tokens=limit)
        manager = self.model.init_continuous_batching(generation, batching_config(self.model, prompts, limit))
        self._say_what_is_lost()
        manager.logit_processor = processors
        finished = False
        try:
            manager.warmup()
            manager.start()
            yield manager
            finished = True
        finally:
            manager.stop(block=True, hard_stop=not finished)
            manager.destroy()

    def _collect(
        self, manager, prompts: list[list[int]], sampler: RowSampler, settings: Sampling, on_finished: OnFinished | None
    ) -> dict[int, Response]:
        ends, limit = eos_ids(self.model.generation_config, self.tokenizer), settings.max_new_tokens
        for row, prompt in enumerate(prompts):
            manager.add_request(prompt, f"row {row}", max_new_tokens=limit, eos_token_id=ends, row=row)
        done: dict[int, Response] = {}
        while len(done) < len(prompts):
            output = manager.get_result(timeout=1.0)
            if output is None and not manager.is_running():
                raise_cause(manager.background_thread_status.fatal_error)
            if output is None or not output.is_finished():
                continue
            if output.error is not None:
                raise_cause(manager.background_thread_status.fatal_error or output.error)
            if not bool(sampler.finite):
                raise FloatingPointError("sampling: the model's logits are not finite")
            row, ids = int(output.request_id.removeprefix("row ")), output.generated_tokens
            done[row] = Response(ids, finished=ids[-1] in ends)
            sampler.forget(row)
            if on_finished is not None:
                on_finished(row, done[row])
        return done

    def _say_what_is_lost(self) -> None:
        is_flash = "flash" in self.model.config._attn_implementation
        if self.model.device.type == "cuda" and not is_flash and not self.has_said:
            say(
                "--engine continuous without flash attention: every step reads the whole cache under a mask, and there "
                f"is no fast decode path (pip install '{deps['kernels']}' brings it; other versions do not)"
            )
            self.has_said = True

    def close(self) -> None:
        pass


def raise_cause(error: object) -> None:
    """Continuous batching's own errors in our terms; it hands some of them on as text."""
    text = str(error) or "it stopped before all rows were done"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        raise torch.OutOfMemoryError(text)
    raise InputError(f"--engine continuous: {text.splitlines()[0]}")


PAGE = 256  # tokens


def batching_config(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> ContinuousBatchingConfig:
    """A cache for this workload: the fast decode path reaches its longest row, and warm-up captures no larger batch.

    On a GPU the cache takes what transformers takes where logits are processed (0.8 of the free memory), which it
    cannot see before our sampler is in. On a CPU that would be most of the machine's memory: room for 32 rows does.
    """
    pages_per_row = (max(map(len, prompts)) + max_new_tokens) // PAGE + 1
    pages_per_row += pages_per_row % 2
    names = {field.name for field in fields(ContinuousBatchingConfig)}
    workload = {
        "page_size" if "page_size" in names else "block_size": PAGE,  # by the name that the installed library has
        "max_blocks_per_request": pages_per_row,
        "max_requests_per_batch": min(len(prompts), 1024),
    }
    if model.device.type != "cpu":
        return ContinuousBatchingConfig(max_memory_percent=0.8, **workload)
    rows = min(len(prompts), 32)
    return ContinuousBatchingConfig(num_blocks=pages_per_row * rows + 1, max_batch_tokens=PAGE, **workload)


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
