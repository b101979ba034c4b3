#!/usr/bin/env bash
# Guess: kl_discount_factor of tinker-cookbook's on-policy distillation ("discount factor for future KL") makes a
# sampled token answer for the KL of later sampled tokens, too. Prompts and tool outputs have no part in the loss, as
# without it.
# True (tinker-cookbook 0.6.1, tinker 0.38.0): they have. What is sent to forward_backward has an advantage for every
# token of prompt and tool output: the discounted KL of all that follows, at .99 about -12 for the prompt, where a
# sampled token's own KL is about 1. By Tinker's published formula for importance_sampling, minus the sum of exp(logprob
# - sampled logprob) * advantage, they are trained on. In a bigram student that reads its prompt as well as its teacher
# does, 50 steps take the probability of the prompt from .76 a token to .36, of the tool's output from .58 to .37. At 0,
# the default, both stay as they were, to the last bit.
# Why: incorporate_kl_penalty (tinker_cookbook/distillation/train_on_policy.py) masks the KL and then runs
# discounted_future_sum_vectorized over the whole sequence, prompt first, without masking the sum. train_step
# (rl/train.py) takes the mask out before it sends the data, so that advantages of 0 are the only mask; and the sampled
# logprob of a prompt token is 0, so that its weight is its probability. incorporate_kl_penalty of rl/metrics.py, for RL
# with a KL penalty, does the same (by its source).
# Bites: runs with kl_discount_factor > 0, an option of all its distillation recipes. The student unlearns to predict
# problems and tool outputs that it does not answer as the teacher does, the more the longer the answer, by the same
# LoRA weights that answer.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check tinker==0.38.0 transformers==5.23.0 datasets==5.2.0 \
    chz termcolor blobfile cloudpickle pillow tqdm
v/bin/pip install -q --disable-pip-version-check --no-deps tinker-cookbook==0.6.1
cat > seen.py <<'PY'
import asyncio
from importlib.metadata import version
from types import SimpleNamespace

import tinker
import torch
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.distillation.train_on_policy import incorporate_kl_penalty
from tinker_cookbook.rl.data_processing import assemble_training_data, compute_advantages
from tinker_cookbook.rl.train import train_step
from tinker_cookbook.rl.types import Trajectory, TrajectoryGroup, Transition

print("tinker-cookbook", version("tinker-cookbook"), "tinker", version("tinker"))
torch.set_num_threads(1)
PROMPT, TOOL, ANSWER = [0, 1, 2, 3, 4, 5], [6, 7, 8], range(9, 13)  # three sets of tokens
teacher = torch.randn(13, 13, generator=torch.Generator().manual_seed(0))
start = torch.randn(13, 13, generator=torch.Generator().manual_seed(1))
for table in (start, teacher):
    for text in (PROMPT, TOOL):  # both read the prompt and the tool's output well
        table[text[:-1], text[1:]] += 4
    table[[*ANSWER, PROMPT[-1], TOOL[-1]], :9] = -1e9  # and go on with answers only


async def now(value):
    return value


class Teacher:
    def compute_logprobs(self, sequence):
        ids = torch.tensor(sequence.to_ints())
        logprobs = teacher.log_softmax(-1)[ids[:-1], ids[1:]]
        return SimpleNamespace(coroutine=lambda: now([None, *logprobs.tolist()]))


class Service:
    """The training service, by Tinker's published formula for importance_sampling, with plain gradient descent."""

    def __init__(self):
        self.table = start.clone().requires_grad_()

    def forward_backward(self, data, loss_fn, loss_fn_config):
        self.sent, outputs = data, []
        for datum in data:
            given = {name: value.to_torch() for name, value in datum.loss_fn_inputs.items()}
            logprobs = self.table.log_softmax(-1)[datum.model_input.to_ints(), given["target_tokens"].long()]
            (-((logprobs - given["logprobs"]).exp() * given["advantages"]).sum()).backward()
            outputs.append({"logprobs": tinker.TensorData.from_torch(logprobs.detach())})
        return now(SimpleNamespace(loss_fn_outputs=outputs))

    def optim_step(self, params):
        with torch.no_grad():
            self.table -= params.learning_rate * self.table.grad
        self.table.grad = None
        return now(SimpleNamespace(metrics={}))


def answer(table, last, generator, n=10):
    tokens, logprobs = [], []
    for _ in range(n):
        distribution = table[tokens[-1] if tokens else last].log_softmax(-1)
        tokens.append(torch.multinomial(distribution.exp(), 1, generator=generator).item())
        logprobs.append(distribution[tokens[-1]].item())
    return TokensWithLogprobs(tokens=tokens, maybe_logprobs=logprobs)


async def train(discount, steps):
    service, generator = Service(), torch.Generator().manual_seed(2)
    for _ in range(steps):
        table, groups = service.table.detach(), []
        for _ in range(4):
            first, second = answer(table, PROMPT[-1], generator), answer(table, TOOL[-1], generator)
            turns = [(PROMPT, first), ([*PROMPT, *first.tokens, *TOOL], second)]
            turns = [Transition(tinker.ModelInput.from_ints(ids), said, 0.0, False) for ids, said in turns]
            groups.append(TrajectoryGroup([Trajectory(turns, tinker.ModelInput.from_ints([]))], [0.0], [{}]))
        data, _ = assemble_training_data(groups, compute_advantages(groups))
        masks = [datum.loss_fn_inputs["mask"].to_torch() for datum in data]
        await incorporate_kl_penalty(data, [Teacher()] * len(data), [0] * len(data), 1.0, discount)
        await train_step(data, service, 0.02, 1, "importance_sampling")
    sent = [datum.loss_fn_inputs for datum in service.sent]
    assert all("mask" not in inputs for inputs in sent)
    return service.table.detach(), [inputs["advantages"].to_torch() for inputs in sent], masks


def sure(table, text):
    """The probability of the text's tokens, a token, on (geometric) average."""
    return table.log_softmax(-1)[text[:-1], text[1:]].mean().exp().item()


print(f"seen: before: prompt {sure(start, PROMPT):.3f}, tool output {sure(start, TOOL):.3f} a token")
for discount in (0.0, 0.99):
    _, advantages, masks = asyncio.run(train(discount, 1))
    unsampled = torch.stack([advantage[mask == 0] for advantage, mask in zip(advantages, masks)])
    sampled = torch.stack([advantage[mask == 1] for advantage, mask in zip(advantages, masks)])
    table, *_ = asyncio.run(train(discount, 50))
    print(f"seen: {discount}: mean |advantage|: prompt and tool output {unsampled.abs().mean():.2f}, sampled "
          f"{sampled.abs().mean():.2f}; after 50 steps: prompt {sure(table, PROMPT):.3f}, tool {sure(table, TOOL):.3f}")
    print("seen: advantages sent, prompt (5), answer (10), tool (3), answer (10):",
          [round(a, 1) for a in advantages[0].tolist()])
    if discount:
        assert (unsampled != 0).all() and unsampled.abs().mean() > sampled.abs().mean()
        assert sure(table, PROMPT) < sure(start, PROMPT) / 2 and sure(table, TOOL) < sure(start, TOOL) / 1.2
    else:
        assert (unsampled == 0).all() and (sampled != 0).any()
        assert sure(table, PROMPT) == sure(start, PROMPT) and sure(table, TOOL) == sure(start, TOOL)
PY
v/bin/python seen.py
