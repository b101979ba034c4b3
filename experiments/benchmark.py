"""One table, one run: memory and speed of the loss, of sampling and of a step, each beside a naive twin.

    python -m experiments.benchmark --device cpu --quick      about two minutes on idle cores
    python -m experiments.benchmark --device cuda

Memory is the peak of PyTorch's own allocations beyond what is there before, forward and backward. Times are the
smallest of several turns taken in alternation, on a CPU the seconds that this process computed. The naive twin of the
loss is the same formula on whole float32 logits, that of sampling one call per micro-batch, that of a step both.
The presets' own shapes are for experiments/first_gpu_hour.py.

Axes: B sequences, T response tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import train
from grading import make_grader
from loss import method_loss_from_hidden
from model import pick_device
from problems import load_problems
from rollout import Response
from runtime.engines import Engine, GenerateEngine
from runtime.flags import run_script
from runtime.run_folder import git_commit, made, versions, write_atomically

ROOT = Path(__file__).resolve().parent.parent
V = 151_936  # Qwen3's vocabulary
GIB = 2**30


class Table:
    """Rows of (what, ours, naive, unit); printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, what: str, ours: float | None, naive: float | None, unit: str, note: str = "") -> None:
        row = {"what": what, "ours": ours, "naive": naive, "unit": unit, "naive / ours": None, "note": note}
        if naive is not None and ours:
            row["naive / ours"] = naive / ours
        self.rows.append(row)
        print(self.line(row), flush=True)

    @staticmethod
    def line(row: dict) -> str:
        cells = [row["what"], *("-" if row[k] is None else f"{row[k]:.4g}" for k in ("ours", "naive", "naive / ours"))]
        return f"| {' | '.join([*cells, row['unit'], row['note']])} |"

    def markdown(self) -> str:
        head = "| what | ours | naive twin | naive / ours | unit | note |\n|---|---|---|---|---|---|\n"
        return head + "\n".join(map(self.line, self.rows)) + "\n"


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; on a CPU those that this process computed, which other processes disturb least."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    wait(device)
    start = clock()
    function()
    wait(device)
    return clock() - start


def alternate(functions: list[Callable[[], object]], device: torch.device, turns: int) -> list[float]:
    """The smallest of `turns` times of each function, taken in alternation after one unmeasured call each."""
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
# The loss


def naive_opsd(student_BTD: Tensor, teacher_BTD: Tensor, head_VD: Tensor, mask_BT: Tensor) -> Tensor:
    """Eq. (1) on whole float32 logits, written straight down: the twin."""
    student_logp_BTV = ((student_BTD @ head_VD.T).float() / 1.1).log_softmax(dim=-1)
    with torch.no_grad():
        teacher_logp_BTV = ((teacher_BTD @ head_VD.T).float() / 1.1).log_softmax(dim=-1)
    entries_BTV = teacher_logp_BTV.exp() * (teacher_logp_BTV - student_logp_BTV)
    return (entries_BTV.clamp(max=0.05).sum(dim=-1) * mask_BT).sum() / mask_BT.sum()


def loss_functions(B: int, T: int, D: int, V: int, device: torch.device) -> tuple[Callable, Callable]:
    """Forward and backward of our loss, given a chunk size, and of the naive one, on the same random states."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    student = (0.3 * torch.randn(B, T, D, device=device)).to(dtype).requires_grad_()
    teacher, head = (0.3 * torch.randn(B, T, D, device=device)).to(dtype), torch.randn(V, D, device=device).to(dtype)
    ids = torch.randint(V, (B, T), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def ours(chunk_tokens: int | None = None) -> float:
        student.grad = None
        loss = method_loss_from_hidden("opsd", student, teacher, head, ids, mask, chunk_tokens=chunk_tokens)
        loss.backward()
        return loss.item()

    def naive() -> float:
        student.grad = None
        loss = naive_opsd(student, teacher, head, mask)
        loss.backward()
        return loss.item()

    return ours, naive


def benchmark_loss(table: Table, device: torch.device, quick: bool) -> None:
    D, T = (2560, 1024) if device.type == "cuda" else (256, 32) if quick else (2560, 64)
    ours, naive = loss_functions(4, T, D, V, device)
    note = f"V {V}, D {D}, {4 * T} tokens, values differ by {abs(ours() - naive()):.0e}"
    table.add("loss, peak memory", peak_bytes(ours, device) / GIB, peak_bytes(naive, device) / GIB, "GiB", note)
    table.add("loss, time", *alternate([ours, naive], device, 3), "s", note)
    for long in (1024,) if quick else (1024, 4096):
        longer, _ = loss_functions(4, long, 64, V, device)
        table.add(f"loss, peak memory at 4 x {long}", peak_bytes(longer, device) / GIB, None, "GiB", "D 64")


# ---------------------------------------------------------------------------------------------------------------
# Sampling and a step, with the embedded model


class PerMicroBatch:
    """The naive way to sample: one call per micro-batch, in the order of the prompts."""

    name = "per micro-batch"

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine, self.size = engine, size

    def sample(self, prompts, keys, settings, on_finished=None) -> list[Response]:
        starts = range(0, len(prompts), self.size)
        parts = [self.engine.sample(prompts[i : i + self.size], keys[i : i + self.size], settings) for i in starts]
        return [response for part in parts for response in part]

    def close(self) -> None:
        self.engine.close()


def benchmark_step(table: Table, device: torch.device, quick: bool) -> None:
    """One step by parts; the twin samples per micro-batch and holds all logits of a micro-batch at once."""
    config = train.parse_config(["--device", str(device), "--batch_size", "16" if quick else "32"])
    config = replace(config, engine="generate", micro_batch_size=4, gradient_checkpointing=False)
    run = train.build(config, device, make_grader("exact", []))
    twin = replace(run, engine=PerMicroBatch(GenerateEngine(run.model, run.tokenizer), config.micro_batch_size))
    problems = load_problems(config.data)
    train.train_step(0, run, problems, config)
    ours, _ = train.train_step(1, run, problems, config)
    with mock.patch("loss.CHUNK_BYTES", 2**60):
        naive, _ = train.train_step(1, twin, problems, config)
    note = f"{config.batch_size} prompts, {ours['mean_length']:.0f} tokens on average"
    for part in ("sampling", "teacher", "student", "update"):
        table.add(f"step tiny, {part}", ours[f"seconds_{part}"], naive[f"seconds_{part}"], "s", note)


def benchmark_ranks(table: Table, folder: Path) -> None:
    """Seconds per step on the CPU with one and with two ranks, of one thread each; their losses must agree."""
    rows = {}
    for ranks in (1, 2):
        run = folder / f"ranks-{ranks}"
        flags = ["--preset", "tiny", "--num_steps", "3", "--batch_size", "32", "--eval_data", "", "--device", "cpu"]
        launcher = [
            sys.executable,
            *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []),
        ]
        subprocess.run(
            [*launcher, str(ROOT / "train.py"), *flags, "--output_dir", str(run)], check=True, cwd=ROOT,
            capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        rows[ranks] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    took = {n: min(sum(v for k, v in row.items() if k.startswith("seconds_")) for row in rows[n]) for n in rows}
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows[1], rows[2], strict=True))
    table.add("step tiny, 2 ranks beside 1", took[2], took[1], "s", f"CPU; losses differ by at most {apart:.0e}")


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    name = models[0] if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "benchmark", help="folder for the table")
    args = parser.parse_args()
    device = pick_device(args.device)
    made(args.output_dir)
    table, start = Table(), time.perf_counter()
    benchmark_loss(table, device, args.quick)
    benchmark_step(table, device, args.quick)
    with tempfile.TemporaryDirectory() as folder:
        benchmark_ranks(table, Path(folder))
    facts = {
        "hardware": hardware(device), "versions": versions(), "git_commit": git_commit(), "load": os.getloadavg()[0],
        "command": " ".join(["python", *sys.orig_argv[1:]]), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    write_report(args.output_dir, "benchmark", facts, table)


def write_report(folder: Path, name: str, facts: dict, table: Table) -> None:
    """NAME.md and NAME.json: the facts of the machine and the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    described = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    write_atomically(folder / f"{name}.json", json.dumps({**facts, "rows": table.rows}, indent=1) + "\n")
    write_atomically(folder / f"{name}.md", f"# {name}\n\n{described}\n\n{table.markdown()}")
    print(f"wrote {folder / name}.md")


if __name__ == "__main__":
    run_script(main)
