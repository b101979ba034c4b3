#!/usr/bin/env bash
# Guess: torch.Generator().manual_seed(seed), documented for 64-bit seeds, gives another stream for every such seed.
# True (torch 2.13.0, CPU): only the low 32 bits count. 1, 2**32 + 1 and 2**63 + 1 give the same numbers, -1 those of
# 2**32 - 1, while initial_seed() reports the full value, so a check that compares seeds sees no clash.
# Why: CPUGeneratorImpl keeps the 64-bit seed but starts its engine with it, and mt19937::init_with_uint32 in
# aten/src/ATen/core/MT19937RNGEngine.h keeps seed & 0xffffffff.
# Bites: samplers that give each rollout a 64-bit seed of its own (a hash of run, step and row, or row << 32 | run):
# with hashes, 200,000 rollouts hold about five pairs that draw the same numbers; seeds that differ in the high word
# only are all one stream, so "independent" samples of one prompt are copies.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy
cat > seen.py <<'PY'
import hashlib

import torch

print("torch", torch.__version__)


def stream(seed):
    return torch.rand(1000, generator=torch.Generator().manual_seed(seed))


for seed, other in [(1, 2**32 + 1), (1, 2**63 + 1), (-1, 2**32 - 1), (1, 2)]:
    same = torch.equal(stream(seed), stream(other))
    reported = [torch.Generator().manual_seed(value).initial_seed() for value in (seed, other)]
    print(f"seen: seeds {seed} and {other}: the same 1000 numbers: {same}; initial_seed {reported}")
    assert same is (other != 2) and reported[0] != reported[1]

by_low_word, clashes = {}, []
for step in range(1000):
    for row in range(200):
        seed = int.from_bytes(hashlib.sha256(f"run 0, step {step}, row {row}".encode()).digest()[:8], "big")
        clashes += [(by_low_word[seed % 2**32], seed)] if seed % 2**32 in by_low_word else []
        by_low_word[seed % 2**32] = seed
assert clashes and all(a != b and torch.equal(stream(a), stream(b)) for a, b in clashes)
print(f"seen: 200,000 rollouts with hashed 64-bit seeds, all different: {len(clashes)} pairs draw the same numbers")
PY
v/bin/python seen.py
