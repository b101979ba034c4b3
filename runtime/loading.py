"""Loading a model: where its checkpoint is, whether it is what the losses rely on, and which prompts fit into it."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import teacher  # its prompts by their names there: a fork may put its own in their place
from errors import InputError, one_line, require, some
from model import response_hidden
from problems import Problem
from runtime.ranks import gather_objects, pick_device, progress, rank, say, shard, world_size
from teacher import Prompts, encode_prompt

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name of it
ADAPTER_BESIDE = f"{ADAPTER_CONFIG} stands beside the model; put the adapter into a directory of its own"
DTYPES = ("float32", "bfloat16", "float16")
TINY_MODEL = Path(__file__).resolve().parent.parent / "tiny-model"  # the embedded model, `tiny`


def load_model(
    name: str, dtype: str = "auto", device: str | torch.device = "auto", in_parts: bool = False
) -> PreTrainedModel:
    """Load a causal LM, in evaluation mode. `dtype`: auto (bfloat16 on a GPU, else float32) or its name. `in_parts`:
    frozen, and shared over the ranks (runtime/ranks.py::shard).

    The checkpoint's sampling defaults are dropped, so that only our own flags decide; its EOS ids are kept. Raises
    InputError where it is missing, quantised, more than a language model, not exactly the architecture's, or its head
    is not a plain linear map of the last hidden state.
    """
    device = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    require(dtype in DTYPES, "dtype", dtype, f"be one of auto, {', '.join(DTYPES)}")
    name, config = find_checkpoint(name), load_config(name)
    check_plain(config, name)
    if str(config.dtype).endswith("float32") and dtype != "float32":
        say(f"{name}: its float32 weights are rounded to {dtype}; --dtype float32 keeps them")
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa", trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library that may be asked has errors of its own
        raise InputError(f"--model {name}: cannot be loaded ({one_line(error)})") from error
    check_weights(model, name, found)
    kept = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**kept)
    model = shard(model, device) if in_parts else model.to(device)
    check_head(model, name)
    model.get_output_embeddings().register_forward_pre_hook(_in_order)
    return model


def _in_order(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """States in one piece: for a view, as of the last of each row, torch copies a frozen head once a row on a CPU."""
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def load_config(name: str) -> PreTrainedConfig:
    """A checkpoint's config. Raises InputError where it, or the generation config beside it, cannot be read."""
    name = find_checkpoint(name)
    defaults = Path(name) / "generation_config.json"
    try:
        if defaults.is_file():  # where it is damaged, transformers would do without its EOS ids in silence
            json.loads(defaults.read_text(encoding="utf-8"))
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each library that may be asked has errors of its own
        what = f"its config or {defaults.name} cannot be loaded ({one_line(error)})"
        raise InputError(f"--model {name}: {what}") from error


def check_plain(config: PreTrainedConfig, name: str) -> None:
    """Raise InputError for quantised weights, and for more than a text model: no tool reads an adapter of its part."""
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"--model {name}: its weights are quantised, and only plain ones can be trained and scored")
    if config.get_text_config() is not config:
        way = f"whole = transformers.AutoModelForCausalLM.from_pretrained({name!r}); "
        way += "getattr(whole.model, 'language_model', whole).save_pretrained('DIRECTORY')"
        what = f"{config.model_type} is more than a language model"
        raise InputError(f"--model {name}: {what}; save its text part, and the tokenizer beside it: {way}")


def check_weights(model: PreTrainedModel, name: str, found: dict) -> None:
    """Raise InputError where the checkpoint and the architecture do not have exactly the same weights."""
    mismatched = {key for key, *_ in found["mismatched_keys"]}  # (name, shape in the file, shape in the model)
    kinds = {"lacks": found["missing_keys"] - mismatched, "has other shapes of": mismatched,
             "has, beyond the architecture,": found["unexpected_keys"]}  # fmt: skip
    for what, keys in kinds.items():
        if keys:
            raise InputError(f"--model {name}: the checkpoint {what} {some(sorted(keys))}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"--model {name}: {ADAPTER_BESIDE}")


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Raise InputError unless logits are head x hidden, as the losses compute them, compared with the model's own."""
    head, ids = model.get_output_embeddings(), list(range(1, 9))
    try:
        hidden_TD = response_hidden(model, [ids[:1]], [ids[1:]])[0]
        ours_TV = F.linear(hidden_TD, head.weight).float()
        theirs_TV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float()
    except (AttributeError, TypeError, NotImplementedError, ValueError, IndexError) as error:
        raise InputError(f"--model {name}: its forward pass is of another kind ({one_line(error)})") from error
    limit = 4 * torch.finfo(model.dtype).eps * theirs_TV.abs().max()  # the same operation, give or take its last bits
    off = (ours_TV - theirs_TV).abs().max()
    if getattr(head, "bias", None) is not None or not off <= limit:
        what = f"its logits are not head x hidden (a bias, a multiplier or a cap; {off:.2g} off)"
        raise InputError(f"--model {name}: {what}, which the losses rely on")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint. Without a pad token EOS is used: masks come from lengths, not from ids."""
    name = find_checkpoint(name)
    rows = load_config(name).get_text_config().vocab_size  # where this fails, its words are the clearer ones
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each library that may be asked has errors of its own
        raise InputError(f"--model {name}: no tokenizer can be loaded ({one_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {name}: the tokenizer has no EOS token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    vocabulary = tokenizer.get_vocab().items()
    if beyond := [token for token, index in vocabulary if index >= rows and can_occur(tokenizer, index)]:
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


# Spaces, line breaks, digits and LaTeX, as in solutions: libraries have dropped some tokenizers' spaces in silence.
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


def load_other(
    name: str, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, in_parts: bool = False
) -> PreTrainedModel:
    """The model of `--teacher NAME`, in the student's dtype and on its device, to score the student's own token ids.

    Raises InputError where it reads them otherwise.
    """
    try:
        theirs = load_tokenizer(name)
        other = load_model(name, str(student.dtype).removeprefix("torch."), student.device, in_parts)
    except InputError as error:
        raise InputError(str(error).replace("--model", "--teacher", 1)) from error.__cause__
    check_same_tokens(tokenizer, theirs, prompts, name)
    match_heads(student, other)
    return other


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, others: PreTrainedTokenizerBase, prompts: Prompts, name: str
) -> None:
    """Raise InputError unless another model reads the student's token ids as the student does, prompts included."""
    if differing := {token for token, _ in tokenizer.get_vocab().items() ^ others.get_vocab().items()}:
        raise InputError(f"--teacher {name}: its vocabulary is not the student's ({some(sorted(differing))})")
    probe = Problem("Let x = 12.\n\nWhat is $\\frac{x}{5} + 345$?", "It is \\boxed{347.4}.", "347.4")
    for encode in (teacher.student_prompt, teacher.teacher_prompt):
        if encode(tokenizer, probe, prompts) != encode(others, probe, prompts):
            raise InputError(f"--teacher {name}: its tokenizer or chat template encodes a prompt otherwise")


def match_heads(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Cut the rows of the other model's head that pad it beyond the student's. Raises InputError where it has fewer."""
    rows, head = len(model.get_output_embeddings().weight), other.get_output_embeddings()
    if len(head.weight) < rows:
        raise InputError(f"--teacher {other.name_or_path}: its head has {len(head.weight)} rows, the student's {rows}")
    if len(head.weight) > rows:
        head.weight = nn.Parameter(head.weight[:rows], requires_grad=False)


def context_length(config: PreTrainedConfig, on_server: bool = False) -> int:
    """Tokens that fit into a model's context. In this process, with longrope, those of its short frequencies: beyond
    them transformers changes the frequencies of a whole batch with its longest row, those of tokens before, too."""
    rope = {} if on_server else getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # also one a kind of layer
    short = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return int(min(getattr(config, "max_position_embeddings", None) or sys.maxsize, *short, sys.maxsize))


# --- Which prompts fit into the context: counted in tokens before anything is sampled, never cut ----------------


def count_tokens(encode: Callable[[Problem], list[int]], problems: list[Problem]) -> list[int]:
    """Tokens of each problem's prompt; ranks share the work."""
    mine = progress(range(rank(), len(problems), world_size()), desc="prompts measured", leave=False)
    parts = gather_objects([(index, len(encode(problems[index]))) for index in mine])
    return [tokens for _, tokens in sorted(pair for part in parts for pair in part)]


def check_room(flag: str, problems: list[Problem], tokens: list[int], max_new_tokens: int, context: int) -> None:
    """Raise InputError, naming the first row of the data whose prompt and response exceed the model's context."""
    for problem, count in zip(problems, tokens, strict=True):
        if count + max_new_tokens > context:
            room = f"a prompt of {count} tokens and a response of {max_new_tokens} exceed the context of {context}"
            raise InputError(f"{flag}, row {problem.row}: {room}")


def fitting_problems(
    run, data: list[Problem], held_out: list[Problem], config
) -> tuple[list[Problem], list[list[int]]]:
    """The problems of `run` (train.Training) whose longer prompt leaves room for a response, the others told by row;
    and the longest prompt of each context.

    Raises InputError where no problem fits, or one of `held_out` does not.
    """
    both = (teacher.student_prompt, teacher.teacher_prompt)
    contexts = [partial(prompt, run.tokenizer, prompts=run.prompts) for prompt in both]
    context = min(map(context_length, (run.model.config, run.teacher.scorer.config)))
    limit = min(config.max_length, context)
    counts = list(zip(*(count_tokens(encode, data) for encode in contexts), strict=True))
    fits = [max(tokens) + config.max_new_tokens <= limit for tokens in counts]
    if not any(fits):
        room = f"no prompt leaves room for {config.max_new_tokens} new tokens in {limit}"
        raise InputError(f"--data {config.data}: {room}")
    left = [str(problem.row) for problem, fit in zip(data, fits, strict=True) if not fit]
    note = f"; {len(left)} left out, with a response longer than {limit} tokens: row {some(left)}" if left else ""
    kept = [index for index, fit in enumerate(fits) if fit]
    say(f"{len(kept)} problems of {config.data}{note}")
    longest = [encode(data[max(kept, key=lambda i: counts[i][n])]) for n, encode in enumerate(contexts)]
    template, chat = run.prompts.evaluation, run.prompts.chat
    tokens = count_tokens(lambda each: encode_prompt(run.tokenizer, template, each, True, chat), held_out)
    check_room(f"--eval_data {config.eval_data}", held_out, tokens, config.max_new_tokens, context)
    return [data[index] for index in kept], longest
