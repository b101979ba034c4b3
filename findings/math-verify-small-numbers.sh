#!/usr/bin/env bash
# Guess: math-verify compares small numbers as it does large ones: exactly, or to so many significant digits, so that
# 6.63 \times 10^{-34} is not 1.6 \times 10^{-19}, and 0.0000004 is neither 0.0000001 nor one in 13,983,816.
# True (math-verify 0.9.0, latex2sympy2_extended 1.11.0): where one side is a decimal, both are compared to six places
# behind the point: all that is below .0000005 is one number, and 0.0 is the same. Where a side is a product, a power or
# a root, all that is below 1e-16 is: Planck's constant equals the charge of an electron, with either sign, e^{-40}
# equals e^{-50}, and \frac{\sqrt{2}}{10^{20}} equals \frac{\sqrt{3}}{10^{20}}. Two whole numbers or two fractions
# are compared exactly, however small, and large numbers are kept apart.
# Why: sympy_numeric_eq in math_verify/grader.py rounds both sides to float_rounding = 6 decimal places, an absolute
# number of them, where one is a Float. Where neither is a plain number (6.63/10**34 is a product) it evaluates the
# difference with chop=True, for which sympy drops what is small beside 1, not beside the two numbers.
# Bites: rewards and scores for answers in scientific notation, as physics and chemistry have them (SciBench,
# OlympiadBench), and for small probabilities written as decimals. A wrong exponent or sign earns 1, and a grader that
# says so of nearly every answer to a problem teaches nothing there. A larger float_rounding helps the decimals only.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check math-verify==0.9.0 latex2sympy2-extended==1.11.0 \
    antlr4-python3-runtime==4.13.2 sympy==1.14.0
cat > seen.py <<'PY'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"), "latex2sympy2-extended", version("latex2sympy2-extended"))
PAIRS = [  # gold, answer, equal by math-verify
    (r"6.63 \times 10^{-34}", r"6.63 \times 10^{-34}", True),
    (r"6.63 \times 10^{-34}", r"1.6 \times 10^{-19}", True),
    (r"1.6 \times 10^{-19}", r"-1.6 \times 10^{-19}", True),
    (r"9.11 \times 10^{-31}", r"1.67 \times 10^{-27}", True),
    ("e^{-40}", "e^{-50}", True),
    (r"\frac{\sqrt{2}}{10^{20}}", r"\frac{\sqrt{3}}{10^{20}}", True),
    (r"3.5 \times 10^{-15}", r"1.5 \times 10^{-15}", False),
    (r"2.5 \times 10^{-7}", r"2.5 \times 10^{-8}", False),
    ("0.0000004", "0.0000001", True),
    ("4.0E-7", "1.0E-9", True),
    ("0.0000004", "0.0", True),
    (r"\frac{1}{13983816}", "0.0000004", True),
    (r"\frac{1}{13983816}", "0.0", True),
    (r"\frac{1}{13983816}", r"\frac{1}{2500000}", False),
    (r"\frac{1}{13983816}", "0", False),
    ("1000000.1", "1000000.2", False),
    (r"6.02 \times 10^{23}", r"6.02 \times 10^{22}", False),
]
for gold, answer, expected in PAIRS:
    a, b = parse(f"${gold}$"), parse(f"${answer}$")
    seen = [verify(a, b), verify(b, a)]
    print(f"seen: {gold:25} and {answer:25} equal: {seen[0]!s:5}  read as {a[0]} and {b[0]}")
    assert seen == [expected] * 2
a, b = parse("$0.0000004$"), parse("$0.0000001$")
c, d = parse(r"$6.63 \times 10^{-34}$"), parse(r"$1.6 \times 10^{-19}$")
finer = verify(a, b, float_rounding=12), verify(c, d, float_rounding=40)
print("seen: with more decimal places:", finer)
assert finer == (False, True)
PY
v/bin/python seen.py
