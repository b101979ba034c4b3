"""samples.jsonl of an evaluation: a line that pins the regime, then one line for every sample, as soon as it is there.

An evaluation of hours can be killed at any moment: what is in the file counts, what is missing is sampled.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import InputError
from runtime.pins import difference
from runtime.ranks import gather_objects, rank, wait_for_all
from runtime.run_folder import HARMLESS, keep_traceback, locked


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


class SampleFile:
    """samples.jsonl, held by the first rank; other ranks write parts beside it, which the first one takes in.

    `header` is the regime (None in a new file) and `samples` what is there, by (seed, problem, sample). A last line
    without its end was torn by a crash: it is cut off, and its sample is missing. Raises InputError for a damaged line
    elsewhere and for a folder that another process holds or that is neither empty nor an evaluation's; a folder in
    which nothing was written is taken away again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if rank() == 0 else part_of(path, rank())
        self.header: dict | None = None
        self.samples: dict[tuple[int, int, int], Sample] = {}
        with ExitStack() as held:
            if rank() == 0:
                held.enter_context(locked(path.parent, _refusal))
                self.file = held.enter_context(path.open("a+b"))
                held.callback(self._remove_if_empty)
                self._read()
                self._take_in_parts()
            self.header, self.samples = gather_objects((self.header, self.samples))[0]
            self._is_new = self.header is None
            if rank() > 0:
                self.file = held.enter_context(self.path.open("a+b"))
                held.callback(self._remove_if_empty)
            self._held = held.pop_all()

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if rank() > 0 and isinstance(error, Exception):
            keep_traceback(error, self.path.parent)
        self._held.__exit__(kind, error, trace)

    def _remove_if_empty(self) -> None:
        if self.file.seek(0, os.SEEK_END) == 0:
            self.path.unlink(missing_ok=True)

    def begin(self, header: dict) -> None:
        """Set the regime of a new file; it is written with the first sample, so that a failed start claims nothing."""
        self.header = header if self.header is None else self.header

    def add(self, item: Sample) -> None:
        """Write a sample at once."""
        if self._is_new and rank() == 0:
            self._append({"regime": self.header})
            self._is_new = False
        self._append(asdict(item))
        self.samples[item.seed, item.problem, item.sample] = item

    def collect(self) -> None:
        """When all ranks are done: everything into the one file."""
        wait_for_all()
        if rank() == 0:
            self._take_in_parts()

    def _append(self, row: dict) -> None:
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()

    def _read(self) -> None:
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        self.file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self.header = dict(row["regime"])
                else:
                    item = Sample(**row)
                    self.samples[item.seed, item.problem, item.sample] = item
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}, line {number}: not a line of a sample file") from None

    def _take_in_parts(self) -> None:
        """Also those that a killed evaluation has left; a part without a regime beside it is of no use."""
        for part in sorted(self.path.parent.glob(part_of(self.path, "*").name)):
            lines = part.read_bytes().split(b"\n")[:-1]  # behind the last line break lies a torn line, or nothing
            for line in lines if self.header is not None else ():
                self.add(Sample(**json.loads(line)))
            part.unlink()


def part_of(path: Path, number: int | str) -> Path:
    return path.with_name(f"{path.stem}-rank{number}.jsonl")


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
    others = sorted(name for name in others if name != path.name and not name.startswith("samples-rank"))
    return f"{folder}: is not empty and holds no evaluation of ours ({others[0]} is there)" if others else None


REGIME = b'{"regime": '  # how every sample file begins
