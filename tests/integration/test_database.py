"""Connections: how they are set up, what counts as losing one, and how it is found again."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import psycopg
import psycopg_pool
import pytest
import sqlalchemy
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from outbox.database import (
    connect,
    connect_async,
    is_disconnect,
    parameters,
    retry_connecting,
    retry_connecting_async,
)
from outbox.errors import ConfigError
from outbox.pools import async_pool, pool
from tests.postgres import Cluster
from tests.waiting import wait_until

pytestmark = pytest.mark.direct(
    "it makes connections of every kind and breaks them; test_pooler.py has those of a pooler"
)

Connection = psycopg.Connection[TupleRow]

NOWHERE = "postgresql://postgres@/postgres?host=/nonexistent"
SETTINGS = (
    "select current_setting('timezone'), current_setting('client_connection_check_interval'), "
    "current_setting('client_encoding'), current_setting('application_name'), "
    "current_setting('statement_timeout')"
)
AS_STORED = """select '{"b": 1e16,  "a": null}'::json, '{"b": 1,  "a": null}'::jsonb"""
AS_READ = ('{"b": 1e16,  "a": null}', {"b": 1, "a": None})


# -- how a connection is set up ------------------------------------------------------------------------


async def test_every_way_to_connect_gives_the_same_session(database_url: str) -> None:
    expected = ("UTC", "1s", "UTF8", "me", "0")
    with connect(database_url, application_name="me") as one:
        assert one.execute(SETTINGS).fetchone() == expected
        assert one.execute(AS_STORED).fetchone() == AS_READ
    async with await connect_async(database_url, application_name="me") as other:
        assert await (await other.execute(SETTINGS)).fetchone() == expected
        assert await (await other.execute(AS_STORED)).fetchone() == AS_READ
    with pool(database_url, application_name="me", max_size=1) as several, several.connection() as one:
        assert one.execute(SETTINGS).fetchone() == expected
        assert one.execute(AS_STORED).fetchone() == AS_READ
    async with (
        async_pool(database_url, application_name="me", max_size=1) as many,
        many.connection() as other,
    ):
        assert await (await other.execute(SETTINGS)).fetchone() == expected
        assert await (await other.execute(AS_STORED)).fetchone() == AS_READ


def test_json_is_exact_in_binary_too(db: Connection) -> None:
    assert db.cursor(binary=True).execute(AS_STORED).fetchone() == AS_READ


async def test_user_code_may_get_json_decoded(database_url: str) -> None:
    decoded = ({"b": 1e16, "a": None}, {"b": 1, "a": None})
    with connect(database_url, application_name="me", json_as_text=False) as one:
        assert one.execute(AS_STORED).fetchone() == decoded
    with (
        pool(database_url, application_name="me", max_size=1, json_as_text=False) as several,
        several.connection() as one,
    ):
        assert one.execute(AS_STORED).fetchone() == decoded


async def test_autocommit_is_the_callers_choice(database_url: str) -> None:
    with connect(database_url, application_name="me", autocommit=False) as one:
        assert not one.autocommit
        assert one.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    async with (
        async_pool(database_url, application_name="me", max_size=1, autocommit=False) as many,
        many.connection() as other,
    ):
        assert not other.autocommit


def test_the_url_wins_over_the_defaults_but_not_over_the_application_name() -> None:
    url = (
        "postgresql://u@h1:1,h2:2/db?target_session_attrs=read-write&connect_timeout=9&application_name=other"
    )
    assert conninfo_to_dict(parameters(url, "me")) == {
        "user": "u",
        "host": "h1,h2",
        "port": "1,2",
        "dbname": "db",
        "target_session_attrs": "read-write",
        "connect_timeout": "9",
        "application_name": "me",
        "client_encoding": "UTF8",
        "keepalives": "1",
        "keepalives_idle": "5",
        "keepalives_interval": "2",
        "keepalives_count": "3",
        "tcp_user_timeout": "10000",
    }


async def test_the_second_of_two_hosts_is_tried(database_url: str) -> None:
    url = database_url.replace("?host=", "?host=/nonexistent,").replace("&port=5432", "&port=5432,5432")
    connect(url, application_name="me").close()
    await (await connect_async(url, application_name="me")).close()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:se%zzcret@localhost/db",
        "postgresql://me:se@cret@localhost/db",
        "postgresql://me:se/cret@localhost/db",
        "postgresql://me:12/cret@localhost/db",
        "host=localhost password='secret",
    ],
)
def test_no_piece_of_a_badly_written_password_is_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="percent-encoded") as raised:
        connect(url, application_name="me")
    assert "cret" not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_a_refused_password_is_not_repeated(database_url: str) -> None:
    url = database_url.replace("postgres@", "nobody:secret@")
    with pytest.raises(psycopg.OperationalError) as raised:
        connect(url, application_name="me")
    assert "secret" not in str(raised.value)


def test_the_server_drops_a_statement_whose_client_has_gone(db: Connection, database_url: str) -> None:
    running = "select count(*) from pg_stat_activity where application_name = 'gone' and state = 'active'"
    leaver = connect(database_url, application_name="gone")
    leaver.pgconn.send_query(b"select pg_sleep(600)")
    wait_until(lambda: db.execute(running).fetchone() == (1,))
    leaver.pgconn.finish()
    wait_until(lambda: db.execute(running).fetchone() == (0,))


# -- what counts as losing it --------------------------------------------------------------------------


def error_of(operation: Callable[[], object]) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as raised:
        operation()
    return raised.value


def test_a_terminated_session_is_a_disconnect(db: Connection, database_url: str) -> None:
    with connect(database_url, application_name="victim") as victim:
        db.execute("select pg_terminate_backend(%s)", [victim.info.backend_pid])
        assert is_disconnect(error_of(lambda: victim.execute("select pg_sleep(60)")))
        assert is_disconnect(error_of(lambda: victim.execute("select 1")))


def test_a_session_ended_by_a_timeout_is_a_disconnect(db: Connection, database_url: str) -> None:
    with connect(database_url, application_name="idler") as idler:
        idler.execute("set idle_in_transaction_session_timeout = '10ms'")
        idler.execute("begin")
        here = "select count(*) from pg_stat_activity where application_name = 'idler'"
        wait_until(lambda: db.execute(here).fetchone() == (0,))
        assert is_disconnect(error_of(lambda: idler.execute("select 1")))


def test_a_crash_of_the_server_is_a_disconnect(cluster: Cluster, database_url: str) -> None:
    with connect(database_url, application_name="victim") as victim:
        cluster.restart("immediate")
        assert is_disconnect(error_of(lambda: victim.execute("select 1")))
        assert is_disconnect(error_of(lambda: victim.execute("select 1")))


def test_an_unreachable_server_is_a_disconnect() -> None:
    assert is_disconnect(error_of(lambda: connect(NOWHERE, application_name="me")))
    assert is_disconnect(
        error_of(lambda: connect("postgresql://no-such-host.invalid/db", application_name="me"))
    )
    assert is_disconnect(error_of(lambda: connect("postgresql://127.0.0.1:1/db", application_name="me")))


def test_a_server_without_a_free_slot_is_a_disconnect(db: Connection, database_url: str) -> None:
    db.execute("create role crowd login connection limit 0")
    try:
        url = database_url.replace("postgres@", "crowd@")
        assert is_disconnect(error_of(lambda: connect(url, application_name="me")))
    finally:
        db.execute("drop role crowd")


def test_a_refusal_is_not_a_disconnect(cluster: Cluster) -> None:
    url = cluster.url("no_such_database")
    assert not is_disconnect(error_of(lambda: connect(url, application_name="me")))
    url = cluster.url().replace("postgres@", "no_such_role@")
    assert not is_disconnect(error_of(lambda: connect(url, application_name="me")))


@pytest.mark.parametrize(
    "statement",
    [
        "selec",
        "select 1/0",
        "set statement_timeout = '1ms'; select pg_sleep(1)",
        "do $$ begin raise serialization_failure; end $$",
        "do $$ begin raise deadlock_detected; end $$",
        "do $$ begin raise disk_full; end $$",
        "do $$ begin raise internal_error; end $$",
    ],
)
def test_an_error_of_a_statement_is_not_a_disconnect(db: Connection, statement: str) -> None:
    assert not is_disconnect(error_of(lambda: db.execute(statement.encode())))


def test_an_answer_that_nobody_has_asked_for_is_a_disconnect() -> None:
    assert is_disconnect(psycopg.InternalError("received 2 results from command 'BEGIN'"))


def test_other_errors_are_not_disconnects(database_url: str) -> None:
    assert not is_disconnect(ConnectionError())
    closed = pool(database_url, application_name="me", max_size=1)
    with closed:
        pass
    assert not is_disconnect(error_of(closed.getconn))


def test_a_disconnect_is_seen_through_sqlalchemy(db: Connection, database_url: str) -> None:
    engine = sqlalchemy.create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as victim:
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        with pytest.raises(sqlalchemy.exc.OperationalError) as raised:
            victim.execute(sqlalchemy.text("select 1"))
        assert is_disconnect(raised.value)
    with engine.connect() as connection, pytest.raises(sqlalchemy.exc.ProgrammingError) as wrong:
        connection.execute(sqlalchemy.text("selec"))
    assert not is_disconnect(wrong.value)
    engine.dispose()


# -- finding it again ------------------------------------------------------------------------------------


class Flaky:
    """Fails with `error` until it has been called `times` times."""

    def __init__(self, times: int, error: Exception) -> None:
        self.calls, self.times, self.error = 0, times, error

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "connected"

    async def later(self) -> str:
        return self()


GONE = psycopg.OperationalError("the connection is lost")


async def test_a_disconnect_is_repeated_until_it_works(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "outbox.database")
    assert retry_connecting(Flaky(3, GONE), give_up_after_seconds=None) == "connected"
    assert await retry_connecting_async(Flaky(3, GONE).later, give_up_after_seconds=30) == "connected"
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "WARNING", "INFO"]


async def test_any_other_error_is_raised_at_once() -> None:
    broken = Flaky(9, ValueError("mine"))
    with pytest.raises(ValueError, match="mine"):
        retry_connecting(broken, give_up_after_seconds=None)
    with pytest.raises(ValueError, match="mine"):
        await retry_connecting_async(broken.later, give_up_after_seconds=None)
    assert broken.calls == 2


async def test_the_last_error_is_raised_when_the_time_is_up() -> None:
    dead = Flaky(10**6, GONE)
    with pytest.raises(psycopg.OperationalError, match="is lost"):
        retry_connecting(dead, give_up_after_seconds=0.1)
    with pytest.raises(psycopg.OperationalError, match="is lost"):
        await retry_connecting_async(dead.later, give_up_after_seconds=0.1)
    assert dead.calls >= 4


def test_a_stop_ends_the_wait_at_once() -> None:
    stopping = threading.Event()
    dead = Flaky(10**6, GONE)

    def stop_soon() -> None:
        wait_until(lambda: dead.calls >= 3)
        stopping.set()

    stopper = threading.Thread(target=stop_soon)
    stopper.start()
    with pytest.raises(psycopg.OperationalError):
        retry_connecting(dead, give_up_after_seconds=None, stopping=stopping)
    stopper.join()
    assert dead.calls <= 4


async def test_cancelling_ends_an_endless_wait() -> None:
    waiting = asyncio.create_task(
        retry_connecting_async(Flaky(10**6, GONE).later, give_up_after_seconds=None)
    )
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_stopped_server_is_waited_for(cluster: Cluster, database_url: str) -> None:
    cluster.stop("immediate")
    starter = threading.Thread(target=cluster.start)
    opening = asyncio.create_task(
        retry_connecting_async(
            lambda: connect_async(database_url, application_name="me"), give_up_after_seconds=None
        )
    )
    starter.start()
    connection = await asyncio.wait_for(opening, 30)
    await connection.close()
    starter.join()


async def test_a_pool_survives_a_restart_of_the_server(cluster: Cluster, database_url: str) -> None:
    with pool(database_url, application_name="me", max_size=8, wait_seconds=5) as several:
        several.resize(8, 8)
        several.wait()
        async with async_pool(database_url, application_name="me", max_size=8, wait_seconds=5) as many:
            await many.resize(8, 8)
            await many.wait()
            cluster.restart("immediate")
            for _ in range(10):
                with several.connection() as one:
                    assert one.execute("select 1").fetchone() == (1,)
                async with many.connection() as other:
                    assert await (await other.execute("select 1")).fetchone() == (1,)


async def test_a_pool_hands_out_no_more_than_its_size(database_url: str) -> None:
    few = async_pool(database_url, application_name="me", max_size=2)
    async with few, few.connection(), few.connection():
        with pytest.raises(psycopg_pool.PoolTimeout):
            await few.getconn(timeout=0.1)
