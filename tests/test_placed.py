"""The worlds `placed`: what is predicted before training, which cells count, and the report."""

import json
import shutil
from contextlib import nullcontext
from hashlib import sha256

import pytest

from errors import InputError
from experiments.study import placed
from experiments.study.run import read_cells
from problems import tiny_problems
from rollout import Response
from runtime.loading import TINY_MODEL, load_tokenizer

ARMS = list(placed.RISE)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder as make_world leaves it, with the embedded model, and numbers small enough for a test."""
    folder = tmp_path / "placed-12-seed1"
    shutil.copytree(TINY_MODEL, folder / "model")
    rows = [{"problem": p.problem, "solution": p.solution, "answer": p.answer} for p in tiny_problems("train", 24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, size in (("SOLUTIONS", 24), ("DIAGNOSED", 24), ("POSITIONS", 120), ("CONTINUATIONS", 2)):
        monkeypatch.setattr(placed, name, size)
    return folder


@pytest.mark.parametrize("early", [True, False])
def test_harm_early_speaks_for_rising_weights(world, monkeypatch, early):
    """Students' solutions as they are sampled; behind a child of the teacher, an answer is wrong in one half alone."""
    tokenizer, calls = load_tokenizer("tiny"), []

    class Engine(placed.GenerateEngine):
        def sample(self, prompts, keys, settings):
            calls.append(settings.temperature)
            if len(calls) == 1:
                self.problems = prompts
                self.solutions = super().sample(prompts, keys, settings)
                return self.solutions
            answers = {tuple(x): p.answer for x, p in zip(self.problems, tiny_problems("train", 24), strict=True)}
            rows = []
            for prompt in prompts:
                n = next(n for n, x in enumerate(self.problems) if prompt[: len(x)] == x)
                r = (len(prompt) - len(self.problems[n]) - 0.5) / len(self.solutions[n].ids)
                harmed = len(calls) == 3 and (r < 0.5) == early
                text = f"\\boxed{{{'no' if harmed else answers[tuple(self.problems[n])]}}}"
                rows.append(Response([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], True))
            return rows

    monkeypatch.setattr(placed, "GenerateEngine", Engine)
    line = placed.predict(world)
    assert calls == [1.1, 1.0, 1.0]
    tenths = line["harm_by_tenth"]
    zero, harmed = (tenths[5:], tenths[:5]) if early else (tenths[:5], tenths[5:])
    assert zero == [0.0] * 5 and 0.0 < sum(harmed) < 1.0
    for arm, rise in placed.RISE.items():
        point, low, high = line["harm"][arm]
        assert low <= point <= high and (low * rise > 0) == (high * rise > 0) == (not early)
    claims = placed.with_claims(line, {"teacher": 0.7, "unforced": 0.8})["claims"]
    assert claims["harm"] == {arm: placed.SIDES[rise if early else -rise] for arm, rise in placed.RISE.items()}
    assert claims["AUROC above .5"] == claims["always up"] == {**dict.fromkeys(ARMS, "up"), "reversed": "down"}
    assert claims["AUROC above its null"]["Moderate"] == "down" and set(claims["none"].values()) == {"none"}
    assert json.loads(json.dumps(line)) == line


@pytest.mark.slow
def test_the_papers_diagnostic_is_a_rival(world):
    found = placed.position_auroc(world)
    assert set(found) == {"teacher", "unforced"} and all(0.0 <= value <= 1.0 for value in found.values())


def line(world, claim="up", harm=-0.01):
    claims = {"harm": dict.fromkeys(ARMS, claim)}
    return {"world": world, "model_id": f"{world} m", "harm": dict.fromkeys(ARMS, [harm] * 3), "claims": claims}


def predicted(output, *worlds):
    """Add worlds to predictions.jsonl; returns its digest by then."""
    path = output / "predictions.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(line(world)) + "\n" for world in worlds)
    return sha256(path.read_bytes()).hexdigest()


def write_cells(output, part, digest, scores):
    """scores: (world, arm, rate, seed) -> accuracy."""
    (output / part).mkdir(exist_ok=True)
    with (output / part / "cells.jsonl").open("a") as file:
        for (world, arm, rate, seed), accuracy in scores.items():
            evaluation = {"20": {"sampled": accuracy}}
            cell = {"row": f"{world} / {arm} / {rate:g}", "options": {}, "seed": seed, "model_id": f"{world} m",
                    "error": None, "seconds": 1.0, "evaluation": evaluation, "predictions": digest}  # fmt: skip
            file.write(json.dumps(cell) + "\n")


def test_each_arm_is_measured_at_its_best_rate(tmp_path):
    worlds = ("placed-12-seed1", "placed-34-seed1")
    digest = predicted(tmp_path, *worlds)
    grid = placed.tuning(tmp_path)
    assert len(grid.rows) == (2 * 5 + 4) * 3 and grid.facts == {"predictions": digest} and grid.seeds == [4]
    assert grid.options("placed-12-seed1 / reversed / 0.001")["eval_data"].endswith("placed-12-seed1/validation.jsonl")
    assert grid.options("placed-12-seed1 / uniform, clip .05 / 0.001")["tau_clip"] == 0.05
    best = {"uniform": 1e-4, "Moderate": 3e-4, "reversed": 1e-3, "by index": 3e-4, "uniform, clip .05": 3e-4}
    tuned = {(worlds[0], arm, rate, 4): 0.5 + 0.1 * (rate == best[arm]) for arm in best for rate in placed.RATES}
    write_cells(tmp_path, "tuning", digest, tuned | {("placed-34-seed1", "uniform", 1e-4, 4): 0.9})
    grid = placed.final(tmp_path)
    rows = [f"placed-12-seed1 / {arm} / {rate:g}" for arm, rate in {**best, "OPSD": 1e-4}.items()]
    assert set(grid.rows) == set(rows) and grid.seeds == [0, 1, 2, 3]
    assert {grid.options(row)["eval_data"] for row in rows} == {"runs/worlds/placed-12-seed1/final.jsonl"}
    grid = placed.early(tmp_path)
    assert set(grid.rows) == {f"{world} / {arm} / 0.0003" for world in worlds for arm in placed.FOUR}
    assert grid.seeds == [0, 1, 2, 3] and grid.options("placed-34-seed1 / reversed / 0.0003")["learning_rate"] == 3e-4


@pytest.mark.parametrize(("action", "part", "rows"), [
    ("tune", "tuning", 42), ("measure", "final", 0), ("early", "early", 8),
])  # fmt: skip
def test_each_action_runs_its_grid_in_its_own_folder(tmp_path, monkeypatch, call, action, part, rows):
    predicted(tmp_path, "placed-12-seed1", "placed-34-seed1")
    ran = []
    monkeypatch.setattr(placed, "run_grid", lambda grid, output, workers: ran.append((output, len(grid.rows))))
    with nullcontext() if rows else pytest.raises(InputError, match="tuned"):
        call(placed, action, f"--output_dir={tmp_path}")
    assert ran == [(tmp_path / part, rows)] * (rows > 0)


def test_a_cell_before_its_prediction_is_refused(tmp_path):
    first = predicted(tmp_path, "a")
    second = predicted(tmp_path, "b")
    write_cells(tmp_path, "final", first, {("a", "uniform", 1e-4, 0): 0.5})
    write_cells(tmp_path, "final", second, {("a", "uniform", 1e-4, 1): 0.5, ("b", "uniform", 1e-4, 0): 0.25})
    assert placed.scores(tmp_path, "final")["a", "uniform", 1e-4] == {0: 50.0, 1: 50.0}
    cells = read_cells(tmp_path / "final" / "cells.jsonl")
    for digest in (first, "0" * 64):
        write_cells(tmp_path, "final", digest, {("b", "uniform", 1e-4, 1): 0.5})
        with pytest.raises(InputError, match=r"a cell of b that no line of predictions.jsonl came before"):
            placed.scores(tmp_path, "final")
        (tmp_path / "final" / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))


def test_report_by_hand(tmp_path):
    """Moderate is 10 points better in one world and reversed as good as uniform; in two flat worlds nothing moves."""
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    worlds = ["placed-12-seed1", "placed-123456-seed1", "placed-random-seed1", "placed-believed-seed1"]
    digest = predicted(tmp_path, *worlds, "placed-56-seed1")
    final = {
        (world, arm, 1e-4, seed): 0.5 + 0.01 * seed + (arm == "Moderate") * (gain + 0.001 * (-1) ** seed)
        for world, gain in zip(worlds, (0.1, 0.0, 0.004, 0.02), strict=True)
        for arm in ("uniform", "Moderate", "reversed", "OPSD") for seed in range(4)
    } | {
        (worlds[0], arm + placed.CLIPPED, 1e-3, seed): 0.3 + 0.01 * seed + (arm == "Moderate") * 0.02 * seed
        for arm in ("uniform", "Moderate") for seed in range(4)
    } | {
        ("placed-56-seed1", arm, 1e-3, seed): 0.3 for arm in ("uniform", "Moderate") for seed in range(3)
    }  # fmt: skip
    write_cells(tmp_path, "final", digest, final)
    early = {(worlds[0], arm, 3e-4, seed): 0.4 + (arm == "reversed") * (0.2 + 0.001 * (-1) ** seed)
             for arm in ("uniform", "Moderate", "reversed") for seed in range(4)}  # fmt: skip
    write_cells(tmp_path, "early", digest, early)
    text = placed.write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert "5 of 16 base models predicted" in text and "At tuned rates: 8 of 10 differences" in text
    first, at_fixed, clipped = (row for row in text.splitlines() if row.startswith("| placed-12-seed1"))
    gain, nothing = "+10.0 [+9.8, +10.2]", "+0.0 [+0.0, +0.0]"
    # OPSD is as good as uniform
    assert first == f"| placed-12-seed1 | up; {gain}, hit | up; {nothing} | {gain} | {nothing} |"
    assert "| placed-56-seed1 | up; - |" in text and "| harm | 3 of 8 |" in text  # Moderate, where it gains
    assert "window's place: Spearman -." in text  # one window
    # Moderate in the flat worlds: 0 and .4 points, mean .2, half a width t(1) at 90 % times .2: 6.31 * .2
    assert "| Moderate | 2 | +0.2 [-1.1, +1.5] | yes |" in text
    assert "| Moderate | 4 | - |" in text  # equal predictions have no rank
    assert "At 0.0003 everywhere: 2 of 10 differences" in text and "| harm | 1 of 2 |" in text
    lost = "-20.0 [-20.2, -19.8]"
    assert at_fixed == f"| placed-12-seed1 | up; {nothing} | up; +20.0 [+19.8, +20.2], hit | {lost} |"
    assert clipped == "| placed-12-seed1 | -20.0 [-20.0, -20.0] | +3.0 [-1.1, +7.1] | - | - |"  # 0, 2, 4, 6; t(3) 3.18


def test_scatter_shows_prediction_and_measurement(tmp_path):
    for name in ("scipy", "matplotlib"):
        pytest.importorskip(name)
    predicted(tmp_path, "placed-12-seed1")
    up = placed.paired_difference({0: 3.0, 1: 5.0}, {0: 1.0, 1: 1.0})
    found = {"final": {}, "early": {("placed-12-seed1", "Moderate"): up}}
    tuned, early = placed.scatter(placed.read_predictions(tmp_path), found).axes
    assert not tuned.containers
    (bars,) = early.containers
    assert [*map(float, (*bars[0].get_xdata(), *bars[0].get_ydata()))] == [-1.0, 3.0]


def test_rank_correlation_by_hand(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.setattr(placed, "RESAMPLES", 50)
    assert placed.rank_correlation([(1, 2), (2, 3), (3, 5), (4, 9)]) == "+1.00 [+1.00, +1.00]"
    assert placed.rank_correlation([(1, 9), (2, 5), (3, 3), (4, 2)]) == "-1.00 [-1.00, -1.00]"
    assert placed.rank_correlation([(1, 2), (2, 3), (3, 5)]) == "-"
