"""Exact arithmetic on the numbers people write: read by a small parser, never evaluated as code, bounded in size."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1000  # characters of an answer
DEEPEST = 20  # brackets inside brackets
MOST_BITS = 2**14  # of a numerator or denominator

_SEPARATED = re.compile(r"[1-9][0-9]{0,2}(?:, ?[0-9]{3})+(?:\.[0-9]*)?")
_MIXED = re.compile(r"(-?)([0-9]+) ?(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|(?<= )([0-9]+)/([0-9]+))")
_REPEATING = re.compile(r"(-?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_TOKEN = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?|\\[a-zA-Z]+|[-+*/^!(){}]")


class _NotExactError(Exception):
    """The text is no bounded arithmetic on rational numbers."""


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of normalised text that is arithmetic on rational numbers, else None.

    Read are decimals, `1e3`, `1,000`, `\frac{1}{2}`, `6 1/2`, `0.\overline{3}`, and + - * / ! ^ of these while they
    stay bounded.
    """
    if len(text) > LONGEST:
        return None
    text = text.removeprefix("+")
    if _SEPARATED.fullmatch(text.removeprefix("-")):
        text = re.sub(", ?", "", text)
    if (mixed := _MIXED.fullmatch(text)) is not None:
        sign, whole, top, bottom = mixed[1], int(mixed[2]), int(mixed[3] or mixed[5]), int(mixed[4] or mixed[6])
        return (-1 if sign else 1) * (whole + Fraction(top, bottom)) if 0 < top < bottom else None
    if (repeating := _REPEATING.fullmatch(text)) is not None:
        sign, whole, once, again = repeating.groups()
        value = int(whole + once or "0") + Fraction(int(again), 10 ** len(again) - 1)
        return (-1 if sign else 1) * value / 10 ** len(once)
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        return None
    try:
        return _Arithmetic(tokens).value()
    except _NotExactError:
        return None


class _Arithmetic:
    """Recursive descent: sum -> product -> signed power -> number, fraction or bracket."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = [*tokens[::-1]]
        self.depth = 0

    def value(self) -> Fraction:
        total = self.sum()
        if self.tokens:
            raise _NotExactError
        return total

    def take(self, *wanted: str) -> str:
        """The next token if it is wanted, else ""."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else ""

    def sum(self) -> Fraction:
        total = self.product()
        while sign := self.take("+", "-"):
            total = _bounded(total + (1 if sign == "+" else -1) * self.product())
        return total

    def product(self) -> Fraction:
        total = self.signed()
        while sign := self.take("*", "/", "\\cdot", "\\times", "\\div"):
            factor = self.signed()
            total = _bounded(total * factor) if sign not in ("/", "\\div") else _quotient(total, factor)
        return total

    def signed(self) -> Fraction:
        return -self.power() if self.take("-") else self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if self.take("!"):
            base = _factorial(base)
        if self.take("^"):
            base = _power(base, self.atom())
        return base

    def atom(self) -> Fraction:
        if self.take("\\frac"):
            return _quotient(self.group("{"), self.group("{"))
        if self.tokens and self.tokens[-1] in ("(", "{"):
            return self.group("(", "{")
        if not self.tokens or self.tokens[-1][0] not in ".0123456789":
            raise _NotExactError
        digits, _, exponent = self.tokens.pop().lower().partition("e")
        return _bounded(Fraction(digits) * _power(Fraction(10), Fraction(exponent or 0)))

    def group(self, *opening: str) -> Fraction:
        bracket = self.take(*opening)
        self.depth += 1
        if not bracket or self.depth > DEEPEST:
            raise _NotExactError
        inside = self.sum()
        if not self.take(")" if bracket == "(" else "}"):
            raise _NotExactError
        self.depth -= 1
        return inside


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise _NotExactError
    return value


def _quotient(top: Fraction, bottom: Fraction) -> Fraction:
    if bottom == 0:
        raise _NotExactError
    return _bounded(top / bottom)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """base^exponent, refused before it is computed where it would be large, irrational or undefined."""
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or (base == 0 and exponent <= 0) or abs(exponent) * bits > MOST_BITS:
        raise _NotExactError
    return base ** int(exponent)


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= 1000:
        raise _NotExactError
    total = 1
    for factor in range(2, int(value) + 1):
        total *= factor
    return Fraction(total)
