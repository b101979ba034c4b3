#!/usr/bin/env bash
# Guess: OpenCompass reads the last number of a response to GSM8K, so that "The answer is 1,080" counts as 1080, all the
# more as it takes the commas out of the reference answers itself.
# True (opencompass 0.5.4): it reads 80. A comma ends a number, so that the last group of three digits is the answer:
# 1,080 is graded as 080 and wrong, and "she has 2,018" is right where 18 is asked for. $18.00, "18." and a number
# without commas are read as they should be.
# Why: gsm8k_postprocess in opencompass/datasets/gsm8k.py takes the last match of \-?\d+\.\d+|\-?\d+ in the response,
# while gsm8k_dataset_postprocess, for the reference, removes the commas. Gsm8kEvaluator compares what is left. Most of
# the configurations in configs/datasets/gsm8k do so, gsm8k_gen, the usual one, among them. Those that look for a box
# (0shot_v2) do not: the last lines below.
# Bites: 131 of the 1,319 test answers of GSM8K are 1,000 or more (counted apart). A chat model, which writes 1,080, can
# lose ten points of a hundred to a base model that copies the prompt's plain digits, and training that changes no more
# than how large numbers are written moves the score.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check --no-deps opencompass==0.5.4
cat > seen.py <<'PY'
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType
from unittest.mock import MagicMock


class Registry:
    """OpenCompass' lists of names, which need another package; the functions under the names stay as they are."""

    def register_module(self, *args, **kwargs):
        return lambda entry: entry


class BaseEvaluator:
    def __init__(self, **options):
        pass


def stand_in(name, **content):
    sys.modules[name] = module = ModuleType(name)
    module.__dict__.update(content)


folder = importlib.util.find_spec("opencompass").submodule_search_locations[0]
for part in ("", ".datasets"):  # without their __init__.py, which load every data set's dependencies
    stand_in(f"opencompass{part}", __path__=[folder + part.replace(".", "/")])
stand_in("opencompass.openicl", BaseEvaluator=BaseEvaluator)
stand_in("opencompass.openicl.icl_evaluator", BaseEvaluator=BaseEvaluator)
names = ("LOAD_DATASET", "TEXT_POSTPROCESSORS", "ICL_EVALUATORS")
stand_in("opencompass.registry", **{name: Registry() for name in names})
stand_in("opencompass.utils", get_data_path=None)
stand_in("opencompass.datasets.base", BaseDataset=object)
stand_in("datasets", Dataset=MagicMock(), DatasetDict=MagicMock())

from opencompass.datasets import gsm8k, math  # noqa: E402

print("opencompass", version("opencompass"))
reference = "First, 9 * 120 = <<9*120=1080>>1080.\n#### {}".format
say = "There are 9 rows of 120 seats. The answer is {}".format
CASES = [  # the answer in the data set, how the response writes its answer, right by OpenCompass
    ("1,080", "1,080", False), ("1,080", "$1,080.", False), ("1,080", "1080", True), ("1080", "1,080", False),
    ("1450000", "1,450,000 dollars", False), ("18", "18.", True), ("18", "$18.00", True), ("18", "2,018", True),
    ("80", "1,080", True),
]
for gold, written, expected in CASES:
    read, wanted = gsm8k.gsm8k_postprocess(say(written)), gsm8k.gsm8k_dataset_postprocess(reference(gold))
    score = gsm8k.Gsm8kEvaluator().score([read], [wanted])["accuracy"]
    print(f"seen: gold {gold:8} answer {written:18} read as {read:6} against {wanted:8} accuracy {score:5.1f}")
    assert score == 100 * expected

right = list(range(500, 1500, 10))  # a model that is right every time
for style, write in (("1080", "{}"), ("1,080", "{:,}")):
    read = [gsm8k.gsm8k_postprocess(say(write.format(n))) for n in right]
    score = gsm8k.Gsm8kEvaluator().score(read, [str(n) for n in right])["accuracy"]
    print(f"seen: 100 right answers, half of them above 999, written as {style}: accuracy {score}")
    assert score == (100 if style == "1080" else 50)
for written in ("1,080", "1080"):
    read = math.math_postprocess_v2(f"9 * 120 is \\boxed{{{written}}}.")
    score = math.MATHEvaluator(version="v2").score([read], ["1080"])["accuracy"]
    print(f"seen: with a box, as in 0shot_v2: {written} read as {read}, accuracy {score}")
    assert score == 100
PY
v/bin/python seen.py
