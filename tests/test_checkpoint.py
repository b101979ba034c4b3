"""Checkpoints torn, corrupted or cut short, a full disk, and runs on real processes that die or change size."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest
import torch
from forked import run_ranks, script
from safetensors import SafetensorError

from errors import InputError
from model import add_lora, load_model, lora_parameters
from runtime import checkpoint as checkpoint_module
from runtime.checkpoint import damage, load_checkpoint, newest_checkpoint, save_checkpoint
from teacher import Teacher

ROOT = Path(__file__).resolve().parent.parent
FILES = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.pt", "ema.safetensors", "manifest.json")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return families.make_checkpoint("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


class Trained:
    """A model with adapter, EMA teacher, optimizer and schedule, that can take steps on made-up gradients."""

    def __init__(self, base) -> None:
        torch.manual_seed(3)
        self.model = load_model(str(base), device="cpu")
        add_lora(self.model, 4, 8.0)
        self.teacher = Teacher(self.model, "ema", 0.9)
        self.optimizer = torch.optim.AdamW(lora_parameters(self.model), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (step + 1))

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in lora_parameters(self.model):
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.scheduler.step()
        self.teacher.update()

    def save(self, run: Path, step: int) -> Path:
        return save_checkpoint(run, step, self.model, "base", self.teacher, self.optimizer, self.scheduler)

    def load(self, path: Path) -> int:
        return load_checkpoint(path, self.model, self.teacher, self.optimizer, self.scheduler)

    def tensors(self) -> list[torch.Tensor]:
        moments = [m for state in self.optimizer.state_dict()["state"].values() for m in state.values()]
        return [*lora_parameters(self.model), *self.teacher.average, *moments]


@pytest.fixture
def run(qwen3, tmp_path):
    """A run folder with whole checkpoints after steps 1 and 2."""
    trained = Trained(qwen3)
    for step in (1, 2):
        trained.step(step)
        trained.save(tmp_path / "run", step)
    return tmp_path / "run"


def test_loading_gives_back_every_bit_and_the_next_step_is_the_same(qwen3, tmp_path):
    unbroken, resumed = Trained(qwen3), Trained(qwen3)
    unbroken.step(1)
    path = unbroken.save(tmp_path, 1)
    resumed.step(7)  # other values everywhere, so that anything not restored shows
    assert resumed.load(path) == 1
    unbroken.step(2)
    resumed.step(2)
    assert resumed.scheduler.state_dict() == unbroken.scheduler.state_dict()
    for ours, theirs in zip(resumed.tensors(), unbroken.tensors(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "delete"])
def test_any_harmed_file_is_noticed_and_the_checkpoint_before_is_used(run, name, harm):
    path = run / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    if harm == "flip" and name == "manifest.json":
        content = content.replace(b'"step": 2', b'"step": 3')
    elif harm == "flip":
        content[len(content) // 2] ^= 1
    elif harm == "truncate":
        content = content[: len(content) // 2]
    path.unlink() if harm == "delete" else path.write_bytes(b"" if harm == "empty" else content)
    newest, lines = newest_checkpoint(run)
    assert newest == run / "checkpoint-1"
    assert len(lines) == 1 and "checkpoint-2" in lines[0] and "using the checkpoint before it" in lines[0]


@pytest.mark.parametrize("manifest", ["[]", '{"step": 2, "sha256": {}}', '{"step": 2, "sha256": 1}', "{}", "\0"])
def test_a_manifest_that_vouches_for_nothing_is_no_checkpoint(run, manifest):
    (run / "checkpoint-2" / "manifest.json").write_text(manifest)
    assert damage(run / "checkpoint-2") is not None
    assert newest_checkpoint(run)[0] == run / "checkpoint-1"


def test_a_partial_checkpoint_is_never_looked_at(run):
    (run / "checkpoint-2").rename(run / ".partial-3")
    (run / "checkpoint-best").mkdir()
    assert newest_checkpoint(run) == (run / "checkpoint-1", [])
    assert newest_checkpoint(run / "nowhere") == (None, [])


@pytest.mark.parametrize(
    "place, error",
    [
        ("save_adapter", OSError(errno.ENOSPC, "No space left on device")),
        ("save_file", SafetensorError("IoError: No space left on device")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file: No space left on device")),
        ("_sync", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_whole(qwen3, run, monkeypatch, place, error):
    def fail(*args, **kwargs):
        raise error

    owner = torch if place == "torch.save" else checkpoint_module
    monkeypatch.setattr(owner, place.removeprefix("torch."), fail)
    with pytest.raises(InputError, match=r"checkpoint-3: cannot be written .*; earlier checkpoints are whole"):
        Trained(qwen3).save(run, 3)
    monkeypatch.undo()
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert newest_checkpoint(run) == (run / "checkpoint-2", [])


def test_a_really_full_disk(qwen3, run):
    """The kernel's own limit on a file's size, in a process of its own, stands in for a disk without room."""
    code = (
        "import resource, signal, sys, test_checkpoint as t; from pathlib import Path\n"
        "trained = t.Trained(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "trained.save(Path(sys.argv[2]), 3)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(qwen3), str(run)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "cannot be written" in done.stderr
    assert newest_checkpoint(run) == (run / "checkpoint-2", [])
    assert not (run / ".partial-3").exists()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError])
def test_an_error_of_the_gpu_is_not_the_disks(qwen3, run, monkeypatch, kind):
    def fail(*args, **kwargs):
        raise kind("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checkpoint_module, "save_adapter", fail)
    with pytest.raises(kind, match="CUDA error"):
        Trained(qwen3).save(run, 3)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-2"]


# ---------------------------------------------------------------------------------------------------------------
# Real processes


def arguments(run: Path, *more: str) -> list[str]:
    """train.py on the embedded model, steps as short as they come."""
    flags = {
        "preset": "tiny", "output_dir": run, "batch_size": 4, "max_new_tokens": 8, "save_steps": 1, "device": "cpu",
        "eval_data": "", "resume": True,
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in flags.items()), *more]


def start(run: Path, *more: str, ranks: int = 1) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    command = [*launcher, str(ROOT / "train.py"), *arguments(run, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen, seconds: float = 90) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, finish(process)
        time.sleep(0.02)


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_sigterm_to_the_process_writes_a_checkpoint_and_exits_with_0(tmp_path):
    process = start(tmp_path / "run", "--num_steps=500", "--save_steps=500")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 0 and "SIGTERM: saved after step" in output
    newest, lines = newest_checkpoint(tmp_path / "run")
    assert lines == [] and len(metrics(tmp_path / "run")) == int(newest.name.removeprefix("checkpoint-"))


def test_another_number_of_ranks_goes_on_with_the_same_numbers(tmp_path):
    """Two steps on two ranks, two more on one: the same rollouts and, up to rounding, the losses of one rank."""
    flags = arguments(tmp_path / "changed", "--num_steps=4", "--learning_rate=1e-4")
    run_ranks(tmp_path, script, "train.py", flags)
    for step in (3, 4):  # taken away, as if the run had ended after step 2
        shutil.rmtree(tmp_path / "changed" / f"checkpoint-{step}")
    (output,) = run_ranks(tmp_path, script, "train.py", flags, ranks=1)
    assert "going on from" in output and "checkpoint-2" in output
    flags = arguments(tmp_path / "same", "--num_steps=4", "--learning_rate=1e-4")
    run_ranks(tmp_path, script, "train.py", flags, ranks=1)
    for ours, theirs in zip(metrics(tmp_path / "changed"), metrics(tmp_path / "same"), strict=True):
        assert ours["mean_length"] == theirs["mean_length"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert len(metrics(tmp_path / "same")) == 4


def test_one_dead_rank_ends_all_with_its_error(tmp_path):
    process = start(tmp_path / "run", "--num_steps=500", ranks=2)
    wait_for(tmp_path / "run" / "checkpoint-1", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output = finish(process, seconds=60)
    assert process.returncode != 0 and "SIGKILL" in output
    assert newest_checkpoint(tmp_path / "run")[0] is not None
