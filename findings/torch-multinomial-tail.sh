#!/usr/bin/env bash
# Guess: torch.multinomial(probs, n, replacement=True) is n times torch.multinomial(probs, 1), up to rounding noise.
# True (torch 2.13.0, CPU, float32): they are two algorithms. Over a vocabulary of 150,000 where one token has nearly
# all the mass, tokens of 2e-8 each (0.3 % together) are never drawn in 5 million draws with replacement, where 15,000
# are due; at 1e-7 each the tail comes 20 % too often. Drawn one at a time, or in float64, the frequencies are right.
# Why: with n > 1 and replacement, aten/src/ATen/native/cpu/MultinomialKernel.cpp adds the probabilities up in their own
# dtype and searches that running sum; near 1 a float32 has steps of 6e-8, so smaller terms round to nothing or to a
# whole step. One draw takes the fast path of multinomial in Distributions.cpp: argmax of p / Exp(1), exact in the tail.
# Bites: Monte Carlo estimates of entropy, of a KL between policies or of how often a policy leaves the top token,
# that draw many tokens from one next-token distribution: exactly the rare tokens, which carry the large log-ratios, are
# missing. generate() draws one at a time and is safe.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy
cat > seen.py <<'PY'
import torch

print("torch", torch.__version__)
VOCABULARY, DRAWS = 150_000, 5_000_000


def distribution(tail_probability, dtype=torch.float32):
    probs = torch.full((VOCABULARY,), tail_probability, dtype=dtype)
    probs[0] = 1 - tail_probability * (VOCABULARY - 1)
    return probs


def tail_share(probs):
    """Share of draws with replacement that are not the top token."""
    return (torch.multinomial(probs, DRAWS, replacement=True) > 0).double().mean().item()


torch.manual_seed(0)
for tail_probability in (2e-8, 1e-7):
    due = tail_probability * (VOCABULARY - 1)
    single, double = (tail_share(distribution(tail_probability, dtype)) for dtype in (torch.float32, torch.float64))
    print(f"seen: tail tokens of {tail_probability:g}: due {due:.5f}, float32 {single:.5f}, float64 {double:.5f}")
    assert abs(double / due - 1) < 0.05
    assert single == 0 if tail_probability == 2e-8 else 1.15 < single / due < 1.25

rows = distribution(2e-8).expand(200, -1)
hits = sum((torch.multinomial(rows, 1) > 0).sum().item() for _ in range(25))
print(f"seen: tail tokens of 2e-08, 5,000 draws one at a time: due 15, float32 {hits}")
assert 3 < hits < 40
PY
v/bin/python seen.py
