"""Behind a real PgBouncer in transaction mode: everything is right, and nothing is left in a session for somebody else."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox import Client, ConfigError, schema, sessions
from outbox.database import connect, connect_async, is_full
from outbox.pools import async_pool, pool
from outbox.sessions import is_pooled
from outbox.settings import Settings
from tests.crash.proxy import Proxy
from tests.engines import Lab
from tests.integration.supervising import QUICK, lone_supervisor, supervising, until, workers
from tests.integration.test_engine_transaction_sessions import SPOILING, Visitor
from tests.pooler import Pooler, pooled
from tests.postgres import Cluster
from tests.transactional import KINDS, SYNC_AND_ASYNC, Business, notes
from tests.waiting import wait_until, wait_until_async
from worker import step, workflow
from worker.definitions import collecting
from worker.queries import load
from worker.supervision.liveness import end_backends, reclaim
from worker.supervision.supervisor import Supervisor
from worker.telemetry import exporter as exporting
from worker.telemetry.exporter import DatabaseMetrics
from worker.testing import StepwellTest
from worker.testing.servers import Server

Db = psycopg.Connection[TupleRow]

ROUND = 12
"""So many transactions in a row have every session of a pool, whose sessions take turns, at least once."""


@pytest.fixture
def around(cluster: Cluster) -> Iterator[str]:
    """The way to a fresh database that leads around the pooler."""
    with cluster.database() as url:
        yield url


@pytest.fixture
def through(bouncer: Pooler, around: str) -> str:
    """The way to the same database that leads through it."""
    return bouncer.warmed(around)


@pytest.fixture
def looking(around: str) -> Iterator[Db]:
    with connect(around, application_name="test") as connection:
        yield connection


def everywhere(url: str, statement: str) -> set[Any]:
    """Return what a client of its own, not one of ours, is answered in each session of the pool."""
    with psycopg.connect(
        url, autocommit=True, prepare_threshold=None, application_name="a service"
    ) as client:
        rows = [
            client.execute(f"select pg_backend_pid(), ({statement})::text".encode()).fetchone()
            for _ in range(ROUND)
        ]
    assert len({row[0] for row in rows if row}) > 1, "the sessions did not take turns"
    return {row[1] for row in rows if row}


# -- connections -------------------------------------------------------------------------------------


async def test_a_pooler_is_known_for_one_and_nothing_is_prepared_there(through: str, around: str) -> None:
    """Each prepared statement would be missing in one session, or be there already in another."""
    with connect(around, application_name="test") as plain:
        assert not is_pooled(plain)
    statement = "select pg_backend_pid(), %s::int"
    with connect(through, application_name="test") as one:
        assert is_pooled(one)
        rows = [one.execute(statement, [n], prepare=True).fetchone() for n in range(ROUND)]
        assert len({row[0] for row in rows if row}) > 1
    async with await connect_async(through, application_name="test") as other:
        assert is_pooled(other)
        for n in range(ROUND):
            await other.execute(statement, [n], prepare=True)
    with pool(through, application_name="test", max_size=1) as several, several.connection() as one:
        assert is_pooled(one)
        rows = [one.execute(statement, [n]).fetchone() for n in range(ROUND)]
        assert {row[1] for row in rows if row} == set(range(ROUND))
    async with async_pool(through, application_name="test", max_size=1) as many, many.connection() as other:
        assert is_pooled(other)


def defaults(db: Db, setting: str) -> None:
    """Have new sessions of a database begin with a setting."""
    db.execute(
        f"do $$ begin execute format('alter database %I set {setting}', current_database()); end $$".encode()
    )


def test_connecting_changes_nothing_for_other_clients_of_the_pooler(
    bouncer: Pooler, around: str, looking: Db
) -> None:
    defaults(looking, "timezone = ''Asia/Tokyo''")
    through = bouncer.warmed(around)
    with ExitStack() as stack:
        ours = [stack.enter_context(connect(through, application_name="stepwell client")) for _ in range(4)]
        for _ in range(ROUND):
            for each in ours:
                assert each.execute("show timezone").fetchone() == ("UTC",)
                assert str(each.info.timezone) == "UTC"
        assert everywhere(through, "current_setting('timezone')") == {"Asia/Tokyo"}
        assert everywhere(through, "current_setting('client_connection_check_interval')") == {"0"}
        assert everywhere(through, "current_setting('application_name')") == {"a service"}


def test_no_session_of_the_pool_bears_the_name_of_a_worker(through: str, looking: Db) -> None:
    with connect(through, application_name="stepwell 123") as worker:
        names = {worker.execute("show application_name").fetchone() for _ in range(ROUND)}
        assert names == {("stepwell worker",)}
        named = "select count(*) from pg_stat_activity where application_name = 'stepwell 123'"
        assert looking.execute(named).fetchone() == (0,)


def test_a_database_that_is_not_there_is_a_refusal_and_not_waited_for(
    bouncer: Pooler, cluster: Cluster
) -> None:
    with (
        pytest.raises(psycopg.OperationalError) as raised,
        Client(bouncer.url(cluster.url("no_such"))) as client,
    ):
        client.cancel("00000000-0000-7000-8000-000000000000")
    assert "no_such" in str(raised.value)


def test_a_migration_leaves_no_lock_and_no_time_out_behind(bouncer: Pooler, cluster: Cluster) -> None:
    with cluster.database(template=None) as empty:
        url = bouncer.warmed(empty)
        with connect(url, application_name="test") as connection:
            assert schema.migrate(connection) == [f"{schema.SCHEMA_VERSION} schema"]
            assert schema.migrate(connection) == []
        assert everywhere(url, "current_setting('lock_timeout')") == {"0"}
        with connect(empty, application_name="test") as direct:
            assert advisory_locks(direct) == 0


def advisory_locks(db: Db) -> int:
    """Return how many there are, but for those that a claim or a flush of a worker holds for a moment: they are negative."""
    row = db.execute(
        "select count(*) from pg_locks l join pg_database d on d.oid = l.database"
        " where l.locktype = 'advisory' and d.datname = current_database()"
        " and (l.classid::bigint << 32) | l.objid::bigint > 0"
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_the_testing_kit_asks_for_the_database_itself(through: str) -> None:
    with pytest.raises(ConfigError, match="leads through a connection pooler"):
        StepwellTest(through)
    with pytest.raises(ConfigError, match="leads through a connection pooler"), Server(through):
        pass


# -- engines -----------------------------------------------------------------------------------------


def counting(executions: list[int]) -> Any:
    with collecting() as registry:

        @step
        async def count(n: int) -> int:
            executions.append(n)
            return n

        @workflow
        async def counted(n: int) -> int:
            return await count(n) + await count(n)

    return registry, counted


async def test_an_idle_worker_without_a_session_of_its_own_polls_and_asks_nobody_to_ring(
    through: str, around: str
) -> None:
    executions: list[int] = []
    registry, counted = counting(executions)
    async with Lab(through) as lab:
        async with lab.engine(registry, poll_seconds=0.2):
            for n in range(5):
                assert await lab.succeeded(await lab.enqueue(counted, {"n": n})) == 2 * n
            assert await lab.execute("select count(*) from stepwell.doorbell") == [(0,)]
        async with lab.engine(
            registry, direct_database_url=around, poll_seconds=3600.0, doorbell_seconds=7200.0
        ):
            await wait_until_async(lambda: _leased(lab))
            assert await lab.succeeded(await lab.enqueue(counted, {"n": 7}), timeout=10) == 14, (
                "it was rung for"
            )
    assert len(executions) == 12


async def _leased(lab: Lab) -> bool:
    return bool(await lab.execute("select 1 from stepwell.doorbell where until > now()"))


async def test_a_cancellation_is_noticed_without_a_ring(through: str) -> None:
    begun = asyncio.Event()
    with collecting() as registry:

        @step
        async def endless() -> None:
            begun.set()
            await asyncio.Event().wait()

        @workflow
        async def waiting() -> None:
            await endless()

    async with Lab(through) as lab, lab.engine(registry):
        run = await lab.enqueue(waiting)
        await begun.wait()
        assert await lab.cancel(run)
        assert (await lab.ended(run, timeout=10)).state == "cancelled"


def has_reached(executions: list[int], many: int) -> bool:
    return len(executions) >= many


async def test_many_runs_are_executed_once_while_the_pooler_is_killed_and_started_again(
    cluster: Cluster, bouncer: Pooler, around: str
) -> None:
    executions: list[int] = []
    registry, counted = counting(executions)
    with pooled(cluster, around) as (own, url):
        async with Lab(url) as lab, lab.engine(registry, poll_seconds=0.1):
            await lab.enqueue_many(counted, [{"n": n} for n in range(300)])
            for at in (100, 300):
                await wait_until_async(partial(has_reached, executions, at))
                own.kill()
                await asyncio.to_thread(own.run)
            await lab.all_succeeded(300)
    assert sorted(executions) == sorted([*range(300)] * 2), "no step that was recorded ran again"


# -- transactional steps -----------------------------------------------------------------------------


ONE_SESSION = {"default_pool_size": "1", "min_pool_size": "1"}


@contextmanager
def one_session(cluster: Cluster, around: str) -> Iterator[str]:
    """A pooler that has one session for everybody: whatever a step leaves in it the next client finds."""
    with pooled(cluster, around, **ONE_SESSION) as (_, url):
        yield url


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_a_step_does_to_its_session_nobody_else_finds(
    cluster: Cluster, bouncer: Pooler, around: str, kind: str
) -> None:
    visitor = Visitor(kind)
    with one_session(cluster, around) as url:
        async with Lab(url) as lab:
            await lab.execute("create table crm (id serial primary key, note text, tx bigint)")
            async with lab.engine(visitor.business.registry, connections=1, poll_seconds=0.1):
                flow = visitor.business.flow
                before = await lab.succeeded(await lab.enqueue(flow, {"follow": "nothing"}))
                visitor.todo = SPOILING
                await lab.succeeded(await lab.enqueue(flow, {"note": "spoilt", "follow": "nothing"}))
                visitor.todo = ()
                after = await lab.succeeded(
                    await lab.enqueue(flow, {"note": "innocent", "follow": "nothing"})
                )
            assert after == before
            assert len(set(visitor.backends)) == 1, "it was the same session"
            assert await notes(lab) == ["x", "spoilt", "innocent"]
        with psycopg.connect(url, autocommit=True, prepare_threshold=None, application_name="test") as client:
            assert client.execute("select current_setting('app.tenant', true)").fetchone() in ((None,), ("",))


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_nor_what_a_step_has_done_that_failed(
    cluster: Cluster, bouncer: Pooler, around: str, kind: str
) -> None:
    """What was set is undone by the rollback itself. A lock of the session is not."""
    visitor = Visitor(kind)
    with one_session(cluster, around) as url:
        async with Lab(url) as lab:
            await lab.execute("create table crm (id serial primary key, note text, tx bigint)")
            async with lab.engine(visitor.business.registry, connections=1, poll_seconds=0.1):
                flow = visitor.business.flow
                before = await lab.succeeded(await lab.enqueue(flow, {"follow": "nothing"}))
                visitor.todo = (*SPOILING, "select 1 / 0")
                failed = await lab.ended(await lab.enqueue(flow, {"note": "spoilt", "follow": "nothing"}))
                assert failed.state == "failed"
                visitor.todo = ()
                assert await lab.succeeded(await lab.enqueue(flow, {"follow": "nothing"})) == before
            assert await notes(lab) == ["x", "x"]
            assert await lab.execute(
                "select count(*) from pg_locks l join pg_database d on d.oid = l.database"
                " where l.locktype = 'advisory' and d.datname = current_database()"
            ) == [(0,)]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_step_that_has_committed_holds_no_session_however_late_its_client_says_its_last_word(
    cluster: Cluster, bouncer: Pooler, around: str, kind: str
) -> None:
    """A Flush behind the COMMIT would: a pooler lends a session for it, and nothing answers it."""
    visitor = Visitor(kind)
    flow = visitor.business.flow
    with pooled(cluster, around, **ONE_SESSION) as (own, url):
        database = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
        with Proxy(cluster, own.socket, in_turn=True) as slow:
            async with Lab(url) as lab:
                await lab.execute("create table crm (id serial primary key, note text, tx bigint)")
                engine = lab.start(
                    visitor.business.registry, url=slow.url(str(database)), connections=1, poll_seconds=0.1
                )
                try:
                    for n in range(3):
                        note = {"note": str(n), "follow": "nothing"}
                        await lab.succeeded(await lab.enqueue(flow, note), timeout=10)
                    await engine.drain()
                finally:
                    await engine.destroy()
                assert await notes(lab) == ["0", "1", "2"]


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_session_that_cannot_be_given_back_takes_nothing_back_of_what_was_committed(
    cluster: Cluster, bouncer: Pooler, around: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = sessions._commit_and_reset
    spoilt: list[str] = []

    def failing(statement: LiteralString) -> LiteralString:
        if spoilt:
            return message(statement)
        spoilt.append(statement)
        return f"{message(statement)};\nselect 1 / 0"

    monkeypatch.setattr(sessions, "_commit_and_reset", failing)
    business = Business(kind)
    with one_session(cluster, around) as url:
        async with Lab(url) as lab:
            await lab.execute("create table crm (id serial primary key, note text, tx bigint)")
            async with lab.engine(business.registry, poll_seconds=0.1):
                assert await lab.succeeded(await lab.enqueue(business.flow)) == "saved x and went on"
                assert await lab.succeeded(await lab.enqueue(business.flow)) == "saved x and went on"
            assert await notes(lab) == ["x", "x"]
    assert spoilt
    assert business.executions == 2


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_step_that_acts_as_another_role_leaves_it(
    cluster: Cluster, bouncer: Pooler, around: str, kind: str
) -> None:
    visitor = Visitor(kind)
    visitor.todo = ("set role pg_monitor", "select current_user")
    with one_session(cluster, around) as url:
        async with Lab(url) as lab:
            await lab.execute("create table crm (id serial primary key, note text, tx bigint)")
            async with lab.engine(visitor.business.registry, poll_seconds=0.1):
                assert await lab.succeeded(await lab.enqueue(visitor.business.flow)) == "saved x and went on"
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as client:
            assert client.execute("select current_user").fetchone() == ("postgres",)


@pytest.mark.parametrize("loose", ["off", "local"])
async def test_a_completion_is_durable_whatever_the_role_has_for_its_default(
    cluster: Cluster, bouncer: Pooler, around: str, looking: Db, loose: str
) -> None:
    """A pooler lends sessions that cannot be set for good. The server crashes when the next step has begun (I7)."""
    defaults(looking, f"synchronous_commit = {loose}")
    cluster.execute("alter system set wal_writer_delay = '10s'")
    cluster.execute("select pg_reload_conf()")
    executions: list[int] = []
    released = asyncio.Event()
    with collecting() as registry:

        @step
        async def first() -> None:
            executions.append(1)

        @step
        async def second() -> None:
            executions.append(2)
            await released.wait()

        @workflow
        async def both() -> None:
            await first()
            await second()

    try:
        with pooled(cluster, around) as (_, url):
            async with Lab(url) as lab, lab.engine(registry, poll_seconds=0.1):
                run = await lab.enqueue(both)
                await wait_until_async(lambda: 2 in executions)
                await asyncio.to_thread(cluster.restart, "immediate")
                released.set()
                await lab.succeeded(run)
    finally:
        cluster.start()
        cluster.execute("alter system reset wal_writer_delay")
        cluster.execute("select pg_reload_conf()")
    assert executions.count(1) == 1


def test_a_client_refuses_a_pooler_whose_commits_are_not_durable(
    bouncer: Pooler, around: str, looking: Db
) -> None:
    defaults(looking, "synchronous_commit = off")
    with (
        Client(bouncer.url(around)) as client,
        pytest.raises(ConfigError, match="may be lost: synchronous_commit is 'off'"),
    ):
        client.enqueue("w", {})


# -- who lives ---------------------------------------------------------------------------------------


async def test_without_a_session_of_its_own_a_supervisor_says_so_and_goes_by_the_lease(
    through: str, around: str, looking: Db, caplog: pytest.LogCaptureFixture
) -> None:
    looking.execute("select stepwell.enqueue('w') from generate_series(1, 3)")
    with lone_supervisor(through) as dying, caplog.at_level(logging.WARNING):
        await until(lambda: len(workers(looking)) == 1)
        async with supervising(through) as living:
            await until(lambda: len(workers(looking)) == 2)
            await until(
                lambda: (
                    looking.execute("select bool_or(locking) from stepwell.workers").fetchone() == (False,)
                )
            )
            assert advisory_locks(looking) == 0
            os.killpg(dying.pid, signal.SIGKILL)
            await until(lambda: living.count("reclaimed") == 1)
            assert [event.detail for event in living.events if event.kind == "verdict"] == ["lease"]
    told = [each.getMessage() for each in caplog.records if "connection pooler" in each.getMessage()]
    assert len(told) == 1
    assert "noticed after 2 s instead of 0.6" in told[0]
    assert "STEPWELL_DIRECT_DATABASE_URL" in told[0]


async def test_a_pause_of_the_pooler_kills_nobody_whose_lease_holds(
    cluster: Cluster, bouncer: Pooler, around: str, looking: Db
) -> None:
    """To an observer with a session, who sees no lock of theirs, a beat that is late is no death."""
    with pooled(cluster, around) as (own, url), lone_supervisor(url, lease_seconds=60.0):
        await until(
            lambda: looking.execute("select bool_or(locking) from stepwell.workers").fetchone() == (False,)
        )
        async with supervising(around, settings={"lease_seconds": 60.0}) as observer:
            await until(lambda: observer.supervisor.vitals().connected)
            assert own._process is not None
            own._process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(3 * QUICK["lost_lock_seconds"])  # the fault itself
            own._process.send_signal(signal.SIGCONT)
            await until(lambda: len(workers(looking)) == 2)
            assert observer.count("verdict") == 0


async def test_with_the_address_of_the_database_a_lost_lock_is_noticed_as_ever(
    through: str, around: str, looking: Db, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"direct_database_url": around, "lease_seconds": 600.0}
    looking.execute("select stepwell.enqueue('w') from generate_series(1, 3)")
    with lone_supervisor(through, **settings) as dying, caplog.at_level(logging.WARNING):
        await until(lambda: len(workers(looking)) == 1)
        async with supervising(through, settings=settings) as living:
            await until(lambda: len(workers(looking)) == 2)
            os.killpg(dying.pid, signal.SIGKILL)
            await until(lambda: living.count("reclaimed") == 1)
            assert [event.detail for event in living.events if event.kind == "verdict"] == ["lost_lock"]
    assert not [each for each in caplog.records if "connection pooler" in each.getMessage()]


async def test_two_addresses_of_two_databases_are_refused(cluster: Cluster, through: str) -> None:
    with cluster.database() as other:
        supervisor = Supervisor(
            Settings(**{**QUICK, "direct_database_url": other}), through, app="tests.flows", processes=1
        )
        assert await asyncio.wait_for(supervisor.run(), 60) == 2
    assert supervisor.complaint is not None
    assert "lead to two databases" in supervisor.complaint


async def test_a_claim_that_cannot_end_is_ended_and_nobody_elses_transaction(
    through: str, around: str, looking: Db
) -> None:
    """The dead worker is known by a lock of its transaction, whatever the pooler calls the session."""
    for worker in (77, 78):
        looking.execute("select stepwell.register_v1(%s, null, 'h', 1, '', '{default}', '{w}')", [worker])
    looking.execute("select stepwell.enqueue('w') from generate_series(1, 2)")
    claim = "select * from stepwell.claim_v1(%s, 'default', '{w}', 1, array_fill(0, array[20])::bigint[])"
    with (
        connect(through, application_name="stepwell 77", autocommit=False) as frozen,
        connect(through, application_name="stepwell 78", autocommit=False) as alive,
    ):
        frozen.execute(claim, [77])
        alive.execute(claim, [78])
        async with await connect_async(around, application_name="test") as heir:
            done = await reclaim(heir, 77, "lease", poison_after=3, pass_seconds=20)
        assert (done.found, done.finished) == (True, True)
        alive.execute("select 1")
        alive.commit()
        with pytest.raises(psycopg.OperationalError):
            frozen.execute("select 1")
    assert looking.execute("select claimed_by from stepwell.tasks order by claimed_by").fetchall() == [
        (78,),
        (None,),
    ]


async def test_a_backend_that_serves_somebody_else_by_now_is_left_alone(through: str, around: str) -> None:
    with connect(through, application_name="stepwell 79", autocommit=False) as somebody:
        pid = somebody.execute("select pg_backend_pid()").fetchone()
        assert pid is not None
        async with await connect_async(around, application_name="test") as heir:
            ending = {"backend": pid[0], "worker": 77}
            assert await (await heir.execute(load("terminate_backend"), ending)).fetchall() == []
            assert await end_backends(heir, 79) == 0, "it holds nothing of a worker's"
        assert somebody.execute("select pg_backend_pid()").fetchone() == pid


# -- metrics -----------------------------------------------------------------------------------------


def test_of_exporters_without_a_session_one_exports_and_the_next_follows(
    through: str, around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "LEASE_SECONDS", 1.0)
    first, second, direct = DatabaseMetrics(through), DatabaseMetrics(through), DatabaseMetrics(around)
    try:
        first.start()
        assert list(first.collect())
        second.start()
        assert second.problem() is None
        assert not list(second.collect())
        first.stop()
        wait_until(lambda: list(second.collect()), what="the lease to be over")
        direct.start()
        assert list(direct.collect()), "who has a session goes before"
        assert not list(second.collect())
    finally:
        for each in (first, second, direct):
            each.stop()
    assert everywhere(through, "current_setting('statement_timeout')") == {"0"}


# -- no room -----------------------------------------------------------------------------------------


def test_a_pooler_that_is_full_is_waited_for(cluster: Cluster, bouncer: Pooler, around: str) -> None:
    made: list[Any] = []
    with (
        pooled(cluster, around, max_client_conn="3") as (_, url),
        ExitStack() as crowd,
        Client(url) as client,
    ):
        for _ in range(3):
            crowd.enter_context(psycopg.connect(url, autocommit=True))
        with pytest.raises(psycopg.OperationalError) as raised:
            connect(url, application_name="test")
        assert is_full(raised.value)
        enqueuing = threading.Thread(target=lambda: made.append(client.enqueue("w", {}, key=1)))
        enqueuing.start()
        assert not made
        crowd.close()
        enqueuing.join(20)
    assert len(made) == 1


def test_everything_runs_from_the_command_line(
    through: str, around: str, looking: Db, tmp_path: Path
) -> None:
    """A supervisor with two workers behind the pooler; one of them is killed in the middle."""
    app = tmp_path / "pooled_flows.py"
    app.write_text(
        "from worker import step, workflow\n\n"
        "@step\nasync def think(n: int) -> int:\n    return n\n\n"
        "@workflow\nasync def thinking(n: int) -> int:\n    return await think(n) + await think(n)\n"
    )
    environment = {**os.environ, "STEPWELL_DATABASE_URL": through, "STEPWELL_DIRECT_DATABASE_URL": around}
    command = [sys.executable, "-m", "worker.cli"]
    with (tmp_path / "log").open("wb") as log:
        supervisor = subprocess.Popen(
            [*command, "worker", str(app), "--processes", "2"],
            env=environment,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(lambda: len(workers(looking)) == 2, 60)
        looking.execute(
            "select stepwell.enqueue('thinking', json_build_object('n', n)) from generate_series(1, 500) n"
        )
        wait_until(
            lambda: (
                looking.execute("select count(*) > 50 from stepwell.runs where state <> 'open'").fetchone()
                == (True,)
            )
        )
        os.kill(workers(looking)[0][1], signal.SIGKILL)
        counted = "select count(*) from stepwell.runs where state = 'succeeded'"
        wait_until(lambda: looking.execute(counted).fetchone() == (500,), 60)
        said = subprocess.run(
            [*command, "runs", "list", "--json"], env=environment, capture_output=True, text=True, check=True
        )
        assert "thinking" in said.stdout
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        if supervisor.poll() is None:
            os.killpg(supervisor.pid, signal.SIGKILL)
            supervisor.wait(10)
