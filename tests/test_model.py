import json
import re
import shutil
from types import SimpleNamespace

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import model as models
from chat import end_of_turn, eos_ids
from errors import InputError
from model import add_lora, lora_layers, lora_parameters, response_hidden
from runtime.checkpoint import load_adapter, save_adapter
from runtime.loading import context_length, find_checkpoint, load_config, load_model, load_tokenizer, pick_device

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], list(range(20, 45))]
RESPONSES = [[30, 31, 32], [33, 34, 35, 36, 37], [38, 39]]


def randomise(model):
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        parameter.data.normal_(std=0.1)


def test_a_row_alone_equals_the_same_row_in_a_padded_batch(model):
    """Lengths differ, one is beyond Olmo3's window of 16; without a mask it sees what generation sees with one."""
    batch = response_hidden(model, PROMPTS, RESPONSES)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = response_hidden(model, [prompt], [response])
        torch.testing.assert_close(batch[row, : len(response)], alone[0], atol=1e-5, rtol=0)
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        ours = model.get_output_embeddings()(alone[0])
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=0)


def test_lora_starts_at_the_base_and_switches_off_exactly(model):
    base = response_hidden(model, PROMPTS, RESPONSES)
    add_lora(model, rank=4, alpha=8.0)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == SEVEN and len(lora_layers(model)) == 2 * 7
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in lora_parameters(model)}
    assert torch.equal(response_hidden(model, PROMPTS, RESPONSES), base)
    randomise(model)
    changed = response_hidden(model, PROMPTS, RESPONSES)
    assert (changed - base).abs().max() > 1e-2
    with models.adapter_disabled(model):
        assert torch.equal(response_hidden(model, PROMPTS, RESPONSES), base)
    assert torch.equal(response_hidden(model, PROMPTS, RESPONSES), changed)


def test_lora_by_hand():
    linear = torch.nn.Linear(3, 2, bias=False)
    parent = torch.nn.ModuleDict({"q_proj": linear})
    add_lora(parent, rank=1, alpha=6.0)
    layer = parent["q_proj"]
    layer.lora_A.data = torch.tensor([[1.0, 2.0, 3.0]])
    layer.lora_B.data = torch.tensor([[1.0], [-1.0]])
    x = torch.tensor([1.0, 1.0, 1.0])
    torch.testing.assert_close(layer(x), linear(x) + torch.tensor([36.0, -36.0]))


def test_eos_ids_join_the_checkpoints_and_the_tokenizers(checkpoint, tmp_path):
    """A checkpoint may list several, as Llama 3 does, or none."""
    shutil.copytree(checkpoint, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [9, 7], "temperature": 0.3}))
    loaded, tokenizer = load_model(str(tmp_path / "m"), device="cpu"), load_tokenizer(str(tmp_path / "m"))
    assert loaded.generation_config.temperature is None
    assert eos_ids(loaded.generation_config, tokenizer) == sorted({7, 9, tokenizer.eos_token_id})
    assert eos_ids(GenerationConfig(eos_token_id=5), tokenizer) == sorted({5, tokenizer.eos_token_id})
    assert eos_ids(GenerationConfig(), tokenizer) == [tokenizer.eos_token_id]


def test_a_base_model_ends_where_its_template_ends_a_turn(qwen3):
    """Its EOS is <|endoftext|>; the template closes what an assistant said by <|im_end|>."""
    tokenizer = load_tokenizer(qwen3)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn(tokenizer) == turn
    assert eos_ids(GenerationConfig(), tokenizer) == sorted({turn, tokenizer.eos_token_id})
    each = "{%- for m in messages %}{{ m.content + '<think>' }}{%- endfor %}"
    for spaced in (" \n<|im_end|>", "<|im_end|>\nDone."):  # a space before it, the answer's words once more behind it
        tokenizer.chat_template = "{%- for m in messages %}{{ m.content }}" + spaced + "{%- endfor %}"
        assert end_of_turn(tokenizer) == (turn if "Done" not in spaced else None)
    for template in (None, "{{ raise_exception('users only') }}", "{{ messages[0].content }}", each):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) is None


def test_what_is_no_checkpoint_and_an_unknown_device_are_said(tmp_path):
    for name in ("/no/such/dir", "./nothing", "just-a-name"):
        with pytest.raises(InputError, match=name):
            find_checkpoint(name)
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="device"):
        pick_device("no-such-device")


def test_the_gpu_gets_an_index_and_dtypes_have_names(checkpoint, monkeypatch):
    """torch.cuda.set_device refuses a device without an index."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="bfloat16"):
        load_model(checkpoint, "bf16", device="cpu")


def test_float32_weights_that_are_rounded_are_told(tmp_path, capsys):
    """Below bfloat16's digits most of a full fine-tuning at a small rate would be lost in silence."""
    model = families.odd("Phi3", pad_token_id=0)
    for saved, loaded, told in ((torch.float32, "bfloat16", True), (torch.float32, "float32", False),
                                (torch.bfloat16, "bfloat16", False)):  # fmt: skip
        model.to(saved).save_pretrained(tmp_path)
        load_model(tmp_path, loaded, device="cpu")
        assert ("its float32 weights are rounded to bfloat16; --dtype float32" in capsys.readouterr().out) == told


def test_the_context_of_longrope_ends_where_a_long_row_would_change_all():
    def config(rope):
        return SimpleNamespace(max_position_embeddings=400, rope_parameters=rope)

    long = {"rope_type": "longrope", "original_max_position_embeddings": 110}
    yarn = long | {"rope_type": "yarn"}
    cases = ((None, 400), ({"rope_type": "default"}, 400), (yarn, 400), (long, 110), ({"a": yarn, "b": long}, 110))
    assert [context_length(config(rope)) for rope, _ in cases] == [length for _, length in cases]
    assert context_length(config(long), on_server=True) == 400


@pytest.fixture
def qwen3(qwen3, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(qwen3, tmp_path / "qwen3")


NORM = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda weights: weights.pop(NORM), f"lacks {NORM}$"),
    (lambda weights: weights.update({"model.layers.7.stray.weight": torch.ones(2)}), "beyond .*layers.7.stray"),
    (lambda weights: weights.update({NORM: torch.ones(3, 3)}), f"other shapes of {NORM}$"),
    (lambda weights: [weights.pop(name) for name in [*weights] if "layers.1" in name], "lacks .* and 8 more$"),
])  # fmt: skip
def test_weights_that_are_missing_or_too_many_are_named(qwen3, change, message):
    """transformers only warns, and draws what is missing anew at each load."""
    weights = load_file(qwen3 / "model.safetensors")
    change(weights)
    save_file(weights, qwen3 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        load_model(qwen3, device="cpu")


@pytest.mark.parametrize(("added", "special", "template", "refused"), [
    (["<step>"], False, "", True), (["<|turn|>"], True, "<|turn|>", True),
    (["<|image|>"], True, "", False), (["[PAD]"], True, "", False),  # which no prompt can hold
])  # fmt: skip
def test_a_token_beyond_the_embedding_is_named(qwen3, added, special, template, refused):
    """A tokenizer that grew while the embedding did not."""
    tokenizer = load_tokenizer(qwen3)
    rows = len(tokenizer)
    tokenizer.add_tokens(added, special_tokens=special)
    tokenizer.chat_template += template
    if added == ["[PAD]"]:
        tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(qwen3)
    if refused:
        with pytest.raises(InputError, match=f"embedding of {rows} rows has none for the token {re.escape(added[0])}$"):
            load_tokenizer(qwen3)
    else:
        assert load_tokenizer(qwen3).pad_token_id < rows


def test_an_adapter_beside_the_model_is_named(qwen3):
    (qwen3 / "adapter_config.json").write_text("{}")
    for load in (load_model, load_tokenizer, find_checkpoint):
        with pytest.raises(InputError, match=r"adapter_config\.json stands beside the model"):
            load(str(qwen3))


def change_config(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(("values", "message"), [
    ({"model_type": "unheard-of", "architectures": ["Unheard"]}, "unheard-of"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised"),
    ({"quantization_config": {"quant_method": "unheard-of"}}, "quantised"),
    ({"hidden_size": "many"}, "cannot be loaded"), ({"layer_types": ["one"]}, "layer_type"),
    ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "lacks model.layers.2"),
    ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "beyond the architecture"),
])  # fmt: skip
def test_a_config_that_does_not_fit_is_one_line(qwen3, values, message):
    change_config(qwen3, **values)
    with pytest.raises(InputError, match=message) as caught:
        load_model(qwen3, device="cpu")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
def test_what_cannot_be_read_beside_the_weights_is_one_line(qwen3, load):
    """An unknown architecture also where no model is loaded; a torn generation config, whose EOS ids would be lost."""
    change_config(qwen3, model_type="unheard-of")
    with pytest.raises(InputError, match=r"^--model .*cannot be loaded .*unheard-of") as caught:
        load(str(qwen3))
    assert len(str(caught.value).splitlines()) == 1
    change_config(qwen3, model_type="qwen3")
    (qwen3 / "generation_config.json").write_text('{"eos_token_id": [1, 2')
    with pytest.raises(InputError, match=r"^--model .*generation_config.json cannot be loaded"):
        load(str(qwen3))


@pytest.mark.parametrize("kind", families.ODD_HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_is_not_linear_is_seen_in_its_logits(tmp_path, kind, dtype):
    """Multipliers, caps and biases, whatever their names in the config."""
    families.make_odd(kind, tmp_path / kind)
    with pytest.raises(InputError, match="logits are not head x hidden"):
        load_model(tmp_path / kind, dtype, device="cpu")


@pytest.mark.parametrize(("kind", "left"), families.ODD_BLOCKS.items())
def test_lora_leaves_no_matrix_of_a_block_frozen_in_silence(tmp_path, kind, left):
    families.make_odd(kind, tmp_path / kind)
    model = load_model(tmp_path / kind, device="cpu")
    with pytest.raises(InputError, match=left):
        add_lora(model, 2, 4.0)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    hidden = response_hidden(model, [[1, 2]], [[3, 4, 5]])  # all weights can be trained
    hidden.sum().backward()


@pytest.mark.parametrize("kind", ["qwen3_5", "phi3", "qwen2"])
def test_all_linear_maps_are_adapted_and_peft_reads_the_adapter(tmp_path, kind):
    """Fused projections, linear attention; what stands in adapter_config.json finds the same maps again."""
    peft = pytest.importorskip("peft")
    families.make_odd(kind, tmp_path / "base")
    model = load_model(tmp_path / "base", device="cpu")
    maps = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    add_lora(model, 2, 4.0)
    randomise(model)
    assert lora_layers(model).keys() == maps - {"lm_head"}
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base", device="cpu"), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
        assert (model(ids).logits - load_model(tmp_path / "base", device="cpu")(ids).logits).abs().max() > 1e-2
    again = load_model(tmp_path / "base", device="cpu")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(response_hidden(again, PROMPTS, RESPONSES), response_hidden(model, PROMPTS, RESPONSES))


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5_tower"])
def test_a_vision_tower_is_refused_with_a_way_that_works(tmp_path, kind):
    families.make_odd(kind, tmp_path / "whole")
    with pytest.raises(InputError, match="more than a language model") as caught:
        load_model(str(tmp_path / "whole"), device="cpu")
    assert len(str(caught.value).splitlines()) == 1
    advice = str(caught.value).split("beside it: ")[1].replace("DIRECTORY", str(tmp_path / "text"))
    exec(advice, {"transformers": transformers})
    model, ids = load_model(str(tmp_path / "text"), device="cpu"), torch.tensor([[5, 6, 7, 8]])
    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    add_lora(model, 2, 4.0)


@pytest.mark.parametrize("kind", ["qwen2_drops", "opt_drops", "mixtral_drops"])
@pytest.mark.parametrize("rank", [2, 0])
def test_only_the_adapters_own_dropout_draws(tmp_path, kind, rank):
    """With and without gradient checkpointing: whatever the base's config drops, skips or jitters while training."""
    families.make_odd(kind, tmp_path / kind)
    model = load_model(tmp_path / kind, device="cpu")
    if rank and kind != "mixtral_drops":  # LoRA refuses experts
        add_lora(model, rank, 4.0)
        randomise(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            models.recompute_activations(model)
        with torch.no_grad():
            still = response_hidden(model, PROMPTS, RESPONSES)
        with models.adapter_dropout(model):
            hidden = response_hidden(model, PROMPTS, RESPONSES)
            assert torch.equal(hidden, still)
            hidden.square().sum().backward()
        gradients.append([p.grad for p in models.trained_parameters(model) if p.grad is not None])
        model.zero_grad(set_to_none=True)
    assert gradients[0] and all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_sampling_casts_the_adapter_to_the_models_dtype_but_on_a_cpu(device, dtype):
    layer = models.LoRALinear(torch.nn.Linear(4, 3, dtype=torch.bfloat16, device=device), 2, 4.0, 0.0)
    with models.cast_adapter(torch.nn.Sequential(layer)):
        assert [part.dtype for part in layer.cast] == [dtype] * 2
    assert layer.cast is None
