import json
import re
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

import viability
from errors import InputError
from experiments import diagnose_report as report
from experiments.diagnose_report import REMAINING, write_report
from loss import resolve_method
from train import parse_config
from viability import GRAY, LABELS, POSITION, LabelRule, auroc_of, label_children
from weighting import SCHEDULES, relative_position

RULE, FIGURE = LabelRule(bootstraps=100), report.figure1


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """No picture."""
    monkeypatch.setattr(report, "figure1", lambda *_: None)


def a_world(teacher_factor=lambda r: 1.0, problems=40, seed=0, base=lambda r: 0.25 + 0.7 * r):
    """Rows as phase F writes them: unforced viability base(r), and the teacher's children factor(r) of it."""
    draw, rows = np.random.default_rng(seed), []
    for problem in range(problems):
        length = int(draw.integers(80, 120))
        for position in sorted(draw.choice(length, 5, replace=False).tolist()):
            r = (position + 0.5) / length
            chance = {"teacher": base(r) * teacher_factor(r), "student": base(r), "unforced": base(r)}
            viability = {arm: (draw.binomial(6, p, 3) / 6).tolist() for arm, p in chance.items()}
            rows.append({
                "problem": problem, "position": position, "length": length,
                "h_trunc": draw.random(), "entropy": draw.random(), "mutual_information": draw.random(),
                "log_kappa": draw.normal(), "viability": viability,
                "teacher": [7, 8, 9], "student": [7, 9, 8] if r > 0.5 else [7, 8, 5],
                "label": {arm: LABELS[int(label_children(np.array(v), RULE))] for arm, v in viability.items()},
            })  # fmt: skip
    return rows


def analysed(rows):
    return report.analyse(rows, RULE)[1]


def a_folder(path, rows, rule=RULE):
    """A run's folder as diagnose.py leaves it, as far as the report reads it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "F_labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "table1.json").write_text(json.dumps({"rule": asdict(rule)}))
    return path


def test_a_faultless_teacher_is_told_from_a_faulty_one():
    """Early prefixes fail in both worlds; only in the second do the teacher's tokens add to it."""
    faultless, faulty = analysed(a_world(seed=1)), analysed(a_world(lambda r: 0.4 + 0.6 * (r > 0.5), seed=1))
    for result in (faultless, faulty):
        assert result["table1"][POSITION]["interval"][0] > 0.5  # position wins in both
    paired = faultless["arms"]["unforced"]["teacher_minus_arm"]
    assert all(abs(paired[part]["mean"]) < 0.05 for part in ("early", "late"))
    paired = faulty["arms"]["unforced"]["teacher_minus_arm"]
    assert paired["early"]["interval"][1] < -0.1 and abs(paired["late"]["mean"]) < 0.05


def test_remaining_length_competes_in_the_table_that_diagnose_prints():
    rows = a_world(problems=20)
    data, result = report.analyse(rows, RULE)
    assert data.score[REMAINING].tolist() == [row["length"] - row["position"] for row in rows]
    assert result["table1"].items() >= viability.table1(viability.to_columns(rows, RULE))["table1"].items()


def test_differences_are_paired_by_resample():
    row = ({"auroc": 0.7}, np.array([0.6, 0.8, np.nan]))
    assert report.difference(row, row) == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert report.difference(row, None) is None
    better = report.difference(({"auroc": 0.9}, np.array([0.9, 0.9, 0.9])), row)
    assert better == {"difference": pytest.approx(0.2), "interval": pytest.approx([0.105, 0.295])}


def test_one_class_gives_no_number_but_a_report(tmp_path):
    text = write_report([a_folder(tmp_path, a_world(base=lambda r: 0.99))], tmp_path)
    result = json.loads((tmp_path / "controls.json").read_text())
    assert result["table1"][POSITION] is None and result["labels"]["real-uncertain"] == 0
    assert f"| {POSITION} | - | - | - | - |" in text
    text = write_report([a_folder(tmp_path, a_world()[::5])], tmp_path)  # one candidate a problem, as by --candidates 1
    assert "within a problem, teacher | - |" in text and "NaN" not in (tmp_path / "controls.json").read_text()


def test_mistakes_are_named(tmp_path, call):
    with pytest.raises(InputError, match=r"no finished run of diagnose\.py"):
        write_report([tmp_path], tmp_path)
    with pytest.raises(InputError, match="found no candidate"):
        write_report([a_folder(tmp_path, [])], tmp_path)
    with pytest.raises(InputError, match="--output_dir"):
        call(report, "a", "b")
    run, theirs = a_folder(tmp_path / "run", a_world(problems=10)), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "report.md").write_text("# mine")
    with pytest.raises(InputError, match=r"theirs: holds a report\.md of another program"):
        write_report([run], theirs)
    assert (theirs / "report.md").read_text() == "# mine"
    (theirs / "report.md").unlink()
    assert write_report([run], theirs) == write_report([run], theirs)  # our own is replaced


def test_runs_side_by_side_have_the_numbers_that_each_has_alone(tmp_path):
    runs = [a_folder(tmp_path / name, a_world(seed=seed, problems=10)) for name, seed in (("one", 0), ("two", 7))]
    cells = [write_report([run], run).splitlines() for run in runs]
    both = write_report(runs, tmp_path / "both").splitlines()
    assert both[0] == f"| run | {tmp_path}/one | {tmp_path}/two |"
    size = both.index("")
    assert size > 20
    for together, one, two in zip(both[2:size], cells[0][2:], cells[1][2:], strict=False):
        assert together == one.rstrip(" |") + " | " + two.split(" | ", 1)[1], together


def test_the_schedules_flags_are_what_training_reads(tmp_path):
    text = write_report([a_folder(tmp_path, a_world())], tmp_path)
    result = json.loads((tmp_path / "controls.json").read_text())
    content, (flags,) = result["schedule"]["teacher"], re.findall("`(--schedule .*)`", text)
    schedule, r = resolve_method("pwopsd", parse_config(flags.split())).token_weight, relative_position([50])
    w = content["w_min"] + (1 - content["w_min"]) / (1 + np.exp(-(r.numpy() - content["tau"]) / content["s"]))
    assert schedule(r).numpy() == pytest.approx(w, abs=1e-3)
    assert not np.allclose(w, SCHEDULES["moderate"](r).numpy(), atol=0.05)
    assert content["at_the_edge"] == []
    flat = analysed(a_world(base=lambda r: 0.6))["schedule"]["teacher"]  # no rise up to 1 within [0, 1]
    assert "tau" in flat["at_the_edge"]
    for name, (low, high) in content["intervals"].items():
        assert low <= high and np.isfinite([content[name], low, high]).all()


def test_figure_and_its_absence(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "figure1", FIGURE)
    write_report([a_folder(tmp_path, a_world(problems=20))], tmp_path)
    assert (tmp_path / "figure1.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "report.md").unlink()
    with pytest.raises(InputError, match="pip install matplotlib"):
        write_report([tmp_path], tmp_path)
    assert (tmp_path / "report.md").exists()


def test_resamples_weight_candidates_not_problems():
    """Two candidates in the first of two problems: means 2, 1 and 14 / 5; a resample without both problems has none."""
    data = SimpleNamespace(problem=np.array([0, 0, 1, 1]), counts=np.array([[1, 1], [2, 0], [1, 3], [0, 0]]))
    found = report.mean_with_interval(np.array([1.0, 1.0, 4.0, 99.0]), data, np.array([True, True, True, False]))
    assert found == {"mean": 2.0, "interval": pytest.approx(np.percentile([2.0, 1.0, 2.8], [2.5, 97.5])), "n": 3}
    assert report.mean_with_interval(np.ones(4), data, np.zeros(4, bool)) is None


def test_the_rise_of_viability_is_taken_within_problems():
    """Two problems whose viability rises by .5 and 1.5 over r, one of them lower throughout; r is 0, 1 and 0, .5."""
    data = SimpleNamespace(problem=np.array([0, 0, 1, 1]), r=np.array([0.0, 1.0, 0.0, 0.5]),
                           counts=np.array([[2, 0], [0, 2], [1, 1]]))  # fmt: skip
    found = report.slope(np.array([0.4, 0.9, 0.0, 0.75]), data)
    mean = (0.5 * 0.5 + 1.5 * 0.125) / (0.5 + 0.125)  # each weighted by its squares of r around the mean
    assert found["mean"] == pytest.approx(mean)
    assert found["interval"] == pytest.approx(np.percentile([0.5, 1.5, mean], [2.5, 97.5]))


@pytest.mark.parametrize(("w_min", "tau", "s"), [(0.25, 0.30, 0.10), (0.6, 0.5, 0.0501187)])
def test_schedule_is_recovered_from_its_own_curve(w_min, tau, s):
    draw = np.random.default_rng(0)
    r, problem = draw.random(400), np.repeat(np.arange(40), 10)
    w = w_min + (1 - w_min) / (1 + np.exp(-(r - tau) / s))
    (exact,) = report.fit_schedule(r, w, problem, np.ones((1, 40)))
    assert exact == pytest.approx([w_min, tau, s], abs=0.02)
    noisy = (draw.random(400) < w).astype(float)
    fits = report.fit_schedule(r, noisy, problem, viability.resamples(40, 300, seed=0))
    low, high = np.percentile(fits, [2.5, 97.5], axis=0)
    assert (low <= [w_min, tau, s]).all() and ([w_min, tau, s] <= high).all()


def test_schedule_fit_weights_problems_by_their_counts():
    """A resample that holds a problem twice fits as if its candidates stood there twice."""
    draw = np.random.default_rng(1)
    r, reliability, problem = draw.random(60), draw.random(60), np.repeat(np.arange(3), 20)
    (counted,) = report.fit_schedule(r, reliability, problem, np.array([[2, 0, 1]]))
    rows = np.concatenate([np.arange(20), np.arange(20), np.arange(40, 60)])
    (copied,) = report.fit_schedule(r[rows], reliability[rows], np.zeros(60, int), np.ones((1, 1)))
    assert counted == pytest.approx(copied, abs=1e-12)


def test_the_two_centrings_by_hand():
    """One problem's only uncertain candidate has a gray one that is later still: its mean is lower over all.
    Labelled alone: problem 0 holds one uncertain candidate (0 after centring), problem 1 one diverse (0): a tie, .5.
    Over all: .9 - .5 against .6 - .8, so the uncertain one ranks higher: 1.
    """
    rows = [a_world(problems=2)[i] for i in (0, 1, 5, 6)]
    labelled = ((0, "real-uncertain"), (8, "gray"), (3, "diversity"), (0, "gray"))
    for row, (position, label) in zip(rows, labelled, strict=True):
        row.update(position=position, length=10, label=dict.fromkeys(row["label"], label))
    data, result = report.analyse(rows, RULE)
    by = result["arms"]["teacher"]["auroc"]
    assert (by["labelled"][POSITION]["auroc"], by["all"][POSITION]["auroc"]) == (0.5, 1.0)
    assert result["arms"]["teacher"]["problems_labelled"] == 2
    assert result["arms"]["teacher"]["problems_with_both_classes"] == 0
    data.label["teacher"][:] = GRAY
    assert auroc_of(data, data.score[POSITION], over_all=True) is None


def test_the_control_stands_in_the_table(tmp_path):
    """A teacher that hurts early: position finds it on the teacher's labels and not where nothing was forced."""
    rows = a_world(lambda r: 0.3 if r < 0.5 else 1.0, base=lambda r: 0.85)
    text = write_report([a_folder(tmp_path, rows)], tmp_path)
    line = next(line for line in text.splitlines() if line.startswith(f"| {POSITION} |"))
    cells = line[2:-2].split(" | ")[1:]
    forced, over_all, unforced, _ = (float(cell.split()[0]) if cell != "-" else 0.5 for cell in cells)
    assert min(forced, over_all) > 0.8 > unforced
