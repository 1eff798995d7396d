"""The SQL statements of this package, one file each, laid out as in `outbox.queries`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import LiteralString

from outbox.queries import strip_header


@cache
def load(name: str) -> LiteralString:
    """Return the statement of `name`.sql without its header."""
    return strip_header(name, (files(__name__) / f"{name}.sql").read_text(encoding="utf-8"))
