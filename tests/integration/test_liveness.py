"""Who is held for dead, and what becomes of what it held."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Self

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox.database import connect, connect_async
from outbox.settings import Settings
from tests.postgres import Cluster
from tests.waiting import wait_until_async
from worker.queries import load
from worker.supervision import liveness
from worker.supervision.liveness import Detector, Sighting, Undertaker, reclaim, sightings

pytestmark = pytest.mark.direct("sessions of workers are simulated, and known by their names")

Db = psycopg.Connection[TupleRow]
Adb = psycopg.AsyncConnection[TupleRow]

SETTINGS = Settings(beat_seconds=1.0, lost_lock_seconds=3.0, lease_seconds=15.0)


# -- in the database ---------------------------------------------------------------------------------


def random_id() -> int:
    return secrets.randbelow(2**63 - 1) + 1


@pytest.fixture
def worker(db: Db) -> Callable[..., int]:
    """Registers a worker that claims so many tasks; returns its id."""

    def register(tasks: int = 0) -> int:
        worker_id = random_id()
        db.execute(
            "select stepwell.register_v1(%s, null, 'host', 42, '', array['default'], array['w'])", [worker_id]
        )
        if tasks:
            db.execute("select stepwell.enqueue('w') from generate_series(1, %s)", [tasks])
            db.execute(
                "select * from stepwell.claim_v1(%s, 'default', array['w'], %s, array_fill(0, array[20])::bigint[])",
                [worker_id, tasks],
            )
            assert claims(db, worker_id) == tasks
        return worker_id

    return register


def claims(db: Db, worker_id: int) -> int:
    return count(db, "stepwell.tasks where claimed_by = %s", worker_id)


def known(db: Db, worker_id: int) -> bool:
    return count(db, "stepwell.workers where id = %s", worker_id) == 1


def count(db: Db, what: str, *parameters: object) -> int:
    row = db.execute(f"select count(*) from {what}".encode(), parameters).fetchone()
    assert row is not None
    return int(row[0])


@contextmanager
def session_of(url: str, worker_id: int) -> Iterator[Db]:
    """A connection of a worker's, in a transaction."""
    connection = connect(url, application_name=f"stepwell {worker_id}", autocommit=False)
    try:
        yield connection
    finally:
        connection.close()


async def seen(connection: Adb, worker_id: int) -> Sighting:
    (sighting,) = [each for each in await sightings(connection) if each.worker_id == worker_id]
    return sighting


async def test_an_observer_sees_the_advisory_lock_of_a_worker(
    db: Db, adb: Adb, worker: Callable[..., int], cluster: Cluster
) -> None:
    one, other = worker(), worker()
    db.execute("select pg_advisory_lock(%s)", [one])
    assert (await seen(adb, one)).locked
    assert not (await seen(adb, other)).locked
    db.execute("select pg_advisory_unlock(%s)", [one])
    assert not (await seen(adb, one)).locked


async def test_locks_of_other_kinds_and_databases_are_not_taken_for_it(
    db: Db, adb: Adb, worker: Callable[..., int], cluster: Cluster
) -> None:
    one = worker()
    with connect(cluster.url(), application_name="elsewhere") as elsewhere:
        elsewhere.execute("select pg_advisory_lock(%s)", [one])
        high, low = one >> 32, one & 0xFFFF_FFFF
        db.execute("select pg_advisory_lock(%s, %s)", [high, low - 2**32 if low >= 2**31 else low])
        assert not (await seen(adb, one)).locked


async def test_a_reclaim_frees_the_tasks_and_forgets_the_worker(
    db: Db, adb: Adb, worker: Callable[..., int]
) -> None:
    dead = worker(tasks=3)
    done = await reclaim(adb, dead, "obituary", poison_after=3, pass_seconds=10)
    assert (done.found, done.tasks, done.finished) == (True, 3, True)
    assert count(db, "stepwell.tasks where state = 'ready' and interrupted and not fresh") == 3
    assert not known(db, dead)


async def test_reclaiming_what_nobody_knows_does_nothing(adb: Adb) -> None:
    done = await reclaim(adb, random_id(), "obituary", poison_after=3, pass_seconds=10)
    assert (done.found, done.tasks, done.finished) == (False, 0, True)


async def test_many_tasks_are_freed_in_chunks(
    db: Db, adb: Adb, worker: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "CHUNK_TASKS", 2)
    dead = worker(tasks=5)
    assert (await reclaim(adb, dead, "obituary", poison_after=3, pass_seconds=10)).tasks == 5
    assert not known(db, dead)


async def test_two_that_reclaim_at_once_share_the_work(
    db: Db, database_url: str, worker: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "CHUNK_TASKS", 3)
    for _ in range(5):
        dead = worker(tasks=20)
        async with opened(database_url) as one, opened(database_url) as other:
            done = await asyncio.gather(
                reclaim(one, dead, "lease", poison_after=3, pass_seconds=10),
                reclaim(other, dead, "lost_lock", poison_after=3, pass_seconds=10),
            )
        assert sum(each.tasks for each in done) == 20
        assert all(each.finished for each in done)
        assert count(db, "stepwell.tasks where interruptions <> 1") == 0
        assert not known(db, dead)
        db.execute("delete from stepwell.tasks")
    assert count(db, "stepwell.counters where kind = 'worker'") in (1, 2)
    assert db.execute("select sum(value) from stepwell.counters where kind = 'worker'").fetchone() == (5,)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Adb]:
    async with await connect_async(url, application_name="stepwell supervisor 1") as connection:
        yield connection


async def test_a_claim_that_cannot_end_is_terminated(
    db: Db, adb: Adb, database_url: str, worker: Callable[..., int]
) -> None:
    dead = worker(tasks=1)
    with session_of(database_url, dead) as stopped:
        stopped.execute("select from stepwell.workers where id = %s for key share", [dead])
        done = await reclaim(adb, dead, "obituary", poison_after=3, pass_seconds=10)
        assert (done.tasks, done.finished) == (1, True)
        with pytest.raises(psycopg.OperationalError):
            stopped.execute("select 1")


async def test_a_claim_whose_client_reads_no_more_is_terminated(
    db: Db, adb: Adb, database_url: str, worker: Callable[..., int]
) -> None:
    """A SIGSTOPped client in the middle of a large answer holds its key share for ever."""
    dead = worker(tasks=1)
    with session_of(database_url, dead) as stopped:
        statement = (
            f"select from stepwell.workers where id = {dead} for key share;"
            "select repeat('x', 1000) from generate_series(1, 100000)"
        )
        stopped.pgconn.send_query(f"begin; {statement}".encode())
        writing = "pg_stat_activity where application_name = %s and wait_event = 'ClientWrite'"
        await wait_until_async(lambda: count(db, writing, f"stepwell {dead}") == 1)
        done = await reclaim(adb, dead, "obituary", poison_after=3, pass_seconds=10)
        assert (done.tasks, done.finished) == (1, True)


async def test_a_flush_that_is_on_the_wire_does_not_keep_its_tasks(
    db: Db, adb: Adb, database_url: str, worker: Callable[..., int]
) -> None:
    dead = worker(tasks=2)
    with session_of(database_url, dead) as flushing:
        flushing.execute("select from stepwell.tasks where claimed_by = %s for update", [dead])
        done = await reclaim(adb, dead, "obituary", poison_after=3, pass_seconds=10)
        assert (done.tasks, done.finished) == (2, True)


async def test_a_flush_that_is_being_applied_comes_through(
    db: Db, adb: Adb, database_url: str, worker: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "LAST_STATEMENT_SECONDS", 30.0)
    dead = worker(tasks=1)
    with session_of(database_url, dead) as flushing:
        flushing.pgconn.send_query(
            b"select pg_sleep(0.3); insert into stepwell.migrations values (99, 'flushed')"
        )
        await wait_until_async(lambda: count(db, "pg_stat_activity where wait_event = 'PgSleep'") == 1)
        done = await reclaim(adb, dead, "obituary", poison_after=3, pass_seconds=10)
        assert done.finished
        assert count(db, "stepwell.migrations where version = 99") == 1


async def test_a_pass_ends_when_somebody_else_locks_what_is_left(
    db: Db, adb: Adb, database_url: str, worker: Callable[..., int]
) -> None:
    dead = worker(tasks=2)
    with connect(database_url, application_name="a person", autocommit=False) as person:
        person.execute(
            "select from stepwell.tasks where claimed_by = %s order by id limit 1 for update", [dead]
        )
        done = await reclaim(adb, dead, "obituary", poison_after=3, pass_seconds=0.1)
        assert (done.tasks, done.finished) == (1, False)
        assert known(db, dead)
        person.rollback()
    done = await reclaim(adb, dead, "obituary", poison_after=3, pass_seconds=10)
    assert (done.tasks, done.finished) == (1, True)


async def test_a_role_that_may_not_terminate_says_so_and_goes_on_later(
    db: Db,
    cluster: Cluster,
    database_url: str,
    worker: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    dead = worker(tasks=1)
    cluster.execute("drop role if exists weak")
    cluster.execute("create role weak login in role stepwell_worker")
    try:
        with session_of(database_url, dead) as foreign:
            foreign.execute("select from stepwell.tasks where claimed_by = %s for update", [dead])
            async with opened(database_url.replace("postgres@", "weak@")) as weak:
                assert not (await reclaim(weak, dead, "obituary", poison_after=3, pass_seconds=0.1)).finished
                assert "pg_signal_backend" in caplog.text
                foreign.rollback()
                assert (await reclaim(weak, dead, "obituary", poison_after=3, pass_seconds=10)).tasks == 1
    finally:
        cluster.execute("drop role weak")


# -- beating -----------------------------------------------------------------------------------------


async def test_one_locked_row_does_not_stop_the_beats_of_the_others(
    db: Db, adb: Adb, database_url: str, worker: Callable[..., int]
) -> None:
    one, other, buried = worker(), worker(), worker()
    db.execute("select stepwell.bury_v1(%s)", [buried])
    with connect(database_url, application_name="a person", autocommit=False) as person:
        person.execute("select from stepwell.workers where id = %s for update", [one])
        known = await (
            await adb.execute(load("beat"), {"workers": [one, other, buried, 1], "locking": True})
        ).fetchall()
    assert {row[0] for row in known} == {one, other}
    assert dict(db.execute("select id, beat from stepwell.workers").fetchall()) == {
        one: 0,
        other: 1,
        buried: 0,
    }


async def test_a_beat_does_not_wait_for_a_claim(
    db: Db, adb: Adb, database_url: str, worker: Callable[..., int]
) -> None:
    one = worker()
    with session_of(database_url, one) as claiming:
        claiming.execute("select from stepwell.workers where id = %s for key share", [one])
        await adb.execute(load("beat"), {"workers": [one], "locking": True})
    assert db.execute("select beat from stepwell.workers").fetchone() == (1,)


# -- the undertaker ----------------------------------------------------------------------------------


class Burials:
    """An undertaker at work, and what it did."""

    def __init__(self, url: str) -> None:
        self.done: list[tuple[int, Detector, int]] = []
        self.undertaker = Undertaker(
            lambda: connect_async(url, application_name="stepwell supervisor 1"),
            SETTINGS,
            on_reclaim=lambda *what: self.done.append(what),
        )

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.undertaker.run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_the_undertaker_reports_what_it_reclaimed(
    db: Db, database_url: str, worker: Callable[..., int]
) -> None:
    async with Burials(database_url) as burials:
        dead, drained = worker(tasks=2), random_id()
        assert burials.undertaker.report(drained, "obituary")
        assert burials.undertaker.report(dead, "lost_lock")
        assert not burials.undertaker.report(dead, "lost_lock")
        await wait_until_async(lambda: burials.done)
        assert burials.done == [(dead, "lost_lock", 2)]
        assert await burials.undertaker.settle(5)


async def test_obituaries_go_first(db: Db, database_url: str, worker: Callable[..., int]) -> None:
    ours, theirs = worker(tasks=1), worker(tasks=1)
    burials = Burials(database_url)
    burials.undertaker.report(theirs, "lease")
    burials.undertaker.report(ours, "obituary")
    assert await burials.undertaker.run_once() == 1
    assert await burials.undertaker.run_once() == 1
    assert [worker_id for worker_id, _, _ in burials.done] == [ours, theirs]
    await burials.undertaker._disconnect()


async def test_tasks_that_stay_locked_are_freed_later(
    db: Db, database_url: str, worker: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "PASS_SECONDS", 0.1)
    dead = worker(tasks=2)
    async with Burials(database_url) as burials:
        with connect(database_url, application_name="a person", autocommit=False) as person:
            person.execute(
                "select from stepwell.tasks where claimed_by = %s order by id limit 1 for update", [dead]
            )
            burials.undertaker.report(dead, "obituary")
            await wait_until_async(lambda: claims(db, dead) == 1)
            person.rollback()
        assert await burials.undertaker.settle(20)
        assert burials.done == [(dead, "obituary", 2)]


async def test_an_obituary_survives_a_restart_of_the_database_and_a_verdict_does_not(
    cluster: Cluster, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with connect(database_url, application_name="test") as db:
        dead, silent = random_id(), random_id()
        for worker_id in (dead, silent):
            db.execute(
                "insert into stepwell.workers (id, host, pid, queues, names) values (%s, '', 1, '{}', '{}')",
                [worker_id],
            )
    async with Burials(database_url) as burials:
        await wait_until_async(lambda: burials.undertaker._connection is not None)
        cluster.stop("immediate")
        burials.undertaker.report(dead, "obituary")
        burials.undertaker.report(silent, "lost_lock")
        burials.undertaker.forget_verdicts()
        await wait_until_async(lambda: "cannot be reached" in caplog.text)
        cluster.start()
        assert await burials.undertaker.settle(20)
        assert burials.done == [(dead, "obituary", 0)]
    with connect(database_url, application_name="test") as db:
        assert known(db, silent)
        assert not known(db, dead)


async def test_a_report_that_comes_with_the_end_does_not_keep_the_undertaker(database_url: str) -> None:
    burials = Burials(database_url)
    running = asyncio.create_task(burials.undertaker.run())
    await wait_until_async(lambda: burials.undertaker._connection is not None)
    burials.undertaker.report(random_id(), "lease")
    await wait_until_async(lambda: not burials.undertaker._cases)
    burials.undertaker._changed.set()
    running.cancel()
    ended, _ = await asyncio.wait({running}, timeout=5)
    assert ended
