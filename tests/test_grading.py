"""The LaTeX grader: what it accepts, and what hostile answers cannot do to it."""

import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import grading
from errors import InputError
from grading import ExactGrader, MathVerifyGrader, answers_match, make_grader
from runtime import grading_worker
from tests.test_answers import ALIKE, APART

is_missing = importlib.util.find_spec("math_verify") is None
needs_math_verify = pytest.mark.skipif(is_missing, reason="the optional package math-verify is not installed")


@pytest.fixture(scope="module")
def grader():
    grader = MathVerifyGrader(seconds=5.0)
    yield grader
    grader.close()


PAIRS = [line.split("\t") for line in Path(__file__).with_name("answer_pairs.tsv").read_text().splitlines()[1:]]


@pytest.mark.slow
@needs_math_verify
def test_pairs_labelled_by_hand(grader):
    assert [pair for pair in PAIRS if {grader.match(*pair[1:]), grader.match(*pair[:0:-1])} != {pair[0] == "="}] == []
    assert grader.stopped == grader.refused == 0


def test_form_and_arithmetic_alone_pass_no_wrong_pair():
    assert [pair for pair in PAIRS if pair[0] == "!" and answers_match(*pair[1:])] == []


# Ordinary identities, for which sympy compiles code that it generates, and four pairs that are none
IDENTITIES = [
    (r"\binom{n}{3}", r"\frac{n(n-1)(n-2)}{6}"), (r"1-\cos 2x", r"2\sin^2 x"), (r"\tan^2 x", r"\sec^2 x-1"),
    (r"\frac{a^2-b^2}{a-b}", "a+b"), (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"), (r"\gcd(12,18)", "6"),
    (r"\frac{x^3+y^3}{x+y}", "x^2-xy+y^2"), (r"\frac{n!}{(n-2)!}", "n^2-n"), (r"\int_0^1 x^2 dx", r"\frac{1}{3}"),
    (r"\sum_{k=1}^{n} k^2", r"\frac{n(n+1)(2n+1)}{6}"), (r"\frac{1}{1+\sqrt{x}}", r"\frac{1-\sqrt{x}}{1-x}"),
    (r"\cosh^2 x-\sinh^2 x", "1"), (r"\sin x\cos y+\cos x\sin y", r"\sin(x+y)"), (r"\max(2,5)", "5"),
    (r"\frac{(n+1)!}{n!}", "n+1"), (r"\frac{2}{x^2-1}+\frac{1}{x+1}", r"\frac{1}{x-1}"),
    (r"\sum_{k=0}^{n} 2^k", "2^{n+1}-1"), (r"\sum_{n=1}^{\infty}\frac{1}{n^2}", r"\frac{\pi^2}{6}"),
]  # fmt: skip
NO_IDENTITIES = [
    ("(x+y)^2", "x^2+y^2"), ("(a+b+c)^2", "a^2+b^2+c^2"), (r"\binom{n}{2}", r"\binom{n}{3}"), (r"\cos 2x", r"2\cos x"),
]  # fmt: skip


@pytest.mark.slow
@needs_math_verify
def test_the_sandbox_changes_no_verdict(grader):
    free = grading_worker.make_comparison()
    for a, b in IDENTITIES + NO_IDENTITIES:
        right = (a, b) in IDENTITIES
        assert (grader._ask(a, b), free(a, b)) == (str(right).lower(), right), (a, b)


@pytest.mark.slow
@needs_math_verify
def test_refusals_are_counted(monkeypatch, tmp_path):
    """One that decided: math-verify swallows the error of its library, and calls the two not equal."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import sys\nsys.path.insert(0, {str(grading.WORKER.parent)!r})\nimport re, grading_worker as worker\n"
        "worker.ALLOWED_SOURCE = re.compile('from sympy import .')\nworker.serve(5.0, int(2e9))\n"
    )
    monkeypatch.setattr(grading, "WORKER", worker)
    grader = MathVerifyGrader()
    assert not grader.match("\\sqrt{12}", "3\\sqrt{2}+1") and grader.refused == 1 and grader.stopped == 0
    assert not grader.match("a+b", "a+c") and grader.refused == 1  # it is the next one's no more
    grader.close()


@pytest.mark.slow
@pytest.mark.parametrize(("what", "reply"), [("time.sleep(1.5) or True", "true\n"), ("[0 for _ in iter(int, 1)]", "")])
def test_the_limit_is_of_processor_time(what, reply):
    """What waits is not stopped, so no verdict depends on the load of the machine; what computes is."""
    program = (
        f"import sys, time; sys.path.insert(0, {str(grading.WORKER.parent)!r}); import grading_worker as worker\n"
        f"worker.make_comparison = lambda: lambda a, b: a == 'x' and ({what})\nworker.serve(0.5, int(2e9))"
    )
    run = subprocess.run([sys.executable, "-c", program], input='["x", "y"]\n', capture_output=True, text=True)
    assert run.stdout == "ready\n" + reply


@pytest.mark.parametrize("gold", ["proof", "NotFound", "\\text{proof}", "5+5=10\n#### 10", "?"])
def test_golds_that_no_answer_matches_are_told(gold):
    note = make_grader("exact", ["5", gold]).note
    assert note.startswith("1 of 2 gold answers") and "\n" not in note


@needs_math_verify
def test_math_verify_changes_no_verdict_of_the_tables(grader):
    assert [pair for pair in ALIKE if not grader.match(*pair)] == []
    assert [pair for pair in APART if grader.match(*pair)] == []


@needs_math_verify
def test_math_verify_is_asked_only_about_formulas(grader):
    idle, before = MathVerifyGrader(), grader.asked
    pairs = [("5", "6"), ("5", "5.0"), ("(1,2)", "(2,1)"), ("2_5", "2_6"), ("\\sqrt{2}", "$\\sqrt2$"), ("a b", None)]
    for pair in pairs:
        idle.match(*pair)
    assert idle.asked == 0 and idle._worker is None
    assert grader.match("(\\sqrt{4},\\sqrt{9})", "(2,3)") and grader.asked == before + 1
    assert grader.match("(2,3)", "(\\sqrt{4},\\sqrt{9})") and grader.asked == before + 1  # known, also turned round


def test_exact_undercounts_latex_and_none_matches_nothing():
    exact = ExactGrader()
    assert exact.match("0.5", "\\frac{1}{2}") and not exact.match("\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt{3}}{3}")
    assert not exact.match(None, "1") and not exact.match("1", None) and not exact.match(None, None)
    assert not answers_match(None, "None") and exact.asked == exact.stopped == 0
    exact.close()


def test_the_choice_of_grader(monkeypatch):
    with pytest.raises(InputError, match="--grader sympy"):
        make_grader("sympy", ["5"])
    assert make_grader("exact", ["proof"]).note != make_grader("exact", ["\\sqrt{2}"]).note == ExactGrader.note == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plain = make_grader("auto", ["5", "1,000", "\\text{east}"])
    assert plain.name == "exact" and "pip install math-verify" in plain.note and "\n" not in plain.note
    for name, golds in (("auto", ["5", "\\sqrt{2}"]), ("math-verify", ["5"])):
        with pytest.raises(InputError, match=r"pip install .*--grader exact") as caught:
            make_grader(name, golds)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@needs_math_verify
def test_a_worker_that_is_stopped_or_dies_or_is_deaf_is_replaced():
    grader, start = make_grader("auto", ["5"]), time.monotonic()
    assert grader.name == "math-verify" and grader.note == "" and grader.version[0].isdigit()
    grader.limits = (1.0, 2**29)
    tower, towers = "9^{9^{9^{9^{9}}}}", ",".join(f"9^{{9^{{9^{{9^{{{top}}}}}}}}}" for top in range(5, 9))
    assert not grader.match(tower, "1") and grader.stopped == grader.asked == 1 and time.monotonic() - start < 60
    assert not grader.match("1", tower) and grader.stopped == 1  # known, also the other way round
    assert not grader.match(tower, "2") and grader.asked == 1  # of a vote: what was stopped is not asked about again
    assert not grader.match(towers, "\\sqrt{2},\\sqrt{3},\\sqrt{5},\\sqrt{7}")
    assert grader.stopped == grader.asked == 2  # one stop ends a comparison of many parts
    assert grader.match("\\frac{2}{\\sqrt{2}}", "\\sqrt{2}") and grader.asked == 3
    assert resource.prlimit(grader._worker.pid, resource.RLIMIT_AS) == (2**29, 2**29)
    os.kill(grader._worker.pid, signal.SIGKILL)
    grader._worker.wait()
    assert grader.match("\\sqrt{18}", "3\\sqrt{2}") and grader.stopped == 2
    grader.close()
    program = "import os, time; os.close(0); print('closed', flush=True); time.sleep(60)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    grader._worker = deaf = subprocess.Popen([sys.executable, "-c", program], **pipes)
    assert deaf.stdout.readline() == "closed\n"
    assert not grader.match("\\sqrt{8}", "2\\sqrt{2}") and grader.stopped == 3 and deaf.poll() is not None
    assert not grader.match("2^{2^{40}}", "1")  # beyond the limit of memory
    assert grader.match("\\sqrt{50}", "5\\sqrt{2}")
    grader.close()


MONOMIAL = "def monomial_div(A, B):\n    (a0,) = A\n    (b0,) = B\n    r0 = a0 - b0\n    if r0 < 0: return None\n"
LAMBDA = "def _lambdifygenerated(n):\n    return (n + 1)**2\n"
NUMBERS = ["Integer (35 )", "Float ('3.5' )", "Integer (1 )", "Integer (3 )/Integer (2 )"]
CODE = ["__import__('os').system('id')", "Integer (3 ).__class__", "from os import *", "import scipy; import numpy",
        MONOMIAL + "    exec(A)\n", MONOMIAL.replace("a0 - b0", "a0.b0"), LAMBDA.replace("n + 1", "n.n"),
        LAMBDA + "    exec(n)\n", LAMBDA.replace("n + 1", "id")]  # fmt: skip
EVENTS = [("os.system", ("id",)), ("subprocess.Popen", ("id", (), None, None)), ("os.remove", ("/tmp/x", -1)),
          ("socket.connect", (None, ("127.0.0.1", 80))), ("open", ("/tmp/x", "w", os.O_WRONLY | os.O_CREAT)),
          *[("compile", (text.encode(), "<string>")) for text in CODE]]  # fmt: skip


@pytest.mark.parametrize("source", [MONOMIAL, LAMBDA, "from sympy import *", "from mpmath import *", *NUMBERS])
def test_numbers_may_be_compiled(source):
    for text in (source, source.encode()):
        grading_worker.refuse("compile", (text, "<string>"))


@pytest.mark.parametrize(("event", "arguments"), EVENTS)
def test_everything_else_is_refused(event, arguments):
    with pytest.raises((PermissionError, ImportError)):
        grading_worker.refuse(event, arguments)


def hostile_answers(count: int, seed: int, canary: str):
    """Seeded answers that try to break a grader; those with code would create the file `canary`."""
    draw = random.Random(seed)
    pieces = ["\\frac{", "\\sqrt{", "\\left(", "\\right)", "\\text{", "\\begin{pmatrix}", "\\boxed{", "\\infty"]
    pieces += ["\\int", "\\sum", "\\cup", "\\pi", "\\\\", *"{}^_x1+&=,%$ei!/."]
    code = [
        "__import__('os').system('touch CANARY')", "open('CANARY','w').write('1')", "';open('CANARY','w');'",
        "\\text{exec(\"open('CANARY','w')\")}", "().__class__.__base__.__subclasses__()[0]('CANARY')",
        "\\write18{touch CANARY}", "$(touch CANARY)", "Integer(__import__('os').system('touch CANARY'))",
        "lambda: open('CANARY','w')", "1__import__('os').system('touch CANARY')",
    ]  # fmt: skip
    control = [chr(number) for number in (0, 1, 7, 8, 10, 13, 27, 127, 0x2028, 0x202E, 0xD800)]

    depth = draw.randint(2, 400)
    kinds = {
        "braces": lambda: "".join(draw.choice("{}\\x1") for _ in range(draw.randint(1, 60))),
        "latex": lambda: "".join(draw.choice(pieces) for _ in range(draw.randint(1, 30))),
        "long": lambda: draw.choice(["1", "x", "{", "1+", "\\frac{1}{2}", " "]) * (100_000 // draw.randint(1, 6)),
        "deep": lambda: draw.choice(["(", "{", "\\sqrt{", "\\frac{1}{"]) * depth + "1" + draw.choice(")}") * depth,
        "tower": lambda: "^{".join(str(draw.randint(2, 99)) for _ in range(draw.randint(2, 6))) + "}" * 5,
        "factorial": lambda: f"{draw.randint(10, 10**9)}" + "!" * draw.randint(1, 4),
        "unicode": lambda: "".join(chr(draw.randint(1, 0xD7FF)) for _ in range(draw.randint(1, 50))),
        "control": lambda: "".join(draw.choice(control) for _ in range(20)),
        "code": lambda: draw.choice(code).replace("CANARY", canary),
    }
    weights = {"long": 1, "deep": 2, "tower": 2, "factorial": 1}  # the slow ones
    names = draw.choices(list(kinds), [weights.get(name, 20) for name in kinds], k=count)
    return [(name, kinds[name]()) for name in names]


@pytest.mark.slow
@needs_math_verify
def test_hostile_answers_neither_crash_nor_hang_nor_run(tmp_path):
    canary = tmp_path / "canary"
    grader = MathVerifyGrader(seconds=1.0)
    for _, answer in hostile_answers(60, 5, str(canary)):
        start = time.monotonic()
        assert grader.match(answer, "\\frac{\\sqrt{3}}{2}") is False
        assert time.monotonic() - start < 60
        json.dumps(answer)
    assert not canary.exists()
    assert grader.match("\\frac{2}{\\sqrt{2}}", "\\sqrt{2}")
    grader.close()
