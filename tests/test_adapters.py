"""Adapters in PEFT's format: ours in PEFT, PEFT's with us; what is more than plain LoRA is refused by its field."""

import importlib
import json
import os

import pytest
import torch
from runtime.adapters import ADAPTER_FREE, ADAPTER_UNDERSTOOD, check_adapter_fields, load_adapter, save_adapter
from safetensors.torch import load_file
from test_model import PROMPTS, RESPONSES, randomise

from errors import InputError
from model import add_lora, load_model, response_hidden


@pytest.fixture
def model(checkpoint):
    return load_model(checkpoint, device="cpu").eval()


def peft_or_skip():
    return importlib.import_module("peft") if os.environ.get("CI") else pytest.importorskip("peft")


def test_adapter_round_trip(model, checkpoint, tmp_path):
    add_lora(model, rank=4, alpha=8.0)
    randomise(model)
    save_adapter(model, tmp_path, str(checkpoint))
    again = load_model(checkpoint, device="cpu").eval()
    load_adapter(again, tmp_path)
    assert torch.equal(response_hidden(again, PROMPTS, RESPONSES), response_hidden(model, PROMPTS, RESPONSES))


def test_adapter_loads_in_peft_with_identical_logits(model, checkpoint, tmp_path):
    peft = peft_or_skip()
    add_lora(model, rank=4, alpha=8.0)
    randomise(model)
    save_adapter(model, tmp_path, str(checkpoint))
    theirs = peft.PeftModel.from_pretrained(load_model(checkpoint, device="cpu"), tmp_path).eval()
    ids = torch.tensor([PROMPTS[2]])
    assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)


def test_adapter_of_another_shape_is_refused(model, checkpoint, tmp_path):
    add_lora(model, rank=4, alpha=8.0)
    save_adapter(model, tmp_path, str(checkpoint))
    other = load_model(checkpoint, device="cpu")
    add_lora(other, rank=2, alpha=8.0)
    with pytest.raises(InputError, match="has r 4"):
        load_adapter(other, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_dora": True}))
    with pytest.raises(InputError, match="use_dora"):
        load_adapter(load_model(checkpoint, device="cpu"), tmp_path)


def test_an_adapter_that_peft_wrote_gives_pefts_logits(model, checkpoint, tmp_path):
    peft = peft_or_skip()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="gaussian")
    theirs = peft.get_peft_model(load_model(checkpoint, device="cpu"), config).eval()
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    ids = torch.tensor([PROMPTS[2]])
    torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha_pattern", {"q_proj": 16}), ("rank_pattern", {"q_proj": 2}), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
        ("use_rslora", True), ("use_dora", True), ("modules_to_save", ["lm_head"]), ("layers_to_transform", [0]),
        ("layers_to_transform", 1), ("layers_pattern", "layers"), ("bias", "all"), ("bias", "lora_only"),
        ("fan_in_fan_out", True), ("lora_bias", True), ("layer_replication", [[0, 2]]), ("use_qalora", True),
        ("target_parameters", ["experts"]), ("trainable_token_indices", [1]), ("exclude_modules", ["up_proj"]),
        ("task_type", "SEQ_CLS"), ("peft_type", "IA3"), ("peft_type", "ADALORA"), ("megatron_config", {"a": 1}),
        ("arrow_config", {"a": 1}), ("a_field_of_tomorrow", True), ("alora_invocation_tokens", [1]),
    ],
)  # fmt: skip
def test_more_than_plain_lora_is_refused_by_its_field(tmp_path, field, value):
    check_adapter_fields(PLAIN, tmp_path)
    with pytest.raises(InputError, match=field if field != "peft_type" else "describes no LoRA"):
        check_adapter_fields({**PLAIN, field: value}, tmp_path)


def test_pefts_own_defaults_are_understood(tmp_path):
    peft = peft_or_skip()
    config = json.loads(json.dumps(peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM").to_dict(), default=str))
    check_adapter_fields({**config, "peft_type": "LORA"}, tmp_path)
    assert set(config) >= {*ADAPTER_UNDERSTOOD, *ADAPTER_FREE} - {"runtime_config"}  # the table names real fields


@pytest.mark.parametrize("config", [[], {"peft_type": "LORA"}, {"r": "4", "lora_alpha": 8}, {"r": 0, "lora_alpha": 8}])
def test_a_config_that_is_no_adapters(tmp_path, config):
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        check_adapter_fields(config, tmp_path)


def test_another_scale_than_the_models_is_refused(model, checkpoint, tmp_path):
    add_lora(model, rank=4, alpha=8.0)
    save_adapter(model, tmp_path, str(checkpoint))
    other = load_model(checkpoint, device="cpu")
    add_lora(other, rank=4, alpha=16.0)
    with pytest.raises(InputError, match="lora_alpha 8"):
        load_adapter(other, tmp_path)


def test_the_base_is_named_for_every_folder(model, checkpoint, tmp_path, monkeypatch):
    add_lora(model, rank=4, alpha=8.0)
    monkeypatch.chdir(checkpoint.parent)
    for base, stored in ((checkpoint.name, str(checkpoint)), ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B")):
        save_adapter(model, tmp_path, base)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == stored
