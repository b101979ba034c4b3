import json
import math
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from forked import run_ranks, script

import diagnose
from diagnose import DiagnoseConfig, Diagnosis
from errors import InputError
from grading import ExactGrader
from model import response_hidden
from problems import Problem, load_problems
from rollout import Response
from runtime import loading
from runtime.engines import GenerateEngine
from runtime.loading import load_model, load_tokenizer
from runtime.records import append_rows
from teacher import student_prompt
from viability import LabelRule, labels, truncated_entropy, uncertainty

SMALL = diagnose.PRESETS["tiny"] | {"num_problems": [4], "rollouts": 2}


class FixedEngine:
    """Answers by a function of (prompts, keys, settings) instead of a model."""

    def __init__(self, answer):
        self.answer = answer

    def sample(self, prompts, keys, settings, on_finished=None):
        return [Response(ids, finished=True) for ids in self.answer(prompts, keys, settings)]

    def close(self):
        pass


def forbidden(*args, **settings):
    pytest.fail("computed again, or by the wrong engine")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of four problems with right spines of the embedded model, of which no phase is done."""
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    config, folder = DiagnoseConfig(**SMALL), tmp_path_factory.mktemp("choice")
    run = Diagnosis(model, tokenizer, GenerateEngine(model, tokenizer), ExactGrader(), [], config, folder)
    some = replace(run, problems=load_problems("tiny:heldout", False)[:16])
    right = [row["problem"] for row in diagnose.spines(some) if row["correct"]]
    return replace(run, problems=[some.problems[i] for i in right[:4]])


@pytest.fixture
def fresh(tiny, tmp_path):
    """The same run in a folder of its own; returns a function of what differs."""
    return lambda **changes: replace(tiny, folder=tmp_path, **changes)


@pytest.fixture(scope="module")
def small_run(tiny, tmp_path_factory):
    """Phases A to E on four problems, and their files."""
    run = replace(tiny, folder=tmp_path_factory.mktemp("run"))
    return run, all_phases(run)


def all_phases(run):
    A = diagnose.spines(run)
    B = diagnose.teacher_pass(run, A)
    C = diagnose.candidates(run, A, B)
    D = diagnose.dropout_scores(run, A, C)
    return A, B, C, D, diagnose.continuations(run, A, C)


def test_valid_tokens_of_each_family(checkpoint):
    model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    valid = diagnose.valid_tokens(model, tokenizer)
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
    model, tokenizer = tiny.model, tiny.tokenizer
    wide = load_model("tiny", device="cpu")
    wide.resize_token_embeddings(len(tokenizer) + 5, mean_resizing=False)
    digit = tokenizer.convert_tokens_to_ids("7")
    assert not diagnose.valid_tokens(wide, tokenizer)[len(tokenizer) :].any()
    assert diagnose.valid_tokens(model, tokenizer)[[digit, tokenizer.convert_tokens_to_ids("\\boxed{")]].all()
    wide.generation_config.eos_token_id = [tokenizer.eos_token_id, digit]
    assert not diagnose.valid_tokens(wide, tokenizer)[digit]


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


def test_teacher_pass_scores_each_position_in_both_contexts(small_run, fresh):
    """Eight tokens of each context, so that a swapped prompt or a shifted position cannot go unseen."""
    run, (A, *_) = fresh(config=DiagnoseConfig(**SMALL | {"children": 8})), small_run[1]
    valid, differs = diagnose.valid_tokens(run.model, run.tokenizer), []
    for row in diagnose.teacher_pass(run, A):
        i, ids = row["problem"], A[row["problem"]]["ids"]
        assert len(row["h_trunc"]) == len(row["teacher_ids"]) == len(row["student_ids"]) == len(ids)
        for t in (0, len(ids) // 2, len(ids) - 1):
            teacher = direct_probabilities(run.model, run.teacher_prompt(i), ids, t)
            student = direct_probabilities(run.model, student_prompt(run.tokenizer, run.problems[i]), ids, t)
            h, p, top = truncated_entropy(teacher, valid, diagnose.TOP_VALID)
            assert row["h_trunc"][t] == pytest.approx(h.item(), rel=1e-3, abs=1e-7)
            assert row["teacher_p"][t] == pytest.approx(p[0, :8].tolist(), rel=1e-3)
            assert row["teacher_ids"][t] == top[0, :8].tolist()
            own = truncated_entropy(student, valid, diagnose.TOP_VALID)[2][0, :8].tolist()
            assert row["student_ids"][t] == own
            differs.append(own != row["teacher_ids"][t])
    assert sum(differs) >= len(differs) / 2  # else the contexts could be exchanged


def test_positions_are_the_most_uncertain_spaced_and_have_a_plausible_second_token():
    """2 is too near to 1, 5 and 6 to 4."""
    h, p = [0.1, 0.9, 0.8, 0.2, 0.7, 0.6, 0.5, 0.0], [[0.5, 0.4]] * 8
    for end, changes, expected in ((8, {}, [1, 4, 7]), (8, {"candidates": 2}, [1, 4]), (4, {}, [1]),
                                   (8, {"min_spacing": 64}, [1])):  # fmt: skip
        assert diagnose.pick_positions(h, p, end, DiagnoseConfig(**{"min_spacing": 3, **changes})) == expected
    config = DiagnoseConfig(min_spacing=1)
    for p, expected in (([[0.90, 0.089], [0.19, 0.019], [0.15, 0.02]], [2]),
                        ([[0.90, 0.0901], [0.19, 0.020], [0.15, 0.02]], [0, 1, 2])):  # fmt: skip
        assert diagnose.pick_positions([3.0, 2.0, 1.0], p, 3, config) == expected


def test_nothing_behind_the_box(tiny):
    tokenizer = tiny.tokenizer
    ids = tokenizer.encode("3+8=11;\\boxed{11}", add_special_tokens=False)
    t = diagnose.first_boxed(tokenizer, ids)
    assert tokenizer.decode(ids[: t - 1]) == "3+8=11;" and tokenizer.decode(ids[:t]) == "3+8=11;\\boxed{"
    assert diagnose.first_boxed(tokenizer, ids[: t - 1]) == t  # len + 1: no box, every position may be picked


def test_uncertainty_by_hand_and_at_its_limits():
    one = torch.tensor([0.5, 0.5]).expand(5, 1, 2)
    same = uncertainty(one)
    assert same["entropy"].item() == pytest.approx(math.log(2)) and abs(same["mutual_information"].item()) < 1e-6
    assert same["log_kappa"].item() > 50  # no variance: a precision without bound
    apart = uncertainty(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]))  # mu = (.7, .3), unbiased variance .08 each
    assert apart["log_kappa"].exp().item() == pytest.approx(2 * 0.21 / 0.16 - 1)
    opposed = uncertainty(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert opposed["mutual_information"].item() == pytest.approx(math.log(2), abs=1e-6)
    # mu = 1/2, unbiased variance 1/2 each: kappa = 0.5 / 1 - 1 < 0, floored at 1e-6.
    assert opposed["log_kappa"].item() == pytest.approx(math.log(1e-6), abs=1e-4)
    draw = np.random.default_rng(0).dirichlet(20.0 * np.array([0.6, 0.3, 0.1]), size=(4000, 1))
    assert uncertainty(torch.tensor(draw))["log_kappa"].exp().item() == pytest.approx(20.0, rel=0.05)


def test_hooks_drop_in_the_last_layers_only_keep_the_mean_and_are_always_removed(checkpoint):
    model = load_model(checkpoint, device="cpu").eval()
    layers, ids, seen = model.get_decoder().layers, ([[5, 6]] * 2000, [[7]] * 2000), []
    generator = torch.Generator().manual_seed(0)

    def outputs() -> list[torch.Tensor]:
        """Of the first and the last block."""
        watches = [layers[n].register_forward_hook(lambda block, inputs, output: seen.append(output)) for n in (0, -1)]
        response_hidden(model, *ids)
        for watch in watches:
            watch.remove()
        return seen[-2:]

    plain = outputs()
    with diagnose.dropout_hooks(model, 1, 0.1, generator):
        dropped = outputs()
    assert torch.equal(plain[0], dropped[0])
    assert (dropped[1] == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (dropped[1].mean(dim=0) - plain[1][0]).abs().max() < 0.05 * plain[1].abs().max()
    with pytest.raises(RuntimeError, match="stop"), diagnose.dropout_hooks(model, 2, 0.5, generator):
        raise RuntimeError("stop")
    assert all(torch.equal(*pair) for pair in zip(outputs(), plain, strict=True))


def test_dropout_is_read_at_the_candidate_in_the_teachers_context(small_run, fresh, monkeypatch):
    """Without dropout all passes agree: the entropy is the teacher's over the full vocabulary."""
    monkeypatch.setattr(diagnose, "DROPOUT", 0.0)
    run, (A, _, C, *_) = fresh(), small_run[1]
    rows = diagnose.dropout_scores(run, A, C)
    assert sum(len(row["positions"]) for row in rows) > 4
    for row in rows:
        prompt, ids = run.teacher_prompt(row["problem"]), A[row["problem"]]["ids"]
        for t, entropy in zip(row["positions"], row["entropy"], strict=True):
            p = direct_probabilities(run.model, prompt, ids, t)
            assert entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-3)


def test_phases_on_the_embedded_model(small_run):
    """What each phase covers: all problems, their right spines, and as many continuations as each arm needs."""
    run, (A, B, C, D, E) = small_run
    decode, found, budgets = run.tokenizer.decode, [], Counter()
    kept = [row["problem"] for row in A if row["correct"]]
    assert len(A) == 4 and kept == [row["problem"] for row in B] == [row["problem"] for row in C]
    for row in C:
        for c in row["candidates"]:
            found.append((row["problem"], c["position"]))
            assert "\\boxed" not in decode(A[row["problem"]]["ids"][: c["position"]])
            for token in {*c["teacher"], *c["student"], None}:
                budgets[*found[-1], token] = run.config.rollouts * (run.config.children if token is None else 1)
    assert Counter((row["problem"], row["position"], row["token"]) for row in E) == budgets
    for row in E:
        start = decode(A[row["problem"]]["ids"][: row["position"]])
        assert row["text"].startswith(start + ("" if row["token"] is None else decode([row["token"]])))
    assert [(row["problem"], t) for row in D for t in row["positions"]] == found
    assert all(np.isfinite(row[name]).all() for row in D for name in ("entropy", "mutual_information", "log_kappa"))


def test_a_run_taken_up_at_any_phase_equals_an_unbroken_one(small_run, fresh, monkeypatch):
    """Files cut within each phase, the last line torn, and another batch size; a second time nothing is left to do."""
    whole, run = small_run[1], fresh(config=DiagnoseConfig(**SMALL | {"batch_size": 90}))
    for path in small_run[0].folder.iterdir():
        lines = path.read_text().splitlines(keepends=True)
        (run.folder / path.name).write_text("".join(lines[: len(lines) // 2]) + lines[-1][:9])
    assert len(list(run.folder.iterdir())) == 5 and all_phases(run) == whole
    monkeypatch.setattr(diagnose, "response_hidden", forbidden)
    assert all_phases(replace(run, engine=FixedEngine(forbidden))) == whole


@pytest.mark.slow
def test_two_ranks_leave_the_rows_of_one(tmp_path, call):
    """Five problems, three on one rank and two on the other; the same rows in the same files, and the same table."""
    flags = "--num_problems 5 --rollouts 1 --batch_size 16 --device cpu --seed 1 --output_dir"
    outputs = run_ranks(tmp_path, script, "diagnose.py", [*flags.split(), str(tmp_path / "two")], ranks=2)
    assert "".join(outputs).count("problems, ") == 1  # one rank speaks
    call(diagnose, *flags.split(), tmp_path / "one")
    one, two = ({path.name for path in (tmp_path / run).iterdir()} for run in ("one", "two"))
    assert one == two and len(one) == 9
    for name in ("A_spines", "B_teacher", "C_candidates", "D_dropout", "E_continuations", "F_labels"):
        rows = [sorted((tmp_path / run / f"{name}.jsonl").read_text().splitlines()) for run in ("one", "two")]
        assert rows[0] == rows[1] and rows[0], name
    assert (tmp_path / "one/table1.json").read_text() == (tmp_path / "two/table1.json").read_text()
    assert json.loads((tmp_path / "two/config.json").read_text())["ranks"] == 2


def test_spines_without_a_box_are_sampled_again_and_wrong_ones_stay_out(fresh):
    class Strict(ExactGrader):
        def match(self, answer, gold):
            return answer.strip() == gold  # is not asked about what has no box

    run, calls = replace(fresh(), grader=Strict()), []
    boxed = run.tokenizer.encode("\\boxed{" + run.problems[1].answer + "}", add_special_tokens=False)

    def answer(prompts, keys, settings):
        calls.append((settings.temperature, [key[-1] for key in keys]))
        return [boxed if settings.temperature or key[-1] != 1 else boxed[:1] for key in keys]

    rows = diagnose.spines(replace(run, engine=FixedEngine(answer)))
    assert calls == [(0.0, [0, 1, 2, 3]), (0.7, [1])]
    assert [row["temperature"] for row in rows] == [0.0, 0.7, 0.0, 0.0] and rows[1]["correct"]
    right = [row["problem"] for row in rows if row["correct"]]
    assert len(right) < 4 and [row["problem"] for row in diagnose.teacher_pass(run, rows)] == right


@pytest.mark.parametrize("thinks", [True, False])
def test_student_thinking_reaches_the_prompts_of_phases_a_b_and_e(fresh, checkpoint, family, thinks, monkeypatch):
    """With each family's template: the student's context is sampled from and scored; the teacher's stays as it is."""
    model, tokenizer, sampled, scored = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint), [], []
    config = DiagnoseConfig(student_thinking=thinks, rollouts=1, min_spacing=1, context=400)

    def answer(prompts, keys, settings):
        sampled.extend(prompts)
        return [tokenizer.encode("2 \\boxed{2}", add_special_tokens=False)] * len(prompts)

    def spy(model, prompts, responses):
        scored.extend(prompts)
        return response_hidden(model, prompts, responses)

    for name, value in (("response_hidden", spy), ("MIN_P2", 0.0), ("MIN_RATIO", 0.0)):
        monkeypatch.setattr(diagnose, name, value)
    parts = {"model": model, "tokenizer": tokenizer, "engine": FixedEngine(answer)}
    all_phases(fresh(config=config, problems=[Problem("1+1?", "", "2")], **parts))
    texts = [tokenizer.decode(ids) for ids in [*sampled, *scored]]
    student = [text for text in texts if "privileged" not in text]
    assert len(sampled) > 3 and len(student) == len(sampled) + 1 and len(texts) > len(student)
    closed = {"qwen3": "<think>\n\n</think>", "olmo3": "<think></think>", "llama": "<think>\n</think>"}[family]
    assert all((closed in text) == (not thinks) for text in student), student[0]
    assert not any("</think>" in text for text in texts if "privileged" in text)


def test_continuations_have_streams_of_their_own_and_end_at_the_context(small_run, fresh):
    """Each row is cut at its own last position of the context, not at its batch's; token 0 is not "none forced"."""
    A, _, C, _, _ = small_run[1]
    C = [{**row, "candidates": [{**c, "teacher": [0, *c["teacher"][1:]]} for c in row["candidates"]]} for row in C]
    run, keys = fresh(), []
    seven = run.tokenizer.convert_tokens_to_ids("7")

    def answer(prompts, stream_keys, settings):
        keys.extend(stream_keys)
        return [[seven] * settings.limit(prompt) for prompt in prompts]

    rows = diagnose.continuations(replace(run, engine=FixedEngine(answer)), A, C)
    assert len(set(keys)) == len(keys) == len(rows)
    for row in rows:
        prefix = len(run.student_prompt(row["problem"])) + row["position"] + (row["token"] is not None)
        assert prefix + row["tokens"] == run.config.context


def test_labels_of_every_arm_by_hand():
    rule = LabelRule(children=2, rollouts=2)
    found = {"position": 3, "teacher": [7, 8], "student": [8, 9], "length": 10}
    right = {7: [1, 1], 8: [1, 1], 9: [0, 1], None: [0, 1, 0, 0]}
    E = [{"problem": 0, "position": 3, "token": v, "sample": n, "correct": bool(x)}
         for v, xs in right.items() for n, x in enumerate(xs)]  # fmt: skip
    D = [{"problem": 0, "positions": [3], "entropy": [0.5], "mutual_information": [0.1], "log_kappa": [2.0]}]
    (row,) = labels([{"problem": 0, "candidates": [found]}], D, E[::-1], rule)
    assert row["viability"] == {"teacher": [1.0, 1.0], "student": [1.0, 0.5], "unforced": [0.5, 0.0]}
    assert row["label"] == {"teacher": "diversity", "student": "gray", "unforced": "gray"}
    assert (row["entropy"], row["log_kappa"]) == (0.5, 2.0)


def test_defaults_are_the_papers_protocol():
    config = diagnose.parse_config(["--preset", "qwen3-4b"])
    assert config.num_problems == [24, 30, 30] and len(config.data) == 3 and config.model == "Qwen/Qwen3-4B"
    assert config.student_thinking and not diagnose.parse_config([]).student_thinking
    numbers = ("context", "spine_tokens", "candidates", "min_spacing", "children", "rollouts")
    assert [getattr(config, name) for name in numbers] == [32768, 16384, 5, 64, 3, 6]
    assert (diagnose.TEMPERATURE, diagnose.TOP_P, diagnose.FALLBACK_TEMPERATURE) == (1.0, 0.95, 0.7)
    assert (diagnose.TOP_VALID, diagnose.MIN_P2, diagnose.MIN_RATIO) == (16, 0.02, 0.10)
    assert (diagnose.PASSES, diagnose.DROPOUT, diagnose.DROPPED_LAYERS) == (5, 0.1, 4)
    assert LabelRule() == LabelRule(3, 6, 0.75, 2, 0.40, 2000, 0)
    assert diagnose.parse_config([]).children == diagnose.PRESETS["tiny"]["children"]
    assert diagnose.parse_config(["--children", "3"]).children == 3  # a flag wins over the preset


def test_problems_are_drawn_without_replacement_from_each_source(tmp_path):
    for name in "ab":
        append_rows(tmp_path / f"{name}.jsonl", [{"problem": f"{name}{i}", "answer": str(i)} for i in range(9)])
    data = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    drawn = diagnose.draw_problems(DiagnoseConfig(data=data, num_problems=[9, 4]))
    texts = [problem.problem for problem in drawn]
    assert sorted(texts[:9]) == [f"a{i}" for i in range(9)] and len(set(texts[9:])) == 4
    assert all(text[0] == "b" for text in texts[9:]) and isinstance(drawn[0], Problem)
    assert diagnose.draw_problems(DiagnoseConfig(data=data, num_problems=[9, 4])) == drawn
    with pytest.raises(InputError, match="has 9 problems"):
        diagnose.draw_problems(DiagnoseConfig(data=data, num_problems=[9, 10]))
    (tmp_path / "d.csv").write_text("task,key\n1+1,2\n")
    named = DiagnoseConfig(data=[str(tmp_path / "d.csv")], num_problems=[1], columns="problem=task,answer=key")
    assert diagnose.draw_problems(named) == [Problem("1+1", "", "2")]


MISTAKES = ("--preset no", "--children 1", "--children 17", "--resume", "--rollouts 0", "--candidates 0", "--context 1",
            "--seed -1", "--min_spacing 0", "--spine_tokens 0", "--data a b")  # fmt: skip


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_named(flags):
    with pytest.raises(InputError, match=flags.split()[0].replace("--data", "--num_problems")):
        diagnose.parse_config(flags.split())


@pytest.fixture
def script_with(call, tmp_path):
    """diagnose.py with these flags, in the folder `run`."""
    return lambda flags: call(diagnose, "--output_dir", tmp_path / "run", "--device", "cpu", *flags.split())


def test_a_run_ends_with_table_1_and_pins_its_grader(script_with, tmp_path, monkeypatch, capsys):
    """The grader is chosen by the answers used, and table1.json says its rule; a resumed run makes its labels anew."""
    asked, tables, flags = [], [], "--num_problems 6 --rollouts 1 --seed 3"

    def install(version):
        class Other(ExactGrader):
            name, stopped, refused = "other", 2, 3

        Other.version = version
        monkeypatch.setattr(diagnose, "make_grader", lambda *given: asked.append(given) or Other())

    install("1.0")
    for more in ("", " --resume"):
        script_with(flags + more)
        output = capsys.readouterr().out
        tables.append(json.loads((tmp_path / "run/table1.json").read_text()))
        assert f"{tables[-1]['labels']['diversity']} diversity" in output
        assert f"python -m experiments.diagnose_report {tmp_path / 'run'}" in output
        assert "grader other 1.0, 2 comparisons stopped at a limit, 3 refused" in output
    assert tables[0] == tables[1] and tables[0]["rule"] == asdict(LabelRule(children=2, rollouts=1))
    config = diagnose.parse_config(flags.split())
    assert asked[0] == ("auto", [problem.answer for problem in diagnose.draw_problems(config)])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["grader"] == "other 1.0"
    with pytest.raises(InputError, match="--student_thinking False, not True"):
        script_with(flags + " --resume --student_thinking")
    install("2.0")
    with pytest.raises(InputError, match=r"--grader other 1\.0"):
        script_with(flags + " --resume")


def test_a_model_without_layers_to_drop_in_is_named_before_the_work(script_with, monkeypatch):
    def load(*given, **more):
        model = loading.load_model(*given, **more)
        model.get_decoder = lambda: torch.nn.Linear(1, 1)
        return model

    monkeypatch.setattr(diagnose, "load_model", load)
    with pytest.raises(InputError, match="--model tiny: Qwen3ForCausalLM has no `layers`"):
        script_with("--num_problems 1")


def test_a_prompt_without_room_is_named_by_its_source_and_row(script_with, tmp_path):
    """Before anything is sampled; the longer of the two contexts counts, and a row that just fits is taken."""
    loading.check_room("--data", [Problem("1", "", "1")], [78], 72, 150)
    for name, problems in (("short", ["1+2+3+4+5"]), ("long", ["1+2", "1+2+3", "+".join("123456789" * 4)])):
        append_rows(tmp_path / f"{name}.jsonl", [{"problem": p, "answer": "6"} for p in problems])
    with pytest.raises(InputError, match=r"--data .*long.jsonl, row 2: a prompt of 81 tokens and a response of 73"):
        script_with(f"--data {tmp_path}/short.jsonl {tmp_path}/long.jsonl --num_problems 1 3 --context 153")
    assert not (tmp_path / "run").exists()
