"""Graders: whether two answers are the same, decided without trusting what a model wrote.

`exact` compares strings and numbers (problems.answers_match). `math-verify` (optional package) also knows LaTeX: sets,
intervals, matrices, algebra. It runs in a process of its own (grading_worker.py), with a limit on time and memory for
every comparison, killed where it passes one and replaced.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from problems import InputError, answers_match

SECONDS_PER_COMPARISON = 10.0  # math-verify's own default is 5 for the parsing and 5 for the comparison
MEMORY_BYTES = 2 * 2**30
WORKER = Path(__file__).resolve().with_name("grading_worker.py")


class ExactGrader:
    """Strings and numbers only. On LaTeX answers it undercounts."""

    name, version = "exact", "1"
    stopped = 0  # comparisons that were killed at a limit

    def match(self, a: str | None, b: str | None) -> bool:
        return a is not None and b is not None and answers_match(a, b)

    def close(self) -> None:
        pass


class MathVerifyGrader:
    """Exact grader first, then math-verify in both directions in the worker. Symmetric; None matches nothing.

    A comparison that is killed at its limit counts as not equal and adds to `stopped`.
    """

    name = "math-verify"

    def __init__(self, seconds: float = SECONDS_PER_COMPARISON, memory_bytes: int = MEMORY_BYTES) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise InputError(
                "--grader math-verify: grading LaTeX needs `pip install math-verify`; "
                "--grader exact does without it and undercounts LaTeX answers"
            )
        self.version = importlib.metadata.version("math-verify")
        self.limits = (seconds, memory_bytes)
        self.stopped = 0
        self._known: dict[tuple[str, str], bool] = {}
        self._worker: subprocess.Popen | None = None

    def match(self, a: str | None, b: str | None) -> bool:
        if a is None or b is None:
            return False
        if answers_match(a, b):
            return True
        pair = (min(a, b), max(a, b))
        if pair not in self._known:
            self._known[pair] = self._ask(pair)
        return self._known[pair]

    def _ask(self, pair: tuple[str, str]) -> bool:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            self._start()
        try:
            self._worker.stdin.write(json.dumps(pair) + "\n")
            self._worker.stdin.flush()
            reply = self._worker.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply not in ("true\n", "false\n"):
            self.stopped += 1
            self.close()
        return reply == "true\n"

    def _start(self) -> None:
        command = [sys.executable, str(WORKER), *map(str, self.limits)]
        fixed = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self._worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | fixed,
        )
        if self._worker.stdout.readline() != "ready\n":
            raise InputError(
                "--grader math-verify: its worker does not start; run `python grading_worker.py 10 2e9` to see why"
            )

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.stdout.close()
            self._worker.wait()
            self._worker = None


def make_grader(name: str, latex: bool = False) -> ExactGrader | MathVerifyGrader:
    """`auto` is math-verify for benchmarks whose answers are LaTeX, where its absence is an error, else exact."""
    if name not in ("auto", "exact", "math-verify"):
        raise InputError(f"--grader {name}: choose one of auto, exact, math-verify")
    if name == "exact" or (name == "auto" and not latex):
        return ExactGrader()
    return MathVerifyGrader()
