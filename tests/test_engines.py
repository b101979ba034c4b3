"""What generate does where the memory is short."""

from types import SimpleNamespace

import pytest
import torch

from rollout import Response, Sampling
from runtime import engines
from runtime.engines import GenerateEngine

SETTINGS = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=8)
ROWS = [[i] for i in range(7)], [(0, 1, i) for i in range(7)]
RESPONSES = [Response([i, *key], True) for (i,), key in zip(*ROWS, strict=True)]


@pytest.fixture
def small_memory(monkeypatch):
    """Sampling that runs out of memory with more rows than `limit`; `tried` are the sizes of all batches."""

    def limited(model, tokenizer, prompts, keys, settings, on_token):
        limited.tried.append(len(prompts))
        if len(prompts) > limited.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Response([i, *key], True) for (i,), key in zip(prompts, keys, strict=True)]

    limited.tried, limited.limit = [], 2
    monkeypatch.setattr(engines, "sample", limited)
    return limited


@pytest.mark.parametrize(("batch_size", "tried"), [(200, [7, 3, 1, 1, 1, 1, 1, 1, 1]), (4, [4, 2, 2, 2, 1])])
def test_a_batch_that_does_not_fit_is_halved_and_what_fits_is_remembered(small_memory, capsys, batch_size, tried):
    seen, engine = [], GenerateEngine(None, None, batch_size)
    responses = engine.sample(*ROWS, SETTINGS, lambda row, response: seen.append((row, response)))
    assert responses == RESPONSES and seen == list(enumerate(responses))  # once each
    assert small_memory.tried == tried and engine.batch_size == tried[-2]
    assert capsys.readouterr().out.startswith(f"out of memory: {tried[0]} rows start anew, {tried[1]} at a time\n")


def test_rows_before_a_lack_of_memory_are_not_sampled_again(small_memory):
    """The third batch does not fit, the first two are there already."""
    small_memory.limit = 4
    sampled = []

    def shrink(row, response):
        sampled.append(row)
        small_memory.limit = 1 if row == 3 else small_memory.limit

    assert GenerateEngine(None, None, batch_size=2).sample(*ROWS, SETTINGS, shrink) == RESPONSES
    assert small_memory.tried == [2, 2, 2, 1, 1, 1] and sampled == list(range(7))


@pytest.mark.parametrize(("in_parts", "tried"), [(False, [7, 3, 1]), (True, [7])])
def test_a_row_that_does_not_fit_ends_it_and_ranks_that_share_a_model_do_not_try_again(small_memory, in_parts, tried):
    small_memory.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        model, tokenizer = SimpleNamespace(_is_fsdp_managed_module=in_parts), SimpleNamespace(eos_token_id=0)
        GenerateEngine(model, tokenizer).sample(*ROWS, SETTINGS)
    assert small_memory.tried == tried
