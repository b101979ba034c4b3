"""The cells of a real model, run on the embedded one."""

import json
import sys
from concurrent.futures import Executor, Future

import pytest

import evaluate
import train
from errors import InputError
from experiments import real_model
from problems import Problem


class Inline(Executor):
    """Does the work where it is handed in: signals, which the scripts catch, reach the main thread alone."""

    def __init__(self, workers):
        pass

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command on four sums, the untrained model and one arm, all in this process; returns the folder."""

    def call(script, **flags):
        main = {"train.py": train.main, "evaluate.py": evaluate.main}[script]
        monkeypatch.setattr(sys, "argv", [script, *(f"--{name}={value}" for name, value in flags.items())])
        return main() or 0.0

    monkeypatch.setattr(real_model, "call", call)
    monkeypatch.setattr(real_model, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(real_model, "TRAINING", {"num_steps": 1, "batch_size": 2, "max_new_tokens": 8, "top_k": 0})
    monkeypatch.setattr(real_model, "NEW_TOKENS", 48)
    monkeypatch.setattr(real_model, "CELLS", [("untrained", 0), ("OPSD", 1)])
    monkeypatch.setattr(real_model, "DECODINGS", {"greedy": 0.0})
    prompts = {"student": "Problem: {problem}", "teacher": "{problem} {solution}", "evaluation": "Problem: {problem}"}
    monkeypatch.setattr(real_model, "PROMPTS", prompts)

    def command(*arguments: str):
        flags = ["--model=tiny", "--train=tiny:train", "--test=tiny:heldout", "--count=4", f"--output_dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["real_model", *(arguments or flags)])
        real_model.main()
        return tmp_path

    return command


@pytest.mark.slow
def test_a_killed_run_goes_on_and_says_the_same(run, capsys):
    path = run() / "cells.jsonl"
    whole = path.read_text()
    cells = {(cell := json.loads(line))["row"]: cell for line in whole.splitlines()}
    untrained, trained = cells["untrained"], cells["OPSD"]
    assert len(cells) == 2 and len(trained["steps"]) == 1
    assert all(len(cell[name]) == 4 for cell in (untrained, trained) for name in ("correct", "boxed", "finished"))
    assert trained["train"]["method"] == "opsd" and trained["ground"] == untrained["ground"]
    out, step = capsys.readouterr().out, trained["steps"][0]
    assert "| OPSD - untrained | greedy | 1 |" in out
    assert f"| OPSD | 1 | {step['mean_length']:.2f} | {step['eos_rate']:.2f} | {step['repetition']:.2f} |" in out
    path.write_text(whole[:-50])  # the last line is torn
    run()
    assert path.read_text() == whole


def test_the_table_pairs_problems_and_seeds():
    """OPSD is right on one problem more than the untrained model in seed 1, on two more in seed 2, of four."""
    pytest.importorskip("scipy")

    def cell(row, seed, correct):
        return {"row": row, "seed": seed, "decoding": "greedy", "ground": "a", "correct": correct, "boxed": [1.0] * 4,
                "finished": [1.0, 1.0, 0.0, 0.0], "tokens": [1, 2, 3, 4]}  # fmt: skip

    table = real_model.report([
        cell("untrained", 0, [1, 0, 0, 0]), cell("OPSD", 1, [1, 1, 0, 0]), cell("OPSD", 2, [1, 1, 1, 0]),
    ])  # fmt: skip
    assert "| OPSD | greedy | 1, 2 | 62.5 | 100.0 | 50.0 | 2.5 |" in table
    # over seeds: mean 37.5, t(.975, 1) = 12.706 times 12.5
    assert "| OPSD - untrained | greedy | 1, 2 | +37.5 [+0.0, +75.0] | [-121.3, +196.3] |" in table
    with pytest.raises(InputError, match="not comparable"):
        real_model.report([cell("untrained", 0, [1, 0, 0, 0]), cell("OPSD", 1, [1, 1, 0, 0]) | {"ground": "b"}])


def test_what_cannot_run_says_so(run):
    with pytest.raises(InputError, match="name all three"):
        run("--model", "tiny")
    with pytest.raises(InputError, match="tiny:heldout: has 400 problems with equations, 401 are asked for"):
        real_model.shortest("tiny:heldout", 401, None)


@pytest.mark.parametrize(("solution", "answer", "line"), [
    ("He pays 20 x $50=$1,000.\nSo 1,000*.5 = $5", "5", "20*50 = 1,000, 1,000*.5 = 5. The answer is \\boxed{5}."),
    ("90-.5*40=70\nHe has 1200+70 = 1,270", "1270", "90-.5*40 = 70, 1200+70 = 1,270. The answer is \\boxed{1270}."),
    ("He has 4+3 = 7. Then he loses two.", "5", None),
    ("4x+7 = 15, so x = 2", "2", None),
])  # fmt: skip
def test_a_solution_becomes_its_equations(solution, answer, line):
    assert real_model.as_equations(Problem("", solution, answer)) == line


def test_a_script_that_fails_ends_the_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(real_model, "ROOT", tmp_path)
    (tmp_path / "script.py").write_text("import sys\nsys.exit(sys.argv[1])")
    with pytest.raises(InputError, match=r"script\.py has stopped"):
        real_model.call("script.py", benchmark="nowhere.jsonl")
    assert capfd.readouterr().err == "--benchmark=nowhere.jsonl\n"
