"""What ranks do together: whose GPU is whose, one start for all, few collectives."""

import re

import pytest
import torch
from forked import run_ranks

from errors import InputError
from runtime import ranks
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


def test_a_log_file_gets_a_line_now_and_then_and_nothing_of_what_is_quick(capsys, monkeypatch):
    assert list(ranks.progress(range(3), desc="batches")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ranks, "LOG_EVERY", 0.0)
    with ranks.progress(total=3, desc="tokens") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert any(re.search(r"tokens: 2 of 3, .*it/s, at most 00:0\d left$", line) for line in lines), lines
