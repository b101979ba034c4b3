"""Checkpoints: directories in PEFT's format, atomic, with checksums, so that a run can be killed at any moment.

A checkpoint `checkpoint-STEP` appears only when it is complete: the weights (the adapter, or the whole model with its
tokenizer), the optimizer, the schedule and, for an EMA teacher, its average. No random state and no data position is
stored: the problems of a step, their order and the random numbers of each rollout are functions of (seed, step, slot)
(train.py::step_share, rollout.py::uniforms), so a resumed run draws what an unbroken one draws, on any number of ranks.
What draws within a step, LoRA's dropout, depends on the rank too.
"""

import json
import os
import pickle
import re
import shutil
from contextlib import suppress
from math import inf
from pathlib import Path
from string import Template

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from errors import InputError, one_line
from model import add_lora, lora_layers
from runtime.loading import ADAPTER_CONFIG, find_checkpoint, load_model
from runtime.ranks import say
from runtime.records import read_record, remove, sha256
from teacher import EVALUATION_PROMPT

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Fields of PEFT's adapter_config.json whose value changes nothing in what is computed here ...
ADAPTER_FREE = {"target_modules", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
                "peft_version", "megatron_core", "qalora_group_size", "runtime_config"}  # fmt: skip
# ... and the values that are understood of others; of any that is not listed, only an empty or false one.
ADAPTER_UNDERSTOOD = {
    "peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others (PiSSA, OLoRA, ...) also change the base
}  # fmt: skip


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's parameters under their names in PEFT's files."""
    parts = [(name, layer, part) for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")]
    return {f"base_model.model.{name}.{part}.weight": getattr(layer, part) for name, layer, part in parts}


def save_adapter(model: PreTrainedModel, directory: Path, base: str) -> None:
    """Write the adapter; `peft.PeftModel.from_pretrained(base_model, directory)` reads it."""
    layers = lora_layers(model)
    layer = next(iter(layers.values()))
    base = str(Path(base).resolve()) if Path(base).is_dir() else base  # found from any folder of this machine
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": layer.rank, "lora_alpha": layer.alpha, "lora_dropout": layer.dropout, "bias": "none",
        "target_modules": list(dict.fromkeys(name.rpartition(".")[2] for name in layers)),
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(weights, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: PreTrainedModel, directory: Path | str) -> None:
    """Add the adapter in a directory of PEFT's format. Raises InputError where it is none, or does not fit."""
    try:
        config = json.loads((Path(directory) / ADAPTER_CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--adapter {directory}: not an adapter ({one_line(error)})") from None
    check_adapter_fields(config, directory)
    base, here = (str(name or "") for name in (config.get("base_model_name_or_path"), model.name_or_path))
    if base and here and Path(base).name != Path(here).name:  # a folder may have moved; a sibling fits as well
        say(f"--adapter {directory}: was trained on {base}, and --model is {here}")
    add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    load_tensors(adapter_tensors(model), Path(directory) / ADAPTER_WEIGHTS)


def load_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Copy a file's tensors into those of the same names. Raises InputError, naming file and tensor, for a misfit."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
    for name in sorted(stored.keys() | tensors.keys()):
        there, here = (tuple(group[name].shape) if name in group else "nothing" for group in (stored, tensors))
        if there != here:
            raise InputError(f"{path}: does not fit the model: {name} is {there} there and {here} here")
    for name, tensor in tensors.items():
        tensor.data.copy_(stored[name])


def check_adapter_fields(config: dict, directory: Path | str) -> None:
    """Raise InputError, naming the field, for an adapter that is anything but plain LoRA."""
    config = config if isinstance(config, dict) else {}
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    is_fine = {name: not value for name, value in config.items() if name not in ADAPTER_FREE}
    is_fine |= {name: config[name] in values for name, values in ADAPTER_UNDERSTOOD.items() if name in config}
    is_fine["r"] = type(r) is int and r > 0
    is_fine["lora_alpha"] = type(alpha) in (int, float) and 0 < alpha < inf
    is_fine["lora_dropout"] = type(dropout) in (int, float) and 0 <= dropout < 1
    for name in (name for name in is_fine if not is_fine[name]):
        has = f"{ADAPTER_CONFIG} has {config.get(name)!r} for {name}"
        raise InputError(f"--adapter {directory}: {has}, and only plain LoRA is understood")


MANIFEST, TRAINER_STATE, EMA_WEIGHTS, CARD = "manifest.json", "trainer_state.pt", "ema.safetensors", "README.md"
GENERATION = "generation_config.json"
CARD_TEMPLATE = Path(__file__).parent / "card.md"


def save_checkpoint(folder: Path, step: int, run, base: str) -> Path:
    """Write `folder/checkpoint-STEP` after `step` steps of `run` (train.Training): its model, teacher, optimizer and
    schedule. Until the final rename it lies under a name that nothing reads.

    Raises InputError where it cannot be written (a full disk, say); any other error, of the GPU say, passes as it is.
    In each case the partial directory is removed and earlier checkpoints are untouched.
    """
    final, partial = folder / f"checkpoint-{step}", folder / f".partial-{step}"
    is_adapter = bool(lora_layers(run.model))
    average, state = run.teacher.average, {"optimizer": run.optimizer, "scheduler": run.scheduler}
    try:
        remove(partial)
        partial.mkdir(parents=True)
        if is_adapter:
            save_adapter(run.model, partial, base)
        else:
            save_whole(run.model, base, partial)
        if average:
            save_file({str(i): tensor.contiguous() for i, tensor in enumerate(average)}, partial / EMA_WEIGHTS)
        torch.save({name: part.state_dict() for name, part in state.items()}, partial / TRAINER_STATE)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        digests = {path.relative_to(partial).as_posix(): sha256(path) for path in files}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=2) + "\n")
        (partial / CARD).write_text(model_card(folder, step, base, is_adapter))
        for path in [*files, partial / MANIFEST]:
            with suppress(OSError):  # some file systems have no modes; weights are written readable to one user
                path.chmod((partial / CARD).stat().st_mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        remove(final)
        partial.rename(final)
    except Exception as error:
        remove(partial)
        if not isinstance(error, (OSError, SafetensorError)) and not FULL_DISK_IN_TORCH.search(str(error)):
            raise
        raise InputError(f"{final}: cannot be written ({one_line(error)}); earlier checkpoints are whole") from error
    return final


FULL_DISK_IN_TORCH = re.compile("PytorchStreamWriter|inline_container")  # a RuntimeError like many others


def save_whole(model: PreTrainedModel, base: str, directory: Path) -> None:
    """Write a model as a checkpoint of its own, with the tokenizer, template and sampling defaults of its base."""
    base = find_checkpoint(base)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(directory)
    defaults = cached_file(base, GENERATION, _raise_exceptions_for_missing_entries=False)
    if defaults is not None:  # as it is: a base's defaults need not be valid in the eyes of this version
        shutil.copyfile(defaults, directory / GENERATION)


def model_card(folder: Path, step: int, base: str, is_adapter: bool) -> str:
    """README.md of a checkpoint: what it is, how it was made, how it is loaded, without paths of this machine."""
    record = read_record(folder) or {"config": {}}
    config, prompts = record["config"], record.get("inputs", {}).get("prompts", {})
    prompt, given = prompts.get("evaluation", EVALUATION_PROMPT), prompts.get("chat", {}).get("kwargs", {})
    chat = {"enable_thinking": True, "thinking": True, **given}  # chat.py::apply_template
    name = Path(base).name if Path(base).is_dir() else base
    source, dtype, rank = name if is_adapter else ".", config.get("dtype", "auto"), config.get("lora_rank", 64)
    load = f'model = transformers.AutoModelForCausalLM.from_pretrained("{source}", dtype="{dtype}")'
    if is_adapter:
        load = f'import peft\n\n{load}\nmodel = peft.PeftModel.from_pretrained(model, ".")'
    ranks = max(8, 1 << (rank - 1).bit_length())  # vLLM takes powers of two
    lora = f"--enable-lora --max-lora-rank {ranks} --lora-modules pw=."
    return Template(CARD_TEMPLATE.read_text(encoding="utf-8")).substitute(
        library="peft" if is_adapter else "transformers", what="A LoRA adapter" if is_adapter else "All weights",
        tag=f"base_model: {name}" if "/" in name else "tags: [math]", name=name, method=config.get("method"), step=step,
        data=_without_folders(config.get("data", "")), command=_without_folders(record.get("command", "")),
        processes=record.get("ranks", 1), commit=record.get("git_commit"),
        versions=", ".join(map(" ".join, record.get("versions", {}).items())),
        source=source, load=load, dtype=dtype, tokens=config.get("max_new_tokens"), peft=', "peft": "."' * is_adapter,
        served=lora if is_adapter else "--served-model-name pw",
        chat=chat, chat_json=json.dumps(chat).replace("'", "\\u0027"),
        example=json.dumps(prompt.replace("{problem}", "What is 2+3?")),
        asked=json.dumps(prompt.replace("{problem}", "{{problem}}")),
    )  # fmt: skip


def _without_folders(text: str) -> str:
    """Absolute paths as their last part: no other machine has the folders."""
    return re.sub(r"(?<![\w.~-])/(?:[^/\s'\"]*/)*", "", text)


def resume(folder: Path, run) -> int:
    """Load the newest whole checkpoint of a run (train.Training); the steps behind it, 0 where there is none."""
    newest = newest_checkpoint(folder)
    say(f"going on from {newest}" if newest else "no checkpoint to go on from: starting anew")
    return load_checkpoint(newest, run) if newest else 0


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; says, of each newer one, why it was passed over."""
    steps = [path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*")]
    for step in sorted(map(int, filter(str.isdecimal, steps)), reverse=True):
        path = run / f"checkpoint-{step}"
        if (wrong := damage(path)) is None:
            return path
        say(f"{path}: {wrong}; using the checkpoint before it")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there with its checksum."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, digest in manifest["sha256"].items():
            if sha256(checkpoint / name) != digest:
                return f"{name} is damaged (checksum)"
        if checkpoint.name != f"checkpoint-{manifest['step']}" or TRAINER_STATE not in manifest["sha256"]:
            return f"{MANIFEST} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    return None


def load_checkpoint(checkpoint: Path, run) -> int:
    """Put everything back in place and return the number of steps done.

    Raises InputError where something does not fit, and for a trainer state that would run code (weights_only).
    """
    if lora_layers(run.model):
        load_tensors(adapter_tensors(run.model), checkpoint / ADAPTER_WEIGHTS)
    else:
        saved = load_model(str(checkpoint), str(run.model.dtype).removeprefix("torch."), "cpu")
        run.model.load_state_dict(saved.state_dict())
    if run.teacher.average:
        load_tensors({str(i): tensor for i, tensor in enumerate(run.teacher.average)}, checkpoint / EMA_WEIGHTS)
    try:
        state = torch.load(checkpoint / TRAINER_STATE, map_location="cpu", weights_only=True)
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint / TRAINER_STATE}: not of this run ({one_line(error)})") from error
    return int(json.loads((checkpoint / MANIFEST).read_text())["step"])
