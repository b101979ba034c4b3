#!/usr/bin/env bash
# Guess: maj@8 of lm-eval's gsm8k_cot_self_consistency is the majority of the answers: a sample without one has no vote,
# and 1,000 and 1000, which the task's metric takes for equal, are votes for the same number.
# True (lm-eval 0.4.13): "[invalid]", the mark of a sample whose answer was not found, is a candidate like any other and
# wins as soon as it is the most frequent; three samples that agree on the right answer lose to four that were cut off
# or wrote "The answer is $18". And votes are strings: 1,000 and 1000 split theirs, and a wrong 999 wins with fewer.
# Why: RegexFilter puts "[invalid]" in place of what it did not find, and MajorityVoteFilter
# (lm_eval/filters/selection.py) returns the commonest string of all; only exact_match drops commas, afterwards.
# Bites: maj@k of models that often run out of tokens or do not keep to the phrase: it can fall below the accuracy of
# one sample, where self-consistency should raise it, and two models can differ by their commas alone.
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


class Loader(yaml.SafeLoader):
    """Reads the task's file though some of its values name functions."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
folder = Path(lm_eval.__file__).parent / "tasks/gsm8k"
votes = yaml.load((folder / "gsm8k-cot-self-consistency.yaml").read_text(), Loader)
regexes = yaml.load((folder / "gsm8k-cot.yaml").read_text(), Loader)["metric_list"][0]["regexes_to_ignore"]


def score(filter_name, samples, reference):
    """(the answer that the task's own filters choose, its exact_match)."""
    filters = next(entry["filter"] for entry in votes["filter_list"] if entry["name"] == filter_name)
    steps = [[step["function"], {key: value for key, value in step.items() if key != "function"}] for step in filters]
    requests = [Instance(request_type="generate_until", doc={}, arguments=("", {}), idx=0, resps=list(samples))]
    build_filter_ensemble(filter_name, steps).apply(requests)
    found = requests[0].filtered_resps[filter_name]
    matches = exact_match_fn(predictions=[found], references=[reference], regexes_to_ignore=regexes)
    return found, float(matches["exact_match"])


say = "So the answer is found. The answer is {}.".format
for label, samples, reference, expected in [
    ("5 x 18, 3 x 17", [say(18)] * 5 + [say(17)] * 3, "#### 18", 1.0),
    ("3 x 18, 4 unfinished, 17", [say(18)] * 3 + ["First, 9 * 2"] * 4 + [say(17)], "#### 18", 0.0),
    ("3 x 18, 5 x $18", [say(18)] * 3 + [say("$18")] * 5, "#### 18", 0.0),
    ("1,000 alone", [say("1,000")] * 8, "#### 1000", 1.0),
    ("5 x 1000, 3 x 999", [say(1000)] * 5 + [say(999)] * 3, "#### 1000", 1.0),
    ("1,000 and 1000, 3 x 999", [say(1)] + [say("1,000"), say(1000)] * 2 + [say(999)] * 3, "#### 1000", 0.0),
]:
    found, value = score("maj@8", samples, reference)
    print(f"seen: {label:28} -> {found!r:12} scores {value}")
    assert value == expected, label
PY
v/bin/python seen.py
