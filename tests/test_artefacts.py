"""What a run leaves, opened as others would: in a fresh process, from another folder, by another user."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import families
import pytest
import torch
from runtime.export import export

from model import add_lora, load_model, lora_parameters
from runtime.checkpoint import save_checkpoint
from teacher import Teacher

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


def test_an_adapter_and_its_export(base, folder):
    checkpoint, logits = trained(base, folder / "run", lora=True)
    export(str(checkpoint), str(folder / "merged"))
    check_model(folder / "merged", folder, logits)
    pytest.importorskip("peft")
    (found,) = opened(OPEN_ADAPTER, checkpoint, folder)
    torch.testing.assert_close(torch.tensor(found), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_asks_for(base, folder, mask):
    before = os.umask(mask)
    try:
        paths = [trained(base, folder / "run", lora)[0] for lora in (True, False)]
        paths.append(trained(base, folder / "run", True)[0])
        export(str(paths[-1]), str(folder / "merged"))
    finally:
        os.umask(before)
    for directory in (folder / "run" / "checkpoint-1", folder / "merged"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o777 & ~mask
        for path in directory.iterdir():
            assert (path.name, stat.S_IMODE(path.stat().st_mode)) == (path.name, 0o666 & ~mask)
