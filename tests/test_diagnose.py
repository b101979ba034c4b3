import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

import diagnose
from diagnose import (
    PRESETS,
    DiagnoseConfig,
    candidates,
    continuations,
    diagnostic_prompt,
    draw_problems,
    dropout_hooks,
    dropout_scores,
    first_boxed,
    labels,
    parse_config,
    pick_positions,
    read_rows,
    run_phase,
    spines,
    teacher_pass,
    truncated_entropy,
    uncertainty,
    valid_tokens,
)
from model import load_model, load_tokenizer, response_hidden
from problems import InputError, Problem, load_problems
from rollout import Rollout
from teacher import student_prompt

SMALL = {"num_problems": [4], "children": 2, "rollouts": 2, "min_spacing": 2, "context": 96, "spine_tokens": 72}


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu"), load_tokenizer("tiny"), load_problems("tiny:heldout", False)[:4]


@pytest.fixture(scope="module")
def small_run(tiny, tmp_path_factory):
    """Phases A to E on four problems, and their files."""
    run, config = tmp_path_factory.mktemp("run"), DiagnoseConfig(**SMALL, batch_size=64)
    return run, config, all_phases(*tiny, config, run)


def all_phases(model, tokenizer, problems, config, run):
    A = spines(model, tokenizer, problems, config, run / "A.jsonl")
    B = teacher_pass(model, tokenizer, problems, A, config, run / "B.jsonl")
    C = candidates(tokenizer, A, B, config, run / "C.jsonl")
    D = dropout_scores(model, tokenizer, problems, A, C, config, run / "D.jsonl")
    return A, B, C, D, continuations(model, tokenizer, problems, A, C, config, run / "E.jsonl")


# ---------------------------------------------------------------------------------------------------------------
# B: tokens and entropy


def test_valid_tokens_of_each_family(checkpoint):
    model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    valid = valid_tokens(model, tokenizer)
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    assert not valid[tokenizer.all_special_ids].any()
    assert not valid[tokenizer.convert_tokens_to_ids(["<think>", "</think>"])].any()
    for i, text in texts.items():
        if not text.strip() or "\ufffd" in text:
            assert not valid[i], text
        if text.isascii() and text.isalnum():
            assert valid[i], text
    assert any("\ufffd" in text for text in texts.values()) and any(text.isspace() for text in texts.values())


def test_ids_behind_the_tokenizer_and_eos_ids_are_not_valid(tiny):
    model, tokenizer, _ = tiny
    wide = load_model("tiny", device="cpu")
    wide.resize_token_embeddings(len(tokenizer) + 5, mean_resizing=False)
    digit = tokenizer.convert_tokens_to_ids("7")
    assert not valid_tokens(wide, tokenizer)[len(tokenizer) :].any()
    assert valid_tokens(model, tokenizer)[[digit, tokenizer.convert_tokens_to_ids("\\boxed{")]].all()
    wide.generation_config.eos_token_id = [tokenizer.eos_token_id, digit]
    assert not valid_tokens(wide, tokenizer)[digit]


def test_truncated_entropy_by_hand():
    """Valid .4 .2 .1 of .4 .2 .1 .3: the top two renormalise to 2/3, 1/3, their probabilities do not."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    valid = torch.tensor([True, False, True, True])
    h, top, ids = truncated_entropy(p, valid, 2)
    assert h.item() == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)), abs=1e-6)
    assert top[0].tolist() == pytest.approx([0.4, 0.2]) and ids[0].tolist() == [0, 2]
    h, top, _ = truncated_entropy(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), valid, 2)
    assert h.item() == 0.0  # all mass on an invalid token: no entropy, and no nan


@torch.no_grad()
def direct_probabilities(model, prompt, ids, t):
    """[1, V] by the whole model on prompt + response, read where response token t is predicted."""
    return model(input_ids=torch.tensor([[*prompt, *ids]])).logits[:, len(prompt) - 1 + t].softmax(dim=-1)


def test_teacher_pass_scores_each_position_in_both_contexts(tiny, small_run, tmp_path):
    """Eight tokens of each context, so that a swapped prompt or a shifted position cannot go unseen."""
    model, tokenizer, problems = tiny
    A, config = small_run[2][0], DiagnoseConfig(**(SMALL | {"children": 8}))
    valid, differs = valid_tokens(model, tokenizer), []
    for row in teacher_pass(model, tokenizer, problems, A, config, tmp_path / "B.jsonl"):
        problem, ids = problems[row["problem"]], A[row["problem"]]["ids"]
        assert len(row["h_trunc"]) == len(row["teacher_ids"]) == len(row["student_ids"]) == len(ids)
        for t in (0, len(ids) // 2, len(ids) - 1):
            teacher = direct_probabilities(model, diagnostic_prompt(tokenizer, problem), ids, t)
            student = direct_probabilities(model, student_prompt(tokenizer, problem), ids, t)
            h, p, top = truncated_entropy(teacher, valid, config.top_valid)
            assert row["h_trunc"][t] == pytest.approx(h.item(), rel=1e-3, abs=1e-7)
            assert row["teacher_p"][t] == pytest.approx(p[0, :8].tolist(), rel=1e-3)
            assert row["teacher_ids"][t] == top[0, :8].tolist()
            own = truncated_entropy(student, valid, config.top_valid)[2][0, :8].tolist()
            assert row["student_ids"][t] == own
            differs.append(own != row["teacher_ids"][t])
    assert sum(differs) >= len(differs) / 2  # else the contexts could be exchanged


# ---------------------------------------------------------------------------------------------------------------
# C: positions


def config_c(**overrides):
    return DiagnoseConfig(**{"candidates": 5, "min_spacing": 3, **overrides})


def test_positions_are_the_most_uncertain_and_spaced():
    h, p = [0.1, 0.9, 0.8, 0.2, 0.7, 0.6, 0.5, 0.0], [[0.5, 0.4]] * 8
    assert pick_positions(h, p, 8, config_c()) == [1, 4, 7]  # 2 is too near to 1, 5 and 6 to 4
    assert pick_positions(h, p, 8, config_c(candidates=2)) == [1, 4]
    assert pick_positions(h, p, 4, config_c()) == [1]
    assert pick_positions(h, p, 8, config_c(min_spacing=64)) == [1]


def test_positions_need_a_plausible_second_token():
    h = [3.0, 2.0, 1.0]
    assert pick_positions(h, [[0.90, 0.089], [0.19, 0.019], [0.15, 0.02]], 3, config_c(min_spacing=1)) == [2]
    assert pick_positions(h, [[0.90, 0.0901], [0.19, 0.020], [0.15, 0.02]], 3, config_c(min_spacing=1)) == [0, 1, 2]


def test_nothing_behind_the_box(tiny):
    _, tokenizer, _ = tiny
    ids = tokenizer.encode("3+8=11;\\boxed{11}", add_special_tokens=False)
    t = first_boxed(tokenizer, ids)
    assert tokenizer.decode(ids[: t - 1]) == "3+8=11;" and tokenizer.decode(ids[:t]) == "3+8=11;\\boxed{"
    assert first_boxed(tokenizer, ids[: t - 1]) == t  # len + 1: no box, every position may be picked


# ---------------------------------------------------------------------------------------------------------------
# D: dropout


def test_uncertainty_by_hand_and_at_its_limits():
    one = torch.tensor([0.5, 0.5]).expand(5, 1, 2)
    same = uncertainty(one)
    assert same["entropy"].item() == pytest.approx(math.log(2)) and abs(same["mutual_information"].item()) < 1e-6
    assert same["log_kappa"].item() > 50  # no variance: a precision without bound
    opposed = uncertainty(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert opposed["mutual_information"].item() == pytest.approx(math.log(2), abs=1e-6)
    # mu = 1/2, unbiased variance 1/2 each: kappa = 0.5 / 1 - 1 < 0, floored at 1e-6.
    assert opposed["log_kappa"].item() == pytest.approx(math.log(1e-6), abs=1e-4)


def test_moment_matching_recovers_a_dirichlet():
    draw = np.random.default_rng(0).dirichlet(20.0 * np.array([0.6, 0.3, 0.1]), size=(4000, 1))
    assert uncertainty(torch.tensor(draw))["log_kappa"].exp().item() == pytest.approx(20.0, rel=0.05)


def test_hooks_drop_in_the_last_layers_only_and_are_always_removed(checkpoint):
    model = load_model(checkpoint, device="cpu").eval()
    ids, seen = [[5, 6, 7, 8]], []
    watch = model.get_decoder().layers[0].register_forward_hook(lambda m, i, output: seen.append(output))
    plain = response_hidden(model, ids, ids)
    generator = torch.Generator().manual_seed(0)
    with dropout_hooks(model, 1, 0.5, generator):
        dropped = response_hidden(model, ids, ids)
    first = [out[0] if isinstance(out, tuple) else out for out in seen]
    assert torch.equal(first[0], first[1]) and not torch.allclose(plain, dropped)
    with pytest.raises(RuntimeError, match="stop"), dropout_hooks(model, 2, 0.5, generator):
        raise RuntimeError("stop")
    assert torch.equal(response_hidden(model, ids, ids), plain)
    watch.remove()
    assert all(not layer._forward_hooks for layer in model.get_decoder().layers)


def test_hooked_dropout_keeps_the_mean(checkpoint):
    model = load_model(checkpoint, device="cpu").eval()
    layer = model.get_decoder().layers[-1]
    outputs = []
    with dropout_hooks(model, 1, 0.1, torch.Generator().manual_seed(0)):
        watch = layer.register_forward_hook(lambda m, i, output: outputs.append(output))
        response_hidden(model, [[5, 6]] * 2000, [[7]] * 2000)
        watch.remove()
    hidden = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert (hidden == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    model_out = []
    watch = layer.register_forward_hook(lambda m, i, output: model_out.append(output))
    response_hidden(model, [[5, 6]], [[7]])
    watch.remove()
    plain = model_out[0][0] if isinstance(model_out[0], tuple) else model_out[0]
    assert (hidden.mean(dim=0) - plain[0]).abs().max() < 0.05 * plain.abs().max()


def test_dropout_is_read_at_the_candidate_in_the_teachers_context(tiny, small_run, tmp_path):
    """Without dropout all passes agree: the entropy is the teacher's over the full vocabulary."""
    model, tokenizer, problems = tiny
    A, C = small_run[2][0], small_run[2][2]
    rows = dropout_scores(*tiny, A, C, DiagnoseConfig(**SMALL, dropout=0.0), tmp_path / "D.jsonl")
    assert sum(len(row["positions"]) for row in rows) > 4
    for row in rows:
        prompt, ids = diagnostic_prompt(tokenizer, problems[row["problem"]]), A[row["problem"]]["ids"]
        for t, entropy in zip(row["positions"], row["entropy"], strict=True):
            p = direct_probabilities(model, prompt, ids, t)
            assert entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------
# The phases together


def test_phases_on_the_embedded_model(small_run, tiny):
    _, config, (A, B, C, D, E) = small_run
    _, tokenizer, problems = tiny
    assert [row["problem"] for row in A] == [0, 1, 2, 3]
    kept = {row["problem"] for row in A if row["correct"]}
    assert kept == {row["problem"] for row in B} == {row["problem"] for row in C}
    for row in C:
        spine = A[row["problem"]]
        positions = [c["position"] for c in row["candidates"]]
        assert all(b - a >= config.min_spacing for a, b in pairwise(positions))
        for c in row["candidates"]:
            assert "\\boxed" not in tokenizer.decode(spine["ids"][: c["position"]])
            assert len(set(c["teacher"])) == 2 and c["teacher_p"] == sorted(c["teacher_p"], reverse=True)
    groups = {}
    for row in E:
        groups.setdefault((row["problem"], row["position"], row["token"]), []).append(row["sample"])
    for (_, _, token), samples in groups.items():
        budget = config.rollouts * (config.children if token is None else 1)
        assert sorted(samples) == list(range(budget))
    for row in E:
        start = tokenizer.decode(A[row["problem"]]["ids"][: row["position"]])
        forced = "" if row["token"] is None else tokenizer.decode([row["token"]])
        assert row["text"].startswith(start + forced)
        room = config.context - len(student_prompt(tokenizer, problems[row["problem"]])) - row["position"]
        assert row["tokens"] <= room - (row["token"] is not None)
    assert all(np.isfinite(row[name]).all() for row in D for name in ("entropy", "mutual_information", "log_kappa"))


def test_a_run_taken_up_at_any_phase_equals_an_unbroken_one(small_run, tiny, tmp_path):
    """Files cut within each phase, the last line torn, and another batch size: the same rows."""
    run, _, whole = small_run
    for name in "ABCDE":
        lines = (run / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[: len(lines) // 2]) + lines[-1][:9])
    again = all_phases(*tiny, DiagnoseConfig(**SMALL, batch_size=23), tmp_path)
    assert again == whole


def forbidden(*args, **settings):
    pytest.fail("computed again, or by the wrong engine")


def test_finished_phases_touch_no_model(small_run, tiny, monkeypatch):
    run, config, whole = small_run
    monkeypatch.setitem(diagnose.ENGINES, "generate", forbidden)
    monkeypatch.setattr(diagnose, "response_hidden", forbidden)
    assert all_phases(*tiny, config, run) == whole


def test_engines_sample_the_same_rows(small_run, tiny, tmp_path, monkeypatch):
    _, _, (A, _, C, _, E) = small_run
    monkeypatch.setitem(diagnose.ENGINES, "generate", forbidden)
    config = DiagnoseConfig(**SMALL, engine="continuous", batch_size=64)
    assert spines(*tiny, config, tmp_path / "A.jsonl") == A
    assert continuations(*tiny, A, C[:1], config, tmp_path / "E.jsonl") == [row for row in E if row["problem"] == 0]


def test_a_lack_of_gpu_memory_is_one_line_and_the_run_goes_on(small_run, tiny, tmp_path, monkeypatch):
    _, config, (A, *_) = small_run
    small = DiagnoseConfig(**SMALL, batch_size=2)
    calls, real = [], diagnose.ENGINES["generate"]

    def scarce(*args, **settings):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **settings)

    monkeypatch.setitem(diagnose.ENGINES, "generate", scarce)
    with pytest.raises(InputError, match=r"A\.jsonl: out of GPU memory .*--batch_size"):
        spines(*tiny, small, tmp_path / "A.jsonl")
    assert read_rows(tmp_path / "A.jsonl") == A[:2]
    assert spines(*tiny, config, tmp_path / "A.jsonl") == A and len(calls) == 3


def test_spines_without_a_box_are_sampled_again(tiny, tmp_path, monkeypatch):
    model, tokenizer, problems = tiny
    boxed = tokenizer.encode("\\boxed{" + problems[1].answer + "}", add_special_tokens=False)
    calls = []

    def fake(model, tokenizer, prompts, keys, *, temperature, **settings):
        calls.append((temperature, [key[-1] for key in keys]))
        plain = [boxed if temperature or key[-1] != 1 else boxed[:1] for key in keys]
        return Rollout(prompts, plain, [True] * len(prompts))

    monkeypatch.setitem(diagnose.ENGINES, "generate", fake)
    rows = spines(model, tokenizer, problems, DiagnoseConfig(**SMALL), tmp_path / "A.jsonl")
    assert calls == [(0.0, [0, 1, 2, 3]), (0.7, [1])]
    assert [row["temperature"] for row in rows] == [0.0, 0.7, 0.0, 0.0] and rows[1]["correct"]


def test_wrong_spines_stay_out_unless_asked_for(tiny, tmp_path):
    model, tokenizer, problems = tiny
    ids = tokenizer.encode("3+8=11;\\boxed{11}", add_special_tokens=False)
    rows = [{"problem": 0, "ids": ids, "correct": False}, {"problem": 1, "ids": ids, "correct": True}]
    for asked, expected in ((False, [1]), (True, [0, 1])):
        config = DiagnoseConfig(**SMALL, incorrect_spines=asked)
        found = teacher_pass(model, tokenizer, problems, rows, config, tmp_path / f"{asked}.jsonl")
        assert [row["problem"] for row in found] == expected


def test_continuations_have_streams_of_their_own_and_end_at_the_context(small_run, tiny, tmp_path, monkeypatch):
    """Each row is cut at its own last position of the context, not at its batch's."""
    _, config, (A, _, C, _, E) = small_run
    keys, seven = [], tiny[1].convert_tokens_to_ids("7")

    def fake(model, tokenizer, prompts, stream_keys, *, max_new_tokens, **settings):
        keys.extend(stream_keys)
        assert max_new_tokens == config.context - min(map(len, prompts))
        return Rollout(prompts, [[seven] * max_new_tokens for _ in prompts], [False] * len(prompts))

    monkeypatch.setitem(diagnose.ENGINES, "generate", fake)
    rows = continuations(*tiny, A, C, config, tmp_path / "E.jsonl")
    assert len(set(keys)) == len(keys) == len(E)
    for row in rows:
        prefix = len(student_prompt(tiny[1], tiny[2][row["problem"]])) + row["position"] + (row["token"] is not None)
        assert prefix + row["tokens"] == config.context


def test_labels_of_every_arm_by_hand():
    config = DiagnoseConfig(children=2, rollouts=2, diversity_children=2)
    found = {"position": 3, "teacher": [7, 8], "student": [8, 9], "length": 10, "spine_correct": True}
    right = {7: [1, 1], 8: [1, 1], 9: [0, 1], None: [0, 1, 0, 0]}
    E = [{"problem": 0, "position": 3, "token": v, "sample": n, "correct": bool(x)}
         for v, xs in right.items() for n, x in enumerate(xs)]  # fmt: skip
    D = [{"problem": 0, "positions": [3], "entropy": [0.5], "mutual_information": [0.1], "log_kappa": [2.0]}]
    (row,) = labels([{"problem": 0, "candidates": [found]}], D, E[::-1], config)
    assert row["viability"] == {"teacher": [1.0, 1.0], "student": [1.0, 0.5], "unforced": [0.5, 0.0]}
    assert row["label"] == {"teacher": "diversity", "student": "gray", "unforced": "gray"}
    assert (row["entropy"], row["log_kappa"]) == (0.5, 2.0)


# ---------------------------------------------------------------------------------------------------------------
# The run


def test_defaults_are_the_papers_protocol():
    config = parse_config(["--preset", "qwen3-4b"])
    assert config.num_problems == [24, 30, 30] and len(config.data) == 3 and config.model == "Qwen/Qwen3-4B"
    assert config.engine == "continuous"  # 32K tokens a row: nothing padded
    expected = {
        "context": 32768, "spine_tokens": 16384, "fallback_temperature": 0.7, "top_valid": 16, "candidates": 5,
        "min_p2": 0.02, "min_ratio": 0.10, "min_spacing": 64, "children": 3, "dropout_passes": 5, "dropout": 0.1,
        "dropout_layers": 4, "rollouts": 6, "temperature": 1.0, "top_p": 0.95, "diversity_viability": 0.75,
        "diversity_children": 2, "uncertain_viability": 0.40, "bootstraps": 2000, "bootstrap_seed": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert parse_config([]).children == PRESETS["tiny"]["children"]
    assert parse_config(["--children", "3"]).children == 3  # a flag wins over the preset


def test_problems_are_drawn_without_replacement_from_each_source(tmp_path):
    for name in "ab":
        lines = [json.dumps({"problem": f"{name}{i}", "answer": str(i)}) + "\n" for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    drawn = draw_problems(DiagnoseConfig(data=data, num_problems=[9, 4]))
    texts = [problem.problem for problem in drawn]
    assert sorted(texts[:9]) == [f"a{i}" for i in range(9)] and len(set(texts[9:])) == 4
    assert all(text[0] == "b" for text in texts[9:]) and isinstance(drawn[0], Problem)
    assert draw_problems(DiagnoseConfig(data=data, num_problems=[9, 4])) == drawn
    with pytest.raises(InputError, match="has 9 problems"):
        draw_problems(DiagnoseConfig(data=data, num_problems=[9, 10]))


@pytest.mark.parametrize(
    "flags",
    ["--preset no", "--children 1", "--top_valid 1", "--engine vllm", "--grader_name exact", "--dropout 0",
     "--dropout 1", "--min_p2 2", "--temperature -1", "--dropout_passes 1", "--data a b", "--fallback_temperature 0"],
)  # fmt: skip
def test_mistakes_are_named(flags):
    with pytest.raises(InputError, match=flags.split()[0] if flags != "--data a b" else "--num_problems"):
        parse_config(flags.split())


def test_a_file_that_is_not_ours_is_named(tmp_path):
    path = tmp_path / "A.jsonl"
    path.write_text("not json\n{}\n")
    with pytest.raises(InputError, match=r"A\.jsonl"):
        read_rows(path)


def test_run_phase_keeps_the_order_of_the_jobs(tmp_path):
    done = []

    def work(jobs):
        done.extend(jobs)
        return [{"a": a, "b": b, "sum": a + (b or 0)} for a, b in jobs]

    path, fields = tmp_path / "x.jsonl", ("a", "b")
    run_phase(path, fields, [(1, None), (2, 5)], work, 1)
    rows = run_phase(path, fields, [(3, 4), (2, 5), (1, None)], work, 10)
    assert [row["sum"] for row in rows] == [7, 7, 1] and done == [(1, None), (2, 5), (3, 4)]


class BracedGrader:
    """Knows that \\{15\\} is 15, as no other grader does."""

    name, stopped = "braced", 0

    def __init__(self, version):
        self.version = version

    def match(self, given, gold):
        return given is not None and given == gold.strip("\\{}")

    def close(self):
        pass


def test_the_grader_is_chosen_by_the_answers_used_and_pinned(tiny, tmp_path, monkeypatch):
    data, run, asked = tmp_path / "data.jsonl", tmp_path / "run", []
    lines = [json.dumps({"problem": p.problem, "answer": f"\\{{{p.answer}\\}}"}) + "\n" for p in tiny[2]]
    data.write_text("".join(lines))

    def grader(version):
        return lambda name, latex: asked.append((name, latex)) or BracedGrader(version)

    flags = f"diagnose.py --data {data} --num_problems 4 --rollouts 1 --context 100 --output_dir {run}"
    monkeypatch.setattr(sys, "argv", flags.split())
    monkeypatch.setattr(diagnose, "make_grader", grader("1.0"))
    monkeypatch.setattr(diagnose, "report", lambda *rest: "")
    diagnose.main()
    assert asked == [("auto", True)]
    assert json.loads((run / "config.json").read_text())["config"]["grader"] == "braced 1.0"
    assert all(row["correct"] for row in read_rows(run / "A_spines.jsonl"))
    assert any(row["correct"] for row in read_rows(run / "E_continuations.jsonl"))
    monkeypatch.setattr(sys, "argv", [*flags.split(), "--resume"])
    diagnose.main()  # the same grader: goes on
    monkeypatch.setattr(diagnose, "make_grader", grader("2.0"))
    with pytest.raises(InputError, match=r"--grader braced 1\.0"):
        diagnose.main()
