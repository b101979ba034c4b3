"""What a training step takes, told before the first one; the plan behind `--micro_batch_size auto`.

Weights, gradients and optimizer are counted. What the passes take is measured on fake tensors (runtime/fake_step.py)
with two shallow models of the same kind, and extended to the model's depth: every part's peak grows by the same number
of bytes with each block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loss import CHUNK_BYTES, LossOptions, Method
from problems import InputError
from rollout import Sampling
from runtime.fake_step import StepShape, fake_model, fake_teacher, step_bytes
from runtime.ranks import BUCKET_BYTES
from teacher import Teacher

USABLE = 0.92  # of the free memory: allocators waste some, and kernels have workspaces
UNKNOWN_MEMORY_SIZE = 4  # sequences: the paper's micro-batch, where nothing is known
UPDATE_COPIES = 3  # AdamW's temporaries, each of the largest parameter


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step on one rank. Its parts take turns, so the largest of them counts."""

    weights: int  # frozen ones, with the teacher's copies
    trained: int  # the adapter, or all weights
    optimizer: int  # gradients and AdamW's two moments
    sampling: int  # key-value cache of the rows sampled together, the next token's probabilities
    teacher: int  # one micro-batch in the teacher's context
    student: int  # one micro-batch in the student's context: forward, loss and backward
    update: int  # gradients on their way over the ranks, AdamW's temporaries
    micro_batch_size: int
    trouble: str | None = None  # why sampling, teacher and student could not be measured; they are then 0

    @property
    def total(self) -> int:
        fixed = self.weights + self.trained + self.optimizer
        return fixed + max(self.sampling, self.teacher, self.student, self.update)

    def __str__(self) -> str:
        if self.trouble is not None:
            return (
                f"memory of a step: cannot be told for this model ({self.trouble}); {self.micro_batch_size} sequences"
            )
        parts = [f"{f.name} {getattr(self, f.name) / 2**30:.2f}" for f in fields(self)[:-2]]
        return f"memory in GiB: {', '.join(parts)}; peak {self.total / 2**30:.2f} ({self.micro_batch_size} sequences)"


@dataclass(frozen=True)
class Planned:
    """What a plan is made for."""

    model: PreTrainedModel
    teacher: Teacher
    method: Method
    options: LossOptions
    settings: Sampling
    gradient_checkpointing: bool
    ranks: int = 1


def plan_memory(run: Planned, shape: StepShape, local_batch: int, available: int | None) -> MemoryPlan:
    """What a step takes at worst: every rollout as long as it may be, after the longest prompt of each context.

    `shape.micro_batch_size` 0 chooses the largest power of two, or the whole local batch, that fits into `available`
    bytes (free memory of the device before anything but the model was allocated; None: unknown, nothing is refused).
    Raises InputError, with what would help, where the step cannot fit. Where the model's code does not run on fake
    tensors, the plan says so and nothing is refused.
    """
    size = shape.micro_batch_size
    powers = [2**n for n in range(local_batch.bit_length()) if 2**n < local_batch]
    sizes = [min(size, local_batch)] if size else [local_batch, *reversed(powers)]
    if available is None:
        sizes = [sizes[0] if size else min(local_batch, UNKNOWN_MEMORY_SIZE)]
    for candidate in sizes:
        plan = _plan(run, replace(shape, micro_batch_size=candidate))
        if plan.trouble is not None:
            return replace(plan, micro_batch_size=candidate if size else min(local_batch, UNKNOWN_MEMORY_SIZE))
        resident = plan.weights + plan.trained  # already allocated, so no longer part of `available`
        if available is None or plan.total - resident <= USABLE * available:
            return plan
    advice = _advice(plan, run.gradient_checkpointing)
    raise InputError(f"{plan}, but {(available + resident) / 2**30:.2f} are there; {advice}")


def _plan(run: Planned, shape: StepShape) -> MemoryPlan:
    parameters, teacher = list(run.model.parameters()), run.teacher
    copies = teacher.average if teacher.copy is None else teacher.copy.parameters()
    trained = [p for p in parameters if p.requires_grad]
    largest = max(_bytes([p]) for p in trained)
    try:
        taken, trouble = _pass_bytes(run, shape), None
    except Exception as error:  # whatever a model's own code raises on tensors without content
        taken, trouble = {}, f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    return MemoryPlan(
        weights=_bytes(p for p in parameters if not p.requires_grad) + _bytes(copies),
        trained=_bytes(trained), optimizer=3 * _bytes(trained),
        sampling=max(taken.get("prefill", 0), taken.get("decode", 0)),
        teacher=taken.get("teacher", 0), student=taken.get("student", 0),
        update=max(UPDATE_COPIES * largest, min(_bytes(trained), max(BUCKET_BYTES, largest)) * (run.ranks > 1)),
        micro_batch_size=shape.micro_batch_size, trouble=trouble,
    )  # fmt: skip


def _pass_bytes(run: Planned, shape: StepShape) -> dict[str, int]:
    """Peaks of the passes by part, at the model's depth."""
    depth, shallow = run.model.config.num_hidden_layers, _two_depths(run.model)
    scored = 4 * max(1, CHUNK_BYTES // (4 * run.model.config.vocab_size))
    peaks = []
    for layers in shallow:
        with fake_model(run.model, layers, run.gradient_checkpointing) as (model, live):
            teacher = fake_teacher(model, run.teacher)
            peaks.append(step_bytes(model, teacher, shape, run.method, run.options, run.settings, live, scored))
    first, last = peaks[0], peaks[-1]
    steps = (depth - shallow[0]) / max(1, shallow[-1] - shallow[0])
    return {name: int(first[name] + steps * (last[name] - first[name])) for name in first}


def _two_depths(model: PreTrainedModel) -> list[int]:
    """One period of the blocks' kinds (Olmo's windows: four blocks) and one block, and a period more."""
    depth, kinds = model.config.num_hidden_layers, getattr(model.config, "layer_types", None) or ["all alike"]
    period = 1 + max(kinds.index(kind) for kind in set(kinds))
    return [period + 1, 2 * period + 1] if 2 * period + 1 < depth else [depth]


def _advice(plan: MemoryPlan, checkpointing: bool) -> str:
    largest = max(plan.sampling, plan.teacher, plan.student, plan.update)
    advice = []
    if largest == plan.sampling:
        advice += ["a lower --batch_size or more ranks", "a lower --max_new_tokens"]
    elif largest > plan.update:
        advice += ["a lower --micro_batch_size"] if plan.micro_batch_size > 1 else ["a lower --max_length"]
        advice += [] if checkpointing else ["--gradient_checkpointing true"]
    if plan.optimizer > plan.weights:
        advice += ["LoRA (--lora_rank 64)"]
    return "what helps: " + ", ".join([*advice, "a larger device"])


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
