"""Loading, the embedded world, and the extraction and comparison of answers."""

import csv
import json
import os
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


# --- Loading ----------------------------------------------------------------------------------------------------


COLUMNS = "problem is empty or missing .the columns are Id, solution; --columns prob"
BAD = [
    ("d.jsonl", '{"problem": "a", "solution": "s"}\n{', "line 2: not valid JSON"),
    ("d.jsonl", '{"problem": " ", "solution": "s"}', "line 1: the problem is empty"),
    ("d.jsonl", '{"problem": "a"}', "line 1: the solution is empty"),
    ("d.jsonl", '{"problem": "a", "solution": "s"}\n7', "line 2: expected an object"),
    ("d.jsonl", "[1]", "row 0: expected an object"),
    ("d.jsonl", '[{"problem": "a",\n"solution" "s"}]', "line 2: not valid JSON"),
    ("d.jsonl", '{"Id": 3, "solution": "s"}', COLUMNS),
    ("d.jsonl", "", "no problems in it"),
    ("d.jsonl", '{"problem": "half \\ud800 a pair", "solution": "s"}', "line 1: the problem is neither .*half .ud800"),
    ("d.jsonl", '{"problem": NaN, "solution": "s"}', "line 1: the problem is neither text nor a number .* but NaN"),
    ("d.jsonl", "[" * 100_000, "line 1: not valid JSON"),
    ("d.csv", "problem,solution\na,b,c\n", "line 2: not valid CSV .more or fewer cells"),
    ("d.csv", "problem,solution\na,1\n\nb\n", "line 4: not valid CSV .more or fewer"),
    ("d.csv", "problem,answer,answer\na,1,2\n", "line 1: not valid CSV .two columns answer"),
    ("d.csv", 'problem,solution\n"a,1\n', "line 2: not valid CSV .unexpected end"),
    ("d.csv", "problem;solution\na;1\n", "the columns are problem;solution"),
    ("d.csv", "problem,solution\n", "no problems in it"),
    ("d.csv", b"problem,solution\n\xe9,1\n", "not UTF-8"),
    ("d.parquet", "PAR1", "d.parquet: cannot be read"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_files_are_named_with_their_line(tmp_path, name, text, message):
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        load_problems(str(tmp_path / name))


def test_numbers_keep_their_spelling_and_a_byte_order_mark_is_no_text(tmp_path):
    numbers = ("7", "0.50", "-3", "1e3", "9" * 5000)
    rows = [f'{{"problem": {number}, "solution": {number}, "answer": {number}}}' for number in numbers]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8-sig")
    assert texts(load_problems(str(path))) == [(number,) * 3 for number in numbers]


@pytest.mark.parametrize("name", ["problem", "solution", "answer"])
@pytest.mark.parametrize("value", [["2"], [], {}, True])
def test_what_is_neither_text_nor_a_number_is_named_with_its_line(tmp_path, name, value):
    row = {"problem": "p", "solution": "s", "answer": "2"}
    with pytest.raises(InputError, match=f"line 2: the {name} is neither text nor a number"):
        load_problems(jsonl(tmp_path, row, {**row, name: value}))


def test_an_answer_is_needed_where_a_solution_is_not_and_null_is_as_good_as_missing(tmp_path):
    (item,) = load_problems(jsonl(tmp_path, {"problem": "p", "solution": "so \\boxed{4}", "answer": None}))
    assert item.answer == "4"
    with pytest.raises(InputError, match="line 1: the answer is empty"):
        load_problems(jsonl(tmp_path, {"problem": "a", "solution": "no box"}), need_solution=False)
    pair = '{"problem": "a whole pair \\ud83d\\ude00", "solution": "s"}'
    assert load_problems(jsonl(tmp_path, pair))[0].problem.endswith("\U0001f600")


def test_sources_that_are_not_there(monkeypatch):
    with pytest.raises(InputError, match=r"math500.*owner/name"):
        load_problems("nonsense")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install datasets.*\.jsonl"):
        load_problems("aime24")


def test_benchmark_names_reach_the_papers_data(monkeypatch):
    asked, row = [], ("row", {"problem": "p", "answer": "1"})
    monkeypatch.setattr(problems, "_read_hub", lambda source: asked.append(source) or [row])
    for name in ("math500", "aime24", "aime25", "hmmt25"):
        load_problems(name, need_solution=False)
    assert asked == [BENCHMARKS[name] for name in ("math500", "aime24", "aime25", "hmmt25")]
    assert load_problems("tiny") == load_problems("tiny:heldout")


# --- Data as people have them -----------------------------------------------------------------------------------


def texts(items):
    return [(item.problem, item.solution, item.answer) for item in items]


WANTED = [("a\n,b", 'so "4"', "0.50"), ("c", "s", "007")]
ROWS = [dict(zip(("problem", "solution", "answer"), row, strict=True)) for row in WANTED]


def saved(path, rows=ROWS):
    """The rows in the format that the path's suffix names; a path without one is written by save_to_disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) + "\n" for row in rows))
    else:
        data = pytest.importorskip("datasets").Dataset.from_list(rows)
        data.to_parquet(path) if path.suffix else data.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["d.csv", "d.json", "d.jsonl", "d.parquet", "d"])
def test_every_format_gives_the_same_problems_with_their_rows(tmp_path, name):
    items = load_problems(str(saved(tmp_path / name)))
    assert texts(items) == WANTED and [item.row for item in items] == [0, 1]


@pytest.mark.parametrize("name", ["train.csv", "train-00000-of-00002.parquet", "train"])
def test_a_folder_holds_splits(tmp_path, monkeypatch, name):
    saved(tmp_path / "d" / name)
    saved(tmp_path / "d" / name.replace("train", "test"), ROWS[1:])
    saved(tmp_path / "d" / "training_notes.json", [{"lr": 1}])
    monkeypatch.setattr(problems, "_read_hub", lambda source: pytest.fail(f"{source} was asked for on the hub"))
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path / "d", f"{tmp_path.name}/d", "~/d"):  # one slash, as a hub name has
        assert texts(load_problems(f"{folder}")) == texts(load_problems(f"{folder}:train")) == WANTED
        assert texts(load_problems(f"{folder}:test")) == WANTED[1:]
        with pytest.raises(InputError, match=r"no split dev.*training_notes"):
            load_problems(f"{folder}:dev")
    saved(tmp_path / "d" / "train.jsonl")
    if name != "train":  # the same problems twice
        with pytest.raises(InputError, match="in one format"):
            load_problems(str(tmp_path / "d"))


def test_a_long_cell_is_read_whole_and_several_files_of_a_split_in_order(tmp_path):
    path = saved(tmp_path / "d.csv", [{"problem": "p", "solution": "s" * 200_000}])
    assert len(load_problems(str(path))[0].solution) == 200_000
    for number in (1, 0):
        saved(tmp_path / f"train-{number}.jsonl", ROWS[number : number + 1])
    items = load_problems(str(tmp_path))
    assert texts(items) == WANTED and [item.row for item in items] == [0, 1]
    with pytest.raises(InputError, match="no split test"):  # save_to_disk without splits
        load_problems(f"{saved(tmp_path / 'd')}:test")


PATHS = ["./a/b", "/a/b", "~/a", "../a", "a/b.parquet", "a/b.csv", "b.jsonl", "b.csv:test", "notes:test", "a:b.csv"]


@pytest.mark.parametrize("source", PATHS)
def test_what_looks_like_a_path_is_never_asked_for_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr(problems, "_read_hub", lambda source: pytest.fail("was asked for"))
    with pytest.raises(InputError, match="no such data file"):
        load_problems(source)


def test_hub_names_with_config_and_split(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []
    data = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: asked.append((*name, split)) or data)
    for source in ("openai/gsm8k", "openai/gsm8k:test", "openai/gsm8k:main:test"):
        assert texts(load_problems(source)) == WANTED
    assert asked == [("openai/gsm8k", "train"), ("openai/gsm8k", "test"), ("openai/gsm8k", "main", "test")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: {}["main, socratic"])
    with pytest.raises(InputError, match=r"openai/gsm8k: cannot be read .KeyError: 'main, socratic'"):
        load_problems("openai/gsm8k")
    with pytest.raises(InputError, match="neither a data file"):
        load_problems("a/b:c:d:e")


def test_values_whose_spelling_a_table_loses_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    label = datasets.Features(problem=datasets.Value("string"), answer=datasets.ClassLabel(names=["A", "B"]))
    data = datasets.Dataset.from_dict({"problem": ["p"], "answer": [1]}, features=label)
    data.to_parquet(tmp_path / "label.parquet")
    data.save_to_disk(tmp_path / "label")
    mixed = datasets.Features(problem=datasets.Value("string"), answer=datasets.Json())
    datasets.Dataset.from_dict({"problem": ["p"], "answer": ["007"]}, features=mixed).save_to_disk(tmp_path / "mixed")
    for name, kind in (("label.parquet", "ClassLabel"), ("label", "ClassLabel"), ("mixed", "Json")):
        with pytest.raises(InputError, match=f"row 0: the answer is neither text nor a number .*{kind}"):
            load_problems(str(tmp_path / name), need_solution=False)
    saved(tmp_path / "nan.parquet", [{"problem": "p", "answer": float("nan")}])
    with pytest.raises(InputError, match="row 0: the answer is neither"):
        load_problems(str(tmp_path / "nan.parquet"), need_solution=False)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value, wanted", [(0.1, "0.1"), (-2.5, "-2.5"), (2050.0, "2050.0"), (None, "9")])
def test_a_number_of_a_table_has_as_few_digits_as_its_type(tmp_path, kind, value, wanted):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(problem=datasets.Value("string"), answer=datasets.Value(kind))
    rows = {"problem": ["p"], "solution": ["\\boxed{9}"], "answer": [value]}
    features["solution"] = datasets.Value("string")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    assert [problem.answer for problem in load_problems(str(tmp_path / "d.parquet"))] == [wanted]


def test_a_parquet_file_that_changes_is_read_anew(tmp_path):
    path = saved(tmp_path / "d.parquet", [{"problem": "p", "answer": "1"}])
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert load_problems(str(path), False)[0].answer == "1"
    saved(path, [{"problem": "p", "answer": "2"}])
    os.utime(path, ns=times)
    assert load_problems(str(path), False)[0].answer == "2"


ASKED, SOLVED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "s \\boxed{5}"}


@pytest.mark.parametrize(("row", "wanted"), [
    ({"question": "q", "generated_solution": "s", "expected_answer": "1"}, ("q", "s", "1")),
    ({"ID": 1, "Problem": "q", "Solution": "s", "Answer": 2}, ("q", "s", "2")),
    ({"prompt": "instructions", "question": "q", "response": "s \\boxed{5}"}, ("q", "s \\boxed{5}", "5")),
    ({"problem": "q", "solution": "s", "final_answer": "guess", "answer": "1"}, ("q", "s", "1")),
    ({"problem": "q", "solution": "s \\boxed{5}", "answer": " "}, ("q", "s \\boxed{5}", "5")),
    ({"answer": "5", "Answer": "6", "problem": "q", "solution": "s", "SOLUTION": "no"}, ("q", "s", "5")),
    ({"problem": "q", "solution": "s", "answer": "either \\boxed{1} or \\boxed{2}"},
     ("q", "s", "either \\boxed{1} or \\boxed{2}")),
    ({"problem": "q", "solution": "s", "answer": "So we get \\boxed{5}, as wanted."}, ("q", "s", "5")),
    ({"problem": "q", "solution": "s", "answer": "\\boxed{5} \\text{ cm}"}, ("q", "s", "\\boxed{5} \\text{ cm}")),
    ({"problem": "q", "solution": "s", "answer": "\\boxed{1}, \\boxed{2}"}, ("q", "s", "\\boxed{1}, \\boxed{2}")),
    # GSM8K
    ({"question": "q", "answer": "48/2 = <<48/2=24>>24\nso 72\n#### 72"}, ("q", "48/2 = 24\nso 72", "72")),
    ({"question": "q", "answer": "so \\boxed{72}\n#### 72"}, ("q", "so \\boxed{72}", "72")),
    ({"question": "q", "answer": "so 1,000 #### 1,000\n"}, ("q", "so 1,000", "1,000")),
    ({"question": "q", "solution": "other", "answer": "so <<1=1>>1\n#### 1"}, ("q", "other", "1")),
    ({"question": "q", "solution": "so <<1=1>>1\n#### 1"}, ("q", "so 1", "1")),
    ({"question": "q", "solution": "#### So\n1\n#### 7"}, ("q", "#### So\n1", "7")),
    ({"problem": "q", "solution": "#### First\nwe see", "answer": ""}, ("q", "#### First\nwe see", "")),
    ({"problem": "q", "solution": "x\n#### So \\boxed{3}"}, ("q", "x\n#### So \\boxed{3}", "3")),
    ({"problem": "q", "solution": "so <<1=1>>1 #### 1", "answer": "1"}, ("q", "so <<1=1>>1 #### 1", "1")),
    # dialogues
    ({"messages": [{"role": "system", "content": "be"}, ASKED, SOLVED]}, ("q", "s \\boxed{5}", "5")),
    ({"extra": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "s"}]}, ("q", "s", "")),
    ({"prompt": [ASKED], "completion": [SOLVED]}, ("q", "s \\boxed{5}", "5")),
    ({"messages": [ASKED], "solution": "s", "answer": 4}, ("q", "s", "4")),
])  # fmt: skip
def test_usual_columns_and_forms(tmp_path, row, wanted):
    assert texts(load_problems(jsonl(tmp_path, row))) == [wanted]


def test_dialogues_that_are_no_problem_and_solution(tmp_path):
    for turns, message in (([ASKED] * 2, "the problem is neither"), ([ASKED], "the solution is empty or missing")):
        with pytest.raises(InputError, match=f"line 1: {message}"):
            load_problems(jsonl(tmp_path, {"messages": turns}))
    assert load_problems(jsonl(tmp_path, {"messages": [ASKED], "answer": 1}), need_solution=False)[0].solution == ""


def test_columns_by_name(tmp_path):
    path = jsonl(tmp_path, {"problem": "other", "task": "q", "answer": "long \\boxed{7}", "key": 7})
    assert texts(load_problems(path, columns="problem=task, solution=answer")) == [("q", "long \\boxed{7}", "7")]
    assert texts(load_problems(path, False, columns="answer=key")) == [("other", "", "7")]
    with pytest.raises(InputError, match=r"--columns problem=tusk: .*has the columns problem, task, answer, key"):
        load_problems(path, columns="problem=tusk")
    for columns in ("question=task", "task", "=task", "problem:task"):
        with pytest.raises(InputError, match=f"--columns {columns}: not of the form"):
            load_problems(path, columns=columns)
    path = jsonl(tmp_path, {"problem": "q", "answer": "\\boxed{7} \\text{ cm}"})  # a column that is taken is not free
    assert texts(load_problems(path, columns="solution=answer")) == [("q", "\\boxed{7} \\text{ cm}", "7")]
    assert load_problems("tiny", columns="problem=task") == load_problems("tiny")  # their columns are known
    with pytest.raises(InputError, match="line 2: the problem is empty or missing"):  # one choice for all rows
        load_problems(jsonl(tmp_path, {"problem": "p", "solution": "s"}, {"question": "another", "solution": "s"}))


def test_tiny_problems_are_right_and_the_splits_are_disjoint_in_any_order():
    train, held_out = tiny_problems("train", 300), tiny_problems("heldout", 100)
    assert tiny_problems("train", 300) == train
    for item in train + held_out:
        assert sum(map(int, item.problem.split("+"))) == int(item.answer) == int(extract_boxed(item.solution))
    keys = [{tuple(sorted(item.problem.split("+"))) for item in part} for part in (train, held_out)]
    assert not keys[0] & keys[1]
    assert tiny_split([3, 1, 2, 5, 9]) == tiny_split([9, 5, 3, 2, 1])


BOXES = {
    "5": ["\\boxed{5}", "\\boxed {5}", "\\boxed\n{5}", "\\boxed 5.", "$\\boxed5$", "\\fbox{5}",
          "\\boxed{4} or \\fbox{5}"],
    "2": ["\\boxed{1} then \\boxed{2}"], "3": ["\\boxed{\\boxed{3}}"], "9": ["\\boxed{9\\ }"],
    "\\frac{1}{\\sqrt{2}}": ["\\boxed{\\frac{1}{\\sqrt{2}}}.", "\\boxed\\frac{1}{\\sqrt{2}}."],
    "\\{1, 2\\}": ["\\boxed{\\{1, 2\\}}"], "a\\\\": ["\\boxed{a\\\\}"],  # a line break, then the closing brace
    # a space, a line break or nothing before the content
    "-2.5": ["\\boxed -2.5, so"], "1,250": ["\\boxed 1,250"], "\\frac12": ["\\boxed\\frac12"],
    "1\\frac12": ["\\boxed 1\\frac12"], "x": ["\\boxed x$", "$\\boxed{x}$"], "\\text{A}": ["\\boxed{\\text{A}}"],
    # no box, and boxes that hold nothing
    None: ["\\boxedtext{5}", "\\boxed{\\boxed{}}", "\\boxed{}", "\\boxed{ \n}", "\\boxed{4} and \\boxed{", "boxed{4}",
           "", "\\boxed{4} and \\boxed{\\frac{1}{2}", "\\boxed{4} and \\fbox{\\{1, 2\\}", "\\boxed{4} and \\boxed"],
}  # fmt: skip
HOLLOW = (" by \\boxedA", " goes inside \\boxed{}.", " goes inside \\boxed{ } or \\boxed{...}.",
          ", with \\boxed around it", "\\boxed{\\text{ }}", ", which is \\boxed{?}", " \\boxed{\\_\\_}", 
          " \\boxed{\\underline{\\hspace{1cm}}}", " \\boxed{\\text{your answer}}")  # fmt: skip


def test_extract_boxed():
    for text, answer in [(text, answer) for answer, texts in BOXES.items() for text in texts]:
        assert extract_boxed(text) == answer, text
    for tail in HOLLOW:
        assert extract_boxed("\\boxed{5}" + tail) == "5", tail


def test_extraction_is_linear():
    box = "\\boxed{"
    for text in (box * 50_000, box * 50_000 + "}" * 50_000, "\\boxed\\frac{" + "{" * 100_000, "\\boxed" * 50_000,
                 box + "{" * 100_000, box + "\\" * 100_000, box + "{}" * 50_000):  # fmt: skip
        start = time.process_time()
        extract_boxed(text)
        assert time.process_time() - start < 2
