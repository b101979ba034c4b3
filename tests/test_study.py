"""The study: its statistics against known values, its bookkeeping of cells, and the report made from them."""

import json
import shlex
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import pytest

import experiments.study.rules  # noqa: F401  (registers its rows)
from errors import InputError
from experiments.study import run as study
from experiments.study.grids import GRIDS, Grid
from experiments.study.report import (
    BEFORE,
    Difference,
    collect,
    detectable,
    holm,
    paired_difference,
    segments,
    t_quantile,
    t_two_sided_p,
    write_report,
)
from experiments.study.run import missing_cells, read_cells, read_grid, run_grid
from train import parse_config

TINY = Grid(common={"num_steps": 2}, seeds=[0, 1], rows={"OPSD": {"method": "opsd"}, "PW": {"method": "pwopsd"}})
BEHAVIOUR = {
    "repaired": 0.5, "broken": None, "stated": 0.9, "leaps": 0.0, "strays": 0.0,
    "leaps_sampled": 0.0, "strays_sampled": 0.0,
}  # fmt: skip
VERSIONS = {"python": "3", "torch": "2", "transformers": "5"}


def record(options, seed, after, *, error=None, accuracy=(0.5, 0.5)):
    start = {"0": {"sampled": 0.5, "greedy": 0.25}}
    end = {} if error else {"2": {"sampled": after, "greedy": after - 0.1}}
    return {
        "row": "any", "options": options, "seed": seed, "model_id": "m", "seconds": 1.0,
        "evaluation": start | end,
        "behaviour": {step: dict(BEHAVIOUR) for step in start | end},
        "accuracy": list(accuracy), "eos_rate": [1.0] * len(accuracy), "error": error, "git_commit": "c",
        "versions": VERSIONS, "machine": "x",
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


# Student's t: the tables of any statistics book.
@pytest.mark.parametrize(("p", "df", "t"), [(0.05, 4, 2.776), (0.05, 1, 12.706), (0.01, 9, 3.250), (0.4, 4, 0.941)])
def test_t_table(p, df, t):
    pytest.importorskip("scipy")
    assert t_quantile(p, df) == pytest.approx(t, abs=1e-3)
    assert t_two_sided_p(t, df) == pytest.approx(p, abs=2e-4)


def test_no_scipy_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(InputError, match="pip install scipy"):
        paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 1.0})


def test_paired_difference_by_hand():
    pytest.importorskip("scipy")
    left, right = {0: 3.0, 1: 5.0, 2: 7.0, 9: 100.0}, {0: 1.0, 1: 4.0, 2: 4.0, 8: -100.0}
    d = paired_difference(left, right)  # differences 2, 1, 3: mean 2, std 1; seeds 8 and 9 have no partner
    assert (d.pairs, d.mean, d.std) == (3, 2.0, 1.0)
    assert d.half == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert d.p == pytest.approx(0.0742, abs=1e-4)
    assert paired_difference({0: 1.0}, {0: 2.0}) is None


def test_equal_cells_differ_by_nothing():
    d = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (d.mean, d.half, d.p) == (0.0, 0.0, 1.0)


def test_holm_by_hand():
    # Sorted .01 <= .05/4, .015 <= .05/3, .03 > .05/2: the procedure stops there, also before .04 <= .05/1.
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.015}
    assert holm({name: Difference(5, 1.0, 1.0, 1.0, value) for name, value in p.items()}) == {"a", "d"}
    assert holm({"a": None}) == set()


def test_detectable_shrinks_with_seeds():
    pytest.importorskip("scipy")
    assert detectable(2.0, 5) == pytest.approx((2.776 + 0.941) * 2.0 / 5**0.5, abs=1e-2)
    assert detectable(2.0, 20) < detectable(2.0, 5) / 2


def test_segments_cover_every_value():
    assert segments([1.0, 2.0]) == [1.0, 2.0]
    values = [float(i) for i in range(10)]
    assert segments(values) == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_each_grid_has_a_folder_of_its_own():
    assert len({study.default_folder(name) for name in GRIDS}) == len(GRIDS)
    assert str(study.default_folder("some/mine.json")) == "runs/study-mine"


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_grid_names_are_known_to_the_trainer(grid):
    for name in grid.rows:
        flags = [f"--{key}={value}" for key, value in grid.options(name).items()]
        assert parse_config(flags).method == grid.rows[name]["method"]
    assert {grid.baseline, *(name for pair in grid.contrasts for name in pair)} <= {*grid.rows, BEFORE}


def test_every_cell_runs_once(fake_cells, tmp_path):
    run_grid(TINY, tmp_path, workers=1)
    assert fake_cells == [("OPSD", 0), ("PW", 0), ("OPSD", 1), ("PW", 1)]
    first = (tmp_path / "cells.jsonl").read_text()
    run_grid(TINY, tmp_path, workers=1)
    assert len(fake_cells) == 4
    assert (tmp_path / "cells.jsonl").read_text() == first


def test_a_line_cut_short_runs_again(fake_cells, tmp_path):
    run_grid(TINY, tmp_path, workers=1)
    path = tmp_path / "cells.jsonl"
    path.write_text(path.read_text()[:-20])
    run_grid(TINY, tmp_path, workers=1)
    assert fake_cells[4:] == [("PW", 1)]
    assert len(read_cells(path)) == 4


@pytest.mark.parametrize("line", ["nonsense", '{"a": 1}', "[1]"])
def test_a_line_that_is_no_cell_is_named(tmp_path, line):
    whole = json.dumps(record({}, 0, 0.9))
    (tmp_path / "cells.jsonl").write_text(f"{whole}\n{line}\n{whole}\n")
    with pytest.raises(InputError, match=r"cells.jsonl, line 2: not"):
        read_cells(tmp_path / "cells.jsonl")


def test_an_output_that_is_no_folder_and_a_negative_number_of_workers_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output_dir .*file: cannot be written"):
        run_grid(TINY, tmp_path / "file", workers=1)
    monkeypatch.setattr(sys, "argv", ["study", "--workers", "-1", "--output_dir", str(tmp_path)])
    with pytest.raises(InputError, match="--workers -1"):
        study.main()


def test_rows_with_equal_options_share_cells(fake_cells, tmp_path):
    grid = Grid({}, [0], {"OPSD": {"method": "opsd"}, "again": {"method": "opsd"}})
    records = run_grid(grid, tmp_path, workers=1)
    assert len(fake_cells) == 1
    assert [row.after("sampled") for row in collect(grid, records)] == [{0: 90.0}, {0: 90.0}]


def test_changed_options_run_again(fake_cells, tmp_path):
    run_grid(TINY, tmp_path, workers=1)
    changed = Grid({"num_steps": 3}, [0], TINY.rows)
    assert [cell.row for cell in missing_cells(changed, read_cells(tmp_path / "cells.jsonl"))] == ["OPSD", "PW"]


def test_results_of_another_model_are_not_mixed():
    with pytest.raises(InputError, match="another model"):
        missing_cells(TINY, [record(TINY.options("OPSD"), 0, 0.9)])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"rows": {"OPSD": {}}, "seeds": []}',
        '{"rows": {"A": {}}, "seeds": [0]}',
        '{"rows": {"OPSD": {}}, "seeds": [0], "contrasts": [["OPSD", "B"]]}',
        '{"rows": {"OPSD": {}}, "seeds": [0], "colour": 1}',
        '{"rows": {"OPSD": 3}, "seeds": [0]}',
        '{"rows": ["OPSD"], "seeds": [0]}',
        '{"rows": {"OPSD": {}}, "seeds": 3}',
        '{"rows": {"OPSD": {}}, "seeds": ["a"]}',
        '{"rows": {"OPSD": {}}, "seeds": [0], "common": [1]}',
    ],
)
def test_a_bad_grid_is_refused(tmp_path, content):
    path = tmp_path / "grid.json"
    path.write_text(content)
    with pytest.raises(InputError, match="--grid"):
        read_grid(path)


def test_report_tells_effect_from_noise(tmp_path):
    """Six seeds: a row 10 points better each time, one that moves with no direction, one that broke off."""
    pytest.importorskip("scipy")
    grid = Grid(
        {}, list(range(6)), {"OPSD": {"method": "opsd"}, "better": {"a": 1}, "noise": {"a": 2}, "broken": {"a": 3}}
    )
    records = []
    for seed, row in product(grid.seeds, grid.rows):
        change = {"OPSD": 0.0, "better": 0.10 + 0.001 * (seed % 2), "noise": 0.02 * (-1) ** seed, "broken": 0.0}[row]
        error = "step 3: the loss is nan" if row == "broken" else None
        records.append(record(grid.options(row), seed, None if error else 0.8 + 0.01 * seed + change, error=error))
    text = write_report(grid, records, tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    verdict = next(line for line in text.splitlines() if line.startswith("**Sampled"))
    settled, _, rest = verdict.partition("Leaning")
    assert "better +10.0" in settled
    assert "noise" not in settled
    assert "noise +0.0" in rest
    line = next(line for line in text.splitlines() if line.startswith("| noise |"))
    after = [82, 79, 84, 81, 86, 83]
    assert f"| {mean(after):.1f} ± {stdev(after):.1f} | +0.0 [-2.3, +2.3] |" in line  # t(5) 2.571 * 2.19 / sqrt(6)
    assert "| before training | 50.0 ± 0.0 | **-32.5 [" in text
    assert "step 3: the loss is nan" in text
    assert "seeds 0, 1, 2, 3, 4, 5" in text


def test_report_along_training(tmp_path):
    """A row 20 points better after 1 step and 10 worse after 2: by step, paired, with leaps and repaired facts."""
    pytest.importorskip("scipy")
    grid = Grid({"eval_steps": 1}, [0, 1, 2], {"OPSD": {"method": "opsd"}, "early": {"a": 1}, "once": {"a": 2}})
    records = []
    for seed, (row, (first, last)) in product(
        grid.seeds, {"OPSD": (0, 0), "early": (0.2, -0.1), "once": (0, 0)}.items()
    ):
        if row == "once" and seed:
            continue
        cell = record(grid.options(row), seed, 0.5 + 0.01 * seed + last + 0.001 * (row == "early") * seed)
        cell["evaluation"]["1"] = {"sampled": 0.6 + 0.01 * seed + first, "greedy": 0.3}
        cell["behaviour"]["1"] = BEHAVIOUR | {"stated": 0.4, "leaps": 0.25}
        records.append(cell)
    text = write_report(grid, records, tmp_path)
    sampled, greedy, leaps = (
        text.split("## Along training")[1].split("## Learning")[0].split("| after steps | 1 | 2 |")[1:]
    )
    assert "| early | 81.0 ± 1.0, +20.0 [+20.0, +20.0] | 41.1 ± 1.1, **-9.9 [-10.1, -9.7]** |" in sampled
    assert "| once | 60.0 | 50.0 |" in sampled  # one seed: no difference
    assert "| OPSD | 61.0 ± 1.0 | 51.0 ± 1.0 |" in sampled
    assert "| early | 30.0 ± 0.0, +0.0 [+0.0, +0.0] |" in greedy
    assert "| early | 25.0, 0.0, - | 0.0, 0.0, 50.0 |" in leaps
    assert "Along training" not in write_report(TINY, [record(TINY.options("OPSD"), 0, 0.8)], tmp_path)


def test_cells_of_another_grid_are_no_report(tmp_path):
    with pytest.raises(InputError, match="no cell of this grid"):
        write_report(TINY, [record({"method": "eopd"}, 0, 0.9), record(TINY.options("PW"), 7, 0.9)], tmp_path)
    text = write_report(TINY, [record(TINY.options("PW"), 0, 0.9), record({"method": "eopd"}, 0, 0.9)], tmp_path)
    assert "1 of 4 cells" in text and " 0 minutes summed" in text
    other = record(TINY.options("PW"), 1, 0.9) | {"model_id": "n"}
    with pytest.raises(InputError, match="several models"):
        write_report(TINY, [record(TINY.options("PW"), 0, 0.9), other], tmp_path)


def test_report_of_an_unfinished_grid(tmp_path):
    records = [record(TINY.options("PW"), 0, 0.9)]
    assert "has not been measured yet" in write_report(TINY, records, tmp_path)
    assert "no row has two seeds" in write_report(TINY, [*records, record(TINY.options("OPSD"), 0, 0.8)], tmp_path)


def test_equal_differences_of_few_seeds_settle_nothing(tmp_path):
    """Scores come in steps: that two seeds differ by the same quarter of a point happens."""
    pytest.importorskip("scipy")
    records = [record(TINY.options(row), seed, 0.5 + 0.1 * (row == "PW")) for row in TINY.rows for seed in TINY.seeds]
    assert "Settled (5 %, Holm over 2 rows): none." in write_report(TINY, records, tmp_path)


def test_a_row_that_the_trainer_refuses_is_told_before_the_first_cell(fake_cells, tmp_path):
    for options, said in (({"method": "none"}, "--method none"), ({"method": "opsd", "top_p": 2}, "--top_p 2")):
        with pytest.raises(InputError, match=said):
            run_grid(Grid({}, [0], {"OPSD": {"method": "opsd"}, "bad": options}), tmp_path, 1)
    blind = Grid({"preset": "qwen3-4b", "model": "tiny"}, [0], {"OPSD": {"method": "opsd"}})
    with pytest.raises(InputError, match="row OPSD: no --eval_data"):
        run_grid(blind, tmp_path, 1)
    assert not fake_cells and len(missing_cells(blind, [])) == 1


def test_a_command_is_one_that_runs(tmp_path):
    """Of every grid, through the rules' own entry: the trainer without them knows four methods."""
    cell = study.Cell("a row", {"method": "shuffled", "data": "my data.jsonl"}, 3, "m")
    words = shlex.split(study.command(cell, tmp_path))
    assert words[:3] == ["torchrun", "-m", "experiments.study.rules"]
    config = parse_config(words[3:])
    assert (config.method, config.data, config.seed) == ("shuffled", "my data.jsonl", 3)
    assert Path(config.output_dir) == tmp_path / "runs" / cell.folder


def test_workers_stay_on_the_gpus_they_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert study.visible_gpus() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert study.visible_gpus() == ["0", "1"]


def test_right_answers_by_problem():
    rows = [
        {"step": step, "decoding": decoding, "problem": problem, "correct": problem == 2 or step == 1}
        for problem in (2, 0, 1) for step in (0, 1) for decoding in ("sampled", "greedy")
    ]  # fmt: skip
    assert (study.right(rows, 0, "greedy"), study.right(rows, 1, "sampled")) == ("001", "111")


def test_a_cell_is_a_run_of_train(tmp_path):
    """One real cell of one step: its line holds what the run's own files hold; a second call adds nothing."""
    data = tmp_path / "two.jsonl"
    rows = [{"problem": "1+2+3+4+5", "solution": "1+2=3;3+3=6;6+4=10;10+5=15;\\boxed{15}", "answer": "15"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"num_steps": 1, "batch_size": 2, "eval_data": str(data), "tau_clip": "inf", "device": "cpu"}
    grid = Grid(common, [3], {"OPSD": {"method": "opsd"}})
    (cell,) = run_grid(grid, tmp_path, workers=1)
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert cell["evaluation"] == evaluation and set(evaluation) == {"0", "1"}
    assert cell["behaviour"]["1"].keys() == BEHAVIOUR.keys()
    for step, decoding in product(("0", "1"), ("sampled", "greedy")):
        assert cell["right"][step][decoding] == str(int(evaluation[step][decoding]))  # of one problem
    assert cell["accuracy"] == [json.loads((run / "metrics.jsonl").read_text())["accuracy"]]
    assert json.loads((run / "config.json").read_text())["config"]["seed"] == 3
    assert not list(run.glob("checkpoint-*"))
    assert run_grid(grid, tmp_path, workers=1) == [cell]
