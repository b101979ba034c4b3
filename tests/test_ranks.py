"""What ranks do together: whose GPU is whose, one start for all, few collectives."""

import json
import os
import re
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from torch.distributed.tensor import DTensor

import train
from errors import InputError
from problems import tiny_problems
from runtime import ranks
from runtime.loading import load_model
from runtime.ranks import rank_device, sum_over_ranks


def test_each_rank_has_the_gpu_of_its_number():
    assert rank_device("auto", "3", has_gpu=True) == rank_device("cuda", "3", has_gpu=True) == "cuda:3"
    assert rank_device("auto", "3", has_gpu=False) == "auto"
    assert rank_device("cpu", "3", has_gpu=True) == "cpu"
    with pytest.raises(InputError, match="--device cuda:0: several ranks cannot share a GPU"):
        rank_device("cuda:0", "1", has_gpu=True)


def together() -> None:
    ranks.start_ranks("cpu")
    tensors = [torch.full((n,), 1.0 + ranks.rank()) for n in (1, 500)]
    sum_over_ranks(tensors)
    assert all((tensor == 3.0).all() for tensor in tensors)
    turned, half = torch.arange(12.0).view(3, 4).T, torch.ones(2, 3, dtype=torch.bfloat16)
    sum_over_ranks([turned, half])  # in place, whatever their strides and dtypes
    assert torch.equal(turned, 2.0 * torch.arange(12.0).view(3, 4).T) and half.dtype == torch.bfloat16
    assert (half == 2.0).all()

    ranks.check_same_start([("lora_A", torch.arange(4.0)), ("lora_B", torch.zeros(3, dtype=torch.bfloat16))])
    turned = torch.arange(4.0) if ranks.rank() else torch.arange(4.0).flip(0)
    for apart in (torch.arange(4.0) + 1e-6 * ranks.rank(), turned):
        with pytest.raises(InputError, match="rank 1 starts with another lora_A than rank 0"):
            ranks.check_same_start([("same", torch.ones(2)), ("lora_A", apart)])
    ranks.stop_ranks()


def test_sums_are_over_all_ranks_and_another_start_is_named(tmp_path):
    alone = [torch.ones(2, 3)]
    sum_over_ranks(alone)
    assert torch.equal(alone[0], torch.ones(2, 3))
    run_ranks(tmp_path, together)


def trained(run: Path, *more: str) -> int:
    """The exit status of train.py in this process, whose group of ranks outlives it."""
    flags = {
        "device": "cpu", "num_steps": 2, "batch_size": 2, "micro_batch_size": 1, "max_new_tokens": 8, "lora_rank": 4,
        "teacher": "ema", "gradient_checkpointing": True, "eval_data": run.parent / "held_out.jsonl", "output_dir": run,
    }  # fmt: skip
    sys.argv = ["train.py", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), *more]
    return train.main()


def in_parts(folder: Path) -> None:
    """A run of whole models, and one in parts that a signal for one of the ranks stops and that goes on."""
    train.ranks.stop_ranks, build, sample, held, calls = lambda: None, train.build, train.rollout.sample, [], []

    def weighed(*arguments):
        run = build(*arguments)
        blocks = [run.model.get_decoder().layers, run.teacher.scorer.get_decoder().layers]
        weights = [(name, weight) for block in blocks for name, weight in block.named_parameters()]
        held.append(sum(local(weight).numel() for name, weight in weights if "lora" not in name))
        return run

    def asked(model, tokenizer, prompts, keys, settings, on_token):
        calls.append(prompts)
        if len(calls) == 3 and ranks.rank() == 1:  # two for the held-out problem, only where ranks sample together
            os.kill(os.getpid(), signal.SIGTERM)
        apart = replace(settings, max_new_tokens=5 + 3 * ranks.rank())
        return sample(model, tokenizer, prompts, keys, apart, on_token)

    train.build, train.engines.sample = weighed, asked
    assert trained(folder / "whole") == 0
    calls.clear()
    assert trained(folder / "parts", "--shard") == 128 + signal.SIGTERM
    assert len(calls) == 3, calls
    assert trained(folder / "parts", "--shard", "--resume") == 0
    assert trained(folder / "other", "--shard", "--teacher", "tiny", "--num_steps", "1", "--eval_data", "") == 0
    assert max(held[1:]) < 0.51 * held[0], held

    with pytest.raises(InputError, match="--shard: needs ranks, two or more that divide --batch_size, not 2"):
        trained(folder / "uneven", "--shard", "--batch_size", "5")
    model = load_model("tiny", device="cpu")
    model.get_decoder().layers[1].mlp.up_proj.weight.data[0, 0] += ranks.rank()
    with pytest.raises(InputError, match=r"rank 1 starts with another layers\.1\.mlp\.up_proj\.weight than rank 0"):
        ranks.shard(model, torch.device("cpu"))
    dist.destroy_process_group()


def local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


@pytest.mark.slow
def test_a_model_in_parts_trains_as_whole_ones_do(tmp_path):
    rows = "".join(json.dumps(asdict(problem)) + "\n" for problem in tiny_problems("heldout", 1))
    (tmp_path / "held_out.jsonl").write_text(rows)
    run_ranks(tmp_path, in_parts, tmp_path)
    runs = whole, parts = tmp_path / "whole", tmp_path / "parts"
    weights = [f"checkpoint-2/{name}.safetensors" for name in ("adapter_model", "ema")]
    for name in ("samples.jsonl", "heldout.jsonl", *weights):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]] and rows[0][0][name] > 0


def test_all_weights_are_not_trained_in_parts(call):
    with pytest.raises(InputError, match=r"--shard splits frozen weights: --lora_rank .*: verl or ms-swift"):
        train.parse_config(["--shard", "--lora_rank", "0"])
    with pytest.raises(InputError, match="--shard: needs ranks, two or more that divide --batch_size, not 1"):
        call(train, "--shard")


def test_a_log_file_gets_a_line_now_and_then_and_nothing_of_what_is_quick(capsys, monkeypatch):
    for step in ranks.progress(range(3), desc="batches"):
        ranks.say(f"step {step}")  # which must not draw the bar again, at the numbers of its last line
    assert capsys.readouterr() == ("step 0\nstep 1\nstep 2\n", "")
    monkeypatch.setattr(ranks, "LOG_EVERY", 0.0)
    with ranks.progress(total=3, desc="tokens") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert any(re.search(r"tokens: 2 of 3, .*it/s, at most 00:0\d left$", line) for line in lines), lines
