import pytest
import torch

from model import load_model, load_tokenizer
from problems import InputError, Problem
from rollout import check_sampling, choose_tokens, sample
from teacher import student_prompt

SETTINGS = {"temperature": 1.1, "top_p": 0.95, "top_k": 20, "max_new_tokens": 12}
PROBLEMS = [Problem(text, "", "") for text in ("What is 2+2?", "A much longer question: how many clips?", "Why?")]


@pytest.fixture
def loaded(checkpoint):
    return load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)


def test_choose_tokens_inverts_the_distribution():
    """Probabilities .5 .3 .2 at ids 2 0 1: u in [0, .5) is id 2, [.5, .8) id 0, then id 1."""
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log().expand(6, 3)
    u = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.9999999])
    assert choose_tokens(logits, u, 1.0, 1.0, 0).tolist() == [2, 2, 0, 0, 1, 1]
    assert choose_tokens(logits, u, 1.0, 1.0, 2).tolist() == [2, 2, 2, 0, 0, 0]  # top_k 2: 5/8, 3/8
    assert choose_tokens(logits, u, 1.0, 0.7, 0).tolist() == [2, 2, 2, 0, 0, 0]  # smallest set holding 0.7
    assert choose_tokens(logits, u, 1.0, 0.5, 0).tolist() == [2] * 6
    assert choose_tokens(logits, u, 0.0, 1.0, 0).tolist() == [2] * 6


def test_frequencies_match_the_tempered_truncated_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 30) * 2
    n = 40_000
    drawn = choose_tokens(logits.expand(n, 30), torch.rand(n), 1.1, 0.9, 20)
    p, order = (logits[0] / 1.1).topk(20).values.softmax(-1), logits[0].topk(20).indices
    p[p.cumsum(0) - p >= 0.9] = 0
    expected = torch.zeros(30)
    expected[order] = p / p.sum()
    observed = torch.bincount(drawn, minlength=30) / n
    assert (observed - expected).abs().max() < 0.01
    assert observed[expected == 0].sum() == 0


def test_a_rows_sample_does_not_depend_on_its_batch(loaded):
    model, tokenizer = loaded
    prompts = [student_prompt(tokenizer, problem) for problem in PROBLEMS]
    keys = [(7, 0, i) for i in range(3)]
    together = sample(model, tokenizer, prompts, keys, **SETTINGS)
    alone = [sample(model, tokenizer, [p], [k], **SETTINGS).responses[0] for p, k in zip(prompts, keys, strict=True)]
    assert together.responses == alone
    backwards = sample(model, tokenizer, prompts[::-1], keys[::-1], **SETTINGS)
    assert backwards.responses[::-1] == alone
    other = sample(model, tokenizer, prompts, [(8, 0, i) for i in range(3)], **SETTINGS)
    assert other.responses != alone


def test_greedy_equals_generates_greedy(loaded):
    model, tokenizer = loaded
    prompt = student_prompt(tokenizer, PROBLEMS[0])
    ours = sample(model, tokenizer, [prompt], [(0,)], temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=8)
    theirs = model.eval().generate(
        input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id
    )
    assert ours.responses[0] == theirs[0, len(prompt) :].tolist()


def test_the_eos_counts_as_a_token_also_where_pad_is_eos(loaded, family):
    """The head is bent so that EOS is likely: rows end with exactly one EOS at their last position, or are cut."""
    model, tokenizer = loaded
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == (family == "llama")
    forward = model.forward

    def eager_to_end(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., tokenizer.eos_token_id] = output.logits.max(dim=-1).values
        return output

    model.forward = eager_to_end
    prompts = [student_prompt(tokenizer, problem) for problem in PROBLEMS] * 4
    rollout = sample(model, tokenizer, prompts, [(1, i) for i in range(12)], **SETTINGS)
    eos = tokenizer.eos_token_id
    assert any(rollout.finished)
    assert len(set(rollout.lengths)) > 1
    for response, finished, length in zip(rollout.responses, rollout.finished, rollout.lengths, strict=True):
        assert length == len(response) <= SETTINGS["max_new_tokens"]
        assert response.count(eos) == (1 if finished else 0)
        assert finished == (response[-1] == eos)
        assert finished or length == SETTINGS["max_new_tokens"]


def test_sampling_leaves_the_models_mode(loaded):
    model, tokenizer = loaded
    for mode in (True, False):
        model.train(mode)
        sample(model, tokenizer, [student_prompt(tokenizer, PROBLEMS[0])], [(0,)], **SETTINGS)
        assert model.training is mode


def test_logits_that_are_not_numbers_stop_the_run(loaded):
    model, tokenizer = loaded
    model.get_input_embeddings().weight.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match="finite"):
        sample(model, tokenizer, [student_prompt(tokenizer, PROBLEMS[0])], [(0,)], **SETTINGS)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new"),
    ],
)
def test_mistakes_are_named(change, word):
    with pytest.raises(InputError, match=word):
        check_sampling(**{**SETTINGS, **change})
