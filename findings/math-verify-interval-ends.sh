#!/usr/bin/env bash
# Guess: the interval (1, 2) and the set {1, 2} are two answers: one to (x-1)(x-2) < 0, the other to (x-1)(x-2) = 0.
# True (math-verify 0.9.0, latex2sympy2_extended 1.11.0): an open interval equals the list of its two ends. Where the
# reference is (1,2), x \in (1,2) or 1 < x < 2, a box with 1,2 or x=1, x=2 or \{1,2\} is right, and so are two boxes,
# one for each root. Where the roots are asked for, (1,2) and x \in (1,2) are right. With a closed end, as in [1,2), the
# ends are wrong, as they should be. A point is ordered as it was written: for (3,5), 3,5 and x=3, y=5 pass, 5,3 does
# not. The points (2,1) and (1,2) both pass for \{1,2\}, but where (2,1) is asked for \{1,2\} is wrong, \{2,1\} right.
# Why: sympy_compare_sets (math_verify/grader.py) makes a pair of an open interval's ends, since (1,2) may be a point
# that was read as an interval, and compares it with a finite set. sympy_expr_eq has made an interval of 1 < x < 2 by
# then, so that it, too, becomes a pair, and equations in a set lose their left sides.
# Bites: rewards and scores for inequalities, domains, ranges and "for which values": the ends are half of the work, and
# a model that stops at them earns 1 wherever both ends are open. (The other way round, 1 < x < 2 for \{1,2\} is wrong.)
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check math-verify==0.9.0 latex2sympy2-extended==1.11.0 \
    antlr4-python3-runtime==4.13.2 sympy==1.14.0
cat > seen.py <<'PY'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"), "latex2sympy2_extended", version("latex2sympy2_extended"))
ENDS = [r"\boxed{1,2}", r"\boxed{x=1, x=2}", r"\boxed{\{1,2\}}", r"$x=\boxed{1}$ or $x=\boxed{2}$"]


def answers(reference, texts, expected):
    gold = parse(f"${reference}$")
    for text in texts:
        read = parse("Both factors are 0 at the ends, so the answer is " + text)
        equal = verify(gold, read)
        print(f"seen: reference {reference}, read as {gold[0]}; {text}, read as {read[0]}: {equal}")
        assert equal == expected


for reference in ("(1,2)", r"x \in (1,2)", "1 < x < 2"):  # all x between the two
    answers(reference, ENDS, True)
answers(r"x \in (-3,\infty)", [r"\boxed{x=-3, x=\infty}"], True)
answers(r"\{1,2\}", [r"\boxed{(1,2)}", r"\boxed{x \in (1,2)}"], True)  # the two roots
answers(r"\{1,2\}", [r"\boxed{1 < x < 2}"], False)
for reference in ("[1,2)", "(1,2]", "[1,2]"):
    answers(reference, ENDS, False)
answers(r"(-\infty,1) \cup (2,\infty)", ENDS, False)
answers("(3,5)", [r"\boxed{3,5}", r"\boxed{x=3, y=5}"], True)  # a point
answers("(3,5)", [r"\boxed{5,3}", r"\boxed{x=5, y=3}"], False)
answers(r"\{1,2\}", [r"\boxed{(2,1)}", r"\boxed{(1,2)}"], True)
answers("(2,1)", [r"\boxed{\{1,2\}}"], False)
answers("(2,1)", [r"\boxed{\{2,1\}}"], True)
PY
v/bin/python seen.py
