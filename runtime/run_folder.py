"""Run folders: config.json, metrics.jsonl, samples.jsonl and evaluation.json of a run."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers

from errors import InputError
from runtime.pins import difference
from runtime.ranks import gather_objects, rank, wait_for_all

RECORD = "config.json"


def run_folder(output_dir: str | None, name: str) -> Path:
    """--output_dir, or a new folder runs/NAME that nothing has taken yet; the same on all ranks."""
    run, number = Path(output_dir or f"runs/{name}"), 2
    while output_dir is None and rank() == 0:
        try:
            run.mkdir(parents=True)  # of two processes, one makes it
            break
        except FileExistsError:
            run, number = Path(f"runs/{name}-{number}"), number + 1
        except OSError as error:
            raise InputError(f"--output_dir {run}: cannot be made ({error.strerror})") from None
    return Path(gather_objects(str(run))[0])


@contextmanager
def claimed(run: Path, resume: bool) -> Iterator[dict | None]:
    """Hold a run folder, from before the slow work to the end; yields its record, None for a new run.

    Raises InputError where the folder holds another run without `resume`, files of another program, or a run that is
    under way. A folder in which nothing was written is taken away again.
    """
    if rank() > 0:
        wait_for_all()
        try:
            yield read_record(run)
        except Exception as error:
            keep_traceback(error, run)
            raise
        return
    with locked(run, lambda folder: _refusal(folder, resume)):
        wait_for_all()
        yield read_record(run)


def _refusal(run: Path, resume: bool) -> str | None:
    """Why a run may not use a folder, or None."""
    if read_record(run) is not None:
        return None if resume else f"{run}: holds another run; continue it with --resume or choose another folder"
    others = sorted(path.name for path in run.iterdir() if path.name not in HARMLESS) if run.is_dir() else []
    return f"{run}: is not empty and holds no run of ours ({others[0]} is there)" if others else None


def read_record(run: Path) -> dict | None:
    """config.json of a run of ours; None where there is none, or where it is another program's."""
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(record, dict) and isinstance(record.get("config"), dict) and "versions" in record
    return record if ours else None


def made(folder: Path, flag: str = "output_dir") -> Path:
    """A folder for results, made before the work that fills it. Raises InputError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--{flag} {folder}: cannot be written ({error.strerror})") from None
    return folder


LOCK, ERROR_LOG = ".lock", "error.log"
HARMLESS = {LOCK, ERROR_LOG, "evaluation.json", "heldout.jsonl"}  # what may stand there before a run's first line


@contextmanager
def locked(folder: Path, refusal: Callable[[Path], str | None]) -> Iterator[None]:
    """Hold a folder against other processes, made where it is not there; one without content is taken away at the end.

    `refusal` says why the folder may not be used. An exception that is no mistake of the user's leaves its traceback in
    error.log. Raises InputError, naming --output_dir.
    """
    try:
        _check(refusal(folder))  # before anything is written into a folder that is not ours
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat())
        except (BlockingIOError, FileNotFoundError):
            is_there = False  # held, or its holder has just taken the folder away
        _check(None if is_there else f"{folder}: another process is running in it")
        try:
            _check(refusal(folder))  # again: a run may have ended since
            yield
        except Exception as error:
            keep_traceback(error, folder)
            raise
        finally:
            with suppress(OSError):  # somebody else may have taken it away
                if {path.name for path in folder.iterdir()} <= {LOCK}:
                    (folder / LOCK).unlink()
                    folder.rmdir()


def _check(refusal: str | None) -> None:
    if refusal is not None:
        raise InputError(f"--output_dir {refusal}")


def keep_traceback(error: Exception, folder: Path) -> None:
    """Append an exception's traceback to the folder's error.log and note it on the exception."""
    if isinstance(error, InputError) and error.__cause__ is None:
        return
    with suppress(OSError), (folder / ERROR_LOG).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(traceback.format_exception(error)) + "\n")
        error.add_note(f"traceback: {folder / ERROR_LOG}")


def record_run(
    run: Path, record: dict | None, config: dict, free: set[str], facts: dict, pins: dict | None = None
) -> None:
    """Write config.json, or check that the run that it records is the one that `config` continues.

    Fields in `free` may change on resuming; `pins`, {flag: what its value holds} (pins.py), may not. Raises InputError,
    naming the flag, for any other difference.
    """
    if record is not None:
        before = record["config"]
        for key, value in json.loads(json.dumps(config)).items():
            if key not in free and before.get(key) != value:
                raise InputError(f"--resume: {run} was started with --{key} {before.get(key)}, not {value}")
        for key, pin in (pins or {}).items():
            if changed := difference(record.get("pins", {}).get(key), pin):
                raise InputError(
                    f"--resume: what --{key} {config[key]} names has changed since {run} began ({changed})"
                )
    elif rank() == 0:
        facts = {"versions": versions(), "git_commit": git_commit(), **facts, "pins": pins or {}}
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


def keep_lines(path: Path, wanted: int) -> list[dict]:
    """Cut a JSONL file of steps back to those below `wanted`, so that a resumed run appends where it left off.

    Returns what is kept.
    """
    lines, rows = [], []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            if row["step"] < wanted:
                lines.append(line + "\n")
                rows.append(row)
        except (ValueError, KeyError):
            continue  # a line torn by the crash
    if path.is_file():
        write_atomically(path, "".join(lines))
    return rows


class RunLog:
    """metrics.jsonl, samples.jsonl, heldout.jsonl and evaluation.json of a run, written by rank 0, step by step.

    `evaluation` is {steps done: {"sampled": accuracy, "greedy": accuracy}}, keys as text; `earlier` the metrics of the
    steps before `start`.
    """

    def __init__(self, run: Path, start: int) -> None:
        self.run, self.file = run, run / "evaluation.json"
        try:
            stored = gather_objects(json.loads(self.file.read_text()) if self.file.exists() else {})[0]
            self.evaluation = {step: value for step, value in stored.items() if int(step) <= start}
        except (ValueError, AttributeError) as error:
            raise InputError(f"{self.file}: not the accuracies of a run ({error})") from None
        earlier = []
        if rank() == 0:
            earlier = keep_lines(run / "metrics.jsonl", start)
            keep_lines(run / "samples.jsonl", start)
        self.earlier: list[dict] = gather_objects(earlier)[0]

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
