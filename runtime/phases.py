"""Phases: work in jobs whose rows go to a file as soon as they are there, shared over ranks, taken up where it stopped.

A job's row must depend on the job alone, not on what it is batched with; then a run of several ranks, or one that was
interrupted, leaves the rows of an unbroken run of one process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from errors import InputError
from runtime.ranks import gather_objects, hide_bar, rank, say, world_size
from runtime.run_folder import write_atomically


def run_phase(
    path: Path, fields: tuple[str, ...], jobs: list[tuple], work: Callable[[list[tuple]], list[dict]], batch_size: int
) -> list[dict]:
    """The rows of a phase in the order of its jobs, on all ranks: those in its file, and the others, computed now.

    A job is the tuple of the values that its row has under `fields`; `work` turns jobs into one row each. In each round
    every rank works on at most `batch_size` jobs, and the first rank appends all rows to the file.
    """
    started = time.perf_counter()
    done = {
        tuple(row[name] for name in fields): row for row in gather_objects(read_rows(path) if rank() == 0 else [])[0]
    }
    left = [job for job in jobs if job not in done]
    size = batch_size * world_size()
    for start in tqdm(range(0, len(left), size), desc=path.stem, disable=hide_bar()):
        mine = left[start : start + size][rank() :: world_size()]
        try:
            rows = work(mine) if mine else []
        except torch.OutOfMemoryError:
            raise InputError(f"{path}: out of GPU memory; --resume goes on behind its rows, on a larger GPU") from None
        rows = [row for part in gather_objects(rows) for row in part]
        if rank() == 0:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        done |= {tuple(row[name] for name in fields): row for row in rows}
    seconds = time.perf_counter() - started
    say(f"{path.stem}: {len(jobs)} rows, {len(jobs) - len(left)} of them from before, {seconds:.0f} s")
    return [done[job] for job in jobs]


def read_rows(path: Path) -> list[dict]:
    """Rows of a phase's file, none if it is not there yet. A last line torn by an interruption is cut off."""
    if not path.is_file():
        return []
    *whole, torn = path.read_text(encoding="utf-8").split("\n")
    if torn:
        write_atomically(path, "".join(line + "\n" for line in whole))
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not a file of this program ({error}); remove it to repeat the phase") from None
