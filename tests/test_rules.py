import math
import runpy

import pytest
import torch
from test_loss import method_loss_from_hidden, random_case, scores_of

import loss
import train
from experiments.study import rules
from loss import LossOptions, TokenScores, method_loss
from weighting import SCHEDULES, position_weight, relative_position

ON_OPSD = ["prefix", "suffix", "skip", "iw_opd", "dash", "scgate"]
WITHIN_A_ROW = [*ON_OPSD, "dial"]
TOKEN_CLIPS = {"opsd_token_clip": rules.token_clip, "opsd_scaled_clip": rules.scaled_clip}
ROWS = [*WITHIN_A_ROW, "tip", "beta_opsd", "opd", "iw_opd_pg", "tip_reverse", *TOKEN_CLIPS]


def weigh(name, scores, lengths, **numbers):
    """A rule's weights, [M]."""
    if name in SCHEDULES:
        return SCHEDULES[name](relative_position(lengths), **numbers)
    return loss.METHODS[name].token_weight(relative_position(lengths), scores, lengths, 0, LossOptions(), **numbers)


def random_scores(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(len(TokenScores.__dataclass_fields__), sum(lengths), generator=draw)
    scores = dict(zip(TokenScores.__dataclass_fields__, values, strict=True))
    scores["student_logprob"] *= -0.03  # probabilities of .97 to 1, on both sides of SCGate's threshold
    scores["teacher_logprob"] *= -1.0
    return scores


def log(*chances):
    return torch.tensor(chances).log()


GAPS = {"student_logprob": [-1.0, -4.0, -2.0, -5.0], "teacher_logprob": [-2.0, -1.0, -2.0, -1.0]}  # |A| = 1, 3, 0, 4
SURE = {"student_logprob": log(0.2, 0.98, 0.999, 1.0)}
# |p_T - p_S| = .4, .1, .3, 0, .18; times |log p_T / p_S| = .64, .07, .12, 0, .41
APART = {"teacher_logprob": log(0.5, 0.1, 0.9, 0.3, 0.02), "student_logprob": log(0.1, 0.2, 0.6, 0.3, 0.2)}
# h = 0, 1, 0, .515 (cut at .97), d = 0, 0, 1, .1; s = 0, 1, 1, .564
CONFIDENT = {"student_entropy": [0.0, 1.0, 0.0, 0.5]}
UNSURE = CONFIDENT | {"loss": [0.0, 0.0, 2.0, 0.2]}
LN3 = math.log(3)


@pytest.mark.parametrize(("name", "lengths", "given", "numbers", "weights"), [
    ("prefix", [10], {}, {}, [1] * 3 + [0] * 7),
    ("suffix", [10], {}, {}, [0] * 7 + [1] * 3),
    ("skip", [5, 2], {}, {}, [0, 0, 0, 1, 1, 0, 0]),
    ("skip", [5, 2], {}, {"first": 1}, [0, 1, 1, 1, 1, 0, 1]),
    ("iw_opd", [4], GAPS, {}, [1.5, 1.4375, 1.25, 1.25]),  # what lies before is 0, 1/8, 1/2, 1/2
    ("iw_opd", [4], GAPS, {"gamma": 1.0}, [2.0, 1.875, 1.5, 1.5]),
    ("iw_opd", [4], GAPS, {"gamma": 0.0}, [1.0] * 4),
    ("iw_opd", [3], {}, {}, [1.5] * 3),  # the two agree everywhere
    ("dash", [3], {"loss": [-LN3, LN3, 0.0]}, {"kappa": 1.0}, [1.0, 1.75, 1.4375]),  # lambda = 3/4, 1/4
    ("dash", [3], {"loss": [-LN3, LN3, 0.0]}, {"kappa": 0.0}, [1.0, 1.5, 1.75]),  # lambda = 1/2 everywhere
    ("dash", [6], {"loss": [0.0] * 5 + [1.0]}, {"kappa": 1e4}, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    ("scgate", [4], SURE, {}, [1, 1, 0, 0]),
    ("scgate", [4], SURE, {"most": 0.5}, [1, 0, 0, 0]),
    ("tip", [4], UNSURE, {}, [0, 1, 1, 0]),
    ("tip", [4], UNSURE, {"share": 0.75}, [0, 1, 1, 1]),
    ("tip", [4], {"student_entropy": [1.0, 4.0, 1.0, 2.5], "loss": [-2.0, -2.0, 0.0, -1.8]}, {}, [0, 1, 1, 0]),
    ("tip", [4], CONFIDENT, {}, [0, 1, 0, 1]),  # by entropy alone the third, confident and wrong, goes
    ("tip", [4], {}, {}, [1, 1, 0, 0]),  # nothing to choose by: the first ones
    ("tip", [4, 3, 1], {"loss": [0.0, 9.0, 5.0, 1.0, 7.0, 8.0, 6.0, 2.0]}, {}, [0, 1, 1, 0, 0, 1, 0, 0]),  # of each row
    ("dial", [5], APART, {}, [1, 0, 1, 0, 0]),  # two of five are kept
    ("dial", [5], APART, {"b": 0.5}, [1, 0, 0, 0, 1]),
])  # fmt: skip
def test_weights_by_hand(name, lengths, given, numbers, weights):
    assert weigh(name, scores_of(sum(lengths), **given), lengths, **numbers).tolist() == pytest.approx(weights)


def test_weights_by_position_at_their_limits():
    r, moderate = relative_position([10]), SCHEDULES["moderate"](relative_position([52]))
    assert torch.equal(rules.suffix(r), position_weight(r, w_min=0.0, tau=0.7, s=1e-6).round())
    for r in map(relative_position, ([length] for length in range(1, 60))):
        assert torch.equal(rules.suffix(r), rules.prefix(r).flip(0)), len(r)
    torch.testing.assert_close(weigh("by_index", None, [52, 10]), torch.cat([moderate, moderate[:10]]))


def test_shuffled():
    """The study's main control: each row holds Moderate's weights of its own, in a random order."""
    lengths, scores = [12, 1, 30], scores_of(43)
    torch.manual_seed(5)
    first, second = weigh("shuffled", scores, lengths), weigh("shuffled", scores, lengths)
    moderate = SCHEDULES["moderate"](relative_position(lengths))
    for weights in (first, second):
        for row, unshuffled in zip(weights.split(lengths), moderate.split(lengths), strict=True):
            assert torch.equal(row.sort().values, unshuffled)  # Moderate rises: sorted, they are its own
    for one, other in ((first, moderate), (second, moderate), (first, second)):
        rows = zip(one.split(lengths), other.split(lengths), strict=True)
        assert [torch.equal(*pair) for pair in rows] == [False, True, False]
    torch.manual_seed(5)
    assert torch.equal(weigh("shuffled", scores, lengths), first)
    assert loss.METHODS["shuffled"].reduction is loss.METHODS["pwopsd"].reduction  # so that the places alone differ


@pytest.mark.parametrize("name", [*WITHIN_A_ROW, "tip", "shuffled"])
def test_weights_are_non_negative_float32_without_gradient_and_most_those_of_a_row_alone(name):
    lengths = [7, 4, 1]
    values = random_scores(lengths)
    values["loss"].requires_grad_()
    weight = weigh(name, TokenScores(**values), lengths)
    assert weight.shape == (12,) and weight.dtype == torch.float32
    assert not weight.requires_grad and weight.min() >= 0 and weight.unique().numel() > 1
    parts = zip(*(value.split(lengths) for value in values.values()), strict=True)
    if name in WITHIN_A_ROW:
        alone = [weigh(name, TokenScores(*row), [length]) for row, length in zip(parts, lengths, strict=True)]
        assert torch.equal(weight, torch.cat(alone))


def test_what_each_row_adds_up_and_is_divided_by():
    """A rule that drops tokens by those kept, TIP's rows look beyond their own, and the clip is Eq. (1)'s rows'."""
    drop = {"prefix", "suffix", "skip", "scgate", "tip", "tip_reverse", "dial"}
    sampled, others = {"opd", "iw_opd_pg", "dial"}, {"tip_reverse", "beta_opsd", *TOKEN_CLIPS}
    for name in ROWS:
        row, on_eq_1 = loss.METHODS[name], name not in sampled | others
        assert (row.token_loss is loss.clipped_divergence) == row.clips == on_eq_1, name
        assert (row.token_loss is rules.sampled_token) == (name in sampled), name
        assert row.reduction is (loss.weighted_mean if name in drop else loss.token_mean), name
        assert row.over_batch is name.startswith("tip"), name


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_from_hidden_states(name):
    """Registered: known by name, and in chunks of hidden states what it is on whole logits, value and gradient."""
    student, teacher, ids, mask = random_case(D=5)
    head = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))
    plain, chunked = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = method_loss(name, plain @ head.T, teacher @ head.T, ids, mask, clip=2.0)
    given = method_loss_from_hidden(name, chunked, teacher, head, ids, mask, clip=2.0, chunk_tokens=5)
    expected.backward()
    given.backward()
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(chunked.grad, plain.grad)
    assert plain.grad.any() and not plain.grad[~mask].any()


def gradient_times_temperature(name, student, teacher, ids, **options):
    """T_distill d(loss)/d(student logits) of one token, [V]."""
    student = student.clone().requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    value = method_loss(name, student[None, None], teacher[None, None], ids, mask, temperature=1.1, **options)
    value.backward()
    return value.item(), 1.1 * student.grad


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0, None])
@pytest.mark.parametrize("seed", range(4))
def test_closed_forms_of_the_losses(clip, seed):
    """The value, and T_distill times the gradient; q_w is proportional to p_S^(1-w) p_T^w, y the first token."""
    student, teacher = 2 * torch.randn(2, 9, generator=torch.Generator().manual_seed(seed))
    p_S, p_T = (student / 1.1).softmax(-1), (teacher / 1.1).softmax(-1)
    half = p_S**0.5 * p_T**0.5 / (p_S**0.5 * p_T**0.5).sum()
    tau, y, A = math.inf if clip is None else clip, torch.eye(9)[0], (p_T[0] / p_S[0]).log()
    d = (p_T * (p_T / p_S).log()).sum()

    def by_entry(q):
        entries = q * (q / p_S).log()
        kept = q * (entries <= tau)
        return entries.clamp(max=tau).sum(), kept.sum() * p_S - kept

    closed = {
        "opsd": by_entry(p_T),
        "opsd_token_clip": (d.clamp(max=tau), (p_S - p_T) * (d <= tau)),
        "opsd_scaled_clip": (d.clamp(max=tau), (p_S - p_T) * (tau / d).clamp(max=1.0)),
        "opd": (-A * p_S[0].log(), -A * (y - p_S)),
        "tip_reverse": ((p_S * (p_S / p_T).log()).sum(), p_S * ((p_S / p_T).log() - (p_S * (p_S / p_T).log()).sum())),
        "beta_opsd": by_entry(half),
    }
    for name, (value, gradient) in closed.items():
        every = {"schedule": "uniform"} if name == "tip_reverse" else {}  # it drops a row's only token
        ids = torch.zeros(1, 1, dtype=torch.long)
        given = gradient_times_temperature(name, student, teacher, ids, clip=clip, **every)
        assert given[0] == pytest.approx(value.item(), abs=1e-5), name
        torch.testing.assert_close(given[1], gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", TOKEN_CLIPS)
@pytest.mark.parametrize("clip", [1e-6, 0.05, math.inf])
@pytest.mark.parametrize("offset", [1e-8, 0.0, -1e-8])
def test_a_divergence_around_zero_passes_unchanged(name, clip, offset):
    """Rounding leaves the sum a little off 0, on either side: the factor stays 1 and the gradient finite."""
    teacher = torch.tensor([[0.0]])  # one entry, log p = 0: d = -log p_S
    student = torch.tensor([[-offset]], requires_grad=True)
    value = TOKEN_CLIPS[name](student, teacher, torch.zeros(1, dtype=torch.long), LossOptions(tau_clip=clip))
    value.sum().backward()
    assert value.item() == pytest.approx(offset, abs=1e-12)
    assert student.grad.item() == -1.0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", TOKEN_CLIPS)
def test_no_clip_is_opsd_without_a_clip(name, beta):
    case = random_case()
    torch.testing.assert_close(*(method_loss(row, *case, clip=None, beta=beta) for row in (name, "opsd")))


def test_the_file_is_train_with_its_rows_known(monkeypatch):
    """`python -m experiments.study.rules` registers the rows and is train.py."""
    known = []
    monkeypatch.setattr(loss, "METHODS", {name: row for name, row in loss.METHODS.items() if name not in ROWS})
    monkeypatch.setattr(train, "cli", lambda: known.append(set(ROWS) <= loss.METHODS.keys()))
    runpy.run_path(rules.__file__, run_name="__main__")
    assert known == [True]
