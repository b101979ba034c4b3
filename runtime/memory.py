"""What a training step takes, told before the first one; the plan behind `--micro_batch_size auto`.

Weights, gradients and optimizer are counted. What the passes take is measured on fake tensors (runtime/fake_step.py)
with shallow models of the same kinds of blocks, and extended to the model's depth: every part's peak grows by the same
number of bytes with each block of a kind. Nothing is measured where a crude bound is far below what is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from errors import InputError
from loss import CHUNK_BYTES, LossOptions, Method
from rollout import Sampling
from runtime.fake_step import StepShape, block_kinds, fake_model, step_bytes
from runtime.ranks import BUCKET_BYTES
from teacher import Teacher

USABLE = 0.92  # of the free memory: allocators waste some, and kernels have workspaces
UNKNOWN_MEMORY_SIZE = 4  # sequences: the paper's micro-batch, where nothing is known
UPDATE_COPIES = 2  # AdamW's temporaries, each of the largest parameter
FAR_BELOW = 0.5  # of the free memory: a bound below it is enough


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
    unmeasured: str | None = None  # why sampling, teacher and student are 0: in words

    @property
    def total(self) -> int:
        fixed = self.weights + self.trained + self.optimizer
        return fixed + max(self.sampling, self.teacher, self.student, self.update)

    def __str__(self) -> str:
        if self.unmeasured is not None:
            return f"memory of a step: {self.unmeasured} ({self.micro_batch_size} sequences)"
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
    elif (bound := crude_bound(run, replace(shape, micro_batch_size=sizes[0]))) < FAR_BELOW * available:
        words = f"less than {bound / 2**30:.2f} GiB, and {available / 2**30:.2f} are free"
        return replace(_fixed(run, sizes[0]), unmeasured=words)
    plan = None
    for candidate in sizes:
        if plan is not None and candidate != sizes[-1] and _least(plan, candidate) > USABLE * available:
            continue
        plan = _plan(run, replace(shape, micro_batch_size=candidate), plan)
        if plan.unmeasured is not None:
            return replace(plan, micro_batch_size=candidate if size else min(local_batch, UNKNOWN_MEMORY_SIZE))
        if available is None or _beyond_the_model(plan) <= USABLE * available:
            return plan
    advice = _advice(plan, run.gradient_checkpointing)
    there = (available + plan.weights + plan.trained) / 2**30
    raise InputError(f"{plan}, but {there:.2f} are there; {advice}")


def _beyond_the_model(plan: MemoryPlan) -> int:
    return plan.total - plan.weights - plan.trained  # these are allocated, and no longer part of what is free


def _least(plan: MemoryPlan, size: int) -> float:
    """What a smaller micro-batch takes at least: the passes shrink with it in proportion, or less."""
    share = size / plan.micro_batch_size
    return _beyond_the_model(replace(plan, teacher=int(share * plan.teacher), student=int(share * plan.student)))


def crude_bound(run: Planned, shape: StepShape) -> int:
    """More bytes than a step takes beyond the model; in float32, without recomputation, without a fake step.

    Per token four times what goes in and out of every linear map (the head and each adapter are among them), and four
    times a row of attention scores of each head; twelve times a chunk's logits; and what is counted anyway.
    """
    config, fixed = run.model.config, _fixed(run, shape.micro_batch_size)
    heads = getattr(config, "num_attention_heads", 2**30)  # a model of another kind has no bound worth the name
    longest = max(shape.student_tokens, shape.teacher_tokens) + shape.max_new_tokens
    tokens = max(shape.micro_batch_size, shape.local_batch) * longest
    ends = sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in run.model.parameters() if p.dim() > 1)
    scores = config.num_hidden_layers * heads * longest
    chunk = min(CHUNK_BYTES, 4 * tokens * config.vocab_size)
    return fixed.optimizer + fixed.update + 4 * 4 * tokens * (ends + scores) + 12 * chunk


def _fixed(run: Planned, micro_batch_size: int) -> MemoryPlan:
    """What is counted: weights, gradients, optimizer and update."""
    parameters, teacher = list(run.model.parameters()), run.teacher
    copies = teacher.average if teacher.copy is None else teacher.copy.parameters()
    trained = [p for p in parameters if p.requires_grad]
    largest = max(_bytes([p]) for p in trained)
    return MemoryPlan(
        weights=_bytes(p for p in parameters if not p.requires_grad) + _bytes(copies),
        trained=_bytes(trained), optimizer=3 * _bytes(trained), sampling=0, teacher=0, student=0,
        update=max(UPDATE_COPIES * largest, min(_bytes(trained), max(BUCKET_BYTES, largest)) * (run.ranks > 1)),
        micro_batch_size=micro_batch_size,
    )  # fmt: skip


def _plan(run: Planned, shape: StepShape, larger: MemoryPlan | None) -> MemoryPlan:
    """The plan at a size; `larger` is that of another size, which samples alike."""
    plan = _fixed(run, shape.micro_batch_size)
    try:
        taken = _pass_bytes(run, shape if larger is None else replace(shape, local_batch=0))
    except Exception as error:  # whatever a model's own code raises on tensors without content
        words = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        return replace(plan, unmeasured=f"cannot be told for this model ({words})")
    sampling = max(taken.get("prefill", 0), taken.get("decode", 0)) if larger is None else larger.sampling
    return replace(plan, sampling=sampling, teacher=taken["teacher"], student=taken["student"])


def _pass_bytes(run: Planned, shape: StepShape) -> dict[str, int]:
    """Peaks of the passes by part, at the model's depth."""
    kinds = block_kinds(run.model)
    few, more = _shallow(kinds)
    scored = 4 * max(1, CHUNK_BYTES // (4 * run.model.config.vocab_size))

    def measure(blocks: list[str]) -> dict[str, int]:
        with fake_model(run.model, blocks, run.gradient_checkpointing) as (model, live):
            return step_bytes(
                model, Teacher(model, run.teacher.kind), shape, run.method, run.options, run.settings, live, scored
            )

    at_few = measure(few)
    taken = dict(at_few)
    for kind, blocks in more.items():
        at_more, missing = measure(blocks), kinds.count(kind) - few.count(kind)
        taken = {part: taken[part] + missing * (at_more[part] - at_few[part]) for part in taken}
    return taken


def _shallow(kinds: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The first block and one of each kind, and for each kind these and one more of it; or all blocks.

    The first is apart: its input is the embedding, which stays beside the states of all later ones.
    """
    each = list(dict.fromkeys(kinds))
    few = [kinds[0], *each]
    more = {kind: [*few, kind] for kind in each}
    return (few, more) if len(few) + sum(map(len, more.values())) < len(kinds) else (kinds, {})


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
