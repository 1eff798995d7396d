"""Worker processes as they really are: a supervisor, the engine, an APP in a file."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tests.integration.supervising import (
    Db,
    claims,
    is_gone,
    lone_supervisor,
    supervising,
    until,
    wait_for_workers,
    workers,
)
from worker.supervision import process

APP = """
import asyncio, ctypes, os, subprocess, time
from worker import step, workflow

@step
async def note(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text + "\\n")

@step
async def rest(seconds: float) -> None:
    await asyncio.sleep(seconds)

@step
async def block_the_loop(seconds: float) -> None:
    time.sleep(seconds)

@step
def hold_the_gil(seconds: float) -> None:
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))

@step(timeout=0.1)
def get_stuck(seconds: float) -> None:
    time.sleep(seconds)

@step
async def descriptors() -> str:
    return subprocess.check_output(["ls", "-l", "/proc/self/fd"], text=True)

@workflow
async def resting(path: str, seconds: float) -> None:
    await note(path, "resting")
    await rest(seconds)

@workflow
async def blocking(path: str, seconds: float) -> None:
    await note(path, "blocking")
    await block_the_loop(seconds)

@workflow
async def holding(path: str, seconds: float) -> None:
    await note(path, "holding")
    hold_the_gil(seconds)

@workflow
async def stuck(path: str, seconds: float) -> None:
    await note(path, "stuck")
    get_stuck(seconds)

@workflow
async def listing() -> str:
    return await descriptors()
"""


@pytest.fixture
def app(tmp_path: Path) -> str:
    file = tmp_path / "flows.py"
    file.write_text(APP)
    return str(file)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def enqueue(db: Db, workflow: str, notes: Path, seconds: float) -> None:
    db.execute(
        "select stepwell.enqueue(%s, json_build_object('path', %s::text, 'seconds', %s::float8))",
        [workflow, str(notes), seconds],
    )


def state(db: Db) -> str:
    row = db.execute("select state from stepwell.runs").fetchone()
    assert row is not None
    return str(row[0])


async def test_a_worker_process_executes_and_drains(db: Db, database_url: str, app: str, notes: Path) -> None:
    enqueue(db, "resting", notes, 0.5)
    async with supervising(database_url, app, child_command=None) as it:
        await until(notes.exists)
        it.supervisor.drain()
        assert await asyncio.wait_for(it.running, 15) == 0
    assert workers(db) == []
    assert claims(db) == {}
    assert it.reclaims == []


async def test_an_app_that_cannot_be_imported_is_one_sentence(database_url: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    async with supervising(database_url, str(broken), child_command=None) as it:
        assert await asyncio.wait_for(it.running, 20) == 2
        assert "no_such_module" in (it.supervisor.complaint or "")
        assert "\n" not in (it.supervisor.complaint or "")


async def test_a_users_own_worker_module_does_not_hide_ours(
    database_url: str, app: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text("raise SystemExit('not this one')\n")
    (tmp_path / "outbox.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    async with supervising(database_url, app, child_command=None) as it:
        await until(lambda: it.supervisor.vitals().claiming)
        assert it.count("exited") == 0


async def test_a_second_sigterm_stops_what_a_drain_would_wait_for(
    db: Db, database_url: str, app: str, notes: Path
) -> None:
    enqueue(db, "resting", notes, 60)
    async with supervising(database_url, app, child_command=None, settings={"grace_seconds": 60.0}) as it:
        await until(lambda: notes.exists() and len(it.pids) == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: not it.supervisor.vitals().claiming)
        assert not it.running.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(it.running, 30) == 1
    assert claims(db) == {}
    assert workers(db) == []


async def test_a_worker_process_leaves_ctrl_c_to_its_supervisor(database_url: str, app: str) -> None:
    async with supervising(database_url, app, child_command=None) as it:
        await until(lambda: len(it.pids) == 1)
        (child,) = it.supervisor.vitals().children
        os.kill(child.pid, signal.SIGINT)
        assert child.vitals is not None
        await until(lambda: it.supervisor.vitals().children[0].vitals != child.vitals)
        assert it.pids == [child.pid]


async def test_what_a_step_starts_does_not_inherit_the_pipe(db: Db, database_url: str, app: str) -> None:
    db.execute("select stepwell.enqueue('listing')")
    async with supervising(database_url, app, child_command=None):
        await until(lambda: state(db) == "succeeded")
    row = db.execute("select output #>> '{}' from stepwell.runs").fetchone()
    assert row is not None
    assert "socket:" not in row[0]


@pytest.mark.crash
async def test_a_step_that_blocks_the_loop_for_too_long_is_killed(
    db: Db, database_url: str, app: str, notes: Path
) -> None:
    enqueue(db, "blocking", notes, 60)
    async with supervising(database_url, app, child_command=None) as it:
        await until(notes.exists)
        it.lose_patience(after_seconds=1.0)
        await until(lambda: it.reclaims == [("obituary", 1)])


@pytest.mark.crash
async def test_a_step_that_holds_the_gil_longer_than_the_lease_is_not_taken_for_dead(
    db: Db, database_url: str, app: str, notes: Path
) -> None:
    enqueue(db, "holding", notes, 4)
    async with (
        supervising(database_url, app, child_command=None) as it,
        supervising(database_url, "work") as other,
    ):
        await until(lambda: state(db) == "succeeded")
        assert it.reclaims == other.reclaims == []
    assert db.execute("select from stepwell.outbox where outcome = 'interrupted'").fetchall() == []


@pytest.mark.crash
async def test_children_of_a_supervisor_that_was_stopped_too_long_start_afresh(
    db: Db, database_url: str, app: str, notes: Path
) -> None:
    with lone_supervisor(database_url, app, real=True) as frozen:
        ((dead, pid),) = await wait_for_workers(db, 1)
        enqueue(db, "resting", notes, 120)
        await until(lambda: dead in claims(db))
        async with supervising(database_url, "work") as it:
            os.kill(frozen.pid, signal.SIGSTOP)
            await until(lambda: it.reclaims == [("lease", 1)])
            os.kill(frozen.pid, signal.SIGCONT)
            await until(lambda: is_gone(pid))
            await wait_for_workers(db, 2)
            assert dead not in dict(workers(db))


@pytest.mark.crash
async def test_a_step_that_holds_the_gil_does_not_outlive_the_supervisor(
    db: Db, database_url: str, app: str, notes: Path
) -> None:
    enqueue(db, "holding", notes, 60)
    with lone_supervisor(database_url, app, real=True) as supervisor:
        ((_, pid),) = await wait_for_workers(db, 1)
        await until(notes.exists)
        supervisor.kill()
        await until(lambda: is_gone(pid))


@pytest.mark.crash
async def test_a_thread_that_never_returns_does_not_keep_a_drained_process(
    db: Db, database_url: str, app: str, notes: Path
) -> None:
    enqueue(db, "stuck", notes, 60)
    async with supervising(database_url, app, child_command=None, settings={"grace_seconds": 0.5}) as it:
        await until(lambda: notes.exists() and state(db) != "open")
        started = time.monotonic()
        it.supervisor.drain()
        assert await asyncio.wait_for(it.running, 20) == 0
        assert time.monotonic() - started < process.EXIT_SECONDS + 5
