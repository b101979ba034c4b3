"""What our ways of computing cost beside the plain ones, taken in turns in one process: a table in Markdown, printed.

    python -m experiments.bench

| part | ours | the plain way |
|---|---|---|
| loss | a chunk of tokens at a time | whole float32 logits |
| head | `model.py::head_logits` in bfloat16, and its gradient | a linear map in bfloat16 |
| choose | a nucleus among the likeliest tokens | among all of them, sorted |

On a CPU seconds are CPU seconds of this process, which others on the machine disturb least; on a GPU those that pass.
Axes: B rows, M tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments.study.run import processor
from loss import LossOptions, resolve_method, score_tokens_from_hidden
from model import head_logits
from rollout import Sampling, choose_tokens
from runtime.flags import run_script
from runtime.loading import pick_device
from runtime.records import git_commit, versions

V = 151_936  # Qwen3's vocabulary
GIB = 2**30
HEAD = "| what | ours | plain | plain / ours | unit | note |\n" + "|---" * 6 + "|"


def add_row(what: str, ours: float | None, plain: float | None = None, unit: str = "", note: str = "") -> None:
    """Print a row of the table, at once."""
    ratio = plain / ours if ours and plain is not None else None
    numbers = ("-" if value is None else f"{value:.4g}" for value in (ours, plain, ratio))
    print(f"| {' | '.join([what, *numbers, unit, note])} |", flush=True)


def facts(title: str, device: torch.device) -> str:
    """A heading, and what the numbers under it were measured on."""
    cpu = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    found = {"hardware": hardware, **versions(), "commit": git_commit(), "load": f"{os.getloadavg()[0]:.1f}"}
    return "\n".join([f"# {title}", "", *(f"- {name}: {value}" for name, value in found.items()), ""])


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def alternate(functions: list[Callable[[], object]], device: torch.device, turns: int = 3) -> list[float]:
    """The smallest of `turns` times of each function, in s, taken in alternation after one unmeasured call each."""
    on_gpu, times = device.type == "cuda", []
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if on_gpu else (time.process_time, lambda: None)
    for _ in range(turns + 1):
        for function in functions:
            wait()
            start = clock()
            function()
            wait()
            times.append(clock() - start)
    return [min(times[i + len(functions) :: len(functions)]) for i in range(len(functions))]


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Peak of PyTorch's allocations while `function` runs, beyond those alive before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# ---------------------------------------------------------------------------------------------------------------
# The parts


def plain_opsd(student_MD: Tensor, teacher_MD: Tensor, head_VD: Tensor) -> Tensor:
    """Eq. (1) on whole float32 logits, written straight down."""
    student_logp_MV = ((student_MD @ head_VD.T).float() / 1.1).log_softmax(dim=-1)
    with torch.no_grad():
        teacher_logp_MV = ((teacher_MD @ head_VD.T).float() / 1.1).log_softmax(dim=-1)
    entries_MV = teacher_logp_MV.exp() * (teacher_logp_MV - student_logp_MV)
    return entries_MV.clamp(max=0.05).sum(dim=-1).mean()


def loss_functions(M: int, D: int, V: int, device: torch.device) -> tuple[Callable, Callable]:
    """Forward and backward of our OPSD loss, given a chunk size, and of the plain one, on the same random states."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    student = (0.3 * torch.randn(M, D, device=device)).to(dtype).requires_grad_()
    teacher, head = (0.3 * torch.randn(M, D, device=device)).to(dtype), torch.randn(V, D, device=device).to(dtype)
    ids, options = torch.randint(V, (M,), device=device), LossOptions()
    method = resolve_method("opsd", options)

    def backward(value: Tensor) -> tuple[float, Tensor]:
        student.grad = None
        value.backward()
        return value.item(), student.grad

    def ours(chunk_tokens: int | None = None) -> tuple[float, Tensor]:
        scores = score_tokens_from_hidden(method, student, teacher, head, head, ids, options, chunk_tokens)
        return backward(scores.loss.mean())

    return ours, lambda: backward(plain_opsd(student, teacher, head))


def bench_loss(device: torch.device) -> None:
    D, M = (2560, 4096) if device.type == "cuda" else (256, 128)
    ours, plain = loss_functions(M, D, V, device)
    note = f"V {V}, D {D}, {M} tokens, values differ by {abs(ours()[0] - plain()[0]):.0e}"
    add_row("loss, peak memory", peak_bytes(ours, device) / GIB, peak_bytes(plain, device) / GIB, "GiB", note)
    add_row("loss, time", *alternate([ours, plain], device), "s", note)


def bench_head(device: torch.device) -> None:
    x_MD = torch.randn(69, 896, device=device).bfloat16().requires_grad_()
    head_VD = torch.randn(V // 8, 896, device=device).bfloat16()
    both = [lambda to=to: to(x_MD, head_VD).square().mean().backward() for to in (head_logits, F.linear)]
    add_row("head in bfloat16 and its gradient", *alternate(both, device), "s", f"V {V // 8}, D 896, 69 tokens")


def bench_choose(device: torch.device) -> None:
    logits_BV, u_B = torch.randn(32, V, device=device) * 5.0, torch.rand(32, device=device)
    few = {}, {"candidates": V}
    both = [lambda few=few: choose_tokens(logits_BV, u_B, Sampling(1.0, 0.95, 0, 1), **few) for few in few]
    add_row("choosing a token", *alternate(both, device), "s", f"V {V}, 32 rows, top_p 0.95")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    device = pick_device(parser.parse_args().device)
    print(facts("bench", device) + "\n" + HEAD)
    for bench in (bench_loss, bench_head, bench_choose):
        bench(device)


if __name__ == "__main__":
    run_script(main)
