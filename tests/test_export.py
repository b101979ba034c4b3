"""Merging an adapter: by hand, against base + adapter, and as a checkpoint that plain transformers loads."""

import json
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors import InputError
from model import LoRALinear, add_lora, load_model, lora_layers, lora_parameters
from runtime import export as export_module
from runtime.adapters import save_adapter
from runtime.export import export, merge_adapter
from runtime.flags import run_script

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.tensor([[5, 9, 40, 7, 21, 33]])


@pytest.fixture
def adapted(checkpoint, tmp_path):
    """A model with an adapter that is not zero, and where that adapter is stored."""
    model = load_model(str(checkpoint), device="cpu").eval()
    add_lora(model, 4, 8.0, dropout=0.05)
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        parameter.data.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter", str(checkpoint))
    return model, tmp_path / "adapter"


def test_merging_by_hand():
    """W + (alpha / r) B A with alpha / r = 2: [[1, 0], [0, 1]] + 2 [[1], [3]] [[5, 7]]."""
    layer = LoRALinear(torch.nn.Linear(2, 2, bias=False), rank=1, alpha=2.0, dropout=0.0)
    layer.base.weight.data = torch.eye(2)
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[5.0, 7.0]]), torch.tensor([[1.0], [3.0]])
    outer = torch.nn.Module()
    outer.inner = layer
    merge_adapter(outer)
    assert isinstance(outer.inner, torch.nn.Linear)
    assert torch.equal(outer.inner.weight, torch.tensor([[11.0, 14.0], [30.0, 43.0]]))


def test_the_export_loads_in_plain_transformers_with_the_same_logits(adapted, tmp_path):
    model, adapter = adapted
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        base = load_model(
            json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"], device="cpu"
        )
        assert (ours - base(input_ids=IDS).logits).abs().max() > 0.1  # the adapter does something
        difference = export(str(adapter), str(tmp_path / "merged"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=IDS).logits, ours, atol=1e-3, rtol=1e-4)
    assert 0.0 <= difference < 1e-3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template is not None
    assert merged.generation_config.eos_token_id == base.generation_config.eos_token_id


def test_the_layout_is_that_of_the_base(adapted, tmp_path, checkpoint):
    """What vLLM and others expect: the base's tensor names and config, no trace of the adapter."""
    export(str(adapted[1]), str(tmp_path / "merged"))
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", checkpoint))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    config, base = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "merged", checkpoint))
    assert {**config, "transformers_version": ""} == {**base, "transformers_version": ""}


def test_the_file_keeps_the_dtype_of_the_base_and_merging_is_float32(adapted, tmp_path, checkpoint):
    """A bfloat16 base: the merged weights are the float32 sum rounded once."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "bf16")
    export(str(adapted[1]), str(tmp_path / "merged"), base=str(tmp_path / "bf16"))
    name, layer = next(iter(lora_layers(adapted[0]).items()))
    wanted = base.get_submodule(name).weight.float() + 2.0 * layer.lora_B @ layer.lora_A
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"], wanted.bfloat16())
    export(str(adapted[1]), str(tmp_path / "wide"), base=str(tmp_path / "bf16"), dtype="float32")
    assert torch.equal(load_file(tmp_path / "wide" / "model.safetensors")[f"{name}.weight"], wanted)


def test_a_merge_that_changes_the_logits_writes_nothing(adapted, tmp_path, monkeypatch):
    def wrong(model):
        merge_adapter(model)
        model.get_decoder().layers[0].mlp.up_proj.weight[0] += 1.0

    monkeypatch.setattr(export_module, "merge_adapter", wrong)
    with pytest.raises(InputError, match=r"differ by .*nothing written"):
        export(str(adapted[1]), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_leaves_nothing(adapted, tmp_path, monkeypatch):
    def fail(model, base, directory):
        (directory / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save_whole", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"--output_dir .*merged: cannot be written .*No space left"):
        export(str(adapted[1]), str(tmp_path / "merged"))
    assert sorted(tmp_path.iterdir()) == before


def test_mistakes_are_named(adapted, tmp_path):
    with pytest.raises(InputError, match="names the base model"):
        export(str(tmp_path), str(tmp_path / "merged"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(InputError, match="--output_dir"):
        export(str(adapted[1]), str(tmp_path / "full"))
    with pytest.raises(InputError, match="--dtype int8"):
        export(str(adapted[1]), str(tmp_path / "merged"), dtype="int8")
    weights = load_file(adapted[1] / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapted[1] / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        export(str(adapted[1]), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_the_command_line(tmp_path, monkeypatch):
    checkpoint = families.make_checkpoint("qwen3", tmp_path / "base")
    model = load_model(str(checkpoint), device="cpu")
    add_lora(model, 4, 8.0)
    save_adapter(model, tmp_path / "adapter", str(checkpoint))
    command = [sys.executable, "-m", "runtime.export", "--adapter", str(tmp_path / "adapter"), "--output_dir"]
    command.append(str(tmp_path / "merged"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "largest logit difference to base + adapter: 0.00e+00" in done.stdout
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit) as caught:
        run_script(export_module.main)
    assert caught.value.code == f"error: --output_dir {tmp_path / 'merged'}: is not a new or empty directory"
