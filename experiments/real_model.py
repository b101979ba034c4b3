"""What the method does to a real model: arms trained by train.py, scored by evaluate.py on the same held-out problems.

    python -m experiments.real_model --model DIR --train gsm8k_train.jsonl --test gsm8k_test.jsonl
    python -m experiments.real_model --report experiments/results/real-model/short-answers.jsonl

Prompts, sampling, adapter and optimizer are the paper's; what a smaller model and a shorter time change stands in the
constants below. First OPSD at each learning rate, with the clip and without, whose rollouts say which rate is best for
either; then all arms at these, several seeds. After Ctrl-C the first command goes on; a finished cell is a line of
cells.jsonl: what is right, boxed and finished of each problem, no text. docs/real-model.md says what came out.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np

from errors import InputError
from evaluate import bootstrap_interval
from experiments.study.report import paired_difference
from grading import extract_boxed
from problems import Problem, load_problems
from runtime import records
from runtime.flags import run_script
from runtime.records import read_rows, write_rows
from teacher import EVALUATION_PROMPT, TEACHER_PROMPT, fill

ROOT = Path(__file__).parent.parent
TRAINING = {
    "num_steps": 20, "max_new_tokens": 288, "micro_batch_size": 16, "gradient_checkpointing": True, "save_steps": 10,
}  # fmt: skip
SCORED_TOKENS = 448  # limit of the scored answers
RATES, TUNING_SEED, TUNING_STEPS = (5e-6, 3e-5, 1e-4), 0, 10
TUNED, TUNING = ("OPSD", "OPSD, no clip"), "tuning"
DECODINGS = {"greedy": 0.0, "sampled": 1.0}
UNTRAINED, SHOWN = "untrained", "untrained, shown the solution"
ARMS = {
    "OPSD": {"method": "opsd"},
    "Moderate": {"method": "pwopsd"},
    "uniform, per sequence": {"method": "opsd", "reduction": "sequence_mean"},
    "reversed Moderate": {"method": "pwopsd", "schedule": "reversed"},
}
ARMS |= {f"{arm}, no clip": options | {"tau_clip": "inf"} for arm, options in ARMS.items()}
# (arm, seed), the most important ones first.
FINAL = [(arm, seed) for arms in (list(ARMS)[:4], list(ARMS)[4:]) for seed in (1, 2, 3) for arm in arms]
CONTRASTS = [("Moderate", "uniform, per sequence"), ("reversed Moderate", "uniform, per sequence"),
             ("uniform, per sequence", "OPSD"), ("Moderate", "OPSD")]  # fmt: skip
CONTRASTS += [(f"{left}, no clip", f"{right}, no clip") for left, right in CONTRASTS]
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


def call(script: str, **flags: object) -> float:
    """Run a script of ours as a command; its CPU seconds. Raises InputError where it fails, after its own line."""
    words = [sys.executable, str(ROOT / script), *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(words)  # held, so that no other thread's Popen waits for it
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise InputError(f"{script} has stopped, and its own line says why")
    return usage.ru_utime + usage.ru_stime


def measure(
    row: str, rate: float | None, seed: int, decodings: tuple[str, ...], model: str, folder: Path
) -> list[dict]:
    """Lines of cells.jsonl: an arm trained, unless that is done, and scored for each decoding; TUNING is not scored."""
    cell, given, is_tuning, cells = {"row": row, "rate": rate, "seed": seed}, {}, decodings == (TUNING,), []
    run = folder / "runs" / "-".join(map(str, [*cell.values(), *decodings])).replace(" ", "-").replace(",", "")
    if row in ARMS:
        options = TRAINING | ARMS[row] | {"learning_rate": rate, "seed": seed}
        options |= {"num_steps": TUNING_STEPS} if is_tuning else {}
        cell["train"] = {name: str(value) for name, value in options.items()}
        data = folder / "train.jsonl"
        cell["train_cpu_s"] = round(call("train.py", model=model, data=data, output_dir=run, resume=True, **options))
        cell["steps"] = read_rows(run / "metrics.jsonl")
        given = {"adapter": run / f"checkpoint-{options['num_steps']}"}
    if is_tuning:
        return [cell | {"decoding": TUNING}]
    source = "shown" if row == SHOWN else "test"
    for decoding in decodings:
        output = run.with_name(f"{run.name}-{decoding}")
        cpu_s = call("evaluate.py", model=model, benchmark=folder / f"{source}.jsonl", num_samples=1, batch_size=500,
                     prompts=folder / f"prompts-{source}.json", temperature=DECODINGS[decoding],
                     max_new_tokens=SCORED_TOKENS, output_dir=output, **given)  # fmt: skip
        summary = json.loads((output / "summary.json").read_text())
        samples = sorted(read_rows(output / "samples.jsonl"), key=lambda sample: sample["problem"])
        cells.append(cell | {
            "decoding": decoding, "evaluate_cpu_s": round(cpu_s),
            "correct": summary["per_problem"]["avg"][0],
            "boxed": [float(extract_boxed(sample["text"]) is not None) for sample in samples],
            "finished": [float(sample["finish_reason"] != "length") for sample in samples],
            "tokens": [sample["tokens"] for sample in samples],
        })  # fmt: skip
    return cells


def best_rate(cells: list[dict], arm: str) -> float:
    """The rate at which an arm's rollouts are right most often in the second half of tuning; of equals the lower."""
    steps = {cell["rate"]: cell["steps"] for cell in cells if (cell["decoding"], cell["row"]) == (TUNING, arm)}
    right = {rate: np.mean([step["accuracy"] for step in steps[rate][TUNING_STEPS // 2 :]]) for rate in RATES}
    return max(RATES, key=lambda rate: (right[rate], -rate))


def report(cells: list[dict]) -> str:
    """Markdown: each row's shares, then the paired differences with 95 % intervals over problems and over seeds."""
    lines = ["| row | rate | decoding | seeds | right % | boxed % | finished % | tokens |", "|---" * 8 + "|"]
    rows: dict[tuple, dict[int, dict]] = {}
    for cell in cells:
        rows.setdefault((cell["row"], cell["rate"], cell["decoding"]), {})[cell["seed"]] = cell
    scored = {key: by_seed for key, by_seed in rows.items() if key[2] != TUNING}
    for (row, rate, decoding), by_seed in scored.items():
        means = {name: np.mean([cell[name] for cell in by_seed.values()]) for name in ("correct", "boxed", "finished")}
        shares = " | ".join(f"{100 * value:.1f}" for value in means.values())
        tokens, seeds = np.mean([cell["tokens"] for cell in by_seed.values()]), ", ".join(map(str, sorted(by_seed)))
        lines.append(f"| {row} | {rate or ''} | {decoding} | {seeds} | {shares} | {tokens:.1f} |")
    lines += ["", "| difference in points | rate | decoding | seeds | over problems | over seeds |", "|---" * 6 + "|"]
    for pair, (row, rate, decoding) in product(CONTRASTS, scored):
        b = scored.get((pair[1], None if pair[1] == UNTRAINED else rate, decoding), {})
        a = scored[row, rate, decoding] if row == pair[0] else {}
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
    """What metrics.jsonl says of each arm's first and last step, as means over seeds."""
    names = ["mean_length", "eos_rate", "repetition", "divergence", "student_entropy", "teacher_entropy"]
    tenths = "divergence by tenth"
    lines = ["", f"| row | rate | seeds | step | {' | '.join(names)} | {tenths} |", "|---" * (5 + len(names)) + "|"]
    for (row, rate, decoding), by_seed in rows.items():
        runs = [cell["steps"] for cell in by_seed.values() if "steps" in cell and decoding != "sampled"]
        for i, step in ((0, "first"), (-1, "last")) if runs else ():
            parts = [f"{np.mean([run[i][name] for run in runs]):.3f}" for name in names]
            by_tenth = zip(*(run[i]["by_decile"]["divergence"] for run in runs), strict=True)
            parts += [" ".join(f"{np.mean([d for d in tenth if d is not None] or [np.nan]):.3f}" for tenth in by_tenth)]
            seeds = ", ".join(map(str, by_seed)) + f" ({TUNING})" * (decoding == TUNING)
            lines.append(f"| {row} | {rate} | {seeds} | {step} | {' | '.join(parts)} |")
    return lines


def measure_all(cells: list[dict], model: str, folder: Path, at_once: int) -> None:
    """Measure the cells that are missing, `at_once` at a time: tuning, then the final ones at the best rates."""
    pool = ThreadPoolExecutor(at_once)

    def run(jobs: list[tuple], decodings: tuple[str, ...]) -> None:
        done = {key(cell) for cell in cells}
        missing = [job for job in jobs if not {(*job, decoding) for decoding in decodings} <= done]
        for job in as_completed([pool.submit(measure, *job, decodings, model, folder) for job in missing]):
            new = [cell for cell in job.result() if key(cell) not in done]
            records.append_rows(folder / "cells.jsonl", new)
            cells.extend(new)
            print(f"{len(cells)} cells, the last of {key(new[-1])}", flush=True)

    try:
        run([(arm, rate, TUNING_SEED) for rate in RATES for arm in TUNED], (TUNING,))
        rates = {arm: best_rate(cells, TUNED["no clip" in arm]) for arm in ARMS}
        rows = [(row, None, 0) for row in (UNTRAINED, SHOWN)] + [(arm, rates[arm], seed) for arm, seed in FINAL]
        run(rows, tuple(DECODINGS))
    finally:
        pool.shutdown(cancel_futures=True)


def key(cell: dict) -> tuple:
    return cell["row"], cell["rate"], cell["seed"], cell["decoding"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name of an instruction-tuned checkpoint")
    parser.add_argument("--train", help="problems with solutions, any form that train.py's --data reads")
    parser.add_argument("--test", help="held-out problems, likewise")
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
    train, test, folder = load_problems(args.train), load_problems(args.test), args.output_dir
    constants = {"training": TRAINING, "arms": ARMS, "tuning": [RATES, TUNING_STEPS, TUNING_SEED]}
    named = {"model": args.model, "train": args.train, "test": args.test, "scored_tokens": SCORED_TOKENS}
    digests = {"train": records.digest(train), "test": records.digest(test)}
    with records.open_run(folder, "real_model", resume=True) as record:
        inputs = records.fingerprints({"model": args.model}) | digests
        records.record_run(folder, "real_model", record, named | constants, set(), inputs, {})
        write_problems(train, test, folder)
        cells = read_rows(folder / "cells.jsonl")
        write_rows(folder / "cells.jsonl", cells)  # without a line that a kill cut short
        measure_all(cells, args.model, folder, args.at_once)
    return print(report(cells))


if __name__ == "__main__":
    run_script(main)
