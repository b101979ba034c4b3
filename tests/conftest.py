import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import families
import forked

from runtime.loading import load_model, load_tokenizer


def pytest_collection_finish(session):
    """What ranks are forked from imports the project meanwhile, beside the tests before theirs."""
    if any(hasattr(item.module, "run_ranks") for item in session.items):
        forked.server()


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


@pytest.fixture
def model(checkpoint):
    return load_model(checkpoint, device="cpu")


@pytest.fixture
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture
def call(monkeypatch):
    """Runs the `main` of a script with these words behind its name."""

    def main(script, *words: object):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        return script.main()

    return main


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> Path:
    """A random checkpoint of one family, which tests only read."""
    return families.make_checkpoint("qwen3", tmp_path_factory.mktemp("models") / "qwen3")
