"""`tx=` joins the caller's own transaction: one suite over all the kinds of connection and session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest
import pytest_asyncio
import sqlalchemy as sa
from psycopg.rows import TupleRow, dict_row
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox import AsyncClient, Client, ConfigError, PayloadError, SchemaError
from outbox.database import connect, connect_async
from tests.flows import Lead, welcome
from tests.waiting import wait_until_async

Db = psycopg.Connection[TupleRow]

# A client that could not connect if it tried: joining a transaction needs no connection of its own.
NOWHERE = "postgresql://nobody@nowhere.invalid/none"

KINDS = (
    "psycopg.Connection",
    "psycopg.AsyncConnection",
    "sqlalchemy.Connection",
    "sqlalchemy.Session",
    "sqlalchemy.AsyncConnection",
    "sqlalchemy.AsyncSession",
)


class Caller:
    """A service with a transaction of its own; its calls are awaited, whatever is behind them."""

    def __init__(self, tx: Any, is_async: bool, run_sql: Callable[[str], Any]) -> None:
        self.tx = tx
        self.is_async = is_async
        self.client: Any = AsyncClient(NOWHERE) if is_async else Client(NOWHERE)
        self._run_sql = run_sql

    async def enqueue(self, *args: Any, **options: Any) -> tuple[UUID, bool]:
        run = await self._call(lambda: self.client.enqueue(welcome, *args, tx=self.tx, **options))
        return run.id, run.created

    async def enqueue_many(self, inputs: Any, **options: Any) -> list[tuple[UUID, bool]]:
        if self.is_async:
            return [
                (r.id, r.created)
                async for r in self.client.enqueue_many(welcome, inputs, tx=self.tx, **options)
            ]
        return [(r.id, r.created) for r in self.client.enqueue_many(welcome, inputs, tx=self.tx, **options)]

    async def cancel(self, run: UUID) -> bool:
        answer: bool = await self._call(lambda: self.client.cancel(run, tx=self.tx))
        return answer

    async def signal(self, run: UUID, payload: Any) -> bool:
        answer: bool = await self._call(lambda: self.client.signal(run, "100 %", payload, tx=self.tx))
        return answer

    async def write(self, note: str) -> None:
        await self._call(lambda: self._run_sql(f"insert into business values ('{note}')"))

    async def commit(self) -> None:
        await self._call(self.tx.commit)

    async def rollback(self) -> None:
        await self._call(self.tx.rollback)

    async def _call(self, call: Callable[[], Any]) -> Any:
        # A synchronous call may wait for a lock that this very test holds, so it gets a thread.
        return await call() if self.is_async else await asyncio.to_thread(call)


@asynccontextmanager
async def calling(kind: str, url: str) -> AsyncIterator[Caller]:
    engine_url = sqlalchemy_url(url)
    if kind == "psycopg.Connection":
        with connect(url, application_name="caller", autocommit=False) as plain:
            yield Caller(plain, False, lambda text: plain.execute(text.encode()))
    elif kind == "psycopg.AsyncConnection":
        async with await connect_async(url, application_name="caller", autocommit=False) as async_plain:
            yield Caller(async_plain, True, lambda text: async_plain.execute(text.encode()))
    elif kind.startswith("sqlalchemy.Async"):
        async_engine = create_async_engine(engine_url, connect_args={"application_name": "caller"})
        opened: Any = async_engine.connect() if kind.endswith("Connection") else AsyncSession(async_engine)
        async with opened as async_tx:
            yield Caller(async_tx, True, lambda text: async_tx.execute(sa.text(text)))
        await async_engine.dispose()
    else:
        engine = sa.create_engine(engine_url, connect_args={"application_name": "caller"})
        with engine.connect() if kind.endswith("Connection") else Session(engine) as tx:
            yield Caller(tx, False, lambda text: tx.execute(sa.text(text)))
        engine.dispose()


@pytest_asyncio.fixture(params=KINDS)
async def caller(request: pytest.FixtureRequest, database_url: str, db: Db) -> AsyncIterator[Caller]:
    db.execute("create table business (note text)")
    async with calling(request.param, database_url) as opened:
        yield opened


def stored(db: Db) -> tuple[int, ...]:
    """Return how many business rows, runs, tasks and keys another transaction sees."""
    tables = ("business", "stepwell.runs", "stepwell.tasks", "stepwell.keys")
    return tuple(one(db, f"select count(*) from {table}") for table in tables)


def one(db: Db, statement: str) -> Any:
    row = db.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


async def waits_for_a_lock(db: Db) -> None:
    await wait_until_async(
        lambda: one(
            db,
            "select count(*) from pg_stat_activity where application_name = 'caller' and wait_event_type = 'Lock'",
        )
    )


# -- what every kind promises ------------------------------------------------------------------------


async def test_commit_leaves_everything(caller: Caller, db: Db) -> None:
    await caller.write("order 1")
    run, created = await caller.enqueue(Lead(1), key="order 1")
    assert created
    assert stored(db) == (0, 0, 0, 0)
    await caller.commit()
    assert stored(db) == (1, 1, 1, 1)
    assert one(db, "select id from stepwell.runs") == run


async def test_rollback_leaves_nothing(caller: Caller, db: Db) -> None:
    await caller.write("order 1")
    await caller.enqueue(Lead(1), key="order 1")
    await caller.rollback()
    assert stored(db) == (0, 0, 0, 0)


async def test_an_enqueue_that_comes_first_opens_the_callers_transaction(caller: Caller, db: Db) -> None:
    await caller.enqueue(Lead(1))
    await caller.write("order 1")
    assert stored(db) == (0, 0, 0, 0)
    await caller.commit()
    assert stored(db) == (1, 1, 1, 0)


async def test_several_enqueues_stand_and_fall_together(caller: Caller, db: Db) -> None:
    for number in range(3):
        await caller.enqueue(Lead(number), key=number)
    await caller.enqueue_many(
        (Lead(number) for number in range(25)), key=lambda lead: 100 + lead.id, chunk=10
    )
    assert stored(db) == (0, 0, 0, 0)
    await caller.rollback()
    assert stored(db) == (0, 0, 0, 0)

    for number in range(3):
        await caller.enqueue(Lead(number), key=number)
    await caller.enqueue_many(
        (Lead(number) for number in range(25)), key=lambda lead: 100 + lead.id, chunk=10
    )
    await caller.commit()
    assert stored(db) == (0, 28, 28, 28)


async def test_a_key_that_is_known_gives_its_first_run(caller: Caller, db: Db) -> None:
    first, created = await caller.enqueue(Lead(1), key="k")
    assert created
    await caller.commit()
    await caller.write("order 2")
    assert await caller.enqueue(Lead(2), key="k") == (first, False)
    known, unknown = await caller.enqueue_many(
        [Lead(3), Lead(4)], key=lambda lead: "k" if lead.id == 3 else None
    )
    assert known == (first, False)
    assert unknown[1]
    await caller.commit()
    assert stored(db) == (1, 2, 2, 1)


async def test_a_key_twice_in_one_transaction_gives_one_run(caller: Caller, db: Db) -> None:
    first, created = await caller.enqueue(Lead(1), key="k")
    assert (created, await caller.enqueue(Lead(1), key="k")) == (True, (first, False))
    await caller.commit()
    assert stored(db) == (0, 1, 1, 1)


async def test_a_concurrent_first_inserter_that_commits_wins(
    caller: Caller, database_url: str, db: Db
) -> None:
    with connect(database_url, application_name="other", autocommit=False) as other:
        first = Client(NOWHERE).enqueue(welcome, Lead(1), key="k", tx=other)
        await caller.write("order 2")
        second = asyncio.create_task(caller.enqueue(Lead(2), key="k"))
        await waits_for_a_lock(db)
        other.commit()
        assert await second == (first.id, False)
    await caller.write("order 3")  # the transaction has not been aborted
    await caller.commit()
    assert stored(db) == (2, 1, 1, 1)


async def test_a_concurrent_first_inserter_that_rolls_back_leaves_the_key(
    caller: Caller, database_url: str, db: Db
) -> None:
    with connect(database_url, application_name="other", autocommit=False) as other:
        first = Client(NOWHERE).enqueue(welcome, Lead(1), key="k", tx=other)
        await caller.write("order 2")
        second = asyncio.create_task(caller.enqueue(Lead(2), key="k"))
        await waits_for_a_lock(db)
        other.rollback()
        run, created = await second
        assert created
        assert run != first.id
    await caller.write("order 3")
    await caller.commit()
    assert stored(db) == (2, 1, 1, 1)


async def test_cancel_joins_as_well(caller: Caller, db: Db) -> None:
    run, _ = await caller.enqueue(Lead(1))
    await caller.commit()
    assert await caller.cancel(run)
    await caller.rollback()
    assert stored(db) == (0, 1, 1, 0)
    assert await caller.cancel(run)
    await caller.commit()
    assert stored(db) == (0, 1, 2, 0)


async def test_signal_joins_as_well(caller: Caller, db: Db) -> None:
    run, _ = await caller.enqueue(Lead(1))
    assert await caller.signal(run, "with the run itself")
    await caller.commit()
    assert await caller.signal(run, "rolled back")
    await caller.rollback()
    with pytest.raises(PayloadError):
        await caller.signal(run, object())
    assert await caller.signal(run, {"by": "Ada", "share": "50 %"})
    await caller.commit()
    sent = db.execute(
        "select payload::text from stepwell.signals where name = '100 %' order by id"
    ).fetchall()
    assert sent == [('"with the run itself"',), ('{"by":"Ada","share":"50 %"}',)]
    assert stored(db) == (0, 1, 3, 0)


async def test_what_can_be_checked_is_refused_before_it_could_abort_the_transaction(
    caller: Caller, db: Db
) -> None:
    await caller.write("order 1")
    for options, error in (
        ({"priority": 10}, ConfigError),
        ({"delay": -1}, ConfigError),
        ({"queue": ""}, ConfigError),
        ({"key": "é" * 257}, PayloadError),
        ({"key": "a\0b"}, PayloadError),
        ({"labels": {"a": "\0"}}, PayloadError),
    ):
        with pytest.raises(error):
            await caller.enqueue(Lead(1), **options)
    with pytest.raises(PayloadError, match="name"):
        await caller.enqueue(Lead(1, name="\0"))
    await caller.commit()
    assert stored(db) == (1, 0, 0, 0)


async def test_a_savepoint_of_the_caller_takes_its_enqueue_back(caller: Caller, db: Db) -> None:
    await caller.enqueue(Lead(1), key="kept")
    await caller._call(lambda: caller._run_sql("savepoint s"))
    await caller.enqueue(Lead(2), key="taken back")
    await caller._call(lambda: caller._run_sql("rollback to savepoint s"))
    await caller.commit()
    assert one(db, "select string_agg(key, ',') from stepwell.keys") == "kept"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_database_without_the_schema_is_named(kind: str, empty_database_url: str) -> None:
    async with calling(kind, empty_database_url) as caller:
        with pytest.raises(SchemaError, match="stepwell migrate"):
            await caller.enqueue(Lead(1))
        await caller.rollback()


# -- peculiar connections ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["psycopg.Connection", "psycopg.AsyncConnection"])
async def test_a_connection_in_autocommit_mode_has_nothing_to_join(
    kind: str, database_url: str, db: Db
) -> None:
    async with calling(kind, database_url) as caller:
        if caller.is_async:
            await caller.tx.set_autocommit(True)
        else:
            caller.tx.autocommit = True
        with pytest.raises(ConfigError, match="autocommit"):
            await caller.enqueue(Lead(1))
        await caller._call(lambda: caller._run_sql("begin"))
        await caller.enqueue(Lead(1))
        await caller._call(lambda: caller._run_sql("rollback"))
        assert one(db, "select count(*) from stepwell.runs") == 0


def test_an_engine_in_autocommit_mode_has_nothing_to_join(database_url: str) -> None:
    engine = sa.create_engine(sqlalchemy_url(database_url), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, pytest.raises(ConfigError, match="autocommit"):
        Client(NOWHERE).enqueue(welcome, Lead(1), tx=connection)
    engine.dispose()


def test_the_row_factory_of_a_connection_does_not_matter(database_url: str) -> None:
    with connect(database_url, application_name="caller", autocommit=False) as connection:
        connection.row_factory = dict_row  # type: ignore[assignment]  # any factory at run time
        assert Client(NOWHERE).enqueue(welcome, Lead(1), tx=connection).created


def test_a_connection_that_streams_its_results_enqueues_all_the_same(database_url: str, db: Db) -> None:
    engine = sa.create_engine(sqlalchemy_url(database_url))
    with engine.connect().execution_options(stream_results=True) as connection:
        Client(NOWHERE).enqueue(welcome, Lead(1), tx=connection)
        connection.commit()
    engine.dispose()
    assert one(db, "select count(*) from stepwell.runs") == 1


def test_scoped_sessions_are_joined(database_url: str, db: Db) -> None:
    engine = sa.create_engine(sqlalchemy_url(database_url))
    session = scoped_session(sessionmaker(engine))
    Client(NOWHERE).enqueue(welcome, Lead(1), tx=session)
    session.commit()
    session.remove()
    engine.dispose()
    assert one(db, "select count(*) from stepwell.runs") == 1


async def test_asynchronous_scoped_sessions_are_joined(database_url: str, db: Db) -> None:
    engine = create_async_engine(sqlalchemy_url(database_url))
    session = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
    await AsyncClient(NOWHERE).enqueue(welcome, Lead(1), tx=session)
    await session.commit()
    await session.remove()
    await engine.dispose()
    assert one(db, "select count(*) from stepwell.runs") == 1


async def test_a_sync_client_inside_run_sync_joins_the_async_session(database_url: str, db: Db) -> None:
    engine = create_async_engine(sqlalchemy_url(database_url))
    async with AsyncSession(engine) as session:
        await session.run_sync(lambda inner: Client(NOWHERE).enqueue(welcome, Lead(1), tx=inner))
        await session.commit()
    await engine.dispose()
    assert one(db, "select count(*) from stepwell.runs") == 1


def test_a_serializable_caller_may_see_a_serialization_failure(database_url: str) -> None:
    with (
        connect(database_url, application_name="caller", autocommit=False) as caller,
        connect(database_url, application_name="other", autocommit=False) as other,
    ):
        caller.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        caller.execute("select count(*) from stepwell.runs")
        Client(NOWHERE).enqueue(welcome, Lead(1), key="k", tx=other)
        other.commit()
        with pytest.raises(psycopg.errors.SerializationFailure):
            Client(NOWHERE).enqueue(welcome, Lead(2), key="k", tx=caller)


# -- wrong pairings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_says_which_client_takes_the_transaction(kind: str, database_url: str) -> None:
    async with calling(kind, database_url) as caller:
        wanted = "AsyncClient" if caller.is_async else "Client"
        wrong: Any = Client(NOWHERE) if caller.is_async else AsyncClient(NOWHERE)
        with pytest.raises(ConfigError, match=rf"got {kind.partition('.')[0]}.*; {wanted} takes this one"):
            await wrong.enqueue(welcome, Lead(1), tx=caller.tx)


@pytest.mark.parametrize("tx", ["begin", object(), 17])
async def test_anything_else_is_no_transaction(tx: Any) -> None:
    with pytest.raises(ConfigError, match="tx= of Client takes a psycopg Connection"):
        Client(NOWHERE).enqueue(welcome, Lead(1), tx=tx)
    with pytest.raises(ConfigError, match="tx= of AsyncClient takes a psycopg AsyncConnection"):
        await AsyncClient(NOWHERE).enqueue(welcome, Lead(1), tx=tx)


def test_another_database_or_driver_is_named() -> None:
    engine = sa.create_engine("sqlite://")
    with (
        engine.connect() as connection,
        pytest.raises(ConfigError, match=r"sqlite\+pysqlite.*postgresql\+psycopg"),
    ):
        Client(NOWHERE).enqueue(welcome, Lead(1), tx=connection)
    engine.dispose()


def sqlalchemy_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)
