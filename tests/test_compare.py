"""Paired differences of evaluations by hand, and what may not be compared."""

import json
from pathlib import Path

import pytest

from errors import InputError
from evaluate import Sample, summarise
from experiments.study import compare as module
from experiments.study.compare import compare
from problems import Problem


@pytest.fixture
def evaluation(tmp_path):
    """Write an evaluation with N = 2 and the given numbers of right answers per problem; returns its folder."""
    problems = [Problem(f"p{i}", "", str(i)) for i in range(4)]

    def make(
        name, right, seeds=(0, 1), grader="exact", num_samples=2, answers="x", prompts="p", version="1",
        server="a server", address="one", **changes,
    ):  # fmt: skip
        regime = {"model": "m", "adapter": name, "benchmark_sha256": "b", "temperature": 1.0, "server": address}
        regime |= changes
        samples = [
            Sample(i, n, seed, f"\\boxed{{{i if n < count else 99}}}", 5, "eos")
            for seed in seeds for i, count in enumerate(right) for n in range(2)
        ]  # fmt: skip
        summary = {"num_samples": num_samples, "regime": regime, "inputs": {"prompts": prompts, "server": server},
                   "answers_sha256": answers, "grader": {"name": grader, "version": version, "stopped": 0}}  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summarise(samples, problems) | summary))
        return str(tmp_path / name)

    return make


def cells(text):
    """The cells of a Markdown table's lines."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]


def test_two_evaluations_by_hand(evaluation):
    """A: 1/2, 2/2, 0, 0. B: 2/2, 0, 1/2, 0. Differences +50, -100, +50, 0: mean 0, std 70.71, t(3) 3.182."""
    pytest.importorskip("scipy")
    a, b = evaluation("a", [1, 2, 0, 0]), evaluation("b", [2, 0, 1, 0], temperature=0.7, seeds=(0,))
    text = compare([a], [b])
    avg = cells(text)[2]
    assert avg == ["avg", "37.50", "37.50", "+0.00", "-", "[-112.52, +112.52] 147.11"]  # (3.182 + .978) 70.71 / 2
    assert text.endswith("\nNot evaluated alike: seeds, temperature.")
    same = compare([a], [evaluation("same", [1, 2, 0, 0], address="another")])
    assert cells(same)[2][3:] == ["+0.00", "-", "-"]  # no spread to go by


def test_two_rows_of_a_study_by_hand(evaluation, call, capsys):
    """Right minus left by training seed: +12.5, +25, +37.5: mean 25, half a width t(2) 12.5 / sqrt(3) = 31.05.
    By problem, over the training seeds: +1/6, 0, +1/2, +1/3: std 21.52, half a width t(3) 21.52 / 2 = 34.24."""
    pytest.importorskip("scipy")
    left = [evaluation(f"a{i}", [1, 2, 0, 0]) for i in range(3)]
    right = [evaluation(f"b{i}", right) for i, right in enumerate(([1, 2, 1, 0], [1, 2, 1, 1], [2, 2, 1, 1]))]
    head, _, avg, of_pass, of_maj = cells(compare(left, right))
    assert head[-2:] == ["95 % over 3 training seeds", "95 % over 4 problems"]
    assert avg[:4] == ["avg", "37.50", "62.50", "+25.00"]
    assert avg[4].startswith("[-6.05, +56.05] ") and avg[5].startswith("[-9.24, +59.24] ")
    assert of_pass[:4] == ["pass", "50.00", "91.67", "+41.67"]  # 75 once and 100 twice, minus 50
    assert of_maj[0] == "maj"
    assert "| -25.00 | [-56.05, +6.05] " in compare(right, left)
    call(module, "--left", *left, "--right", *right)
    assert capsys.readouterr().out == compare(left, right) + "\n"


def test_what_cannot_be_compared_is_one_line(evaluation):
    a, b, c = (evaluation(name, [1, 2, 0, 0]) for name in "abc")
    changed = {"cool": {"temperature": 0.7}, "once": {"seeds": (0,)}, "other": {"benchmark_sha256": "x"},
               "verified": {"grader": "math-verify"}, "more": {"num_samples": 4},
               "mended": {"answers": "y"}, "asked": {"prompts": "q"}, "newer": {"version": "2"},
               "here": {"server": "this process"}}  # fmt: skip
    torn, cut = Path(evaluation("torn", [1, 2, 0, 0])), Path(evaluation("cut", [1, 2, 0, 0]))
    whole = json.loads((torn / "summary.json").read_text())
    (torn / "summary.json").write_text(json.dumps({name: whole[name] for name in whole if name != "per_problem"}))
    (cut / "summary.json").write_text((cut / "summary.json").read_text()[:200])
    runs = {name: evaluation(name, [1, 2, 0, 0], **changes) for name, changes in changed.items()}
    for left, right, said in (
        ([a, b], [c], "2 and 1 evaluations"),
        ([a, b], [c, a], f"{a} is named twice"),
        ([a, b], [c, runs["cool"]], "cool: evaluated otherwise .*temperature"),
        ([a, b], [c, runs["once"]], "once: evaluated otherwise .*seeds"),
        ([a, b], [c, runs["asked"]], "asked: evaluated otherwise .*prompts"),  # the file's name is no prompt
        ([a, b], [c, runs["here"]], "here: evaluated otherwise .*server"),
        ([a, b], [c, f"{a}/"], "is named twice"),
        ([a], [f"{a}/none"], "none: no evaluation with a whole summary.json"),
        ([a], [torn], r"torn: no evaluation with a whole summary.json .per_problem is missing"),
        ([a], [cut], "cut: no evaluation with a whole summary.json"),
        ([a], [runs["other"]], "other: not comparable with the first .benchmark .*, now x"),
        ([a], [runs["verified"]], "grader exact, now math-verify"),
        ([a], [runs["newer"]], "grader's version 1, now 2"),
        ([a], [runs["mended"]], "mended: .*answers x, now y"),
        ([a], [runs["more"]], "num_samples 2, now 4"),
    ):
        with pytest.raises(InputError, match=said):
            compare(left, right)
