"""The language model: loading, LoRA, and the one forward pass that both contexts share.

LoRA (Hu et al. 2021) is written out here: W x + (alpha / r) B A x on the seven projections of every block. The adapter
is stored in PEFT's file format and is never merged in place: the fixed teacher is the same model with it switched off.

Axes: B sequences, T response tokens, D hidden.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from problems import InputError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's file names
DTYPES = ("float32", "bfloat16", "float16")
PEFT_PREFIX = "base_model.model."
TINY_MODEL = Path(__file__).resolve().parent / "tiny-model"  # the embedded model, known to every script as `tiny`


# ---------------------------------------------------------------------------------------------------------------
# Loading


def load_model(
    name: str, dtype: str = "auto", attention: str = "sdpa", device: str | torch.device = "auto"
) -> PreTrainedModel:
    """Load a causal LM from a directory or a hub name. `dtype`: auto (bfloat16 on a GPU, else float32) or its name.

    Sampling defaults that the checkpoint brings are dropped, so that only our own flags decide; its EOS ids are kept.
    Raises InputError where there is no checkpoint, or its head is not a plain linear map of the last hidden state.
    """
    device = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of auto, {', '.join(DTYPES)}")
    name = find_checkpoint(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"--model {name}: cannot be loaded ({str(error).splitlines()[0]})") from None
    head = model.get_output_embeddings()
    scaled = [
        key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(model.config, key, None)
    ]
    if head is None or getattr(head, "bias", None) is not None or scaled:
        raise InputError(f"--model {name}: the head is not a plain linear map ({scaled or 'no head, or a bias'})")
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    return model.to(device)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint. Without a pad token EOS is used: masks come from lengths, not from ids."""
    name = find_checkpoint(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model {name}: no tokenizer can be loaded ({str(error).splitlines()[0]})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {name}: the tokenizer has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_checkpoint(name: str) -> str:
    """The directory or hub name behind `--model`: `tiny`, a directory with a config.json, or `owner/name`."""
    path = TINY_MODEL if name == "tiny" else Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name}: no checkpoint there (config.json is missing)")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"--model {name}: neither a directory nor a hub name like 'owner/name'")
    return name


def pick_device(name: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one. Raises InputError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: not on this machine") from None
    return device


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: those of the checkpoint's generation config and the tokenizer's own."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({*listed, tokenizer.eos_token_id})


def context_length(model: PreTrainedModel) -> int:
    """Tokens that fit into the model's context."""
    return int(getattr(model.config, "max_position_embeddings", None) or sys.maxsize)


# ---------------------------------------------------------------------------------------------------------------
# LoRA


class LoRALinear(nn.Module):
    """A frozen linear map with a low-rank update: y = W x + (alpha / r) B A dropout(x). A, B are float32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.rank, self.alpha, self.enabled = base, rank, alpha, True
        self.dropout, self.cast = dropout, None  # cast: A and B in the model's dtype, where cast_adapter holds them
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # PEFT's initialisation; B = 0, so the update starts at 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        A, B = self.cast or (self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
        if self.training and self.dropout > 0.0:
            x = F.dropout(x, self.dropout)
        return torch.add(y, F.linear(F.linear(x, A), B), alpha=self.alpha / self.rank)


def add_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze the model and put an adapter on the seven projections of each block, in place.

    Raises InputError where a projection is missing (the model is not of the Llama / Qwen / Olmo layout).
    """
    found = {n: m for n, m in model.named_modules() if n.split(".")[-1] in LORA_TARGETS and isinstance(m, nn.Linear)}
    missing = [target for target in LORA_TARGETS if not any(name.endswith(target) for name in found)]
    if missing:
        raise InputError(f"LoRA needs the projections {', '.join(missing)}, which {type(model).__name__} lacks")
    model.requires_grad_(False)
    for name, linear in found.items():
        parent, _, child = name.rpartition(".")
        layer = LoRALinear(linear, rank, alpha, dropout).train(linear.training)  # no dropout in a model that evaluates
        setattr(model.get_submodule(parent), child, layer)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name, in the model's order; empty where there is no adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base, bit for bit."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
def cast_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the adapter is in the model's dtype, cast once instead of at each call: for sampling, no gradients."""
    layers = lora_layers(model).values()
    for layer in layers:
        dtype = layer.base.weight.dtype
        layer.cast = (layer.lora_A.detach().to(dtype), layer.lora_B.detach().to(dtype))
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None


def save_adapter(model: PreTrainedModel, directory: Path, base_model: str) -> None:
    """Write the adapter in PEFT's format; `peft.PeftModel.from_pretrained(base, directory)` reads it."""
    layers = lora_layers(model)
    weights = {}
    for name, layer in layers.items():
        weights[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        weights[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    any_layer = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": any_layer.rank, "lora_alpha": any_layer.alpha, "lora_dropout": any_layer.dropout, "bias": "none",
        "target_modules": list(LORA_TARGETS), "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
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
    if config.get("use_rslora") or config.get("use_dora") or config.get("rank_pattern"):
        raise InputError(f"--adapter {directory}: only plain LoRA can be read (no rsLoRA, DoRA or rank patterns)")
    if not lora_layers(model):
        add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    layers = lora_layers(model)
    expected = {f"{PEFT_PREFIX}{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
    if expected != set(weights):
        odd = sorted(expected ^ set(weights))[0]
        raise InputError(f"--adapter {directory}: does not fit the model (first difference: {odd})")
    with torch.no_grad():
        for name, layer in layers.items():
            for part, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                stored = weights[f"{PEFT_PREFIX}{name}.{part}.weight"]
                if stored.shape != parameter.shape:
                    raise InputError(
                        f"--adapter {directory}: {name}.{part} is {tuple(stored.shape)}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(stored)


# ---------------------------------------------------------------------------------------------------------------
# The forward pass of both contexts


def response_hidden(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """Last hidden states aligned to the response, [B, T, D]: entry t is what predicts response token t.

    Rows are prompt + response without a gap, padded behind their end. A causal model never looks there, so no
    attention mask is needed and SDPA may take its fast causal kernel; entries past a row's length mean nothing.

    Authors: prompts padded on the right, before the response, and no position ids, so that shorter rows get a gap in
    RoPE and their first response token is read off a pad position. Here: no gap, and positions are always passed.
    """
    assert len(prompts) == len(responses) and all(prompts) and all(responses)
    device = model.get_input_embeddings().weight.device
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    width, T = max(map(len, rows)), max(map(len, responses))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    positions = torch.arange(width, device=device).expand(len(rows), width)
    hidden = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    index = (starts[:, None] + torch.arange(T, device=device)).clamp(max=width - 1)
    return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1]))


def response_mask(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """[B, T] True where a response has a token. From lengths, never from ids: a pad id may be the EOS id."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
