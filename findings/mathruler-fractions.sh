#!/usr/bin/env bash
# Guess: grade_answer of mathruler, the grader of EasyR1's rewards, reads LaTeX fractions and roots as mathematics:
# (1+\sqrt{5})/2 is \frac{1+\sqrt{5}}{2}, and 1+\frac{\sqrt{5}}{2} is not.
# True (mathruler 0.1.0, sympy 1.14.0, pylatexenc 2.10 and 2.11): the other way round. A fraction loses its braces and
# gets no brackets for them, so \frac{a+b}{c} is a + b/c and \frac{a}{bc} is (a/b)c; a cube root is a square root; and
# -2\frac{1}{3} is -2 + 1/3. Where a sum stands over the reference's line, or a sum or product under it, the same number
# with a slash, as two fractions or with the terms in another order is wrong; 1+\frac{\sqrt{5}}{2}, \frac{1}{x}+1 for
# \frac{1}{x+1} and \sqrt{4} for \sqrt[3]{4} are right.
# Why: _parse_latex in mathruler/grader.py turns LaTeX into text with pylatexenc's LatexNodes2Text, whose \frac is
# "%s/%s" and whose \sqrt drops the optional argument, and are_equal_under_sympy calculates with that text. Equal texts
# are right even before.
# Bites: answers with a sum over a fraction line or a product under it, as every quadratic formula, and roots of higher
# degree. A reward of 1 goes to a term that slipped out of its fraction, which is a mistake that models make, and 0 to
# the right number in other words. Fractions of single terms (1/2, \frac{1}{\sqrt{3}}) are graded as they should be, and
# so is an answer that agrees with the reference to the letter, which hides it.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check mathruler==0.1.0 sympy==1.14.0 tqdm
cat > seen.py <<'PY'
from importlib.metadata import version

import sympy
from mathruler.grader import grade_answer

print("mathruler", version("mathruler"), "pylatexenc", version("pylatexenc"), "sympy", sympy.__version__)
x, r2, r3, r5 = sympy.Symbol("x"), sympy.sqrt(2), sympy.sqrt(3), sympy.sqrt(5)
# reference, its value, and given answers with theirs
CASES = [
    (r"\frac{1+\sqrt{5}}{2}", (1 + r5) / 2, [
        (r"(1+\sqrt{5})/2", (1 + r5) / 2),
        (r"\frac{\sqrt{5}+1}{2}", (1 + r5) / 2),
        (r"\frac{1}{2}+\frac{\sqrt{5}}{2}", (1 + r5) / 2),
        (r"1+\frac{\sqrt{5}}{2}", 1 + r5 / 2),
    ]),
    (r"\frac{\sqrt{3}}{2}", r3 / 2, [(r"\frac{3}{2\sqrt{3}}", 3 / (2 * r3))]),
    (r"\frac{2}{3\sqrt{2}}", 2 / (3 * r2), [(r"\frac{\sqrt{2}}{3}", r2 / 3), (r"\frac{2\sqrt{2}}{3}", 2 * r2 / 3)]),
    (r"\frac{1}{x+1}", 1 / (x + 1), [(r"1/(x+1)", 1 / (x + 1)), (r"\frac{1}{x}+1", 1 / x + 1)]),
    (r"\frac{\pi}{2}", sympy.pi / 2, [(r"\frac{1}{2\pi}", 1 / (2 * sympy.pi))]),
    (r"\sqrt[3]{4}", sympy.cbrt(4), [(r"\sqrt{4}", sympy.Integer(2))]),
    (r"-2\frac{1}{3}", -sympy.Rational(7, 3), [
        (r"-\frac{7}{3}", -sympy.Rational(7, 3)),
        (r"-\frac{5}{3}", -sympy.Rational(5, 3)),
    ]),
]
seen = []
for gold, value, answers in CASES:
    for answer, its_value in answers:
        equal, graded = sympy.simplify(value - its_value) == 0, grade_answer(answer, gold)
        print(f"seen: {gold:22} answered {answer:32} {'equal' if equal else 'other'}, graded {graded}")
        assert grade_answer(gold, gold) and graded is not equal, (gold, answer)
        seen.append(equal)
print(f"seen: all {len(seen)} graded wrongly, {sum(seen)} right answers and {len(seen) - sum(seen)} wrong ones")
assert (len(seen), sum(seen)) == (13, 7), seen
assert grade_answer("1/2", r"\frac{1}{2}") and grade_answer(r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}")
PY
for pylatexenc in 2.10 2.11; do
  v/bin/pip install -q --disable-pip-version-check "pylatexenc==$pylatexenc" && v/bin/python seen.py
done
