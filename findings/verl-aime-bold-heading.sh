#!/usr/bin/env bash
# Guess: verl's reward for AIME (data_source "aime...", "math_dapo" or "math") finds the boxed answer at the end of a
# solution, as its docstrings say: `Answer: ...` first, else \boxed{}.
# True (verl 0.9.1): the heading with which Qwen and R1 models like to end takes the box away. "**Final Answer:**", then
# \boxed{33}, gets -1: what stands behind "Answer:" on that line, here "**", IS the answer, and a wrong one. The same
# with "**Answer:** 33", with "Answer: 33." for its full stop, and with a heading before "\[\boxed{33}\]" on one line.
# A box further than 100 characters from the end does not count either.
# Why: is_correct_minerva in verl/utils/reward_score/math_dapo.py takes the last match of (?i)Answer\s*:\s*([^\n]+), in
# which \s* runs on over line breaks, verify() falls back to the box only where nothing matched at all, and
# normalize_final_answer takes neither asterisks nor a full stop off.
# Bites: rewards and accuracies of runs on AIME or DAPO prompts that ask for a box; training then teaches the model not to
# write a heading, which reads as better mathematics.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.10.2 \
    tensordict==0.10.0 ray==2.60.0 omegaconf==2.4.0
v/bin/pip install -q --disable-pip-version-check --no-deps verl==0.9.1
cat > seen.py <<'PY'
from importlib.metadata import version

from verl.utils.reward_score import default_compute_score

print("verl", version("verl"))
remark = " No other value is possible, since both legs of the triangle are integers and its angle at C is a right one."
right = (r"\boxed{33}", "Answer: 33", "The answer is $\\boxed{33}$.", "**Answer**\n\n\\boxed{33}", "Answer: $33$.")
wrong = ("**Final Answer:**\n\n\\boxed{33}", "**Final Answer:** \\boxed{33}", "**Answer:** 33", "Answer: 33.",
         "**Final Answer:**\n\\[\n\\boxed{33}\n\\]", "### Answer:\n\\[\\boxed{33}\\]", "It is \\boxed{33}." + remark)
for expected, solutions in ((1.0, right), (-1.0, wrong)):
    for solution in solutions:
        found = default_compute_score("aime2024", solution, "33")
        print(f"seen: {solution[:40]!r:45} score {found['score']:+.0f}, taken as the answer: {found['pred']!r}")
        assert found["score"] == expected
PY
v/bin/python seen.py
