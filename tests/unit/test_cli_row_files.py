"""Rows of files, broken ones included, and the file of rejects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worker.cli.mistakes import Mistake
from worker.cli.row_files import Rejects, Row, Source


def rows_of(path: Path) -> list[Row]:
    with Source.of(path).opened() as rows:
        return list(rows)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rejected(path: Path) -> str:
    """Reject every row of a file and return what was written."""
    with Source.of(path).opened() as rows, Rejects(rows) as rejects:
        for row in rows:
            rejects.add(row, row.problem or "unwanted")
    return rejects.path.read_bytes().decode(errors="surrogateescape")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_of_spreadsheets_is_read(tmp_path: Path, separator: str, end: str) -> None:
    lines = [
        f"\ufeffid{separator} name ",
        f'1{separator}"Doe{separator} ""Jo""',
        'second line"',
        "",
        f"2{separator}x",
    ]
    first, second = rows_of(written(tmp_path / "a.csv", end.join(lines)))
    assert dict(first.fields) == {"id": "1", "name": f'Doe{separator} "Jo"{end}second line'}
    assert dict(second.fields) == {"id": "2", "name": "x"}
    assert (first.where, second.where) == ("line 2", "line 5")


def test_a_short_row_lacks_cells_and_a_long_one_is_a_problem(tmp_path: Path) -> None:
    short, long = rows_of(written(tmp_path / "a.csv", "a,b\n1\n1,2,3\n"))
    assert dict(short.fields) == {"a": "1", "b": None}
    assert long.problem == "has 3 cells for 2 columns"


@pytest.mark.parametrize("tail", ["", f"4,{'d' * 1000}\n" * 2500])
def test_an_unclosed_quote_costs_one_row_only(tmp_path: Path, tail: str) -> None:
    path = written(tmp_path / "a.csv", 'id,name\n1,a\n2,"b\n3,c\n' + tail)
    rows = rows_of(path)
    assert [row.fields["id"] for row in rows[:3] if not row.problem] == ["1", "3"]
    assert "not valid CSV" in (rows[1].problem or "")
    assert rows[1].raw == ['2,"b']
    assert [row.where for row in rows[:3]] == ["line 2", "line 3", "line 4"]
    assert len(rows) == 3 + tail.count("\n")


def test_a_row_that_is_not_utf8_is_a_problem_and_is_repeated_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", b"id,name\n1,J\xfcrgen\n2,J\xc3\xbcrgen\n")
    first, second = rows_of(path)
    assert first.problem == "column name is not UTF-8"
    assert second.fields["name"] == "Jürgen"
    rejected(path)
    assert b"1,J\xfcrgen,column name is not UTF-8" in (tmp_path / "a.csv.rejects.csv").read_bytes()


def test_rejects_have_the_reason_as_the_last_column_and_can_be_read_again(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'a,b\n1\n1,2,3\n"x,",y\n')
    assert rejected(path).splitlines() == [
        "a,b,reason",
        "1,,unwanted",
        "1,2,3,has 3 cells for 2 columns",
        '"x,",y,unwanted',
    ]
    again = rows_of(tmp_path / "a.csv.rejects.csv")
    assert [dict(row.fields) for row in again if not row.problem] == [
        {"a": "1", "b": ""},
        {"a": "x,", "b": "y"},
    ]


def test_json_lines_are_read_and_rejected_with_a_reason(tmp_path: Path) -> None:
    lines = ['{"id": 1}', "", "{", "[1]", '{"id": "\\ud800"}', '{"id": NaN}', '{"id": "a\u2028b"}', "é"]
    path = written(tmp_path / "a.jsonl", "\n".join(lines) + "\n\xff".encode("latin-1").decode("latin-1"))
    rows = rows_of(path)
    assert [row.where for row in rows[:4]] == ["line 1", "line 3", "line 4", "line 5"]
    assert next(row.fields for row in rows if not row.problem) == {"id": 1}
    assert "column 2" in (rows[1].problem or "")
    assert rows[2].problem == "is not a JSON object"
    reasons = [json.loads(line) for line in rejected(path).split("\n") if line]
    assert reasons[0] == {"id": 1, "reason": "unwanted"}
    assert reasons[1]["line"] == "{"
    again = rows_of(tmp_path / "a.jsonl.rejects.jsonl")
    assert again[0].fields == {"id": 1}


def test_rejects_of_a_former_run_do_not_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "a\n1\n")
    stale = written(tmp_path / "a.csv.rejects.csv", "old")
    with Source.of(path).opened() as rows, Rejects(rows):
        list(rows)
    assert not stale.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "a\n1\n", ".csv or .jsonl"),
        ("a.csv", "", "has no header"),
        ("a.csv", "a,b,a\n", "two columns called 'a'"),
        ("a.csv", "id\n1\n".encode("utf-16"), "UTF-16"),
        ("missing.csv", None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_in_a_sentence(
    tmp_path: Path, name: str, content: Any, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        written(path, content)
    with pytest.raises(Mistake, match=said):
        rows_of(path)


def test_a_key_that_is_no_column_is_said_with_the_columns(tmp_path: Path) -> None:
    with (
        Source.of(written(tmp_path / "a.csv", "a,b\n1,2\n")).opened() as rows,
        pytest.raises(Mistake, match="no column 'id'; its columns are a, b"),
    ):
        rows.require_key("id")
