"""Run folders: config.json, metrics.jsonl, samples.jsonl and evaluation.json of a run."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from problems import InputError
from runtime.ranks import gather_objects, rank, wait_for_all

RECORD = "config.json"


def run_folder(output_dir: str | None, name: str) -> Path:
    """--output_dir, or a folder runs/NAME that no run has taken yet; the same on all ranks."""
    run, number = Path(output_dir or f"runs/{name}"), 2
    while output_dir is None and (run / RECORD).exists():
        run, number = Path(f"runs/{name}-{number}"), number + 1
    return Path(gather_objects(str(run))[0])


@contextmanager
def claimed(run: Path, resume: bool) -> Iterator[dict | None]:
    """Hold a run folder, from before the slow work to the end; yields its record, None for a new run.

    Raises InputError where the folder holds another run without `resume`, files of another program, or a run that is
    under way.
    """
    lock = None
    if rank() == 0:
        if (run / RECORD).exists() and not resume:
            raise InputError(
                f"--output_dir {run}: holds another run; continue it with --resume or choose another folder"
            )
        if run.exists() and not (run / RECORD).exists() and any(path.name != LOCK for path in run.iterdir()):
            raise InputError(f"--output_dir {run}: is not empty and holds no run of ours ({RECORD} is missing)")
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output_dir {run}: another process is running in it") from None
    try:
        wait_for_all()
        yield json.loads((run / RECORD).read_text()) if (run / RECORD).exists() else None
    finally:
        if lock is not None:
            lock.close()


LOCK = ".lock"


def record_run(run: Path, record: dict | None, config: dict, free: set[str], facts: dict) -> None:
    """Write config.json, or check that the run that it records is the one that `config` continues.

    Fields in `free` may change on resuming. Raises InputError, naming the flag, for any other difference.
    """
    if record is not None:
        before = record["config"]
        for key, value in json.loads(json.dumps(config)).items():
            if key not in free and before.get(key) != value:
                raise InputError(f"--resume: {run} was started with --{key} {before.get(key)}, not {value}")
    elif rank() == 0:
        facts = {"versions": versions(), "git_commit": git_commit(), **facts}
        write_atomically(run / RECORD, json.dumps({"config": config, **facts}, indent=2) + "\n")


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def git_commit() -> str | None:
    """The commit of this checkout, or None outside of one."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader, or a crash, sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def keep_lines(path: Path, wanted: int) -> None:
    """Cut a JSONL file of steps back to those below `wanted`, so that a resumed run appends where it left off."""
    if path.is_file():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < wanted:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # a line torn by the crash
        write_atomically(path, "".join(kept))


class RunLog:
    """metrics.jsonl, samples.jsonl, heldout.jsonl and evaluation.json of a run, written by rank 0, step by step.

    `evaluation` is {steps done: {"sampled": accuracy, "greedy": accuracy}}, keys as text.
    """

    def __init__(self, run: Path, start: int) -> None:
        self.run, self.file = run, run / "evaluation.json"
        stored = gather_objects(json.loads(self.file.read_text()) if self.file.exists() else {})[0]
        self.evaluation = {step: value for step, value in stored.items() if int(step) <= start}
        if rank() == 0:
            keep_lines(run / "metrics.jsonl", start)
            keep_lines(run / "samples.jsonl", start)

    def append(self, metrics: dict, samples: list[dict]) -> None:
        self._append("metrics.jsonl", [metrics])
        self._append("samples.jsonl", sorted(samples, key=lambda row: row["slot"]))

    def evaluate(self, step: int, rows: list[dict]) -> str:
        """Keep the held-out samples of `step` and their accuracies; returns the line to print."""
        of = {name: [row["correct"] for row in rows if row["decoding"] == name] for name in ("sampled", "greedy")}
        self.evaluation[str(step)] = {name: sum(correct) / len(correct) for name, correct in of.items()}
        if rank() == 0:
            keep_lines(self.run / "heldout.jsonl", step)
            self._append("heldout.jsonl", sorted(rows, key=lambda r: (r["decoding"], r["problem"], r["sample"])))
            write_atomically(self.file, json.dumps(self.evaluation, indent=2) + "\n")
        first, now = self.evaluation.get("0", {}), self.evaluation[str(step)]
        parts = [f"{name} {first[name]:.4f} -> {now[name]:.4f}" if step and first else f"{name} {now[name]:.4f}"
                 for name in now]  # fmt: skip
        return f"held-out accuracy after {step} steps: {', '.join(parts)} ({len(of['greedy'])} problems)"

    def _append(self, name: str, rows: list[dict]) -> None:
        if rank() == 0:
            with (self.run / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
