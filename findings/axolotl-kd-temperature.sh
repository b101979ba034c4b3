#!/usr/bin/env bash
# Guess: with kd_temperature T the distillation loss of axolotl is multiplied by T * T, as usual, so that its gradient
# keeps its size beside the cross-entropy's, and what is logged is what is descended.
# True (axolotl 0.19.0, liger-kernel 0.8.5, torch 2.13.0, CPU): the value is multiplied, the gradient is not. At T = 2
# the gradient is a quarter of that of the logged loss, at T = 4 a sixteenth; at T = 1 all is well. With kd_ce_alpha
# and kd_alpha .5 value and gradient are of two functions: at T = 4, descending raises the loss after some steps.
# Why: LigerFusedLinearKLTopKLogprobFunction.forward in axolotl/integrations/kd/kernels/liger.py takes the gradients a
# chunk at a time and keeps them for backward; the factor temperature**2 goes onto the sum of the losses afterwards.
# Bites: distillation at T > 1 with both losses. The teacher has 1 / T**2 of the say that kd_alpha gives it, so that a
# higher temperature, which should show more of the teacher, is next to plain fine-tuning, and looks like a soft teacher
# that does not help. With kd_alpha alone Adam hides it, but for gradient clipping and the log. kd_temperature_min, a
# schedule for the online teacher, does not reach this loss' temperature either (by reading, callbacks.py).
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
v/bin/pip install -q --disable-pip-version-check --no-deps axolotl==0.19.0 liger-kernel==0.8.5  # without triton etc.
cat > seen.py <<'PY'
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType

import torch

HOME = importlib.util.find_spec("axolotl").submodule_search_locations[0].removesuffix("axolotl")
for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.kd"):  # without their __init__.py
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [HOME + name.replace(".", "/")]
from axolotl.integrations.kd.kernels import LigerFusedLinearKLTopKLogprobLoss  # noqa: E402

print("axolotl", version("axolotl"), "liger-kernel", version("liger-kernel"), "torch", torch.__version__)
V, TOKENS, WIDTH = 8, 3, 4
torch.manual_seed(0)
head, hidden = torch.randn(V, WIDTH), torch.randn(1, TOKENS, WIDTH)
teacher = 2 * torch.randn(1, TOKENS, V)
ids, mask = torch.arange(V).expand(1, TOKENS, V).contiguous(), torch.ones(1, TOKENS, V)
labels = torch.tensor([[-100, 1, 2]])  # moved by one position inside: the tokens after the first two


def loss(head, temperature, ce, kd):
    """axolotl's loss; all of the vocabulary is the top k, the teacher's log-probabilities are at its temperature."""
    function = LigerFusedLinearKLTopKLogprobLoss(ce, kd, temperature, 0.0, compute_ce_loss=ce > 0, normalize_topk=True,
                                                 compiled=False)
    return function(head, hidden, ids, (teacher / temperature).log_softmax(-1), mask, labels)


def formula(head, temperature):
    student, wanted = (hidden @ head.T / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * (wanted.exp() * (wanted - student)).sum()


for temperature in (1.0, 2.0, 4.0):
    leaf = head.clone().requires_grad_()
    value, wanted = loss(leaf, temperature, 0.0, 1.0), formula(leaf, temperature)
    (gradient,), (right,) = torch.autograd.grad(value, leaf), torch.autograd.grad(wanted, leaf)
    step = 1e-2 * right / right.norm()
    slope = (loss(head + step, temperature, 0.0, 1.0) - loss(head - step, temperature, 0.0, 1.0)) / (2 * step.norm())
    share = (gradient.norm() / right.norm()).item()
    print(f"seen: T = {temperature:.0f}: loss {value.item():.4f}, by the formula {wanted.item():.4f}; slope of the "
          f"loss {slope.item():.4f}, its gradient's norm {gradient.norm().item():.4f}, {share:.4f} of the right one")
    assert abs(value.item() / wanted.item() - 1) < 1e-4 and abs(slope.item() / right.norm().item() - 1) < 1e-2
    assert abs(share - 1 / temperature**2) < 1e-4

leaf, logged = torch.zeros(V, WIDTH, requires_grad=True), []
for _ in range(3000):  # plain gradient descent on what axolotl returns
    value = loss(leaf, 4.0, 0.5, 0.5)
    (gradient,) = torch.autograd.grad(value, leaf)
    leaf.data -= 0.05 * gradient
    logged.append(value.item())
least = min(logged)
print(f"seen: T = 4, both losses: logged {logged[0]:.3f} at first, {least:.3f} at step {logged.index(least)}, "
      f"{logged[-1]:.3f} at the end")
assert logged[-1] > least + 0.05 and 0 < logged.index(least) < len(logged) - 100
PY
v/bin/python seen.py
