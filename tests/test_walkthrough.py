"""docs/walkthrough.md and the script that prints its numbers."""

import re

import pytest
import torch

from experiments import walkthrough
from experiments.worlds import STEP, WORLDS, believed_result
from loss import method_loss
from problems import tiny_solution  # noqa: F401

PAGE = walkthrough.PAGE.read_text(encoding="utf-8")
DECIMAL = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def tables():
    return walkthrough.blocks()
