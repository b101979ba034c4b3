"""What to run in the first hour on a new GPU: every part bounded in time, one table, nothing stops the rest.

    python -m experiments.first_gpu_hour                        a GPU, about an hour
    python -m experiments.first_gpu_hour --small --device cpu   the same parts at small shapes, for a look at the script

- environment: versions, GPU, driver
- loss: seconds and memory of the loss at Qwen3's vocabulary, by chunk size
- rates: bytes a second of a copy, operations a second of a matrix product
- each preset: two steps of `train.py` at its shape: seconds by part, sampling beside what reading the weights would
  allow, scoring beside the matrix rate, peak of the memory
- kill: a run killed and resumed ends as one that was not

Each part is a process of its own, and what it prints is kept beside the table: one that hangs or dies is a row. A
preset's weights are random: speed and memory do not depend on them, and hardly a response ends before the limit.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, PreTrainedModel, Qwen3Config

import train
from experiments.bench import GIB, HEAD, add_row, alternate, facts, loss_functions, peak_bytes
from runtime.flags import run_script
from runtime.loading import load_tokenizer, pick_device
from runtime.records import make_folder, versions

ROOT = Path(__file__).resolve().parent.parent
# The architectures behind the presets, from the checkpoints' config.json.
SHAPES = {
    "qwen3-4b": partial(Qwen3Config,
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
    ),
    "dsr1-llama-8b": partial(LlamaConfig,
        vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
    ),
    "olmo3-7b": partial(Olmo3Config,
        vocab_size=100_278, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=65536, sliding_window=4096, tie_word_embeddings=False,
    ),
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 1000}
SECONDS = {"environment": 120, "loss": 300, "rates": 120, **dict.fromkeys(SHAPES, 800), "kill": 400}  # limits


def random_model(preset: str, device: torch.device, small: bool) -> PreTrainedModel:
    """A preset's shape with random weights; with `small` a narrow one of as many kinds of blocks."""
    config = SHAPES[preset](**(SMALL if small else {}))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


# ---------------------------------------------------------------------------------------------------------------
# The parts, each in its own process; they print rows


def environment(device: torch.device, small: bool) -> None:
    add_row("environment", None, note=", ".join(f"{name} {version}" for name, version in versions().items()))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        add_row("GPU memory free / all", free / GIB, total / GIB, "GiB", f"CUDA {torch.version.cuda}")


def loss(device: torch.device, small: bool) -> None:
    V, D, M = (1000, 64, 64) if small else (151_936, 2560, 4096)
    ours, plain = loss_functions(M, D, V, device)
    for chunk in (4, 16) if small else (32, 69, 128, 256, 512):
        seconds, twin = alternate([lambda c=chunk: ours(c), plain], device)
        peak = peak_bytes(lambda c=chunk: ours(c), device) / GIB
        add_row(f"loss, {chunk} tokens a chunk", seconds, twin, "s", f"V {V}, {M} tokens; peak {peak:.3g} GiB")


def rates(device: torch.device, small: bool) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), multiply-adds times two a second of a matrix product."""
    size, side = (2**20, 128) if small else (2**30, 8192)
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, y = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copying, product = (max(seconds, 1e-9) for seconds in alternate([lambda: a.copy_(b), lambda: x @ y], device, 5))
    add_row("copy bandwidth", 2 * size / copying / 1e12, None, "TB/s")
    add_row("matrix rate", 2 * side**3 / product / 1e12, None, "TFLOP/s")
    return 2 * size / copying, 2 * side**3 / product


def steps(preset: str, device: torch.device, small: bool) -> None:
    """Two steps of train.py on a random checkpoint of the preset's shape; the second one is told."""
    bandwidth, rate = rates(device, small)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(preset, device, small)
        table = model.get_input_embeddings().weight
        numbers = sum(p.numel() for p in model.parameters())
        # What decoding a token reads: all but the input embedding, unless the head is that table.
        read = numbers - (0 if model.get_output_embeddings().weight is table else table.numel())
        read_bytes, numbers = read * table.element_size(), numbers - table.numel()
        model.save_pretrained(f"{folder}/model")
        load_tokenizer("tiny").save_pretrained(f"{folder}/model")
        del model, table
        flags = ["--preset", preset, "--model", f"{folder}/model", "--data", "tiny:train", "--eval_data", ""]
        flags += ["--num_steps", "2", "--device", str(device), "--output_dir", f"{folder}/run"]
        flags += ["--max_new_tokens", "16", "--batch_size", "4"] if small else []
        with mock.patch.object(sys, "argv", ["train.py", *flags]):
            train.main()
        config = json.loads(Path(folder, "run/config.json").read_text())["config"]
        row = json.loads(Path(folder, "run/metrics.jsonl").read_text().splitlines()[-1])
    B, tokens = config["batch_size"], config["batch_size"] * row["mean_length"]
    note = f"{B} rollouts, {row['mean_length']:.0f} tokens on average, random weights"
    for part in ("sampling", "grading", "teacher", "student", "update"):
        add_row(f"{preset}, {part}", row[f"seconds_{part}"], None, "s", note)
    speed, floor = tokens / row["seconds_sampling"], B * bandwidth / read_bytes
    add_row(f"{preset}, decoding", speed, floor, "tokens/s", "plain: reading the weights alone")
    # Per weight and token: teacher 2, student 2, its recomputation 2, backward through frozen weights 2.
    scoring, passes = row["seconds_teacher"] + row["seconds_student"], 8 if config["gradient_checkpointing"] else 6
    add_row(f"{preset}, scoring", scoring, passes * numbers * tokens / rate, "s", "plain: responses at the matrix rate")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / GIB
        add_row(f"{preset}, peak of the memory", peak, None, "GiB", f"{config['micro_batch_size']} rows a micro-batch")


def kill(device: torch.device, small: bool) -> None:
    """The embedded model: SIGKILL after the second checkpoint, resumed, beside an unbroken run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--preset", "tiny", "--num_steps", "4", "--save_steps", "1"]
        command += ["--batch_size", "4", "--eval_data", "", "--device", str(device), "--output_dir"]
        subprocess.run([*command, f"{folder}/whole"], check=True, cwd=ROOT)
        process = subprocess.Popen([*command, f"{folder}/killed"], cwd=ROOT)
        while process.poll() is None and not Path(folder, "killed", "checkpoint-2").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run([*command, f"{folder}/killed", "--resume"], check=True, cwd=ROOT)
        lines = [Path(folder, name, "metrics.jsonl").read_text().splitlines() for name in ("killed", "whole")]
    apart = max(abs(json.loads(a)["loss"] - json.loads(b)["loss"]) for a, b in zip(*lines, strict=True))
    add_row("killed and resumed: losses differ by", apart, None, "nats", "embedded model, 4 steps")


# ---------------------------------------------------------------------------------------------------------------
# The script


def run_part(name: str, args: argparse.Namespace) -> list[str]:
    """The rows that a part has printed in its own process, and one that says how it ended where it failed."""
    log, limit = args.output_dir / f"{name}.log", int(SECONDS[name] * args.patience)
    command = [sys.executable, "-m", "experiments.first_gpu_hour", "--run", name, "--device", args.device]
    command += ["--small"] if args.small else []
    with log.open("w") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit, stdout=file, stderr=file, check=False)
            trouble = f"ended with status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            trouble = f"not done after {limit} s"
    lines = log.read_text(errors="replace").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    words = f"{lines[-1][:300]} ".replace("|", "/") if lines else ""
    return rows + ([f"| {name}: FAILED | - | - | - | | {trouble}: {words}({log}) |"] if trouble else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=[*SECONDS])
    parser.add_argument("--patience", type=float, default=1.0, help="factor on every part's time limit")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "first-gpu-hour")
    parser.add_argument("--run", choices=SECONDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = pick_device(args.device)
    parts = {"environment": environment, "loss": loss, "rates": rates, "kill": kill}
    if args.run in parts:
        parts[args.run](device, args.small)
    elif args.run:
        steps(args.run, device, args.small)
    else:
        path = make_folder(args.output_dir) / "first-gpu-hour.md"
        for number, name in enumerate([None, *args.parts]):
            lines = run_part(name, args) if name else [facts(path.stem, device), HEAD]
            print("\n".join(lines), flush=True)
            with path.open("a" if number else "w") as file:
                file.write("\n".join(lines) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
