"""What keeps a run alive: atomic checkpoints with checksums, run folders, and the samples of an evaluation.

A checkpoint is a directory `checkpoint-STEP` that appears only when it is complete: the weights (the adapter in PEFT's
format, or the whole model), the optimizer, the schedule and, for an EMA teacher, its average. No random state and no
data position is stored: both are functions of (seed, step), so a resumed run draws what an unbroken one draws, on any
number of ranks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from model import ADAPTER_WEIGHTS, load_adapter, lora_layers, save_adapter
from problems import InputError
from teacher import Teacher

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.pt"
EMA_WEIGHTS = "ema.safetensors"


def save_checkpoint(
    run: Path,
    step: int,
    model: PreTrainedModel,
    base_model: str,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> Path:
    """Write `run/checkpoint-STEP` after `step` steps. Until the final rename it lies under a name that nothing reads.

    Raises InputError where it cannot be written (a full disk, say), with the partial directory removed and earlier
    checkpoints untouched.
    """
    final, partial = run / f"checkpoint-{step}", run / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if lora_layers(model):
            save_adapter(model, partial, base_model)
        else:
            model.save_pretrained(partial)
        if teacher.average:
            save_file({str(i): tensor.contiguous() for i, tensor in enumerate(teacher.average)}, partial / EMA_WEIGHTS)
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(state, partial / TRAINER_STATE)
        digests = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=2) + "\n")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(run)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a name of its own in each library
        shutil.rmtree(partial, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise InputError(f"{final}: cannot be written ({reason}); earlier checkpoints are whole") from error
    return final


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and one line for each newer one that had to be passed over."""
    damaged = []
    numbered = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        problem = damage(path)
        if problem is None:
            return path, damaged
        damaged.append(f"{path}: {problem}; using the checkpoint before it")
    return None, damaged


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there with its checksum."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, digest in manifest["sha256"].items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} is damaged (checksum)"
        if checkpoint.name != f"checkpoint-{manifest['step']}" or TRAINER_STATE not in manifest["sha256"]:
            return f"{MANIFEST} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    return None


def load_checkpoint(
    checkpoint: Path,
    model: PreTrainedModel,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Put everything back in place and return the number of steps done. Tensors only are unpickled (weights_only)."""
    if (checkpoint / ADAPTER_WEIGHTS).is_file():
        load_adapter(model, checkpoint)
    else:
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype, trust_remote_code=False)
        model.load_state_dict(saved.state_dict())
    if teacher.average:
        if not (checkpoint / EMA_WEIGHTS).is_file():
            raise InputError(f"{checkpoint}: holds no EMA teacher")
        average = load_file(checkpoint / EMA_WEIGHTS)
        teacher.average = [average[str(i)].to(old.device) for i, old in enumerate(teacher.average)]
    state = torch.load(checkpoint / TRAINER_STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return int(json.loads((checkpoint / MANIFEST).read_text())["step"])


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_run(run: Path, config: dict, free: set[str], resume: bool, facts: dict) -> None:
    """Claim a run folder: write config.json, or check that the run in it is the one that `config` continues.

    Fields in `free` may change on resuming. Raises InputError if the folder holds another run.
    """
    record = run / "config.json"
    if record.exists() and not resume:
        raise InputError(f"--output_dir {run}: holds another run; continue it with --resume or choose another folder")
    if record.exists():
        before = json.loads(record.read_text())["config"]
        for key, value in json.loads(json.dumps(config)).items():
            if key not in free and before.get(key) != value:
                raise InputError(f"--resume: {run} was started with --{key} {before.get(key)}, not {value}")
        return
    run.mkdir(parents=True, exist_ok=True)
    facts = {"versions": versions(), "git_commit": git_commit(), **facts}
    write_atomically(record, json.dumps({"config": config, **facts}, indent=2) + "\n")


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def git_commit() -> str | None:
    """The commit of this checkout, or None outside of one."""
    here = Path(__file__).resolve().parent
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------------------------
# samples.jsonl of an evaluation: a line that pins the regime, then one line for every sample, written as soon as it is
# there. An evaluation of hours can be killed at any moment: what is in the file counts, what is missing is sampled.


@dataclass(frozen=True)
class Sample:
    """One sampled solution, as it is written to samples.jsonl."""

    problem: int  # index in the benchmark
    sample: int  # 0..N-1
    seed: int
    text: str
    tokens: int
    finish_reason: str  # "eos" or "length"


def check_regime(found: dict, wanted: dict, path: Path) -> None:
    """Raise InputError, naming the field, where a file's samples come from another regime than the one asked for."""
    for name, value in wanted.items():
        hashed = wanted.get(f"{name}_sha256") is not None  # a hash says more than the name of a path
        if not hashed and found.get(name) != value:
            raise InputError(
                f"{path}: its samples have {name} {found.get(name)!r}, not {value!r}; use another --output_dir"
            )


@contextmanager
def open_samples(path: Path) -> Iterator[tuple[dict | None, list[Sample], Callable[[dict], None]]]:
    """Yield the regime (None in a new file), the samples, and a function that appends a line.

    A last line without its end was torn by a crash: it is cut off, and its sample is missing. Raises InputError for a
    damaged line elsewhere and for a file that another process is writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another evaluation is writing to it") from None
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
        header, samples = None, []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    header = row["regime"]
                else:
                    samples.append(Sample(**row))
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}, line {number}: not a line of a sample file") from None

        def append(row: dict) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        yield header, samples, append


def weights_digest(directory: Path) -> str:
    """SHA-256 of a directory's weights; for an adapter also of its settings (rank, alpha)."""
    total = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("adapter_config.json")]):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
