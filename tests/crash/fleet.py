"""Real worker processes for the crash tests: start them, find who holds a run, and kill with real signals."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Json

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
APP = ROOT / "tests" / "crash" / "flows.py"


@dataclass(frozen=True)
class Held:
    """Who holds a run: a worker process and its supervisor."""

    pid: int
    supervisor_pid: int
    worker: int = 0
    """The worker's id in the database."""

    @property
    def application(self) -> str:
        """The name of the worker's connections."""
        return f"stepwell {self.worker}"


class Fleet:
    """Supervisors with their workers on one database. `home` holds the ledger and the gates.

    `workers_url` is by which way the workers reach the database, if it is another one. With `metrics` each supervisor
    serves its metrics; `queues` are those that all of them serve.
    """

    def __init__(
        self, url: str, home: Path, *, app: Path = APP, workers_url: str = "", metrics: bool = False,
        queues: Sequence[str] = ("default",), environment: Mapping[str, str] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.home = home
        self._app = app
        self._url = url
        self._arguments = ["--metrics-port", "0", "--metrics-host", "127.0.0.1"] if metrics else []
        self._arguments += [each for queue in queues for each in ("--queue", queue)]
        self.db = psycopg.connect(url, autocommit=True)
        self.db.execute("create table saved (run uuid, name text, size int)")
        self._supervisors: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            **(environment or {}),
            "STEPWELL_DATABASE_URL": workers_url or url,
            "STEPWELL_TEST_HOME": str(home),
            "PYTHONPATH": str(ROOT),
            **{f"STEPWELL_{name.upper()}": str(value) for name, value in settings.items()},
        }

    def start(self, processes: int = 1, *, claiming: bool = True) -> subprocess.Popen[bytes]:
        """Start a supervisor and return, mostly when its workers claim."""
        before = self._count()
        log = (self.home / f"supervisor-{len(self._supervisors)}.log").open("wb")
        supervisor = subprocess.Popen(
            [
                sys.executable, "-m", "worker.cli", "worker", str(self._app), "--processes", str(processes),
                *self._arguments,
            ],
            env=self.environment, stdout=log, stderr=log, cwd=self.home,
        )  # fmt: skip
        log.close()
        self._supervisors.append(supervisor)
        if not claiming:
            return supervisor
        wait_until(lambda: self._count() >= before + processes, 120, what="the workers to register")
        return supervisor

    def reconnect(self) -> None:
        """Connect anew, where the server has ended our own connection."""
        self.db.close()
        self.db = psycopg.connect(self._url, autocommit=True)

    @property
    def living(self) -> list[subprocess.Popen[bytes]]:
        """The supervisors that run."""
        return [each for each in self._supervisors if each.poll() is None]

    def stop(self) -> None:
        """Drain every supervisor that lives; kill what does not end."""
        living = self.living
        for each in living:
            each.send_signal(signal.SIGTERM)
        for each in living:
            try:
                each.wait(20)
            except subprocess.TimeoutExpired:
                self.kill_tree(each.pid)
        for each in self._supervisors:
            each.wait()
        self.db.close()

    def enqueue(self, workflow: str, **input: Any) -> UUID:
        row = self.db.execute("select stepwell.enqueue(%s, %s)", (workflow, Json(input))).fetchone()
        assert row is not None
        run: UUID = row[0]
        return run

    # -- what is going on

    def status(self, run: UUID) -> str:
        row = self.db.execute("select status from stepwell.run_status where id = %s", (run,)).fetchone()
        assert row is not None
        return str(row[0])

    def holder(self, run: UUID) -> Held:
        """Return who holds the run's claim, as soon as somebody does."""

        def found() -> Any:
            return self.db.execute(
                "select w.pid, w.id from stepwell.tasks t join stepwell.workers w on w.id = t.claimed_by where t.run_id = %s",
                (run,),
            ).fetchone()

        pid, worker = wait_until(found, what="a worker to hold the run")
        return Held(pid, parent_of(pid), worker)

    def wait_for(self, run: UUID, status: str, timeout: float = 30.0) -> None:
        wait_until(lambda: self.status(run) == status, timeout, what=f"the run to be {status}")

    def effects(self) -> Counter[str]:
        """Return how often each step took effect, over all runs."""
        return Counter(line[1] for line in self._ledger() if line[0] == "effect")

    def keys(self, step: str) -> set[str]:
        """Return the idempotency keys that executions of a step had."""
        return {line[2] for line in self._ledger() if line[1] == step}

    def history(self, run: UUID) -> list[tuple[str, int, str]]:
        """Return (name, n, outcome) of each record of steps and sleeps, in order."""
        return self.db.execute(
            "select name, n, outcome from stepwell.outbox where run_id = %s and kind <> 'run' order by seq",
            (run,),
        ).fetchall()

    # -- gates and kills

    @contextlib.contextmanager
    def gate(self, name: str) -> Iterator[None]:
        """Close a gate; inside the block somebody stands before it. At the end it is open."""
        (self.home / f"closed-{name}").touch()
        try:
            yield
        finally:
            (self.home / f"closed-{name}").unlink()

    def reached(self, gate: str) -> None:
        wait_until((self.home / f"reached-{gate}").exists, 60, what=f"a step to reach the gate {gate}")

    def kill(self, held: Held, victim: str) -> None:
        """SIGKILL the worker, or its whole tree."""
        if victim == "worker":
            os.kill(held.pid, signal.SIGKILL)
        else:
            self.kill_tree(held.supervisor_pid)

    def kill_one(self, chance: random.Random) -> None:
        """SIGKILL any worker; now and then a whole supervisor with its workers, and start another one instead."""
        if chance.random() < 0.2:
            victim = chance.choice([each for each in self._supervisors if each.poll() is None])
            self.kill_tree(victim.pid)
            victim.wait()
            self.start(2, claiming=False)
            return
        rows = self.db.execute("select pid from stepwell.workers where dead_at is null").fetchall()
        if rows:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(rows)[0], signal.SIGKILL)

    def kill_tree(self, supervisor_pid: int) -> None:
        """SIGKILL a supervisor together with its workers, so that none of them can do anything more."""
        self.signal_tree(supervisor_pid, signal.SIGKILL)

    def signal_tree(self, supervisor_pid: int, number: signal.Signals) -> None:
        """Send a signal to a supervisor of ours and then to its workers."""
        children = children_of(supervisor_pid)
        self.signal_supervisor(supervisor_pid, number)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def signal_supervisor(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a supervisor; it has to be one of ours, and not whoever has inherited its workers."""
        # The last one that was started: in an hour of chaos process ids come round again.
        supervisor = next((each for each in reversed(self._supervisors) if each.pid == pid), None)
        assert supervisor is not None, f"process {pid} is no supervisor of this test"
        supervisor.send_signal(number)

    def _count(self) -> int:
        row = self.db.execute("select count(*) from stepwell.workers where dead_at is null").fetchone()
        assert row is not None
        return int(row[0])

    def _ledger(self) -> list[list[str]]:
        path = self.home / "ledger"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def parent_of(pid: int) -> int:
    """Return the process id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    """Return the process ids of a process's children; of none, if it has gone."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []
