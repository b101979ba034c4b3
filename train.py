"""PW-OPSD training, Algorithm 1 of the paper, on one process or several.

    python train.py                                             the embedded model, about a minute on a laptop
    torchrun --nproc_per_node 4 train.py --preset qwen3-4b      the paper's run

Each step: sample one solution per prompt from the student, score every token of it in both contexts, weight the
tokens' losses by position, update. Ranks share the step's prompts. A loss is a fraction (loss.LossTerms): every
micro-batch adds the gradient of its numerator; gradients and denominators are summed over micro-batches and ranks, and
divided once, which is the exact mean over the whole step whatever the split.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from checkpoint import (
    keep_lines,
    load_checkpoint,
    newest_checkpoint,
    open_run,
    save_checkpoint,
    write_atomically,
)
from evaluate import is_correct, sample_solutions
from experiments.memory import MemoryPlan, available_memory, plan_memory
from experiments.monitor import Clock, StepSums, collapse_warning, rollout_metrics, step_line
from experiments.ranks import gather_objects, rank, sum_over_ranks, world_size
from loss import LossOptions, get_method, loss_terms_from_hidden
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
from problems import FlagParser, InputError, Problem, answers_match, extract_boxed, load_problems
from rollout import check_sampling, sample, sample_continuous
from teacher import Teacher, student_prompt, teacher_prompt

# Independent streams of random numbers of one seed: the second entry of a stream's key (rollout.py).
ROLLOUT_STREAM, SHUFFLE_STREAM, DROPOUT_STREAM = 1, 2, 3


def option(default: object, text: str) -> object:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig(LossOptions):
    """Options of train.py. Defaults are the paper's (Section 4.1, Appendix H); a preset changes what it names."""

    preset: str | None = option(None, "tiny (the default without --model), qwen3-4b, dsr1-llama-8b, olmo3-7b")
    method: str = option("pwopsd", "opsd, pwopsd, eopd or reopold")
    model: str = option("tiny", "directory or hub name; `tiny` is the embedded model")
    data: str = option("siyanzhao/Openthoughts_math_30k_opsd", ".jsonl path, hub name or tiny:train")
    output_dir: str | None = option(None, "run folder; default runs/MODEL-METHOD-seedSEED, numbered if taken")
    resume: bool = option(False, "go on from the newest checkpoint in --output_dir, if there is one")
    seed: int = option(42, "of every random draw: adapter, data order, rollouts, evaluation")
    num_steps: int = option(150, "optimizer steps; the learning rate falls linearly to 0 over them")
    batch_size: int = option(32, "prompts per step over all ranks, one rollout each")
    micro_batch_size: str = option("4", "sequences per forward pass on each rank, or auto: what the memory allows")
    learning_rate: float = option(5e-6, "at the first step")
    max_grad_norm: float = option(0.1, "gradients are clipped to this norm")
    lora_rank: int = option(64, "r; 0 trains all weights")
    lora_alpha: float = option(128.0, "the update is scaled by alpha / r")
    lora_dropout: float = option(0.0, "the paper's text says 0.05, the authors' code runs with 0")
    teacher: str = option("fixed", "whose weights score: fixed, ema or live")
    ema_decay: float = option(0.99, "decay per step of --teacher ema")
    max_new_tokens: int = option(1024, "length limit of a rollout")
    rollout_temperature: float = option(1.1, "temperature of sampling; --temperature is T_distill")
    top_p: float = option(0.95, "nucleus of sampling")
    top_k: int = option(20, "most likely tokens of sampling; 0 is off")
    engine: str = option("generate", "sampling by generate, or by continuous batching (long rollouts on a GPU)")
    max_length: int = option(20000, "limit in tokens of the longer context with its response")
    long_prompts: str = option("error", "what happens to problems over the limit: error or drop")
    save_steps: int = option(25, "steps between checkpoints; the last step is always saved")
    eval_data: str | None = option(None, "held-out problems, scored before and after training")
    eval_samples: int = option(1, "samples per held-out problem")
    gradient_checkpointing: bool | None = option(None, "default: on a GPU only")
    device: str = option("auto", "auto, cpu, cuda, ...")
    dtype: str = option("auto", "auto (bfloat16 on a GPU, else float32; float32 without LoRA) or its name")
    attention: str = option("sdpa", "transformers' attn_implementation")


PRESETS: dict[str, dict] = {
    # tau_clip 0.05 collapses a model of this size (README, "What the clip does to the gradient"); the rest is scale.
    "tiny": {
        "model": "tiny", "data": "tiny:train", "eval_data": "tiny:heldout", "num_steps": 20, "clip": 1.0,
        "max_new_tokens": 96, "micro_batch_size": "32", "learning_rate": 1e-3, "max_grad_norm": 1.0,
        "lora_rank": 16, "lora_alpha": 32.0, "top_k": 0,
    },
    "qwen3-4b": {"model": "Qwen/Qwen3-4B", "long_prompts": "drop"},
    "dsr1-llama-8b": {
        "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "long_prompts": "drop", "micro_batch_size": "2",
    },
    "olmo3-7b": {"model": "allenai/Olmo-3-7B-Think", "long_prompts": "drop", "micro_batch_size": "2"},
}  # fmt: skip
ENGINES = {"generate": sample, "continuous": sample_continuous}
FREE_ON_RESUME = {"resume", "output_dir", "device", "micro_batch_size", "gradient_checkpointing", "save_steps"}


# ---------------------------------------------------------------------------------------------------------------
# One step of Algorithm 1


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
    """Algorithm 1, one step over all ranks. Returns its metrics and this rank's rollouts, as rows for samples.jsonl.

    Raises FloatingPointError, naming step and problems, where the loss or its gradient is not finite.
    """
    clock, parameters = Clock(), [p for p in model.parameters() if p.requires_grad]
    picked = step_problems(len(problems), config.batch_size, config.seed, step)
    slots = range(rank(), config.batch_size, world_size())
    batch = [problems[picked[slot]] for slot in slots]
    seed_step(config.seed, step)

    # Sample y ~ pi_theta(. | x_stu), fixed data from here on.
    with clock("sampling"):
        rollout = ENGINES[config.engine](
            model, tokenizer, [student_prompt(tokenizer, problem) for problem in batch],
            [(config.seed, ROLLOUT_STREAM, step, slot) for slot in slots],
            temperature=config.rollout_temperature, top_p=config.top_p, top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
    x_tch = [teacher_prompt(tokenizer, problem) for problem in batch]

    # Score both contexts, weight by position, add up the gradient.
    model.train()
    sums = StepSums(parameters[0].device)
    sizes = [len(prompt) + length for prompt, length in zip(x_tch, rollout.lengths, strict=True)]
    for rows in micro_batches(sizes, int(config.micro_batch_size)):
        responses = [rollout.responses[row] for row in rows]
        with clock("teacher"), teacher.scoring() as scorer:
            teacher_hidden_BTD = response_hidden(scorer, [x_tch[row] for row in rows], responses)
            teacher_head_VD = scorer.get_output_embeddings().weight
        with clock("student"):
            student_hidden_BTD = response_hidden(model, [rollout.prompts[row] for row in rows], responses)
            terms = loss_terms_from_hidden(
                config.method, student_hidden_BTD, teacher_hidden_BTD, model.get_output_embeddings().weight,
                *pad_responses(responses, student_hidden_BTD.device), options=config, step=step,
                teacher_head_weight_VD=teacher_head_VD,
            )  # fmt: skip
            terms.numerator.backward()
        sums.add(terms, [picked[slots[row]] for row in rows])

    # One division by the whole step's denominator, one update.
    with clock("update"):
        loss = sums.over_ranks()
        for parameter in parameters:
            sum_over_ranks(parameter.grad).div_(sums.denominator)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if not (loss.isfinite() and grad_norm.isfinite()):
            raise FloatingPointError(
                f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}, problems {sums.bad or picked}"
            )
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        teacher.update()

    texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    samples = [
        {
            "step": step, "slot": slot, "problem": picked[slot], "text": text, "tokens": length,
            "finish_reason": "eos" if finished else "length",
            "correct": answers_match(extract_boxed(text), problem.answer) if problem.answer else None,
        }
        for slot, problem, text, length, finished in zip(
            slots, batch, texts, rollout.lengths, rollout.finished, strict=True
        )
    ]  # fmt: skip
    metrics = {"step": step, "loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": learning_rate}
    metrics |= rollout_metrics(samples) | sums.token_metrics() | clock.metrics()
    metrics["sampled_tokens_per_second"] = round(sum(rollout.lengths) / clock.seconds["sampling"], 1)
    return metrics, samples


def step_problems(num_problems: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The problems of a step, a function of (seed, step) alone: epoch after epoch, each in a new order."""
    orders: dict[int, np.ndarray] = {}
    picked = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_problems)
        if epoch not in orders:
            key = np.random.SeedSequence((seed, SHUFFLE_STREAM, epoch))
            orders[epoch] = np.random.default_rng(key).permutation(num_problems)
        picked.append(int(orders[epoch][offset]))
    return picked


def seed_step(seed: int, step: int) -> None:
    """Whatever torch draws within a step (LoRA dropout) depends on (seed, step, rank) alone."""
    torch.manual_seed(int(np.random.SeedSequence((seed, DROPOUT_STREAM, step, rank())).generate_state(1)[0]))


def micro_batches(lengths: list[int], size: int) -> list[list[int]]:
    """Rows grouped by length, longest first: little is padded, and a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]


def pad_responses(responses: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Response ids and their mask, each [B, T]."""
    lengths = [len(response) for response in responses]
    ids_BT = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in responses], device=device)
    return ids_BT, response_mask(lengths, device)


# ---------------------------------------------------------------------------------------------------------------
# The run


def held_out_accuracy(model, tokenizer, problems: list[Problem], config: TrainConfig) -> float:
    """Avg@N on held-out problems by the evaluation protocol (evaluate.py), all ranks sharing the samples."""
    jobs = [(index, number) for index in range(len(problems)) for number in range(config.eval_samples)]
    jobs, size = jobs[rank() :: world_size()], 200
    correct = 0
    for start in range(0, len(jobs), size):
        batch = sample_solutions(
            model, tokenizer, problems, jobs[start : start + size], seed=config.seed, temperature=1.0, top_p=0.95,
            top_k=0, max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        correct += sum(is_correct(item, problems) for item in batch)
    counts = gather_objects((correct, len(jobs)))
    return sum(right for right, _ in counts) / sum(done for _, done in counts)


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """Flags over the preset over the paper's defaults; without --model and --preset the preset is `tiny`."""
    config = FlagParser(TrainConfig, description=__doc__).parse_with_presets(PRESETS, arguments)
    check_config(config)
    return config


def check_config(config: TrainConfig) -> None:
    """Raise InputError, naming the flag, for values that cannot work."""
    get_method(config.method, config)
    check_sampling(config.rollout_temperature, config.top_p, config.top_k, config.max_new_tokens)
    size = config.micro_batch_size
    if size != "auto" and not (size.isdecimal() and int(size) > 0):
        raise InputError(f"--micro_batch_size {size}: must be at least 1, or auto")
    if config.engine not in ENGINES:
        raise InputError(f"--engine {config.engine}: choose one of {', '.join(ENGINES)}")
    for name in ("num_steps", "batch_size", "save_steps", "eval_samples", "max_length"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least 1")
    for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
        if not 0.0 < getattr(config, name) < float("inf"):
            raise InputError(f"--{name} {getattr(config, name)}: must be positive")
    if config.seed < 0 or config.lora_rank < 0:
        raise InputError("--seed and --lora_rank must be at least 0")
    if not 0.0 <= config.lora_dropout < 1.0 or not 0.0 <= config.ema_decay <= 1.0:
        raise InputError("--lora_dropout must lie in [0, 1), --ema_decay in [0, 1]")
    if config.long_prompts not in ("error", "drop"):
        raise InputError(f"--long_prompts {config.long_prompts}: choose error or drop")
    if config.resume and config.output_dir is None:
        raise InputError("--resume needs --output_dir, the run to go on with")


def fitting_problems(problems: list[Problem], tokenizer, context: int, config: TrainConfig) -> list[Problem]:
    """The problems whose longer prompt leaves room for a response; others are an error or dropped, never cut."""
    limit = min(config.max_length, context)
    kept = []
    for number, problem in enumerate(problems):
        longest = max(prompt_lengths(tokenizer, problem))
        if longest + config.max_new_tokens <= limit:
            kept.append(problem)
        elif config.long_prompts == "error":
            raise InputError(
                f"{config.data}, problem {number}: a prompt of {longest} tokens and --max_new_tokens "
                f"{config.max_new_tokens} exceed {limit} (the smaller of --max_length {config.max_length} and the "
                f"context of {context}); --long_prompts drop leaves such problems out"
            )
    if not kept:
        raise InputError(f"{config.data}: no problem fits into {limit} tokens with its response")
    return kept


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[int, int]:
    return len(student_prompt(tokenizer, problem)), len(teacher_prompt(tokenizer, problem))


def plan(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher: Teacher, problems: list[Problem],
    config: TrainConfig, device: torch.device,
) -> MemoryPlan:  # fmt: skip
    """What a step takes on this rank; decides `--micro_batch_size auto`. Raises InputError where it cannot fit."""
    longest = max(problems, key=lambda problem: len(problem.problem) + len(problem.solution))
    student_tokens, teacher_tokens = prompt_lengths(tokenizer, longest)
    sharing = 1 if device.type == "cuda" else world_size()  # ranks on a CPU share its memory
    free = available_memory(device)
    memory = plan_memory(
        model, teacher, student_tokens=student_tokens, teacher_tokens=teacher_tokens,
        max_new_tokens=config.max_new_tokens, local_batch=-(-config.batch_size // world_size()),
        micro_batch_size=None if config.micro_batch_size == "auto" else int(config.micro_batch_size),
        gradient_checkpointing=checkpoints_activations(config, device),
        available=None if free is None else free // sharing,
    )  # fmt: skip
    return min(gather_objects(memory), key=lambda memory: memory.micro_batch_size)


def checkpoints_activations(config: TrainConfig, device: torch.device) -> bool:
    return device.type == "cuda" if config.gradient_checkpointing is None else config.gradient_checkpointing


def run_folder(config: TrainConfig) -> Path:
    """--output_dir, or a folder of its own that no run has taken yet; the same on all ranks."""
    name = f"{config.preset or Path(config.model).name}-{config.method}-seed{config.seed}"
    run, number = Path(config.output_dir or f"runs/{name}"), 2
    while config.output_dir is None and (run / "config.json").exists():
        run, number = Path(f"runs/{name}-{number}"), number + 1
    return Path(gather_objects(str(run))[0])


def build(config: TrainConfig, device: torch.device):
    """Model with its adapter, tokenizer, teacher, optimizer and learning-rate schedule, all at their start."""
    dtype = "float32" if config.dtype == "auto" and config.lora_rank == 0 else config.dtype
    model, tokenizer = load_model(config.model, dtype, config.attention, device), load_tokenizer(config.model)
    torch.manual_seed(config.seed)
    if config.lora_rank > 0:
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout)
    teacher = Teacher(model, config.teacher, config.ema_decay)
    if checkpoints_activations(config, device):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = lora_parameters(model) or list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=config.num_steps)
    return model, tokenizer, teacher, optimizer, scheduler


def main() -> None:
    disable_progress_bar()
    config = parse_config()
    device = pick_device(config.device)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed and device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the group: NCCL's object collectives use the current device
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if config.batch_size < world_size():
            raise InputError(f"--batch_size {config.batch_size}: fewer prompts than the {world_size()} ranks")
    stop_asked: list[int] = []

    def ask_to_stop(number: int, frame: object) -> None:
        if stop_asked:  # asked twice: at once
            raise KeyboardInterrupt
        stop_asked.append(number)

    signal.signal(signal.SIGTERM, ask_to_stop)

    problems = load_problems(config.data)
    held_out = load_problems(config.eval_data, need_solution=False) if config.eval_data else []
    model, tokenizer, teacher, optimizer, scheduler = build(config, device)
    fitting = fitting_problems(problems, tokenizer, context_length(model), config)
    memory = plan(model, tokenizer, teacher, fitting, config, device)
    config.dtype = str(model.dtype).removeprefix("torch.")  # a run stays in the precision that `auto` chose
    free = FREE_ON_RESUME - ({"micro_batch_size"} if config.method == "reopold" else set())  # its quantile's tokens
    run = run_folder(config)
    if rank() == 0:
        open_run(run, asdict(config), free, config.resume, {"ranks": world_size(), "hardware": str(device)})
    say(" ".join(f"--{name} {value}" for name, value in asdict(config).items() if value is not None))
    say(f"{len(fitting)} problems ({len(problems) - len(fitting)} dropped as too long), run folder {run}")
    say(str(memory))
    config.micro_batch_size = str(memory.micro_batch_size)

    start = 0
    if config.resume:
        newest, damaged = newest_checkpoint(run)
        for line in damaged:
            say(line)
        start = load_checkpoint(newest, model, teacher, optimizer, scheduler) if newest else 0
        say(f"going on from {newest}" if newest else "no checkpoint to go on from: starting anew")
    gather_objects(None)  # every rank has read before rank 0 writes
    log = RunLog(run, start)
    if held_out and "before" not in log.evaluation:
        log.evaluate("before", held_out_accuracy(model, tokenizer, held_out, config))
        say(f"held-out accuracy before training: {log.evaluation['before']:.4f} ({len(held_out)} problems)")

    history, warned = [], None
    steps = range(start, config.num_steps)
    for step in tqdm(steps, initial=start, total=config.num_steps, disable=quiet(), unit="step"):
        metrics, samples = train_step(step, model, tokenizer, teacher, fitting, optimizer, scheduler, config)
        log.append(metrics, [row for part in gather_objects(samples) for row in part])
        say(step_line(metrics, config.num_steps))
        history.append(metrics)
        if not warned and (warned := collapse_warning(history, config.max_new_tokens)):
            say(f"warning: after step {step + 1} the run looks collapsed: {warned}")
        stopping = any(gather_objects(bool(stop_asked)))
        if stopping or (step + 1) % config.save_steps == 0 or step + 1 == config.num_steps:
            if rank() == 0:
                save_checkpoint(run, step + 1, model, find_checkpoint(config.model), teacher, optimizer, scheduler)
            gather_objects(None)  # no rank runs ahead of a checkpoint that may fail
        if stopping:
            say(f"SIGTERM: saved after step {step + 1}; go on with --resume --output_dir {run}")
            return

    if held_out:
        log.evaluate("after", held_out_accuracy(model, tokenizer, held_out, config))
        before, after = log.evaluation["before"], log.evaluation["after"]
        gain = f"{100 * (after - before):+.1f} points"
        say(f"held-out accuracy: {before:.4f} -> {after:.4f} ({gain}, {len(held_out)} problems)")
    say(f"weights: {run}/checkpoint-{config.num_steps}")


class RunLog:
    """metrics.jsonl, samples.jsonl and evaluation.json of a run, written by rank 0, step by step."""

    def __init__(self, run: Path, start: int) -> None:
        self.metrics, self.samples, self.file = run / "metrics.jsonl", run / "samples.jsonl", run / "evaluation.json"
        self.evaluation = gather_objects(json.loads(self.file.read_text()) if self.file.exists() else {})[0]
        self.evaluation.pop("after", None)
        if rank() == 0:
            keep_lines(self.metrics, start)
            keep_lines(self.samples, start)

    def append(self, metrics: dict, samples: list[dict]) -> None:
        if rank() == 0:
            for path, rows in ((self.metrics, [metrics]), (self.samples, sorted(samples, key=lambda row: row["slot"]))):
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)

    def evaluate(self, when: str, accuracy: float) -> None:
        self.evaluation[when] = accuracy
        if rank() == 0:
            write_atomically(self.file, json.dumps(self.evaluation, indent=2) + "\n")


def say(text: str) -> None:
    if rank() == 0:
        tqdm.write(text)


def quiet() -> bool | None:
    """Whether to hide the progress bar: on all ranks but the first, and (None) where the output is no terminal."""
    return None if rank() == 0 else True


def cli() -> None:
    """`main` for the shell: a mistake of the user's, or a run that cannot go on, becomes one line and status 1."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (InputError, FloatingPointError, OSError) as error:  # OSError: a full disk under the logs, say
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume with --output_dir goes on from the last checkpoint")


if __name__ == "__main__":
    cli()
