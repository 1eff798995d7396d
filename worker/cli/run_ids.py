"""Which run is meant: by its id, or by the beginning of one if that is unique."""

from __future__ import annotations

import re
from uuid import UUID

from outbox.errors import RunNotFound
from worker.cli.connecting import Session
from worker.cli.mistakes import Mistake
from worker.queries import load

_SHORTEST_PREFIX = 4
_SHOWN_MATCHES = 5


def resolved(opened: Session, text: str) -> UUID:
    """Return the id of the one run that begins with `text`. Raises RunNotFound, Mistake if there are several."""
    digits = text.strip().lower().replace("-", "")
    if not re.fullmatch(r"[0-9a-f]{1,32}", digits):
        raise RunNotFound(f"{text!r} is not the id of a run, nor the beginning of one")
    if len(digits) < _SHORTEST_PREFIX:
        raise Mistake(f"{text!r} is too short: give at least {_SHORTEST_PREFIX} characters of the run's id")
    bounds = {"lowest": UUID(digits.ljust(32, "0")), "highest": UUID(digits.ljust(32, "f"))}
    rows = opened.connection.execute(
        load("cli_runs_between"), {**bounds, "limit": _SHOWN_MATCHES + 1}
    ).fetchall()
    if not rows:
        raise RunNotFound(f"there is no run {text}" + ("" if len(digits) == 32 else "…"))
    if len(rows) > 1:
        shown = ", ".join(row[0] for row in rows[:_SHOWN_MATCHES]) + (
            ", …" if len(rows) > _SHOWN_MATCHES else ""
        )
        raise Mistake(f"{text} is the beginning of more than one run: {shown}")
    return UUID(rows[0][0])
