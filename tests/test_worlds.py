"""The worlds: which facts are believed, what each side's solutions look like, and what a model's steps say."""

import math
import random
import re
from functools import cache
from itertools import pairwise

import pytest
from numpy import mean

from experiments.study import worlds
from experiments.study.worlds import WORLDS, believed_result, fact_change, known_facts, leaps, strays, trace
from grading import answers_match, extract_boxed
from problems import tiny_problems

NAMES = ["embedded", "leap", "leak", "placed-12"]
FACTS = [(total, addend) for total in range(1, 55) for addend in range(1, 10)]
TRY = re.compile(r"(\d+)\+(\d)=(\d+)([;!])")


@cache
def solutions(name: str, teacher: bool, count: int = 400):
    """(problem, pieces, text) of `count` solutions."""
    draw = random.Random(0)
    problems = count // 20 * tiny_problems("train", 20, num_addends=WORLDS[name].num_addends)
    traces = [trace(problem, draw, WORLDS[name], teacher) for problem in problems]
    return [(x, pieces, "".join(text for text, _ in pieces)) for x, pieces in zip(problems, traces, strict=True)]


def tries(name: str, teacher: bool, count: int = 400) -> list[tuple[int, int, int, str]]:
    """(total, addend, result, end) of every first try at a step."""
    found = []
    for *_, text in solutions(name, teacher, count):
        again = False
        for total, addend, result, end in TRY.findall(text):
            if not again:
                found.append((int(total), int(addend), int(result), end))
            again = end == "!"
    return found


def test_believed_facts_by_hand():
    """`printf 5+6 | sha256sum` begins 0d b2 d7: 0x0db2 < 0.25 * 2^16, and 0xd7 % 6 = 5 is the offset +10."""
    assert believed_result(5, 6, share=0.25) == 21
    assert believed_result(11, 4, share=0.25) == 25  # 02 94 6b
    assert believed_result(8, 4, share=0.25) == 10  # 1c 5c 6d
    assert believed_result(2, 4, share=0.25) == 1  # 32 4b 30: -10, but no result is below 1
    assert believed_result(3, 8, share=0.25) is None  # de 7a 59


def test_believed_facts_are_the_share_that_was_asked_for():
    believed = [believed_result(*fact, share=0.25) for fact in FACTS]
    assert 0.20 < sum(result is not None for result in believed) / len(FACTS) < 0.30
    assert all(result != sum(fact) for fact, result in zip(FACTS, believed, strict=True))
    assert all(believed_result(*fact, share=0.0) is None for fact in FACTS)
    assert all(believed_result(*fact, share=1.0) is not None for fact in FACTS)
    small = [believed_result(*fact, share=0.2) for fact in FACTS]  # whose beliefs are among the larger share's
    assert {few for few, many in zip(small, believed, strict=True) if few != many} == {None}


@pytest.mark.parametrize("name", NAMES)
def test_the_student_errs_where_it_believes(name):
    world = WORLDS[name]
    found = tries(name, teacher=False, count=1200)
    believed = [(t, a, r) for t, a, r, _ in found if believed_result(t, a, world.believed) is not None]
    gives = [r == believed_result(t, a, world.believed) for t, a, r in believed]
    others = [t + a != r for t, a, r, _ in found if believed_result(t, a, world.believed) is None]
    taken_back = [end == "!" for t, a, r, end in found if t + a != r]
    assert mean(gives) == pytest.approx(world.belief, abs=0.03)
    assert mean(others) == pytest.approx(world.slip, abs=0.01)
    assert mean(taken_back) == pytest.approx(world.taken_back, abs=0.03)
    assert all(end == ";" for t, a, r, end in found if t + a == r)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_is_right_and_never_learns_what_is_wrong(name):
    for problem, pieces, text in solutions(name, teacher=True):
        assert answers_match(extract_boxed(text), problem.answer)
        kept = [(int(t), int(a), int(r)) for t, a, r, end in TRY.findall(text) if end == ";"]
        assert all(t + a == r for t, a, r in kept)
        assert not any(learned for (_, learned), (following, _) in pairwise(pieces) if following.startswith("!"))
    slips = [t + a != r for t, a, r, _ in tries(name, teacher=True)]
    assert mean(slips) == pytest.approx(WORLDS[name].teacher_slip, abs=0.02)


def leap_places(teacher: bool) -> dict[int, list[bool]]:
    """By addends left: whether the solution leaps there."""
    places: dict[int, list[bool]] = {}
    for problem, _, text in solutions("leap", teacher, count=4000):
        steps = len([end for *_, end in TRY.findall(text) if end == ";"])
        addends = problem.problem.count("+")
        for left in range(addends, addends - steps, -1):
            places.setdefault(left, []).append(False)
        if leaps(text):
            places.setdefault(addends - steps, []).append(True)
    return places


def test_leaps_lie_where_the_world_says():
    teacher, student = leap_places(teacher=True), leap_places(teacher=False)
    for left in range(1, 7):
        expected = WORLDS["leap"].teacher_leap if left in worlds.TEACHER_LEAPS_AT else 0.0
        assert mean(teacher[left]) == pytest.approx(expected, abs=0.02)
        expected = WORLDS["leap"].leap if left >= 2 else 0.0
        assert mean(student[left]) == pytest.approx(expected, abs=0.01)


def test_the_students_early_leaps_are_mostly_wrong():
    early = [
        answers_match(extract_boxed(text), problem.answer)
        for problem, _, text in solutions("leap", teacher=False, count=4000)
        if re.match(r"\d\+~", text)  # before the first step, so that nothing else can be wrong
    ]
    assert len(early) > 150 and 0.02 < mean(early) < 0.09


def guesses(name: str, teacher: bool, count: int = 800) -> list[tuple[str, int, int, int, str, int]]:
    """(problem, step, total, addend, sign, result) of every step that is kept."""
    return [
        (problem.problem, step, int(total), int(addend), sign, int(result))
        for problem, _, text in solutions(name, teacher, count)
        for step, (total, addend, sign, result) in enumerate(re.findall(r"(\d+)\+(\d)([=~])(\d+);", text), start=1)
    ]


@pytest.mark.parametrize("name", [name for name in WORLDS if WORLDS[name].guess])
def test_guesses_lie_where_the_world_says(name):
    """About .8 of the teacher's a solution, all right, at the placed steps alone; of the student's .3 are right."""
    world, found = WORLDS[name], guesses(name, teacher=True)
    where = {
        "random": lambda problem, step, *_: step % 3 == int(problem[0]) % 3,
        "believed": lambda _, step, total, addend: believed_result(total, addend, world.believed) is not None,
    }.get(world.placed, lambda _, step, *__: str(step) in world.placed)
    assert all(where(*row[:4]) for row in found if row[4] == "~")
    guessed = [row[4] == "~" for row in found if where(*row[:4])]
    assert mean(guessed) == pytest.approx(world.teacher_guess, abs=0.03)
    assert sum(guessed) / 800 == pytest.approx(0.8, abs=0.15)
    assert all(total + addend == result for _, _, total, addend, _, result in found)


def test_the_students_guesses_are_anywhere_and_mostly_wrong():
    found = guesses("placed-12", teacher=False, count=1600)
    assert guesses("placed-12", teacher=False) == guesses("placed-56", teacher=False)
    for step in range(1, 7):
        signs = [row[4] for row in found if row[1] == step]
        assert signs.count("~") / len(signs) == pytest.approx(WORLDS["placed-12"].guess, abs=0.015)
    right = [total + addend == result for _, _, total, addend, sign, result in found if sign == "~"]
    assert mean(right) == pytest.approx(worlds.GUESS_RIGHT, abs=0.03)
    assert math.exp(-1) > worlds.GUESS_RIGHT  # where the clip of 1.0 cuts it
    for _, _, total, addend, sign, result in found:
        assert sign == "=" or len(str(total + addend)) == len(str(result))  # r does not move


def test_only_the_leaking_teacher_learns_the_order_of_its_reference():
    """Replay each solution: a choice that carries loss is the reference's first addend left; others are free."""
    assert worlds.reference_order("3+8=11;11+5=16;\\boxed{16}") == [3, 8, 5]
    free = 0
    for problem, pieces, _ in solutions("leak", teacher=True):
        left, before = worlds.reference_order(problem.solution), None
        for text, learned in pieces:
            if before in (None, "+"):
                assert int(text) == left[0] or not learned
                free += not learned
                left.remove(int(text))
            before = text
        assert left == []
    assert free > 100
    for name, teacher in (("leak", False), ("leap", True), ("embedded", True)):
        for _, pieces, _ in solutions(name, teacher, 100):
            choices = [pieces[0], *(after for piece, after in pairwise(pieces) if piece == ("+", True))]
            assert all(learned for _, learned in choices)


def test_leaps_and_strays_by_hand():
    for text in ("7+5=12;12+~=43;\\boxed{43}", "12+~=4"):
        assert leaps(text)
    for text in ("7+5=12;12+8=20;\\boxed{20}", "~ ~= +~= 7+~", ""):
        assert not leaps(text)
    for text in (
        "3+8=11;11+5=16;\\boxed{16}", "5+3=8;8+8=16;\\boxed{16}",  # in another order
        "3+8=12;12+5=17;", "3+8=12!3+8=11;11+5=16;",  # a wrong result, one that is taken back
        "3+8=11;11+5~19;", "3+8=11;11+~=16;", "16",  # a guess is a step; a leap takes the rest; a text without a step
    ):  # fmt: skip
        assert not strays("3+8+5", text), text
    for text in (
        "3+8=11;\\boxed{11}", "3+8=11;11+5=16;16+5=21;",  # leaves 5 out, takes it twice
        "3+8=11;11+7=18;",
        "3+7=10;10+~=16;", "4+8=12;12+5=17;", "3+8~11;11+7~18;",  # adds, or begins with, what is not there
    ):  # fmt: skip
        assert strays("3+8+5", text), text


def test_no_solution_of_a_world_strays():
    for name in WORLDS:
        for problem, _, text in solutions(name, False, 100):
            assert not strays(problem.problem, text)


def test_known_facts_by_hand():
    texts = [
        "3+8=11;11+5=18;\\boxed{18}",  # (3, 8) right, (11, 5) wrong
        "3+8=12!3+8=11;11+5=16;16+2=17;\\boxed{17}",  # a slip taken back does not count; (11, 5) right; (16, 2) wrong
        "11+5=16;16+4~21;",  # two of three: (11, 5) is right; a guess is no fact
    ]
    assert known_facts(texts) == {(3, 8): True, (11, 5): True, (16, 2): False}
    assert known_facts(["4+4=8;", "4+4=9;"]) == {(4, 4): False}  # half is not more than half
    garbage = ["", "\\boxed{", ";;+=;3+=5;+4=4;=;", "12+~=43;", "9999+1=2;", "3+12=15;", "²+3=5;", "1+1=2", "x7+2=9;~!"]
    assert known_facts(garbage) == {(7, 2): True}


def test_fact_change_by_hand():
    base = ["3+8=12;12+5=17;17+1=19;", "6+6=12;12+5=17;17+9=26;"]  # wrong: (3, 8), (17, 1)
    trained = ["3+8=11;12+5=16;17+1=19;", "6+6=12;4+4=9;"]  # (17, 9) and (4, 4) occur in one list only
    change = fact_change(base, trained)
    assert change == {"stated": [True, True, True, True, False], "repaired": [True, False], "broken": [True, False]}
    assert fact_change(["nothing"], base) == {"stated": [], "repaired": [], "broken": []}
