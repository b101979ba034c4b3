"""How errors end a script: one line, whatever went wrong, and where its traceback is."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from errors import InputError
from runtime import stopping
from runtime.flags import run_script
from runtime.records import open_run

ROOT = Path(__file__).resolve().parent.parent


def line_of(capsys, error) -> str:
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    message = caught.value.code
    assert isinstance(message, str) and len(message.splitlines()) == 1  # status 1, and the line on stderr
    return message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("--flag 3: no"), "error: --flag 3: no$"),
        (InputError("two\nlines"), "error: two lines$"),
        (FloatingPointError("step 3: loss nan"), "error: step 3: loss nan$"),
        (OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"), "No space left .*metrics.jsonl"),
        (KeyError("k_proj"), r"error: KeyError: 'k_proj' \(test_errors.py, line \d+\)"),
        (AssertionError(), r"error: AssertionError: without a word \(test_errors.py"),
        (RuntimeError("many\n  lines\nof CUDA"), "error: RuntimeError: many lines of CUDA"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory .*--micro_batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "error: out of memory"),
        (MemoryError(), "error: out of memory"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "error: UnicodeEncodeError"),
    ],
)
def test_each_exception_is_one_line(capsys, error, said):
    assert re.search(said, line_of(capsys, error))


def test_the_line_names_the_traceback_in_the_run_folder(tmp_path):
    def main():
        with open_run(tmp_path / "run", "train", False):
            raise KeyError("k_proj")

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    log = tmp_path / "run" / "error.log"
    assert caught.value.code == f"error: KeyError: 'k_proj'; traceback: {log}"
    assert 'raise KeyError("k_proj")' in log.read_text()


@pytest.mark.parametrize(("main", "status"), [(lambda: sys.exit(7), 7), (lambda: 143, 143), (lambda: None, None)])
def test_a_status_of_its_own_passes(main, status):
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == status


def test_ctrl_c_ends_an_evaluation_with_one_line(tmp_path):
    """At its slowest, while it samples; what it has stays and counts."""
    command = [sys.executable, "evaluate.py", "--output_dir", str(tmp_path / "run"), "--num_samples", "20",
               "--device", "cpu", "--batch_size", "4"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    samples, end = tmp_path / "run" / "samples.jsonl", time.monotonic() + 240
    while not (samples.exists() and samples.stat().st_size > 0):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    lines = [line for line in re.split("[\r\n]", errors) if line.strip() and "sample" not in line.split("stopped")[0]]
    assert process.returncode == 130 and "Traceback" not in errors
    assert lines[-1].startswith("stopped; what was written stays, and the same command goes on there")
    assert len(samples.read_text().splitlines()) > 1


def test_a_signal_during_the_wait_for_other_ranks_is_not_lost(monkeypatch):
    stop = stopping.Stop()
    stop.release()

    def wait(asked):
        stop._note(signal.SIGUSR1, None)
        return [asked, 0]

    monkeypatch.setattr(stopping, "gather_objects", wait)
    stop.hold()  # the other ranks know nothing of it, and go on to their next `hold`
    with pytest.raises(stopping.StoppedError):
        stop.release()
    assert stop.asked == signal.SIGUSR1


def test_every_rank_knows_the_signal_that_one_was_sent(monkeypatch):
    stop = stopping.Stop()
    stop.release()
    monkeypatch.setattr(stopping, "gather_objects", lambda asked: [asked, signal.SIGTERM])
    with pytest.raises(stopping.StoppedError):
        stop.hold()
    assert stop.asked == signal.SIGTERM


def test_one_ctrl_c_that_comes_twice_counts_once_and_a_later_one_ends_at_once(monkeypatch):
    stop, now = stopping.Stop(), iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: next(now)))
    for _ in range(2):
        stop._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop._note(signal.SIGINT, None)


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    handlers = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda number: handlers.get(number, signal.SIG_DFL))
    stop = stopping.Stop().listen()
    assert handlers.pop(signal.SIGHUP) is signal.SIG_IGN
    assert set(handlers.values()) == {stop._note} and signal.SIGTERM in handlers
