"""The processes that the demo starts beside Postgres: the mail provider and ``stepwell worker``.

Each is in a process group of its own, so that Ctrl-C in a terminal reaches the demo alone, which then
takes them down in order. `stop` is safe twice and before `start`. When the demo itself is killed, the
provider ends with its standard input; the workers stay until the next demo clears up (`home`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import worker
from outbox.errors import ConfigError

START_TIMEOUT_SECONDS = 20.0
STOP_TIMEOUT_SECONDS = 10.0
LOG_LINES = 15
PID_FILE = "workers.pid"


class Provider:
    """``python -m worker.demo.mailserver``."""

    def __init__(self, maildir: Path, home: Path, latency_seconds: float) -> None:
        self._arguments = ["--maildir", str(maildir), "--latency", f"{latency_seconds:.3f}"]
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Start it and return the port that it serves; ConfigError when it does not come up."""
        with (self._home / "provider.log").open("ab") as log:
            self._process = _python(
                "worker.demo.mailserver",
                self._arguments,
                home=self._home,
                variables={},
                stdin=subprocess.PIPE,  # never written to: it ends with us
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT_SECONDS)
        said = self._process.stdout.readline().strip() if readable else b""
        if not said.isdigit():
            self.stop()
            raise ConfigError(f"the mail provider did not start: {log_end(self._home / 'provider.log')}")
        return int(said)

    def stop(self) -> None:
        """End it and wait for that."""
        if self._process is not None:
            _end(self._process)
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None


class Workers:
    """``stepwell worker``: a supervisor with its worker processes, which may be killed and started again."""

    def __init__(
        self, app: str, flags: Mapping[str, object], variables: Mapping[str, str], home: Path
    ) -> None:
        self._arguments = [app, *(str(word) for flag in flags.items() for word in flag)]
        self._variables = variables
        self._home = home
        self.log = home / "workers.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a supervisor; the one before must have ended."""
        with self.log.open("ab") as log:
            self._process = _python(
                "worker.cli",
                ["worker", *self._arguments],
                home=self._home,
                variables=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        (self._home / PID_FILE).write_text(f"{self._process.pid}\n")

    @property
    def pid(self) -> int | None:
        """Return the supervisor's process id while it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def kill_tree(self, children: Iterable[int]) -> None:
        """SIGKILL the supervisor and all of its children, the supervisor first: it must not mourn them."""
        assert self._process is not None
        _signal_group(self._process, signal.SIGKILL)
        for child in children:  # normally in the group, and dead already
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Drain and end: SIGTERM, then SIGKILL to what is left of the group."""
        if self._process is not None:
            _end(self._process)
            _signal_group(self._process, signal.SIGKILL)
            self._process = None


def log_end(log: Path) -> str:
    """Return the last lines of a process's log."""
    if not log.exists():
        return "(nothing was logged)"
    lines = log.read_text(errors="replace").strip().splitlines()
    return "\n".join(lines[-LOG_LINES:]) or "(nothing was logged)"


def _python(
    module: str,
    arguments: list[str],
    *,
    home: Path,
    variables: Mapping[str, str],
    stdin: int,
    stdout: int | IO[bytes],
    stderr: IO[bytes],
) -> subprocess.Popen[bytes]:
    """Start a module of ours with this interpreter, away from the user's files and settings."""
    # Of Stepwell's own settings only those that are given here: the demo must not touch real data.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEPWELL_")}
    packages = [str(Path(file).parents[1]) for file in [worker.__file__] if file]
    search = [*packages, *filter(None, [environment.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=home,
        env={**environment, **variables, "PYTHONPATH": os.pathsep.join(search)},
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, insist when it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)  # the leader of its session: its pid is the group's id


@contextlib.contextmanager
def reserved_port(wanted: int, host: str = "0.0.0.0") -> Iterator[int]:  # noqa: S104 - where the metrics are served
    """Yield `wanted` if nobody listens there and no other demo has it, else a port that is free now.

    Until the workers listen, nothing but a locked file tells another demo, started in the same moment, that it is taken.
    """
    lock = Path(tempfile.gettempdir()) / f"stepwell-demo-port-{wanted}-{os.getuid()}"
    try:
        held = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:  # a temporary directory that cannot be written to: then as well as can be told
        yield wanted if _is_free(wanted, host) else _any_port(host)
        return
    try:
        yield wanted if _is_locked_by_us(held) and _is_free(wanted, host) else _any_port(host)
    finally:
        os.close(held)


def _is_locked_by_us(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_free(port: int, host: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _any_port(host: str) -> int:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
    raise ConfigError("no TCP port is free on this machine")
