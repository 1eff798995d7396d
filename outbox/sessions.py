"""What a session of ours is like: settled right after connecting, and behind a pooler given back as it was lent.

A direct connection has a session of the server for itself. Behind a connection pooler in transaction mode (PgBouncer) it
has one for the length of a transaction, and another one for the next: what is set, locked, prepared or listened to in a
session is somebody else's a moment later. So there

  - nothing is prepared, and nothing is set for the session but what PgBouncer carries with its client (time zone,
    encoding, name);
  - a session does not bear the name of a worker: whoever ends the backends of a dead one would end somebody else's;
  - what a step has done to a session is undone in the round trip of its COMMIT or ROLLBACK, before anybody else has it;
  - what cannot do without a session of its own (the locks of supervisors and exporters, LISTEN) goes to the database
    itself, if the settings say where that is, or is done without.

A pooler is known by the process id: it gives its client another one than the server says of itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, LiteralString

import psycopg
from psycopg.rows import TupleRow, tuple_row
from psycopg.types.string import TextBinaryLoader, TextLoader

from outbox.errors import ConfigError
from outbox.queries import load

POOLED_WORKER = "stepwell worker"
"""What a worker's sessions are called behind a pooler, instead of by its id."""
_WORKER = re.compile(r"stepwell \d+")
_OURSELVES = "reset role"
"""User code may act as another role, which may not write what is ours."""

Connection = psycopg.Connection[Any]
AsyncConnection = psycopg.AsyncConnection[Any]


# -- how it begins -----------------------------------------------------------------------------------


def settle(connection: Connection, application_name: str, *, json_as_text: bool) -> None:
    """Make a new connection in autocommit mode what ours are like, and find out whether it goes through a pooler."""
    row = connection.execute(load("session_backend"), _introduction(connection, application_name)).fetchone()
    if row is not None and row[0]:
        connection.prepare_threshold = None
    else:
        connection.execute(load("session_settings"))
    _adapt(connection, json_as_text)


async def settle_async(connection: AsyncConnection, application_name: str, *, json_as_text: bool) -> None:
    """Settle an asynchronous connection; see `settle`."""
    introduction = _introduction(connection, application_name)
    row = await (await connection.execute(load("session_backend"), introduction)).fetchone()
    if row is not None and row[0]:
        connection.prepare_threshold = None
    else:
        await connection.execute(load("session_settings"))
    _adapt(connection, json_as_text)


def is_pooled(connection: Connection | AsyncConnection) -> bool:
    """Tell whether a connection that was settled here goes through a pooler: then it never prepares anything."""
    return connection.prepare_threshold is None


def require_durable(connection: Connection) -> None:
    """Raise ConfigError where commits are not durable and a session cannot have it so: behind a pooler.

    For those who commit by plain statements. Workers see to it in each transaction.
    """
    if is_pooled(connection):
        _require_durable(connection.execute(load("session_durability")).fetchone())


async def require_durable_async(connection: AsyncConnection) -> None:
    """Raise what `require_durable` raises."""
    if is_pooled(connection):
        _require_durable(await (await connection.execute(load("session_durability"))).fetchone())


def _require_durable(row: tuple[Any, ...] | None) -> None:
    if row is not None and row[0] in ("off", "local"):
        raise ConfigError(
            f"commits through this connection pooler may be lost: synchronous_commit is {row[0]!r} for the role or the "
            "database, and no client can change that for a session which it shares; "
            "`alter role … set synchronous_commit = on`, or go to the database itself"
        )


def _introduction(connection: Connection | AsyncConnection, application_name: str) -> dict[str, Any]:
    name = POOLED_WORKER if _WORKER.fullmatch(application_name) else application_name
    return {"told": connection.info.backend_pid, "name": name}


def _adapt(connection: Connection | AsyncConnection, json_as_text: bool) -> None:
    """Have a connection read `json` as the text that was stored, if wanted."""
    if json_as_text:
        connection.adapters.register_loader("json", TextLoader)
        connection.adapters.register_loader("json", TextBinaryLoader)


# -- how user code leaves it --------------------------------------------------------------------------


def reset() -> LiteralString:
    """Return the statements, outside of a transaction, that make a direct session as `settle` has left it."""
    return f"{load('reset_session')};\n{load('session_settings')}"


def forget(connection: Connection | AsyncConnection) -> None:
    """Have a connection make cursors and rows like a new one, whatever user code has set."""
    connection.row_factory = tuple_row
    if isinstance(connection, psycopg.AsyncConnection):
        connection.cursor_factory = psycopg.AsyncCursor
    else:
        connection.cursor_factory = psycopg.Cursor


def commit(connection: Connection, statement: LiteralString, parameters: Mapping[str, Any]) -> TupleRow:
    """Execute a last statement in a transaction that user code had, and commit; return the statement's row.

    In one round trip, at whose end a session that a pooler has lent is as it was lent. Whatever fails, nothing behind it is
    executed, and the transaction is left failed.
    """
    if is_pooled(connection):
        with psycopg.ClientCursor(connection, row_factory=tuple_row) as cursor:
            cursor.execute(_commit_and_reset(statement), {**parameters, "name": POOLED_WORKER})
            cursor.nextset()
            return _one(cursor.fetchone())
    with connection.cursor(row_factory=tuple_row) as cursor:
        with connection.pipeline():
            connection.execute(_OURSELVES)
            cursor.execute(statement, parameters)
            connection.execute("commit")
        return _one(cursor.fetchone())


async def commit_async(
    connection: AsyncConnection, statement: LiteralString, parameters: Mapping[str, Any]
) -> TupleRow:
    """Commit; see `commit`."""
    if is_pooled(connection):
        async with psycopg.AsyncClientCursor(connection, row_factory=tuple_row) as cursor:
            await cursor.execute(_commit_and_reset(statement), {**parameters, "name": POOLED_WORKER})
            cursor.nextset()
            return _one(await cursor.fetchone())
    async with connection.cursor(row_factory=tuple_row) as cursor:
        async with connection.pipeline():
            await connection.execute(_OURSELVES)
            await cursor.execute(statement, parameters)
            await connection.execute("commit")
        return _one(await cursor.fetchone())


def roll_back(connection: Connection) -> None:
    """Roll back what user code has begun; where a pooler has lent the session, with all that was done to it."""
    if not is_pooled(connection):
        connection.rollback()
        return
    with psycopg.ClientCursor(connection) as cursor:
        cursor.execute(_rollback_and_reset(), {"name": POOLED_WORKER})


async def roll_back_async(connection: AsyncConnection) -> None:
    """Roll back; see `roll_back`."""
    if not is_pooled(connection):
        await connection.rollback()
        return
    async with psycopg.AsyncClientCursor(connection) as cursor:
        await cursor.execute(_rollback_and_reset(), {"name": POOLED_WORKER})


def _commit_and_reset(statement: LiteralString) -> LiteralString:
    """Return one message that executes a statement, commits and resets, so that nobody gets the session in between.

    A pipeline would not do: psycopg ends one with a Flush behind the last Sync. Where PgBouncer has taken the session back by
    then it lends one for that Flush, which nothing answers, so that it stays lent until this client speaks again.
    """
    return f"{_OURSELVES};\n{statement};\ncommit;\n{_reset_lent()}"


def _rollback_and_reset() -> LiteralString:
    return f"rollback;\n{_reset_lent()}"


def _reset_lent() -> LiteralString:
    return f"{load('reset_session')};\n{load('pooled_settings')}"


def _one(row: TupleRow | None) -> TupleRow:
    assert row is not None, "a function returns a row"
    return row
