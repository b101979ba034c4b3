#!/usr/bin/env bash
# Guess: SkyRL's GSM8K environment grades the last "#### ANSWER" of a response, so that what a solution says before its
# end plays no part, and "1080." and $1080 are 1080.
# True (skyrl-gym 0.4.0): it grades the first. A solution in steps under Markdown headings, "#### 1. Count the rows",
# has the answer "1." and the reward 0, whatever it ends with. A first result that is corrected, #### 1170 and then
# #### 1080, gets 0, and the right one first with a wrong one at the end gets 1. A full stop behind the number is part
# of it, so that "#### 1080." is wrong; $1080 and **1080** are no answer. A comma is fine. In the multi-turn environment
# a heading earns what a well-formed wrong answer earns.
# Why: extract_solution in skyrl_gym/envs/gsm8k/utils.py takes re.search (the first match) of #### (\-?[0-9\.\,]+),
# compares the text with the reference's, and removes a "$" that the pattern cannot have let in.
# Bites: GRPO on GSM8K, SkyRL's first example. Chat models number their steps under headings: for the right answer they
# get what they get for a wrong one, and the policy learns to drop the headings, or to state a number first and reason
# afterwards, while the curve is read as accuracy. The same checkpoint scores otherwise in verl or lm-eval.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check pandas==2.3.3 requests==2.32.5 omegaconf==2.3.0 \
    func_timeout==4.3.5
v/bin/pip install -q --disable-pip-version-check --no-deps skyrl-gym==0.4.0
cat > seen.py <<'PY'
from importlib.metadata import version

import skyrl_gym

print("skyrl-gym", version("skyrl-gym"))
GOLD = "1080"


def reward(response, name="gsm8k"):
    env = skyrl_gym.make(name, extras={"reward_spec": {"method": "rule", "ground_truth": GOLD}, "max_turns": 5})
    return env.step(response)["reward"]


CASES = [  # what the response is, its words, its reward
    ("the number alone", "9 * 120 = 1080.\n#### 1080", 1),
    ("with a comma", "9 * 120 = 1,080.\n#### 1,080", 1),
    ("under smaller headings", "### 1. Count the rows\nThere are 9.\n### 2. Multiply\n9 * 120 = 1080\n#### 1080", 1),
    ("under headings", "#### 1. Count the rows\nThere are 9.\n#### 2. Multiply\n9 * 120 = 1080\n#### 1080", 0),
    ("corrected", "9 * 130 = 1170, so\n#### 1170\nNo: a row has 120 seats, so it is 9 * 120.\n#### 1080", 0),
    ("spoilt", "9 * 120 = 1080, so\n#### 1080\nNo: there are 10 rows, so it is 1200.\n#### 1200", 1),
    ("with a full stop", "9 * 120 = 1080.\n#### 1080.", 0),
    ("in dollars", "9 * 120 = 1080.\n#### $1080", 0),
    ("in bold type", "9 * 120 = 1080.\n#### **1080**", 0),
]
for what, response, expected in CASES:
    print(f"seen: {GOLD} {what}: ends with {response.splitlines()[-1]!r}, reward {reward(response)}")
    assert reward(response) == expected
headings = "#### 1. Count the rows\nThere are 9.\n#### 2. Multiply\nI get 9 * 120 = 1080, the answer."
print(f"seen: multi-turn, headings and no #### answer: reward {reward(headings, 'gsm8k_multi_turn')}")
assert abs(reward(headings, "gsm8k_multi_turn") - 0.04) < 1e-9
PY
v/bin/python seen.py
