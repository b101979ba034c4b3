"""The study's answer: Markdown from the cells that experiments/study/run.py measured, and the statistics behind it.

All comparisons are paired: a row minus the baseline at the same seed, then mean and t interval over the seeds. A
difference counts as settled only after Holm's correction over all comparisons of its table.
"""

from dataclasses import dataclass, replace
from math import isclose, sqrt
from pathlib import Path
from statistics import mean, median, stdev

from errors import InputError
from experiments.study.grids import BEFORE, Grid

LEVEL, POWER = 0.05, 0.80
DECODINGS = ("sampled", "greedy")

# --- Statistics -------------------------------------------------------------------------------------------------


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


def family(pairs: dict[object, tuple[dict, dict]]) -> dict[object, Difference]:
    """The paired differences of a column or a table, settled where they stand after Holm's step-down correction over
    all of them; without those that have no two pairs."""
    found = {key: d for key, pair in pairs.items() if (d := paired_difference(*pair)) is not None}
    left = len(found)
    for key in sorted(found, key=lambda key: found[key].p):
        if found[key].p > LEVEL / left:
            break
        found[key], left = replace(found[key], settled=True), left - 1
    return found


def detectable(std: float, pairs: int) -> float:
    """The true difference that a paired t test at 5 % finds with 80 % chance: (t_.975 + t_.80) std / sqrt(n)."""
    t = scipy_stats().t
    return float(t.ppf(1 - LEVEL / 2, pairs - 1) + t.ppf(POWER, pairs - 1)) * std / sqrt(pairs)


# --- From cells to rows -----------------------------------------------------------------------------------------


BEHAVIOUR = ("repaired", "broken", "leaps", "leaps_sampled", "strays")
MEASURES = dict.fromkeys(DECODINGS, "evaluation") | dict.fromkeys(BEHAVIOUR, "behaviour")  # -> its part of a cell
STATED = 0.5  # below this share of the base's facts, repaired and broken say nothing
Rows = dict[str, list[dict]]  # a row's finished cells by its name; without those whose loss was not finite


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


def last_step(cells: list[dict]) -> int:
    return max((int(step) for cell in cells for step in cell["evaluation"]), default=0)


def after(cells: list[dict], measure: str, step: int | None = None) -> dict[int, float]:
    """A row's held-out values by seed, in percent, after so many steps (None: all of them); none where none was taken.

    Repaired and broken facts are against step 0, and want most of its facts stated again.
    """
    step = str(last_step(cells) if step is None else step)
    scored = [(cell["seed"], cell[MEASURES[measure]][step]) for cell in cells if step in cell["evaluation"]]
    if measure in ("repaired", "broken") and (step == "0" or any((v["stated"] or 0) < STATED for _, v in scored)):
        return {}
    return {seed: 100 * values[measure] for seed, values in scored if values.get(measure) is not None}


# --- Markdown ---------------------------------------------------------------------------------------------------


def write_report(grid: Grid, records: list[dict], output: Path) -> str:
    """Write OUTPUT/report.md and return its text. Raises InputError as `of_grid` does."""
    records = of_grid(grid, records)
    cells = {name: [cell for cell in records if cell["options"] == grid.options(name)] for name in grid.rows}
    rows = {name: [cell for cell in found if cell["error"] is None] for name, found in cells.items() if found}
    # The model before training, on the same problems and random numbers at each seed.
    start = [{**cell, "evaluation": {"0": cell["evaluation"]["0"]}} for found in rows.values() for cell in found]
    parts = [_header(grid, records, sum(map(len, cells.values()))), *_answer(grid, {BEFORE: start, **rows})]
    failed = [f"- {n}, seed {c['seed']}: {c['error']}" for n, found in cells.items() for c in found if c["error"]]
    parts += ["\n".join(["## Runs that stopped with a loss that was not finite", "", *failed])] if failed else []
    text = "\n\n".join(part for part in parts if part) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    return text


def _header(grid: Grid, records: list[dict], cells: int) -> str:
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


def _answer(grid: Grid, rows: Rows) -> list[str]:
    if grid.baseline not in rows:
        return ["The baseline has not been measured yet."]
    baseline = rows[grid.baseline]
    others = {name: cells for name, cells in rows.items() if name != grid.baseline}
    found = {d: family({n: (after(c, d), after(baseline, d)) for n, c in others.items()}) for d in DECODINGS}
    return [
        *(_verdict(f"{d.capitalize()} held-out accuracy after training", found[d], grid.baseline) for d in DECODINGS),
        _table(grid, rows, found),
        _contrasts(grid, rows),
        _along(grid, rows),
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


def _table(grid: Grid, rows: Rows, found: dict[str, dict[str, Difference]]) -> str:
    to, columns = f"to {grid.baseline}", ["repaired %", "broken %", "leaps %, greedy", "leaps %, sampled", "stray %"]
    body = []
    for name, cells in rows.items():
        body.append([name])
        for decoding in DECODINGS:
            body[-1] += [_mean_std(after(cells, decoding)), found[decoding].get(name, "-")]
        body[-1] += [_mean_std(after(cells, measure)) for measure in BEHAVIOUR]
    note = (
        "Held-out problems. Mean ± standard deviation over training seeds; difference [95 % interval] paired by seed; "
        "** settled after Holm's correction over the column. Intervals are over training seeds, on the same problems "
        "and from one base model; a sampled column's deviation is mostly that of one sample a problem. Repaired: facts "
        "wrong before and right after; broken: right before and wrong after; of greedy solutions, - where they state "
        "less than half of the facts of the base's. Leaps: solutions that take all that is left at once; stray: greedy "
        "solutions that add what is not in the sum, or leave some of it out without a leap."
    )
    return markdown(["row", "sampled %", to, "greedy %", to, *columns], body) + "\n\n" + note


def _contrasts(grid: Grid, rows: Rows) -> str:
    pairs = [(a, b) for a, b in grid.contrasts if a in rows and b in rows]
    columns = [family({(a, b): (after(rows[a], d), after(rows[b], d)) for a, b in pairs}) for d in DECODINGS]
    body = [[f"{a} - {b}", *(found.get((a, b), "-") for found in columns)] for a, b in pairs]
    return "## One thing changed at a time\n\n" + markdown(["contrast", *DECODINGS], body) if pairs else ""


def _along(grid: Grid, rows: Rows) -> str:
    """Where held-out problems were scored along the way: each row there, and its difference to the baseline."""
    steps = sorted({int(step) for cells in rows.values() for cell in cells for step in cell["evaluation"]} - {0})
    if len(steps) < 2:
        return ""
    rows = {name: cells for name, cells in rows.items() if last_step(cells)}
    parts, head = ["## Along training"], ["after steps", *map(str, steps)]
    note = "** settled after Holm's correction over this table, which is a family of its own."
    for d in DECODINGS:
        values = {(name, step): after(cells, d, step) for name, cells in rows.items() for step in steps}
        found = family({(n, s): (v, values[grid.baseline, s]) for (n, s), v in values.items() if n != grid.baseline})
        shown = {key: _mean_std(v) + (f", {found[key]}" if key in found else "") for key, v in values.items()}
        body = [[name, *(shown[name, step] for step in steps)] for name in rows]
        parts += [f"Held out, {d}, %, and the difference to {grid.baseline}; {note}", markdown(head, body)]
    body = [[name] for name in rows]
    for line, cells in zip(body, rows.values(), strict=True):
        for step in steps:
            measured = [list(after(cells, measure, step).values()) for measure in ("leaps", "strays", "repaired")]
            line.append(", ".join(f"{mean(values):.1f}" if values else "-" for values in measured))
    return "\n\n".join([*parts, "Leaps, strays and repaired facts, %, of greedy solutions.", markdown(head, body)])


def _mean_std(values: dict[int, float]) -> str:
    numbers = list(values.values())
    spread = f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.1f}{spread}" if numbers else "-"
