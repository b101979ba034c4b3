"""The promises of README.md and docs/: files, commands, examples and the study's numbers hold."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import dropwhile
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

import diagnose
import evaluate
import loss
import train
import weighting
from runtime.flags import FlagParser

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*ROOT.glob("docs/*.md")]}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
WALK = ROOT / "docs/walkthrough.ipynb"
CELLS = json.loads(WALK.read_text(encoding="utf-8"))["cells"]
PAGES["docs/walkthrough.ipynb"] = "\n\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", sorted(PAGES))


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", PAGES[page])


def fences(page: str, language: str) -> list[str]:
    return [match[2] for match in FENCE.finditer(PAGES[page]) if match[1] == language]


@every_page
def test_every_file_and_name_that_a_page_mentions_exists(page):
    """In links, by their folder, in the README's tree, and as FILE.py::NAME."""
    for target in re.findall(r"\]\((?!https?://|#)([^)\s#]+)", prose(page)):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target} does not exist"
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "runs")
    tree = re.findall(r"^(\S+) ", PAGES[page].partition("## Files")[2].partition("\n## ")[0], re.MULTILINE)
    files = [file for file in tree if "/" in file or "." in file] if page == "README.md" else []
    assert len(files) >= 10 or page != "README.md"
    for file in files + re.findall(rf"`((?:{folders})/[\w./-]*)`", PAGES[page]):
        assert (ROOT / file).exists(), f"{page}: {file} does not exist"
    for file, name in set(re.findall(r"([\w/.-]+\.py)::(\w+)", PAGES[page])):
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(class |def )?{name}\b", code, re.MULTILINE), f"{page}: {file} has no {name}"


OTHERS = {"pip", "vllm", "export", "lm_eval"}  # commands of others, which are not checked
SCRIPTS = {
    "train.py": (train.TrainConfig, train.PRESETS),
    "evaluate.py": (evaluate.EvaluationConfig, None),
    "diagnose.py": (diagnose.DiagnoseConfig, diagnose.PRESETS),
}


def commands(page: str) -> list[list[str]]:
    """The commands of a page, word by word: those in bash blocks, and those of python that stand in a line of prose."""
    blocks = [line for block in fences(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:python|torchrun) [^`]+)`", prose(page))
    parts = [part for line in [*blocks, *inline] for part in re.split(r" && | \| |; ", line.partition(" #")[0])]
    found = [[word for word in shlex.split(part, comments=True) if word != "..."] for part in parts]
    return [list(dropwhile(re.compile("[A-Z_]+=").match, words)) for words in found if words]


def check_command(words: list[str], monkeypatch, capsys) -> None:
    """Raise unless the command's script exists and takes its flags."""
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[0] in OTHERS or words[:3] == ["python", "-m", "pytest"] or (ROOT / words[0]).is_file():
        return
    assert words[0] == "python", f"an unknown command: {words[0]}"
    if words[1] in SCRIPTS:
        config_class, presets = SCRIPTS[words[1]]
        if "--help" not in words:
            FlagParser(config_class, None).parse(presets, words[2:])
    elif words[1] == "-m":
        monkeypatch.setattr("sys.argv", [words[2], "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            getattr(importlib.import_module(words[2]), "main", train.main)()  # the rules' own is train.py's
        known = set(re.findall(r"(?<![\w-])--?[\w-]+", capsys.readouterr().out))
        unknown = [word for word in words[3:] if word.startswith("-") and word.split("=")[0] not in known]
        assert not unknown, f"{words[2]} has no {', '.join(unknown)}"
    else:
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"


@every_page
def test_commands_parse(page, monkeypatch, capsys):
    for words in commands(page):
        check_command(words, monkeypatch, capsys)


@every_page
def test_flags_in_prose_exist(page):
    """A flag in backticks is one of the three scripts', or of a command that the same page shows."""
    known = {name for config_class, _ in SCRIPTS.values() for name in config_class.__dataclass_fields__}
    shown = {word.removeprefix("--") for words in commands(page) for word in words if word.startswith("--")}
    modules = set(re.findall(r"\bexperiments[./](?:study[./])?(\w+)", PAGES[page]))
    sources = [path for name in modules for path in ROOT.glob(f"**/{name}.py")]
    declared = {flag for path in sources for flag in re.findall(r'"--(\w+)"', path.read_text(encoding="utf-8"))}
    for flag in re.findall(r"`(?:[^`\n]* )?--(\w+)(?![\w-])[^`\n]*`", prose(page)):
        assert flag in known | shown | declared, f"{page}: no script has --{flag}"


def test_the_examples_of_new_methods_run(monkeypatch):
    monkeypatch.setattr(loss, "METHODS", dict(loss.METHODS))
    monkeypatch.setattr(weighting, "SCHEDULES", dict(weighting.SCHEDULES))
    monkeypatch.setattr(train, "cli", lambda: None)
    methods, schedules = set(loss.METHODS), set(weighting.SCHEDULES)
    namespace: dict = {}
    for block in fences("README.md", "python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert {"late_opsd", "hellinger"} <= loss.METHODS.keys() - methods
    assert weighting.SCHEDULES.keys() - schedules
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 9), torch.randn(2, 6, 9)
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool)
    late = loss.method_loss("late_opsd", student, teacher, ids, mask)
    first_half_changed = student.clone()
    first_half_changed[:, :3] += torch.randn(2, 3, 9)
    torch.testing.assert_close(loss.method_loss("late_opsd", first_half_changed, teacher, ids, mask), late)
    assert 0 < loss.method_loss("hellinger", student, teacher, ids, mask).item() < 1


DECIMAL = re.compile(r"-?\d+\.\d+")


@pytest.mark.slow
def test_the_walkthrough_prints_what_it_holds():
    """Equal words; decimal numbers within two units of their last digit, which another machine's rounding may move."""
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    run = subprocess.run([sys.executable, "-c", code], cwd=WALK.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    held = "".join("".join(output["text"]) for cell in cells for output in cell["outputs"])
    assert DECIMAL.sub("#", held) == DECIMAL.sub("#", run.stdout), "execute the notebook again"
    for here, there in zip(DECIMAL.findall(held), DECIMAL.findall(run.stdout), strict=True):
        assert float(here) == pytest.approx(float(there), abs=2.01 * 10 ** -len(here.split(".")[1]))


# --- the study's numbers ----------------------------------------------------------------------------------------


def study_tables(mark: str = "cells") -> list[tuple[list[str], list[str], list[list[str]]]]:
    """(folders, columns, rows) of each table of docs/study.md behind `<!-- MARK FOLDER ... -->`."""
    found = []
    for folders, lines in re.findall(rf"<!-- {mark} (.+) -->\n((?:\|.*\n)+)", PAGES["docs/study.md"]):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines.splitlines()]
        found.append((folders.split(), head[1:], rows))
    return found


@cache
def cells_of(folder: str) -> list[dict]:
    lines = (ROOT / "experiments/results" / folder / "cells.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def measured(folder: str, row: str, column: str) -> dict[int, float]:
    """A row's values by seed in percent, from the cells alone; `column` is as in `greedy %, after 40`."""
    name, step = column.split(" %")[0].replace(" ", "_"), re.search(r"after (\d+)", column)
    values = {}
    for cell in cells_of(folder):
        if row in (cell["row"], "before training"):
            last = "0" if row == "before training" else step[1] if step else max(cell["evaluation"], key=int)
            values[cell["seed"]] = 100 * (cell["evaluation"][last] | cell["behaviour"][last])[name]
    return values


def as_shown(left: dict[int, float], right: dict[int, float] | None = None) -> str:
    """mean ± sample deviation; of a difference its mean and 95 % t interval over six or four seeds."""
    if right is None:
        return f"{mean(left.values()):.1f} ± {stdev(left.values()):.1f}"
    d = [left[seed] - right[seed] for seed in left]
    half = {6: 2.570582, 4: 3.182446}[len(d)] * stdev(d) / len(d) ** 0.5
    return f"{mean(d):+.1f} [{mean(d) - half:+.1f}, {mean(d) + half:+.1f}]"


def test_the_studys_tables_hold_what_the_cells_say():
    """Each number of the page, computed anew; bold ones stand bold in the report, either way round."""
    count = 0
    for folders, columns, rows in study_tables():
        for name, *cells in [row for row in rows if not row[0].startswith("diagnostic")]:
            for place, (column, cell) in enumerate(zip(columns, cells, strict=True)):
                folder = folders[len(folders) * place // len(columns)]
                sides = [measured(folder, side, column) for side in name.split(" - ")] if cell != "-" else []
                shown = [as_shown(*order) for order in (sides, sides[::-1])] if sides else ["-"]
                assert cell.strip("*") == shown[0] and all(len(side) == 6 for side in sides), (folder, name, column)
                report = (ROOT / "experiments/results" / folder / "report.md").read_text()
                assert not cell.startswith("**") or any(f"**{text}**" in report for text in shown), (name, column)
                count += cell != "-"
    assert count > 120


def test_the_placed_table_holds_what_predictions_and_cells_say():
    """What was claimed of base models 1; 2 and what the cells give, at 3e-4 (`early`) and at tuned rates (`final`)."""
    ((folder,), columns, rows) = study_tables("placed")[0]
    lines = (ROOT / "experiments/results" / folder / "predictions.jsonl").read_text().splitlines()
    claims = {line["world"]: line["claims"]["harm"] for line in map(json.loads, lines)}
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for part in ("early", "final"):
        for cell in cells_of(f"{folder}/{part}"):
            key = (part, cell["row"].rpartition(" / ")[0])
            scores.setdefault(key, {})[cell["seed"]] = 100 * cell["evaluation"]["20"]["sampled"]
    for where, *cells in rows:
        for column, cell in zip(columns, cells, strict=True):
            arms, rate = column.split(", ")
            left, right = arms.split(" - ")
            shown = []
            for world in (f"placed-{where.replace(', ', '')}-seed{seed}" for seed in (1, 2)):
                sides = [scores["early" if rate == "3e-4" else "final", f"{world} / {arm}"] for arm in (left, right)]
                assert all(len(side) == 4 for side in sides)
                shown.append((f"{claims[world][left]}: " if right == "uniform" else "") + as_shown(*sides))
            assert cell == "; ".join(shown), (where, column)
    assert len(rows) == 8
