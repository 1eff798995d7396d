"""Where transactional steps get their connections and sessions from: one source for each library.

A source opens a transaction by a statement of the caller's and yields the driver's connection with what the step
is given. Steps share sessions, one after the other: whatever one has set in a session (settings, a role, locks,
temporary tables) is undone when it comes back to its pool; behind a connection pooler with the end of its transaction,
by `worker.steps.transactions`. Each is made at the first step that wants it, and SQLAlchemy is imported only then: it
takes longer to import than everything else that a worker needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from outbox import database, pools, sessions
from worker.kinds import TransactionKind

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

_DIALECT = "postgresql+psycopg://"


class Opened(NamedTuple):
    """An open transaction: the library's connection, the driver's below it, and the first statement's row."""

    connection: Any
    driver: Any
    row: Any


class Source(Protocol):
    """Gives connections of one library to steps in threads."""

    def opened(self, statement: str, parameters: tuple[Any, ...]) -> AbstractContextManager[Opened]:
        """Open a transaction by a statement. What is left open at the end is rolled back."""
        ...

    def given(self, kind: TransactionKind, connection: Any, /) -> AbstractContextManager[Any]:
        """Yield what the step gets of an open transaction."""
        ...

    async def close(self) -> None:
        """Close every connection."""


class AsyncSource(Protocol):
    """Gives connections of one library to steps in the loop."""

    def opened(self, statement: str, parameters: tuple[Any, ...]) -> AbstractAsyncContextManager[Opened]:
        """Open a transaction by a statement. What is left open at the end is rolled back."""
        ...

    def given(self, kind: TransactionKind, connection: Any, /) -> AbstractAsyncContextManager[Any]:
        """Yield what the step gets of an open transaction."""
        ...

    async def close(self) -> None:
        """Close every connection."""


class Sources:
    """The sources of one worker. `limit` bounds the connections of each."""

    def __init__(self, url: str, name: str, limit: int) -> None:
        self._place = _Place(url, name, limit)
        self._made: dict[str, Any] = {}

    def of(self, kind: TransactionKind) -> Source:
        """Return the source of a kind that is used from threads."""
        made: Source = self._of(_Psycopg if kind is TransactionKind.PSYCOPG else _SQLAlchemy)
        return made

    def of_async(self, kind: TransactionKind) -> AsyncSource:
        """Return the source of a kind that is used in the loop."""
        psycopg_wanted = kind is TransactionKind.PSYCOPG_ASYNC
        made: AsyncSource = self._of(_AsyncPsycopg if psycopg_wanted else _AsyncSQLAlchemy)
        return made

    async def close(self) -> None:
        """Close every connection; safe twice."""
        for source in self._made.values():
            await source.close()

    def _of(self, cls: Callable[[_Place], Any]) -> Any:
        name = cls.__qualname__
        if name not in self._made:
            self._made[name] = cls(self._place)
        return self._made[name]


class _Place(NamedTuple):
    url: str
    name: str
    limit: int

    def connect(self) -> psycopg.Connection[Any]:
        return database.connect(self.url, application_name=self.name, autocommit=False, json_as_text=False)

    async def connect_async(self) -> psycopg.AsyncConnection[Any]:
        return await database.connect_async(
            self.url, application_name=self.name, autocommit=False, json_as_text=False
        )


class _Psycopg:
    def __init__(self, place: _Place) -> None:
        self._pool: ConnectionPool[Any] = pools.pool(
            place.url, application_name=place.name, max_size=place.limit, autocommit=False, json_as_text=False,
            for_user_code=True,
        )  # fmt: skip
        self._pool.open()

    @contextmanager
    def opened(self, statement: str, parameters: tuple[Any, ...]) -> Iterator[Opened]:
        with self._pool.connection() as connection:
            row = connection.execute(statement.encode(), parameters).fetchone()
            yield Opened(connection, connection, row)

    def given(self, _kind: TransactionKind, connection: Any) -> AbstractContextManager[Any]:
        return nullcontext(connection)

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.close)


class _AsyncPsycopg:
    def __init__(self, place: _Place) -> None:
        self._pool: AsyncConnectionPool[Any] = pools.async_pool(
            place.url, application_name=place.name, max_size=place.limit, autocommit=False, json_as_text=False,
            for_user_code=True,
        )  # fmt: skip
        self._opening = asyncio.Lock()

    @asynccontextmanager
    async def opened(self, statement: str, parameters: tuple[Any, ...]) -> AsyncIterator[Opened]:
        async with self._opening:
            await self._pool.open()
        async with self._pool.connection() as connection:
            row = await (await connection.execute(statement.encode(), parameters)).fetchone()
            yield Opened(connection, connection, row)

    def given(self, _kind: TransactionKind, connection: Any) -> AbstractAsyncContextManager[Any]:
        return nullcontext(connection)

    async def close(self) -> None:
        await self._pool.close()


class _SQLAlchemy:
    def __init__(self, place: _Place) -> None:
        from sqlalchemy import create_engine

        self._engine: Engine = create_engine(
            _DIALECT, creator=place.connect, pool_size=place.limit, max_overflow=0, pool_pre_ping=True
        )
        _reset_on_return(self._engine)
        self._closed = False

    @contextmanager
    def opened(self, statement: str, parameters: tuple[Any, ...]) -> Iterator[Opened]:
        pool = self._engine.pool
        try:
            with self._engine.connect() as connection:
                row = connection.exec_driver_sql(statement, parameters).one()
                yield Opened(connection, connection.connection.driver_connection, row)
        finally:
            # An abandoned step has come back, to a pool that was disposed of: nobody else would close its connection.
            # Asked once that is there again: `close` may be called at any moment.
            if self._closed:
                pool.dispose()

    def given(self, kind: TransactionKind, connection: Any) -> AbstractContextManager[Any]:
        from sqlalchemy.orm import Session

        if kind is TransactionKind.SQLALCHEMY_CONNECTION:
            return nullcontext(connection)
        return Session(connection, join_transaction_mode="create_savepoint")

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._engine.dispose)


def _reset_on_return(engine: Engine) -> None:
    """Undo what a step has set in a session before another step gets it, as the pools of psycopg do."""
    from sqlalchemy import event

    def reset(connection: Any, record: Any, state: Any) -> None:
        if state.terminate_only or not state.asyncio_safe:
            return  # it is being closed, not returned
        sessions.forget(record.driver_connection)
        connection.rollback()
        if sessions.is_pooled(record.driver_connection):
            return  # its session has gone back already
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(sessions.reset())
        cursor.close()
        connection.autocommit = False

    event.listen(engine, "reset", reset)


class _AsyncSQLAlchemy:
    def __init__(self, place: _Place) -> None:
        from sqlalchemy.ext.asyncio import create_async_engine

        self._engine: AsyncEngine = create_async_engine(
            _DIALECT,
            async_creator=place.connect_async,
            pool_size=place.limit,
            max_overflow=0,
            pool_pre_ping=True,
        )
        _reset_on_return(self._engine.sync_engine)

    @asynccontextmanager
    async def opened(self, statement: str, parameters: tuple[Any, ...]) -> AsyncIterator[Opened]:
        async with self._engine.connect() as connection:
            row = (await connection.exec_driver_sql(statement, parameters)).one()
            yield Opened(connection, (await connection.get_raw_connection()).driver_connection, row)

    def given(self, kind: TransactionKind, connection: Any) -> AbstractAsyncContextManager[Any]:
        from sqlalchemy.ext.asyncio import AsyncSession

        if kind is TransactionKind.SQLALCHEMY_ASYNC_CONNECTION:
            return nullcontext(connection)
        return AsyncSession(connection, join_transaction_mode="create_savepoint")

    async def close(self) -> None:
        await self._engine.dispose()
