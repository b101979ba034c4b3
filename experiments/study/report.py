"""The study's answer: Markdown from the cells that experiments/study/run.py measured, and the statistics behind it.

All comparisons are paired: a row minus the baseline at the same seed, then mean and t interval over the seeds. A
difference counts as settled only after Holm's correction over all comparisons of its table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import isclose, sqrt
from pathlib import Path
from statistics import mean, median, stdev

from errors import InputError
from experiments.study.grids import BEFORE, Grid

LEVEL, POWER = 0.05, 0.80
DECODINGS = ("sampled", "greedy")
SEGMENTS = 5  # points of a learning curve in the report

# ---------------------------------------------------------------------------------------------------------------
# Statistics


def scipy_stats():
    try:
        import scipy.stats
    except ImportError:
        raise InputError("the study's statistics need scipy: pip install scipy") from None
    return scipy.stats


@dataclass(frozen=True)
class Difference:
    """A paired difference with its 95 % t interval and two-sided p; `settled` is up to `holm`."""

    pairs: int
    mean: float
    std: float
    low: float
    high: float
    p: float
    settled: bool = False

    def __str__(self) -> str:
        text = f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"
        return f"**{text}**" if self.settled else text


def paired_difference(left: dict[int, float], right: dict[int, float]) -> Difference | None:
    """left - right over the keys (seeds, problems) that both have; None for fewer than two."""
    differences = [left[key] - right[key] for key in sorted(left.keys() & right.keys())]
    if len(differences) < 2:
        return None
    n, centre, spread = len(differences), mean(differences), stdev(differences)
    if isclose(spread, 0.0, abs_tol=1e-12):  # scores come in steps: equal differences are no certainty
        return Difference(n, centre, 0.0, centre, centre, 1.0)
    test = scipy_stats().ttest_1samp(differences, 0.0)
    return Difference(n, centre, spread, *map(float, test.confidence_interval(1 - LEVEL)), float(test.pvalue))


def holm(differences: dict[object, Difference]) -> dict[object, Difference]:
    """The same, those settled that stand at LEVEL after Holm's step-down correction over all of them."""
    found, left = dict(differences), len(differences)
    for key in sorted(found, key=lambda key: found[key].p):
        if found[key].p > LEVEL / left:
            break
        found[key], left = replace(found[key], settled=True), left - 1
    return found


def family(pairs: dict[object, tuple[dict, dict]]) -> dict[object, Difference]:
    """The paired differences of a column or a table, corrected for their number, without those not measured twice."""
    return holm({key: d for key, pair in pairs.items() if (d := paired_difference(*pair)) is not None})


def detectable(std: float, pairs: int) -> float:
    """The true difference that a paired t test at 5 % finds with 80 % chance: (t_.975 + t_.80) std / sqrt(n)."""
    t = scipy_stats().t
    return float(t.ppf(1 - LEVEL / 2, pairs - 1) + t.ppf(POWER, pairs - 1)) * std / sqrt(pairs)


# ---------------------------------------------------------------------------------------------------------------
# From cells to rows


@dataclass(frozen=True)
class Row:
    """A row's cells, in percent; a run whose loss was not finite has none."""

    name: str
    at: dict[int, dict[str, dict[int, float]]]  # steps -> measure (MEASURES) -> seed -> value
    curve: list[float]  # rollout accuracy in SEGMENTS equal parts of training, mean over seeds
    errors: list[str]

    def after(self, measure: str, steps: int | None = None) -> dict[int, float]:
        """Held-out values by seed, after so many steps (None: all of them)."""
        return self.at.get(max(self.at, default=0) if steps is None else steps, {}).get(measure, {})


BEHAVIOUR = ("repaired", "broken", "leaps", "leaps_sampled", "strays")
MEASURES = dict.fromkeys(DECODINGS, "evaluation") | dict.fromkeys(BEHAVIOUR, "behaviour")  # -> its part of a cell
STATED = 0.5  # below this share of the base's facts, repaired and broken say nothing


def of_grid(grid: Grid, records: list[dict]) -> list[dict]:
    """The records of a grid's rows and seeds. Raises InputError where there is none, or they are of several models."""
    options = [grid.options(name) for name in grid.rows]
    found = [record for record in records if record["seed"] in grid.seeds and record["options"] in options]
    if not found:
        raise InputError("no cell of this grid has been measured there; --grid names another one")
    models = sorted({record["model_id"] for record in found})
    if len(models) > 1:
        raise InputError(f"cells of several models cannot be compared: {', '.join(models)}")
    return found


def collect(name: str, cells: list[dict]) -> Row:
    """A row from its cells."""
    whole = [cell for cell in cells if cell["error"] is None]

    def percent(step: str, measure: str) -> dict[int, float]:
        values = {cell["seed"]: cell[MEASURES[measure]][step].get(measure) for cell in whole}
        if measure in ("repaired", "broken") and any((c["behaviour"][step]["stated"] or 0) < STATED for c in whole):
            return {}
        return {seed: 100 * value for seed, value in values.items() if value is not None}

    steps = list(whole[0]["evaluation"]) if whole else []
    return Row(
        name,
        {int(step): {measure: percent(step, measure) for measure in MEASURES} for step in steps},
        [100 * mean(values) for values in zip(*(segments(cell["accuracy"]) for cell in whole), strict=True)],
        [f"seed {cell['seed']}: {cell['error']}" for cell in cells if cell["error"] is not None],
    )


def untrained(rows: list[Row]) -> Row:
    """The model before training, as a row of its own: the same problems and random numbers at each seed."""
    kept = [measure for measure in MEASURES if measure not in ("repaired", "broken")]
    start = {measure: {s: v for row in rows for s, v in row.after(measure, 0).items()} for measure in kept}
    return Row(BEFORE, {0: start}, [], [])


def segments(values: list[float]) -> list[float]:
    """Means over SEGMENTS parts of about equal length (over each value where there are fewer)."""
    parts = min(SEGMENTS, len(values))
    bounds = [round(i * len(values) / parts) for i in range(parts + 1)]
    return [mean(values[start:end]) for start, end in pairwise(bounds)]


# ---------------------------------------------------------------------------------------------------------------
# Markdown


def write_report(grid: Grid, records: list[dict], output: Path) -> str:
    """Write OUTPUT/report.md and return its text. Raises InputError as `of_grid` does."""
    records = of_grid(grid, records)
    rows = [collect(name, [c for c in records if c["options"] == grid.options(name)]) for name in grid.rows]
    rows = [row for row in rows if row.at or row.errors]
    parts = [_header(grid, records, rows), *_answer(grid, [untrained(rows), *rows])]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    return text


def _header(grid: Grid, records: list[dict], rows: list[Row]) -> str:
    cells = sum(len(row.after("sampled")) + len(row.errors) for row in rows)
    first, seeds = records[0], ", ".join(map(str, grid.seeds))
    commits = ", ".join(sorted({str(record["git_commit"])[:10] for record in records}))
    common = " ".join(f"--{name} {value}" for name, value in grid.common.items())
    machines = "; ".join(sorted({record["machine"] for record in records}))
    seconds = [record["seconds"] for record in records]
    return (
        f"# The controlled study\n\n{cells} of {len(grid.rows) * len(grid.seeds)} cells: {len(grid.rows)} rows, seeds "
        f"{seeds}. `train.py {common}`. Model {first['model_id']}, commit {commits}, torch "
        f"{first['versions']['torch']}, transformers {first['versions']['transformers']}, on {machines}. "
        f"{sum(seconds) / 60:.0f} minutes summed over the cells, {median(seconds):.0f} s a cell (median)."
    )


def _answer(grid: Grid, rows: list[Row]) -> list[str]:
    baseline = next((row for row in rows if row.name == grid.baseline), None)
    if baseline is None:
        return ["The baseline has not been measured yet.", _curves(rows)]
    others = [row for row in rows if row is not baseline]
    found = {d: family({row.name: (row.after(d), baseline.after(d)) for row in others}) for d in DECODINGS}
    return [
        *(_verdict(f"{d.capitalize()} held-out accuracy after training", found[d], grid.baseline) for d in DECODINGS),
        _table(grid, rows, found),
        _contrasts(grid, rows),
        _along(rows, baseline),
        _curves(rows),
        _failures(rows),
    ]


def _verdict(what: str, found: dict[str, Difference], baseline: str) -> str:
    """What is settled, what only leans, what is noise, and what could have been seen."""
    if not found:
        return f"**{what}**: no row has two seeds in common with {baseline} yet."
    groups = {"settled": [], "leaning": [], "noise": []}
    for name, d in sorted(found.items(), key=lambda item: (item[1].mean, item[0])):
        groups["settled" if d.settled else "leaning" if d.p < LEVEL else "noise"].append(f"{name} {d.mean:+.1f}")
    settled, leaning, noise = ("; ".join(names) or "none" for names in groups.values())
    typical, pairs = median(d.std for d in found.values()), max(d.pairs for d in found.values())
    return (
        f"**{what}, difference to {baseline} in points.** Settled (5 %, Holm over {len(found)} rows): {settled}. "
        f"Leaning (the row's own interval leaves out 0, the correction does not): {leaning}. "
        f"Not separable from noise: {noise}. With {pairs} seeds and a standard deviation of "
        f"{typical:.2f} (the median row's, of the paired differences), one comparison finds a true difference of "
        f"{detectable(typical, pairs):.1f} points with 80 % chance; smaller ones stay undecided here."
    )


def markdown(head: list[str], body: list[list[object]]) -> str:
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [head, ["---"] * len(head), *body])


def _table(grid: Grid, rows: list[Row], found: dict[str, dict[str, Difference]]) -> str:
    head = ["row"]
    for decoding in DECODINGS:
        head += [f"{decoding} %", f"to {grid.baseline}"]
    head += ["repaired %", "broken %", "leaps %, greedy", "leaps %, sampled", "stray %"]
    body = []
    for row in rows:
        body.append([row.name])
        for decoding in DECODINGS:
            body[-1] += [_mean_std(row.after(decoding)), found[decoding].get(row.name, "-")]
        body[-1] += [_mean_std(row.after(measure)) for measure in BEHAVIOUR]
    note = (
        "Held-out problems. Mean ± standard deviation over training seeds; difference [95 % interval] paired by seed; "
        "** settled after Holm's correction over the column. Intervals are over training seeds, on the same problems "
        "and from one base model; a sampled column's deviation is mostly that of one sample a problem. Repaired: facts "
        "wrong before and right after; broken: right before and wrong after; of greedy solutions, - where they state "
        "less than half of the facts of the base's. Leaps: solutions that take all that is left at once; stray: greedy "
        "solutions that add what is not in the sum, or leave some of it out without a leap."
    )
    return markdown(head, body) + "\n\n" + note


def _contrasts(grid: Grid, rows: list[Row]) -> str:
    by_name = {row.name: row for row in rows}
    pairs = [(by_name[a], by_name[b]) for a, b in grid.contrasts if a in by_name and b in by_name]
    if not pairs:
        return ""
    columns = [family({(a.name, b.name): (a.after(d), b.after(d)) for a, b in pairs}) for d in DECODINGS]
    body = [[f"{a.name} - {b.name}", *(found.get((a.name, b.name), "-") for found in columns)] for a, b in pairs]
    return "## One thing changed at a time\n\n" + markdown(["contrast", *DECODINGS], body)


def _along(rows: list[Row], baseline: Row) -> str:
    """Where held-out problems were scored along the way: each row there, and its difference to the baseline."""
    steps = sorted({step for row in rows for step in row.at if step > 0})
    if len(steps) < 2:
        return ""
    trained, head = [row for row in rows if max(row.at, default=0)], ["after steps", *map(str, steps)]
    parts = ["## Along training"]
    for d in DECODINGS:
        places = [(row, step) for row in trained for step in steps if row is not baseline]
        found = family({(row.name, step): (row.after(d, step), baseline.after(d, step)) for row, step in places})
        body = [[row.name] for row in trained]
        for cells, row in zip(body, trained, strict=True):
            for step in steps:
                difference = found.get((row.name, step))
                cells.append(_mean_std(row.after(d, step)) + (f", {difference}" if difference else ""))
        note = "** settled after Holm's correction over this table, which is a family of its own."
        parts += [f"Held out, {d}, %, and the difference to {baseline.name}; {note}", markdown(head, body)]

    def shown(row: Row, step: int) -> str:
        values = [row.after(name, step).values() for name in ("leaps", "strays", "repaired")]
        return ", ".join(f"{mean(found):.1f}" if found else "-" for found in values)

    body = [[row.name, *(shown(row, step) for step in steps)] for row in trained]
    return "\n\n".join([*parts, "Leaps, strays and repaired facts, %, of greedy solutions.", markdown(head, body)])


def _curves(rows: list[Row]) -> str:
    width = max((len(row.curve) for row in rows), default=0)
    if not width:
        return ""
    head = ["row", *(f"{100 * i // width}-{100 * (i + 1) // width} %" for i in range(width))]
    body = [[row.name, *(f"{value:.1f}" for value in row.curve)] for row in rows if row.curve]
    note = "Rollout accuracy, %, by part of training, mean over seeds."
    return "\n\n".join(["## Learning curves", note, markdown(head, body)])


def _failures(rows: list[Row]) -> str:
    failed = [f"- {row.name}, {error}" for row in rows for error in row.errors]
    return "\n".join(["## Runs that stopped with a loss that was not finite", "", *failed]) if failed else ""


def _mean_std(values: dict[int, float]) -> str:
    numbers = list(values.values())
    if len(numbers) < 2:
        return f"{numbers[0]:.1f}" if numbers else "-"
    return f"{mean(numbers):.1f} ± {stdev(numbers):.1f}"
