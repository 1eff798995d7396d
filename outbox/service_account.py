"""The account that runs Postgres for root, which Postgres refuses to run as, and where that account can go."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from outbox.errors import ConfigError

SERVICE_ACCOUNT = "pgserver"
"""The name that the wheel's own code uses, so that a machine has one such account."""


def service_account() -> pwd.struct_passwd:
    """Return the account that runs Postgres for root, creating it when the machine has none."""
    options = ["--system", "--no-create-home", "--user-group", "--shell", "/bin/sh"]
    try:
        with _one_at_a_time():
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(SERVICE_ACCOUNT)
            subprocess.run(["useradd", *options, SERVICE_ACCOUNT], check=True, capture_output=True)
            return pwd.getpwnam(SERVICE_ACCOUNT)
    except (OSError, subprocess.CalledProcessError, KeyError):
        raise ConfigError(
            f"Postgres does not run as root, and the account {SERVICE_ACCOUNT!r} for it cannot be created: "
            "run Stepwell as an ordinary user, or set STEPWELL_DATABASE_URL"
        ) from None


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let no two processes of ours change the accounts of the machine at once.

    Two runs of useradd can lose what the first has written: an account that was found is not there a moment later.
    """
    directory = os.open("/etc", os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def require_reach(home: Path, account: pwd.struct_passwd) -> None:
    closed = first_closed(home, account)
    if closed:
        raise ConfigError(
            f"the account {account.pw_name!r}, which runs the embedded Postgres for root, cannot enter "
            f"{closed}: leave STEPWELL_DATA_DIR unset or choose a directory that is open to it"
        )


def first_closed(path: Path, account: pwd.struct_passwd) -> Path | None:
    """Return the directory on the way to `path` (itself included) that the account may not enter."""
    for directory in [*reversed(path.parents), path]:
        found = directory.stat()
        if found.st_uid == account.pw_uid:
            allowed = found.st_mode & stat.S_IXUSR
        elif found.st_gid == account.pw_gid:
            allowed = found.st_mode & stat.S_IXGRP
        else:
            allowed = found.st_mode & stat.S_IXOTH
        if not allowed:
            return directory
    return None
