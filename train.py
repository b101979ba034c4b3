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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

import evaluate
import grading
import loss
import model
import problems
import rollout
import teacher
import weighting
from errors import InputError
from problems import Problem
from runtime import checkpoint, engines, loading, metrics, ranks, records
from runtime.flags import FlagParser, departures, option, run_script


def train_step(step: int, run: Training, data: list[Problem], config: TrainConfig) -> tuple[dict, list[dict]]:
    """Algorithm 1, one step over all ranks: sample, score, weigh, divide, update.

    Returns its metrics and this rank's rollouts, as rows for samples.jsonl. Up to `hold` nothing has changed, and a
    signal leaves the step. Raises FloatingPointError, naming step and problems, where loss or gradient is not finite.
    """
    seen = metrics.Observer(run.model.device)
    drawn, keys = step_share(step, data, config)
    seed_step(config.seed, step)

    # Sample y ~ pi_theta(. | x_stu), fixed data from here on.
    x_stu = [teacher.student_prompt(run.tokenizer, problem, run.prompts) for problem in drawn]
    x_tch = [teacher.teacher_prompt(run.tokenizer, problem, run.prompts) for problem in drawn]
    y = run.engine.sample(x_stu, keys, config.sampling)
    seen.lap("sampling")
    samples = sample_rows(drawn, keys, y, run)  # graded here: a weight may depend on the outcome
    rollouts = [Rollout(*row) for row in zip(x_stu, x_tch, y, samples, strict=True)]
    seen.lap("grading")

    # Score every token in both contexts, weight it by its position, add up the gradient of the loss's numerator.
    numerator, denominator = torch.zeros((), device=run.model.device), torch.zeros((), device=run.model.device)
    for rows in ranks.progress(micro_batches(rollouts, config.micro_batch_size), desc="micro-batches", leave=False):
        with model.adapter_dropout(run.model):
            part, count = loss_fraction(step, rows, run, config, seen)
            part.backward()
        numerator, denominator = numerator + part.detach(), denominator + count
        seen.lap("student")

    # Sum over ranks, one division by the whole step's denominator, one update.
    run.stop.hold()
    gradients = run.gradients()
    ranks.sum_over_ranks([numerator, denominator, seen.table, *gradients])
    denominator.masked_fill_(denominator == 0, torch.finfo(torch.float32).tiny)  # REOPOLD's mask may be empty
    value = numerator / denominator
    for gradient in gradients:
        gradient /= denominator
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm)
    check_finite(step, value, grad_norm, seen.broken, drawn)
    learning_rate = update(run)
    seen.lap("update")

    row = {"step": step, "loss": value.item(), "grad_norm": grad_norm.item(), "learning_rate": learning_rate}
    row |= metrics.rollout_metrics(samples, [metrics.repeats(response.ids) for response in y]) | seen.means()
    return row | seen.times(sum(len(response.ids) for response in y)), samples


def loss_fraction(
    step: int, rows: list[Rollout], run: Training, config: TrainConfig, seen: metrics.Observer
) -> tuple[Tensor, Tensor]:
    """Eq. (8) of a micro-batch, as (numerator, denominator): both contexts, the token losses, their weights."""
    y, device = [row.y.ids for row in rows], run.model.device
    L = [len(ids) for ids in y]
    mask_BT, ids_M = model.response_mask(L, device), torch.tensor([y_t for ids in y for y_t in ids], device=device)
    with run.teacher.scoring() as scorer:
        teacher_MD = model.response_hidden(scorer, [row.x_tch for row in rows], y)[mask_BT]
        teacher_head_VD = scorer.get_output_embeddings().weight
    seen.lap("teacher")
    student_MD = model.response_hidden(run.model, [row.x_stu for row in rows], y)[mask_BT]
    head_VD = run.model.get_output_embeddings().weight
    # config holds T_distill and the other LossOptions
    scores = loss.score_tokens_from_hidden(run.method, student_MD, teacher_MD, head_VD, teacher_head_VD, ids_M, config)
    correct = [row.sample["correct"] for row in rows]
    scores = loss.of_rows(scores, L, correct=correct, finished=[row.y.finished for row in rows])
    r_M = weighting.relative_position(L).to(device)  # Eq. (5): r = (t - 0.5) / L
    w_M = run.method.token_weight(r_M, scores, L, step, config).detach()  # Eq. (5): w(r), or the method's own
    seen.see([row.sample["problem"] for row in rows], L, r_M, w_M, scores,
             metrics.sampler_gap(student_MD, head_VD, ids_M, [row.y for row in rows]))  # fmt: skip
    return run.method.reduction(scores.loss, w_M, L)  # Eq. (8), PW-OPSD: Eq. (6), as a fraction


@dataclass(frozen=True)
class Rollout:
    """One sampled solution, the prompts of both contexts, and its row of samples.jsonl."""

    x_stu: list[int]
    x_tch: list[int]
    y: rollout.Response
    sample: dict


def micro_batches(rollouts: list[Rollout], size: int) -> list[list[Rollout]]:
    """Rows grouped by their number of tokens, longest first: little is padded, and a lack of memory shows at once."""
    order = sorted(rollouts, key=lambda row: -len(row.x_tch) - len(row.y.ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def update(run: Training) -> float:
    """One step of the optimizer, the schedule and the teacher; the step's learning rate."""
    learning_rate = run.scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.scheduler.step()
    run.teacher.update()
    run.optimizer.zero_grad()
    return learning_rate


def check_finite(step: int, value: Tensor, grad_norm: Tensor, broken: list[int], drawn: list[Problem]) -> None:
    """Raise FloatingPointError on every rank, naming the problems with a broken loss; the step's, where none has."""
    if not (value.isfinite() and grad_norm.isfinite()):
        parts = ranks.gather_objects((broken, [problem.row for problem in drawn]))
        where = sorted(i for mine, _ in parts for i in mine) or sorted(i for _, mine in parts for i in mine)
        raise FloatingPointError(f"step {step}: loss {value:g}, gradient norm {grad_norm:g}, problems {where}")


# --- What a step draws: all of it a function of (seed, step, slot), whatever the ranks --------------------------

# Independent streams of random numbers of one seed: the second entry of a stream's key (rollout.py).
ROLLOUT_STREAM, SHUFFLE_STREAM, DROPOUT_STREAM, REFERENCE_STREAM = 1, 2, 3, 4


def step_share(step: int, data: list[Problem], config: TrainConfig) -> tuple[list[Problem], list[rollout.StreamKey]]:
    """This rank's problems of the step's batch, and the keys of their rollouts: (seed, purpose, step, slot)."""
    slots = range(ranks.rank(), config.batch_size, ranks.world_size())
    picked = step_problems(len(data), config.batch_size, config.seed, step)
    return [data[picked[slot]] for slot in slots], [(config.seed, ROLLOUT_STREAM, step, slot) for slot in slots]


def step_problems(num_problems: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The problems of a step, a function of (seed, step) alone: epoch after epoch, each in a new order."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // num_problems for position in positions}
    orders = {e: np.random.default_rng((seed, SHUFFLE_STREAM, e)).permutation(num_problems) for e in epochs}
    return [int(orders[position // num_problems][position % num_problems]) for position in positions]


def seed_step(seed: int, step: int) -> None:
    """Torch's generator starts a step from (seed, step, rank); which row gets which draw is up to the micro-batches."""
    torch.manual_seed(int(np.random.SeedSequence((seed, DROPOUT_STREAM, step, ranks.rank())).generate_state(1)[0]))


def sample_rows(
    drawn: list[Problem], keys: list[rollout.StreamKey], y: list[rollout.Response], run: Training
) -> list[dict]:
    """This rank's rollouts as rows for samples.jsonl, graded."""
    texts = run.tokenizer.batch_decode([response.ids for response in y], skip_special_tokens=True)
    return [
        {
            "step": step, "slot": slot, "problem": problem.row, "answer": problem.answer, "text": text,
            "tokens": len(response.ids), "finish_reason": "eos" if response.finished else "length",
            "correct": run.grader.grade(text, problem.answer) if problem.answer else None,
        }
        for (_, _, step, slot), problem, response, text in zip(keys, drawn, y, texts, strict=True)
    ]  # fmt: skip


# --- Options ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig(loss.LossOptions):
    """Options of train.py. Defaults are the paper's (Section 4.1, Appendix H); a preset changes what it names."""

    preset: str | None = option(None, "tiny (the default without --model), qwen3-4b, dsr1-llama-8b, olmo3-7b", "method")
    method: str = option("pwopsd", "opsd, pwopsd, eopd or reopold", "method")
    reference: str = option("own", "own, other, answer or none: what the teacher sees", "method")
    teacher: str = option("fixed", "whose weights score: fixed, ema, live, or those of another model", "method")
    ema_decay: float = option(0.99, "decay per step of --teacher ema", "method", within=(0, 1))
    student_thinking: bool = option(False, "thinking mode of the student's context", "method")
    teacher_thinking: bool = option(True, "thinking mode of the teacher's context", "method")
    prompts: str | None = option(None, "JSON file of templates: student, teacher, evaluation", "method")
    chat_template_kwargs: str | None = option(None, "JSON of further arguments for the chat template", "method")
    model: str = option("tiny", "directory or hub name; `tiny` is the embedded model", "data")
    data: str = option("siyanzhao/Openthoughts_math_30k_opsd", "file, folder, hub name or tiny:train", "data")
    columns: str | None = option(None, "columns with unusual names: problem=...,solution=...,answer=...", "data")
    max_length: int = option(20000, "limit in tokens of the longer context with its response", "data", least=1)
    eval_data: str | None = option(None, "held-out problems, scored before and after, within --max_new_tokens", "data")
    eval_steps: int = option(0, "also score them every so many steps; 0 is off", "data", least=0)
    server: str | None = option(None, "address of a vLLM that serves --model with LoRA", "sampling")
    max_new_tokens: int = option(1024, "length limit of a rollout", "sampling")
    temperature: float = option(1.1, "of the rollouts; --distill_temperature is the loss's", "sampling")
    top_p: float = option(0.95, "nucleus of the rollouts; 1 is off", "sampling")
    top_k: int = option(20, "most likely tokens of the rollouts; 0 is off", "sampling")
    num_steps: int = option(150, "steps, over which the learning rate falls linearly to 0", "optimisation", least=1)
    batch_size: int = option(32, "prompts per step over all ranks, one rollout each", "optimisation", within=(1, 1e6))
    micro_batch_size: int = option(4, "sequences per forward pass on each rank", "optimisation", least=1)
    learning_rate: float = option(5e-6, "at the first step", "optimisation", positive=True)
    max_grad_norm: float = option(0.1, "gradients are clipped to this norm", "optimisation", positive=True)
    lora_rank: int = option(64, "r; 0 trains all weights", "optimisation", least=0)
    lora_alpha: float = option(128.0, "the update is scaled by alpha / r", "optimisation", positive=True)
    lora_dropout: float = option(0.0, "paper's text: 0.05, authors' code: 0", "optimisation", within=(0, 0.99))
    output_dir: str | None = option(None, "run folder; default runs/MODEL-METHOD-seedSEED, numbered if taken")
    resume: bool = option(False, "go on from the newest checkpoint in --output_dir, if there is one")
    seed: int = option(42, "of every random draw: adapter, data order, rollouts, evaluation", within=(0, 2**63))
    save_steps: int = option(25, "steps between checkpoints; the last step is always saved", least=1)
    grader: str = option("auto", "math-verify, exact, or auto: math-verify where it is installed")
    shard: bool = option(False, "each rank holds its part of the frozen blocks, not all of them")
    gradient_checkpointing: bool | None = option(None, "default: on a GPU only")
    device: str = option("auto", "auto, cpu, cuda, ...")
    dtype: str = option("auto", "auto (bfloat16 on a GPU, else float32; float32 without LoRA) or its name")

    @property
    def sampling(self) -> rollout.Sampling:
        return rollout.Sampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens)


PRESETS: dict[str, dict] = {
    # At tau_clip 0.05 this model moves away from its teacher (docs/differences.md); the rest is scale.
    "tiny": {
        "model": "tiny", "data": "tiny:train", "eval_data": "tiny:heldout", "num_steps": 20, "tau_clip": 1.0,
        "max_new_tokens": 96, "micro_batch_size": 32, "learning_rate": 2e-3, "max_grad_norm": 1.0,
        "lora_rank": 16, "lora_alpha": 32.0, "top_k": 0,
    },
    "qwen3-4b": {"model": "Qwen/Qwen3-4B"},
    "dsr1-llama-8b": {"model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "micro_batch_size": 2},
    "olmo3-7b": {"model": "allenai/Olmo-3-7B-Think", "micro_batch_size": 2},
}  # fmt: skip
# What may differ when a run is taken up again, besides the number of ranks. It changes rounding only, with two
# exceptions: a server draws other tokens, and LoRA dropout other masks. Where a method is `over_batch`, neither the
# number of ranks nor micro_batch_size may.
FREE_ON_RESUME = {"resume", "output_dir", "device", "micro_batch_size", "gradient_checkpointing", "save_steps",
                  "server", "shard"}  # fmt: skip


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """Flags over the preset over the paper's defaults; without --model and --preset the preset is `tiny`.

    Raises InputError, naming the flag, for values that cannot work, or change nothing beside the others.
    """
    config = FlagParser(TrainConfig, __doc__).parse(PRESETS, arguments)
    loss.resolve_method(config.method, config)
    _ = config.sampling  # checks itself
    teacher.load_prompts(config.prompts, config.chat_template_kwargs)
    if config.teacher not in teacher.KINDS:
        loading.find_checkpoint(config.teacher, f"--teacher {config.teacher}: none of {', '.join(teacher.KINDS)}, and")
    given, clips = departures(config, PRESETS).split(), config.method not in ("eopd", "reopold")
    switches = config.method not in ("opsd", "pwopsd", "eopd")
    for flag, counts, with_ in (
        ("tau_clip", clips, "--method opsd or pwopsd"),
        ("beta", clips, "--method opsd or pwopsd"),
        ("switch_step", switches and not config.schedule, "--method reopold, without --schedule"),
        ("ema_decay", config.teacher == "ema", "--teacher ema"),
        ("eval_steps", config.eval_data, "--eval_data"),
        ("lora_alpha", config.lora_rank, "--lora_rank above 0"),
        ("lora_dropout", config.lora_rank, "--lora_rank above 0"),
    ):
        if not counts and f"--{flag}" in given:
            raise InputError(f"--{flag} {getattr(config, flag)}: counts only with {with_}")
    half = f"--dtype {config.dtype} with --lora_rank 0: updates vanish in its few digits; what helps: --dtype float32"
    for is_asked, what in (
        (config.server, "--server samples from an adapter that it loads by name: --lora_rank must be above 0"),
        (config.shard, "--shard splits frozen weights: --lora_rank must be above 0; all weights: verl or ms-swift"),
        (config.dtype in ("bfloat16", "float16"), f"{half}, or LoRA, whose adapter is float32 beside any --dtype"),
    ):
        if is_asked and config.lora_rank == 0:
            raise InputError(what)
    return config


def on_device(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The options with what the device decides where the user did not."""
    on_gpu, checkpointing = device.type == "cuda", config.gradient_checkpointing
    auto = "bfloat16" if on_gpu and config.lora_rank > 0 else "float32"
    dtype = auto if config.dtype == "auto" else config.dtype
    return replace(config, dtype=dtype, gradient_checkpointing=on_gpu if checkpointing is None else checkpointing)


# --- The run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What a step works with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: teacher.Teacher
    method: loss.Method
    engine: engines.Engine
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    grader: grading.ExactGrader
    prompts: teacher.Prompts
    stop: ranks.Stop

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return model.trained_parameters(self.model)

    def gradients(self) -> list[Tensor]:
        """Of all parameters, to be changed in place; zeros where none has come: a router's bias, with --lora_rank 0."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters]


def choose_prompts(
    config: TrainConfig, data: list[Problem], date: str | None = None
) -> tuple[list[Problem], teacher.Prompts]:
    """The problems with the reference that the teacher is shown, and the prompts of both contexts.

    `date`: of the run's start, for chat templates that show one; a resumed run keeps it.
    """
    prompts = teacher.load_prompts(config.prompts, config.chat_template_kwargs, date)
    thinking = {"student_thinking": config.student_thinking, "teacher_thinking": config.teacher_thinking}
    draw = np.random.default_rng((config.seed, REFERENCE_STREAM))
    return teacher.choose_reference(config.reference, data, replace(prompts, **thinking), draw)


def build(
    config: TrainConfig, device: torch.device, grader: grading.ExactGrader, prompts=teacher.PAPER_PROMPTS
) -> Training:
    """Model with its adapter, teacher, optimizer and learning-rate schedule, all at their start."""
    student = loading.load_model(config.model, config.dtype, device, config.shard)
    tokenizer = loading.load_tokenizer(config.model)
    torch.manual_seed(config.seed)
    if config.lora_rank > 0:
        model.add_lora(student, config.lora_rank, config.lora_alpha, config.lora_dropout)
    if config.gradient_checkpointing:
        model.recompute_activations(student)
    if config.teacher in teacher.KINDS:
        scorer = teacher.Teacher(student, config.teacher, config.ema_decay)
    else:
        other = loading.load_other(config.teacher, student, tokenizer, prompts, config.shard)
        scorer = teacher.Teacher(student, "other", other=other)
    # Parameter by parameter (foreach False): updating all at once would take as much memory again.
    optimizer = torch.optim.AdamW(
        scorer.trained, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False
    )
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=config.num_steps)
    if config.server:
        engine = engines.connect(config.server, config.model, tokenizer, in_flight=200, needs_raw=True)
    else:
        rows = config.batch_size // ranks.world_size() if config.shard else 200
        engine = engines.GenerateEngine(student, tokenizer, rows)
    method, stop = loss.resolve_method(config.method, config), ranks.Stop(config.shard)
    return Training(student, tokenizer, scorer, method, engine, optimizer, scheduler, grader, prompts, stop)


def rehearse(run: Training, longest: list[list[int]], config: TrainConfig) -> None:
    """One micro-batch of the longest prompts and responses, forward and backward, dropped again, before step 0.

    Raises InputError, naming the flags that help, where the device's memory does not hold them.
    """
    (x_stu, x_tch), rows = longest, min(config.micro_batch_size, -(-config.batch_size // ranks.world_size()))
    y = rollout.Response([run.tokenizer.eos_token_id] * config.max_new_tokens, finished=True)
    batch = [Rollout(x_stu, x_tch, y, {"correct": None, "problem": 0})] * rows
    try:
        moments = [torch.empty_like(parameter) for parameter in run.parameters for _ in ("first", "second")]
        with model.adapter_dropout(run.model):
            part, _ = loss_fraction(0, batch, run, config, metrics.Observer(run.model.device))
            part.backward()
        del moments, part
    except torch.OutOfMemoryError as error:
        what = f"{rows} rows with prompts of {len(x_stu)} and {len(x_tch)} tokens and {config.max_new_tokens} new ones"
        helps = "--gradient_checkpointing true, a lower --micro_batch_size, --max_length, --max_new_tokens, --lora_rank"
        raise InputError(f"{what} do not fit into the memory together; what helps: {helps}") from error
    finally:
        run.optimizer.zero_grad()


def score_held_out(log: records.RunLog, step: int, run: Training, data: list[Problem], config: TrainConfig) -> None:
    """Avg@1 on held-out problems, with evaluate.py's prompts and sampling, but at most --max_new_tokens, and greedy.

    Nothing is kept where a signal comes.
    """
    if not data or str(step) in log.evaluation:
        return
    rows, mine = [], [(config.seed, index, 0) for index in range(len(data))][ranks.rank() :: ranks.world_size()]
    for decoding, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        settings = rollout.Sampling(temperature, 0.95, 0, config.max_new_tokens)
        for item in evaluate.solve(run.engine, run.tokenizer, data, mine, settings, prompts=run.prompts):
            correct = run.grader.grade(item.text, data[item.problem].answer)
            rows.append({"step": step, "decoding": decoding, "correct": correct, **asdict(item)})
    run.stop.hold()
    ranks.say(log.evaluate(step, [row for part in ranks.gather_objects(rows) for row in part]))
    run.stop.release()


def main() -> int:
    """Returns the exit status: 0, or 128 + the signal that has stopped the run."""
    config = parse_config()
    device = ranks.start_ranks(config.device)
    if config.batch_size < ranks.world_size():
        raise InputError(f"--batch_size {config.batch_size}: fewer prompts than the {ranks.world_size()} ranks")
    if config.shard and (ranks.world_size() == 1 or config.batch_size % ranks.world_size()):
        raise InputError(f"--shard: needs ranks, two or more that divide --batch_size, not {ranks.world_size()}")
    loading.find_checkpoint(config.model)  # a wrong --model is told before the data are looked for
    data = problems.load_problems(config.data, columns=config.columns)
    held_out = problems.load_problems(config.eval_data, False, config.columns) if config.eval_data else []
    name = f"{config.preset or Path(config.model).name}-{config.method}-seed{config.seed}"
    folder = records.new_folder(config.output_dir, name)
    with records.open_run(folder, "train", config.resume) as record:
        options = departures(config, PRESETS) or "the preset as it is"
        ranks.say(f"{config.method}, {options}; options: {folder}/config.json")
        asked = train(on_device(config, device), device, folder, record, data, held_out)
    ranks.stop_ranks()
    return 128 + asked if asked else 0


def train(
    config: TrainConfig, device: torch.device, folder: Path, record: dict | None, data: list[Problem],
    held_out: list[Problem],
) -> int:  # fmt: skip
    """A run in a folder that is ours, from its start or from its newest checkpoint; the signal that ended it, or 0."""
    grader = grading.make_grader(config.grader, [problem.answer for problem in [*data, *held_out] if problem.answer])
    config = replace(config, grader=grader.name)  # a resumed run may not turn to another
    date = records.first_day(record)
    data, prompts = choose_prompts(config, data, date)
    run = build(config, device, grader, prompts)
    run.stop.listen()
    contexts = ("student", "teacher", "evaluation") if held_out else ("student", "teacher")
    for note in teacher.check_prompts(run.tokenizer, prompts, contexts):
        ranks.say(note)
    kept, longest = loading.fitting_problems(run, data, held_out, config)
    free = FREE_ON_RESUME - ({"micro_batch_size"} if run.method.over_batch else set())
    models = {"model": config.model} | ({} if config.teacher in teacher.KINDS else {"teacher": config.teacher})
    inputs = records.fingerprints(models)
    inputs |= {"data": records.digest(data), "eval_data": records.digest(held_out), "prompts": asdict(prompts)}
    if any(theirs != inputs for theirs in ranks.gather_objects(inputs)):
        raise InputError("the ranks have read other data or prompts: all need the same files")
    facts = {"hardware": str(device), "date": date}
    records.record_run(folder, "train", record, asdict(config), free, inputs, facts)
    if record and run.method.over_batch and record["ranks"] != (now := ranks.world_size()):
        what = f"--method {config.method} weighs a token by the others of its micro-batch, which the ranks share out"
        raise InputError(f"--output_dir {folder}: was started on {record['ranks']} ranks, not {now}: {what}")
    ranks.say(f"graded by {grader.name}" + (f"; {grader.note}" if grader.note else ""))
    if device.type != "cpu":
        rehearse(run, longest, config)
    start = checkpoint.resume(folder, run) if config.resume else 0
    ranks.check_same_start(list(run.model.named_parameters()))  # all have read before rank 0 writes
    with closing(run.engine), closing(run.grader):
        take_steps(start, run, kept, held_out, folder, config)
    engines.withdraw(folder)
    return run.stop.asked


def take_steps(
    start: int, run: Training, data: list[Problem], held_out: list[Problem], folder: Path, config: TrainConfig
) -> None:
    """The steps that are left, with what is logged, scored and saved between them."""
    log, done = records.RunLog(folder, start), start
    watch = metrics.Watch(config.max_new_tokens, config.lora_dropout, run.model.dtype, log.earlier)
    if start == config.num_steps:
        ranks.say(f"all {start} steps are done: only held-out scores that are missing are made up for")
    try:
        engines.publish(run.engine, run.model, folder, start)
        run.stop.release()
        for step in ranks.progress(range(start, config.num_steps), desc="step", initial=start, total=config.num_steps):
            if step == 0 or (config.eval_steps and step % config.eval_steps == 0):
                score_held_out(log, step, run, held_out, config)
            row, samples = train_step(step, run, data, config)  # from its update on, signals wait
            log.append(row, [sample for part in ranks.gather_objects(samples) for sample in part])
            done = step + 1  # with its rows: a step that is saved is not made again
            ranks.say("\n".join([metrics.step_line(row, config.num_steps), *watch.see(row)]))
            if done % config.save_steps == 0 or done == config.num_steps:
                save(folder, done, run, config)
                ranks.wait_for_all()  # none runs ahead of the one that writes, which may fail
            engines.publish(run.engine, run.model, folder, done)
            run.stop.release()
        score_held_out(log, config.num_steps, run, held_out, config)
        run.stop.hold()
    except ranks.StoppedError:
        if done > start:
            save(folder, done, run, config)  # before any rank is waited for: an error may have ended it
        run.stop.meet()
        ranks.wait_for_all()
        where = f"saved after step {done}" if done else "before the first step was done"
        ranks.say(f"stopped by a signal, {where}; the same command with --resume --output_dir {folder} goes on")
    except Exception:
        run.stop.held = True  # torchrun ends the other ranks by a signal
        if done > start and {int(state["step"]) for state in run.optimizer.state.values()} == {done}:
            save(folder, done, run, config)  # no weight has moved since then
        raise
    else:
        ranks.say(f"weights: {folder}/checkpoint-{config.num_steps}")


def save(folder: Path, step: int, run: Training, config: TrainConfig) -> None:
    """The first rank writes the checkpoint after `step` steps, unless it is there, whole."""
    if ranks.rank() == 0 and checkpoint.damage(folder / f"checkpoint-{step}") is not None:
        checkpoint.save_checkpoint(folder, step, run, loading.find_checkpoint(config.model))


def cli() -> None:
    """Entry for scripts that add a method of their own (README: Add a method)."""
    run_script(main)


if __name__ == "__main__":
    cli()
