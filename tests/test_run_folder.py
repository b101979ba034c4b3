"""Run folders: whose they are, who is in them, and what is left of a run that failed."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from errors import InputError
from runtime.run_folder import (
    ERROR_LOG,
    LOCK,
    RunLog,
    claimed,
    keep_lines,
    locked,
    made,
    read_record,
    record_run,
    run_folder,
)

ROOT = Path(__file__).resolve().parent.parent


def start_run(run, **config):
    with claimed(run, resume=False) as record:
        record_run(run, record, {"seed": 1, **config}, set(), {"ranks": 1})


def test_a_run_is_recorded_and_goes_on_where_asked(tmp_path):
    run = tmp_path / "a" / "run"
    start_run(run, save_steps=5)
    assert read_record(run)["ranks"] == 1
    with claimed(run, resume=True) as record:
        record_run(run, record, {"seed": 1, "save_steps": 9}, {"save_steps"}, {})
        with pytest.raises(InputError, match="--seed 1, not 2"):
            record_run(run, record, {"seed": 2, "save_steps": 5}, {"save_steps"}, {})
    with pytest.raises(InputError, match="holds another run"), claimed(run, resume=False):
        pass


def test_what_a_flag_names_may_not_change_behind_it(tmp_path):
    pins = {"model": {"config.json": "1", "model.safetensors": "2"}, "data": "3"}
    with claimed(tmp_path / "run", False) as record:
        record_run(tmp_path / "run", record, {"model": "m", "data": "d"}, set(), {}, pins)
    with claimed(tmp_path / "run", True) as record:
        record_run(tmp_path / "run", record, {"model": "m", "data": "d"}, set(), {}, pins)
        for key, changed in (("model", {"config.json": "9", "model.safetensors": "2"}), ("data", "4")):
            with pytest.raises(InputError, match=f"what --{key} . names has changed"):
                record_run(tmp_path / "run", record, {"model": "m", "data": "d"}, set(), {}, {**pins, key: changed})


FOREIGN = {
    "another trainer's run": {"checkpoint-1/model.safetensors": "", "metrics.jsonl": ""},
    "a model": {"config.json": '{"model_type": "qwen3"}', "model.safetensors": ""},
    "some config": {"config.json": '{"config": {}}'},
    "no JSON": {"config.json": "{"},
    "a list": {"config.json": "[]"},
    "a note": {"notes.txt": "mine"},
    "a hidden file": {".git/HEAD": ""},
    "an evaluation": {"samples.jsonl": '{"regime": {}}\n'},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_is_not_ours_is_refused_and_stays_as_it_is(tmp_path, files, resume):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="holds no run of ours"), claimed(tmp_path, resume):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_and_what_a_failed_start_left_are_free(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / ERROR_LOG).write_text("Traceback")
    start_run(tmp_path)
    assert read_record(tmp_path) is not None


@pytest.mark.parametrize("error", [InputError("a mistake"), KeyboardInterrupt()])
def test_a_claim_that_fails_before_the_first_line_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), claimed(tmp_path / "run", False):
        assert (tmp_path / "run").is_dir()
        raise error
    assert not (tmp_path / "run").exists()
    start_run(tmp_path / "run")


def test_the_traceback_of_an_unexpected_error_is_kept(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught, claimed(tmp_path / "run", False):
        1 / 0  # noqa: B018
    assert "1 / 0" in (tmp_path / "run" / ERROR_LOG).read_text()
    assert caught.value.__notes__ == [f"traceback: {tmp_path / 'run' / ERROR_LOG}"]
    start_run(tmp_path / "run")  # and it is in nobody's way
    with pytest.raises(InputError), claimed(tmp_path / "run", True):
        raise InputError("a full disk") from OSError("No space left")
    assert "No space left" in (tmp_path / "run" / ERROR_LOG).read_text()


def test_a_run_that_is_under_way_is_left_alone(tmp_path):
    start_run(tmp_path / "run")
    refused = pytest.raises(InputError, match="another process is running in it")
    with claimed(tmp_path / "run", True), refused, claimed(tmp_path / "run", True):
        pass
    with claimed(tmp_path / "run", True):
        pass


def test_a_folder_taken_away_under_a_waiting_process_is_not_held_by_it(tmp_path, monkeypatch):
    """The lock of a file that has just lost its name holds nothing."""
    import runtime.run_folder as module

    take = module.fcntl.flock

    def take_late(file, how):
        os.unlink(tmp_path / "run" / LOCK)  # its holder has cleaned up between open and flock
        return take(file, how)

    monkeypatch.setattr(module.fcntl, "flock", take_late)
    with pytest.raises(InputError, match="another process"), claimed(tmp_path / "run", False):
        pass


def test_what_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"--output_dir .*file"), claimed(path, False):
            pass


def test_a_folder_for_results_is_made_or_named(tmp_path):
    assert made(tmp_path / "a" / "b").is_dir() and made(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(InputError, match=r"--output_dir .*file.*: cannot be written"):
            made(path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_without_permission_is_one_line(tmp_path):
    code = (
        "import os; from pathlib import Path; from runtime.run_folder import claimed\n"
        "import transformers.trainer_utils; from runtime.flags import run_script\n"
        "os.setuid(65534)\n"  # last: the environment's packages may be root's alone
        "def main():\n    with claimed(Path('/proc/self/nothing'), False): pass\n"
        "run_script(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: --output_dir /proc/self/nothing: cannot be written")
    assert len(done.stderr.splitlines()) == 1


def _take_number(folder: str, queue) -> None:
    os.chdir(folder)
    queue.put(str(run_folder(None, "name")))


def test_two_runs_without_a_name_get_two_folders(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_take_number, args=(str(tmp_path), queue)) for _ in range(8)]
    for process in processes:
        process.start()
    names = {queue.get(timeout=60) for _ in processes}
    assert names == {"runs/name", *(f"runs/name-{number}" for number in range(2, 9))}
    monkeypatch.chdir(tmp_path)
    assert str(run_folder("elsewhere", "name")) == "elsewhere" and not Path("elsewhere").exists()


def test_the_refusal_is_asked_again_under_the_lock(tmp_path):
    """A run that began and ended between the first look and the lock."""
    answers = iter([None, f"{tmp_path}: holds another run"])
    with pytest.raises(InputError, match="holds another run"), locked(tmp_path / "run", lambda folder: next(answers)):
        pass


@pytest.mark.parametrize("text", ['{"0', "[1]", '{"first": {}}'])
def test_accuracies_that_are_no_runs_are_named(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(InputError, match=r"evaluation.json: not the accuracies of a run"):
        RunLog(tmp_path, 0)


def test_lines_are_cut_back_and_torn_lines_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    keep_lines(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]
