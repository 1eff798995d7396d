"""A database that is put back from a dump while runs were at every stage, and workers that knew more than it does."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest

from tests import postgres
from tests.crash.fleet import Fleet
from tests.postgres import Cluster
from tests.waiting import wait_until

pytestmark = pytest.mark.crash

QUICK: dict[str, Any] = {
    "beat_seconds": 0.2,
    "lost_lock_seconds": 1.0,
    "lease_seconds": 5.0,
    "grace_seconds": 5.0,
}
END_SECONDS = 60.0


class Backup:
    """A dump of one database, and the two ways to put it back."""

    def __init__(self, cluster: Cluster, url: str, home: Path) -> None:
        self._cluster, self._url, self._file = cluster, url, home / "stepwell.dump"
        self._name = urlsplit(url).path.removeprefix("/")

    def take(self) -> None:
        """Dump everything, while whoever works goes on."""
        self._run("pg_dump", "--format=custom", f"--file={self._file}", self._url)

    def put_back(self) -> None:
        """Replace the database by what was dumped, under its own name, as docs/operations.md says: built beside it, renamed."""
        beside = f"{self._name}_restored"
        self._cluster.execute(f"create database {beside} template template0")
        self._run("pg_restore", "--exit-on-error", f"--dbname={self._cluster.url(beside)}", str(self._file))
        # Who comes meanwhile is refused, and tries again.
        lost = f"{self._name}_lost"
        self._cluster.execute(f"alter database {self._name} with allow_connections false")
        self._cluster.execute(
            f"select pg_terminate_backend(pid, 10000) from pg_stat_activity where datname = '{self._name}'"
        )
        self._cluster.execute(f"alter database {self._name} rename to {lost}")
        self._cluster.execute(f"alter database {beside} rename to {self._name}")
        self._cluster.execute(f"drop database {lost}")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(postgres.binaries(self._cluster.version) / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture
def backup(cluster: Cluster, database_url: str, tmp_path: Path) -> Backup:
    return Backup(cluster, database_url, tmp_path)


@contextmanager
def started(url: str, home: Path, supervisors: int = 1) -> Iterator[Fleet]:
    fleet = Fleet(url, home, **QUICK)
    try:
        for _ in range(supervisors):
            fleet.start()
        yield fleet
    finally:
        fleet.stop()


def ended(fleet: Fleet) -> dict[UUID, str]:
    """Wait until no run is open; return how each has ended."""

    def states() -> dict[UUID, str] | None:
        found = dict(fleet.db.execute("select id, state from stepwell.runs").fetchall())
        return None if "open" in found.values() else found

    return wait_until(states, END_SECONDS, what="the runs to end")


def record_ends(fleet: Fleet, run: UUID) -> list[str]:
    """Return the names of a run's steps that are recorded as completed, in order."""
    return [name for name, n, outcome in fleet.history(run) if n == 0 and outcome == "completed"]


def task_of(fleet: Fleet, run: UUID) -> tuple[int, int]:
    """Return id and attempt of the run's task."""
    row = fleet.db.execute(
        "select id, attempt from stepwell.tasks where run_id = %s and path = '{}' and kind = 'run'", (run,)
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def test_after_a_restore_every_run_ends_and_what_was_recorded_before_the_backup_is_not_executed_again(
    database_url: str, tmp_path: Path, backup: Backup
) -> None:
    with started(database_url, tmp_path) as fleet:
        succeeded = fleet.enqueue("journey", name="before")
        fleet.wait_for(succeeded, "succeeded")
        blocked = fleet.enqueue("journey", wrong=1)
        fleet.wait_for(blocked, "blocked")
        cancelled = fleet.enqueue("nap", seconds=3600)
        fleet.db.execute("select stepwell.cancel(%s)", (cancelled,))
        fleet.wait_for(cancelled, "cancelled")
        sleeping = fleet.enqueue("nap", seconds=6)
        fleet.wait_for(sleeping, "waiting")
        # Not begun at the backup; a step that must be executed once at the most.
        delayed = fleet.db.execute(
            """select stepwell.enqueue('launch', '{"name": "delayed"}', delay => '6 seconds')"""
        ).fetchone()
        assert delayed is not None
        with fleet.gate("before-count"), fleet.gate("before-fire"):
            amid = fleet.enqueue("journey", name="amid")
            held = fleet.enqueue("launch", name="held")
            fleet.reached("before-count")
            fleet.reached("before-fire")
            wait_until(lambda: record_ends(fleet, amid) == ["greet"], what="greet to be recorded")
            backup.take()
        lost = fleet.enqueue("journey", name="lost")
        assert set(ended(fleet).values()) == {"succeeded", "blocked", "cancelled"}
        done_before = fleet.effects()
        assert done_before == {"greet": 4, "count": 3, "save": 3, "pay": 3, "fire": 2}
        keys_before = {step: fleet.keys(step) for step in done_before}
        fleet.stop()

        backup.put_back()
        fleet.reconnect()
        fleet.start(claiming=False)
        states = ended(fleet)
        assert states == {
            succeeded: "succeeded",
            blocked: "blocked",
            cancelled: "cancelled",
            sleeping: "succeeded",
            delayed[0]: "succeeded",
            amid: "succeeded",
            held: "blocked",  # it was under way at the backup: nobody can know
        }
        assert lost not in states
        # What was in flight counts as interrupted, on the call after the one that was recorded.
        assert ("count", 1, "interrupted") in fleet.history(amid)
        # greet again for the run that slept at the backup; count, save for the one in the middle; fire for the one that had
        # not begun, whatever on_crash says; pay was executed, found its own effect, and only then asked.
        assert fleet.effects() - done_before == {"greet": 1, "count": 1, "save": 1, "fire": 1}
        assert {step: fleet.keys(step) for step in done_before} == keys_before
        assert ("pay", 1, "failed") in fleet.history(amid)
        # The rows of a transactional step went with the database, and came again with their record.
        assert fleet.db.execute("select count(*), count(distinct run) from saved").fetchone() == (2, 2)
        assert fleet.db.execute("select count(*) from stepwell.tasks").fetchone() == (0,)


def test_a_worker_that_was_frozen_before_the_restore_writes_nothing_after_it(
    database_url: str, tmp_path: Path, backup: Backup
) -> None:
    with started(database_url, tmp_path) as fleet:
        with fleet.gate("before-count"):
            run = fleet.enqueue("journey", name="Ann")
            fleet.reached("before-count")
            stale = fleet.holder(run)
            wait_until(lambda: record_ends(fleet, run) == ["greet"], what="greet to be recorded")
            backup.take()
            fleet.signal_tree(stale.supervisor_pid, signal.SIGSTOP)
            backup.put_back()
            fleet.reconnect()
            fleet.start(claiming=False)
            successor = wait_until(
                lambda: (now := fleet.holder(run)).worker != stale.worker and now,
                END_SECONDS,
                what="a takeover",
            )
            os.kill(stale.pid, signal.SIGCONT)
            fleet.signal_supervisor(stale.supervisor_pid, signal.SIGCONT)
        assert ended(fleet) == {run: "succeeded"}
        wait_until(lambda: fleet.effects()["count"] == 2, what="the step of the frozen worker to end as well")
        written = dict(
            fleet.db.execute(
                "select name, worker from stepwell.outbox where run_id = %s and n = 0", (run,)
            ).fetchall()
        )
        assert written.pop("greet") == stale.worker  # before the backup
        assert written["count"] == successor.worker
        assert stale.worker not in written.values()
        assert record_ends(fleet, run) == ["greet", "count", "sleep", "save", "pay"]
        assert fleet.db.execute("select count(*) from saved").fetchone() == (1,)
        assert fleet.effects()["greet"] == 1


def test_a_worker_that_goes_on_through_a_restore_writes_nothing_of_a_run_that_is_gone_over_another_one(
    database_url: str, tmp_path: Path, backup: Backup
) -> None:
    """The ids of tasks are given once more; that worker has the lost run and the new one under one id."""
    with started(database_url, tmp_path) as fleet:
        backup.take()
        with fleet.gate("before-greet"):
            lost = fleet.enqueue("journey", name="lost")
            fleet.reached("before-greet")
            held, as_lost = fleet.holder(lost), task_of(fleet, lost)
            worker = held.worker
            # Frozen for that long, it does not see the moment without a database, in which it would end.
            fleet.signal_tree(held.supervisor_pid, signal.SIGSTOP)
            backup.put_back()
            fleet.reconnect()
            fleet.signal_tree(held.supervisor_pid, signal.SIGCONT)
            run = fleet.enqueue("journey", name="new")
            assert fleet.holder(run).worker == worker
            assert task_of(fleet, run) == as_lost, "the case that is meant"
            wait_until(lambda: _started(fleet, "greet") == 2, what="both to stand at the gate")
        assert ended(fleet) == {run: "succeeded"}
        assert record_ends(fleet, run) == ["greet", "count", "sleep", "save", "pay"]
        foreign = "select count(*) from stepwell.outbox where run_id <> %s"
        assert fleet.db.execute(foreign, (run,)).fetchone() == (0,)
        output = fleet.db.execute("select output from stepwell.runs where id = %s", (run,)).fetchone()
        assert output is not None
        assert output[0] == ["hello new", 9, 9, "paid new"]
        assert fleet.db.execute("select name from saved").fetchall() == [("new",)]
        # The lost run's step ended at the gate's opening, and nothing came after it.
        assert fleet.effects() == {"greet": 2, "count": 1, "save": 1, "pay": 1}


def _started(fleet: Fleet, step: str) -> int:
    return sum(line[0] == "start" and line[1] == step for line in fleet._ledger())
