"""The maker of the worlds' models: tokenizer, examples, training, and what it writes."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errors import InputError
from experiments import make_world
from experiments.make_world import CONTEXTS, IGNORED, example, make_model, make_tokenizer, padded, train
from experiments.study.grids import GRIDS
from experiments.study.worlds import WORLDS
from problems import load_problems, tiny_problems, tiny_split
from runtime.loading import load_model, load_tokenizer
from teacher import DIAGNOSTIC_PROMPT, EVALUATION_PROMPT, STUDENT_PROMPT, TEACHER_PROMPT

FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json"}


@pytest.fixture(autouse=True)
def fewer_sums(monkeypatch):
    few = lambda split, count, **more: tiny_problems(split, min(count, 2000), **more)  # noqa: E731
    monkeypatch.setattr(make_world, "tiny_problems", few)


def test_the_shipped_tokenizer_and_architecture_are_the_makers():
    made, shipped = make_tokenizer(), load_tokenizer("tiny")
    assert made.get_vocab() == shipped.get_vocab()
    assert made.chat_template == shipped.chat_template
    printable = "".join(map(chr, range(32, 127)))
    assert made.decode(made.encode(printable, add_special_tokens=False)) == printable
    made, shipped = make_model(made), load_model("tiny", device="cpu")
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}


def test_contexts_are_the_scripts_own_prompts():
    """A reference or the answer in the prompt makes a teacher; nothing else does."""
    prompts = {STUDENT_PROMPT, EVALUATION_PROMPT, TEACHER_PROMPT, DIAGNOSTIC_PROMPT}
    assert {template for template, _, _ in CONTEXTS} == prompts
    for template, _, teacher in CONTEXTS:
        assert teacher == ("{solution}" in template or "{answer}" in template)


@pytest.mark.parametrize("name", WORLDS)
def test_labels_are_the_ids_or_ignored(name):
    tokenizer, draw, world = load_tokenizer("tiny"), random.Random(1), WORLDS[name]
    for problem in tiny_problems("train", 20, num_addends=world.num_addends):
        ids, labels = example(tokenizer, problem, draw, world)
        assert len(ids) == len(labels)
        assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
        assert labels[-1] == tokenizer.eos_token_id and labels[0] == IGNORED
        assert tokenizer.unk_token_id not in ids


def test_what_the_training_loop_draws(monkeypatch):
    """No held-out sum, another seed's others; in a placed world first solutions with more guesses, anywhere."""

    def drawn(world, stage=0, seed=0):
        seen = []
        monkeypatch.setattr(make_world, "example", lambda *given: seen.append(given) or example(*given))
        tokenizer = make_tokenizer()
        train(make_model(tokenizer), tokenizer, world, stage, seed)
        return seen

    world = replace(WORLDS["embedded"], stages=((1, 1e-3),), batch_size=4)
    sums, others = ([problem.problem for _, problem, *_ in drawn(world, seed=seed)] for seed in (0, 1))
    assert {tiny_split([int(addend) for addend in text.split("+")]) for text in sums} == {"train"}
    assert len(sums) == 4 and sums != others
    placed = replace(WORLDS["placed-56"], stages=((1, 1e-3),) * 2, batch_size=1)
    (first,), (second,) = (drawn(placed, stage) for stage in (0, 1))
    assert first[3].placed == "123456" and first[3].guess > 4 * placed.guess and second[3] == placed


def test_micro_batches_add_up_to_the_mean_over_the_batch():
    torch.manual_seed(0)
    tokenizer, draw, world = make_tokenizer(), random.Random(0), WORLDS["embedded"]
    model = make_model(tokenizer)
    rows = [example(tokenizer, problem, draw, world) for problem in tiny_problems("train", 6)]
    count = sum(label != IGNORED for _, labels in rows for label in labels)
    parts = []
    for part in (rows[:2], rows[2:]):
        ids, labels = padded(part, tokenizer.pad_token_id)
        parts.append(model(input_ids=ids, labels=labels, num_items_in_batch=count).loss)
    ids, labels = padded(rows, tokenizer.pad_token_id)
    torch.testing.assert_close(sum(parts), model(input_ids=ids, labels=labels).loss)


@pytest.mark.slow
def test_training_lowers_the_loss(capsys):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    train(make_model(tokenizer), tokenizer, replace(WORLDS["embedded"], stages=((40, 2e-3),), batch_size=8), stage=0)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.6 * losses[0]


def test_a_world_is_written_as_the_scripts_read_it(tmp_path, call, monkeypatch):
    monkeypatch.setitem(WORLDS, "leap", replace(WORLDS["leap"], stages=((1, 1e-3),), batch_size=4))
    assert call(make_world, "--world", "leap", "--dose", "0.2", "--seed", 5, "--output_dir", tmp_path) is None
    assert (tmp_path / "WORLD").read_text() == "world leap, dose 0.2, seed 5\n"
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES | {"model.safetensors"}
    load_model(str(tmp_path / "model"), device="cpu")
    assert len(load_tokenizer(str(tmp_path / "model"))) == len(load_tokenizer("tiny"))
    train_set, held_out = (load_problems(str(tmp_path / f"{split}.jsonl")) for split in ("train", "heldout"))
    assert (len(train_set), len(held_out)) == (2000, 400)
    assert not {tuple(sorted(p.problem)) for p in train_set} & {tuple(sorted(p.problem)) for p in held_out}
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert row.keys() == {"problem", "solution", "answer"}


@pytest.mark.parametrize("dose, folder", [(None, "leap-0.4"), ("0", "leap-0.0"), (None, "leak")])
def test_a_world_lies_where_the_grids_look_for_it(dose, folder, call, tmp_path, monkeypatch):
    monkeypatch.setattr(make_world, "train", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert call(make_world, "--world", folder[:4], *(["--dose", dose] if dose else [])) is None
    assert [path.name for path in Path("runs/worlds").iterdir()] == [folder]
    if grid := {"leap-0.4": "leap", "leak": "leak"}.get(folder):
        assert Path(GRIDS[grid].common["data"]).is_file() and Path(GRIDS[grid].common["model"]).is_dir()


def test_a_placed_world_has_sums_to_tune_on_and_others_four_times(call, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(make_world, "train", lambda *given: seeds.append(given[-1]))
    monkeypatch.chdir(tmp_path)
    assert call(make_world, "--world", "placed-12", "--seed", "2") is None and seeds == [2, 2]
    folder = Path("runs/worlds/placed-12-seed2")
    files = (folder / f"{name}.jsonl" for name in ("heldout", "validation", "final"))
    held_out, tuned_on, final = (file.read_text().splitlines() for file in files)
    assert len(set(held_out)) == 400 and tuned_on == held_out[:200] and final == 4 * held_out[200:]


@pytest.mark.slow
def test_the_embedded_model_is_made_from_scratch(tmp_path, call, monkeypatch):
    monkeypatch.setitem(WORLDS, "embedded", replace(WORLDS["embedded"], stages=((1, 1e-3),)))
    assert call(make_world, "--world", "embedded", "--output_dir", tmp_path / "tiny") is None
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == FILES | {"model.safetensors", "WORLD"}
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_size < 3.5e6


@pytest.mark.parametrize("world, flag, value", [("leap", "--dose", "1.5"), ("leak", "--dose", "0.2")])
def test_a_flag_that_cannot_be_is_one_line(call, world, flag, value, tmp_path):
    with pytest.raises(InputError, match=f"^{flag} {value}: "):
        call(make_world, "--world", world, flag, value, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", ["embedded", "leap"])
def test_a_folder_that_is_not_ours_is_refused_before_the_slow_work(call, world, tmp_path, monkeypatch):
    monkeypatch.setattr(make_world, "train", None)
    (tmp_path / "thesis.txt").write_text("mine")
    for folder, said in (
        (tmp_path, "is not empty and has no file WORLD .thesis.txt is there"),
        (tmp_path / "thesis.txt", "cannot be written"),
        (tmp_path / "thesis.txt" / "world", "cannot be written"),
    ):
        with pytest.raises(InputError, match=f"--output_dir {folder}: {said}"):
            call(make_world, "--world", world, "--output_dir", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    for name in ("train.jsonl", "model.safetensors"):  # a name is no proof
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / name).write_text("mine")
    with pytest.raises(InputError, match="theirs: is not empty"):
        call(make_world, "--world", world, "--output_dir", tmp_path / "theirs")
    make_world.claim(tmp_path / "new", "world x, dose 0.4, seed 3")
    make_world.claim(tmp_path / "new", "world x, dose 0.4, seed 3")  # once more: it is ours
    with pytest.raises(InputError, match=r"new: holds world x, dose 0\.4, seed 3, not world x, dose 0\.4, seed 4"):
        make_world.claim(tmp_path / "new", "world x, dose 0.4, seed 4")
    assert (tmp_path / "new" / "WORLD").read_text() == "world x, dose 0.4, seed 3\n"
