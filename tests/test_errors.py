"""How errors end a script: one line for what a user can do something about, else a traceback."""

import errno
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from errors import InputError
from runtime import ranks
from runtime.flags import run_script


def failing(error):
    """A script that ends with the error."""

    def main():
        raise error

    return main


@pytest.mark.parametrize(("error", "said"), [
    (InputError("--flag 3: no"), "error: --flag 3: no$"), (InputError("two\nlines"), "error: two lines$"),
    (FloatingPointError("step 3: loss nan"), "error: step 3: loss nan$"), (MemoryError(), "error: out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"), "No space left .*metrics.jsonl"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory .*--micro_batch_size"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "nobody reads the output any more; what was written stays"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "error: out of memory"),
])  # fmt: skip
def test_what_a_user_can_mend_is_one_line(error, said):
    with pytest.raises(SystemExit) as caught:
        run_script(failing(error))
    message = caught.value.code  # a text: status 1, and the line on stderr
    assert re.search(said, message) and len(message.splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("k_proj"), RuntimeError("of CUDA"), AssertionError()])
def test_a_fault_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_script(failing(error))


@pytest.mark.parametrize(("main", "status"), [
    (lambda: sys.exit(7), 7), (lambda: 143, 143), (lambda: None, None), (failing(KeyboardInterrupt()), 130),
])  # fmt: skip
def test_a_status_of_its_own_passes(capsys, main, status):
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == status
    assert capsys.readouterr().err.startswith("stopped; what was written stays") == (status == 130)


def test_a_signal_during_the_wait_for_other_ranks_is_not_lost_and_all_know_the_signal_of_one(monkeypatch):
    stop, other = ranks.Stop(), ranks.Stop()
    stop.release()
    other.release()

    def wait(asked):
        stop._note(signal.SIGUSR1, None)
        return [asked, 0]

    monkeypatch.setattr(ranks, "gather_objects", wait)
    stop.hold()  # the other ranks know nothing of it, and go on to their next `hold`
    with pytest.raises(ranks.StoppedError):
        stop.release()
    monkeypatch.setattr(ranks, "gather_objects", lambda asked: [asked, signal.SIGUSR1])
    with pytest.raises(ranks.StoppedError):
        other.hold()
    assert stop.asked == other.asked == signal.SIGUSR1


def test_where_a_model_is_shared_a_signal_waits_for_the_end_of_the_step():
    stop = ranks.Stop(sharded=True)
    stop.release()
    stop._note(signal.SIGTERM, None)
    with pytest.raises(ranks.StoppedError):
        stop.release()


def test_one_ctrl_c_that_comes_twice_counts_once_and_a_later_one_ends_at_once(monkeypatch):
    stop, now = ranks.Stop(), iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: next(now)))
    for _ in range(2):
        stop._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop._note(signal.SIGINT, None)


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    handlers = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda number: handlers.get(number, signal.SIG_DFL))
    stop = ranks.Stop()
    stop.listen()
    assert handlers.pop(signal.SIGHUP) is signal.SIG_IGN
    assert set(handlers.values()) == {stop._note} and signal.SIGTERM in handlers
