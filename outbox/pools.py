"""Pools of connections like those of `outbox.database`, tested as they are handed out.

A test is a round trip, which would be a good part of an enqueue. So a connection that was tested a moment ago is
only looked at from here: a server that has gone has closed it, which can be read without asking anybody.
"""

from __future__ import annotations

import select
import time
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from outbox import sessions
from outbox.database import PREPARE_AFTER, parameters

TEST_SECONDS = 5.0
"""After this long a connection is tested by a round trip again: a silent network closes nothing."""
AGAIN_SECONDS = 3.0
"""A pool that cannot connect waits twice as long after each attempt. After so long it begins anew, for those who wait: the
database may have been full for minutes, and is to be found at once when it has room."""


def pool(
    url: str,
    *,
    application_name: str,
    max_size: int,
    autocommit: bool = True,
    json_as_text: bool = True,
    wait_seconds: float = 30.0,
    for_user_code: bool = False,
) -> ConnectionPool[psycopg.Connection[TupleRow]]:
    """Return a pool, not yet open, of at most `max_size` connections like those of `connect`.

    A connection is tested as it is handed out: after a restart of the database a caller waits for about a second
    instead of failing. `wait_seconds` bounds the wait for one (PoolTimeout). `for_user_code`: what was set in a
    session is undone when it comes back.
    """
    tests = _Tests()

    def configure(connection: psycopg.Connection[TupleRow]) -> None:
        sessions.settle(connection, application_name, json_as_text=json_as_text)
        connection.autocommit = autocommit

    def reset(connection: psycopg.Connection[TupleRow]) -> None:
        sessions.forget(connection)
        if sessions.is_pooled(connection):
            return  # its session has gone back already
        connection.autocommit = True
        connection.execute(sessions.reset())
        connection.autocommit = autocommit

    def check(connection: psycopg.Connection[TupleRow]) -> None:
        if not tests.is_due(connection):
            return
        try:
            ConnectionPool.check_connection(connection)
        except psycopg.Error:
            created.check()  # the pool waits longer after each broken one: let it meet no other
            raise

    def begin_anew(failed: ConnectionPool[Any]) -> None:
        if failed.get_stats()["requests_waiting"]:
            failed.check()

    created = ConnectionPool(
        parameters(url, application_name),
        kwargs={"autocommit": True, "prepare_threshold": PREPARE_AFTER},
        configure=configure,
        check=check,
        reset=reset if for_user_code else None,
        min_size=0,
        max_size=max_size,
        timeout=wait_seconds,
        reconnect_timeout=AGAIN_SECONDS,
        reconnect_failed=begin_anew,
        name=application_name,
        open=False,
    )
    return created  # pyright: ignore[reportReturnType]  # the class is the default one


def async_pool(
    url: str,
    *,
    application_name: str,
    max_size: int,
    autocommit: bool = True,
    json_as_text: bool = True,
    wait_seconds: float = 30.0,
    for_user_code: bool = False,
) -> AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]]:
    """Return an asynchronous pool, not yet open; see `pool`."""
    tests = _Tests()

    async def configure(connection: psycopg.AsyncConnection[TupleRow]) -> None:
        await sessions.settle_async(connection, application_name, json_as_text=json_as_text)
        await connection.set_autocommit(autocommit)

    async def reset(connection: psycopg.AsyncConnection[TupleRow]) -> None:
        sessions.forget(connection)
        if sessions.is_pooled(connection):
            return
        await connection.set_autocommit(True)
        await connection.execute(sessions.reset())
        await connection.set_autocommit(autocommit)

    async def check(connection: psycopg.AsyncConnection[TupleRow]) -> None:
        if not tests.is_due(connection):
            return
        try:
            await AsyncConnectionPool.check_connection(connection)
        except psycopg.Error:
            await created.check()
            raise

    async def begin_anew(failed: AsyncConnectionPool[Any]) -> None:
        if failed.get_stats()["requests_waiting"]:
            await failed.check()

    created = AsyncConnectionPool(
        parameters(url, application_name),
        kwargs={"autocommit": True, "prepare_threshold": PREPARE_AFTER},
        configure=configure,
        check=check,
        reset=reset if for_user_code else None,
        min_size=0,
        max_size=max_size,
        timeout=wait_seconds,
        reconnect_timeout=AGAIN_SECONDS,
        reconnect_failed=begin_anew,
        name=application_name,
        open=False,
    )
    return created  # pyright: ignore[reportReturnType]  # the class is the default one


class _Tests:
    """When the connections of one pool were tested."""

    def __init__(self) -> None:
        self._tested: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    def is_due(self, connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
        """Tell whether a connection has to be tested by a round trip; if so, it is taken for tested from now on."""
        moment = time.monotonic()
        if moment - self._tested.get(connection, -TEST_SECONDS) < TEST_SECONDS and not _has_news(connection):
            return False
        self._tested[connection] = moment
        return True


def _has_news(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Tell whether the server has sent something unasked, as it does when it ends a session."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    return bool(poller.poll(0))
