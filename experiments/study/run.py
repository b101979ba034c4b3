"""The controlled study: which tokens to weight, how to clip, what to show the teacher; one thing changed at a time.

    python -m experiments.study.run                        what is missing of the embedded world's grid, then the report
    python -m experiments.study.run --grid leap            a world in which early teacher tokens mislead
    python -m experiments.study.run --report_only          the report again, from the cells measured so far

For a grid of your own, a script puts it into `grids.GRIDS` and calls `main`. A cell is one run of train.py: one row's
options and one seed. Rows share seeds, hence problems, their order and the random numbers of sampling, so rows are
compared in pairs. OUTPUT_DIR/cells.jsonl gets a line for each finished cell, never run again, and makes the report.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import experiments.study.rules  # noqa: F401  (registers its rows)
import train
from errors import InputError
from experiments.study.grids import GRIDS, Grid
from experiments.study.report import DECODINGS, write_report
from experiments.study.worlds import fact_change, leaps, strays
from problems import Problem, load_problems
from runtime.flags import run_script
from runtime.loading import find_checkpoint
from runtime.ranks import STOP_SIGNALS
from runtime.records import append_rows, git_commit, make_folder, read_rows, versions, write_rows


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

    @property
    def flags(self) -> list[str]:
        return [f"--{name}={value}" for name, value in {**self.options, "seed": self.seed}.items()]


def model_id(name: str) -> str:
    """A hub model by its name, a local one by a digest of its weights: other weights make other cells."""
    digest = hashlib.sha256()
    files = sorted(Path(find_checkpoint(name)).glob("*.safetensors"))
    for file in files:
        digest.update(file.read_bytes())
    return f"{name} {digest.hexdigest()[:12]}" if files else name


def run_cell(cell: Cell, output: Path) -> dict:
    """Train a cell, or go on with it, and return its line of cells.jsonl. A loss that is not finite is a result too."""
    run = output / "runs" / cell.folder
    run.mkdir(parents=True, exist_ok=True)
    words = ["train.py", *cell.flags, f"--output_dir={run}", "--resume=true"]
    started, error, handlers = time.time(), None, {n: signal.getsignal(n) for n in STOP_SIGNALS}
    with run.with_suffix(".log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            with mock.patch.object(sys, "argv", words):
                train.main()
        except FloatingPointError as problem:
            error = str(problem)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    record = asdict(cell) | measured(run, train.parse_config(cell.flags), error)
    record |= {"error": error, "seconds": round(time.time() - started, 1)}
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return record


def measured(run: Path, config: train.TrainConfig, error: str | None) -> dict:
    """What a finished run's files say, short enough to be committed; it has none where it stopped before step 0."""
    file = run / "evaluation.json"
    evaluation = json.loads(file.read_text()) if file.exists() else {}
    if error is None and str(config.num_steps) not in evaluation:
        raise InputError(f"{run}: stopped before its end; the same command goes on with it")
    steps, held_out = read_rows(run / "metrics.jsonl"), read_rows(run / "heldout.jsonl")
    problems = load_problems(config.eval_data, False, config.columns)

    def rows(step: str, decoding: str) -> list[dict]:
        found = [row for row in held_out if (row["step"], row["decoding"]) == (int(step), decoding)]
        return sorted(found, key=lambda row: row["problem"])

    scored = {step: {decoding: rows(step, decoding) for decoding in DECODINGS} for step in evaluation}
    return {
        "evaluation": evaluation,
        "behaviour": {step: behaviour(problems, scored["0"]["greedy"], after) for step, after in scored.items()},
        # A 1 for each held-out sample that is right, else a 0: the error over problems is made of these.
        "right": {
            step: {decoding: "".join(str(int(row["correct"])) for row in rows) for decoding, rows in after.items()}
            for step, after in scored.items()
        },
        "max_grad_norm": round(max(step["grad_norm"] for step in steps), 6) if steps else None,
        "git_commit": git_commit(), "versions": versions(),
        "machine": f"{processor()}, {cores()} cores",
    }  # fmt: skip


def behaviour(problems: list[Problem], before: list[dict], after: dict[str, list[dict]]) -> dict[str, float | None]:
    """What accuracy hides, of held-out rows, `after` by decoding: shares in [0, 1], None where nothing is a world's.

    Of greedy solutions `repaired` and `broken` facts, out of the `stated` share of the base's facts that they still
    state; `leaps` and `strays` of greedy ones, and with `_sampled` behind them of sampled ones.
    """
    facts = fact_change([row["text"] for row in before], [row["text"] for row in after["greedy"]])
    for decoding, name in (("greedy", ""), ("sampled", "_sampled")):
        solutions = after[decoding] if facts["stated"] else []
        facts[f"leaps{name}"] = [leaps(row["text"]) for row in solutions]
        facts[f"strays{name}"] = [strays(problems[row["problem"]].problem, row["text"]) for row in solutions]
    return {name: sum(found) / len(found) if found else None for name, found in facts.items()}


def read_cells(path: Path) -> list[dict]:
    """The finished cells. A last line that a crash cut short is left out, and its cell runs again."""
    return read_rows(path, ("row", "options", "seed", "model_id", "error", "seconds"))


def missing_cells(grid: Grid, records: list[dict]) -> list[Cell]:
    """Seed by seed, so that a grid stopped early still holds whole pairs. Rows with equal options share their cells."""
    names = {row: train.parse_config(Cell(row, grid.options(row), 0, "").flags).model for row in grid.rows}
    models = {name: model_id(name) for name in set(names.values())}
    done = {Cell("", r["options"], r["seed"], r["model_id"]).key for r in records}
    missing: dict[str, Cell] = {}
    for seed in grid.seeds:
        for row, name in names.items():
            cell = Cell(row, grid.options(row), seed, models[name])
            if cell.key not in done:
                missing.setdefault(cell.key, cell)
    stale = {r["model_id"] for r in records} - set(models.values())
    if stale and missing:
        raise InputError(f"the results are of another model ({', '.join(stale)}): choose another --output_dir")
    return list(missing.values())


def run_cells(cells: list[Cell], output: Path, workers: int) -> Iterator[dict]:
    """Records in the order in which cells finish; one worker runs them in this process."""
    if workers == 1:
        yield from (run_cell(cell, output) for cell in cells)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked child cannot use the GPU
    with ProcessPoolExecutor(workers, spawn) as pool:
        futures = [pool.submit(run_cell, cell, output) for cell in cells]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Its name, where the system tells: another one rounds otherwise, and makes other models and cells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def run_grid(grid: Grid, output: Path, workers: int) -> list[dict]:
    """Run the missing cells, adding each to cells.jsonl as it finishes; returns all of its records."""
    path = output / "cells.jsonl"
    records = read_cells(path)
    cells = missing_cells(grid, records)
    if blind := [cell.row for cell in cells if not train.parse_config(cell.flags).eval_data]:
        raise InputError(f"row {blind[0]}: no --eval_data to score its cells by")
    write_rows(make_folder(output) / path.name, records)  # without a line that was cut short
    total = len(cells) + len(records)
    for record in tqdm(run_cells(cells, output, workers), "cells", total, initial=len(records), unit="cell"):
        records.append(record | grid.facts)
        append_rows(path, records[-1:])
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="embedded", choices=GRIDS, help="of grids.py")
    parser.add_argument("--output_dir", type=Path, help="cells.jsonl and report.md; default runs/study-GRID")
    parser.add_argument("--workers", type=int, default=0, help="cells at a time; default: one on a GPU, else per core")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    grid, output = GRIDS[args.grid], args.output_dir or Path(f"runs/study-{args.grid}")
    if not args.report_only:
        run_grid(grid, output, args.workers or (1 if torch.cuda.is_available() else cores()))
    records = read_cells(output / "cells.jsonl")
    if not records:
        raise InputError(f"--output_dir {output}: no cells have been measured there")
    return print(write_report(grid, records, output))


if __name__ == "__main__":
    run_script(main)
