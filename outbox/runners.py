"""Carry statements out: in the caller's transaction, or on a pooled connection where each commits by itself.

Where a database is restarted or a connection breaks:
  - what was not sent yet waits for a connection, up to `GIVE_UP_SECONDS`;
  - a statement that may be repeated (a read, an enqueue with keys, a cancel) is sent again within that time;
  - any other is not: it may have been carried out, and the error of the driver says that nobody knows.
In a caller's transaction nothing is ever repeated. What the database rolled back by itself (a deadlock, a
serialization failure) is repeated at once, a few times, on our own connections.

Both runners open their pool at the first use, so that a client that only joins transactions needs no URL. A
runner may be used by many threads or tasks. After a fork, or in another event loop, it opens a new pool.
"""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from typing import Any, TypeVar

import psycopg
import tenacity
from psycopg.errors import DeadlockDetected, SerializationFailure
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout

from outbox import database, pools, schema, sessions
from outbox.errors import ConfigError
from outbox.settings import Settings
from outbox.statements import Statement
from outbox.transactions import (
    AsyncTransaction,
    Transaction,
    execute,
    execute_async,
    execute_in,
    execute_in_async,
)

T = TypeVar("T")

APPLICATION_NAME = "stepwell client"
GIVE_UP_SECONDS = 30.0
POOL_WAIT_SECONDS = 10.0

_CONFLICTS = (DeadlockDetected, SerializationFailure)
_REPEATING: dict[str, Any] = {
    "retry": tenacity.retry_if_exception_type(_CONFLICTS),
    "stop": tenacity.stop_after_attempt(4),
    "wait": tenacity.wait_random(0, 0.05),
    "reraise": True,
}

Pool = ConnectionPool[psycopg.Connection[TupleRow]]
AsyncPool = AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]]


class Runner:
    """Carries statements out for `Client`. `close` is safe twice and before the first use."""

    def __init__(self, url: str | None, settings: Settings | None) -> None:
        self.settings = _settings(url, settings)
        self.keyring = self.settings.keyring()
        self._lock = threading.Lock()
        self._pool: Pool | None = None
        self._process = os.getpid()
        self._closed = False

    def run(self, statement: Statement[T], tx: Transaction | None = None) -> T:
        """Carry one statement out; with `tx` in that transaction, without as a transaction of its own."""
        if tx is not None:
            return execute_in(tx, statement)
        if statement.repeatable:
            return database.retry_connecting(
                lambda: self._once(statement), give_up_after_seconds=GIVE_UP_SECONDS
            )
        pool, connection = database.retry_connecting(self._borrowed, give_up_after_seconds=GIVE_UP_SECONDS)
        try:
            return _execute(connection, statement)
        finally:
            pool.putconn(connection)

    def close(self) -> None:
        """Close the connections; the runner cannot be used any more."""
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, True
        if pool is not None and self._process == os.getpid():
            pool.close()

    def _once(self, statement: Statement[T]) -> T:
        pool, connection = self._borrowed()
        try:
            return _execute(connection, statement)
        finally:
            pool.putconn(connection)

    def _borrowed(self) -> tuple[Pool, psycopg.Connection[TupleRow]]:
        pool = self._opened()
        try:
            return pool, pool.getconn()
        except PoolTimeout:
            # A pool only says that it has waited; a connection of its own says why, where that is the database's doing.
            database.connect(database.url_of(self.settings), application_name=APPLICATION_NAME).close()
            raise PoolTimeout(_all_in_use(self.settings)) from None

    def _opened(self) -> Pool:
        with self._lock:
            if self._closed:
                raise ConfigError("this client is closed")
            if self._pool is None or self._process != os.getpid():
                self._pool, self._process = _new_pool(self.settings), os.getpid()
            return self._pool


class AsyncRunner:
    """Carries statements out for `AsyncClient`."""

    def __init__(self, url: str | None, settings: Settings | None) -> None:
        self.settings = _settings(url, settings)
        self.keyring = self.settings.keyring()
        self._pool: AsyncPool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()
        self._closed = False

    async def run(self, statement: Statement[T], tx: AsyncTransaction | None = None) -> T:
        """Carry one statement out; with `tx` in that transaction, without as a transaction of its own."""
        if tx is not None:
            return await execute_in_async(tx, statement)
        if statement.repeatable:
            return await database.retry_connecting_async(
                lambda: self._once(statement), give_up_after_seconds=GIVE_UP_SECONDS
            )
        pool, connection = await database.retry_connecting_async(
            self._borrowed, give_up_after_seconds=GIVE_UP_SECONDS
        )
        try:
            return await _execute_async(connection, statement)
        finally:
            await pool.putconn(connection)

    async def close(self) -> None:
        """Close the connections; the runner cannot be used any more."""
        pool, self._pool, self._closed = self._pool, None, True
        if pool is not None and self._loop is asyncio.get_running_loop():
            await pool.close()

    async def _once(self, statement: Statement[T]) -> T:
        pool, connection = await self._borrowed()
        try:
            return await _execute_async(connection, statement)
        finally:
            await pool.putconn(connection)

    async def _borrowed(self) -> tuple[AsyncPool, psycopg.AsyncConnection[TupleRow]]:
        pool = await self._opened()
        try:
            return pool, await pool.getconn()
        except PoolTimeout:
            url = database.url_of(self.settings)
            await (await database.connect_async(url, application_name=APPLICATION_NAME)).close()
            raise PoolTimeout(_all_in_use(self.settings)) from None

    async def _opened(self) -> AsyncPool:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._pool, self._loop, self._lock = None, loop, asyncio.Lock()
        async with self._lock:
            if self._closed:
                raise ConfigError("this client is closed")
            if self._pool is None:
                self._pool = await _new_async_pool(self.settings)
            return self._pool


def _settings(url: str | None, settings: Settings | None) -> Settings:
    if settings is None:
        return Settings.load(database_url=url)
    return settings if url is None else replace(settings, database_url=url)


def _new_pool(settings: Settings) -> Pool:
    """Return an open pool. A first connection of its own says what is wrong, where a pool would only wait."""
    url = database.url_of(settings)
    with database.connect(url, application_name=APPLICATION_NAME) as connection:
        schema.check(connection)
        sessions.require_durable(connection)
    pool = pools.pool(
        url, application_name=APPLICATION_NAME, max_size=settings.connections, wait_seconds=POOL_WAIT_SECONDS
    )
    pool.open()
    return pool


async def _new_async_pool(settings: Settings) -> AsyncPool:
    url = database.url_of(settings)
    async with await database.connect_async(url, application_name=APPLICATION_NAME) as connection:
        await schema.check_async(connection)
        await sessions.require_durable_async(connection)
    pool = pools.async_pool(
        url, application_name=APPLICATION_NAME, max_size=settings.connections, wait_seconds=POOL_WAIT_SECONDS
    )
    await pool.open()
    return pool


def _all_in_use(settings: Settings) -> str:
    return (
        f"all {settings.connections} connections of this client have been in use for {POOL_WAIT_SECONDS:g} s; "
        "allow it more (STEPWELL_CONNECTIONS)"
    )


def _execute(connection: psycopg.Connection[TupleRow], statement: Statement[T]) -> T:
    try:
        return execute(connection, statement)
    except psycopg.InternalError:
        connection.close()  # who answers what was not asked, or has become read-only, is not asked again
        raise
    except _CONFLICTS:
        result: T = tenacity.Retrying(**_REPEATING)(execute, connection, statement)
        return result


async def _execute_async(connection: psycopg.AsyncConnection[TupleRow], statement: Statement[T]) -> T:
    try:
        return await execute_async(connection, statement)
    except psycopg.InternalError:
        await connection.close()
        raise
    except _CONFLICTS:
        result: T = await tenacity.AsyncRetrying(**_REPEATING)(execute_async, connection, statement)
        return result
