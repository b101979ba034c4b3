"""Checkpoints torn, corrupted or opened by others, adapters that do not fit, and real runs that die or change size."""

import errno
import importlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import families
import pytest
import torch
from forked import run_ranks, script
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_model import PROMPTS, RESPONSES, randomise

from errors import InputError
from model import add_lora, lora_parameters, response_hidden
from runtime import checkpoint as checkpoint_module
from runtime.checkpoint import (
    ADAPTER_FREE,
    ADAPTER_UNDERSTOOD,
    check_adapter_fields,
    damage,
    load_adapter,
    load_checkpoint,
    newest_checkpoint,
    save_adapter,
    save_checkpoint,
)
from runtime.loading import load_model
from runtime.records import sha256
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
        ("sync", OSError(errno.EDQUOT, "Disk quota exceeded")),
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


@pytest.mark.parametrize("name", ["checkpoint-3", ".partial-3"])
def test_links_to_somewhere_else_are_not_followed(qwen3, run, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (run / name).symlink_to(outside)
    Trained(qwen3).save(run, 3)
    assert newest_checkpoint(run) == (run / "checkpoint-3", []) and not (run / "checkpoint-3").is_symlink()
    assert [path.name for path in outside.iterdir()] == ["kept"]


def test_a_checkpoint_is_saved_where_modes_cannot_be_set(qwen3, run, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    Trained(qwen3).save(run, 3)
    assert newest_checkpoint(run) == (run / "checkpoint-3", [])


def test_the_newest_checkpoint_is_the_newest_by_number(run):
    for step in (75, 100):
        manifest = json.loads((run / "checkpoint-1" / "manifest.json").read_text())
        shutil.copytree(run / "checkpoint-1", run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}" / "manifest.json").write_text(json.dumps({**manifest, "step": step}))
    assert newest_checkpoint(run) == (run / "checkpoint-100", [])


class Code:
    """A pickle that runs a command where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("state", [Code, lambda path: [1], lambda path: {"optimizer": {}, "scheduler": {}}])
def test_a_trainer_state_that_runs_code_or_is_another_is_refused(qwen3, run, tmp_path, state):
    """With its checksum in order, as somebody who means harm would see to."""
    checkpoint = run / "checkpoint-2"
    torch.save(state(tmp_path / "harmed"), checkpoint / "trainer_state.pt")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"]["trainer_state.pt"] = sha256(checkpoint / "trainer_state.pt")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert newest_checkpoint(run) == (checkpoint, [])
    with pytest.raises(InputError, match=r"trainer_state\.pt: not of this run"):
        Trained(qwen3).load(checkpoint)
    assert not (tmp_path / "harmed").exists()


# ---------------------------------------------------------------------------------------------------------------
# Adapters in PEFT's format: ours in PEFT, PEFT's with us


@pytest.fixture
def model(checkpoint):
    return load_model(checkpoint, device="cpu").eval()


def peft_or_skip():
    return importlib.import_module("peft") if os.environ.get("CI") else pytest.importorskip("peft")


def test_adapter_round_trip(model, checkpoint, tmp_path):
    add_lora(model, rank=4, alpha=8.0)
    randomise(model)
    save_adapter(model, tmp_path, str(checkpoint))
    again = load_model(checkpoint, device="cpu").eval()
    load_adapter(again, tmp_path)
    assert torch.equal(response_hidden(again, PROMPTS, RESPONSES), response_hidden(model, PROMPTS, RESPONSES))


def test_adapter_loads_in_peft_with_identical_logits(model, checkpoint, tmp_path):
    peft = peft_or_skip()
    add_lora(model, rank=4, alpha=8.0)
    randomise(model)
    save_adapter(model, tmp_path, str(checkpoint))
    theirs = peft.PeftModel.from_pretrained(load_model(checkpoint, device="cpu"), tmp_path).eval()
    ids = torch.tensor([PROMPTS[2]])
    assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)


def test_adapter_of_another_shape_is_refused(model, checkpoint, tmp_path):
    add_lora(model, rank=4, alpha=8.0)
    save_adapter(model, tmp_path, str(checkpoint))
    other = load_model(checkpoint, device="cpu")
    add_lora(other, rank=2, alpha=8.0)
    with pytest.raises(InputError, match="has r 4"):
        load_adapter(other, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_dora": True}))
    with pytest.raises(InputError, match="use_dora"):
        load_adapter(load_model(checkpoint, device="cpu"), tmp_path)


def test_an_adapter_that_peft_wrote_gives_pefts_logits(model, checkpoint, tmp_path):
    peft = peft_or_skip()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="gaussian")
    theirs = peft.get_peft_model(load_model(checkpoint, device="cpu"), config).eval()
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    ids = torch.tensor([PROMPTS[2]])
    torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha_pattern", {"q_proj": 16}), ("rank_pattern", {"q_proj": 2}), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
        ("use_rslora", True), ("use_dora", True), ("modules_to_save", ["lm_head"]), ("layers_to_transform", [0]),
        ("layers_to_transform", 1), ("layers_pattern", "layers"), ("bias", "all"), ("bias", "lora_only"),
        ("fan_in_fan_out", True), ("lora_bias", True), ("layer_replication", [[0, 2]]), ("use_qalora", True),
        ("target_parameters", ["experts"]), ("trainable_token_indices", [1]), ("exclude_modules", ["up_proj"]),
        ("task_type", "SEQ_CLS"), ("peft_type", "IA3"), ("peft_type", "ADALORA"), ("megatron_config", {"a": 1}),
        ("arrow_config", {"a": 1}), ("a_field_of_tomorrow", True), ("alora_invocation_tokens", [1]),
    ],
)  # fmt: skip
def test_more_than_plain_lora_is_refused_by_its_field(tmp_path, field, value):
    check_adapter_fields(PLAIN, tmp_path)
    with pytest.raises(InputError, match=field if field != "peft_type" else "describes no LoRA"):
        check_adapter_fields({**PLAIN, field: value}, tmp_path)


def test_pefts_own_defaults_are_understood(tmp_path):
    peft = peft_or_skip()
    config = json.loads(json.dumps(peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM").to_dict(), default=str))
    check_adapter_fields({**config, "peft_type": "LORA"}, tmp_path)
    assert set(config) >= {*ADAPTER_UNDERSTOOD, *ADAPTER_FREE} - {"runtime_config"}  # the table names real fields


@pytest.mark.parametrize("config", [[], {"peft_type": "LORA"}, {"lora_alpha": 8}, {"r": 4}])
def test_a_config_that_is_no_adapters(tmp_path, config):
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        check_adapter_fields(config, tmp_path)


@pytest.mark.parametrize("name", ["r", "lora_alpha", "lora_dropout"])
@pytest.mark.parametrize("value", ["4", -1, float("nan"), float("inf"), True, [4], None])
def test_a_value_that_is_no_size_is_named(tmp_path, name, value):
    with pytest.raises(InputError, match=rf"adapter_config\.json has .* for {name}"):
        check_adapter_fields({**PLAIN, name: value}, tmp_path)
    with pytest.raises(InputError, match=r"has 16\.5 for r"):
        check_adapter_fields({**PLAIN, "r": 16.5}, tmp_path)


def test_a_tensor_too_many_or_too_few_is_named(model, checkpoint, tmp_path):
    add_lora(model, rank=4, alpha=8.0)
    save_adapter(model, tmp_path, str(checkpoint))
    whole = load_file(tmp_path / "adapter_model.safetensors")
    first = next(iter(whole))
    for name, weights in (
        ("base_model.model.lm_head.lora_A.weight", {**whole, "base_model.model.lm_head.lora_A.weight": torch.zeros(4)}),
        (first, {key: value for key, value in whole.items() if key != first}),
    ):
        save_file(weights, tmp_path / "adapter_model.safetensors")
        with pytest.raises(InputError, match=rf"does not fit the model .first difference: {re.escape(name)}"):
            load_adapter(load_model(checkpoint, device="cpu"), tmp_path)


def test_another_scale_than_the_models_is_refused(model, checkpoint, tmp_path):
    add_lora(model, rank=4, alpha=8.0)
    save_adapter(model, tmp_path, str(checkpoint))
    other = load_model(checkpoint, device="cpu")
    add_lora(other, rank=4, alpha=16.0)
    with pytest.raises(InputError, match="lora_alpha 8"):
        load_adapter(other, tmp_path)


def test_the_base_is_named_for_every_folder(model, checkpoint, tmp_path, monkeypatch):
    add_lora(model, rank=4, alpha=8.0)
    monkeypatch.chdir(checkpoint.parent)
    for base, stored in ((checkpoint.name, str(checkpoint)), ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B")):
        save_adapter(model, tmp_path, base)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == stored


# ---------------------------------------------------------------------------------------------------------------
# Opened as others would: in a fresh process, from another folder, by another user


NOBODY = 65534
IDS = [[5, 9, 40, 7, 21, 33]]
OPEN_MODEL = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
defaults = GenerationConfig.from_pretrained(sys.argv[1])
logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
print(json.dumps([logits.flatten().tolist(), text, defaults.top_k, defaults.eos_token_id]))
"""
OPEN_ADAPTER = """
import json, sys, torch, peft
model = peft.AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
print(json.dumps([logits.flatten().tolist()]))
"""


@pytest.fixture
def folder():
    """A folder that every user may enter; pytest's own are open to one user only."""
    path = Path(tempfile.mkdtemp(prefix="artefacts-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def can_be_nobody() -> bool:
    """Whether this process may become another user, who can start this Python (it may lie in a folder of root's)."""
    if os.getuid() != 0:
        return False
    try:
        subprocess.run([sys.executable, "-c", ""], user=NOBODY, group=NOBODY, extra_groups=[], check=True)
    except (PermissionError, subprocess.CalledProcessError):
        return False
    return True


def opened(code: str, artefact: Path, folder: Path) -> list:
    """What a fresh process prints that runs elsewhere, as nobody where this one may choose."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    home.chmod(0o777)
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if can_be_nobody() else {}
    done = subprocess.run(
        [sys.executable, "-c", code, str(artefact), json.dumps(IDS)], cwd=home, capture_output=True, text=True,
        env={**os.environ, "HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}, check=False, **user,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def base(folder, monkeypatch):
    """A base with sampling defaults, named from its own folder, so by a relative path."""
    families.make_checkpoint("qwen3", folder / "base")
    defaults = json.loads((folder / "base" / "generation_config.json").read_text())
    (folder / "base" / "generation_config.json").write_text(json.dumps({**defaults, "top_k": 7, "do_sample": True}))
    for path in (folder / "base").iterdir():
        path.chmod(0o644)
    monkeypatch.chdir(folder)
    return "base"


def trained(base: str, run: Path, lora: bool):
    """A checkpoint of a model whose weights have moved, and its logits."""
    model = load_model(base, device="cpu").eval()
    if lora:
        add_lora(model, 4, 8.0)
    torch.manual_seed(1)
    for parameter in lora_parameters(model) or list(model.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    teacher = Teacher(model, "live")
    optimizer = torch.optim.AdamW(teacher.trained, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    checkpoint = save_checkpoint(run, 1, model, base, teacher, optimizer, scheduler)
    with torch.no_grad():
        return checkpoint, model(input_ids=torch.tensor(IDS)).logits.flatten()


def check_model(artefact: Path, folder: Path, logits) -> None:
    found, text, top_k, eos = opened(OPEN_MODEL, artefact, folder)
    torch.testing.assert_close(torch.tensor(found), logits, atol=1e-4, rtol=1e-4)
    assert text == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert top_k == 7 and eos == json.loads((folder / "base" / "config.json").read_text())["eos_token_id"]


def test_a_checkpoint_of_all_weights(base, folder):
    checkpoint, logits = trained(base, folder / "run", lora=False)
    check_model(checkpoint, folder, logits)


def test_a_checkpoint_of_an_adapter(base, folder):
    checkpoint, logits = trained(base, folder / "run", lora=True)
    peft_or_skip()
    (found,) = opened(OPEN_ADAPTER, checkpoint, folder)
    torch.testing.assert_close(torch.tensor(found), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_asks_for(base, folder, mask):
    before = os.umask(mask)
    try:
        for lora in (True, False):
            directory = trained(base, folder / f"run-{lora}", lora)[0]
            assert stat.S_IMODE(directory.stat().st_mode) == 0o777 & ~mask
            for path in directory.iterdir():
                assert (path.name, stat.S_IMODE(path.stat().st_mode)) == (path.name, 0o666 & ~mask)
    finally:
        os.umask(before)


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_says_what_it_is_and_its_card_may_be_edited(base, folder, lora):
    """No path of this machine; the code of the card is what others run."""
    facts = {"config": {"method": "pwopsd", "data": f"{folder}/sums.jsonl"}, "versions": {"torch": "2"},
             "git_commit": "abc", "command": f"train.py --data {folder}/sums.jsonl --prompts='{folder}/a b' --x Qwen/Q",
             }  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(facts))
    checkpoint, _ = trained(base, folder / "run", lora)
    card = (checkpoint / "README.md").read_text()
    assert str(folder) not in card and "`train.py --data sums.jsonl --prompts='a b' --x Qwen/Q`" in card
    for fact in ("- base: base\n", "- data: sums.jsonl\n", "pwopsd, step 1", "commit abc; torch 2"):
        assert fact in card, fact
    code = card.split("```python\n")[1].split("```")[0]
    if lora:
        peft_or_skip()
    import transformers

    loaded = eval(code.replace("THIS_DIRECTORY", str(checkpoint)),
                  {"transformers": transformers, "peft": sys.modules.get("peft")})  # fmt: skip
    assert loaded(input_ids=torch.tensor(IDS)).logits.shape[1] == len(IDS[0])
    (checkpoint / "README.md").write_text("mine")
    assert damage(checkpoint) is None


def test_a_tokenizer_with_several_templates_is_saved_whole(base, folder):
    (folder / "base" / "additional_chat_templates").mkdir()
    (folder / "base" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    checkpoint, _ = trained(base, folder / "run", lora=False)
    template = checkpoint / "additional_chat_templates" / "tools.jinja"
    assert template.read_text() == "tools" and damage(checkpoint) is None
    template.write_text("other")
    assert "additional_chat_templates/tools.jinja is damaged" in damage(checkpoint)


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


def test_sigterm_to_the_process_writes_a_checkpoint_and_exits_with_143(tmp_path):
    process = start(tmp_path / "run", "--num_steps=500", "--save_steps=500")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 143 and "stopped by a signal, saved after step" in output
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
