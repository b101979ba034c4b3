"""Grading: whether two answers are the same, exactly or by math-verify in a process of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

from problems import InputError

_NUMBER = re.compile(r"[+-]?(\d{1,400}(\.\d{0,400})?|\.\d{1,400})")
_FRACTION = re.compile(r"([+-]?)\\?[dt]?frac\{([+-]?\d{1,400})\}\{([+-]?\d{1,400})\}|([+-]?\d{1,400})/(\d{1,400})")


def normalise_answer(answer: str) -> str:
    """Strip what carries no meaning: spaces, dollar signs, `\\left`, `\\text{}`, a final full stop, percent signs."""
    text = answer.strip().rstrip(".").replace("$", "").replace("\\!", "").replace("\\,", "").replace("\\ ", " ")
    text = text.replace("\\left", "").replace("\\right", "").replace("\\%", "").replace("%", "")
    text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace("^\\circ", "").replace("^{\\circ}", "")
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    return re.sub(r"\s+", "", text)


def parse_number(answer: str) -> Fraction | None:
    """The exact value of an integer, a decimal or a fraction in normalised text; None for anything else."""
    if _NUMBER.fullmatch(answer):
        return Fraction(answer.rstrip(".") if answer.endswith(".") else answer)
    match = _FRACTION.fullmatch(answer)
    if match is None:
        return None
    sign, top, bottom, plain_top, plain_bottom = match.groups()
    numerator, denominator = int(top or plain_top), int(bottom or plain_bottom)
    if denominator == 0:
        return None
    return Fraction(-numerator if sign == "-" else numerator, denominator)


def answers_match(given: str | None, gold: str) -> bool:
    """Whether two answers are the same string or number after normalisation. Symmetric; None never matches."""
    if given is None:
        return False
    left, right = normalise_answer(given), normalise_answer(gold)
    if left == right:
        return left != ""
    a, b = parse_number(left), parse_number(right)
    return a is not None and a == b


# ---------------------------------------------------------------------------------------------------------------
# Graders decide whether two answers are the same, without trusting what a model wrote. `exact` compares strings and
# numbers. `math-verify` (optional package) also knows LaTeX: sets, intervals, matrices, algebra. It runs in a process
# of its own (runtime/grading_worker.py) with a limit on time and memory, killed where it passes one and replaced.


SECONDS_PER_COMPARISON = 10.0  # math-verify's own default is 5 for the parsing and 5 for the comparison
MEMORY_BYTES = 2 * 2**30
WORKER = Path(__file__).resolve().parent / "grading_worker.py"


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
    """`auto` is math-verify for benchmarks whose answers are LaTeX, where its absence is an error, else exact."""
    if name not in ("auto", "exact", "math-verify"):
        raise InputError(f"--grader {name}: choose one of auto, exact, math-verify")
    latex = any(parse_number(normalise_answer(gold)) is None for gold in golds)
    if name == "exact" or (name == "auto" and not latex):
        return ExactGrader()
    return MathVerifyGrader()
