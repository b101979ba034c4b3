"""The memory plan against a real step's allocations, and its choices."""

import json
from contextlib import contextmanager
from dataclasses import replace

import families
import pytest
import torch
from transformers import Olmo3Config, Olmo3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import train
from errors import InputError
from grading import make_grader
from loss import resolve_method
from model import add_lora, load_model, response_hidden
from problems import load_problems
from rollout import Response
from runtime import memory
from runtime.fake_step import LiveBytes, StepShape, block_kinds, fake_model
from runtime.memory import FAR_BELOW, USABLE, Planned, _shallow, available_memory, crude_bound, plan_memory
from teacher import Teacher
from train import TrainConfig

SHAPE = StepShape(student_tokens=20, teacher_tokens=60, max_new_tokens=30, local_batch=8, micro_batch_size=2)
CONFIG = TrainConfig()


@pytest.fixture
def model(checkpoint):
    model = load_model(checkpoint, device="cpu")
    add_lora(model, 4, 8.0)
    return model


def planned(model, checkpointing=False, kind="fixed"):
    return Planned(
        model, Teacher(model, kind), resolve_method("pwopsd", CONFIG), CONFIG, CONFIG.sampling, checkpointing
    )


def plan(model, size=2, checkpointing=False, available=None, kind="fixed", **shape):
    return plan_memory(
        planned(model, checkpointing, kind), replace(SHAPE, micro_batch_size=size, **shape), 8, available
    )


# The counter, and fake tensors


def test_live_bytes_by_hand():
    """Two tensors of 4,000 bytes, one of them freed, a view that costs nothing."""
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a + 1
        view = b[:10]
        assert (live.now, live.peak) == (8000, 8000)
        del a, b
        assert live.now == 4000  # the view holds its storage
        del view
        assert (live.now, live.peak) == (0, 8000)


def test_a_fake_model_weighs_what_the_model_does(model):
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    with fake_model(model, block_kinds(model), False) as (fake, live):
        weights = sum(p.numel() * p.element_size() for p in fake.parameters())
        assert weights == own and own <= live.now <= own + 2 * buffers


# Plan and step


class FixedEngine:
    """Rollouts of the longest kind, without sampling."""

    name, batch_size = "fixed", None

    def sample(self, prompts, keys, settings, on_finished=None):
        return [Response([5] * settings.max_new_tokens, finished=False) for _ in prompts]

    def close(self):
        pass


class PeakClock(train.Clock):
    """Peaks beside seconds; the counter is set by the test."""

    live, peaks, base = None, {}, 0

    @contextmanager
    def __call__(self, part):
        with super().__call__(part):
            if part in ("teacher", "student"):
                with self.live, self.live.part(self.peaks, part, self.base):
                    yield
            else:
                yield


@pytest.mark.parametrize("lora_rank", [4, 0])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_plan_is_what_a_real_step_takes(checkpoint, tmp_path, monkeypatch, lora_rank, checkpointing):
    """train_step itself, on real tensors, part by part: within 10 %."""
    rows = [{"problem": "How many? " * 3, "solution": "Because. " * 12, "answer": "1"}] * 4
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = train.parse_config(
        [
            "--model", str(checkpoint), "--data", str(tmp_path / "data.jsonl"), "--batch_size", "4",
            "--micro_batch_size", "2", "--max_new_tokens", "200", "--lora_rank", str(lora_rank), "--device", "cpu",
            "--gradient_checkpointing", checkpointing, "--dtype", "float32",
        ]
    )  # fmt: skip
    config = replace(config, engine="generate")
    problems = load_problems(config.data)
    run = train.build(config, torch.device("cpu"), make_grader("exact", []))
    run = replace(run, engine=FixedEngine())
    x_stu, x_tch = (prompt(run.tokenizer, problems[0]) for prompt in (train.student_prompt, train.teacher_prompt))
    its = Planned(run.model, run.teacher, run.method, config, config.sampling, config.gradient_checkpointing)
    expected = plan_memory(its, StepShape(len(x_stu), len(x_tch), 200, 0, 2), 4, None)
    train.train_step(0, run, problems, config)  # makes moments
    for parameter in run.parameters:
        parameter.grad = torch.zeros_like(parameter)
    monkeypatch.setattr(train, "Clock", PeakClock)
    live, copies = LiveBytes(), [] if run.teacher.copy is None else run.teacher.copy.parameters()
    for tensor in [*run.model.parameters(), *run.model.buffers(), *(p.grad for p in run.parameters), *copies]:
        live.count(tensor)
    PeakClock.live, PeakClock.peaks, PeakClock.base = live, {}, live.now
    train.train_step(1, run, problems, config)
    for part in ("teacher", "student"):
        assert getattr(expected, part) == pytest.approx(PeakClock.peaks[part], rel=0.10), part


def test_fixed_parts_by_hand(model):
    adapter = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    fixed, ema = plan(model), plan(model, kind="ema")
    assert (fixed.weights, fixed.trained, fixed.optimizer) == (frozen, adapter, 3 * adapter)
    assert ema.weights == frozen + adapter
    V, kv = model.config.vocab_size, model.config.num_key_value_heads * 8  # heads of 32 / 4 = 8
    cache = 8 * 50 * 2 * 2 * kv * 4
    assert cache + 3 * 8 * V * 4 < fixed.sampling < 3 * cache + 12 * 8 * V * 4


def test_all_weights_with_an_average_are_two_sets(checkpoint):
    model = load_model(checkpoint, device="cpu")
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    for kind, copies in (("fixed", 1), ("ema", 1), ("live", 0)):
        at = plan(model, kind=kind)
        assert (at.weights, at.trained, at.optimizer) == (copies * own, own, 3 * own)


def test_shallow_models_hold_every_kind_of_block():
    """Olmo's windows come in fours: the first block and one of each kind, and one more of each."""
    w, f = "sliding_attention", "full_attention"
    assert _shallow([f] * 36) == ([f, f], {f: [f, f, f]})
    assert _shallow([w, w, w, f] * 8) == ([w, w, f], {w: [w, w, f, w], f: [w, w, f, f]})
    assert _shallow([f] * 5) == ([f] * 5, {}) and _shallow([w, w, w, f]) == ([w, w, w, f], {})  # no dearer whole


@pytest.mark.parametrize("kind", ["qwen3", "olmo3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_deep_models_plan_is_extended_from_shallow_ones(kind, checkpointing, monkeypatch):
    """Twelve blocks measured whole; Olmo's windows are shorter than the contexts and than what is sampled."""
    shape = {**families.SHAPE, "num_hidden_layers": 12}
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, vocab_size=600, head_dim=8, tie_word_embeddings=True))
    else:
        model = Olmo3ForCausalLM(Olmo3Config(**shape, vocab_size=600, sliding_window=16))
        assert set(block_kinds(model)) == {"sliding_attention", "full_attention"}
    add_lora(model, 4, 8.0)
    extended = plan(model, checkpointing=checkpointing)
    monkeypatch.setattr("runtime.memory._shallow", lambda kinds: (kinds, {}))
    whole = plan(model, checkpointing=checkpointing)
    for part in ("sampling", "teacher", "student"):
        assert getattr(extended, part) == pytest.approx(getattr(whole, part), rel=0.01), part


def test_the_cache_of_a_long_sample_is_the_real_one(tmp_path):
    """Sampling's peak above the prompt's pass grows by the cache: keys and values of the blocks' own lengths."""
    shape = {**families.SHAPE, "num_hidden_layers": 4}
    model = Olmo3ForCausalLM(Olmo3Config(**shape, vocab_size=50, sliding_window=16))
    add_lora(model, 4, 8.0)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    per_token = 8 * 2 * model.config.num_key_value_heads * head_dim * 4  # bytes of a block, 8 rows
    kinds = block_kinds(model)
    assert kinds.count("full_attention") == 1
    apart = plan(model, max_new_tokens=2400).sampling - plan(model, max_new_tokens=1400).sampling
    # The full block's cache, and what it is copied to as it grows; masks and scores of one token are small.
    assert 1000 * per_token < apart < 3 * 1000 * per_token


# Its choices


def test_checkpointing_and_fewer_sequences_take_less(model):
    assert plan(model, 1).student < plan(model, 4).student
    tall = {"student_tokens": 200}
    assert plan(model, 4, True, **tall).student < plan(model, 4, False, **tall).student


def test_auto_takes_the_largest_that_fits(model):
    needs = {}
    for size in (1, 2, 4, 8):
        at = plan(model, size)
        needs[size] = (at.total - at.weights - at.trained) / USABLE
    assert needs[2] > needs[1]
    assert plan(model, 0, available=int(needs[8]) + 1).micro_batch_size == 8
    assert plan(model, 0, available=int(needs[8]) - 1).micro_batch_size == 4
    assert plan(model, 0, available=int(needs[2]) + 1).micro_batch_size == 2
    assert plan(model, 0, available=None).micro_batch_size == 4


def test_auto_measures_only_sizes_that_may_fit(model, monkeypatch):
    """Sampling once; of the sizes the largest, and those whose share of it fits."""
    shapes, measure = [], memory._pass_bytes

    def spy(run, shape):
        shapes.append((shape.micro_batch_size, shape.local_batch))
        return measure(run, shape)

    alone = {size: plan(model, size) for size in (1, 8)}
    monkeypatch.setattr(memory, "_pass_bytes", spy)
    enough = (alone[1].total - alone[1].weights - alone[1].trained) / USABLE
    least = plan(model, 0, available=int(enough) + 1)
    assert shapes == [(8, 8), (1, 0)]
    assert replace(least, micro_batch_size=0) == replace(alone[1], micro_batch_size=0)
    assert alone[1].student >= alone[8].student / 8


@pytest.mark.parametrize(("family", "lora_rank"), [("qwen3", 4), ("llama", 4), ("olmo3", 4), ("qwen3", 0)])
def test_the_crude_bound_is_above_the_plan(family, lora_rank, tmp_path):
    """A long context, where attention's scores count most, and none at all, where the logits do."""
    model = load_model(str(families.make_checkpoint(family, tmp_path / family)), device="cpu")
    if lora_rank:
        add_lora(model, lora_rank, 8.0)
    for changes in ({"teacher_tokens": 600, "max_new_tokens": 500}, {"student_tokens": 1, "teacher_tokens": 1}):
        at = plan(model, 8, **changes)
        bound = crude_bound(planned(model), replace(SHAPE, micro_batch_size=8, **changes))
        assert bound > 1.5 * (at.total - at.weights - at.trained), changes


def test_nothing_is_measured_where_the_bound_is_far_below_what_is_free(model, monkeypatch):
    bound = crude_bound(planned(model), replace(SHAPE, micro_batch_size=8))
    assert plan(model, 0, available=int(bound / FAR_BELOW)).unmeasured is None
    monkeypatch.setattr(memory, "_pass_bytes", None)
    at = plan(model, 0, available=int(bound / FAR_BELOW) + 2)
    assert at.micro_batch_size == 8
    assert str(at).startswith(f"memory of a step: less than {bound / 2**30:.2f} GiB, and ")


def test_what_cannot_fit_is_refused_with_advice(model):
    with pytest.raises(InputError, match=r"memory in GiB.*are there; what helps: a lower --micro_batch_size"):
        plan(model, 8, available=1000, max_new_tokens=300, local_batch=1)
    with pytest.raises(InputError, match="--max_length"):
        plan(model, 0, available=1000, teacher_tokens=1000, local_batch=1)
    with pytest.raises(InputError, match="--batch_size"):
        plan(model, 1, available=1000, local_batch=64)
    assert plan(model, 8, available=None).micro_batch_size == 8


def test_a_model_that_does_not_run_on_fake_tensors_is_said_and_trained(model, monkeypatch):
    """A branch on a value: there is none in a fake tensor."""

    def forward(self, *args, **kwargs):
        if kwargs["input_ids"].sum().item() > 0:
            raise AssertionError
        return original(self, *args, **kwargs)

    kind = type(model.get_decoder())
    original = kind.forward
    monkeypatch.setattr(kind, "forward", forward)
    at = plan(model, 0, available=10)
    assert at.micro_batch_size == 4 and "cannot be told for this model" in str(at)


def test_the_printed_plan_names_every_part(model):
    text = str(plan(model))
    assert all(word in text for word in ("weights", "trained", "optimizer", "sampling", "teacher", "student", "peak"))


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
