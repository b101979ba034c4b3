#!/usr/bin/env bash
# Guess: R and r are two unknowns, so \pi(R^2-r^2) is 0 only where R = r, and A+a is no other way to write 2a.
# True (math-verify 0.9.0): a letter's size is dropped. \pi(R^2-r^2) is verified as 0, A+a as 2a, and N-n as 0; the tree
# that it parses holds the small letter alone. Where only one of the two sizes occurs, a wrong size passes as right, too.
# Why: latex2sympy2_extended.symbols.get_symbol makes every letter small before it makes a sympy Symbol of it, since
# `lowercase_symbols` of that package's ConversionConfig is on by default and math_verify.parse cannot be told otherwise.
# Bites: whoever rewards or scores answers with letters: rings and annuli (R, r), triangles (angle A, side a), sums
# (N, n). A reward of 1 goes to an answer that is wrong, and majority votes join two clusters.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check math-verify==0.9.0 latex2sympy2-extended==1.11.0
cat > seen.py <<'PY'
import importlib.metadata

from math_verify import parse, verify

print("math-verify", importlib.metadata.version("math-verify"))
for gold, answer in [
    (r"$\pi(R^2-r^2)$", "$0$"),
    ("$2a$", "$A+a$"),
    ("$N-n$", "$0$"),
    (r"$\frac{R}{r}$", "$1$"),
]:
    found = verify(parse(gold), parse(answer))
    print(f"seen: gold {gold:16} answer {answer:8} verified {found}; the gold is read as {parse(gold)[0]}")
    assert found is True
PY
v/bin/python seen.py
