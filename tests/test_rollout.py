import pytest
import torch

from problems import Problem
from rollout import Sampling, StreamSampler, choose_tokens, sample, uniforms
from teacher import student_prompt

SETTINGS = Sampling(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=12)
PROBLEMS = [Problem(text, "", "") for text in ("What is 2+2?", "A much longer question: how many clips?", "Why?")]


def test_choose_tokens_inverts_the_distribution():
    """Probabilities .5 .3 .2 at ids 2 0 1: u in [0, .5) is id 2, [.5, .8) id 0, then id 1."""
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log().expand(6, 3)
    u = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.9999999])
    assert choose_tokens(logits, u, Sampling(1.0, 1.0, 0, 1)).tolist() == [2, 2, 0, 0, 1, 1]
    assert choose_tokens(1.5 * logits, u, Sampling(1.5, 1.0, 0, 1)).tolist() == [2, 2, 0, 0, 1, 1]
    assert choose_tokens(logits, u, Sampling(1.0, 1.0, 2, 1)).tolist() == [2, 2, 2, 0, 0, 0]  # top_k 2: 5/8, 3/8
    assert choose_tokens(logits, u, Sampling(1.0, 0.7, 0, 1)).tolist() == [2, 2, 2, 0, 0, 0]  # smallest set holding 0.7
    assert choose_tokens(logits, u, Sampling(1.0, 0.5, 0, 1)).tolist() == [2] * 6
    assert choose_tokens(logits, u, Sampling(1.0, 0.6, 2, 1)).tolist() == [2] * 6  # .6 of what top_k leaves: 5/8
    assert choose_tokens(logits, u, Sampling(0.0, 1.0, 0, 1)).tolist() == [2] * 6


def test_top_p_1_is_off_exactly():
    """No token is lost where the cumulative sum rounds to 1 before the end: the tail is drawn as it stands."""
    torch.manual_seed(0)
    logits, u = torch.randn(100, 1000) * 3, torch.full((100,), 1.0 - 2.0**-24)  # the largest float32 below 1
    values, order = logits.sort(dim=-1, descending=True)
    cumulative = values.softmax(dim=-1).cumsum(dim=-1)
    assert (cumulative[:, :-1] >= 1.0).any()
    index = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(dim=-1).clamp(max=999)
    assert torch.equal(choose_tokens(logits, u, Sampling(1.0, 1.0, 0, 1)), order[range(100), index])


def by_a_sort(logits_BV, uniform_B, top_p):
    """The nucleus as it is defined: all tokens sorted, then the smallest set that holds top_p."""
    values_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    p_BV = values_BV.softmax(dim=-1)
    p_BV = p_BV.masked_fill(p_BV.cumsum(dim=-1) - p_BV >= top_p, 0.0)
    total_BV = p_BV.cumsum(dim=-1)
    return ids_BV.gather(-1, (total_BV <= uniform_B[:, None] * total_BV[:, -1:]).sum(dim=-1, keepdim=True)).squeeze(-1)


@pytest.mark.parametrize("spread", [0.01, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_nucleus_needs_no_sort_of_all_tokens(spread, rounded):
    """Peaked and flat rows, also together, and rows of many equal logits, as bfloat16 gives them."""
    torch.manual_seed(0)
    logits_BV, u_B = torch.randn(32, 4000) * spread, torch.rand(32)
    logits_BV[::2, 7] += 3 * spread + 9.0
    logits_BV = logits_BV.bfloat16().float() if rounded else logits_BV
    for top_p in (0.3, 0.95, 0.999):
        chosen_B = choose_tokens(logits_BV, u_B, Sampling(1.0, top_p, 0, 1))
        assert torch.equal(chosen_B, by_a_sort(logits_BV, u_B, top_p))
        one_by_one = [choose_tokens(logits_BV[i : i + 1], u_B[i : i + 1], Sampling(1.0, top_p, 0, 1)) for i in range(8)]
        assert torch.equal(chosen_B[:8], torch.cat(one_by_one))


@pytest.mark.parametrize("mode", [True, False])
def test_sampling_is_without_dropout_and_leaves_the_mode_also_where_it_fails(model, tokenizer, monkeypatch, mode):
    model.train(mode)
    forward, seen = model.forward, []
    monkeypatch.setattr(model, "forward", lambda *args, **more: seen.append(model.training) or forward(*args, **more))
    sample(model, tokenizer, [student_prompt(tokenizer, PROBLEMS[0])], [(0,)], SETTINGS)
    assert set(seen) == {False} and model.training is mode

    def broken(*args, **more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError):
        sample(model, tokenizer, [student_prompt(tokenizer, PROBLEMS[0])], [(0,)], SETTINGS)
    assert model.training is mode


def test_a_nucleus_that_ends_among_equals_beyond_the_candidates():
    """3000 equal logits: .5 of their mass are the first 1500 ids, of which 1024 candidates are any part."""
    u_B = torch.tensor([0.0, 0.2, 0.6667, 0.9999])
    chosen_B = choose_tokens(torch.zeros(4, 3000), u_B, Sampling(1.0, 0.5, 0, 1))
    assert torch.allclose(chosen_B / 1500.0, u_B, atol=2e-3)
    logits_BV = torch.zeros(4, 3000)
    logits_BV[:, 9] = 9.0  # .73 of the mass
    assert choose_tokens(logits_BV, u_B, Sampling(1.0, 0.5, 0, 1)).tolist() == [9] * 4
    assert torch.equal(choose_tokens(logits_BV, u_B, Sampling(1.0, 0.75, 0, 1)), by_a_sort(logits_BV, u_B, 0.75))
    nan = torch.full((2, 3000), float("nan"))
    assert choose_tokens(nan, u_B[:2], Sampling(1.0, 0.95, 0, 1)).shape == (2,)  # `sample` then raises


def test_uniform_numbers_belong_to_their_key():
    keys = [(1, 0, 3), (1, 0, 4), (1, 1, 3), (2, 0, 3)]
    rows = uniforms(keys, 1000)
    assert rows.dtype == torch.float32 and rows.min() >= 0.0 and rows.max() < 1.0
    assert len({tuple(row.tolist()) for row in rows}) == 4
    for key, row in zip(keys, rows, strict=True):
        assert torch.equal(uniforms([key], 1000)[0], row)
        assert torch.equal(uniforms([key], 10)[0], row[:10])  # a lower limit cuts the stream, it does not change it
        assert row.mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_rows_sample_does_not_depend_on_its_batch(model, tokenizer):
    prompts = [student_prompt(tokenizer, problem) for problem in PROBLEMS]
    keys = [(7, 0, i) for i in range(3)]
    told: list[int] = []
    together = sample(model, tokenizer, prompts, keys, SETTINGS, lambda: told.append(1))
    assert len(told) == max(len(row.ids) for row in together)  # each token of the batch is told
    alone = [sample(model, tokenizer, [p], [k], SETTINGS)[0] for p, k in zip(prompts, keys, strict=True)]
    assert together == alone
    backwards = sample(model, tokenizer, prompts[::-1], keys[::-1], SETTINGS)
    assert backwards[::-1] == alone
    other = sample(model, tokenizer, prompts, [(8, 0, i) for i in range(3)], SETTINGS)
    assert other != alone


def test_each_row_ends_at_the_context_of_its_own(model, tokenizer):
    prompts, settings = [[5] * 4, [5] * 7], Sampling(0.0, 1.0, 0, 20, context=10)
    rows = sample(model, tokenizer, prompts, [(0,), (1,)], settings)
    assert all(len(row.ids) == 10 - len(prompt) or row.finished for row, prompt in zip(rows, prompts, strict=True))
    assert any(not row.finished for row in rows) and len(rows[1].ids) <= 3


def test_greedy_equals_generates_greedy(model, tokenizer):
    prompt = student_prompt(tokenizer, PROBLEMS[0])
    (ours,) = sample(model, tokenizer, [prompt], [(0,)], Sampling(0.0, top_p=1.0, top_k=0, max_new_tokens=8))
    how = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": tokenizer.pad_token_id}
    theirs = model.generate(input_ids=torch.tensor([prompt]), **how)
    assert ours.ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_is_given_its_states_in_one_piece(model, tokenizer, rows):
    """For a strided view of each row's last state torch copies a frozen head once a row on a CPU: seconds each."""
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda head, states, _: seen.append(states[0]))
    sample(model, tokenizer, [[1, 2, 3]] * rows, [(i,) for i in range(rows)], Sampling(0.0, 1.0, 0, 2))
    assert len(seen) == 2 and {states.stride() for states in seen} == {(seen[0].shape[-1], seen[0].shape[-1], 1)}


def test_the_eos_counts_as_a_token_also_where_pad_is_eos(model, tokenizer, family):
    """The head is bent so that two EOS are likely: rows end with exactly one at their last position, or are cut."""
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == (family == "llama")
    forward, ends = model.forward, [tokenizer.eos_token_id, *tokenizer.encode("9", add_special_tokens=False)[-1:]]
    model.generation_config.eos_token_id = ends[1:]  # the tokenizer's own counts besides

    def eager_to_end(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., ends] = output.logits.max(dim=-1, keepdim=True).values
        return output

    model.forward = eager_to_end
    prompts = [student_prompt(tokenizer, problem) for problem in PROBLEMS] * 4
    responses = sample(model, tokenizer, prompts, [(1, i) for i in range(12)], SETTINGS)
    assert {response.ids[-1] for response in responses if response.finished} == set(ends)
    assert len({len(response.ids) for response in responses}) > 1
    for response in responses:
        assert len(response.ids) <= SETTINGS.max_new_tokens
        assert sum(map(response.ids.count, ends)) == (1 if response.finished else 0)
        assert response.finished == (response.ids[-1] in ends)
        assert response.finished or len(response.ids) == SETTINGS.max_new_tokens


def test_logits_that_are_not_numbers_stop_the_run(model, tokenizer):
    model.get_input_embeddings().weight.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match="finite"):
        sample(model, tokenizer, [student_prompt(tokenizer, PROBLEMS[0])], [(0,)], SETTINGS)


def test_one_number_that_is_none_in_one_row_at_the_first_token_is_seen():
    sampler, scores = StreamSampler(torch.zeros(2, 2), 1, SETTINGS, lambda: None), torch.zeros(2, 8)
    scores[1, 3] = float("nan")
    sampler(torch.zeros(2, 1), scores)
    sampler(torch.zeros(2, 2), torch.zeros(2, 8))
    assert not sampler.finite
