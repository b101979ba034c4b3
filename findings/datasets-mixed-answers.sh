#!/usr/bin/env bash
# Guess: a .jsonl whose `answer` is a string in some rows and a number in others loads as it is written, or is refused.
# True (datasets 5.2.0): it loads, and strings that happen to be valid JSON change: "007" -> 7, "0.10" -> 0.1,
# "12" -> 12, "true" -> True, "[1,2]" -> a list, "null" and "NaN" -> None. Other strings stay. Every value of a plain
# string column stays, so one number anywhere in the column changes what the other rows hold.
# Why: on mixed types the loader stores the column as JSON text; datasets.utils.json.json_encode_field first tries to
# parse a string and, if that works, keeps it as though it were encoded already, so decoding on access turns it into
# the value. Asking for features={"answer": Value("string")} does not help: "x" then comes back as "\"x\"", with quotes.
# on_mixed_types=None makes it an error, as one would wish.
# Bites: whoever pools benchmarks whose answers are partly int and partly str: exact-match on strings, padded answers
# such as "007", and rows whose answer is the word "null" are silently other problems.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1
export HF_HOME="$T/hf" HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import json

import datasets
from datasets import Features, Value, load_dataset

datasets.disable_progress_bars()
WRITTEN = ["007", "0.10", "12", "true", "[1,2]", "null", "NaN", "1,234", "x"]


def load(name, answers, **options):
    with open(name, "w") as out:
        out.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    return load_dataset("json", data_files=name, split="train", **options)["answer"][:]


print("datasets", datasets.__version__)
plain = load("plain.jsonl", WRITTEN)
mixed = load("mixed.jsonl", [*WRITTEN, 5])
typed = load("typed.jsonl", [*WRITTEN, 5], features=Features({"answer": Value("string")}))
print("seen: strings only     ", plain)
print("seen: and a number 5   ", mixed)
print("seen: and features=... ", typed)
assert plain == WRITTEN
assert mixed == [7, 0.1, 12, True, [1, 2], None, None, "1,234", "x", 5], mixed
assert typed == [*WRITTEN[:-2], '"1,234"', '"x"', "5"], typed
try:
    load("refused.jsonl", [*WRITTEN, 5], on_mixed_types=None)
    raise SystemExit("on_mixed_types=None did not refuse the column")
except datasets.exceptions.DatasetGenerationError as error:
    print("seen: on_mixed_types=None", type(error.__cause__).__name__)
PY
v/bin/python seen.py
