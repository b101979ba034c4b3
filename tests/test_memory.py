"""The memory plan against what autograd really keeps, and its choices."""

import families
import pytest
import torch

from experiments.memory import available_memory, plan_memory
from model import add_lora, load_model, response_hidden
from problems import InputError
from teacher import Teacher

SIZES = {"student_tokens": 20, "teacher_tokens": 60, "max_new_tokens": 30, "local_batch": 8}


@pytest.fixture
def model(checkpoint):
    model = load_model(checkpoint, device="cpu")
    add_lora(model, 4, 8.0)
    return model


def plan(model, micro_batch_size=2, gradient_checkpointing=False, available=None, kind="fixed", **sizes):
    return plan_memory(
        model, Teacher(model, kind), micro_batch_size=micro_batch_size, gradient_checkpointing=gradient_checkpointing,
        available=available, **{**SIZES, **sizes},
    )  # fmt: skip


def kept_bytes(model, rows: int, tokens: int) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor stays alive, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        response_hidden(model, [[5] * (tokens - 30)] * rows, [[6] * 30] * rows)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(model, dtype):
    """The plan's (layers + 1) blocks hold the measured bytes of all layers, and not twice as many."""
    model = model.to(dtype).train()
    measured = kept_bytes(model, rows=2, tokens=50)
    planned = plan(model, student_tokens=20, teacher_tokens=20).activations
    assert measured <= planned <= 2.5 * measured  # 2 layers: the one block to spare alone is half as much again


def test_fixed_parts_by_hand(model):
    adapter = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    fixed, ema = plan(model), plan(model, kind="ema")
    assert (fixed.weights, fixed.trained, fixed.optimizer) == (frozen, adapter, 3 * adapter)
    assert ema.weights == frozen + adapter
    V, kv = model.config.vocab_size, model.config.num_key_value_heads * 8  # heads of 32 / 4 = 8
    assert fixed.sampling == 8 * 50 * 2 * 2 * kv * 4 + 6 * 8 * V * 4


def test_checkpointing_and_fewer_sequences_take_less(model):
    tall = {"student_tokens": 100, "teacher_tokens": 100}
    assert plan(model, 1, **tall).activations * 4 == plan(model, 4, **tall).activations
    assert plan(model, 4, True, **tall).activations < plan(model, 4, False, **tall).activations


def test_auto_takes_the_largest_that_fits(model):
    needs = {}
    for size in (1, 2, 4, 8):
        at = plan(model, size)
        needs[size] = (at.total - at.weights - at.trained) / 0.92
    assert needs[2] > needs[1]
    assert plan(model, None, available=int(needs[8]) + 1).micro_batch_size == 8
    assert plan(model, None, available=int(needs[8]) - 1).micro_batch_size == 4
    assert plan(model, None, available=int(needs[2]) + 1).micro_batch_size == 2
    assert plan(model, None, available=None).micro_batch_size == 4


def test_what_cannot_fit_is_refused_with_advice(model):
    with pytest.raises(InputError, match=r"memory in GiB.*are there; what helps: a lower --micro_batch_size"):
        plan(model, 8, available=1000, max_new_tokens=300)
    with pytest.raises(InputError, match="--max_length"):
        plan(model, None, available=1000)
    assert plan(model, 8, available=None).micro_batch_size == 8


def test_the_printed_plan_names_every_part(model):
    text = str(plan(model))
    assert all(word in text for word in ("weights", "trained", "optimizer", "sampling", "activations", "loss", "peak"))


def test_free_memory_of_the_host_is_read():
    free = available_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_sdpa_gets_a_causal_flag_and_no_mask(tmp_path, monkeypatch):
    """No [T, T] mask is ever built for full attention; a sliding window needs one only where it is shorter than T."""
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append((kwargs.get("is_causal"), kwargs.get("attn_mask") is None))
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for family, tokens, no_mask in (
        ("qwen3", 40, True),
        ("llama", 40, True),
        ("olmo3", 12, True),
        ("olmo3", 40, False),
    ):
        calls.clear()
        model = load_model(str(families.make_checkpoint(family, tmp_path / f"{family}{tokens}")), device="cpu")
        response_hidden(model, [[5] * (tokens - 5), [6] * 3], [[7] * 5, [8] * 2])
        assert calls and all((causal, free) == (True, True) for causal, free in calls) == no_mask
