from itertools import product
from math import comb, prod

import numpy as np
import pytest

import viability
from viability import ARMS, DIVERSITY, GRAY, POSITION, UNCERTAIN, LabelRule


def a_run(seed=0, C=60, P=9):
    """Random candidates with ties in the score and problems of one class only."""
    draw = np.random.default_rng(seed)
    problem = np.sort(draw.integers(P, size=C))
    return draw.integers(6, size=C).astype(float), (draw.random(C) < 0.3).astype(int), problem


def slow_auroc(score, label):
    """The share of (real-uncertain, diversity) pairs won, ties counting half."""
    pairs = [(a, b) for a, la in zip(score, label, strict=True) for b, lb in zip(score, label, strict=True) if la > lb]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def test_labels_by_hand():
    """5/6 >= .75; 4/6 is less; 2/6 < .40; 3/6 is not."""
    sixths_CK = np.array([(5, 5, 0), (4, 4, 6), (2, 2, 2), (2, 2, 3), (0, 0, 6)])
    found = viability.label_children(sixths_CK / 6, LabelRule())
    assert found.tolist() == [DIVERSITY, GRAY, UNCERTAIN, GRAY, GRAY]
    rule = LabelRule(diversity_viability=0.5, uncertain_viability=0.5)  # closed above, open below
    assert viability.label_children(np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.0]]), rule).tolist() == [DIVERSITY, GRAY]


def test_midranks_and_auroc_by_hand():
    assert viability.midranks(np.array([10.0, 20.0, 20.0, 5.0])).tolist() == [2.0, 3.5, 3.5, 1.0]
    # Pairs (2 v 1), (2 v 2), (3 v 1), (3 v 2): 1 + 0.5 + 1 + 1 of 4.
    assert viability.auroc(np.array([2.0, 3.0, 1.0, 2.0]), np.array([1, 1, 0, 0])) == 3.5 / 4


def test_auprc_by_hand_and_at_its_limits():
    # Thresholds 3, 2, 1: precision 1, 1/2 (a tie of both classes after one hit: 2 of 3), recall 1/2, 1.
    score, label = np.array([3.0, 2.0, 2.0, 1.0]), np.array([1, 1, 0, 0])
    assert viability.auprc(score, label) == pytest.approx(0.5 * 1.0 + 0.5 * 2 / 3)
    assert viability.auprc(np.array([4.0, 3.0, 2.0, 1.0]), label) == 1.0
    assert viability.auprc(np.ones(5), np.array([1, 0, 0, 0, 1])) == pytest.approx(2 / 5)  # the base rate


def test_centring_removes_each_problems_mean():
    score, problem = np.array([1.0, 3.0, 10.0, 10.0, 40.0]), np.array([0, 0, 2, 2, 2])
    assert viability.centre(score, problem).tolist() == [-1.0, 1.0, -10.0, -10.0, 20.0]
    shifted = viability.centre(score + np.array([0.1, 0.1, 7.3, 7.3, 7.3]), problem)
    assert (shifted == viability.centre(score, problem)).all()  # exactly: ties must survive


def test_bootstrap_equals_a_twin_that_rebuilds_and_centres_each_resample():
    score, label, problem = a_run()
    counts = viability.resamples(9, 40, seed=3)
    fast = viability.bootstrap_auroc(viability.centre(score, problem), label, problem, counts)
    for row, value in zip(counts, fast, strict=True):
        pieces = [np.flatnonzero(problem == p) for p, times in enumerate(row) for _ in range(times)]
        copy = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        rows = np.concatenate(pieces)
        assert value == pytest.approx(slow_auroc(viability.centre(score[rows], copy), label[rows]), abs=1e-12)


def test_a_resample_without_a_class_has_no_auroc_and_the_interval_leaves_it_out():
    score, label, problem = np.array([2.0, 1.0]), np.array([1, 0]), np.array([0, 1])
    values = viability.bootstrap_auroc(score, label, problem, np.array([[1, 1], [2, 0], [0, 2]]))
    assert values[0] == 1.0 and np.isnan(values[1:]).all()
    assert viability.interval(values) == [1.0, 1.0] and viability.interval(values[1:]) is None


def test_resamples_draw_as_many_problems_as_there_are_and_repeat_with_the_seed():
    counts = viability.resamples(7, 50, seed=0)
    assert (counts.sum(axis=1) == 7).all() and (counts == viability.resamples(7, 50, seed=0)).all()
    assert (counts != viability.resamples(7, 50, seed=1)).any()


def a_row(problem, position, teacher, **changes):
    return {
        "problem": problem, "position": position, "length": 10, "h_trunc": 0.5, "entropy": 0.5, "log_kappa": 1.0,
        "mutual_information": 0.5, "viability": {arm: [0.5] for arm in ARMS},
        "label": {"teacher": teacher, "student": "gray", "unforced": "gray"},
    } | changes  # fmt: skip


def test_table_1_by_hand():
    """Early is uncertain in problem 0 (won), late is in problem 1 (lost); the gray candidate counts nowhere."""
    rows = [
        a_row(3, 1, "real-uncertain"), a_row(3, 5, "diversity"), a_row(3, 0, "gray"),
        a_row(8, 9, "real-uncertain", entropy=0.9, log_kappa=-3.0), a_row(8, 2, "diversity"),
        a_row(9, 2, "gray"),
    ]  # fmt: skip
    data = viability.to_columns(rows, LabelRule(bootstraps=50))
    assert data.r.tolist() == [0.15, 0.55, 0.05, 0.95, 0.25, 0.25]
    assert data.score[POSITION] == pytest.approx(1.0 - data.r) and data.problem.tolist() == [0, 0, 0, 1, 1, 2]
    result = viability.table1(data)
    assert (result["problems"], result["candidates"]) == (3, 6)
    assert result["labels"] == {"diversity": 2, "real-uncertain": 2, "gray": 2}
    # Centred over labelled candidates: uncertain +.2, -.35 against diversity -.2, +.35: one pair of four is won.
    assert result["table1"][POSITION]["auroc"] == 0.25
    # Uncertain 0, +.2 against diversity 0, -.2: three pairs are won, one is a tie.
    assert result["table1"]["H(p)"]["auroc"] == result["table1"]["log kappa"]["auroc"] == 0.875
    low, high = result["table1"][POSITION]["interval_reoriented"]
    assert 0.5 <= low <= high <= 1.0
    text = "\n".join(viability.table1_lines(result))
    assert "2 real-uncertain, 2 diversity, 2 gray" in text and "0.83 [.66,.95]" in text


def test_each_arm_is_scored_by_its_own_labels():
    """Candidates that are gray for the teacher's tokens count where the student's have a label, and the other way."""
    rows = [a_row(0, position, teacher, label={"teacher": teacher, "student": student, "unforced": "gray"})
            for position, teacher, student in ((1, "gray", "real-uncertain"), (5, "gray", "diversity"),
                                               (2, "diversity", "gray"), (8, "real-uncertain", "gray"))]  # fmt: skip
    data = viability.to_columns(rows, LabelRule(bootstraps=5))
    found = {arm: viability.auroc_of(data, data.score[POSITION], arm) for arm in ARMS}
    assert (found["student"][0]["auroc"], found["teacher"][0]["auroc"], found["unforced"]) == (1.0, 0.0, None)


def test_a_class_without_candidates_has_no_number():
    rows = [a_row(0, 1, "diversity"), a_row(0, 5, "gray")]
    result = viability.table1(viability.to_columns(rows, LabelRule(bootstraps=5)))
    assert set(result["table1"].values()) == {None}
    assert "no candidate of one class" in viability.table1_lines(result)[2]


@pytest.mark.parametrize(("steps", "uncertain", "diversity"), [
    (1, 0.0, 0.996848), (10, 0.005925, 0.135772), (40, 0.908751, 1.06e-7),
])  # fmt: skip
def test_labels_turn_uncertain_early_with_no_fault_of_the_teacher(steps, uncertain, diversity):
    """Each child as good as any other, .95 to survive a step: the published chances of both labels, by enumeration."""
    p, found = 0.95**steps, {}
    for right in product(range(7), repeat=3):
        label = int(viability.label_children(np.array(right) / 6, LabelRule()))
        chance = prod(comb(6, k) * p**k * (1 - p) ** (6 - k) for k in right)
        found[label] = found.get(label, 0.0) + chance
    assert found[UNCERTAIN] == pytest.approx(uncertain, abs=1e-6)
    assert found[DIVERSITY] == pytest.approx(diversity, rel=5e-3)
