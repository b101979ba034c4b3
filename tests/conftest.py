import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import families

from loss import LossOptions
from model import lora_layers
from runtime import memory


@pytest.fixture(autouse=True)
def one_thread():
    """Many small tensors: one thread is fastest, and sums come out the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["qwen3", "llama", "olmo3"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def checkpoint(family, tmp_path_factory) -> Path:
    """A random checkpoint of each family in turn."""
    return families.make_checkpoint(family, tmp_path_factory.mktemp("models") / family)


PLANS: dict[tuple, dict[str, int]] = {}


@pytest.fixture
def plans_once(monkeypatch):
    """What a step takes in memory is measured once for equal runs: it takes seconds, and many tests start such runs."""
    measure = memory._pass_bytes

    def once(run: memory.Planned, shape: memory.StepShape) -> dict[str, int]:
        model, loss, teacher = run.model, run.method, run.teacher
        key = (
            model.config.to_json_string(), model.config._attn_implementation, model.dtype, memory.CHUNK_BYTES,
            tuple((layer.rank, layer.dropout) for layer in lora_layers(model).values()), teacher.kind,
            teacher.copy is None,
            loss.token_loss, loss.clips, tuple(getattr(run.options, field.name) for field in fields(LossOptions)),
            run.settings, run.gradient_checkpointing, run.ranks, shape,
        )  # fmt: skip
        if key not in PLANS:
            PLANS[key] = measure(run, shape)
        return PLANS[key]

    monkeypatch.setattr(memory, "_pass_bytes", once)
