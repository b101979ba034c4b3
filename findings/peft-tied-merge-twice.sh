#!/usr/bin/env bash
# Guess: ensure_weight_tying=True, which PEFT's warning asks for where an adapter lies on a tied layer ("complications,
# for example when merging"), keeps embeddings and head one through training, merging and saving.
# True (peft 0.21.2, transformers 5.23.0): through training. LoRA on lm_head, embed_tokens or both of a tied model is
# merged as W + 2 BA: the change is added twice, and the merged model is not the trained one, saved and read again
# neither. The adapter, saved and loaded, is right, and so are a merge after lm_head's weight was cloned, and with
# modules_to_save or trainable_token_indices. Merging warns of "complications" in the words that it has without the
# option, too; wrapping, which warns without it, is silent.
# Why: with the option both layers hold the same A and B, which is right for forward. merge_adapter and
# _unload_and_optionally_merge (peft/tuners/tuners_utils.py) merge every layer that they come to into its base weight,
# and the two base weights are one. safe_merge=True looks for NaN only.
# Bites: whoever trains new or rare tokens of a small model (Qwen3 up to 4 B, Gemma, Llama 3.2 are tied) by LoRA on its
# embeddings and serves the merged weights. Evaluated as an adapter it is good, merged it overshoots: twice the change,
# in what is read and in what is said.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check transformers==5.23.0 peft==0.21.2
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__)
transformers.utils.logging.disable_progress_bar()
shape = Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
torch.manual_seed(0)
Qwen3ForCausalLM(shape).save_pretrained("base")
ids = torch.arange(12).reshape(1, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def trained(**options):
    """The base with an adapter, of which every trained weight was moved, and what wrapping warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(Qwen3ForCausalLM.from_pretrained("base"), LoraConfig(r=8, lora_alpha=16, **options))
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    return model, [str(w.message) for w in caught if "tie_word_embeddings" in str(w.message)]


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


CASES = {  # a LoRA, and how often merging adds its change to the tied weight
    "lm_head": (dict(target_modules=["lm_head"]), 2), "embed_tokens": (dict(target_modules=["embed_tokens"]), 2),
    "both and q_proj": (dict(target_modules=["q_proj", "lm_head", "embed_tokens"]), 2),
    "both, cloned": (dict(target_modules=["lm_head", "embed_tokens"]), 1),
    "modules_to_save": (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), None),
    "token indices": (dict(target_modules=["q_proj"], trainable_token_indices=[1, 2, 3]), None),
}
for name, (options, expected) in CASES.items():
    model, warned = trained(ensure_weight_tying=True, **options)
    right = logits(model)
    model.save_pretrained("adapter")
    again = off(logits(PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained("base"), "adapter")), right)
    inner, times = model.base_model.model, None
    weight = inner.get_input_embeddings().weight.detach().clone()
    if expected:
        change = inner.model.embed_tokens.get_delta_weight("default").detach()
        assert torch.allclose(change, inner.lm_head.get_delta_weight("default"), atol=1e-6)  # tied as they should be
    if name == "both, cloned":
        inner.lm_head.base_layer.weight = torch.nn.Parameter(weight.clone())
        inner.config.tie_word_embeddings = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload(safe_merge=True)
    spoken = sum("complications" in str(w.message) for w in caught)
    if expected:
        times = (((merged.model.embed_tokens.weight - weight) * change).sum() / (change * change).sum()).item()
        assert abs(times - expected) < 1e-4
    merged.save_pretrained("merged")
    wrong, read = off(logits(merged), right), off(logits(Qwen3ForCausalLM.from_pretrained("merged")), right)
    print(f"seen: {name:15} logits off by {again:.4f} as an adapter read again, {wrong:.4f} merged, {read:.4f} "
          f"merged and read again; change added {times and round(times, 3)} times; warnings: wrapping {len(warned)}, "
          f"merging {spoken}")
    assert again < 1e-5 and not warned and spoken == (expected == 2)
    assert (wrong > 0.1) == (read > 0.1) == (expected == 2) and (expected == 2 or max(wrong, read) < 1e-5)
_, warned = trained(target_modules=["lm_head"])
print("seen: without the option, at wrapping:", warned[0][:200])
assert "`ensure_weight_tying` is not set to True" in warned[0]
PY
v/bin/python seen.py
