"""PW-OPSD training, Algorithm 1 of the paper, on one process or several.

    python train.py                                             the embedded model, within a minute on a laptop
    torchrun --nproc_per_node 4 train.py --preset qwen3-4b      the paper's run

Each step: sample one solution per prompt from the student, score every token of it in both contexts, weight the
tokens' losses by position, update. Ranks share the step's prompts. A loss is a fraction: each micro-batch adds its
numerator (and that one's gradient) and its denominator; both are summed over micro-batches and ranks, and one division
at the end gives the exact mean over the whole step, whatever the split.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from errors import InputError
from evaluate import solve
from grading import Grader, extract_boxed, make_grader
from loss import LossOptions, Method, resolve_method, score_tokens_from_hidden
from model import (
    add_lora,
    context_length,
    eos_ids,
    find_checkpoint,
    load_model,
    load_tokenizer,
    recompute_activations,
    response_hidden,
    response_mask,
    trained_parameters,
)
from problems import Problem, load_problems
from rollout import Response, Sampling, StreamKey
from runtime.checkpoint import damage, resume, save_checkpoint
from runtime.engines import ENGINES, Engine, choose_engine, connect, make_engine, publish, withdraw
from runtime.fit import fitting_problems, plan_run
from runtime.flags import FlagParser, Sigterm, departures, option, run_script
from runtime.metrics import (
    Clock,
    TokenMetrics,
    Watch,
    repeats,
    rollout_metrics,
    sampler_gap,
    step_line,
)
from runtime.pins import run_pins
from runtime.ranks import (
    buckets,
    check_same_start,
    gather_objects,
    hide_bar,
    rank,
    say,
    start_ranks,
    stop_ranks,
    wait_for_all,
    world_size,
)
from runtime.run_folder import RunLog, claimed, record_run, run_folder
from teacher import (
    PAPER_PROMPTS,
    REFERENCES,
    Prompts,
    Teacher,
    choose_reference,
    load_prompts,
    student_prompt,
    teacher_prompt,
)
from weighting import relative_position

# Independent streams of random numbers of one seed: the second entry of a stream's key (rollout.py).
ROLLOUT_STREAM, SHUFFLE_STREAM, DROPOUT_STREAM, REFERENCE_STREAM = 1, 2, 3, 4


def size_or_auto(text: str) -> int:
    """A number, or 0 for `auto`."""
    return 0 if text == "auto" else int(text)


@dataclass(frozen=True)
class TrainConfig(LossOptions):
    """Options of train.py. Defaults are the paper's (Section 4.1, Appendix H); a preset changes what it names."""

    preset: str | None = option(None, "tiny (the default without --model), qwen3-4b, dsr1-llama-8b, olmo3-7b", "method")
    method: str = option("pwopsd", "opsd, pwopsd, eopd or reopold", "method")
    teacher: str = option(
        "fixed", "whose weights score: fixed, ema or live", "method", choices=("fixed", "ema", "live")
    )
    ema_decay: float = option(0.99, "decay per step of --teacher ema", "method", within=(0, 1))
    reference: str = option(
        "own", "what the teacher is shown: own, other (another problem's), answer or none", "method", choices=REFERENCES
    )
    student_thinking: bool = option(False, "thinking mode of the student's context", "method")
    teacher_thinking: bool = option(True, "thinking mode of the teacher's context", "method")
    prompts: str | None = option(None, "JSON file of templates: student, teacher, evaluation", "method")
    model: str = option("tiny", "directory or hub name; `tiny` is the embedded model", "data")
    data: str = option("siyanzhao/Openthoughts_math_30k_opsd", ".jsonl path, hub name or tiny:train", "data")
    max_length: int = option(20000, "limit in tokens of the longer context with its response", "data", least=1)
    long_prompts: str = option(
        "error", "what happens to problems over the limit: error or drop", "data", choices=("error", "drop")
    )
    eval_data: str | None = option(None, "held-out problems, scored before and after training", "data")
    eval_samples: int = option(1, "samples per held-out problem, besides the greedy one", "data", least=1)
    eval_steps: int = option(0, "also score them every so many steps; 0 is off", "data", least=0)
    engine: str = option(
        "auto", "auto, generate, continuous (long rollouts on a GPU) or server", "sampling", choices=ENGINES
    )
    server: str | None = option(None, "address of a vLLM that serves --model with LoRA", "sampling")
    served_model: str | None = option(None, "the server's name for --model, where it is another", "sampling")
    max_new_tokens: int = option(1024, "length limit of a rollout", "sampling")
    temperature: float = option(1.1, "of the rollouts; --distill_temperature is the loss's", "sampling")
    top_p: float = option(0.95, "nucleus of the rollouts; 1 is off", "sampling")
    top_k: int = option(20, "most likely tokens of the rollouts; 0 is off", "sampling")
    num_steps: int = option(
        150, "optimizer steps; the learning rate falls linearly to 0 over them", "optimisation", least=1
    )
    batch_size: int = option(32, "prompts per step over all ranks, one rollout each", "optimisation", least=1)
    micro_batch_size: int = option(
        4,
        "sequences per forward pass on each rank, or auto: what the memory allows",
        "optimisation",
        size_or_auto,
        least=0,
    )
    learning_rate: float = option(5e-6, "at the first step", "optimisation", positive=True)
    max_grad_norm: float = option(0.1, "gradients are clipped to this norm", "optimisation", positive=True)
    lora_rank: int = option(64, "r; 0 trains all weights", "optimisation", least=0)
    lora_alpha: float = option(128.0, "the update is scaled by alpha / r", "optimisation", positive=True)
    lora_dropout: float = option(
        0.0, "the paper's text says 0.05, the authors' code runs with 0", "optimisation", within=(0, 0.99)
    )
    output_dir: str | None = option(None, "run folder; default runs/MODEL-METHOD-seedSEED, numbered if taken")
    resume: bool = option(False, "go on from the newest checkpoint in --output_dir, if there is one")
    seed: int = option(42, "of every random draw: adapter, data order, rollouts, evaluation", within=(0, 2**63))
    stop_on_collapse: bool = option(False, "end a run that looks collapsed, instead of a warning only")
    save_steps: int = option(25, "steps between checkpoints; the last step is always saved", least=1)
    grader: str = option("auto", "math-verify, exact, or auto: math-verify where it is installed")
    gradient_checkpointing: bool | None = option(None, "default: on a GPU only")
    device: str = option("auto", "auto, cpu, cuda, ...")
    dtype: str = option("auto", "auto (bfloat16 on a GPU, else float32; float32 without LoRA) or its name")
    attention: str = option("sdpa", "transformers' attn_implementation")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens)


PRESETS: dict[str, dict] = {
    # At tau_clip 0.05 the beliefs of this world are hardly repaired (docs/study.md); the rest is scale.
    "tiny": {
        "model": "tiny", "data": "tiny:train", "eval_data": "tiny:heldout", "num_steps": 20, "tau_clip": 1.0,
        "max_new_tokens": 96, "micro_batch_size": 32, "learning_rate": 2e-3, "max_grad_norm": 1.0,
        "lora_rank": 16, "lora_alpha": 32.0, "top_k": 0,
    },
    "qwen3-4b": {"model": "Qwen/Qwen3-4B", "long_prompts": "drop"},
    "dsr1-llama-8b": {
        "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "long_prompts": "drop", "micro_batch_size": 2,
    },
    "olmo3-7b": {"model": "allenai/Olmo-3-7B-Think", "long_prompts": "drop", "micro_batch_size": 2},
}  # fmt: skip
# What may differ when a run is taken up again. It changes rounding only, with two exceptions: a server draws other
# tokens, and LoRA dropout other masks under another micro_batch_size.
FREE_ON_RESUME = {
    "resume", "output_dir", "stop_on_collapse", "device", "micro_batch_size", "gradient_checkpointing", "save_steps",
    "engine", "server", "served_model",
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What a step works with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher
    method: Method
    engine: Engine
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    grader: Grader
    prompts: Prompts
    stop: Sigterm = field(default_factory=Sigterm)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return trained_parameters(self.model)


# ---------------------------------------------------------------------------------------------------------------
# One step of Algorithm 1


def train_step(
    step: int, run: Training, problems: list[Problem], config: TrainConfig
) -> tuple[dict, list[dict]] | None:
    """Algorithm 1, one step over all ranks. Returns its metrics and this rank's rollouts, as rows for samples.jsonl.

    Returns None, with nothing changed, where SIGTERM came while it was sampling. Raises FloatingPointError, naming step
    and problems, where the loss or its gradient is not finite.
    """
    model, method, device = run.model, run.method, run.model.device
    share, clock, statistics, broken = step_share(step, problems, config), Clock(), TokenMetrics(device), []
    seed_step(config.seed, step)

    # Sample y ~ pi_theta(. | x_stu), fixed data from here on.
    x_stu = [student_prompt(run.tokenizer, problem, run.prompts) for problem in share.problems]
    x_tch = [teacher_prompt(run.tokenizer, problem, run.prompts) for problem in share.problems]
    with clock("sampling"):
        y = run.stop.unless_asked(lambda: run.engine.sample(x_stu, share.keys, config.sampling))
    if any(gather_objects(run.stop.asked)):
        return None

    # Score every token in both contexts, weight it by its position, add up the gradient of the loss's numerator.
    model.train()
    numerator, denominator = torch.zeros((), device=device), torch.zeros((), device=device)
    tokens = [len(x) + len(response.ids) for x, response in zip(x_tch, y, strict=True)]
    for rows in micro_batches(tokens, config.micro_batch_size):
        y_rows = [y[row].ids for row in rows]
        L = [len(ids) for ids in y_rows]
        mask_BT, ids_M = response_mask(L, device), torch.tensor([y_t for ids in y_rows for y_t in ids], device=device)
        with clock("teacher"), run.teacher.scoring() as teacher:
            teacher_MD = response_hidden(teacher, [x_tch[row] for row in rows], y_rows)[mask_BT]
            teacher_head_VD = teacher.get_output_embeddings().weight
        with clock("student"):
            student_MD = response_hidden(model, [x_stu[row] for row in rows], y_rows)[mask_BT]
            head_VD = model.get_output_embeddings().weight
            # config holds T_distill and the other LossOptions
            scores = score_tokens_from_hidden(method, student_MD, teacher_MD, head_VD, teacher_head_VD, ids_M, config)
            l_M = scores.loss  # Eq. (1): d_t, or the method's own
            r_M = relative_position(L)  # Eq. (5), for the log; loss.by_position takes the same r of L
            w_M = method.token_weight(scores, L, step, config).detach()  # Eq. (5): w(r_t), or the method's own
            part, count = method.reduction(l_M, w_M, L)  # Eq. (6), as a fraction
            part.backward()
        numerator, denominator = numerator + part.detach(), denominator + count
        gap_M = sampler_gap(student_MD, head_VD, ids_M, [y[row] for row in rows])
        statistics.add(r_M, w_M, scores, gap_M)
        broken += [] if part.isfinite() else [share.indices[row] for row in rows]

    # Sum over ranks, one division by the whole step's denominator, one update.
    with clock("update"):
        sum_over_ranks([numerator, denominator, statistics.table, *(p.grad for p in run.parameters)])
        denominator.clamp_(min=torch.finfo(torch.float32).tiny)  # REOPOLD's mask may be empty
        loss = numerator / denominator
        for parameter in run.parameters:
            parameter.grad /= denominator
        learning_rate, grad_norm = update(run, loss, config.max_grad_norm)
    check_finite(step, loss, grad_norm, broken, share)

    samples = sample_rows(step, share, y, run)
    metrics = {"step": step, "loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": learning_rate}
    metrics |= rollout_metrics(samples, [repeats(row.ids) for row in y]) | statistics.means() | clock.metrics(samples)
    return metrics, samples


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sum float32 tensors in place over all ranks, joined into one all-reduce (full fine-tuning: a few)."""
    for bucket in buckets(tensors) if dist.is_initialized() else ():
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def update(run: Training, loss: Tensor, max_grad_norm: float) -> tuple[float, Tensor]:
    """Clip the gradient and step, unless something is not finite; the step's learning rate and gradient norm."""
    learning_rate = run.scheduler.get_last_lr()[0]
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, max_grad_norm)
    if loss.isfinite() and grad_norm.isfinite():
        run.optimizer.step()
        run.scheduler.step()
        run.teacher.update()
    run.optimizer.zero_grad()
    return learning_rate, grad_norm


def check_finite(step: int, loss: Tensor, grad_norm: Tensor, broken: list[int], share: Share) -> None:
    """Raise FloatingPointError on every rank, naming the problems with a broken loss; the step's, where none has."""
    if not (loss.isfinite() and grad_norm.isfinite()):
        parts = gather_objects((broken, share.indices))
        where = sorted(i for mine, _ in parts for i in mine) or sorted(i for _, mine in parts for i in mine)
        raise FloatingPointError(f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}, problems {where}")


@dataclass(frozen=True)
class Share:
    """This rank's part of a step's problems."""

    slots: range  # their places in the step's batch
    indices: list[int]  # their places in the data
    problems: list[Problem]
    keys: list[StreamKey]  # of their rollouts


def step_share(step: int, problems: list[Problem], config: TrainConfig) -> Share:
    """This rank's slots of the step's batch; a rollout's key is (seed, purpose, step, slot), whatever the ranks."""
    slots = range(rank(), config.batch_size, world_size())
    picked = step_problems(len(problems), config.batch_size, config.seed, step)
    indices = [picked[slot] for slot in slots]
    keys = [(config.seed, ROLLOUT_STREAM, step, slot) for slot in slots]
    return Share(slots, indices, [problems[index] for index in indices], keys)


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
    """Torch's generator starts a step from (seed, step, rank); which row gets which draw is up to the micro-batches."""
    torch.manual_seed(int(np.random.SeedSequence((seed, DROPOUT_STREAM, step, rank())).generate_state(1)[0]))


def micro_batches(tokens: list[int], size: int) -> list[list[int]]:
    """Rows grouped by their number of tokens, longest first: little is padded, and a lack of memory shows at once."""
    order = sorted(range(len(tokens)), key=lambda row: -tokens[row])
    return [order[start : start + size] for start in range(0, len(order), size)]


def sample_rows(step: int, share: Share, y: list[Response], run: Training) -> list[dict]:
    """This rank's rollouts as rows for samples.jsonl, graded."""
    texts = run.tokenizer.batch_decode([response.ids for response in y], skip_special_tokens=True)
    return [
        {
            "step": step, "slot": slot, "problem": index, "text": text, "tokens": len(response.ids),
            "finish_reason": "eos" if response.finished else "length",
            "correct": run.grader.match(extract_boxed(text), problem.answer) if problem.answer else None,
        }
        for slot, index, problem, response, text in zip(
            share.slots, share.indices, share.problems, y, texts, strict=True
        )
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The run


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """Flags over the preset over the paper's defaults; without --model and --preset the preset is `tiny`."""
    config = FlagParser(TrainConfig, __doc__).parse(PRESETS, arguments)
    check_config(config)
    return config


def check_config(config: TrainConfig) -> None:
    """Raise InputError, naming the flag, for values that cannot work."""
    resolve_method(config.method, config)
    engine, _ = choose_engine(config.engine, torch.device("cpu"), config.max_new_tokens, config.server)
    if engine == "server" and config.lora_rank == 0:
        raise InputError("--engine server trains an adapter, which the server loads: --lora_rank must be above 0")
    _ = config.sampling  # checks itself
    load_prompts(config.prompts)
    if config.dtype in ("bfloat16", "float16") and config.lora_rank == 0:
        raise InputError(
            f"--dtype {config.dtype} with --lora_rank 0: updates of --learning_rate's size vanish in its few digits; "
            "what helps: --dtype float32, or LoRA (--lora_rank 64), whose adapter is float32 beside any --dtype"
        )
    if config.resume and config.output_dir is None:
        raise InputError("--resume needs --output_dir, the run to go on with")


def choose_prompts(config: TrainConfig, problems: list[Problem]) -> tuple[list[Problem], Prompts]:
    """The problems with the reference that the teacher is shown, and the prompts of both contexts."""
    prompts = replace(
        load_prompts(config.prompts),
        student_thinking=config.student_thinking,
        teacher_thinking=config.teacher_thinking,
    )
    draw = np.random.default_rng(np.random.SeedSequence((config.seed, REFERENCE_STREAM)))
    return choose_reference(config.reference, problems, prompts, draw)


def build(config: TrainConfig, device: torch.device, grader: Grader, prompts: Prompts = PAPER_PROMPTS) -> Training:
    """Model with its adapter, teacher, optimizer and learning-rate schedule, all at their start."""
    model, tokenizer = load_model(config.model, config.dtype, config.attention, device), load_tokenizer(config.model)
    torch.manual_seed(config.seed)
    if config.lora_rank > 0:
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout)
    if config.gradient_checkpointing:
        recompute_activations(model)
    teacher = Teacher(model, config.teacher, config.ema_decay)
    optimizer = make_optimizer(teacher.trained, config)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=config.num_steps)
    if config.engine == "server":
        ends, name = eos_ids(model.generation_config, tokenizer), config.served_model or config.model
        engine = connect(config.server, name, tokenizer, ends, SAMPLED_AT_ONCE, needs_ids=True)
    else:
        engine = make_engine(config.engine, model, tokenizer, batch_size=SAMPLED_AT_ONCE)
    method = resolve_method(config.method, config)
    return Training(model, tokenizer, teacher, method, engine, optimizer, scheduler, grader, prompts)


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, parameter by parameter (foreach False): updating all at once would take as much memory again."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False
    )


def settle(config: TrainConfig, device: torch.device, record: dict | None) -> TrainConfig:
    """The options that this machine decides where the user did not; a resumed run keeps its micro-batch size."""
    dtype, checkpointing, size = config.dtype, config.gradient_checkpointing, config.micro_batch_size
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and config.lora_rank > 0 else "float32"
    if checkpointing is None:
        checkpointing = device.type == "cuda"
    if size == 0 and record is not None:
        size = record["config"]["micro_batch_size"]
    engine, reason = choose_engine(config.engine, device, config.max_new_tokens, config.server)
    say(f"sampling by {engine}: {reason}")
    return replace(config, dtype=dtype, gradient_checkpointing=checkpointing, micro_batch_size=size, engine=engine)


SAMPLED_AT_ONCE = 200  # sequences of generate at a time, or requests in flight


def score_held_out(log: RunLog, step: int, run: Training, problems: list[Problem], config: TrainConfig) -> None:
    """Avg@N on held-out problems, by the evaluation protocol and greedy; nothing is kept where SIGTERM comes."""
    if not problems or str(step) in log.evaluation:
        return
    rows = run.stop.unless_asked(lambda: held_out_rows(step, run, problems, config))
    if not any(gather_objects(run.stop.asked)):
        say(log.evaluate(step, [row for part in gather_objects(rows) for row in part]))


def held_out_rows(step: int, run: Training, problems: list[Problem], config: TrainConfig) -> list[dict]:
    """This rank's part of the held-out samples, graded, as rows for heldout.jsonl."""
    rows = []
    for decoding, temperature, count in (("sampled", 1.0, config.eval_samples), ("greedy", 0.0, 1)):
        jobs = [(config.seed, index, number) for index in range(len(problems)) for number in range(count)]
        settings, mine = Sampling(temperature, 0.95, 0, config.max_new_tokens), jobs[rank() :: world_size()]
        for item in solve(run.engine, run.tokenizer, problems, mine, settings, template=run.prompts.evaluation):
            correct = run.grader.match(extract_boxed(item.text), problems[item.problem].answer)
            rows.append({"step": step, "decoding": decoding, "correct": correct, **asdict(item)})
    return rows


def main() -> None:
    disable_progress_bar()
    config = parse_config()
    device = start_ranks(config.device)
    if config.batch_size < world_size():
        raise InputError(f"--batch_size {config.batch_size}: fewer prompts than the {world_size()} ranks")
    find_checkpoint(config.model)  # a wrong --model is told before the data are looked for
    problems = load_problems(config.data)
    held_out = load_problems(config.eval_data, need_solution=False) if config.eval_data else []
    folder = run_folder(
        config.output_dir, f"{config.preset or Path(config.model).name}-{config.method}-seed{config.seed}"
    )
    with claimed(folder, config.resume) as record:
        say(f"{config.method}, {departures(config, PRESETS) or 'the preset as it is'}; options: {folder}/config.json")
        train(settle(config, device, record), device, folder, record, problems, held_out)
    stop_ranks()


def train(
    config: TrainConfig, device: torch.device, folder: Path, record: dict | None, problems: list[Problem],
    held_out: list[Problem],
) -> None:  # fmt: skip
    """A run in a folder that is ours, from its start or from its newest checkpoint."""
    grader = make_grader(config.grader, [problem.answer for problem in [*problems, *held_out] if problem.answer])
    problems, prompts = choose_prompts(config, problems)
    run = build(config, device, grader, prompts)
    run.stop.listen()
    fit = fitting_problems(problems, run.tokenizer, prompts, context_length(run.model), config)
    memory, fitting = plan_run(run, fit, config, device), fit.problems
    config = replace(config, micro_batch_size=memory.micro_batch_size)
    free = FREE_ON_RESUME - ({"micro_batch_size"} if run.method.over_batch else set())
    pins = run_pins(config, problems, held_out)
    record_run(folder, record, asdict(config), free, {"ranks": world_size(), "hardware": str(device)}, pins)
    say(f"{len(fitting)} problems ({len(problems) - len(fitting)} dropped as too long), graded by {grader.name}")
    if grader.note:
        say(grader.note)
    say(str(memory))
    start = resume(folder, run.model, run.teacher, run.optimizer, run.scheduler) if config.resume else 0
    check_same_start([(name, p) for name, p in run.model.named_parameters() if p.requires_grad])
    wait_for_all()  # every rank has read before rank 0 writes
    with closing(run.engine), closing(run.grader):
        take_steps(start, run, fitting, held_out, folder, config)
    withdraw(folder)


def take_steps(
    start: int, run: Training, problems: list[Problem], held_out: list[Problem], folder: Path, config: TrainConfig
) -> None:
    """The steps that are left, with what is logged, scored and saved between them."""
    log = RunLog(folder, start)
    watch = Watch(folder, config, run.model.dtype, log.earlier)
    if start == config.num_steps:
        say(f"all {start} steps are done: only held-out scores that are missing are made up for")
    for step in tqdm(range(start, config.num_steps), initial=start, total=config.num_steps, disable=hide_bar()):
        publish(run.engine, run.model, folder, step)
        if step == 0 or (config.eval_steps and step % config.eval_steps == 0):
            score_held_out(log, step, run, held_out, config)
        done = train_step(step, run, problems, config)
        if done is not None:
            metrics, samples = done
            log.append(metrics, [row for part in gather_objects(samples) for row in part])
            say(step_line(metrics, config.num_steps))
            watch.see(metrics)
        steps_done = step if done is None else step + 1
        stopping = any(gather_objects(run.stop.asked))
        due = steps_done % config.save_steps == 0 or steps_done == config.num_steps
        if steps_done > start and (stopping or due):
            save(folder, steps_done, run, config)
        if stopping:
            return say_stopped(steps_done, folder)
    publish(run.engine, run.model, folder, config.num_steps)
    score_held_out(log, config.num_steps, run, held_out, config)
    if any(gather_objects(run.stop.asked)):
        return say_stopped(config.num_steps, folder)
    return say(f"weights: {folder}/checkpoint-{config.num_steps}")


def say_stopped(steps_done: int, folder: Path) -> None:
    where = f"saved after step {steps_done}" if steps_done else "before the first step was done"
    say(f"SIGTERM: {where}; the same command with --resume --output_dir {folder} goes on")


def save(folder: Path, step: int, run: Training, config: TrainConfig) -> None:
    """Write the checkpoint after `step` steps, unless it is there, whole; no rank runs ahead of one that may fail."""
    if rank() == 0 and damage(folder / f"checkpoint-{step}") is not None:
        base = find_checkpoint(config.model)
        save_checkpoint(folder, step, run.model, base, run.teacher, run.optimizer, run.scheduler)
    wait_for_all()


def cli() -> None:
    """Entry for scripts that add a method of their own (README: Add a method)."""
    run_script(main)


if __name__ == "__main__":
    cli()
