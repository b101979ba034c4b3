"""What ranks do together: whose GPU is whose, one start for all, few collectives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from problems import InputError
from runtime.ranks import rank_device

ROOT = Path(__file__).resolve().parent.parent


def test_each_rank_has_the_gpu_of_its_number():
    assert rank_device("auto", "3", has_gpu=True) == rank_device("cuda", "3", has_gpu=True) == "cuda:3"
    assert rank_device("auto", "3", has_gpu=False) == "auto"
    assert rank_device("cpu", "3", has_gpu=True) == "cpu"
    with pytest.raises(InputError, match="--device cuda:0: several ranks cannot share a GPU"):
        rank_device("cuda:0", "1", has_gpu=True)


TOGETHER = """
import torch, torch.distributed as dist
from problems import InputError
from runtime import ranks
from train import sum_over_ranks

ranks.start_ranks("cpu")
calls, original = [], dist.all_reduce
dist.all_reduce = lambda tensor: (calls.append(tensor.numel()), original(tensor))
tensors = [torch.full((n,), 1.0 + ranks.rank()) for n in (1, 7, 500, 3)]
sum_over_ranks(tensors)
assert calls == [511], calls  # all of them in one piece
assert all((tensor == 3.0).all() for tensor in tensors)
calls.clear()
ranks.BUCKET_BYTES = 32
sum_over_ranks(tensors)
assert calls == [8, 500, 3], calls  # 32 bytes at a time; what is larger goes alone
assert all((tensor == 6.0).all() for tensor in tensors)

ranks.check_same_start([("lora_A", torch.arange(4.0)), ("lora_B", torch.zeros(3, dtype=torch.bfloat16))])
turned = torch.arange(4.0) if ranks.rank() else torch.arange(4.0).flip(0)
for apart in (torch.arange(4.0) + 1e-6 * ranks.rank(), turned):
    try:
        ranks.check_same_start([("same", torch.ones(2)), ("lora_A", apart)])
    except InputError as error:
        assert "rank 1 starts with another lora_A than rank 0" in str(error)
    else:
        raise AssertionError(apart)
ranks.stop_ranks()
"""


def test_sums_go_in_few_pieces_and_another_start_is_named(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, str(tmp_path / "together.py")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
