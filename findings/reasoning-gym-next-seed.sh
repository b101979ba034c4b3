#!/usr/bin/env bash
# Guess: reasoning-gym data sets made with two different seeds are two different draws, so that seed 1 can train and
# seed 2 can validate, and ReseedingDataset, which makes a data set endless, goes on with new problems.
# True (reasoning-gym 0.1.25): for most tasks the data set of seed 2 is that of seed 1 moved on by one row. All its rows
# but the last are rows of the other, with the same answers; the same for a composite of such tasks. ReseedingDataset
# raises the seed by one a chunk: 5,000 rows in chunks of 500 are 509 different ones, most of them served ten times.
# Why: a task's __getitem__ draws from Random(self.seed + idx), and so does CompositeDataset, which hands seed + i + 1
# to its i-th task; ReseedingDataset._create_chunk takes seed + chunk_num (reasoning_gym/dataset.py). gsm_symbolic
# escapes, since it also draws a list of templates from the bare seed.
# Bites: whoever validates on the next seed, as the project's own training/train_grpo.py does (1 and 2, equal sizes,
# one configuration): the validation set was trained on, and memory reads as reasoning. Runs over "seeds 1 to 5" share
# their problems as well. Seeds that lie further apart than the data set is long share none, but for chance.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check reasoning-gym==0.1.25
cat > seen.py <<'PY'
from importlib.metadata import version
from itertools import islice

from reasoning_gym import create_dataset
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.dataset import ReseedingDataset

print("reasoning-gym", version("reasoning-gym"))


def rows(name, seed, **options):
    return [(row["question"], row["answer"]) for row in create_dataset(name, seed=seed, size=500, **options)]


tasks = [DatasetSpec(name=name, weight=1, config={}) for name in ("chain_sum", "basic_arithmetic", "gcd")]
for name, options in [("basic_arithmetic", {}), ("gcd", {}), ("composite", {"datasets": tasks}), ("gsm_symbolic", {})]:
    train, after, far = (rows(name, seed, **options) for seed in (1, 2, 1_000_001))
    shared, by_chance = (sum(row in set(train) for row in other) for other in (after, far))
    print(f"seen: {name}: of 500 rows, {shared} of seed 2 and {by_chance} of seed 1000001 are rows of seed 1 too")
    assert by_chance < 25
    assert (after[:-1] == train[1:]) == (name != "gsm_symbolic")

endless = ReseedingDataset(create_dataset("gcd", seed=1), chunk_size=500)
questions = [row["question"] for row in islice(endless, 5000)]
print(f"seen: of {len(questions)} rows of ReseedingDataset {len(set(questions))} are different")
assert len(questions) == 5000 and len(set(questions)) <= 509
PY
v/bin/python seen.py
