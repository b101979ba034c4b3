#!/usr/bin/env bash
# Guess: torchmetrics' BootStrapper(..., sampling_strategy="multinomial"), the bootstrap of the textbooks (n rows out of
# n, with replacement), gives one standard error for one set of rows, however they are split over calls of update().
# True (torchmetrics 1.9.0): it is that of the noise WITHIN the calls; what differs from call to call is not in it. Rows
# that come one a call have a standard error of exactly 0. 64 problems of which half are always solved and half never,
# eight samples each: given at once .024 (as for 512 rows), a problem a call 0. The mean's error over problems is .063.
# 64 mixed rows at once, eight a call and one a call: .062, .055 and 0; sorted, eight a call, .022. With "poisson", the
# default, the split makes no difference.
# Why: BootStrapper.update (torchmetrics/wrappers/bootstrapping.py) draws anew for each call, and for "multinomial"
# _bootstrap_sampler draws as many rows as this call has, out of this call's. Together that is a stratified bootstrap
# whose strata are the batches. Poisson weights are drawn for each row alone, which batches cannot change.
# Bites: evaluations that call update() once a problem with its n samples, or on small batches: the error bar of Avg@N
# is that of sampling only, the more so the fewer rows a call has, and goes to 0 at last. Every difference between two
# models is then significant. A larger evaluation batch makes the bars longer.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
v/bin/pip install -q --disable-pip-version-check torchmetrics==1.9.0
export OMP_NUM_THREADS=1
cat > seen.py <<'PY'
import torch
import torchmetrics
from torchmetrics import MeanMetric
from torchmetrics.wrappers import BootStrapper

print("torchmetrics", torchmetrics.__version__)
DRAWS = 200


def error(rows, call, strategy):
    """The mean and the standard error that BootStrapper gives, `call` rows a call of update()."""
    torch.manual_seed(1)
    metric = BootStrapper(MeanMetric(), num_bootstraps=DRAWS, sampling_strategy=strategy)
    for batch in rows.split(call):
        metric.update(batch)
    seen = metric.compute()
    return seen["mean"].item(), seen["std"].item()


def within(rows, call):
    """The exact standard error of a bootstrap that resamples inside each call only."""
    return (sum(len(b) * b.var(unbiased=False) for b in rows.split(call)) ** 0.5 / len(rows)).item()


mixed = torch.rand(64, generator=torch.Generator().manual_seed(0)).round()
right = within(mixed, 64)
CASES = [(name, rows, call) for name, rows in (("mixed", mixed), ("sorted", mixed.sort().values))
         for call in ((64, 8, 1) if name == "mixed" else (64, 8))]
for name, rows, call in CASES:
    for strategy in ("multinomial", "poisson"):
        mean, std = error(rows, call, strategy)
        expected = within(rows, call) if strategy == "multinomial" else right
        print(f"seen: {name:6} rows, {call:2} a call, {strategy:11}: mean {mean:.3f}, standard error {std:.4f}; exact: "
              f"all rows' {right:.4f}, within the calls {within(rows, call):.4f}")
        assert abs(mean - mixed.mean()) < 0.03 and abs(std - expected) < 0.2 * expected + 1e-6
assert error(mixed, 1, "multinomial")[1] == 0 and within(mixed.sort().values, 8) < 0.4 * right
problems = (torch.arange(64) % 2).float()
samples = problems.repeat_interleave(8)
at_once, by_problem = error(samples, 512, "multinomial")[1], error(samples, 8, "multinomial")[1]
true = (problems.std() / 64 ** 0.5).item()
print(f"seen: 64 problems, 8 samples each: at once {at_once:.4f}, a problem a call {by_problem:.4f}, "
      f"over problems {true:.4f}")
assert by_problem == 0 and 0.017 < at_once < 0.027 and 0.06 < true < 0.066
PY
v/bin/python seen.py
