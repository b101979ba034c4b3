#!/usr/bin/env bash
# Guess: verl's on-policy distillation at its defaults (loss_mode k3, use_policy_gradient false) descends the reverse KL
# that its loss function is named after and that the logged value estimates.
# True (verl 0.9.1): averaged over the student's samples, the value is the reverse KL, KL(student || teacher), but the
# gradient is exactly that of the FORWARD KL, KL(teacher || student). And a token that the teacher finds more than about
# 13 times as likely as the student has no gradient at all, since its estimate is cut at 10: the tokens on which the
# two differ most teach nothing. loss_mode k2 has the gradient of the reverse KL.
# Why: kl_penalty_forward in verl/trainer/ppo/core_algos.py returns clamp(ratio - log(ratio) - 1, -10, 10), and
# distillation_loss backpropagates through it (verl/trainer/distillation/losses.py). kl_penalty knows "k3+", which has
# the right gradient, but the names that distillation takes end at "k3".
# Bites: comparisons of forward and reverse divergences, of which this one is both; students that are meant to settle
# on one mode and cover all of them; a privileged teacher, whose surprises are just the tokens of large ratio.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.10.2 \
    tensordict==0.10.0 ray==2.60.0 omegaconf==2.4.0 codetiming==1.4.0 orjson==3.13.0
v/bin/pip install -q --disable-pip-version-check --no-deps verl==0.9.1
cat > seen.py <<'PY'
from importlib.metadata import version

import torch
import yaml
import verl
from verl.trainer.ppo.core_algos import kl_penalty

print("verl", version("verl"))
defaults_file = verl.__path__[0] + "/trainer/config/distillation/distillation.yaml"
defaults = yaml.safe_load(open(defaults_file))["distillation_loss"]
print("defaults:", defaults["loss_mode"], "use_policy_gradient", defaults["use_policy_gradient"])
assert (defaults["loss_mode"], defaults["use_policy_gradient"]) == ("k3", False)


def gradients(student_p, teacher_p):
    """Of the logits, exact means over the student's samples: each mode's, and those of both divergences; the values."""
    logits = torch.tensor(student_p, dtype=torch.float64).log().requires_grad_()
    student, teacher = logits.log_softmax(-1), torch.tensor(teacher_p, dtype=torch.float64).log()
    share = student.detach().exp()  # of the sampled token; the samples are fixed data, as in training
    losses = {mode: (share * kl_penalty(student, teacher, mode)).sum() for mode in ("k3", "k2")}
    losses["reverse"] = (student.exp() * (student - teacher)).sum()
    losses["forward"] = (teacher.exp() * (teacher - student)).sum()
    grads = {name: torch.autograd.grad(loss, logits, retain_graph=True)[0] for name, loss in losses.items()}
    return grads, {name: loss.item() for name, loss in losses.items()}


grads, values = gradients([0.6, 0.3, 0.1], [0.2, 0.3, 0.5])
for name in grads:
    print(f"seen: {name:8} value {values[name]:.4f} gradient {[round(g, 4) for g in grads[name].tolist()]}")
assert abs(values["k3"] - values["reverse"]) < 1e-9
assert torch.allclose(grads["k3"], grads["forward"]) and not torch.allclose(grads["k3"], grads["reverse"], atol=0.05)
assert torch.allclose(grads["k2"], grads["reverse"])

log_p = torch.tensor([-5.0, -5.0], requires_grad=True)
estimate = kl_penalty(log_p, log_p.detach() + torch.tensor([2.0, 3.0]), "k3")  # ratios of 7.4 and 20.1
estimate.sum().backward()
print(f"seen: teacher 7.4 and 20.1 times as likely: estimates {estimate.tolist()}, gradients {log_p.grad.tolist()}")
assert log_p.grad[0] < -6 and log_p.grad[1] == 0
PY
v/bin/python seen.py
