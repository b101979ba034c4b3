"""The process in which grading.py compares LaTeX answers: JSON pairs on stdin, a word for each on stdout.

    python runtime/grading_worker.py SECONDS BYTES

`true`, `false`, or `refused` where false was found after something had been refused. math-verify reads numbers through
sympy's parser, which compiles them as Python. So this process refuses to compile anything that is not a plain number or
sympy's own monomial arithmetic, and to start processes, open sockets or write files. It loads neither torch nor any
other file of the project, so that a killed one is replaced in about a second.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

# What may be compiled. sympy's parser: its own namespace and a number. sympy.polys (MonomialOps): arithmetic on tuples
# that it generates, of no other names than a0, b0, r0, A, B, k. lambdify, for infinite sums: names of libraries that
# are loaded already, and arithmetic on one letter. Everything else would be the model's text as code.
NUMBER = r"(?:Integer|Float|Rational) ?\( ?'?[\d.eE+-]{0,5000}'? ?\)"
ALLOWED_SOURCE = re.compile(
    rf"\s*(?:from (?:math|mpmath|sympy(?:\.[a-z]+)*) import [\w*, ]+|{NUMBER}(?:/{NUMBER})?)\s*"
    r"|def monomial_[a-z]+\((?:[ABk]|, )+\):\n(?:return|if|else|None|[ABabkr\d +*<>=(),:\n-])*"
    r"|def _lambdifygenerated\(([a-zA-Z])\):\n *return (?:\1|[\d ()+*/-])*\n"
)
REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "tempfile.", "urllib.", "webbrowser.")
# Of two constants that may be one: math-verify compares six digits behind the point, so also 1e-20 and 1e-21
GAP = 1e-4
HARMLESS = ("os.listdir", "os.scandir")  # the import system's
refusals: list[str] = []


def refuse(event: str, arguments: tuple) -> None:
    """Audit hook: raises for what no comparison of two answers needs."""
    reason = ""
    if event == "compile" and str(arguments[1]).startswith("<"):
        text = arguments[0].decode("utf-8", "replace") if isinstance(arguments[0], bytes) else str(arguments[0])
        if text.startswith(("import scipy", "import numpy")):
            raise ImportError("lambdify does without")
        if not ALLOWED_SOURCE.fullmatch(text):
            reason = f"to compile {text[:80]!r}"
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        reason = f"to write {arguments[0]!r}"
    elif event.startswith(REFUSED) and event not in HARMLESS:
        reason = event
    if reason:
        refusals.append(reason)
        raise PermissionError(f"refused {reason}")


def far_apart(x: object, y: object) -> bool:
    """Whether two sympy expressions are constants of different size: |x - y| > GAP max(|x|, |y|)."""
    if not all(getattr(z, "is_number", False) for z in (x, y)):
        return False
    p, q = x.doit().evalf(30), y.doit().evalf(30)
    return bool(abs(p - q) > GAP * max(abs(p), abs(q)))


def make_comparison():
    """The comparison of two LaTeX answers by math-verify, in both directions."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, I, Symbol

    # Units are off already (grading.split_unit); math-verify would take the c of `\sqrt{2}c` for one.
    config = [LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, nits=True))]

    def meant(reading):
        """Where math-verify sees an i, all letters are complex and i is a letter: all are real but i."""
        if isinstance(reading, str):
            return reading
        letters = {s for s in reading.atoms(Symbol) if s.name == "i" or not s.is_real}
        bound = letters - reading.free_symbols  # \sum_{i=1}^n
        values = {s: I if s.name == "i" and s not in bound else Symbol(s.name, real=True) for s in letters}
        if values and isinstance(reading, Eq):  # z = 1 + i is no false statement about a real z
            return Eq(reading.lhs.xreplace(values), reading.rhs.xreplace(values), evaluate=False)
        return reading.xreplace(values)

    def same(*answers: str) -> bool:
        boxes = [f"\\boxed{{{answer}}}" for answer in answers]
        x, y = ([*map(meant, parse(box, extraction_config=config, parsing_timeout=None))] for box in boxes)
        equal = verify(x, y, timeout_seconds=None) or verify(y, x, timeout_seconds=None)
        return equal and not far_apart(x[0], y[0])

    return same


def serve(seconds: float, memory_bytes: int) -> None:
    """Answer JSON pairs from stdin until it closes. SIGPROF's default action ends a comparison at its limit."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may look like a reply
    same = make_comparison()
    logging.disable()  # math-verify warns that its own time limits are off; this process has its own
    same("\\int_0^1 x e^x + \\frac{1}{2} dx", "\\sqrt{x} + 0.5")  # loads what sympy imports late and the hook forbids
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.addaudithook(refuse)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        refusals.clear()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = same(*json.loads(line))
        except MemoryError:
            sys.exit(1)  # the interpreter may be damaged: leave it to a fresh one
        except Exception:  # whatever hostile text does to the parser: not equal
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if verdict else "refused" if refusals else "false", file=replies, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(float(sys.argv[2])))
