"""The process in which runtime/grading.py compares LaTeX answers: JSON pairs on stdin, `true` or `false` on stdout.

    python runtime/grading_worker.py SECONDS BYTES

math-verify reads numbers through sympy's parser, which compiles them as Python. So this process refuses to compile
anything that is not a plain number, and to start processes, open sockets or write files. It loads neither torch nor any
other file of the project, so that a killed one is replaced in about a second.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys

# What sympy's parser may compile: its own namespace and a number. Everything else would be the model's text as code.
NUMBER_SOURCE = re.compile(r"\s*(from sympy import \*|(Integer|Float|Rational) ?\( ?'?[\d.eE+-]{0,5000}'? ?\))\s*")
REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "tempfile.", "urllib.", "webbrowser.")
GAP = (
    1e-4  # of two constants that may be one: math-verify compares six digits behind the point, so also 1e-20 and 1e-21
)
HARMLESS = ("os.listdir", "os.scandir")  # the import system's


def refuse(event: str, arguments: tuple) -> None:
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


def far_apart(x: object, y: object) -> bool:
    """Whether two sympy expressions are constants of different size: |x - y| > GAP max(|x|, |y|)."""
    if not (getattr(x, "is_number", False) and getattr(y, "is_number", False)):
        return False
    p, q = x.evalf(30), y.evalf(30)
    return bool(abs(p - q) > GAP * max(abs(p), abs(q)))


def serve(seconds: float, memory_bytes: int) -> None:
    """Answer JSON pairs from stdin with true or false until it closes. SIGALRM's default action ends a comparison."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may look like a reply
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # math-verify warns that its own time limits are off; this process has its own

    def parsed(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)

    def same(a: str, b: str) -> bool:
        x, y = parsed(a), parsed(b)
        equal = verify(x, y, timeout_seconds=None) or verify(y, x, timeout_seconds=None)
        return equal and not far_apart(x[0], y[0])

    same("\\frac{1}{2}", "\\sqrt{x} + 0.5")  # loads what sympy imports late, before the hook forbids it
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.addaudithook(refuse)
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
    serve(float(sys.argv[1]), int(float(sys.argv[2])))
