"""The study's answer: Markdown from the cells that experiments/study/run.py measured, and the statistics behind it.

All comparisons are paired: a row minus the baseline at the same seed, then mean and t interval over the seeds. A
difference counts as settled only after Holm's correction over all comparisons of its table.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import isclose, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

from errors import InputError

if TYPE_CHECKING:
    from experiments.study.grids import Grid

LEVEL, POWER = 0.05, 0.80
DECODINGS = ("sampled", "greedy")
BEFORE = "before training"  # the row of the untrained model; a contrast may name it
SEGMENTS = 5  # points of a learning curve in the report


# ---------------------------------------------------------------------------------------------------------------
# Statistics


def student_t():
    """scipy.stats.t, Student's distribution."""
    try:
        from scipy.stats import t
    except ImportError:
        raise InputError("the study's statistics need scipy: pip install scipy") from None
    return t


def t_two_sided_p(t: float, df: int) -> float:
    """Pr(|T| >= t) for Student's T."""
    return float(2.0 * student_t().sf(abs(t), df))


def t_quantile(two_sided_p: float, df: int) -> float:
    """The t whose two-sided p value is the one given."""
    return float(student_t().isf(two_sided_p / 2.0, df))


@dataclass(frozen=True)
class Difference:
    """A paired difference over seeds; `half` is half the width of its 95 % t interval."""

    pairs: int
    mean: float
    std: float
    half: float
    p: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def paired_difference(left: dict[int, float], right: dict[int, float]) -> Difference | None:
    """left - right over the seeds that both have; None for fewer than two."""
    differences = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    n = len(differences)
    if n < 2:
        return None
    centre, spread = mean(differences), stdev(differences)
    if isclose(spread, 0.0, abs_tol=1e-12):
        return Difference(n, centre, 0.0, 0.0, 1.0)  # scores come in steps: equal differences are no certainty
    error = spread / sqrt(n)
    return Difference(n, centre, spread, t_quantile(LEVEL, n - 1) * error, t_two_sided_p(centre / error, n - 1))


def holm(differences: dict[str, Difference | None]) -> set[str]:
    """The differences from 0 that stand at LEVEL after Holm's step-down correction over all that could be measured."""
    p_values = {name: d.p for name, d in differences.items() if d is not None}
    rejected: set[str] = set()
    for name in sorted(p_values, key=p_values.get):
        if p_values[name] > LEVEL / (len(p_values) - len(rejected)):
            break
        rejected.add(name)
    return rejected


def detectable(std: float, pairs: int) -> float:
    """The true difference that a paired t test at 5 % finds with 80 % chance: (t_.975 + t_.80) std / sqrt(n)."""
    df = pairs - 1
    return (t_quantile(LEVEL, df) + t_quantile(2 * (1 - POWER), df)) * std / sqrt(pairs)


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


def collect(grid: Grid, records: list[dict]) -> list[Row]:
    """The grid's rows, in its order; records of other options and seeds are left out."""
    found = of_grid(grid, records)
    return [_row(name, [cell for cell in found if cell["options"] == grid.options(name)]) for name in grid.rows]


def _row(name: str, cells: list[dict]) -> Row:
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
    rows = [row for row in collect(grid, records) if row.at or row.errors]
    rows.insert(0, untrained(rows))
    text = "\n\n".join(part for part in (_header(grid, records, rows), *_answer(grid, rows)) if part) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    return text


def _header(grid: Grid, records: list[dict], rows: list[Row]) -> str:
    cells = sum(len(row.after("sampled")) + len(row.errors) for row in rows[1:])
    first, seeds = records[0], ", ".join(map(str, grid.seeds))
    commits = ", ".join(sorted({str(record["git_commit"])[:10] for record in records}))
    common = " ".join(f"--{name} {value}" for name, value in grid.common.items())
    machines = "; ".join(sorted({record["machine"] for record in records}))
    seconds = [record["seconds"] for record in records]
    facts = [
        f"{cells} of {len(grid.rows) * len(grid.seeds)} cells: {len(grid.rows)} rows, seeds {seeds}.",
        f"`train.py {common}`.",
        f"Model {first['model_id']}, commit {commits}, torch {first['versions']['torch']},",
        f"transformers {first['versions']['transformers']}, on {machines}.",
        f"{sum(seconds) / 60:.0f} minutes summed over the cells, {median(seconds):.0f} s a cell (median).",
    ]
    return "# The controlled study\n\n" + " ".join(facts)


def _answer(grid: Grid, rows: list[Row]) -> list[str]:
    baseline = next((row for row in rows if row.name == grid.baseline), None)
    if baseline is None:
        return ["The baseline has not been measured yet.", _curves(rows)]
    others = [row for row in rows if row is not baseline]
    sampled, greedy = (
        {row.name: paired_difference(row.after(decoding), baseline.after(decoding)) for row in others}
        for decoding in DECODINGS
    )
    settled = holm(sampled), holm(greedy)
    return [
        _verdict("sampled held-out accuracy after training", sampled, settled[0], grid.baseline),
        _verdict("greedy held-out accuracy after training", greedy, settled[1], grid.baseline),
        _table(grid, rows, sampled, greedy, settled),
        _contrasts(grid, rows),
        _along(rows, baseline),
        _curves(rows),
        _failures(rows),
    ]


def _verdict(what: str, differences: dict[str, Difference | None], settled: set[str], baseline: str) -> str:
    """What is settled, what only leans, what is noise, and what could have been seen."""
    known = {name: d for name, d in differences.items() if d is not None}
    if not known:
        return f"**{what.capitalize()}**: no row has two seeds in common with {baseline} yet."
    leaning = {name for name, d in known.items() if name not in settled and d.p < LEVEL}
    noise = known.keys() - settled - leaning
    typical = median(d.std for d in known.values())
    pairs = max(d.pairs for d in known.values())

    def listed(names: set[str] | dict) -> str:
        ordered = sorted(names, key=lambda name: (known[name].mean, name))
        return "; ".join(f"{name} {known[name].mean:+.1f}" for name in ordered) or "none"

    return (
        f"**{what.capitalize()}, difference to {baseline} in points.** Settled (5 %, Holm over {len(known)} rows): "
        f"{listed(settled)}. Leaning (the row's own interval leaves out 0, the correction does not): "
        f"{listed(leaning)}. Not separable from noise: {listed(noise)}. With {pairs} seeds and a standard deviation of "
        f"{typical:.2f} (the median row's, of the paired differences), one comparison finds a true difference of "
        f"{detectable(typical, pairs):.1f} points with 80 % chance; smaller ones stay undecided here."
    )


def _markdown(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def _table(grid: Grid, rows: list[Row], sampled: dict, greedy: dict, settled: tuple[set[str], set[str]]) -> str:
    to = f"to {grid.baseline}"
    body = []
    for row in rows:
        cells = [row.name]
        for decoding, differences, sure in zip(DECODINGS, (sampled, greedy), settled, strict=True):
            cells += [_mean_std(row.after(decoding)), _interval(differences.get(row.name), row.name in sure)]
        body.append([*cells, *(_mean_std(row.after(measure)) for measure in BEHAVIOUR)])
    note = (
        "Held-out problems. Mean ± standard deviation over training seeds; difference [95 % interval] paired by seed; "
        "** settled after Holm's correction over the column. Intervals are over training seeds, on the same problems "
        "and from one base model; a sampled column's deviation is mostly that of one sample a problem. Repaired: facts "
        "wrong before and right after; broken: right before and wrong after; of greedy solutions, - where they state "
        "less than half of the facts of the base's. Leaps: solutions that take all that is left at once; stray: greedy "
        "solutions that add what is not in the sum, or leave some of it out without a leap."
    )
    columns = ["repaired %", "broken %", "leaps %, greedy", "leaps %, sampled", "stray %"]
    head = ["row", "sampled %", to, "greedy %", to, *columns]
    return _markdown(head, body) + "\n\n" + note


def _contrasts(grid: Grid, rows: list[Row]) -> str:
    by_name = {row.name: row for row in rows}
    pairs = [(by_name[a], by_name[b]) for a, b in grid.contrasts if a in by_name and b in by_name]
    if not pairs:
        return ""
    columns = []
    for decoding in DECODINGS:
        found = {f"{a.name} - {b.name}": paired_difference(a.after(decoding), b.after(decoding)) for a, b in pairs}
        settled = holm(found)
        columns.append({name: _interval(difference, name in settled) for name, difference in found.items()})
    body = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return "## One thing changed at a time\n\n" + _markdown(["contrast", *DECODINGS], body)


def _along(rows: list[Row], baseline: Row) -> str:
    """Where held-out problems were scored along the way: each row there, and its difference to the baseline."""
    steps = sorted({step for row in rows for step in row.at if step > 0})
    if len(steps) < 2:
        return ""
    trained, head = [row for row in rows if max(row.at, default=0)], ["after steps", *map(str, steps)]
    tables = []
    for decoding in DECODINGS:
        found = {
            (row.name, step): paired_difference(row.after(decoding, step), baseline.after(decoding, step))
            for row in trained
            for step in steps
            if row is not baseline
        }
        settled = holm(found)

        def cell(row: Row, step: int, decoding=decoding, found=found, settled=settled) -> str:
            place = (row.name, step)
            difference = f", {_interval(found[place], place in settled)}" if found.get(place) else ""
            return _mean_std(row.after(decoding, step)) + difference

        tables.append(
            f"Held out, {decoding}, %, and the difference to {baseline.name}; ** settled after Holm's correction over "
            "this table, which is a family of its own."
        )
        tables.append(_markdown(head, [[row.name, *(cell(row, step) for step in steps)] for row in trained]))
    tables.append("Leaps, strays and repaired facts, %, of greedy solutions.")
    shown = ("leaps", "strays", "repaired")
    body = [
        [row.name, *(", ".join(_mean(row.after(name, step)) for name in shown) for step in steps)] for row in trained
    ]
    return "\n\n".join(["## Along training", *tables, _markdown(head, body)])


def _curves(rows: list[Row]) -> str:
    width = max((len(row.curve) for row in rows), default=0)
    if not width:
        return ""
    head = ["row", *(f"{100 * i // width}-{100 * (i + 1) // width} %" for i in range(width))]
    body = [[row.name, *(f"{value:.1f}" for value in row.curve)] for row in rows if row.curve]
    note = "Rollout accuracy, %, by part of training, mean over seeds."
    return "\n\n".join(["## Learning curves", note, _markdown(head, body)])


def _failures(rows: list[Row]) -> str:
    failed = [f"- {row.name}, {error}" for row in rows for error in row.errors]
    return "\n".join(["## Runs that stopped with a loss that was not finite", "", *failed]) if failed else ""


def _mean(values: dict[int, float]) -> str:
    return f"{mean(values.values()):.1f}" if values else "-"


def _mean_std(values: dict[int, float]) -> str:
    numbers = list(values.values())
    if len(numbers) < 2:
        return f"{numbers[0]:.1f}" if numbers else "-"
    return f"{mean(numbers):.1f} ± {stdev(numbers):.1f}"


def _interval(difference: Difference | None, settled: bool) -> str:
    if difference is None:
        return "-"
    text = f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
    return f"**{text}**" if settled else text
