"""A highly available Postgres on one machine: three nodes under Patroni, etcd, and HAProxy before them, all real programs.

They come from Debian's packages. Everything lives in one directory, on free ports of the loopback, with passwords of its own,
and runs as the account `postgres` where root calls. A node can be killed as a machine dies: its Patroni, its postmaster and
every backend at once; and it can be started again, to come back as a standby.

Whatever was started here is ended by `stop`, by process id. Postgres is no child of Patroni's, so it is found by the pid file
in the data directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.waiting import wait_until

NODES = 3
PROGRAMS = {"patroni": "patroni", "etcd": "etcd-server", "haproxy": "haproxy"}
"""Each program, and Debian's package of it."""
ACCOUNT = "postgres"
STARTED_SECONDS = 120.0
FAILED_OVER_SECONDS = 180.0
ASK_SECONDS = 2.0
EVERY_SECONDS = 0.25
LAG_BYTES = 64 * 2**20
"""How far a standby may lag and still be promoted where replication is asynchronous: what it lacks is lost."""


class Unavailable(Exception):
    """What this machine lacks, and how to get it."""


@dataclass(frozen=True)
class Replication:
    """How commits get to the standbys.

    `synchronous`: a commit is acknowledged when a standby has it on disk, and no other standby is promoted. `strict`: also
    while there is no standby, when nothing is acknowledged. Otherwise commits are acknowledged by the primary alone.
    """

    synchronous: bool = True
    strict: bool = False
    ttl_seconds: int = 20
    """After so long without a sign of the primary another node takes its place."""

    def settings(self) -> dict[str, Any]:
        """Return what Patroni keeps in etcd. Its rule: loop_wait + 2 × retry_timeout is no longer than ttl."""
        wait = max(1, self.ttl_seconds // 5)
        return {
            "ttl": self.ttl_seconds, "loop_wait": wait, "retry_timeout": max(3, wait),
            "synchronous_mode": self.synchronous, "synchronous_mode_strict": self.strict,
            "maximum_lag_on_failover": LAG_BYTES,
        }  # fmt: skip


@dataclass
class Node:
    """One machine: a Patroni and its Postgres."""

    name: str
    home: Path
    port: int
    rest_port: int
    patroni: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def data(self) -> Path:
        return self.home / "data"

    def postgres(self) -> list[int]:
        """Return the process ids of its Postgres, the postmaster's first."""
        try:
            postmaster = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return []
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children")
        if not children.exists() or "postgres" not in _command(postmaster):
            return []
        return [postmaster, *map(int, children.read_text().split())]

    def walsenders(self) -> list[int]:
        """Return the processes that send its log to the standbys."""
        return [pid for pid in self.postgres() if "walsender" in _command(pid)]

    def ask(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and answer of its Patroni; 0 if there is none."""
        url = f"http://127.0.0.1:{self.rest_port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=ASK_SECONDS) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, {}
        except (OSError, ValueError):
            return 0, {}

    def is_primary(self) -> bool:
        return self.ask("/primary")[0] == 200

    def is_synchronous(self) -> bool:
        return self.ask("/synchronous")[0] == 200

    def streaming(self) -> int:
        """Return how many standbys stream from it."""
        said = self.ask("/patroni")[1].get("replication") or []
        return sum(each.get("state") == "streaming" for each in said)

    def kill(self) -> None:
        """SIGKILL its Patroni and its whole Postgres."""
        if self.patroni is not None:
            _signal_group(self.patroni.pid, signal.SIGKILL)
        processes = self.postgres()
        for pid in processes[:1]:  # a postmaster that is stopped starts no backend meanwhile
            _signal(pid, signal.SIGSTOP)
        for pid in [*processes, *self.postgres()]:
            _signal(pid, signal.SIGKILL)
        if self.patroni is not None:
            self.patroni.wait(20)
            self.patroni = None
        wait_until(
            lambda: not any(map(_is_running, processes)), 60, what=f"the Postgres of {self.name} to end"
        )


class HighlyAvailable:
    """Three nodes behind one address; enter it to have it run. `home` is kept, for the logs in it."""

    def __init__(self, home: Path, replication: Replication) -> None:
        self._programs = programs()
        self._account = pwd.getpwnam(ACCOUNT) if os.geteuid() == 0 else None
        self._home = home
        self._replication = replication
        self._password = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []
        etcd, peer, self._port, *ports = _free_ports(3 + 2 * NODES)
        self._etcd, self._peer = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
        self._etcd_port = etcd
        self.nodes = [
            Node(f"node{number + 1}", home / f"node{number + 1}", *ports[2 * number : 2 * number + 2])
            for number in range(NODES)
        ]

    def url(self, database: str) -> str:
        """Return the address of a database, whichever node is the primary."""
        return f"postgresql://postgres:{self._password}@127.0.0.1:{self._port}/{database}"

    def primary(self) -> Node | None:
        """Return the node that says that it is the primary."""
        return next((node for node in self.nodes if node.is_primary()), None)

    def start(self) -> None:
        """Start everything, and wait until there is a primary with all of its standbys."""
        for place in (self._home, *(node.home for node in self.nodes)):
            place.mkdir(exist_ok=True)
            place.chmod(0o755)
            self._hand_over(place)
        self._launch("etcd", [
            self._programs["etcd"], "--name", "etcd", "--data-dir", str(self._home / "etcd"),
            "--listen-client-urls", self._etcd, "--advertise-client-urls", self._etcd,
            "--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer,
            "--initial-cluster", f"etcd={self._peer}", "--initial-cluster-state", "new",
        ])  # fmt: skip
        for node in self.nodes:
            self.revive(node)
            if node is self.nodes[0]:  # the others are copies of it
                wait_until(
                    node.is_primary,
                    STARTED_SECONDS,
                    what="the first node to be the primary",
                    every=EVERY_SECONDS,
                )
        (self._home / "haproxy.cfg").write_text(self._proxy())
        self._launch("haproxy", [self._programs["haproxy"], "-db", "-f", str(self._home / "haproxy.cfg")])
        self.wait_until_whole()

    def revive(self, node: Node) -> None:
        """Start a node; it becomes what Patroni makes of it."""
        file = node.home / "patroni.yml"
        file.write_text(json.dumps(self._configuration(node), indent=2))  # which is YAML as well
        file.chmod(0o600)
        self._hand_over(file)
        node.patroni = self._launch(node.name, [self._programs["patroni"], str(file)])

    def wait_until_whole(self) -> None:
        """Wait until there is a primary, and every other node streams from it, one synchronously if that is wanted."""

        def whole() -> bool:
            primary = self.primary()
            synchronous = not self._replication.synchronous or any(map(Node.is_synchronous, self.nodes))
            return primary is not None and synchronous and primary.streaming() == NODES - 1

        wait_until(whole, FAILED_OVER_SECONDS, what="a primary with all of its standbys", every=EVERY_SECONDS)

    def wait_for_other_primary(self, dead: Node) -> Node:
        """Return the node that has taken the place of another."""

        def other() -> Node | None:
            found = self.primary()
            return found if found is not dead else None

        return wait_until(other, FAILED_OVER_SECONDS, what="another node to be promoted", every=EVERY_SECONDS)

    def stop(self) -> None:
        """End everything that was started; safe twice."""
        for node in self.nodes:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                node.kill()
        while self._processes:
            process = self._processes.pop()
            if process.poll() is None:
                _signal_group(process.pid, signal.SIGKILL)
            process.wait(20)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- how it is set up

    def _configuration(self, node: Node) -> dict[str, Any]:
        hosts = [
            "host all all 127.0.0.1/32 scram-sha-256",
            "host replication replicator 127.0.0.1/32 scram-sha-256",
        ]
        return {
            "scope": "drill",
            "name": node.name,
            "restapi": {
                "listen": f"127.0.0.1:{node.rest_port}", "connect_address": f"127.0.0.1:{node.rest_port}",
            },
            "etcd3": {"host": f"127.0.0.1:{self._etcd_port}"},
            "bootstrap": {
                "dcs": {
                    **self._replication.settings(),
                    "postgresql": {
                        "use_pg_rewind": True,
                        "parameters": {"max_connections": 200, "track_commit_timestamp": "on"},
                    },
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{node.port}",
                "connect_address": f"127.0.0.1:{node.port}",
                "data_dir": str(node.data),
                "bin_dir": str(self._programs["postgres"].parent),
                "pgpass": str(node.home / "pgpass"),
                "pg_hba": hosts,
                "authentication": {
                    "superuser": {"username": "postgres", "password": self._password},
                    "replication": {"username": "replicator", "password": self._password},
                    "rewind": {"username": "rewinder", "password": self._password},
                },
                "parameters": {
                    "unix_socket_directories": str(node.home), "jit": "off", "shared_buffers": "64MB",
                    "log_line_prefix": "%m [%p] %a ",
                },
                # A node that was the primary and has more than the others is made anew from them.
                "remove_data_directory_on_rewind_failure": True,
                "remove_data_directory_on_diverged_timelines": True,
            },
        }  # fmt: skip

    def _proxy(self) -> str:
        servers = [
            f"    server {node.name} 127.0.0.1:{node.port} check port {node.rest_port}" for node in self.nodes
        ]
        return "\n".join([
            "global",
            "    maxconn 1000",
            "defaults",
            "    mode tcp",
            "    timeout connect 4s",
            "    timeout client 30m",
            "    timeout server 30m",
            "    timeout check 2s",
            "listen primary",
            f"    bind 127.0.0.1:{self._port}",
            "    option httpchk OPTIONS /primary",
            "    http-check expect status 200",
            "    default-server inter 1s fall 2 rise 1 on-marked-down shutdown-sessions",
            *servers,
            "",
        ])  # fmt: skip

    def _launch(self, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        prefixes = ("PG", "PATRONI", "ETCD", "STEPWELL")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
        owner = self._account
        with (self._home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self._home, env={**environment, "LC_ALL": "C.UTF-8"}, start_new_session=True,
                user=owner.pw_uid if owner else None, group=owner.pw_gid if owner else None,
                extra_groups=[] if owner else None, umask=0o077,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def _hand_over(self, place: Path) -> None:
        if self._account is not None:
            os.chown(place, self._account.pw_uid, self._account.pw_gid)


def programs() -> dict[str, Path]:
    """Return the path of each program. Raises Unavailable, with the packages to install."""
    found = {
        name: shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin") for name in PROGRAMS
    }
    servers = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda each: float(each.parts[4])
    )
    missing = [PROGRAMS[name] for name, path in found.items() if path is None] + (
        [] if servers else ["postgresql"]
    )
    if missing:
        raise Unavailable(f"this takes Debian's packages: apt-get install {' '.join(missing)}")
    return {**{name: Path(path) for name, path in found.items() if path is not None}, "postgres": servers[-1]}


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on; all at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


@contextlib.contextmanager
def held_back(node: Node, seconds: float) -> Iterator[None]:
    """Have a node send nothing to its standbys for so long, as when the network between them stalls; then yield."""
    senders = node.walsenders()
    for pid in senders:
        _signal(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)  # the fault itself
        yield
    finally:
        for pid in senders:
            _signal(pid, signal.SIGCONT)
