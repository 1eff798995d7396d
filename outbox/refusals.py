"""What an error of the database means to a caller: `explained` makes it one of ours where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from outbox.errors import ConfigError, PayloadError, RunConflict, SchemaError, StepwellError

_INVALID_ARGUMENT = "22023"
_NO_PRIVILEGE = "42501"
_NOT_IN_THAT_STATE = "55000"
# schema, table, function, column, type, parameter: not there
_UNDEFINED = frozenset({"3F000", "42P01", "42883", "42703", "42704"})


@contextmanager
def explained() -> Iterator[None]:
    """Raise what the body raises, as an error of ours where the database said something about our call.

    Everything else, a lost connection or a transaction of the caller that is already aborted, passes unchanged.
    Looks through SQLAlchemy's wrapper.
    """
    try:
        yield
    except Exception as error:
        original = getattr(error, "orig", None) or error
        meant = meaning(original) if isinstance(original, psycopg.Error) else None
        if meant is None:
            raise
        raise meant from error


def meaning(error: psycopg.Error) -> StepwellError | None:
    """Return what an error of the database means in our words, or None if it is not about our call."""
    said = error.diag.message_primary or str(error)
    state = error.sqlstate or ""
    hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
    if state == _INVALID_ARGUMENT and said.startswith("stepwell: "):
        about_data = any(word in said for word in ("input", "key", "labels"))
        return (PayloadError if about_data else ConfigError)(said.removeprefix("stepwell: ") + hint)
    if state == _NOT_IN_THAT_STATE and said.startswith("stepwell: "):
        return RunConflict(said.removeprefix("stepwell: ") + hint)
    if state in _UNDEFINED and "stepwell" in said:
        return SchemaError(
            f"this database has no Stepwell schema, or an older one ({said}): run `stepwell migrate`"
        )
    if state == _NO_PRIVILEGE:
        return ConfigError(
            f"the database role may not do this ({said}): grant it stepwell_producer to enqueue, signal and "
            "cancel, stepwell_viewer to read, stepwell_worker to retry and repair"
        )
    if state.startswith("22"):
        return PayloadError(f"the database refuses the data: {said}")
    return None
