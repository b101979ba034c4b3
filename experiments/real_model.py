"""What the method does to a real model: arms trained by train.py, scored by evaluate.py on the same held-out problems.

    python -m experiments.real_model --model DIR --train gsm8k_train.jsonl --test gsm8k_test.jsonl
    python -m experiments.real_model --report experiments/results/real-model/paper-prompts.jsonl

Prompts, sampling, adapter and optimizer are the paper's; what a smaller model and a shorter time change stands in the
constants below. After Ctrl-C the first command goes on; a finished cell is a line of cells.jsonl: what is right, boxed
and finished of each problem, no text. docs/real-model.md says what came out.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from threading import Event, Lock

import numpy as np

from errors import InputError, require
from evaluate import bootstrap_interval
from experiments.study.report import paired_difference
from grading import extract_boxed
from problems import Problem, load_problems
from runtime import records
from runtime.flags import run_script
from runtime.records import read_rows, write_rows
from teacher import EVALUATION_PROMPT, TEACHER_PROMPT, fill

ROOT = Path(__file__).parent.parent
RUNNING: set[int] = set()  # the scripts' process ids
STOPPED = Event()  # a script has failed, or SIGTERM has come: no other one starts
# 20 rates that fall linearly from 3e-5 sum to 3.2e-4; the 100 steps that the paper evaluates sum to 3.4e-4.
TRAINING = {"num_steps": 20, "batch_size": 8, "micro_batch_size": 8, "max_new_tokens": 128, "learning_rate": 3e-5,
            "save_steps": 5}  # fmt: skip
SCORED_TOKENS = 448  # limit of the scored answers
DECODINGS = {"greedy": 0.0, "sampled": 1.0}
UNTRAINED, SHOWN = "untrained", "untrained, shown the solution"
ARMS = {
    "OPSD": {"method": "opsd"},
    "Moderate": {"method": "pwopsd"},
    "uniform, per sequence": {"method": "opsd", "reduction": "sequence_mean"},
    "reversed Moderate": {"method": "pwopsd", "schedule": "reversed"},
}
NO_CLIP = {arm: f"{arm}, no clip" for arm in ARMS}
ARMS |= {NO_CLIP[arm]: options | {"tau_clip": "inf"} for arm, options in ARMS.items()}
# Rollouts cut where the answers are: most end by themselves, and r = 1 is then the answer's end.
WHOLE = {f"{arm}, no clip": f"{arm}, no clip, whole" for arm in ("OPSD", "Moderate", "reversed Moderate")}
ARMS |= {WHOLE[arm]: ARMS[arm] | {"max_new_tokens": SCORED_TOKENS} for arm in WHOLE}
ROWS = [(UNTRAINED, 0), (SHOWN, 0)]
ROWS += [(name, seed) for seed in (1, 2, 3) for arm in NO_CLIP for name in (arm, NO_CLIP[arm])]
ROWS += [(arm, seed) for seed in (1, 2, 3) for arm in WHOLE.values()]
CONTRASTS = [("Moderate", "uniform, per sequence"), ("reversed Moderate", "uniform, per sequence"),
             ("uniform, per sequence", "OPSD"), ("Moderate", "OPSD"), ("reversed Moderate", "OPSD"),
             ("reversed Moderate", "Moderate")]  # fmt: skip
CONTRASTS += [(NO_CLIP[left], NO_CLIP[right]) for left, right in CONTRASTS]
CONTRASTS += [(WHOLE[a], WHOLE[b]) for a, b in CONTRASTS if a in WHOLE and b in WHOLE]
CONTRASTS = [(NO_CLIP[arm], arm) for arm in NO_CLIP] + [(WHOLE[arm], arm) for arm in WHOLE] + CONTRASTS
CONTRASTS = [(SHOWN, UNTRAINED), *((arm, UNTRAINED) for arm in ARMS), *CONTRASTS]


def write_problems(train: list[Problem], test: list[Problem], folder: Path) -> None:
    """The problems, the held-out ones also as the teacher is shown them, and the prompts to score them with."""
    shown = [replace(item, problem=fill(TEACHER_PROMPT, item)) for item in test]
    for name, problems, template in (
        ("train", train, EVALUATION_PROMPT), ("test", test, EVALUATION_PROMPT), ("shown", shown, "{problem}"),
    ):  # fmt: skip
        if any(not problem.answer for problem in problems):
            raise InputError(f"--{name}: all problems need answers, and some have none")
        write_rows(folder / f"{name}.jsonl", [asdict(problem) for problem in problems])
        records.write_atomically(folder / f"prompts-{name}.json", json.dumps({"evaluation": template}))


def stop(*_: object) -> None:
    """Hand SIGTERM on to the scripts, which keep what they have (Ctrl-C reaches them by itself)."""
    STOPPED.set()
    for process in [*RUNNING]:
        os.kill(process, signal.SIGTERM)


def call(script: str, **flags: object) -> float:
    """Run a script of ours as a command; its CPU seconds. Raises InputError where it fails, after its own line."""
    if STOPPED.is_set():
        raise InputError(f"{script} is not started, as another one has stopped")
    words = [sys.executable, str(ROOT / script), *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(words)  # held, so that no other thread's Popen waits for it
    RUNNING.add(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    RUNNING.discard(process.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        STOPPED.set()
        number = -process.returncode
        why = f"killed by signal {number}" if number > 0 else "and its own line says why"
        raise InputError(f"{script} has stopped, {why}")
    return usage.ru_utime + usage.ru_stime


def measure(row: str, seed: int, model: str, dtype: str, folder: Path) -> Iterator[dict]:
    """The lines of cells.jsonl for a row: an arm trained, unless that is done, and scored for each decoding.

    Their CPU seconds are those of the last call, not what a killed one had spent.
    """
    cell, given = {"row": row, "rate": TRAINING["learning_rate"] if row in ARMS else None, "seed": seed}, {}
    run = folder / "runs" / name_of(row, seed)
    if row in ARMS:
        options = TRAINING | ARMS[row] | {"seed": seed, "dtype": dtype}
        cell["train"] = {name: str(value) for name, value in options.items()}
        data = folder / "train.jsonl"
        cell["train_cpu_s"] = round(call("train.py", model=model, data=data, output_dir=run, resume=True, **options))
        cell["steps"] = read_rows(run / "metrics.jsonl")
        given = {"adapter": run / f"checkpoint-{options['num_steps']}"}
    source = "shown" if row == SHOWN else "test"
    for decoding, temperature in DECODINGS.items():
        output = run.with_name(f"{run.name}-{decoding}")
        cpu_s = call("evaluate.py", model=model, benchmark=folder / f"{source}.jsonl", num_samples=1, batch_size=500,
                     prompts=folder / f"prompts-{source}.json", temperature=temperature, dtype=dtype,
                     max_new_tokens=SCORED_TOKENS, output_dir=output, **given)  # fmt: skip
        summary = json.loads((output / "summary.json").read_text())
        samples = sorted(read_rows(output / "samples.jsonl"), key=lambda sample: sample["problem"])
        yield cell | {
            "decoding": decoding, "evaluate_cpu_s": round(cpu_s),
            "correct": summary["per_problem"]["avg"][0],
            "boxed": [float(extract_boxed(sample["text"]) is not None) for sample in samples],
            "finished": [float(sample["finish_reason"] != "length") for sample in samples],
            "tokens": [sample["tokens"] for sample in samples],
        }  # fmt: skip


def report(cells: list[dict]) -> str:
    """Markdown: each row's shares, then the paired differences with 95 % intervals over problems and over seeds."""
    lines = ["| row | rate | decoding | seeds | right % | boxed % | finished % | tokens |", "|---" * 8 + "|"]
    rows: dict[tuple, dict[int, dict]] = {}
    for cell in cells:
        rows.setdefault((cell["row"], cell["rate"], cell["decoding"]), {})[cell["seed"]] = cell
    for (row, rate, decoding), by_seed in rows.items():
        means = {name: np.mean([cell[name] for cell in by_seed.values()]) for name in ("correct", "boxed", "finished")}
        shares = " | ".join(f"{100 * value:.1f}" for value in means.values())
        tokens, seeds = np.mean([cell["tokens"] for cell in by_seed.values()]), ", ".join(map(str, sorted(by_seed)))
        lines.append(f"| {row} | {rate or ''} | {decoding} | {seeds} | {shares} | {tokens:.1f} |")
    lines += ["", "| difference in points | rate | decoding | seeds | over problems | over seeds |", "|---" * 6 + "|"]
    for pair, (row, rate, decoding) in product(CONTRASTS, rows):
        b = rows.get((pair[1], None if pair[1] == UNTRAINED else rate, decoding), {})
        a = rows[row, rate, decoding] if row == pair[0] else {}
        b = dict.fromkeys(a, b[0]) if pair[1] == UNTRAINED and b else b
        if seeds := sorted(a.keys() & b.keys()):
            a_SP, b_SP = (100 * np.array([side[seed]["correct"] for seed in seeds]) for side in (a, b))
            low, high = bootstrap_interval((a_SP - b_SP).mean(axis=0))
            seed_means = [dict(zip(seeds, x_SP.mean(axis=1).tolist(), strict=True)) for x_SP in (a_SP, b_SP)]
            over = paired_difference(*seed_means)
            over_seeds = f"[{over.low:+.1f}, {over.high:+.1f}]" if over else "one seed"
            mean = (a_SP - b_SP).mean()
            lines.append(f"| {' - '.join(pair)} | {rate or ''} | {decoding} | {', '.join(map(str, seeds))} | "
                         f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] | {over_seeds} |")  # fmt: skip
    return "\n".join(lines + training_lines(rows))


def training_lines(rows: dict) -> list[str]:
    """Means over each arm's first and last quarter of steps and its seeds, of what metrics.jsonl has; nan if none."""
    names = ["mean_length", "eos_rate", "repetition", "divergence", "forward_kl", "clipped_mass", "student_entropy",
             "teacher_entropy"]  # fmt: skip
    heads = " | ".join([*names, "forward_kl by tenth"])
    lines = ["", f"| row | rate | seeds | steps | {heads} |", "|---" * (5 + len(names)) + "|"]
    for (row, rate, decoding), by_seed in rows.items():
        runs = [cell["steps"] for cell in by_seed.values() if "steps" in cell and decoding != "sampled"]
        quarter, seeds = max(1, len(runs[0]) // 4) if runs else 0, ", ".join(map(str, sorted(by_seed)))
        for part, which in ((slice(quarter), "first"), (slice(-quarter, None), "last")) if runs else ():
            steps = [step for run in runs for step in run[part]]
            parts = [f"{np.mean([step[name] for step in steps if name in step] or [np.nan]):.3f}" for name in names]
            by_tenth = zip(*(step["by_decile"].get("forward_kl", [None] * 10) for step in steps), strict=True)
            parts += [" ".join(f"{np.mean([d for d in tenth if d is not None] or [np.nan]):.3f}" for tenth in by_tenth)]
            lines.append(f"| {row} | {rate} | {seeds} | {which} {quarter} | {' | '.join(parts)} |")
    return lines


def measure_all(cells: list[dict], rows: list[tuple], model: str, dtype: str, folder: Path, at_once: int) -> None:
    """Measure those of the rows that are missing, `at_once` at a time."""
    done, pool, one_writes = {key(cell) for cell in cells}, ThreadPoolExecutor(at_once), Lock()

    def add(row: str, seed: int) -> None:
        for cell in measure(row, seed, model, dtype, folder):
            with one_writes:
                new = [] if key(cell) in done else [cell]
                records.append_rows(folder / "cells.jsonl", new)
                cells.extend(new)
            print(f"{len(cells)} cells, the last of {key(cell)}", flush=True)

    missing = [row for row in rows if not {(*row, name) for name in DECODINGS} <= done]
    signal.signal(signal.SIGTERM, stop)
    try:
        for job in as_completed([pool.submit(add, *row) for row in missing]):
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def key(cell: dict) -> tuple:
    return cell["row"], cell["seed"], cell["decoding"]


def name_of(row: str, seed: int) -> str:
    return f"{row}-{seed}".replace(" ", "-").replace(",", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name of an instruction-tuned checkpoint")
    parser.add_argument("--train", help="problems with solutions, any form that train.py's --data reads")
    parser.add_argument("--test", help="held-out problems, likewise")
    kinds, help_of = ("auto", "float32", "bfloat16", "float16"), "bfloat16 is faster where a processor knows it"
    parser.add_argument("--dtype", default="auto", choices=kinds, help=f"as in train.py; {help_of}")
    names = {name_of(*row): row for row in ROWS}
    parser.add_argument("--rows", nargs="+", default=list(names), choices=names, metavar="ROW",
                        help="measure these alone, such as untrained-0 OPSD-1 Moderate-no-clip-3")  # fmt: skip
    parser.add_argument("--at_once", type=int, default=2, help="trainings at a time, which share the device")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/real-model"))
    parser.add_argument("--report", type=Path, metavar="CELLS", help="run nothing, print the table of a cells.jsonl")
    args = parser.parse_args()
    if args.report:
        if not args.report.is_file():
            raise InputError(f"--report {args.report}: no such file")
        return print(report(read_rows(args.report)))
    if not (args.model and args.train and args.test):
        raise InputError("--model, --train and --test: name all three, or --report CELLS")
    require(args.at_once > 0, "at_once", args.at_once, "be at least 1")
    train, test, folder = load_problems(args.train), load_problems(args.test), args.output_dir
    constants = {"training": TRAINING, "arms": ARMS, "scored": [SCORED_TOKENS, DECODINGS]}
    named = {"model": args.model, "train": args.train, "test": args.test, "dtype": args.dtype}
    digests = {"train": records.digest(train), "test": records.digest(test)}
    with records.open_run(folder, "real_model", resume=True) as record:
        inputs = records.fingerprints({"model": args.model}) | digests
        records.record_run(folder, "real_model", record, named | constants, set(), inputs, {})
        write_problems(train, test, folder)
        cells = read_rows(folder / "cells.jsonl")
        write_rows(folder / "cells.jsonl", cells)  # without a line that a kill cut short
        rows = [names[name] for name in dict.fromkeys(args.rows)]
        measure_all(cells, rows, args.model, args.dtype, folder, args.at_once)
    return print(report(cells))


if __name__ == "__main__":
    run_script(main)
