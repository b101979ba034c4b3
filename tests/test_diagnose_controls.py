import numpy as np
import pytest

from experiments.diagnose_controls import (
    bootstrap_mean,
    centred_auroc,
    fit_schedule,
    fit_survival,
    null_probabilities,
    simulate_null,
)
from viability import DIVERSITY, GRAY, UNCERTAIN, LabelRule, label_children, resamples

RULE = LabelRule()


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
