"""One child of a supervisor: spawned, briefed, watched, and gone.

A child is a process that runs `worker.supervision.process`; its end of a socket pair tells it what to do and shows it when
its supervisor dies. It stays in the supervisor's process group, so that job control works on the whole, and
leaves Ctrl-C to the supervisor.

Whatever happens to the supervisor, no child outlives it: the kernel closes the socket pair.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from worker.engine.vitals import Vitals
from worker.supervision.pipe import (
    DEAD,
    EXIT_DECLARED_DEAD,
    FD_VARIABLE,
    LINE_MAX_BYTES,
    Briefing,
    Complaint,
    News,
    read_message,
)
from worker.supervision.watchdog import LOOK_SECONDS, Watchdog

logger = logging.getLogger(__name__)

STEADY_SECONDS = 5.0
"""A child that lived so long did not die of how it starts."""
BACKOFF_FIRST_SECONDS = 0.25
BACKOFF_LONGEST_SECONDS = 10.0
_FORGIVEN = {EXIT_DECLARED_DEAD: 3}  # it is not the process's fault, unless it happens again and again
LAST_WORDS_SECONDS = 1.0
MISSED_BEATS = 2


def command() -> list[str]:
    """Return the command line of a child: this interpreter, and this very copy of Stepwell.

    Safe-path mode and the explicit directory keep a `worker.py` or `outbox.py` where the user works from hiding
    ours.
    """
    home = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {home!r}); from worker.supervision.process import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code]


class Backoff:
    """How long to wait before a child is replaced: not at all, unless children keep dying as they start."""

    def __init__(self) -> None:
        self._quick_deaths = 0

    def after(self, status: int, lived_seconds: float) -> float:
        """Return the wait in seconds after a child has exited."""
        if lived_seconds >= STEADY_SECONDS:
            self._quick_deaths = 0
            return 0.0
        self._quick_deaths += 1
        excess = self._quick_deaths - _FORGIVEN.get(status, 1)
        if excess <= 0:
            return 0.0
        return min(BACKOFF_LONGEST_SECONDS, BACKOFF_FIRST_SECONDS * 2.0 ** min(excess - 1, 10))


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended. `status` is negative for a signal."""

    status: int
    lived_seconds: float
    ready: bool
    killed_because: str | None = None
    complaint: str | None = None

    def __str__(self) -> str:
        if self.status < 0:
            with suppress(ValueError):
                return f"was killed by {signal.Signals(-self.status).name}"
        return f"exited with status {self.status}"


class Child:
    """A running worker process. `ready` is true once it has registered and claims."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        ours: socket.socket,
        briefing: Briefing,
        on_ready: Callable[[Child], None],
    ) -> None:
        self.worker_id = briefing.worker_id
        self.pid = process.pid
        self.vitals: Vitals | None = None
        self.ready = False
        self._briefing = briefing
        self._on_ready = on_ready
        self._process = process
        self._socket = ours
        self._writer: asyncio.StreamWriter | None = None
        self._watchdog = Watchdog(briefing.settings)
        self._started_at = time.monotonic()
        self._beats = 0
        self._missed = 0
        self._leaving = False
        self._complaint: str | None = None
        self._killed_because: str | None = None
        self._status = asyncio.get_running_loop().create_future()
        threading.Thread(
            target=self._reap, args=(self._status,), name=f"reaper of {self.pid}", daemon=True
        ).start()

    @classmethod
    def spawn(cls, command: Sequence[str], briefing: Briefing, on_ready: Callable[[Child], None]) -> Self:
        """Start the process; `attend` briefs it. Raises OSError when the system has no room for it."""
        ours, theirs = socket.socketpair()
        try:
            # Blocked, which the child inherits until it ignores it: Ctrl-C must not hit it as it starts.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, FD_VARIABLE: str(theirs.fileno())},
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, ours, briefing, on_ready)

    async def attend(self) -> Exit:
        """Brief the child, then listen to it and watch it until it has exited. For one caller, once."""
        listening = asyncio.create_task(self._listen())
        watching = asyncio.create_task(self._watch())
        try:
            status = await self._status
            if not self.ready:  # it may have said why
                await asyncio.wait({listening}, timeout=LAST_WORDS_SECONDS)
        finally:
            for task in (listening, watching):
                task.cancel()
            await asyncio.gather(listening, watching, return_exceptions=True)
            self._close()
        return Exit(
            status, time.monotonic() - self._started_at, self.ready, self._killed_because, self._complaint
        )

    def terminate(self) -> None:
        """Ask the child to drain; the second time, to stop."""
        self._leaving = True
        self._process.terminate()

    def kill(self, reason: str) -> None:
        """Kill the child."""
        if self._killed_because is None and not self._status.done():
            logger.warning("killing worker process %d: %s", self.pid, reason)
            self._killed_because = reason
        self._process.kill()

    def tell(self, news: News) -> bool:
        """Tell the child something for its hooks; return whether that was possible. Nobody knows whether it hears."""
        if self._writer is None or not self.ready or self._leaving:
            return False
        self._writer.write(news.to_line())
        return True

    def note_beat(self, known: bool) -> None:
        """Take note of whether the database knew the child as alive when its supervisor beat for it.

        A child that did register and then is missing has been declared dead. It will find out at its next claim
        or flush, but one whose slots are all taken may not make any for a long time: so it is told.
        """
        staying = self.vitals is not None and self.vitals.claiming and not self._leaving
        self._missed = self._missed + 1 if staying and not known else 0
        if self._missed == MISSED_BEATS and self._writer is not None:
            logger.warning("worker process %d was declared dead by an observer", self.pid)
            self._writer.write(DEAD)

    async def _listen(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=LINE_MAX_BYTES)
        self._writer.write(self._briefing.to_line())
        try:
            while line := await reader.readline():
                self._hear(read_message(line))
        except (ConnectionError, ValueError) as error:  # ValueError: a line without end
            logger.debug("worker process %d cannot be understood: %s", self.pid, error)

    def _hear(self, message: Vitals | Complaint | None) -> None:
        match message:
            case Vitals():
                self.vitals = message
                self._beats += 1
                if message.claiming and not self.ready:
                    self.ready = True
                    self._on_ready(self)
            case Complaint(sentence):
                self._complaint = sentence
            case None:
                pass

    async def _watch(self) -> None:
        while True:
            reason = self._watchdog.look(
                stopped=_state(self.pid) == "T", beats=self._beats, vitals=self.vitals, now=time.monotonic()
            )
            if reason:
                self.kill(reason)
                return
            await asyncio.sleep(LOOK_SECONDS)

    def _reap(self, exited: asyncio.Future[int]) -> None:
        status = self._process.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            exited.get_loop().call_soon_threadsafe(_resolve, exited, status)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        else:
            self._socket.close()


def _resolve(future: asyncio.Future[int], status: int) -> None:
    if not future.done():
        future.set_result(status)


def _state(pid: int) -> str:
    """Return the state letter of a process, empty where the system has no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].strip()[:1]
