"""Who is dead, and what becomes of the tasks that it held.

Three detectors, in order of speed. *Obituary*: a child has exited, and its supervisor says so. *Lost lock*: a
worker's beat has not changed for `lost_lock_seconds`, and the advisory lock that its supervisor's session holds
was absent throughout. *Lease*: its beat has not changed for `lease_seconds`, whatever the lock says. A supervisor that
reaches the database through a connection pooler only has no session to hold a lock in; its beats say so, and for its
workers the lease alone counts.

`Observer` judges by what it has seen on one unbroken connection, by its own monotonic clock: a new connection
takes a new observer. Otherwise the first supervisor back after a restart of the database would hold everybody
for dead.

`reclaim` carries a verdict out: *bury* (from then on the worker claims nothing, I11), end what is left of its
backends (a flush of its that is on the wire must not come after), then free its tasks in chunks. Each part is
a transaction of its own and may be repeated, so two that reclaim the same worker at once share the work, and
one that dies half-way leaves a buried row, which the next observer takes up.

`Undertaker` does this one worker at a time on a connection of its own, obituaries first, and never waits for the
supervisor's beat nor makes it wait. It remembers obituaries across an outage of the database; verdicts it is
told to forget, because after an outage they are out of date.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Container, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
from psycopg.errors import DeadlockDetected, InsufficientPrivilege, LockNotAvailable, SerializationFailure

from outbox.database import is_disconnect, retry_connecting_async
from outbox.settings import Settings
from worker.queries import load
from worker.supervision.watchdog import Unchanged

logger = logging.getLogger(__name__)

Detector = Literal["obituary", "lost_lock", "lease"]
Connection = psycopg.AsyncConnection[Any]
OnReclaim = Callable[[int, Detector, int], None]

CHUNK_TASKS = 500
PASS_SECONDS = 10.0
LAST_STATEMENT_SECONDS = 0.1
FIRST_WAIT_SECONDS = 0.01
LONGEST_WAIT_SECONDS = 0.5
RETRY_FIRST_SECONDS = 0.2
RETRY_LONGEST_SECONDS = 5.0

_CONFLICTS = (LockNotAvailable, DeadlockDetected, SerializationFailure)


# -- judging -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one look at the database shows of a worker."""

    worker_id: int
    beat: int
    buried: bool
    locked: bool
    host: str = ""
    pid: int = 0
    locking: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """A worker is dead."""

    worker_id: int
    detector: Detector
    reason: str


class Observer:
    """Judges the workers of other supervisors by what one unbroken connection shows of them.

    For the first `settle_seconds` it judges nobody: after an outage the others may still be on their way
    back, each at a time of its own.
    """

    def __init__(self, settings: Settings, *, settle_seconds: float = 0.0) -> None:
        self._lost_lock_seconds = settings.lost_lock_seconds
        self._lease_seconds = settings.lease_seconds
        self._longest_gap_seconds = 2 * settings.beat_seconds
        self._settle_seconds = settle_seconds
        self._judge_from: float | None = None
        self._beats: dict[int, Unchanged] = {}
        self._absences: dict[int, Unchanged] = {}

    def look(self, sightings: Iterable[Sighting], now: float, *, own: Container[int] = ()) -> list[Verdict]:
        """Take in one look, made at the monotonic time `now`; return who is dead. `own` are not judged."""
        if self._judge_from is None:
            self._judge_from = now + self._settle_seconds
        if now < self._judge_from:
            return []
        others = [each for each in sightings if each.worker_id not in own]
        known = {each.worker_id for each in others}
        for gone in self._beats.keys() - known:
            del self._beats[gone], self._absences[gone]
        return [verdict for each in others if (verdict := self._judge(each, now))]

    def _judge(self, seen: Sighting, now: float) -> Verdict | None:
        gap = self._longest_gap_seconds
        silent = self._beats.setdefault(seen.worker_id, Unchanged(gap)).see(seen.beat, now)
        # A look that finds the lock counts as another value than any beat, so the absence starts anew.
        absent = self._absences.setdefault(seen.worker_id, Unchanged(gap)).see(
            None if seen.locked else seen.beat, now
        )
        if seen.locking and not seen.locked and absent >= self._lost_lock_seconds:
            return self._verdict(seen, "lost_lock", silent)
        if silent >= self._lease_seconds or (seen.buried and silent >= self._lost_lock_seconds):
            return self._verdict(seen, "lease", silent)
        return None

    def _verdict(self, seen: Sighting, detector: Detector, silent_seconds: float) -> Verdict:
        lock = "held" if seen.locked else "lost" if seen.locking else "never held, through a pooler"
        return Verdict(
            seen.worker_id,
            detector,
            f"no beat for {silent_seconds:.1f} s, lock {lock}, process {seen.pid} on {seen.host}",
        )


async def sightings(connection: Connection) -> list[Sighting]:
    """Look at every worker that the database knows."""
    cursor = await connection.execute(load("observe"))
    return [Sighting(*row) for row in await cursor.fetchall()]


# -- reclaiming --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What one pass did: whether there was a worker to bury, tasks freed, whether nothing remains."""

    found: bool
    tasks: int
    finished: bool


async def reclaim(
    connection: Connection, worker_id: int, detector: Detector, *, poison_after: int, pass_seconds: float
) -> Reclaimed:
    """Free what a dead worker holds, for at most about `pass_seconds`; safe to repeat and to race.

    Whoever is the first to bury it has it counted under `detector`.

    The connection must be in autocommit mode. Not finished means that something still locks the rest.
    """
    deadline = time.monotonic() + pass_seconds
    found = await _bury(connection, worker_id, detector, deadline)
    if found is None:
        return Reclaimed(found=True, tasks=0, finished=False)
    await _let_statements_end(connection, worker_id)
    await end_backends(connection, worker_id)
    tasks, wait = 0, FIRST_WAIT_SECONDS
    while True:
        freed, remaining = await _free_chunk(connection, worker_id, poison_after)
        tasks += freed
        if not remaining or time.monotonic() >= deadline:
            return Reclaimed(found, tasks, finished=not remaining)
        if freed == 0:  # what is left is locked: by a backend that is ending, or by one to end
            await end_backends(connection, worker_id)
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


async def _bury(connection: Connection, worker_id: int, detector: Detector, deadline: float) -> bool | None:
    """Return whether the worker was known; None when its row stayed locked until `deadline`."""
    while True:
        try:
            row = await (await connection.execute(load("bury"), [worker_id, detector])).fetchone()
            return bool(row and row[0])
        except _CONFLICTS:
            # A claim that cannot end: its client is stopped in the middle of a large answer.
            await end_backends(connection, worker_id)
        if time.monotonic() >= deadline:
            return None


async def _let_statements_end(connection: Connection, worker_id: int) -> None:
    """Wait a moment for a flush that is being applied: what it records need not be done again."""
    deadline = time.monotonic() + LAST_STATEMENT_SECONDS
    while any(active for _, active in await _backends(connection, worker_id)):
        if time.monotonic() >= deadline:
            return
        await asyncio.sleep(FIRST_WAIT_SECONDS)


async def _free_chunk(connection: Connection, worker_id: int, poison_after: int) -> tuple[int, bool]:
    try:
        cursor = await connection.execute(load("reclaim"), [worker_id, poison_after, CHUNK_TASKS])
    except _CONFLICTS:
        return 0, True
    row = await cursor.fetchone()
    assert row is not None  # a function with out parameters answers with one row
    return row[0], row[1]


async def end_backends(connection: Connection, worker_id: int) -> int:
    """Terminate the backends that still serve a worker; return how many. Warns where the role may not."""
    ended = 0
    for backend, _ in await _backends(connection, worker_id):
        try:
            # Asked again in the statement that ends it: behind a pooler, it may serve somebody else by now.
            cursor = await connection.execute(
                load("terminate_backend"), {"backend": backend, "worker": worker_id}
            )
            ended += len(await cursor.fetchall())
        except InsufficientPrivilege as error:
            logger.warning(
                "backend %d of dead worker %d cannot be terminated, so its tasks wait until it ends: %s; "
                "run all workers under one role, or grant theirs pg_signal_backend",
                backend, worker_id, error.diag.message_primary,
            )  # fmt: skip
    return ended


async def _backends(connection: Connection, worker_id: int) -> list[tuple[int, bool]]:
    """Return the process id of each backend of a worker, and whether it is in the middle of a statement."""
    cursor = await connection.execute(load("backends"), {"worker": worker_id})
    return [(pid, active) for pid, active in await cursor.fetchall()]


@dataclass(slots=True)
class _Case:
    detector: Detector
    not_before: float = 0.0
    passes: int = 0
    found: bool = False
    tasks: int = 0


class Undertaker:
    """Reclaims from dead workers, one after the other. `connect` opens a connection in autocommit mode.

    `on_reclaim` gets worker, detector and number of freed tasks for each worker that was found. (Of two observers that share
    the work on one worker, both are told; the database counts it once.)
    """

    def __init__(
        self, connect: Callable[[], Awaitable[Connection]], settings: Settings, *, on_reclaim: OnReclaim
    ) -> None:
        self._connect = connect
        self._poison_after = settings.poison_after
        self._on_reclaim = on_reclaim
        self._connection: Connection | None = None
        self._cases: dict[int, _Case] = {}
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()

    @property
    def obituaries(self) -> int:
        """How many obituaries are still to be carried out."""
        return sum(case.detector == "obituary" for case in self._cases.values())

    def report(self, worker_id: int, detector: Detector) -> bool:
        """Have a dead worker's tasks reclaimed, soon; return whether that is news."""
        case = self._cases.get(worker_id)
        if case is None:
            self._cases[worker_id] = _Case(detector)
        elif detector == "obituary":
            case.detector, case.not_before = detector, 0.0
        if detector == "obituary":
            self._settled.clear()
        self._changed.set()
        return case is None

    def forget_verdicts(self) -> None:
        """Drop what observers reported and what is not done: after an outage they judge anew."""
        for worker_id in [key for key, case in self._cases.items() if case.detector != "obituary"]:
            del self._cases[worker_id]

    async def settle(self, timeout_seconds: float) -> bool:
        """Wait until all obituaries are carried out; return whether they are."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._settled.wait()
        return self.obituaries == 0

    async def run(self) -> None:
        """Carry out what is reported, until cancelled."""
        try:
            with suppress(psycopg.Error):  # only so that the first obituary need not wait for it
                await retry_connecting_async(self._connected, give_up_after_seconds=None)
            while True:
                self._changed.clear()
                await self.run_once()
                await self._pause()
        finally:
            await self._disconnect()

    async def run_once(self) -> int:
        """Make a pass for the most urgent case that is due; return the number of tasks freed."""
        if not self._due():
            return 0
        try:
            connection = await retry_connecting_async(self._connected, give_up_after_seconds=None)
        except psycopg.Error as error:
            logger.error("dead workers are not reclaimed: the database refuses a connection: %s", error)
            await asyncio.sleep(RETRY_LONGEST_SECONDS)
            return 0
        due = self._due()  # connecting may have taken an outage's time
        if not due:
            return 0
        worker_id = min(due, key=lambda key: self._cases[key].detector != "obituary")
        case = self._cases[worker_id]
        try:
            done = await reclaim(
                connection,
                worker_id,
                case.detector,
                poison_after=self._poison_after,
                pass_seconds=PASS_SECONDS,
            )
        except psycopg.Error as error:
            await self._put_off(worker_id, case, error)
            return 0
        case.found, case.tasks = case.found or done.found, case.tasks + done.tasks
        if done.finished:
            self._close(worker_id, case)
        else:
            await self._put_off(worker_id, case, None)
        return done.tasks

    def _due(self) -> list[int]:
        return [key for key, case in self._cases.items() if case.not_before <= time.monotonic()]

    def _close(self, worker_id: int, case: _Case) -> None:
        self._cases.pop(worker_id, None)
        if not self.obituaries:
            self._settled.set()
        if case.found or case.tasks:
            logger.info("reclaimed %d tasks of dead worker %d (%s)", case.tasks, worker_id, case.detector)
            self._on_reclaim(worker_id, case.detector, case.tasks)

    async def _put_off(self, worker_id: int, case: _Case, error: psycopg.Error | None) -> None:
        case.passes += 1
        wait = min(RETRY_LONGEST_SECONDS, RETRY_FIRST_SECONDS * 2 ** min(case.passes - 1, 10))
        case.not_before = time.monotonic() + (0.0 if case.passes == 1 and error else wait)
        if error is None:
            level = logging.WARNING if case.passes == 1 else logging.DEBUG
            logger.log(level, "tasks of dead worker %d are still locked by somebody, trying again", worker_id)
        elif is_disconnect(error):
            await self._disconnect()
        else:
            logger.error("reclaiming from dead worker %d failed, trying again: %s", worker_id, error)

    async def _pause(self) -> None:
        """Wait for a report, or for the next case that was put off."""
        waits = [case.not_before - time.monotonic() for case in self._cases.values()]
        if waits and min(waits) <= 0:
            return
        # Not wait_for: before Python 3.12 it may swallow a cancellation that comes with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(min(waits, default=None)):
                await self._changed.wait()

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = await self._connect()
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
