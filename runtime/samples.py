"""samples.jsonl of an evaluation: a line that pins the regime, then one line for every sample, as soon as it is there.

An evaluation of hours can be killed at any moment: what is in the file counts, what is missing is sampled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from problems import InputError
from runtime.ranks import gather_objects, rank, wait_for_all


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


class SampleFile:
    """samples.jsonl, held by the first rank; other ranks write parts beside it, which the first one takes in.

    `header` is the regime (None in a new file) and `samples` what is there, by (seed, problem, sample). A last line
    without its end was torn by a crash: it is cut off, and its sample is missing. Raises InputError for a damaged line
    elsewhere and for a file that another process is writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if rank() == 0 else part_of(path, rank())
        self.header: dict | None = None
        self.samples: dict[tuple[int, int, int], Sample] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            self.file = path.open("a+b")
            self._lock()
            self._read()
            self._take_in_parts()
        self.header, self.samples = gather_objects((self.header, self.samples))[0]
        self._is_new = self.header is None
        if rank() > 0:
            self.file = self.path.open("a+b")

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def begin(self, header: dict) -> None:
        """Set the regime of a new file; it is written with the first sample, so that a failed start claims nothing."""
        self.header = self.header or header

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

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another evaluation is writing to it") from None

    def _read(self) -> None:
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        self.file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self.header = row["regime"]
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


def weights_digest(directory: Path) -> str:
    """SHA-256 of a directory's weights; for an adapter also of its settings (rank, alpha)."""
    total = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("adapter_config.json")]):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
