"""Which errors of the database pass by themselves, so that the statement has to be sent again."""

from __future__ import annotations

import psycopg

_CONFLICTS = ("40001", "40P01")
_CLASSES = ("40", "53", "55", "57", "58")
_READ_ONLY = "25006"
_LIMIT_CLASS = "54"


def is_conflict(error: BaseException) -> bool:
    """Tell whether another transaction was in the way: the same statement may come through at once."""
    return _state(error) in _CONFLICTS


def is_transient(error: BaseException) -> bool:
    """Tell whether the server could not do it just now, without blame for what it was asked to do.

    A conflict, a lock that was not to be had, a statement that an operator or a time-out has cancelled, a disk or
    a memory that was full, a standby that was reached instead of its primary. Lost connections are
    `outbox.database.is_disconnect`.
    """
    state = _state(error)
    return state[:2] in _CLASSES or state == _READ_ONLY


def is_bad_data(error: BaseException) -> bool:
    """Tell whether what was sent was refused for its content: sent again, it would be refused again."""
    return isinstance(error, psycopg.DataError | psycopg.IntegrityError) or _state(error)[:2] == _LIMIT_CLASS


def _state(error: BaseException) -> str:
    return getattr(error, "sqlstate", None) or ""
