"""A supervisor and its children, as real processes that get real signals."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox.database import connect
from tests.integration.supervising import (
    Db,
    claims,
    enqueue,
    is_gone,
    lone_supervisor,
    supervising,
    until,
    wait_for_workers,
    workers,
)
from tests.postgres import Cluster
from worker.supervision import children, supervisor

pytestmark = pytest.mark.direct("supervisors hold locks; test_pooler.py has those that cannot")

# -- children ----------------------------------------------------------------------------------------


async def test_children_are_registered_locked_and_beaten_for(db: Db, database_url: str) -> None:
    async with supervising(database_url, processes=2) as it:
        found = await wait_for_workers(db, 2)
        await until(lambda: it.supervisor.vitals().claiming)
        assert {pid for _, pid in found} == {child.pid for child in it.supervisor.vitals().children}
        assert advisory_locks(db) == {worker_id for worker_id, _ in found}
        before = beats(db)
        await until(lambda: all(beats(db)[each] > before[each] for each in before))
        seen = it.supervisor.vitals()
        assert (seen.alive, seen.connected, seen.schema_ok) == (True, True, True)


async def test_the_password_is_neither_in_argv_nor_in_the_environment(db: Db, database_url: str) -> None:
    async with supervising(database_url) as it:
        ((_, pid),) = await wait_for_workers(db, 1)
        assert not [file for file in ("cmdline", "environ") if database_url.encode() in contents(pid, file)]
        assert it.count("exited") == 0


def contents(pid: int, file: str) -> bytes:
    return Path(f"/proc/{pid}/{file}").read_bytes()


async def test_a_killed_child_is_reclaimed_at_once_and_replaced(db: Db, database_url: str) -> None:
    enqueue(db, 3)
    async with supervising(database_url) as it:
        await until(lambda: 3 in claims(db).values())
        ((dead, pid),) = workers(db)
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: dead not in claims(db))
        assert time.monotonic() - killed_at < 1.0
        await until(lambda: 3 in claims(db).values())
        assert dead not in claims(db)
        await until(lambda: it.reclaims == [("obituary", 3)])
        assert dead not in dict(workers(db))
        await until(lambda: advisory_locks(db) == set(it.worker_ids))


async def test_a_stopped_child_is_killed_and_replaced(db: Db, database_url: str) -> None:
    enqueue(db, 1)
    async with supervising(database_url) as it:
        await until(lambda: 1 in claims(db).values())
        ((dead, pid),) = workers(db)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: 1 in claims(db).values() and dead not in claims(db))
        assert is_gone(pid)
        await until(lambda: it.reclaims == [("obituary", 1)])


@pytest.mark.parametrize("behaviour", ["mute", "stuck"])
async def test_a_child_that_hangs_is_killed(db: Db, database_url: str, behaviour: str) -> None:
    async with supervising(database_url, behaviour) as it:
        await until(lambda: len(it.pids) == 1)
        it.lose_patience(after_seconds=1.0)
        await until(lambda: it.count("exited") >= 1)
        assert "SIGKILL" in next(event.detail for event in it.events if event.kind == "exited")
        await until(lambda: it.count("spawned") >= 2)


async def test_a_child_that_was_declared_dead_is_replaced_by_a_fresh_one(
    database_url: str, tmp_path: Path
) -> None:
    async with supervising(database_url, f"declared dead:{tmp_path}") as it:
        await until(lambda: it.supervisor.vitals().claiming)
        assert [event.detail for event in it.events if event.kind == "exited"] == ["exited with status 75"]


async def test_a_child_that_an_observer_buried_is_told_so(db: Db, database_url: str) -> None:
    async with supervising(database_url) as it:
        await until(lambda: it.supervisor.vitals().claiming)
        ((dead, _),) = workers(db)
        db.execute("select stepwell.bury_v1(%s)", [dead])
        await until(lambda: it.count("exited") == 1 and it.supervisor.vitals().claiming)
        assert dead not in it.worker_ids
        await until(lambda: dead not in dict(workers(db)))


async def test_crashing_children_do_not_spin(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "STEADY_SECONDS", 60.0)
    async with supervising(database_url, "crash") as it:
        await until(lambda: it.count("exited") == 3)
        started = time.monotonic()
        await until(lambda: it.count("exited") == 5)
        assert time.monotonic() - started > 1.0


async def test_a_mistake_in_the_configuration_ends_the_supervisor_with_the_sentence(
    database_url: str,
) -> None:
    async with supervising(database_url, "misconfigured", processes=2) as it:
        assert await asyncio.wait_for(it.running, 30) == 2
        assert it.supervisor.complaint == "the app defines no workflow"


async def test_a_mistake_that_comes_later_leaves_the_others_alone(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    async with supervising(database_url, f"misconfigured later:{tmp_path}") as it:
        await until(lambda: it.supervisor.vitals().claiming)
        os.kill(it.pids[0], signal.SIGKILL)
        await until(lambda: it.count("exited") >= 2)
        assert not it.running.done()


async def test_a_child_that_cannot_be_started_is_tried_again(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervising(database_url, child_command=["/nonexistent/python"]):
        await until(lambda: caplog.text.count("cannot be started") >= 2)


# -- the end -----------------------------------------------------------------------------------------


async def test_sigterm_drains(db: Db, database_url: str) -> None:
    enqueue(db, 2)
    async with supervising(database_url, processes=2) as it:
        await until(lambda: len(it.pids) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(it.running, 30) == 0
    assert workers(db) == []
    assert claims(db) == {}
    assert it.reclaims == []
    assert advisory_locks(db) == set()


async def test_what_a_child_leaves_behind_is_reclaimed_when_it_is_told_to_stop(
    db: Db, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.2)
    enqueue(db, 2)
    async with supervising(database_url, "stubborn") as it:
        await until(lambda: len(it.pids) == 1)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: it.count("draining") == 1)
        assert not it.running.done()
        os.kill(os.getpid(), signal.SIGINT)
        assert await asyncio.wait_for(it.running, 30) == 1
    assert workers(db) == []
    assert it.reclaims == [("obituary", 2)]


async def test_a_child_that_outlives_the_grace_time_is_killed(
    db: Db, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "MARGIN_SECONDS", 0.1)
    async with supervising(database_url, "stubborn", settings={"grace_seconds": 0.3}) as it:
        await until(lambda: len(it.pids) == 1)
        it.supervisor.drain()
        assert await asyncio.wait_for(it.running, 30) == 1
    assert workers(db) == []


async def test_a_supervisor_that_is_told_to_end_before_it_has_a_database_ends(cluster: Cluster) -> None:
    cluster.stop()
    try:
        async with supervising(cluster.url()) as it:
            await asyncio.sleep(0)
            it.supervisor.drain()
            assert await asyncio.wait_for(it.running, 30) == 0
    finally:
        cluster.start()


@pytest.mark.crash
async def test_ctrl_c_in_a_terminal_drains(db: Db, database_url: str) -> None:
    with lone_supervisor(database_url, processes=2) as process:
        await wait_for_workers(db, 2)
        os.killpg(process.pid, signal.SIGINT)
        await until(lambda: process.poll() is not None)
        assert process.returncode == 0
    assert workers(db) == []


# -- the supervisor dies, and who notices ------------------------------------------------------------


@pytest.mark.crash
async def test_no_child_outlives_its_supervisor(db: Db, database_url: str) -> None:
    with lone_supervisor(database_url, processes=2) as process:
        pids = [pid for _, pid in await wait_for_workers(db, 2)]
        process.kill()
        await until(lambda: all(is_gone(pid) for pid in pids))


@pytest.mark.crash
async def test_a_dead_tree_is_reclaimed_by_the_other_supervisor(db: Db, database_url: str) -> None:
    enqueue(db, 4)
    async with supervising(database_url, processes=1) as it:
        await until(lambda: len(it.pids) == 1)
        with lone_supervisor(database_url, processes=2) as process:
            enqueue(db, 4)
            await wait_for_workers(db, 3)
            os.killpg(process.pid, signal.SIGKILL)
            await until(lambda: len(workers(db)) == 1)
        await until(lambda: [detector for detector, _ in it.reclaims] == ["lost_lock"] * 2)
        assert set(claims(db)) == set(it.worker_ids)


@pytest.mark.crash
async def test_a_stopped_tree_is_reclaimed_after_the_lease_and_starts_afresh(
    db: Db, database_url: str
) -> None:
    async with supervising(database_url) as it:
        await until(lambda: len(it.pids) == 1)
        with lone_supervisor(database_url) as process:
            frozen = set(dict(await wait_for_workers(db, 2))) - set(it.worker_ids)
            os.killpg(process.pid, signal.SIGSTOP)
            await until(lambda: not frozen & set(dict(workers(db))))
            await until(lambda: [detector for detector, _ in it.reclaims] == ["lease"])
            os.killpg(process.pid, signal.SIGCONT)
            fresh = set(dict(await wait_for_workers(db, 2)))
            assert not frozen & fresh
            assert set(it.worker_ids) < fresh


@pytest.mark.crash
async def test_two_observers_reclaim_one_dead_worker_without_harm(db: Db, database_url: str) -> None:
    enqueue(db, 10)
    with lone_supervisor(database_url) as process:
        await until(lambda: 10 in claims(db).values())
        async with supervising(database_url, "idle") as one, supervising(database_url, "idle") as other:
            await until(lambda: len(one.pids) == len(other.pids) == 1)
            process.kill()
            await until(lambda: len(workers(db)) == 2)
            await until(lambda: one.reclaims or other.reclaims)
            assert sum(tasks for _, tasks in one.reclaims + other.reclaims) == 10
    row = db.execute("select max(interruptions) from stepwell.tasks").fetchone()
    assert row == (1,)


# -- the database goes away --------------------------------------------------------------------------


async def test_a_restart_of_the_database_reclaims_nobody(cluster: Cluster, database_url: str) -> None:
    async with (
        supervising(database_url, processes=2) as one,
        supervising(database_url, processes=2) as other,
    ):
        await until(lambda: len(one.pids) == len(other.pids) == 2)
        before = sorted(one.worker_ids + other.worker_ids)
        cluster.restart("immediate")
        await until(lambda: one.supervisor.vitals().connected)
        await until(lambda: other.supervisor.vitals().connected)
        with connect(database_url, application_name="test") as db:
            await until(lambda: sorted(advisory_locks(db)) == before)
            await beats_for(db, seconds=3.0)
        assert one.reclaims == other.reclaims == []
        assert sorted(one.worker_ids + other.worker_ids) == before


async def test_a_supervisor_that_comes_back_last_from_an_outage_is_not_held_for_dead(
    cluster: Cluster, database_url: str
) -> None:
    async with supervising(database_url) as early, supervising(database_url) as late:
        await until(lambda: len(early.pids) == len(late.pids) == 1)
        let_in = asyncio.Event()
        connect_late = late.supervisor._heartbeat._connect

        async def connect_when_let_in() -> psycopg.AsyncConnection[Any]:
            await let_in.wait()
            return await connect_late()

        late.supervisor._heartbeat._connect = connect_when_let_in
        cluster.restart("immediate")
        with connect(database_url, application_name="test") as db:
            (early_id,) = early.worker_ids
            before = beats(db)[early_id]
            await until(lambda: beats(db)[early_id] >= before + 10)  # a second, at ten beats a second
            let_in.set()
            await until(lambda: late.supervisor.vitals().connected)
            await beats_for(db, seconds=3.0)
        assert early.reclaims == []


async def beats_for(db: Db, seconds: float) -> None:
    """Wait until each worker has been beaten for so often that any detector would have had its time."""
    target = {worker_id: beat + seconds / 0.1 * 0.8 for worker_id, beat in beats(db).items()}
    await until(lambda: all(beats(db)[each] > target[each] for each in target))


async def test_a_child_that_dies_during_an_outage_is_reclaimed_afterwards(
    cluster: Cluster, database_url: str
) -> None:
    with connect(database_url, application_name="test") as db:
        enqueue(db, 2)
    async with supervising(database_url) as it:
        await until(lambda: len(it.pids) == 1)
        cluster.stop("immediate")
        os.kill(it.pids[0], signal.SIGKILL)
        await until(lambda: it.count("exited") == 1)
        await until(lambda: not it.supervisor.vitals().connected)
        cluster.start()
        await until(lambda: it.reclaims == [("obituary", 2)])
        await until(lambda: it.supervisor.vitals().claiming)


async def test_a_lost_session_takes_its_locks_again(db: Db, database_url: str) -> None:
    async with supervising(database_url, processes=2) as it:
        await until(lambda: len(it.pids) == 2)
        ended = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'stepwell supervisor%'"
        assert len(db.execute(ended).fetchall()) == 2
        await until(lambda: advisory_locks(db) == set())
        await until(lambda: advisory_locks(db) == set(it.worker_ids))
        assert it.reclaims == []


async def test_a_supervisor_waits_for_a_database_that_is_down_at_the_start(
    cluster: Cluster, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.stop()
    async with supervising(database_url) as it:
        await until(lambda: "cannot be reached" in caplog.text)
        assert it.count("spawned") == 0
        assert not it.supervisor.vitals().connected
        cluster.start()
        await until(lambda: it.supervisor.vitals().claiming)
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 2


async def test_a_missing_schema_ends_the_supervisor_with_what_to_do(empty_database_url: str) -> None:
    async with supervising(empty_database_url) as it:
        assert await asyncio.wait_for(it.running, 30) == 2
        assert "stepwell migrate" in (it.supervisor.complaint or "")
        assert it.count("spawned") == 0


async def test_a_refused_connection_ends_the_supervisor(cluster: Cluster) -> None:
    async with supervising(cluster.url(f"absent_{secrets.token_hex(4)}")) as it:
        assert await asyncio.wait_for(it.running, 30) == 2
        assert "does not exist" in (it.supervisor.complaint or "")


# -- what the database shows -------------------------------------------------------------------------


def advisory_locks(db: Db) -> set[int]:
    """Return what supervisors have locked. Below zero is what a claim or a flush of a worker holds for a moment."""
    statement = """
        select (classid::bigint << 32) | objid::bigint from pg_locks
        where locktype = 'advisory' and objsubid = 1 and (classid::bigint << 32) | objid::bigint > 0
          and database = (select oid from pg_database where datname = current_database())"""
    return {row[0] for row in db.execute(statement).fetchall()}


def beats(db: Db) -> dict[int, int]:
    return dict(db.execute("select id, beat from stepwell.workers").fetchall())
