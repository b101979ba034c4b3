#!/usr/bin/env bash
# Guess: add_weighted_adapter(["one"], [1.0], "other") makes a copy of an adapter; what it cannot copy it refuses, as it
# does for target_parameters. What it reads from stays as it is, and the order of two adapters is of no matter.
# True (peft 0.21.2, transformers 5.23.0): for plain LoRA. With use_rslora the copy is sqrt(r) times as large (r = 16: 4
# times); DoRA's magnitudes, a trained lm_head in modules_to_save and trained tokens are the base model's again. Where
# an adapter was begun as PiSSA or OLoRA, it changes itself, and so does the base under all of them. Of two adapters of
# which one uses rsLoRA the result depends on which is named first. No warning in any of these.
# Why: LoraModel.add_weighted_adapter (peft/tuners/lora/model.py) takes the first adapter's config with r = lora_alpha,
# so that the scaling is 1, which with the inherited use_rslora it is not; inject_adapter begins the new adapter as
# that config says, which for init_lora_weights="pissa" or "olora" takes the principal part out of the base's weights,
# before A and B are overwritten; and nothing but A, B and the scaling is read from the sources.
# Bites: whoever copies an adapter, puts it halfway to the base (weights [.5]) or adds one to another: rsLoRA is meant
# for large ranks, where the factor is 8 or more, and the model still answers. (Two adapters with modules_to_save are
# refused.)
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
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__)
shape = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)
ids = torch.arange(12).reshape(1, 12)


def trained(**options):
    """A model with an adapter `one` of which every trained weight was moved."""
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(Qwen3Config(**shape))
    model = get_peft_model(base, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], **options), "one").eval()
    move(model)
    return model


def move(model):
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data *= 1 + 0.2 * torch.rand_like(weight)
            weight.data += 0.02 * torch.randn_like(weight)


def logits(model, adapter):
    model.set_adapter(adapter)
    with torch.no_grad():
        return model(input_ids=ids).logits


def change(model, adapter="one"):
    """The change that `adapter` makes to the first q_proj's weight."""
    return model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight(adapter)


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


CASES = {
    "plain LoRA": {}, "alpha_pattern": dict(alpha_pattern={"q_proj": 64}), "use_rslora": dict(use_rslora=True),
    "use_dora": dict(use_dora=True), "modules_to_save": dict(modules_to_save=["lm_head"]),
    "trainable_token_indices": dict(trainable_token_indices=[1, 2, 3, 4]), "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
}
for name, options in CASES.items():
    model = trained(**options)
    before = logits(model, "one")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_weighted_adapter(["one"], [1.0], "other")
    caught = [w for w in caught if "deprecated" not in str(w.message)]
    copy, source = off(logits(model, "other"), before), off(logits(model, "one"), before)
    size = (change(model, "other").norm() / change(model).norm()).item()
    print(f"seen: {name:23} logits of the copy off by {copy:.4f}, of the source afterwards by {source:.4f}; "
          f"change of q_proj x {size:.3f}; warnings {len(caught)}")
    assert not caught and (copy < 1e-5) == (name in ("plain LoRA", "alpha_pattern"))
    assert (source > 0.01) == (name in ("pissa", "olora")) and abs(size - (4 if name == "use_rslora" else 1)) < 1e-4

for first, second in (("one", "plain"), ("plain", "one")):
    model = trained(use_rslora=True)
    model.add_adapter("plain", LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("plain")
    move(model)
    mean = 0.5 * change(model) + 0.5 * change(model, "plain")
    model.add_weighted_adapter([first, second], [0.5, 0.5], "other", combination_type="cat")
    size = (change(model, "other").norm() / mean.norm()).item()
    print(f"seen: mean of {first} and {second}, in this order: change x {size:.3f}, direction "
          f"{torch.cosine_similarity(change(model, 'other').flatten(), mean.flatten(), 0):.4f}")
    assert abs(size - (32**0.5 if first == "one" else 1)) < 1e-4  # r of the new one is 16 + 16
PY
v/bin/python seen.py
