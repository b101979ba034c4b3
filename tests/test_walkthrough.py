"""docs/walkthrough.md and the script that prints its tables hold together."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch

from experiments import walkthrough
from experiments.study.worlds import WORLDS, believed_result
from loss import LossOptions, clipped_divergence

PAGE = walkthrough.PAGE.read_text(encoding="utf-8")
DECIMAL = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def walk() -> walkthrough.Walk:
    return walkthrough.Walk()


def check_alike(shown: str, printed: str, name: str) -> None:
    """Equal words; decimal numbers within two units of their last digit, which another machine's rounding may move."""
    assert DECIMAL.sub("#", shown) == DECIMAL.sub("#", printed), name
    for here, there in zip(DECIMAL.findall(shown), DECIMAL.findall(printed), strict=True):
        digits = len(here.split(".")[1])
        assert float(here) == pytest.approx(float(there), abs=2.01 * 10**-digits), name


def test_the_page_holds_the_printed_numbers(walk):
    printed, shown = walkthrough.blocks(walk), walkthrough.page_blocks(PAGE)
    assert list(shown) == list(printed)
    for name, text in shown.items():
        check_alike(text, printed[name], f"{name}: run `-m experiments.walkthrough --write`")


@pytest.mark.slow
def test_the_notebook_prints_the_numbers_that_it_holds_and_they_are_the_pages():
    notebook = walkthrough.PAGE.with_suffix(".ipynb")
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    run = subprocess.run([sys.executable, "-c", code], cwd=notebook.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shown = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    check_alike(shown, run.stdout, "execute docs/walkthrough.ipynb again")
    assert outputs[-1]["data"]["image/svg+xml"]
    assert set(DECIMAL.findall(shown)) <= set(DECIMAL.findall(PAGE))


def test_the_rollout_states_the_belief_and_the_teacher_knows_better(walk):
    total, addend = walkthrough.FACT
    belief, right = believed_result(total, addend, WORLDS["embedded"].believed), total + addend
    assert f"{total}+{addend}={belief};" in walk.text
    assert walk.y_t(walkthrough.DIGIT) == f"`{str(belief)[-1]}`"
    assert walk.y_t(walkthrough.MARK) == "`;`"
    for logp_MV, digit, mark in ((walk.student_logp_MV, belief, ";"), (walk.teacher_logp_MV, right, "!")):
        best = logp_MV[[walkthrough.DIGIT - 1, walkthrough.MARK - 1]].argmax(dim=-1).tolist()
        assert walk.run.tokenizer.decode(best) == f"{str(digit)[-1]}{mark}"


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0, math.inf])
def test_closed_form_is_the_gradient_of_the_loss(clip):
    torch.manual_seed(0)
    student_MV = (4 * torch.randn(50, 7, dtype=torch.float64)).requires_grad_()
    teacher_MV = (4 * torch.randn(50, 7, dtype=torch.float64)).log_softmax(-1)
    student_logp_MV = (student_MV / 1.1).log_softmax(-1)
    value = clipped_divergence(student_logp_MV, teacher_MV, torch.zeros(50), LossOptions(tau_clip=clip)).sum()
    (gradient_MV,) = torch.autograd.grad(value, student_MV)
    closed_MV = walkthrough.logit_gradients(student_logp_MV.detach(), teacher_MV, clip)
    torch.testing.assert_close(gradient_MV * 1.1, closed_MV)
    plain_MV = (student_logp_MV.exp() - teacher_MV.exp()).detach()
    assert torch.allclose(closed_MV, plain_MV) == (clip == math.inf)


def test_reversal_by_hand():
    """p_T = (.9, .1), p_S = (.5, .5): entries .529 and -.161, so clip 0.2 cuts the first and leaves P_A = .1."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    clipped, plain = (walkthrough.logit_gradients(student, teacher, clip) for clip in (0.2, math.inf))
    torch.testing.assert_close(plain, torch.tensor([[-0.4, 0.4]]))
    torch.testing.assert_close(clipped, torch.tensor([[0.05, -0.05]]))  # .1 * .5, and .1 * .5 - .1
