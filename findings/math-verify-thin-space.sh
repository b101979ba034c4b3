#!/usr/bin/env bash
# Guess: 100\,000, common LaTeX for one hundred thousand, is read as 100000 like 100,000 and 100{,}000, or not at all.
# True (math-verify 0.9.0, latex2sympy2_extended 1.11.0): spaces between groups of digits mean a product or a sum. So
# 100\,000 is 100 * 0 = 0: it is graded unequal to 100000 and EQUAL to 0; 1\,050 comes out as 51, not 1050; plain
# spaces, "\ " and \; do the same. Right answers are lost, and a reference so written accepts 0 as its answer.
# Why: the grammar of latex2sympy2_extended skips spacing commands between tokens and reads numbers side by side as an
# implicit product (000 is 0) or as a mixed number (1 and 050); its normaliser only removes commas, also as {,}.
# Bites: whoever grades answers or loads references written in the SI or ISO way, with thin spaces, as many European
# textbooks and some models write large numbers.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check "math-verify[antlr4_13_2]==0.9.0"
cat > seen.py <<'PY'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"), "latex2sympy2_extended", version("latex2sympy2_extended"))
for text, value, instead in [
    ("100,000", 100000, None),
    ("100{,}000", 100000, None),
    (r"100\,000", 100000, 0),
    (r"100\ 000", 100000, 0),
    (r"12\;000", 12000, 0),
    ("12 000", 12000, 0),
    (r"1\,050", 1050, 51),
]:
    answer = parse(rf"\boxed{{{text}}}")
    right = verify(parse(f"${value}$"), answer)
    wrong = None if instead is None else verify(parse(f"${instead}$"), answer)
    print(f"seen: {text:10} parsed as {answer[0]!s:7} equal to {value}: {right}; to {instead}: {wrong}")
    assert right is (instead is None), text
    assert wrong is (None if instead is None else True), text
PY
v/bin/python seen.py
