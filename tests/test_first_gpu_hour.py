"""The first hour's twins are equal in value, its measuring measures, its shapes are the presets'."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import first_gpu_hour
from experiments.first_gpu_hour import SHAPES, loss_functions, peak_bytes

CPU = torch.device("cpu")


def test_the_plain_loss_is_the_same_loss():
    ours, plain = loss_functions(M=8, D=8, V=30, device=CPU)
    (a, by_chunks), (b, whole) = ours(3), plain()
    assert a == pytest.approx(b)
    torch.testing.assert_close(by_chunks, whole)


def test_the_memory_of_the_loss_does_not_grow_with_the_tokens_but_the_plain_one_does():
    def peak(tokens: int, chunk: int | None) -> int:
        ours, plain = loss_functions(tokens, 4, 2_000, CPU)
        return peak_bytes(plain if chunk is None else lambda: ours(chunk), CPU)

    logits = 2_000 * 4
    assert peak(32, 8) < 1.05 * peak(16, 8) < 8.0 * 8 * logits
    assert peak(32, None) > 1.9 * peak(16, None) > 1.9 * 4 * 16 * logits


def test_peak_memory_by_hand():
    """Two tensors of 4 MB alive at once, then one of them again: 8 MB."""
    assert peak_bytes(lambda: (torch.ones(1_000_000) + 1) * 2, CPU) == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize("preset, billions", [("qwen3-4b", 4.02), ("dsr1-llama-8b", 8.03), ("olmo3-7b", 7.30)])
def test_the_shapes_have_the_published_number_of_weights(preset, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[preset]())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.slow
def test_a_part_that_runs_out_of_time_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch, capsys, call):
    """Each part in a process of its own: one that is given a second, and those that have the time they need."""
    monkeypatch.setitem(first_gpu_hour.SECONDS, "qwen3-4b", 1)
    flags = ["--device", "cpu", "--output_dir", str(tmp_path), "--parts", "qwen3-4b", "loss", "olmo3-7b"]
    call(first_gpu_hour, *flags)
    rows = [line for line in (tmp_path / "first-gpu-hour.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert "qwen3-4b: FAILED" in rows[0] and "not done after 1 s" in rows[0]
    assert "tokens a chunk" in rows[1] and "olmo3-7b, scoring" in rows[-1] and "FAILED" not in "".join(rows[1:])
    assert rows[-1] in capsys.readouterr().out
