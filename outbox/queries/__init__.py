"""The SQL statements of this package, one file each: a header of comments, then the statement.

The header says the statement's purpose, the index that it relies on and the order in which it locks.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import LiteralString, cast


@cache
def load(name: str) -> LiteralString:
    """Return the statement of `name`.sql without its header.

    The header stays in the file: it would travel to the server with every execution.
    """
    return strip_header(name, (files(__name__) / f"{name}.sql").read_text(encoding="utf-8"))


def strip_header(name: str, text: str) -> LiteralString:
    """Return the statement below the header; a header that leaves something out is a programming error."""
    lines = text.splitlines()
    start = next((at for at, line in enumerate(lines) if not line.startswith("--")), len(lines))
    header, statement = "\n".join(lines[:start]), "\n".join(lines[start:]).strip().rstrip(";")
    if "Index:" not in header or "Locks:" not in header:
        raise ValueError(
            f"{name}.sql must begin with comments: its purpose, its Index: and its Locks: in order"
        )
    if not statement:
        raise ValueError(f"{name}.sql holds no statement")
    # A file of ours: no input is ever part of it. To mypy the two types are one, to pyright they are not.
    return cast("LiteralString", statement)  # type: ignore[redundant-cast]
