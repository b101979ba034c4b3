#!/usr/bin/env bash
# Guess: `compiled` of LigerFusedLinearJSDLoss is a matter of speed, and in bfloat16 the divergence is right to a few
# percent either way, as the logits are the same.
# True (liger-kernel 0.8.5, torch 2.13.0, CPU): with compiled=False a Jensen-Shannon divergence, which cannot be
# negative, is: -.0012 a token where .0050 is right, -.0076 where .0005 is. The forward KL is .0205 for .0200, but .0033
# for .0018. Compiled (the default), the same four calls say .0058, .0009, .0201 and .0019. The gradients differ little
# (cosine to float32 .96 to 1 in both).
# Why: distillation_loss_fn (liger_kernel/chunked_loss/jsd_loss.py) works in the logits' own dtype. It adds log .5 to
# log-probabilities that lie on bfloat16's grid (steps of 1/16 near -10), where -.693 is no multiple of a step, so that
# nearly all entries round the same way; so does the logsumexp of two close terms, which adds .69. The mixture comes out
# too large as a whole and is subtracted from both terms. A float32 mixture that is rounded once does no harm. The
# compiler keeps what it fuses in float32, which hides that.
# Bites: whoever reads that loss, since on-policy distillation starts from small divergences and beta .5 is the default.
# By reading: the distillation trainers of TRL 0.29 (GKD and GOLD with use_liger_kernel) pass compiled=False; with a
# model in bfloat16 it is half of what they log, beside a cross-entropy that hides its sign.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy
v/bin/pip install -q --disable-pip-version-check --no-deps liger-kernel==0.8.5  # without triton, which a CPU lacks
cat > seen.py <<'PY'
from importlib.metadata import version
from math import log

import torch
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

print("liger-kernel", version("liger-kernel"), "torch", torch.__version__)
TOKENS, HIDDEN, VOCABULARY = 256, 256, 32_000
torch.manual_seed(0)
head = (2 * torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).bfloat16()
teacher = torch.randn(TOKENS, HIDDEN).bfloat16()
labels = torch.zeros(TOKENS, dtype=torch.long)


def loss_and_gradient(student, dtype, beta, compiled):
    measure = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    student = student.to(dtype, copy=True).requires_grad_()
    loss = measure(student, head.to(dtype), teacher.to(dtype), head.to(dtype), labels)
    loss.backward()
    return loss.item(), student.grad.float().flatten()


def with_mixture(student, dtype):
    """The JSD in float32 but for the log of its mixture, which is made in `dtype` and rounded to bfloat16."""
    p, q = ((states.float() @ head.float().T).log_softmax(-1) for states in (student, teacher))
    mixture = torch.logsumexp(torch.stack([p.to(dtype) + log(0.5), q.to(dtype) + log(0.5)]), dim=0).bfloat16().float()
    return sum(0.5 * (logp.exp() * (logp - mixture)).sum(-1).mean().item() for logp in (p, q))


for distance in (0.1, 0.03):
    student = (teacher.float() + distance * torch.randn(TOKENS, HIDDEN)).bfloat16()
    for beta, name in ((0.5, "JSD"), (0.0, "forward KL")):
        right, gradient = loss_and_gradient(student, torch.float32, beta, compiled=False)
        seen = {}
        for compiled in (False, True):
            seen[compiled], other = loss_and_gradient(student, torch.bfloat16, beta, compiled)
            cosine = torch.cosine_similarity(other, gradient, 0).item()
            how = f"in bfloat16, compiled {compiled}"
            print(f"seen: {name} {right:.5f}; {how}: {seen[compiled]:.5f}, cosine {cosine:.3f}")
            assert cosine > 0.94
        assert 0.9 < seen[True] / right < 2.2
        if beta:
            once, throughout = (with_mixture(student, dtype) for dtype in (torch.float32, torch.bfloat16))
            print(f"seen: in float32 but for a mixture rounded once: {once:.5f}; made in bfloat16: {throughout:.5f}")
            assert once > 0 > throughout
        assert seen[False] < 0 if beta else seen[False] / right > (1.0 if distance == 0.1 else 1.4)
PY
v/bin/python seen.py
