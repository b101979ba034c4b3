import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import families


def pytest_collection_modifyitems(items):
    """Tests marked `slow` run where CI is set."""
    if not os.environ.get("CI"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: runs where the variable CI is set"))


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
