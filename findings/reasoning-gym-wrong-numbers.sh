#!/usr/bin/env bash
# Guess: reasoning-gym's score_answer gives a wrong number 0, or at most the .01 of some tasks, so that the mean score
# of a benchmark is its accuracy, nearly.
# True (reasoning-gym 0.1.25): where the right answer's digits stand anywhere in the wrong one, it scores their share
# of its length: 190 for 19 is .667. To answer 12 to every problem is right in 3 of 500 problems of gcd and in none of
# letter_counting, and scores .285 and .303; a model that is wrong by a factor of ten in all of chain_sum scores .732.
# In game_of_life_halting every answer that is not empty scores 1: True and False each on all 500 problems.
# Why: ProceduralDataset.score_answer (reasoning_gym/dataset.py), which gcd, letter_counting and other tasks inherit,
# ends in `oracle_answer in answer`, meant for an answer inside a sentence; so does utils.compute_decimal_reward, which
# chain_sum calls. GameOfLifeHaltingDataset.score_answer compares bool("False") with bool("True"), two strings that hold
# something.
# Bites: whoever reports the mean score as accuracy, or trains on it: where the answer is 2, a wrong 12 earns .5 and an
# equally wrong 3 nothing, and a task whose score is constant teaches nothing.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check reasoning-gym==0.1.25
cat > seen.py <<'PY'
from importlib.metadata import version

from reasoning_gym import create_dataset

print("reasoning-gym", version("reasoning-gym"))


def accuracy_and_score(task, answer):
    """Over 500 problems, of what `answer` says to each right answer."""
    data = create_dataset(task, seed=1, size=500)
    given = [(answer(row["answer"]), row) for row in data]
    right = [text == row["answer"] for text, row in given]
    scores = [data.score_answer(text, row) for text, row in given]
    return sum(right) / 500, round(sum(scores) / 500, 3)


data = create_dataset("chain_sum", seed=1, size=500)
row = next(row for row in data if len(row["answer"]) == 2)
score = data.score_answer(row["answer"] + "0", row)
print(f"seen: chain_sum, {row['answer']}0 for {row['answer']}: {score:.3f}")
assert round(score, 3) == 0.667
seen = {}
for task, name, answer in [
    ("gcd", "12", lambda right: "12"),
    ("letter_counting", "12", lambda right: "12"),
    ("chain_sum", "ten times the right one", lambda right: right + "0"),
    ("lcm", "the right one plus one", lambda right: str(int(right) + 1)),
    ("game_of_life_halting", "True", lambda right: "True"),
    ("game_of_life_halting", "False", lambda right: "False"),
]:
    seen[task, name] = accuracy, score = accuracy_and_score(task, answer)
    print(f"seen: {task}, answer {name}: accuracy {accuracy:.3f}, mean score {score:.3f}")
assert seen["gcd", "12"] == (0.006, 0.285) and seen["letter_counting", "12"] == (0.0, 0.303)
assert seen["chain_sum", "ten times the right one"] == (0.0, 0.732) and seen["lcm", "the right one plus one"][1] == 0
assert {seen["game_of_life_halting", word][1] for word in ("True", "False")} == {1.0}
assert sum(seen["game_of_life_halting", word][0] for word in ("True", "False")) == 1.0
PY
v/bin/python seen.py
