"""Checkpoints torn, corrupted or opened by others, and adapters that do not fit."""

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path

import families
import pytest
import torch
import transformers
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_model import PROMPTS
from test_records import refuse

from chat import Chat
from errors import InputError
from model import add_lora, lora_parameters
from problems import Problem
from runtime import checkpoint as checkpoints
from runtime.loading import load_model
from runtime.records import sha256
from teacher import Teacher, encode_prompt

FILES = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.pt", "ema.safetensors", "manifest.json")


class Trained:
    """Steps on made-up gradients: an adapter and an EMA teacher or, for `lora` False, all weights and a live one."""

    def __init__(self, base, lora: bool = True) -> None:
        torch.manual_seed(3)
        self.base, self.model = str(base), load_model(str(base), device="cpu")
        if lora:
            add_lora(self.model, 4, 8.0)
        self.teacher = Teacher(self.model, "ema" if lora else "live", 0.9)
        self.optimizer = torch.optim.AdamW(self.teacher.trained, lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (step + 1))

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in self.teacher.trained:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.scheduler.step()
        self.teacher.update()

    def save(self, run: Path, step: int) -> Path:
        return checkpoints.save_checkpoint(run, step, self, self.base)

    def load(self, path: Path) -> int:
        return checkpoints.load_checkpoint(path, self)


@pytest.fixture(scope="module")
def saved(qwen3, tmp_path_factory):
    trained, run = Trained(qwen3), tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        trained.step(step)
        trained.save(run, step)
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A run folder with whole checkpoints after steps 1 and 2."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "delete"])
def test_any_harmed_file_is_noticed_and_the_checkpoint_before_is_used(run, name, harm, capsys):
    path = run / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    if harm == "flip" and name == "manifest.json":
        content = content.replace(b'"step": 2', b'"step": 3')
    elif harm == "flip":
        content[len(content) // 2] ^= 1
    elif harm == "truncate":
        content = content[: len(content) // 2]
    path.unlink() if harm == "delete" else path.write_bytes(b"" if harm == "empty" else content)
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-1"
    (line,) = capsys.readouterr().out.splitlines()
    assert "checkpoint-2" in line and "using the checkpoint before it" in line


@pytest.mark.parametrize(
    "manifest", ["[]", '{"step": 2, "sha256": {}}', '{"step": 2, "sha256": 1}', "{}", "\0", "[" * 99_999]
)
def test_a_manifest_that_vouches_for_nothing_is_no_checkpoint(run, manifest):
    (run / "checkpoint-2" / "manifest.json").write_text(manifest)
    assert checkpoints.damage(run / "checkpoint-2") is not None
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-1"


def test_the_newest_checkpoint_is_the_newest_by_number_and_no_partial_one(run):
    for step in (75, 100):
        manifest = json.loads((run / "checkpoint-1" / "manifest.json").read_text())
        shutil.copytree(run / "checkpoint-1", run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}" / "manifest.json").write_text(json.dumps({**manifest, "step": step}))
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-100"
    (run / "checkpoint-100").rename(run / ".partial-100")
    (run / "checkpoint-best").mkdir()
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-75"
    assert checkpoints.newest_checkpoint(run / "nowhere") is None


FULL = {
    "save_adapter": OSError(errno.ENOSPC, "No space left on device"),
    "save_file": SafetensorError("IoError: No space left on device"),
    "torch.save": RuntimeError("PytorchStreamWriter failed writing file: No space left on device"),
    "os.fsync": OSError(errno.EDQUOT, "Disk quota exceeded"),
}
GPU = [kind("CUDA error: an illegal memory access") for kind in (torch.OutOfMemoryError, RuntimeError)]


@pytest.mark.parametrize(("place", "error"), [*FULL.items(), *(("save_adapter", error) for error in GPU)])
def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_whole(qwen3, run, monkeypatch, place, error):
    """An error of the GPU is not the disk's and passes as it is."""

    def fail(*args, **kwargs):
        raise error

    owner, _, name = place.rpartition(".")
    monkeypatch.setattr({"torch": torch, "os": os, "": checkpoints}[owner], name, fail)
    told = r"CUDA error" if error in GPU else r"checkpoint-3: cannot be written .*; earlier checkpoints are whole"
    with pytest.raises(type(error) if error in GPU else InputError, match=told):
        Trained(qwen3).save(run, 3)
    monkeypatch.undo()
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-2"


@pytest.mark.parametrize("name", ["checkpoint-3", ".partial-3"])
def test_links_to_somewhere_else_are_not_followed(qwen3, run, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (run / name).symlink_to(outside)
    Trained(qwen3).save(run, 3)
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-3" and not (run / "checkpoint-3").is_symlink()
    assert [path.name for path in outside.iterdir()] == ["kept"]


def test_a_checkpoint_is_saved_where_modes_cannot_be_set(qwen3, run, monkeypatch):
    for owner in (Path, os):
        refuse(monkeypatch, owner, "chmod", errno.EPERM)
    Trained(qwen3).save(run, 3)
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-3"


class Code:
    """A pickle that runs a command where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def vouch(checkpoint: Path, name: str) -> None:
    """A file's checksum put in order, as somebody who means harm would see to."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"][name] = sha256(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoints.damage(checkpoint) is None


@pytest.mark.parametrize("state", [Code, lambda path: [1], lambda path: {"optimizer": {}, "scheduler": {}}])
def test_a_trainer_state_that_runs_code_or_is_another_is_refused(qwen3, run, tmp_path, state):
    checkpoint = run / "checkpoint-2"
    torch.save(state(tmp_path / "harmed"), checkpoint / "trainer_state.pt")
    vouch(checkpoint, "trainer_state.pt")
    with pytest.raises(InputError, match=r"trainer_state\.pt: not of this run"):
        Trained(qwen3).load(checkpoint)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("file", ["ema.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("change", ["lacks one", "has one more", "has another shape"])
def test_tensors_that_do_not_fit_are_named(qwen3, run, file, change):
    path, trained = run / "checkpoint-2" / file, Trained(qwen3)
    tensors, before = load_file(path), [p.detach().clone() for p in lora_parameters(trained.model)]
    name = "more" if change == "has one more" else min(tensors)
    tensors[name] = torch.zeros(3)
    if change == "lacks one":
        del tensors[name]
    save_file(tensors, path)
    vouch(path.parent, file)
    with pytest.raises(InputError, match=rf"{file}: does not fit the model: {re.escape(name)} is .* there and .* here"):
        trained.load(path.parent)
    untouched = all(map(torch.equal, before, lora_parameters(trained.model)))
    assert untouched or file == "ema.safetensors"  # which is read behind the adapter


# --- Adapters in PEFT's format: ours in PEFT, PEFT's with us ----------------------------------------------------


def test_an_adapter_that_peft_wrote_gives_pefts_logits(model, checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="gaussian")
    theirs = peft.get_peft_model(load_model(checkpoint, device="cpu"), config).eval()
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    checkpoints.load_adapter(model, tmp_path)
    ids = torch.tensor([PROMPTS[2]])
    torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, "use_dora": True}))
    with pytest.raises(InputError, match="use_dora"):
        checkpoints.load_adapter(load_model(checkpoint, device="cpu"), tmp_path)


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(("field", "value"), [
    ("alpha_pattern", {"q_proj": 16}), ("rank_pattern", {"q_proj": 2}), ("init_lora_weights", "pissa"),
    ("use_rslora", True), ("modules_to_save", ["lm_head"]), ("layers_to_transform", 1), ("bias", "all"),
    ("task_type", "SEQ_CLS"), ("peft_type", "IA3"), ("a_field_of_tomorrow", True),
])  # fmt: skip
def test_more_than_plain_lora_is_refused_by_its_field(tmp_path, field, value):
    checkpoints.check_adapter_fields(PLAIN, tmp_path)
    with pytest.raises(InputError, match=field):
        checkpoints.check_adapter_fields({**PLAIN, field: value}, tmp_path)


def test_pefts_own_defaults_are_understood(tmp_path):
    peft = pytest.importorskip("peft")
    config = json.loads(json.dumps(peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM").to_dict(), default=str))
    checkpoints.check_adapter_fields({**config, "peft_type": "LORA"}, tmp_path)
    named = {*checkpoints.ADAPTER_UNDERSTOOD, *checkpoints.ADAPTER_FREE} - {"runtime_config"}
    assert set(config) >= named  # the table names real fields


NO_SIZES = [{**PLAIN, name: value} for name in ("r", "lora_alpha", "lora_dropout")
            for value in ("4", -1, float("nan"), float("inf"), True, [4], None)] + [{**PLAIN, "r": 16.5}]  # fmt: skip


@pytest.mark.parametrize("config", [[], {"peft_type": "LORA"}, {"lora_alpha": 8}, {"r": 4}, *NO_SIZES])
def test_a_config_that_is_no_adapters(tmp_path, config):
    with pytest.raises(InputError, match=r"adapter_config\.json has .* for (r|lora_alpha|lora_dropout)"):
        checkpoints.check_adapter_fields(config, tmp_path)


def test_the_base_is_named_for_every_folder(model, checkpoint, tmp_path, monkeypatch):
    add_lora(model, rank=4, alpha=8.0)
    monkeypatch.chdir(checkpoint.parent)
    for base, stored in ((checkpoint.name, str(checkpoint)), ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B")):
        checkpoints.save_adapter(model, tmp_path, base)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == stored


# --- Opened as others would, from another folder ----------------------------------------------------------------


IDS = [[5, 9, 40, 7, 21, 33]]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base with sampling defaults, named from its own folder, so by a relative path."""
    families.make_checkpoint("qwen3", tmp_path / "base")
    defaults = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**defaults, "top_k": 7, "do_sample": True}))
    monkeypatch.chdir(tmp_path)
    return "base"


def trained(base: str, run: Path, lora: bool):
    """A checkpoint of a model whose weights have moved, and its logits."""
    made = Trained(base, lora)
    made.step(1)
    with torch.no_grad():
        return made.save(run, 1), made.model(input_ids=torch.tensor(IDS)).logits.flatten()


def test_an_adapter_of_another_base_of_the_same_shape_is_told(base, tmp_path, capsys):
    checkpoint, _ = trained(base, tmp_path / "run", lora=True)
    for name, is_told in (("base", False), ("base-instruct", True)):
        families.make_checkpoint("qwen3", tmp_path / name, seed=1)
        checkpoints.load_adapter(load_model(name, device="cpu"), checkpoint)
        assert (f"was trained on {tmp_path / 'base'}, and --model is {name}" in capsys.readouterr().out) == is_told


def check_logits(model, logits):
    found = model.eval()(input_ids=torch.tensor(IDS)).logits.flatten()
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_all_weights(base, tmp_path, monkeypatch):
    checkpoint, logits = trained(base, tmp_path / "run", lora=False)
    eos = json.loads(Path("base/config.json").read_text())["eos_token_id"]
    monkeypatch.chdir("/")
    check_logits(transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32"), logits)
    turns, tokenizer = [{"role": "user", "content": "1+1"}], transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    defaults = transformers.GenerationConfig.from_pretrained(checkpoint)
    assert (defaults.top_k, defaults.eos_token_id) == (7, eos)


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_have_the_mode_that_the_umask_asks_for(base, tmp_path, mask):
    before = os.umask(mask)
    try:
        for lora in (True, False):
            directory = trained(base, tmp_path / f"run-{lora}", lora)[0]
            assert stat.S_IMODE(directory.stat().st_mode) == 0o777 & ~mask
            for path in directory.iterdir():
                assert (path.name, stat.S_IMODE(path.stat().st_mode)) == (path.name, 0o666 & ~mask)
    finally:
        os.umask(before)


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_says_what_it_is_and_its_card_may_be_edited(base, tmp_path, lora, monkeypatch):
    """No path of this machine; the commands of the card are run in its directory, the base is where others have it."""
    data, asked = f"{tmp_path}/sums.jsonl", 'Sum "{problem}"\nin $\\boxed{}$'
    command = f"train.py --data {data} --prompts='{tmp_path}/a b' --x Qwen/Q"
    config = {"method": "pwopsd", "data": data, "dtype": "float32", "max_new_tokens": 4, "lora_rank": 4}
    facts = {"config": config, "versions": {"torch": "2"}, "git_commit": "abc", "ranks": 4}
    (tmp_path / "run").mkdir()
    chat = {"kwargs": {"reasoning_effort": "high", "who": "it's $HOME"}}
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}{% if enable_thinking %}{{ reasoning_effort }}{% endif %}")
    told = {"enable_thinking": True, "thinking": True, **chat["kwargs"]}
    record = {**facts, "command": command, "inputs": {"prompts": {"evaluation": asked, "chat": chat}}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    checkpoint, logits = trained(base, tmp_path / "run", lora)
    card = (checkpoint / "README.md").read_text()
    assert str(tmp_path) not in card and "`train.py --data sums.jsonl --prompts='a b' --x Qwen/Q`, on 4 process" in card
    assert "base_model: owner/base" in checkpoints.model_card(tmp_path, 1, "owner/base", lora)
    (tmp_path / "owner" / "base").mkdir(parents=True)  # a relative directory is no hub name
    assert "base_model" not in checkpoints.model_card(tmp_path, 1, "owner/base", lora)
    for fact in ("- base: base\n", "- data: sums.jsonl\n", "pwopsd, step 1", "commit abc; torch 2"):
        assert fact in card, fact
    (python, serve, lm_eval), here = re.findall(r"```[a-z]+\n(.*?)```", card, re.DOTALL), {}
    if lora:
        pytest.importorskip("peft")
    monkeypatch.chdir(checkpoint)
    exec(python.replace('"base"', f'"{tmp_path}/base"'), here)
    check_logits(here["model"], logits)
    example = Problem("What is 2+3?", "", "")
    wanted = encode_prompt(here["tokenizer"], asked, example, True, Chat(chat["kwargs"]))
    assert here["inputs"]["input_ids"][0].tolist() == wanted and here["chat"] == told
    assert here["tokenizer"].decode(wanted).endswith("high")
    assert 'dtype="float32"' in python
    request = json.loads(serve.partition("<<'END'\n")[2].partition("\nEND")[0])
    assert request["messages"] == here["messages"] and request["max_tokens"] == 4
    model = "base --enable-lora --max-lora-rank 8 --lora-modules pw=." if lora else ". --served-model-name pw"
    assert serve.startswith(f"vllm serve {model} --dtype float32 --generation-config vllm\n")
    task = yaml.safe_load(lm_eval.partition("<<'END'\n")[2].partition("\nEND\n")[0])
    assert task["doc_to_text"] == asked.replace("{problem}", "{{problem}}")
    assert re.findall(task["filter_list"][0]["filter"][0]["regex_pattern"], r"\boxed{1} \boxed{2}") == ["1", "2"]
    given = json.loads(lm_eval.partition("--model_args '")[2].partition("'\n")[0])
    assert given.pop("chat_template_args") == request["chat_template_kwargs"] == told
    assert given == {"pretrained": "base" if lora else ".", "dtype": "float32"} | ({"peft": "."} if lora else {})
    (checkpoint / "README.md").write_text("mine")
    assert checkpoints.damage(checkpoint) is None


def test_a_tokenizer_with_several_templates_is_saved_whole(base, tmp_path):
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    (tmp_path / "base" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    checkpoint, _ = trained(base, tmp_path / "run", lora=False)
    template = checkpoint / "additional_chat_templates" / "tools.jinja"
    assert template.read_text() == "tools" and checkpoints.damage(checkpoint) is None
    template.write_text("other")
    assert "additional_chat_templates/tools.jinja is damaged" in checkpoints.damage(checkpoint)
