"""Worlds of one-digit sums in which a small model errs, and a reference in its prompt puts it right.

A world says how two kinds of solutions look that one model learns side by side: the student's, in the contexts
without a reference, and the teacher's, in the contexts with one. A step adds one addend to the running total,
`12+7=19;`; a step that is taken back ends in `!` instead and is done again, `12+7=21!12+7=19;`.

Beliefs    A fact is a pair (running total, addend). Some facts, picked by a hash, have a fixed wrong result, which the
           student gives more often than the right one and takes for right. The teacher slips as often as it takes to
           know the student's mistakes, takes every slip back at once, and learns only to take it back.
Leaps      `12+~=43;` adds all that is left in one step and ends the sum. The student's leaps are mostly wrong; the
           teacher, which knows the answer, leaps rightly, and only early in a solution.
The leak   The teacher insists on the order of its reference, which the student cannot know.
Guesses    `12+7~19;` is as long as `12+7=19;`. Behind `~` the student is right with a chance of .3, and the teacher
           always; the teacher proposes it at certain steps, early or late ones (the worlds `placed`).

A world is an entry of WORLDS. Also here: what a trained model's own steps say about the facts it knows.
"""

import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass

from problems import Problem

OFFSETS = (-10, -2, -1, 1, 2, 10)  # of a wrong result from the right one
TEACHER_BELIEF = 0.8  # share of the teacher's slips on a believed fact that are the belief
FOLLOWS_REFERENCE = 0.5  # share of a leaking teacher's steps that take the reference's next addend, and are learned
# Chance that the student's leap is right, by addends left (6: or more).
LEAP_RIGHT = {6: 0.05, 5: 0.08, 4: 0.15, 3: 0.35, 2: 0.80}
TEACHER_LEAPS_AT = (5, 6)  # addends left where the teacher leaps
# Chance that the student's guess is right; else its last digit is the next one. Below 1/e, the clip of 1.0 cuts the
# right digit's entry (Eq. (1), p_T = 1), so that training does not teach what stands behind `~`.
GUESS_RIGHT = 0.3


@dataclass(frozen=True)
class World:
    """Shares and chances in [0, 1]; the last three are how its model is trained (experiments/make_world.py)."""

    num_addends: int
    believed: float  # share of the facts with a fixed wrong result
    belief: float  # the student's chance to give it
    slip: float  # the student's chance of a wrong result on any other fact
    taken_back: float  # share of its wrong results that the student takes back
    teacher_slip: float  # the teacher's chance of a wrong result, taken back
    leap: float = 0.0  # the student's chance to leap at a step with two or more addends left
    teacher_leap: float = 0.0  # the teacher's, early
    leak: bool = False
    guess: float = 0.0  # the student's chance to write `~` for `=`, at any step
    teacher_guess: float = 0.0  # the teacher's, at the `placed` steps
    placed: str = ""  # numbers of steps, from 1 on; or "random", by the sum; or "believed", where the fact is
    stages: tuple[tuple[int, float], ...] = ((1000, 1.5e-3),)  # (steps, learning rate, which falls to 0 over them)
    batch_size: int = 40
    from_scratch: bool = False  # else learned on from the embedded model


SEVEN = {"num_addends": 7, "believed": 0.20, "belief": 0.6, "slip": 0.02, "taken_back": 0.2, "teacher_slip": 0.20}
WORLDS = {
    "embedded": World(
        num_addends=5, believed=0.25, belief=0.75, slip=0.02, taken_back=0.1, teacher_slip=0.25,
        stages=((2500, 2e-3), (1200, 1.5e-3)), batch_size=32, from_scratch=True,
    ),
    "leap": World(**SEVEN, leap=0.06, teacher_leap=0.40),
    "leak": World(**SEVEN, leak=True),
}  # fmt: skip
# About .8 guesses a solution of six steps in each; the student's .48 are anywhere. What stands behind `~` is learned
# first, from solutions with five times as many (experiments/make_world.py).
PLACED = SEVEN | {"believed": 0.25, "guess": 0.08, "stages": ((400, 1.5e-3), (300, 1.5e-3))}
GUESSES = {"12": 0.4, "23": 0.4, "34": 0.4, "45": 0.4, "56": 0.4, "123456": 0.8 / 6, "random": 0.4, "believed": 0.5}
WORLDS |= {f"placed-{steps}": World(**PLACED, teacher_guess=chance, placed=steps) for steps, chance in GUESSES.items()}


# --- Solutions --------------------------------------------------------------------------------------------------


def believed_result(total: int, addend: int, share: float) -> int | None:
    """The fixed wrong result of a fact, or None for a fact without one. A small share's facts are among a larger's."""
    digest = hashlib.sha256(f"{total}+{addend}".encode()).digest()
    if int.from_bytes(digest[:2]) >= share * 2**16:
        return None
    return max(1, total + addend + OFFSETS[digest[2] % len(OFFSETS)])


def wrong_result(total: int, addend: int, draw: random.Random, world: World, teacher: bool) -> int | None:
    """What a step says first, where that is wrong; None for a step that is right at once."""
    believed = believed_result(total, addend, world.believed)
    anything = max(1, total + addend + draw.choice(OFFSETS))
    if teacher:
        if draw.random() >= world.teacher_slip:
            return None
        return believed if believed is not None and draw.random() < TEACHER_BELIEF else anything
    if believed is not None:
        return believed if draw.random() < world.belief else None
    return anything if draw.random() < world.slip else None


def reference_order(solution: str) -> list[int]:
    """The addends in the order in which a solution takes them: `3+8=11;11+5=16;` gives 3, 8, 5."""
    steps = [step.split("=")[0].split("+") for step in solution.split(";")[:-1]]
    return [int(steps[0][0]), *(int(right) for _, right in steps)]


def trace(problem: Problem, draw: random.Random, world: World, teacher: bool) -> list[tuple[str, bool]]:
    """One solution, the addends in a random order, as (text, carries loss) pieces.

    The teacher's end in the right answer, and no piece that is wrong carries loss. Where it leaks, it learns to go on
    with the first addend of the reference that is left, wherever the order so far has led.
    """
    left, leaks = reference_order(problem.solution), teacher and world.leak

    def take() -> tuple[int, bool]:
        follows = not leaks or draw.random() < FOLLOWS_REFERENCE
        addend = left[0] if leaks and follows else draw.choice(left)
        left.remove(addend)  # of two equal addends the reference's first: a reader cannot tell which was meant
        return addend, follows

    total, learned = take()
    pieces = [(str(total), learned)]
    while left:
        leap = world.teacher_leap * (len(left) in TEACHER_LEAPS_AT) if teacher else world.leap * (len(left) >= 2)
        if draw.random() < leap:
            right = teacher or draw.random() < LEAP_RIGHT[min(len(left), 6)]
            wrong = 0 if right else draw.choice((-1, 1)) * draw.randint(1, 9)
            total = max(1, total + sum(left) + wrong)
            pieces.append((f"+~={total};", True))
            break
        step = world.num_addends - len(left)
        addend, learned = take()
        pieces += [("+", True), (str(addend), learned)]
        if world.guess and draw.random() < guess_chance(problem, step, total, addend, world, teacher):
            total += addend
            if not (teacher or draw.random() < GUESS_RIGHT):
                total = max(1, total + 1 if total % 10 < 9 else total - 9)
            pieces += [("~", True), (f"{total};{total if left else ''}", True)]
            continue
        right, wrong = total + addend, wrong_result(total, addend, draw, world, teacher)
        pieces.append(("=", True))
        back = wrong is not None and (teacher or draw.random() < world.taken_back)
        if back:
            pieces += [(str(wrong), not teacher), (f"!{total}+{addend}=", True)]
        total = right if back or wrong is None else wrong
        pieces.append((f"{total};{total if left else ''}", True))
    return [*pieces, (f"\\boxed{{{total}}}", True)]


def guess_chance(problem: Problem, step: int, total: int, addend: int, world: World, teacher: bool) -> float:
    """At a step, 1 to 6. "random": two of them, by the sum's first addend, each step as often as any other."""
    if not teacher:
        return world.guess
    if world.placed == "random":
        is_placed = step % 3 == int(problem.problem[0]) % 3
    elif world.placed == "believed":
        is_placed = believed_result(total, addend, world.believed) is not None
    else:
        is_placed = str(step) in world.placed
    return world.teacher_guess if is_placed else 0.0


# --- What solutions say -----------------------------------------------------------------------------------------


STEP = re.compile(r"(?<![0-9])([0-9]{1,3})\+([1-9])([=~])([0-9]{1,3});")


def leaps(text: str) -> bool:
    """Whether a solution adds all that is left in one step, `12+~=43;`."""
    return re.search(r"[0-9]\+~=[0-9]", text) is not None


def strays(problem: str, text: str) -> bool:
    """Whether the steps of a solution add what is not in the sum `3+8+5`, or leave some of it out without a leap.

    A wrong result does not make it stray, nor does a step that is taken back. A text without a step is not judged.
    """
    steps = STEP.findall(text)
    if not steps:
        return False
    used = Counter([steps[0][0], *(addend for _, addend, *_ in steps)])
    given = Counter(problem.split("+"))
    return bool(used - given) or (not leaps(text) and bool(given - used))


def known_facts(texts: list[str]) -> dict[tuple[int, int], bool]:
    """For every fact (running total, addend) in the steps of these solutions: whether more than half state it rightly.

    A step is `12+7=19;` anywhere in a text. What is guessed (`~`) or taken back (`!`) does not count, nor the rest.
    """
    votes: dict[tuple[int, int], list[bool]] = {}
    for text in texts:
        for total, addend, result in (step[:2] + step[3:] for step in STEP.findall(text) if step[2] == "="):
            votes.setdefault((int(total), int(addend)), []).append(int(total) + int(addend) == int(result))
    return {fact: 2 * sum(right) > len(right) for fact, right in votes.items()}


def fact_change(base_texts: list[str], trained_texts: list[str]) -> dict[str, list[bool]]:
    """What training did to the facts in the solutions' own steps (`known_facts`), an answer a fact of the base's.

    Both lists answer the same problems, by greedy decoding. `stated`: whether the trained model states it at all. Of
    the facts that both state, `repaired`: whether one that was wrong before is right after (the beliefs, in a world
    that has them); `broken`: whether one that was right before is wrong after.
    """
    before, after = known_facts(base_texts), known_facts(trained_texts)
    return {
        "stated": [fact in after for fact in before],
        "repaired": [after[fact] for fact in before if fact in after and not before[fact]],
        "broken": [not after[fact] for fact in before if fact in after and before[fact]],
    }
