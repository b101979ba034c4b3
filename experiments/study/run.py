"""The controlled study: which tokens to weight, how to clip, what to show the teacher; one thing changed at a time.

    python -m experiments.study.run                        what is missing of the embedded world's grid, then the report
    python -m experiments.study.run --grid leap            a world in which early teacher tokens mislead
    python -m experiments.study.run --grid mine.json       a grid of your own, {"common": {}, "seeds": [], "rows": {}}
    python -m experiments.study.run --report_only          the report again, from the cells measured so far

A cell is one run of train.py: one row's options and one seed. Rows share seeds, hence problems, their order and the
random numbers of sampling, so rows are compared in pairs. OUTPUT_DIR/cells.jsonl gets one line per finished cell and is
all that the report is made from; a cell that stands there is never run again. The rules of rules.py are registered as
a fork would register its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from errors import InputError
from experiments.study.grids import GRIDS, Grid
from experiments.study.report import BEFORE, DECODINGS, write_report
from problems import Problem, load_problems
from runtime.flags import run_script

if TYPE_CHECKING:
    from train import TrainConfig


def read_grid(path: Path) -> Grid:
    """A grid from JSON. Raises InputError for a missing file, unknown keys, or a baseline or contrast without a row."""
    try:
        grid = Grid(**{"common": {}, **json.loads(path.read_text())})
        rows = grid.rows.values() if isinstance(grid.rows, dict) else [None]
        if not all(isinstance(part, dict) for part in (grid.common, *rows)):
            raise ValueError("common, rows and each row are objects, of flags of train.py")
        if not isinstance(grid.seeds, list) or not all(isinstance(seed, int) for seed in grid.seeds):
            raise ValueError("seeds is a list of whole numbers")
        missing = {grid.baseline, *(name for pair in grid.contrasts for name in pair)} - {*grid.rows, BEFORE}
        if not all(len(pair) == 2 for pair in grid.contrasts):
            raise ValueError("contrasts are pairs of rows")
        if missing or not grid.seeds:
            raise ValueError(f"no row named {', '.join(sorted(missing))}" if missing else "no seeds")
        return grid
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"--grid {path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------
# One cell


@dataclass(frozen=True)
class Cell:
    row: str
    options: dict[str, object]
    seed: int
    model_id: str

    @property
    def key(self) -> str:
        """What makes a cell this cell; its row's name does not."""
        return json.dumps([self.options, self.seed, self.model_id], sort_keys=True)

    @property
    def folder(self) -> str:
        name = "".join(c if c.isalnum() else "-" for c in self.row.lower())
        return f"{name}-seed{self.seed}-{hashlib.sha256(self.key.encode()).hexdigest()[:8]}"


def model_id(name: str) -> str:
    """A hub model by its name, a local one by a digest of its weights: other weights make other cells."""
    from runtime.loading import find_checkpoint

    digest = hashlib.sha256()
    files = sorted(Path(find_checkpoint(name)).glob("*.safetensors"))
    for file in files:
        digest.update(file.read_bytes())
    return f"{name} {digest.hexdigest()[:12]}" if files else name


def flags(options: dict, seed: int) -> list[str]:
    return [f"--{name}={value}" for name, value in {**options, "seed": seed}.items()]


def config_of(options: dict, seed: int = 0) -> TrainConfig:
    """What train.py makes of a cell's flags. Raises InputError for what it refuses."""
    import experiments.study.rules  # noqa: F401  (registers its rows)
    from train import parse_config

    return parse_config(flags(options, seed))


def run_cell(cell: Cell, output: Path) -> dict:
    """Train a cell, or go on with it, and return its line of cells.jsonl. A loss that is not finite is a result too."""
    import experiments.study.rules  # noqa: F401  (registers its rows)
    import train

    run = output / "runs" / cell.folder
    run.mkdir(parents=True, exist_ok=True)
    started, error, argv, on_sigterm = time.time(), None, sys.argv, signal.getsignal(signal.SIGTERM)
    with run.with_suffix(".log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        sys.argv = ["train.py", *flags(cell.options, cell.seed), f"--output_dir={run}", "--resume=true"]
        try:
            train.main()
        except FloatingPointError as problem:
            error = str(problem)
        finally:
            sys.argv = argv
            signal.signal(signal.SIGTERM, on_sigterm)
    record = {**asdict(cell), **measured(run, error), "error": error, "seconds": round(time.time() - started, 1)}
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return record


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(run: Path, error: str | None) -> dict:
    """What a finished run's files say, short enough to be committed."""
    record = json.loads((run / "config.json").read_text())
    evaluation, last = json.loads((run / "evaluation.json").read_text()), str(record["config"]["num_steps"])
    if error is None and last not in evaluation:
        raise InputError(f"{run}: stopped before its end; the same command goes on with it")
    steps, held_out = read_lines(run / "metrics.jsonl"), read_lines(run / "heldout.jsonl")
    problems = load_problems(record["config"]["eval_data"], False, record["config"].get("columns"))
    return {
        "evaluation": evaluation,
        "behaviour": {step: behaviour(problems, held_out, int(step)) for step in evaluation},
        "right": {step: {name: right(held_out, int(step), name) for name in DECODINGS} for step in evaluation},
        "accuracy": [step["accuracy"] for step in steps],
        "mean_length": [round(step["mean_length"], 2) for step in steps],
        "eos_rate": [step["eos_rate"] for step in steps],
        "divergence": [round(step["divergence"], 6) for step in steps],
        "max_grad_norm": round(max(step["grad_norm"] for step in steps), 6) if steps else None,
        "git_commit": record.get("git_commit"),
        "versions": record.get("versions"),
        "machine": f"{platform.machine()}, {cores()} cores",
    }


def right(held_out: list[dict], step: int, decoding: str) -> str:
    """A 1 for each held-out sample that is right, else a 0, by problem: the error over problems is made of these."""
    rows = [row for row in held_out if (row["step"], row["decoding"]) == (step, decoding)]
    return "".join(str(int(row["correct"])) for row in sorted(rows, key=lambda row: row["problem"]))


def behaviour(problems: list[Problem], held_out: list[dict], step: int) -> dict:
    """What accuracy hides, after `step` steps: shares in [0, 1], None where solutions are not those of a world.

    Of greedy solutions `repaired` and `broken` facts, out of the `stated` share of the base's facts that they still
    state; `leaps` and `strays` of greedy ones, and with `_sampled` behind them of sampled ones.
    """
    from experiments.study.worlds import leaps, repaired_and_broken, strays

    def rows(number: int, decoding: str) -> list[dict]:
        return [row for row in held_out if row["step"] == number and row["decoding"] == decoding]

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    before, after = ([row["text"] for row in rows(number, "greedy")] for number in (0, step))
    change = repaired_and_broken(before, after)
    shares = {
        "repaired": share(change.repaired, change.wrong_before),
        "broken": share(change.broken, change.right_before),
        "stated": share(change.wrong_before + change.right_before, change.before),
    }
    for decoding, name in (("greedy", ""), ("sampled", "_sampled")):
        solutions = rows(step, decoding) if change.before else []
        shares[f"leaps{name}"] = share(sum(leaps(row["text"]) for row in solutions), len(solutions))
        stray = sum(strays(problems[row["problem"]].problem, row["text"]) for row in solutions)
        shares[f"strays{name}"] = share(stray, len(solutions))
    return shares


# ---------------------------------------------------------------------------------------------------------------
# All cells


CELL_FIELDS = {"row", "options", "seed", "model_id", "error", "seconds"}


def read_cells(path: Path) -> list[dict]:
    """The finished cells. A last line that a crash cut short is left out, and its cell runs again."""
    lines = path.read_text().splitlines() if path.is_file() else []
    cells = []
    for number, line in enumerate(lines, start=1):
        try:
            cells.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not valid JSON") from None
            continue
        if not isinstance(cells[-1], dict) or not cells[-1].keys() >= CELL_FIELDS:
            raise InputError(f"{path}, line {number}: not a cell of a study")
    return cells


def missing_cells(grid: Grid, records: list[dict]) -> list[Cell]:
    """Seed by seed, so that a grid stopped early still holds whole pairs. Rows with equal options share their cells."""
    names = {row: config_of(grid.options(row)).model for row in grid.rows}  # a row that train.py refuses is told here
    models = {name: model_id(name) for name in set(names.values())}
    done = {Cell("", r["options"], r["seed"], r["model_id"]).key for r in records}
    cells: dict[str, Cell] = {}
    for seed in grid.seeds:
        for row in grid.rows:
            options = grid.options(row)
            cell = Cell(row, options, seed, models[names[row]])
            if cell.key not in done:
                cells.setdefault(cell.key, cell)
    stale = {r["model_id"] for r in records} - set(models.values())
    if stale and cells:
        raise InputError(f"the results are of another model ({', '.join(stale)}): choose another --output_dir")
    return list(cells.values())


def run_cells(cells: list[Cell], output: Path, workers: int) -> Iterator[dict]:
    """Records in the order in which cells finish; one worker runs them in this process."""
    if workers == 1:
        yield from (run_cell(cell, output) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")  # a forked child cannot use the GPU
    slots, gpus = context.Queue(), visible_gpus() or [""]
    for slot in range(workers):
        slots.put(gpus[slot % len(gpus)])
    with ProcessPoolExecutor(workers, context, initializer=_take_slot, initargs=(slots,)) as pool:
        futures = [pool.submit(run_cell, cell, output) for cell in cells]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _take_slot(slots: multiprocessing.Queue) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = slots.get()


def cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES takes, of the GPUs that this process may use."""
    import torch

    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return allowed.split(",") if allowed else [str(gpu) for gpu in range(torch.cuda.device_count())]


def run_grid(grid: Grid, output: Path, workers: int) -> list[dict]:
    """Run the missing cells, adding each to cells.jsonl as it finishes; returns all of its records."""
    from runtime.records import make_folder, write_atomically

    path = output / "cells.jsonl"
    records = read_cells(path)
    cells = missing_cells(grid, records)
    if blind := sorted({cell.row for cell in cells if not config_of(cell.options).eval_data}):
        raise InputError(f"row {blind[0]}: no --eval_data to score its cells by; --dry_run prints their commands")
    write_atomically(make_folder(output) / path.name, "".join(json.dumps(record) + "\n" for record in records))
    total = len(cells) + len(records)
    for record in tqdm(run_cells(cells, output, workers), "cells", total, initial=len(records), unit="cell"):
        records.append(record)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return records


def command(cell: Cell, output: Path) -> str:
    """A cell as a line of the shell, for machines on which the study itself does not run; rules.py knows all rows."""
    words = ["torchrun", "-m", "experiments.study.rules", *flags(cell.options, cell.seed)]
    return shlex.join([*words, f"--output_dir={output / 'runs' / cell.folder}"])


def default_folder(grid: str) -> Path:
    """runs/study-GRID; of a JSON file its name without the ending, which a grid's own name (leap-0.2) does not have."""
    return Path(f"runs/study-{grid if grid in GRIDS else Path(grid).stem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="embedded", help=f"{', '.join(GRIDS)} (grids.py), or a JSON file")
    parser.add_argument("--output_dir", type=Path, help="cells.jsonl and report.md; default runs/study-GRID")
    parser.add_argument("--workers", type=int, default=0, help="cells at a time; default: one per GPU, else per core")
    parser.add_argument("--dry_run", action="store_true", help="print the missing cells' commands, run nothing")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must be at least 0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    grid = GRIDS[args.grid] if args.grid in GRIDS else read_grid(Path(args.grid))
    output = args.output_dir or default_folder(args.grid)
    if args.dry_run:
        return print(
            "\n".join(command(cell, output) for cell in missing_cells(grid, read_cells(output / "cells.jsonl")))
        )
    if args.report_only:
        records = read_cells(output / "cells.jsonl")
    else:
        records = run_grid(grid, output, args.workers or len(visible_gpus()) or cores())
    if not records:
        raise InputError(f"--output_dir {output}: no cells have been measured there")
    return print(write_report(grid, records, output))


if __name__ == "__main__":
    run_script(main)
