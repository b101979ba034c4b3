"""The study: its statistics against known values, its bookkeeping of cells, and the report made from them."""

import json
import signal
import sys
from itertools import product
from pathlib import Path

import pytest

import experiments.study.rules  # noqa: F401  (registers its rows)
from errors import InputError
from experiments.study import report
from experiments.study import run as study
from experiments.study.grids import GRIDS, Grid
from experiments.study.report import Difference, after, family, paired_difference, write_report
from experiments.study.run import Cell, missing_cells, read_cells, run_grid
from runtime.ranks import STOP_SIGNALS, Stop
from train import parse_config

RESULTS = Path(__file__).resolve().parent.parent / "experiments" / "results"
TINY = Grid(common={"num_steps": 2}, seeds=[0, 1], rows={"OPSD": {"method": "opsd"}, "PW": {"method": "pwopsd"}})
BEHAVIOUR = dict.fromkeys(("leaps", "strays", "leaps_sampled", "strays_sampled"), 0.0)
BEHAVIOUR |= {"repaired": 0.5, "broken": None, "stated": 0.9}


def record(options, seed, after, *, error=None):
    start = {"0": {"sampled": 0.5, "greedy": 0.25}}
    end = {} if error else {"2": {"sampled": after, "greedy": after - 0.1}}
    return {
        "row": "any", "options": options, "seed": seed, "model_id": "m", "seconds": 1.0, "evaluation": start | end,
        "behaviour": {step: dict(BEHAVIOUR) for step in start | end}, "accuracy": [0.5, 0.5], "eos_rate": [1.0, 1.0],
        "error": error, "git_commit": "c", "versions": {"python": "3", "torch": "2", "transformers": "5"},
        "machine": "x",
    }  # fmt: skip


@pytest.fixture
def fake_cells(monkeypatch):
    """Cells that cost nothing; returns the list of those that ran."""
    ran = []

    def run_cell(cell, output):
        ran.append((cell.row, cell.seed))
        return record(cell.options, cell.seed, 0.9) | {"model_id": cell.model_id}

    monkeypatch.setattr(study, "run_cell", run_cell)
    return ran


def test_a_cell_leaves_the_signals_as_they_were(tmp_path, monkeypatch):
    """train.main leaves those of its run, which would swallow a Ctrl-C between two cells."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    monkeypatch.setattr(study.train, "main", lambda: Stop().listen())
    monkeypatch.setattr(study, "measured", lambda *_: {})
    study.run_cell(Cell("row", {}, 0, "m"), tmp_path)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_cell_that_stops_before_its_first_score_says_so_and_one_without_finite_logits_is_a_result(
    tmp_path, monkeypatch
):
    cell = Cell("row", {}, 0, "m")
    monkeypatch.setattr(study.train, "main", lambda: 130)
    with pytest.raises(InputError, match="stopped before its end"):
        study.run_cell(cell, tmp_path)

    def fail(*_, **__):
        raise FloatingPointError("held out: logits nan")

    monkeypatch.undo()
    monkeypatch.setattr(study.train.engines, "sample", fail)  # its run, having written no row, takes its folder away
    found = study.run_cell(cell, tmp_path)
    assert (found["error"], found["evaluation"], found["max_grad_norm"]) == ("held out: logits nan", {}, None)
    failed = {name: found[name] for name in ("error", "evaluation", "behaviour")}
    text = write_report(Grid({}, [0], TINY.rows), [{**record(TINY.rows["OPSD"], 0, 0.9), **failed}], tmp_path)
    assert "- OPSD, seed 0: held out: logits nan" in text


def test_paired_difference_by_hand(monkeypatch):
    pytest.importorskip("scipy")
    left, right = {0: 3.0, 1: 5.0, 2: 7.0, 9: 100.0}, {0: 1.0, 1: 4.0, 2: 4.0, 8: -100.0}
    d = paired_difference(left, right)  # differences 2, 1, 3: mean 2, std 1; seeds 8 and 9 have no partner
    assert (d.pairs, d.mean, d.std) == (3, 2.0, 1.0)
    assert (d.low, d.high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)  # t(2)
    assert d.p == pytest.approx(0.0742, abs=1e-4)
    assert paired_difference({0: 1.0}, {0: 2.0}) is None
    equal = paired_difference({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5})  # scores come in steps: no certainty
    assert (equal.mean, equal.low, equal.high, equal.p) == (0.5, 0.5, 0.5, 1.0)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(InputError, match="pip install scipy"):
        paired_difference(left, right)


def test_holm_by_hand(monkeypatch):
    # Sorted .01 <= .05/4, .015 <= .05/3, .03 > .05/2: the procedure stops there, also before .04 <= .05/1.
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.015, "once": None}
    monkeypatch.setattr(report, "paired_difference", lambda p, _: p and Difference(5, 1.0, 1.0, 0.0, 2.0, p))
    found = family({name: (p, None) for name, p in p_values.items()})
    assert {name: d.settled for name, d in found.items()} == {"a": True, "b": False, "c": False, "d": True}
    assert [str(found[name]) for name in "ab"] == ["**+1.0 [+0.0, +2.0]**", "+1.0 [+0.0, +2.0]"]


# --- cells ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_grid_names_are_known_to_the_trainer(grid):
    for name in grid.rows:
        flags = [f"--{key}={value}" for key, value in grid.options(name).items()]
        assert parse_config(flags).method == grid.rows[name]["method"]


def test_a_grid_names_its_own_rows():
    for given in ({"baseline": "PW"}, {"contrasts": (("OPSD", "PW"),)}):
        with pytest.raises(InputError, match="a grid without a row named PW"):
            Grid({}, [0], {"OPSD": {}}, **given)


def test_every_cell_runs_once_and_a_line_cut_short_again(fake_cells, tmp_path):
    path = tmp_path / "cells.jsonl"
    run_grid(TINY, tmp_path, workers=1)
    assert fake_cells == [("OPSD", 0), ("PW", 0), ("OPSD", 1), ("PW", 1)]
    first = path.read_text()
    run_grid(TINY, tmp_path, workers=1)
    assert len(fake_cells) == 4 and path.read_text() == first
    path.write_text(first[:-20])
    run_grid(TINY, tmp_path, workers=1)
    assert fake_cells[4:] == [("PW", 1)] and path.read_text() == first
    changed = Grid({"num_steps": 3}, [0], TINY.rows)
    assert [cell.row for cell in missing_cells(changed, read_cells(path))] == ["OPSD", "PW"]


@pytest.mark.parametrize("line", ["nonsense", '{"a": 1}', "[1]"])
def test_a_line_that_is_no_cell_is_named(tmp_path, line):
    whole = json.dumps(record({}, 0, 0.9))
    (tmp_path / "cells.jsonl").write_text(f"{whole}\n{line}\n{whole}\n")
    with pytest.raises(InputError, match=r"cells.jsonl, line 2: not"):
        read_cells(tmp_path / "cells.jsonl")


def test_what_cannot_run_is_told_before_the_first_cell(fake_cells, tmp_path):
    (tmp_path / "file").write_text("")
    opsd = {"method": "opsd"}
    blind = Grid({"preset": "qwen3-4b", "model": "tiny"}, [0], {"OPSD": opsd})
    for grid, output, said in (
        (TINY, tmp_path / "file", "--output_dir .*file: cannot be written"),
        (Grid({}, [0], {"OPSD": opsd, "bad": {"method": "none"}}), tmp_path, "--method none"),
        (Grid({}, [0], {"OPSD": opsd, "bad": {"method": "opsd", "top_p": 2}}), tmp_path, "--top_p 2"),
        (blind, tmp_path, "row OPSD: no --eval_data"),
    ):
        with pytest.raises(InputError, match=said):
            run_grid(grid, output, workers=1)
    with pytest.raises(InputError, match="another model"):
        missing_cells(TINY, [record(TINY.options("OPSD"), 0, 0.9)])
    assert not fake_cells and len(missing_cells(blind, [])) == 1


def test_rows_with_equal_options_share_cells(fake_cells, tmp_path):
    pytest.importorskip("scipy")
    grid = Grid({}, [0, 1], {"OPSD": {"method": "opsd"}, "again": {"method": "opsd"}})
    text = write_report(grid, run_grid(grid, tmp_path, workers=1), tmp_path)
    assert len(fake_cells) == 2
    assert "| OPSD | 90.0 ± 0.0 | - |" in text and "| again | 90.0 ± 0.0 | +0.0 [+0.0, +0.0] |" in text


@pytest.mark.slow
def test_a_cell_is_a_run_of_train(tmp_path):
    """One real cell of one step: its line holds what the run's own files hold; a second call adds nothing."""
    data = tmp_path / "three.jsonl"
    data.write_text("".join(f'{{"problem": "1+2+3+4+{n}", "answer": "{10 + n}"}}\n' for n in (5, 6, 7)))
    common = {"num_steps": 1, "batch_size": 2, "eval_data": str(data), "tau_clip": "inf", "device": "cpu"}
    grid = Grid(common, [3], {"OPSD": {"method": "opsd"}}, facts={"predictions": "abc"})
    (cell,) = run_grid(grid, tmp_path, workers=1)
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert cell["evaluation"] == evaluation and set(evaluation) == {"0", "1"}
    assert cell["predictions"] == "abc" and cell["machine"].startswith(study.processor())
    assert cell["behaviour"]["1"].keys() == BEHAVIOUR.keys()
    held_out = [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]
    right = {(str(r["step"]), r["decoding"], r["problem"]): str(int(r["correct"])) for r in held_out}
    for step, decoding in product(("0", "1"), ("sampled", "greedy")):
        assert cell["right"][step][decoding] == "".join(right[step, decoding, problem] for problem in range(3))
    assert json.loads((run / "config.json").read_text())["config"]["seed"] == 3
    assert not list(run.glob("checkpoint-*"))
    assert run_grid(grid, tmp_path, workers=1) == [cell]
    (tmp_path / "cells.jsonl").unlink()  # as after a kill between the run and its line
    assert run_grid(grid, tmp_path, workers=1)[0]["right"] == cell["right"]


def test_behaviour_by_hand():
    """Two of three facts stated again, the wrong one repaired, the right one broken; one leap; sampled, one stray."""
    problems = [study.Problem("3+8+5", "", "16"), study.Problem("4+4", "", "8")]

    def rows(*texts):
        return [{"problem": index, "text": text} for index, text in enumerate(texts)]

    greedy, sampled = rows("3+8=11;11+~=16;", "4+4=9;"), rows("3+8=11;", "4+4=8;")
    found = study.behaviour(problems, rows("3+8=12;12+5=17;", "4+4=8;"), {"greedy": greedy, "sampled": sampled})
    assert found == {
        "stated": 2 / 3, "repaired": 1.0, "broken": 1.0, "leaps": 0.5, "strays": 0.0, "leaps_sampled": 0.0,
        "strays_sampled": 0.5,
    }  # fmt: skip
    nothing = study.behaviour(problems, rows("words", "words"), {"greedy": greedy, "sampled": sampled})
    assert set(nothing.values()) == {None}


# --- the report -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_the_committed_report_comes_out_of_its_cells(name, tmp_path):
    pytest.importorskip("scipy")
    folder = RESULTS / f"study-{name}"
    text = write_report(GRIDS[name], read_cells(folder / "cells.jsonl"), tmp_path)
    assert text == (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()


def test_report_tells_effect_from_noise(tmp_path):
    """Six seeds: rows 10 points better each time, a little better, that move with no direction, that broke off."""
    pytest.importorskip("scipy")
    rows = {"OPSD": {"method": "opsd"}, "better": {"a": 1}, "noise": {"a": 2}, "broken": {"a": 3}, "almost": {"a": 4}}
    grid = Grid({}, list(range(6)), rows)
    records = []
    for seed, row in product(grid.seeds, grid.rows):
        sign = (-1) ** seed
        change = {"better": 0.10 + 0.001 * sign, "noise": 0.02 * sign, "almost": 0.02 + 0.0165 * sign}.get(row, 0.0)
        error = "step 3: the loss is nan" if row == "broken" else None
        records.append(record(grid.options(row), seed, None if error else 0.8 + 0.01 * seed + change, error=error))
    text = write_report(grid, records, tmp_path)
    assert "rows): before training -32.5; better +10.0. Leaning" in text
    assert "does not): almost +2.0. Not" in text and "noise: noise +0.0. With 6 seeds" in text  # p = .042
    assert "| noise | 82.5 ± 2.4 | +0.0 [-2.3, +2.3] |" in text  # 82, 79, 84, 81, 86, 83; t(5) 2.571 * 2.19 / sqrt(6)
    assert "- broken, seed 5: step 3: the loss is nan" in text and "| broken | - | - | - | - |" in text


def test_what_is_measured_along_training():
    """Leaps after 1 step in percent; repaired facts need most of the base's stated again, and step 0 repairs none."""
    cells = [record({}, seed, 0.9) for seed in (0, 1)]
    for cell in cells:
        cell["evaluation"]["1"], cell["behaviour"]["1"] = {}, BEHAVIOUR | {"stated": 0.4, "leaps": 0.25}
    assert after(cells, "leaps", 1) == {0: 25.0, 1: 25.0} and after(cells, "repaired") == {0: 50.0, 1: 50.0}
    assert after(cells, "repaired", 0) == after(cells, "repaired", 1) == {}


def test_report_of_an_unfinished_grid(tmp_path):
    pw, other = record(TINY.options("PW"), 0, 0.9), record({"method": "eopd"}, 0, 0.9)
    with pytest.raises(InputError, match="no cell of this grid"):
        write_report(TINY, [other, record(TINY.options("PW"), 7, 0.9)], tmp_path)
    with pytest.raises(InputError, match="several models"):
        write_report(TINY, [pw, record(TINY.options("PW"), 1, 0.9) | {"model_id": "n"}], tmp_path)
    text = write_report(TINY, [pw, other], tmp_path)
    assert "1 of 4 cells" in text and " 0 minutes summed" in text and "has not been measured yet" in text
    assert "no row has two seeds" in write_report(TINY, [pw, record(TINY.options("OPSD"), 0, 0.8)], tmp_path)
