"""What a run writes and may go on from: its folder, config.json, files of rows, and what its inputs hold.

The three scripts share it. A folder is held by one process (and its ranks); config.json says what was asked for, with a
fingerprint of each input; rows are on the disk as soon as they are there, so what a killed run has written counts.
"""

import datetime
import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import astuple
from pathlib import Path

import filelock
import torch
import transformers
from transformers.utils import cached_file, extract_commit_hash

from errors import InputError, one_line
from problems import Problem
from runtime.loading import TINY_MODEL
from runtime.ranks import gather_objects, progress, rank, say, wait_for_all, world_size

# --- Files ------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader, or a crash, sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # a link of that name would be followed
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Take a file, a link or a folder away, if it is there; what a link names stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """A folder for results, made before the work that fills it. Raises InputError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
    return folder


# --- Run folders ------------------------------------------------------------------------------------------------

RECORD, LOCK, TRIAL = "config.json", ".lock", ".trial"
LEFTOVERS = {f".{RECORD}.partial", LOCK, TRIAL}  # of a start that failed
# How a file system says that it has no locks.
NO_LOCKS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EPERM, errno.EACCES}


def new_folder(output_dir: str | None, name: str) -> Path:
    """--output_dir, or a new folder runs/NAME that nothing has taken yet; the same on all ranks."""
    folder, number = Path(output_dir or f"runs/{name}"), 2
    while output_dir is None and rank() == 0:
        try:
            folder.mkdir(parents=True)  # of two processes, one makes it
            break
        except FileExistsError:
            folder, number = Path(f"runs/{name}-{number}"), number + 1
    return Path(gather_objects(str(folder))[0])


@contextmanager
def open_run(folder: Path, script: str, resume: bool) -> Iterator[dict | None]:
    """Hold a run folder, from before the slow work to the end; yields its config.json, None for a run that begins.

    Raises InputError, naming --output_dir, where the folder is not ours, or a run could not write there. A folder in
    which nothing was written is taken away again.
    """
    with _locked(folder, script, resume) if rank() == 0 else nullcontext() as record:
        yield gather_objects(record)[0]


def _refusal(folder: Path, why: str) -> InputError:
    return InputError(f"--output_dir {folder}: {why}")


@contextmanager
def _locked(folder: Path, script: str, resume: bool) -> Iterator[dict | None]:
    begun_before(folder, script, resume)  # before anything is written into a folder that is not ours
    lock = filelock.FileLock(make_folder(folder) / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise _refusal(folder, "another process is running in it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"--output_dir {folder}: cannot be locked ({one_line(error)}); nothing keeps a second run out of it")
    try:
        record = begun_before(folder, script, resume)  # again: a run may have ended since
        _try_to_write(folder)
        yield record
    finally:
        with suppress(OSError):  # somebody else may have taken it away
            if {path.name for path in folder.iterdir()} <= {LOCK, RECORD}:
                shutil.rmtree(folder)  # while it is still held: nobody else can be in it
        lock.release()


def begun_before(folder: Path, script: str, resume: bool) -> dict | None:
    """config.json of a run that has begun in the folder, None where none has; raises InputError where none may."""
    record = read_record(folder)
    contents = list(folder.iterdir()) if folder.is_dir() else []
    ours = LEFTOVERS if record is None else {*LEFTOVERS, RECORD}
    others = [path.name for path in contents if path.is_symlink() or path.name not in ours]
    if record is None and others:
        raise _refusal(folder, f"is not empty and holds no run of ours ({min(others)} is there)")
    if not others:
        return None
    if record.get("script") != script:
        raise _refusal(folder, f"holds another run, of {record.get('script', 'another version')}")
    if not resume:
        raise _refusal(folder, "holds another run; continue it with --resume or choose another folder")
    return record


def _try_to_write(folder: Path) -> None:
    """What a run cannot do without, once with nothing at stake: files and folders written, renamed and removed."""
    trial = folder / TRIAL
    remove(trial)
    try:
        trial.mkdir()  # without parents: another process may have taken the folder away
        (trial / "partial").mkdir()
        for text in ("new", "replaced"):
            write_atomically(trial / "partial" / "file", text)
        (trial / "partial").rename(trial / "whole")
    except OSError as error:
        raise _refusal(folder, f"cannot be written ({error.strerror})") from None
    finally:
        remove(trial)


def read_record(folder: Path) -> dict | None:
    """config.json of a run of ours; None where there is none, or where it is another program's."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record["config"], dict) and "versions" in record else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def record_run(
    folder: Path, script: str, record: dict | None, config: dict, free: set[str], inputs: dict, facts: dict
) -> None:
    """Write config.json, or check that the run that it records is the one that `config` continues.

    `inputs` is {flag: fingerprint of what its value names}: there the content counts, not the name. Flags in `free` may
    change, and so may the code, which is told. Raises InputError, naming the flag, for any other difference.
    """
    if record is not None:
        before = record["config"] | record.get("inputs", {})
        asked = json.loads(json.dumps(config | inputs))
        for flag in sorted(asked, key=lambda flag: flag in inputs):  # last, as another flag may change what they name
            now = asked[flag]
            if flag not in free and (changed := difference(before.get(flag), now)):
                how = f"was started with --{flag} {record['config'].get(flag)}, not {config.get(flag)}"
                if flag in inputs and record["config"].get(flag) == config[flag]:
                    how = f"what --{flag} {config[flag]} names has changed since the run began ({changed})"
                raise _refusal(folder, f"{how}; for another run choose another folder")
        then, now = record["versions"] | record.get("code", {}), versions() | code()
        if changed := difference(*({name: side[name] for name in sorted(then.keys() & now)} for side in (then, now))):
            say(f"--output_dir {folder}: begun with other code ({changed}), goes on with today's")
    elif rank() == 0:
        made_by = {"versions": versions(), "git_commit": git_commit(), "code": code()}
        facts = {**made_by, "ranks": world_size(), **facts}
        record = {"script": script, "command": shlex.join(sys.argv), "config": config, **facts, "inputs": inputs}
        write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")


def first_day(record: dict | None) -> str:
    """The day a run began, YYYY-MM-DD, the same on all ranks: what its chat template takes for today."""
    return gather_objects((record or {}).get("date") or datetime.date.today().isoformat())[0]


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def code() -> dict[str, str]:
    """SHA-256 of the command's own file, `script`, and of each file of the checkout's that a command may use."""
    root, script = Path(__file__).resolve().parent.parent, Path(sys.argv[0])
    files = {path.relative_to(root).as_posix(): path for path in [*root.glob("*.py"), *root.glob("runtime/*.py")]}
    return {name: sha256(path) for name, path in (files | {"script": script}).items() if path.is_file()}


def git_commit() -> str | None:
    """The commit of this checkout, or None outside of one."""
    command = ["git", "--git-dir", str(Path(__file__).resolve().parent.parent / ".git"), "rev-parse", "HEAD"]
    found = shutil.which("git") and subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or None


# --- Inputs by content, so that nothing changes under its name without a word -----------------------------------

# Weights of every format and their indices, configs, generation defaults, tokenizers, templates, adapters.
DECIDING = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".json", ".jinja", ".txt", ".model",
            ".tiktoken"}  # fmt: skip
# How the names of files begin that stand beside them in a checkpoint and decide nothing that is sampled.
BESIDE = ("trainer_state", "training_args", "train_results", "eval_results", "all_results", "optimizer", "scheduler",
          "scaler", "rng_state", "manifest", "ema.", "requirements")  # fmt: skip


def fingerprints(named: dict[str, str | None]) -> dict[str, dict[str, str] | None]:
    """The fingerprint of what each flag names, on all ranks; the first one reads the files."""
    found = {flag: name and fingerprint(name) for flag, name in named.items()} if rank() == 0 else None
    return gather_objects(found)[0]


def fingerprint(name: str) -> dict[str, str]:
    """SHA-256 of each file that decides what a directory's model samples, by name; for a hub name its revision.

    Files are hashed whole and anew each time: size and time of a file survive a change of its content (`cp -p`, an
    archive). A GiB takes about a second where the CPU has SHA instructions, up to 6 without.
    """
    directory = TINY_MODEL if name == "tiny" else Path(name)
    if not directory.is_dir():
        try:
            return {"revision": extract_commit_hash(cached_file(name, "config.json"), None)}
        except Exception as error:  # the hub's errors have no common base class
            raise InputError(f"--model {name}: cannot be read ({one_line(error)})") from error
    there = sorted([*directory.iterdir(), *directory.glob("additional_chat_templates/*")])
    paths = [path for path in there if path.suffix in DECIDING and not path.name.startswith(BESIDE) and path.is_file()]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, paths))
    return {path.relative_to(directory).as_posix(): digest for path, digest in zip(paths, digests, strict=True)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(problems: list[Problem]) -> str:
    """SHA-256 of problems in their order, wherever they come from: a file, the hub, the embedded world."""
    return hashlib.sha256(json.dumps([astuple(problem) for problem in problems]).encode()).hexdigest()


def difference(found: object, wanted: object) -> str | None:
    """The first part in which two fingerprints differ, in words; None where they are the same."""
    if found == wanted:
        return None
    if isinstance(found, dict) and isinstance(wanted, dict):
        part = min(part for part in found.keys() | wanted.keys() if found.get(part) != wanted.get(part))
        return f"{part} {difference(found.get(part), wanted.get(part))}"
    return f"{str(found)[:12]}, now {str(wanted)[:12]}"


# --- Rows -------------------------------------------------------------------------------------------------------


def read_rows(path: Path, fields: tuple[str, ...] = (), exactly: bool = False) -> list[dict]:
    """Rows of a JSONL file, none where there is no file. What stands behind the last line break was torn by a crash.

    Raises InputError, naming file and line, for a line that is no object with these fields (`exactly`: and no others).
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else (), start=1):
        try:
            rows.append(json.loads(line))
            names = rows[-1].keys()
            if odd := set(fields) ^ names if exactly else set(fields) - names:
                raise ValueError(f"{'unknown' if min(odd) in names else 'no'} {min(odd)}")
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not a row of this program's ({one_line(error)})") from None
    return rows


def append_rows(path: Path, rows: list[dict]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def write_rows(path: Path, rows: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


class RowFile:
    """The rows of a JSONL file, by the values of their `key`, on all ranks; what is added is on the disk at once.

    Ranks above the first write parts beside the file, which the first takes in: in `collect`, or at the next start
    those of a killed run. A torn last line is cut off, and its row is missing.
    """

    def __init__(self, path: Path, key: tuple[str, ...], values: tuple[str, ...] = ()) -> None:
        self.path, self.key, self.fields = path, key, key + values
        self._own = self.path if rank() == 0 else self._part(rank())
        self.rows: dict[tuple, dict] = {}
        self.collect()

    def add(self, rows: list[dict]) -> None:
        append_rows(self._own, rows)
        self.rows |= {self._key(row): row for row in rows}

    def collect(self) -> None:
        """When all ranks are done: everything into the one file, and known to all."""
        wait_for_all()
        if rank() == 0:
            self.rows = self._read(self.path)
            for part in sorted(self.path.parent.glob(self._part("*").name)):
                self.add([row for key, row in self._read(part).items() if key not in self.rows])
                part.unlink()
        self.rows = gather_objects(self.rows if rank() == 0 else None)[0]

    def _read(self, path: Path) -> dict[tuple, dict]:
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        return {self._key(row): row for row in read_rows(path, self.fields, exactly=True)}

    def _key(self, row: dict) -> tuple:
        return tuple(row[name] for name in self.key)

    def _part(self, number: int | str) -> Path:
        return self.path.with_name(f"{self.path.stem}-rank{number}.jsonl")


def do_jobs(file: RowFile, jobs: list[tuple], work: Callable[[list[tuple]], list[dict]], batch_size: int) -> list[dict]:
    """The rows of all jobs in their order, on all ranks: those in the file, and the others, computed now.

    A job is its row's key; `work` turns at most `batch_size` jobs into one row each. A row must depend on its job
    alone, not on what it is batched with; then several ranks, or an interrupted run, leave the rows of an unbroken one.
    """
    started = time.perf_counter()
    left = [job for job in jobs if job not in file.rows]
    mine = left[rank() :: world_size()]
    for start in progress(range(0, len(mine), batch_size), desc=file.path.stem):
        file.add(work(mine[start : start + batch_size]))
    file.collect()
    seconds = time.perf_counter() - started
    say(f"{file.path.stem}: {len(jobs)} rows, {len(jobs) - len(left)} of them from before, {seconds:.0f} s")
    return [file.rows[job] for job in jobs]


class RunLog:
    """What a training run writes of its steps, from `start` steps on: metrics, rollouts, held-out samples.

    A resumed run makes the steps behind its checkpoint again, so their rows are cut off here. Rank 0 writes.
    `earlier`: the metrics of the steps before `start`. `evaluation`: the held-out accuracies as they stand in
    evaluation.json, {steps done, as text: {"sampled": accuracy, "greedy": accuracy}}.
    """

    def __init__(self, run: Path, start: int) -> None:
        self.run, self.file = run, run / "evaluation.json"
        try:
            stored = gather_objects(json.loads(self.file.read_text()) if self.file.exists() else {})[0]
            self.evaluation = {step: value for step, value in stored.items() if int(step) <= start}
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{self.file}: not the accuracies of a run ({error})") from None
        rows = [self._cut(name, start) for name in ("metrics.jsonl", "samples.jsonl")] if rank() == 0 else [None]
        self.earlier: list[dict] = gather_objects(rows[0])[0]
        if [row["step"] for row in self.earlier] != list(range(start)):
            say(f"{run / 'metrics.jsonl'}: does not hold each of the {start} steps before, and never will")

    def append(self, metrics: dict, samples: list[dict]) -> None:
        if rank() == 0:
            append_rows(self.run / "metrics.jsonl", [metrics])
            append_rows(self.run / "samples.jsonl", sorted(samples, key=lambda row: row["slot"]))

    def evaluate(self, step: int, rows: list[dict]) -> str:
        """Keep the held-out samples of `step` and their accuracies; returns the line to print."""
        of = {name: [row["correct"] for row in rows if row["decoding"] == name] for name in ("sampled", "greedy")}
        now = self.evaluation[str(step)] = {name: sum(correct) / len(correct) for name, correct in of.items()}
        if rank() == 0:
            self._cut("heldout.jsonl", step)
            rows = sorted(rows, key=lambda row: (row["decoding"], row["problem"], row["sample"]))
            append_rows(self.run / "heldout.jsonl", rows)
            write_atomically(self.file, json.dumps(self.evaluation, indent=2) + "\n")
        first = self.evaluation.get("0", {}) if step else {}
        before = {name: f"{value:.4f} -> " for name, value in first.items()}
        parts = ", ".join(f"{name} {before.get(name, '')}{value:.4f}" for name, value in now.items())
        return f"held-out accuracy after {step} steps: {parts} ({len(of['greedy'])} problems)"

    def _cut(self, name: str, start: int) -> list[dict]:
        """Keep the rows of the steps below `start`, and return them."""
        rows = [row for row in read_rows(self.run / name, ("step",)) if row["step"] < start]
        if (self.run / name).exists():
            write_rows(self.run / name, rows)
        return rows
