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

from tests.crash.fleet import parent_of
from tests.integration.supervising import Db
from tests.security.members import member_of
from tests.waiting import wait_until

pytestmark = pytest.mark.direct("it counts the sessions of each worker by their names")

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
POOL = 4
RUNS = 600
SUPERVISOR = 2
EXPORTER = 1
ENGINE = 3
"""For each process: one to claim, one that listens, and from the first flush on one to commit."""
DESCRIPTORS = 20
"""What a worker process has open at the most beside its sessions."""
SUPERVISOR_DESCRIPTORS, FOR_EACH_CHILD = 12, 2
"""What a supervisor has open at the most, its sessions among it."""

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


def descriptors(pid: int) -> int:
    """Return how many files a process has open."""
    with suppress(FileNotFoundError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


class Most:
    """The most that was seen at once: sessions of the supervisor with its exporter, of each worker process, and open files."""

    def __init__(self) -> None:
        self.sessions: Counter[str] = Counter()
        self.worker_files = self.supervisor_files = 0

    def see(self, db: Db) -> None:
        self.sessions.update(
            {name: max(0, count - self.sessions[name]) for name, count in sessions(db).items()}
        )
        for (pid,) in db.execute("select pid from stepwell.workers where dead_at is null").fetchall():
            self.worker_files = max(self.worker_files, descriptors(pid))
            with suppress(OSError):
                self.supervisor_files = max(self.supervisor_files, descriptors(parent_of(pid)))

    @property
    def workers(self) -> list[int]:
        return [count for name, count in self.sessions.items() if re.fullmatch(r"stepwell \d+", name)]

    @property
    def supervisor(self) -> int:
        return sum(self.sessions.values()) - sum(self.workers)


def most(db: Db, workflow: str) -> Most:
    """Run many at once, and as many without transactions; return the most that was seen."""
    statement = "select stepwell.enqueue(name) from generate_series(1, %s), unnest(%s::text[]) name"
    db.execute(statement, [RUNS, [workflow, "asynchronous"]])
    seen = Most()

    def done() -> bool:
        seen.see(db)
        row = db.execute("select count(*) from stepwell.runs where state = 'open'").fetchone()
        return row == (0,)

    wait_until(done, 120, what=f"{RUNS} runs of {workflow}")
    return seen


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
        seen = most(db, workflow)
    assert seen.supervisor == SUPERVISOR + EXPORTER
    # A process that the others leave nothing to flush opens no session for it.
    assert len(seen.workers) == PROCESSES
    assert max(seen.workers) == ENGINE + libraries * POOL
    assert 0 < seen.worker_files <= DESCRIPTORS + max(seen.workers)
    assert 0 < seen.supervisor_files <= SUPERVISOR_DESCRIPTORS + FOR_EACH_CHILD * PROCESSES


def test_without_metrics_nobody_exports(db: Db, database_url: str, tmp_path: Path) -> None:
    with worker(database_url, tmp_path):
        wait_until(lambda: supervisors(db) >= SUPERVISOR)
        seen = most(db, "asynchronous")
    assert seen.supervisor == SUPERVISOR
    assert max(seen.workers) == ENGINE


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
            # Who had to wait need not be who has executed it, and waits for two seconds between its attempts.
            wait_until(lambda: "the database can be reached again" in (tmp_path / "log").read_text())
        log = (tmp_path / "log").read_text()
        assert "another takes its place" not in log  # nobody gave up over it
        wait_until(lambda: not sessions(db))
