"""Checkpoints: atomic, with checksums, so that a run can be killed at any moment.

A checkpoint is a directory `checkpoint-STEP` that appears only when it is complete: the weights (the adapter in PEFT's
format, or the whole model with its tokenizer), the optimizer, the schedule and, for an EMA teacher, its average. No
random state and no data position is stored: the problems of a step, their order and the random numbers of each rollout
are functions of (seed, step, slot) (train.py::step_share, rollout.py::uniforms), so a resumed run draws what an
unbroken one draws, on any number of ranks. What draws within a step, LoRA's dropout, depends on the rank too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from errors import InputError
from model import lora_layers
from runtime.adapters import ADAPTER_WEIGHTS, load_adapter, save_adapter
from runtime.artefacts import open_to_readers, save_whole
from runtime.pins import sha256
from runtime.ranks import say
from teacher import Teacher

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.pt"
EMA_WEIGHTS = "ema.safetensors"


def save_checkpoint(
    run: Path,
    step: int,
    model: PreTrainedModel,
    base_model: str,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> Path:
    """Write `run/checkpoint-STEP` after `step` steps. Until the final rename it lies under a name that nothing reads.

    Raises InputError where it cannot be written (a full disk, say); any other error, of the GPU say, passes as it is.
    In each case the partial directory is removed and earlier checkpoints are untouched.
    """
    final, partial = run / f"checkpoint-{step}", run / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if lora_layers(model):
            save_adapter(model, partial, base_model)
        else:
            save_whole(model, base_model, partial)
        if teacher.average:
            save_file({str(i): tensor.contiguous() for i, tensor in enumerate(teacher.average)}, partial / EMA_WEIGHTS)
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(state, partial / TRAINER_STATE)
        digests = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        open_to_readers(partial)
        (partial / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=2) + "\n")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(run)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not cannot_be_written(error):
            raise
        reason = str(error).splitlines()[0]
        raise InputError(f"{final}: cannot be written ({reason}); earlier checkpoints are whole") from error
    return final


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and one line for each newer one that had to be passed over."""
    damaged = []
    numbered = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        problem = damage(path)
        if problem is None:
            return path, damaged
        damaged.append(f"{path}: {problem}; using the checkpoint before it")
    return None, damaged


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there with its checksum."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, digest in manifest["sha256"].items():
            if sha256(checkpoint / name) != digest:
                return f"{name} is damaged (checksum)"
        if checkpoint.name != f"checkpoint-{manifest['step']}" or TRAINER_STATE not in manifest["sha256"]:
            return f"{MANIFEST} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    return None


def load_checkpoint(
    checkpoint: Path,
    model: PreTrainedModel,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Put everything back in place and return the number of steps done. Tensors only are unpickled (weights_only)."""
    if (checkpoint / ADAPTER_WEIGHTS).is_file():
        load_adapter(model, checkpoint)
    else:
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype, trust_remote_code=False)
        model.load_state_dict(saved.state_dict())
    if teacher.average:
        if not (checkpoint / EMA_WEIGHTS).is_file():
            raise InputError(f"{checkpoint}: holds no EMA teacher")
        for i, stored in load_file(checkpoint / EMA_WEIGHTS).items():
            teacher.average[int(i)].data.copy_(stored)
    state = torch.load(checkpoint / TRAINER_STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return int(json.loads((checkpoint / MANIFEST).read_text())["step"])


def cannot_be_written(error: Exception) -> bool:
    """Whether an error is the disk's: a full one has a name of its own in each library."""
    in_torch = isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|inline_container", str(error))
    return isinstance(error, (OSError, SafetensorError)) or bool(in_torch)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resume(
    run: Path, model: PreTrainedModel, teacher: Teacher, optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> int:  # fmt: skip
    """Load a run's newest whole checkpoint; the number of steps behind it, 0 where there is none."""
    newest, damaged = newest_checkpoint(run)
    for line in damaged:
        say(line)
    if newest is None:
        say("no checkpoint to go on from: starting anew")
        return 0
    say(f"going on from {newest}")
    return load_checkpoint(newest, model, teacher, optimizer, scheduler)
