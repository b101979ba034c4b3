"""Adapters as files, in PEFT's format: plain LoRA and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from errors import InputError
from model import ADAPTER_CONFIG, add_lora, lora_layers

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
# Fields of PEFT's adapter_config.json whose value changes nothing in what is computed here ...
ADAPTER_FREE = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision", "inference_mode",
    "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
# ... and the values that are understood of others; of any that is not listed, only an empty or false one.
ADAPTER_UNDERSTOOD = {
    "peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others (PiSSA, OLoRA, ...) also change the base
}  # fmt: skip


def save_adapter(model: PreTrainedModel, directory: Path, base_model: str) -> None:
    """Write the adapter in PEFT's format; `peft.PeftModel.from_pretrained(base, directory)` reads it."""
    layers = lora_layers(model)
    weights = {}
    for name, layer in layers.items():
        weights[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        weights[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    any_layer = next(iter(layers.values()))
    base_model = str(Path(base_model).resolve()) if Path(base_model).is_dir() else base_model  # for other folders
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": any_layer.rank, "lora_alpha": any_layer.alpha, "lora_dropout": any_layer.dropout, "bias": "none",
        "target_modules": list(dict.fromkeys(name.rpartition(".")[2] for name in lora_layers(model))),
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: PreTrainedModel, directory: Path | str) -> None:
    """Read an adapter in PEFT's format, adding LoRA where the model has none. Raises InputError on a misfit."""
    directory = Path(directory)
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text())
        weights = load_file(directory / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--adapter {directory}: not an adapter ({error})") from None
    check_adapter_fields(config, directory)
    if not lora_layers(model):
        add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    layers = lora_layers(model)
    expected = {f"{PEFT_PREFIX}{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
    if expected != set(weights):
        odd = sorted(expected ^ set(weights))[0]
        raise InputError(f"--adapter {directory}: does not fit the model (first difference: {odd})")
    with torch.no_grad():
        for name, layer in layers.items():
            if (layer.rank, layer.alpha) != (config["r"], config["lora_alpha"]):
                raise InputError(
                    f"--adapter {directory}: has r {config['r']} and lora_alpha {config['lora_alpha']}, "
                    f"not {layer.rank} and {layer.alpha}"
                )
            for part, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                stored = weights[f"{PEFT_PREFIX}{name}.{part}.weight"]
                if stored.shape != parameter.shape:
                    raise InputError(
                        f"--adapter {directory}: {name}.{part} is {tuple(stored.shape)}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(stored)


def check_adapter_fields(config: object, directory: Path) -> None:
    """Raise InputError, naming the field, for an adapter that is anything but plain LoRA."""
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"--adapter {directory}: {ADAPTER_CONFIG} describes no LoRA adapter")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or not config[name] > 0:
            raise InputError(f"--adapter {directory}: {ADAPTER_CONFIG} has no number for {name}")
    for name, value in config.items():
        understood = value in ADAPTER_UNDERSTOOD[name] if name in ADAPTER_UNDERSTOOD else not value
        if name not in ADAPTER_FREE and not understood:
            raise InputError(f"--adapter {directory}: {name} {value!r} is not understood, only plain LoRA is")
