"""A user turn as token ids: the model's own chat template around our text, and where a turn ends.

A template is a program of the checkpoint's. It is told the thinking mode and, where a run asks for it, other arguments
and the date that it should take for today's. Whatever the text spells, only the template opens and closes turns.
"""

import re
from dataclasses import dataclass, field, replace
from datetime import datetime

from transformers import GenerationConfig, PreTrainedTokenizerBase

from errors import InputError, one_line


@dataclass(frozen=True)
class Chat:
    """What the chat template is told besides the turn and the thinking mode."""

    kwargs: dict = field(default_factory=dict)  # further arguments, as vLLM's chat_template_kwargs
    date: str | None = None  # YYYY-MM-DD, today's date for templates that show it; None: the clock's


def encode_turn(tokenizer: PreTrainedTokenizerBase, text: str, thinking: bool, chat: Chat = Chat()) -> list[int]:
    """Token ids of one user turn in the model's chat template, ready for the response to follow.

    The template alone decides on a BOS: the tokenizer must not add a second one. A control token that the text spells
    stays text. Raises InputError for a template that is missing or fails.
    """
    turn, cut = render_turn(tokenizer, text, thinking, chat)
    ids = [token for part in turn.split(cut) for token in tokenizer.encode(part, add_special_tokens=False)]
    if cut in turn:  # with the cut and without, the ids must read the same
        whole = tokenizer.encode(turn.replace(cut, ""), add_special_tokens=False)
        if tokenizer.decode(ids) != tokenizer.decode(whole):
            raise InputError(f"{tokenizer.name_or_path}: cannot encode a control token as text, in {text[:80]!r}")
    return ids


def render_turn(tokenizer: PreTrainedTokenizerBase, text: str, thinking: bool, chat: Chat) -> tuple[str, str]:
    """The turn's text, and the character at which it is cut before encoding, if it occurs.

    Think-closure: with thinking off, a thought that the template opens regardless is closed again, at the end of the
    prompt only. Paper: `<think>`. Here: its like too (`[THINK]`, `<seed:think>`).
    """
    if tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template, which the prompts need")
    text, cut = cut_control_tokens(tokenizer, text)
    turn = apply_template(tokenizer, [{"role": "user", "content": text}], thinking, chat)
    opened = OPEN_THOUGHT.search(turn)
    if opened and not thinking:
        turn += f"{opened[1]}/{opened[2]}\n\n"
    return turn, cut


OPEN_THOUGHT = re.compile(r"(<|\[)([\w:]*think(?:>|\]))\s*$", re.IGNORECASE)


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], thinking: bool, chat: Chat, prompt: bool = True
) -> str:
    """The messages in the model's template and, with `prompt`, the opening of the turn that is generated."""
    # Most templates name the mode enable_thinking, some (DeepSeek V3.1, Granite) thinking; none minds the other's name.
    arguments = {"enable_thinking": thinking, "thinking": thinking, **chat.kwargs}
    try:
        if chat.date is not None:  # a literal in place of each call of the clock; a function cannot be passed
            day, template = datetime.fromisoformat(chat.date), tokenizer.get_chat_template()
            arguments["chat_template"] = CLOCK.sub(lambda call: repr(day.strftime(call[2])), template)
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **arguments)
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(f"{tokenizer.name_or_path}: the chat template fails ({one_line(repr(error))})") from error


CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


# Control tokens in the text. A tokenizer finds `<|im_end|>` wherever it stands, also where a problem quotes it. So the
# text is cut inside of each one by a character that occurs nowhere else, and encoded part by part without it.

MARKUP = re.compile(r"\s*<.+>\s*", re.DOTALL)  # <think> and <｜User｜> steer a model too, though not declared special


def cut_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    """The text, cut behind the first character of every control token that it spells, and the character of the cut."""
    cut = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)  # a private-use character
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content in text]
    controls = [token.content for token in added if token.special or MARKUP.fullmatch(token.content)]
    if not controls:
        return text, cut
    starts = re.compile(f"(?={'|'.join(map(re.escape, controls))}).", re.DOTALL)
    return starts.sub(lambda match: match[0] + cut, text), cut


# --- What a template does, seen in what it renders --------------------------------------------------------------


def template_notes(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[str]:
    """What a user should know about the template, one line each."""
    off, on = (render_turn(tokenizer, "Hi", thinking, chat)[0] for thinking in (False, True))
    then = render_turn(tokenizer, "Hi", True, replace(chat, date="1999-12-31"))[0]
    alike = "the chat template renders both thinking modes alike; it may know another argument (--chat_template_kwargs)"
    dated = f"the chat template shows the date: {chat.date or 'the one of each day it is rendered on'}"
    return [note for note, is_so in ((alike, off == on), (dated, then != on)) if is_so]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template puts behind an assistant's message, which a base model's EOS is not."""
    messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "Done."}]
    try:
        text = apply_template(tokenizer, messages, False, Chat(), prompt=False)
    except InputError:
        return None  # no template, or one that takes no assistant's message
    _, said, behind = text.rpartition("Done.")
    first = tokenizer.encode(behind.lstrip(), add_special_tokens=False)[:1] if said else []
    added = tokenizer.added_tokens_decoder
    return next((token for token in first if token in added and added[token].special), None)


def eos_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: those of the checkpoint's generation config, the tokenizer's own, and the chat
    template's end of turn, which is none of these where a base model brings a template."""
    own, turn = generation.eos_token_id, end_of_turn(tokenizer)
    listed = own if isinstance(own, list) else [own]
    return sorted({*listed, tokenizer.eos_token_id, turn} - {None})
