"""Real Postgres servers for the tests: the embedded 18 and 16, and the system's 15.

A cluster lives in a directory of its own and is stopped and deleted at the end of the session; one that a
killed session left behind is cleaned up by the next. Nothing is synced to disk: killing Postgres processes
does not lose what the kernel holds, so crash tests may use such a cluster as well.
"""

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from outbox import embedded
from outbox.database import connect
from outbox.schema import migrate

VERSIONS = (18, 16, 15)
PREFIX = "stepwell-tests-"
TEMPLATE = "stepwell_template"
MEMORY_NEEDED_BYTES = 8 * 2**30
SETTINGS = {
    **embedded.SERVER_SETTINGS,
    "fsync": "off",
    "full_page_writes": "off",
    "cluster_name": "stepwell-tests",
    "log_lock_waits": "on",
    "track_commit_timestamp": "on",  # tests/crash/checker.py compares these times with those of steps
    "max_prepared_transactions": "4",
}


class Cluster:
    """One Postgres server under the control of a test."""

    def __init__(self, version: int, home: Path, **settings: str) -> None:
        self.version = version
        self.server = embedded.Server(home, binaries(version), {**SETTINGS, **settings})
        self._numbers = itertools.count(1)

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, None while it is down."""
        return self.server.pid

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.server.log

    def start(self) -> None:
        """Start the server unless it runs, and wait until it accepts connections."""
        self.server.start()

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server and wait until it is gone."""
        self.server.stop(mode)

    def restart(self, mode: Literal["fast", "immediate"] = "immediate") -> None:
        """Stop and start; `immediate` aborts all backends and recovers, as after a crash."""
        self.stop(mode)
        self.start()

    def processes(self) -> list[int]:
        """Return the process ids of the server, the postmaster's first."""
        found = embedded.PidFile.read(self.server.data)
        if found is None:
            return []
        children = Path(f"/proc/{found.pid}/task/{found.pid}/children")
        return [found.pid, *map(int, children.read_text().split())] if children.exists() else [found.pid]

    def freeze(self) -> None:
        """Stop every process of the server where it is (SIGSTOP); `thaw` lets them go on."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on; safe when it is not."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def url(self, dbname: str = "postgres") -> str:
        """Return the URL of a database, also while the server is down."""
        socket_dir = self.server.socket_dir()
        return f"postgresql://postgres@/{quote(dbname)}?host={quote(str(socket_dir))}&port={embedded.PORT}"

    def execute(self, statement: str) -> None:
        """Run one administrative statement outside a transaction."""
        with connect(self.url(), application_name="tests") as connection:
            connection.execute(statement.encode())

    def psql(self, url: str, script: str) -> None:
        """Have this version's psql run a script, as somebody would who has it in a file.

        Raise CalledProcessError, with what it said on stderr, when it ends with an error.
        """
        subprocess.run(
            [binaries(self.version) / "psql", "--no-psqlrc", "--quiet", url],
            input=script, text=True, capture_output=True, check=True, timeout=120,
        )  # fmt: skip

    @contextmanager
    def database(self, template: str | None = TEMPLATE) -> Iterator[str]:
        """Yield the URL of a new database: with Stepwell's schema, or empty for `template=None`."""
        self.start()  # an earlier test may have left it down
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        self.execute(f"create database {name} template {template or 'template0'}")
        try:
            yield self.url(name)
        finally:
            self.start()
            self.execute(f"drop database if exists {name} with (force)")

    def make_template(self) -> None:
        """Install the schema once; each test copies it."""
        self.execute(f"create database {TEMPLATE}")
        with connect(self.url(TEMPLATE), application_name="tests") as connection:
            migrate(connection)
            # A sequence in a copied database falls back to its last value on disk when the server is killed before
            # its first checkpoint; written now, that is where each test starts anyway.
            for sequence in ("stepwell.turns", "stepwell.tasks_id_seq"):
                connection.execute("select setval(%s, nextval(%s))", (sequence, sequence))
            connection.execute("checkpoint")


@contextmanager
def running(version: int, **settings: str) -> Iterator[Cluster]:
    """Yield a started cluster of that major version, without a database of ours in it. `settings` are the server's."""
    _remove_left_behind()
    home = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=places()[0]))
    home.chmod(0o755)  # the account that runs Postgres for root passes through
    cluster = Cluster(version, home, **settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


def binaries(version: int) -> Path:
    """Return the server programs of a major version; raise LookupError when this machine has none."""
    if version in (16, 18):
        return embedded.binaries(version)
    candidates = [
        Path(f"/usr/lib/postgresql/{version}/bin"),
        Path(f"/opt/homebrew/opt/postgresql@{version}/bin"),
    ]
    if shutil.which("pg_config"):
        said = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=True).stdout
        candidates.insert(0, Path(said.strip()))
    for candidate in candidates:
        if (candidate / "postgres").exists() and _major(candidate) == version:
            return candidate
    raise LookupError(f"no Postgres {version} on this machine; install it or choose another --postgres")


def _major(bin_dir: Path) -> int:
    said = subprocess.run(
        [bin_dir / "postgres", "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"(\d+)", said)
    return int(match[1]) if match else 0


def places() -> list[Path]:
    """Return where clusters may live, best first; pytest's own directories are closed to other accounts."""
    memory, disk = Path("/dev/shm"), Path("/var/tmp")
    found = [disk if disk.is_dir() else Path(tempfile.gettempdir())]
    # A new database is 350 new files: in memory that takes a tenth of the time.
    if (
        memory.is_dir()
        and os.access(memory, os.W_OK)
        and shutil.disk_usage(memory).free > MEMORY_NEEDED_BYTES
    ):
        found.insert(0, memory)
    return found


def _remove_left_behind() -> None:
    """Stop and delete clusters of test sessions whose process is gone."""
    for home in itertools.chain.from_iterable(parent.glob(f"{PREFIX}*") for parent in places()):
        match = re.fullmatch(rf"{PREFIX}(\d+)-.*", home.name)
        if match is None or home.stat().st_uid != os.geteuid() or _lives(int(match[1])):
            continue
        version_file = home / "postgres" / "PG_VERSION"
        if version_file.exists():
            Cluster(int(version_file.read_text()), home).stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def found() -> list[int]:
    """Return the versions that this machine has, the one that tests run on by default first."""
    there = []
    for version in VERSIONS:
        try:
            binaries(version)
        except LookupError:
            continue
        there.append(version)
    return there


if __name__ == "__main__":
    sys.stdout.write(" ".join(map(str, found()[1:])) + "\n")
