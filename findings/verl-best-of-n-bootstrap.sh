#!/usr/bin/env bash
# Guess: with 8 samples a prompt, verl's validation metric best@8/mean is the share of problems that at least one of the
# 8 solves (pass@8), and maj@8/mean the share that the vote of the 8 solves; only smaller n need an estimate.
# True (verl 0.9.1): at n = 8, too, 8 samples are drawn out of the 8 with replacement, 1,000 times. A problem that one
# sample of 8 solves counts .65 in best@8, not 1, and one that two of 8 solve .89: 100 hard problems of which 24 are
# solved by a sample or two have a pass@8 of .24 and a best@8 of .17. maj@8 is blurred: .76 where the vote of the 8 wins
# by 5 to 3, .24 where it loses. best@2 of four right in 8 is .75, where two different samples give .79.
# Why: bootstrap_metric in verl/trainer/ppo/metric_utils.py calls np.random.choice(..., replace=True) for every subset
# size, and process_validation_metrics takes the mean over the draws for n = 2, 4, ... and for N itself. The docstring
# says "bootstrap samples of size N"; what that does to the number it does not say.
# Bites: pass@k and maj@k read off verl's curves (val-core/.../best@N/mean), held against those that other harnesses
# compute. It is too low by up to a third where few samples are right, which is just where RL is said to win or lose its
# pass@k. And the gap closes as the samples of a problem become alike, so that a model which only got surer of what it
# could solve seems to solve more. mean@N is the plain mean.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.10.2 \
    tensordict==0.10.0 ray==2.60.0 omegaconf==2.4.0 codetiming==1.4.0 orjson==3.13.0 datasets==5.2.0 pillow==12.3.0
v/bin/pip install -q --disable-pip-version-check --no-deps verl==0.9.1
cat > seen.py <<'PY'
from importlib.metadata import version
from math import comb

from verl.trainer.ppo.metric_utils import process_validation_metrics

print("verl", version("verl"))
N = 8


def measured(problems):
    """verl's metrics of problems that are lists of N (answer, right or not)."""
    uids = [str(i) for i, samples in enumerate(problems) for _ in samples]
    infos = {"acc": [float(right) for samples in problems for _, right in samples],
             "pred": [answer for samples in problems for answer, _ in samples]}
    return process_validation_metrics(["math"] * len(uids), uids, infos)["math"]["acc"]


def problem(right, wrong_alike=False):
    return [("42", True)] * right + [("7" if wrong_alike else str(100 + i), False) for i in range(N - right)]


for right in (0, 1, 2, 4, 8):
    seen = measured([problem(right)])
    drawn = 1 - (1 - right / N) ** N
    pass_2 = 1 - comb(N - right, 2) / comb(N, 2)
    print(f"seen: {right} of 8 right: mean@8 {seen['mean@8']:.3f}, best@8 {seen['best@8/mean']:.3f} where pass@8 is "
          f"{float(right > 0):.0f}, best@2 {seen['best@2/mean']:.3f} where pass@2 is {pass_2:.3f}")
    assert abs(seen["best@8/mean"] - drawn) < 0.04 and abs(seen["mean@8"] - right / N) < 1e-9
    assert abs(seen["best@2/mean"] - (1 - (1 - right / N) ** 2)) < 0.04
hard = [problem(1)] * 20 + [problem(2)] * 4 + [problem(0)] * 76
seen = measured(hard)
print(f"seen: 100 hard problems, 24 of them solved by 1 or 2 samples of 8: best@8 {seen['best@8/mean']:.3f}")
assert abs(seen["best@8/mean"] - 0.166) < 0.01
for right in (5, 3):  # against one wrong answer, so that the vote is clear
    seen = measured([problem(right, wrong_alike=True)])
    print(f"seen: {right} of 8 right, the others agree on 7: maj@8 {seen['maj@8/mean']:.3f} where the vote of the 8 is "
          f"{float(right > 4):.0f}")
    assert 0.1 < seen["maj@8/mean"] < 0.9
PY
v/bin/python seen.py
