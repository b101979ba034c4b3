"""Eqs. (9)-(11) by hand, the engines, and evaluations that are killed, resumed, regraded or mixed up."""

import json
import shutil

import numpy as np
import pytest
import torch

import evaluate
from errors import InputError
from model import add_lora, lora_parameters
from problems import Problem, tiny_problems
from rollout import Response, Sampling
from runtime.checkpoint import save_adapter
from runtime.engines import GenerateEngine
from runtime.loading import TINY_MODEL, load_model, load_tokenizer
from runtime.records import append_rows

SETTINGS = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=48)


@pytest.fixture(scope="module")
def tiny():
    """The embedded model with an adapter that changes what it says."""
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    add_lora(model, 4, 8.0)
    torch.manual_seed(0)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


MAJORITIES = [
    (["4", "5", "4"], [1, 0, 1], 1),
    (["5", "4", "4", "5"], [0, 1, 1, 0], 0),  # tie: seen first
    (["4", "5", "5", "4"], [1, 0, 0, 1], 1),
    (["0.5", "3", "1/2", "\\frac{1}{2}"], [1, 0, 1, 1], 1),  # clusters by equality, not by text
    ([None, "4", None], [0, 1, 0], 0),  # INVALID wins
    (["4", None, None, "4"], [1, 0, 0, 1], 1),  # tie with INVALID: seen first
    ([None, "4", "4", None], [0, 1, 1, 0], 0),
]


@pytest.mark.parametrize(("answers", "correct", "maj"), MAJORITIES)
def test_maj_by_hand(answers, correct, maj):
    def asked(a, b):
        assert None not in (a, b)  # a grader of one's own need not know that there may be no answer
        return evaluate.answers_match(a, b)

    assert evaluate.maj_at_n(answers, [bool(c) for c in correct], asked) == maj


def item(problem, text, sample=0, seed=0, tokens=10, finish_reason="eos"):
    return evaluate.Sample(problem, sample, seed, text, tokens, finish_reason)


def test_summary_by_hand():
    """Two problems, N = 2, two seeds; the answers are 1 and 2."""
    problems = [Problem("a", "", "1"), Problem("b", "", "2")]
    samples = [
        item(0, "\\boxed{6} no, \\boxed{1.0}"),  # the last box counts
        item(0, "\\boxed{1} no, \\boxed{3}", 1, tokens=30, finish_reason="length"),  # 1/2, the tie right
        item(1, "\\boxed{}"), item(1, "none", 1),  # 0/2, INVALID
        item(0, "\\boxed{1}", 0, 1), item(0, "\\boxed{1}", 1, 1),
        item(1, "\\boxed{5}", 0, 1), item(1, "\\boxed{2}", 1, 1),
    ]  # fmt: skip
    summary = evaluate.summarise(samples[::-1], problems)  # whatever the order in the file
    metrics = {name: value["mean"] for name, value in summary["metrics"].items()}
    assert metrics == {
        "avg": 4 / 8, "pass": 3 / 4, "maj": 2 / 4, "parseable": 6 / 8, "cut_at_limit": 1 / 8, "tokens": 100 / 8,
    }  # fmt: skip
    avg = summary["metrics"]["avg"]
    assert avg["by_seed"] == [0.25, 0.75] and avg["std_over_seeds"] == pytest.approx(0.125**0.5)
    assert avg["interval"] == [0.25, 0.75]  # problems at 3/4 and 1/4
    assert summary["per_problem"]["avg"] == [[0.5, 0.0], [1.0, 0.5]] and summary["seeds"] == [0, 1]
    assert summary["per_problem"]["maj"] == [[1.0, 0.0], [1.0, 0.0]]
    lenient = evaluate.summarise(samples, problems, lambda answer, gold: answer.strip() != "")["metrics"]
    assert lenient["avg"]["mean"] == lenient["parseable"]["mean"] == 6 / 8  # no box is wrong, whoever grades
    alone = evaluate.summarise([s for s in samples if s.seed == 0], problems)["metrics"]["avg"]
    assert alone["std_over_seeds"] is None and alone["mean"] == 0.25


def test_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = evaluate.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert evaluate.bootstrap_interval(values) == [low, high]


def test_interval_where_all_problems_are_alike_is_the_exact_binomial_one():
    assert evaluate.share_interval(np.ones(5)) == [pytest.approx(0.4782, abs=1e-4), 1.0]  # tables of Clopper-Pearson
    assert evaluate.share_interval(np.zeros(10)) == [0.0, pytest.approx(0.3085, abs=1e-4)]
    assert evaluate.share_interval(np.full(5, 0.5)) == [0.5, 0.5]  # the mean of many samples each, no binomial count
    assert evaluate.bootstrap_interval(np.zeros(10)) == [0.0, 0.0]  # of differences, say


def test_streams_differ_by_seed_benchmark_problem_and_sample_only():
    problems, others = tiny_problems("heldout", 3), tiny_problems("train", 3)
    jobs = [(seed, index, number) for seed in (0, 1) for index in (0, 1) for number in (0, 1)]
    keys = [key for part in (problems, others) for key in evaluate.stream_keys(part, jobs)]
    streams = {tuple(np.random.SeedSequence(key).generate_state(4).tolist()) for key in keys}
    assert len(streams) == 16
    keys = evaluate.stream_keys(list(problems), [(0, 0, 0), (0, 1, 0)])
    assert evaluate.stream_keys(problems, [(0, 1, 0)]) == keys[1:]


def test_a_sample_is_the_same_whatever_is_sampled_beside_it(tiny):
    model, tokenizer = tiny
    problems = tiny_problems("heldout", 6)
    jobs = [(3, index, number) for index in range(6) for number in range(2)]
    seen = []
    model.train()
    together = evaluate.solve(GenerateEngine(*tiny), tokenizer, problems, jobs, SETTINGS)
    assert [(s.seed, s.problem, s.sample) for s in together] == jobs
    assert len({s.text for s in together}) > 6
    part = jobs[7:2:-2]
    again = evaluate.solve(GenerateEngine(*tiny, 2), tokenizer, problems, part, SETTINGS, on_sample=seen.append)
    assert again == [together[jobs.index(job)] for job in part]
    assert sorted(seen, key=again.index) == again and model.training
    model.eval()


class Calculator:
    """An engine that answers every sum rightly and in the opposite order; it may stop after some rows."""

    def __init__(self, tokenizer, stop_after=None):
        self.tokenizer, self.stop_after, self.asked, self.closed = tokenizer, stop_after, [], False

    def sample(self, prompts, keys, settings, on_finished):
        self.asked.append((len(prompts), len(set(keys)), settings))
        for done, row in enumerate(reversed(range(len(prompts)))):
            if done == self.stop_after:
                raise InputError("--server: gone")
            numbers = self.tokenizer.decode(prompts[row]).split("user\n")[1].split("\n")[0]
            text = f"{keys[row]} \\boxed{{{sum(map(int, numbers.split('+')))}}}"  # each sample is another
            on_finished(row, Response(self.tokenizer.encode(text, add_special_tokens=False), True))

    def close(self):
        self.closed = True


OPEN_ENGINE = evaluate.open_engine


@pytest.fixture
def run(tmp_path, monkeypatch, call):
    """evaluate.py on four sums, solved by a Calculator or OPEN_ENGINE's model; (summary, lines of samples.jsonl)."""
    monkeypatch.setattr(evaluate, "open_engine", lambda config, tokenizer: Calculator(tokenizer))
    benchmark = tmp_path / "four.jsonl"
    append_rows(benchmark, [{"problem": p.problem, "answer": p.answer} for p in tiny_problems("heldout", 4)])
    settings = ["--num_samples", 2, "--max_new_tokens", 48, "--batch_size", 8, "--device", "cpu"]

    def evaluated(name, *flags):
        folder = tmp_path / name
        call(evaluate, "--benchmark", benchmark, *settings, "--output_dir", folder, *flags)
        lines = (folder / "samples.jsonl").read_bytes().splitlines(True)
        return json.loads((folder / "summary.json").read_text()), lines

    evaluated.folder, evaluated.benchmark = tmp_path, benchmark
    return evaluated


def test_an_evaluation_that_is_killed_or_grows_ends_like_an_unbroken_one(run):
    summary, lines = run("whole", "--seeds", 0, 1)
    assert len(lines) == 2 * 4 * 2 and summary["seeds"] == [0, 1] and summary["problems"] == list(range(4))
    first, one = run("growing", "--seeds", 1, "--num_samples", 1)
    grown, more = run("growing", "--seeds", 0, 1)
    assert more[: len(one)] == one and sorted(more) == sorted(lines) and grown == summary
    assert run("growing", "--seeds", 1, "--num_samples", 1)[0] == first  # the old question keeps its answer
    file = run.folder / "broken" / "samples.jsonl"
    shutil.copytree(run.folder / "whole", file.parent)
    for left in (b"".join(lines[:10]) + lines[10][:25], b"".join(lines)):
        file.write_bytes(left)
        resumed, again = run("broken", "--seeds", 0, 1)
        assert sorted(again) == sorted(lines) and resumed == summary
        assert b"".join(again).startswith(left[: left.rfind(b"\n") + 1])  # what was there is not touched


def test_the_same_command_grades_again_without_loading_a_model(run, monkeypatch):
    summary, lines = run("graded")
    (run.folder / "graded" / "summary.json").unlink()
    monkeypatch.setattr(evaluate, "open_engine", None)
    assert run("graded") == (summary, lines)
    run.benchmark.write_text(run.benchmark.read_text().splitlines(True)[0])
    with pytest.raises(InputError, match=r"what --benchmark .* names has changed"):
        run("graded")
    (run.folder / "graded" / "samples.jsonl").write_bytes(lines[0] + b'{"note": 1, ' + lines[1][1:])
    with pytest.raises(InputError, match=r"samples\.jsonl, line 2: not a row of this program's .unknown note"):
        run("graded")


def test_a_limit_takes_the_first_problems_with_the_same_draws_and_columns_are_passed_on(run):
    summary, lines = run("whole")
    few, first = run("few", "--limit", 3)
    assert few["problems"] == [0, 1, 2] and set(first) < set(lines)
    rows = [json.loads(line) for line in run.benchmark.read_text().splitlines()]
    run.benchmark.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))  # a row beyond the limit keys too
    with pytest.raises(InputError, match=r"what --benchmark .* names has changed"):
        run("few", "--limit", 3)
    run.benchmark.write_text("".join(json.dumps({"task": r["problem"], "key": r["answer"]}) + "\n" for r in rows))
    named, again = run("named", "--columns", "problem=task,answer=key")
    assert named["metrics"] == summary["metrics"] and again == lines


def test_another_regime_is_refused_and_names_its_field(run):
    _, lines = run("pinned")
    for flag, value in (("temperature", 0.5), ("top_p", 1.0), ("top_k", 5), ("max_new_tokens", 40),
                        ("enable_thinking", False), ("dtype", "bfloat16"), ("limit", 2)):  # fmt: skip
        with pytest.raises(InputError, match=f"pinned: was started with --{flag} .*, not {value}; "):
            run("pinned", f"--{flag}", value)
    (run.folder / "prompts.json").write_text('{"evaluation": "{problem}"}')
    with pytest.raises(InputError, match=r"was started with --prompts None, not .*prompts.json; "):
        run("pinned", "--prompts", run.folder / "prompts.json")
    run.benchmark.write_text("".join(run.benchmark.read_text().splitlines(True)[::-1]))
    with pytest.raises(InputError, match=r"what --benchmark .* names has changed"):
        run("pinned")
    assert (run.folder / "pinned" / "samples.jsonl").read_bytes() == b"".join(lines)


def test_a_model_that_changes_under_its_name_is_refused(run, tiny, monkeypatch):
    """By content: test_records.py has the files that count."""
    monkeypatch.setattr(evaluate, "open_engine", OPEN_ENGINE)
    model, adapter = run.folder / "model", run.folder / "adapter"
    shutil.copytree(TINY_MODEL, model)
    save_adapter(tiny[0], adapter, str(model))
    given = ("--model", model, "--adapter", adapter)
    summary, lines = run("pinned", *given)
    assert lines != run("plain", "--model", model)[1]  # the adapter speaks
    for flag, path in (("model", model / "model.safetensors"), ("adapter", adapter / "adapter_model.safetensors")):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + b"\1")
        with pytest.raises(InputError, match=f"what --{flag} .* names has changed .*{path.name}"):
            run("pinned", *given, "--num_samples", 3)
        path.write_bytes(before)
    shutil.move(model, run.folder / "moved")  # content counts, not the name
    again, same = run("pinned", "--model", run.folder / "moved", "--adapter", adapter)
    assert (again["metrics"], same) == (summary["metrics"], lines)


def test_a_response_stays_within_the_context(run, capsys):
    """The embedded model has 512 positions; one limit for all problems, or the problem that leaves none, by its row."""
    longest = "+".join("123456789" * 25)
    run.benchmark.write_text(json.dumps({"problem": "1+2", "answer": "3"}) + "\n\n"
                             + json.dumps({"problem": longest, "answer": "3"}) + "\n")  # fmt: skip
    run("long", "--max_new_tokens", 100, "--num_samples", 1)
    limit = json.loads((run.folder / "long" / "config.json").read_text())["config"]["max_new_tokens"]
    assert limit < 100 and f"the model's context leaves {limit}" in capsys.readouterr().out
    run.benchmark.write_text(run.benchmark.read_text().replace(longest, longest + "+1" * 40))
    with pytest.raises(InputError, match=r"--benchmark .*, row 1: a prompt of 5\d\d tokens and a response of 1 exceed"):
        run("longer")
    assert not (run.folder / "longer").exists()


def test_an_engine_is_asked_for_exactly_what_is_missing_and_what_it_gave_is_kept(run, monkeypatch):
    """Any engine may stand behind the script."""
    tokenizer = load_tokenizer("tiny")
    broken, whole = Calculator(tokenizer, stop_after=10), Calculator(tokenizer)
    engines = iter([broken, whole, whole])
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: next(engines))
    with pytest.raises(InputError, match="gone"):
        run("served", "--seeds", 0, 1)
    assert len((run.folder / "served" / "samples.jsonl").read_bytes().splitlines()) == 10
    summary, lines = run("served", "--seeds", 0, 1)
    assert summary["metrics"]["avg"]["mean"] == 1.0 and len(lines) == 16 and whole.closed
    run("served", "--seeds", 0, 1, 2)
    assert broken.asked == [(16, 16, SETTINGS)] and whole.asked == [(6, 6, SETTINGS), (8, 8, SETTINGS)]


def test_a_server_has_a_context_of_its_own(run, monkeypatch):
    asked, theirs = [], evaluate.context_length
    monkeypatch.setattr(evaluate, "context_length", lambda *given: asked.append(given[-1]) or theirs(*given))
    run("here")
    run("there", "--server", "http://localhost:1")
    assert asked == [False, True]
