"""What the method does to a real model: arms trained by train.py, scored by evaluate.py on the same held-out problems.

    python -m experiments.real_model --model DIR --train gsm8k_train.jsonl --test gsm8k_test.jsonl
    python -m experiments.real_model --report experiments/results/real-model/cells.jsonl

Both prompts ask for one line of arithmetic, and the problems are the shortest of their files, so that answers can end
within the limit. The first command can be killed and goes on; a finished cell is a line of cells.jsonl: what is right,
boxed and finished of each problem, no text. docs/real-model.md says what came out.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from errors import InputError
from evaluate import bootstrap_interval
from experiments.study.report import paired_difference
from grading import extract_boxed
from problems import Problem, load_problems
from runtime.flags import run_script
from runtime.records import append_rows, make_folder, read_rows, write_atomically, write_rows

ROOT = Path(__file__).parent.parent
AT_ONCE = 2  # cells at a time, each on the threads of OMP_NUM_THREADS: two of one thread beat one of two on a CPU
EXAMPLE = (
    "Q: 3 boxes of 12 eggs, 20 are eaten. How many are left?\nA: 3*12 = 36, 36-20 = 16. The answer is \\boxed{16}."
)
ASKED = "\n\nAnswer like this, in one line.\nQ: {problem}\nA:"
# The teacher's example is this very problem: its context differs by what is known, not by what is asked.
PROMPTS = {
    "student": EXAMPLE + ASKED, "teacher": "Q: {problem}\nA: {solution}" + ASKED, "evaluation": EXAMPLE + ASKED,
}  # fmt: skip
NEW_TOKENS = 40
TRAINING = {
    "max_new_tokens": NEW_TOKENS, "num_steps": 4, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-5,
    "tau_clip": "inf", "temperature": 1.0, "distill_temperature": 1.0, "top_k": 0, "save_steps": 2,
}  # fmt: skip
UNTRAINED = "untrained"
ARMS = {
    "OPSD": {"method": "opsd"},
    "PW-OPSD Moderate": {"method": "pwopsd"},
    "uniform, per sequence": {"method": "opsd", "reduction": "sequence_mean"},
    "reversed Moderate": {"method": "pwopsd", "schedule": "reversed"},
    "OPSD, clip .05": {"method": "opsd", "tau_clip": 0.05},
    "Moderate, clip .05": {"method": "pwopsd", "tau_clip": 0.05},
    "OPSD, 1e-4": {"method": "opsd", "learning_rate": 1e-4},
    "Moderate, 1e-4": {"method": "pwopsd", "learning_rate": 1e-4},
}
# In the order of importance: what is missing at the end of the time is at the end of the list.
CELLS = [
    (UNTRAINED, 0), *((arm, seed) for seed in (1, 2, 3) for arm in list(ARMS)[:2]),
    *((arm, 1) for arm in list(ARMS)[2:6]), *((arm, seed) for seed in (1, 2) for arm in list(ARMS)[6:]),
]  # fmt: skip
NUMBER = r"\$?(?:\d+(?:[.,]\d+)*|\.\d+)"
EQUATION = re.compile(rf"{NUMBER}(?:\s*[-+*/x]\s*{NUMBER})+\s*=\s*{NUMBER}")
DECODINGS = {"greedy": 0.0, "sampled": 1.0}
CONTRASTS = [(arm, UNTRAINED) for arm in ARMS] + [(arm, "OPSD") for arm in list(ARMS)[1:6]]
CONTRASTS += [("Moderate, 1e-4", "OPSD, 1e-4")]


def shortest(source: str, count: int, path: Path) -> None:
    """Write the `count` shortest problems of a file, solution counted in, in the file's order.

    Only those whose solution's equations end in the answer; they are the solution here, in the style of EXAMPLE.
    """
    problems = [replace(item, solution=short) for item in load_problems(source) if (short := as_equations(item))]
    if len(problems) < count:
        raise InputError(f"{source}: has {len(problems)} problems with equations, {count} are asked for")
    kept = sorted(problems, key=lambda problem: len(problem.problem) + len(problem.solution))[:count]
    write_rows(path, [asdict(problem) for problem in sorted(kept, key=lambda problem: problem.row)])


def as_equations(problem: Problem) -> str | None:
    """`48/2 = 24, 48+24 = 72. The answer is \\boxed{72}.`; None where the last equation does not give the answer."""
    found = [re.sub(r"[\s$]", "", text).replace("x", "*") for text in EQUATION.findall(problem.solution)]
    if not found or found[-1].partition("=")[2].replace(",", "") != problem.answer.replace(",", ""):
        return None
    return f"{', '.join(found).replace('=', ' = ')}. The answer is \\boxed{{{problem.answer}}}."


def call(script: str, **flags: object) -> float:
    """Run a script of ours as a command; its CPU seconds. Raises InputError where it fails, after its own line."""
    words = [sys.executable, str(ROOT / script), *(f"--{name}={value}" for name, value in flags.items())]
    _, status, usage = os.wait4(subprocess.Popen(words).pid, 0)
    if status:
        raise InputError(f"{script} has stopped; the same command goes on")
    return usage.ru_utime + usage.ru_stime


def measure(row: str, seed: int, decoding: str, model: str, folder: Path) -> dict:
    """Train an arm with a seed, unless that is done, and score it: one line of cells.jsonl."""
    run, cell = folder / "runs" / f"{row.replace(' ', '-')}-{seed}", {"row": row, "seed": seed, "decoding": decoding}
    common = {"model": model, "prompts": folder / "prompts.json"}
    scoring = {
        "benchmark": folder / "test.jsonl", "temperature": DECODINGS[decoding], "num_samples": 1, "batch_size": 100,
        "max_new_tokens": NEW_TOKENS, "output_dir": run.with_name(f"{run.name}-{decoding}"), **common,
    }  # fmt: skip
    if row != UNTRAINED:
        options = TRAINING | ARMS[row] | {"seed": seed}
        cell["train"] = {name: str(value) for name, value in options.items()}
        data = folder / "train.jsonl"
        cell["train_cpu_s"] = round(call("train.py", data=data, output_dir=run, resume=True, **common, **options))
        cell["steps"] = read_rows(run / "metrics.jsonl")
        scoring["adapter"] = run / f"checkpoint-{TRAINING['num_steps']}"
    cell["evaluate_cpu_s"] = round(call("evaluate.py", **scoring))
    summary = json.loads((scoring["output_dir"] / "summary.json").read_text())
    samples = sorted(read_rows(scoring["output_dir"] / "samples.jsonl"), key=lambda sample: sample["problem"])
    ground = [sorted((name, value) for name, value in summary["inputs"].items() if name != "adapter"), NEW_TOKENS]
    return cell | {
        "ground": hashlib.sha256(json.dumps(ground).encode()).hexdigest()[:12],
        "correct": summary["per_problem"]["avg"][0],
        "boxed": [float(extract_boxed(sample["text"]) is not None) for sample in samples],
        "finished": [float(sample["finish_reason"] != "length") for sample in samples],
        "tokens": [sample["tokens"] for sample in samples],
    }


def report(cells: list[dict]) -> str:
    """Markdown: each row's shares, then the paired differences with 95 % intervals over problems and over seeds.

    Raises InputError for cells of more than one ground (model, problems, prompts, limit).
    """
    if len({cell["ground"] for cell in cells}) > 1:
        raise InputError("the cells differ in model, problems, prompts or limit: they are not comparable")
    lines = ["| row | decoding | seeds | right % | boxed % | finished % | tokens |", "|---|---|---|---|---|---|---|"]
    rows = {(cell["row"], cell["decoding"]): {} for cell in cells}
    for cell in cells:
        rows[cell["row"], cell["decoding"]][cell["seed"]] = cell
    for (row, decoding), by_seed in rows.items():
        means = {name: np.mean([cell[name] for cell in by_seed.values()]) for name in ("correct", "boxed", "finished")}
        shares = " | ".join(f"{100 * value:.1f}" for value in means.values())
        tokens = np.mean([cell["tokens"] for cell in by_seed.values()])
        lines.append(f"| {row} | {decoding} | {', '.join(map(str, by_seed))} | {shares} | {tokens:.1f} |")
    lines += ["", "| difference in points | decoding | seeds | over problems | over seeds |", "|---|---|---|---|---|"]
    for (left, right), decoding in [(pair, decoding) for decoding in DECODINGS for pair in CONTRASTS]:
        a, b = rows.get((left, decoding), {}), rows.get((right, decoding), {})
        b = dict.fromkeys(a, b[0]) if right == UNTRAINED and b else b
        if seeds := sorted(a.keys() & b.keys()):
            a_SP, b_SP = (100 * np.array([side[seed]["correct"] for seed in seeds]) for side in (a, b))
            low, high = bootstrap_interval((a_SP - b_SP).mean(axis=0))
            seed_means = [dict(zip(seeds, x_SP.mean(axis=1).tolist(), strict=True)) for x_SP in (a_SP, b_SP)]
            over = paired_difference(*seed_means)
            over_seeds = f"[{over.low:+.1f}, {over.high:+.1f}]" if over else "one seed"
            mean = (a_SP - b_SP).mean()
            lines.append(f"| {left} - {right} | {decoding} | {', '.join(map(str, seeds))} | "
                         f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] | {over_seeds} |")  # fmt: skip
    return "\n".join(lines + training_lines(rows))


def training_lines(rows: dict) -> list[str]:
    """What metrics.jsonl says of each arm's steps, from the first to the last, as means over seeds."""
    names = ["mean_length", "eos_rate", "repetition", "divergence", "student_entropy", "teacher_entropy"]
    lines = ["", f"| row | seeds | {' | '.join(names)} | divergence by tenth, first step | last |", "|---" * 10 + "|"]
    for (row, _), by_seed in rows.items():
        if runs := [cell["steps"] for cell in by_seed.values() if "steps" in cell]:
            parts = [np.mean([[step[name] for step in run] for run in runs], axis=0) for name in names]
            for i in (0, -1):
                tenths = zip(*(run[i]["by_decile"]["divergence"] for run in runs), strict=True)
                parts.append([np.mean([d for d in tenth if d is not None] or [np.nan]) for tenth in tenths])
            shown = " | ".join(", ".join(f"{value:.2f}" for value in part) for part in parts)
            lines.append(f"| {row} | {', '.join(map(str, by_seed))} | {shown} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name of an instruction-tuned checkpoint")
    parser.add_argument("--train", help="problems with solutions, any form that train.py's --data reads")
    parser.add_argument("--test", help="held-out problems, likewise")
    parser.add_argument("--count", type=int, default=200, help="the shortest so many problems of each file")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/real-model"))
    parser.add_argument("--report", type=Path, metavar="CELLS", help="run nothing, print the table of a cells.jsonl")
    args = parser.parse_args()
    if args.report:
        return print(report(read_rows(args.report)))
    if not (args.model and args.train and args.test):
        raise InputError("--model, --train and --test: name all three, or --report CELLS")
    folder, path = args.output_dir, args.output_dir / "cells.jsonl"
    make_folder(folder)
    for source, name in ((args.train, "train.jsonl"), (args.test, "test.jsonl")):
        shortest(source, args.count, folder / name)
    write_atomically(folder / "prompts.json", json.dumps(PROMPTS))
    cells = read_rows(path)
    write_rows(path, cells)  # without a line that a kill cut short
    done = {(cell["row"], cell["seed"], cell["decoding"]) for cell in cells}
    jobs = [(*cell, decoding) for decoding in DECODINGS for cell in CELLS if (*cell, decoding) not in done]
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for job in as_completed([pool.submit(measure, *job, args.model, folder) for job in jobs]):
            cells.append(job.result())
            append_rows(path, cells[-1:])
            print(report(cells), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return print(report(cells))


if __name__ == "__main__":
    run_script(main)
