"""The harder worlds: where errors lie, what the teacher is taught, and what is written."""

import json
import random
import re

import pytest

from experiments import harder_worlds
from experiments.harder_worlds import ADDENDS, IGNORED, STEPS, WORLDS, example, make_problems, reference_order, trace
from experiments.study import read_grid
from model import load_tokenizer
from problems import answers_match, extract_boxed, load_problems
from train import parse_config

STEP = re.compile(r"(\d+)\+(\d)=(\d+)([;!])")


def solutions(name: str, teacher: bool, count: int = 300):
    draw = random.Random(0)
    problems = make_problems("train", 20, seed=0)
    return [(problem, trace(problem, draw, WORLDS[name], teacher)) for problem in problems for _ in range(count // 20)]


def slips_by_step(name: str) -> list[float]:
    """Share of solutions whose first try at each step is wrong."""
    wrong, count = [0] * STEPS, 0
    for _, pieces in solutions(name, teacher=False, count=2000):
        count += 1
        tries = STEP.findall("".join(text for text, _ in pieces))
        step, again = 0, False
        for left, right, given, end in tries:
            if not again:
                wrong[step] += int(left) + int(right) != int(given)
                step += 1
            again = end == "!"
        assert step == STEPS
    return [w / count for w in wrong]


def test_slips_lie_where_the_world_says():
    early, late, leak = (slips_by_step(name) for name in ("early", "late", "leak"))
    assert min(early[:2]) > 0.3 > 0.03 > max(early[2:])
    assert min(late[-2:]) > 0.3 > 0.03 > max(late[:-2])
    assert all(0.07 < share < 0.13 for share in leak)


@pytest.mark.parametrize("name", WORLDS)
def test_the_teacher_is_always_right_and_never_learns_a_slip(name):
    for problem, pieces in solutions(name, teacher=True):
        text = "".join(text for text, _ in pieces)
        assert answers_match(extract_boxed(text), problem.answer)
        for place, (piece, _) in enumerate(pieces):
            if piece == "!":
                assert pieces[place - 1][1] is False


def test_only_the_leaking_teacher_learns_the_order_of_its_reference():
    """Replay each solution: a choice that carries loss is the reference's first addend left; others are free."""
    free = 0
    for problem, pieces in solutions("leak", teacher=True, count=100):
        left, before = reference_order(problem.solution), None
        for text, learned in pieces:
            if before in (None, "+"):
                assert int(text) == left[0] or not learned
                free += not learned
                left.remove(int(text))
            before = text
        assert left == []
    assert free > 100
    assert all(pieces[0][1] for _, pieces in solutions("early", teacher=True, count=100))


def test_reference_order_by_hand():
    assert reference_order("3+8=11;11+5=16;\\boxed{16}") == [3, 8, 5]


def test_splits_share_no_sum():
    train, held_out = (
        {tuple(sorted(p.problem.split("+"))) for p in make_problems(s, 200, 0)} for s in ("train", "heldout")
    )
    assert not train & held_out
    assert all(len(addends) == ADDENDS for addends in train | held_out)


def test_labels_are_the_ids_or_ignored():
    tokenizer, draw = load_tokenizer("tiny"), random.Random(1)
    for problem in make_problems("train", 20, seed=0):
        ids, labels = example(tokenizer, problem, draw, WORLDS["leak"])
        assert len(ids) == len(labels)
        assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
        assert labels[-1] == tokenizer.eos_token_id
        assert labels[0] == IGNORED


def test_a_world_can_be_studied(tmp_path, monkeypatch):
    """What is written is a grid that the study reads and problems that the trainer reads."""
    monkeypatch.setattr(harder_worlds, "train", lambda world, steps, output: None)
    grid = read_grid(harder_worlds.write_world("leak", 0, tmp_path))
    for row in grid.rows:
        config = parse_config([f"--{name}={value}" for name, value in grid.options(row).items()])
        assert config.num_steps == 20
        assert config.lora_rank == 16
    assert len(load_problems(config.data)) == 2000
    assert len(load_problems(config.eval_data)) == 400
    assert json.loads((tmp_path / "grid.json").read_text())["rows"]
