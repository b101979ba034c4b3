import pytest

from errors import InputError
from runtime.phases import read_rows, run_phase


def test_a_file_that_is_not_ours_is_named(tmp_path):
    path = tmp_path / "A.jsonl"
    path.write_text("not json\n{}\n")
    with pytest.raises(InputError, match=r"A\.jsonl"):
        read_rows(path)


def test_run_phase_keeps_the_order_of_the_jobs(tmp_path):
    done = []

    def work(jobs):
        done.extend(jobs)
        return [{"a": a, "b": b, "sum": a + (b or 0)} for a, b in jobs]

    path, fields = tmp_path / "x.jsonl", ("a", "b")
    run_phase(path, fields, [(1, None), (2, 5)], work, 1)
    rows = run_phase(path, fields, [(3, 4), (2, 5), (1, None)], work, 10)
    assert [row["sum"] for row in rows] == [7, 7, 1] and done == [(1, None), (2, 5), (3, 4)]
