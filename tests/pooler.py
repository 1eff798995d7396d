"""A real PgBouncer in transaction mode before a test's server: small pools whose sessions go round.

Each transaction of a client gets the session that has been idle for longest, and a pool has several of them: whoever counts
on getting the same session again is let down at once, also in a test with one client.

The way through the pooler and the way around it are two addresses of one database: `Pooler.url` makes the first of the
second, `direct` the second of the first.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import psycopg

from outbox import embedded
from tests.postgres import Cluster
from tests.waiting import wait_until

PORT = 6432
SESSIONS = 4
SETTINGS = {
    "pool_mode": "transaction",
    "default_pool_size": "6",
    "min_pool_size": str(SESSIONS),
    "server_round_robin": "1",
    "max_client_conn": "500",
    "server_login_retry": "0.2",
    "server_idle_timeout": "30",
    "query_wait_timeout": "30",
    "autodb_idle_timeout": "30",
    "auth_type": "trust",
    "auth_user": embedded.SUPERUSER,  # looks up the roles that tests make
    "admin_users": embedded.SUPERUSER,
    "log_connections": "0",
    "log_disconnections": "0",
    "unix_socket_mode": "0777",
}


class Unavailable(Exception):
    """This machine has no PgBouncer."""


def program() -> str:
    """Return the path of PgBouncer. Raises Unavailable."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise Unavailable("there is no PgBouncer here; it is the Debian package pgbouncer")
    return found


class Pooler:
    """One PgBouncer before a cluster; enter it to have it run. `settings` go before those of this module."""

    def __init__(self, cluster: Cluster, settings: Mapping[str, str] | None = None) -> None:
        self._program = program()
        self._cluster = cluster
        self.home = cluster.server.home / f"pooler-{os.urandom(3).hex()}"
        self._settings = {**SETTINGS, **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, url: str) -> str:
        """Return the way to the database of `url` that leads through this pooler."""
        server = f"host={quote(str(self._cluster.server.socket_dir()))}&port={embedded.PORT}"
        assert server in url, f"{url} is no address of this cluster"
        return url.replace(server, f"host={quote(str(self.home))}&port={PORT}")

    def warmed(self, url: str) -> str:
        """Return what `url` does, with several sessions in the pool of the database."""
        through = self.url(url)
        with ExitStack() as stack:
            for _ in range(SESSIONS):
                client = stack.enter_context(psycopg.connect(through, application_name="tests"))
                client.execute("select 1")
        return through

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.home / f".s.PGSQL.{PORT}"

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.home / "log").read_text()

    def show(self, what: str) -> list[dict[str, Any]]:
        """Return what its console shows: POOLS, SERVERS, CLIENTS."""
        url = self.url(self._cluster.url("pgbouncer"))
        with psycopg.connect(url, autocommit=True) as console, psycopg.ClientCursor(console) as cursor:
            cursor.execute(f"show {what}".encode())
            names = [column.name for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        owner = self._account()
        self.home.mkdir(mode=0o755)
        (self.home / "server").symlink_to(self._cluster.server.socket_dir())
        (self.home / "users").write_text(f'"{embedded.SUPERUSER}" ""\n')
        (self.home / "ini").write_text(self._configuration())
        if owner is not None:
            os.chown(self.home, owner.pw_uid, owner.pw_gid)
        self.run()

    def run(self) -> None:
        """Start the process in the home that is there."""
        owner = self._account()
        self._process = subprocess.Popen(
            [self._program, "--quiet", str(self.home / "ini")],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=self.home,
            user=owner.pw_uid if owner else None, group=owner.pw_gid if owner else None,
            extra_groups=[] if owner else None,
        )  # fmt: skip
        wait_until(self._answers, what="PgBouncer to take connections")

    def kill(self) -> None:
        """SIGKILL it: all of its clients lose their connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)
            self._process = None

    def stop(self) -> None:
        """End it and remove what it has left; safe twice."""
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _configuration(self) -> str:
        places = {
            "listen_addr": "", "listen_port": str(PORT), "unix_socket_dir": str(self.home),
            "auth_file": str(self.home / "users"), "logfile": str(self.home / "log"),
        }  # fmt: skip
        lines = [f"{name} = {value}" for name, value in {**self._settings, **places}.items()]
        server = f"* = host={self._cluster.server.socket_dir()} port={embedded.PORT}"
        return "\n".join(["[databases]", server, "[pgbouncer]", *lines, ""])

    def _account(self) -> pwd.struct_passwd | None:
        """Return the account of the server: PgBouncer, too, does not run as root."""
        return pwd.getpwuid(self._cluster.server.data.stat().st_uid) if os.geteuid() == 0 else None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (
            self.log if (self.home / "log").exists() else "PgBouncer has ended"
        )
        try:
            return bool(self.show("pools"))
        except psycopg.OperationalError:
            return False


def direct(url: str) -> str:
    """Return the way to the database of `url` around the pooler that it leads through, if it leads through one."""
    return re.sub(rf"(host=[^&]*)&port={PORT}\b", rf"\1/server&port={embedded.PORT}", url)


@contextmanager
def pooled(cluster: Cluster, url: str, **settings: str) -> Iterator[tuple[Pooler, str]]:
    """Yield a pooler of the test's own, and the way to the database of `url` that leads through it."""
    with Pooler(cluster, settings) as pooler:
        yield pooler, pooler.url(direct(url))
