"""PW-OPSD training, Algorithm 1 of the paper, on one process or several.

    python train.py                                             the embedded model, about a minute on a laptop
    torchrun --nproc_per_node 4 train.py --preset qwen3-4b      the paper's run

Each step: sample one solution per prompt from the student, score every token of it in both contexts, weight the tokens'
losses by position, update. Ranks share the step's prompts. Every micro-batch adds the gradient of its numerator; they are
summed over micro-batches and ranks and divided once by the summed denominator, which is the exact mean over the whole step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from checkpoint import keep_lines, load_checkpoint, newest_checkpoint, save_checkpoint, write_atomically
from evaluate import is_correct, sample_solutions
from loss import LossOptions, LossTerms, get_method, loss_terms_from_hidden
from model import (
    add_lora,
    context_length,
    find_checkpoint,
    load_model,
    load_tokenizer,
    lora_parameters,
    pick_device,
    response_hidden,
    response_mask,
)
from problems import InputError, Problem, answers_match, extract_boxed, load_problems
from rollout import Rollout, check_sampling, sample
from teacher import Teacher, student_prompt, teacher_prompt

# Streams of random numbers, told apart by the second entry of their key (rollout.py).
ROLLOUT_STREAM, SHUFFLE_STREAM, DROPOUT_STREAM = 1, 2, 3


@dataclass
class TrainConfig(LossOptions):
    """Options of train.py. Defaults are the paper's (Section 4.1, Appendix H); presets change what they name."""

    preset: str | None = field(
        default=None, metadata={"help": "tiny (default without --model), qwen3-4b, dsr1-llama-8b, olmo3-7b"}
    )
    method: str = field(default="pwopsd", metadata={"help": "opsd, pwopsd, eopd or reopold"})
    model: str = field(default="tiny", metadata={"help": "directory or hub name; `tiny` is the embedded model"})
    data: str = field(
        default="siyanzhao/Openthoughts_math_30k_opsd", metadata={"help": ".jsonl path, hub name or tiny:train"}
    )
    output_dir: str | None = field(default=None, metadata={"help": "run folder; default runs/MODEL-METHOD-seedSEED"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in --output_dir, if any"})
    seed: int = 42
    num_steps: int = field(
        default=150, metadata={"help": "optimizer steps; the learning rate falls linearly to 0 over them"}
    )
    batch_size: int = field(default=32, metadata={"help": "prompts per step, over all ranks; one rollout each"})
    micro_batch_size: int = field(default=4, metadata={"help": "sequences per forward pass and rank"})
    learning_rate: float = 5e-6
    max_grad_norm: float = 0.1
    lora_rank: int = field(default=64, metadata={"help": "0 trains all weights"})
    lora_alpha: float = 128.0
    lora_dropout: float = field(
        default=0.0, metadata={"help": "the paper's text says 0.05, the authors' code runs with 0"}
    )
    teacher: str = field(default="fixed", metadata={"help": "fixed, ema or live"})
    ema_decay: float = field(default=0.99, metadata={"help": "decay of --teacher ema, per step"})
    max_new_tokens: int = 1024
    rollout_temperature: float = 1.1
    top_p: float = 0.95
    top_k: int = 20
    max_length: int = field(default=20000, metadata={"help": "tokens of the longer context with its response"})
    long_prompts: str = field(
        default="error", metadata={"help": "problems over --max_length or the context: error or drop"}
    )
    save_steps: int = field(default=25, metadata={"help": "steps between checkpoints; the last step is always saved"})
    eval_data: str | None = field(
        default=None, metadata={"help": "held-out problems, scored before and after training"}
    )
    eval_samples: int = field(default=1, metadata={"help": "samples per held-out problem"})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "default: on a GPU only"})
    device: str = "auto"
    dtype: str = field(default="auto", metadata={"help": "auto (bfloat16 on a GPU, else float32) or its name"})
    attention: str = field(default="sdpa", metadata={"help": "transformers' attn_implementation"})


PAPER = {"data": "siyanzhao/Openthoughts_math_30k_opsd", "long_prompts": "drop"}
PRESETS: dict[str, dict] = {
    # tau_clip 0.05 collapses a model of this size (README, "Clipping"); everything else is scale.
    "tiny": {
        "model": "tiny", "data": "tiny:train", "eval_data": "tiny:heldout", "num_steps": 30, "clip": 1.0, "max_new_tokens": 96,
        "micro_batch_size": 32, "learning_rate": 1e-3, "max_grad_norm": 1.0, "lora_rank": 16, "lora_alpha": 32.0, "top_k": 0,
    },
    "qwen3-4b": {**PAPER, "model": "Qwen/Qwen3-4B", "micro_batch_size": 4},
    "dsr1-llama-8b": {**PAPER, "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "micro_batch_size": 2},
    "olmo3-7b": {**PAPER, "model": "allenai/Olmo-3-7B-Think", "micro_batch_size": 2},
}  # fmt: skip
FREE_ON_RESUME = {"resume", "output_dir", "device", "micro_batch_size", "gradient_checkpointing", "save_steps"}


# ---------------------------------------------------------------------------------------------------------------
# One step of Algorithm 1


def step_problems(num_problems: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The problems of a step, a function of (seed, step) alone: epoch after epoch in a new order."""
    picked = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_problems)
        order = np.random.default_rng(np.random.SeedSequence((seed, SHUFFLE_STREAM, epoch))).permutation(num_problems)
        picked.append(int(order[offset]))
    return picked


def micro_batches(lengths: list[int], size: int) -> list[list[int]]:
    """Rows grouped by length, longest first, so that little is padded and a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]


def score_micro_batch(
    model: PreTrainedModel,
    teacher: Teacher,
    student_prompts: list[list[int]],
    teacher_prompts: list[list[int]],
    responses: list[list[int]],
    step: int,
    config: TrainConfig,
    clock: Clock,
) -> LossTerms:
    """Score the responses in both contexts and return their loss as a fraction, with a gradient for the student only."""
    with clock("teacher"), teacher.scoring() as scorer:
        teacher_hidden_BTD = response_hidden(scorer, teacher_prompts, responses)
        teacher_head_VD = scorer.get_output_embeddings().weight
    with clock("student"):
        student_hidden_BTD = response_hidden(model, student_prompts, responses)
        device = student_hidden_BTD.device
        lengths = [len(response) for response in responses]
        T = max(lengths)
        ids_BT = torch.tensor([response + [0] * (T - len(response)) for response in responses], device=device)
        return loss_terms_from_hidden(
            config.method, student_hidden_BTD, teacher_hidden_BTD, model.get_output_embeddings().weight, ids_BT,
            response_mask(lengths, device), options=config, step=step, teacher_head_weight_VD=teacher_head_VD,
        )  # fmt: skip


class Clock:
    """Seconds spent in named parts of a step; waits for the GPU at both ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def train_step(
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher,
    problems: list[Problem],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: TrainConfig,
) -> tuple[dict, list[dict]]:
    """Algorithm 1, one step over all ranks. Returns its metrics and this rank's rollouts as rows for samples.jsonl.

    Raises FloatingPointError, naming step and problems, where the loss or its gradient is not finite.
    """
    clock, parameters = Clock(), [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    seed_step(config.seed, step)
    slots = range(rank(), config.batch_size, world_size())
    picked = step_problems(len(problems), config.batch_size, config.seed, step)
    indices = [picked[slot] for slot in slots]

    with clock("sampling"):  # y ~ pi_theta(. | x_stu)
        rollout = sample(
            model, tokenizer, [student_prompt(tokenizer, problems[i]) for i in indices],
            [(config.seed, ROLLOUT_STREAM, step, slot) for slot in slots],
            temperature=config.rollout_temperature, top_p=config.top_p, top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
    teacher_prompts = [teacher_prompt(tokenizer, problems[i]) for i in indices]

    total_numerator = torch.zeros((), device=device)
    total_denominator = torch.zeros((), device=device)
    deciles = torch.zeros(10, len(DECILE_COLUMNS), device=device)
    bad: list[int] = []
    model.train()
    for rows in micro_batches(
        [len(p) + n for p, n in zip(teacher_prompts, rollout.lengths, strict=True)], config.micro_batch_size
    ):
        terms = score_micro_batch(
            model, teacher, [rollout.prompts[row] for row in rows], [teacher_prompts[row] for row in rows],
            [rollout.responses[row] for row in rows], step, config, clock,
        )  # fmt: skip
        with clock("update"):
            terms.numerator.backward()
        total_numerator += terms.numerator.detach()
        total_denominator += terms.denominator
        deciles += decile_sums(terms)
        if not terms.numerator.isfinite():
            bad += [indices[row] for row in rows]

    with clock("update"):
        for tensor in (total_numerator, total_denominator, deciles, *(p.grad for p in parameters)):
            sum_over_ranks(tensor)
        for parameter in parameters:
            parameter.grad /= total_denominator.clamp(min=torch.finfo(torch.float32).tiny)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        loss = total_numerator / total_denominator.clamp(min=torch.finfo(torch.float32).tiny)
        if not (loss.isfinite() and grad_norm.isfinite()):
            bad = sorted(index for part in gather_objects(bad) for index in part)
            raise FloatingPointError(
                f"step {step}: the loss is {loss.item()}, its gradient norm {grad_norm.item()}; problems {bad or picked}"
            )
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        teacher.update()

    texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    samples = [
        {"step": step, "problem": index, "text": text, "tokens": length, "finish_reason": "eos" if done else "length",
         "correct": answers_match(extract_boxed(text), problems[index].answer)}
        for index, text, length, done in zip(indices, texts, rollout.lengths, rollout.finished, strict=True)
    ]  # fmt: skip
    metrics = {"step": step, "loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": learning_rate}
    return {
        **metrics,
        **rollout_metrics(samples, problems),
        **decile_metrics(deciles),
        **seconds(clock, rollout),
    }, samples


# ---------------------------------------------------------------------------------------------------------------
# Metrics (their formulas stand in the README)


DECILE_COLUMNS = ("tokens", "divergence", "weight", "clipped_mass", "student_entropy", "teacher_entropy")


def decile_sums(terms: LossTerms) -> torch.Tensor:
    """[10, columns]: sums over the valid tokens of each tenth of their solution."""
    scores = terms.scores
    columns = (
        torch.ones_like(terms.weight),
        scores.loss.detach(),
        terms.weight,
        scores.clipped_mass,
        scores.student_entropy,
        scores.teacher_entropy,
    )
    decile = (terms.relative_position * 10).long().clamp(max=9)
    return torch.zeros(10, len(columns), device=decile.device).index_add_(0, decile, torch.stack(columns, dim=1))


def decile_metrics(sums: torch.Tensor) -> dict:
    """Token means over the step, and the same by tenth of the solution (`null` where no token lies)."""
    total, by_decile = sums.sum(dim=0).tolist(), sums.tolist()
    means = {name: total[i] / total[0] for i, name in enumerate(DECILE_COLUMNS) if i}
    tenths = {
        name: [row[i] / row[0] if row[0] else None for row in by_decile] for i, name in enumerate(DECILE_COLUMNS) if i
    }
    return {**means, "by_decile": tenths}


def rollout_metrics(samples: list[dict], problems: list[Problem]) -> dict:
    """Accuracy over the problems that have an answer, mean length and share that ended with EOS, over all ranks."""
    graded = [row["correct"] for row in samples if problems[row["problem"]].answer]
    ended = sum(row["finish_reason"] == "eos" for row in samples)
    sums = torch.tensor(
        [sum(graded), len(graded), sum(row["tokens"] for row in samples), ended, len(samples)], dtype=torch.float64
    )
    correct, count, tokens, ended, rows = sum_over_ranks(sums, cpu=True).tolist()
    return {"accuracy": correct / count if count else None, "mean_length": tokens / rows, "eos_rate": ended / rows}


def seconds(clock: Clock, rollout: Rollout) -> dict:
    parts = {f"seconds_{part}": round(value, 4) for part, value in clock.seconds.items()}
    return {**parts, "sampled_tokens_per_second": round(sum(rollout.lengths) / clock.seconds["sampling"], 1)}


def held_out_accuracy(model, tokenizer, problems: list[Problem], config: TrainConfig) -> float:
    """Avg@N on held-out problems by the evaluation protocol (evaluate.py), shared among the ranks."""
    jobs = [(index, number) for index in range(len(problems)) for number in range(config.eval_samples)][
        rank() :: world_size()
    ]
    correct = 0
    for start in range(0, len(jobs), EVAL_BATCH):
        batch = sample_solutions(
            model, tokenizer, problems, jobs[start : start + EVAL_BATCH], seed=config.seed, temperature=1.0, top_p=0.95,
            top_k=0, max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        correct += sum(is_correct(item, problems) for item in batch)
    counts = sum_over_ranks(torch.tensor([correct, len(jobs)], dtype=torch.float64), cpu=True)
    return (counts[0] / counts[1]).item()


EVAL_BATCH = 400


# ---------------------------------------------------------------------------------------------------------------
# Ranks and random numbers


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: torch.Tensor, cpu: bool = False) -> torch.Tensor:
    """Sum in place over all ranks; `cpu` for host tensors, which NCCL cannot carry itself."""
    if not dist.is_initialized():
        return tensor
    if cpu and dist.get_backend() == "nccl":
        moved = tensor.cuda()
        dist.all_reduce(moved)
        return tensor.copy_(moved)
    dist.all_reduce(tensor)
    return tensor


def gather_objects(value: object) -> list:
    gathered = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(gathered, value)
    return gathered


def seed_step(seed: int, step: int) -> None:
    """Everything torch draws within a step (LoRA dropout) depends on (seed, step, rank) alone."""
    torch.manual_seed(int(np.random.SeedSequence((seed, DROPOUT_STREAM, step, rank())).generate_state(1)[0]))


# ---------------------------------------------------------------------------------------------------------------
# The run


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """Flags over the preset over the paper's defaults; without --model and --preset the preset is `tiny`."""
    parser = HfArgumentParser(TrainConfig, description=__doc__)
    given = parser.parse_args(arguments)
    preset = given.preset or ("tiny" if given.model == "tiny" else None)
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
        parser.set_defaults(**PRESETS[preset], preset=preset)
    (config,) = parser.parse_args_into_dataclasses(arguments)
    check_config(config)
    return config


def check_config(config: TrainConfig) -> None:
    """Raise InputError, naming the flag, for values that cannot work."""
    get_method(config.method, config)
    check_sampling(config.rollout_temperature, config.top_p, config.top_k, config.max_new_tokens)
    for name in ("num_steps", "batch_size", "micro_batch_size", "save_steps", "eval_samples", "max_length"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least 1")
    for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
        if not 0.0 < getattr(config, name) < float("inf"):
            raise InputError(f"--{name} {getattr(config, name)}: must be positive")
    if config.lora_rank < 0 or not 0.0 <= config.lora_dropout < 1.0 or not 0.0 <= config.ema_decay <= 1.0:
        raise InputError("--lora_rank must be at least 0, --lora_dropout in [0, 1), --ema_decay in [0, 1]")
    if config.long_prompts not in ("error", "drop"):
        raise InputError(f"--long_prompts {config.long_prompts}: choose error or drop")
    if config.batch_size < world_size():
        raise InputError(f"--batch_size {config.batch_size}: fewer prompts than the {world_size()} ranks")
    if config.resume and config.output_dir is None:
        raise InputError("--resume needs --output_dir, the run to go on with")


def fitting_problems(problems: list[Problem], tokenizer, context: int, config: TrainConfig) -> list[Problem]:
    """The problems whose longer prompt leaves room for a response; others are an error or dropped, never cut."""
    room = min(config.max_length, context) - config.max_new_tokens
    kept = []
    for number, problem in enumerate(problems):
        longest = max(len(student_prompt(tokenizer, problem)), len(teacher_prompt(tokenizer, problem)))
        if longest <= room:
            kept.append(problem)
        elif config.long_prompts == "error":
            raise InputError(
                f"{config.data}, problem {number}: its prompt has {longest} tokens and --max_new_tokens {config.max_new_tokens}, "
                f"over the limit of {room + config.max_new_tokens} (--max_length {config.max_length}, context {context}); "
                "--long_prompts drop leaves such problems out"
            )
    if not kept:
        raise InputError(f"{config.data}: no problem fits into {room} prompt tokens")
    return kept


def open_run(config: TrainConfig) -> Path:
    """The run folder with config.json in it. Raises InputError if it holds a run that this one does not continue."""
    name = f"{config.preset or Path(config.model).name}-{config.method}-seed{config.seed}"
    run = Path(config.output_dir or f"runs/{name}")
    number = 2
    while config.output_dir is None and (run / "config.json").exists():
        run, number = Path(f"runs/{name}-{number}"), number + 1
    run = Path(gather_objects(str(run))[0])
    record = run / "config.json"
    if record.exists() and not config.resume:
        raise InputError(f"--output_dir {run}: holds another run; continue it with --resume or choose another folder")
    if record.exists():
        before = json.loads(record.read_text())["config"]
        for key, value in json.loads(json.dumps(asdict(config))).items():
            if key not in FREE_ON_RESUME and before.get(key) != value:
                raise InputError(f"--resume: {run} was started with --{key} {before.get(key)}, not {value}")
    gather_objects(None)  # no rank may create what another still checks
    if rank() == 0 and not record.exists():
        run.mkdir(parents=True, exist_ok=True)
        versions = {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        content = {"config": asdict(config), "versions": versions, "git_commit": git_commit(), "ranks": world_size()}
        write_atomically(record, json.dumps(content, indent=2) + "\n")
    return run


def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    result = (
        subprocess.run(command, capture_output=True, text=True, check=False)
        if Path(__file__).with_name(".git").exists()
        else None
    )
    return result.stdout.strip() or None if result else None


def build(config: TrainConfig, device: torch.device):
    """Model with adapter, tokenizer, teacher, optimizer and schedule, all at their start."""
    dtype = "float32" if config.dtype == "auto" and config.lora_rank == 0 else config.dtype
    model, tokenizer = load_model(config.model, dtype, config.attention, device), load_tokenizer(config.model)
    torch.manual_seed(config.seed)
    if config.lora_rank > 0:
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout)
    teacher = Teacher(model, config.teacher, config.ema_decay)
    if config.gradient_checkpointing or (config.gradient_checkpointing is None and device.type == "cuda"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = lora_parameters(model) or list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=config.num_steps)
    return model, tokenizer, teacher, optimizer, scheduler


def main() -> None:
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    config = parse_config()
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if distributed and torch.cuda.is_available() else config.device
    device = pick_device(local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    say = (lambda text: tqdm.write(text)) if rank() == 0 else (lambda text: None)

    problems = load_problems(config.data)
    held_out = load_problems(config.eval_data, need_solution=False) if config.eval_data else []
    model, tokenizer, teacher, optimizer, scheduler = build(config, device)
    fitting = fitting_problems(problems, tokenizer, context_length(model), config)
    run = open_run(config)
    say(json.dumps(asdict(config), indent=None))
    if len(fitting) < len(problems):
        say(f"dropped {len(problems) - len(fitting)} of {len(problems)} problems as too long")

    start = 0
    if config.resume:
        newest, damaged = newest_checkpoint(run)
        for line in damaged:
            say(line)
        if newest is not None:
            start = load_checkpoint(newest, model, teacher, optimizer, scheduler)
            say(f"going on from {newest}")
    evaluation_file, metrics_file, samples_file = (
        run / f for f in ("evaluation.json", "metrics.jsonl", "samples.jsonl")
    )
    if rank() == 0:
        keep_lines(metrics_file, start)
        keep_lines(samples_file, start)
    evaluation = json.loads(evaluation_file.read_text()) if evaluation_file.exists() else {}
    if held_out and "before" not in evaluation:
        evaluation["before"] = held_out_accuracy(model, tokenizer, held_out, config)
        say(f"held-out accuracy before: {evaluation['before']:.3f} ({len(held_out)} problems)")

    stop_asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop_asked.append(number))
    bar = tqdm(range(start, config.num_steps), initial=start, total=config.num_steps, disable=rank() != 0, unit="step")
    for step in bar:
        metrics, samples = train_step(step, model, tokenizer, teacher, fitting, optimizer, scheduler, config)
        samples = [row for part in gather_objects(samples) for row in part]
        if rank() == 0:
            with metrics_file.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            with samples_file.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in samples)
        say(step_line(metrics))
        stop = any(gather_objects(bool(stop_asked)))
        if rank() == 0 and ((step + 1) % config.save_steps == 0 or step + 1 == config.num_steps or stop):
            saved = save_checkpoint(run, step + 1, model, find_checkpoint(config.model), teacher, optimizer, scheduler)
        if stop:
            say(f"SIGTERM: saved after step {step + 1}; continue with --resume --output_dir {run}")
            return

    if held_out:
        evaluation["after"] = held_out_accuracy(model, tokenizer, held_out, config)
        if rank() == 0:
            write_atomically(evaluation_file, json.dumps({**evaluation, "problems": len(held_out)}, indent=2) + "\n")
        say(
            f"held-out accuracy: {evaluation['before']:.3f} before, {evaluation['after']:.3f} after ({len(held_out)} problems)"
        )
    say(f"run folder: {run}; weights: {run}/checkpoint-{config.num_steps}")


def step_line(metrics: dict) -> str:
    accuracy = "   -" if metrics["accuracy"] is None else f"{metrics['accuracy']:.2f}"
    return (
        f"step {metrics['step']:4d}  loss {metrics['loss']:8.4f}  grad {metrics['grad_norm']:7.3f}  lr {metrics['learning_rate']:.1e}  "
        f"accuracy {accuracy}  length {metrics['mean_length']:6.1f}  eos {metrics['eos_rate']:.2f}  "
        f"H student {metrics['student_entropy']:.3f} teacher {metrics['teacher_entropy']:.3f}  weight {metrics['weight']:.3f}  "
        f"clipped {metrics['clipped_mass']:.3f}  s {metrics['seconds_sampling']:.2f}/{metrics['seconds_teacher']:.2f}/"
        f"{metrics['seconds_student'] + metrics['seconds_update']:.2f}"
    )


if __name__ == "__main__":
    try:
        main()
    except (InputError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
