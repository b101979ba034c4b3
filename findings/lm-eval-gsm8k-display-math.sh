#!/usr/bin/env bash
# Guess: "flexible-extract" of lm-eval's gsm8k task finds the last number of an answer, so $$\boxed{18}$$ scores as 18.
# True (lm-eval 0.4.13): two or more of the characters $ 0-9 . , count as a number even without a digit. The closing $$
# of display mathematics, "$." at the end of a sentence or "..." is taken for the answer, and the right answer scores 0;
# $\boxed{18}$ without a full stop scores 1. A dash is a sign: "2-18" gives -18. Besides, "strict-match" takes
# "#### 18" but not "#### $18", a form that the metric's own list of ignored characters provides for.
# Why: the regexes in lm_eval/tasks/gsm8k/gsm8k.yaml, (-?[$0-9.,]{2,})|(-?[0-9]+) with group_select -1, and
# "#### (\-?[0-9\.\,]+)"; RegexFilter.apply in lm_eval/filters/extraction.py uses them as they are, and exact_match
# then strips "$", "," and one final "." of what was found.
# Bites: instruction-tuned and reasoning models, which end on a box in display mathematics: a base model may seem better
# at GSM8K than its tuned child, and a training run that teaches \boxed seems to unlearn.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check lm-eval==0.4.13
cat > seen.py <<'PY'
from importlib.metadata import version
from pathlib import Path

import lm_eval
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters import build_filter_ensemble

print("lm-eval", version("lm-eval"))
task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
regexes = task["metric_list"][0]["regexes_to_ignore"]


def score(filter_name, answer):
    """(what the task's own filter extracts, exact_match against the reference 18)."""
    filters = next(entry["filter"] for entry in task["filter_list"] if entry["name"] == filter_name)
    steps = [[step["function"], {key: value for key, value in step.items() if key != "function"}] for step in filters]
    instance = Instance(request_type="generate_until", doc={}, arguments=("", {}), idx=0, resps=[answer])
    build_filter_ensemble(filter_name, steps).apply([instance])
    found = instance.filtered_resps[filter_name]
    matches = exact_match_fn(predictions=[found], references=["so 9 * 2 = 18\n#### 18"], regexes_to_ignore=regexes)
    return found, float(matches["exact_match"])


for filter_name, answer, expected in [
    ("flexible-extract", r"So it is $\boxed{18}$", 1.0),
    ("flexible-extract", r"So it is $\boxed{18}$.", 0.0),
    ("flexible-extract", "So it is\n$$\n\\boxed{18}\n$$", 0.0),
    ("flexible-extract", r"So it is $$\boxed{18}$$", 0.0),
    ("flexible-extract", "So it is 18. Let me check...", 0.0),
    ("flexible-extract", "20 - 2 = 18", 1.0),
    ("flexible-extract", "Pages 2-18", 0.0),
    ("strict-match", "#### 18", 1.0),
    ("strict-match", "#### $18", 0.0),
]:
    found, value = score(filter_name, answer)
    print(f"seen: {filter_name:16} {answer!r:36} extracts {found!r:12} scores {value}")
    assert value == expected, (filter_name, answer)
PY
v/bin/python seen.py
