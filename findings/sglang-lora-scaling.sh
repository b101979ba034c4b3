#!/usr/bin/env bash
# Guess: SGLang, which serves PEFT's adapters by name, applies an adapter as strongly as PEFT does, or refuses it, as it
# refuses DoRA.
# True (sglang 0.5.23, peft 0.21.2, transformers 5.23.0): its strength is lora_alpha / r for all adapters and modules.
# One with use_rslora is served at 1/sqrt(r) of it: a quarter at r = 16, an eighth at r = 64. Modules in alpha_pattern
# get the common alpha. One begun as PiSSA and saved as it is goes onto a base that still has what PiSSA took out. No
# error and no warning in any of these.
# Why: LoRAAdapter in sglang/srt/lora/lora.py sets scaling = lora_alpha / r, LoRAConfig (lora_config.py) reads r,
# lora_alpha, target_modules and use_dora, LoRAManager.validate_new_adapter asks only for DoRA and added tokens, and
# nothing else in sglang/srt names those options. vLLM 0.32 honours use_rslora and both patterns and refuses PiSSA (by
# its source, vllm/lora/peft_helper.py).
# Bites: evaluations and on-policy rollouts of rsLoRA adapters through SGLang. rsLoRA is meant for large ranks, where a
# model then answers nearly as its base does: training seems to have done nothing. As rollouts they are another
# policy's, and importance ratios lean the same way at every step. The server itself is not needed here: the parts below
# are SGLang's own, and what they import beside torch is left out.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check transformers==5.23.0 peft==0.21.2
v/bin/pip install -q --disable-pip-version-check --no-deps sglang==0.5.23
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from importlib.metadata import version
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

OWN = {f"sglang.srt.lora.{part}" for part in ("lora", "lora_config", "lora_manager", "torch_ops.lora_ops")}
FOLDERS = {name.rsplit(".", depth)[0] for name in OWN for depth in range(1, name.count(".") + 1)}
HOME = importlib.util.find_spec("sglang").submodule_search_locations[0].removesuffix("sglang")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """All of sglang but the modules named above: kernels, model loaders, the server."""

    def find_spec(self, name, path=None, target=None):
        if name in OWN or name.split(".")[0] != "sglang":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__name__ = spec.name
        module.__path__ = [HOME + spec.name.replace(".", "/")] if spec.name in FOLDERS else []
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, StandIns())
for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
    del sys.modules[name]
from sglang.srt.lora.lora import LoRAAdapter  # noqa: E402
from sglang.srt.lora.lora_config import LoRAConfig  # noqa: E402
from sglang.srt.lora.lora_manager import LoRAManager  # noqa: E402
from sglang.srt.lora.torch_ops.lora_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd  # noqa: E402

print("sglang", version("sglang"), "peft", version("peft"))
records = []
handler = logging.Handler(level=logging.WARNING)
handler.emit = records.append
logging.getLogger("sglang").addHandler(handler)
shape = Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16)
x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def served(folder):
    """What SGLang's CPU kernels add for the first q_proj with the adapter in `folder`."""
    config = LoRAConfig(path=folder)
    manager = SimpleNamespace(attn_dp_enabled=False, lora_refs={}, memory_pool=None, num_pinned_loras=0,
                              max_loras_per_batch=8)
    LoRAManager.validate_new_adapter(manager, config, SimpleNamespace(lora_name=folder, lora_path=folder, pinned=False))
    adapter = LoRAAdapter("one", config, shape, None, None)
    weights = load_file(f"{folder}/adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    one, rows = torch.tensor([0]), torch.tensor([len(x)])
    ranks, scaling = torch.tensor([config.r]), torch.tensor([adapter.scaling])
    low = sgemm_lora_a_fwd(x, weights[key.format("A")][None], one, rows, ranks, scaling)
    B = weights[key.format("B")]
    return sgemm_lora_b_fwd(low, B[None], one, rows, ranks, torch.tensor([0, len(B)])), adapter.scaling


CASES = {"plain": ({}, 1), "use_rslora": (dict(use_rslora=True), 1 / 4), "rank 64, use_rslora": (
    dict(r=64, lora_alpha=64, use_rslora=True), 1 / 8), "alpha_pattern": (dict(alpha_pattern={"q_proj": 64}), 1 / 4)}
for name, (options, expected) in CASES.items():
    torch.manual_seed(0)
    options = dict(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"]) | options
    base = Qwen3ForCausalLM(shape)
    model = get_peft_model(base, LoraConfig(**options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        change = layer(x) - layer.base_layer(x)
    model.save_pretrained(name)
    added, scaling = served(name)
    share = ((added * change).sum() / (change * change).sum()).item()
    print(f"seen: {name:20} scaling {scaling} where PEFT has {layer.scaling['default']}: SGLang adds {share:.4f} times "
          f"PEFT's change; warnings {len(records)}")
    assert abs(share - expected) < 1e-4 and not records
for name, options in (("pissa", dict(init_lora_weights="pissa")), ("dora", dict(use_dora=True))):
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(shape)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], **options)).eval()
    model.save_pretrained(name)
    try:
        added, _ = served(name)
    except ValueError as error:
        print(f"seen: {name}: {error}")
        assert name == "dora"
        continue
    with torch.no_grad():  # untrained, so that the right change to the checkpoint's own weight is none
        off = (added.norm() / (x @ weight.T).norm()).item()
    print(f"seen: {name}, untrained: what SGLang adds to the checkpoint's q_proj is {off:.2f} of its output, where 0 "
          f"is right; warnings {len(records)}")
    assert off > 0.1 and not records
PY
v/bin/python seen.py
