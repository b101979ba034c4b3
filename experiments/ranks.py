"""The few collectives of a data-parallel run; without torchrun each is the identity."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum in place over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: object) -> list:
    """Every rank's value, on every rank."""
    gathered = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(gathered, value)
    return gathered
