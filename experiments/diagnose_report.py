"""What a run of diagnose.py says: controls, competing scores and the null beside Table 1, Figure 1, a fitted schedule.

    python -m experiments.diagnose_report runs/diagnose-tiny
    python -m experiments.diagnose_report RUN RUN --output_dir runs/diagnose-report       runs side by side

Each run's folder gets controls.json (all numbers) and schedule.json (`train.py --schedule`); --output_dir, by default
the folder of a single run, gets report.md and Figure 1. Needs `pip install matplotlib` for the figure alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from errors import InputError
from experiments.diagnose_controls import REMAINING, analyse
from experiments.diagnose_figure import figure
from runtime.flags import run_script
from runtime.records import make_folder, write_atomically
from viability import ARMS, POSITION, Candidates, LabelRule, by_spine

# ---------------------------------------------------------------------------------------------------------------
# In a table


def number(value: float | None, bounds: list[float] | None = None, signed: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def cell(entry: dict | None, key: str = "mean", signed: bool = False) -> str:
    return number(entry[key], entry["interval"], signed) if entry else "-"


def column(result: dict) -> dict[str, str]:
    """One run's numbers with their 95 % intervals, by the name of their row."""

    def counts(labels: dict[str, int]) -> str:
        return " / ".join(str(labels[name]) for name in ("real-uncertain", "diversity", "gray"))

    rows = {
        "problems, candidates": f"{result['problems']}, {result['candidates']}",
        "real-uncertain / diversity / gray": counts(result["labels"]),
    }
    rows |= {f"AUROC of {name}": cell(row, "auroc") for name, row in result["table1"].items()}
    rows[f"- of {POSITION}, re-oriented"] = "-"
    if position := result["table1"][POSITION]:
        low, high = position["interval_reoriented"]
        rows[f"- of {POSITION}, re-oriented"] = f"[{low:.2f}, {high:.2f}]"
    rows[f"- of {POSITION} if teacher = student (null)"] = number(result["null"]["auroc"], result["null"]["range"])
    for rival, gap in result["position_minus"].items():
        rows[f"- of {POSITION} minus {rival}"] = cell(gap, "difference", signed=True)
    rows |= {f"viability, {arm}": cell(result["arms"][arm]["viability"]["all"]) for arm in ARMS}
    for arm in ARMS[1:]:
        for part, what in (("all", ""), ("early", ", early (r < 0.5)"), ("late", ", late")):
            rows[f"- teacher minus {arm}{what}"] = cell(result["arms"][arm]["teacher_minus_arm"][part], signed=True)
    for arm in ARMS[1:]:
        rows[f"labels of the {arm} arm"] = counts(result["arms"][arm]["labels"])
        rows[f"- AUROC of {POSITION} on the {arm} arm's labels"] = cell(result["arms"][arm]["position"], "auroc")
    for arm, fit in result["schedule"].items():
        for name in ("w_min", "tau", "s"):
            edge = ", at the edge of the grid" if name in fit["at_the_edge"] else ""
            rows[f"Eq. (5) fitted to {arm}, {name}"] = number(fit[name], fit["intervals"][name]) + edge
    return rows


def table(results: dict[str, dict]) -> list[str]:
    """Markdown, a column for each run."""
    columns = [column(result) for result in results.values()]
    head = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    return head + [f"| {name} | " + " | ".join(entry[name] for entry in columns) + " |" for name in columns[0]]


# ---------------------------------------------------------------------------------------------------------------
# In words


def verdict(result: dict) -> str:
    """What the evidence supports, in sentences that follow from the intervals alone."""
    position, arms = result["table1"][POSITION], result["arms"]
    if position is None:
        return "One class has no candidate: this run says nothing about any score."
    low, high = position["interval"]
    if low > 0.5:
        found = "Early candidates are real-uncertain more often than late ones"
    elif high < 0.5:
        found = "Late candidates are real-uncertain more often than early ones"
    else:
        found = "Position does not separate the classes"
    sentences = [f"{found} (AUROC {cell(position, 'auroc')}).", *_against_the_null(result)]
    for arm, what in (("unforced", "no token was forced"), ("student", "the student's own tokens were forced")):
        gap = arms[arm]["position_teacher_minus_arm"]
        if gap is None:
            sentences.append(f"Where {what}, one class has no candidate, so position cannot be compared.")
        elif gap["interval"][0] <= 0.0 <= gap["interval"][1]:
            shown = cell(gap, "difference", True)
            sentences.append(f"Where {what}, position separates as well, as far as can be told ({shown}).")
        else:
            word, shown = "worse" if gap["difference"] > 0.0 else "better", cell(gap, "difference", True)
            sentences.append(f"Where {what}, position separates {word} (AUROC difference {shown}).")
    for arm, what in (("unforced", "going on unforced"), ("student", "forcing the student's own tokens")):
        parts = arms[arm]["teacher_minus_arm"]
        effects = [f"{part} {_effect(parts[part])}" for part in ("early", "late")]
        sentences.append(f"Against {what}, the teacher's tokens {_effect(parts['all'])}; {', '.join(effects)}.")
    rival = result["position_minus"][REMAINING]
    if rival["interval"][0] <= 0.0 <= rival["interval"][1]:
        sentences.append("Position cannot be told from remaining length.")
    else:
        word = "beats" if rival["difference"] > 0.0 else "loses to"
        sentences.append(f"Position {word} remaining length (difference {cell(rival, 'difference', True)}).")
    return " ".join(sentences)


def _against_the_null(result: dict) -> list[str]:
    position, null = result["table1"][POSITION]["auroc"], result["null"]["range"]
    if null is None:
        return []
    if null[0] <= position <= null[1]:
        return ["A teacher that is just the student would give as much: the AUROC lies inside the null's range."]
    side = "above" if position > null[1] else "below"
    return [f"The AUROC lies {side} the range of a teacher that is just the student."]


def _effect(paired: dict | None) -> str:
    if paired is None:
        return "no candidate"
    low, high = paired["interval"]
    word = "hurt" if high < 0.0 else "help" if low > 0.0 else "have no effect that can be shown"
    return f"{word} ({cell(paired, signed=True)})"


# ---------------------------------------------------------------------------------------------------------------


def analyse_run(run: Path) -> dict[str, tuple[Candidates, dict]]:
    """Analyses of a run folder, by kind of spine, written there as controls.json and schedule.json."""
    try:
        rows = [json.loads(line) for line in (run / "F_labels.jsonl").read_text(encoding="utf-8").splitlines()]
        rule = LabelRule(**json.loads((run / "table1.json").read_text(encoding="utf-8"))["rule"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run}: no finished run of diagnose.py ({type(error).__name__}: {error})") from None
    if not rows:
        raise InputError(f"{run}: its run found no candidate")
    analyses = {name: analyse(members, rule) for name, members in by_spine(rows).items()}
    results = {name: {**result, "verdict": verdict(result)} for name, (_, result) in analyses.items()}
    write_atomically(run / "controls.json", json.dumps(results, indent=2) + "\n")
    if "right spines" in results:
        schedule = results["right spines"]["schedule"]["teacher"]
        write_atomically(run / "schedule.json", json.dumps(schedule, indent=2) + "\n")
    return analyses


def write_report(runs: list[Path], output_dir: Path) -> str:
    """OUTPUT_DIR/report.md on all runs; returns its text. Figure 1 is drawn last: it needs matplotlib."""
    titled: dict[str, tuple[Candidates, dict]] = {}
    if output_dir not in runs:  # a folder named wrongly is not made
        make_folder(output_dir)
    for run in runs:
        name = run.resolve().name
        if name in titled:
            raise InputError(f"{run}: another of the runs is in a folder named {name}, too; give it a name of its own")
        for kind, analysis in analyse_run(run).items():
            titled[name if kind == "right spines" else f"{name}, {kind}"] = analysis
    lines = table({title: result for title, (_, result) in titled.items()})
    lines += [text for title, (_, result) in titled.items() for text in ("", f"**{title}**: {verdict(result)}")]
    text = "\n".join(lines) + "\n"
    write_atomically(output_dir / "report.md", text)
    print(text)
    figure(titled, output_dir / "figure1")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of diagnose.py")
    parser.add_argument("--output_dir", type=Path, help="where report.md and Figure 1 go; needed for several runs")
    args = parser.parse_args()
    if len(args.runs) > 1 and args.output_dir is None:
        raise InputError("several runs need --output_dir")
    output_dir = args.output_dir or args.runs[0]
    write_report(args.runs, output_dir)
    print(f"{output_dir}/report.md, {output_dir}/figure1.png; training with it: train.py --schedule RUN/schedule.json")


if __name__ == "__main__":
    run_script(main)
