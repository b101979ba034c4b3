r"""The algebra of answers: when two strings that people box are the same answer, as far as that is decided exactly.

`normalise_answer` takes off what only dresses an answer (`\displaystyle`, `\mathbf{}`, spaces, a final full stop);
`read_answer` sees its form: a number with its name and unit (`x = 5\text{ cm}`), a number in a base, a tuple or
interval, a set, a list, a union, words, or any other formula; `same_answer` compares two readings part by part and
hands only two formulas to `ask`. Text from a model is never evaluated as code, and every size is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from runtime.arithmetic import DEEPEST, LONGEST, parse_number

MOST_PARTS = 20  # of a tuple, set, list or union; one with more is equal only as a string, as is a too long answer

# ---------------------------------------------------------------------------------------------------------------
# Dress

_SYMBOLS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
    | {
        "−": "-",
        "–": "-",
        "\u2009": "\\,",
        "\u202f": "\\,",
        "\u00a0": " ",
        "\u3000": " ",
        "∞": "\\infty ",
        "∪": "\\cup ",
    }
    | {"×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "≤": "\\le ", "≥": "\\ge ", "∅": "\\emptyset ", "∈": "\\in "}
    | {"°": "^\\circ ", "²": "^2", "³": "^3", "½": "\\frac12 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "±": "\\pm "}
    | dict.fromkeys("\u200b\u2060\ufeff", "")
)
_WORD_END = r"(?![a-zA-Z])"
# (pattern, replacement), in this order
_DRESS = [
    (r"\\\\|\\[()\[\]]", lambda match: match[0] if match[0] == "\\\\" else " "),  # \( \), but not a line break
    (r"(?<!\\)\$", ""),
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|large|Large|bf|rm|limits){_WORD_END}", ""),
    (r"(?<=[0-9])(?:\{,\}|,\\!|\\,)\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}000 1,\!000 1\,000
    (rf"\\!|(?<=\S)~|(?<!\\)\\[,;: ]|\\q?quad{_WORD_END}", lambda match: "" if match[0] == "\\!" else " "),
    (rf"\\[dtc]frac{_WORD_END}", r"\\frac"),
    (rf"\\(?:leq|leqslant|leqq){_WORD_END}", r"\\le"),
    (rf"\\(?:geq|geqslant|geqq){_WORD_END}", r"\\ge"),
    (rf"\\lt{_WORD_END}", "<"),
    (rf"\\gt{_WORD_END}", ">"),
    (rf"\\varnothing{_WORD_END}|\\\{{\s*\\\}}", r"\\emptyset"),
    (rf"\^\s*\{{\s*\\circ\s*\}}|\^\s*\\circ{_WORD_END}|\\degrees?{_WORD_END}", r"^\\circ"),
    (r"\\?%", r"\\%"),
    (r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|underline)\s*(?=\{)|\\(?:text)?color\s*\{[a-zA-Z]+\}", ""),
    (r"\\(?:mathrm|textbf|textit|textrm|textsf|textnormal|mbox|hbox)\s*(?=\{)", r"\\text"),
    (r"\\(?:text|boxed|fbox)\s*\{((?:[-+0-9.,\s]|\\%)*)\}", r"\1"),
    (r"\\(frac|sqrt)\s*([0-9a-zA-Z])(?![a-zA-Z])", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    (r"([_^])\s*\{\s*([0-9a-zA-Z])\s*\}", r"\1\2"),
    (r"\\text\{\s*(and|or)\s*\}|(?<![\\a-zA-Z])(and|or)(?![a-zA-Z])", r"\\text{\1\2}"),
    (rf"\\langle{_WORD_END}", "("),
    (rf"\\rangle{_WORD_END}", ")"),
    (rf"\\lbrace{_WORD_END}", r"\\{"),
    (rf"\\rbrace{_WORD_END}", r"\\}"),
    (r"(?<=[0-9]),\s+(?=[0-9]{3}(?![0-9]))", ",\0"),  # the one space that tells: `1, 000` may be a list
    (r"(?<![0-9a-zA-Z])\s+|\s+(?![0-9a-zA-Z])|(?<=[0-9])\s+(?=[a-zA-Z])|(?<=[a-zA-Z])\s+(?=[0-9])", ""),
    (r"\s+", " "),
    (r"\0", " "),
    (r"^\+|\\\\$", ""),
    (r"(?<!\.)[.,;:]$", ""),
]
_DRESS = [(re.compile(pattern), replacement) for pattern, replacement in _DRESS]
_WRAPPER = re.compile(r"(?:\\(?:text|boxed|fbox))?(?=\{)")


@lru_cache(maxsize=4096)
def normalise_answer(answer: str) -> str:
    r"""The answer in one spelling, without mere dress: `\dfrac 12.` becomes `\frac{1}{2}`, a too long one ""."""
    text = answer.strip().translate(_SYMBOLS) if len(answer) <= LONGEST else ""
    for pattern, replacement in _DRESS:
        text = pattern.sub(replacement, text)
    for _ in range(DEEPEST):
        wrapper = _WRAPPER.match(text)
        if wrapper is None or _partner(text, wrapper.end()) != len(text) - 1:
            break
        text = text[wrapper.end() + 1 : -1].strip()
        text = re.sub(r"(?<!\.)[.,;:]$", "", text)
    return text


# ---------------------------------------------------------------------------------------------------------------
# Brackets

_OPENING, _CLOSING = "([{", ")]}"
_BRACKET = re.compile(r"\\[a-zA-Z]+|\\.|[()\[\]{},;]", re.DOTALL)


def _partner(text: str, begin: int) -> int:
    """Where the bracket at `begin` is closed; brackets of any kind close each other, as in [0, 1). -1 for nowhere."""
    depth = 0
    for token in _BRACKET.finditer(text, begin):
        bracket = token[0].lstrip("\\")
        depth += (bracket in _OPENING) - (bracket in _CLOSING) if len(bracket) == 1 else 0
        if depth == 0:
            return token.end() - 1
    return -1


def _split(text: str, separator: re.Pattern) -> list[str]:
    """The parts of `text` between separators outside all brackets, empty ones left out."""
    parts, begin, depth = [], 0, 0
    for token in re.finditer(rf"(?P<cut>{separator.pattern})|\\[a-zA-Z]+|\\.|.", text, re.DOTALL):
        if token["cut"] is not None and depth == 0:
            parts.append(text[begin : token.start()].strip())
            begin = token.end()
        elif len(bracket := token[0].lstrip("\\")) == 1:
            depth += (bracket in _OPENING) - (bracket in _CLOSING)
    return [part for part in [*parts, text[begin:].strip()] if part]


# ---------------------------------------------------------------------------------------------------------------
# Units

# One line a unit, its spellings in it; two different units of this table are different answers.
_UNITS = r"""
dollar dollars usd \$
euro euros €
yen ¥
pound pounds £ lb lbs
cent cents ¢
percent \%
degree degrees deg ^\circ
mm millimeter millimeters
cm centimeter centimeters
km kilometer kilometers
m meter meters metre metres
in inch inches
ft foot feet
yd yard yards
mi mile miles
g gram grams
kg kilogram kilograms
oz ounce ounces
ml mL milliliter milliliters
L liter liters
s sec second seconds
min mins minute minutes
h hr hrs hour hours
day days
cup cups
week weeks
month months
year years
"""
_UNIT_OF = {spelling: line.split()[0] for line in _UNITS.strip().splitlines() for spelling in line.split()}
# Words that make the number before them another number, or no number.
_CHANGING = """
or and to than more less fewer over under about approximately around roughly at least most not no plus minus times
divided by above below negative dozen dozens hundred hundreds thousand thousands million millions billion billions
trillion trillions half halves third thirds fourths fifth fifths sixths eighths tenth tenths hundredth hundredths
thousandth thousandths squared cubed factorial mod modulo base one two three four five six seven eight nine ten
eleven twelve twenty thirty forty fifty sixty seventy eighty ninety
"""
_FUNCTION = re.compile(r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?[a-z]?|(?:log|exp|sqrt|frac|gcd|lcm|max|min)[a-z]?")
_CURRENCY = re.compile(r"([+-]?)(\\\$|[€£¥¢])([+-]?)")
_TAIL = re.compile(
    r"(?P<symbol>\\%|\\\$|[€£¥¢]|\^\\circ)|\\text\{(?P<text>[a-zA-Z][a-zA-Z /.]*)(?P<power>\^[23]\}|\}\^[23]|\})"
    r"|(?<=[0-9}])(?P<plain>[a-zA-Z][a-zA-Z /]*)(?P<plain_power>\^[23])?"
)


def _split_unit(text: str) -> tuple[str, str]:
    """The answer and its unit, "" without one: a currency in front, or a sign or words behind."""
    unit = ""
    if (money := _CURRENCY.match(text)) is not None:
        unit, text = _UNIT_OF[money[2]], (money[1] or money[3]) + text[money.end() :]
    tail = next((tail for tail in _TAIL.finditer(text) if tail.end() == len(text) and tail.start() > 0), None)
    if tail is None:
        return text, unit
    words = (tail["text"] or tail["plain"] or "").replace("/", " per ").replace(".", "").split()
    if not all(_counts(word, as_text=tail["text"] is not None or word is not words[0]) for word in words):
        return text, unit
    names = [_UNIT_OF.get(word) or _UNIT_OF.get(word.lower(), word.lower()) for word in words]
    power = (tail["power"] or tail["plain_power"] or "").replace("}", "")
    behind = " ".join(names) + power or _UNIT_OF[tail["symbol"]]
    return text[: tail.start()], unit or behind


def _counts(word: str, as_text: bool) -> bool:
    r"""Whether a word behind a number only says what is counted. Outside \text{} a short one may be a product."""
    if (word in _UNIT_OF or word.lower() in _UNIT_OF) if len(word) > 1 else (word in _UNIT_OF and as_text):
        return True
    if word.lower() in _CHANGING.split() or _FUNCTION.fullmatch(word):
        return False
    return len(word) > 1 if as_text else word == "per" or (len(word) > 3 and bool(re.search("[aeiou]", word)))


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
# x, x_1, \theta, AB, f(2), (x,y), area or \text{area}, before the only "=" of the answer, or before \in
_NAMED = re.compile(
    r"((?:[a-zA-Z]|\\(?!text|in\b)[a-zA-Z]+)(?:_[0-9a-zA-Z])?'?(?:\([0-9a-zA-Z]+\))?|[A-Z]{2,4}|[a-zA-Z]{4,20}"
    r"|\((?:[a-zA-Z],)+[a-zA-Z]\)|\\text\{[a-zA-Z ]+\})(?:=|\\in(?![a-zA-Z]))(?!.*=)"
)
_BASED = re.compile(r"\(?0*([0-9][0-9A-Z]*)\)?_(?:([2-9])|\{([0-9]{2})\})")
_SET_BUILDER = re.compile(r"[a-zA-Z](?:\\mid(?![a-zA-Z])|\||:)")
_NO_WORDS = re.compile(r"\\(?:begin|end|operatorname)\*?\{[^{}]*\}|\\(?!text)[a-zA-Z]+")
_WORD = re.compile(r"\\text|[a-zA-Z]{4,}")
_COMPARED = r"\s?(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z]))\s?"
_INEQUALITY = re.compile(rf"(?:(.+?){_COMPARED})?([a-zA-Z]|\\[a-zA-Z]+)(?:{_COMPARED}(.+))?")


@lru_cache(maxsize=4096)
def read_answer(answer: str) -> Reading:
    """The reading of an answer in any spelling."""
    text = normalise_answer(answer)
    if not _readable(text):
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


def _readable(text: str) -> bool:
    """Whether the braces are paired and no bracket is nested too deeply: what parsers may be given."""
    depth = braces = 0
    for token in _BRACKET.finditer(text):
        bracket = token[0].lstrip("\\")
        if len(bracket) == 1:
            depth += (bracket in _OPENING) - (bracket in _CLOSING)
        braces += {"{": 1, "}": -1}.get(token[0], 0)
        if braces < 0 or depth > DEEPEST:
            return False
    return braces == 0


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
    bare, unit = _split_unit(text)
    value, based = parse_number(bare), _BASED.fullmatch(bare)
    if value is not None:
        parts = tuple(bare.split(", ")) if ", " in bare else ()
        return Reading("number", bare, unit=unit, value=value, parts=parts)
    if based is not None:
        return Reading("based", f"{based[1]}_{based[2] or based[3]}")
    reading = _read_parts(bare)
    if reading is not None:
        return reading if len(reading.parts) <= MOST_PARTS else Reading("words", text)
    if any(not _FUNCTION.fullmatch(word) for word in _WORD.findall(_NO_WORDS.sub(" ", bare))):
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
    if opening is not None and _partner(text, 0) == len(text) - 1:
        return _read_brackets(text, opening[0], text[opening.end() : -1].removesuffix("\\"))
    if len(parts := _split(text, _CUP)) > 1:
        return Reading("union", text, parts=tuple(parts))
    if len(parts := _split(text, _OR)) > 1 and all(map(_read_inequality, parts)):
        return Reading("union", text, parts=tuple(parts))
    if len(parts := _plus_and_minus(_split(text, _COMMA))) > 1:
        return Reading("list", text, parts=_by_letter(parts))
    return None


def _read_brackets(text: str, opening: str, inside: str) -> Reading | None:
    parts = _split(inside, _COMMA)
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
    if (x.name and y.name and x.name != y.name) or _units_clash(x.unit, y.unit):
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
    if forms <= {"number", "based"}:
        return forms == {"based"} and x.text == y.text
    if "tuple" in forms and forms <= {"tuple", "list"}:
        return _same_tuple(x, y, ask)
    if forms <= {"list", "set"}:
        return _same_collection(x.parts, y.parts, ask, as_set="set" in forms)
    if forms == {"union"} and _same_collection(x.parts, y.parts, ask, as_set=False):
        return True
    if "set" in forms and len(parts := (y if y.form == "set" else x).parts) == 1:  # the set of one element and it
        return _same(read_answer(parts[0]), x if y.form == "set" else y, ask)
    return _open(x, y) and ask(x.text, y.text)


def _units_clash(a: str, b: str) -> bool:
    known = set(_UNIT_OF.values())
    return a != b and a.partition("^")[0] in known and b.partition("^")[0] in known


def _same_tuple(x: Reading, y: Reading, ask: Ask) -> bool:
    """In order, with the same brackets; a list without brackets is a tuple with round ones."""
    same_ends = (x.ends or "()") == (y.ends or "()") and len(x.parts) == len(y.parts)
    return same_ends and all(same_answer(p, q, ask) for p, q in zip(x.parts, y.parts, strict=True))


def _same_collection(xs: tuple[str, ...], ys: tuple[str, ...], ask: Ask, as_set: bool) -> bool:
    """In any order; as often in both, unless as sets."""
    if as_set:
        found = [[same_answer(p, q, ask) for q in ys] for p in xs]
        return all(map(any, found)) and all(map(any, zip(*found, strict=True)))
    left = list(ys)
    for part in xs:
        partner = next((other for other in left if same_answer(part, other, ask)), None)
        if partner is None:
            return False
        left.remove(partner)
    return not left


_VAGUE = re.compile(r"\\(?:approx|sim|simeq|cong)(?![a-zA-Z])|≈|\.\.\.|\\[lc]?dots(?![a-zA-Z])")
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
