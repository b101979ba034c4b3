"""What the clips cut: the closed form of the gradient against autograd, the account by hand and on real rollouts."""

import math
import sys

import pytest
import torch

from errors import InputError
from experiments import clipping
from experiments.clipping import account, both_contexts, logit_gradients, markdown
from loss import LossOptions, clipped_divergence
from model import load_model, load_tokenizer
from problems import load_problems


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0, math.inf])
def test_closed_form_is_the_gradient_of_the_loss(clip):
    torch.manual_seed(0)
    student_MV = (4 * torch.randn(50, 7, dtype=torch.float64)).requires_grad_()
    teacher_MV = (4 * torch.randn(50, 7, dtype=torch.float64)).log_softmax(-1)
    temperature = 1.1
    student_logp_MV = (student_MV / temperature).log_softmax(-1)
    value = clipped_divergence(student_logp_MV, teacher_MV, torch.zeros(50), LossOptions(tau_clip=clip)).sum()
    (gradient_MV,) = torch.autograd.grad(value, student_MV)
    clipped_MV, unclipped_MV = logit_gradients(student_logp_MV.detach(), teacher_MV, clip)
    torch.testing.assert_close(gradient_MV * temperature, clipped_MV)
    assert torch.equal(clipped_MV, unclipped_MV) == (clip == math.inf)


def test_reversal_by_hand():
    """p_T = (.9, .1), p_S = (.5, .5): entries .529 and -.161, so clip 0.2 cuts the first and leaves P_A = .1."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    clipped, unclipped = logit_gradients(student, teacher, 0.2)
    torch.testing.assert_close(unclipped, torch.tensor([[-0.4, 0.4]]))
    torch.testing.assert_close(clipped, torch.tensor([[0.05, -0.05]]))  # .1 * .5, and .1 * .5 - .1


def test_an_account_by_hand():
    """Three tokens with the entries (.529, -.161), (0, 0), (-.168, .255): d = .368, 0, .087."""
    student = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.7, 0.3]]).log()
    teacher = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]).log()
    first, second = 0.9 * math.log(1.8), 0.5 * math.log(5 / 3)
    expected = {
        "tokens": 1 / 3, "mass": 0.9 / 3, "divergence": first / (first + second), "on_token": 0.0,
        "dropped": 1 / 3, "at_token": 0.0,
    }  # fmt: skip
    assert account(student, teacher, 0.3, token=1) == pytest.approx(expected, abs=1e-6)
    assert account(student, teacher, 0.3, token=0) == pytest.approx(
        {**expected, "on_token": 1, "at_token": 1}, abs=1e-6
    )
    # At .08 the first and the third token are dropped, and the teacher gives alternative 1 .1 and .5 there.
    low = account(student, teacher, 0.08, token=1)
    assert (low["tokens"], low["dropped"]) == pytest.approx((2 / 3, 2 / 3))
    assert (low["divergence"], low["on_token"]) == pytest.approx((1.0, second / (first + second)))
    assert low["at_token"] == pytest.approx(1 / 2)
    none = account(student, teacher, math.inf, token=0)
    assert none["tokens"] == none["mass"] == none["divergence"] == none["dropped"] == 0.0
    assert math.isnan(none["on_token"]) and math.isnan(none["at_token"])


def test_the_table_on_real_rollouts():
    """A lower clip cuts more, and the embedded model's beliefs are among it; nobody leaps there."""
    tokenizer = load_tokenizer("tiny")
    contexts = both_contexts(load_model("tiny", device="cpu"), tokenizer, load_problems("tiny:heldout")[:8])
    assert contexts[0].shape == contexts[1].shape and contexts[0].shape[1] >= len(tokenizer)
    lines = markdown(*contexts, tokenizer.convert_tokens_to_ids("~"), "~").splitlines()
    rows = {cells[0]: [float(cell) for cell in cells[1:]] for cells in (line[2:-2].split(" | ") for line in lines[2:8])}
    for name in ("tokens with a cut entry", "teacher's mass cut", "divergence on cut entries"):
        assert 0.0 < rows[name][0] < rows[name][1] < rows[name][2] < 100.0
    assert rows["- of that on `~`"] == rows["- of these where the teacher proposes `~`"] == [0.0] * 3
    assert lines[-1].startswith(f"{len(contexts[0])} tokens") and lines[-1].endswith("at 0.0 % of them.")


def test_an_alternative_that_is_no_token_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clipping", "--token", "~~"])
    with pytest.raises(InputError, match=r"--token '~~': 2 tokens of tiny, not one"):
        clipping.main()
