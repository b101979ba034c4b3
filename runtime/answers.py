"""The algebra of answers: when two strings that people box are the same answer, as far as that is decided exactly.

`read_answer` sees the form of an answer: a number with its name and unit (`x = 5 cm`), a number in a base, a tuple or
interval, a set, a list, a union, words, or any other formula; `same_answer` compares two readings part by part and
hands only formulas to `ask`. Text from a model is never evaluated as code, and every size is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from runtime.answer_text import FUNCTION, normalise_answer, partner, readable, split, split_unit, units_clash
from runtime.arithmetic import LONGEST, parse_number

MOST_PARTS = 20  # of a tuple, set, list or union; one with more is equal only as a string, as is a too long answer

# ---------------------------------------------------------------------------------------------------------------
# Forms


@dataclass(frozen=True)
class Reading:
    r"""What an answer says. `form` is number, based, words, formula, list, set, tuple or union.

    text   the normalised answer, without its name where the form is known and without its unit (words: lower case)
    value  of a number
    parts  of a list, set, tuple or union; also of a number written as `1, 000`, which may be a list
    ends   a tuple's two brackets: an interval is read as a tuple, since an open one is written like it
    """

    form: str
    text: str
    name: str = ""
    unit: str = ""
    value: Fraction | None = None
    parts: tuple[str, ...] = ()
    ends: str = ""


_COMMA = re.compile(r",|;|\\text\{(?:and|or)\}")
_OR = re.compile(r"\\text\{or\}")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
# x, x_1, x_{\max}, \theta, AB, \angle AB, f(2), (x,y), area or \text{area}, before the only "=", or before \in
_INDEX = r"_(?:[0-9a-zA-Z]|\{[^{}=]*(?:\{[^{}=]*\})?\})"
_NAMED = re.compile(
    rf"((?:[a-zA-Z]|\\(?!text|in\b)[a-zA-Z]+)(?:{_INDEX})?'?(?:(?:\^\{{-1\}})?\((?:[0-9a-zA-Z]+|-?[0-9]+[./]?[0-9]*)\))?"
    r"|(?:m?\\angle ?)?[A-Z]{1,4}|[a-zA-Z]{4,20}"
    r"|\((?:[a-zA-Z],)+[a-zA-Z]\)|\\text\{[a-zA-Z ]+\})(?:=|\\in(?![a-zA-Z]))(?!.*=)"
)
_BASED = re.compile(r"(-?)\(?0*([0-9][0-9A-Z]*)\)?_(?:([2-9])|\{([0-9]{2})\})")
_SET_BUILDER = re.compile(r"[a-zA-Z](?:\\mid(?![a-zA-Z])|\||:)")
_NO_WORDS = re.compile(r"\\(?:begin|end|operatorname)\*?\{[^{}]*\}|\\(?!text)[a-zA-Z]+")
_WORD = re.compile(r"\\text|[a-zA-Z]{4,}")
_COMPARED = r"\s?(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z]))\s?"
_INEQUALITY = re.compile(rf"(?:(.+?){_COMPARED})?([a-zA-Z]|\\[a-zA-Z]+)(?:{_COMPARED}(.+))?")


@lru_cache(maxsize=4096)
def read_answer(answer: str) -> Reading:
    """The reading of an answer in any spelling."""
    text = normalise_answer(answer)
    if not readable(text):
        return Reading("words", text)
    interval = _read_inequality(text)
    if interval is not None:
        return interval
    if (turned := re.fullmatch(r"([^=]+)=([a-zA-Z])", text)) is not None and parse_number(turned[1]) is not None:
        text = f"{turned[2]}={turned[1]}"
    named = _NAMED.match(text)
    reading = _read_body(text[named.end() :].strip() if named else text)
    if named is None:
        return reading
    if reading.form in ("words", "formula"):
        return _read_body(text)
    if reading.form == "tuple" and named[1].startswith("("):  # (x,y)=(2,4)
        letters = named[1].strip("()").split(",")
        named_parts = [f"{letter}={part}" for letter, part in zip(letters, reading.parts, strict=False)]
        return replace(reading, parts=_by_letter(named_parts))
    return replace(reading, name=named[1])


def _read_inequality(text: str) -> Reading | None:
    r"""`x > 2`, `2 < x`, `1 \le x < 2` as the interval of x; None for others, also where a bound holds a letter."""
    match = _INEQUALITY.fullmatch(text)
    if match is None or not (match[2] or match[4]):
        return None
    low, first, name, second, high = match.groups()
    if any(
        re.search("[a-zA-Z=<>,]|\\\\[lg]e", re.sub(r"\\(?![lg]e)[a-zA-Z]+", "", bound or "")) for bound in (low, high)
    ):
        return None
    rising = [sign in ("<", "\\le") for sign in (first, second) if sign]
    if len(set(rising)) != 1:
        return None
    if not rising[0]:
        low, first, second, high = high, second, first, low
    ends = ("[" if first in ("\\le", "\\ge") else "(") + ("]" if second in ("\\le", "\\ge") else ")")
    return Reading("tuple", text, name, parts=(low or "-\\infty", high or "\\infty"), ends=ends)


def _read_body(text: str) -> Reading:
    bare, unit = split_unit(text)
    value, based = parse_number(bare), _BASED.fullmatch(bare)
    if value is not None:
        parts = tuple(bare.split(", ")) if ", " in bare else ()
        return Reading("number", bare, unit=unit, value=value, parts=parts)
    if based is not None:
        return Reading("based", f"{based[1]}{based[2]}_{based[3] or based[4]}")
    reading = _read_parts(bare)
    if reading is not None:
        return reading if len(reading.parts) <= MOST_PARTS else Reading("words", text)
    if any(not FUNCTION.fullmatch(word) for word in _WORD.findall(_NO_WORDS.sub(" ", bare))):
        return Reading("words", re.sub(r"\\text|[{}\s]", "", text).lower())
    return Reading("formula", bare, unit=unit)


def _read_parts(text: str) -> Reading | None:
    """The reading of a matrix, of what stands in brackets, of a union or a list; None for others."""
    if (matrix := _MATRIX.fullmatch(text)) is not None:
        rows = [row.split("&") for row in matrix[2].removesuffix("\\\\").split("\\\\")]
        return Reading(
            "tuple", text, parts=tuple(entry for row in rows for entry in row), ends=f"matrix {[*map(len, rows)]}"
        )
    opening = re.match(r"[(\[]|\\\{", text)
    if opening is not None and partner(text, 0) == len(text) - 1:
        return _read_brackets(text, opening[0], text[opening.end() : -1].removesuffix("\\"))
    if len(parts := split(text, _CUP)) > 1:
        return Reading("union", text, parts=tuple(parts))
    if len(parts := split(text, _OR)) > 1 and all(map(_read_inequality, parts)):
        return Reading("union", text, parts=tuple(parts))
    if len(parts := _plus_and_minus(split(text, _COMMA))) > 1:
        return Reading("list", text, parts=_by_letter(parts))
    return None


def _read_brackets(text: str, opening: str, inside: str) -> Reading | None:
    parts = split(inside, _COMMA)
    if opening == "\\{":
        condition = _SET_BUILDER.match(inside)
        return (
            read_answer(inside[condition.end() :]) if condition else Reading("set", text, parts=_plus_and_minus(parts))
        )
    if len(parts) > 1:
        return Reading("tuple", text, parts=_by_letter(parts), ends=opening + text[-1])
    return read_answer(inside) if opening + text[-1] == "()" and parts else None


def _plus_and_minus(parts: list[str]) -> tuple[str, ...]:
    r"""`1 \pm 2` as the two parts `1 + 2` and `1 - 2`."""
    both = [[part.replace("\\pm", sign) for sign in "+-"] if part.count("\\pm") == 1 else [part] for part in parts]
    return tuple(part for pair in both for part in pair)


def _by_letter(parts: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """`y=4, x=2` in the order of the letters; anything else as it is."""
    letters = {part[0] for part in parts if re.match("[a-zA-Z]=", part)}
    return tuple(sorted(parts) if len(letters) == len(parts) else parts)


def needs_algebra(answer: str) -> bool:
    """Whether the answer holds a formula that is no number, so that only equal spellings of it are known as equal."""
    reading = read_answer(answer)
    if reading.parts:
        return any(needs_algebra(part) for part in reading.parts if part != answer)
    return reading.form == "formula" and not re.fullmatch(r"[a-zA-Z]|-?\\infty|\\emptyset", reading.text)


# ---------------------------------------------------------------------------------------------------------------
# Comparison

Ask = Callable[[str, str], bool]


def same_answer(a: str, b: str, ask: Ask = lambda a, b: False) -> bool:
    """Whether two answers are the same. `ask` is called for two formulas that arithmetic and form leave open.

    Symmetric where `ask` is. Orders, bases and sizes are decided here.
    """
    left, right = normalise_answer(a), normalise_answer(b)
    if left == right:
        return left != "" or (len(a) > LONGEST and a.strip() == b.strip() != "")
    if "" in (left, right):
        return False
    return _same(read_answer(left), read_answer(right), ask)


def _same(x: Reading, y: Reading, ask: Ask) -> bool:
    x, y = sorted((x, y), key=lambda reading: (reading.form, reading.text))
    forms = {x.form, y.form}
    if "words" in forms:
        return x.form == y.form and x.text == y.text != ""
    if (x.name and y.name and x.name != y.name) or units_clash(x.unit, y.unit):
        return False
    if x.form == y.form == "number" and x.value == y.value:
        return True
    if x.form == y.form == "formula" and x.text == y.text:
        return True
    if forms & {"list", "set", "tuple"} or (x.form == "number" and x.parts and y.parts):
        x, y = (
            replace(reading, form="list") if reading.form == "number" and reading.parts else reading
            for reading in (x, y)
        )
        forms = {x.form, y.form}
    if forms == {"based"}:
        return x.text == y.text
    if "tuple" in forms and forms <= {"tuple", "list"}:
        return _same_tuple(x, y, ask)
    if forms <= {"list", "set"}:
        return _same_collection(x.parts, y.parts, ask, as_set="set" in forms)
    if forms == {"union"} and _same_collection(x.parts, y.parts, ask, as_set=False):
        return True
    if "set" in forms and len(parts := (y if y.form == "set" else x).parts) == 1:  # the set of one element and it
        return _same(read_answer(parts[0]), x if y.form == "set" else y, ask)
    return _open(x, y) and ask(x.text, y.text)


def _same_tuple(x: Reading, y: Reading, ask: Ask) -> bool:
    """In order, with the same brackets; a list without brackets is a tuple with round ones."""
    same_ends = (x.ends or "()") == (y.ends or "()") and len(x.parts) == len(y.parts)
    return same_ends and all(same_answer(p, q, ask) for p, q in zip(x.parts, y.parts, strict=True))


def _same_collection(xs: tuple[str, ...], ys: tuple[str, ...], ask: Ask, as_set: bool) -> bool:
    """In any order; as often in both, unless as sets."""
    if as_set:
        found = [[same_answer(p, q, ask) for q in ys] for p in xs]
        return bool(found) and all(map(any, found)) and all(map(any, zip(*found, strict=True)))
    left = list(ys)
    for part in xs:
        found = next((other for other in left if same_answer(part, other, ask)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


# What algebra would drop: `about`, `and so on`, and the base of a number that is part of a formula.
_VAGUE = re.compile(r"\\(?:approx|sim|simeq|cong)(?![a-zA-Z])|\.\.\.|\\[lc]?dots(?![a-zA-Z])|(?<=[0-9)])_")
_COUNTED = re.compile(r"-?[0-9.,]+[a-zA-Z]+")  # 5m: a product, which math-verify may read as a length


def _open(x: Reading, y: Reading) -> bool:
    """Whether algebra may still find two readings equal."""
    forms = {x.form, y.form}
    if "formula" not in forms and forms != {"union"} and forms != {"tuple", "union"}:
        return False
    formula = x.text if x.form == "formula" else y.text
    if _VAGUE.search(x.text + " " + y.text) or ("number" in forms and _COUNTED.fullmatch(formula)):
        return False
    if forms & {"list", "based"} or ("tuple" in forms and ("," in formula or "=" in formula)):
        return False
    equations = [text for text in (x.text, y.text) if "=" in text]
    return len(equations) != 1 or not _unsolved(equations[0])


def _unsolved(equation: str) -> bool:
    """Whether it is an equation for one letter, as 2x = 10 is: its right side is no answer."""
    left = equation.partition("=")[0]
    letters = set(re.findall("[a-zA-Z]", re.sub(r"\\(?:frac|sqrt|cdot)(?![a-zA-Z])", "", left)))
    return len(letters) == 1 and "\\" not in re.sub(r"\\(?:frac|sqrt|cdot)(?![a-zA-Z])", "", left) and len(left) > 1
