"""Worlds in which position should matter: longer sums whose errors, or whose teacher's whims, have a place.

    python -m experiments.harder_worlds --world leak         writes runs/worlds/leak: a model, problems, and a grid
    python -m experiments.study --grid runs/worlds/leak/grid.json --output_dir runs/study-leak

Each world is the embedded one with seven addends, learned on from the embedded model.

leak    The teacher insists on the order of its reference solution, which the student cannot know: the information term
        I(Y; Z | h) of Eq. (4). It shrinks as addends run out, so early teacher tokens say little about right and wrong.
        This is the paper's case for raising the weight with the position.
early   The student slips on its first two steps, and hardly ever later.
late    The student slips on its last two steps, and hardly ever before.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import get_cosine_schedule_with_warmup

from model import load_model, load_tokenizer
from problems import InputError, Problem, tiny_solution, tiny_split
from teacher import EVALUATION_PROMPT, STUDENT_PROMPT, TEACHER_PROMPT, encode_prompt

ADDENDS, STEPS = 7, 6
IGNORED = -100
RETRACTED = 0.3  # share of its slips that the student takes back, as in the embedded world
TEACHER_SLIP = 0.25
BATCH = 32


@dataclass(frozen=True)
class World:
    slip: Callable[[int], float]  # the student's chance of a slip at step 0..STEPS-1
    leak: bool = False


WORLDS = {
    "leak": World(lambda step: 0.10, leak=True),
    "early": World(lambda step: 0.35 if step < 2 else 0.01),
    "late": World(lambda step: 0.35 if step >= STEPS - 2 else 0.01),
}
GRID_ROWS = {
    "OPSD": {"method": "opsd"},
    "uniform, per sequence": {"method": "pwopsd", "schedule": "uniform"},
    "PW-OPSD Moderate": {"method": "pwopsd"},
    "reversed Moderate": {"method": "pwopsd", "schedule": "reversed"},
    "OPSD, no clip": {"method": "opsd", "clip": "inf"},
    "Moderate, no clip": {"method": "pwopsd", "clip": "inf"},
    "reversed, no clip": {"method": "pwopsd", "schedule": "reversed", "clip": "inf"},
}
CONTRASTS = [
    ("PW-OPSD Moderate", "reversed Moderate"),
    ("PW-OPSD Moderate", "uniform, per sequence"),
    ("reversed Moderate", "uniform, per sequence"),
    ("Moderate, no clip", "reversed, no clip"),
    ("Moderate, no clip", "OPSD, no clip"),
    ("reversed, no clip", "OPSD, no clip"),
]


def make_problems(split: str, count: int, seed: int) -> list[Problem]:
    """Distinct sums with their solution; a held-out sum occurs in training in no order."""
    draw = random.Random(f"{split}-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        addends = [draw.randint(1, 9) for _ in range(ADDENDS)]
        if tiny_split(addends) == split:
            text = "+".join(map(str, addends))
            problems.setdefault(text, Problem(text, tiny_solution(addends, draw), str(sum(addends))))
    return list(problems.values())


def reference_order(solution: str) -> list[int]:
    """The addends in the order in which a solution takes them: `3+8=11;11+5=16;` gives 3, 8, 5."""
    steps = [step.split("=")[0].split("+") for step in solution.split(";")[:-1]]
    return [int(steps[0][0]), *(int(right) for _, right in steps)]


def trace(problem: Problem, draw: random.Random, world: World, teacher: bool) -> list[tuple[str, bool]]:
    """One solution as (text, carries loss) pieces.

    The teacher takes all slips back and never learns to slip. In a world with a leak it learns to go on with the first
    addend of the reference that is left, from wherever the student's order has led.
    """
    left, leaks = reference_order(problem.solution), teacher and world.leak

    def take() -> tuple[int, bool]:
        follows = not leaks or draw.random() < 0.5
        addend = left[0] if leaks and follows else draw.choice(left)
        left.remove(addend)  # of two equal addends the reference's first: a reader cannot tell which was meant
        return addend, follows

    total, learned = take()
    pieces = [(str(total), learned)]
    for step in range(STEPS):
        addend, learned = take()
        right = total + addend
        pieces += [("+", True), (str(addend), learned), ("=", True)]
        if draw.random() < (TEACHER_SLIP if teacher else world.slip(step)):
            wrong = max(1, right + draw.choice((-10, -2, -1, 1, 2, 10)))
            taken_back = teacher or draw.random() < RETRACTED
            pieces += [(str(wrong), not teacher), ("!" if taken_back else ";", True)]
            if taken_back:
                pieces.append((f"{total}+{addend}={right};", True))
            total = right if taken_back else wrong
        else:
            pieces.append((f"{right};", True))
            total = right
        if step < STEPS - 1:
            pieces.append((str(total), True))
    return [*pieces, (f"\\boxed{{{total}}}", True)]


def example(tokenizer, problem: Problem, draw: random.Random, world: World) -> tuple[list[int], list[int]]:
    """Token ids and labels of one sequence, half of them in the teacher's context."""
    template, teacher = draw.choice(
        [(STUDENT_PROMPT, False), (EVALUATION_PROMPT, False), *[(TEACHER_PROMPT, True)] * 2]
    )
    ids = encode_prompt(tokenizer, template, problem, enable_thinking=template != STUDENT_PROMPT)
    labels = [IGNORED] * len(ids)
    for text, carries_loss in [*trace(problem, draw, world, teacher), (tokenizer.eos_token, True)]:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if carries_loss else [IGNORED] * len(piece)
    return ids, labels


def train(world: World, steps: int, output: Path) -> None:
    """Go on from the embedded model until it knows the world, and save it."""
    torch.manual_seed(0)
    draw = random.Random(0)
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    problems = make_problems("train", 5000, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, steps)
    start = time.time()
    for step in range(steps):
        rows = [example(tokenizer, draw.choice(problems), draw, world) for _ in range(BATCH)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def write_world(name: str, steps: int, output: Path) -> Path:
    """A model, train.jsonl, heldout.jsonl, and the grid that uses them; returns the grid's path."""
    output.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 2000), ("heldout", 400)):
        lines = [json.dumps(asdict(problem)) + "\n" for problem in make_problems(split, count, seed=0)]
        (output / f"{split}.jsonl").write_text("".join(lines))
    train(WORLDS[name], steps, output / "model")
    common = {
        "preset": "tiny", "model": str(output / "model"), "data": str(output / "train.jsonl"),
        "eval_data": str(output / "heldout.jsonl"), "num_steps": 20, "eval_samples": 2, "max_new_tokens": 128,
    }  # fmt: skip
    grid = {"common": common, "seeds": [0, 1, 2, 3, 4, 5], "rows": GRID_ROWS, "contrasts": CONTRASTS}
    (output / "grid.json").write_text(json.dumps(grid, indent=2) + "\n")
    return output / "grid.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True, choices=WORLDS)
    parser.add_argument("--steps", type=int, default=500, help=f"supervised steps of {BATCH} solutions")
    parser.add_argument("--output_dir", type=Path, help="default: runs/worlds/WORLD")
    args = parser.parse_args()
    print(f"wrote {write_world(args.world, args.steps, args.output_dir or Path('runs/worlds') / args.world)}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
