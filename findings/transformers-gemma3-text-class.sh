#!/usr/bin/env bash
# Guess: the text-only class of a family reads the language part of that family's image-and-text checkpoint, as
# Qwen3_5ForCausalLM does with a Qwen3.5: same logits, the vision weights left out. Or it refuses.
# True (transformers 5.23.0): Gemma3ForCausalLM.from_pretrained on a Gemma 3 image-and-text checkpoint returns a model
# whose every weight is freshly drawn. It takes the text config out of the checkpoint's, so that the shapes are right;
# the only sign is the printed table of MISSING keys. AutoModelForCausalLM gives the whole model, with its vision tower.
# Why: checkpoint names begin with language_model. there; conversion_mapping.get_checkpoint_conversion_mapping has a
# PrefixChange for qwen3_5_text (and by it gemma3n_text), and none for gemma3_text.
# Bites: whoever wants to train or score the text part of a 4 B to 27 B Gemma 3 without its vision tower, by the class
# that is named for it: losses near log(vocabulary), and a saved checkpoint that holds nothing of the model.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check transformers==5.23.0
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import torch
import transformers
from transformers import (AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration,
                          Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration)

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
text = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32)
gemma = Gemma3Config(text_config=text, mm_tokens_per_image=1, image_token_index=299, boi_token_index=298,
                     eoi_token_index=297, vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                                             num_attention_heads=2, image_size=28, patch_size=14))
linear = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
qwen = Qwen3_5Config(text_config=text | linear | dict(layer_types=["linear_attention", "full_attention"]),
                     vision_config=dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64))
ids = torch.arange(5, 15)[None]


def missing(name, config, whole_class, text_class):
    """How many weights of the text class the whole checkpoint lacks, of how many, and the gap of the logits."""
    torch.manual_seed(0)
    whole = whole_class(config).eval()
    whole.save_pretrained(name)
    part, info = text_class.from_pretrained(name, output_loading_info=True)
    gap = (part.eval()(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max().item()
    print(f"seen: {text_class.__name__}: {len(info['missing_keys'])} of {len(part.state_dict())} missing, gap {gap:.3g}")
    return len(info["missing_keys"]), len(part.state_dict()), gap


absent, total, gap = missing("gemma", gemma, Gemma3ForConditionalGeneration, Gemma3ForCausalLM)
assert absent == total and gap > 0.1, (absent, total, gap)
absent, total, gap = missing("qwen", qwen, Qwen3_5ForConditionalGeneration, Qwen3_5ForCausalLM)
assert absent == 0 and gap < 1e-5, (absent, total, gap)
auto = AutoModelForCausalLM.from_pretrained("gemma")
print("seen: AutoModelForCausalLM gives", type(auto).__name__)
assert isinstance(auto, Gemma3ForConditionalGeneration)
PY
v/bin/python seen.py
