"""What generate does where the memory is short."""

import pytest
import torch

from problems import tiny_problems
from rollout import Sampling, sample
from runtime import engines
from runtime.engines import GenerateEngine
from runtime.loading import load_model, load_tokenizer
from teacher import student_prompt

SETTINGS = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=16)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu"), load_tokenizer("tiny")


@pytest.fixture
def rows(tiny):
    """Seven prompts and their keys."""
    prompts = [student_prompt(tiny[1], problem) for problem in tiny_problems("train", 7)]
    return prompts, [(0, 1, index) for index in range(7)]


@pytest.fixture
def small_memory(monkeypatch):
    """Plain sampling that runs out of memory with more rows than `limit`; `tried` are the sizes of all batches."""

    def limited(model, tokenizer, prompts, keys, settings, on_token):
        limited.tried.append(len(prompts))
        if len(prompts) > limited.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(model, tokenizer, prompts, keys, settings)

    limited.tried, limited.limit = [], 2
    monkeypatch.setattr(engines, "sample", limited)
    return limited


@pytest.mark.parametrize(("batch_size", "tried"), [(200, [7, 3, 1, 1, 1, 1, 1, 1, 1]), (4, [4, 2, 2, 2, 1])])
def test_a_batch_that_does_not_fit_is_halved_and_what_fits_is_remembered(tiny, rows, small_memory, batch_size, tried):
    seen, engine = [], GenerateEngine(*tiny, batch_size)
    responses = engine.sample(*rows, SETTINGS, lambda row, response: seen.append((row, response)))
    assert responses == sample(*tiny, *rows, SETTINGS)
    assert seen == list(enumerate(responses))  # once each
    assert small_memory.tried == tried and engine.batch_size == tried[-2]


def test_rows_before_a_lack_of_memory_are_not_sampled_again(tiny, rows, small_memory):
    """The third batch does not fit, the first two are there already."""
    small_memory.limit = 4
    sampled, engine = [], GenerateEngine(*tiny, batch_size=2)

    def shrink(row, response):
        sampled.append(row)
        small_memory.limit = 1 if row == 3 else small_memory.limit

    responses = engine.sample(*rows, SETTINGS, shrink)
    assert small_memory.tried == [2, 2, 2, 1, 1, 1] and sampled == list(range(7))
    assert responses == sample(*tiny, *rows, SETTINGS)


def test_a_single_row_that_does_not_fit_is_said(tiny, rows, small_memory):
    small_memory.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        GenerateEngine(*tiny).sample(*rows, SETTINGS)
    assert small_memory.tried == [7, 3, 1]


def test_ranks_that_share_a_model_do_not_try_again(tiny, rows, small_memory, monkeypatch):
    monkeypatch.setattr(tiny[0], "_is_fsdp_managed_module", True, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        GenerateEngine(*tiny).sample(*rows, SETTINGS)
    assert small_memory.tried == [7]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_do_not_change_the_responses(tiny, rows, size):
    assert GenerateEngine(*tiny, batch_size=size).sample(*rows, SETTINGS) == sample(*tiny, *rows, SETTINGS)
