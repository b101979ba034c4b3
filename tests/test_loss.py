import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import loss as losses
import model
from errors import InputError
from loss import METHODS, LossOptions, entropy, method_loss

PAPERS = ("opsd", "pwopsd", "eopd", "reopold")  # METHODS grows where experiments/study/rules.py is imported
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
CALLS = {
    "opsd": ("opsd", {}), "opsd_noclip": ("opsd", {"clip": None}),
    "opsd_jsd": ("opsd", {"clip": None, "beta": 0.5}), "opsd_reverse_kl": ("opsd", {"clip": None, "beta": 1.0}),
    "pwopsd_moderate": ("pwopsd", {}), "pwopsd_aggressive": ("pwopsd", {"schedule": "aggressive"}),
    "pwopsd_noclip": ("pwopsd", {"clip": None}), "pwopsd_global": ("pwopsd", {"reduction": "token_mean"}),
    "uniform_per_sequence": ("opsd", {"reduction": "sequence_mean"}), "eopd": ("eopd", {}),
    "reopold_phase1": ("reopold", {"step": 0}), "reopold_phase2": ("reopold", {"step": 60}),
}  # fmt: skip
EVERY_LOSS = [
    *CALLS.values(), ("pwopsd", {"beta": 0.3, "clip": 0.2}), ("opsd", {"beta": 1.0}),
    ("reopold", {"reduction": "sequence_mean", "step": 60}),
    ("eopd", {"schedule": "sharp", "reduction": "weighted_mean"}),
]  # fmt: skip


def random_case(seed=0, lengths=(6, 3, 1), V=11, D=None):
    """Student and teacher values [B, T, D or V], response ids and mask; what lies behind a row's end is garbage."""
    draw = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    student = 2 * torch.randn(B, T, D or V, generator=draw)
    teacher = 2 * torch.randn(B, T, D or V, generator=draw)
    ids = torch.randint(V, (B, T), generator=draw)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return student, teacher, ids, mask


def scores_of(length, **given):
    """TokenScores of `length` tokens: the values given, 0 for the others."""
    values = {name: torch.zeros(length) for name in losses.TokenScores.__dataclass_fields__}
    return losses.TokenScores(**values | {name: torch.as_tensor(value) for name, value in given.items()})


def method_loss_from_hidden(
    name, student_BTD, teacher_BTD, head_VD, ids_BT, mask_BT, chunk_tokens=None, step=0, teacher_head=None, **overrides
):
    """`method_loss` made of what training uses: `score_tokens_from_hidden` on the valid tokens' hidden states."""
    options = losses._options(overrides)
    method = losses.resolve_method(name, options)
    lengths = losses.valid_lengths(mask_BT, ids_BT, student_BTD, teacher_BTD)
    scores = losses.score_tokens_from_hidden(
        method, student_BTD[mask_BT], teacher_BTD[mask_BT], head_VD, head_VD if teacher_head is None else teacher_head,
        ids_BT[mask_BT], options, chunk_tokens,
    )  # fmt: skip
    return losses.reduce_tokens(method, scores, lengths, step, options)


def value_and_gradient(name, student, teacher, ids, mask, **options):
    student = student.detach().clone().requires_grad_()
    loss = method_loss(name, student, teacher, ids, mask, **options)
    loss.backward()
    return loss.item(), student.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", range(len(GOLDEN)))
@pytest.mark.parametrize("key", CALLS)
def test_golden(case, key, device):
    golden, (name, options) = GOLDEN[case], CALLS[key]
    assert golden["expected"].keys() <= CALLS.keys()  # all are used
    student, teacher, ids = (
        torch.tensor(golden[name], device=device) for name in ("student_logits", "teacher_logits", "response_ids")
    )
    loss, gradient = value_and_gradient(name, student, teacher, ids, ids != -100, **options)
    assert loss == pytest.approx(golden["expected"][key]["loss"], abs=1e-5)
    torch.testing.assert_close(gradient.cpu(), torch.tensor(golden["expected"][key]["grad"]), atol=1e-6, rtol=0)


P_T, P_S, MIXED = (0.75, 0.25), (0.5, 0.5), (0.575, 0.425)  # MIXED = .3 P_T + .7 P_S


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("options", "expected"), [
    ({"clip": None}, kl(P_T, P_S)),  # entries .75 log 1.5 = .30410 and .25 log .5 = -.17329
    ({"clip": 0.05}, 0.05 + 0.25 * math.log(0.5)),  # negative, and rightly so
    ({"clip": None, "beta": 0.3}, 0.3 * kl(P_T, MIXED) + 0.7 * kl(P_S, MIXED)),  # .02795; .3 and .7 exchanged .029
])  # fmt: skip
def test_eq1_and_the_jsd_by_hand(options, expected):
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    loss = method_loss("opsd", student, teacher, ids, mask, temperature=1.0, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def slow_divergence(student, teacher, temperature, clip):
    """Eq. (1) for one token with Python's numbers."""
    s = [math.exp(x / temperature) for x in student.tolist()]
    t = [math.exp(x / temperature) for x in teacher.tolist()]
    p, q = [x / sum(s) for x in s], [x / sum(t) for x in t]
    return sum(min(b * math.log(b / a), clip) for a, b in zip(p, q, strict=True))


def test_eq1_and_eq6_against_a_slow_twin():
    student, teacher, ids, mask = random_case()
    lengths = mask.sum(1).tolist()
    token_total, sequence_total = 0.0, 0.0
    for i, L in enumerate(lengths):
        row = 0.0
        for t in range(1, L + 1):
            d = slow_divergence(student[i, t - 1], teacher[i, t - 1], 1.1, 0.05)
            w = 0.25 + 0.75 / (1 + math.exp(-((t - 0.5) / L - 0.30) / 0.10))
            token_total += d
            row += w * d
        sequence_total += row / L
    opsd = method_loss("opsd", student, teacher, ids, mask)
    pwopsd = method_loss("pwopsd", student, teacher, ids, mask)
    assert opsd.item() == pytest.approx(token_total / sum(lengths), abs=1e-5)
    assert pwopsd.item() == pytest.approx(sequence_total / len(lengths), abs=1e-5)


def test_clipped_gradient_in_closed_form():
    """With A the unclipped entries: T dL/dlogit_i = P_A p_S(i) - p_T(i) 1[i in A]: a clipped entry is pushed DOWN."""
    student, teacher, ids, mask = random_case(lengths=(1,), V=9)
    _, gradient = value_and_gradient("opsd", student, teacher, ids, mask)
    p_S, p_T = (student[0, 0] / 1.1).softmax(-1), (teacher[0, 0] / 1.1).softmax(-1)
    in_A = p_T * (p_T / p_S).log() <= 0.05
    assert 0 < in_A.sum() < 9
    expected = (p_T[in_A].sum() * p_S - p_T * in_A) / 1.1
    torch.testing.assert_close(gradient[0, 0], expected, atol=1e-6, rtol=0)
    assert (gradient[0, 0][~in_A] > 0).all()


@pytest.mark.parametrize("name, options", [("opsd", {}), ("pwopsd", {}), ("opsd", {"beta": 0.5}), ("reopold", {})])
def test_equal_contexts_give_exactly_zero(name, options):
    student, _, ids, mask = random_case()
    loss, gradient = value_and_gradient(name, student, student, ids, mask, **options)
    assert loss == 0.0 if options == {} else abs(loss) < 1e-7  # JSD rounds where it forms the mixture
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("name, options", EVERY_LOSS)
def test_padding_has_no_value_and_no_gradient(name, options):
    student, teacher, ids, mask = random_case()
    loss, gradient = value_and_gradient(name, student, teacher, ids, mask, **options)
    assert gradient[~mask].abs().max() == 0 and gradient[mask].abs().max() > 0
    other, changed = student.clone(), teacher.clone()
    other[~mask], changed[~mask] = 1e4, -1e4
    assert value_and_gradient(name, other, changed, ids, mask, **options)[0] == loss
    wider = [torch.nn.functional.pad(x, (0, 0, 0, 2)) for x in (student, teacher)]
    wider += [torch.nn.functional.pad(x, (0, 2)) for x in (ids, mask)]
    loss_wider, _ = value_and_gradient(name, *wider, **options)
    assert loss_wider == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize("name, options", EVERY_LOSS)
@pytest.mark.parametrize("chunk_tokens", [4, 100])
@pytest.mark.parametrize("train_head", [False, True])
def test_chunks_of_hidden_states_equal_whole_logits(name, options, chunk_tokens, train_head):
    student, teacher, ids, mask = random_case(D=5)
    draw = torch.Generator().manual_seed(1)
    head = torch.randn(11, 5, generator=draw)
    results = []
    for chunked in (False, True):
        hidden, weight = student.clone().requires_grad_(), head.clone().requires_grad_(train_head)
        if chunked:
            more = {"chunk_tokens": chunk_tokens, "teacher_head": head, **options}
            loss = method_loss_from_hidden(name, hidden, teacher, weight, ids, mask, **more)
        else:
            loss = method_loss(name, hidden @ weight.T, teacher @ head.T, ids, mask, **options)
        (3.0 * loss).backward()
        results.append([loss.detach(), hidden.grad, *([weight.grad] if train_head else [])])
        assert train_head or weight.grad is None
    for whole, in_chunks in zip(*results, strict=True):
        torch.testing.assert_close(in_chunks, whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("train_head", [False, True])
def test_no_chunk_is_larger_than_asked(name, train_head, monkeypatch):
    """Computed once, with its gradient, or again for it where the head is trained; by default what CHUNK_BYTES hold."""
    student, teacher, ids, mask = random_case(D=5)  # 10 valid tokens, V = 11
    head, sizes, linear = torch.randn(11, 5).requires_grad_(train_head), [], model.F.linear

    def spy(states, weight):
        sizes.append(len(states))
        return linear(states, weight)

    monkeypatch.setattr(model.F, "linear", spy)
    for chunk_tokens, chunk_bytes, expected in ((4, 2**30, [4, 4, 2]), (None, 3 * 4 * 11, [3, 3, 3, 1])):
        monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", chunk_bytes)
        sizes.clear()
        more = {"chunk_tokens": chunk_tokens, "teacher_head": head.detach()}
        value = method_loss_from_hidden(name, student.requires_grad_(), teacher, head, ids, mask, **more)
        forward = [size for size in expected for _ in ("student", "teacher")]
        assert sizes == forward
        value.backward()
        assert sorted(sizes) == sorted((2 if train_head else 1) * forward)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_and_a_trained_head_give_the_same_value_and_gradient(name, dtype):
    """Two ways to the same numbers: bit for bit in value, up to the dtype's rounding in the gradient."""
    student, teacher, ids, mask = random_case(D=5)
    student, teacher, head = student.to(dtype), teacher.to(dtype), torch.randn(11, 5).to(dtype)
    values, gradients = [], []
    for train_head in (False, True):
        hidden, weight = student.clone().requires_grad_(), head.clone().requires_grad_(train_head)
        value = method_loss_from_hidden(name, hidden, teacher, weight, ids, mask, chunk_tokens=4, teacher_head=head)
        value.backward()
        values.append(value.item())
        gradients.append(hidden.grad)
    with torch.no_grad():
        values.append(method_loss_from_hidden(name, student, teacher, head, ids, mask, chunk_tokens=4).item())
    assert values[0] == values[1] == values[2]
    tolerance = 1e-6 if dtype == torch.float32 else 0.02 * gradients[1].abs().max().item()
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=0)


def test_eopd_by_hand():
    """On-policy the ratio is 1, so l_opd = -A; the gate opens on the teacher's entropy alone."""
    student, teacher, ids, mask = random_case(lengths=(4, 2), V=30)
    log_s, log_t = (student[mask] / 1.1).log_softmax(-1), (teacher[mask] / 1.1).log_softmax(-1)
    expected = 0.0
    for m, y in enumerate(ids[mask].tolist()):
        expected += -(log_t[m, y] - log_s[m, y]).item()
        if entropy(log_t)[m] > 0.8:
            top = sorted(range(30), key=lambda j: -log_t[m, j].item())[:16]
            mass = sum(math.exp(log_t[m, j]) for j in top)
            q = {j: math.exp(log_t[m, j]) / mass for j in top}
            expected += sum(q[j] * (math.log(q[j]) - log_s[m, j].item()) for j in top)
    loss = method_loss("eopd", student, teacher, ids, mask)
    assert loss.item() == pytest.approx(expected / 6, abs=1e-5)


def test_reopold_by_hand():
    student, teacher, ids, mask = random_case()
    log_s, log_t = (student[mask] / 1.1).log_softmax(-1), (teacher[mask] / 1.1).log_softmax(-1)
    floor = math.log(0.1) / 0.9
    assert floor == pytest.approx(-2.5584, abs=1e-4)
    y = ids[mask]
    R = [(log_t[m, y[m]] - log_s[m, y[m]]).item() for m in range(len(y))]
    early = [m for m in range(len(y)) if R[m] >= floor]
    assert 0 < len(early) < len(y)
    expected = -sum(R[m] * log_s[m, y[m]].item() for m in early) / len(early)
    assert method_loss("reopold", student, teacher, ids, mask, step=49).item() == pytest.approx(expected, abs=1e-5)
    of_batch = [losses.resolve_method("reopold", LossOptions(schedule=name)).over_batch for name in (None, "uniform")]
    assert of_batch == [True, False]
    H = entropy(log_s)
    late = [m for m in range(len(y)) if H[m] >= torch.quantile(H, 0.8)]
    expected = -sum(max(R[m], floor) * log_s[m, y[m]].item() for m in late) / len(late)
    assert method_loss("reopold", student, teacher, ids, mask, step=50).item() == pytest.approx(expected, abs=1e-5)


def test_a_mask_without_a_token_is_no_loss_and_not_nan():
    student, teacher, ids, mask = random_case()
    teacher = teacher.scatter(-1, ids[..., None], -100.0)  # every R is below the floor
    assert method_loss("reopold", student, teacher, ids, mask, step=0).item() == 0.0


def test_weights_whose_sum_is_below_zero_divide_by_it(monkeypatch):
    student, teacher, ids, mask = random_case()
    for name, sign in (("up", 1.0), ("down", -1.0)):
        weigh = lambda r_M, *_, sign=sign: sign * (0.5 + r_M)  # noqa: E731
        monkeypatch.setitem(METHODS, name, losses.Method(losses.policy_gradient, weigh, losses.weighted_mean))
    up, down = (method_loss(name, student, teacher, ids, mask).item() for name in ("up", "down"))
    assert up == pytest.approx(down, rel=1e-6) and up != 0.0


def test_a_weight_may_look_at_the_rows_outcome(monkeypatch):
    student, teacher, ids, mask = random_case(lengths=(4, 2, 3))
    right = lambda r_M, scores, *_: torch.nan_to_num(scores.correct, nan=2.0) * scores.finished  # noqa: E731
    monkeypatch.setitem(METHODS, "right", losses.Method(losses.clipped_divergence, right, losses.weighted_mean))
    given = method_loss("right", student, teacher, ids, mask, correct=[True, None, True], finished=[False, True, True])
    of_1, of_2 = (method_loss("opsd", *(x[i : i + 1] for x in (student, teacher, ids, mask))) for i in (1, 2))
    torch.testing.assert_close(given, (2 * 2 * of_1 + 3 * of_2) / 7)


def test_no_gradient_reaches_the_teachers_hidden_states_or_head():
    student, teacher, ids, mask = random_case(D=5)
    heads = torch.randn(2, 11, 5).requires_grad_()
    for name in PAPERS:
        hidden = student.requires_grad_(), teacher.requires_grad_()
        method_loss_from_hidden(name, *hidden, heads[0].detach(), ids, mask, teacher_head=heads[1]).backward()
        assert teacher.grad is None and heads.grad is None and student.grad.abs().max() > 0


@pytest.mark.parametrize(("name", "options", "word"), [
    ("opsd", {"temperature": 0.0}, "distill_temperature"), ("opsd", {"clip": -1.0}, "tau_clip"),
    ("opsd", {"w_min": 0.5}, "uniform"), ("reopold", {"tau": 0.5}, "add --schedule"),
])  # fmt: skip
def test_mistakes_are_named(name, options, word):
    with pytest.raises(InputError, match=word):
        method_loss(name, *random_case(), **options)


KL_MV = partial(F.kl_div, log_target=True)
WRONG_SHAPES = {  # what a fork may well write; each would broadcast
    "a batch mean": losses.Method(lambda s, t, *_: KL_MV(s, t, reduction="batchmean"), "uniform", losses.token_mean),
    "a column": losses.Method(
        lambda s, t, *_: KL_MV(s, t, reduction="none").sum(-1, keepdim=True), "uniform", losses.token_mean
    ),
    "a weight that is one number": losses.Method(
        losses.clipped_divergence, lambda r_M, *_: r_M.mean(), losses.token_mean
    ),
    "a plain number": losses.Method(losses.clipped_divergence, lambda *_: 0.5, losses.token_mean),
    "a weight a row": losses.Method(
        losses.clipped_divergence, lambda r_M, _, L, *__: r_M.new_ones(len(L), 1), losses.token_mean
    ),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_a_row_must_give_one_number_a_token(case, monkeypatch):
    """The first has the right value, and through hidden states a gradient too small by the size of a chunk."""
    monkeypatch.setitem(METHODS, "wrong", WRONG_SHAPES[case])
    logits_BTV = torch.randn(2, 2, 3, 7)
    with pytest.raises(InputError, match="not one number a token"):
        method_loss("wrong", *logits_BTV, torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool))


def test_masks_that_make_no_sense_are_refused():
    student, teacher, ids, mask = random_case()
    holes, empty = mask.clone(), mask.clone()
    holes[0, 1] = empty[2] = False
    for wrong in (holes, empty, mask.long(), mask[:, :2]):
        with pytest.raises(InputError, match="mask"):
            method_loss("opsd", student, teacher, ids, wrong)
    with pytest.raises(InputError, match="shape"):
        method_loss("opsd", student, teacher[..., :5], ids, mask)


def test_defaults_are_the_papers():
    options = LossOptions()
    assert (options.distill_temperature, options.tau_clip, options.beta) == (1.1, 0.05, 0.0)
    assert (losses.ENTROPY_GATE, losses.GATE_TOP_K, losses.RATIO_CLIP) == (0.8, 16, 0.2)
    assert (losses.REWARD_LAMBDA, options.switch_step, losses.ENTROPY_QUANTILE) == (0.1, 50, 0.2)


def test_clipped_mass_by_hand():
    """p_T = (.9, .1), p_S = (.5, .5): entries .529 and -.161. Only a loss that clips tells what it cuts."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    kl = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)  # whatever the clip and the loss
    for name, clip, mass in (("opsd", 0.2, 0.9), ("opsd", 1.0, 0.0), ("opsd", math.inf, 0.0), ("eopd", 0.2, 0.0)):
        scores = losses.score_tokens(METHODS[name], student, teacher, torch.tensor([0]), LossOptions(tau_clip=clip))
        assert scores.clipped_mass.item() == pytest.approx(mass)
        assert scores.forward_kl.item() == pytest.approx(kl)
    wrapped = losses.Method(
        lambda *given: 0.5 * losses.clipped_divergence(*given), "uniform", losses.token_mean, clips=True
    )
    scores = losses.score_tokens(wrapped, student, teacher, torch.tensor([0]), LossOptions(tau_clip=0.2))
    assert scores.clipped_mass.item() == pytest.approx(0.9)
    reverse = LossOptions(tau_clip=0.2, beta=1.0)  # entries -.294 and .805
    scores = losses.score_tokens(METHODS["opsd"], student, teacher, torch.tensor([0]), reverse)
    assert (scores.clipped_mass.item(), scores.forward_kl.item()) == pytest.approx((0.1, kl))


def test_scores_by_hand():
    student, teacher = torch.tensor([[0.25] * 4]).log(), torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    scores = losses.score_tokens(METHODS["opsd"], student, teacher, torch.tensor([1]), LossOptions())
    assert scores.student_logprob.item() == pytest.approx(math.log(0.25))
    assert scores.teacher_logprob.item() == pytest.approx(math.log(0.5))
    assert scores.student_entropy.item() == pytest.approx(2.0 * math.log(2))
    assert scores.teacher_entropy.item() == pytest.approx(1.75 * math.log(2))


@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_half_precision_states_are_not_rounded(device):
    """The product of bfloat16 numbers in float32; its gradients are those of the bfloat16 product."""
    torch.manual_seed(0)
    V = 2 * model.HEAD_ROWS + 30
    x_MD, head_VD = (torch.randn(n, 64).to(device, torch.bfloat16).requires_grad_() for n in (5, V))
    logits_MV = model.head_logits(x_MD, head_VD)
    assert logits_MV.dtype == torch.float32
    torch.testing.assert_close(logits_MV, x_MD.float() @ head_VD.float().T)
    half_MV = logits_MV.detach().bfloat16()
    assert not torch.equal(logits_MV, half_MV.float())
    assert torch.equal(losses.log_probabilities(half_MV, 1.1), (half_MV.float() / 1.1).log_softmax(dim=-1))
    up_MV = torch.randn(5, V, device=device) / V**0.5
    (to_x,) = torch.autograd.grad(model.head_logits(x_MD, head_VD.detach()), x_MD, up_MV)  # the head is frozen
    gradient_MV = up_MV if device == "cpu" else up_MV.bfloat16()  # a GPU multiplies in the states' precision
    torch.testing.assert_close(to_x, (gradient_MV.float() @ head_VD.float()).bfloat16())
    found = torch.autograd.grad(logits_MV, (x_MD, head_VD), up_MV)
    wanted = torch.autograd.grad(torch.nn.functional.linear(x_MD, head_VD), (x_MD, head_VD), up_MV.bfloat16())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak of the resident memory")
def test_the_resident_memory_does_not_grow_with_the_chunks():
    """A chunk's tensors go back to the system: of a heap, small results between them would keep .1 GiB a chunk."""
    code = """
import re, torch
from loss import LossOptions, resolve_method, score_tokens_from_hidden
def gib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20
torch.set_num_threads(1)
M, V, D = 1024, 151_936, 8
student_MD, teacher_MD = torch.randn(M, D, requires_grad=True), torch.randn(M, D)
head_VD, ids_M, options = torch.randn(V, D), torch.randint(V, (M,)), LossOptions()
open("/proc/self/clear_refs", "w").write("5")
start = gib("VmRSS")
method = resolve_method("opsd", options)
score_tokens_from_hidden(method, student_MD, teacher_MD, head_VD, head_VD, ids_M, options).loss.mean().backward()
print(gib("VmHWM") - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 0.8
