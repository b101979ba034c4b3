#!/usr/bin/env bash
# Guess: match(numeric=True) of inspect-ai, documented as a numeric match, asks whether the last number of the response
# is the target: 123456 is not 123457, and a closing \boxed{18} counts as 18.
# True (inspect-ai 0.3.285): it asks for five significant digits. 123456 and 123457 are the same, 10000.4 is 10000, and
# 1048600 passes for 1048576. And a number in \boxed{...} is not seen: the last bare number before it is graded in its
# place, so that a right box is wrong, and "9 * 2 = 18, so \boxed{36}" is right where 18 is asked for.
# Why: match_str in inspect_ai/scorer/_common.py compares normalize_number of both sides, which formats with ".5g"
# (precision: int = 5, out of the caller's reach); it takes words between blanks, and a word that does not parse as a
# number after brackets at its ends are taken off, as "\boxed{18", is passed over.
# Bites: arithmetic with long numbers (products, powers, sums of money; 8 of 500 test answers of GSM8K have six digits
# or more): the sixth digit and all after it are never graded. And models that box their answer: the score is that of
# the last bare number they mention before.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check inspect-ai==0.3.285
cat > seen.py <<'PY'
import asyncio
from importlib.metadata import version

from inspect_ai.model import ModelOutput
from inspect_ai.scorer import Target, match
from inspect_ai.solver import TaskState

print("inspect-ai", version("inspect-ai"))
scorer = match(numeric=True)


def score(response, target):
    """(C for correct or I, the number that was graded)."""
    output = ModelOutput.from_content("mockllm/model", response)
    state = TaskState(model="mockllm/model", sample_id=1, epoch=1, input="?", messages=[], output=output)
    seen = asyncio.run(scorer(state, Target(target)))
    return seen.value, seen.answer


for response, target, expected in [
    ("The answer is 12345", "12346", "I"),
    ("The answer is 123456", "123457", "C"),
    ("The answer is 10000.4", "10000", "C"),
    ("2**20 = 1048600", "1048576", "C"),
    ("The answer is 18.", "18", "C"),
    (r"9 eggs at 2 dollars each: \boxed{18}", "18", "I"),
    (r"9 eggs at 2 dollars each: $\boxed{18}$.", "18", "I"),
    (r"9 * 2 = 18, so \boxed{36}", "18", "C"),
]:
    value, answer = score(response, target)
    print(f"seen: target {target:7} {response!r:44} scores {value}, graded: {answer}")
    assert value == expected, response
PY
v/bin/python seen.py
