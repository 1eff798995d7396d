"""A network of its own for some processes, which can fall silent: packets are dropped, nobody is told.

Needs root and `ip` and `tc` (iproute2). What runs on the island reaches this host by `host`, and nothing else.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_numbers = itertools.count(1)

_DROP_ALL = ("tbf", "rate", "8bit", "burst", "1", "limit", "1")
"""A bucket that no packet fits into. `netem loss 100%` says it better, but few kernels have it built in."""


class Island:
    """A namespace `name` with one link to this host."""

    def __init__(self, name: str, link: str, number: int) -> None:
        self.name = name
        self.host = f"10.199.{number % 256}.1"
        self._own = f"10.199.{number % 256}.2"
        self._here, self._there = f"{link}a", f"{link}b"

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs `command` on the island."""
        return ["ip", "netns", "exec", self.name, *command]

    def fall_silent(self) -> None:
        """Drop what is sent, in both directions: no reset, no error, as when a cable is cut somewhere."""
        _run("tc", "qdisc", "add", "dev", self._here, "root", *_DROP_ALL)
        _run(*self.inside("tc", "qdisc", "add", "dev", self._there, "root", *_DROP_ALL))

    def be_heard(self) -> None:
        """Let packets pass again."""
        _run("tc", "qdisc", "del", "dev", self._here, "root")
        _run(*self.inside("tc", "qdisc", "del", "dev", self._there, "root"))

    def rise(self) -> None:
        """Make the namespace and its link."""
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self.name)
        _run("ip", "address", "add", f"{self.host}/30", "dev", self._here)
        _run("ip", "link", "set", self._here, "up")
        _run(*self.inside("ip", "link", "set", "lo", "up"))
        _run(*self.inside("ip", "address", "add", f"{self._own}/30", "dev", self._there))
        _run(*self.inside("ip", "link", "set", self._there, "up"))

    def sink(self) -> None:
        """Remove both; safe when they were not made."""
        subprocess.run(["ip", "link", "delete", self._here], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)


def obstacle() -> str | None:
    """Return why no island can be made here, None if one can."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} (iproute2) not installed"
    if os.geteuid() != 0:
        return "only root can make a network namespace"
    try:
        with island():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespace here: {error.stderr.strip()}"


@contextmanager
def island() -> Iterator[Island]:
    """Make an island, and remove it at the end. Processes on it must have ended by then."""
    number = next(_numbers)
    made = Island(
        f"stepwell-{os.getpid()}-{number}", f"sw{os.getpid() % 100_000}x{number}", os.getpid() + number
    )
    try:
        made.rise()
        yield made
    finally:
        made.sink()


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)
