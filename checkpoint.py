"""What keeps a run alive: atomic checkpoints with checksums, and the newest one that is whole.

A checkpoint is a directory `checkpoint-STEP` that appears only when it is complete: the weights (the adapter in PEFT's
format, or the whole model), the optimizer, the schedule and, for an EMA teacher, its average. No random state and no
data position is stored: both are functions of (seed, step), so a resumed run draws what an unbroken one draws, on any
number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from loss import CHUNK_TOKENS
from model import ADAPTER_WEIGHTS, load_adapter, lora_layers, save_adapter
from problems import InputError
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

    Raises InputError where it cannot be written (a full disk, say), with the partial directory removed and earlier
    checkpoints untouched.
    """
    final, partial = run / f"checkpoint-{step}", run / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if lora_layers(model):
            save_adapter(model, partial, base_model)
        else:
            model.save_pretrained(partial)
        if teacher.average:
            save_file({str(i): tensor.contiguous() for i, tensor in enumerate(teacher.average)}, partial / EMA_WEIGHTS)
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(state, partial / TRAINER_STATE)
        digests = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=2) + "\n")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(run)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a name of its own in each library
        shutil.rmtree(partial, ignore_errors=True)
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
            if _sha256(checkpoint / name) != digest:
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
        average = load_file(checkpoint / EMA_WEIGHTS)
        teacher.average = [average[str(i)].to(old.device) for i, old in enumerate(teacher.average)]
    state = torch.load(checkpoint / TRAINER_STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return int(json.loads((checkpoint / MANIFEST).read_text())["step"])


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader, or a crash, sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def keep_lines(path: Path, wanted: int) -> None:
    """Cut a JSONL file of steps back to those below `wanted`, so that a resumed run appends where it left off."""
    if path.is_file():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < wanted:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # a line torn by the crash
        write_atomically(path, "".join(kept))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_run(run: Path, config: dict, free: set[str], resume: bool, facts: dict) -> None:
    """Claim a run folder: write config.json, or check that the run in it is the one that `config` continues.

    Fields in `free` may change on resuming. Raises InputError if the folder holds another run.
    """
    record = run / "config.json"
    if record.exists() and not resume:
        raise InputError(f"--output_dir {run}: holds another run; continue it with --resume or choose another folder")
    if record.exists():
        before = json.loads(record.read_text())["config"]
        for key, value in json.loads(json.dumps(config)).items():
            if key not in free and before.get(key) != value:
                raise InputError(f"--resume: {run} was started with --{key} {before.get(key)}, not {value}")
        return
    run.mkdir(parents=True, exist_ok=True)
    facts = {"versions": versions(), "git_commit": git_commit(), **facts}
    write_atomically(record, json.dumps({"config": config, **facts}, indent=2) + "\n")


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def git_commit() -> str | None:
    """The commit of this checkout, or None outside of one."""
    here = Path(__file__).resolve().parent
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------------------------
# Memory plan


# Bytes that one block keeps per token for its backward pass over the bytes of its linear maps' inputs and outputs,
# measured with Qwen3, Llama and Olmo 3 (tests/test_memory.py): norms and rotations keep float32 copies.
SAVED_PER_LINEAR_BYTE = {4: 1.2, 2: 1.55}
LOSS_BUFFERS = 6  # [CHUNK_TOKENS, V] float32 tensors that loss.py holds at its peak, one of them to spare
SAMPLING_BUFFERS = 6  # [B, V] float32 tensors of sorting and summing the next token's probabilities
USABLE = 0.92  # of the free memory: allocators waste some, and kernels have workspaces


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step on one rank. Sampling and scoring take turns, so the larger of the two counts."""

    weights: int  # frozen ones, with the teacher's copies
    trained: int  # the adapter, or all weights
    optimizer: int  # gradients and AdamW's two moments
    sampling: int  # key-value cache of the whole local batch
    activations: int  # of one micro-batch, student's forward and backward
    loss: int  # chunk of logits, hidden states of both contexts
    micro_batch_size: int

    @property
    def total(self) -> int:
        fixed = self.weights + self.trained + self.optimizer
        return fixed + max(self.sampling, self.activations + self.loss)

    def __str__(self) -> str:
        parts = [f"{f.name} {getattr(self, f.name) / 2**30:.2f}" for f in fields(self) if f.name != "micro_batch_size"]
        return f"memory in GiB: {', '.join(parts)}; peak {self.total / 2**30:.2f} ({self.micro_batch_size} sequences)"


def plan_memory(
    model: PreTrainedModel,
    teacher: Teacher,
    *,
    student_tokens: int,
    teacher_tokens: int,
    max_new_tokens: int,
    local_batch: int,
    micro_batch_size: int | None,
    gradient_checkpointing: bool,
    available: int | None,
) -> MemoryPlan:
    """What a step takes at worst: every rollout as long as `max_new_tokens` after the longest prompt of each context.

    `micro_batch_size` None chooses the largest power of two, or the whole local batch, that fits into `available`
    bytes (free memory of the device before anything but the model was allocated; None: unknown, nothing is refused).
    Raises InputError, with what would help, where the step cannot fit.
    """

    def plan(size: int) -> MemoryPlan:
        return _plan(
            model, teacher, student_tokens, teacher_tokens, max_new_tokens, local_batch, size, gradient_checkpointing
        )

    powers = [2**n for n in range(local_batch.bit_length()) if 2**n < local_batch]
    sizes = [local_batch, *reversed(powers)] if micro_batch_size is None else [min(micro_batch_size, local_batch)]
    plans = [plan(size) for size in sizes]
    resident = plans[0].weights + plans[0].trained  # already allocated, so no longer part of `available`
    if available is None:
        return plans[0] if micro_batch_size is not None else plan(min(local_batch, UNKNOWN_MEMORY_SIZE))
    for candidate in plans:
        if candidate.total - resident <= USABLE * available:
            return candidate
    raise InputError(
        f"{plans[-1]}, but {(available + resident) / 2**30:.2f} are there; {_advice(plans[-1], gradient_checkpointing)}"
    )


UNKNOWN_MEMORY_SIZE = 4  # the paper's micro-batch, where the free memory cannot be read


def _plan(model, teacher, student_tokens, teacher_tokens, max_new_tokens, local_batch, size, checkpointing):
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    frozen = _bytes(p for p in model.parameters() if not p.requires_grad)
    copies = _bytes(teacher.average) + (_bytes(teacher.copy.parameters()) if teacher.copy is not None else 0)
    head = model.get_output_embeddings().weight
    V, D, itemsize = *head.shape, head.element_size()
    blocks = list(model.get_decoder().layers)
    linears = {name.split(".")[-1 - name.endswith(".base")]: m for name, m in blocks[0].named_modules()
               if isinstance(m, nn.Linear)}  # fmt: skip
    kept = sum(m.in_features + m.out_features for m in linears.values()) * itemsize
    kept = int(kept * SAVED_PER_LINEAR_BYTE.get(itemsize, 1.55))  # bytes per token and block
    # With checkpointing a block's input is kept and one block at a time recomputed; its gradients take as much again.
    per_token = len(blocks) * D * itemsize + 2 * kept if checkpointing else (len(blocks) + 1) * kept
    student, context = student_tokens + max_new_tokens, teacher_tokens + max_new_tokens
    activations = size * max(student * per_token, context * kept)  # the teacher's pass keeps no more than one block
    cache = local_batch * student * len(blocks) * 2 * linears["k_proj"].out_features * itemsize
    states = 4 * size * max_new_tokens * D * itemsize  # of both contexts, their gradient, and the gradient kept
    return MemoryPlan(
        weights=frozen + copies, trained=trained, optimizer=3 * trained,
        sampling=cache + SAMPLING_BUFFERS * local_batch * V * 4, activations=activations,
        loss=LOSS_BUFFERS * CHUNK_TOKENS * V * 4 + states, micro_batch_size=size,
    )  # fmt: skip


def _advice(plan: MemoryPlan, checkpointing: bool) -> str:
    advice = []
    if plan.activations + plan.loss > plan.sampling:
        advice += ["a lower --micro_batch_size"] if plan.micro_batch_size > 1 else ["a lower --max_length"]
        advice += [] if checkpointing else ["--gradient_checkpointing true"]
    else:
        advice += ["a lower --batch_size or more ranks", "a lower --max_new_tokens"]
    if plan.optimizer > plan.weights:
        advice += ["LoRA (--lora_rank 64)"]
    return "what helps: " + ", ".join(advice) + ", or a larger device"


def available_memory(device: torch.device) -> int | None:
    """Free bytes of a device: a GPU's own, the host's as Linux estimates it, None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
