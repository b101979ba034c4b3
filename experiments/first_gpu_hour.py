"""What to run in the first hour on a new GPU: every part bounded in time, one table, nothing stops the rest.

    python -m experiments.first_gpu_hour                   a GPU, about an hour
    python -m experiments.first_gpu_hour --device cpu      the same parts at small shapes, for a look at the script

A part is a preset: two steps of `train.py` at its shape: seconds by part, sampling beside what reading the weights
would allow, scoring beside the matrix rate, peak of the memory.

Each part is a process of its own, and what it prints is kept beside the table: one that hangs or dies is a row. The
weights are random: hardly a response ends before the limit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, Qwen3Config

import train
from experiments.study.run import processor
from runtime.flags import run_script
from runtime.loading import load_tokenizer
from runtime.ranks import pick_device
from runtime.records import git_commit, make_folder, versions

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
HEAD = "| what | ours | plain | plain / ours | unit | note |\n" + "|---" * 6 + "|"
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
SECONDS = dict.fromkeys(SHAPES, 800)  # limits


def add_row(what: str, ours: float | None, plain: float | None = None, unit: str = "", note: str = "") -> None:
    """Print a row of the table, at once."""
    ratio = plain / ours if ours and plain is not None else None
    numbers = ("-" if value is None else f"{value:.4g}" for value in (ours, plain, ratio))
    print(f"| {' | '.join([what, *numbers, unit, note])} |", flush=True)


# --- The parts, each in its own process; they print rows --------------------------------------------------------


def rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), multiply-adds times two a second of a matrix product."""
    on_gpu = device.type == "cuda"
    size, side, dtype = (2**30, 8192, torch.bfloat16) if on_gpu else (2**20, 128, torch.float32)
    a, x = torch.empty(size, dtype=torch.uint8, device=device), torch.randn(side, side, device=device, dtype=dtype)
    given = {"globals": {"a": a, "b": a.clone(), "x": x}, "num_threads": torch.get_num_threads()}
    copying, product = (Timer(code, **given).timeit(20).mean for code in ("a.copy_(b)", "x @ x"))
    add_row("copy bandwidth", 2 * size / copying / 1e12, None, "TB/s")
    add_row("matrix rate", 2 * side**3 / product / 1e12, None, "TFLOP/s")
    return 2 * size / copying, 2 * side**3 / product


def steps(preset: str, device: torch.device) -> None:
    """Two steps of train.py on a random checkpoint of the preset's shape; the second one is told."""
    on_gpu, (bandwidth, rate) = device.type == "cuda", rates(device)
    with tempfile.TemporaryDirectory() as folder:
        config = SHAPES[preset](**({} if on_gpu else SMALL))
        with torch.device(device):
            dtype = torch.bfloat16 if on_gpu else torch.float32
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
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
        flags += ["--max_new_tokens", "16", "--batch_size", "4"] if not on_gpu else []
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
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device) / GIB
        add_row(f"{preset}, peak of the memory", peak, None, "GiB", f"{config['micro_batch_size']} rows a micro-batch")


# --- The script -------------------------------------------------------------------------------------------------


def run_part(name: str, device: torch.device, output_dir: Path) -> list[str]:
    """The rows that a part has printed in its own process, and one that says how it ended where it failed."""
    log, limit = output_dir / f"{name}.log", SECONDS[name]
    command = [sys.executable, "-m", "experiments.first_gpu_hour", "--run", name, "--device", str(device)]
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


def facts(device: torch.device) -> str:
    """What the numbers were measured on."""
    hardware = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        hardware = f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}"
    found = {"hardware": hardware, **versions(), "commit": git_commit(), "load": f"{os.getloadavg()[0]:.1f}"}
    return "\n".join(["# The first hour", "", *(f"- {name}: {value}" for name, value in found.items()), "", HEAD])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=[*SECONDS])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "first-gpu-hour")
    parser.add_argument("--run", choices=SECONDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.run:
        return steps(args.run, device)
    path = make_folder(args.output_dir) / "first-gpu-hour.md"
    with path.open("w") as file:
        for lines in ([facts(device)], *(run_part(name, device, args.output_dir) for name in args.parts)):
            print("\n".join(lines), flush=True)
            print("\n".join(lines), file=file, flush=True)
    return print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
