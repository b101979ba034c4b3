"""samples.jsonl: torn lines, damaged lines, two writers, and regimes that may not be mixed."""

from contextlib import suppress
from dataclasses import replace

import pytest

from errors import InputError
from runtime.samples import Sample, SampleFile, check_regime

ROW = Sample(
    problem=3, sample=1, seed=0, text="zero \x00, half \ud800 of a pair, \\boxed{1}\n", tokens=5, finish_reason="eos"
)


def write(path, rows, regime):
    """Open the file, add rows, and give what was there before them."""
    with SampleFile(path) as file:
        header, samples = file.header, list(file.samples.values())
        file.begin(regime)
        for number, row in enumerate(rows):
            file.add(replace(row, sample=number))
    return header, samples


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    assert write(path, [ROW], {"model": "m"}) == (None, [])
    assert write(path, [], {}) == ({"model": "m"}, [replace(ROW, sample=0)])


def test_a_file_cut_anywhere_loses_the_torn_line_and_nothing_else(tmp_path):
    path = tmp_path / "run" / "samples.jsonl"
    write(path, [ROW, ROW], {"model": "m"})
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole[:cut])
        header, samples = write(path, [], {"model": "m"})
        lines = sum(end <= cut for end in ends)
        assert (header is None) == (lines == 0) and len(samples) == max(lines - 1, 0)
        if lines:
            assert path.read_bytes() == whole[: ends[lines - 1]]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    write(path, [ROW, ROW], {"model": "m"})
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"{\n", b"[]\n", b'{"problem": 1}\n', b"\x00\x00\n"):
        path.write_bytes(lines[0] + damaged + lines[2])
        with pytest.raises(InputError, match="line 2"):
            write(path, [], {})
    for first in (lines[1], b'{"regime": 3}\n'):
        path.write_bytes(first)
        with pytest.raises(InputError, match="line 1"):
            write(path, [], {})


def test_an_empty_regime_is_another_regime(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"regime": {}}\n')
    with SampleFile(path) as file:
        file.begin({"model": "m"})
        with pytest.raises(InputError, match="its samples have model None, not 'm'"):
            check_regime(file.header, {"model": "m"}, path)


def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    with SampleFile(path), pytest.raises(InputError, match="another process is running in it"), SampleFile(path):
        pass
    write(path, [ROW], {"model": "m"})  # and the lock is gone afterwards


@pytest.mark.parametrize("error", [InputError("a mistake"), KeyboardInterrupt(), None])
def test_an_evaluation_without_a_sample_leaves_no_folder(tmp_path, error):
    with suppress(InputError, KeyboardInterrupt), SampleFile(tmp_path / "run" / "samples.jsonl"):
        if error is not None:
            raise error
    assert not (tmp_path / "run").exists()


def test_the_traceback_of_an_unexpected_error_is_kept(tmp_path):
    path = tmp_path / "run" / "samples.jsonl"
    with pytest.raises(ZeroDivisionError), SampleFile(path):
        1 / 0  # noqa: B018
    assert "1 / 0" in (tmp_path / "run" / "error.log").read_text()
    write(path, [ROW], {"model": "m"})


@pytest.mark.parametrize(
    "files",
    [
        {"samples.jsonl": '{"step": 0, "slot": 1}\n', "config.json": "{}"},
        {"samples.jsonl": '{"step": 0, "sl'},
        {"samples.jsonl": "not JSON"},
        {"samples.jsonl": "", "metrics.jsonl": ""},
        {"notes.txt": "mine"},
    ],
)
def test_a_folder_that_is_no_evaluations_stays_as_it_is(tmp_path, files):
    """A torn line that is not ours is not cut off either."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="--output_dir"):
        write(tmp_path / "samples.jsonl", [ROW], {})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_parts_that_a_killed_start_left_are_in_nobodys_way(tmp_path):
    (tmp_path / "samples-rank1.jsonl").write_text("{")
    (tmp_path / "samples.jsonl").write_text("")
    assert write(tmp_path / "samples.jsonl", [ROW], {"model": "m"}) == (None, [])


def test_a_mismatch_names_the_field_and_content_counts_more_than_a_name(tmp_path):
    path = tmp_path / "samples.jsonl"
    files = {"config.json": "1", "model.safetensors": "2"}
    found = {"model": "a/m", "model_pin": files, "adapter": None, "adapter_pin": None, "benchmark": "x",
             "benchmark_sha256": "2", "top_p": 0.95}  # fmt: skip
    check_regime(found, dict(found), path)
    check_regime(found, {**found, "model": "elsewhere/m", "benchmark": "y"}, path)
    for field, value, said in (
        ("top_p", 1.0, "top_p 0.95, not 1.0"),
        ("model_pin", {**files, "config.json": "3"}, r"model_pin \(config.json 1, now 3"),
        ("model_pin", {**files, "chat_template.jinja": "3"}, r"chat_template.jinja not there, now 3"),
        ("model_pin", {"revision": "4"}, "model_pin"),
        ("adapter_pin", {"adapter_config.json": "3"}, "adapter_pin"),
        ("benchmark_sha256", "3", "benchmark_sha256"),
    ):
        with pytest.raises(InputError, match=said):
            check_regime(found, {**found, field: value}, path)
