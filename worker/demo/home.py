"""The demo's own directory and the Postgres in it: made anew for each demo, gone after it.

It never is a directory that the user works with, so the demo can touch no real data. What a demo that was
killed has left behind, processes included, is cleared up by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outbox import embedded
from outbox.database import EmbeddedPostgres
from outbox.errors import ConfigError
from outbox.settings import Settings
from worker.demo.processes import PID_FILE

logger = logging.getLogger(__name__)

PREFIX = "stepwell-demo-"
SHARED = Path("/var/tmp")
POSTGRES_VERSION = 18
LOCK_FILE = "lock"


@contextmanager
def fresh_home() -> Iterator[Path]:
    """Yield a directory that is deleted at the end."""
    _remove_left_behind()
    home = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_parent()))
    try:
        home.chmod(0o711)  # the account that runs Postgres for root passes through
        with (home / LOCK_FILE).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # says that we live; the kernel lets go of it however we end
            yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def fresh_postgres(home: Path) -> Iterator[str]:
    """Yield the URL of a Postgres in `home`, which is stopped at the end whoever is still connected."""
    postgres = EmbeddedPostgres(Settings(data_dir=home / "postgres"), POSTGRES_VERSION)
    try:
        yield postgres.start()
    finally:
        _stop_postgres(home)


def _stop_postgres(home: Path) -> None:
    try:
        server = embedded.Server(home / "postgres", embedded.binaries(POSTGRES_VERSION))
        server.stop("immediate")  # its data is deleted next
    except ConfigError as error:
        logger.warning("the demo's Postgres could not be stopped: %s", error)


def _parent() -> Path:
    return SHARED if SHARED.is_dir() else Path(tempfile.gettempdir())


def _remove_left_behind() -> None:
    for home in _parent().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another account's, gone already, or not locked yet
            if home.is_symlink() or home.stat().st_uid != os.geteuid():
                continue
            with (home / LOCK_FILE).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its demo lives
                _kill_workers(home)
                _stop_postgres(home)
                shutil.rmtree(home, ignore_errors=True)


def _kill_workers(home: Path) -> None:
    """SIGKILL the workers of a demo that is gone, if the process id in its file is still theirs."""
    with contextlib.suppress(OSError, ValueError):
        group = int((home / PID_FILE).read_text())
        command = subprocess.run(
            ["ps", "-o", "command=", "-p", str(group)], capture_output=True, text=True, check=False
        )
        if os.getpgid(group) == group and "worker.demo.workflows" in command.stdout:
            os.killpg(group, signal.SIGKILL)
