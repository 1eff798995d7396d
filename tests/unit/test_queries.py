"""The SQL files of both packages: each one loads, and says what a reader has to know."""

from __future__ import annotations

from importlib.resources import files
from types import ModuleType

import pytest

import outbox.queries
import worker.queries
from outbox.queries import strip_header

FILES = [
    (module, file.name.removesuffix(".sql"))
    for module in (outbox.queries, worker.queries)
    for file in files(module).iterdir()
    if file.name.endswith(".sql")
]


@pytest.mark.parametrize(
    ("module", "name"), FILES, ids=[f"{module.__name__}.{name}" for module, name in FILES]
)
def test_every_statement_loads_without_its_header(module: ModuleType, name: str) -> None:
    statement = module.load(name)
    assert statement
    assert not statement.startswith("--")
    assert module.load(name) is statement


def test_a_header_that_leaves_something_out_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"some\.sql must begin with comments"):
        strip_header("some", "select 1")
    with pytest.raises(ValueError, match=r"some\.sql must begin with comments"):
        strip_header("some", "-- Purpose: one.\n-- Locks: none.\nselect 1")


def test_a_file_without_a_statement_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no statement"):
        strip_header("some", "-- Index: none. Locks: none.\n")


def test_a_comment_inside_the_statement_stays() -> None:
    text = "-- Index: none. Locks: none.\nselect 1 -- why\n  from one;\n"
    assert strip_header("some", text) == "select 1 -- why\n  from one"


def test_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        outbox.queries.load("no_such_statement")
