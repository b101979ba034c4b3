"""Paired statistics by hand and by simulation, and what may not be compared."""

import json
import math
import sys

import numpy as np
import pytest

from errors import InputError
from evaluate import Sample, benchmark_digest, summarise
from experiments.study.compare import (
    PAPER,
    PAPER_BENCHMARKS,
    compare,
    compare_seeds,
    comparison_text,
    detectable_difference,
    flips,
    load_summary,
    main,
    permutation_p,
    report,
)
from problems import load_problems


def test_permutation_p_by_hand():
    """Of the 8 sign patterns of (1, 2, 3) only +++ and --- reach a sum of 6; for (1, -1, 2) six reach 2."""
    assert permutation_p(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert permutation_p(np.array([1.0, -1.0, 2.0])) == 6 / 8
    assert permutation_p(np.zeros(5)) == 1.0 and permutation_p(np.zeros(40)) == 1.0
    assert permutation_p(np.full(30, 0.1)) == pytest.approx(1 / 100_001)
    assert permutation_p(np.full(30, 0.1), draws=1200) == pytest.approx(1 / 1201)
    assert permutation_p(np.full(30, 0.1), draws=200) == pytest.approx(1 / 201)


def test_random_signs_agree_with_the_normal_limit_and_are_fair():
    draw = np.random.default_rng(0)
    d = draw.normal(0.3, 1.0, 60)
    z = abs(d.sum()) / math.sqrt((d**2).sum())
    assert permutation_p(d) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)
    ps = [permutation_p(draw.normal(0.0, 1.0, 12)) for _ in range(300)]
    assert 0.02 < np.mean(np.array(ps) <= 0.05) < 0.09  # under the null, 5 % are called significant


def test_the_detectable_difference_by_hand_and_by_simulation():
    assert detectable_difference(np.array([1.0, -1.0] * 8)) == pytest.approx(
        (1.95996 + 0.84162) * math.sqrt(16 / 15) / 4, rel=1e-4
    )
    draw = np.random.default_rng(0)
    true = detectable_difference(draw.normal(0, 5.0, 100_000)) * math.sqrt(100_000 / 100)  # for 100 problems
    found = [permutation_p(draw.normal(true, 5.0, 100), draws=1000) <= 0.05 for _ in range(300)]
    assert 0.72 < np.mean(found) < 0.88


def test_flips_by_hand():
    a, b = np.array([0.4, 0.5, 0.9, 0.0, 1.0]), np.array([0.5, 0.4, 0.6, 0.2, 0.0])
    assert flips(a, b) == ([0], [1, 4])


# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path):
    """Write an evaluation with N = 2 and the given numbers of right answers per problem; returns its folder."""
    benchmark = tmp_path / "four.jsonl"
    benchmark.write_text("".join(json.dumps({"problem": f"p{i}", "answer": str(i)}) + "\n" for i in range(4)))
    problems = load_problems(str(benchmark), need_solution=False)

    def make(name, right, adapter=None, seeds=(0, 1), **changes):
        folder = tmp_path / name
        regime = {
            "model": "m", "adapter": adapter, "benchmark": str(benchmark),
            "benchmark_sha256": benchmark_digest(problems), "temperature": 1.0, **changes,
        }  # fmt: skip
        samples = [
            Sample(i, n, seed, f"\\boxed{{{i if n < count else 99}}}", 5, "eos")
            for seed in seeds for i, count in enumerate(right) for n in range(2)
        ]  # fmt: skip
        folder.mkdir(parents=True)
        summary = {
            **summarise(samples, problems), "benchmark": str(benchmark), "num_samples": 2, "regime": regime,
            "answers_sha256": benchmark_digest(problems, "answer"),
            "grader": {"name": "exact", "version": "1", "stopped": 0},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    make.benchmark = benchmark
    return make


def test_a_comparison_by_hand(evaluation):
    """A: 1/2, 2/2, 0, 0. B: 2/2, 0, 1/2, 0. Differences +50, -100, +50, 0: mean 0."""
    a, b = evaluation("a", [1, 2, 0, 0]), evaluation("b", [2, 0, 1, 0], temperature=0.7)
    result = compare(load_summary(str(a)), load_summary(str(b / "summary.json")))
    assert (result["a"], result["b"], result["difference"], result["p"]) == (37.5, 37.5, 0.0, 1.0)
    assert result["gained"] == [(2, 0.0, 0.5)] and result["lost"] == [(1, 1.0, 0.0)]
    assert result["detectable"] == pytest.approx(2.80158 * np.std([50, -100, 50, 0], ddof=1) / 2, rel=1e-4)
    assert result["other_settings"] == ["temperature"]
    text = comparison_text(result, "avg")
    assert "+0.00 points" in text and "2 (0% -> 50%)" in text and "temperature" in text
    back = compare(load_summary(str(b)), load_summary(str(a)), "pass")
    assert back["difference"] == 0.0 and back["a"] == 50.0


def test_the_same_evaluation_twice_differs_by_exactly_nothing(evaluation):
    a = load_summary(str(evaluation("a", [1, 2, 0, 0])))
    assert compare(a, a)["interval"] == [0.0, 0.0]


def test_two_rows_of_a_study_by_hand(evaluation):
    """Right minus left by training seed: +12.5, +25, +37.5: mean 25, half a width t(2) 12.5 / sqrt(3) = 31.05.

    By problem, over the training seeds: +1/6, 0, +1/2, +1/3.
    """
    pytest.importorskip("scipy")
    left = [evaluation(f"a{i}", [1, 2, 0, 0]) for i in range(3)]
    right = [evaluation(f"b{i}", right) for i, right in enumerate(([1, 2, 1, 0], [1, 2, 1, 1], [2, 2, 1, 1]))]
    lines = compare_seeds([*map(str, left)], [*map(str, right)]).splitlines()
    assert lines[0].split(" | ")[-2:] == ["95 % over 3 training seeds (t)", "95 % over 4 problems (bootstrap) |"]
    avg, of_pass, of_maj = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5])
    assert avg[:5] == ["avg", "37.50", "62.50", "+25.00", "[-6.05, +56.05]"]
    low, high = map(float, avg[5].strip("[]").split(", "))
    assert 0.0 < low < 25.0 - 10.0 and 25.0 + 10.0 < high <= 50.0
    assert of_pass[:4] == ["pass", "50.00", "91.67", "+41.67"]  # 75 once and 100 twice, minus 50
    assert of_maj[0] == "maj"
    swapped = compare_seeds([*map(str, right)], [*map(str, left)])
    assert "| -25.00 | [-56.05, +6.05] |" in swapped


def test_rows_of_a_study_that_cannot_be_compared_are_one_line(evaluation):
    a, b, c = (str(evaluation(name, [1, 2, 0, 0])) for name in "abc")
    for left, right, said in (
        ([a, b], [c], "2 and 1 evaluations"),
        ([a], [b], "1 and 1 evaluations"),
        ([], [], "0 and 0 evaluations"),
        ([a, b], [c, a], f"{a} is named twice"),
        (
            [a, b],
            [c, str(evaluation("cool", [1, 2, 0, 0], temperature=0.7))],
            "cool: evaluated otherwise .*temperature",
        ),
        ([a, b], [c, str(evaluation("once", [1, 2, 0, 0], seeds=(0,)))], "once: evaluated otherwise .*seeds"),
        ([a, b], [c, str(evaluation("other", [1, 2, 0, 0], benchmark_sha256="x"))], "regime benchmark_sha256"),
    ):
        with pytest.raises(InputError, match=said):
            compare_seeds(left, right)


def test_the_flags_of_two_rows(evaluation, monkeypatch, capsys):
    pytest.importorskip("scipy")
    a, b, c, d = (str(evaluation(name, [1, i % 3, 0, 0])) for i, name in enumerate("abcd"))
    monkeypatch.setattr(sys, "argv", ["compare", "--left", a, b, "--right", c, d])
    main()
    assert capsys.readouterr().out == compare_seeds([a, b], [c, d]) + "\n"
    monkeypatch.setattr(sys, "argv", ["compare", "--left", a, b])
    with pytest.raises(InputError, match="--left and --right: 2 and 0 evaluations"):
        main()


def test_what_cannot_be_compared_is_one_line(evaluation, tmp_path):
    a = evaluation("a", [1, 2, 0, 0])
    summary = load_summary(str(a))
    other = json.loads(json.dumps(summary))
    other["regime"]["benchmark_sha256"] = "x"
    with pytest.raises(InputError, match="benchmark_sha256"):
        compare(summary, other)
    with pytest.raises(InputError, match="grader name is 'exact' and 'math-verify'"):
        compare(summary, {**summary, "grader": {"name": "math-verify"}})
    with pytest.raises(InputError, match="N 2 and 4"):
        compare(summary, {**summary, "num_samples": 4}, "maj")
    with pytest.raises(InputError, match="no summary there"):
        load_summary(str(tmp_path))
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match="not a summary"):
        load_summary(str(tmp_path))


def test_the_report_has_a_base_row_and_keeps_the_papers_numbers_apart(evaluation, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {"method": "pwopsd"}}))
    evaluation("runs/x", [2, 2, 2, 0], adapter=str(run / "checkpoint-5"))
    alone = report(str(tmp_path / "runs"))
    assert "| base: not evaluated | - |" in alone
    evaluation("runs/base", [1, 2, 0, 0])
    ours, paper = report(str(tmp_path / "runs")).split("\nThe paper's")
    rows = [line for line in ours.splitlines() if line.startswith("|")]
    assert rows[0] == "| method | four (N 2) |"
    assert rows[2].startswith("| base: m | 37.50 ± 0.00 [") and rows[3].startswith("| pwopsd: ")
    assert "75.00 ± 0.00 [" in rows[3] and len(rows) == 4 and "OPSD" not in ours
    assert "| PW-OPSD Moderate | 95.34 ± 0.10 | 76.20 ± 0.58 | 67.78 ± 1.27 | 43.33 ± 1.21 |" in paper
    with pytest.raises(InputError, match=r"no summary.json under"):
        report(str(run))
    with pytest.raises(InputError, match="--metric nonsense"):
        report(str(tmp_path / "runs"), "nonsense")


def test_the_papers_rows_have_the_papers_means():
    means = {"OPSD": 70.27, "EOPD": 69.13, "REOPOLD": 68.15, "PW-OPSD Mild": 70.57, "PW-OPSD Moderate": 70.66,
             "PW-OPSD Sharp": 70.90, "PW-OPSD Aggressive": 70.92}  # fmt: skip
    for name, mean in means.items():
        assert len(PAPER[name]) == len(PAPER_BENCHMARKS)
        assert np.mean([value for value, _ in PAPER[name]]) == pytest.approx(mean, abs=0.011)
