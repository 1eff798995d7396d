"""The machine under the benchmarks: a durable Postgres of its own, and workers as real processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
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

    def __init__(self, home: Path, bin_dir: Path, settings: Mapping[str, str]) -> None:
        self.home = home
        self.bin_dir = bin_dir
        self.server = embedded.Server(home, bin_dir, {**embedded.SERVER_SETTINGS, **SETTINGS, **settings})
        self._databases = 0
        self._numbers = itertools.count(1)

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Yield the URL of an empty database, which goes at the end. The server has to listen on 127.0.0.1."""
        name = f"bench_{next(self._numbers)}"
        with connect(self.server.running_url() or "", application_name="bench") as admin:
            admin.execute(f"create database {name}")  # type: ignore[arg-type]  # names of our own making
            try:
                yield f"postgresql://{embedded.SUPERUSER}@127.0.0.1:{embedded.PORT}/{name}"
            finally:
                admin.execute(f"drop database {name} with (force)")  # type: ignore[arg-type]  # as above
                admin.execute("checkpoint")

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
def bench(version: int, **settings: str) -> Iterator[Bench]:
    """Start a cluster in a directory of its own on disk, and remove it at the end."""
    home = Path(tempfile.mkdtemp(prefix="stepwell-bench-", dir="/var/tmp"))
    home.chmod(0o755)
    made = Bench(home, binaries(version), settings)
    try:
        made.server.start()
        yield made
    finally:
        made.server.stop()
        shutil.rmtree(home, ignore_errors=True)


def binaries(version: int) -> Path:
    """Return where the server's programs are: the system's for the version that it has, else the wheel's."""
    installed = _installed()
    return installed[1] if installed is not None and installed[0] == version else embedded.binaries(version)


def installed_version() -> int | None:
    """Return the major version of the system's Postgres, None where it has none."""
    installed = _installed()
    return None if installed is None else installed[0]


def _installed() -> tuple[int, Path] | None:
    try:
        found = subprocess.run(
            ["pg_config", "--bindir"], capture_output=True, text=True, check=True
        ).stdout.strip()
        said = subprocess.run(
            [f"{found}/postgres", "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r" (\d+)", said)
    return (int(match[1]), Path(found)) if match else None


def wait_for(condition: Any, seconds: float, *, every: float = 0.005) -> None:
    """Return when `condition`, which is asked so often, answers true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a benchmark waited in vain; see workers.log")
        time.sleep(every)


@contextlib.contextmanager
def stuck_transaction(url: str, *, application_name: str) -> Iterator[None]:
    """Hold a transaction open that has written something, with its snapshot."""
    with connect(url, application_name=application_name) as db:
        db.execute("create table if not exists bench_stuck (n int)")
        db.execute("begin isolation level repeatable read")
        db.execute("insert into bench_stuck values (1)")
        yield
        db.execute("rollback")


def living(db: psycopg.Connection[Any]) -> int:
    """Return how many workers are registered and not declared dead."""
    row = db.execute("select count(*) from stepwell.workers where dead_at is null").fetchone()
    return int(row[0]) if row else 0
