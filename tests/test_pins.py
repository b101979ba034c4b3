"""Pins: every file that a sample depends on changes them, no other does."""

import os
from functools import partial

import families
import pytest

import runtime.pins
from errors import InputError
from problems import Problem
from runtime.pins import difference, fingerprint, model_pin, problems_pin

DECIDING = (
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "model.gguf", "consolidated.00.pth", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json",
)  # fmt: skip
BESIDE = (
    "README.md", "trainer_state.pt", "optimizer.pt", "training_args.bin", "rng_state_0.pth", "manifest.json",
    "ema.safetensors", ".gitattributes", "log.out",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in DECIDING + BESIDE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"before")
    return tmp_path


def test_a_pin_names_what_decides_and_nothing_else(folder):
    assert sorted(fingerprint(str(folder))) == sorted(DECIDING)


@pytest.mark.parametrize("name", DECIDING)
def test_a_changed_file_of_the_same_size_and_time_changes_the_pin(folder, name):
    before, times = fingerprint(str(folder)), (folder / name).stat()
    (folder / name).write_bytes(b"after!")
    os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = fingerprint(str(folder))
    assert [key for key in before if before[key] != after[key]] == [name]
    assert name in difference(before, after)
    (folder / name).unlink()
    assert f"{name} {before[name][:12]}, now not there" in difference(before, fingerprint(str(folder)))


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_may_change(folder, name):
    before = fingerprint(str(folder))
    (folder / name).unlink()
    assert fingerprint(str(folder)) == before


def test_links_are_followed(folder, tmp_path_factory):
    """The hub's cache is made of links."""
    blob = tmp_path_factory.mktemp("blobs") / "abc"
    blob.write_bytes(b"before")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(blob)
    before = fingerprint(str(folder))
    blob.write_bytes(b"after!")
    assert "model.safetensors" in difference(before, fingerprint(str(folder)))


def test_a_hub_model_is_pinned_by_its_revision(tmp_path, monkeypatch):
    """From a cache of the hub's layout, without a network."""
    base = families.make_checkpoint("qwen3", tmp_path / "base")
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    find = partial(runtime.pins.cached_file, cache_dir=tmp_path / "hub", local_files_only=True)
    monkeypatch.setattr(runtime.pins, "cached_file", find)
    assert model_pin("owner/name") == {"revision": "a" * 40}
    with pytest.raises(InputError, match="owner/other"):
        model_pin("owner/other")


def test_problems_are_pinned_in_their_order_and_with_all_fields():
    one, two = Problem("a", "b", "c"), Problem("d", "e", "f")
    others = ([two, one], [one], [Problem("a", "b", "x"), two], [Problem("a", "x", "c"), two],
              [Problem("ab", "", "c"), two])  # fmt: skip
    assert len({problems_pin([one, two]), *map(problems_pin, others)}) == 6


def test_a_difference_in_words():
    assert difference({"a": "1"}, {"a": "1"}) is None and difference(None, None) is None
    assert difference("0123456789abcdef", "x") == "0123456789ab, now x"
    assert difference(None, {"revision": "1"}) is not None
