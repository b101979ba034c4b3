#!/usr/bin/env bash
# Guess: lighteval's tasks math:algebra to math:precalculus compare the boxed answers, by a majority of four samples:
# right where most of the four box what the reference solution boxes.
# True (lighteval 0.13.0): whole texts are compared. Four solutions that all box the right answer score 0, whatever they
# box; what scores 1 is the reference solution, word for word. As four sampled solutions hardly ever agree in every
# character, the majority is the first of them.
# Why: the tasks (lighteval/tasks/tasks/math.py) hand `normalize_pred` and `normalize_gold` to Metrics.maj_at_n, which
# sets them as attributes (Metric.__call__: setattr, no check); MajAtN (metrics/metrics_sample.py) reads the one name
# `normalize`, which stays None, so that nothing takes the box out of gold or sample. With that name the four score 1.
# Bites: whoever reports MATH by these tasks: every model is near 0. In the same way any misspelt or renamed parameter
# of a metric is dropped without a word, and still stands in the metric's name in the table.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check lighteval==0.13.0
cat > seen.py <<'PY'
from importlib.metadata import version

from lighteval.metrics.metrics_sample import MajAtN
from lighteval.metrics.normalizations import math_normalizer
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.tasks import math

print("lighteval", version("lighteval"))
row = {"problem": "What is 1 + 1?", "solution": "One and one more is two, hence $\\boxed{2}$."}
SAMPLES = {
    "four that box the right answer": ["The sum is $\\boxed{2}$."] * 4,
    "the same in four wordings": [f"{word}, so it is $\\boxed{{2}}$." for word in ("Add", "Sum", "Count", "Two")],
    "the reference solution four times": [row["solution"]] * 4,
}
tasks = [task for task in vars(math).values() if getattr(task, "name", "").startswith("math:")]
right = MajAtN(n=4, strip_strings=True, normalize=math_normalizer)
assert len(tasks) == 7
for words, samples in SAMPLES.items():
    answers = ModelResponse(text=samples)
    scores = {task.metrics[0].sample_level_fn.compute(task.prompt_function(row), answers) for task in tasks}
    named = right.compute(tasks[0].prompt_function(row), answers)
    print(f"seen: {words}: {scores} in all {len(tasks)} tasks; with `normalize`: {named}")
    assert scores == {int("reference" in words)} and named == 1
PY
v/bin/python seen.py
