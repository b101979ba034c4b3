"""Loading, the embedded world, and the extraction and comparison of answers."""

import json
import sys
import time

import pytest

import problems
from errors import InputError
from grading import extract_boxed
from problems import BENCHMARKS, load_problems, tiny_problems, tiny_split


def jsonl(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------------------
# Loading


def test_a_file_gives_its_problems_in_order(tmp_path):
    path = jsonl(
        tmp_path, {"problem": "a", "solution": "so \\boxed{4}"}, "", {"problem": "b", "solution": "s", "answer": 7}
    )
    first, second = load_problems(path)
    assert (first.problem, first.answer, second.problem, second.answer) == ("a", "4", "b", "7")


@pytest.mark.parametrize(
    ("lines", "need_solution", "message"),
    [
        (['{"problem": "a", "solution": "s"}', "{"], True, "line 2: not valid JSON"),
        (['{"problem": " ", "solution": "s"}'], True, "line 1: the problem is empty"),
        (['{"problem": "a"}'], True, "line 1: the solution is empty"),
        (['{"problem": "a", "solution": "no box"}'], False, "line 1: the answer is empty"),
        (["[1]"], True, "line 1: expected an object"),
        ([""], True, "no problems in it"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, lines, need_solution, message):
    with pytest.raises(InputError, match=message):
        load_problems(jsonl(tmp_path, *lines), need_solution)


def test_numbers_keep_their_spelling_and_a_byte_order_mark_is_no_text(tmp_path):
    numbers = ("7", "0.50", "-3", "1e3", "9" * 5000)
    rows = [f'{{"problem": {number}, "solution": {number}, "answer": {number}}}' for number in numbers]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8-sig")
    assert [(item.problem, item.solution, item.answer) for item in load_problems(str(path))] == [
        (number, number, number) for number in numbers
    ]


@pytest.mark.parametrize("name", ["problem", "solution", "answer"])
@pytest.mark.parametrize("value", [["2"], [], {}, {"text": "2"}, True, False])
def test_what_is_neither_text_nor_a_number_is_named_with_its_line(tmp_path, name, value):
    row = {"problem": "p", "solution": "s", "answer": "2"}
    with pytest.raises(InputError, match=f"line 2: the {name} is neither text nor a number"):
        load_problems(jsonl(tmp_path, row, {**row, name: value}))


def test_null_is_as_good_as_missing(tmp_path):
    (item,) = load_problems(jsonl(tmp_path, {"problem": "p", "solution": "so \\boxed{4}", "answer": None}))
    assert item.answer == "4"
    with pytest.raises(InputError, match="line 1: the problem is empty or missing"):
        load_problems(jsonl(tmp_path, {"problem": None, "solution": "s"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"problem": "half \\ud800 of a pair", "solution": "s"}',
            "line 1: the problem holds half of a surrogate pair",
        ),
        ('{"problem": "p", "solution": "\\udc00"}', "line 1: the solution holds half"),
        ('{"problem": NaN, "solution": "s"}', "line 1: not valid JSON .NaN is no number"),
        ('{"problem": "p", "solution": -Infinity}', "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_what_no_tokenizer_can_read_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_problems(jsonl(tmp_path, text))
    pair = '{"problem": "a whole pair \\ud83d\\ude00", "solution": "s"}'
    assert load_problems(jsonl(tmp_path, pair))[0].problem.endswith("\U0001f600")


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such data file"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=r"math500.*owner/name"):
        load_problems("nonsense")
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        load_problems(str(tmp_path / "latin.jsonl"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install datasets.*--benchmark path.jsonl"):
        load_problems("aime24")


def test_benchmark_names_reach_the_papers_data(monkeypatch):
    asked = []
    monkeypatch.setattr(
        problems, "_read_hub", lambda source: asked.append(source) or [("row", {"problem": "p", "answer": "1"})]
    )
    for name in ("math500", "aime24", "aime25", "hmmt25"):
        load_problems(name, need_solution=False)
    assert asked == [BENCHMARKS[name] for name in ("math500", "aime24", "aime25", "hmmt25")]
    assert load_problems("tiny") == load_problems("tiny:heldout")


# ---------------------------------------------------------------------------------------------------------------
# The embedded world


def test_tiny_problems_are_right_and_the_splits_are_disjoint_in_any_order():
    train, held_out = tiny_problems("train", 300), tiny_problems("heldout", 100)
    assert tiny_problems("train", 300) == train
    for item in train + held_out:
        assert sum(map(int, item.problem.split("+"))) == int(item.answer) == int(extract_boxed(item.solution))
    keys = [{tuple(sorted(item.problem.split("+"))) for item in part} for part in (train, held_out)]
    assert not keys[0] & keys[1]
    assert tiny_split([3, 1, 2, 5, 9]) == tiny_split([9, 5, 3, 2, 1])


# ---------------------------------------------------------------------------------------------------------------
# The last box


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{5}", "5"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{a\\\\}", "a\\\\"),  # a line break, then the closing brace
        # a space, a line break or nothing before the content
        ("\\boxed {5}", "5"),
        ("\\boxed\n{5}", "5"),
        ("\\boxed 5.", "5"),
        ("$\\boxed5$", "5"),
        ("\\boxed -2.5, so", "-2.5"),
        ("\\boxed 1,250", "1,250"),
        ("\\boxed\\frac12", "\\frac12"),
        ("\\boxed\\frac{1}{\\sqrt{2}}.", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed 1\\frac12", "1\\frac12"),
        ("\\boxed x$", "x"),
        ("\\fbox{5}", "5"),
        ("\\boxed{4} or \\fbox{5}", "5"),
        ("\\boxed{\\text{A}}", "\\text{A}"),
        ("$\\boxed{x}$", "x"),
        # no box, and boxes that hold nothing
        ("\\boxedtext{5}", None),
        ("\\boxed{5} by \\boxedA", "5"),
        ("\\boxed{5} goes inside \\boxed{}.", "5"),
        ("\\boxed{5} goes inside \\boxed{ } or \\boxed{...}.", "5"),
        ("\\boxed{5}, with \\boxed around it", "5"),
        ("\\boxed{5}\\boxed{\\text{ }}", "5"),
        ("\\boxed{9\\ }", "9"),
        ("\\boxed{5}, which is \\boxed{?}", "5"),
        ("\\boxed{5} \\boxed{\\_\\_}", "5"),
        ("\\boxed{5} \\boxed{\\underline{\\hspace{1cm}}}", "5"),
        ("\\boxed{5} \\boxed{\\text{your answer}}", "5"),
        ("\\boxed{\\boxed{}}", None),
        ("\\boxed{}", None),
        ("\\boxed{ \n}", None),
        ("\\boxed{4} and \\boxed{", None),
        ("\\boxed{4} and \\boxed{\\frac{1}{2}", None),
        ("\\boxed{4} and \\fbox{\\{1, 2\\}", None),
        ("\\boxed{4} and \\boxed", None),
        ("boxed{4}", None),
        ("", None),
    ],
)
def test_extract_boxed(text, answer):
    assert extract_boxed(text) == answer


def test_extraction_is_linear():
    for text in (
        "\\boxed{" * 50_000,
        "\\boxed{" * 50_000 + "}" * 50_000,
        "\\boxed\\frac{" + "{" * 400_000,
        "\\boxed" * 50_000,
        "\\boxed{" + "{" * 400_000,
        "\\boxed{" + "\\" * 400_000,
        "\\boxed{" + "{}" * 200_000,
    ):
        start = time.process_time()
        extract_boxed(text)
        assert time.process_time() - start < 2
