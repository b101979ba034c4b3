#!/usr/bin/env bash
# Guess: whole numbers in a .jsonl load as they are written, or are refused, as Dataset.from_list refuses long ones.
# True (datasets 5.2.0, pyarrow 26.0.1): one answer of more than 63 bits makes floats of the whole column. It loses its
# last digits (12345678902469135780 is off by 604), and 42 in another row becomes 42.0. One 0.5 in the column does so,
# too, and makes 9007199254740992 of 9007199254740993. With the same rows from_list raises OverflowError or
# ArrowInvalid; the file is loaded without a word.
# Why: the json loader (datasets/packaged_modules/json/json.py) hands the file to pyarrow.json.read_json, which takes a
# float64 for a column as soon as one number does not fit into an int64, whatever a float can hold. What the loader does
# about mixed types (on_mixed_types) comes only after a refusal by pyarrow. With features of strings the long answer
# becomes "1.2345678902469136e+19"; only quotes in the file keep it.
# Bites: arithmetic (products of long numbers, factorials, Fibonacci numbers): the reference itself is wrong, so that no
# right answer equals it. And whoever compares strings, since str(42.0) is "42.0": one long answer makes all the other
# 10,000 references of a data set wrong for an exact match.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import json
import warnings

import datasets
import pyarrow
from datasets import Dataset, Features, Value, load_dataset

print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
datasets.disable_progress_bars()


def loaded(name, answers, **options):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache", **options)
    assert not caught
    return rows["answer"][:]


LONG = 123456789 * 100000000020  # 12345678902469135780, as any product of two numbers of ten digits
CASES = {
    "63 bits": ([42, 2**63 - 1], [42, 2**63 - 1]),
    "64 bits": ([42, 2**63], [42.0, 2.0**63]),
    "a product": ([42, LONG], [42.0, float(LONG)]),
    "one half": ([2**53 + 1, 0.5], [2.0**53, 0.5]),
}
for name, (written, expected) in CASES.items():
    seen = loaded(name.replace(" ", "-"), written)
    try:
        in_memory = Dataset.from_list([{"answer": answer} for answer in written])["answer"][:]
    except (OverflowError, pyarrow.ArrowInvalid) as error:
        in_memory = type(error).__name__
    kept = [int(value) - answer for value, answer in zip(seen, written)]
    print(f"seen: {name:10} {written} -> {seen} ({[type(value).__name__ for value in seen]}), off by {kept}; "
          f"from_list: {in_memory}")
    assert seen == expected and [type(x) for x in seen] == [type(x) for x in expected]
    assert (in_memory == written) == (name == "63 bits")
for answer in ("42", "12345678902469135780"):
    print(f"seen: {answer} in quotes beside the other: {loaded('quotes-' + answer, [answer, str(LONG)])}")
rows = [*range(10_000), LONG]
wrong = sum(str(value) != str(answer) for value, answer in zip(loaded("many", rows), rows))
print(f"seen: of {len(rows)} answers, one of them long, {wrong} differ as strings from what was written")
assert wrong == len(rows)
as_text = loaded("many-text", rows[-3:], features=Features({"answer": Value("string")}))
print("seen: with features of strings:", as_text)
PY
v/bin/python seen.py
