"""What a training step takes, told before the first one; the plan behind `--micro_batch_size auto`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from loss import CHUNK_BYTES
from problems import InputError
from teacher import Teacher

# Bytes that one block keeps per token for its backward pass over the bytes of its linear maps' inputs and outputs,
# measured with Qwen3, Llama and Olmo 3 (tests/test_memory.py): norms and rotations keep float32 copies.
SAVED_PER_LINEAR_BYTE = {4: 1.2, 2: 1.55}
LOSS_BUFFERS = 6  # tensors of CHUNK_BYTES that loss.py holds at its peak, one of them to spare
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
        loss=LOSS_BUFFERS * min(CHUNK_BYTES, size * max_new_tokens * V * 4) + states, micro_batch_size=size,
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
