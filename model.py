"""The language model: the forward pass, the same function for both contexts; LoRA; loading.

LoRA (Hu et al. 2021) is written out here: W x + (alpha / r) B A x on every linear map of the blocks, which are seven in
a Llama, Qwen or Olmo. The adapter is never merged in place: the fixed teacher is the same model with it switched off.
A model always stays in evaluation mode: of all that may draw in a forward pass, only LoRA's own dropout does.

Axes: B sequences, T response tokens, D hidden.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from chat import end_of_turn
from errors import InputError, one_line, some

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name of it
ADAPTER_BESIDE = f"{ADAPTER_CONFIG} stands beside the model; put the adapter into a directory of its own"
DTYPES = ("float32", "bfloat16", "float16")
TINY_MODEL = Path(__file__).resolve().parent / "tiny-model"  # the embedded model, known to every script as `tiny`


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


# ---------------------------------------------------------------------------------------------------------------
# LoRA


class LoRALinear(nn.Module):
    """A frozen linear map with a low-rank update: y = W x + (alpha / r) B A dropout(x). A, B are float32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.rank, self.alpha, self.enabled = base, rank, alpha, True
        self.dropout, self.cast = dropout, None  # cast: A and B as cast_adapter holds them
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
        return torch.add(y, F.linear(F.linear(x.to(A.dtype), A), B).to(y.dtype), alpha=self.alpha / self.rank)


def add_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze the model and put an adapter on each linear map but the head (PEFT's "all-linear"), in place.

    Raises InputError where another matrix would stay frozen beside them (experts, a router), or PEFT takes no adapter.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    # An embedding stays as it is, and so does a filter of a few taps on each channel alone, the vector that it is.
    spared = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is head or is_channelwise(m)]
    reached = {id(module.weight) for module in [*found.values(), *spared]}
    left = [name for name, weight in model.named_parameters() if weight.dim() > 1 and id(weight) not in reached]
    # PEFT takes no adapter of a Mamba block, whose kernels read the projections' weights past any adapter.
    left += [name for name, m in model.named_modules() if "mamba" in f"{name} {type(m).__name__}".lower()]
    if left or not found:
        raise InputError(
            f"LoRA would leave {some(left)} of {type(model).__name__} frozen; --lora_rank 0 trains all weights"
        )
    model.requires_grad_(False)
    for name, linear in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear, rank, alpha, dropout).eval())


def is_channelwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name, in the model's order; empty where there is no adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of each adapted layer; empty where there is no adapter."""
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The student's trainable parameters: its adapter's, or all where it has none."""
    return lora_parameters(model) or list(model.parameters())


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
def adapter_dropout(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Inside, LoRA's own dropout draws (or not): for the student's pass and its gradient. Nothing else ever draws.

    The base stays in evaluation mode, also where all its weights are trained: dropout, router noise or skipped layers
    of its config would make the two contexts differ by more than their prompts.
    """
    layers = [layer for layer in lora_layers(model).values() if layer.training is not on]
    for layer in layers:
        layer.train(on)
    try:
        yield
    finally:
        for layer in layers:
            layer.train(not on)


@contextmanager
def cast_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the adapter is cast once instead of at each call: for sampling, no gradients.

    To the model's dtype, but on a CPU it stays in float32: products this small are fastest there.
    """
    layers = lora_layers(model).values()
    for layer in layers:
        dtype = torch.float32 if layer.base.weight.device.type == "cpu" else layer.base.weight.dtype
        layer.cast = (layer.lora_A.detach().to(dtype), layer.lora_B.detach().to(dtype))
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None


# ---------------------------------------------------------------------------------------------------------------
# Loading


def load_model(name: str, dtype: str = "auto", device: str | torch.device = "auto") -> PreTrainedModel:
    """Load a causal LM, in evaluation mode. `dtype`: auto (bfloat16 on a GPU, else float32) or its name.

    Sampling defaults that the checkpoint brings are dropped, so that only our own flags decide; its EOS ids are kept.
    Raises InputError where there is no checkpoint, it is more than a language model, its weights are not exactly the
    architecture's, or its head is not a plain linear map of the last hidden state.
    """
    device = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of auto, {', '.join(DTYPES)}")
    name, config = find_checkpoint(name), load_config(name)
    try:
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised, and only plain ones can be trained and scored")
        check_text_only(config, name)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa", trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # each library that may be asked has errors of its own
        raise InputError(f"--model {name}: cannot be loaded ({one_line(error)})") from error
    check_weights(model, name, found)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    model = model.to(device)
    check_head(model, name)
    return model


def load_config(name: str) -> PreTrainedConfig:
    """A checkpoint's config. Raises InputError where it, or the generation config beside it, cannot be read."""
    name = find_checkpoint(name)
    defaults = Path(name) / "generation_config.json"
    try:
        if defaults.is_file():  # where it is damaged, transformers would do without its EOS ids in silence
            json.loads(defaults.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"--model {name}: {defaults.name} is not valid JSON ({error})") from None
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each library that may be asked has errors of its own
        raise InputError(f"--model {name}: cannot be loaded ({one_line(error)})") from error


def check_text_only(config: PreTrainedConfig, name: str) -> None:
    """Raise InputError for a model with a vision tower or the like: no tool would read an adapter of its text part."""
    if config.get_text_config() is not config:
        raise InputError(
            f"--model {name}: {config.model_type} is more than a language model; save its text part, and the tokenizer "
            f"beside it: whole = transformers.AutoModelForCausalLM.from_pretrained({name!r}); "
            "getattr(whole.model, 'language_model', whole).save_pretrained('DIRECTORY')"
        )


def check_weights(model: PreTrainedModel, name: str, found: dict) -> None:
    """Raise InputError where the checkpoint and the architecture do not have exactly the same weights."""
    mismatched = [key for key, *_ in found["mismatched_keys"]]  # (name, shape in the file, shape in the model)
    for what, keys in (
        ("lacks", set(found["missing_keys"]) - set(mismatched)),
        ("has other shapes of", mismatched),
        ("has, beyond the architecture,", found["unexpected_keys"]),
    ):
        if keys:
            raise InputError(f"--model {name}: the checkpoint {what} {some(sorted(keys))}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"--model {name}: {ADAPTER_BESIDE}")


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Raise InputError unless logits are head x hidden, as the losses compute them, compared with the model's own."""
    head, ids = model.get_output_embeddings(), list(range(1, 1 + HEAD_TOKENS))
    try:
        hidden_TD = response_hidden(model, [ids[:1]], [ids[1:]])[0]
        ours_TV = F.linear(hidden_TD, head.weight).float()
        theirs_TV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float()
    except (AttributeError, TypeError, NotImplementedError, ValueError, IndexError) as error:
        raise InputError(f"--model {name}: its forward pass is of another kind ({one_line(error)})") from error
    limit = 4 * torch.finfo(model.dtype).eps * theirs_TV.abs().max()  # the same operation, give or take its last bits
    off = (ours_TV - theirs_TV).abs().max()
    if getattr(head, "bias", None) is not None or not off <= limit:
        raise InputError(
            f"--model {name}: its logits are not head x hidden (a bias, a multiplier or a cap; {off:.2g} off), "
            "which the losses rely on"
        )


HEAD_TOKENS = 8  # of the one forward pass that compares


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint. Without a pad token EOS is used: masks come from lengths, not from ids."""
    name = find_checkpoint(name)
    rows = load_config(name).get_text_config().vocab_size  # where this fails, its words are the clearer ones
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each library that may be asked has errors of its own
        raise InputError(f"--model {name}: no tokenizer can be loaded ({one_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {name}: the tokenizer has no EOS token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= rows and can_occur(tokenizer, index)]
    if beyond:
        raise InputError(f"--model {name}: its embedding of {rows} rows has none for the token {some(sorted(beyond))}")
    back = tokenizer.decode(tokenizer.encode(MATHEMATICS, add_special_tokens=False))
    if back.strip() != MATHEMATICS:
        raise InputError(f"--model {name}: the tokenizer loses text: {MATHEMATICS!r} comes back as {back!r}")
    return tokenizer


def can_occur(tokenizer: PreTrainedTokenizerBase, index: int) -> bool:
    """Whether a prompt may hold the token: special ones only where the chat template spells or names them."""
    token = tokenizer.added_tokens_decoder.get(index)
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return token is None or not token.special or index in named or token.content in str(tokenizer.chat_template)


# Spaces, line breaks, digits and LaTeX: what solutions are made of. Libraries have dropped the spaces of some
# tokenizers in silence.
MATHEMATICS = "Let x = 12 and y = 3.\n\nThen $x + 2y = 18$, so  \\boxed{\\frac{18}{5}}"


def find_checkpoint(name: str, said: str = "") -> str:
    """The directory or hub name behind `--model`: `tiny`, a directory with a config.json, or `owner/name`.

    Raises InputError where there is none, in words that begin with `said` instead of the flag.
    """
    said = said or f"--model {name}:"
    path = TINY_MODEL if name == "tiny" else Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{said} no checkpoint there (config.json is missing)")
        if (path / ADAPTER_CONFIG).is_file():  # where peft is installed, transformers would apply it in silence
            raise InputError(f"{said} {ADAPTER_BESIDE}")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{said} neither a directory nor a hub name like 'owner/name'")
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


def eos_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: those of the checkpoint's generation config, the tokenizer's own, and the chat
    template's end of turn, which is none of these where a base model brings a template."""
    own, turn = generation.eos_token_id, end_of_turn(tokenizer)
    listed = own if isinstance(own, list) else [own]
    return sorted({*listed, tokenizer.eos_token_id, turn} - {None})


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing of each block. The library's own works in training mode only, where its dropout draws."""
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def context_length(model: PreTrainedModel) -> int:
    """Tokens that fit into the model's context."""
    return int(getattr(model.config, "max_position_embeddings", None) or sys.maxsize)
