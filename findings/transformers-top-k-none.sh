#!/usr/bin/env bash
# Guess: top_k=None in a model's generation_config switches top-k off, as None does when it is passed to generate, so a
# sample at temperature 1 and top_p 1 comes from the model's own distribution.
# True (transformers 5.23.0): in the configuration None means "not set" and generate puts 50 in its place, though the
# attribute still reads None. As an argument, generate(top_k=None), None does switch it off; 0 does so in both places.
# Why: GenerationMixin._prepare_generation_config fills what is None from the global defaults (top_k 50), after the
# model's configuration was merged in, and only then lays the keyword arguments on top.
# Bites: on-policy training. The rollouts are from the 50 likeliest tokens, so importance ratios, KL estimates from
# samples and entropies assume another sampler than the one that ran, and nothing printed from the config shows it.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check transformers==5.23.0
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

print("transformers", transformers.__version__)
VOCABULARY = 200
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **shape))


def candidates(config_top_k, **arguments):
    """How many tokens the first sampled token is drawn from."""
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=config_top_k)
    asked = dict(max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    scores = model.generate(torch.tensor([[5, 6, 7]]), **asked, **arguments).scores[0]
    return torch.isfinite(scores).sum().item()


for name, got, expected in [
    ("generation_config.top_k = None", candidates(None), 50),
    ("generation_config.top_k = 0", candidates(0), VOCABULARY),
    ("generate(top_k=None)", candidates(None, top_k=None), VOCABULARY),
    ("generate(top_k=0)", candidates(None, top_k=0), VOCABULARY),
]:
    print(f"seen: {name:32} draws from {got} of {VOCABULARY} tokens")
    assert got == expected, name
PY
v/bin/python seen.py
