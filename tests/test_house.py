"""The house: which file may import which, and that importing runs nothing."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUIET = """
import builtins, importlib, sys, threading
opened = builtins.open
def guarded(file, mode="r", *args, **kwargs):
    assert file == "/dev/null" or not set(mode) & set("wax+"), f"{file} is opened for writing"
    return opened(file, mode, *args, **kwargs)
for name in sys.argv[1:]:
    builtins.open = guarded
    importlib.import_module(name)
    builtins.open = opened
assert threading.active_count() == 1, threading.enumerate()
"""


FOLDERS = ("", "runtime/", "experiments/", "experiments/study/")
FILES = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.py")]


def level(name: str) -> int:
    """Of a dotted name: other people's -1, method 0, runtime 1, scripts 2, experiments 3."""
    first = name.split(".")[0]
    if first in ("runtime", "train", "evaluate", "diagnose", "experiments"):
        return {"runtime": 1, "experiments": 3}.get(first, 2)
    return 0 if (ROOT / f"{first}.py").exists() else -1


def test_imports_go_one_way():
    assert len(FILES) > 30
    for path in FILES:
        own = level(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
        for line in re.findall(r"^ *(?:from|import) (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert level(line) <= own, f"{path} imports {line}"


@pytest.mark.slow
def test_importing_runs_nothing(tmp_path):
    """In one fresh process and an empty folder: nothing is printed, written or started."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    assert {"loss", "runtime.server", "experiments.study.run"} <= set(names)
    if not importlib.util.find_spec("openai"):
        names.remove("runtime.server")  # imported where --server is given; says that the package is missing
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.defpath, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-B", "-W", "ignore", "-c", QUIET, *names]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout == "", result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
