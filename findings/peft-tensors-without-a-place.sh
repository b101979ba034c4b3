#!/usr/bin/env bash
# Guess: where adapter file and model do not match, PeftModel.from_pretrained says so in both directions: weights of
# the model that the file lacks, and tensors of the file that the model has no place for.
# True (peft 0.21.2): the first is a warning, the second nothing at all. An adapter of a four-layer model goes onto a
# two-layer one without a word, half of it unused; the same where the adapter's config names fewer modules or layers
# than its file holds tensors for. So the half that is lost depends on which side is short.
# Why: PeftModel.load_adapter warns of load_result.missing_keys only; set_peft_model_state_dict loads with strict=False
# and its unexpected_keys are returned by load_adapter, which from_pretrained drops.
# Bites: adapters put onto a pruned or smaller sibling, configs written by hand beside a file of another training, and
# tools that check an adapter by the absence of warnings.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check transformers==5.23.0 peft==0.21.2
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import json
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

print("peft", peft.__version__)
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
             head_dim=16)


def base(layers):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, **shape))


def save(layers, modules):
    get_peft_model(base(layers), LoraConfig(r=4, target_modules=modules)).save_pretrained("a")


def load(layers):
    """(tensors of the file, LoRA tensors of the model, whether a warning speaks of adapter keys)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(layers), "a")
    used = sum("lora_" in name for name, _ in model.named_parameters())
    return len(load_file("a/adapter_model.safetensors")), used, any("adapter keys" in str(w.message) for w in caught)


save(4, ["q_proj"])
print("seen: adapter of 4 layers on 2:", longer := load(2))
save(2, ["q_proj"])
print("seen: adapter of 2 layers on 4:", shorter := load(4))
save(2, ["q_proj", "v_proj"])
config = Path("a/adapter_config.json")
config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj"]}))
print("seen: q and v in the file, q in its config:", narrow := load(2))
assert longer == (8, 4, False), longer
assert shorter == (4, 8, True), shorter
assert narrow == (8, 4, False), narrow
PY
v/bin/python seen.py
