"""Join the caller's own transaction: carry a statement out on the connection or session that it gives.

Never commits and never rolls back: what the statement wrote stands or falls with the caller's transaction. An
error of the database leaves that transaction aborted, as any failed statement does; what can be checked is
therefore checked before anything is sent.

psycopg connections are used with a cursor of our own, so that the caller's row factory does not matter.
SQLAlchemy's are asked to run the statement, because only then they know of the transaction that it begins.
SQLAlchemy is looked at only if the caller has imported it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from outbox.errors import ConfigError
from outbox.refusals import explained
from outbox.statements import Rows, Statement

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session

T = TypeVar("T")

Transaction: TypeAlias = Union["psycopg.Connection[Any]", "Connection", "Session", "scoped_session[Any]"]
AsyncTransaction: TypeAlias = Union[
    "psycopg.AsyncConnection[Any]", "AsyncConnection", "AsyncSession", "async_scoped_session[Any]"
]

_SYNC = "a psycopg Connection or SQLAlchemy's Connection or Session"
_ASYNC = "a psycopg AsyncConnection or SQLAlchemy's AsyncConnection or AsyncSession"
# A cursor on the server would run our function only when it is fetched from.
_PLAIN_CURSOR = {"stream_results": False}


def execute(connection: psycopg.Connection[Any], statement: Statement[T]) -> T:
    """Carry a statement out on a psycopg connection."""
    with explained(), psycopg.Cursor(connection, row_factory=tuple_row) as cursor:
        rows: Rows = cursor.execute(statement.sql.encode(), statement.parameters).fetchall()
    return statement.decode(rows)


async def execute_async(connection: psycopg.AsyncConnection[Any], statement: Statement[T]) -> T:
    """Carry a statement out on an asynchronous psycopg connection."""
    with explained():
        async with psycopg.AsyncCursor(connection, row_factory=tuple_row) as cursor:
            await cursor.execute(statement.sql.encode(), statement.parameters)
            rows: Rows = await cursor.fetchall()
    return statement.decode(rows)


def execute_in(tx: Transaction, statement: Statement[T]) -> T:
    """Carry a statement out in the caller's transaction. Raises ConfigError if `tx` has none to join."""
    if isinstance(tx, psycopg.Connection):
        _require_transaction(tx)
        return execute(tx, statement)
    joined: Any = tx
    if (orm := _loaded("sqlalchemy.orm")) and isinstance(joined, orm.scoped_session):
        joined = joined()
    if orm and isinstance(joined, orm.Session):
        joined = joined.connection()
    if (core := _loaded("sqlalchemy")) and isinstance(joined, core.Connection):
        _require_psycopg(joined)
        _require_transaction(joined.connection.driver_connection)
        with explained():
            result = joined.exec_driver_sql(
                statement.sql, dict(statement.parameters), execution_options=_PLAIN_CURSOR
            )
        return statement.decode(result.all())
    raise _misfit(tx, _SYNC, "Client", "AsyncClient" if _is_async(tx) else None)


async def execute_in_async(tx: AsyncTransaction, statement: Statement[T]) -> T:
    """Carry a statement out in the caller's transaction, as `execute_in` does."""
    if isinstance(tx, psycopg.AsyncConnection):
        _require_transaction(tx)
        return await execute_async(tx, statement)
    joined: Any = tx
    if (asyncio := _loaded("sqlalchemy.ext.asyncio")) and isinstance(joined, asyncio.async_scoped_session):
        joined = joined()
    if asyncio and isinstance(joined, asyncio.AsyncSession):
        joined = await joined.connection()
    if asyncio and isinstance(joined, asyncio.AsyncConnection):
        _require_psycopg(joined)
        _require_transaction((await joined.get_raw_connection()).driver_connection)
        with explained():
            result = await joined.exec_driver_sql(
                statement.sql, dict(statement.parameters), execution_options=_PLAIN_CURSOR
            )
        return statement.decode(result.all())
    raise _misfit(tx, _ASYNC, "AsyncClient", "Client" if _is_sync(tx) else None)


def _loaded(name: str) -> Any:
    """Return a module if it has been imported: whoever has an object of its classes has imported it."""
    module: ModuleType | None = sys.modules.get(name)
    return module


def _require_transaction(connection: Any) -> None:
    """Raise ConfigError for a connection on which every statement commits by itself."""
    if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
        raise ConfigError(
            "tx= is a connection in autocommit mode with no transaction open, so there is nothing to join: open one "
            "(`with connection.transaction():`), or leave tx= out"
        )


def _require_psycopg(connection: Any) -> None:
    dialect = connection.dialect
    if dialect.name != "postgresql" or dialect.driver not in ("psycopg", "psycopg_async"):
        raise ConfigError(
            f"tx= is a SQLAlchemy connection through {dialect.name}+{dialect.driver}; Stepwell joins those of "
            "postgresql+psycopg"
        )


def _is_async(tx: object) -> bool:
    asyncio = _loaded("sqlalchemy.ext.asyncio")
    ours = (asyncio.AsyncConnection, asyncio.AsyncSession, asyncio.async_scoped_session) if asyncio else ()
    return isinstance(tx, (psycopg.AsyncConnection, *ours))


def _is_sync(tx: object) -> bool:
    core, orm = _loaded("sqlalchemy"), _loaded("sqlalchemy.orm")
    ours = ((core.Connection,) if core else ()) + ((orm.Session, orm.scoped_session) if orm else ())
    return isinstance(tx, (psycopg.Connection, *ours))


def _misfit(tx: object, wanted: str, client: str, other: str | None) -> ConfigError:
    cls = type(tx)
    advice = f"; {other} takes this one" if other else ""
    return ConfigError(f"tx= of {client} takes {wanted}, got {cls.__module__}.{cls.__qualname__}{advice}")
