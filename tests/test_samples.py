"""samples.jsonl: torn lines, damaged lines, two writers, and regimes that may not be mixed."""

import json
from dataclasses import asdict

import pytest

from checkpoint import Sample, check_regime, open_samples, weights_digest
from problems import InputError

ROW = Sample(
    problem=3, sample=1, seed=0, text="zero \x00, half \ud800 of a pair, \\boxed{1}\n", tokens=5, finish_reason="eos"
)


def write(path, rows, regime):
    with open_samples(path) as (header, samples, append):
        if header is None:
            append({"regime": regime})
        for row in rows:
            append(asdict(row))
    return header, samples


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    assert write(path, [ROW], {"model": "m"}) == (None, [])
    assert write(path, [], {}) == ({"model": "m"}, [ROW])


def test_a_file_cut_anywhere_loses_the_torn_line_and_nothing_else(tmp_path):
    path = tmp_path / "samples.jsonl"
    write(path, [ROW, ROW], {"model": "m"})
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
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
    path.write_bytes(lines[1])
    with pytest.raises(InputError, match="line 1"):
        write(path, [], {})


def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    with open_samples(path), pytest.raises(InputError, match="another evaluation"), open_samples(path):
        pass
    write(path, [ROW], {"model": "m"})  # and the lock is gone afterwards


def test_a_mismatch_names_the_field_and_a_hash_counts_more_than_a_path(tmp_path):
    path = tmp_path / "samples.jsonl"
    found = {"model": "a/m", "model_sha256": "1", "benchmark": "x", "benchmark_sha256": "2", "top_p": 0.95}
    check_regime(found, dict(found), path)
    check_regime(found, {**found, "model": "elsewhere/m"}, path)
    for field, value in (("top_p", 1.0), ("model_sha256", "3"), ("benchmark_sha256", "3")):
        with pytest.raises(InputError, match=field):
            check_regime(found, {**found, field: value}, path)
    hub = {"model": "owner/name", "model_sha256": None}
    with pytest.raises(InputError, match="model 'owner/name'"):
        check_regime(hub, {**hub, "model": "owner/other"}, path)


def test_the_digest_follows_the_weights_and_the_adapters_settings(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abc")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1}))
    first = weights_digest(tmp_path)
    assert first == weights_digest(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    second = weights_digest(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abd")
    assert len({first, second, weights_digest(tmp_path)}) == 3
