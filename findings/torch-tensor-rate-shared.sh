#!/usr/bin/env bash
# Guess: AdamW([{"params": a}, {"params": b}], lr=torch.tensor(.1)) is AdamW with lr=.1: each parameter group has a
# learning rate of its own, which a scheduler moves on its own.
# True (torch 2.13.0): all groups, and all optimizers made of that tensor, hold one tensor, and schedulers write into it
# in place. LambdaLR with a constant for one group and a decay for the other decays both; OneCycleLR with max_lr [.1,
# .01] runs both at .01, since the last group wins. ReduceLROnPlateau multiplies once for each group: of two groups .5
# makes .25, of four .0625. A scheduler of one optimizer moves the other. state_dict() holds the live tensor, so that a
# state kept for going back has the new rate. CosineAnnealingLR and others that treat all groups alike are right.
# Why: Optimizer.add_param_group (torch/optim/optimizer.py) fills a group from self.defaults without a copy, and
# _update_param_group_val (torch/optim/lr_scheduler.py) does fill_ where the value is a tensor. A tensor named in a
# group's own dict is that group's own.
# Bites: compiled optimizers, for which PyTorch's recipe says to wrap the rate in a tensor so that a schedule does not
# compile again: with ReduceLROnPlateau on the usual two groups (weight decay or none), or with a schedule for each
# group (head, adapters, layers). No error and no warning. The log shows one curve where two were asked for.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > seen.py <<'PY'
import warnings

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

print("torch", torch.__version__)
warnings.simplefilter("error")


def optimizer(rate, groups=2):
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)], lr=rate)


def rates(adam):
    return [round(float(group["lr"]), 5) for group in adam.param_groups]


def after(schedule, rate, steps, groups=2):
    adam = optimizer(rate, groups)
    scheduler = schedule(adam)
    for _ in range(steps):
        for group in adam.param_groups:
            group["params"][0].grad = torch.ones(2)
        adam.step()
        scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))  # a loss that does not fall
    return rates(adam)


CASES = {  # schedule, steps, groups -> the rates with a float, and with a tensor
    "LambdaLR, constant and halved": (
        lambda adam: LambdaLR(adam, [lambda step: 1.0, lambda step: 0.5**step]), 2, 2, [0.1, 0.025], [0.025, 0.025]),
    "OneCycleLR at its top": (
        lambda adam: OneCycleLR(adam, [0.1, 0.01], total_steps=10), 2, 2, [0.1, 0.01], [0.01, 0.01]),
    "ReduceLROnPlateau, 2 groups": (
        lambda adam: ReduceLROnPlateau(adam, factor=0.5, patience=0), 2, 2, [0.05, 0.05], [0.025, 0.025]),
    "ReduceLROnPlateau, 4 groups": (
        lambda adam: ReduceLROnPlateau(adam, factor=0.5, patience=0), 2, 4, [0.05] * 4, [0.00625] * 4),
    "CosineAnnealingLR": (lambda adam: CosineAnnealingLR(adam, 10), 5, 2, [0.05] * 2, [0.05] * 2),
}
for name, (schedule, steps, groups, plain, shared) in CASES.items():
    seen = after(schedule, 0.1, steps, groups), after(schedule, torch.tensor(0.1), steps, groups)
    print(f"seen: {name}: lr=.1 {seen[0]}, lr=torch.tensor(.1) {seen[1]}")
    assert seen == (plain, shared)

weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]  # do the steps follow those rates? Adam's first is lr
adam = torch.optim.AdamW([{"params": [w]} for w in weights], lr=torch.tensor(0.1), weight_decay=0.0)
LambdaLR(adam, [lambda step: 1.0, lambda step: 0.1])
for w in weights:
    w.grad = torch.ones(2)
adam.step()
print(f"seen: factors 1.0 and .1: the first step moves the weights by {[round(-w[0].item(), 4) for w in weights]}")
assert all(abs(w[0].item() + 0.01) < 1e-5 for w in weights)

rate = torch.tensor(0.1)
one, other = optimizer(rate), optimizer(rate)
kept = one.state_dict()
schedule = ExponentialLR(one, 0.5)
one.step()
schedule.step()
one.load_state_dict(kept)
print(f"seen: after one step of a schedule for one optimizer, and back to the state kept before it: {rates(one)}, the "
      f"other optimizer {rates(other)}, the caller's tensor {rate.item():.3f}")
assert rates(one) == rates(other) == [0.05, 0.05] and abs(rate.item() - 0.05) < 1e-6

own = torch.optim.AdamW([{"params": [w], "lr": torch.tensor(0.1)} for w in weights], lr=0.1)
schedule = LambdaLR(own, [lambda step: 1.0, lambda step: 0.5**step])
own.step()
schedule.step()
print(f"seen: with a tensor in each group's own dict: {rates(own)}")
assert rates(own) == [0.1, 0.05]
PY
v/bin/python seen.py
