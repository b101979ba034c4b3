"""Ranks: what torchrun starts, the few collectives of a run, each the identity without it, and how a run is stopped."""

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from errors import InputError


def start_ranks(device_name: str) -> torch.device:
    """This rank's device, current before anything touches another GPU; joins the group that torchrun has started."""
    disable_progress_bar()  # of loading weights
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


def pick_device(name: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one. Raises InputError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: not on this machine") from None
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
    named = [(name, x.detach()) for name, x in named if not isinstance(x, DTensor)]  # those are compared by `shard`
    sums = [int(tensor.contiguous().view(torch.uint8).sum(dtype=torch.int64)) for _, tensor in named]
    ordered = [float(tensor.flatten()[::7].double().sum()) for _, tensor in named]
    everyone = gather_objects(list(zip(sums, ordered, strict=True)))
    for other, theirs in enumerate(everyone):
        for (name, _), first, here in zip(named, everyone[0], theirs, strict=True):
            if first != here:
                need = "all ranks need the same model files, versions and kind of GPU"
                raise InputError(f"rank {other} starts with another {name} than rank 0: {need}")


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Bring a loaded model to the device, frozen, and of each block only this rank's part: torch's FSDP2 puts a block
    together where it runs, forward and backward. Embedding, norm and head stay whole.

    From then on all ranks have to make the same passes, or parts of different blocks would meet.
    """
    decoder, mesh = model.requires_grad_(False).get_decoder(), init_device_mesh(device.type, (world_size(),))
    blocks = {name: m for name, m in decoder.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    if not blocks:
        raise InputError(f"--shard: {type(model).__name__} has no blocks of the kind that transformers splits")
    for name, block in blocks.items():
        check_same_start([(f"{name}.{part}", weight) for part, weight in block.to(device).named_parameters()])
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if not isinstance(p, DTensor)})
    model._is_fsdp_managed_module = True  # `generate` then goes on until the last rank's rows are done
    return model.to(device)


def wait_for_all() -> None:
    gather_objects(None)


def say(text: str) -> None:
    """Print a line on the first rank, above a progress bar; a log file has none to make room for."""
    if rank() == 0:
        write = tqdm.write if sys.stderr.isatty() else partial(print, flush=True)
        write(text)


LOG_EVERY = 30.0  # seconds


def progress(items: Iterable | None = None, **settings) -> tqdm:
    """tqdm, on the first rank: a bar on a terminal, and in a log file a line at most every half minute."""
    settings = {"delay": 1.0, **settings}
    if not sys.stderr.isatty():
        words = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, at most {remaining} left\n"
        settings |= dict.fromkeys(("delay", "mininterval", "maxinterval"), LOG_EVERY)
        settings |= {"bar_format": words, "position": 0}
    return tqdm(items, disable=rank() > 0, **settings)


# --- How a run is asked to stop, and when it does: after its last finished step, on all ranks alike -------------

AGAIN = 1.0  # seconds: Ctrl-C reaches a process twice, from the terminal and from torchrun


class StoppedError(BaseException):
    """A signal has asked the run to stop. No `except Exception` on the way may take it for a failure."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stop:
    """SIGTERM, Ctrl-C, and the USR1 and HUP of schedulers: each means to keep the last finished step and to end.

    A step is left wherever it stands, as nothing of it is kept before its update: StoppedError rises out of whatever is
    under way. From `hold` to `release` a signal waits instead; what several ranks do together lies between the two: all
    of a step where a model is `sharded`. A second Ctrl-C ends the process at once.
    """

    def __init__(self, sharded: bool = False) -> None:
        self.asked, self._since = 0, 0.0  # the first signal's number and time
        self.held, self._sharded = True, sharded  # held: signals wait

    def listen(self) -> None:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP
                signal.signal(number, self._note)

    def hold(self) -> None:
        """Signals wait from here on. Raises StoppedError, on every rank, where one of them was asked before."""
        if not self.held:
            self.held = True
            self._agree()

    def _agree(self) -> None:
        if asked := max(gather_objects(self.asked)):  # a signal during the wait stays noted, for `release`
            self.asked = asked
            raise StoppedError

    def release(self) -> None:
        """Signals stop the run again; raises StoppedError where one has come meanwhile."""
        if self._sharded:
            self._agree()
            return
        self.held = False
        if self.asked:
            raise StoppedError

    def meet(self) -> None:
        """After StoppedError: this rank waits for the others, which come here, too, or into `hold`."""
        with suppress(StoppedError):
            self.hold()

    def _note(self, number: int, frame: object) -> None:
        if self.asked:
            if number == signal.SIGINT and time.monotonic() - self._since > AGAIN:
                raise KeyboardInterrupt
            return
        self.asked, self._since = number, time.monotonic()
        if not self.held:
            raise StoppedError
