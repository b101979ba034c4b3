"""What two boxed answers say: equal in every dress, different in order, base and size."""

import random
import time
from fractions import Fraction

import grading
from grading import LONGEST, needs_algebra, normalise_answer, parse_number, read_answer, same_answer

# What people box around the number 10. Each line is one kind of dress.
DRESSES_OF_TEN = [
    "10", "10.0", "10.", "10,", "010", "+10", "1e1", "10^1", "20/2", r"\frac{20}{2}", r"\dfrac{20}2", r"2\cdot5",
    r"$10$", r"\(10\)", r"\[10\]", "{10}", "(10)", r"\left(10\right)", r"\boxed{10}", r"\fbox{10}",
    r"\mathbf{10}", r"\mathrm{10}", r"\textbf{10}", r"\text{10}", r"\displaystyle 10", r"\large 10", r"\boldsymbol{10}",
    r"\$10", r"$\$10$", r"\$\,10", "10 USD", r"\$10.00", "€10", "10 years old", "10 cups", "10¢",
    r"10\text{ dollars}", "10 dollars", r"10\text{ dollars}.", r"\text{10 dollars}", "10 apples", "10 cm", "10 days",
    r"10\,\text{cm}", r"10~\text{cm}", "10~cm", r"10\;\text{s}", r"10\ \text{cm}^2", r"10\textbf{ cm}", r"10\mbox{ cm}",
    r"10\text{ miles per hour}", "10 miles/hour", r"10\text{ km/h}", r"10\text{ square feet}",
    r"10^\circ", r"10^{\circ}", "10°", r"10\degree", r"10\%", "10%",
    "x=10", "x = 10", r"\theta=10", "x_1=10", "AB=10", "f(2)=10", "total = 10", r"\text{Total}=10",
    "１０", "\u00a010", "10\u200b", "\ufeff10", "10 = x", r"\text{10}\text{ cm}", r"10\text{.}", r"10\text{ \%}",
    r"\underline{10}", r"\color{red}{10}", r"\textcolor{red}{10}", r"10\ \mathrm{cm^2}", r"10\text{ cm$^2$}",
    r"\text{\$}10", r"10~\text{\$}", r"US\$10", r"\mathdollar 10", r"\pounds 10", r"10\text{°}", r"10^\circ C",
    r"10^\circ\text{F}", r"10 \operatorname{cm}", r"a_{12}=10", r"a_{n+1} = 10", r"x_{\max}=10", r"A_{\text{max}}=10",
    r"S_{\triangle ABC}=10", "f(-2)=10", "f(1/2)=10", "f^{-1}(3)=10", r"\angle ABC=10^\circ", r"m\angle A = 10",
]  # fmt: skip
# Neighbours of the number 10 that say something else.
NOT_TEN = [
    "10 or 12", r"10 \text{ or } 12", r"10\text{ and }11", "10, 12", "10,1", "(10,10)", r"\{10,11\}", r"10\pm1",
    "1 0", "x>10", r"\geq 10", "<10", r"x\ne10", r"\approx10", r"x\approx10", "~10", "about 10", r"\text{about }10",
    "at least 10", "10 or more", "10 to 12", "10-12", "10~12", "10...", r"10\ldots", "10+", "10 11",
    "10 dozen", "10 million", r"10\text{ thousand}", "10 squared", "10 half", "10 percent more", "10 mod 12",
    "10x", "10i", "10e", "10m", "10abc", "10sinx", r"10 \sin x", r"10\pi", r"10\text{ i}", "10!", "10²", "10^2", "10½",
    "2x=10", "x^2=10", "|x|=10", "x=10,y=11", "10=11", "-10", "−10", "10_2", "10_3", "1000\\%", "10/0", "", "ten",
    "(10", "10}", "{10", r"\infty", r"10^\circ 30'", "a_{10}=9", "f(10)=1", "-x=10", "x^{-1}=10",
    "x+1=10", r"\sqrt{x}=10", "10=2x",
    r"\text{in }10", r"10\text{ and one}", r"10\operatorname{million}", r"\frac{x}{2}=10", "5+5=10=y", "3+10=13",
]  # fmt: skip
EQUAL = [
    # numbers
    (r"1{,}000", "1000"), ("1,000", "1000"), ("1, 000", "1000"), (r"1,\!000", "1000"), (r"1\,000", "1000"),
    (r"\$1,000.50", "1000.5"), (r"\$32,\!348", "32348"), (r"11,\! 111,\! 111,\! 100", "11111111100"), ("1e3", "1000"),
    ("10^3", "1000"), (r"1.5\times10^3", "1500"), (r"\frac12", "0.5"), (r"\frac 34", "3/4"), (r"\frac9{19}", "9/19"),
    (r"1\frac12", "1.5"), (r"-1\frac12", "-3/2"), ("6 1/2", "6.5"), (r"137 \frac{1}{2}", "137.5"), ("6½", "6.5"),
    (r"-\frac12", r"\frac{-1}{2}"), (r"\frac{1}{-2}", "-.5"), ("−5", "-5"), ("0", "-0"), (r"0.1\overline{6}", "1/6"),
    ("10^{-20}", r"\frac{1}{10^{20}}"), (r"1\ 000", "1000"), ("1~000~000", "1000000"), (r"0.\dot{3}", "1/3"),
    (r"0.1\bar{6}", "1/6"), (r"5\ 100/101", r"5\frac{100}{101}"), (r"1.2E5", "120{,}000"), (r"3.0\times10^{-2}", ".03"),
    (r"\frac{17}{6}\ (\approx 2.83)", r"\frac{17}{6}"), ("e\\approx2.718", "e"),
    # units
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"), (r"15\text{ cm}^2", r"15\mbox{ cm}^2"),
    (r"\$5", "5 dollars"), (r"2\sqrt{5}\text{ cm}", r"2 \sqrt5"), (r"8\mbox{ inches}^2", "8 square inches"),
    # tuples, lists, sets, matrices
    ("(2,4)", "2,4"), ("(2,4)", r"\left( 2, 4 \right)"), ("(2,4)", "x=2, y=4"), ("(2,4)", "y=4, x=2"),
    ("(2,4)", "(x,y)=(2,4)"), ("(2,4)", "(y,x)=(4,2)"), ("(2,4)", r"\langle 2,4\rangle"),
    (r"(1{,}000,5)", "(1000,5.0)"),
    ("(100,200)", "100, 200"), ("100, 200", "200, 100"), ("1,-2", "-2, 1"), ("x=4 or x=5", "4,5"),
    (r"4\text{ and }5", r"\{5,4\}"), (r"1, 2, \text{ and } 3", "3;2;1"), (r"(1,2)\text{ and }(3,4)", "(3,4),(1,2)"),
    (r"\text{Bob and Alice}", r"\text{Alice and Bob}"), (r"\text{Carol, Bob and Alice}", r"\text{Alice, Bob, Carol}"),
    (r"\{1,2\}", r"\{2,1\}"), (r"\{5\}", "5"), (r"\pm5", "5,-5"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt5,1+\sqrt5"), (r"\text{Tom and Ann}", r"\text{Ann, Tom}"),
    (r"\begin{pmatrix} 1&2 \\[2pt] 3&4 \end{pmatrix}", r"\begin{bmatrix}1&2\cr 3&4\\\end{bmatrix}"),
    (r"\begin{pmatrix} 1/5 \\ -2 \end{pmatrix}", r"\begin{bmatrix} 0.2 \\ -2 \end{bmatrix}"),
    # intervals
    (r"m \geq \sqrt{2}", r"[\sqrt{2},\infty)"), (r"x \in [-2,7]", r"-2 \le x \le 7"), ("-2≤x≤7", "[-2,7]"),
    (r"7\ge x\ge-2", "[-2,7]"), ("2 < x", r"(2,\infty)"), (r"x\leqslant 0", r"(-\infty,0]"), ("(2,4)", "2<x<4"),
    (r"(2,12) \cup (12,102)", r"(12,102)\cup(2,12)"), (r"x<2 \text{ or } x>3", r"(-\infty, 2) \cup (3, +\infty)"),
    (r"\{x \mid x>10\}", r"(10,\infty)"),
    # signs and words
    (r"\emptyset", r"\varnothing"), (r"\emptyset", r"\{\}"), (r"\emptyset", "∅"), (r"\text{(B)}", "B"),
    (r"\text{Evelyn}", "Evelyn"), (r"\text{even}", "Even"), ("2516_8", "2516_{8}"), ("4210_{5}", "(4210)_5"),
    ("21_{12}", "021_{12}"), ("-21_5", "−21_{5}"), ("N=21_3", r"21_{\text{3}}"), ("(B)", r"\text{B}"),
]  # fmt: skip
DIFFERENT = [
    # separators
    ("(3,100)", "(3100)"), ("1,2,345", "1,2345"), ("1,234", "(1,234)"), ("1,00", "100"), ("0,500", "500"),
    ("1,000,00", "100000"), ("1.000", "1000"), ("7, 000", "7"), ("61/2", "6 1/2"), (r"1\frac{4}{5}", r"\frac{14}{5}"),
    # order and number of parts
    ("4,2", "(2,4)"), (r"\{4,2\}", "(2,4)"), ("x=4, y=2", "(2,4)"), ("(x,y)=(4,2)", "(2,4)"), ("(y,x)=(2,4)", "(2,4)"),
    (r"\{2,4\}", "(2,4)"), ("(2,4)", "(24)"), (r"\langle 4,2\rangle", "(2,4)"), (r"x=4\land y=2", "(2,4)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{cases}x=4\\y=2\end{cases}", "(2,4)"),
    ("x=4,y=2", "x=2,y=4"), ("(1,-16,-4,43)", "(1,-4,-16,43)"), ("2,2,3", "2,3,3"), ("2,4", "4,2,2"), ("2,4", "2"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # bases
    ("2516_9", "2516_8"), ("2516", "2516_8"), ("1358", "2516_8"), ("2516_{18}", "2516_8"), ("2517_8", "2516_8"),
    ("-10_9", "-10"), ("-10_9", "-10_8"), ("10_9", "-10_9"), ("10_9+1", "11"), ("-(10_9)", "-10"),
    # sizes
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), ("10^{-20}", "10^{-21}"), (r"\frac{1}{20!}", r"\frac{1}{21!}"),
    ("10^{-20}", "0"), ("0.333333", "1/3"), ("1/2", "2/1"),
    # units and names
    (r"500\%", "5"), ("50\\%", "0.5"), ("5 cm", "5 mm"), ("5 cm", r"5\text{ m}"), ("15 cm", "15 cm^2"), ("x=5", "y=5"),
    (r"\$5", "5 cents"), ("x>5", "y>5"), (r"5^\circ C", r"5^\circ F"), ("12\\%", "12/100"), ("a_{10}=9", "a_{11}=9"),
    # intervals
    ("[0,1)", "[0,1]"), ("(0,1)", "[0,1]"), ("(3,4)", "(3,4]"), ("x>5", r"x\ge5"), ("x<2, x>3", "(2,3)"),
    (r"x>2 \text{ and } x<3", r"(-\infty,3)\cup(2,\infty)"), (r"\{x \mid x>10\}", "10"), (r"[2,4]", "2,4"),
    # words
    (r"\text{east}", r"\text{seat}"), ("", ""), ("$", " "), (r"\{,\}", r"\{1\}"),
]  # fmt: skip


ALIKE = [*EQUAL, *((answer, "10") for answer in DRESSES_OF_TEN)]
APART = [*DIFFERENT, *((answer, "10") for answer in NOT_TEN)]


def test_a_number_is_read_through_its_dress_and_no_more_than_an_answer_says():
    assert [(a, b) for a, b in ALIKE if not (same_answer(a, b) and same_answer(b, a))] == []
    assert [(a, b) for a, b in APART if same_answer(a, b) or same_answer(b, a)] == []


# Left to math-verify, which knows that they are no number; all others are decided here, since it equates some of them.
OPEN = {
    "10!", r"10\pi", r"10 \sin x", "10i", "10+", "~10", "<10", r"\geq 10", r"x\ne10", r"\infty", r"10^\circ 30'", "(10",
    "10=2x", r"10\operatorname{million}", "5+5=10=y", "3+10=13", r"10\text{ i}", "10/0", "10=11", "x^2=10", "10 mod 12",
    "10e", "10 11", "1 0", "10 to 12", "10~12", "ten",
}  # fmt: skip


def test_what_form_and_arithmetic_decide_is_not_asked():
    closed = [pair for pair in APART if pair[0] not in OPEN]
    assert [(a, b) for a, b in closed if any(same_answer(*pair, lambda x, y: True) for pair in ((a, b), (b, a)))] == []


def test_a_relation_is_no_value():
    for sign in (r"\ne", r"\neq", r"\not=", r"\approx", "~", ">", r"\ge", r"\leq", "y>", r"y\le "):
        assert not same_answer(sign + r"\frac12x", r"\frac12x", ask=lambda x, y: True), sign
        assert same_answer(sign + r"\frac12x", sign + r" \frac{1}{2} x"), sign


def test_numbers_are_exact_and_bounded():
    assert parse_number("1/3") * 3 == 1 and parse_number("0.1") * 10 == 1 and parse_number("-2^2") == -4
    assert parse_number("2-3*4/6+1") == 1 and parse_number("\\frac{1+2}{3^2}") == Fraction(1, 3)
    assert parse_number("2\\frac{3}{2}") is None and parse_number("2 3/2") is None  # a product, or a slip
    assert parse_number("-2(3)") == -6 and parse_number("(2)(3)4") == 24 and parse_number("\\frac{10!}{3!7!}") == 120
    assert parse_number("5!") == 120 and parse_number("(2+3)^{-1}") == Fraction(1, 5)
    none = "1/0 0^{-1} 0^0 4^{1/2} 10^{10^9} 1e9999 (-1)! 1001! 9!! (1\\frac{4}{5}) 2--3 9//2"
    for text in (*none.split(), "", "1 2"):
        assert parse_number(text) is None, text
    for text in ("9" * (LONGEST + 1), "(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "*".join(["9^{999}"] * 90)):
        assert parse_number(text) is None, text[:20]
    assert parse_number(f"2^{{{grading.MOST_BITS // 2}}}") == 2 ** (grading.MOST_BITS // 2)


def test_algebra_is_asked_only_where_it_is_needed():
    asked = []
    assert not same_answer("(\\sqrt{4},x+1)", "(2,1+x)", ask=lambda a, b: asked.append((a, b)))
    assert asked == [("\\sqrt{4}", "2")] or asked == [("2", "\\sqrt{4}")]
    assert same_answer("(\\sqrt{4},x+1)", "(2,1+x)", ask=lambda a, b: True)
    read = ["5", "-1.5", "1,000", "\\frac{1}{2}", "(3,7)", "\\text{east}", "B", "12_5", "x=5"]
    formulas = ["\\sqrt{2}", "x+1", "(3,\\frac{\\pi}{2})", "1\\pm\\sqrt{2}", "y=2x"]
    assert [gold for gold in [*read, *formulas] if needs_algebra(gold)] == formulas


def test_one_spelling():
    assert normalise_answer("\\dfrac 12.") == normalise_answer("$\\tfrac{1}2$") == "\\frac{1}{2}"
    assert normalise_answer("\\left[0,\\,1\\right)") == "[0,1)" and normalise_answer("\\leftarrow") == "\\leftarrow"


def test_matching_is_symmetric_and_quick_on_anything():
    draw = random.Random(3)
    pieces = [*"0123456789.,/{}\\ -+$%^_=<>()[]!xy", "frac", "\\frac", "\\text{", "\\cup", "\\pm", " or ", "cm", "\\{"]
    texts = ["".join(draw.choice(pieces) for _ in range(draw.randint(0, 9))) for _ in range(200)]
    for a in texts:
        for b in texts[:30]:
            assert same_answer(a, b) == same_answer(b, a), (a, b)
        assert same_answer(a, a) == (normalise_answer(a) != "")
    longs = r"\text{ 1, ( { 1 . \frac x= \begin{pmatrix} <x \pm = \{ ! -"
    for piece in (*longs.split(), "a "):
        for size in (LONGEST - 10, 100_000):
            text = (piece * size)[:size]
            start = time.process_time()
            same_answer(text, "1"), same_answer(text, text + "1"), read_answer(text)
            assert time.process_time() - start < 2, piece
    assert same_answer("x" * 2 * LONGEST, " " + "x" * 2 * LONGEST)
    assert not same_answer("x" * 2 * LONGEST, "y" * 2 * LONGEST)


def test_depth_and_parts_are_bounded():
    for depth, asked in ((grading.DEEPEST, True), (grading.DEEPEST + 1, False)):
        deep, questions = "\\sqrt{" * depth + "x" + "}" * depth, []
        same_answer(deep, "x", ask=lambda a, b, questions=questions: questions.append(a))
        assert bool(questions) == asked and same_answer(deep, " " + deep)
    few, many = (list(map(str, range(count))) for count in (grading.MOST_PARTS, grading.MOST_PARTS + 1))
    assert same_answer(",".join(few), ",".join(few[::-1])) and same_answer(",".join(many), ",".join(many))
    assert not same_answer(",".join(many), ",".join(many[::-1]), ask=lambda a, b: True)
