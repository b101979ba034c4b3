import numpy as np
import pytest

from experiments.diagnose_statistics import (
    DIVERSITY,
    GRAY,
    UNCERTAIN,
    LabelRule,
    auprc,
    auroc,
    bootstrap_auroc,
    bootstrap_mean,
    centre,
    centred_auroc,
    fit_schedule,
    fit_survival,
    interval,
    label_children,
    midranks,
    null_probabilities,
    resamples,
    simulate_null,
)

RULE = LabelRule()


def a_run(seed=0, C=60, P=9):
    """Random candidates with ties in the score and problems of one class only."""
    draw = np.random.default_rng(seed)
    problem = np.sort(draw.integers(P, size=C))
    return draw.integers(6, size=C).astype(float), (draw.random(C) < 0.3).astype(int), problem


def slow_auroc(score, label):
    """The share of (real-uncertain, diversity) pairs won, ties counting half."""
    won = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, la in zip(score, label, strict=True)
        for b, lb in zip(score, label, strict=True)
        if la == 1 and lb == 0
    ]
    return sum(won) / len(won)


@pytest.mark.parametrize(
    ("sixths", "expected"),
    [
        ((5, 5, 0), DIVERSITY),  # 5/6 >= 0.75
        ((4, 4, 6), GRAY),  # 4/6 < 0.75: one good child only
        ((2, 2, 2), UNCERTAIN),  # 2/6 < 0.40
        ((2, 2, 3), GRAY),  # one child at 3/6
        ((0, 0, 6), GRAY),
    ],
)
def test_labels_by_hand(sixths, expected):
    assert label_children(np.array(sixths) / 6, RULE) == expected


def test_label_thresholds_are_closed_above_and_open_below():
    rule = LabelRule(diversity_viability=0.5, uncertain_viability=0.5)
    assert label_children(np.array([0.5, 0.5, 0.0]), rule) == DIVERSITY
    assert label_children(np.array([0.5, 0.0, 0.0]), rule) == GRAY


def test_midranks_and_auroc_by_hand():
    assert midranks(np.array([10.0, 20.0, 20.0, 5.0])).tolist() == [2.0, 3.5, 3.5, 1.0]
    # Pairs (2 v 1), (2 v 2), (3 v 1), (3 v 2): 1 + 0.5 + 1 + 1 of 4.
    assert auroc(np.array([2.0, 3.0, 1.0, 2.0]), np.array([1, 1, 0, 0])) == 3.5 / 4


def test_auroc_equals_the_pairwise_twin_and_flips_with_the_sign():
    score, label, _ = a_run()
    assert auroc(score, label) == pytest.approx(slow_auroc(score, label), abs=1e-12)
    assert auroc(-score, label) == pytest.approx(1.0 - auroc(score, label), abs=1e-12)
    assert auroc(np.zeros_like(score), label) == 0.5


def test_auprc_by_hand_and_at_its_limits():
    # Thresholds 3, 2, 1: precision 1, 1/2 (a tie of both classes after one hit: 2 of 3), recall 1/2, 1.
    assert auprc(np.array([3.0, 2.0, 2.0, 1.0]), np.array([1, 1, 0, 0])) == pytest.approx(0.5 * 1.0 + 0.5 * 2 / 3)
    assert auprc(np.array([4.0, 3.0, 2.0, 1.0]), np.array([1, 1, 0, 0])) == 1.0
    assert auprc(np.ones(5), np.array([1, 0, 0, 0, 1])) == pytest.approx(2 / 5)  # no information: the base rate


def test_centring_removes_each_problems_mean():
    score, problem = np.array([1.0, 3.0, 10.0, 10.0, 40.0]), np.array([0, 0, 2, 2, 2])
    assert centre(score, problem).tolist() == [-1.0, 1.0, -10.0, -10.0, 20.0]
    shifted = centre(score + np.array([0.1, 0.1, 7.3, 7.3, 7.3]), problem)
    assert (shifted == centre(score, problem)).all()  # exactly: ties must survive


def test_bootstrap_equals_a_twin_that_rebuilds_and_centres_each_resample():
    score, label, problem = a_run()
    counts = resamples(9, 40, seed=3)
    fast = bootstrap_auroc(centre(score, problem), label, problem, counts)
    for row, value in zip(counts, fast, strict=True):
        pieces = [np.flatnonzero(problem == p) for p, times in enumerate(row) for _ in range(times)]
        copy = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        rows = np.concatenate(pieces)
        assert value == pytest.approx(slow_auroc(centre(score[rows], copy), label[rows]), abs=1e-12)


def test_a_resample_without_a_class_has_no_auroc_and_the_interval_leaves_it_out():
    score, label, problem = np.array([2.0, 1.0]), np.array([1, 0]), np.array([0, 1])
    values = bootstrap_auroc(score, label, problem, np.array([[1, 1], [2, 0], [0, 2]]))
    assert values[0] == 1.0 and np.isnan(values[1:]).all()
    assert interval(values) == [1.0, 1.0] and interval(values[1:]) is None


def test_resamples_draw_as_many_problems_as_there_are_and_repeat_with_the_seed():
    counts = resamples(7, 50, seed=0)
    assert (counts.sum(axis=1) == 7).all() and (counts == resamples(7, 50, seed=0)).all()
    assert (counts != resamples(7, 50, seed=1)).any()


def test_bootstrap_mean_weights_candidates_not_problems():
    value, problem = np.array([1.0, 1.0, 4.0]), np.array([0, 0, 1])
    means = bootstrap_mean(value, problem, np.array([[1, 1], [2, 0], [1, 3]]))
    assert means.tolist() == [2.0, 1.0, pytest.approx((2 + 12) / 5)]


@pytest.mark.parametrize(
    ("steps", "uncertain", "diversity"),
    [(1, 0.0, 0.996848), (10, 0.005925, 0.135772), (40, 0.908751, 1.06e-7)],
)
def test_null_reproduces_the_published_probabilities(steps, uncertain, diversity):
    """Survival 0.95 a step, 3 children of 6 rollouts, teacher = student (paper's critics)."""
    got = [float(p[0]) for p in null_probabilities(np.array([0.95**steps]), RULE)]
    assert got[0] == pytest.approx(uncertain, abs=5e-7) and got[1] == pytest.approx(diversity, rel=5e-3, abs=5e-9)
    if steps == 1:
        assert got[0] < 1e-12


def test_null_probabilities_equal_simulated_rollouts():
    draw = np.random.default_rng(0)
    viability = 0.95**15
    labels = label_children(draw.binomial(6, viability, size=(200_000, 3)) / 6, RULE)
    uncertain, diversity = (float(p[0]) for p in null_probabilities(np.array([viability]), RULE))
    assert (labels == UNCERTAIN).mean() == pytest.approx(uncertain, abs=3e-3)
    assert (labels == DIVERSITY).mean() == pytest.approx(diversity, abs=3e-3)


def test_null_world_gives_position_an_auroc_without_any_teacher_fault():
    """Viability that only depends on what remains separates early from late; constant viability does not."""
    remaining, problem = np.tile([40.0, 25.0, 15.0, 8.0, 2.0], 60), np.repeat(np.arange(60), 5)
    values = simulate_null(0.95**remaining, remaining, problem, RULE, 20, seed=0)
    assert values.min() > 0.95
    flat = simulate_null(np.full(300, 0.5), remaining, problem, RULE, 200, seed=0)
    assert abs(np.nanmean(flat) - 0.5) < 0.03


def test_centred_auroc_needs_both_classes_and_leaves_gray_out():
    score, problem = np.array([5.0, 1.0, 99.0]), np.zeros(3, int)
    assert centred_auroc(score, np.array([UNCERTAIN, DIVERSITY, GRAY]), problem) == 1.0
    assert np.isnan(centred_auroc(score, np.array([DIVERSITY, DIVERSITY, GRAY]), problem))


def test_survival_is_recovered():
    remaining = np.arange(1.0, 60.0)
    assert fit_survival(remaining, 0.97**remaining) == pytest.approx(0.97, abs=1e-3)


@pytest.mark.parametrize(("w_min", "tau", "s"), [(0.25, 0.30, 0.10), (0.6, 0.5, 0.0501187)])
def test_schedule_is_recovered_from_its_own_curve(w_min, tau, s):
    draw = np.random.default_rng(0)
    r, problem = draw.random(400), np.repeat(np.arange(40), 10)
    w = w_min + (1 - w_min) / (1 + np.exp(-(r - tau) / s))
    (exact,) = fit_schedule(r, w, problem, np.ones((1, 40)))
    assert exact == pytest.approx([w_min, tau, s], abs=0.02)
    noisy = (draw.random(400) < w).astype(float)
    fits = fit_schedule(r, noisy, problem, resamples(40, 300, seed=0))
    low, high = np.percentile(fits, [2.5, 97.5], axis=0)
    assert (low <= [w_min, tau, s]).all() and ([w_min, tau, s] <= high).all()


def test_schedule_fit_weights_problems_by_their_counts():
    """A resample that holds a problem twice fits as if its candidates stood there twice."""
    draw = np.random.default_rng(1)
    r, reliability, problem = draw.random(60), draw.random(60), np.repeat(np.arange(3), 20)
    (counted,) = fit_schedule(r, reliability, problem, np.array([[2, 0, 1]]))
    rows = np.concatenate([np.arange(20), np.arange(20), np.arange(40, 60)])
    (copied,) = fit_schedule(r[rows], reliability[rows], np.zeros(60, int), np.ones((1, 1)))
    assert counted == pytest.approx(copied, abs=1e-12)
