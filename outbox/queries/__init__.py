"""The SQL statements of this package, one file each: a header of comments, then the statement.

The header says the statement's purpose, the index that it relies on and the order in which it locks.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def load(name: str) -> str:
    """Return the statement of `name`.sql without its header.

    The header stays in the file: it would travel to the server with every execution.
    """
    return strip_header(name, (files(__name__) / f"{name}.sql").read_text(encoding="utf-8"))


def strip_header(name: str, text: str) -> str:
    """Return the statement below the header comment; a file without one is a programming error."""
    lines = text.splitlines()
    start = next((at for at, line in enumerate(lines) if not line.startswith("--")), len(lines))
    if start == 0:
        raise ValueError(f"{name}.sql has no header comment: say its purpose, its index and its lock order")
    statement = "\n".join(lines[start:]).strip().rstrip(";")
    if not statement:
        raise ValueError(f"{name}.sql holds no statement")
    return statement
