"""Ranks: what torchrun starts, and the few collectives of a run; without torchrun each is the identity."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from model import pick_device


def start_ranks(device_name: str) -> torch.device:
    """This rank's device, current before anything touches another GPU; joins the group that torchrun has started."""
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed and device_name in ("auto", "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the group: NCCL's object collectives use the current device
    if distributed and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_objects(value: object) -> list:
    """Every rank's value, on every rank."""
    gathered = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(gathered, value)
    return gathered


BUCKET_BYTES = 2**30  # an adapter's gradients go over the ranks in one piece, those of all weights in a few


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sum float32 tensors in place over all ranks, joined into pieces of BUCKET_BYTES; one process leaves them be."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    for tensor, following in zip(tensors, [*tensors[1:], None], strict=True):
        bucket.append(tensor)
        if following is None or sum(map(_size, bucket)) + _size(following) > BUCKET_BYTES:
            _sum_joined(bucket)
            bucket = []


def _sum_joined(bucket: list[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def wait_for_all() -> None:
    gather_objects(None)


def say(text: str) -> None:
    """Print a line on the first rank, above a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def hide_bar() -> bool | None:
    """tqdm's `disable`: True on all ranks but the first; None hides the bar where the output is no terminal."""
    return None if rank() == 0 else True
