"""One table, one run: memory and speed of every part, each beside a naive twin in the same process.

    python -m experiments.benchmark --device cpu --quick      about two minutes
    python -m experiments.benchmark --device cuda             the presets' shapes with random weights

Memory is the peak of PyTorch's own allocations beyond what is there before, forward and backward. The loss's time is
the smallest of several turns taken in alternation, on a CPU the seconds that this process computed. The naive twin of
the loss is the same formula on whole float32 logits, that of sampling one call per micro-batch, that of a step both.

Axes: B sequences, T response tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from checkpoint import git_commit, versions, write_atomically
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, PreTrainedModel, Qwen3Config

import rollout
import train
from loss import CHUNK_TOKENS, method_loss_from_hidden
from model import load_tokenizer
from problems import InputError, load_problems
from teacher import student_prompt

ROOT = Path(__file__).resolve().parent.parent
V = 151_936  # Qwen3's vocabulary
GIB = 2**30
# The architectures behind the presets, from the checkpoints' config.json; weights are random.
SHAPES: dict[str, Callable] = {
    "qwen3-4b": lambda: Qwen3Config(
        vocab_size=V, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
    ),
    "dsr1-llama-8b": lambda: LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
    ),
    "olmo3-7b": lambda: Olmo3Config(
        vocab_size=100_278, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=65536, sliding_window=4096, tie_word_embeddings=False,
    ),
}  # fmt: skip


class Table:
    """Rows of (what, ours, naive, unit); printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, what: str, ours: float, naive: float | None, unit: str, note: str = "") -> None:
        row = {"what": what, "ours": ours, "naive": naive, "unit": unit, "naive / ours": None, "note": note}
        if naive is not None and ours > 0:
            row["naive / ours"] = naive / ours
        self.rows.append(row)
        print(self.line(row), flush=True)

    @staticmethod
    def line(row: dict) -> str:
        cells = [row["what"], *("-" if row[k] is None else f"{row[k]:.4g}" for k in ("ours", "naive", "naive / ours"))]
        return f"| {' | '.join([*cells, row['unit'], row['note']])} |"

    def markdown(self) -> str:
        head = "| what | ours | naive twin | naive / ours | unit | note |\n|---|---|---|---|---|---|\n"
        return head + "\n".join(map(self.line, self.rows)) + "\n"


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; on a CPU those that this process computed, which other processes disturb least."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    wait(device)
    start = clock()
    function()
    wait(device)
    return clock() - start


def alternate(functions: list[Callable[[], object]], device: torch.device, turns: int) -> list[float]:
    """The smallest of `turns` times of each function, taken in alternation after one unmeasured call each."""
    for function in functions:
        function()
    times = [[seconds(function, device) for function in functions] for _ in range(turns)]
    return [min(column) for column in zip(*times, strict=True)]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Peak of PyTorch's allocations while `function` runs, beyond those alive before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# ---------------------------------------------------------------------------------------------------------------
# (1) The loss


def naive_opsd(student_BTD: Tensor, teacher_BTD: Tensor, head_VD: Tensor, mask_BT: Tensor) -> Tensor:
    """Eq. (1) on whole float32 logits, written straight down: the twin."""
    student_logp_BTV = ((student_BTD @ head_VD.T).float() / 1.1).log_softmax(dim=-1)
    with torch.no_grad():
        teacher_logp_BTV = ((teacher_BTD @ head_VD.T).float() / 1.1).log_softmax(dim=-1)
    entries_BTV = teacher_logp_BTV.exp() * (teacher_logp_BTV - student_logp_BTV)
    return (entries_BTV.clamp(max=0.05).sum(dim=-1) * mask_BT).sum() / mask_BT.sum()


def loss_functions(B: int, T: int, D: int, device: torch.device) -> tuple[Callable, Callable]:
    """Forward and backward of our loss, given a chunk size, and of the naive one, on the same random states."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    student = (0.3 * torch.randn(B, T, D, device=device)).to(dtype).requires_grad_()
    teacher, head = (0.3 * torch.randn(B, T, D, device=device)).to(dtype), torch.randn(V, D, device=device).to(dtype)
    ids = torch.randint(V, (B, T), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def ours(chunk_tokens: int = CHUNK_TOKENS) -> float:
        student.grad = None
        loss = method_loss_from_hidden("opsd", student, teacher, head, ids, mask, chunk_tokens=chunk_tokens)
        loss.backward()
        return loss.item()

    def naive() -> float:
        student.grad = None
        loss = naive_opsd(student, teacher, head, mask)
        loss.backward()
        return loss.item()

    return ours, naive


def benchmark_loss(table: Table, device: torch.device, quick: bool) -> None:
    on_gpu = device.type == "cuda"
    D, small = (2560, 1024) if on_gpu else (256, 32) if quick else (2560, 64)
    ours, naive = loss_functions(4, small, D, device)
    tokens = 4 * small
    difference = abs(ours() - naive())
    naive_peak = peak_bytes(naive, device)
    per_logit = naive_peak / (tokens * V)
    note = f"V {V}, D {D}, {tokens} tokens, values differ by {difference:.0e}"
    table.add("loss, peak memory", peak_bytes(ours, device) / GIB, naive_peak / GIB, "GiB", note)
    table.add("loss, time", *alternate([ours, naive], device, 3), "s", note)
    if on_gpu:
        for chunk in (128, 256, 512):
            table.add(
                f"loss, time at chunk_tokens {chunk}", *alternate([lambda c=chunk: ours(c), naive], device, 3), "s"
            )
    for T in (64, 1024) if quick and not on_gpu else (1024, 4096):
        width = D if on_gpu else 64
        states = (
            3 * 4 * T * width * (2 if on_gpu else 4)
        )  # of both contexts there is none; ours, its gradient, its twin
        larger, _ = loss_functions(4, T, width, device)
        peak = peak_bytes(larger, device)
        note = f"naive computed: {per_logit:.1f} bytes a logit, as measured above; D {width}"
        note += f"; {(peak - states) / GIB:.4g} without the gradient of the states"
        table.add(f"loss, peak memory at 4 x {T}", peak / GIB, 4 * T * V * per_logit / GIB, "GiB", note)


# ---------------------------------------------------------------------------------------------------------------
# (2) to (4) A step, sampling, and the floors


def build(preset: str | None, device: torch.device, folder: Path, quick: bool):
    """What train.train_step needs: the embedded model, or on a GPU a preset's shape with random weights."""
    config = train.parse_config([*(["--preset", preset] if preset else []), "--data", "tiny:train"])
    config = replace(config, device=str(device), output_dir=str(folder))
    tokenizer, problems = load_tokenizer("tiny"), load_problems("tiny:train")
    if preset in (None, "tiny"):
        config = replace(config, batch_size=16 if quick else 32, micro_batch_size=4)
        return config, problems, train.build(config, device)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(SHAPES[preset](), attn_implementation=config.attention)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    if quick:
        config = replace(config, max_new_tokens=128)
    with mock.patch.object(train, "load_model", lambda *_: model):
        _, _, *rest = train.build(replace(config, model="tiny"), device)
    return config, problems, (model, tokenizer, *rest)


def per_micro_batch(sampler: Callable, size: int) -> Callable:
    """The naive way to sample: one call per micro-batch."""

    def sample(model, tokenizer, prompts, keys, **settings) -> rollout.Rollout:
        parts = [
            sampler(model, tokenizer, prompts[start : start + size], keys[start : start + size], **settings)
            for start in range(0, len(prompts), size)
        ]
        joined = (
            [row for part in parts for row in getattr(part, name)] for name in ("prompts", "responses", "finished")
        )
        return rollout.Rollout(*joined)

    return sample


def benchmark_step(table: Table, preset: str, device: torch.device, folder: Path, quick: bool) -> dict:
    """One step by parts. The twin samples per micro-batch and holds all logits of a micro-batch at once."""
    config, problems, (model, tokenizer, teacher, optimizer, scheduler) = build(preset, device, folder, quick)

    def step(number: int) -> dict:
        return train.train_step(number, model, tokenizer, teacher, problems, optimizer, scheduler, config)[0]

    whole = train.loss_terms_from_hidden
    twin_loss = mock.patch.object(
        train, "loss_terms_from_hidden", lambda *a, **k: whole(*a, **{**k, "chunk_tokens": 10**9})
    )
    twin_sample = mock.patch.dict(train.ENGINES, generate=per_micro_batch(rollout.sample, int(config.micro_batch_size)))
    step(0)
    ours = step(1)
    try:
        with twin_loss, twin_sample:
            naive = step(1)
    except torch.OutOfMemoryError:
        naive = {}
    weights = "trained weights" if preset == "tiny" else "random weights"
    note = f"{config.batch_size} prompts, {ours['mean_length']:.0f} tokens on average, {weights}"
    for part in ("sampling", "teacher", "student", "update"):
        key = f"seconds_{part}"
        table.add(
            f"step {preset}, {part}", ours[key], naive.get(key), "s", note if naive else f"{note}; twin: no memory"
        )
    return {"ours": ours, "model": model, "config": config, "problems": problems, "tokenizer": tokenizer}


def benchmark_sampling(table: Table, preset: str, built: dict, device: torch.device) -> None:
    """Tokens per second of each engine, beside the first engine called once per micro-batch."""
    config, tokenizer, model = built["config"], built["tokenizer"], built["model"]
    prompts = [student_prompt(tokenizer, problem) for problem in built["problems"][: config.batch_size]]
    keys = [(0, slot) for slot in range(len(prompts))]

    def rate(sampler: Callable) -> float:
        took, tokens = float("inf"), 0
        for _ in range(2):
            start = time.perf_counter()
            out = sampler(
                model, tokenizer, prompts, keys, temperature=config.rollout_temperature, top_p=config.top_p,
                top_k=config.top_k, max_new_tokens=config.max_new_tokens,
            )  # fmt: skip
            wait(device)
            took, tokens = min(took, time.perf_counter() - start), sum(out.lengths)
        return tokens / took

    naive = rate(per_micro_batch(rollout.sample, int(config.micro_batch_size)))
    for name, sampler in train.ENGINES.items():
        ours = rate(sampler)
        table.add(f"sampling {preset}, {name}", ours, naive, "tokens/s", f"{len(prompts)} rows; more is better")


def benchmark_floors(table: Table, preset: str, built: dict, device: torch.device) -> None:
    """GPU only: bytes of weights per decoded token over copy bandwidth; multiply-adds over the matmul rate."""
    model: PreTrainedModel = built["model"]
    config, step = built["config"], built["ours"]
    a, b = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2 * 2**30 / alternate([lambda: a.copy_(b)], device, 10)[0]
    x, y = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / alternate([lambda: x @ y], device, 10)[0]
    embeddings = model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - embeddings.numel()
    if model.get_output_embeddings().weight is embeddings:
        body += embeddings.numel()  # the tied table is read as the head; looking up rows costs nothing
    floor = body * embeddings.element_size() / bandwidth
    taken = step["seconds_sampling"] / (step["mean_length"] or 1.0)
    table.add(f"{preset}, copy bandwidth", bandwidth / 1e12, None, "TB/s")
    table.add(f"{preset}, matmul rate", rate / 1e12, None, "TFLOP/s", "bfloat16, 8192 x 8192")
    table.add(
        f"{preset}, decoding: floor / ours", floor / taken, None, "ratio", "bar: at least 0.5; time per step of a batch"
    )
    tokens = config.batch_size * step["mean_length"]
    # Per weight and token: teacher 2, student 2, its recomputation 2, backward through frozen weights 2.
    flops = 8 * body * tokens
    scoring = sum(step[f"seconds_{part}"] for part in ("teacher", "student", "update"))
    table.add(
        f"{preset}, scoring: floor / ours", flops / rate / scoring, None, "ratio", "prompts not counted; bar: 0.35"
    )


# ---------------------------------------------------------------------------------------------------------------
# (5) Ranks


def benchmark_ranks(table: Table, folder: Path) -> None:
    """Seconds per step on the CPU with one and with two ranks, of one thread each; their losses must agree."""
    rows = {}
    for ranks in (1, 2):
        run = folder / f"ranks-{ranks}"
        flags = ["--preset", "tiny", "--num_steps", "3", "--batch_size", "32", "--eval_data", "", "--device", "cpu"]
        launcher = [
            sys.executable,
            *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []),
        ]
        subprocess.run(
            [*launcher, str(ROOT / "train.py"), *flags, "--output_dir", str(run)], check=True, cwd=ROOT,
            capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        rows[ranks] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    took = {n: min(sum(v for k, v in row.items() if k.startswith("seconds_")) for row in rows[n]) for n in rows}
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows[1], rows[2], strict=True))
    table.add("step tiny, 2 ranks beside 1", took[2], took[1], "s", f"CPU; losses differ by at most {apart:.0e}")


# ---------------------------------------------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    name = models[0] if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under three minutes on a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "experiments" / "results", help="folder for the table")
    args = parser.parse_args()
    device = train.pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    table, start = Table(), time.perf_counter()
    benchmark_loss(table, device, args.quick)
    with tempfile.TemporaryDirectory() as folder:
        for preset in list(SHAPES) if device.type == "cuda" else ["tiny"]:
            built = benchmark_step(table, preset, device, Path(folder), args.quick)
            benchmark_sampling(table, preset, built, device)
            if device.type == "cuda":
                benchmark_floors(table, preset, built, device)
            del built
        benchmark_ranks(table, Path(folder))
    load = os.getloadavg()[0]
    facts = {
        "hardware": hardware(device), "versions": versions(), "git_commit": git_commit(), "load": load,
        "command": " ".join(["python", *sys.orig_argv[1:]]), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    name = f"benchmark-{device.type}{'-quick' if args.quick else ''}"
    write_atomically(args.output / f"{name}.json", json.dumps({**facts, "rows": table.rows}, indent=1) + "\n")
    described = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    write_atomically(args.output / f"{name}.md", f"# Benchmark\n\n{described}\n\n{table.markdown()}")
    print(f"wrote {args.output / name}.md")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
