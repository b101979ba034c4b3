#!/usr/bin/env bash
# Guess: final_number_exact_match, HELM Lite's score for GSM8K, compares the last numbers of response and reference;
# words behind the number play no part, and 18.00 is 18.
# True (crfm-helm 0.5.16): a comma counts as a number. "The answer is 18 dollars, as asked." is wrong, since its last
# number is ",", which is nothing without its comma. 18.0 and $18.00 are wrong, since texts are compared. And any
# character between two digits is part of a number, so that 9*2 or 7-4 at the end is one. 1,080 is 1080, and \boxed{18}
# is 18.
# Why: get_final_number in helm/benchmark/metrics/evaluate_reference_metrics.py looks for -?[\d,]+(?:.\d+)?, in which a
# comma needs no digit beside it and the point stands for any character. It takes the last match.
# Bites: chat models, which go on after the number ("18 dollars, which is ..."), and money. A base model that copies the
# prompt's "The answer is 18." loses nothing, so that its tuned child can seem to have unlearned arithmetic.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check --no-deps crfm-helm==0.5.16
cat > seen.py <<'PY'
import importlib.abc
import importlib.machinery
import sys
from importlib.metadata import version
from unittest.mock import MagicMock

OWN = {"helm", "helm.benchmark", "helm.benchmark.metrics", "helm.benchmark.metrics.evaluate_reference_metrics"}


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Other metrics, scenarios and language tools, which the module imports and this metric does not call."""

    def find_spec(self, name, path=None, target=None):
        if name in OWN or name.split(".")[0] not in ("helm", "nltk", "numpy", "rouge_score"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__name__ = [], spec.name
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, StandIns())
from helm.benchmark.metrics.evaluate_reference_metrics import final_number_exact_match  # noqa: E402

print("crfm-helm", version("crfm-helm"))
reference = "She sells 16 - 3 - 4 = 9 eggs. She makes 9 * 2 = 18 dollars. The answer is 18."
CASES = [
    ("She makes 9 * 2 = 18 dollars. The answer is 18.", 1), ("The answer is 18 dollars.", 1),
    ("The answer is 18 dollars, as asked.", 0), ("She makes 18 dollars every day, all in all.", 0),
    ("The answer is **18**, which is what she makes.", 0), ("The answer is $18.00.", 0), ("The answer is 18.0", 0),
    ("The answer is \\boxed{18}.", 1), ("The answer is 17, or rather 18.", 1), ("The answer is 18 = 9*2", 0),
]
for response, expected in CASES:
    seen = final_number_exact_match(reference, response)
    print(f"seen: {response!r:52} scores {seen}")
    assert seen == expected, response
for gold, response, expected in [("The answer is 1,080.", "The answer is 1080.", 1), ("The answer is 3.", "7-4", 0)]:
    seen = final_number_exact_match(gold, response)
    print(f"seen: {response!r} for {gold!r} scores {seen}")
    assert seen == expected
PY
v/bin/python seen.py
