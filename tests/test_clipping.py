"""The closed form behind the account of clipping, against autograd and by hand."""

import math

import pytest
import torch

from experiments.clipping import clip_statistics, logit_gradients, markdown
from loss import LossOptions, clipped_divergence

CLIPS = [0.05, 0.2, 1.0, math.inf]


@pytest.mark.parametrize("clip", CLIPS)
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
    torch.testing.assert_close(clip_statistics(student, teacher, 0.2), torch.tensor([[0.9, 1.0, 1.0]]))
    for clip in (1.0, math.inf):
        torch.testing.assert_close(clip_statistics(student, teacher, clip), torch.zeros(1, 3))


def test_half_of_the_entries_reversed():
    """Three entries, one clipped: it turns around, the others keep their sign where P_A p_S stays above p_T."""
    student, teacher = torch.tensor([[0.2, 0.4, 0.4]]).log(), torch.tensor([[0.5, 0.3, 0.2]]).log()
    # Entries .458, -.086, -.139; P_A = .5; clipped gradient .1, -.1, 0; unclipped -.3, .1, .2.
    clipped, _ = logit_gradients(student, teacher, 0.2)
    torch.testing.assert_close(clipped, torch.tensor([[0.1, -0.1, 0.0]]), atol=1e-6, rtol=0)
    student = torch.tensor([[0.2, 0.3, 0.5]]).log()
    # P_A p_S - p_T = -.15, .05 for the unclipped entries, p_S - p_T = 0, .3: only the first entry turns.
    mass, entries, gradient = clip_statistics(student, teacher, 0.2)[0].tolist()
    assert mass == pytest.approx(0.5)
    assert entries == pytest.approx(1 / 3)
    assert gradient == pytest.approx(0.3 / 0.6)


def test_clipping_tables():
    columns = ("clipped_mass", "reversed_entries", "reversed_gradient")
    row = dict.fromkeys(columns, 0.25) | {"by_decile": {name: [i / 100 for i in range(10)] for name in columns}}
    rows = [{"clip": "0.05", "step": 0, **row}, {"clip": "0.05", "step": 5, **row, "held_out": 0.5}]
    text = markdown(rows)
    assert "| 0.05 | 25.00 | 25.00 | 50.0 |" in text
    assert "| 0.05 | 0.00 | 1.00 | 2.00 |" in text
