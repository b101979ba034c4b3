"""Problems: what the method is trained and evaluated on, and where they come from.

A problem comes from a JSONL file, from the Hugging Face hub (optional package `datasets`), or from the embedded
world: sums of one-digit numbers, solved step by step in any order, so that the model that ships with the project
has something to learn without a download.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from errors import InputError
from grading import extract_boxed


@dataclass(frozen=True)
class Problem:
    """One problem. `solution` is the reference that only the teacher sees; `answer` is what grading compares with."""

    problem: str
    solution: str
    answer: str


# ---------------------------------------------------------------------------------------------------------------
# Loading


# The benchmarks of the paper (Section 4.1) by short name; fields `problem` and `answer`.
BENCHMARKS = {
    "math500": "HuggingFaceH4/MATH-500:test",
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "yentinglin/aime_2025:train",
    "hmmt25": "MathArena/hmmt_feb_2025:train",
    "tiny": "tiny:heldout",
}


def load_problems(source: str, need_solution: bool = True) -> list[Problem]:
    """Read problems from a name in BENCHMARKS, `tiny:train`, `tiny:heldout`, a `.jsonl` path, or `owner/name[:split]`.

    Raises InputError, with file and line, for a missing file, a malformed line or an empty field.
    """
    source = BENCHMARKS.get(source, source)
    if source in ("tiny:train", "tiny:heldout"):
        return tiny_problems(source.removeprefix("tiny:"), count=2000 if source == "tiny:train" else 400)
    if Path(source).is_file() or source.endswith((".jsonl", ".json")):
        rows = _read_jsonl(Path(source))
    else:
        rows = _read_hub(source)
    problems = [_to_problem(row, where, need_solution) for where, row in rows]
    if not problems:
        raise InputError(f"{source}: no problems in it")
    return problems


def _read_jsonl(path: Path) -> list[tuple[str, dict]]:
    if not path.is_file():
        raise InputError(f"{path}: no such data file")
    rows, number = [], 0
    with path.open(encoding="utf-8-sig") as lines:  # with or without a byte order mark
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    # A number keeps its spelling: 0.50 stays 0.50, and one of thousands of digits is text like any.
                    row = json.loads(line, parse_int=str, parse_float=str, parse_constant=_no_number)
                    rows.append((f"{path}, line {number}", row))
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({getattr(error, 'msg', error)})") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 text") from None
    return rows


def _no_number(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no number", "", 0)


def _read_hub(source: str) -> list[tuple[str, dict]]:
    name, _, split = source.partition(":")
    if name.count("/") != 1:
        raise InputError(f"{source}: neither a data file, nor one of {', '.join(BENCHMARKS)}, nor 'owner/name:split'")
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{source}: reading from the hub needs `pip install datasets`; "
            "or pass a file (--data or --benchmark path.jsonl)"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub's errors have no common base class
        raise InputError(
            f"{source}: the hub gave no data ({type(error).__name__}); "
            "pass a file instead (--data or --benchmark path.jsonl)"
        ) from None
    return [(f"{source}, row {number}", row) for number, row in enumerate(rows)]


SURROGATE = re.compile("[\ud800-\udfff]")


def _to_problem(row: object, where: str, need_solution: bool) -> Problem:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with problem, solution, answer")
    fields = {}
    for name in ("problem", "solution", "answer"):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
            raise InputError(
                f"{where}: the {name} is neither text nor a number, but {json.dumps(value, default=str)[:60]}"
            )
        fields[name] = "" if value is None else str(value)
        if SURROGATE.search(fields[name]):
            raise InputError(f"{where}: the {name} holds half of a surrogate pair, which is no text")
    if not fields["problem"].strip():
        raise InputError(f"{where}: the problem is empty or missing")
    if need_solution and not fields["solution"].strip():
        raise InputError(f"{where}: the solution is empty or missing")
    if not fields["answer"].strip():
        fields["answer"] = extract_boxed(fields["solution"]) or ""
    if not need_solution and not fields["answer"].strip():
        raise InputError(f"{where}: the answer is empty or missing")
    return Problem(**fields)


# ---------------------------------------------------------------------------------------------------------------
# The embedded world


TINY_ADDENDS = 5
HELDOUT_TENTHS = 2  # two tenths of all multisets of addends are held out


def tiny_problems(split: str, count: int, seed: int = 0, num_addends: int = TINY_ADDENDS) -> list[Problem]:
    """`count` distinct sums of one-digit numbers, from the `train` or the `heldout` split.

    The split is a hash of the sorted addends, so no held-out sum occurs in training in any order.
    """
    draw = random.Random(f"{split}-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        addends = [draw.randint(1, 9) for _ in range(num_addends)]
        if tiny_split(addends) == split:
            text = "+".join(map(str, addends))
            problems.setdefault(text, Problem(text, tiny_solution(addends, draw), str(sum(addends))))
    return list(problems.values())


def tiny_split(addends: list[int]) -> str:
    digest = hashlib.sha256(repr(sorted(addends)).encode()).digest()
    return "heldout" if digest[0] % 10 < HELDOUT_TENTHS else "train"


def tiny_solution(addends: list[int], draw: random.Random) -> str:
    """A clean solution that adds in a random order: `3+8=11;11+5=16;...\\boxed{26}`."""
    left = draw.sample(addends, len(addends))
    total, steps = left[0], []
    for addend in left[1:]:
        steps.append(f"{total}+{addend}={total + addend};")
        total += addend
    return "".join(steps) + f"\\boxed{{{total}}}"
