"""The first hour's shapes are the presets'; a part that fails is a row."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import first_gpu_hour
from experiments.first_gpu_hour import SHAPES


@pytest.mark.parametrize("preset, billions", [("qwen3-4b", 4.02), ("dsr1-llama-8b", 8.03), ("olmo3-7b", 7.30)])
def test_the_shapes_have_the_published_number_of_weights(preset, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[preset]())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.slow
def test_a_part_that_runs_out_of_time_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch, capsys, call):
    """Each part in a process of its own: one that is given a second, and those that have the time they need."""
    monkeypatch.setitem(first_gpu_hour.SECONDS, "qwen3-4b", 1)
    flags = ["--device", "cpu", "--output_dir", str(tmp_path), "--parts", "qwen3-4b", "olmo3-7b"]
    call(first_gpu_hour, *flags)
    rows = [line for line in (tmp_path / "first-gpu-hour.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert "qwen3-4b: FAILED" in rows[0] and "not done after 1 s" in rows[0]
    assert "olmo3-7b, scoring" in rows[-1] and "FAILED" not in "".join(rows[1:])
    assert rows[-1] in capsys.readouterr().out
