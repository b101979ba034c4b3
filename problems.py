"""Problems: what the method is trained and evaluated on, and where they come from.

A problem comes from a file or a folder, from the Hugging Face hub, or from the embedded world: sums of one-digit
numbers, solved step by step in any order, so that the model that ships with the project has something to learn without
a download. JSON and CSV are read as they are written; Parquet and the hub need the optional package `datasets`.
"""

import csv
import hashlib
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

from errors import InputError, one_line
from grading import extract_boxed


@dataclass(frozen=True)
class Problem:
    """One problem. `solution` is the reference that only the teacher sees; `answer` is what grading compares with."""

    problem: str
    solution: str
    answer: str
    row: int = field(default=0, compare=False)  # its place in the data it comes from, counted from 0


# --- Loading ----------------------------------------------------------------------------------------------------

# The benchmarks of the paper (Section 4.1) by short name; their columns are the usual ones.
BENCHMARKS = {
    "math500": "HuggingFaceH4/MATH-500:test",
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "yentinglin/aime_2025:train",
    "hmmt25": "MathArena/hmmt_feb_2025:train",
    "tiny": "tiny:heldout",
}
# The columns that a field is looked for in, upper or lower case, where --columns names none; the first one counts.
USUAL = {
    "problem": ("problem", "question", "prompt", "query", "messages", "conversations"),
    "solution": ("solution", "generated_solution", "rationale", "response", "completion"),
    "answer": ("answer", "final_answer", "expected_answer", "ground_truth"),
}
SPEAKERS = {"problem": ("user", "human"), "solution": ("assistant", "gpt"), "answer": ("assistant", "gpt")}
Rows = list[tuple[str, dict]]  # (where it stands, for errors; its columns)
HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # a surrogate alone, which is no text
NO_WORDS, WORD = re.compile(r"\\(?:boxed|text)\{[^{}]*\}|\\[a-zA-Z]+"), re.compile("[a-zA-Z]{3,}")
CALCULATOR = re.compile("<<[^<>]*>>")  # GSM8K: 48/2 = <<48/2=24>>24


def load_problems(source: str, need_solution: bool = True, columns: str | None = None) -> list[Problem]:
    """Read problems from a name in BENCHMARKS, `tiny:train`, `tiny:heldout`, a file, a folder, or the hub.

    A file: .jsonl, .json, .csv, .parquet. `FOLDER[:split]`: written by save_to_disk of `datasets`, or with such files,
    `train.jsonl` or `train-*.parquet`. The hub: `owner/name[:config][:split]`. `columns`, as `problem=question,
    answer=target`, names what is not a usual name; BENCHMARKS and the embedded world have the usual ones and ignore it.
    Raises InputError, with the line or row (counted from 0), for what is missing, malformed or empty.
    """
    if source in BENCHMARKS or source.startswith("tiny:"):
        source, columns = BENCHMARKS.get(source, source), None
    if source in ("tiny:train", "tiny:heldout"):
        return tiny_problems(source.removeprefix("tiny:"), count=2000 if source == "tiny:train" else 400)
    rows = _read(source)
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with problem, solution, answer")
    if not rows:
        raise InputError(f"{source}: no problems in it")
    named = _columns(source, list({name: None for _, row in rows for name in row}), columns)
    return [Problem(*_fields(row, where, named, need_solution), number) for number, (where, row) in enumerate(rows)]


def _read(source: str) -> Rows:
    """What exists or looks like a path is never asked for on the hub."""
    path, (name, _, split) = Path(source).expanduser(), source.rpartition(":")
    folder, split = (path, "") if path.exists() or not name else (Path(name).expanduser(), split)
    if folder.is_dir():
        return _read_folder(folder, split)
    if not (folder.exists() or {path.suffix, folder.suffix} & READERS.keys() or source.startswith((".", "/", "~"))):
        return _read_hub(source)
    if not path.is_file():
        raise InputError(f"{path}: no such data file")
    try:
        return READERS.get(path.suffix, _read_json)(path)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None


def _read_json(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    if text.lstrip().startswith("["):
        return [(f"{path}, row {number}", row) for number, row in enumerate(_parse(text, path, 1))]
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{path}, line {number}", _parse(line, path, number)) for number, line in lines if line.strip()]


def _parse(text: str, path: Path, line: int) -> object:
    """JSON in which a number keeps its spelling: 0.50 stays 0.50, and one of thousands of digits is text like any."""
    try:
        return json.loads(text, parse_int=str, parse_float=str)
    except (json.JSONDecodeError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise InputError(f"{path}, line {line}: not valid JSON ({getattr(error, 'msg', error)})") from None


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # a long solution is no mistake
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table, rows = csv.DictReader(lines, strict=True), []
        try:
            names = list(table.fieldnames or ())
            if twice := [name for usual in USUAL.values() for name in usual if names.count(name) > 1]:
                raise csv.Error(f"two columns {twice[0]}")
            for row in table:
                rows.append((f"{path}, line {table.line_num}", row))  # where the row ends
                if None in row or None in row.values():
                    raise csv.Error("more or fewer cells than columns")
        except csv.Error as error:
            raise InputError(f"{path}, line {table.reader.line_num}: not valid CSV ({error})") from None
    return rows


def _read_parquet(path: Path) -> Rows:
    """By pyarrow, which comes with datasets: the reader of datasets may serve an older cached copy."""
    return _read_datasets(path, lambda datasets: datasets.Dataset(import_module("pyarrow.parquet").read_table(path)))


READERS = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_folder(folder: Path, split: str) -> Rows:
    saved = folder if not split and (folder / "state.json").is_file() else folder / (split or "train")
    if (saved / "state.json").is_file():
        return _read_datasets(saved, lambda datasets: datasets.load_from_disk(str(saved)))
    files = [path for path in sorted(folder.glob(f"{split or 'train'}[.-]*")) if path.suffix in READERS]
    if len({path.suffix for path in files}) != 1:
        found = ", ".join(sorted(path.name for path in folder.iterdir()))[:200]
        raise InputError(f"{folder}: no split {split or 'train'} in one format, but {found} (FOLDER:split chooses)")
    return [row for path in files for row in _read(str(path))]


def _read_hub(source: str) -> Rows:
    name, *config, split = source.split(":") if ":" in source else (source, "train")
    if name.count("/") != 1 or len(config) > 1:
        others = f"nor one of {', '.join(BENCHMARKS)}, nor 'owner/name[:config]:split' on the hub"
        raise InputError(f"{source}: neither a data file or folder, {others}")
    return _read_datasets(source, lambda datasets: datasets.load_dataset(name, *config, split=split))


def _read_datasets(source: object, load: Callable) -> Rows:
    """The rows of the datasets.Dataset that `load` gives from the package.

    A label is only a number there, and where numbers and texts are mixed, texts lose their spelling ("007" is 7): in
    place of such a value stands its type, which is refused where it is used. A number of 16 or 32 bits has few
    digits: .1 is 0.1, not 0.10000000149011612.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source}: reading it needs `pip install datasets`; .jsonl, .json and .csv do not") from None
    try:
        data = load(datasets)
    except Exception as error:  # the hub's errors have no common base class
        raise InputError(f"{source}: cannot be read ({type(error).__name__}: {one_line(error)})") from None
    odd = {name: kind for name, kind in data.features.items() if isinstance(kind, (datasets.ClassLabel, datasets.Json))}
    short = {name: np.dtype(kind.dtype).type for name, kind in data.features.items()
             if isinstance(kind, datasets.Value) and kind.dtype in ("float16", "float32")}  # fmt: skip
    rows = (row | {name: _as_short(row[name], kind) for name, kind in short.items()} for row in data)
    return [(f"{source}, row {number}", row | odd) for number, row in enumerate(rows)]


def _as_short(value: float | None, kind: type) -> float | str | None:
    """A broken number in the few digits of its type; a whole one has all of its digits as it is."""
    return value if value is None or not math.isfinite(value) or value.is_integer() else str(kind(value))


def _columns(source: str, found: list[str], asked: str | None) -> dict[str, str | None]:
    """The column of each field: the one asked for, else the first usual one that is found and not asked for."""
    named = dict(pair.strip().partition("=")[::2] for pair in asked.split(",")) if asked else {}
    for name, column in named.items():
        if name not in USUAL:
            raise InputError(f"--columns {asked}: not of the form problem=...,solution=...,answer=...")
        if column not in found:
            raise InputError(f"--columns {name}={column}: {source} has the columns {', '.join(found)}")
    free = {column: column for column in found if column not in named.values()}
    free = {column.lower(): column for column in free} | free  # the very name first
    return {name: next((free[c] for c in usual if c in free), None) for name, usual in USUAL.items()} | named


def _fields(row: dict, where: str, columns: dict, need_solution: bool) -> tuple[str, str, str]:
    """Problem, solution and answer of a row. The two turns of a dialogue are a problem and its solution.

    An answer that is missing is the solution's last box, one that is a sentence with a box the box. GSM8K's `rationale
    #### 42` is a solution and its answer.
    """
    cells = {name: row.get(column) for name, column in columns.items()}
    if columns["solution"] is None and isinstance(cells["problem"], list):
        cells["solution"] = cells["problem"]
    problem, solution, answer = (_text(name, cell, where) for name, cell in cells.items())
    answer = answer if answer.strip() else extract_boxed(solution) or ""
    rationale, mark, final = (answer or solution).strip().rpartition("####")
    if mark and final and "\n" not in final:  # a heading has lines below it
        solution = solution if solution and answer else CALCULATOR.sub("", rationale).rstrip()
        answer = final.strip()
    if answer.count("\\boxed") == 1 and WORD.search(NO_WORDS.sub("", answer)):  # a sentence, which no answer matches
        answer = extract_boxed(answer) or answer
    for name, text in (("problem", problem), ("solution", solution) if need_solution else ("answer", answer)):
        if not text.strip():
            there = f"the columns are {', '.join(row)}; --columns {name}=... names another"
            raise InputError(f"{where}: the {name} is empty or missing ({there})")
    return problem, solution, answer


def _text(name: str, cell: object, where: str) -> str:
    """A cell's text; of a list of messages, {"role", "content"} or {"from", "value"}, the only turn of its speaker."""
    if isinstance(cell, list) and cell and all(isinstance(turn, dict) for turn in cell):
        said = [turn for turn in cell if turn.get("role", turn.get("from")) in SPEAKERS[name]]
        if len(said) < 2:
            cell = said[0].get("content", said[0].get("value")) if said else None
    number = isinstance(cell, (int, float)) and not isinstance(cell, bool) and math.isfinite(cell)
    if not (number or cell is None or (isinstance(cell, str) and not HALF_A_PAIR.search(cell))):
        shown = json.dumps(cell, default=str)[:60]
        raise InputError(f"{where}: the {name} is neither text nor a number nor one turn of a dialogue, but {shown}")
    return "" if cell is None else str(cell)


# --- The embedded world -----------------------------------------------------------------------------------------

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
            problems.setdefault(text, Problem(text, tiny_solution(addends, draw), str(sum(addends)), len(problems)))
    return list(problems.values())


def tiny_split(addends: list[int]) -> str:
    digest = hashlib.sha256(repr(sorted(addends)).encode()).digest()
    return "heldout" if digest[0] % 10 < HELDOUT_TENTHS else "train"


def tiny_solution(addends: list[int], draw: random.Random) -> str:
    """A clean solution that adds in a random order: `3+8=11;11+5=16;...\\boxed{26}`."""
    total, *left = draw.sample(addends, len(addends))
    steps = ""
    for addend in left:
        steps += f"{total}+{addend}={total + addend};"
        total += addend
    return steps + f"\\boxed{{{total}}}"
