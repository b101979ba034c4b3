#!/usr/bin/env bash
# Guess: --reward.clip_range of OpenRLHF ("Reward clip range") clips rewards, before a baseline is taken of them:
# rewards that lie within the range are left alone, and one far outside counts as the end of the range for its whole
# group.
# True (openrlhf 0.11.2, torch 2.13.0): with rloo, reinforce_baseline, group_norm, dr_grpo and flash_reinforce it clips
# what is left after the baseline, the advantage. With rewards of 0 and 1 and the range 0 1 no wrong answer has an
# advantage below 0: it teaches nothing, and right answers alone are pushed. With the range -1 1 and one reward of 50,
# the outlier goes into the baseline as it is, and the right answers beside it, with rewards of 1, get -1. With
# "reinforce", which has no baseline, rewards are clipped, as guessed.
# Why: compute_advantages_and_returns (openrlhf/trainer/ppo_utils/experience_maker.py) subtracts the baseline and hands
# the difference to compute_reward (openrlhf/models/utils.py), where r.clamp is; that order is right where r is a
# reward.
# Bites: a range that names the rewards' own bounds, set to be safe, halves the gradient and shifts the rest: the mean
# advantage of a group is no longer 0. A range against a reward model's outliers does not keep them out of the baseline.
# At the default, -10 10, rewards of 0 and 1 are safe. (ray, deepspeed and transformers, which have no part in these
# functions, are stand-ins, and the packages' __init__.py, which import them all, are passed by.)
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy
v/bin/pip install -q --disable-pip-version-check --no-deps openrlhf==0.11.2
cat > seen.py <<'PY'
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

print("openrlhf", version("openrlhf"), "torch", torch.__version__)
for name, content in (("ray", None), ("deepspeed", None), ("transformers", "AutoTokenizer"),
                      ("openrlhf.trainer.ray.launcher", "RayActorGroup")):
    sys.modules[name] = ModuleType(name)
    if content:
        setattr(sys.modules[name], content, object)
root = Path(importlib.util.find_spec("openrlhf").origin).parent
for name in ("models", "utils", "trainer", "trainer.ppo_utils"):  # these packages without their __init__.py
    package = sys.modules["openrlhf." + name] = ModuleType("openrlhf." + name)
    package.__path__ = [str(root.joinpath(*name.split(".")))]
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker


def advantages(rewards, estimator, clip):
    """The advantage of each sample of one group, before any whitening over the batch; one token each."""
    n = len(rewards)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=True)),
        rollout=SimpleNamespace(n_samples_per_prompt=n), reward=SimpleNamespace(clip_range=clip),
    )
    maker = RemoteExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=args), None)
    batch = Experience(index=list(range(n)), rewards=torch.tensor(rewards), kl=torch.zeros(n, 1),
                       action_mask=torch.ones(n, 1, dtype=torch.bool), info={})
    maker.compute_advantages_and_returns([batch])
    return batch.returns[:, 0]


def guess(rewards, estimator, clip):
    rewards = torch.tensor(rewards).clamp(*clip)
    if estimator == "reinforce":
        return rewards
    centred = rewards - rewards.mean()
    if estimator == "rloo":
        return centred * len(rewards) / (len(rewards) - 1)
    return centred / (rewards.std() + 1e-9) if estimator == "group_norm" else centred


WIDE = (-1000.0, 1000.0)
for rewards, clip in (([1.0, 1.0, 0.0, 0.0], (0.0, 1.0)), ([1.0, 1.0, 0.0, 50.0], (-1.0, 1.0))):
    for estimator in ("rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce", "reinforce"):
        got, right = advantages(rewards, estimator, clip), guess(rewards, estimator, clip)
        print(f"seen: rewards {rewards}, range {clip}, {estimator}: {[round(x, 2) for x in got.tolist()]}; "
              f"of clipped rewards {[round(x, 2) for x in right.tolist()]}")
        assert torch.allclose(got, guess(rewards, estimator, WIDE).clamp(*clip), atol=1e-5)
        assert torch.allclose(got, right, atol=1e-5) == (estimator == "reinforce")
        assert torch.allclose(advantages(rewards, estimator, WIDE), guess(rewards, estimator, WIDE), atol=1e-4)
PY
v/bin/python seen.py
