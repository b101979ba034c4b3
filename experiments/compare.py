"""What two evaluations can say about each other, and tables of many.

    python -m experiments.compare runs/eval-opsd runs/eval-pwopsd     is B better than A, and what could have been seen
    python -m experiments.compare --left A0 A1 A2 --right B0 B1 B2    two rows of a study, by training seed
    python -m experiments.compare --report runs                       Markdown table, ours and the paper's apart

Takes folders of evaluate.py, their summary.json, or a samples.jsonl (which is graded anew). Differences are paired:
both sides met the same problems. Axes: P problems, S training seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np

from errors import InputError
from evaluate import benchmark_digest, bootstrap_interval, summarise
from experiments.report import paired_difference
from grading import make_grader
from problems import load_problems
from runtime.flags import run_script
from runtime.samples import SampleFile

# Avg@12 in % with the sample std over 3 evaluation seeds, Qwen3-4B (paper Table 2). The paper has no base row; the one
# here is the OPSD repository's (AIME24, AIME25, HMMT25).
PAPER_BENCHMARKS = ("math500", "aime24", "aime25", "hmmt25")
PAPER = {
    "base (OPSD repository)": (None, (74.9, None), (66.4, None), (42.2, None)),
    "OPSD": ((95.33, 0.08), (75.19, 0.42), (66.67, 1.27), (43.89, 0.73)),
    "EOPD": ((95.33, 0.08), (73.61, 2.17), (65.65, 0.89), (41.94, 2.00)),
    "REOPOLD": ((95.09, 0.09), (73.98, 0.42), (62.13, 1.67), (41.39, 1.44)),
    "PW-OPSD Mild": ((95.44, 0.05), (73.98, 0.85), (67.59, 1.16), (45.28, 0.73)),
    "PW-OPSD Moderate": ((95.34, 0.10), (76.20, 0.58), (67.78, 1.27), (43.33, 1.21)),
    "PW-OPSD Sharp": ((95.36, 0.15), (75.19, 1.53), (68.80, 0.89), (44.26, 1.12)),
    "PW-OPSD Aggressive": ((95.53, 0.04), (75.19, 0.85), (67.59, 0.85), (45.37, 0.58)),
}


# ---------------------------------------------------------------------------------------------------------------
# Statistics of paired differences


def permutation_p(difference_P: np.ndarray, draws: int = 100_000, seed: int = 0) -> float:
    """Two-sided p-value of the mean difference if A and B were exchangeable within each problem (random signs).

    Exact for up to 16 problems; else from `draws` random sign patterns, the observed one counted in.
    """
    P = len(difference_P)
    observed = abs(difference_P.sum()) - 1e-9  # sums of the same numbers in another order may differ in the last bit
    if P <= 16:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=P)))
        return float((abs(signs @ difference_P) >= observed).mean())
    draw, hits = np.random.default_rng(seed), 0
    for size in [*[1000] * (draws // 1000), draws % 1000]:  # at once, to bound the memory
        hits += int((abs(draw.choice((-1.0, 1.0), (size, P)) @ difference_P) >= observed).sum())
    return (hits + 1) / (draws + 1)


def detectable_difference(difference_P: np.ndarray, power: float = 0.8, level: float = 0.05) -> float:
    """(z_{1-level/2} + z_power) * sd(d) / sqrt(P): the smallest true difference found with that power."""
    z = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
    return float(z * difference_P.std(ddof=1) / math.sqrt(len(difference_P)))


def flips(a_P: np.ndarray, b_P: np.ndarray) -> tuple[list[int], list[int]]:
    """Positions of the problems that went from under half of their samples right to at least half, and back."""
    return np.flatnonzero((a_P < 0.5) & (b_P >= 0.5)).tolist(), np.flatnonzero((a_P >= 0.5) & (b_P < 0.5)).tolist()


# ---------------------------------------------------------------------------------------------------------------
# Reading evaluations


def load_summary(source: str) -> dict:
    """The summary of a folder, a summary.json, or a samples.jsonl."""
    path = Path(source)
    if path.suffix == ".jsonl":
        return _grade(path)
    path = path / "summary.json" if path.is_dir() else path
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not {"metrics", "per_problem", "regime"} <= set(summary):
            raise ValueError("not a summary of evaluate.py")
    except OSError:
        raise InputError(
            f"{path}: no summary there (evaluate.py writes it; --grade_only does for old samples)"
        ) from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    return summary


def _grade(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path}: no such sample file")
    with SampleFile(path) as file:
        header, samples = file.header, list(file.samples.values())
    if header is None or not samples:
        raise InputError(f"{path}: no samples in it")
    problems = load_problems(header["benchmark"], need_solution=False)
    if benchmark_digest(problems) != header["benchmark_sha256"]:
        raise InputError(f"{path}: the benchmark {header['benchmark']} is not the one that was sampled")
    counts: dict[tuple[int, int], int] = {}
    for item in samples:
        counts[item.seed, item.problem] = counts.get((item.seed, item.problem), 0) + 1
    if len(set(counts.values())) > 1 or len(counts) != len(problems) * len({seed for seed, _ in counts}):
        raise InputError(f"{path}: some samples are missing; finish the evaluation first")
    grader = make_grader("auto", [problem.answer for problem in problems])
    summary = summarise(samples, problems, grader.match)
    grader.close()
    return {
        **summary, "benchmark": header["benchmark"], "num_samples": next(iter(counts.values())), "regime": header,
        "answers_sha256": benchmark_digest(problems, "answer"),
        "grader": {"name": grader.name, "version": grader.version, "asked": grader.asked, "stopped": grader.stopped},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Comparison of two


def check_comparable(a: dict, b: dict, metric: str) -> None:
    """Raise InputError where the two are not answers to the same question."""
    for name, where in (("benchmark_sha256", "regime"), ("answers_sha256", None), ("name", "grader")):
        left, right = (side[where][name] if where else side[name] for side in (a, b))
        if left != right:
            raise InputError(f"not comparable: {where + ' ' if where else ''}{name} is {left!r} and {right!r}")
    if metric != "avg" and a["num_samples"] != b["num_samples"]:
        raise InputError(f"not comparable: --metric {metric} with N {a['num_samples']} and {b['num_samples']}")


def other_settings(a: dict, b: dict) -> list[str]:
    """What of A's regime is another in B's, model and adapter aside."""
    ours = ("model", "model_sha256", "adapter", "adapter_sha256", "benchmark")
    return sorted(name for name, value in a["regime"].items() if name not in ours and b["regime"].get(name) != value)


def compare(a: dict, b: dict, metric: str = "avg") -> dict:
    """B minus A, in points of 100. Raises InputError where the two are not answers to the same question."""
    check_comparable(a, b, metric)
    a_P, b_P = (np.array(side["per_problem"][metric]).mean(axis=0) for side in (a, b))
    difference_P = 100 * (b_P - a_P)
    if len(difference_P) < 2:
        raise InputError("a comparison needs at least two problems")
    gained, lost = flips(a_P, b_P)
    return {
        "problems": len(difference_P), "a": 100 * a_P.mean(), "b": 100 * b_P.mean(), "difference": difference_P.mean(),
        "interval": bootstrap_interval(difference_P), "p": permutation_p(difference_P),
        "detectable": detectable_difference(difference_P),
        "gained": [(a["problems"][i], a_P[i], b_P[i]) for i in gained],
        "lost": [(a["problems"][i], a_P[i], b_P[i]) for i in lost],
        "other_settings": other_settings(a, b),
    }  # fmt: skip


def comparison_text(result: dict, metric: str) -> str:
    low, high = result["interval"]
    lines = [
        f"{metric}, {result['problems']} problems: A {result['a']:.2f}  B {result['b']:.2f}",
        f"B - A           {result['difference']:+.2f} points, 95 % [{low:+.2f}, {high:+.2f}] (bootstrap over problems)",
        f"p               {result['p']:.2g} (paired permutation, two-sided)",
        f"detectable      {result['detectable']:.2f} points: the smallest true difference found 4 times in 5",
    ]
    for name, word in (("gained", "to at least"), ("lost", "to under")):
        listed = ", ".join(f"{index} ({before:.0%} -> {after:.0%})" for index, before, after in result[name][:10])
        listed += f" and {len(result[name]) - 10} more" if len(result[name]) > 10 else ""
        lines.append(f"{name:15s} {len(result[name])} problems went {word} half right{': ' + listed if listed else ''}")
    if result["other_settings"]:
        lines.append(f"not the same    {', '.join(result['other_settings'])}")
    lines.append("Training seeds are not in this: one run a side says nothing about the method's spread between runs.")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Two rows of a study


def compare_seeds(left: list[str], right: list[str]) -> str:
    """Two rows, an evaluation a training seed, paired in the order given: Markdown, right minus left, a line a metric.

    Two intervals: t over training seeds; and over problems, of the mean over the training seeds given. Raises
    InputError where the evaluations differ in more than the model and its adapter.
    """
    if len(left) != len(right) or len(left) < 2:
        raise InputError(
            f"--left and --right: {len(left)} and {len(right)} evaluations, not pairs of two or more seeds"
        )
    if twice := {source for source in [*left, *right] if [*left, *right].count(source) > 1}:
        raise InputError(f"--left and --right: {', '.join(sorted(twice))} is named twice")
    sides = [[load_summary(source) for source in side] for side in (left, right)]
    for source, summary in zip([*left, *right][1:], [*sides[0], *sides[1]][1:], strict=True):
        check_comparable(sides[0][0], summary, "pass")
        different = other_settings(sides[0][0], summary) + ["seeds"] * (sides[0][0]["seeds"] != summary["seeds"])
        if different:
            raise InputError(f"{source}: evaluated otherwise than {left[0]}: {', '.join(different)}")
    body = []
    for metric in ("avg", "pass", "maj"):
        a_SP, b_SP = (100 * np.array([np.mean(s["per_problem"][metric], axis=0) for s in side]) for side in sides)
        over_seeds = paired_difference(*(dict(enumerate(x_SP.mean(axis=1).tolist())) for x_SP in (b_SP, a_SP)))
        intervals = ((over_seeds.low, over_seeds.high), bootstrap_interval((b_SP - a_SP).mean(axis=0)))
        means = [f"{a_SP.mean():.2f}", f"{b_SP.mean():.2f}", f"{over_seeds.mean:+.2f}"]
        body.append([metric, *means, *(f"[{low:+.2f}, {high:+.2f}]" for low, high in intervals)])
    seeds, problems = a_SP.shape
    over = [f"95 % over {seeds} training seeds (t)", f"95 % over {problems} problems (bootstrap)"]
    note = (
        "\nThe first interval says whether the method does it. The second holds the training runs fixed: what other "
        "problems\nlike these, and other samples, would do to their mean."
    )
    return "\n".join([*_table(["metric", "left %", "right %", "right - left", *over], body), note])


# ---------------------------------------------------------------------------------------------------------------
# Report


def method_name(summary: dict) -> str:
    """`base: MODEL` without an adapter; else the adapter's path, with the method of its run if that is known."""
    adapter = summary["regime"].get("adapter")
    if not adapter:
        return f"base: {summary['regime'].get('model')}"
    try:
        config = json.loads((Path(adapter).parent / "config.json").read_text(encoding="utf-8"))["config"]
        return f"{config['method']}: {adapter}"
    except (OSError, ValueError, KeyError, TypeError):
        return str(adapter)


def report(directory: str, metric: str = "avg") -> str:
    """Markdown: methods x benchmarks like the paper's Table 2, then the paper's own numbers in a table of their own."""
    paths = sorted(Path(directory).rglob("summary.json"))
    summaries = [load_summary(str(path)) for path in paths]
    if not summaries:
        raise InputError(f"--report {directory}: no summary.json under it")
    cells: dict[str, dict[str, str]] = {}
    for summary in summaries:
        if metric not in summary["metrics"]:
            raise InputError(f"--metric {metric}: choose one of {', '.join(summary['metrics'])}")
        value, column = summary["metrics"][metric], f"{Path(summary['benchmark']).stem} (N {summary['num_samples']})"
        low, high = (100 * end for end in value["interval"])
        spread = "" if value["std_over_seeds"] is None else f" ± {100 * value['std_over_seeds']:.2f}"
        row = cells.setdefault(method_name(summary), {})
        row[column] = f"{row[column]}; " if column in row else ""
        row[column] += f"{100 * value['mean']:.2f}{spread} [{low:.2f}, {high:.2f}]"
    if not any(name.startswith("base: ") for name in cells):
        cells["base: not evaluated"] = {}
    columns = sorted({column for row in cells.values() for column in row})
    names = sorted(cells, key=lambda name: (not name.startswith("base: "), name))
    ours = [[name, *(cells[name].get(column, "-") for column in columns)] for name in names]
    paper = [[name, *(_paper_cell(cell) for cell in row)] for name, row in PAPER.items()]
    return "\n".join([
        f"Ours: {metric} in %, mean ± sample std over evaluation seeds [95 % bootstrap interval over problems]\n",
        *_table(["method", *columns], ours),
        "\nThe paper's (Table 2, Qwen3-4B, Avg@12 in %, ± over 3 evaluation seeds of one run); not measured here\n",
        *_table(["method", *PAPER_BENCHMARKS], paper),
    ])  # fmt: skip


def _paper_cell(cell: tuple[float, float | None] | None) -> str:
    if cell is None:
        return "-"
    mean, spread = cell
    return f"{mean:.1f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    clean = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return [f"| {' | '.join(row)} |" for row in clean]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="*", metavar="A B", help="folders, summary.json or samples.jsonl files")
    for side in ("left", "right"):
        parser.add_argument(
            f"--{side}", nargs="+", metavar="RUN", help="one row's evaluations, in order of their seeds"
        )
    parser.add_argument("--metric", default="avg", help="avg, pass or maj (a report also takes the others)")
    parser.add_argument("--report", metavar="DIR", help="table of all summary.json files under DIR")
    args = parser.parse_args()
    if args.report:
        print(report(args.report, args.metric))
    elif args.left or args.right:
        print(compare_seeds(args.left or [], args.right or []))
    elif len(args.pair) != 2:
        raise InputError("give two evaluations to compare, --left and --right, or --report DIR")
    elif args.metric not in ("avg", "pass", "maj"):
        raise InputError(f"--metric {args.metric}: choose avg, pass or maj")
    else:
        a, b = map(load_summary, args.pair)
        print(comparison_text(compare(a, b, args.metric), args.metric))


if __name__ == "__main__":
    run_script(main)
