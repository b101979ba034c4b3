"""Ranks: what torchrun starts, and the few collectives of a run; without torchrun each is the identity."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from errors import InputError
from runtime.loading import pick_device


def start_ranks(device_name: str) -> torch.device:
    """This rank's device, current before anything touches another GPU; joins the group that torchrun has started."""
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        device_name = rank_device(device_name, os.environ["LOCAL_RANK"], torch.cuda.is_available())
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the group: NCCL's object collectives use the current device
    if distributed and not dist.is_initialized():
        # Ranks wait for the slowest, in an evaluation for hours: torch would give up after 10 or 30 minutes.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    return device


def rank_device(name: str, local_rank: str, has_gpu: bool) -> str:
    """The device of one of several ranks: each has the GPU of its number on this machine."""
    if name.startswith("cuda:"):
        raise InputError(f"--device {name}: several ranks cannot share a GPU; pass cuda, and each takes its own")
    return f"cuda:{local_rank}" if name == "cuda" or (name == "auto" and has_gpu) else name


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


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sum tensors in place over all ranks."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


def check_same_start(named: list[tuple[str, Tensor]]) -> None:
    """Raise InputError, naming the first tensor, unless all ranks hold the same bits; compared by a checksum each.

    Ranks read the model and draw the adapter themselves: other files, versions or GPUs would go unnoticed.
    """
    if world_size() == 1:
        return
    sums = [int(tensor.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64)) for _, tensor in named]
    ordered = [float(tensor.detach().flatten()[::7].double().sum()) for _, tensor in named]
    everyone = gather_objects(list(zip(sums, ordered, strict=True)))
    for other, theirs in enumerate(everyone):
        for (name, _), first, here in zip(named, everyone[0], theirs, strict=True):
            if first != here:
                raise InputError(
                    f"rank {other} starts with another {name} than rank 0: all ranks need the same model files, "
                    "versions and kind of GPU"
                )


def wait_for_all() -> None:
    gather_objects(None)


def say(text: str) -> None:
    """Print a line on the first rank, above a progress bar."""
    if rank() == 0:
        tqdm.write(text)


LOG_EVERY = 30.0  # seconds


def progress(items: Iterable | None = None, **settings) -> tqdm:
    """tqdm, on the first rank: a bar on a terminal, and in a log file a line at most every half minute."""
    settings = {"delay": 1.0, **settings}
    if not sys.stderr.isatty():
        words = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, at most {remaining} left\n"
        settings |= {"bar_format": words, "position": 0} | dict.fromkeys(
            ("delay", "mininterval", "maxinterval"), LOG_EVERY
        )
    return tqdm(items, disable=rank() > 0, **settings)
