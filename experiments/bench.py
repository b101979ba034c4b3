"""What our ways of computing cost beside the plain ones, taken in turns in one process.

    python -m experiments.bench              a table; with a GPU at a preset's shapes
    python -m experiments.bench --quick      smaller sizes, under a minute

| part | ours | the plain way |
|---|---|---|
| loss | a chunk of tokens at a time | whole float32 logits |
| step | micro-batches of 4 rows | one row at a time |

On a CPU seconds are CPU seconds of this process, which others on the machine disturb least; on a GPU those that pass.
Axes: M tokens, V vocabulary, D hidden.
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
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import train
from grading import make_grader
from loss import LossOptions, resolve_method, score_tokens_from_hidden
from problems import load_problems
from runtime.flags import run_script
from runtime.loading import pick_device
from runtime.records import git_commit, make_folder, versions, write_atomically

V = 151_936  # Qwen3's vocabulary
GIB = 2**30
MICRO_BATCH = 4


class Table:
    """Rows of (what, ours, plain, unit, note); printed as they come."""

    def __init__(self) -> None:
        self.lines = ["| what | ours | plain | plain / ours | unit | note |", "|---" * 6 + "|"]

    def add(self, what: str, ours: float | None, plain: float | None, unit: str, note: str = "") -> None:
        ratio = plain / ours if ours and plain is not None else None
        numbers = ("-" if value is None else f"{value:.4g}" for value in (ours, plain, ratio))
        self.lines.append(f"| {' | '.join([what, *numbers, unit, note])} |")
        print(self.lines[-1], flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(function: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    wait(device)
    start = clock()
    function()
    wait(device)
    return clock() - start


def alternate(functions: list[Callable[[], object]], device: torch.device, turns: int = 3) -> list[float]:
    """The smallest of `turns` times of each function, in s, taken in alternation after one unmeasured call each."""
    for function in functions:
        function()
    times = [[seconds(function, device) for function in functions] for _ in range(turns)]
    return [min(column) for column in zip(*times, strict=True)]


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


def bench_loss(table: Table, device: torch.device, quick: bool) -> None:
    D, M = (2560, 4096) if device.type == "cuda" else (256, 128) if quick else (2560, 256)
    ours, plain = loss_functions(M, D, V, device)
    note = f"V {V}, D {D}, {M} tokens, values differ by {abs(ours()[0] - plain()[0]):.0e}"
    table.add("loss, peak memory", peak_bytes(ours, device) / GIB, peak_bytes(plain, device) / GIB, "GiB", note)
    table.add("loss, time", *alternate([ours, plain], device), "s", note)


def bench_step(table: Table, device: torch.device, quick: bool) -> None:
    """Steps of one run of the embedded model, the next one at each turn."""
    config = train.on_device(train.parse_config(["--batch_size", "8" if quick else "32"]), device)
    run, problems, steps = train.build(config, device, make_grader("exact", [])), load_problems(config.data), count()

    def step(rows: int) -> None:
        train.train_step(next(steps), run, problems, replace(config, micro_batch_size=rows))

    both = alternate([lambda: step(MICRO_BATCH), lambda: step(1)], device)
    table.add("step", *both, "s", f"embedded model, {config.batch_size} prompts, sampling included")


PARTS = {"loss": bench_loss, "step": bench_step}


# ---------------------------------------------------------------------------------------------------------------
# The script


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"


def write_table(path: Path, table: Table, device: torch.device) -> None:
    """The table as Markdown, with what it was measured on."""
    facts = {"hardware": hardware(device), **versions(), "commit": git_commit(), "load": f"{os.getloadavg()[0]:.1f}"}
    lines = [f"# {path.stem}", "", *(f"- {name}: {value}" for name, value in facts.items()), "", *table.lines]
    write_atomically(path, "\n".join(lines) + "\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="where bench.md goes")
    args = parser.parse_args()
    device, table = pick_device(args.device), Table()
    folder = make_folder(args.output_dir)
    for part in args.parts:
        PARTS[part](table, device, args.quick)
    write_table(folder / "bench.md", table, device)


if __name__ == "__main__":
    run_script(main)
