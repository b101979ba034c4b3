import inspect
import io
import json
import math
import os
import shutil
import signal
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
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
from loss import METHODS, Method, clipped_divergence, method_loss, sequence_mean
from model import LoRALinear, lora_parameters
from problems import load_problems, tiny_problems
from rollout import Response, Sampling
from runtime import records
from runtime.checkpoint import damage
from runtime.engines import GenerateEngine
from runtime.ranks import rank
from runtime.records import read_rows
from teacher import EVALUATION_PROMPT
from train import PRESETS, Rollout, TrainConfig, build, micro_batches, parse_config, step_problems
from weighting import SCHEDULES

PROBLEMS = [{"problem": f"How many clips are {a} and {b}{' and nothing more' * (a % 3)}?",
             "solution": f"{a}+{b}=\\boxed{{{a + b}}}"} for a in range(1, 6) for b in range(1, 4)]  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": ""}) + "\n" for row in PROBLEMS))
    return path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A file with one held-out problem."""
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    path.write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    return path


def flags(checkpoint, data, *more) -> list[str]:
    """A run of three steps of four short rollouts; later flags win."""
    flat = {
        "model": checkpoint, "data": data, "num_steps": 3, "batch_size": 4, "micro_batch_size": 3, "save_steps": 2,
        "max_new_tokens": 6, "lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 1e-3, "device": "cpu",
    }  # fmt: skip
    return [word for name, value in flat.items() for word in (f"--{name}", str(value))] + [str(word) for word in more]


@dataclass(frozen=True)
class Run:
    """A run's folder; what it has printed and its exit status."""

    folder: Path
    output: str = ""
    status: int = 0

    @property
    def metrics(self) -> list[dict]:
        rows = read_rows(self.folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    @property
    def samples(self) -> list[dict]:
        return read_rows(self.folder / "samples.jsonl")

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def adapter(self, step: int) -> dict:
        return load_file(self.folder / f"checkpoint-{step}" / "adapter_model.safetensors")


def train_in(folder: Path, arguments: list[str]) -> Run:
    """train.py in this process, which has its signal handlers again behind it."""
    before, printed = {number: signal.getsignal(number) for number in SIGNALS}, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["train.py", *arguments, "--output_dir", str(folder)])
        try:
            status = train.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return Run(folder, printed.getvalue(), status)


@pytest.fixture
def run(qwen3, data, tmp_path):
    """Trains with these flags besides, in the folder `name`."""
    return lambda *more, name="run": train_in(tmp_path / name, flags(qwen3, data, *more))


@pytest.fixture(scope="module")
def whole(qwen3, data, tmp_path_factory):
    """Unbroken runs by their flags, each made once, to be read or copied."""
    return cache(lambda *more: train_in(tmp_path_factory.mktemp("whole"), flags(qwen3, data, *more)))


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


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
    models = ["Qwen/Qwen3-4B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "allenai/Olmo-3-7B-Think"]
    assert [PRESETS[name]["model"] for name in ("qwen3-4b", "dsr1-llama-8b", "olmo3-7b")] == models


@pytest.mark.parametrize(("words", "told"), [
    ("--data /no/such.jsonl", "/no/such.jsonl: no such data file"),
    ("--model /no/such --data /no/such.jsonl", "--model /no/such: neither a directory"),  # before any data
])  # fmt: skip
def test_the_script_ends_with_one_line(tmp_path, monkeypatch, words, told):
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split(), "--output_dir", f"{tmp_path}/run"])
    with pytest.raises(SystemExit) as ended:
        train.cli()
    assert str(ended.value.code).startswith(f"error: {told}") and "\n" not in ended.value.code
    assert not (tmp_path / "run").exists()


def test_columns_are_for_the_data_and_the_held_out_problems(tmp_path, monkeypatch):
    path, given = tmp_path / "data.csv", []
    path.write_text("task,why,key\n1+1,so 2,2\n")
    words = f"--data {path} --eval_data {path} --columns problem=task,solution=why,answer=key --device cpu"
    monkeypatch.setattr(train, "train", lambda *arguments: given.extend(arguments[-2:]) or 0)
    assert train_in(tmp_path / "run", words.split()).status == 0
    assert given == [[train.problems.Problem("1+1", "so 2", "2")]] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_weights_in_half_precision_are_refused(dtype):
    with pytest.raises(InputError, match=r"--lora_rank 0: updates .* what helps: --dtype float32, or LoRA"):
        parse_config(["--dtype", dtype, "--lora_rank", "0"])
    for rank_, chosen in ((0, "float32"), (8, "bfloat16")):
        on_gpu = train.on_device(TrainConfig(lora_rank=rank_), torch.device("cuda"))
        assert (on_gpu.dtype, on_gpu.gradient_checkpointing) == (chosen, True)


# One step


def test_gsm8k_like_data_runs_with_every_family(checkpoint, data, tmp_path):
    done = train_in(tmp_path / "run", flags(checkpoint, data, "--num_steps", 2))
    rows = done.metrics
    assert [row["step"] for row in rows] == [0, 1] and "  2/2  loss" in done.output
    assert rows[0]["learning_rate"] == 1e-3 and rows[1]["learning_rate"] == pytest.approx(5e-4)
    assert all(row["student_entropy"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert len(done.samples) == 8
    assert any(tensor.abs().max() > 0 for name, tensor in done.adapter(2).items() if "lora_B" in name)
    assert done.record["config"]["seed"] == 42 and done.record["versions"]["torch"] == torch.__version__


@pytest.fixture
def uneven_rollouts(monkeypatch):
    """The random models never end a response by themselves: row `slot` of a step is cut to 3 + slot tokens."""
    original, sampled = GenerateEngine.sample, []

    def cut(self, prompts, keys, settings, on_finished=None):
        responses = original(self, prompts, keys, settings)
        sampled.append([row.ids[: 3 + key[-1]] for row, key in zip(responses, keys, strict=True)])
        return [Response(ids, len(ids) % 2 == 0) for ids in sampled[-1]]

    monkeypatch.setattr(GenerateEngine, "sample", cut)
    return sampled


def by_outcome(r_M, scores, lengths, step, options):
    """A weight that looks at the row's outcome and at the loss, through which no gradient may flow."""
    return 1.0 + scores.correct + 2.0 * scores.finished + 0.1 * scores.loss


@pytest.mark.parametrize("method", ["opsd", "pwopsd", "eopd", "reopold", "by_outcome"])
def test_the_gradient_of_a_step_is_that_of_the_plain_loss(qwen3, data, monkeypatch, uneven_rollouts, method):
    """Of two micro-batches, scale included: autograd of `method_loss`, all rows in one batch; then clipped."""
    monkeypatch.setitem(METHODS, "by_outcome", Method(clipped_divergence, by_outcome, sequence_mean, clips=True))
    monkeypatch.setattr(ExactGrader, "grade", lambda self, text, gold: int(gold) % 3 == 0)
    words = ["--method", method, "--max_grad_norm", 1e-3]
    words += ["--tau_clip", 0.5] if method in ("opsd", "pwopsd", "by_outcome") else []
    config = parse_config(flags(qwen3, data, *words))
    run, seen = build(config, CPU, ExactGrader()), []
    for layer in lora_parameters(run.model)[1::2]:  # B: an adapter that has learned something
        torch.nn.init.normal_(layer, std=0.02)

    def keep(run):
        seen.append([p.grad.clone() for p in run.parameters])
        run.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(train, "update", keep)
    problems = load_problems(str(data))
    row, _ = train.train_step(0, run, problems, config)
    drawn, ids = train.step_share(0, problems, config)[0], uneven_rollouts[0]
    assert [len(row_ids) for row_ids in ids] == [3, 4, 5, 6]
    head_VD = run.model.get_output_embeddings().weight
    prompts = (train.teacher.student_prompt, train.teacher.teacher_prompt)
    x_stu, x_tch = ([prompt(run.tokenizer, problem) for problem in drawn] for prompt in prompts)
    with run.teacher.scoring() as scorer:
        teacher_BTV = train.model.response_hidden(scorer, x_tch, ids) @ head_VD.T
    student_BTV = train.model.response_hidden(run.model, x_stu, ids) @ head_VD.T
    ids_BT = torch.tensor([row_ids + [0] * (6 - len(row_ids)) for row_ids in ids])
    mask_BT = train.model.response_mask([3, 4, 5, 6])
    correct = [int(problem.answer) % 3 == 0 for problem in drawn]
    outcome = {"correct": correct, "finished": [False, True, False, True]}
    assert len({*correct}) == 2
    plain = method_loss(method, student_BTV, teacher_BTV, ids_BT, mask_BT, clip=0.5, **outcome)
    wanted = torch.autograd.grad(plain, run.parameters)
    norm = torch.cat([g.flatten() for g in wanted]).norm().item()
    assert row["loss"] == pytest.approx(plain.item(), abs=1e-6) and plain.item() != 0.0
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1e-2
    size = max(g.abs().max().item() for g in wanted) * 1e-3 / norm
    for ours, theirs in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(ours, theirs * 1e-3 / norm, atol=1e-4 * size, rtol=1e-3)


def test_a_step_samples_and_scores_with_its_own_settings(run, data, monkeypatch):
    sampled, scored, published, compared = [], [], [], []
    sample, score = GenerateEngine.sample, train.loss.score_tokens_from_hidden

    def spy_on_sampling(self, *args):
        sampled.append((self.tokenizer, *args))
        return sample(self, *args)

    def spy_on_scoring(method, student_MD, teacher_MD, head, teacher_head, ids_M, options):
        scored.append((inspect.unwrap(method.token_loss), method.reduction, options.distill_temperature, len(ids_M)))
        return score(method, student_MD, teacher_MD, head, teacher_head, ids_M, options)

    monkeypatch.setattr(GenerateEngine, "sample", spy_on_sampling)
    monkeypatch.setattr(train.loss, "score_tokens_from_hidden", spy_on_scoring)
    monkeypatch.setattr(train.engines, "publish", lambda *args: published.append(args[-1]))
    monkeypatch.setattr(train.ranks, "check_same_start", compared.append)
    done = run("--temperature", 0.7, "--distill_temperature", 1.3, "--top_k", 7, "--top_p", 0.8)
    assert "model.embed_tokens.weight" in dict(compared[0])  # ranks that read other weights are refused
    problems = load_problems(str(data))
    assert len(sampled) == 3 and published == [0, 1, 2, 3]  # a server samples from the weights of each step
    for step, (tokenizer, prompts, keys, settings) in enumerate(sampled):
        picked = [problems[index] for index in step_problems(len(problems), 4, 42, step)]
        assert prompts == [train.teacher.student_prompt(tokenizer, problem) for problem in picked]
        assert keys == [(42, train.ROLLOUT_STREAM, step, slot) for slot in range(4)]
        assert settings == Sampling(temperature=0.7, top_p=0.8, top_k=7, max_new_tokens=6)
    tokens = [row["tokens"] for row in done.samples]
    assert len(scored) == 6 and sum(row[-1] for row in scored) == sum(tokens)  # micro-batches of 3 and 1
    assert {row[:3] for row in scored} == {(clipped_divergence, sequence_mean, 1.3)}


def test_the_optimizer_is_the_papers(qwen3, data):
    run = build(parse_config(flags(qwen3, data)), CPU, ExactGrader())
    optimizer = run.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    defaults = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    assert defaults == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert trained == [id(parameter) for parameter in lora_parameters(run.model)]
    assert run.scheduler.get_last_lr() == [1e-3]


def test_what_the_teacher_is_changes_its_context_or_its_weights_alone(run, qwen3, tmp_path):
    """Weights of the base or of another model, of the student as it is (an EMA of decay 0) or was; other references."""
    twin = shutil.copytree(qwen3, tmp_path / "twin")
    other = families.make_checkpoint("qwen3", tmp_path / "other", seed=1)
    kinds = [("fixed",), (twin,), ("live",), ("ema", "--ema_decay", 0.0), (other,)]
    kinds += [("fixed", "--reference", shown) for shown in ("other", "none", "answer")]
    runs = [run("--num_steps", 2, "--teacher", *kind, name=str(number)) for number, kind in enumerate(kinds)]
    assert all(each.samples[:4] == runs[0].samples[:4] for each in runs)  # the paper's rollouts
    first, second = zip(*([row["loss"] for row in each.metrics] for each in runs), strict=True)
    assert first[:4] == pytest.approx([first[0]] * 4, abs=1e-6)  # the adapter is new
    assert len({round(loss, 4) for loss in first[3:]}) == 5
    fixed, same, live, fast = second[:4]
    assert same == fixed and fast == pytest.approx(live, abs=1e-6) and abs(fixed - live) > 1e-4

    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    with pytest.raises(InputError, match=r"no prompt leaves room for .* in 20"):
        run("--teacher", twin, name="short")
    with pytest.raises(InputError, match="--teacher frozen: none of fixed, ema, live, and neither a directory"):
        parse_config(["--teacher", "frozen"])
    with pytest.raises(InputError, match=r"--teacher .*: its vocabulary is not the student's"):
        run("--model", "tiny", "--teacher", other, name="tiny")
    (other / "model.safetensors").write_text("torn")
    with pytest.raises(InputError, match=r"^--teacher .*other: cannot be loaded"):
        run("--teacher", other, name="torn")


def test_dropout_reaches_the_student_and_checkpointing_changes_nothing(run, whole, monkeypatch):
    """With B = 0 dropout changes only the first loss's gradient. What is computed again draws the same numbers."""
    without, (forward, calls, runs) = whole().metrics, (LoRALinear.forward, [], [])

    def counted(self, x):
        calls[-1] += 1
        return forward(self, x)

    monkeypatch.setattr(LoRALinear, "forward", counted)
    for given in ("false", "true"):
        calls.append(0)
        runs.append(run("--gradient_checkpointing", given, "--lora_dropout", 0.5, name=given))
    plain, checkpointed = (each.metrics for each in runs)
    assert plain[0]["loss"] == without[0]["loss"]
    assert plain[0]["grad_norm"] != pytest.approx(without[0]["grad_norm"], rel=1e-2)
    assert plain[1]["loss"] != pytest.approx(without[1]["loss"], abs=1e-4)
    for name, within in (("loss", {"abs": 1e-6}), ("grad_norm", {"rel": 1e-5})):
        assert [row[name] for row in checkpointed] == pytest.approx([row[name] for row in plain], **within)
    assert largest_difference(runs[1].adapter(3), runs[0].adapter(3)) < 1e-5
    assert calls[1] - calls[0] == 3 * 2 * 14  # three steps of two micro-batches, seven projections in two blocks


def test_bfloat16_trains_a_float32_adapter(run, monkeypatch):
    hidden, seen = train.model.response_hidden, set()

    def spy(*args):
        states = hidden(*args)
        seen.add(states.dtype)
        return states

    monkeypatch.setattr(train.model, "response_hidden", spy)
    done = run("--dtype", "bfloat16", "--num_steps", 2)
    assert seen == {torch.bfloat16}
    rows, weights = done.metrics, done.adapter(2)
    assert len(rows) == 2
    assert all(math.isfinite(row[name]) and row[name] != 0.0 for row in rows for name in ("loss", "grad_norm"))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


class Strict(ExactGrader):
    """As a user may write one: it wants two texts."""

    def match(self, answer, gold):
        return answer.strip() == gold.strip()


def test_a_problem_without_an_answer_is_not_graded_and_a_text_without_a_box_is_wrong():
    run = SimpleNamespace(tokenizer=train.loading.load_tokenizer("tiny"), grader=Strict())
    drawn, keys = [train.Problem("1+1", "so two", ""), train.Problem("1+1", "", "2")], [(42, 1, 0, 0)] * 2
    rows = train.sample_rows(drawn, keys, [Response([5], True)] * 2, run)
    assert [row["correct"] for row in rows] == [None, False]


def test_a_loss_that_is_not_a_number_stops_with_step_and_problems(run, tmp_path, monkeypatch):
    original = train.model.response_hidden

    def broken(model, prompts, responses):
        hidden = original(model, prompts, responses)
        return hidden * float("nan") if hidden.requires_grad and (tmp_path / "run/metrics.jsonl").exists() else hidden

    monkeypatch.setattr(train.model, "response_hidden", broken)
    expected = sorted(step_problems(len(PROBLEMS), 4, 42, 1))
    with pytest.raises(FloatingPointError) as caught:
        run()
    assert "step 1: loss nan" in str(caught.value) and str(expected) in str(caught.value)
    assert len(Run(tmp_path / "run").metrics) == 1 and (tmp_path / "run/checkpoint-1").is_dir()


def test_weights_that_no_gradient_reaches_stay_as_they_are(qwen3, data):
    """A router's bias, say, of a mixture of experts under --lora_rank 0."""
    config = parse_config(flags(qwen3, data, "--lora_rank", 0, "--lora_alpha", 128))
    run = build(config, CPU, ExactGrader())
    spare = torch.nn.Parameter(torch.ones(2))
    run.model.register_parameter("spare", spare)
    assert any(each is spare for each in run.parameters)
    row, _ = train.train_step(0, run, load_problems(str(data)), config)
    assert row["grad_norm"] > 0.0 and spare.tolist() == [1.0, 1.0]


def test_a_step_is_divided_by_any_sum_of_weights_but_none(qwen3, data, monkeypatch):
    """REOPOLD's mask may be empty over a whole step; a sum below 0 is one, too."""
    rows = {}
    for value in (0.0, 1.0, -1.0):
        monkeypatch.setitem(SCHEDULES, "all", lambda r_M, value=value: torch.full_like(r_M, value))
        config = parse_config(flags(qwen3, data, "--schedule", "all", "--reduction", "weighted_mean"))
        rows[value], _ = train.train_step(0, build(config, CPU, ExactGrader()), load_problems(str(data)), config)
    assert rows[0.0]["loss"] == rows[0.0]["grad_norm"] == 0.0
    assert all(rows[-1.0][name] == rows[1.0][name] != 0.0 for name in ("loss", "grad_norm"))


def test_a_step_whose_rows_cannot_be_written_is_not_saved(run, tmp_path, monkeypatch):
    """It is made again on --resume, and no row is missing."""
    write, calls = records.append_rows, []

    def fails_late(path, rows):
        calls.append(path)
        if len(calls) == 3:  # metrics and samples of step 0, then those of step 1
            raise InputError("the disk is full")
        write(path, rows)

    monkeypatch.setattr(records, "append_rows", fails_late)
    with pytest.raises(InputError, match="the disk is full"):
        run("--save_steps", 1)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.setattr(records, "append_rows", write)
    assert [row["step"] for row in run("--save_steps", 1, "--resume", "true").samples] == [0] * 4 + [1] * 4 + [2] * 4


def test_problems_that_are_too_long_are_left_out_and_the_others_keep_their_numbers(run, data, tmp_path):
    lines = data.read_text().splitlines(keepends=True)
    long = json.dumps({"problem": "Long?", "solution": "word " * 2100, "answer": "1"}) + "\n"
    longer = tmp_path / "longer.jsonl"
    longer.write_text("".join([*lines[:2], long, *lines[2:], long]))
    done = run("--data", longer, "--batch_size", 15, "--num_steps", 1)
    assert f"15 problems of {longer}; 2 left out, with a response longer than 2048 tokens: row 2, 16" in done.output
    assert sorted(row["problem"] for row in done.samples) == [0, 1, *range(3, 16)]
    wanted = read_rows(longer)
    assert all(row["correct"] == row["text"].endswith(wanted[row["problem"]]["solution"]) for row in done.samples)


def test_a_prompt_that_just_fits_is_kept_and_a_longer_one_is_named(run, qwen3, data, tmp_path):
    """The longer context with its response may fill --max_length, and may not exceed it."""
    tokenizer = train.loading.load_tokenizer(str(qwen3))
    longest = max(len(train.teacher.teacher_prompt(tokenizer, problem)) for problem in load_problems(str(data)))
    for limit, words in ((longest + 6, "15 problems"), (longest + 5, "left out")):
        output = run("--num_steps", 1, "--max_length", limit, name=str(limit)).output
        assert words in output and ("left out" in output) == (limit == longest + 5)
    with pytest.raises(InputError, match=r"--data .*: no prompt leaves room for 6 new tokens in 20"):
        run("--max_length", 20, name="none")
    assert not (tmp_path / "none/config.json").exists()  # the folder is free for the same command, mended
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in ("1+1?", "long " * 2000)))
    with pytest.raises(InputError, match=r"--eval_data .*, row 1: a prompt of \d+ tokens .* context of 2048"):
        run("--eval_data", long, name="long")


def test_the_rehearsal_changes_nothing_and_names_what_helps(qwen3, data, monkeypatch):
    """As on a GPU: before step 0, the longest prompts with responses of full length, forward and backward."""
    config = parse_config(flags(qwen3, data))
    run = build(config, CPU, ExactGrader())
    before, seen = [p.detach().clone() for p in run.parameters], []
    hidden = train.model.response_hidden
    monkeypatch.setattr(train.model, "response_hidden", lambda *args: seen.append(args[1:]) or hidden(*args))
    train.rehearse(run, ([5, 6], [5, 6, 7]), replace(config, micro_batch_size=9, batch_size=3))
    ids = [run.tokenizer.eos_token_id] * 6
    assert seen == [([[5, 6, 7]] * 3, [ids] * 3), ([[5, 6]] * 3, [ids] * 3)]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, run.parameters, strict=True))
    assert not run.optimizer.state

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.model, "response_hidden", full)
    with pytest.raises(InputError, match=r"3 rows with prompts of 2 and 3 tokens and 6 new .* --micro_batch_size"):
        train.rehearse(run, ([5, 6], [5, 6, 7]), config)


# Ranks


@pytest.mark.parametrize("method", [pytest.param("opsd", marks=pytest.mark.slow), "pwopsd"])
def test_two_ranks_equal_one(tmp_path, method):
    """Five rollouts that end where they will, 3 on one rank and 2 on the other: neither rows nor tokens are even."""
    rows = [json.dumps(asdict(problem)) + "\n" for problem in tiny_problems("train", 5)]
    (tmp_path / "five.jsonl").write_text("".join(rows))
    (tmp_path / "one.jsonl").write_text(rows[0])
    words = f"--method {method} --num_steps 1 --batch_size 5 --max_new_tokens 48 --data {tmp_path}/five.jsonl "
    words += f"--eval_data {tmp_path}/one.jsonl --device cpu"
    one, two = train_in(tmp_path / "one", words.split()), Run(tmp_path / "two")
    run_ranks(tmp_path, script, "train.py", [*words.split(), "--output_dir", str(two.folder)])
    by_row = [row["tokens"] for row in one.samples]
    assert len(set(by_row)) > 1 and sum(by_row[::2]) / 3 != sum(by_row[1::2]) / 2
    ours, theirs = one.metrics[0], two.metrics[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert ours["mean_length"] == theirs["mean_length"]
    assert largest_difference(one.adapter(1), two.adapter(1)) < 1e-5
    assert one.samples == two.samples and two.record["ranks"] == 2


def test_ranks_that_read_other_files_are_refused(run, monkeypatch):
    def other_data(value):
        return [value, {**value, "data": "other"}] if isinstance(value, dict) and "data" in value else gather(value)

    gather = train.ranks.gather_objects
    monkeypatch.setattr(train.ranks, "gather_objects", other_data)
    with pytest.raises(InputError, match="the ranks have read other data"):
        run()


def stopped_on_two_ranks(data: str, model: str, folder: str, victim: int, fails: bool) -> None:
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
    sys.argv = ["train.py", *flags(model, data, "--output_dir", folder)]
    with pytest.raises((InputError, RuntimeError)) if fails else nullcontext():
        assert train.main() == 128 + signal.SIGTERM


@pytest.mark.parametrize(("victim", "fails"), [pytest.param(0, False, marks=pytest.mark.slow), (1, False), (1, True)])
def test_what_stops_one_of_two_ranks_stops_both_at_the_same_step(qwen3, data, tmp_path, victim, fails):
    run_ranks(tmp_path, stopped_on_two_ranks, str(data), str(qwen3), str(tmp_path / "run"), victim, fails)
    assert len(Run(tmp_path / "run").metrics) == 1 and damage(tmp_path / "run/checkpoint-1") is None


# Runs that are taken up again

AVERAGED = ("--teacher", "ema", "--lora_dropout", "0.1")


@pytest.mark.parametrize("more", [(), AVERAGED, ("--lora_rank", "0", "--lora_alpha", "128")])
def test_a_resumed_run_equals_an_unbroken_one(run, whole, tmp_path, more):
    unbroken = whole(*more)
    shutil.copytree(unbroken.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-3")  # as if killed while step 3 was being saved, with a torn line
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    again = run("--resume", *more)
    assert f"going on from {again.folder}/checkpoint-2" in again.output
    assert again.metrics == unbroken.metrics and again.samples == unbroken.samples
    assert sorted(path.name for path in unbroken.folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    for path in (unbroken.folder / "checkpoint-3").glob("*.safetensors"):
        ours, theirs = load_file(again.folder / "checkpoint-3" / path.name), load_file(path)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()


def test_a_damaged_checkpoint_is_passed_over_and_then_replaced(run, whole, tmp_path):
    shutil.copytree(whole().folder, tmp_path / "run")
    weights = tmp_path / "run/checkpoint-3/adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    output = run("--resume").output
    assert "checkpoint-3: adapter_model.safetensors is damaged" in output and "going on from" in output
    assert weights.read_bytes() == before and damage(tmp_path / "run/checkpoint-3") is None


def test_a_resumed_run_wants_the_files_it_began_with(run, qwen3, data, held_out, tmp_path):
    """By content, though each keeps its name: data, base weights, template, held-out problems, prompts."""
    model, prompts = shutil.copytree(qwen3, tmp_path / "model"), tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"student": "Sum: {problem}"}))
    given = ("--model", model, "--num_steps", 1, "--eval_data", held_out, "--prompts", prompts)
    run(*given)
    for flag, path, old, new in (
        ("data", data, b"clips", b"chips"),
        ("model", model / "model.safetensors", b"\x00\x00\x80?", b"\x00\x00\x00?"),  # each 1.0 of a norm becomes 0.5
        ("model", model / "chat_template.jinja", b"assistant", b"Assistant"),
        ("eval_data", held_out, b"2", b"3"),
        ("prompts", prompts, b"Sum", b"Total"),
    ):
        before = path.read_bytes()
        path.write_bytes(before.replace(old, new))
        assert path.read_bytes() != before, path
        with pytest.raises(InputError, match=rf"what --{flag} .* names has changed since"):
            run(*given, "--resume")
        path.write_bytes(before)
    with pytest.raises(
        InputError, match=rf"was started with --eval_data {held_out}, not tiny:heldout; for another run"
    ):
        run(*given, "--eval_data", "tiny:heldout", "--resume")
    assert "going on from" in run(*given, "--resume").output


def test_a_resumed_run_keeps_its_options_and_the_grader_that_auto_has_found(run, monkeypatch):
    """REOPOLD's quantile is over a micro-batch, so the size is part of the method, as other options are of any."""
    reopold = ("--method", "reopold", "--num_steps", 1)
    grader = run(*reopold).record["config"]["grader"]
    for changed, told in ((("--micro_batch_size", 2), "--micro_batch_size 3, not 2"),
                          (("--temperature", 0.5), r"--temperature 1\.1, not 0\.5")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            run(*reopold, *changed, "--resume")
    for method, is_refused in (("reopold", True), ("opsd", False)):  # by ranks a step's micro-batches differ, too
        given = ("--method", method, "--num_steps", 1)
        folder = run(*given, name=method).folder
        record = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(record | {"ranks": 2}))
        with pytest.raises(InputError, match="was started on 2 ranks, not 1") if is_refused else nullcontext():
            run(*given, "--resume", name=method)
    assert grader in train.grading.GRADERS
    if grader != "exact":
        monkeypatch.setattr(train.grading, "make_grader", lambda *_: train.grading.ExactGrader())
        with pytest.raises(InputError, match="--grader math-verify, not exact"):
            run(*reopold, "--resume")


def test_a_template_with_the_date_renders_the_runs_first_day(run, qwen3, tmp_path):
    """A run that is resumed on another day goes on with the very prompts that it began with."""
    model = shutil.copytree(qwen3, tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + template.read_text())
    given = ("--model", model, "--save_steps", 1, "--num_steps", 2)
    first = run(*given)
    before, record = first.metrics, first.record
    assert f"the chat template shows the date: {record['date']}" in first.output
    record["date"] = record["inputs"]["prompts"]["chat"]["date"] = "2001-02-03"
    (first.folder / "config.json").write_text(json.dumps(record))
    shutil.rmtree(first.folder / "checkpoint-2")
    again = run(*given, "--resume")
    assert "the chat template shows the date: 2001-02-03" in again.output
    assert again.metrics[0] == before[0] and again.metrics[1]["loss"] != before[1]["loss"]


@pytest.mark.parametrize(("where", "number"), [
    ("sampling", signal.SIGTERM), ("scoring", signal.SIGINT), ("scoring", signal.SIGHUP), ("update", signal.SIGUSR1),
])  # fmt: skip
def test_a_signal_keeps_the_last_finished_step(run, whole, tmp_path, monkeypatch, where, number):
    """It leaves a step wherever it stands, except within its update; the run then goes on as if unbroken."""
    unbroken, stopped = whole(*AVERAGED), Run(tmp_path / "run")
    places = {"sampling": (train.rollout.StreamSampler, "__call__"), "scoring": (LoRALinear, "forward")}
    owner, name = places.get(where, (train, "update"))
    original, calls = getattr(owner, name), []

    def preempted(*args, **more):
        calls.append(len(stopped.metrics) if (stopped.folder / "metrics.jsonl").exists() else 0)
        if (calls[-1] == 1 and calls.count(1) == 5) or (where == "update" and calls == [0, 1]):
            os.kill(os.getpid(), number)
        return original(*args, **more)

    before = signal.signal(number, signal.SIG_DFL)  # where the tests run under nohup, it is ignored
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, preempted)
        ended = run(*AVERAGED)
    signal.signal(number, before)
    finished = 2 if where == "update" else 1
    assert f"stopped by a signal, saved after step {finished}; the same command with --resume" in ended.output
    assert ended.status == 128 + number
    assert len(ended.metrics) == finished and damage(ended.folder / f"checkpoint-{finished}") is None
    again = run(*AVERAGED, "--resume")
    assert again.status == 0 and again.metrics == unbroken.metrics
    assert largest_difference(again.adapter(3), unbroken.adapter(3)) == 0.0


# Held-out problems


@pytest.mark.parametrize(("call", "behind"), [(2, 0), (4, 1), (10, 3)])
def test_sigterm_while_scoring_held_out_problems_is_made_up_for(run, whole, held_out, monkeypatch, call, behind):
    """At once: before step 0, on the way, at the end. Two calls to score (sampled, greedy), one for a step."""
    given = ("--eval_data", held_out, "--eval_steps", 1)
    unbroken, (original, calls) = whole(*given), (GenerateEngine.sample, [])

    def preempted(*args, **more):
        calls.append("begun")
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        response = original(*args, **more)
        calls[-1] = "done"
        return response

    with monkeypatch.context() as patch:
        patch.setattr(GenerateEngine, "sample", preempted)
        ended = run(*given)
    assert calls == ["done"] * (call - 1) + ["begun"]
    assert (f"saved after step {behind};" if behind else "stopped by a signal, before the first step") in ended.output
    saved = sorted(path.name for path in ended.folder.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step}" for step in range(1, behind + 1) if step in (2, behind)]
    evaluated = json.loads((ended.folder / "evaluation.json").read_text()) if behind else {}
    assert list(evaluated) == [str(step) for step in range(behind)]
    again = run(*given, "--resume")
    assert again.metrics == unbroken.metrics
    for name in ("evaluation.json", "heldout.jsonl"):
        assert (again.folder / name).read_text() == (unbroken.folder / name).read_text()
    assert largest_difference(again.adapter(3), unbroken.adapter(3)) == 0.0


def test_held_out_accuracy_is_measured_before_and_after(run, held_out, monkeypatch):
    """By the evaluation protocol and greedy, whatever the rollouts' sampling."""
    monkeypatch.setattr(ExactGrader, "match", Strict.match)  # is not asked about what has no box
    original, calls = train.evaluate.solve, []

    def spy(engine, tokenizer, problems, jobs, settings, prompts):
        calls.append((jobs, settings, prompts.evaluation))
        items = original(engine, tokenizer, problems, jobs, settings, prompts=prompts)
        return [replace(item, text="\\boxed{2}") if len(calls) == 4 else item for item in items]

    monkeypatch.setattr(train.evaluate, "solve", spy)
    apart = ("--temperature", 0.7, "--distill_temperature", 1.3, "--top_k", 7, "--top_p", 0.8)
    done = run("--num_steps", 2, "--eval_data", held_out, *apart)
    protocol = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=6)
    sampled = ([(42, 0, 0)], protocol, EVALUATION_PROMPT)
    assert calls == 2 * [sampled, ([(42, 0, 0)], replace(protocol, temperature=0.0), EVALUATION_PROMPT)]
    accuracies = {"0": {"sampled": 0.0, "greedy": 0.0}, "2": {"sampled": 0.0, "greedy": 1.0}}
    assert json.loads((done.folder / "evaluation.json").read_text()) == accuracies
    rows = read_rows(done.folder / "heldout.jsonl")
    order = [(row["step"], row["decoding"], row["problem"], row["sample"]) for row in rows]
    assert order == [(step, *row) for step in (0, 2) for row in (("greedy", 0, 0), ("sampled", 0, 0))]
    assert [row["correct"] for row in rows] == [False, False, True, False]
    assert all(isinstance(row["text"], str) and row["tokens"] <= 6 for row in rows)
    assert "after 2 steps: sampled 0.0000 -> 0.0000, greedy 0.0000 -> 1.0000 (1 problems)" in done.output
    again = run("--num_steps", 2, "--eval_data", held_out, *apart, "--resume").output
    assert "all 2 steps are done" in again and "held-out accuracy" not in again  # none is measured twice
