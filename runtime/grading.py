"""Graders decide whether two answers are the same, without trusting what a model wrote.

`exact` reads numbers, tuples, sets, intervals and words (runtime/answers.py). `math-verify` (optional package) is asked
about the formulas that this leaves open: it knows algebra. It runs in a process of its own (runtime/grading_worker.py)
with a limit on time and memory, killed where it passes one and replaced.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from errors import InputError
from runtime.answer_text import normalise_answer
from runtime.answers import needs_algebra, same_answer
from runtime.arithmetic import parse_number

__all__ = [
    "ExactGrader",
    "Grader",
    "MathVerifyGrader",
    "answers_match",
    "make_grader",
    "normalise_answer",
    "parse_number",
]

SECONDS_PER_COMPARISON = 10.0  # math-verify's own default is 5 for the parsing and 5 for the comparison
MEMORY_BYTES = 2 * 2**30
WORKER = Path(__file__).resolve().parent / "grading_worker.py"
GRADERS = ("auto", "exact", "math-verify")


def answers_match(given: str | None, gold: str | None) -> bool:
    """Whether two answers are the same as far as arithmetic and form decide it. Symmetric; None never matches."""
    return given is not None and gold is not None and same_answer(given, gold)


class ExactGrader:
    """Arithmetic and form only. Of two formulas, only equal spellings are equal: it undercounts LaTeX answers."""

    name, version = "exact", "2"
    asked = stopped = 0  # as MathVerifyGrader's

    def __init__(self, note: str = "") -> None:
        self.note = note  # what a script prints before it grades

    def match(self, a: str | None, b: str | None) -> bool:
        return answers_match(a, b)

    def close(self) -> None:
        pass


class MathVerifyGrader:
    """Exact grader first, then math-verify in both directions in the worker. Symmetric; None matches nothing.

    asked    distinct comparisons that arithmetic and form left open, so that math-verify was asked
    stopped  comparisons that were killed at a limit: they count as not equal
    """

    name, note = "math-verify", ""

    def __init__(self, seconds: float = SECONDS_PER_COMPARISON, memory_bytes: int = MEMORY_BYTES) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise InputError(
                "--grader math-verify: grading LaTeX needs `pip install math-verify`; "
                "--grader exact does without it and undercounts LaTeX answers"
            )
        self.version = importlib.metadata.version("math-verify")
        self.limits = (seconds, memory_bytes)
        self.asked = self.stopped = 0
        self._known: dict[tuple[str, str], bool] = {}
        self._worker: subprocess.Popen | None = None

    def match(self, a: str | None, b: str | None) -> bool:
        if a is None or b is None:
            return False
        pair = (min(a, b), max(a, b))
        if pair not in self._known:
            self._known[pair] = self._decide(pair)
        return self._known[pair]

    def _decide(self, pair: tuple[str, str]) -> bool:
        questions, stopped_before = 0, self.stopped

        def ask(a: str, b: str) -> bool:
            nonlocal questions
            questions += 1
            return self.stopped == stopped_before and self._ask(a, b)  # one stop ends the comparison

        verdict = same_answer(*pair, ask)
        self.asked += questions > 0
        return verdict

    def _ask(self, a: str, b: str) -> bool:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            self._start()
        try:
            self._worker.stdin.write(json.dumps((a, b)) + "\n")
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
                "--grader math-verify: its worker does not start; `python runtime/grading_worker.py 10 2e9` shows why"
            )

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.stdout.close()
            self._worker.wait()
            self._worker = None


Grader = ExactGrader | MathVerifyGrader


def make_grader(name: str, golds: list[str]) -> Grader:
    """The grader of `--grader name`. `auto` is math-verify wherever it is installed.

    Without it, `auto` is an InputError where a gold answer is a formula, else the exact grader with a note.
    """
    if name not in GRADERS:
        raise InputError(f"--grader {name}: choose one of {', '.join(GRADERS)}")
    if name == "exact":
        return ExactGrader()
    if name == "math-verify" or importlib.util.find_spec("math_verify") or any(map(needs_algebra, golds)):
        return MathVerifyGrader()
    return ExactGrader(
        "math-verify is not installed: a right answer that is boxed as a formula may be missed "
        "(`pip install math-verify` to grade these too)"
    )
