"""CPU seconds of our ways beside the plain ones, in turns, best of two: python -m experiments.bench_speed [MODEL].

MODEL (a checkpoint directory) adds a decoding step of 8 rows with LoRA 64 beside the bare model, in bfloat16.
"""

import sys
import time

import torch
import torch.nn.functional as F

from loss import head_logits
from model import adapter_disabled, add_lora, cast_adapter
from rollout import Sampling, choose_tokens
from runtime.loading import load_model

V, D = 151_936, 896


def compare(name, ours, plain):
    best = [float("inf")] * 2
    for _ in range(2):
        for i, function in enumerate((ours, plain)):
            start = time.process_time()
            function()
            best[i] = min(best[i], time.process_time() - start)
    print(f"{name}: {best[0]:.3f} s, plain {best[1]:.3f} s, ratio {best[0] / best[1]:.3f}", flush=True)


def head(product):
    x, W = torch.randn(69, D).bfloat16().requires_grad_(), torch.randn(V // 8, D).bfloat16()
    product(x, W).square().mean().backward()


@torch.no_grad()
def decode(model):
    model(input_ids=torch.ones(8, 1, dtype=torch.long))


def main():
    torch.manual_seed(0)
    logits, u, settings = torch.randn(32, V) * 5.0, torch.rand(32), Sampling(1.0, 0.95, 0, 1)
    compare("choosing, 32 rows", lambda: choose_tokens(logits, u, settings),
            lambda: choose_tokens(logits, u, settings, candidates=V))  # fmt: skip
    compare("head in bfloat16 and its gradient", lambda: head(head_logits), lambda: head(F.linear))
    if sys.argv[1:]:
        model = load_model(sys.argv[1], "bfloat16")
        add_lora(model, 64, 128.0)
        with cast_adapter(model), adapter_disabled(model):
            decode(model)
        compare("decoding", lambda: with_adapter(model), lambda: without(model))


def with_adapter(model):
    with cast_adapter(model):
        decode(model)


def without(model):
    with adapter_disabled(model):
        decode(model)


if __name__ == "__main__":
    main()
