"""What our ways of computing cost beside the plain ones, taken in turns in one process: a table in Markdown, printed.

    python -m experiments.bench              with a GPU at a preset's shapes
    python -m experiments.bench --quick      smaller sizes, under a minute

| part | ours | the plain way |
|---|---|---|
| loss | a chunk of tokens at a time | whole float32 logits |
| head | `model.py::head_logits` in bfloat16, and its gradient | a linear map in bfloat16 |
| choose | a nucleus among the likeliest tokens | among all of them, sorted |
| step | micro-batches of 4 rows | one row at a time |

On a CPU seconds are CPU seconds of this process, which others on the machine disturb least; on a GPU those that pass.
Axes: B rows, M tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import train
from grading import make_grader
from loss import LossOptions, resolve_method, score_tokens_from_hidden
from model import head_logits
from problems import load_problems
from rollout import Sampling, choose_tokens
from runtime.flags import run_script
from runtime.loading import pick_device
from runtime.records import git_commit, versions

V = 151_936  # Qwen3's vocabulary
GIB = 2**30
MICRO_BATCH = 4
HEAD = "| what | ours | plain | plain / ours | unit | note |\n" + "|---" * 6 + "|"


def add_row(what: str, ours: float | None, plain: float | None = None, unit: str = "", note: str = "") -> None:
    """Print a row of the table, at once."""
    ratio = plain / ours if ours and plain is not None else None
    numbers = ("-" if value is None else f"{value:.4g}" for value in (ours, plain, ratio))
    print(f"| {' | '.join([what, *numbers, unit, note])} |", flush=True)


def facts(title: str, device: torch.device) -> str:
    """A heading, and what the numbers under it were measured on."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
        hardware = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    found = {"hardware": hardware, **versions(), "commit": git_commit(), "load": f"{os.getloadavg()[0]:.1f}"}
    return "\n".join([f"# {title}", "", *(f"- {name}: {value}" for name, value in found.items()), ""])


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def alternate(functions: list[Callable[[], object]], device: torch.device, turns: int = 3) -> list[float]:
    """The smallest of `turns` times of each function, in s, taken in alternation after one unmeasured call each."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for _ in range(turns + 1):
        for function in functions:
            wait(device)
            start = clock()
            function()
            wait(device)
            times.append(clock() - start)
    return [min(times[i + len(functions) :: len(functions)]) for i in range(len(functions))]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def bench_loss(device: torch.device, quick: bool) -> None:
    D, M = (2560, 4096) if device.type == "cuda" else (256, 128) if quick else (2560, 256)
    ours, plain = loss_functions(M, D, V, device)
    note = f"V {V}, D {D}, {M} tokens, values differ by {abs(ours()[0] - plain()[0]):.0e}"
    add_row("loss, peak memory", peak_bytes(ours, device) / GIB, peak_bytes(plain, device) / GIB, "GiB", note)
    add_row("loss, time", *alternate([ours, plain], device), "s", note)


def bench_head(device: torch.device, quick: bool) -> None:
    x_MD = torch.randn(69, 896, device=device).bfloat16().requires_grad_()
    head_VD = torch.randn(V // 8, 896, device=device).bfloat16()
    both = [lambda to=to: to(x_MD, head_VD).square().mean().backward() for to in (head_logits, F.linear)]
    add_row("head in bfloat16 and its gradient", *alternate(both, device), "s", f"V {V // 8}, D 896, 69 tokens")


def bench_choose(device: torch.device, quick: bool) -> None:
    logits_BV, u_B = torch.randn(32, V, device=device) * 5.0, torch.rand(32, device=device)
    few = {}, {"candidates": V}
    both = [lambda few=few: choose_tokens(logits_BV, u_B, Sampling(1.0, 0.95, 0, 1), **few) for few in few]
    add_row("choosing a token", *alternate(both, device), "s", f"V {V}, 32 rows, top_p 0.95")


def bench_step(device: torch.device, quick: bool) -> None:
    """Steps of one run of the embedded model, the next one at each turn."""
    config = train.on_device(train.parse_config(["--batch_size", "8" if quick else "32"]), device)
    run, problems, steps = train.build(config, device, make_grader("exact", [])), load_problems(config.data), count()

    def step(rows: int) -> None:
        train.train_step(next(steps), run, problems, replace(config, micro_batch_size=rows))

    both = alternate([lambda: step(MICRO_BATCH), lambda: step(1)], device)
    add_row("step", *both, "s", f"embedded model, {config.batch_size} prompts, sampling included")


PARTS = {"loss": bench_loss, "head": bench_head, "choose": bench_choose, "step": bench_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    args = parser.parse_args()
    device = pick_device(args.device)
    print(facts("bench", device) + "\n" + HEAD)
    for part in args.parts:
        PARTS[part](device, args.quick)


if __name__ == "__main__":
    run_script(main)
