import json
import math
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from forked import run_ranks, script
from safetensors.torch import load_file

import train
from errors import InputError
from grading import ExactGrader
from loss import clipped_divergence, method_loss, sequence_mean
from model import LoRALinear, lora_parameters
from problems import load_problems, tiny_problems
from rollout import Response, Sampling
from runtime.checkpoint import damage
from runtime.engines import GenerateEngine
from runtime.ranks import rank
from teacher import EVALUATION_PROMPT
from train import PRESETS, Rollout, TrainConfig, build, micro_batches, parse_config, step_problems

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = [
    {
        "problem": f"How many clips are {a} and {b}{' and nothing more' * (a % 3)}?",
        "solution": f"{a}+{b}=\\boxed{{{a + b}}}",
    }
    for a in range(1, 6)
    for b in range(1, 4)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": ""}) + "\n" for row in PROBLEMS))
    return path


def flags(checkpoint, data, run, *more) -> list[str]:
    """A run of two steps of four short rollouts; later flags win."""
    flat = {
        "model": checkpoint, "data": data, "output_dir": run, "num_steps": 2, "batch_size": 4, "micro_batch_size": 3,
        "max_new_tokens": 10, "lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 1e-3, "device": "cpu",
    }  # fmt: skip
    return [word for name, value in flat.items() for word in (f"--{name}", str(value))] + [str(word) for word in more]


@pytest.fixture
def run_main(monkeypatch, capsys):
    def run(arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            run.status = train.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return capsys.readouterr().out

    return run


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def lengths(run: Path) -> list[int]:
    return [json.loads(line)["tokens"] for line in (run / "samples.jsonl").read_text().splitlines()]


def adapter(run: Path, step: int) -> dict:
    return load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# Data order and micro-batches


def test_each_epoch_visits_every_problem_once_in_a_new_order():
    picked = [problem for step in range(6) for problem in step_problems(9, 3, seed=1, step=step)]
    assert sorted(picked[:9]) == sorted(picked[9:]) == list(range(9))
    assert picked[:9] != picked[9:]
    assert step_problems(9, 3, seed=1, step=4) == picked[12:15]
    assert step_problems(9, 3, seed=2, step=0) != picked[:3]
    assert len(step_problems(2, 7, seed=0, step=0)) == 7  # more prompts than problems: epochs within a step


def test_micro_batches_hold_every_row_once_longest_first():
    sizes = ((2, 1), (1, 8), (1, 0), (3, 4), (5, 0))
    rows = [Rollout([1] * 9, [1] * prompt, Response([1] * tokens, True), {}) for prompt, tokens in sizes]
    assert micro_batches(rows, 2) == [[rows[1], rows[3]], [rows[4], rows[0]], [rows[2]]]


# Options


def test_defaults_are_the_papers():
    c = TrainConfig()
    assert (c.method, c.lora_rank, c.lora_alpha, c.learning_rate, c.num_steps) == ("pwopsd", 64, 128.0, 5e-6, 150)
    assert (c.batch_size, c.max_grad_norm, c.seed, c.save_steps, c.max_length) == (32, 0.1, 42, 25, 20000)
    assert c.sampling == Sampling(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=1024)
    assert (c.distill_temperature, c.tau_clip, c.teacher) == (1.1, 0.05, "fixed")
    assert [PRESETS[name]["model"] for name in ("qwen3-4b", "dsr1-llama-8b", "olmo3-7b")] == [
        "Qwen/Qwen3-4B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "allenai/Olmo-3-7B-Think",
    ]  # fmt: skip


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults():
    assert parse_config([]).preset == "tiny" and parse_config([]).tau_clip == 1.0
    assert parse_config(["--tau_clip", "0.05"]).tau_clip == 0.05
    assert parse_config(["--preset", "dsr1-llama-8b"]).micro_batch_size == 2
    plain = parse_config(["--model", "some/where"])
    assert plain.preset is None and plain.max_new_tokens == 1024


def test_the_script_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"train.py --data {tmp_path}/no.jsonl --output_dir {tmp_path}/run".split())
    with pytest.raises(SystemExit) as ended:
        train.cli()
    assert ended.value.code == f"error: {tmp_path}/no.jsonl: no such data file" and not (tmp_path / "run").exists()


def test_columns_are_for_the_data_and_the_held_out_problems(tmp_path, monkeypatch):
    path, given = tmp_path / "data.csv", []
    path.write_text("task,why,key\n1+1,so 2,2\n")
    words = f"--data {path} --eval_data {path} --columns problem=task,solution=why,answer=key --device cpu"
    monkeypatch.setattr(train, "train", lambda *arguments: given.extend(arguments[-2:]) or 0)
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split(), "--output_dir", str(tmp_path / "run")])
    assert train.main() == 0
    assert given == [[train.problems.Problem("1+1", "so 2", "2")]] * 2


# Runs


def test_gsm8k_like_data_runs_with_every_family(checkpoint, data, tmp_path, run_main):
    run = tmp_path / "run"
    output = run_main(flags(checkpoint, data, run))
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["learning_rate"] == 1e-3 and rows[1]["learning_rate"] == pytest.approx(5e-4)
    assert all(row["student_entropy"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert len((run / "samples.jsonl").read_text().splitlines()) == 8
    assert any(tensor.abs().max() > 0 for name, tensor in adapter(run, 2).items() if "lora_B" in name)
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["seed"] == 42 and config["versions"]["torch"] == torch.__version__
    assert "  2/2  loss" in output


@pytest.fixture
def uneven_rollouts(monkeypatch):
    """The random models never end a response by themselves: row `slot` of a step is cut to 3 + slot tokens."""
    original = GenerateEngine.sample

    def cut(self, prompts, keys, settings, on_finished=None):
        responses = original(self, prompts, keys, settings)
        return [Response(row.ids[: 3 + key[-1]], False) for row, key in zip(responses, keys, strict=True)]

    monkeypatch.setattr(GenerateEngine, "sample", cut)


@pytest.mark.parametrize("method", ["opsd", "pwopsd", "eopd", "reopold"])
def test_micro_batches_do_not_change_the_step(qwen3, data, tmp_path, run_main, uneven_rollouts, method):
    """Accumulation is exact: rows of different lengths, 3 + 1 or all at once, give the same parameters."""
    for size in (3, 4):
        more = ("--method", method, "--micro_batch_size", size, "--num_steps", 1)
        run_main(flags(qwen3, data, tmp_path / f"run{size}", *more))
        assert lengths(tmp_path / f"run{size}") == [3, 4, 5, 6]
    parts, whole = metrics(tmp_path / "run3")[0], metrics(tmp_path / "run4")[0]
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    assert largest_difference(adapter(tmp_path / "run3", 1), adapter(tmp_path / "run4", 1)) < 1e-5


@pytest.mark.parametrize("method", [pytest.param("opsd", marks=pytest.mark.slow), "pwopsd"])
def test_two_ranks_equal_one(tmp_path, run_main, method):
    """Five rollouts that end where they will, 3 on one rank and 2 on the other: neither rows nor tokens are even."""
    rows = [json.dumps(asdict(problem)) + "\n" for problem in tiny_problems("train", 5)]
    (tmp_path / "five.jsonl").write_text("".join(rows))
    (tmp_path / "one.jsonl").write_text(rows[0])

    words = f"--method {method} --num_steps 1 --batch_size 5 --max_new_tokens 48 --data {tmp_path}/five.jsonl "
    words += f"--eval_data {tmp_path}/one.jsonl --device cpu --output_dir {tmp_path}/"
    run_main((words + "one").split())
    run_ranks(tmp_path, script, "train.py", (words + "two").split())
    by_row = lengths(tmp_path / "one")
    assert len(set(by_row)) > 1 and sum(by_row[::2]) / 3 != sum(by_row[1::2]) / 2
    one, two = metrics(tmp_path / "one")[0], metrics(tmp_path / "two")[0]
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
    assert one["mean_length"] == two["mean_length"]
    assert largest_difference(adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 1)) < 1e-5
    assert (tmp_path / "one/samples.jsonl").read_text() == (tmp_path / "two/samples.jsonl").read_text()
    assert json.loads((tmp_path / "two/config.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("method", ["opsd", "pwopsd", "eopd", "reopold"])
def test_the_gradient_of_a_step_is_that_of_the_plain_loss(qwen3, data, tmp_path, monkeypatch, uneven_rollouts, method):
    """Its scale included: autograd of `method_loss` on whole logits of both contexts, all rows in one batch."""
    words = ["--method", method, "--lora_dropout", 0, "--micro_batch_size", 4, "--max_grad_norm", 1e9]
    words += ["--tau_clip", 0.5] if method in ("opsd", "pwopsd") else []
    config = parse_config(flags(qwen3, data, tmp_path / "run", *words))
    run, seen = build(config, torch.device("cpu"), ExactGrader()), []
    for layer in lora_parameters(run.model)[1::2]:  # B: an adapter that has learned something
        torch.nn.init.normal_(layer, std=0.02)

    def keep(run):
        seen.append([p.grad.clone() for p in run.parameters])
        run.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(train, "update", keep)
    sampled, sample = [], GenerateEngine.sample
    monkeypatch.setattr(GenerateEngine, "sample", lambda *a: sampled.append(sample(*a)) or sampled[-1])
    problems = load_problems(str(data))
    row, _ = train.train_step(0, run, problems, config)
    drawn, ids = train.step_share(0, problems, config)[0], [response.ids for response in sampled[0]]
    head_VD = run.model.get_output_embeddings().weight
    x_stu, x_tch = (
        [prompt(run.tokenizer, problem) for problem in drawn]
        for prompt in (train.teacher.student_prompt, train.teacher.teacher_prompt)
    )
    with run.teacher.scoring() as scorer:
        teacher_BTV = train.model.response_hidden(scorer, x_tch, ids) @ head_VD.T
    student_BTV = train.model.response_hidden(run.model, x_stu, ids) @ head_VD.T
    ids_BT = torch.tensor([row_ids + [0] * (max(map(len, ids)) - len(row_ids)) for row_ids in ids])
    mask_BT = train.model.response_mask([len(row_ids) for row_ids in ids])
    plain = method_loss(method, student_BTV, teacher_BTV, ids_BT, mask_BT, clip=0.5)
    wanted = torch.autograd.grad(plain, run.parameters)
    assert row["loss"] == pytest.approx(plain.item(), abs=1e-6) and plain.item() != 0.0
    size = max(g.abs().max().item() for g in wanted)
    for ours, theirs in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * size, rtol=1e-3)


def test_a_step_samples_and_scores_with_its_own_settings(qwen3, data, tmp_path, run_main, monkeypatch):
    sampled, scored, published = [], [], []
    sample, score = GenerateEngine.sample, train.loss.score_tokens_from_hidden

    def spy_on_sampling(self, *args):
        sampled.append((self.tokenizer, *args))
        return sample(self, *args)

    def spy_on_scoring(method, student_MD, teacher_MD, head, teacher_head, ids_M, options):
        scored.append((method.token_loss, method.reduction, options.distill_temperature, len(ids_M)))
        return score(method, student_MD, teacher_MD, head, teacher_head, ids_M, options)

    monkeypatch.setattr(GenerateEngine, "sample", spy_on_sampling)
    monkeypatch.setattr(train.loss, "score_tokens_from_hidden", spy_on_scoring)
    monkeypatch.setattr(train.engines, "publish", lambda *args: published.append(args[-1]))
    apart = ("--temperature", 0.7, "--distill_temperature", 1.3, "--top_k", 7, "--top_p", 0.8)
    run_main(flags(qwen3, data, tmp_path / "run", "--num_steps", 3, *apart))
    problems = load_problems(str(data))
    assert len(sampled) == 3 and published == [0, 1, 2, 3]  # a server samples from the weights of each step
    for step, (tokenizer, prompts, keys, settings) in enumerate(sampled):
        picked = [problems[index] for index in step_problems(len(problems), 4, 42, step)]
        assert prompts == [train.teacher.student_prompt(tokenizer, problem) for problem in picked]
        assert keys == [(42, train.ROLLOUT_STREAM, step, slot) for slot in range(4)]
        assert settings == Sampling(temperature=0.7, top_p=0.8, top_k=7, max_new_tokens=10)
    tokens = lengths(tmp_path / "run")
    assert len(scored) == 6 and sum(row[-1] for row in scored) == sum(tokens)  # micro-batches of 3 and 1
    assert {row[:3] for row in scored} == {(clipped_divergence, sequence_mean, 1.3)}


def test_the_optimizer_is_the_papers(qwen3, data, tmp_path):
    config = parse_config(flags(qwen3, data, tmp_path / "run"))
    run = build(config, torch.device("cpu"), ExactGrader())
    optimizer = run.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    defaults = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    assert defaults == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert trained == [id(parameter) for parameter in lora_parameters(run.model)]
    assert run.scheduler.get_last_lr() == [1e-3]


def test_gradients_are_clipped_to_max_grad_norm(qwen3, data, tmp_path, run_main):
    """AdamW hardly sees a common factor, but it does where a clipped gradient is as small as its eps."""
    for run, norm in (("loose", 1e6), ("tight", 1e-6)):
        run_main(flags(qwen3, data, tmp_path / run, "--max_grad_norm", norm))
    loose, tight = (metrics(tmp_path / run)[0] for run in ("loose", "tight"))
    assert loose["grad_norm"] == tight["grad_norm"] > 1e-6  # the norm before clipping is logged
    assert largest_difference(adapter(tmp_path / "loose", 2), adapter(tmp_path / "tight", 2)) > 1e-4


def test_the_teachers_weights_are_the_chosen_ones(qwen3, data, tmp_path, run_main):
    """All agree while the adapter is new; one step on, EMA lies between its limits: decay 1 is fixed, 0 is live."""
    losses = {}
    for kind, decay in (("fixed", 0.99), ("live", 0.99), ("ema", 1.0), ("ema", 0.0), ("ema", 0.5)):
        run = tmp_path / f"{kind}-{decay}"
        run_main(flags(qwen3, data, run, "--teacher", kind, "--ema_decay", decay))
        losses[kind, decay] = [row["loss"] for row in metrics(run)]
        assert (run / "samples.jsonl").read_text() == (tmp_path / "fixed-0.99/samples.jsonl").read_text()
    first, second = zip(*losses.values(), strict=True)
    assert first == pytest.approx([first[0]] * 5, abs=1e-6)
    fixed, live, slow, fast, between = second
    assert slow == pytest.approx(fixed, abs=1e-6) and fast == pytest.approx(live, abs=1e-6)
    assert min(abs(fixed - live), abs(between - fixed), abs(between - live)) > 1e-4


def test_lora_dropout_reaches_the_student(qwen3, data, tmp_path, run_main):
    """With B = 0 it cannot change the first loss, only that loss's gradient."""
    for run, dropout in (("without", 0.0), ("with", 0.5)):
        run_main(flags(qwen3, data, tmp_path / run, "--lora_dropout", dropout))
    without, dropped = metrics(tmp_path / "without"), metrics(tmp_path / "with")
    assert dropped[0]["loss"] == without[0]["loss"]
    assert dropped[0]["grad_norm"] != pytest.approx(without[0]["grad_norm"], rel=1e-2)
    assert dropped[1]["loss"] != pytest.approx(without[1]["loss"], abs=1e-4)


def test_gradient_checkpointing_recomputes_and_changes_nothing(qwen3, data, tmp_path, run_main, monkeypatch):
    """With dropout: what is computed again must draw the same numbers again."""
    forward, calls = LoRALinear.forward, []

    def counted(self, x):
        calls[-1] += 1
        return forward(self, x)

    monkeypatch.setattr(LoRALinear, "forward", counted)
    for given in ("false", "true"):
        calls.append(0)
        run_main(flags(qwen3, data, tmp_path / given, "--gradient_checkpointing", given, "--lora_dropout", 0.1))
    plain, checkpointed = metrics(tmp_path / "false"), metrics(tmp_path / "true")
    assert [row["loss"] for row in checkpointed] == pytest.approx([row["loss"] for row in plain], abs=1e-6)
    assert [row["grad_norm"] for row in checkpointed] == pytest.approx([row["grad_norm"] for row in plain], rel=1e-5)
    assert largest_difference(adapter(tmp_path / "true", 2), adapter(tmp_path / "false", 2)) < 1e-5
    assert calls[1] - calls[0] == 2 * 2 * 14  # two steps of two micro-batches, seven projections in two blocks


def test_bfloat16_trains_a_float32_adapter(qwen3, data, tmp_path, run_main, monkeypatch):
    hidden, seen = train.model.response_hidden, set()

    def spy(*args):
        states = hidden(*args)
        seen.add(states.dtype)
        return states

    monkeypatch.setattr(train.model, "response_hidden", spy)
    run_main(flags(qwen3, data, tmp_path / "run", "--dtype", "bfloat16"))
    assert seen == {torch.bfloat16}
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    assert all(math.isfinite(row[name]) and row[name] != 0.0 for row in rows for name in ("loss", "grad_norm"))
    weights = adapter(tmp_path / "run", 2)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("more", [(), ("--teacher", "ema", "--lora_dropout", "0.1"), ("--lora_rank", "0")])
def test_a_resumed_run_equals_an_unbroken_one(qwen3, data, tmp_path, run_main, more):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_main(flags(qwen3, data, whole, "--num_steps", 4, "--save_steps", 2, *more))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")  # as if killed while step 4 was being saved, with a torn line
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    output = run_main(flags(qwen3, data, broken, "--num_steps", 4, "--save_steps", 2, "--resume", *more))
    assert f"going on from {broken}/checkpoint-2" in output
    assert metrics(broken) == metrics(whole)
    assert (broken / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for path in (whole / "checkpoint-4").glob("*.safetensors"):
        ours, theirs = load_file(broken / "checkpoint-4" / path.name), load_file(path)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()


def test_a_damaged_checkpoint_is_passed_over_and_then_replaced(qwen3, data, tmp_path, run_main):
    run = tmp_path / "run"
    given = ("--num_steps", 4, "--save_steps", 2)
    run_main(flags(qwen3, data, run, *given))
    weights = run / "checkpoint-4/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    output = run_main(flags(qwen3, data, run, *given, "--resume"))
    assert "checkpoint-4: adapter_model.safetensors is damaged" in output and "going on from" in output
    assert weights.read_bytes() == whole and damage(run / "checkpoint-4") is None


def test_ranks_that_read_other_files_are_refused(qwen3, data, tmp_path, run_main, monkeypatch):
    compared, gather = [], train.ranks.gather_objects
    monkeypatch.setattr(train.ranks, "check_same_start", compared.append)
    run_main(flags(qwen3, data, tmp_path / "run", "--num_steps", 1))
    assert "model.embed_tokens.weight" in dict(compared[0])

    def other_data(value):
        is_inputs = isinstance(value, dict) and "data" in value
        return [value, {**value, "data": "other"}] if is_inputs else gather(value)

    monkeypatch.setattr(train.ranks, "gather_objects", other_data)
    with pytest.raises(InputError, match="the ranks have read other data"):
        run_main(flags(qwen3, data, tmp_path / "other", "--num_steps", 1))


def test_the_grader_that_auto_has_found_is_kept(qwen3, data, tmp_path, run_main, monkeypatch):
    run_main(flags(qwen3, data, tmp_path / "run", "--num_steps", 1))
    name = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["grader"]
    assert name in train.grading.GRADERS
    if name != "exact":
        monkeypatch.setattr(train.grading, "make_grader", lambda *_: train.grading.ExactGrader())
        with pytest.raises(InputError, match="--grader math-verify, not exact"):
            run_main(flags(qwen3, data, tmp_path / "run", "--num_steps", 1, "--resume"))


def test_a_resumed_run_wants_the_files_it_began_with(qwen3, data, held_out, tmp_path, run_main):
    """By content, though each keeps its name: data, base weights, template, held-out problems, prompts."""
    model, prompts = tmp_path / "model", tmp_path / "prompts.json"
    shutil.copytree(qwen3, model)
    prompts.write_text(json.dumps({"student": "Sum: {problem}"}))
    given = ("--num_steps", 1, "--eval_data", held_out, "--prompts", prompts)
    run_main(flags(model, data, tmp_path / "run", *given))
    weights = model / "model.safetensors"
    for flag, path, old, new in (
        ("data", data, b"clips", b"chips"),
        ("model", weights, b"\x00\x00\x80?", b"\x00\x00\x00?"),  # each 1.0 of a norm becomes 0.5
        ("model", model / "chat_template.jinja", b"assistant", b"Assistant"),
        ("eval_data", held_out, b"2", b"3"),
        ("prompts", prompts, b"Sum", b"Total"),
    ):
        before = path.read_bytes()
        path.write_bytes(before.replace(old, new))
        assert path.read_bytes() != before, path
        with pytest.raises(InputError, match=rf"what --{flag} .* names has changed since"):
            run_main(flags(model, data, tmp_path / "run", *given, "--resume"))
        path.write_bytes(before)
    assert "going on from" in run_main(flags(model, data, tmp_path / "run", *given, "--resume"))


@pytest.mark.parametrize(
    ("where", "number"),
    [("sampling", signal.SIGTERM), ("scoring", signal.SIGINT), ("scoring", signal.SIGHUP), ("update", signal.SIGUSR1)],
)
def test_a_signal_keeps_the_last_finished_step(qwen3, data, tmp_path, run_main, monkeypatch, where, number):
    """It leaves a step wherever it stands, except within its update; the run then goes on as if unbroken."""
    arguments = [*flags(qwen3, data, tmp_path / "run", "--num_steps", 3), "--teacher", "ema"]
    owner, name = {
        "sampling": (train.rollout.StreamSampler, "__call__"),
        "scoring": (LoRALinear, "forward"),
        "update": (train, "update"),
    }[where]
    original, calls = getattr(owner, name), []

    def preempted(*args, **more):
        calls.append(len(metrics(tmp_path / "run")) if (tmp_path / "run/metrics.jsonl").exists() else 0)
        if (calls[-1] == 1 and calls.count(1) == 5) or (where == "update" and calls == [0, 1]):
            os.kill(os.getpid(), number)
        return original(*args, **more)

    before = signal.signal(number, signal.SIG_DFL)  # where the tests run under nohup, it is ignored
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, preempted)
        output = run_main(arguments)
    signal.signal(number, before)
    finished = 2 if where == "update" else 1
    assert f"stopped by a signal, saved after step {finished}; the same command with --resume" in output
    assert run_main.status == 128 + number
    assert len(metrics(tmp_path / "run")) == finished and damage(tmp_path / f"run/checkpoint-{finished}") is None
    run_main([*arguments, "--resume"])
    assert run_main.status == 0
    run_main([*flags(qwen3, data, tmp_path / "whole", "--num_steps", 3), "--teacher", "ema"])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert largest_difference(adapter(tmp_path / "run", 3), adapter(tmp_path / "whole", 3)) == 0.0


def stopped_on_two_ranks(data: str, model: str, run: str, victim: int, fails: bool) -> None:
    """A signal or an error on one rank alone, while it samples the second step: both stop, with the first one saved."""
    original, calls = train.rollout.sample, []

    def preempted(*args, **more):
        calls.append(args)
        if len(calls) == 2 and rank() == victim:
            if fails:
                raise InputError("no answer")
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **more)

    train.engines.sample = preempted
    sys.argv = ["train.py", *flags(model, data, run, "--num_steps", 3)]
    with pytest.raises((InputError, RuntimeError)) if fails else nullcontext():
        assert train.main() == 128 + signal.SIGTERM


@pytest.mark.parametrize(("victim", "fails"), [(0, False), (1, False), (1, True)])
def test_what_stops_one_of_two_ranks_stops_both_at_the_same_step(qwen3, data, tmp_path, victim, fails):
    run_ranks(tmp_path, stopped_on_two_ranks, str(data), str(qwen3), str(tmp_path / "run"), victim, fails)
    assert len(metrics(tmp_path / "run")) == 1 and damage(tmp_path / "run/checkpoint-1") is None


@pytest.fixture
def held_out(tmp_path):
    """A file with one held-out problem."""
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    return tmp_path / "held_out.jsonl"


@pytest.mark.parametrize(("call", "behind"), [(2, 0), (4, 1), (10, 3)])
def test_sigterm_while_held_out_problems_are_scored_ends_at_once_and_is_made_up_for(
    qwen3, data, held_out, tmp_path, run_main, monkeypatch, call, behind
):
    """Before the first step, on the way and at the end: two calls to score (sampled, greedy), one for a step."""

    def arguments(run):
        return flags(qwen3, data, run, "--num_steps", 3, "--eval_data", held_out, "--eval_steps", 1)

    run_main(arguments(tmp_path / "whole"))
    original, calls = GenerateEngine.sample, []

    def preempted(*args, **more):
        calls.append("begun")
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        response = original(*args, **more)
        calls[-1] = "done"
        return response

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(GenerateEngine, "sample", preempted)
        output = run_main(arguments(run))
    assert calls == ["done"] * (call - 1) + ["begun"]
    assert (f"saved after step {behind};" if behind else "stopped by a signal, before the first step") in output
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{behind}"] * (behind > 0)
    evaluated = json.loads((run / "evaluation.json").read_text()) if behind else {}
    assert list(evaluated) == [str(step) for step in range(behind)]
    run_main([*arguments(run), "--resume"])
    assert metrics(run) == metrics(tmp_path / "whole")
    for name in ("evaluation.json", "heldout.jsonl"):
        assert (run / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert largest_difference(adapter(run, 3), adapter(tmp_path / "whole", 3)) == 0.0


def test_a_wrong_model_is_named_before_any_data_is_looked_for(run_main):
    with pytest.raises(InputError, match="--model /no/such: neither a directory"):
        run_main(["--model", "/no/such", "--data", "/no/such.jsonl"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_weights_in_half_precision_are_refused(dtype):
    with pytest.raises(InputError, match=r"--lora_rank 0: updates .* what helps: --dtype float32, or LoRA"):
        parse_config(["--dtype", dtype, "--lora_rank", "0"])
    for rank_, chosen in ((0, "float32"), (8, "bfloat16")):
        on_gpu = train.on_device(TrainConfig(lora_rank=rank_), torch.device("cuda"))
        assert (on_gpu.dtype, on_gpu.gradient_checkpointing) == (chosen, True)


def test_a_problem_without_an_answer_is_not_graded():
    run = SimpleNamespace(tokenizer=train.loading.load_tokenizer("tiny"), grader=ExactGrader())
    drawn, keys = [train.Problem("1+1", "so two", "")], [(42, train.ROLLOUT_STREAM, 0, 0)]
    assert train.sample_rows(drawn, keys, [Response([5], True)], run)[0]["correct"] is None


def test_another_reference_changes_the_teachers_context_alone(qwen3, data, tmp_path, run_main, monkeypatch):
    """The engine gets the very prompts of the paper's run, whatever the teacher is shown."""
    original, sampled = GenerateEngine.sample, []

    def spy(self, prompts, *args):
        sampled.append(prompts)
        return original(self, prompts, *args)

    monkeypatch.setattr(GenerateEngine, "sample", spy)
    losses = set()
    for kind in ("own", "other", "none", "answer"):
        run_main(flags(qwen3, data, tmp_path / kind, "--num_steps", 1, "--reference", kind))
        losses.add(metrics(tmp_path / kind)[0]["loss"])
    assert sampled == 4 * sampled[:1] and len(losses) == 4


def test_a_loss_that_is_not_a_number_stops_with_step_and_problems(qwen3, data, tmp_path, run_main, monkeypatch):
    original = train.model.response_hidden

    def broken(model, prompts, responses):
        hidden = original(model, prompts, responses)
        return hidden * float("nan") if hidden.requires_grad and broken.steps > 1 else hidden

    broken.steps = 0
    seed = train.seed_step

    def count(*args):
        broken.steps += 1
        seed(*args)

    monkeypatch.setattr(train.model, "response_hidden", broken)
    monkeypatch.setattr(train, "seed_step", count)
    expected = sorted(step_problems(len(PROBLEMS), 4, 42, 1))
    with pytest.raises(FloatingPointError) as caught:
        run_main(flags(qwen3, data, tmp_path / "run", "--num_steps", 3))
    assert "step 1: loss nan" in str(caught.value) and str(expected) in str(caught.value)
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run/checkpoint-1").is_dir()


def test_problems_that_are_too_long_are_left_out_and_the_others_keep_their_numbers(qwen3, data, tmp_path, run_main):
    lines = data.read_text().splitlines(keepends=True)
    long = json.dumps({"problem": "Long?", "solution": "word " * 3000, "answer": "1"}) + "\n"
    data.write_text("".join([*lines[:2], long, *lines[2:], long]))
    output = run_main(flags(qwen3, data, tmp_path / "run", "--num_steps", 4))
    assert f"{len(lines)} problems of {data}; 2 left out, with a response longer than 2048 tokens: row 2, 16" in output
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert sorted(row["problem"] for row in rows[:15]) == [0, 1, *range(3, 16)]  # the first epoch
    for row in rows:
        wanted = json.loads(data.read_text().splitlines()[row["problem"]])
        assert row["correct"] == (row["text"].endswith(wanted["solution"]))


def test_a_prompt_that_just_fits_is_kept_and_a_longer_one_is_named(qwen3, data, held_out, tmp_path, run_main):
    """The longer context with its response may fill --max_length, and may not exceed it."""
    tokenizer = train.loading.load_tokenizer(str(qwen3))
    longest = max(len(train.teacher.teacher_prompt(tokenizer, problem)) for problem in load_problems(str(data)))
    for limit, words in ((longest + 10, "15 problems"), (longest + 9, "left out")):
        output = run_main(flags(qwen3, data, tmp_path / str(limit), "--num_steps", 1, "--max_length", limit))
        assert words in output and ("left out" in output) == (limit == longest + 9)
    with pytest.raises(InputError, match=r"--data .*: no prompt leaves room for 10 new tokens in 20"):
        run_main(flags(qwen3, data, tmp_path / "none", "--max_length", 20))
    assert not (tmp_path / "none/config.json").exists()  # the folder is free for the same command, mended
    with held_out.open("a") as file:
        file.write(json.dumps({"problem": "long " * 2000, "answer": "2"}))
    with pytest.raises(InputError, match=r"--eval_data .*, row 1: a prompt of \d+ tokens .* context of 2048"):
        run_main(flags(qwen3, data, tmp_path / "held_out", "--eval_data", held_out))


def test_the_rehearsal_changes_nothing_and_names_what_helps(qwen3, data, tmp_path, monkeypatch):
    """As on a GPU: before step 0, the longest prompts with responses of full length, forward and backward."""
    config = parse_config(flags(qwen3, data, tmp_path / "run"))
    run = build(config, torch.device("cpu"), ExactGrader())
    before, seen = [p.detach().clone() for p in run.parameters], []
    hidden = train.model.response_hidden
    monkeypatch.setattr(train.model, "response_hidden", lambda *args: seen.append(args[1:]) or hidden(*args))
    train.rehearse(run, ([5, 6], [5, 6, 7]), config)
    ids = [run.tokenizer.eos_token_id] * 10
    assert seen == [([[5, 6, 7]] * 3, [ids] * 3), ([[5, 6]] * 3, [ids] * 3)]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, run.parameters, strict=True))
    assert not run.optimizer.state

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.model, "response_hidden", full)
    with pytest.raises(InputError, match=r"3 rows with prompts of 2 and 3 tokens and 10 new .* --micro_batch_size"):
        train.rehearse(run, ([5, 6], [5, 6, 7]), config)


def test_reopold_resumes_with_its_own_micro_batch_only(qwen3, data, tmp_path, run_main):
    """Its quantile is over a micro-batch, so the size is part of the method, as other options are of any."""
    reopold = flags(qwen3, data, tmp_path / "run", "--method", "reopold", "--num_steps", 1)
    run_main(reopold)
    for changed, told in ((["--micro_batch_size", "2"], "--micro_batch_size 3, not 2"),
                          (["--temperature", "0.5"], r"--temperature 1\.1, not 0\.5")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            run_main([*reopold, *changed, "--resume"])


def test_held_out_accuracy_is_measured_before_and_after(qwen3, data, held_out, tmp_path, run_main, monkeypatch):
    """By the evaluation protocol and greedy, whatever the rollouts' sampling."""
    original, calls = train.evaluate.solve, []

    def spy(engine, tokenizer, problems, jobs, settings, prompts):
        calls.append((jobs, settings, prompts.evaluation))
        return original(engine, tokenizer, problems, jobs, settings, prompts=prompts)

    monkeypatch.setattr(train.evaluate, "solve", spy)
    apart = ("--temperature", 0.7, "--distill_temperature", 1.3, "--top_k", 7, "--top_p", 0.8)
    run = tmp_path / "run"
    output = run_main(flags(qwen3, data, run, "--eval_data", held_out, *apart))
    protocol = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=10)
    sampled = ([(42, 0, 0)], protocol, EVALUATION_PROMPT)
    assert calls == 2 * [sampled, ([(42, 0, 0)], replace(protocol, temperature=0.0), EVALUATION_PROMPT)]
    wrong = {"sampled": 0.0, "greedy": 0.0}
    assert json.loads((run / "evaluation.json").read_text()) == {"0": wrong, "2": wrong}
    rows = [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]
    order = [(row["step"], row["decoding"], row["problem"], row["sample"]) for row in rows]
    assert order == [(step, *row) for step in (0, 2) for row in (("greedy", 0, 0), ("sampled", 0, 0))]
    assert all(isinstance(row["text"], str) and row["tokens"] <= 10 and row["correct"] is False for row in rows)
    assert "after 2 steps: sampled 0.0000 -> 0.0000, greedy 0.0000 -> 0.0000 (1 problems)" in output


@pytest.mark.slow
def test_held_out_accuracy_on_the_way_is_kept_once(tmp_path, run_main):
    """--eval_steps; the embedded model, so that there is something to count. A resumed run does not measure twice."""
    held_out = tmp_path / "held_out.jsonl"
    rows = [{"problem": p.problem, "answer": p.answer} for p in tiny_problems("heldout", 4)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(run, *more):
        words = "--num_steps 2 --batch_size 2 --eval_steps 1 --save_steps 1 --max_new_tokens 48 --device cpu"
        return [*words.split(), "--eval_data", str(held_out), "--output_dir", str(run), *more]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_main(arguments(whole))
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert list(evaluation) == ["0", "1", "2"]
    samples = [json.loads(line) for line in (whole / "heldout.jsonl").read_text().splitlines()]
    for step, accuracies in evaluation.items():
        for decoding, accuracy in accuracies.items():
            marks = [row["correct"] for row in samples if (row["step"], row["decoding"]) == (int(step), decoding)]
            assert len(marks) == 4 and accuracy == sum(marks) / 4
    assert any(row["correct"] for row in samples)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-2")
    output = run_main(arguments(broken, "--resume"))
    assert "after 0 steps" not in output and "after 2 steps" in output and "all 2 steps are done" not in output
    assert "all 2 steps are done" in run_main(arguments(broken, "--resume"))
    assert json.loads((broken / "evaluation.json").read_text()) == evaluation
    assert (broken / "heldout.jsonl").read_text() == (whole / "heldout.jsonl").read_text()


def test_a_template_with_the_date_renders_the_runs_first_day(qwen3, data, tmp_path, run_main):
    """A run that is resumed on another day goes on with the very prompts that it began with."""
    model = tmp_path / "model"
    shutil.copytree(qwen3, model)
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + template.read_text())
    arguments = flags(model, data, tmp_path / "run", "--save_steps", 1)
    output = run_main(arguments)
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert f"the chat template shows the date: {record['date']}" in output
    whole = metrics(tmp_path / "run")
    record["date"] = record["inputs"]["prompts"]["chat"]["date"] = "2001-02-03"
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    output = run_main([*arguments, "--resume"])
    assert "the chat template shows the date: 2001-02-03" in output, output
    assert metrics(tmp_path / "run")[0] == whole[0] and metrics(tmp_path / "run")[1]["loss"] != whole[1]["loss"]


def test_another_models_weights_may_score(qwen3, data, tmp_path, run_main):
    """--teacher MODEL: plain on-policy distillation; the same weights under another name are the fixed teacher."""
    twin, other = tmp_path / "twin", tmp_path / "other"
    shutil.copytree(qwen3, twin)
    families.make_checkpoint("qwen3", other, seed=1)
    losses = {}
    for name, given in (("fixed", "fixed"), ("twin", twin), ("other", other)):
        run_main(flags(qwen3, data, tmp_path / f"run-{name}", "--num_steps", 1, "--teacher", given))
        losses[name] = metrics(tmp_path / f"run-{name}")[0]["loss"]
    assert losses["twin"] == losses["fixed"] != losses["other"]
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    with pytest.raises(InputError, match=r"no prompt leaves room for .* in 20"):
        run_main(flags(qwen3, data, tmp_path / "short", "--num_steps", 1, "--teacher", twin))
    with pytest.raises(InputError, match="--teacher frozen: none of fixed, ema, live, and neither a directory"):
        parse_config(["--teacher", "frozen"])
    with pytest.raises(InputError, match=r"--teacher .*: its vocabulary is not the student's"):
        run_main(flags("tiny", data, tmp_path / "tiny", "--num_steps", 1, "--teacher", other))
    (other / "model.safetensors").write_text("torn")
    with pytest.raises(InputError, match=r"^--teacher .*other: cannot be loaded"):
        run_main(flags(qwen3, data, tmp_path / "torn", "--num_steps", 1, "--teacher", other))
