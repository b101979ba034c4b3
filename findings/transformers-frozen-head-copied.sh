#!/usr/bin/env bash
# Guess: whether weights are frozen (requires_grad_(False), as PEFT does with a base model) changes nothing in what
# `generate` costs, which runs without gradients anyway.
# True (transformers 5.23.0, torch 2.13.0, CPU): the first token of each batch of a frozen model copies the whole head
# once for each row and multiplies one row at a time. In bfloat16, 8 rows, vocabulary 151,936, width 896, one thread
# (AMD EPYC with AVX-512): 11 s instead of .04; in float32 .36 s instead of .13.
# Why: modeling_llama.py and its kin give the head hidden_states[:, -1:, :], a strided view. should_fold in torch's
# aten/src/ATen/native/LinearAlgebra.cpp makes one matrix of the rows if the weight requires a gradient, even under
# no_grad, or if the strides are those of one piece; else matmul expands the weight over the batch and calls bmm.
# Bites: sampling with LoRA on a CPU: of 8 rows x 64 tokens of a 0.5 B model in bfloat16 a third of the time is this one
# product; also a dropout or probe pass that takes single positions through the head. A pre-hook that copies the states
# into one piece mends it.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy
cat > seen.py <<'PY'
import time

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=150_000, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=4)
ids = torch.randint(10, 1000, (8, 12))


def first_token(model):
    """CPU seconds of a prefill as `generate` does it, and the times that a batched product was called in it."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.process_time()
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
        seconds = time.process_time() - start
    return seconds, sum(event.count for event in seen.key_averages() if event.key == "aten::bmm")


for dtype in (torch.bfloat16, torch.float32):
    model = LlamaForCausalLM(config).to(dtype).eval()
    first_token(model)
    trained, folded = first_token(model)
    model.requires_grad_(False)
    first_token(model)
    frozen, batched = first_token(model)
    print(f"seen: {dtype}: trained {trained:.3f} CPU s, {folded} batched products; frozen {frozen:.3f}, {batched}")
    assert batched == folded + 1
    assert dtype is torch.float32 or frozen > 3 * trained
PY
v/bin/python seen.py 2>&1 | grep -v USDT
