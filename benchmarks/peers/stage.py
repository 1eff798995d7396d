"""Where one system is measured: a fresh database, its worker processes, and what took effect.

Nobody is asked how far a system is: each execution of a step appends a byte to a file, whose size is free to read. Cost is
what the kernel has charged to the processes of the workers and of Postgres, and what Postgres counts of itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.machine import Bench, wait_for
from benchmarks.peers.systems import System
from outbox.database import connect

START_SECONDS = 90
COMMAND_SECONDS = 600
STOP_SECONDS = 15
TICKS = os.sysconf("SC_CLK_TCK")
OUR_APPLICATION = "bench"


class FailedError(Exception):
    """A system did not do what it was asked to; the message says what."""


@dataclass
class Stage:
    """One system on a database of its own. Use `stage`."""

    system: System
    bench: Bench
    url: str
    home: Path
    workers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def effects(self) -> Path:
        return self.home / "effects"

    @property
    def marks(self) -> Path:
        return self.home / "marks"

    @property
    def log(self) -> Path:
        return self.home / "log"

    # -- what is done

    def run(self, *arguments: object) -> str:
        """Run a command of the system's program; return what it prints. Raises FailedError."""
        try:
            return subprocess.run(
                self.system.command(*arguments), env=self._environment(), cwd=self.home, capture_output=True,
                text=True, timeout=COMMAND_SECONDS, check=True,
            ).stdout  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"{arguments[0]} did not end within {COMMAND_SECONDS} s") from error
        except subprocess.CalledProcessError as error:
            raise FailedError(f"{arguments[0]} failed: {_end_of(error.stderr)}") from error

    def enqueue(self, work: str, count: int, mode: str = "bulk") -> float:
        """Enqueue runs and return how many seconds that took."""
        said = self.run("enqueue", work, count, mode)
        return float(json.loads(said.strip().splitlines()[-1])["seconds"])

    def start_worker(self) -> subprocess.Popen[str]:
        """Start one worker process; return when it takes work. Raises FailedError."""
        with self.log.open("a") as log:
            started = subprocess.Popen(
                self.system.command("work"), env=self._environment(), cwd=self.home, stdout=subprocess.PIPE,
                stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        self.workers.append(started)
        assert started.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        for line in started.stdout:
            if line.strip() == "ready":
                _drain(started)
                return started
            if time.monotonic() > deadline:
                break
        raise FailedError(f"a worker does not start: {_end_of(self.log.read_text())}")

    def stop(self) -> None:
        """End the workers, whatever state they are in."""
        for each in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGCONT)
                each.send_signal(signal.SIGTERM)
        for each in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()
        self.workers.clear()

    # -- what is seen

    def took_effect(self) -> int:
        """Return how many executions of steps there were."""
        return self.effects.stat().st_size if self.effects.exists() else 0

    def wait_for_effects(self, count: int, seconds: float, every: float = 0.01) -> None:
        """Return when there were so many. Raises FailedError."""
        try:
            wait_for(lambda: self.took_effect() >= count, seconds, every=every)
        except TimeoutError:
            raise FailedError(
                f"{self.took_effect()} of {count} effects after {seconds:.0f} s: {_end_of(self.log.read_text())}"
            ) from None

    def left(self) -> int:
        """Return how many runs are not over."""
        with connect(self.url, application_name=OUR_APPLICATION) as db:
            return _number(db, self.system.said["left"])

    def marked(self) -> list[tuple[str, int, int]]:
        """Return (word, nanoseconds, process) of each mark."""
        if not self.marks.exists():
            return []
        lines = self.marks.read_text().splitlines()
        return [(word, int(at), int(pid)) for word, at, pid in (line.split() for line in lines)]

    def settle(self) -> None:
        """Leave the database as it would be after a while: vacuumed, and with nothing to write back."""
        with connect(self.url, application_name=OUR_APPLICATION) as db:
            db.execute("vacuum analyze")
            db.execute("checkpoint")

    def cost(self) -> Cost:
        """Return what the workers and Postgres have spent so far."""
        with connect(self.url, application_name=OUR_APPLICATION) as db:
            db.execute("select pg_stat_force_next_flush()" if _knows_flush(db) else "select 1")
            row = db.execute(
                "select xact_commit, pg_current_wal_lsn() - '0/0'::pg_lsn from pg_stat_database"
                " where datname = current_database()"
            ).fetchone()
            assert row is not None
            statements: float | None = None
            with contextlib.suppress(psycopg.errors.UndefinedTable):
                statements = float(_number(db, STATEMENTS))
        postmaster = self.bench.server.pid
        assert postmaster is not None
        return Cost(
            worker_cpu=sum(_cpu(pid, ended=True) for each in self.workers for pid in (each.pid, *descendants(each.pid))),
            # Backends that have ended are on the postmaster's account.
            postgres_cpu=_cpu(postmaster, ended=True) + sum(_cpu(pid) for pid in descendants(postmaster)),
            commits=float(row[0]), wal_bytes=float(row[1]), statements=statements,
        )  # fmt: skip

    def memory_mb(self) -> float:
        """Return what the workers hold, shared pages counted in proportion."""
        pids = [pid for each in self.workers for pid in (each.pid, *descendants(each.pid))]
        return sum(map(_pss_mb, pids))

    def _environment(self) -> dict[str, str]:
        return self.system.environment(self.url, self.effects, self.marks)


@dataclass(frozen=True)
class Cost:
    """Spent since the beginning: CPU in seconds, and what Postgres counts. Statements where it can count them."""

    worker_cpu: float
    postgres_cpu: float
    commits: float
    wal_bytes: float
    statements: float | None

    def since(self, before: Cost, runs: float) -> dict[str, float]:
        """Return what one of so many runs has cost."""
        figures = {
            "worker_cpu_ms_per_run": 1000 * (self.worker_cpu - before.worker_cpu) / runs,
            "postgres_cpu_ms_per_run": 1000 * (self.postgres_cpu - before.postgres_cpu) / runs,
            "commits_per_run": (self.commits - before.commits) / runs,
            "wal_bytes_per_run": (self.wal_bytes - before.wal_bytes) / runs,
        }
        if self.statements is not None and before.statements is not None:
            figures["statements_per_run"] = (self.statements - before.statements) / runs
        return figures


STATEMENTS = """
select coalesce(sum(calls), 0) from pg_stat_statements
where toplevel and dbid = (select oid from pg_database where datname = current_database())
"""


@contextlib.contextmanager
def stage(bench: Bench, system: System) -> Iterator[Stage]:
    """Yield a stage with the system's schema installed; its workers end with it."""
    home = Path(tempfile.mkdtemp(prefix="peer-", dir=bench.home))
    with bench.database() as url:
        made = Stage(system, bench, url, home)
        try:
            with connect(url, application_name=OUR_APPLICATION) as db, contextlib.suppress(psycopg.Error):
                db.execute("create extension if not exists pg_stat_statements")
            made.run("install")
            yield made
        finally:
            made.stop()


def descendants(pid: int) -> list[int]:
    """Return the processes below one."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def _cpu(pid: int, *, ended: bool = False) -> float:
    """Return the CPU seconds of a process, with those of its children that it has waited for if wanted."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11 : 15 if ended else 13])) / TICKS


def _pss_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _number(db: psycopg.Connection[Any], query: str) -> int:
    row = db.execute(query.encode()).fetchone()
    return int(row[0]) if row else 0


def _knows_flush(db: psycopg.Connection[Any]) -> bool:
    return db.execute("select to_regproc('pg_stat_force_next_flush')").fetchone() != (None,)


def _drain(process: subprocess.Popen[str]) -> None:
    """Read on, so that a talkative worker never blocks on its pipe."""
    import threading

    threading.Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()


def _end_of(said: str | None) -> str:
    lines = [line.strip() for line in (said or "").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:] or "without a word"
