"""Tell systemd how a supervisor is: ready, alive, going away.

The protocol of `Type=notify` is one datagram of `NAME=value` lines to the socket that `$NOTIFY_SOCKET` names. What is
said here:

  - `READY=1` once a worker process claims, not before: a unit that is ordered after this one finds it working;
  - `WATCHDOG=1`, twice in the time that `$WATCHDOG_USEC` allows, from the supervisor's own event loop, so a loop that
    hangs says nothing. Nor does one that, with the database there, has had no worker process that claims for
    `NOT_CLAIMING_SECONDS`: a fresh start may be what helps. A database that is away is no reason to be restarted;
  - `STOPPING=1` as a drain begins, and `STATUS=`, the line that `systemctl status` shows.

Nothing here is ever a reason for the supervisor to stop: what cannot be sent is sent at the next look, if it still
holds. Both variables are taken out of the environment, so that neither worker processes nor what a step starts speak
in the supervisor's name.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from worker.supervision.supervisor import Supervisor, SupervisorVitals
from worker.supervision.watchdog import LOADING_SECONDS

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
NOT_CLAIMING_SECONDS = LOADING_SECONDS
"""For how long no worker process may claim, with the database there, until the watchdog is let go: what one process may
take to load, so that a slow start is not cut short."""
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@dataclass(frozen=True, slots=True)
class NotifySocket:
    """Where systemd listens. `watchdog_seconds` is how long it waits for a sign of life, None for ever."""

    address: str
    watchdog_seconds: float | None = None

    @classmethod
    def from_environment(cls) -> Self | None:
        """Take what systemd has said out of the environment; None where it does not listen."""
        given = {name: os.environ.pop(name, "") for name in _VARIABLES}
        name = given["NOTIFY_SOCKET"]
        if not name.startswith(("/", "@")):
            if name:
                logger.warning(
                    "NOTIFY_SOCKET is neither a path nor an abstract name; systemd is told nothing"
                )
            return None
        micros, pid = given["WATCHDOG_USEC"], given["WATCHDOG_PID"]
        watched = micros.isdigit() and int(micros) > 0 and (not pid or pid == str(os.getpid()))
        return cls("\0" + name[1:] if name[0] == "@" else name, int(micros) / 1e6 if watched else None)

    def send(self, message: str) -> bool:
        """Send one message without waiting; return whether it was taken."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self.address)
        except OSError as error:
            logger.debug("systemd cannot be told %r: %s", message, error)
            return False
        return True


class Reporter:
    """Decides what systemd is told, from what the supervisor says of itself. `send` returns whether it was taken."""

    def __init__(self, send: Callable[[str], bool], watchdog_seconds: float | None, *, now: float) -> None:
        self._send = send
        self._alive_every = None if watchdog_seconds is None else watchdog_seconds / 2
        self._alive_at = now
        self._well_at = now
        self._said: set[str] = set()
        self._status = ""

    def look(self, seen: SupervisorVitals, now: float) -> None:
        """Take in how the supervisor is at the monotonic time `now`, and say what is new."""
        claiming = sum(bool(child.vitals and child.vitals.claiming) for child in seen.children)
        if claiming or seen.ending or not seen.connected:
            self._well_at = now
        if claiming:
            self._say_once("READY=1")
        if seen.ending:
            self._say_once("STOPPING=1")
        self._say_status(_status(seen, claiming))
        well = now - self._well_at < NOT_CLAIMING_SECONDS
        due = self._alive_every is not None and now - self._alive_at >= self._alive_every
        if well and due and self._send("WATCHDOG=1"):
            self._alive_at = now

    def end(self, complaint: str | None) -> None:
        """Say that the supervisor has ended, and why if it was not told to."""
        self._say_once("STOPPING=1")
        if complaint:
            self._say_status(" ".join(complaint.split()))

    def _say_once(self, word: str) -> None:
        if word not in self._said and self._send(word):
            self._said.add(word)

    def _say_status(self, status: str) -> None:
        if status != self._status and self._send(f"STATUS={status}"):
            self._status = status


def _status(seen: SupervisorVitals, claiming: int) -> str:
    if seen.ending:
        return f"draining, worker processes left: {len(seen.children)}"
    if not seen.connected:
        return "waiting for the database"
    return f"worker processes that claim: {claiming} of {len(seen.children)}"


async def run_and_tell(supervisor: Supervisor, systemd: NotifySocket | None) -> int:
    """Run the supervisor as `Supervisor.run` does, telling systemd meanwhile if it listens."""
    if systemd is None:
        return await supervisor.run()
    reporter = Reporter(systemd.send, systemd.watchdog_seconds, now=time.monotonic())
    telling = asyncio.create_task(_tell(reporter, supervisor, systemd.watchdog_seconds))
    try:
        return await supervisor.run()
    finally:
        telling.cancel()
        with suppress(asyncio.CancelledError):
            await telling
        reporter.end(supervisor.complaint)


async def _tell(reporter: Reporter, supervisor: Supervisor, watchdog_seconds: float | None) -> None:
    every = min(LOOK_SECONDS, (watchdog_seconds or LOOK_SECONDS) / 4)
    while True:
        reporter.look(supervisor.vitals(), time.monotonic())
        await asyncio.sleep(every)
