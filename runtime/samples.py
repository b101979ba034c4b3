"""samples.jsonl of an evaluation: a line that pins the regime, then one line for every sample, as soon as it is there.

An evaluation of hours can be killed at any moment: what is in the file counts, what is missing is sampled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from problems import InputError
from runtime.pins import difference
from runtime.run_folder import HARMLESS, locked


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
        if f"{name}_pin" in wanted or f"{name}_sha256" in wanted:  # content says more than the name of a path
            continue
        if name.endswith(("_pin", "_sha256")):
            changed = difference(found.get(name), value)
            if changed is not None:
                raise InputError(f"{path}: its samples have another {name} ({changed}); use another --output_dir")
        elif found.get(name) != value:
            raise InputError(
                f"{path}: its samples have {name} {found.get(name)!r}, not {value!r}; use another --output_dir"
            )


@contextmanager
def open_samples(path: Path) -> Iterator[tuple[dict | None, list[Sample], Callable[[dict], None]]]:
    """Yield the regime (None in a new file), the samples, and a function that appends a line.

    A last line without its end was torn by a crash: it is cut off, and its sample is missing. Raises InputError for a
    damaged line elsewhere, for a file that another process is writing, and for a folder that is neither empty nor an
    evaluation's; a folder in which nothing was written is taken away again.
    """
    with locked(path.parent, _refusal), path.open("a+b") as file:
        header, samples = _read(file, path)

        def append(row: dict) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        try:
            yield header, samples, append
        finally:
            if file.seek(0, os.SEEK_END) == 0:
                path.unlink()


def _refusal(folder: Path) -> str | None:
    """Why an evaluation may not use a folder, or None."""
    path, first = folder / "samples.jsonl", b""
    if path.is_file():
        with path.open("rb") as file:
            first = file.readline()
    whole = first.endswith(b"\n")
    if first[: len(REGIME)] != (REGIME if whole else REGIME[: len(first)]):
        return f"{path}, line 1: not a line of a sample file"
    others = [] if whole or not folder.is_dir() else [p.name for p in folder.iterdir() if p.name not in HARMLESS]
    others = sorted(name for name in others if name != path.name)
    return f"{folder}: is not empty and holds no evaluation of ours ({others[0]} is there)" if others else None


REGIME = b'{"regime": '  # how every sample file begins


def _read(file: BinaryIO, path: Path) -> tuple[dict | None, list[Sample]]:
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
    return header, samples
