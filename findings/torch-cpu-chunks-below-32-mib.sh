#!/usr/bin/env bash
# Guess: a loss over a large vocabulary, taken a chunk of tokens at a time, needs the less memory the smaller its chunks
# are: 30 MiB of logits a chunk at most as much as 34.
# True (torch 2.13.0, Linux with glibc, CPU, one thread): over 1,024 tokens of a vocabulary of 151,936 the resident
# memory grows by 1.3 to 1.5 GiB with chunks of 30 MiB, and on with every chunk; by .3 GiB in all with chunks of 34.
# Why: torch's CPU allocator (c10/core/impl/alloc_cpu.cpp) keeps no cache; glibc maps a tensor for itself only above a
# threshold that rises, as tensors are freed, up to 32 MiB (DEFAULT_MMAP_THRESHOLD_MAX in malloc/malloc.c). Smaller ones
# are cut from the heap, and the few numbers that each chunk leaves lie between them, so that freed room no longer fits.
# Bites: chunked cross entropy or distillation losses on a CPU, whose chunk was chosen by time (mapping costs time) or
# small "to be safe": a step that should need .7 GiB takes 9. A profiler of allocations does not see it: all is freed.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy
cat > seen.py <<'PY'
import re
import sys

import torch

torch.set_num_threads(1)
V, D, M, MIB = 151_936, 8, 1024, int(sys.argv[1])


def gib(name):
    return int(re.search(name + r":\s+(\d+)", open("/proc/self/status").read())[1]) / 2**20


size = MIB * 2**20 // (4 * V)
states, targets, head = torch.randn(M, D), torch.randn(M, D), torch.randn(V, D)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
start, kept = gib("VmRSS"), []
for x, y in zip(states.split(size), targets.split(size)):
    x = x.clone().requires_grad_()
    log_p, log_q = (x @ head.T).log_softmax(-1), (y @ head.T).log_softmax(-1)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    loss = (log_q.exp() * (log_q - log_p)).clamp(max=0.05).sum(-1)
    kept.append((loss.detach(), entropy, *torch.autograd.grad(loss.sum(), x)))
    del log_p, log_q, loss
print(gib("VmHWM") - start)
PY
below=$(v/bin/python seen.py 30) && above=$(v/bin/python seen.py 34)
version=$(v/bin/python -c 'import torch; print(torch.__version__)')
echo "seen: torch $version: chunks of 30 MiB $below GiB, of 34 MiB $above GiB"
v/bin/python -c "assert $below > 3 * $above and $above < .6"
