"""Memory of a training step at the presets' real shapes, run whole on fake tensors, beside what the plan says.

    python -m experiments.fake_step                       all presets, contexts of 2,000 and 20,000 tokens, LoRA
    python -m experiments.fake_step --preset qwen3-4b --full       all weights trained, with each teacher

No weights and no GPU are needed. The tracked step has all blocks, all chunks of the loss and the optimizer's update;
the plan (runtime/memory.py) measures shallow models and extends them. Workspaces inside kernels and the allocator's
waste are in neither.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from runtime.fake_step import StepShape, block_kinds, fake_model, step_bytes
from runtime.memory import MemoryPlan, Planned, plan_memory
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, PreTrainedModel, Qwen3Config

import train
from loss import resolve_method
from model import add_lora
from runtime.flags import run_script
from teacher import Teacher

GIB = 2**30
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
STUDENT_PROMPT = 150  # tokens; the paper's data have a median of 93 and at most 826
PARTS = ("weights", "trained", "optimizer", "sampling", "teacher", "student", "update")


def empty_model(preset: str, lora_rank: int) -> PreTrainedModel:
    """A preset's model without content (on the meta device), in the dtype that training gives it."""
    with torch.device("meta"):
        dtype = torch.bfloat16 if lora_rank else torch.float32
        model = AutoModelForCausalLM.from_config(SHAPES[preset](), dtype=dtype, attn_implementation="sdpa")
        if lora_rank:
            add_lora(model, lora_rank, 2.0 * lora_rank)
    return model


def track(like: PreTrainedModel, its: Teacher, shape: StepShape, config: train.TrainConfig) -> MemoryPlan:
    """Bytes of one step, all of it run on fake tensors, in the plan's parts."""
    method = resolve_method(config.method, config)
    with fake_model(like, block_kinds(like), True) as (model, live):
        teacher = Teacher(model, its.kind)
        resident = live.now
        trained = sum(p.numel() * p.element_size() for p in teacher.trained)
        taken = step_bytes(model, teacher, shape, method, config, config.sampling, live)
        optimizer = train.make_optimizer(teacher.trained, config)
        for _ in range(2):  # the first update makes the moments
            base = live.now
            with live.part(taken, "update", base):
                torch.nn.utils.clip_grad_norm_(teacher.trained, config.max_grad_norm)
                optimizer.step()
            taken["update"] -= 2 * trained if base < live.now else 0
        state = live.now - resident
    return MemoryPlan(
        resident - trained, trained, state, max(taken.get("prefill", 0), taken.get("decode", 0)), taken["teacher"],
        taken["student"], max(0, taken["update"]), shape.micro_batch_size,
    )  # fmt: skip


def compare(preset: str, context: int, lora_rank: int, kind: str, rows_per_rank: int) -> dict:
    """Plan and tracker for one setting, in GiB by part."""
    config = replace(train.parse_config(["--preset", preset]), teacher=kind, lora_rank=lora_rank)
    shape = StepShape(STUDENT_PROMPT, context, config.max_new_tokens, rows_per_rank, config.micro_batch_size)
    like = empty_model(preset, lora_rank)
    teacher = Teacher(like, kind)
    planned = Planned(like, teacher, resolve_method(config.method, config), config, config.sampling, True)
    start = time.process_time()
    plan = plan_memory(planned, shape, rows_per_rank, None)
    plan_seconds = time.process_time() - start
    tracked = track(like, teacher, shape, config)
    row = {
        "preset": preset,
        "context": context,
        "what": f"LoRA {lora_rank}" if lora_rank else "all",
        "kind": kind,
    }
    row |= {"sequences": shape.micro_batch_size, "sampled together": rows_per_rank, "plan seconds": plan_seconds}
    for part in (*PARTS, "total"):
        row[part] = [getattr(plan, part) / GIB, getattr(tracked, part) / GIB]
    return row


def line(row: dict) -> str:
    cells = [f"{plan:.2f} / {tracked:.2f}" for plan, tracked in (row[part] for part in (*PARTS, "total"))]
    head = [row["preset"], f"{row['context']:,}", row["what"], row["kind"], str(row["sequences"])]
    return f"| {' | '.join([*head, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[*SHAPES], action="append")
    parser.add_argument("--context", type=int, action="append", help="tokens of the teacher's prompt")
    parser.add_argument("--full", action="store_true", help="all weights instead of LoRA, with each teacher")
    parser.add_argument("--rows", type=int, default=8, help="rollouts per rank: 32 prompts over four ranks")
    parser.add_argument("--output", type=Path, help="also append the rows to this JSONL file")
    args = parser.parse_args()
    names = ["preset", "context", "trained weights", "teacher", "sequences", *PARTS, "peak"]
    print(f"GiB, plan / tracked\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    for preset in args.preset or SHAPES:
        for context in args.context or (2_000, 20_000):
            for kind in ("fixed", "ema", "live") if args.full else ("fixed",):
                row = compare(preset, context, 0 if args.full else 64, kind, args.rows)
                print(line(row), flush=True)
                if args.output:
                    with args.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    run_script(main)
