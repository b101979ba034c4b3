"""How often the grader errs on answers whose verdict is known: a benchmark's gold answers.

    python experiments/measure_grading.py --math DATA/math500.jsonl --words DATA/gsm8k_test_500.jsonl

Four measures: every gold of --math against itself (all right); all pairs of different golds (printed where they match,
to be read by a person); every gold of --words, a plain number, in twelve dresses (all right) and in as many near
misses (none right). The time counts from the first comparison.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from problems import load_problems
from runtime.flags import run_script
from runtime.grading import make_grader

DRESSES = [
    r"\$%s", r"%s\text{ dollars}", "%s apples", "x=%s", r"\mathbf{%s}", r"\displaystyle %s", r"\text{Total}=%s",
    "%s.", r"%s\,\text{cm}", r"%s^\circ", r"\frac{%s}{1}", "%s.0",
]  # fmt: skip
MISSES = [
    "%s or 12345", "%s, 12345", "x>%s", "about %s", "-%s", "%s.5", "%s0", "%s dozen", "%s_9", r"%s\pi",
    r"\frac{%s}{7}", "(%s, 1)",
]  # fmt: skip


def report(what: str, pairs: Iterable[tuple[str, str]], grader: object, show: bool) -> None:
    """One line of counts and time; with `show`, the pairs that match."""
    start, asked, stopped = time.perf_counter(), grader.asked, grader.stopped
    pairs = list(pairs)
    matches = [pair for pair in pairs if grader.match(*pair)]
    print(
        f"{what}: {len(matches)} of {len(pairs)} match, {grader.asked - asked} asked of {grader.name}, "
        f"{grader.stopped - stopped} stopped, {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    for pair in matches if show else set(pairs) - set(matches) if len(matches) < len(pairs) else ():
        print("  ", *pair, sep="   ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--math", required=True, help="JSONL whose answers are LaTeX")
    parser.add_argument("--words", required=True, help="JSONL whose answers are plain numbers")
    parser.add_argument("--grader", default="auto")
    flags = parser.parse_args()
    golds = [item.answer for item in load_problems(flags.math, need_solution=False)]
    numbers = [item.answer for item in load_problems(flags.words, need_solution=False)]
    grader = make_grader(flags.grader, golds)
    report("golds against themselves", [(gold, gold) for gold in golds], grader, show=False)
    report("in dresses", [(dress % gold, gold) for gold in numbers for dress in DRESSES], grader, show=False)
    report("near misses", [(miss % gold, gold) for gold in numbers for miss in MISSES], grader, show=True)
    different = list(itertools.combinations(sorted(set(golds)), 2))
    report("different golds", different, grader, show=True)
    grader.close()


if __name__ == "__main__":
    run_script(main)
