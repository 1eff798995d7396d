"""Supervisors under test: in this process, or in one of their own; and what the database says of their workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from outbox.settings import Settings
from tests.waiting import wait_until_async
from worker.supervision.liveness import Detector
from worker.supervision.supervisor import Event, Supervisor

until = partial(wait_until_async, timeout=30)
"""Starting a process takes its time on a busy machine."""

Db = psycopg.Connection[TupleRow]

SCRIPTED = [sys.executable, "-m", "tests.integration.scripted_worker"]
QUICK: dict[str, Any] = {
    "beat_seconds": 0.1,
    "lost_lock_seconds": 0.6,
    "lease_seconds": 2.0,
    "stopped_after_seconds": 0.5,
    "grace_seconds": 5.0,
}


class Supervised:
    """A supervisor in this process, with what it reported."""

    def __init__(self, url: str, app: str, processes: int, settings: dict[str, Any], **options: Any) -> None:
        self.events: list[Event] = []
        self.reclaims: list[tuple[Detector, int]] = []
        self.supervisor = Supervisor(
            Settings(**{**QUICK, **settings}),
            url,
            app=app,
            processes=processes,
            child_command=options.pop("child_command", SCRIPTED),
            on_event=self.events.append,
            on_reclaim=lambda *what: self.reclaims.append(what),
        )
        self.running: asyncio.Task[int] = asyncio.create_task(self.supervisor.run())

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)

    def lose_patience(self, after_seconds: float) -> None:
        """From now on, hold a child for hung so soon; how long one takes to start does not matter then."""
        for child in self.supervisor._children.values():
            child._watchdog._hang_after_seconds = after_seconds

    @property
    def pids(self) -> list[int]:
        """The children that claim."""
        return [child.pid for child in self.supervisor.vitals().children if child.ready]

    @property
    def worker_ids(self) -> list[int]:
        return [child.worker_id for child in self.supervisor.vitals().children if child.ready]


@asynccontextmanager
async def supervising(
    url: str, app: str = "work", processes: int = 1, settings: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Supervised]:
    """Run a supervisor for as long as the block, then stop it."""
    supervised = Supervised(url, app, processes, settings or {}, **options)
    try:
        yield supervised
    finally:
        supervised.supervisor.drain()
        await asyncio.wait({supervised.running}, timeout=20)
        supervised.supervisor.stop()
        ended, _ = await asyncio.wait({supervised.running}, timeout=20)
        assert ended, f"the supervisor does not end: {supervised.running.get_stack()}"


@contextmanager
def lone_supervisor(
    url: str,
    app: str = "work",
    processes: int = 1,
    *,
    real: bool = False,
    log: Path | None = None,
    **settings: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a supervisor in a process group of its own; whatever is left of the group is killed at the end."""
    root = Path(__file__).resolve().parents[2]
    arguments = [url, json.dumps({**QUICK, **settings}), app, str(processes), *(["real"] if real else [])]
    with (log or Path(os.devnull)).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.lone_supervisor", *arguments],
            cwd=root,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def is_gone(pid: int) -> bool:
    """Tell whether no process runs under this id; a zombie does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def enqueue(db: Db, tasks: int) -> None:
    db.execute("select stepwell.enqueue('w') from generate_series(1, %s)", [tasks])


def workers(db: Db) -> list[tuple[int, int]]:
    """Return (id, pid) of every worker that the database knows."""
    return db.execute("select id, pid from stepwell.workers order by started_at").fetchall()


def claims(db: Db) -> dict[int, int]:
    """Return how many tasks each worker holds."""
    statement = "select claimed_by, count(*) from stepwell.tasks where state = 'claimed' group by 1"
    return dict(db.execute(statement).fetchall())


async def wait_for_workers(db: Db, number: int) -> list[tuple[int, int]]:
    def enough() -> list[tuple[int, int]]:
        found = workers(db)
        return found if len(found) == number else []

    return await until(enough, what=f"{number} workers")
