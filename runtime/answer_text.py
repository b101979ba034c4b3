r"""The text of an answer: its dress (`\displaystyle`, `\mathbf{}`, spaces, a full stop), brackets, and unit."""

from __future__ import annotations

import re
from functools import lru_cache

from runtime.arithmetic import DEEPEST, LONGEST

# ---------------------------------------------------------------------------------------------------------------
# Dress

_SYMBOLS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
    | {"−": "-", "–": "-", "\u2009": "\\,", "\u202f": "\\,", "\u00a0": " ", "\u3000": " "}
    | {"∞": "\\infty ", "∪": "\\cup ", "¢": "\\text{cents}", "≈": "\\approx "}
    | {"×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "≤": "\\le ", "≥": "\\ge ", "∅": "\\emptyset ", "∈": "\\in "}
    | {"°": "^\\circ ", "²": "^2", "³": "^3", "½": "\\frac12 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "±": "\\pm "}
    | dict.fromkeys("\u200b\u2060\ufeff", "")
)
_WORD_END = r"(?![a-zA-Z])"
# (pattern, replacement), in this order: delimiters, spaces, one command for its synonyms, braces where they may miss
_SPELLINGS = [
    (rf"\\\\\[[0-9.]+[a-z]{{2}}\]|\\cr{_WORD_END}", r"\\\\"),  # the line breaks of matrices: \\[2pt]
    (r"\\\\|\\[()\[\]]", lambda match: match[0] if match[0] == "\\\\" else " "),  # \( \), but not a line break
    (rf"(?:(?<![a-zA-Z])US\s*)?(?:\\\$|\\(?:mathdollar|textdollar){_WORD_END})", r"\\$"),
    (rf"\\(?:pounds|textsterling){_WORD_END}", "£"),
    (r"(?<!\\)\$", ""),
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|large|Large|bf|rm|limits){_WORD_END}", ""),
    (r"(?<=[0-9])(?:\{,\}|,\\!|\\,|\\ |~)\s*(?=[0-9]{3}(?![0-9/]))", ""),  # 1{,}000 1,\!000 1\,000 1\ 000
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
    (r"\\(?:text|boxed|fbox)\s*\{((?:[-+0-9.,\s€£¥]|\\[%$]|\^\\circ)*)\}", r"\1"),
    (r"(?<=\.)([0-9]*)\\(?:bar|dot)\s*\{([0-9])\}", r"\1\\overline{\2}"),  # 0.\dot{3}
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
_DRESS = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]
_WRAPPER = re.compile(r"(?:\\(?:text|boxed|fbox))?(?=\{)")


@lru_cache(maxsize=4096)
def normalise_answer(answer: str) -> str:
    r"""The answer in one spelling, without mere dress: `\dfrac 12.` becomes `\frac{1}{2}`, a too long one ""."""
    text = answer.strip().translate(_SYMBOLS) if len(answer) <= LONGEST else ""
    for pattern, replacement in _DRESS:
        text = pattern.sub(replacement, text)
    for _ in range(DEEPEST):
        wrapper = _WRAPPER.match(text)
        if wrapper is None or partner(text, wrapper.end()) != len(text) - 1:
            break
        text = text[wrapper.end() + 1 : -1].strip()
        text = re.sub(r"(?<!\.)[.,;:]$", "", text)
    return text


# ---------------------------------------------------------------------------------------------------------------
# Brackets

_OPENING, _CLOSING = "([{", ")]}"
_BRACKET = re.compile(r"\\[a-zA-Z]+|\\.|[()\[\]{},;]", re.DOTALL)


def partner(text: str, begin: int) -> int:
    """Where the bracket at `begin` is closed; brackets of any kind close each other, as in [0, 1). -1 for nowhere."""
    depth = 0
    for token in _BRACKET.finditer(text, begin):
        bracket = token[0].lstrip("\\")
        depth += (bracket in _OPENING) - (bracket in _CLOSING) if len(bracket) == 1 else 0
        if depth == 0:
            return token.end() - 1
    return -1


def split(text: str, separator: re.Pattern) -> list[str]:
    """The parts of `text` between separators outside all brackets, empty ones left out."""
    parts, begin, depth = [], 0, 0
    for token in re.finditer(rf"(?P<cut>{separator.pattern})|\\[a-zA-Z]+|\\.|.", text, re.DOTALL):
        if token["cut"] is not None and depth == 0:
            parts.append(text[begin : token.start()].strip())
            begin = token.end()
        elif len(bracket := token[0].lstrip("\\")) == 1:
            depth += (bracket in _OPENING) - (bracket in _CLOSING)
    return [part for part in [*parts, text[begin:].strip()] if part]


def readable(text: str) -> bool:
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


# ---------------------------------------------------------------------------------------------------------------
# Units

# One line a unit, its spellings in it; two different units of this table are different answers.
_UNITS = r"""
dollar dollars usd \$
euro euros €
yen ¥
pound pounds £ lb lbs
cent cents
percent \%
degree degrees deg ^\circ
celsius ^\circC ^\circ\text{C}
fahrenheit ^\circF ^\circ\text{F}
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
FUNCTION = re.compile(r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?[a-z]?|(?:log|exp|sqrt|frac|gcd|lcm|max|min)[a-z]?")
_CURRENCY = re.compile(r"([+-]?)(\\\$|[€£¥])([+-]?)")
_TAIL = re.compile(
    r"(?P<symbol>\\%|\\\$|[€£¥]|\^\\circ(?: ?[CF]|\\text\{[CF]\})?)"
    r"|\\(?:text|operatorname)\{(?P<text>[a-zA-Z][a-zA-Z /.]*)(?P<power>\^[23]\}|\}\^[23]|\})"
    r"|(?<=[0-9}])(?P<plain>[a-zA-Z][a-zA-Z /]*)(?P<plain_power>\^[23])?"
)


def split_unit(text: str) -> tuple[str, str]:
    """The answer and its unit, "" without one: a currency in front, or a sign or words behind."""
    unit = ""
    if (money := _CURRENCY.match(text)) is not None:
        unit, text = _UNIT_OF[money[2]], (money[1] or money[3]) + text[money.end() :]
    tail = next((tail for tail in _TAIL.finditer(text) if tail.end() == len(text) and tail.start() > 0), None)
    if tail is None or text.endswith((r"\text{and}", r"\text{or}"), 0, tail.start()):
        return text, unit
    words = (tail["text"] or tail["plain"] or "").replace("/", " per ").replace(".", "").split()
    if not all(_counts(word, as_text=tail["text"] is not None or word is not words[0]) for word in words):
        return text, unit
    names = [_UNIT_OF.get(word) or _UNIT_OF.get(word.lower(), word.lower()) for word in words]
    power = (tail["power"] or tail["plain_power"] or "").replace("}", "")
    behind = " ".join(names) + power or _UNIT_OF[tail["symbol"].replace(" ", "")]
    return text[: tail.start()], unit or behind


def _counts(word: str, as_text: bool) -> bool:
    r"""Whether a word behind a number only says what is counted. Outside \text{} a short one may be a product."""
    if (word in _UNIT_OF or word.lower() in _UNIT_OF) if len(word) > 1 else (word in _UNIT_OF and as_text):
        return True
    if word.lower() in _CHANGING.split() or FUNCTION.fullmatch(word):
        return False
    return len(word) > 1 if as_text else word == "per" or (len(word) > 3 and bool(re.search("[aeiou]", word)))


def units_clash(a: str, b: str) -> bool:
    known = set(_UNIT_OF.values())
    return a != b and a.partition("^")[0] in known and b.partition("^")[0] in known
