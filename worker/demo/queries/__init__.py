"""The SQL statements of the demo, one file each, laid out as in `outbox.queries`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from outbox.queries import strip_header


@cache
def load(name: str) -> bytes:
    """Return the statement of `name`.sql without its header."""
    return strip_header(name, (files(__name__) / f"{name}.sql").read_text(encoding="utf-8")).encode()
