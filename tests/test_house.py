"""The house: which file may import which, and that importing runs nothing."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train", "evaluate", "diagnose"}
METHOD = {path.stem for path in ROOT.glob("*.py")} - SCRIPTS
FOLDERS = ("", "runtime/", "experiments/", "experiments/study/", "tests/")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(f"{folder}*.py"))
OURS = {*METHOD, *SCRIPTS, "runtime", "experiments", "tests"}
LIBRARIES = {"torch", "transformers", "numpy", "peft", "datasets", "openai", "math_verify", "safetensors", "tokenizers",
             "tqdm", "matplotlib", "scipy", "pyarrow", "filelock", "sympy", "latex2sympy2_extended"}  # fmt: skip
# What a file of a stratum may import of ours.
ALLOWED = {
    "method": METHOD,
    "runtime": {*METHOD, "runtime"},
    "scripts": {*METHOD, "runtime", *SCRIPTS},
    "experiments": OURS - {"tests"},
}


def stratum(path: Path) -> str:
    if path.parent != Path("."):
        return path.parts[0]
    return "scripts" if path.stem in SCRIPTS else "method"


def imports(path: Path) -> list[str]:
    """Dotted names of all imports of a file, those inside functions and under TYPE_CHECKING included."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_file_has_a_stratum():
    assert len(FILES) > 30 and {"loss.py", "train.py", "runtime/ranks.py"} <= {str(path) for path in FILES}
    assert {stratum(path) for path in FILES} == {*ALLOWED, "tests"}
    assert {"loss", "weighting", "teacher", "model", "rollout", "problems"} <= METHOD


@pytest.mark.parametrize("path", [path for path in FILES if stratum(path) != "tests"], ids=str)
def test_imports_go_down_only(path):
    names = {name.split(".")[0] for name in imports(path)}
    unknown = names - OURS - LIBRARIES - sys.stdlib_module_names
    assert not unknown, f"{path} imports {unknown}, which is neither ours nor a package that this test knows"
    ours = names & OURS
    assert ours <= ALLOWED[stratum(path)], f"{path} imports {ours - ALLOWED[stratum(path)]}"


def test_the_method_files_import_each_other_without_circles():
    below = {name: {part.split(".")[0] for part in imports(Path(f"{name}.py"))} & METHOD for name in METHOD}
    while below:
        free = {name for name, needs in below.items() if not needs & set(below)}
        assert free, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in free}


QUIET = """
import builtins, importlib, pathlib, sys, threading
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


def test_importing_runs_nothing(tmp_path):
    """In one fresh process and an empty folder: nothing is printed, written or started."""
    names = [".".join(path.with_suffix("").parts) for path in FILES if stratum(path) != "tests"]
    if not importlib.util.find_spec("openai"):
        names.remove("runtime.server")  # imported where --server is given; says that the package is missing
    command = [sys.executable, "-B", "-W", "ignore", "-c", QUIET, *(name.removesuffix(".__init__") for name in names)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
