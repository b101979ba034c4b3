"""What is logged of a step, and the one-line warning of a collapsed run."""

import pytest
import torch
from test_loss import scores_of

import loss as losses
from rollout import Response
from runtime import metrics
from runtime.metrics import COLLAPSE_WINDOW, Observer, Watch, collapse_warning, gap_warning, repeats, rollout_metrics

HEALTHY = {"accuracy": 0.6, "eos_rate": 1.0, "mean_length": 30.0, "repetition": 0.1}


def history(*changes: dict) -> list[dict]:
    """COLLAPSE_WINDOW steps of each kind, one kind after the other."""
    return [{**HEALTHY, **change} for change in changes for _ in range(COLLAPSE_WINDOW)]


@pytest.mark.parametrize(("change", "words"), [
    ({"accuracy": 0.3}, "accuracy went from 0.60 to 0.30"), ({"accuracy": 0.0}, "accuracy went from 0.60 to 0.00"),
    ({"eos_rate": 0.4}, "eos_rate went from 1.00 to 0.40"), ({"mean_length": 96.0}, "cut at --max_new_tokens 96"),
    ({"mean_length": 7.5}, "mean_length went from 30.00 to 7.50"), ({"accuracy": 0.31}, None), ({}, None),
    ({"repetition": 0.36}, "repetition went from 0.10 to 0.36"), ({"repetition": 0.34}, None),
    ({"eos_rate": 0.51}, None), ({"mean_length": 95.9}, None), ({"mean_length": 8.0}, None),
])  # fmt: skip
def test_a_collapse_is_told_and_a_sound_run_is_not(change, words):
    line = collapse_warning(history({}, change), limit=96)
    assert line is None if words is None else words in line


def test_the_best_so_far_is_the_measure_and_too_few_steps_or_answers_say_nothing():
    assert collapse_warning(history({}, {"accuracy": 0.9}, {"accuracy": 0.44}), limit=96)
    assert collapse_warning(history({"accuracy": 0.3}, {"accuracy": 0.6}), limit=96) is None
    assert collapse_warning([*history({})[:-1], {**HEALTHY, "accuracy": 0.0}], limit=96) is None
    assert collapse_warning(history({"accuracy": None}, {"accuracy": None}), limit=96) is None
    assert collapse_warning(history({"accuracy": 0.9}, {"accuracy": None}), limit=96) is None
    for last in (1.0, 0.0):  # a window without all its five says nothing
        few = [{**HEALTHY, "accuracy": value} for value in (1.0, None, None, None, last)]
        assert collapse_warning([*history({"accuracy": 1.0}), *few], limit=96) is None
    assert collapse_warning([*history({"accuracy": 1.0}), *few, *history({"accuracy": 0.4})], limit=96)


def test_the_start_is_the_runs_and_not_that_after_a_resume():
    """A length that has halved twice: only who knows the first steps can tell. Each kind of warning comes once."""
    short = [{**step, "step": 2 * COLLAPSE_WINDOW + i} for i, step in enumerate(history({"mean_length": 7.5}))]
    for earlier, told in (([], 0), (history({}, {"mean_length": 15.0}), 1)):
        watch = Watch(96, 0.0, torch.float32, earlier)
        lines = [line for step in short for line in watch.see(step)]
        assert len(lines) == told
        assert all("the run looks collapsed: mean_length went from 30.00 to 7.50" in line for line in lines)


@pytest.mark.parametrize(("kls", "words"), [
    ([0.002] * 5 + [0.0031] * 5, "forward_kl went from 0.002 to 0.0031"), ([0.1] * 5 + [0.149] * 5, None),
    ([0.1] * 5, None), ([0.0] * 9, None), ([1e-8] * 5 + [9e-4] * 5, None), ([None] * 3 + [0.1] * 9, None),
    ([None] * 9, None), ([None] * 3 + [0.1] * 5 + [1.6], "to 0.4"),
])  # fmt: skip
def test_a_student_that_leaves_its_teacher_is_told_beside_a_collapse(kls, words):
    """Also where the first steps of a run have no such column; and a collapse after it is told as well."""
    watch, lines = Watch(96, 0.0, torch.float32, []), []
    for step, kl in enumerate(kls):
        lines += watch.see({**HEALTHY, "step": step} | ({} if kl is None else {"forward_kl": kl}))
    assert len(lines) == (words is not None) and (not lines or words in lines[0])
    lines = [line for step in history({"accuracy": 0.0}) for line in watch.see({**step, "step": 20, "forward_kl": 0.1})]
    assert len([line for line in lines if "accuracy went from 0.60" in line]) == (len(kls) > 4)


def test_a_run_of_twenty_tokens_that_stands_twice_is_a_repetition():
    assert not repeats(list(range(300)))
    assert repeats([*range(100), *range(20, 40)])
    assert not repeats([*range(100), *range(20, 39)])  # nineteen
    assert repeats([7] * 21) and not repeats([7] * 20) and not repeats([])
    far = [*range(50), *range(1000, 1170), *range(20)]  # the first stands before the last 200
    assert len(far) == 240 and not repeats(far)


def test_the_samplers_gap_by_hand_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 2 * 4 * 3)  # two tokens of three logits
    student_MD, head_VD, ids_M = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([2, 0, 1])
    told = [Response([2, 0], True, [-0.5, -1.0]), Response([1], True, [-2.0])]
    logp_M = (student_MD @ head_VD.T).log_softmax(dim=-1)[range(3), ids_M]
    gap_M = metrics.sampler_gap(student_MD, head_VD, ids_M, told)
    torch.testing.assert_close(gap_M, (torch.tensor([-0.5, -1.0, -2.0]) - logp_M).abs())
    assert metrics.sampler_gap(student_MD, head_VD, ids_M, [told[0], Response([1], True)]) is None


@pytest.mark.parametrize(("gaps", "dtype", "bound"), [
    ([1.7e-7, 9.9e-6], torch.float32, None), ([1.7e-7, 1.1e-5], torch.float32, "1.0e-05"),
    ([None, None], torch.float32, None), ([1.1e-5], torch.float32, "1.0e-05"),
    ([2.0e-3, 5.9e-3], torch.bfloat16, None), ([2.0e-3, 2.5e-3, 6.1e-3], torch.bfloat16, "6.0e-03"),
    ([4.9e-2], torch.bfloat16, None), ([3.0e-2, 5.1e-2], torch.bfloat16, "5.0e-02"),
    ([5.1e-2], torch.float16, "5.0e-02"), ([1.1e-5, None], torch.float32, None),
    ([None, 1.1e-5], torch.float32, "1.0e-05"), ([None, 2.0e-3, 6.1e-3], torch.bfloat16, "6.0e-03"),
])  # fmt: skip
def test_a_gap_that_rounding_does_not_explain_is_told(gaps, dtype, bound):
    line = gap_warning([{} if gap is None else {"sampler_gap": gap} for gap in gaps], dtype)
    assert line is None if bound is None else f"sampler_gap {gaps[-1]:.1e} is above {bound}: the engine" in line


@pytest.mark.parametrize(("dropout", "said"), [(0.0, ["warning: after step 2: sampler_gap"]), (0.05, [])])
def test_the_gap_is_told_once_and_not_where_the_trainer_drops_out(dropout, said):
    watch = Watch(96, dropout, torch.float32, [])
    gaps = enumerate([1e-7, 1e-3, 1e-7, 1e-3])
    lines = [line for step, gap in gaps for line in watch.see({**HEALTHY, "step": step, "sampler_gap": gap})]
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said


def test_rollouts_by_hand():
    ended, cut = {"finish_reason": "eos", "correct": True}, {"finish_reason": "length", "correct": None}
    expected = {"accuracy": 1.0, "mean_length": 4.0, "eos_rate": 0.5, "repetition": 0.5}
    assert rollout_metrics([{**ended, "tokens": 3}, {**cut, "tokens": 5}], [False, True]) == expected


def test_metrics_by_tenth_of_the_solution():
    seen = Observer(torch.device("cpu"))
    M = torch.arange(4.0)
    r = torch.tensor([0.05, 0.09, 0.55, 0.999])
    for _ in range(2):
        seen.see([0], [4], r, torch.ones(4), scores_of(4, loss=M, clipped_mass=M / 10, forward_kl=M / 5), None)
    row = seen.means()
    assert row["divergence"] == 1.5 and row["weight"] == 1.0 and seen.broken == []
    assert (row["clipped_mass"], row["forward_kl"]) == pytest.approx((0.15, 0.3))
    assert row["by_decile"]["divergence"] == [0.5, None, None, None, None, 2.0, None, None, None, 3.0]


@pytest.mark.parametrize(("token", "row"), [(0, 7), (2, 7), (3, 2)])
def test_one_token_that_is_no_number_marks_its_row(token, row):
    seen, values = Observer(torch.device("cpu")), torch.ones(4)
    values[token] = float("nan")
    seen.see([7, 2], [3, 1], torch.full((4,), 0.5), torch.ones(4), scores_of(4, loss=values), None)
    assert seen.broken == [row]
    seen.see([7, 2], [3, 1], torch.full((4,), 0.5), values.double(), scores_of(4), None)  # a weight that is none
    assert seen.broken == [row, row]
