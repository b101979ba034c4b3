#!/usr/bin/env bash
# Guess: verl's forward_kl_topk is the teacher's KL up to what lies outside the teacher's top k, so that it is 0 with no
# gradient where student and teacher are equal, and pulls a student back that is surer of those k tokens than it is.
# True (verl 0.9.1): it pulls one way only. Where both are equal it still moves mass into the teacher's top k. And a
# student that has more there has loss 0 and no gradient at all, though its true KL is large: nothing brings it back.
# Why: the sum over the top k alone, of p_teacher * log(p_teacher / p_student), is not divided by either's share there and
# has no term for the rest (compute_forward_kl_topk in verl/trainer/distillation/fsdp/losses.py), so it goes below 0, and
# the function of the same name in verl/trainer/distillation/losses.py cuts it at 0.
# Bites: students of this loss lose the entropy that their teacher has in its tail, the more the smaller k; a
# logged distillation loss of 0 that reads as "learned"; comparisons with the KL over the whole vocabulary.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.10.2 \
    tensordict==0.10.0 ray==2.60.0 omegaconf==2.4.0 codetiming==1.4.0 orjson==3.13.0 datasets==5.2.0 pillow==12.3.0
v/bin/pip install -q --disable-pip-version-check --no-deps verl==0.9.1
cat > seen.py <<'PY'
from importlib.metadata import version
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk as of_logits
from verl.trainer.distillation.losses import compute_forward_kl_topk as of_tokens

print("verl", version("verl"), "tensordict", version("tensordict"))
K, names = 2, ("surer than the teacher", "equal to the teacher", "less sure")
teacher = torch.tensor([[0.5, 0.3, 0.1, 0.1]] * 4)  # the last row belongs to the end of the sequence and is not used
student = torch.tensor([[0.6, 0.35, 0.03, 0.02], [0.5, 0.3, 0.1, 0.1], [0.3, 0.3, 0.2, 0.2], [0.25] * 4])
logits = student.log().unsqueeze(0).requires_grad_()


def nested(row):
    return torch.nested.as_nested_tensor([row], layout=torch.jagged)


log_p, ids = teacher.log().topk(K, dim=-1)
config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None, topk=K))
found = of_logits(logits, nested(log_p), nested(ids), config, "thd")
data = TensorDict({"prompts": nested(torch.tensor([7])), "responses": nested(torch.tensor([1, 2, 3])),
                   "response_mask": nested(torch.ones(3))}, batch_size=[1])
loss, _ = of_tokens(None, config, {name: value.squeeze(0) for name, value in found.items()}, data)
full = (teacher * (teacher.log() - logits[0].log_softmax(-1))).sum(-1)
gradient = {}
for t, name in enumerate(names):
    for kind, value in (("top k", loss[0, t]), ("KL", full[t])):
        (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
        gradient[name, kind] = grad[0, t]
        print(f"seen: {name:22} {kind:5} loss {value.item():.4f} d/dlogits {[round(g, 3) for g in grad[0, t].tolist()]}")

assert loss[0, 0] == 0 and full[0] > 0.14
assert gradient["surer than the teacher", "top k"].abs().max() == 0
assert gradient["surer than the teacher", "KL"].abs().max() > 0.07
assert loss[0, 1] == 0 and gradient["equal to the teacher", "KL"].abs().max() < 1e-6
assert torch.allclose(gradient["equal to the teacher", "top k"], torch.tensor([-0.1, -0.06, 0.08, 0.08]), atol=1e-5)
PY
v/bin/python seen.py
