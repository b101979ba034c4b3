#!/usr/bin/env bash
# Guess: with a teacher configured, AReaL's actor descends the RL loss plus distill_loss_weight times the reverse KL to
# the teacher: another teacher, another gradient. rl_loss_weight says how much of the RL loss is in it, and no more.
# True (areal 1.0.4): with rl_loss_weight 1, the default (by the code, with any but 0), the teacher has no part in the
# gradient. The value is right, the reverse KL on average, and logged as rkl_loss; the gradient is the same to the last
# bit for both teachers tried, and over the student's own samples 0 up to noise: under .01 of the KL's norm.
# With rl_loss_weight 0 the gradient is that of the reverse KL (cosine 1.00), for each teacher its own.
# Why: grpo_loss_fn in areal/trainer/ppo/actor.py adds the mean of logprobs - teacher_logp. The teacher's part is a
# constant, and the mean gradient of the log-probabilities of one's own samples is 0. The branch for rl_loss_weight 0
# multiplies the ratio to the sampling policy by the detached difference, as a policy gradient does; this one does not.
# Bites: "RL with distillation" (KDRL) that is RL with noise: rkl_loss is a proper KL which only RL moves, a better
# teacher changes nothing, and a larger weight only adds variance. The engines around the loss are not needed here and
# are left out.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy colorlog packaging
v/bin/pip install -q --disable-pip-version-check --no-deps areal==1.0.4
cat > seen.py <<'PY'
import importlib.abc
import importlib.machinery
import sys
from importlib.metadata import version
from unittest.mock import MagicMock

import torch

# what areal.trainer imports and its loss does not call: engines, data, logging to services
PACKAGES = {"aiohttp", "colorama", "datasets", "einops", "numba", "orjson", "swanlab", "tabulate", "tensorboardX",
            "torchdata", "trackio", "transformers", "wandb", "yaml"}
PARTS = {"api", "dataset", "engine", "experimental", "infra", "models", "reward", "workflow"}


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        top, *rest = name.split(".")
        if top in PACKAGES or (top == "areal" and rest and rest[0] in PARTS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__name__ = [], spec.name
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, StandIns())
from areal.trainer.ppo.actor import grpo_loss_fn  # noqa: E402

print("areal", version("areal"), "torch", torch.__version__)
torch.manual_seed(0)
WORDS, N = 8, 200_000
student = torch.randn(WORDS)
teachers = {"a teacher": torch.randn(WORDS), "another": 3 * torch.randn(WORDS)}
tokens = torch.multinomial(student.softmax(0), N, replacement=True)[None]  # sampled by the student itself


def step(teacher, rl_loss_weight):
    """Loss and gradient of the student's logits where all advantages are 0, so that only the teacher is left."""
    logits = student.clone().requires_grad_()
    logprobs = logits.log_softmax(0)[tokens]
    batch = {
        "logprobs": logprobs.detach(), "prox_logp": logprobs.detach(), "advantages": torch.zeros(1, N),
        "loss_mask": torch.ones(1, N), "teacher_logp": teacher.log_softmax(0)[tokens],
        "rl_loss_weight": rl_loss_weight, "distill_loss_weight": 1.0,
    }
    loss = grpo_loss_fn(logprobs, torch.zeros(1, N), batch, eps_clip=0.2, eps_clip_higher=None, c_clip=None)
    loss.backward()
    return loss.item(), logits.grad


joint = []
for name, teacher in teachers.items():
    logits = student.clone().requires_grad_()
    kl = (logits.softmax(0) * (logits.log_softmax(0) - teacher.log_softmax(0))).sum()
    kl.backward()
    for weight in (1.0, 0.0):
        loss, gradient = step(teacher, weight)
        size, cosine = gradient.norm() / logits.grad.norm(), torch.cosine_similarity(gradient, logits.grad, 0)
        print(f"seen: {name}, rl_loss_weight {weight}: loss {loss:.3f} (reverse KL {kl.item():.3f}), norm of its "
              f"gradient over the KL's {size:.4f}, cosine {cosine:.4f}")
        assert abs(loss - kl.item()) < 0.02
        assert (size < 0.01) if weight else (abs(size - 1) < 0.02 and cosine > 0.99)
        if weight:
            joint.append(gradient)
print("seen: joint gradients of the two teachers equal:", torch.equal(*joint))
assert torch.equal(*joint)
PY
v/bin/python seen.py
