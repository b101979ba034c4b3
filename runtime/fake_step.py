"""A training step on fake tensors: shapes, dtypes and lifetimes of the real one, no memory and no arithmetic.

What a step keeps for its backward pass depends on the model's code, the kernels of attention and this project's own
code. So it is run instead of computed: the same functions as in train.py, on tensors that have no content (torch's
device `meta`), while `LiveBytes` counts. Workspaces inside a kernel and the allocator's waste are not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel, masking_utils

from loss import LossOptions, Method, score_tokens_from_hidden
from model import add_lora, cast_adapter, lora_layers, recompute_activations, response_hidden
from rollout import Sampling, StreamSampler
from teacher import Teacher


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators under it have made and that are alive: `now`, and at most: `peak`.

    torch keeps a storage's Python object as long as the storage itself, so a weak reference tells its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted; for real tensors also those made before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size

    @contextmanager
    def part(self, taken: dict[str, int], name: str, base: int) -> Iterator[None]:
        """Put the peak inside, above `base`, into `taken`; the larger one if `name` is there."""
        self.peak = self.now
        yield
        taken[name] = max(taken.get(name, 0), self.peak - base)


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step on one rank, in tokens and sequences: prompts and responses all at their longest."""

    student_tokens: int
    teacher_tokens: int
    max_new_tokens: int
    local_batch: int  # sampled together; 0 where the engine does not sample in this process's memory
    micro_batch_size: int


def block_kinds(model: PreTrainedModel) -> list[str]:
    """What each block is: Olmo's attend to a window or to everything."""
    return getattr(model.config, "layer_types", None) or ["all alike"] * model.config.num_hidden_layers


@contextmanager
def fake_model(like: PreTrainedModel, kinds: list[str], gradient_checkpointing: bool) -> Iterator[tuple]:
    """A model like `like`, adapter included, with blocks of these kinds, on fake tensors; yields it and the counter."""
    config = copy.deepcopy(like.config)
    config.num_hidden_layers = len(kinds)
    if getattr(config, "layer_types", None):
        config.layer_types = list(kinds)
    layers = list(lora_layers(like).values())
    with _without_content(), torch.device("meta"), LiveBytes() as live:
        model = _from_config(config, like)
        if layers:
            add_lora(model, layers[0].rank, layers[0].alpha, layers[0].dropout)
        if gradient_checkpointing:
            recompute_activations(model)
        yield model, live


def _from_config(config: PreTrainedConfig, like: PreTrainedModel) -> PreTrainedModel:
    attention = like.config._attn_implementation
    return AutoModelForCausalLM.from_config(config, dtype=like.dtype, attn_implementation=attention)


@contextmanager
def _without_content() -> Iterator[None]:
    """Inside, what would ask for values is answered as on a GPU with ordinary rows.

    transformers looks whether positions are those of packed rows and whether a mask masks anything (here it always
    does: prompts differ in length), and torch picks a kernel of attention by the device.
    """
    functional = torch.nn.functional
    kept = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing, functional.scaled_dot_product_attention
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    masking_utils.is_tracing = lambda tensor=None: True
    functional.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils.is_tracing = kept[:2]
        functional.scaled_dot_product_attention = kept[2]


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What a fused kernel allocates: its output and a row's normaliser; a mask is made additive for it."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def step_bytes(
    model: PreTrainedModel, teacher: Teacher, shape: StepShape, method: Method, options: LossOptions,
    settings: Sampling, live: LiveBytes, scored: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Peaks of a step's parts, beyond weights, gradients and optimizer: {"prefill", "decode", "teacher", "student"}.

    In bytes. The parts are those of train.train_step. `scored` limits the tokens that the loss is taken of: it
    holds a chunk of logits at a time, however many there are, and of the other tokens only their gradients.
    """
    for parameter in teacher.trained:
        parameter.grad = torch.zeros_like(parameter)
    taken: dict[str, int] = {}
    if shape.local_batch:
        _sample(model, shape, settings, live, taken)
    B, T = shape.micro_batch_size, shape.max_new_tokens
    x_stu, x_tch, y = [[0] * shape.student_tokens] * B, [[0] * shape.teacher_tokens] * B, [[0] * T] * B
    ids_M = torch.zeros(B * T, dtype=torch.long)
    base = live.now
    model.train()
    D, dtype = model.config.hidden_size, model.dtype
    before = [torch.empty(B * T, D, dtype=dtype) for _ in range(2)]  # the states of the micro-batch before
    with live.part(taken, "teacher", base), teacher.scoring() as scorer:
        teacher_MD = response_hidden(scorer, x_tch, y).flatten(0, 1).clone()
        teacher_head_VD = scorer.get_output_embeddings().weight
    with live.part(taken, "student", base):
        student_MD = response_hidden(model, x_stu, y).flatten(0, 1).clone()
        head_VD = model.get_output_embeddings().weight
        rest = 0 if scored is None or head_VD.requires_grad else max(0, B * T - scored)
        kept = torch.empty(rest, D)  # the other tokens' dl_t/dh_t
        scores = score_tokens_from_hidden(
            method, student_MD[:scored], teacher_MD[:scored], head_VD, teacher_head_VD, ids_M[:scored], options
        )
        scores.loss.sum().backward()
    del before, kept
    return taken


def _sample(
    model: PreTrainedModel, shape: StepShape, settings: Sampling, live: LiveBytes, taken: dict[str, int]
) -> None:
    """The two moments at which `rollout.sample` holds most: the prompts' pass, and the last token's."""
    B, P, T = shape.local_batch, shape.student_tokens, shape.max_new_tokens
    sampler = StreamSampler(torch.zeros(B, 1), 0, settings)
    model.eval()
    base = live.now

    def forward(tokens: int, cache: DynamicCache) -> Tensor:
        before = cache.get_seq_length()
        return model(
            input_ids=torch.zeros(B, tokens, dtype=torch.long),
            attention_mask=torch.ones(B, before + tokens, dtype=torch.long),
            position_ids=torch.arange(before, before + tokens).expand(B, tokens),
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip

    with torch.no_grad(), cast_adapter(model):
        cache = DynamicCache(config=model.config)
        with live.part(taken, "prefill", base):
            forward(P, cache)
        for tokens in (max(T - 2, 0), min(T - 1, 1)):  # the last one alone: a window lets go of what has left it
            for index, layer in enumerate(cache.layers):
                keys, values = layer.keys, layer.values
                cache.update(*(x.new_zeros(*x.shape[:2], tokens, x.shape[3]) for x in (keys, values)), index)
        del keys, values, layer
        with live.part(taken, "decode", base):
            scores = forward(1, cache)[:, -1].to(torch.float32, copy=True)
            sampler(torch.zeros(B, 0, dtype=torch.long), scores)
