#!/usr/bin/env bash
# Guess: Trinity-RFT's algorithm "jsd" brings a student nearer to its teacher: a sampled token that the teacher finds
# less likely than the student has a negative advantage, and the logged jsd/mean is a divergence, 0 or more. The KL
# divergences at the two ends (lambda_coef 0 and 1) are descended as well.
# True (trinity-rft 0.6.0, torch 2.13.0, CPU): at the default, lambda_coef .5, no advantage is ever negative. It is the
# larger the more the two differ on the token, whichever of them likes it: a token that the student gives .05 and the
# teacher .001 earns 1.28, the most of all. Student and teacher may change places, and every advantage stays as it is.
# 300 steps end on that token, at P .995; the JSD has risen from .05 to .67, where log(2) is the most there is, while
# the logged jsd/mean fell all the way, below 0, as though all went well. At lambda_coef 1, called KL(teacher||student),
# the same happens. At 0, and with the algorithm "on_policy_distill", the student comes to its teacher.
# Why: _js_divergence_per_token in trinity/algorithm/advantage_fn/jsd_advantage.py adds lambda log(p_teacher / m) and
# (1 - lambda) log(p_student / m) at the one sampled token, m being the mixture: at most 0, as a logarithm is concave.
# The first is a part of a divergence over the teacher's tokens, but the tokens are the student's, and no weight
# p_teacher / p_student makes up for it. __call__ takes the negative as the advantage. At 1 that is log(p_student /
# p_teacher), the reward of "on_policy_distill" turned round.
# Bites: on-policy distillation with algorithm_type: jsd. The student runs away from its teacher, and the metric that
# one would watch says the opposite. kl_coef and the clipping of the loss only set the pace.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
v/bin/pip install -q --disable-pip-version-check --no-deps trinity-rft==0.6.0
cat > seen.py <<'PY'
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch


def stand_in(name, **content):
    sys.modules[name] = module = ModuleType(name)
    module.__dict__.update(content)


folder = importlib.util.find_spec("trinity").submodule_search_locations[0]
for part in ("algorithm", "algorithm.advantage_fn", "algorithm.policy_loss_fn", "common"):
    stand_in(f"trinity.{part}", __path__=[f"{folder}/{part.replace('.', '/')}"])  # without what their __init__ loads
stand_in("verl", DataProto=object)
stand_in("trinity.algorithm.advantage_fn.advantage_fn", AdvantageFn=object)
stand_in("trinity.common.config", Config=None)
stand_in("trinity.common.constants", SyncMethod=MagicMock())
stand_in("trinity.utils.log", get_logger=MagicMock())

from trinity.algorithm.advantage_fn.jsd_advantage import JSDAdvantage  # noqa: E402
from trinity.algorithm.advantage_fn.on_policy_distill_advantage import OnPolicyDistillAdvantage  # noqa: E402
from trinity.algorithm.algorithm import JSDAlgorithm  # noqa: E402
from trinity.algorithm.policy_loss_fn.ppo_policy_loss import PPOPolicyLossFn  # noqa: E402

print("trinity-rft", version("trinity-rft"), "torch", torch.__version__)
default = JSDAlgorithm.default_config()
assert default["advantage_fn_args"]["lambda_coef"] == 0.5 and default["policy_loss_fn"] == "ppo"
STUDENT, TEACHER = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.7, 0.1, 0.199, 0.001])


def jsd(p, q):
    m = (p + q) / 2
    return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()).item() / 2


def advantages(function, student_logp, teacher_logp):
    batch = {"old_log_probs": student_logp[None], "teacher_logprobs": teacher_logp[None],
             "response_mask": torch.ones(1, len(student_logp))}
    _, metrics = function(SimpleNamespace(batch=batch))
    return batch["advantages"], metrics


def train(function, steps=300, rows=512):
    """The student after policy-gradient steps on its own samples, and the first and last logged divergence a token."""
    torch.manual_seed(0)
    logits = STUDENT.log().requires_grad_()
    optimizer, loss_fn, logged = torch.optim.Adam([logits], lr=0.05), PPOPolicyLossFn(clip_range=0.2), []
    for _ in range(steps):
        logp = logits.log_softmax(0)
        tokens = torch.multinomial(logp.detach().exp(), rows, replacement=True)
        advantage, metrics = advantages(function, logp.detach()[tokens], TEACHER.log()[tokens])
        logged.append(metrics.get("jsd/mean", metrics.get("kl/mean")) / rows)
        loss, _ = loss_fn(logprob=logp[tokens][None], old_logprob=logp.detach()[tokens][None],
                          action_mask=torch.ones(1, rows), advantages=advantage)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(0), logged[0], logged[-1]


one, swapped = (advantages(JSDAdvantage(), *pair)[0][0]
                for pair in ((STUDENT.log(), TEACHER.log()), (TEACHER.log(), STUDENT.log())))
print(f"seen: student {STUDENT.tolist()}, teacher {TEACHER.tolist()}: advantages {one.tolist()}")
assert (one > 0).all() and one.argmax() == 3 and torch.allclose(one, swapped, atol=1e-6)
print(f"seen: the JSD of the two is {jsd(STUDENT, TEACHER):.3f} before training")
for name, function, nearer in (("jsd, default", JSDAdvantage(**default["advantage_fn_args"]), False),
                               ("jsd, lambda_coef 1", JSDAdvantage(lambda_coef=1.0), False),
                               ("jsd, lambda_coef 0", JSDAdvantage(lambda_coef=0.0), True),
                               ("on_policy_distill", OnPolicyDistillAdvantage(), True)):
    student, first, last = train(function)
    apart, reverse_kl = jsd(student, TEACHER), (student * (student / TEACHER).log()).sum().item()
    print(f"seen: {name}: student {[round(p, 3) for p in student.tolist()]}, JSD {apart:.4f}, reverse KL "
          f"{reverse_kl:.3f}; logged a token: {first:.3f} at first, {last:.3f} at last")
    assert apart < 0.002 if nearer else apart > 0.6 and last < first < 0
PY
v/bin/python seen.py
