"""samples.jsonl of an evaluation: a line that pins the regime, then one line for every sample, as soon as it is there.

An evaluation of hours can be killed at any moment: what is in the file counts, what is missing is sampled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from problems import InputError


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
