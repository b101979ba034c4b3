"""Kill training at random moments with SIGKILL, resume it, and compare every bit with a run that was left alone.

    python -m experiments.survival --trials 50 --output experiments/results/survival.json

A trial starts a run of the embedded model, kills it at a moment drawn uniformly from the time between the run folder's
first file and its last, resumes it in a new process, and compares what both runs left: adapter, optimizer and schedule
(bytes of the files), metrics without their timings, and samples. Saving after each step makes a kill hit writing often.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from errors import InputError
from runtime.checkpoint import newest_checkpoint
from runtime.flags import run_script
from runtime.records import git_commit, make_folder, versions, write_atomically

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
COMMAND = [
    sys.executable, "train.py", "--preset", "tiny", "--num_steps", str(STEPS), "--batch_size", "4",
    "--max_new_tokens", "16", "--save_steps", "1", "--eval_data", "", "--device", "cpu", "--teacher", "ema",
    "--lora_dropout", "0.05", "--resume",
]  # fmt: skip


def start(run: Path, server: str | None) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "--output_dir", str(run), *(["--server", server] if server else [])]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    """The output of a run that must end well."""
    output = process.communicate(timeout=600)[0]
    if process.returncode != 0:
        raise RuntimeError(f"a run ended with {process.returncode}:\n{output}")
    return output


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def differences(run: Path, reference: Path) -> list[str]:
    """What two finished runs do not share, bit for bit; empty if all is equal."""
    found = []
    ours, theirs = run / f"checkpoint-{STEPS}", reference / f"checkpoint-{STEPS}"
    for name in ("adapter_model.safetensors", "ema.safetensors"):
        if (ours / name).read_bytes() != (theirs / name).read_bytes():
            found.append(name)
    states = [torch.load(path / "trainer_state.pt", weights_only=True) for path in (ours, theirs)]
    if not same(*states):
        found.append("trainer_state.pt")
    for name in ("metrics.jsonl", "samples.jsonl"):
        if lines(run / name) != lines(reference / name):
            found.append(name)
    return found


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def lines(path: Path) -> list[dict]:
    """Rows of a JSONL file without what a clock measured and a server's rounding, which its batches decide."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.get("by_decile", {}).pop("sampler_gap", None)
    return [{key: value for key, value in row.items() if "second" not in key and key != "sampler_gap"} for row in rows]


def trial(run: Path, reference: Path, delay: float, server: str | None) -> dict:
    """One kill and one resume. `leftover` tells whether the kill fell into the writing of a checkpoint."""
    process = start(run, server)
    wait_for(run / "config.json", process)
    time.sleep(delay)
    process.kill()
    process.communicate()
    killed = process.returncode == -9
    newest, damaged = newest_checkpoint(run)
    saved, leftover = int(newest.name.split("-")[1]) if newest else 0, any(run.glob(".partial-*"))
    finish(start(run, server))
    return {
        "delay_seconds": round(delay, 3), "killed": killed, "steps_saved": saved, "leftover": leftover,
        "damaged": damaged, "differences": differences(run, reference),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", help="sample through this vLLM, which serves the embedded model as tiny")
    parser.add_argument("--output", type=Path, default=Path("runs/survival.json"))
    args = parser.parse_args()
    draw, trials = random.Random(args.seed), []
    if args.trials < 1:
        raise InputError(f"--trials {args.trials}: must be at least 1")
    make_folder(args.output.parent, "output")
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        process = start(reference, args.server)
        wait_for(reference / "config.json", process)
        begin = time.monotonic()
        wait_for(reference / f"checkpoint-{STEPS}", process)
        span = time.monotonic() - begin
        finish(process)
        while sum(row["killed"] for row in trials) < args.trials:  # a run that ended before its kill does not count
            run = Path(folder) / f"trial-{len(trials)}"
            trials.append(trial(run, reference, draw.uniform(0.0, span), args.server))
            shutil.rmtree(run)
            print(len(trials), trials[-1], flush=True)
            killed = [row for row in trials if row["killed"]]
            summary = {
                "killed": len(killed), "exact": sum(not row["differences"] for row in killed),
                "while_writing": sum(row["leftover"] for row in killed),
                "command": " ".join(sys.orig_argv[1:]), "versions": versions(), "git_commit": git_commit(),
                "trials": trials,
            }  # fmt: skip
            write_atomically(args.output, json.dumps(summary, indent=1) + "\n")
    print(f"{summary['killed']} kills, {summary['exact']} exact resumes")
    sys.exit(0 if summary["exact"] == summary["killed"] else 1)


if __name__ == "__main__":
    run_script(main)
