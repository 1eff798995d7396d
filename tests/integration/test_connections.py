"""How many sessions a supervisor and its workers take: what docs/operations.md tells people to count with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.integration.supervising import Db
from tests.security.members import member_of
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
POOL = 4
RUNS = 600
SUPERVISOR = 2
EXPORTER = 1
ENGINE = 3
"""For each process: one to claim, one that listens, and from the first flush on one to commit."""

APP = """
import psycopg
from sqlalchemy.orm import Session
from sqlalchemy import text
from worker import step, transaction, workflow

@step
async def think() -> None: ...

@workflow
async def asynchronous() -> None:
    await think()

@transaction
def with_psycopg(connection: psycopg.Connection) -> None:
    connection.execute("select pg_sleep(0.02)")

@transaction
def with_sqlalchemy(session: Session) -> None:
    session.execute(text("select pg_sleep(0.02)"))

@workflow
async def one_library() -> None:
    with_psycopg()

@workflow
async def two_libraries() -> None:
    with_psycopg()
    with_sqlalchemy()
"""


@contextmanager
def worker(database_url: str, home: Path, *options: str) -> Iterator[None]:
    app = home / "connected_flows.py"
    app.write_text(APP)
    environment = {**os.environ, "STEPWELL_DATABASE_URL": database_url, "STEPWELL_CONNECTIONS": str(POOL)}
    arguments = [str(app), "--processes", str(PROCESSES), "--concurrency", "500", *options]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "worker", *arguments],
            cwd=ROOT, env=environment, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (home / "log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def sessions(db: Db) -> Counter[str]:
    """Return how many sessions there are under each name; workers by their id."""
    statement = """select application_name from pg_stat_activity
                   where datname = current_database() and application_name ~ '^stepwell'"""
    return Counter(name for (name,) in db.execute(statement))


def supervisors(db: Db) -> int:
    """Return how many sessions there are of the supervisor with its exporter."""
    return sum(count for name, count in sessions(db).items() if not re.fullmatch(r"stepwell \d+", name))


def most(db: Db, workflow: str) -> tuple[int, list[int]]:
    """Run many at once, and as many without transactions; return the most sessions of the supervisor with its exporter, and of each worker process."""
    statement = "select stepwell.enqueue(name) from generate_series(1, %s), unnest(%s::text[]) name"
    db.execute(statement, [RUNS, [workflow, "asynchronous"]])
    seen: Counter[str] = Counter()

    def done() -> bool:
        seen.update({name: max(0, count - seen[name]) for name, count in sessions(db).items()})
        row = db.execute("select count(*) from stepwell.runs where state = 'open'").fetchone()
        return row == (0,)

    wait_until(done, 120, what=f"{RUNS} runs of {workflow}")
    workers = [count for name, count in seen.items() if re.fullmatch(r"stepwell \d+", name)]
    return sum(seen.values()) - sum(workers), workers


@pytest.mark.parametrize(
    ("workflow", "libraries"), [("asynchronous", 0), ("one_library", 1), ("two_libraries", 2)]
)
def test_sessions_depend_on_processes_and_libraries_and_not_on_concurrency(
    db: Db, database_url: str, tmp_path: Path, workflow: str, libraries: int
) -> None:
    with worker(database_url, tmp_path, "--metrics-port", "0"):
        wait_until(
            lambda: len([n for n in sessions(db) if n[-1].isdigit() and "supervisor" not in n]) == PROCESSES
        )
        wait_until(lambda: supervisors(db) >= SUPERVISOR + EXPORTER)  # which connects at leisure
        supervisor, workers = most(db, workflow)
    assert supervisor == SUPERVISOR + EXPORTER
    # A process that the others leave nothing to flush opens no session for it.
    assert len(workers) == PROCESSES
    assert max(workers) == ENGINE + libraries * POOL


def test_without_metrics_nobody_exports(db: Db, database_url: str, tmp_path: Path) -> None:
    with worker(database_url, tmp_path):
        wait_until(lambda: supervisors(db) >= SUPERVISOR)
        supervisor, workers = most(db, "asynchronous")
    assert supervisor == SUPERVISOR
    assert max(workers) == ENGINE


def test_workers_wait_while_the_database_has_no_session_left_for_them(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    with member_of("stepwell_worker", database_url, db) as member:
        db.execute(f"alter role {member.name} connection limit 3".encode())  # the test has one of them
        with worker(member.url, tmp_path, "--metrics-port", "0"):
            wait_until(lambda: "too many connections" in (tmp_path / "log").read_text())
            db.execute("select stepwell.enqueue('asynchronous')")
            db.execute(f"alter role {member.name} connection limit -1".encode())
            wait_until(lambda: db.execute("select state from stepwell.runs").fetchone() == ("succeeded",))
        log = (tmp_path / "log").read_text()
        assert "the database can be reached again" in log
        assert "another takes its place" not in log  # nobody gave up over it
        wait_until(lambda: not sessions(db))
