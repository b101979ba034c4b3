"""What to run in the first hour on a new GPU: every part bounded in time, one table, nothing stops the rest.

    python -m experiments.first_gpu_hour                        a GPU, about an hour
    python -m experiments.first_gpu_hour --small --device cpu   the same parts at small shapes, for a look at the script

| part | what it tells |
|---|---|
| environment | versions, GPU, driver |
| loss | seconds and memory of the loss at Qwen3's vocabulary, by chunk size |
| decode | tokens per second at each preset's shape, beside what reading the weights would allow |
| step | two training steps per preset: seconds by part, scoring beside the matrix rate, peak of the memory |
| kill | a run killed and resumed ends as one that was not |

Each part, and in some each preset, is a process of its own: one that hangs or dies is a row of the table. Where the hub
or a local directory has no checkpoint, weights are random, which the row says: speed and memory do not depend on them,
lengths do.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, PreTrainedModel, Qwen3Config
from transformers.utils.logging import disable_progress_bar

import train
from errors import InputError
from experiments.bench import GIB, Table, alternate, hardware, loss_functions, peak_bytes, wait, write_table
from grading import make_grader
from problems import load_problems
from rollout import Sampling
from runtime.engines import GenerateEngine
from runtime.flags import run_script
from runtime.lengths import fitting_problems
from runtime.loading import load_tokenizer, pick_device
from runtime.records import make_folder, versions
from teacher import student_prompt, teacher_prompt

ROOT = Path(__file__).resolve().parent.parent
# The architectures behind the presets, from the checkpoints' config.json.
SHAPES: dict[str, Callable] = {
    "qwen3-4b": lambda: Qwen3Config(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
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
# Limits of the parts; of those in PER_PRESET, for each preset.
SECONDS = {"environment": 120, "loss": 300, "decode": 300, "step": 500, "kill": 400}
PER_PRESET = ("decode", "step")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 1000}


# ---------------------------------------------------------------------------------------------------------------
# Models of the presets' shapes


def random_model(preset: str, device: torch.device, small: bool) -> PreTrainedModel:
    """A preset's shape with random weights; with `small` a narrow one of as many kinds of blocks."""
    config = SHAPES[preset]()
    if small:
        config.num_hidden_layers = 4
        for name, value in {**SMALL, "num_key_value_heads": 2, "sliding_window": 32}.items():
            if hasattr(config, name):
                setattr(config, name, value)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:4]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # random weights never end a response: lengths are the limit
    return model


def build(preset: str, device: torch.device, small: bool, folder: Path) -> tuple:
    """A run of the preset as train.py builds it, and where its weights are from."""
    flags = ["--preset", preset, "--data", "tiny:train", "--device", str(device), "--output_dir", str(folder)]
    config = train.parse_config(flags + (["--max_new_tokens", "16", "--batch_size", "4"] if small else []))
    config = train.on_device(replace(config, eval_data=None), device)
    if not small:
        try:
            return config, train.build(config, device, make_grader("exact", [])), "the checkpoint's weights"
        except InputError:  # no hub here
            pass
    model, tokenizer = random_model(preset, device, small), load_tokenizer("tiny")
    loaders = {"load_model": lambda *_, **__: model, "load_tokenizer": lambda *_: tokenizer}
    with mock.patch.multiple(train.model, **loaders):
        return config, train.build(config, device, make_grader("exact", [])), "random weights"


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that decoding one token reads: all but the input embedding's, unless the head is that table."""
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    return every - (0 if tied else table.numel() * table.element_size())


# ---------------------------------------------------------------------------------------------------------------
# The parts


def environment(table: Table, device: torch.device, small: bool) -> None:
    table.add(f"environment: {hardware(device)}", None, None, "", ", ".join(f"{k} {v}" for k, v in versions().items()))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        table.add("GPU memory free / all", free / GIB, total / GIB, "GiB", f"CUDA {torch.version.cuda}")


def loss(table: Table, device: torch.device, small: bool) -> None:
    V, D, M = (1000, 64, 64) if small else (151_936, 2560, 4096)
    ours, plain = loss_functions(M, D, V, device)
    for chunk in (4, 16) if small else (32, 69, 128, 256, 512):
        seconds, twin = alternate([lambda c=chunk: ours(c), plain], device)
        peak = peak_bytes(lambda c=chunk: ours(c), device) / GIB
        table.add(f"loss, {chunk} tokens a chunk", seconds, twin, "s", f"V {V}, {M} tokens; peak {peak:.3g} GiB")


def rates(device: torch.device, small: bool) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), multiply-adds times two a second of a matrix product."""
    size, side = (2**20, 128) if small else (2**30, 8192)
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, y = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copying, product = (alternate([f], device, 5)[0] for f in (lambda: a.copy_(b), lambda: x @ y))
    return 2 * size / max(copying, 1e-9), 2 * side**3 / max(product, 1e-9)


def decode(table: Table, device: torch.device, small: bool, presets: list[str]) -> None:
    bandwidth, _ = rates(device, small)
    table.add("copy bandwidth", bandwidth / 1e12, None, "TB/s")
    for preset in presets:
        model, tokenizer = random_model(preset, device, small), load_tokenizer("tiny")
        prompts = [student_prompt(tokenizer, p) for p in load_problems("tiny:train")[: 2 if small else 32]]
        keys, tokens = [(0, row) for row in range(len(prompts))], 4 if small else 256
        settings = Sampling(1.1, 0.95, 20, tokens)
        floor = len(prompts) * bandwidth / read_bytes(model)
        engine = GenerateEngine(model, tokenizer)
        engine.sample(prompts[:1], keys[:1], replace(settings, max_new_tokens=2))
        start = time.perf_counter()
        responses = engine.sample(prompts, keys, settings)
        wait(device)
        speed = sum(len(r.ids) for r in responses) / (time.perf_counter() - start)
        note = f"{len(prompts)} rows, {tokens} tokens, random weights; second column: reading the weights alone"
        table.add(f"decode {preset}", speed, floor, "tokens/s", note)


def step(table: Table, device: torch.device, small: bool, presets: list[str]) -> None:
    _, rate = rates(device, small)
    table.add("matrix rate", rate / 1e12, None, "TFLOP/s")
    for preset in presets:
        with tempfile.TemporaryDirectory() as folder:
            one_step(table, device, small, preset, Path(folder), rate)


def one_step(table: Table, device: torch.device, small: bool, preset: str, folder: Path, rate: float) -> None:
    config, run, weights = build(preset, device, small, folder)
    problems = load_problems(config.data)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    problems, longest = fitting_problems(run, problems, [], config)
    train.rehearse(run, longest, config)
    train.train_step(0, run, problems, config)
    row, _ = train.train_step(1, run, problems, config)
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    note = f"{config.batch_size} rollouts, {row['mean_length']:.0f} tokens on average, {weights}"
    for part in ("sampling", "grading", "teacher", "student", "update"):
        table.add(f"step {preset}, {part}", row[f"seconds_{part}"], None, "s", note)
    numbers = sum(p.numel() for p in run.model.parameters()) - run.model.get_input_embeddings().weight.numel()
    # Per weight and token: teacher 2, student 2, its recomputation 2, backward through frozen weights 2.
    passes = 8 if config.gradient_checkpointing else 6
    contexts = [len(teacher_prompt(run.tokenizer, problem)) for problem in problems[: config.batch_size]]
    tokens = config.batch_size * (row["mean_length"] + sum(contexts) / len(contexts) / 2)
    scoring = row["seconds_teacher"] + row["seconds_student"]
    table.add(f"step {preset}, scoring", scoring, passes * numbers * tokens / rate, "s", "second: at the matrix rate")
    table.add(f"step {preset}, peak of the memory", peak, None, "GiB", f"{config.micro_batch_size} rows a micro-batch")


def kill(table: Table, device: torch.device, small: bool) -> None:
    """The embedded model: SIGKILL after the second checkpoint, resumed, beside an unbroken run."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            sys.executable, str(ROOT / "train.py"), "--preset", "tiny", "--num_steps", "4", "--save_steps", "1",
            "--batch_size", "4", "--micro_batch_size", "4", "--eval_data", "", "--device", str(device), "--output_dir",
        ]  # fmt: skip
        quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*flags, f"{folder}/whole"], check=True, **quiet)
        process = subprocess.Popen([*flags, f"{folder}/killed"], **quiet)
        while process.poll() is None and not Path(folder, "killed", "checkpoint-2").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run([*flags, f"{folder}/killed", "--resume"], check=True, **quiet)
        rows = [
            [json.loads(line)["loss"] for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
            for name in ("killed", "whole")
        ]
    apart = max(abs(a - b) for a, b in zip(*rows, strict=True))
    table.add("killed and resumed: losses differ by", apart, None, "nats", "embedded model, 4 steps")


PARTS = {"environment": environment, "loss": loss, "decode": decode, "step": step, "kill": kill}


# ---------------------------------------------------------------------------------------------------------------
# The script


def run_part(table: Table, name: str, args: argparse.Namespace, presets: list[str]) -> None:
    """Add the rows of a part, run in a process of its own, and one that says how it ended where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        rows, limit = Path(folder, "rows"), int(SECONDS[name] * args.patience)
        command = [sys.executable, "-m", "experiments.first_gpu_hour", "--part", name, "--rows", str(rows)]
        command += ["--device", args.device, "--preset", *presets, *(["--small"] if args.small else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True, check=False)
            trouble = None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]
        except subprocess.TimeoutExpired:
            trouble = f"not done after {limit} s"
        found = rows.read_text().splitlines() if rows.exists() else []
    table.lines += found
    print("\n".join(found), flush=True)
    if trouble:
        label = " ".join([name, *(presets if name in PER_PRESET else [])])
        table.add(f"{label}: FAILED", None, None, "", trouble[:300].replace("|", "/"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--preset", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--patience", type=float, default=1.0, help="factor on every part's time limit")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "first-gpu-hour")
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.part:  # in its own process
        disable_progress_bar()
        extra = {"presets": args.preset} if args.part in PER_PRESET else {}
        return PARTS[args.part](RowFile(args.rows), device, args.small, **extra)
    make_folder(args.output_dir)
    table = Table()
    for name in args.parts:
        for presets in [[preset] for preset in args.preset] if name in PER_PRESET else [args.preset]:
            run_part(table, name, args, presets)
    return write_table(args.output_dir / "first-gpu-hour.md", table, device)


class RowFile(Table):
    """A table whose rows are on the disk at once, whatever comes after them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def add(self, *cells, **named) -> None:
        super().add(*cells, **named)
        with self.path.open("a") as file:
            file.write(self.lines[-1] + "\n")


if __name__ == "__main__":
    run_script(main)
