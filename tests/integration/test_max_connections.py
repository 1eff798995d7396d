"""A server without a free connection: what everybody says, and how soon they go on when there is room."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox import AsyncClient, Client, runners
from outbox.database import connect, is_full
from outbox.pools import async_pool, pool
from tests import postgres
from tests.postgres import Cluster
from tests.waiting import wait_until, wait_until_async
from worker.telemetry.exporter import DatabaseMetrics

pytestmark = pytest.mark.direct("a pooler would have connections left")

Db = psycopg.Connection[TupleRow]
MOST = 24
SOON_SECONDS = 3.0
"""Nobody waits longer than two seconds between two attempts."""

APP = """
import psycopg
from worker import transaction, workflow

@transaction
def save(connection: psycopg.Connection) -> int:
    return connection.execute("select 1").fetchone()[0]

@workflow
async def saving() -> int:
    return save()
"""


@pytest.fixture(scope="module")
def small(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server of the test's own with few connections."""
    with postgres.running(request.config.getoption("--postgres"), max_connections=str(MOST)) as started:
        started.make_template()
        yield started


@pytest.fixture
def url(small: Cluster) -> Iterator[str]:
    with small.database() as created:
        yield created


@contextmanager
def crowded(url: str) -> Iterator[ExitStack]:
    """Take every connection of the server; all of them are given back when the stack is closed."""
    with ExitStack() as crowd:
        while _joins(crowd, url):
            pass
        yield crowd


def _joins(crowd: ExitStack, url: str) -> bool:
    try:
        crowd.enter_context(psycopg.connect(url, autocommit=True, application_name="crowd"))
    except psycopg.OperationalError as error:
        if not is_full(error):
            raise
        return False
    return True


def test_what_the_server_says_is_known_for_what_it_is(url: str) -> None:
    with crowded(url), pytest.raises(psycopg.OperationalError) as raised:
        connect(url, application_name="test")
    assert is_full(raised.value)


@pytest.mark.parametrize(
    "said",
    [
        "FATAL:  sorry, too many clients already",
        "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
        'FATAL:  too many connections for role "shop"',
        'FATAL:  too many connections for database "shop"',
        "FATAL:  no more connections allowed (max_client_conn)",
        "FATAL:  server login has been failing, cached error: sorry, too many clients already (server_login_retry)",
    ],
)
def test_so_is_what_others_say(said: str) -> None:
    assert is_full(psycopg.OperationalError(f'connection to server at "db", port 5432 failed: {said}'))
    assert not is_full(psycopg.OperationalError("connection refused"))


# -- clients -----------------------------------------------------------------------------------------


def test_a_client_waits_for_room_and_goes_on_as_soon_as_there_is(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[float] = []

    def enqueue() -> None:
        with Client(url) as client:
            client.enqueue("w", {}, key=1)
        made.append(time.monotonic())

    with crowded(url) as crowd, caplog.at_level(logging.WARNING):
        enqueuing = threading.Thread(target=enqueue)
        enqueuing.start()
        wait_until(lambda: [each for each in caplog.records if each.name == "outbox.database"])
        assert not made
        crowd.close()
        left = time.monotonic()
        enqueuing.join(20)
    assert made[0] - left < SOON_SECONDS
    (said,) = [each.getMessage() for each in caplog.records if each.name == "outbox.database"]
    assert said.startswith("the database has no connection left for this process, trying again: ")
    assert "too many clients" in said
    assert "\n" not in said


async def test_a_client_gives_up_with_the_reason(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "GIVE_UP_SECONDS", 0.2)
    with crowded(url):
        with Client(url) as client, pytest.raises(psycopg.OperationalError, match="too many clients"):
            client.enqueue("w", {})
        async with AsyncClient(url) as other:
            with pytest.raises(psycopg.OperationalError, match="too many clients"):
                await other.enqueue("w", {})


async def test_also_once_it_has_a_pool_and_no_connection_in_it(
    url: str, small: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "GIVE_UP_SECONDS", 0.2)
    monkeypatch.setattr(runners, "POOL_WAIT_SECONDS", 0.5)
    with Client(url) as client:
        async with AsyncClient(url) as other:
            client.enqueue("w", {})
            await other.enqueue("w", {})
            ending = "select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name = 'stepwell client'"
            small.execute(ending)
            with crowded(url):
                with pytest.raises(psycopg.OperationalError, match="too many clients"):
                    client.enqueue("w", {})
                with pytest.raises(psycopg.OperationalError, match="too many clients"):
                    await other.enqueue("w", {})
            # A pool looks again after three seconds at the most, which is longer than it is waited for here.
            async with asyncio.timeout(30):
                while not _is_let_in(client) or not await _is_let_in_async(other):
                    pass


def _is_let_in(client: Client) -> bool:
    try:
        client.enqueue("w", {})
    except psycopg.OperationalError:
        return False
    return True


async def _is_let_in_async(client: AsyncClient) -> bool:
    try:
        await client.enqueue("w", {})
    except psycopg.OperationalError:
        return False
    return True


def test_a_client_whose_connections_are_all_in_use_says_that(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWELL_CONNECTIONS", "1")
    monkeypatch.setattr(runners, "GIVE_UP_SECONDS", 0.2)
    monkeypatch.setattr(runners, "POOL_WAIT_SECONDS", 0.2)
    with Client(url) as client:
        client.enqueue("w", {})
        pool = client._runner._opened()
        with pool.connection(), pytest.raises(psycopg.OperationalError) as raised:
            client.enqueue("w", {})
    assert "all 1 connections of this client have been in use" in str(raised.value)
    assert "STEPWELL_CONNECTIONS" in str(raised.value)


async def test_pools_find_room_as_soon_as_there_is_however_long_there_was_none(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """psycopg's own pools wait twice as long after each attempt: after five of them, half a minute."""

    def attempts(name: str) -> int:
        return sum(f"error connecting in '{name}'" in each.getMessage() for each in caplog.records)

    with (
        crowded(url) as crowd,
        caplog.at_level(logging.WARNING, "psycopg.pool"),
        pool(url, application_name="steps", max_size=2, wait_seconds=60) as several,
    ):
        async with async_pool(url, application_name="async steps", max_size=2, wait_seconds=60) as many:
            found: list[float] = []

            def want() -> None:
                with several.connection():
                    found.append(time.monotonic())

            wanting = threading.Thread(target=want)
            wanting.start()
            other = asyncio.create_task(many.getconn())
            await wait_until_async(lambda: attempts("steps") >= 5 and attempts("async steps") >= 5)
            crowd.close()
            left = time.monotonic()
            connection = await asyncio.wait_for(other, 30)
            found.append(time.monotonic())
            await many.putconn(connection)
            await asyncio.to_thread(wanting.join, 30)
    assert len(found) == 2
    assert max(found) - left < SOON_SECONDS


# -- commands ----------------------------------------------------------------------------------------


def test_a_command_says_so_in_a_sentence(url: str) -> None:
    environment = {**os.environ, "STEPWELL_DATABASE_URL": url}
    with crowded(url):
        for command in (["runs", "list"], ["migrate"], ["enqueue", "w", "{}", "--allow-unknown"]):
            done = subprocess.run(
                [sys.executable, "-m", "worker.cli", *command],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 1, done.stderr
            (line,) = done.stderr.strip().splitlines()
            assert line.startswith("stepwell: the database has no connection left (")
            assert "too many clients" in line


# -- workers -----------------------------------------------------------------------------------------


@contextmanager
def worker(url: str, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    (home / "saving_flows.py").write_text(APP)
    environment = {**os.environ, "STEPWELL_DATABASE_URL": url, "STEPWELL_CONNECTIONS": "2"}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "worker", str(home / "saving_flows.py")],
            env=environment, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (home / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def succeeded(db: Db, runs: int) -> bool:
    return db.execute("select count(*) from stepwell.runs where state = 'succeeded'").fetchone() == (runs,)


def test_workers_that_find_no_room_wait_and_start_when_there_is(url: str, tmp_path: Path) -> None:
    with connect(url, application_name="test") as db:
        db.execute("select stepwell.enqueue('saving')")
        with crowded(url) as crowd, worker(url, tmp_path) as process:
            wait_until(lambda: "too many clients" in (tmp_path / "log").read_text(), 60)
            assert process.poll() is None
            crowd.close()
            wait_until(lambda: succeeded(db, 1), 60)
    lines = (tmp_path / "log").read_text().splitlines()
    told = [line for line in lines if "no connection left" in line]
    assert told
    assert all("too many clients" in line for line in told)
    assert len(told) <= 3, "each who needs a connection says it once"
    assert "Traceback" not in "".join(lines)


def test_workers_that_lose_their_connections_to_others_go_on_when_there_is_room_again(
    url: str, small: Cluster, tmp_path: Path
) -> None:
    with connect(url, application_name="test") as db, worker(url, tmp_path) as process:
        db.execute("select stepwell.enqueue('saving')")
        wait_until(lambda: succeeded(db, 1), 60)
        ours = "pg_stat_activity where application_name ~ '^stepwell' and datname = current_database()"
        with crowded(url) as crowd:
            # Each place that becomes free is taken before the worker is back.
            while db.execute(f"select count(*) from {ours}".encode()).fetchone() != (0,):
                db.execute(f"select pg_terminate_backend(pid, 1000) from {ours}".encode())
                with crowded(url) as more:
                    crowd.enter_context(more.pop_all())
            db.execute("select stepwell.enqueue('saving') from generate_series(1, 20)")
            wait_until(lambda: "no connection left" in (tmp_path / "log").read_text(), 60)
            assert process.poll() is None
            crowd.close()
            left = time.monotonic()
            wait_until(lambda: succeeded(db, 21), 60)
        assert time.monotonic() - left < 4 * SOON_SECONDS
    log = (tmp_path / "log").read_text()
    assert "another takes its place" not in log, "nobody gave up over it"
    assert "Traceback" not in log


def test_the_exporter_says_why_it_has_nothing(url: str) -> None:
    with crowded(url) as crowd:
        metrics = DatabaseMetrics(url)
        metrics.start()
        try:
            assert "too many clients" in str(metrics.problem())
            assert list(metrics.collect()) == []
            crowd.close()
            assert metrics.problem() is None
        finally:
            metrics.stop()
