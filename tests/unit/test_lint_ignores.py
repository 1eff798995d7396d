"""Comments silence what they name, on their line, and are told of when they silence nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.checked import findings, told, written
from worker.lint import check


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def in_body(tmp_path: Path, *lines: str) -> list[str]:
    """Return what is found in a body whose first line is line 5."""
    body = "\n".join(f"    {line}" for line in lines)
    text = f"import time, random\nfrom worker import workflow\n@workflow\ndef flow(n):\n{body}\n"
    return told(findings(tmp_path, text))


@pytest.mark.parametrize(
    "comment",
    [
        "# stepwell: ignore[clock]",
        "# stepwell: ignore[ clock ]",
        "#stepwell:ignore[clock]",
        "# Stepwell: ignore[clock]",
        "# stepwell: ignore",
        "# stepwell: ignore[clock]  because it is only logged",
        "# noqa  # stepwell: ignore[clock]",
    ],
)
def test_a_comment_silences_its_line(comment: str, tmp_path: Path) -> None:
    assert in_body(tmp_path, f"time.time()  {comment}") == []


def test_a_comment_silences_several_rules(tmp_path: Path) -> None:
    both = "time.time() + random.random()"
    assert in_body(tmp_path, f"{both}  # stepwell: ignore[clock, random]") == []
    assert in_body(tmp_path, f"{both}  # stepwell: ignore") == []
    assert in_body(tmp_path, f"{both}  # stepwell: ignore[clock]") == ["5 random"]


def test_a_comment_silences_what_its_statement_has_on_other_lines(tmp_path: Path) -> None:
    lines = ["print(  # stepwell: ignore[clock]", "    time.time(),", ")"]
    assert in_body(tmp_path, *lines) == []
    assert in_body(tmp_path, "print(", "    time.time(),  # stepwell: ignore[clock]", ")") == []


def test_a_comment_does_not_silence_the_statements_inside_of_its_own(tmp_path: Path) -> None:
    lines = ["if n:  # stepwell: ignore[clock]", "    time.time()"]
    assert in_body(tmp_path, *lines) == ["5 unused-ignore", "6 clock"]


def test_a_comment_in_a_string_is_none(tmp_path: Path) -> None:
    assert in_body(tmp_path, 'time.time(), "# stepwell: ignore[clock]"') == ["5 clock"]


@pytest.mark.parametrize(
    "comment", ["# stepwell: ignore-all", "# stepwell: ignored", "# ignore[clock]", "# stepwell ignore"]
)
def test_other_comments_are_none(comment: str, tmp_path: Path) -> None:
    assert in_body(tmp_path, f"time.time()  {comment}") == ["5 clock"]


def test_an_unknown_rule_is_a_finding(tmp_path: Path) -> None:
    assert in_body(tmp_path, "time.time()  # stepwell: ignore[clok]") == ["5 clock", "5 unknown-rule"]
    assert in_body(tmp_path, "time.time()  # stepwell: ignore[clock, clok]") == ["5 unknown-rule"]
    assert in_body(tmp_path, "time.time()  # stepwell: ignore[]") == ["5 clock", "5 unknown-rule"]


def test_an_unused_comment_is_a_finding(tmp_path: Path) -> None:
    assert in_body(tmp_path, "print(n)  # stepwell: ignore[clock]") == ["5 unused-ignore"]
    assert in_body(tmp_path, "print(n)  # stepwell: ignore") == ["5 unused-ignore"]
    assert in_body(tmp_path, "print(n)  # stepwell: ignore[clock, unused-ignore]") == []


def test_a_comment_that_is_used_in_part_says_which_part_is_not(tmp_path: Path) -> None:
    text = "from worker import workflow\n@workflow\ndef flow():\n    open('x')  # stepwell: ignore[io, clock, hash]\n"
    (found,) = findings(tmp_path, text)
    assert found.rule == "unused-ignore"
    assert found.column == 16
    assert found.message == "`stepwell: ignore[clock, hash]` silences nothing here; take it out"


def test_in_a_helper_the_comment_stands_at_the_line_of_the_helper(tmp_path: Path) -> None:
    files = {
        "flows.py": "from worker import workflow\nfrom prices import a\n@workflow\ndef flow():\n    a()\n",
        "prices.py": """\
            def a():
                open("x")  # stepwell: ignore[io]
                print("x")  # stepwell: ignore[io]
            def b():
                print("x")  # stepwell: ignore[io]
            """,
    }
    # Whether b() is reached from elsewhere, this check cannot know, unless it is told to look there too.
    assert told(findings(tmp_path, files)) == ["prices.py:3 unused-ignore"]
    assert told(findings(tmp_path, files, ".")) == ["prices.py:3 unused-ignore", "prices.py:5 unused-ignore"]


def test_a_comment_outside_of_bodies_silences_nothing(tmp_path: Path) -> None:
    text = "from worker import step, workflow\n@step\ndef s():\n    open('x')  # stepwell: ignore[io]\n@workflow\ndef flow():\n    s()\n"
    assert told(findings(tmp_path, text)) == ["4 unused-ignore"]


def test_a_comment_that_a_second_app_needs_is_used(tmp_path: Path) -> None:
    files = {
        "a.py": "from worker import workflow\n@workflow\ndef a(): ...\ndef help():\n    open('x')  # stepwell: ignore[io]\n",
        "b.py": "from worker import workflow\nfrom a import help\n@workflow\ndef b():\n    help()\n",
    }
    written(tmp_path, files)
    assert told(check(["a.py"]).findings) == ["a.py:5 unused-ignore"]
    assert check(["a.py", "b.py"]).findings == ()
