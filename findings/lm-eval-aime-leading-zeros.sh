#!/usr/bin/env bash
# Guess: lm-eval's aime24 task compares integers, so \boxed{033} is right where the answer is 33, as AIME's own answer
# sheets, which have three digits, write it.
# True (lm-eval 0.4.13): it compares strings after a clean-up for LaTeX. 033, 33.0, "33." and \mathbf{33} in the box are
# wrong. Without a box all that stands between the first and the last dollar sign of the whole response is the answer,
# so that $33$ at the end is right only where no other formula comes before it.
# Why: process_results, is_equiv and strip_string in lm_eval/tasks/aime/utils.py; aime24.yaml takes the gold from the
# column Answer of Maxwell-Jia/AIME_2024, an integer, which str() writes without zeros.
# Bites: 7 of the 30 answers of AIME 2024 are below 100. A model that has learned the contest's form loses them here
# and keeps them under a grader that compares numbers; 3 points of accuracy are one problem.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check lm-eval==0.4.13
cat > seen.py <<'PY'
from importlib.metadata import version

from lm_eval.tasks.aime.utils import process_results

print("lm-eval", version("lm-eval"))
for gold, response, expected in [
    (33, r"The answer is $\boxed{33}$.", 1),
    (33, r"The answer is $\boxed{033}$.", 0),
    (33, r"The answer is \boxed{33.0}.", 0),
    (33, r"The answer is \boxed{33.}", 0),
    (33, r"The answer is \boxed{\mathbf{33}}.", 0),
    (33, r"The answer is \boxed{33\text{ cm}}.", 1),
    (33, r"The answer is \boxed{n = 33}.", 1),
    (33, "The answer is $33$", 1),
    (33, "Let $n=33$. The answer is $33$", 0),
    (33, "33", 1),
    (33, "033", 0),
]:
    value = process_results({"Answer": gold}, [response])["exact_match"]
    print(f"seen: gold {gold}, {response!r} scores {value}")
    assert value == expected, response
PY
v/bin/python seen.py
