"""What bfloat16 does to the adapter's gradient: relative distance to float32's, by part and by clip.

    python -m experiments.precision --model DIRECTORY [DIRECTORY ...]
    torchrun --nproc_per_node 2 -m experiments.precision       the rollouts shared by two ranks, gradients summed

The same rollouts, adapter and loss in float32 and in bfloat16 with gradient checkpointing: as train.py computes, with
logits kept in float32 (loss.head_logits), and with logits rounded to bfloat16. Distance: ||g - g32|| / ||g32|| over the
adapter's parameters of a part.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import loss
from loss import LossOptions, resolve_method, score_tokens_from_hidden
from model import (
    add_lora,
    load_model,
    load_tokenizer,
    lora_layers,
    recompute_activations,
    response_hidden,
)
from problems import load_problems
from rollout import Response, Sampling, sample
from runtime.flags import run_script
from runtime.ranks import rank, say, start_ranks, stop_ranks, world_size
from teacher import Teacher, student_prompt, teacher_prompt
from train import sum_over_ranks

ROWS, TOKENS = 8, 64

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prepared(name: str, dtype: str) -> PreTrainedModel:
    """The model with an adapter that has moved away from its start, the same in each dtype."""
    model = load_model(name, dtype, device="cpu")
    torch.manual_seed(0)
    add_lora(model, 8, 16.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    recompute_activations(model)
    return model.train()


def gradients(model: PreTrainedModel, contexts: tuple, y: list[Response], tau_clip: float, rounded: bool) -> dict:
    """Eq. (6)'s gradient by part; `rounded`: logits in the model's dtype."""
    options, mine = LossOptions(tau_clip=tau_clip), slice(rank(), None, world_size())
    method, teacher = resolve_method("pwopsd", options), Teacher(model)
    responses, contexts = [r.ids for r in y[mine]], tuple(context[mine] for context in contexts)
    lengths = [len(ids) for ids in responses]
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    model.zero_grad()
    with teacher.scoring() as scorer:
        teacher_MD = response_hidden(scorer, contexts[1], responses)[mask_BT]
    student_MD = response_hidden(model, contexts[0], responses)[mask_BT]
    head_VD, ids_M = model.get_output_embeddings().weight, torch.tensor([token for row in responses for token in row])
    with mock.patch.object(loss, "head_logits", F.linear) if rounded else nullcontext():
        scores = score_tokens_from_hidden(method, student_MD, teacher_MD, head_VD, head_VD, ids_M, options)
        weight_M = method.token_weight(scores, lengths, 0, options)
        numerator, denominator = method.reduction(scores.loss, weight_M, lengths)
        numerator.backward()
    sum_over_ranks([denominator, *(p.grad for p in teacher.trained)])
    for parameter in teacher.trained:
        parameter.grad /= denominator
    parts: dict[str, list[Tensor]] = {target: [] for target in SEVEN}
    for name, layer in lora_layers(model).items():
        parts[name.split(".")[-1]] += [layer.lora_A.grad.flatten().clone(), layer.lora_B.grad.flatten().clone()]
    return {"all": torch.cat([g for gs in parts.values() for g in gs]), **{k: torch.cat(v) for k, v in parts.items()}}


def compare(name: str, data: str, temperature: float) -> None:
    tokenizer, problems = load_tokenizer(name), load_problems(data)[:ROWS]
    contexts = tuple([prompt(tokenizer, p) for p in problems] for prompt in (student_prompt, teacher_prompt))
    full, half = prepared(name, "float32"), prepared(name, "bfloat16")
    y = sample(full, tokenizer, contexts[0], [(0, i) for i in range(ROWS)], Sampling(temperature, 0.95, 0, TOKENS))
    for tau_clip in (0.05, 1.0, float("inf")):
        wanted = gradients(full, contexts, y, tau_clip, rounded=False)
        for words, rounded in (("bfloat16", False), ("bfloat16, rounded logits", True)):
            found = gradients(half, contexts, y, tau_clip, rounded)
            cells = [f"{((found[k] - wanted[k]).norm() / wanted[k].norm()).item():.3f}" for k in wanted]
            say(f"| {name} | {tau_clip} | {words} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny"])
    parser.add_argument("--data", default="tiny:train")
    parser.add_argument("--temperature", type=float, default=1.1)
    args = parser.parse_args()
    names = ["model", "tau_clip", "forward", "all", *SEVEN]
    start_ranks("cpu")
    say(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name in args.model:
        compare(name, args.data, args.temperature)
    stop_ranks()


if __name__ == "__main__":
    run_script(main)
