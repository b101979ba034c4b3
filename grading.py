r"""When two answers that people box are the same, without trusting what a model wrote.

`extract_boxed` finds an answer in a solution. `normalise_answer` takes off its dress (`\displaystyle`, units of a list,
signs that Unicode writes otherwise). `read_answer` sees its form: a number, a tuple, a list, words, a formula.
`same_answer` compares two readings part by part, and hands only formulas to `ask`: math-verify (optional package), in a
process of its own (runtime/grading_worker.py) with limits on processor time and memory. Text from a model is never
evaluated as code, and every size is bounded. math-verify is silent about much that it drops or adds: what it may be
asked about is decided here (`_open`).
"""

import ast
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from pathlib import Path

from errors import InputError

LONGEST = 1000  # characters of an answer
DEEPEST = 20  # brackets inside brackets
MOST_PARTS = 20  # of a tuple, set or list; one with more is equal only as a string, as is an answer that is too long
MOST_BITS = 2**14  # of a numerator or denominator


def _table(rows: str) -> dict[str, str]:
    """For each word of a row (a line, or a part of it up to a semicolon) the first word of that row."""
    return {word: row.split()[0] for row in re.split("[;\n]", rows.strip()) for word in row.split()}


def _rewrite(text: str, rules: list[tuple]) -> str:
    """The text after each rule (pattern, replacement) in turn."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


# --- Brackets, and the last box ---------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)  # the backslash of a line break (two of them) escapes nothing
_BRACES = {"{": 1, "}": -1}
_BRACKETS = _BRACES | {"\\{": 1, "\\}": -1, "(": 1, ")": -1, "[": 1, "]": -1}  # of any kind, as in [0, 1)


def _depths(text: str, begin: int = 0, brackets: dict[str, int] = _BRACKETS) -> Iterator[tuple[int, int]]:
    """The end of each token from `begin` on, and how many brackets are open there."""
    depth = 0
    for token in _TOKEN.finditer(text, begin):
        depth += brackets.get(token[0], 0)
        yield token.end(), depth


def partner(text: str, begin: int, brackets: dict[str, int] = _BRACKETS) -> int:
    """Where the bracket at `begin` is closed; -1 for nowhere."""
    return next((end - 1 for end, depth in _depths(text, begin, brackets) if depth == 0), -1)


def split(text: str, separator: str) -> list[str]:
    """The parts of `text` between separators (a pattern) outside all brackets, empty ones left out."""
    outside = {0} | {end for end, depth in _depths(text) if depth == 0}
    cuts = [match.span() for match in re.finditer(separator, text) if match.start() in outside]
    edges = [0, *(edge for cut in cuts for edge in cut), len(text)]
    return [part for begin, end in zip(edges[::2], edges[1::2], strict=True) if (part := text[begin:end].strip())]


_BOXES_TRIED = 20  # so that nested empty boxes cost no more than twenty passes over the text
_BOX = r"\\(?:boxed|fbox)(?![a-zA-Z])\s*"
_NOTHING = (  # an empty box or a placeholder: ?, \_\_, ..., \square, \text{answer}
    r"(?:\s|[~.?_…{}$]|\\[,;:!_ ]|\\[hv]space\*?\{[^{}]*\}|\\phantom\{[^{}]*\}"
    r"|\\(?:text|mathrm|boxed|fbox|underline|[lc]?dots|q?quad|square|Box)(?![a-zA-Z])"
    r"|(?i:\b(?:your |final )?answer\b))*"
)
_ARGUMENT = r"(?:\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|[0-9]))"
_BARE = re.compile(  # a number, a letter, or a command with its arguments
    rf"[+-]?[0-9]*\s?\\[dtc]?frac{_ARGUMENT}{{2}}|[+-]?[0-9]*\\(?:sqrt|text){_ARGUMENT}|[+-]?\\(?:pi|infty|emptyset)"
    r"|[+-]?\\?\$?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?%?(?![\w{^]|\\[a-zA-Z])"  # -1,250.5 and 3/4
    r"|[a-zA-Z](?![a-zA-Z])|"
)


def extract_boxed(text: str) -> str | None:
    r"""The content of the LAST `\boxed{...}` or `\fbox{...}` that holds something (paper Section 4.1), or None.

    The braces may stand behind a space or a line break, or be missing: `\boxed 5`. A box that holds nothing, or only a
    placeholder, does not hide the one before it (of the last 20). None where the last box is never closed: the solution
    was cut inside it.
    """
    for box in reversed(list(re.finditer(_BOX, text))[-_BOXES_TRIED:]):
        begin = box.end()
        braced = text.startswith("{", begin)
        end = partner(text, begin, _BRACES) if braced else _BARE.match(text, begin).end()
        if end < 0 or begin == len(text):
            return None
        content = text[begin + braced : end]
        if not re.fullmatch(_NOTHING, content):
            content = content.strip()
            odd = (len(content) - len(content.rstrip("\\"))) % 2  # the backslash of a closing `\ `
            return content[:-1].rstrip() if odd else content
    return None


# --- Dress ------------------------------------------------------------------------------------------------------

_SIGNS = r"""
- − – ‐ ‑; \ldots …; \infty ∞; \cup ∪; \text{cents} ¢; \approx ≈; \ne ≠; \div ÷; \times ×; \cdot · ⋅; \pi π; \theta θ
\le ≤; \ge ≥; / ⁄; \emptyset ∅; \in ∈; ^\circ °; \pm ±; \frac12 ½; \frac14 ¼; \frac34 ¾; \frac13 ⅓; \frac23 ⅔
\mathbb{R} ℝ; ( ⟨; ) ⟩; | ∣
"""
_SYMBOLS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
    | {sign: text + " " if "\\" in text else text for sign, text in _table(_SIGNS).items() if len(sign) == 1}
    | dict.fromkeys("\u2009\u202f", "\\,")
    | dict.fromkeys("\u00a0\u3000", " ")
    | dict.fromkeys("\u200b\u2060\ufeff", "")
)
_SMALL = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "-01234567890123456789")
_DRESS_ONLY = """
left right big bigl bigr Big Bigl Bigr bigg biggl biggr displaystyle textstyle large Large bf rm limits mathbf
boldsymbol bm mathit mathsf mathnormal underline
"""
_SYNONYMS = dict.fromkeys(_DRESS_ONLY.split(), "") | _table(r"""
\frac dfrac tfrac cfrac; \binom dbinom tbinom; \le leq leqslant leqq; \ge geq geqslant geqq; \ne neq; < lt; > gt
\approx simeq approxeq; \emptyset varnothing; \text{and} land wedge; \text{or} lor vee; | mid vert lvert rvert
( langle; ) rangle; \{ lbrace; \} rbrace; : colon; £ pounds textsterling
""")
_END = r"(?![a-zA-Z])"
_FUNCTIONS = r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|gcd|lcm|max|min|det|dim|deg|arg"
_GROUPS = r"(?<![0-9.,])(?<![0-9.,] )([1-9][0-9]{0,2}(?: [0-9]{3})+)(?![0-9/]| ?[0-9]| ?\\[dt]?frac)"
# In this order: delimiters, spaces, one command for its synonyms, braces where they may miss
_SPELLINGS = [
    ("([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)|[₀-₉]+",  # 10¹² is 10^{12}, not 10^1^2
     lambda run: f"{'^' if run[1] else '_'}{{{run[0].translate(_SMALL)}}}"),
    (r"^\s*(?:\*\*|__|`)\s*(.*?)\s*(?:\*\*|__|`)\s*$", r"\1"),  # Markdown
    (r"(?i)^\s*(?:\\text(?:bf|rm|it)?\{)?\s*(?:the )?(?:final )?ans(?:wer|\.)?\s*(?:is|:|=)\s*:?\s*\}?(?=.)", ""),
    (rf"\\\\\[[0-9.]+[a-z]{{2}}\]|\\cr{_END}", r"\\\\"),  # the line breaks of matrices: \\[2pt]
    (r"\\\\|\\[()\[\]]", lambda match: match[0] if match[0] == "\\\\" else " "),  # \( \), but not a line break
    (rf"(?:(?<![a-zA-Z])US\s*)?(?:\\\$|\\(?:mathdollar|textdollar){_END})", r"\\$"),
    (r"(?<!\\)\$", ""),
    (r"\\([a-zA-Z]+)", lambda match: _SYNONYMS.get(match[1], match[0])),
    (r"(?<=[0-9])(?:\{,\}|,\\!)\s*(?=[0-9]{3}(?![0-9/]))", ""),  # 1{,}000 1,\!000
    (rf"\\!|(?<=\S)~|(?<!\\)\\[,;: ]|\\q?quad{_END}", lambda match: "" if match[0] == "\\!" else " "),
    (_GROUPS, lambda match: match[0].replace(" ", "")),  # 12 500
    (r"\{([^{}]*?)\s*\\choose(?![a-zA-Z])\s*([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+|[a-zA-Z]))|(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)",
     lambda match: f"\\sqrt{{{match[1] or match[2] or match[3] or match[4]}}}"),
    (r"\\not\s*=", r"\\ne "),
    (r"\\\{\s*\\\}", r"\\emptyset"),
    (rf"\^\s*\{{\s*\\circ\s*\}}|\^\s*\\circ{_END}|\\degrees?{_END}", r"^\\circ"),
    (r"\\?%", r"\\%"),
    (r"\\(?:text)?color\s*\{[a-zA-Z]+\}", ""),
    (rf"\\(?:mathrm|operatorname\*?)\s*\{{({_FUNCTIONS})\}}", r"\\\1 "),
    (r"\\mathrm\s*\{([eid])\}", r"\1"),
    (r"\\(?:mathrm|textbf|textit|textrm|textsf|textnormal|mbox|hbox)\s*(?=\{)", r"\\text"),
    (r"\\frac\{\\text\{([a-zA-Z]+)\}\}\{\\text\{([a-zA-Z]+)\}((?:\^[23])?)\}", r"\\text{\1/\2\3}"),
    (r"\\(?:text|boxed|fbox)\s*\{((?:[-+0-9.,\s€£¥]|\\[%$]|\^\\circ)*)\}", r"\1"),
    (r"(?<=\.)([0-9]*)\\(?:bar|dot)\s*\{([0-9])\}", r"\1\\overline{\2}"),  # 0.\dot{3}
    (r"\\(frac|sqrt)\s*(\\(?:pi|theta|alpha|beta)(?![a-zA-Z])|[0-9a-zA-Z](?![a-zA-Z]))", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})\s*(\\(?:pi|theta)(?![a-zA-Z])|[0-9a-zA-Z])", r"\1{\2}"),
    (r"([_^])\s*\{\s*([0-9a-zA-Z])\s*\}(?!\s*[0-9])", r"\1\2"),  # but not 3^{2}5
    (r"\{([:=])\}", r"\1"),
    (r"\\text\{([^{}]*[a-z][^{}]*?),?\s(and|or)\s*\}", r"\\text{\1}\\text{\2}"),  # 3\text{ cm and }4\text{ cm}
    (r"\\text\{,?\s*(and|or)\s*\}|(?<![\\a-zA-Z])(and|or)(?![a-zA-Z])", r"\\text{\1\2}"),
    (r"(?<=[0-9])(?:\^?\{?\\text\{(?:st|nd|rd|th)\}\}?|\^?\{?(?:st|nd|rd|th)\}?)$", ""),  # 12^{\text{th}}
    (r"\\begin\{cases\}([^&]*)\\end\{cases\}", lambda match: match[1].replace("\\\\", ",")),
    (rf"(\\(?:{_FUNCTIONS})\^[0-9])\s+([0-9.]+)", r"\1(\2)"),  # \tan^2 60
    (r"(?<=[0-9]),\s+(?=[0-9]{3}(?![0-9]))", ",\0"),  # the one space that tells: `1, 000` may be a list
    (r"(?<![0-9a-zA-Z])\s+|\s+(?![0-9a-zA-Z])|(?<=[0-9])\s+(?=[a-zA-Z])|(?<=[a-zA-Z])\s+(?=[0-9])", ""),
    (r"\s+|\0", " "),
    (r"([\[\]])([^\[\](),;]+)[,;]([^\[\](),;]+)([\[\]])",  # ]0,1[ is (0,1)
     lambda match: f"{'[('[match[1] == ']']}{match[2]},{match[3]}{'])'[match[4] == '[']}"),
    (r"\\(gcd|lcm|max|min)\(([^()]*)\)", lambda match: f"\\{match[1]}({','.join(sorted(match[2].split(',')))})"),
    (r"(?<![0-9a-zA-Z)}\]])\+(?=\\infty)|^\+|[\\ ]+$", ""),
    (r"(?<!\.)[.,;:]$", ""),
]  # fmt: skip
_WRAPPER = r"(?:\\(?:text|boxed|fbox))?(?=\{)"
_PHRASE = r"\\text\{(?:[a-zA-Z]{2,}(?:-[a-zA-Z]{2,})*|[a-zA-Z]+(?: [a-zA-Z]+)+)\}"  # keeps its \text: HTT is no product


@lru_cache(maxsize=4096)
def normalise_answer(answer: str) -> str:
    r"""The answer in one spelling, without mere dress: `\dfrac 12.` becomes `\frac{1}{2}`, a too long one ""."""
    text = _rewrite(answer.strip().translate(_SYMBOLS), _SPELLINGS) if len(answer) <= LONGEST else ""
    for _ in range(DEEPEST):
        wrapper = re.match(_WRAPPER, text)
        if wrapper is None or partner(text, wrapper.end()) != len(text) - 1 or re.fullmatch(_PHRASE, text):
            break
        text = re.sub(r"(?<!\.)[.,;:]$", "", text[wrapper.end() + 1 : -1].strip())
    exact, about, _ = text.partition("\\approx")  # 17/6 \approx 2.83 is 17/6, but x \approx 2.83 is no exact answer
    exact = exact.removesuffix("(")
    return exact if about and exact and (exact in ("e", "\\pi") or not re.fullmatch(_NAMED, exact + "=")) else text


# --- Numbers and units ------------------------------------------------------------------------------------------

# What turns a number into signs, brackets and quotients of whole numbers
_ARITHMETIC = [
    (r"^-?[1-9][0-9]{0,2}(?:, ?[0-9]{3})+(?:\.[0-9]*)?$", lambda match: re.sub(", ?", "", match[0])),  # 1,000
    (r"^(-?)([0-9]+)(?: ?\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))$",  # 1\frac{4}{5}, but not 2\frac{3}{2}
     lambda match: match.expand(r"\1(\2+\3\5/\4\6)" if 0 < int(match[3] or match[5]) < int(match[4] or match[6])
                                else r"\g<0>")),
    (r"^(-?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}$",  # 0.1\overline{6} = 0.1 + 0.06 / 0.9
     lambda match: f"{match[1]}({match[2]}.{match[3]}0+.{'0' * len(match[3])}{match[4]}/.{'9' * len(match[4])})"),
    (r"(?<![0-9.])([0-9]{1,3})!(?!!)", lambda match: f"({math.factorial(int(match[1]))})"),
    (r"(?<=[0-9.)])(?=\()|(?<=\))(?=[0-9])", "*"),  # 2(3), but a mixed number is none of these
    *[(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"), (r"\^\{([^{}]*)\}", r"^(\1)")] * DEEPEST,
    (r"\\(?:cdot|times)(?![a-zA-Z])", "*"),
    (r"\\div", "/"),
    (r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?",
     lambda match: "({}/{})".format(*Fraction(match[0]).as_integer_ratio())),
]  # fmt: skip
_OPERATIONS = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__,
               ast.Div: Fraction.__truediv__, ast.Pow: Fraction.__pow__}  # fmt: skip


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of normalised text that is arithmetic on rational numbers, else None.

    Read are decimals, `1e3`, `1,000`, `\frac{1}{2}`, `6 1/2`, `0.\overline{3}`, `5!`, `2(3)`, and + - * / ^ of these
    while they stay bounded.
    """
    if len(text) > LONGEST or not re.search("[0-9]", text):
        return None
    try:
        text = _rewrite(text, _ARITHMETIC)
        if re.fullmatch(r"(?:[0-9*()^]|[+-](?![+-])|/(?!/))*", text) and "**" not in text:
            return _value(ast.parse(text.replace("^", "**"), mode="eval").body)
    except (ValueError, AttributeError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        pass
    return None


def _value(node: ast.expr) -> Fraction:
    """The value of a syntax tree of whole numbers. An error where it would be large, irrational or undefined."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    left, right, power = _value(node.left), _value(node.right), isinstance(node.op, ast.Pow)
    if power and (right.denominator != 1 or (left == 0 and right <= 0) or abs(right) * _bits(left) > MOST_BITS):
        raise ValueError
    value = _OPERATIONS[type(node.op)](left, right)
    if _bits(value) > MOST_BITS:
        raise ValueError
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


# A unit and its spellings, besides a plural s; two different units of this table are different answers.
_UNIT_OF = _table(r"""
dollar usd \$; euro €; yen ¥; pound £ lb; cent; percent \%; am; pm; degree deg ^\circ; ohm; mol; K; Pa; Hz
celsius ^\circC ^\circ\text{C}; fahrenheit ^\circF ^\circ\text{F}; mm millimeter millimetre; cm centimeter centimetre
km kilometer kilometre; m meter metre; in inch inches; ft foot feet; yd yard; mi mile; mg; g gram; kg kilogram
oz ounce; ml mL milliliter; L liter litre; ms; s sec second; min minute; h hr hour; N newton; J joule; kJ
W watt; kW; V volt; day; cup; week; month; year
""")
_UNIT_OF |= {spelling + "s": unit for spelling, unit in _UNIT_OF.items() if spelling.isalpha() and len(spelling) > 1}
# Words that make the number before them another number, or no number.
_CHANGING = """
or and to than more less fewer over under about approximately around roughly at least most not no plus minus times
divided by above below negative dozen dozens hundred hundreds thousand thousands million millions billion billions
trillion trillions half halves third thirds fourths fifth fifths sixths eighths tenth tenths hundredth hundredths
thousandth thousandths squared cubed factorial mod modulo base one two three four five six seven eight nine ten
eleven twelve twenty thirty forty fifty sixty seventy eighty ninety
"""
_FUNCTION = rf"(?:{_FUNCTIONS}|sqrt|frac|binom)[a-z]?"
_TRIGONOMETRY = r"\\(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)"
_CURRENCY = r"([+-]?)(\\\$|[€£¥])([+-]?)"
_POWER = r"\^(?:[0-9]|\{-?[0-9]\})"
_TWO_UNITS = rf"(\\text\{{[a-zA-Z /.]*(?:{_POWER})?)\}}({_POWER})?(?:\\cdot|(/)|)\\text\{{(?!(?:and|or)\}})"
_TAIL = (
    r"(?P<symbol>\\%|\\\$|[€£¥]|\^\\circ(?: ?[CF]|\\text\{[CF]\})?)"
    rf"|\\(?:text|operatorname)\{{(?P<text>[a-zA-Z](?:[a-zA-Z0-9 /.^-]|\\cdot|\{{-?[0-9]\}})*)\}}(?P<power>{_POWER})?"
    rf"|(?<=[0-9}}])(?P<plain>[a-zA-Z][a-zA-Z /]*)(?P<plain_power>{_POWER})?"
)
_WORDING = [  # a unit's words, each with its power behind it, and `per` before the one it stands under
    (r"\\cdot|\^\{?(-?[0-9])\}?", lambda match: f"^{match[1]} " if match[1] else " "), ("/", " per "), (r"\.", ""),
    (r"\bmph\b", "mi per h"), (r"\b(?:kph|kmh)\b", "km per h"),
    (r"(?i)\b(?:square|sq) ([a-z]+)", r"\1^2"), (r"(?i)\bcubic ([a-z]+)", r"\1^3"),
    (r"([a-zA-Z]+)\^-([0-9])", r"per \1^\2"), (r"\^1\b", ""),
]  # fmt: skip


def split_unit(text: str) -> tuple[str, str]:
    """The answer and its unit, "" without one: a currency in front, or a sign or words behind."""
    unit, whole = "", text
    if (money := re.match(_CURRENCY, text)) is not None:
        unit, text = _UNIT_OF[money[2]], (money[1] or money[3]) + text[money.end() :]
    joined = _rewrite(text, [(_TWO_UNITS, r"\1\2 \3")] * 3)  # \text{N}\cdot\text{m} as \text{N m}
    tail = next((tail for tail in re.finditer(_TAIL, joined) if tail.end() == len(joined) and tail.start() > 0), None)
    if tail is None or joined.endswith((r"\text{and}", r"\text{or}"), 0, tail.start()):
        return text, unit
    rest = joined[: tail.start()]
    if tail["symbol"] is not None:
        if tail["symbol"] == "^\\circ" and re.search(_TRIGONOMETRY, whole):  # degrees of an angle in the formula
            return text, unit
        return rest, unit or _UNIT_OF[tail["symbol"].replace(" ", "")]
    spelled = (tail["text"] or tail["plain"]) + (tail["power"] or tail["plain_power"] or "")
    words, as_text = _rewrite(spelled, _WORDING).split(), tail["text"] is not None
    if not all(_counts(word.partition("^")[0], as_text or position > 0) for position, word in enumerate(words)):
        return text, unit
    rest, inner = split_unit(rest) if rest.endswith("%") else (rest, "")
    named = re.sub("[a-zA-Z]+", lambda word: _UNIT_OF.get(word[0]) or _UNIT_OF.get(word[0].lower(), word[0].lower()),
                   " ".join(words))  # fmt: skip
    return rest, unit or inner or named


def _counts(word: str, as_text: bool) -> bool:
    r"""Whether a word behind a number only says what is counted. Outside \text{} a short one may be a product."""
    if word in _UNIT_OF or (len(word) > 1 and word.lower() in _UNIT_OF):
        return len(word) > 1 or as_text
    if word.lower() in _CHANGING.split() or re.fullmatch(_FUNCTION, word) or not word.isalpha():
        return False
    return len(word) > 1 if as_text else word == "per" or (len(word) > 3 and bool(re.search("[aeiou]", word)))


# --- Forms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    r"""What an answer says. `form` is number, based, time, ratio, words, formula, list, set, tuple or union.

    text   the normalised answer, without its name where the form is known and without its unit (words: lower case)
    value  of a number
    parts  of a list, set, tuple, union or ratio; also of a number written as `1, 000`, which may be a list
    ends   a tuple's two brackets: an interval is read as a tuple, since an open one is written like it
    """

    form: str
    text: str
    name: str = ""
    unit: str = ""
    value: Fraction | None = None
    parts: tuple[str, ...] = ()
    ends: str = ""


_COMMA = r",|;|\\text\{(?:and|or)\}"
_MATRIX = r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}"
# x, x_1, x_{\max}, \theta, AB, \angle AB, |S|, f(2), (x,y), area or \text{area}, before the only "=", or before \in
_INDEX = r"_(?:[0-9a-zA-Z]|\{[^{}=]*(?:\{[^{}=]*\})?\})"
_NAMED = (
    rf"((?:[a-zA-Z]|\\(?!text|in\b)[a-zA-Z]+)(?:{_INDEX})?'?(?:(?:\^\{{-1\}})?\((?:[0-9a-zA-Z]+|-?[0-9]+[./]?[0-9]*)\))?"
    r"|(?:m?\\angle ?)?[A-Z]{1,4}|[a-zA-Z]{4,20}|\|[A-Z]{1,2}(?:\\c[ua]p ?[A-Z])*\||\\#[A-Z]"
    r"|\\(?:overline|vec|hat|bar)\{[a-zA-Z]+\}"
    r"|\((?:[a-zA-Z],)+[a-zA-Z]\)|\\text\{[a-zA-Z ]+\})(?:=|\\in(?![a-zA-Z]))(?!.*=)"
)
_BASED = r"(-?)\(?0*([0-9][0-9A-Z]*)\)?_(?:([2-9])|\{([0-9]{2})\})"
_TIME = r"(?i)([01]?[0-9]|2[0-4]):([0-5][0-9])(?: ?(?:\\text\{)?([ap])\.?m\.?\}?)?"
_CHOICE = r"(?:\\text)?\{\(?([A-J])[).:]+\}(.+)|\(([A-J])\)(-?[0-9].*)"
_SET_BUILDER = r"[a-zA-Z](?:\\in\\mathbb\{R\})?(?:\||:)"
_NO_WORDS = r"\\(?:begin|end|operatorname)\*?\{[^{}]*\}|\\(?!text)[a-zA-Z]+"
_WORD = r"\\text|[a-zA-Z]{4,}|(?<![A-Za-z])[A-Z]{3,}|(?<![a-zA-Z])(?:no|on|yes|odd|one|two|six|ten)(?![a-z])"
_COMPARED = r"\s?(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z]))\s?"
_INEQUALITY = rf"(?:(.+?){_COMPARED})?([a-zA-Z]|\\[a-zA-Z]+)(?:{_COMPARED}(.+))?"


@lru_cache(maxsize=4096)
def read_answer(answer: str) -> Reading:
    """The reading of an answer in any spelling."""
    text = normalise_answer(answer)
    paired = partner(f"{{{text}}}", 0, _BRACES) == len(text) + 1
    if not paired or any(depth > DEEPEST for _, depth in _depths(text)) or text.startswith(("\\ne", "\\approx", "~")):
        return Reading("words", text)  # no parser sees it
    if re.match(_COMPARED, text):  # > 2, of a name that is not told
        interval = _read_inequality("x" + text)
        return replace(interval, name="") if interval else Reading("words", text)
    if (interval := _read_inequality(text)) is not None:
        return interval
    if (turned := re.fullmatch(r"([^=]+)=([a-zA-Z])", text)) is not None and parse_number(turned[1]) is not None:
        text = f"{turned[2]}={turned[1]}"
    named = re.match(_NAMED, text)
    reading = _read_body(text[named.end() :].strip() if named else text)
    if named is None:
        return reading
    if reading.form in ("words", "formula"):
        return _read_body(text)
    if reading.form == "tuple" and named[1].startswith("("):  # (x,y)=(2,4)
        names = named[1].strip("()").split(",")
        parts = tuple(f"{name}={part}" for name, part in zip(names, reading.parts, strict=False))
        return replace(reading, parts=_by_name(parts) or parts)
    return replace(reading, name=named[1])


def _read_inequality(text: str) -> Reading | None:
    r"""`x > 2`, `2 < x`, `1 \le x < 2` as the interval of x; None for others, also where a bound holds a letter."""
    match = re.fullmatch(_INEQUALITY, text)
    if match is None or not (match[2] or match[4]):
        return None
    low, first, name, second, high = match.groups()
    bounds = re.sub(r"\\(?![lg]e)[a-zA-Z]+", "", f"{low or ''} {high or ''}")
    rising = {sign in ("<", "\\le") for sign in (first, second) if sign}
    if re.search(r"[a-zA-Z=<>,]|\\[lg]e", bounds) or len(rising) != 1:
        return None
    if rising == {False}:
        low, first, second, high = high, second, first, low
    ends = ("[" if first in ("\\le", "\\ge") else "(") + ("]" if second in ("\\le", "\\ge") else ")")
    return Reading("tuple", text, name, parts=(low or "-\\infty", high or "\\infty"), ends=ends)


def _read_body(text: str) -> Reading:
    if (time := re.fullmatch(_TIME, text)) is not None:  # one that no clock problem asks for, as 9:21, may be a ratio
        hour, minute = int(time[1]), int(time[2])
        maybe = () if time[3] or minute % 5 == 0 or minute < 10 else (str(hour), str(minute))
        return Reading("time", f"{hour}:{minute}", unit=(time[3] or "").lower(), parts=maybe)
    bare, unit = split_unit(text)
    if (value := parse_number(bare)) is not None:
        return Reading("number", bare, unit=unit, value=value, parts=tuple(bare.split(", ")) if ", " in bare else ())
    if (based := re.fullmatch(_BASED, bare)) is not None:
        return Reading("based", f"{based[1]}{based[2]}_{based[3] or based[4]}")
    if (reading := _read_parts(bare)) is not None:
        return reading if len(reading.parts) <= MOST_PARTS else Reading("words", text)
    bare = re.sub(r"\\text\{([a-zA-Z])\}", r" \1 ", bare).strip()
    if any(not re.fullmatch(_FUNCTION, word) for word in re.findall(_WORD, re.sub(_NO_WORDS, " ", bare))):
        return Reading("words", re.sub(r"\\text|[{}\s-]", "", text).lower())
    return Reading("formula", bare, unit=unit)


def _read_parts(text: str) -> Reading | None:
    """The reading of a matrix, of what stands in brackets, of a union, ratio or list; None for others."""
    if (matrix := re.fullmatch(_MATRIX, text)) is not None:
        rows = matrix[2].removesuffix("\\\\").split("\\\\")
        ends = f"matrix {[row.count('&') for row in rows]}"
        return Reading("tuple", text, parts=tuple("&".join(rows).split("&")), ends=ends)
    opening = re.match(r"[(\[]|\\\{", text)
    if opening is not None and partner(text, 0) == len(text) - 1:
        inside, ends = text[opening.end() : -1].removesuffix("\\"), opening[0] + text[-1]
        parts = split(inside, _COMMA)
        if opening[0] == "\\{":
            if (condition := re.match(_SET_BUILDER, inside)) is not None:
                return read_answer(inside[condition.end() :])
            return Reading("set", text, parts=_plus_and_minus([part.replace(":", "|") for part in parts]))
        if len(parts) > 1:
            return Reading("tuple", text, parts=_by_name(parts) or tuple(parts), ends=ends)
        return read_answer(inside) if ends == "()" and parts else None
    if len(parts := split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return Reading("union", text, parts=tuple(parts))
    if len(parts := split(text, r"\\text\{or\}")) > 1 and all(map(_read_inequality, parts)):
        return Reading("union", text, parts=tuple(parts))
    if len(parts := _plus_and_minus(split(text, _COMMA))) > 1:
        named = _by_name(parts)
        return Reading("tuple" if named else "list", text, parts=named or parts)
    if len(parts := split(re.sub(r"^[a-zA-Z]+(?::[a-zA-Z]+)+=", "", text), ":")) > 1:
        return Reading("ratio", text, parts=tuple(parts))
    return None


def _plus_and_minus(parts: list[str]) -> tuple[str, ...]:
    r"""`1 \pm 2` as the two parts `1 + 2` and `1 - 2`."""
    found = []
    for part in parts:
        plus, minus = part.count("\\pm"), part.count("\\mp")
        signs = ("+-", "-+") if plus + minus == 1 or plus == minus == 1 else ()
        found += [re.sub(r"^\+", "", part.replace("\\pm", pm).replace("\\mp", mp)) for pm, mp in signs] or [part]
    return tuple(found)


def _by_name(parts: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """`y=4, x=2` in the order of the names, if all parts carry one and no two the same; else ()."""
    names = {named[1]: part for part in parts if (named := re.match(_NAMED, part)) and part[named.end() - 1] == "="}
    return tuple(names[name] for name in sorted(names)) if len(names) == len(parts) else ()


def needs_algebra(answer: str) -> bool:
    """Whether the answer holds a formula that is no number, so that only equal spellings of it are known as equal."""
    reading = read_answer(answer)
    if reading.parts:
        return any(needs_algebra(part) for part in reading.parts if part != answer)
    return reading.form == "formula" and not re.fullmatch(r"[a-zA-Z]|-?\\infty|\\emptyset", reading.text)


# --- Comparison -------------------------------------------------------------------------------------------------

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
    chosen = [(text, re.fullmatch(_CHOICE, text)) for text in (left, right)]
    xs, ys = ([*filter(None, match.groups())] if match else [text] for text, match in chosen)
    if len(xs) == len(ys) == 2:  # (C) 12
        return xs[0] == ys[0] and same_answer(xs[1], ys[1], ask)
    return any(_same(read_answer(x), read_answer(y), ask) for x in xs for y in ys)


def _same(x: Reading, y: Reading, ask: Ask) -> bool:
    x, y = sorted((x, y), key=lambda reading: (reading.form, reading.text))
    forms = {x.form, y.form}
    if "words" in forms:  # \text{AB} is AB
        letters = x.form == y.form or (x.form == "formula" and x.text.isalpha())
        return letters and x.text.lower() == y.text.lower() != ""
    if x.name and y.name and x.name != y.name:
        return False
    units = [{word.partition("^")[0] for word in reading.unit.split()} for reading in (x, y)]
    if x.unit != y.unit and all(unit and unit <= {*_UNIT_OF.values(), "per"} for unit in units):
        return False  # two units, both of the table
    if x.form == y.form and (x.text == y.text if x.form in ("based", "formula") else x.value == y.value is not None):
        return True
    if x.parts and y.parts and not forms & {"time", "ratio", "union"}:  # `1, 000` is a list beside a list
        x, y = (replace(reading, form="list") if reading.form == "number" else reading for reading in (x, y))
        forms = {x.form, y.form}
    if forms == {"time"} and x.text == y.text:
        return x.unit == y.unit or "" in (x.unit, y.unit)
    if forms & {"time", "ratio"}:
        return _same_ratio(x, y, ask)
    if "tuple" in forms and forms <= {"tuple", "list"}:  # a list without brackets is a tuple with round ones
        told = [{found[1] or found[0] for found in re.finditer(_SOLVED, reading.text)} for reading in (x, y)]
        if "list" in forms and told[0] != told[1]:
            return False  # the ends of an interval are not the interval
        same_ends = (x.ends or "()") == (y.ends or "()") and len(x.parts) == len(y.parts)
        return same_ends and all(same_answer(p, q, ask) for p, q in zip(x.parts, y.parts, strict=True))
    if forms <= {"list", "set"}:
        if len({*re.findall(r"\\text\{(and|or)\}", x.text + y.text)}) > 1 and not re.search("[0-9]", x.text + y.text):
            return False  # both and either; of numbers both list the solutions
        return _same_collection(x.parts, y.parts, ask, as_set="set" in forms)
    if forms == {"union"} and _same_collection(x.parts, y.parts, ask, as_set=False):
        return True
    if "set" in forms and len(parts := (y if y.form == "set" else x).parts) == 1:  # the set of one element and it
        return _same(read_answer(parts[0]), x if y.form == "set" else y, ask)
    return _open(x, y) and ask(*_for_algebra(x.text, y.text))


def _same_ratio(x: Reading, y: Reading, ask: Ask) -> bool:
    """Up to a common factor: p_i q_j = p_j q_i. 2:3 is the fraction too."""
    fraction = "frac|/|[.]"
    xs, ys = (z.parts or ((z.text, "1") if re.search(fraction, z.text) else ()) for z in (x, y))
    if len(xs) != len(ys) or not xs or [parse_number(p) == 0 for p in xs] != [parse_number(q) == 0 for q in ys]:
        return False
    pairs = combinations(zip(xs, ys, strict=True), 2)
    return all(same_answer(f"({p})\\cdot({s})", f"({r})\\cdot({q})", ask) for (p, q), (r, s) in pairs)


def _same_collection(xs: tuple[str, ...], ys: tuple[str, ...], ask: Ask, as_set: bool) -> bool:
    """In any order; as often in both, unless as sets."""
    if as_set:
        found = [[same_answer(p, q, ask) for q in ys] for p in xs]
        return bool(found) and all(map(any, found)) and all(map(any, zip(*found, strict=True)))
    left = list(ys)
    for part in xs:
        if (found := next((other for other in left if same_answer(part, other, ask)), None)) is None:
            return False
        left.remove(found)
    return not left


# What algebra would drop: `about`, `and so on`, numbers side by side, and the base of a number in a formula.
_VAGUE = r"\\(?:approx|sim|cong|[lc]?dots)(?![a-zA-Z])|\.\.\.|(?<=[0-9)])_|(?<![_0-9.])[0-9.]+ +[0-9.]|[?]"
_COUNTED = r"-?[0-9.,]+[a-zA-Z]+"  # 5m: a product, which math-verify may read as a length
_RELATION = r"[<>]|\\(?:[lg]e|ne)(?![a-zA-Z])"
# 1<x<2; 1 or 2; x=1,x=2: none of them is a point
_SOLVED = rf"{_RELATION}|\\text\{{or\}}|(?<![\\a-zA-Z])(\\?[a-zA-Z]+(?:_[0-9a-zA-Z])?)=.*(?:[,;]|\\text\{{and\}})\1="
_SOLUTIONS = r"[\[(].*,|\\(?:cup|setminus|mathbb|emptyset)"
# What math-verify drops (f', the transpose) or cannot know (it takes the gcd of letters to be 1): alike in both
_ALIKE = r"[a-zA-Z}]'+|\^\{?(?:T|\\top)\}?(?![a-zA-Z])|\\(?:gcd|lcm)\([^()]*[a-zA-Z][^()]*\)"


def _open(x: Reading, y: Reading) -> bool:
    """Whether algebra may still find two readings equal."""
    forms = {x.form, y.form}
    if "formula" not in forms and forms not in ({"union"}, {"tuple", "union"}):
        return False
    formula, other = (x.text, y.text) if x.form == "formula" else (y.text, x.text)
    if re.search(_VAGUE, f"{formula}|{other}") or ("number" in forms and re.fullmatch(_COUNTED, formula)):
        return False
    if forms & {"list", "based"} or ("tuple" in forms and re.search("[,=]", formula)):
        return False
    related = [bool(re.search(_RELATION, text)) for text in (formula, other)]
    if related[0] != related[1] and not re.search(_SOLUTIONS, other if related[0] else formula):
        return False
    if set(re.findall(_ALIKE, formula)) != set(re.findall(_ALIKE, other)):
        return False
    equations = [text for text in (formula, other) if "=" in text]
    if len(equations) != 1:
        return True
    left = re.sub(r"\\(?:frac|sqrt|cdot)(?![a-zA-Z])", "", equations[0].partition("=")[0])  # of 2x = 10, no answer
    return len(set(re.findall("[a-zA-Z]", left))) != 1 or "\\" in left or len(left) == 1


# What math-verify would read as a sum, 1\frac12x, or leave out, 2(3), and a root that it takes for a complex one
_FACTORS = [
    (r"\\sqrt\[([0-9]?[13579])\]\{-([0-9a-zA-Z]+)\}", r"(-1)\\sqrt[\1]{\2}"),
    (r"(?<![0-9a-zA-Z}.^_])([0-9]+)(\\frac\{[0-9]+\}\{[0-9]+\})",
     lambda match: f"({match[1]}+{match[2]})" if parse_number(match[0]) else match[0]),
    (r"(?<![_^0-9a-zA-Z.}])[0-9.]+(?=\()|\)(?=[(0-9]|\\frac)", r"\g<0>\\cdot "),
]  # fmt: skip
_CAPITAL = r"(?<![\\a-zA-Z])[A-Z](?![a-zA-Z])"
_DEGREES = r"(\\frac\{[^{}]*\}\{[^{}]*\}|\([^()]*\)|[0-9.]+|[a-zA-Z]|\\[a-z]+)\^\\circ"


def _for_algebra(*texts: str) -> list[str]:
    """Two formulas as math-verify reads them rightly: factors with their sign, degrees as radians, I and R no i and r.

    It turns capitals into small letters, so that pi(R^2 - r^2) would be 0, and I into the imaginary unit.
    """
    renamed = {
        letter: ("\\Xi" if letter == "I" else letter) + "_{9}"
        for text in texts
        for letter in re.findall(_CAPITAL, text)
        if letter == "I" or letter.lower() in re.sub(r"\\[a-zA-Z]+", "", text)
    }

    def ready(text: str) -> str:
        text = re.sub(_CAPITAL + "(?!_)", lambda letter: renamed.get(letter[0], letter[0]), text)
        if re.search(_TRIGONOMETRY, text):
            text = re.sub(_DEGREES, r"(\1\\cdot\\frac{\\pi}{180})", text)
        return _rewrite(text, _FACTORS)

    return [ready(text) for text in texts]


# --- Graders ----------------------------------------------------------------------------------------------------

WORKER = Path(__file__).resolve().parent / "runtime" / "grading_worker.py"
_NO_GOLD = r"(?i:(?:\\text\{)?(?:proof|not ?found|n/?a|unknown|null|nan|see (?:the )?solution)\.?\}?)"


def answers_match(given: str | None, gold: str | None) -> bool:
    """Whether two answers are the same as far as arithmetic and form decide it. Symmetric; None never matches."""
    return given is not None and gold is not None and same_answer(given, gold)


class ExactGrader:
    """Arithmetic and form only. Of two formulas, only equal spellings are equal: it undercounts LaTeX answers."""

    name, version = "exact", "4"
    note = ""  # what a script prints before it grades
    asked = stopped = refused = 0  # as MathVerifyGrader's

    def match(self, answer: str | None, gold: str | None) -> bool:
        return answers_match(answer, gold)

    def grade(self, solution: str, gold: str) -> bool:
        """Whether the last box of a solution matches; where there is none, `match` is not asked."""
        answer = extract_boxed(solution)
        return answer is not None and self.match(answer, gold)

    def close(self) -> None:
        """End what the grader has started."""


class MathVerifyGrader(ExactGrader):
    """Exact grader first, then math-verify in both directions in the worker. Symmetric; None matches nothing.

    asked    distinct comparisons that arithmetic and form left open, so that math-verify was asked
    stopped  comparisons that were killed at a limit: they count as not equal, and math-verify is not asked about that
             answer again, so that a vote of n slow answers costs n limits at most
    refused  comparisons in which the worker refused what a library wanted to do: not equal, if that decided
    """

    name = "math-verify"

    def __init__(self, seconds: float = 10.0, memory_bytes: int = 2 * 2**30) -> None:
        """Limits of a comparison. Of processor time: no verdict depends on what else the machine does."""
        if importlib.util.find_spec("math_verify") is None:
            raise InputError("--grader math-verify: pip install math-verify; --grader exact undercounts LaTeX answers")
        self.version = f"{ExactGrader.version} on {importlib.metadata.version('math-verify')}"
        self.limits = (seconds, memory_bytes)
        self._known: dict[tuple[str, str], bool] = {}
        self._slow: set[str] = set()
        self._worker: subprocess.Popen | None = None

    def match(self, answer: str | None, gold: str | None) -> bool:
        if answer is None or gold is None:
            return False
        pair = (min(answer, gold), max(answer, gold))
        if pair in self._known:
            return self._known[pair]
        slow, replies = {normalise_answer(answer), normalise_answer(gold)} & self._slow, []

        def ask(a: str, b: str) -> bool:
            if slow or "" in replies:  # one stop ends the comparison
                return False
            replies.append(self._ask(a, b))
            return replies[-1] == "true"

        self._known[pair] = same_answer(answer, gold, ask)
        self.asked += bool(replies)
        self.refused += "refused" in replies
        self.stopped += "" in replies
        self._slow |= {normalise_answer(answer)} if "" in replies else set()
        return self._known[pair]

    def _ask(self, a: str, b: str) -> str:
        """The worker's word for two formulas; "" where it had to be stopped, or is gone."""
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            fixed = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            command = [sys.executable, str(WORKER), *map(str, self.limits)]
            self._worker = subprocess.Popen(command, env=os.environ | fixed, **pipes)
            if self._worker.stdout.readline() != "ready\n":
                raise InputError("--grader math-verify: `python runtime/grading_worker.py 10 2e9` shows what fails")
        try:
            self._worker.stdin.write(json.dumps((a, b)) + "\n")
            self._worker.stdin.flush()
            reply = self._worker.stdout.readline().strip()
        except OSError:  # it refuses
            reply = ""
        if reply not in ("true", "false", "refused"):
            self.close()
            reply = ""
        return reply

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.stdout.close()
            self._worker.wait()
            self._worker = None


GRADERS = {"exact": ExactGrader, "math-verify": MathVerifyGrader}  # a name for what makes a grader


def make_grader(name: str, golds: list[str]) -> ExactGrader:
    """The grader of `--grader name`. `auto` is math-verify wherever it is installed.

    Without it, `auto` is an InputError where a gold answer is a formula, else the exact grader with a note. Golds that
    no answer can match are told in the note too.
    """
    notes = []
    if name == "auto":
        name = "math-verify"
        if importlib.util.find_spec("math_verify") is None and not any(map(needs_algebra, golds)):
            name = "exact"
            notes.append("no math-verify (`pip install math-verify`): a right answer that is a formula may be missed")
    if name not in GRADERS:
        raise InputError(f"--grader {name}: choose one of auto, {', '.join(GRADERS)}")
    odd = [gold for gold in golds if "####" in gold or re.fullmatch(f"{_NO_GOLD}|{_NOTHING}", gold.strip())]
    if odd:
        notes.append(f"{len(odd)} of {len(golds)} gold answers are none that can be graded, such as {odd[0][-40:]!r}")
    grader = GRADERS[name]()
    grader.name = name  # what the records hold, also of a class that inherits another's
    grader.note = "; ".join(notes)
    return grader
