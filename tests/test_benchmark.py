"""The benchmark's own parts: its twins are equal in value, its measuring measures, its shapes are the presets'."""

import json
import sys

import families
import pytest
import torch

from experiments import first_gpu_hour
from experiments.benchmark import PerMicroBatch, Table, alternate, naive_opsd, peak_bytes
from experiments.fake_step import SHAPES, empty_model
from loss import method_loss_from_hidden
from model import load_model, load_tokenizer
from rollout import Sampling
from runtime.engines import GenerateEngine

CPU = torch.device("cpu")


def test_the_naive_loss_is_the_same_loss():
    torch.manual_seed(0)
    ours, naive = (torch.randn(2, 5, 8).requires_grad_() for _ in range(2))
    naive.data = ours.data.clone()
    teacher, head, ids = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randint(30, (2, 5))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    a = method_loss_from_hidden("opsd", ours, teacher, head, ids, mask, chunk_tokens=3)
    b = naive_opsd(naive, teacher, head, mask)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.grad, naive.grad)


def test_the_memory_of_the_loss_does_not_grow_with_the_tokens_but_the_naive_one_does():
    def loss_peak(T: int, chunk: int | None) -> int:
        states, head = torch.randn(1, T, 4).requires_grad_(), torch.randn(20_000, 4)
        ids, mask = torch.zeros(1, T, dtype=torch.long), torch.ones(1, T, dtype=torch.bool)
        loss = (lambda: naive_opsd(states, states.detach(), head, mask)) if chunk is None else (
            lambda: method_loss_from_hidden("opsd", states, states.detach(), head, ids, mask, chunk_tokens=chunk)
        )  # fmt: skip
        return peak_bytes(lambda: loss().backward(), CPU)

    logits = 20_000 * 4
    assert loss_peak(64, 8) < 1.05 * loss_peak(16, 8) < 8.0 * 8 * logits
    assert loss_peak(64, None) > 3.5 * loss_peak(16, None) > 3.5 * 4 * 16 * logits


def test_peak_memory_by_hand():
    """Two tensors of 4 MB alive at once, then one of them again: 8 MB."""

    def work():
        a = torch.ones(1_000_000)
        b = a + 1
        del a
        return b * 2

    assert peak_bytes(work, CPU) == pytest.approx(8e6, rel=0.01)


def test_alternating_keeps_the_smallest_time():
    calls = []
    times = alternate([lambda: calls.append("a"), lambda: sum(range(300_000)) and calls.append("b")], CPU, turns=3)
    assert calls == ["a", "b"] * 4 and times[0] < times[1]


def test_sampling_per_micro_batch_gives_the_same_responses(tmp_path):
    checkpoint = str(families.make_checkpoint("qwen3", tmp_path / "qwen3"))
    engine = GenerateEngine(load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint))
    prompts, keys = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14], [15]], [(0, i) for i in range(5)]
    settings = Sampling(1.0, 1.0, 0, 6)
    assert PerMicroBatch(engine, 2).sample(prompts, keys, settings) == engine.sample(prompts, keys, settings)


@pytest.mark.parametrize("preset, billions", [("qwen3-4b", 4.02), ("dsr1-llama-8b", 8.03), ("olmo3-7b", 7.30)])
def test_the_shapes_have_the_published_number_of_weights(preset, billions):
    model = empty_model(preset, lora_rank=0)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert set(SHAPES) == {"qwen3-4b", "dsr1-llama-8b", "olmo3-7b"}


def test_a_row_of_the_table(capsys):
    table = Table()
    table.add("loss", 2.0, 8.0, "s", "a note")
    table.add("rate", 2.0, None, "TB/s")
    assert "| loss | 2 | 8 | 4 | s | a note |" in table.markdown()
    assert "| rate | 2 | - | - | TB/s |  |" in table.markdown()


@pytest.mark.parametrize(
    "part, words",
    [
        ("loss", "tokens a chunk"),
        ("decode", "decode olmo3-7b, continuous"),
        ("step", "memory: plan"),
        ("long", "continuous batching"),
    ],
)
def test_the_parts_of_the_first_hour_run_on_a_cpu_at_small_shapes(tmp_path, monkeypatch, part, words):
    rows = tmp_path / "rows.jsonl"
    flags = ["--part", part, "--rows", str(rows), "--small", "--device", "cpu", "--preset", "qwen3-4b", "olmo3-7b"]
    monkeypatch.setattr(sys, "argv", ["first_gpu_hour", *flags])
    first_gpu_hour.main()
    assert any(words in json.loads(line)["what"] for line in rows.read_text().splitlines())


def test_a_part_that_runs_out_of_time_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    """Each part in a process of its own: one that is given a second, and one that has the time it needs."""
    monkeypatch.setitem(first_gpu_hour.SECONDS, "kill", 1)
    flags = ["--small", "--device", "cpu", "--parts", "kill", "environment", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["first_gpu_hour", *flags])
    first_gpu_hour.main()
    rows = json.loads((tmp_path / "first-gpu-hour.json").read_text())["rows"]
    assert [row["what"].partition(":")[0] for row in rows] == ["kill", "environment"]
    assert rows[0]["what"] == "kill: FAILED" and "FAILED" not in rows[1]["what"]
    assert "not done after 1 s" in (tmp_path / "first-gpu-hour.md").read_text()
