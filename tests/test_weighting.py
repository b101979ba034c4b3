import math

import pytest
import torch

from errors import InputError
from weighting import SCHEDULES, SIGMOIDS, get_schedule, position_weight, relative_position


def test_relative_position_by_hand():
    """A single token gets the middle."""
    expected = [0.1, 0.3, 0.5, 0.7, 0.9, 0.5, 0.25, 0.75]
    torch.testing.assert_close(relative_position([5, 1, 2]), torch.tensor(expected))


@pytest.mark.parametrize("r, w", [(0, 0.28557), (0.1, 0.33940), (0.3, 0.62500), (0.5, 0.91060), (1, 0.99932)])
def test_moderate_has_the_papers_values(r, w):
    assert position_weight(torch.tensor([float(r)]), *SIGMOIDS["moderate"]).item() == pytest.approx(w, abs=5e-6)


def test_limits():
    r = relative_position([50])
    assert get_schedule("moderate")(r).mean().item() == pytest.approx(0.771, abs=5e-4)
    torch.testing.assert_close(SCHEDULES["reversed"](r), SCHEDULES["moderate"](r).flip(0))
    torch.testing.assert_close(get_schedule("moderate", w_min=1.0)(r), SCHEDULES["uniform"](r))
    assert get_schedule("moderate", s=1e-6)(r).unique().tolist() == [0.25, 1.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_lies_in_0_1_and_sees_the_position_alone(name):
    """Weights are those of Eq. (5) as they stand, whatever their mean; a row's do not depend on the rows beside it."""
    lengths = [40, 3, 1]
    weights = get_schedule(name)(relative_position(lengths))
    assert weights.min() >= 0 and 0 < weights.max() <= 1  # prefix and suffix of experiments/study/rules.py hold zeros
    for row, length in zip(weights.split(lengths), lengths, strict=True):
        torch.testing.assert_close(row, SCHEDULES[name](relative_position([length])))


@pytest.mark.parametrize(("arguments", "word"), [
    ({"name": "moderate_mean1"}, "moderate_mean1: must be one of .*moderate"),
    ({"name": "linear_up", "tau": 0.2}, "linear_up"),
    ({"name": "moderate", "s": 1e-46}, "--s 1e-46: must lie"), ({"name": "moderate", "s": math.inf}, "--s inf"),
])  # fmt: skip
def test_mistakes_are_named(arguments, word):
    with pytest.raises(InputError, match=word):
        get_schedule(**arguments)
