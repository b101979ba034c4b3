"""What evaluations can say about each other: right minus left, paired by problem and by training seed.

    python -m experiments.study.compare --left A --right B            is B better, and what could have been seen
    python -m experiments.study.compare --left A0 A1 --right B0 B1    two rows of a study, an evaluation a training seed

Takes folders of evaluate.py. Axes: P problems, S training seeds.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from errors import InputError, one_line
from experiments.study.report import detectable, markdown, paired_difference
from runtime.flags import run_script
from runtime.records import difference


def read_summary(folder: Path) -> dict:
    """summary.json of an evaluation; InputError where there is none that is whole."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        needed = {"regime", "inputs", "answers_sha256", "grader", "num_samples", "seeds", "per_problem"}
        if lacking := needed - summary.keys():
            raise ValueError(f"{min(lacking)} is missing")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: no evaluation with a whole summary.json ({one_line(error)})") from None
    return summary


def other_settings(a: dict, b: dict, source: str) -> list[str]:
    """What of A's regime is another in B's, model and adapter aside.

    Raises InputError, naming B's source, where the two are not answers to the same question.
    """
    asked, here = (
        {"benchmark": s["regime"]["benchmark_sha256"], "answers": s["answers_sha256"],
         "grader": s["grader"]["name"], "grader's version": s["grader"]["version"],
         "num_samples": s["num_samples"]} for s in (a, b)
    )  # fmt: skip
    if change := difference(asked, here):
        raise InputError(f"{source}: not comparable with the first ({change})")
    pinned = ("prompts", "server")  # the tokens, not a path; whether a server samples, not its address
    a_regime, b_regime = (s["regime"] | {name: s["inputs"].get(name) for name in pinned} for s in (a, b))
    ours = ("model", "adapter", "benchmark")
    different = [name for name, value in a_regime.items() if name not in ours and b_regime.get(name) != value]
    return sorted(different + ["seeds"] * (a["seeds"] != b["seeds"]))


def compare(left: list[str], right: list[str]) -> str:
    """Two rows, an evaluation a training seed, paired in the order given: Markdown, right minus left, a line a metric.

    Two t intervals: over training seeds; and over problems, of the mean over the training seeds given. Raises
    InputError for what cannot be paired, and where rows of several differ in more than the model and its adapter.
    """
    if len(left) != len(right):
        raise InputError(f"--left and --right: {len(left)} and {len(right)} evaluations, which are no pairs")
    sources = [*left, *right]
    paths = [Path(source).resolve() for source in sources]
    if twice := sorted({source for source, path in zip(sources, paths, strict=True) if paths.count(path) > 1}):
        raise InputError(f"--left and --right: {', '.join(twice)} is named twice")
    summaries = [read_summary(path) for path in paths]
    for source, summary in zip(sources[1:], summaries[1:], strict=True):
        different = other_settings(summaries[0], summary, source)
        if different and len(left) > 1:
            raise InputError(f"{source}: evaluated otherwise than {left[0]}: {', '.join(different)}")
    sides, body = (summaries[: len(left)], summaries[len(left) :]), []
    for metric in ("avg", "pass", "maj"):
        a_SP, b_SP = (100 * np.array([np.mean(s["per_problem"][metric], axis=0) for s in side]) for side in sides)
        intervals = []
        for axis in (1, 0):
            a, b = (dict(enumerate(x_SP.mean(axis=axis).tolist())) for x_SP in (a_SP, b_SP))
            d = paired_difference(b, a)
            intervals.append(f"[{d.low:+.2f}, {d.high:+.2f}] {detectable(d.std, d.pairs):.2f}" if d and d.std else "-")
        body.append([metric, f"{a_SP.mean():.2f}", f"{b_SP.mean():.2f}", f"{(b_SP - a_SP).mean():+.2f}", *intervals])
    seeds, problems = a_SP.shape
    over = [f"95 % over {seeds} training seeds", f"95 % over {problems} problems"]
    note = (
        "\nPaired t intervals, and behind each the smallest true difference that is found 4 times in 5. The first says "
        "whether the\nmethod does it. The second holds the training runs fixed: what other problems like these, and "
        "other samples, would\ndo to their mean."
    )
    if different:
        note += f"\nNot evaluated alike: {', '.join(different)}."
    return "\n".join([markdown(["metric", "left %", "right %", "right - left", *over], body), note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in ("left", "right"):
        parser.add_argument(f"--{side}", nargs="+", required=True, metavar="RUN", help="in the order of their seeds")
    args = parser.parse_args()
    print(compare(args.left, args.right))


if __name__ == "__main__":
    run_script(main)
