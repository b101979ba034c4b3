#!/usr/bin/env bash
# Guess: of several boxes in a solution the last one is the answer, and a box beats any other way to state an answer.
# True (math-verify 0.9.0): a comma, "and" or "or" within 70 characters between two bare boxes makes them ONE answer,
# the set of both: a solution that corrects itself is wrong, the same words with a full stop in place of the comma are
# right, and so is the same text with each box between dollars. And "final answer is 5" after the last box beats it.
# Why: math_verify.parser takes everything from the first bare \boxed to the last brace of a line, and
# latex2sympy2_extended.math_normalization.extract_boxed_content walks on past the last box while should_extract_boxed
# sees a near box or a separator. Patterns for "final answer is" have a smaller priority number, so they come first.
# Bites: whoever hands whole solutions of thinking models to math-verify, for grades or rewards: "wait, no" is punished
# by punctuation. Cutting out the last box oneself and giving only that to parse avoids both.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check "math-verify[antlr4_13_2]==0.9.0"
cat > seen.py <<'PY'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"), "latex2sympy2_extended", version("latex2sympy2_extended"))
SOLUTIONS = [  # the reference is 2; solution, graded as right
    (r"So \boxed{3}. That is wrong. It is \boxed{2}.", True),
    (r"So \boxed{3}, which is wrong. It is \boxed{2}.", False),
    (r"So $\boxed{3}$, which is wrong. It is $\boxed{2}$.", True),
    (r"The base is \boxed{3} and the height, our answer, is \boxed{2}.", False),
    (r"It is \boxed{2}. The final answer is 5 only if we count the end points.", False),
    (r"The final answer is 5 only if we count the end points. It is \boxed{2}.", True),
]
for solution, right in SOLUTIONS:
    answer = parse(solution)
    print(f"seen: {answer[0]!s:7} {solution}")
    assert verify(parse("$2$"), answer) is right, solution
PY
v/bin/python seen.py
