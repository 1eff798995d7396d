"""The machine under the benchmarks: a durable Postgres of its own, and workers as real processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from outbox import embedded
from outbox.database import connect
from outbox.schema import migrate

ROOT = Path(__file__).parents[1]
SETTINGS = {"fsync": "on", "synchronous_commit": "on", "shared_buffers": "512MB", "max_wal_size": "4GB"}


class Bench:
    """One cluster, with one fresh database at a time."""

    def __init__(self, home: Path, bin_dir: Path) -> None:
        self.home = home
        self.bin_dir = bin_dir
        self.server = embedded.Server(home, bin_dir, {**embedded.SERVER_SETTINGS, **SETTINGS})
        self._databases = 0

    def fresh(self) -> str:
        """Create a database with the schema and return its URL. The one before goes, and leaves nothing to clean up."""
        before, self._databases = f"bench{self._databases}", self._databases + 1
        name = f"bench{self._databases}"
        with connect(self.server.running_url() or "", application_name="bench") as admin:
            admin.execute(f"drop database if exists {before} with (force)")  # type: ignore[arg-type]  # names of our own making
            admin.execute("checkpoint")
            admin.execute(f"create database {name}")  # type: ignore[arg-type]  # as above
        url = self.server.running_url(name)
        assert url is not None
        with connect(url, application_name="bench") as connection:
            migrate(connection)
        return url

    @contextlib.contextmanager
    def workers(self, url: str, processes: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a supervisor with so many workers; return when they claim."""
        supervisor = self.start(url, processes, **environment)
        try:
            yield supervisor
        finally:
            self.end(supervisor)

    def start(self, url: str, processes: int, **environment: str) -> subprocess.Popen[bytes]:
        with connect(url, application_name="bench") as db:
            before = living(db)
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", "worker", "benchmarks.workload", "--processes", str(processes)],
                env={**os.environ, "STEPWELL_DATABASE_URL": url, "PYTHONPATH": str(ROOT), **environment},
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=(self.home / "workers.log").open("ab"),
            )  # fmt: skip
            wait_for(lambda: living(db) >= before + processes, 60)
        return supervisor

    def end(self, supervisor: subprocess.Popen[bytes]) -> None:
        if supervisor.poll() is None:
            supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(60)


@contextlib.contextmanager
def bench(version: int) -> Iterator[Bench]:
    """Start a cluster in a directory of its own on disk, and remove it at the end."""
    home = Path(tempfile.mkdtemp(prefix="stepwell-bench-", dir="/var/tmp"))
    home.chmod(0o755)
    made = Bench(home, binaries(version))
    try:
        made.server.start()
        yield made
    finally:
        made.server.stop()
        shutil.rmtree(home, ignore_errors=True)


def binaries(version: int) -> Path:
    """Return where the server's programs are: the system's for the version that it has, else the wheel's."""
    try:
        found = subprocess.run(
            ["pg_config", "--bindir"], capture_output=True, text=True, check=True
        ).stdout.strip()
        said = subprocess.run(
            [f"{found}/postgres", "--version"], capture_output=True, text=True, check=True
        ).stdout
        if f" {version}." in said:
            return Path(found)
    except (OSError, subprocess.CalledProcessError):
        pass
    return embedded.binaries(version)


def wait_for(condition: Any, seconds: float, *, every: float = 0.005) -> None:
    """Return when `condition`, which is asked so often, answers true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a benchmark waited in vain; see workers.log")
        time.sleep(every)


def living(db: psycopg.Connection[Any]) -> int:
    """Return how many workers are registered and not declared dead."""
    row = db.execute("select count(*) from stepwell.workers where dead_at is null").fetchone()
    return int(row[0]) if row else 0
