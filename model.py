"""The language model: the forward pass, the same function for both contexts; the head; LoRA.

LoRA (Hu et al. 2021) is written out here: W x + (alpha / r) B A x on every linear map of the blocks, which are seven in
a Llama, Qwen or Olmo. The adapter is never merged in place: the fixed teacher is the same model with it switched off.
A model always stays in evaluation mode: of all that may draw in a forward pass, only LoRA's own dropout does.

Axes: B sequences, T response tokens, D hidden.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from errors import InputError, some

# --- The forward pass of both contexts --------------------------------------------------------------------------


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


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing of each block. The library's own works in training mode only, where its dropout draws."""

    def recomputed(forward, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.forward = partial(recomputed, block.forward)


HEAD_ROWS = 512  # of a half-precision head in float32 at a time: they fit into a CPU's cache


def head_logits(hidden_MD: Tensor, head_VD: Tensor) -> Tensor:
    """hidden @ head.T in float32, also of bfloat16 states: a matrix product accumulates in float32 anyway.

    Logits rounded to bfloat16 would move entries across tau_clip, where the gradient turns around.
    """
    return F.linear(hidden_MD, head_VD) if hidden_MD.dtype == torch.float32 else _WideProduct.apply(hidden_MD, head_VD)


class _WideProduct(torch.autograd.Function):
    """x W^T in float32 for x and W in half precision, whose gradients have their precision.

    A CPU multiplies in float32, HEAD_ROWS of W at a time, so that their copy stays in its cache.
    """

    @staticmethod
    def forward(ctx, x_MD: Tensor, head_VD: Tensor) -> Tensor:
        ctx.save_for_backward(x_MD, head_VD)
        try:
            return torch.mm(x_MD, head_VD.T, out_dtype=torch.float32)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a CPU, or a kernel that lacks it
            logits_MV = x_MD.new_empty(len(x_MD), len(head_VD), dtype=torch.float32)
            for rows, out in zip(head_VD.split(HEAD_ROWS), logits_MV.split(HEAD_ROWS, dim=-1), strict=True):
                torch.mm(x_MD.float(), rows.float().T, out=out)
            return logits_MV

    @staticmethod
    def backward(ctx, grad_MV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x_MD, head_VD), (to_x, to_head) = ctx.saved_tensors, ctx.needs_input_grad
        if not to_head and x_MD.device.type == "cpu":  # whose half precision is slow in so long a sum
            to_x_MD = torch.zeros_like(x_MD, dtype=torch.float32)
            for rows, part in zip(head_VD.split(HEAD_ROWS), grad_MV.split(HEAD_ROWS, dim=-1), strict=True):
                to_x_MD.addmm_(part, rows.float())
            return to_x_MD.to(x_MD.dtype), None
        grad_MV = grad_MV.to(x_MD.dtype)
        return grad_MV @ head_VD if to_x else None, grad_MV.T @ x_MD if to_head else None


# --- LoRA -------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear map with a low-rank update: y = W x + (alpha / r) B A dropout(x). A, B are float32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout, self.enabled = base, rank, alpha, dropout, True
        self.cast: tuple[Tensor, Tensor] | None = None  # A and B as cast_adapter holds them
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
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
    filters = [m for m in model.modules() if isinstance(m, nn.Conv1d) and m.groups == m.in_channels == m.out_channels]
    spared = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is head]
    reached = {id(module.weight) for module in [*found.values(), *spared, *filters]}
    left = [name for name, weight in model.named_parameters() if weight.dim() > 1 and id(weight) not in reached]
    # PEFT takes no adapter of a Mamba block, whose kernels read the projections' weights past any adapter.
    left += [name for name, m in model.named_modules() if "mamba" in f"{name} {type(m).__name__}".lower()]
    if left:
        where = f"{some(left)} of {type(model).__name__}"
        raise InputError(f"LoRA would leave {where} frozen; train.py --lora_rank 0 trains all weights")
    model.requires_grad_(False)
    for name, linear in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear, rank, alpha, dropout).eval())


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
def held(model: nn.Module, name: str, value_of: Callable[[LoRALinear], object]) -> Iterator[None]:
    """Inside, an attribute of each adapted layer has another value; behind it, its own again."""
    before = [(layer, getattr(layer, name)) for layer in lora_layers(model).values()]
    try:
        for layer, _ in before:
            setattr(layer, name, value_of(layer))
        yield
    finally:
        for layer, value in before:
            setattr(layer, name, value)


def adapter_disabled(model: nn.Module) -> AbstractContextManager:
    """Inside, the model is its base, bit for bit."""
    return held(model, "enabled", lambda layer: False)


def adapter_dropout(model: nn.Module, on: bool = True) -> AbstractContextManager:
    """Inside, LoRA's own dropout draws (or not): for the student's pass and its gradient. Nothing else ever draws.

    The base stays in evaluation mode, also where all its weights are trained: dropout, router noise or skipped layers
    of its config would make the two contexts differ by more than their prompts.
    """
    return held(model, "training", lambda layer: on)


def cast_adapter(model: nn.Module) -> AbstractContextManager:
    """Inside, the adapter is cast once instead of at each call: for sampling, no gradients.

    To the model's dtype, but on a CPU it stays in float32: products this small are fastest there.
    """

    def cast(layer: LoRALinear) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if layer.base.weight.device.type == "cpu" else layer.base.weight.dtype
        return layer.lora_A.detach().to(dtype), layer.lora_B.detach().to(dtype)

    return held(model, "cast", cast)
