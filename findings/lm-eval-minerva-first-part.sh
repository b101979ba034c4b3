#!/usr/bin/env bash
# Guess: exact_match of lm-eval's minerva_math asks whether an answer has the reference's value, as its is_equiv and its
# use of sympy say: 3, 5, 7 is not 3, and 1\frac{4}{5} is \frac{9}{5} and not \frac{4}{5}.
# True (lm-eval 0.4.13, sympy 1.14.0): of a list it compares the first entry, of 52_8 the 52 and of an interval behind
# x \in nothing, so that whatever follows may be wrong or missing. A mixed number is a product: \frac{4}{5} is right for
# 1\frac{4}{5}, and \frac{9}{5} and 1.8 are wrong. So is a \pm: 1 \pm \sqrt{19} takes \pm\sqrt{19} but not its two
# values, 3 \pm 2\sqrt{2} takes \pm 6\sqrt{2}. 0.\overline{3} is 0.3, and x(x-1) is a function named x, not x^2-x.
# Why: is_equiv in lm_eval/tasks/minerva_math/utils.py hands both texts to sympy.parsing.latex.parse_latex, which with
# strict=False, its default, reads as far as it can and drops the rest without a word: "3,6,8" gives 3, "52_9" gives 52,
# and "x\in[0,1]" a product of x and a letter called in. normalize_final_answer takes \overline off beforehand. Texts
# that are equal are right before any of that, which hides it from a test with right answers.
# Bites: a model that finds one of several roots, or writes a base or an interval wrong, is credited, and one that turns
# mixed numbers into fractions is not. Of the 500 references of MATH-500, counted apart, 10 are such lists, bases or
# intervals, 2 mixed numbers and 2 have a \pm. By reading, exact_match_original of leaderboard_math_hard parses in the
# same way. The task's other metric, math_verify, grades all of these as it should, but for 52_9.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check "lm-eval[math]==0.4.13" sympy==1.14.0
cat > seen.py <<'PY'
from importlib.metadata import version

from lm_eval.tasks.minerva_math import utils as minerva
from sympy.parsing.latex import parse_latex

print("lm-eval", version("lm-eval"), "sympy", version("sympy"), "math-verify", version("math-verify"))
# reference, answers with another value, the same value in other words
CASES = [
    ("3, 5, 7", ["3", "3, 5", "3, 6, 8"], []),
    ("1, -2", ["1", "1, 2"], []),
    ("52_8", ["52_9"], []),
    (r"x \in [-2,7]", [r"x \in [0,1]"], []),
    (r"1\frac{4}{5}", [r"\frac{4}{5}"], [r"\frac{9}{5}", "1.8"]),
    (r"137\frac{1}{2}", [r"\frac{137}{2}"], ["137.5"]),
    (r"1 \pm \sqrt{19}", [r"\pm\sqrt{19}"], [r"1+\sqrt{19}, 1-\sqrt{19}"]),
    (r"3 \pm 2\sqrt{2}", [r"\pm 6\sqrt{2}"], [r"3+2\sqrt{2}, 3-2\sqrt{2}"]),
    (r"0.\overline{3}", ["0.3"], []),
    ("x(x-1)", [], ["x^2-x"]),
]


def grades(reference, answer):
    """What minerva_math makes of a response that ends in the form which its own examples show."""
    solution = f"We find that it is $\\boxed{{{reference}}}$."
    gold = minerva.normalize_final_answer(minerva.remove_boxed(minerva.last_boxed_only_string(solution)))
    said = f"We find it.\nFinal Answer: The final answer is ${answer}$. I hope it is correct."
    return minerva.process_results({"solution": solution, "answer": gold}, [said])


parse_latex("1")  # loads the parser: is_equiv gives up after five seconds, which a busy machine may need for that
count = right = 0
for reference, others, equals in CASES:
    assert grades(reference, reference)["exact_match"] == 1
    for answer in others + equals:
        graded = grades(reference, answer)
        kind = "other" if answer in others else "equal"
        print(f"seen: {reference:18} answered {answer:27} {kind} value: exact_match {graded['exact_match']}, "
              f"math_verify {graded['math_verify']}")
        assert graded["exact_match"] == (answer in others), (reference, answer)
        assert graded["math_verify"] == (answer in equals or answer == "52_9"), (reference, answer)
        count, right = count + 1, right + (answer in equals)
print(f"seen: all {count} graded wrongly by exact_match, {count - right} other values and {right} equal ones")
assert (count, right) == (18, 6), (count, right)
assert grades("(3,5)", "(3,6)")["exact_match"] == 0 and grades("10,080", "10080")["exact_match"] == 1
PY
v/bin/python seen.py
