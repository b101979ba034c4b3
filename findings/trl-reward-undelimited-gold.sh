#!/usr/bin/env bash
# Guess: TRL's accuracy_reward reads the reference answer of a row as a whole, whether or not it stands between dollars.
# True (trl 1.16.0 with math-verify 0.9.0): a reference without dollars is searched for a plain number or a fraction and
# the first hit is the reference. For 2\sqrt{3} that is 2, for 3\pi 3, for 2^{10} 2, for "y = 2x + 3" 3, for "1,-2" 1:
# the right answer earns 0.0 and that bare number 1.0. A tuple or "p - q" holds no such number and is skipped (None).
# With the same text between dollars every one of them is graded as it should be.
# Why: trl.rewards.accuracy_reward calls math_verify.parse(solution) with its defaults; LatexExtractionConfig there
# matches only delimited or boxed LaTeX, so ExprExtractionConfig's number pattern takes what is left. TRL's docstring
# shows such bare references (\frac{1}{3}, a form that happens to work).
# Bites: whoever trains with this reward on MATH-like data, whose answer column holds bare LaTeX: part of the rows
# reward a wrong answer and punish the right one, without a warning.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check trl==1.16.0 "math-verify[antlr4_13_2]==0.9.0" transformers==5.23.0
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
from importlib.metadata import version

from trl.rewards import accuracy_reward

print("trl", version("trl"), "math-verify", version("math-verify"))
ROWS = [  # reference, the same answer as a model writes it, a wrong answer
    (r"2\sqrt{3}", r"2\sqrt{3}", "2"),
    (r"3\pi", r"3\pi", "3"),
    (r"2^{10}", "1024", "2"),
    (r"y = 2x + 3", r"y = 2x + 3", "3"),
    (r"1,-2", r"1,-2", "1"),
    (r"p - q", r"p - q", "1"),
]


def reward(answer, reference):
    text = rf"The answer is $\boxed{{{answer}}}$."
    return accuracy_reward([[{"role": "assistant", "content": text}]], [reference])[0]


for reference, right, wrong in ROWS:
    bare = reward(right, reference), reward(wrong, reference)
    delimited = reward(right, f"${reference}$"), reward(wrong, f"${reference}$")
    print(f"seen: {reference:12} right, wrong = {bare} bare; {delimited} between dollars")
    assert bare == ((None, None) if reference == "p - q" else (0.0, 1.0)), bare
    assert delimited == (1.0, 0.0), delimited
PY
v/bin/python seen.py
