#!/usr/bin/env bash
# Guess: distilabel's cache hands out a step's old output only where the step and all before it are as they were. The
# pull request that brought it in says so: in a >> b >> c a change of b has b and c computed anew. New rows, new output.
# True (distilabel 1.5.3, datasets 5.2.0): it asks about the step alone. With other rows, or more of them, in
# LoadDataFromDicts the pipeline returns what it made of the old rows. Another parameter of the last step has that step
# run again, on the old rows. Two Dataset objects of one length, handed to run(dataset=...), get one result. With
# use_cache=False, or with another name for the pipeline, all is right. (A change of a step in the middle, or a Dataset
# of another length, ends in a KeyError, so that one notices.)
# Why: _BatchManager.from_dag (distilabel/pipeline/batch_manager.py) takes a step's batches from the folder
# steps_data/NAME_SIGNATURE if there is one, and SignatureMixin.signature hashes the step's own attributes: nothing of
# the steps before it. LoadDataFromHub, which run(dataset=...) makes, holds the Dataset in a private attribute, of which
# only the length is hashed. steps_data belongs to the name of the pipeline; without one that is the steps' names.
# Bites: teacher answers and synthetic data, what distilabel is for. A script that ran on GSM8K and is run on MATH, or
# on a corrected file, saves the old answers under a new name. Pipelines without a name whose steps are of the same
# kinds share one cache in ~/.cache/distilabel, across scripts. The log has a line that results are cached, as it should
# when a run is repeated. (requests is installed by hand, as distilabel imports it without asking for it.)
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check distilabel==1.5.3 datasets==5.2.0 requests
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import logging
from importlib.metadata import version

from datasets import Dataset
from distilabel.pipeline import Pipeline
from distilabel.steps import FormatTextGenerationSFT, LoadDataFromDicts, TruncateTextColumn


def rows(name, n=3):
    return [{"instruction": f"{name} {i}?", "generation": f"{name} {i} is {i}"} for i in range(n)]


def due(name, n=3, length=None):
    return [row["generation"][:length] for row in rows(name, n)]


def formatted(data, use_cache=True, name=None):
    """load >> format; the answers that come out."""
    with Pipeline(name, cache_dir="cache") as pipeline:
        LoadDataFromDicts(data=data) >> FormatTextGenerationSFT()
    return [row[-1]["content"] for row in pipeline.run(use_cache=use_cache)["default"]["train"]["messages"]]


def cut(data, length):
    """load >> cut at `length` characters."""
    with Pipeline(cache_dir="cache") as pipeline:
        LoadDataFromDicts(data=data) >> TruncateTextColumn(column="generation", max_length=length)
    return list(pipeline.run()["default"]["train"]["generation"])


def handed(data, use_cache=True):
    """The rows as a Dataset, handed to run."""
    with Pipeline("handed", cache_dir="cache") as pipeline:
        FormatTextGenerationSFT()
    distiset = pipeline.run(dataset=Dataset.from_list(data), use_cache=use_cache)
    return [row[-1]["content"] for row in distiset["default"]["train"]["messages"]]


def main():
    logging.disable()
    print("distilabel", version("distilabel"), "datasets", version("datasets"))
    for name, got, right, returned in (
        ("first run", formatted(rows("gsm")), due("gsm"), due("gsm")),
        ("other rows", formatted(rows("math")), due("math"), due("gsm")),
        ("five other rows", formatted(rows("math", 5)), due("math", 5), due("gsm")),
        ("other rows, pipeline named", formatted(rows("math"), name="math"), due("math"), due("math")),
        ("other rows, no cache", formatted(rows("math"), use_cache=False), due("math"), due("math")),
        ("cut at 5, first run", cut(rows("gsm"), 5), due("gsm", length=5), due("gsm", length=5)),
        ("cut at 3, other rows", cut(rows("math"), 3), due("math", length=3), due("gsm", length=3)),
        ("Dataset, first run", handed(rows("gsm")), due("gsm"), due("gsm")),
        ("Dataset, other rows", handed(rows("math")), due("math"), due("gsm")),
        ("Dataset, other rows, no cache", handed(rows("math"), use_cache=False), due("math"), due("math")),
    ):
        print(f"seen: {name}: {got}; due {right}")
        assert got == returned


if __name__ == "__main__":
    main()
PY
v/bin/python seen.py 2> err || { cat err; exit 1; }
