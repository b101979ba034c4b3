"""Ranks for tests, as torchrun starts them, forked from a process that has imported the project: no seconds a start."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120


def script(name: str, arguments: list[str]) -> None:
    """`python NAME ARGUMENTS`, from the project's folder."""
    os.chdir(ROOT)
    sys.argv = [name, *arguments]
    runpy.run_path(name, run_name="__main__")


def run_ranks(folder: Path, target: Callable, *arguments: object, ranks: int = 2) -> list[str]:
    """What `target(*arguments)` prints on each rank. Fails, with that, unless all of them end with status 0."""
    context, logs = server(), [folder / f"rank{rank}.log" for rank in range(ranks)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [(rank, ranks, port, str(logs[rank]), target, arguments) for rank in range(ranks)]
    processes = [context.Process(target=_one_rank, args=args) for args in given]
    for process in processes:
        process.start()
    end = time.monotonic() + SECONDS
    while (running := [p for p in processes if p.is_alive()]) and time.monotonic() < end:
        connection.wait([p.sentinel for p in running], timeout=1)
        if any(p.exitcode for p in processes):  # the others would wait for it
            break
    for process in processes:
        process.kill()
        process.join()
    printed = [log.read_text() if log.exists() else "" for log in logs]
    assert [p.exitcode for p in processes] == [0] * ranks, "\n".join(printed)
    return printed


def server() -> multiprocessing.context.BaseContext:
    """The process that is forked: clean, with the project's modules imported once for all tests."""
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload(["train", "diagnose"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


def _one_rank(rank: int, ranks: int, port: int, log: str, target: Callable, arguments: tuple) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    torch.set_num_threads(1)
    target(*arguments)
