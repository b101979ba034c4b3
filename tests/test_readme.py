"""The README's promises: every name in its tables exists, and its examples run."""

import ast
import re
from pathlib import Path

import pytest
import torch

import diagnose
import evaluate
import loss
import train
import weighting

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", README)))


@pytest.mark.parametrize("file, name", NAMES)
def test_every_name_exists(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [t for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) for t in _targets(node)]
    assert name in defined | {target.id for target in targets if isinstance(target, ast.Name)}


def _targets(node):
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def test_the_table_names_enough():
    assert len(NAMES) >= 25


def test_every_file_of_the_tree_exists():
    tree = README.split("## Files")[1].split("```")[1]
    files = re.findall(r"^([\w.-]+(?:\.py|/)) ", tree, flags=re.MULTILINE)
    assert len(files) >= 12
    assert all((ROOT / file).exists() for file in files)
    entries = [line.strip() for line in tree.splitlines() if line.startswith(" ")]  # of experiments/
    assert len(entries) >= 10
    for entry in entries:
        names = re.match(r"(?:[\w*-]+(?:\.py|/),? )+", entry)
        assert names, f"no file name at the start of {entry!r}"
        for name in names[0].replace(",", " ").split():
            assert list((ROOT / "experiments").glob(name)), f"experiments/{name} does not exist"


def test_the_examples_of_new_methods_run(monkeypatch):
    monkeypatch.setattr(loss, "METHODS", dict(loss.METHODS))
    monkeypatch.setattr(weighting, "SCHEDULES", dict(weighting.SCHEDULES))
    monkeypatch.setattr(train, "main", lambda: None)
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 9), torch.randn(2, 6, 9)
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool)
    late = loss.method_loss("late_opsd", student, teacher, ids, mask)
    first_half_changed = student.clone()
    first_half_changed[:, :3] += torch.randn(2, 3, 9)
    torch.testing.assert_close(loss.method_loss("late_opsd", first_half_changed, teacher, ids, mask), late)
    assert 0 < loss.method_loss("hellinger", student, teacher, ids, mask).item() < 1


@pytest.mark.parametrize(
    "script, config",
    [
        ("train", train.TrainConfig),
        ("evaluate", evaluate.EvaluationConfig),
        ("diagnose", diagnose.DiagnoseConfig),
    ],
)
def test_flags_in_the_commands_exist(script, config):
    known = {"--help"} | {f"--{name}" for name in config.__dataclass_fields__}
    commands = re.findall(rf"\b{script}\.py ([^`\n#]*)", README.replace("\\\n", " "))
    used = {word for command in commands for word in command.split() if word.startswith("--")}
    assert len(used - {"--help"}) >= 2 and used <= known
