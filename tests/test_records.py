"""Run folders: whose they are and who is in them; rows torn, foreign and parted; inputs that change behind a name."""

import errno
import fcntl
import json
import os
import shutil
from functools import partial
from pathlib import Path

import families
import filelock
import pytest

from errors import InputError
from problems import Problem
from runtime import records


def begin(run, record=None, config=None, free=(), inputs=None):
    records.record_run(run, "train", record, config or {"seed": 1}, set(free), inputs or {}, {"hardware": "cpu"})


def refused(told, run, script="train", resume=False):
    with pytest.raises(InputError, match=told), records.open_run(run, script, resume):
        pass


def start_run(run):
    """A run that has written its first row."""
    with records.open_run(run, "train", resume=False) as record:
        begin(run, record, {"seed": 1, "save_steps": 5})
        records.append_rows(run / "metrics.jsonl", [{"step": 0}])


# --- Folders ----------------------------------------------------------------------------------------------------


def test_a_run_is_recorded_and_goes_on_where_asked(tmp_path):
    run = tmp_path / "a" / "run"
    start_run(run)
    found = records.read_record(run)
    assert (found["script"], found["ranks"], found["hardware"]) == ("train", 1, "cpu")
    with records.open_run(run, "train", resume=True) as record:
        begin(run, record, {"seed": 1, "save_steps": 9}, {"save_steps"})
        with pytest.raises(InputError, match="--seed 1, not 2"):
            begin(run, record, {"seed": 2, "save_steps": 5}, {"save_steps"})
    refused("holds another run; continue it", run)
    refused("holds another run, of train", run, "evaluate", resume=True)
    with records.open_run(run, "train", True):
        refused("another process is running in it", run, resume=True)
    with records.open_run(run, "train", True):
        pass


@pytest.mark.parametrize("changed", ["script", "loss.py", "torch"])
def test_a_run_that_goes_on_with_other_code_says_so(tmp_path, monkeypatch, capsys, changed):
    """As where a fork's run is resumed by train.py, which knows nothing of the fork."""
    script = tmp_path / "mine.py"
    script.write_text("one")
    monkeypatch.setattr("sys.argv", [str(script)])
    start_run(tmp_path / "run")
    with records.open_run(tmp_path / "run", "train", resume=True) as record:
        begin(tmp_path / "run", record, {"seed": 1, "save_steps": 5}, set())
        assert "other code" not in capsys.readouterr().out
        if changed == "script":
            script.write_text("two")
        else:
            (record["code"] if changed == "loss.py" else record["versions"])[changed] = "before"
        begin(tmp_path / "run", record, {"seed": 1, "save_steps": 5}, set())
    assert f"begun with other code ({changed} " in capsys.readouterr().out


FOREIGN = [
    {"checkpoint-1/model.safetensors": "", "metrics.jsonl": ""},  # another trainer's run
    {"config.json": '{"model_type": "qwen3"}', "model.safetensors": ""},
    {"config.json": '{"config": {}}'}, {"config.json": "{"}, {"config.json": "[]"}, {".git/HEAD": ""},
    *({name: Path("outside")} for name in (records.LOCK, ".config.json.partial", "heldout.jsonl")),  # links elsewhere
]  # fmt: skip


@pytest.mark.parametrize("files", FOREIGN)
def test_a_folder_that_is_not_ours_is_refused_and_stays_as_it_is(tmp_path, files):
    run = tmp_path / "run"
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            (run / name).symlink_to(tmp_path / content)
        else:
            (run / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    for resume in (True, False):
        refused("holds no run of ours", run, "train", resume)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_failed_or_killed_starts_left_is_in_nobodys_way_and_no_run_that_has_begun(tmp_path):
    for name in (records.LOCK, ".config.json.partial"):  # a kill or a full disk while config.json was written
        (tmp_path / name).write_text("{")
    (tmp_path / ".trial" / "partial").mkdir(parents=True)
    begin(tmp_path)
    with records.open_run(tmp_path, "evaluate", resume=False) as record:
        assert record is None and not (tmp_path / ".trial").exists()


@pytest.mark.parametrize("error", [InputError("a mistake"), KeyboardInterrupt()])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_start_that_fails_before_the_first_row_leaves_nothing(tmp_path, error, recorded):
    with pytest.raises(type(error)), records.open_run(tmp_path / "run", "train", False) as record:
        if recorded:
            begin(tmp_path / "run", record)
        assert (tmp_path / "run").is_dir()
        raise error
    assert not (tmp_path / "run").exists()
    start_run(tmp_path / "run")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_others_do_around_the_lock_is_seen(tmp_path, monkeypatch, moment):
    """Before it is taken a run begins and ends; or behind it the holder takes the folder away."""
    take, run = filelock.FileLock.acquire, tmp_path / "run"

    def take_late(lock, *args, **kwargs):
        if moment == "before":
            begin(run)
            records.append_rows(run / "metrics.jsonl", [{"step": 0}])
        result = take(lock, *args, **kwargs)
        if moment == "after":
            shutil.rmtree(run)
        return result

    monkeypatch.setattr(filelock.FileLock, "acquire", take_late)
    refused({"before": "holds another run", "after": "cannot be written"}[moment], run)


def test_a_folder_is_taken_away_before_others_can_hold_it(tmp_path, monkeypatch):
    """A second process takes the lock in the moment in which the first, having written nothing, lets it go."""
    run, release, second = tmp_path / "run", filelock.FileLock.release, []

    def release_to_another(lock, *args, **kwargs):
        release(lock, *args, **kwargs)
        if not second:
            second.append(records.open_run(run, "train", False))
            second[0].__enter__()

    monkeypatch.setattr(filelock.FileLock, "release", release_to_another)
    with pytest.raises(InputError, match="mistake"), records.open_run(run, "train", False):
        raise InputError("a mistake")
    is_there = run.is_dir()
    second[0].__exit__(None, None, None)
    assert is_there


def test_what_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert records.make_folder(tmp_path / "a" / "b").is_dir() and records.make_folder(tmp_path / "a" / "b").is_dir()
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/self/nothing")):
        with pytest.raises(InputError, match=rf"^--output_dir {path}: cannot be written"):
            records.make_folder(path)
        refused(rf"^--output_dir {path}", path, "train", False)


def test_two_runs_without_a_name_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(records.new_folder(None, "name")) for _ in range(3)] == ["runs/name", "runs/name-2", "runs/name-3"]
    assert str(records.new_folder("elsewhere", "name")) == "elsewhere" and not Path("elsewhere").exists()


# --- File systems -----------------------------------------------------------------------------------------------


def refuse(monkeypatch, owner, name, number):
    """Let a function of the operating system fail as a file system that does not offer it does."""

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_run_does_without_locks_and_says_so(tmp_path, monkeypatch, capsys, number):
    """filelock itself has another kind of lock for ENOSYS."""
    refuse(monkeypatch, fcntl, "flock", number)
    start_run(tmp_path / "run")
    assert records.read_record(tmp_path / "run")["config"]["seed"] == 1
    assert ("run: cannot be locked" in capsys.readouterr().out) == (number != errno.ENOSYS)


CANNOT = [(os, "fsync", errno.EIO), (os, "fsync", errno.ENOSPC), (Path, "replace", errno.EPERM), (Path, "rename", 18)]


@pytest.mark.parametrize(("owner", "name", "number"), CANNOT)
def test_what_it_cannot_do_without_is_told_before_the_work(tmp_path, monkeypatch, owner, name, number):
    refuse(monkeypatch, owner, name, number)
    with pytest.raises(InputError, match=rf"run: cannot be written \({os.strerror(number)}"):
        start_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_written_keeps_its_old_text_and_leaves_no_other(tmp_path, monkeypatch):
    records.write_atomically(tmp_path / "a.json", "old")
    refuse(monkeypatch, os, "fsync", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        records.write_atomically(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_rows_that_cannot_be_written_name_their_file(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: cannot be written .Is a directory"):
        records.append_rows(tmp_path, [{"a": 1}])


def test_links_are_not_followed(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    (outside / "kept").mkdir(parents=True)
    run.mkdir()
    (run / ".a.json.partial").symlink_to(outside / "new.json")
    records.write_atomically(run / "a.json", "text")
    (run / "folder").symlink_to(outside)
    records.remove(run / "folder")
    records.remove(run / "nothing")
    assert [path.name for path in outside.iterdir()] == ["kept"] and [p.name for p in run.iterdir()] == ["a.json"]


# --- Rows -------------------------------------------------------------------------------------------------------

KEY, VALUES = ("seed", "problem"), ("text",)
ROWS = [{"seed": 0, "problem": i, "text": "zero \x00, half \ud800, \u2028\n"} for i in range(3)]


def test_a_file_cut_anywhere_loses_the_torn_line_and_nothing_else(tmp_path):
    path = tmp_path / "samples.jsonl"
    records.RowFile(path, KEY, VALUES).add(ROWS)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends)
        assert list(records.RowFile(path, KEY, VALUES).rows.values()) == ROWS[:lines]
        assert path.read_bytes() == whole[: ends[lines - 1] if lines else 0]


LINES = ("{", "3", "[" * 99999, '{"seed": 0, "problem": 0}', '{"seed": 0, "problem": 0, "text": "", "x": 1}')


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", ["samples.jsonl", "samples-rank1.jsonl"])
def test_a_line_that_is_no_row_is_named_with_its_file(tmp_path, line, name):
    path = tmp_path / name
    records.append_rows(path, ROWS[:1])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=rf"{name}, line 2: not a row") as caught:
        records.RowFile(tmp_path / "samples.jsonl", KEY, VALUES)
    assert len(str(caught.value)) < 400 + len(str(path)) and path.exists()


def test_parts_of_killed_ranks_are_taken_in_once_without_their_torn_lines(tmp_path):
    records.append_rows(tmp_path / "samples.jsonl", ROWS[:1])
    records.append_rows(tmp_path / "samples-rank1.jsonl", ROWS[:2])  # the first was taken in before the kill
    (tmp_path / "samples-rank2.jsonl").write_text(json.dumps(ROWS[2]) + '\n{"seed": 1, "pro')
    file = records.RowFile(tmp_path / "samples.jsonl", KEY, VALUES)
    assert sorted(row["problem"] for row in file.rows.values()) == [0, 1, 2]
    assert records.read_rows(tmp_path / "samples.jsonl") == ROWS and len(list(tmp_path.iterdir())) == 1


def test_jobs_keep_their_order_and_are_done_once(tmp_path):
    done, path = [], tmp_path / "x.jsonl"

    def work(jobs):
        done.extend(jobs)
        return [{"a": a, "b": b, "sum": a + (b or 0)} for a, b in jobs]

    records.do_jobs(records.RowFile(path, ("a", "b"), ("sum",)), [(1, None), (2, 5)], work, 1)
    rows = records.do_jobs(records.RowFile(path, ("a", "b"), ("sum",)), [(3, 4), (2, 5), (1, None)], work, 10)
    assert [row["sum"] for row in rows] == [7, 7, 1] and done == [(1, None), (2, 5), (3, 4)]


def test_a_training_runs_rows_are_cut_back_to_its_start(tmp_path, capsys):
    for name in ("metrics.jsonl", "samples.jsonl"):
        records.append_rows(tmp_path / name, [{"step": step, "slot": 0} for step in range(3)])
        with (tmp_path / name).open("a") as file:
            file.write('{"st')
    scores = {step: {"sampled": 0.5, "greedy": 1.0} for step in ("0", "2", "3", "10")}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    log = records.RunLog(tmp_path, 2)
    assert list(log.evaluation) == ["0", "2"]  # those behind the start are scored again
    assert [row["step"] for row in log.earlier] == [0, 1] and not capsys.readouterr().out
    records.RunLog(tmp_path, 4)
    assert "metrics.jsonl: does not hold each of the 4 steps" in capsys.readouterr().out
    log.append({"step": 2}, [{"step": 2, "slot": 1}, {"step": 2, "slot": 0}])
    assert [row["step"] for row in records.read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    rows = records.read_rows(tmp_path / "samples.jsonl")
    assert [(row["step"], row["slot"]) for row in rows] == [(0, 0), (1, 0), (2, 0), (2, 1)]


def test_held_out_scores_of_a_step_replace_those_of_a_killed_try(tmp_path):
    def rows(step, correct):
        return [{"step": step, "decoding": decoding, "problem": i, "sample": 0, "correct": correct}
                for decoding in ("sampled", "greedy") for i in (1, 0)]  # fmt: skip

    log = records.RunLog(tmp_path, 0)
    assert "sampled 0.0000, greedy 0.0000 (2 problems)" in log.evaluate(0, rows(0, False))
    records.append_rows(tmp_path / "heldout.jsonl", rows(4, False)[:1])
    assert "sampled 0.0000 -> 1.0000" in log.evaluate(4, rows(4, True))
    kept = [(row["step"], row["correct"]) for row in records.read_rows(tmp_path / "heldout.jsonl")]
    assert kept == [(0, False)] * 4 + [(4, True)] * 4
    assert records.RunLog(tmp_path, 4).evaluation == log.evaluation


@pytest.mark.parametrize("text", ['{"0', "[1]", '{"first": {}}'])
def test_accuracies_that_are_no_runs_are_named(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(InputError, match=r"evaluation.json: not the accuracies of a run"):
        records.RunLog(tmp_path, 0)


# --- Inputs by content ------------------------------------------------------------------------------------------

DECIDING = (
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.gguf",
    "consolidated.00.pth", "merges.txt", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja", "adapter_config.json", "model.safetensors",
)  # fmt: skip
BESIDE = ("README.md", "trainer_state.pt", "optimizer.pt", "rng_state_0.pth", "manifest.json", "ema.safetensors", "log")


@pytest.fixture
def folder(tmp_path, tmp_path_factory):
    (tmp_path / "model.safetensors").symlink_to(tmp_path_factory.mktemp("blobs") / "abc")  # as in the hub's cache
    for name in DECIDING + BESIDE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"before")
    return tmp_path


@pytest.mark.parametrize("name", DECIDING)
def test_a_changed_file_of_the_same_size_and_time_changes_the_fingerprint(folder, name):
    before, times = records.fingerprint(str(folder)), (folder / name).stat()
    assert sorted(before) == sorted(DECIDING)
    (folder / name).write_bytes(b"after!")
    os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = records.fingerprint(str(folder))
    assert [key for key in before if before[key] != after[key]] == [name] and name in records.difference(before, after)


def test_a_hub_model_is_known_by_its_revision(tmp_path, monkeypatch):
    """From a cache of the hub's layout, without a network."""
    base = families.make_checkpoint("qwen3", tmp_path / "base")
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    find = partial(records.cached_file, cache_dir=tmp_path / "hub", local_files_only=True)
    monkeypatch.setattr(records, "cached_file", find)
    assert records.fingerprint("owner/name") == {"revision": "a" * 40}
    with pytest.raises(InputError, match="owner/other"):
        records.fingerprint("owner/other")


def test_problems_are_known_in_their_order_and_with_all_fields():
    one, two = Problem("a", "b", "c"), Problem("d", "e", "f")
    others = [[Problem(*fields), two] for fields in (("a", "b", "x"), ("a", "x", "c"), ("ab", "", "c"))]
    assert len({records.digest(problems) for problems in ([one, two], [two, one], [one], *others)}) == 6


def test_a_difference_in_words():
    assert records.difference({"a": "1"}, {"a": "1"}) is None and records.difference(None, None) is None
    assert records.difference("0123456789abcdef", "x") == "0123456789ab, now x"
    assert records.difference(None, {"revision": "1"}) is not None
    files = {"config.json": "1", "model.safetensors": "2"}
    assert records.difference(files, {**files, "config.json": "3"}) == "config.json 1, now 3"
    assert records.difference(files, {**files, "chat.jinja": "3"}) == "chat.jinja None, now 3"
    assert records.difference(files, {"config.json": "1"}) == "model.safetensors 2, now None"
