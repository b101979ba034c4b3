"""The house: which file may import which, where libraries' private names may stand, and that importing runs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train", "evaluate", "diagnose"}
METHOD = {path.stem for path in ROOT.glob("*.py")} - SCRIPTS
FOLDERS = ("", "runtime/", "experiments/", "tests/")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(f"{folder}*.py"))
OURS = {*METHOD, *SCRIPTS, "runtime", "experiments", "tests"}
LIBRARIES = {"torch", "transformers", "numpy", "peft", "datasets", "openai", "math_verify", "safetensors", "tokenizers",
             "tqdm", "matplotlib", "scipy", "filelock"}  # fmt: skip
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


# The two files that know private names, of continuous batching and of torch's fake tensors.
PRIVATE = {Path("runtime/continuous.py"), Path("runtime/fake_step.py")}


def private_names(path: Path) -> list[str]:
    """Names of libraries that their authors keep to themselves: `_x` in an import, or behind a library's name."""
    found, known = [name for name in imports(path) if name.split(".")[0] in LIBRARIES and is_private(name)], set()
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))))
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                origin = node.module if isinstance(node, ast.ImportFrom) else alias.name
                known |= {alias.asname or alias.name.split(".")[0]} if origin.split(".")[0] in LIBRARIES else set()
    uses = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    return found + [use for use in uses if use.split(".")[0] in known and is_private(use)]


def is_private(name: str) -> bool:
    parts = name.split(".")
    hidden = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return hidden or name.startswith("transformers.generation.continuous_batching")


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


@pytest.mark.parametrize("path", [path for path in FILES if stratum(path) != "tests"], ids=str)
def test_private_names_of_libraries_stand_in_one_file(path):
    found = private_names(path)
    assert not found or path in PRIVATE, f"{path}: {found}"


def test_the_one_file_is_seen():
    """The search above finds what it looks for."""
    assert "transformers.generation.continuous_batching" in " ".join(private_names(Path("runtime/continuous.py")))
    assert is_private("torch._C.x") and is_private("transformers.utils._y") and not is_private("torch.__version__")


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
    command = [sys.executable, "-B", "-W", "ignore", "-c", QUIET, *(name.removesuffix(".__init__") for name in names)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
