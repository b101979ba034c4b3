"""Graders: whether two answers are the same, decided without trusting what a model wrote.

`exact` compares strings and numbers (problems.answers_match). `math-verify` (optional package) also knows LaTeX: sets,
intervals, matrices, algebra. It runs in a process of its own, this file started as a script: a clean interpreter that
speaks JSON lines, with a limit on time and memory for every comparison, killed by the kernel where it passes one and
replaced. math-verify reads numbers through sympy's parser, which compiles them as Python; so the worker refuses to
compile anything that is not a plain number, and to start processes, open sockets or write files.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

from problems import InputError, answers_match

SECONDS_PER_COMPARISON = 10.0  # math-verify's own default is 5 for the parsing and 5 for the comparison
MEMORY_BYTES = 2 * 2**30


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
                "--grader math-verify: grading LaTeX needs `pip install 'math-verify[antlr4_13_2]'`; "
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
            self._start()
        worker = self._worker
        worker.stdin.write(json.dumps(pair) + "\n")
        worker.stdin.flush()
        reply = worker.stdout.readline()
        if reply not in ("true\n", "false\n"):
            self.stopped += 1
            self.close()
        return reply == "true\n"

    def _start(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), *map(str, self.limits)]
        quiet = {"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self._worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet
        )
        if self._worker.stdout.readline() != "ready\n":
            raise InputError(
                "--grader math-verify: its worker does not start; run `python grading.py 10 2e9` to see why"
            )

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def make_grader(name: str, latex: bool = False) -> ExactGrader | MathVerifyGrader:
    """`auto` is math-verify for benchmarks whose answers are LaTeX, where its absence is an error, else exact."""
    if name not in ("auto", "exact", "math-verify"):
        raise InputError(f"--grader {name}: choose one of auto, exact, math-verify")
    if name == "exact" or (name == "auto" and not latex):
        return ExactGrader()
    return MathVerifyGrader()


# ---------------------------------------------------------------------------------------------------------------
# The worker


# What sympy's parser may compile: its own namespace and a number. Everything else would be the model's text as code.
NUMBER_SOURCE = re.compile(r"\s*(from sympy import \*|(Integer|Float|Rational) ?\( ?'?[\d.eE+-]{0,5000}'? ?\))\s*")
REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "tempfile.", "urllib.", "webbrowser.")
HARMLESS = ("os.listdir", "os.scandir")  # the import system's


def _refuse(event: str, arguments: tuple) -> None:
    """Audit hook: raises for what no comparison of two answers needs."""
    if event == "compile":
        source, filename = arguments
        text = source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source)
        if str(filename).startswith("<") and not NUMBER_SOURCE.fullmatch(text):
            raise PermissionError(f"refused to compile {text[:80]!r}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError(f"refused to write {arguments[0]!r}")
    elif event.startswith(REFUSED) and event not in HARMLESS:
        raise PermissionError(f"refused {event}")


def _serve(seconds: float, memory_bytes: int) -> None:
    """Answer JSON pairs from stdin with true or false until it closes. SIGALRM's default action ends a comparison."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may look like a reply
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # math-verify warns that its own time limits are off; this process has its own

    def parsed(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)

    def same(a: str, b: str) -> bool:
        x, y = parsed(a), parsed(b)
        return verify(x, y, timeout_seconds=None) or verify(y, x, timeout_seconds=None)

    same("\\frac{1}{2}", "\\sqrt{x} + 0.5")  # loads what sympy imports late, before the hook forbids it
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.addaudithook(_refuse)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = same(*json.loads(line))
        except MemoryError:
            sys.exit(1)  # the interpreter may be damaged: leave it to a fresh one
        except Exception:  # whatever hostile text does to the parser: not equal
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("true" if verdict else "false", file=replies, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(float(sys.argv[2])))
