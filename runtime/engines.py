"""Engines: one way to sample for training, evaluation and diagnosis: in this process, or by a server."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errors import InputError
from rollout import OnFinished, Response, Sampling, StreamKey, sample
from runtime.checkpoint import save_adapter
from runtime.ranks import gather_objects, progress, rank

SERVED = "served"  # below a run folder: the adapter that a server samples from


class Engine(Protocol):
    def sample(
        self, prompts: list[list[int]], keys: Sequence[StreamKey], settings: Sampling,
        on_finished: OnFinished | None = None,
    ) -> list[Response]:  # fmt: skip
        """One response per prompt, in their order; `on_finished(row, response)` once each, when its row is done (in
        this process, when its batch is)."""

    def close(self) -> None:
        """Give back what is held outside of this process: nothing by default."""


class GenerateEngine(Engine):
    """`rollout.sample` in batches of at most `batch_size` rows, halved where the memory does not hold one."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 200) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def sample(
        self, prompts: list[list[int]], keys: Sequence[StreamKey], settings: Sampling,
        on_finished: OnFinished | None = None,
    ) -> list[Response]:  # fmt: skip
        responses, rows, in_parts = [], len(prompts), getattr(self.model, "_is_fsdp_managed_module", False)
        if in_parts:  # all ranks make the same passes (ranks.shard): prompts of one token fill up their batches
            spare = max(gather_objects(rows)) - rows
            prompts, keys = prompts + [[self.tokenizer.eos_token_id]] * spare, [*keys, *[(0,)] * spare]
        while len(responses) < len(prompts):
            start, end = len(responses), min(len(responses) + self.batch_size, len(prompts))
            try:
                batch = (prompts[start:end], keys[start:end])
                longest = max(map(settings.limit, batch[0]))
                with progress(total=longest, desc="tokens of a batch", leave=False) as bar:
                    responses += sample(self.model, self.tokenizer, *batch, settings, on_token=bar.update)
            except torch.OutOfMemoryError:
                if end - start == 1 or in_parts:  # the other ranks are in the midst of this batch
                    raise
                self.batch_size = (end - start) // 2  # what fits now fits later, too
                print(f"out of memory: {end - start} rows start anew, {self.batch_size} at a time", flush=True)
                torch.cuda.empty_cache()
                continue
            for row in range(start, min(end, rows)) if on_finished else ():
                on_finished(row, responses[row])
        return responses[:rows]


def connect(
    server: str, model: str, tokenizer: PreTrainedTokenizerBase, in_flight: int, adapter: str | None = None,
    needs_raw: bool = False,
) -> Engine:  # fmt: skip
    """The engine of `--server`, with an adapter loaded there by name; every rank has a name of its own.

    `needs_raw`: training compares the log-probabilities with its own. Raises InputError where the server cannot.
    """
    from runtime.server import ServerEngine

    engine = ServerEngine(server, model, tokenizer, in_flight)
    if needs_raw and not engine.raw_logprobs:
        what = "its log-probabilities are those after temperature, top_k and top_p"
        raise InputError(f"--server {server}: {what}; start vLLM with --logprobs-mode raw_logprobs")
    if adapter is not None:
        engine.use_adapter(Path(adapter), Path(adapter).name)
    return engine


def publish(engine: Engine, model: PreTrainedModel, folder: Path, step: int) -> None:
    """Let the engine sample from the weights after `step` updates, on all ranks; within this process it always does.

    The first rank writes the adapter below the run folder, which the server must see under the same path, and has it
    loaded in place of the one before.
    """
    if isinstance(engine, GenerateEngine):
        return
    if rank() == 0:
        withdraw(folder)  # each step has a path of its own: a shared file system may remember what lay at an old one
        save_adapter(model, folder / SERVED / f"step-{step}", engine.base_model)
        engine.use_adapter(folder / SERVED / f"step-{step}", f"step-{step}")
    engine.model = gather_objects(engine.model)[0]


def withdraw(folder: Path) -> None:
    """Remove what `publish` has written; the weights themselves are in the run's checkpoints."""
    if rank() == 0:
        shutil.rmtree(folder / SERVED, ignore_errors=True)
