"""The cells of a real model, run on the embedded one."""

import json
import signal
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import asdict
from threading import Event

import numpy as np
import pytest

import evaluate
import train
from errors import InputError
from experiments import real_model
from problems import Problem, load_problems
from runtime.records import write_rows


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
    """The command on four sums, all in this process: the untrained model and two arms; returns the folder."""

    def call(script, **flags):
        main = {"train.py": train.main, "evaluate.py": evaluate.main}[script]
        monkeypatch.setattr(sys, "argv", [script, *(f"--{name}={value}" for name, value in flags.items())])
        return main() or 0.0

    monkeypatch.setattr(real_model, "call", call)
    monkeypatch.setattr(real_model, "ThreadPoolExecutor", Inline)
    training = {"num_steps": 2, "batch_size": 2, "max_new_tokens": 8, "learning_rate": 1e-3, "top_k": 0}
    for name, value in {
        "TRAINING": training, "SCORED_TOKENS": 48,
        "ROWS": [("untrained", 0), (real_model.SHOWN, 0), ("OPSD", 1), ("Moderate, no clip", 2)],
    }.items():  # fmt: skip
        monkeypatch.setattr(real_model, name, value)
    test = tmp_path / "four.jsonl"
    write_rows(test, [asdict(problem) for problem in load_problems("tiny:heldout")[:4]])

    def command(*arguments: str):
        flags = ["--model=tiny", "--train=tiny:train", f"--test={test}", f"--output_dir={tmp_path / 'run'}"]
        monkeypatch.setattr(sys, "argv", ["real_model", *flags, *arguments])
        real_model.main()
        return tmp_path / "run"

    return command


@pytest.mark.slow
def test_a_killed_run_goes_on_and_says_the_same(run, capsys):
    path = run("--rows", "OPSD-1", "untrained-0") / "cells.jsonl"
    assert [json.loads(line)["row"] for line in path.open()] == ["OPSD", "OPSD", "untrained", "untrained"]
    run()
    whole = path.read_text()
    cells = [json.loads(line) for line in whole.splitlines()]
    by_key = {real_model.key(cell): cell for cell in cells}
    rows = [("untrained", 0), ("OPSD", 1), ("Moderate, no clip", 2), (real_model.SHOWN, 0)]
    assert len(cells) == 8 and by_key.keys() == {(*row, decoding) for decoding in ("greedy", "sampled") for row in rows}
    trained, other = by_key["OPSD", 1, "greedy"], by_key["Moderate, no clip", 2, "sampled"]
    assert trained["train"]["method"] == "opsd" and other["train"]["tau_clip"] == "inf"
    assert len(trained["steps"]) == len(other["steps"]) == 2
    assert other["steps"] == by_key["Moderate, no clip", 2, "greedy"]["steps"]  # trained once, scored twice
    assert all(len(cell[name]) == 4 for cell in cells for name in ("correct", "boxed", "finished"))
    out, step = capsys.readouterr().out, trained["steps"][0]
    assert "| OPSD - untrained | 0.001 | greedy | 1 |" in out
    assert f"| OPSD | 0.001 | 1 | first 1 | {step['mean_length']:.3f} | {step['eos_rate']:.3f} |" in out
    line = next(line for line in out.splitlines() if line.startswith("| OPSD | 0.001 | 1 | first 1 |")).split(" | ")
    numbers = [f"{step[name]:.3f}" for name in ("divergence", "forward_kl", "clipped_mass", "student_entropy")]
    tenths = step["by_decile"]["forward_kl"]
    assert line[7:11] == numbers and line[12].split()[:10] == [f"{np.nan if d is None else d:.3f}" for d in tenths]
    lines = whole.splitlines(keepends=True)
    gone = next(i for i, cell in enumerate(cells) if cell["decoding"] == "sampled" and cell["row"] == "OPSD")
    path.write_text("".join(lines[1:gone] + lines[gone + 1 :])[:-50])  # of two cells no line, and the last is torn
    run()
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())


def test_a_folder_goes_on_with_its_own_model_and_problems_alone(run, tmp_path):
    """A cell of other problems would be another experiment's."""
    record = {"script": "real_model", "versions": {}, "config": {"model": "other"}, "inputs": {"model": {}}}
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / "cells.jsonl", [])
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="for another run choose another folder"):
        run()
    with pytest.raises(InputError, match="--test: all problems need answers, and some have none"):
        real_model.write_problems([Problem("1+1", "2", "2")], [Problem("1+1", "2", "")], tmp_path)
    with pytest.raises(InputError, match=r"--report .*nothing.jsonl: no such file"):
        run("--report", str(tmp_path / "nothing.jsonl"))


def cell(row, seed, correct, rate=1e-5):
    return {"row": row, "seed": seed, "decoding": "greedy", "correct": correct, "boxed": [1.0] * 4,
            "finished": [1.0, 1.0, 0.0, 0.0], "tokens": [1, 2, 3, 4], "rate": rate}  # fmt: skip


def test_the_table_pairs_problems_seeds_and_rates():
    """OPSD is right on one problem more than the untrained model in seed 1, on two more in seed 2, of four."""
    pytest.importorskip("scipy")
    table = real_model.report([
        cell("untrained", 0, [1, 0, 0, 0], None), cell("OPSD", 1, [1, 1, 0, 0]), cell("OPSD", 2, [1, 1, 1, 0]),
        cell("Moderate", 1, [1, 1, 1, 0]), cell("Moderate", 2, [0, 0, 0, 0], 1e-4),
    ])  # fmt: skip
    assert "| OPSD | 1e-05 | greedy | 1, 2 | 62.5 | 100.0 | 50.0 | 2.5 |" in table
    # over seeds: mean 37.5, t(.975, 1) = 12.706 times 12.5
    assert "| OPSD - untrained | 1e-05 | greedy | 1, 2 | +37.5 [+0.0, +75.0] | [-121.3, +196.3] |" in table
    assert "| Moderate - OPSD | 1e-05 | greedy | 1 | +25.0 [+0.0, +75.0] | one seed |" in table
    assert "Moderate - OPSD | 0.0001" not in table and "| Moderate - untrained | 0.0001 |" in table


def test_whole_solutions_stand_beside_those_cut_short():
    whole, cut = real_model.WHOLE["Moderate, no clip"], "Moderate, no clip"
    assert real_model.ARMS[whole] == {"method": "pwopsd", "tau_clip": "inf", "max_new_tokens": 448}
    cells = [cell(whole, 1, [1, 1, 0, 0]), cell(cut, 1, [1, 0, 0, 0]), cell("OPSD, no clip, whole", 1, [0, 0, 0, 0])]
    table = real_model.report(cells)
    assert f"| {whole} - {cut} | 1e-05 | greedy | 1 | +25.0 [" in table
    assert f"| {whole} - OPSD, no clip, whole | 1e-05 | greedy | 1 | +50.0 [" in table


def test_a_mean_is_that_of_the_runs_that_tell_it():
    """As where a column of metrics.jsonl came between two seeds."""
    names = "mean_length eos_rate repetition divergence clipped_mass student_entropy teacher_entropy"
    old = dict.fromkeys(names.split(), 1.0) | {"by_decile": {}}
    runs = {1: [old] * 4, 2: [old | {"forward_kl": 0.25}] * 4}
    rows = {seed: cell("OPSD", seed, [1, 1, 1, 1]) | {"steps": steps} for seed, steps in runs.items()}
    both, first = real_model.report([*rows.values()]), real_model.report([rows[1]])
    assert "| OPSD | 1e-05 | 1, 2 | first 1 | 1.000 | 1.000 | 1.000 | 1.000 | 0.250 |" in both
    assert "| OPSD | 1e-05 | 1 | last 1 | 1.000 | 1.000 | 1.000 | 1.000 | nan |" in first


def test_what_cannot_run_says_so(run):
    with pytest.raises(InputError, match="name all three"):
        run("--test=")


def script(folder, monkeypatch, text):
    monkeypatch.setattr(real_model, "ROOT", folder)
    monkeypatch.setattr(real_model, "STOPPED", Event())
    (folder / "train.py").write_text(text)


def test_a_script_that_fails_ends_the_run(tmp_path, capfd, monkeypatch):
    """No other one starts: a row may take half an hour."""
    script(tmp_path, monkeypatch, "import sys\nsys.exit(sys.argv[1])")
    with pytest.raises(InputError, match=r"train\.py has stopped, and its own line"):
        real_model.call("train.py", data="nowhere.jsonl")
    with pytest.raises(InputError, match=r"train\.py is not started"):
        real_model.call("train.py", data="nowhere.jsonl")
    assert capfd.readouterr().err == "--data=nowhere.jsonl\n"
    script(tmp_path, monkeypatch, "import os\nos.kill(os.getpid(), 15)")
    with pytest.raises(InputError, match=r"train\.py has stopped, killed by signal 15"):
        real_model.call("train.py")


def test_a_signal_reaches_the_scripts(tmp_path, monkeypatch):
    """As the queue of a cluster sends it, to the command alone: nothing of it goes on behind its back."""
    script(tmp_path, monkeypatch, "import os, time\nos.kill(os.getppid(), 15)\ntime.sleep(60)")
    before, started = signal.getsignal(signal.SIGTERM), time.monotonic()
    try:
        with pytest.raises(InputError, match=r"train\.py (has stopped, killed by signal 15|is not started)"):
            real_model.measure_all([], [("OPSD", 1), ("OPSD", 2)], "tiny", "float32", tmp_path, at_once=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - started < 30 and not real_model.RUNNING
