"""The supervisor's own session: it holds a lock for each child, beats for them, and looks at the others.

One connection, used by one task only (`run`), in ticks: some a second, and one at once when a child is adopted
or has exited. A tick takes the locks that are still missing and gives back those that are not needed any more,
beats for all children in one statement when that is due, and looks at all workers. After a lost connection the locks are taken again before the
first beat, and the observation starts anew (see `worker.supervision.liveness`).

Through a connection pooler in transaction mode there is no session: no locks are taken, the beats say so, and observers
go by the lease alone. Everything else is one statement at a time, which a pooler does not mind. A connection to a pooler
outlives the server's own end, so there the observation also starts anew when another server answers, or the same again.

Whatever goes wrong on the connection has one remedy, a new one, for ever: a server that restarts, a failover
that leaves us on a read-only node, a permission that is missing for a while. Only the first connection may
fail for good, so that a mistake in the configuration ends the supervisor instead of filling its log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import psycopg

from outbox.database import LONGEST_WAIT_SECONDS, retry_connecting_async
from outbox.errors import SchemaError
from outbox.schema import CLAIMANT_FUNCTIONS, check_async
from outbox.sessions import is_pooled
from outbox.settings import Settings
from worker.queries import load
from worker.supervision.liveness import Observer, Verdict, sightings

logger = logging.getLogger(__name__)

Connection = psycopg.AsyncConnection[Any]

LOOKS = 6
REFUSED_SECONDS = 5.0
"""How long to wait after a refusal that reconnecting does not cure, such as a changed password."""


class Heartbeat:
    """Keeps the children of one supervisor alive in the eyes of the others, and watches the others' workers.

    `on_verdicts` gets the workers that this observer holds for dead, `on_beat` the ids that the database knows
    as alive among our own, `on_lost` is called when a session ends.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        settings: Settings,
        *,
        on_verdicts: Callable[[list[Verdict]], None],
        on_beat: Callable[[set[int]], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._connect = connect
        self._settings = settings
        # Several looks fit into the shortest time that is judged, so that it is not overshot by much.
        self._look_seconds = min(settings.beat_seconds, settings.lost_lock_seconds / LOOKS)
        self._on_verdicts = on_verdicts
        self._on_beat = on_beat
        self._on_lost = on_lost
        self._adopted: dict[int, asyncio.Event] = {}
        self._locked: set[int] = set()
        self._poked = asyncio.Event()
        self._attempts = 0
        self._online = False
        self._told = False
        self._ticked_at: float | None = None
        self.started = asyncio.Event()
        self.schema_ok = False

    @property
    def connected(self) -> bool:
        """Tell whether the last tick succeeded and is not long ago."""
        at = self._ticked_at
        return at is not None and time.monotonic() - at < 5 + 3 * self._settings.beat_seconds

    async def adopt(self, worker_id: int) -> None:
        """Beat for this worker from now on; return once its lock is held, which may take an outage.

        Where no lock can be held, once there is a connection.
        """
        held = self._adopted.setdefault(worker_id, asyncio.Event())
        self._poked.set()
        await held.wait()

    def abandon(self, worker_id: int) -> None:
        """Beat for this worker no more, and give its lock back."""
        self._adopted.pop(worker_id, None)
        self._poked.set()

    async def run(self) -> None:
        """Hold a session until cancelled. Raises SchemaError or psycopg.Error if the very first one fails."""
        while True:
            connection = await self._open()
            try:
                await self._serve(connection)
            except psycopg.Error as error:
                level = logging.WARNING if self._online else logging.DEBUG
                logger.log(level, "the supervisor lost its database session, connecting again: %s", error)
            finally:
                pause_seconds = 0.0 if self._online else self._settings.beat_seconds
                self._lose()
                await connection.close()
            await asyncio.sleep(pause_seconds)

    async def _open(self) -> Connection:
        """Connect, for as long as it takes."""
        complained = False
        while True:
            try:
                return await retry_connecting_async(self._try, give_up_after_seconds=None)
            except (psycopg.Error, SchemaError) as error:
                if not self.started.is_set():
                    raise
                if not complained:
                    logger.error("the database refuses the supervisor, which keeps trying: %s", error)
                complained = True
            await asyncio.sleep(REFUSED_SECONDS)

    async def _try(self) -> Connection:
        self._attempts += 1
        connection = await self._connect()
        try:
            self.schema_ok = False
            await check_async(connection, CLAIMANT_FUNCTIONS)
            self.schema_ok = True
        except BaseException:
            await connection.close()
            raise
        if is_pooled(connection):
            self._tell_of_pooler()
        return connection

    def _tell_of_pooler(self) -> None:
        if not self._told:
            settings = self._settings
            logger.warning(
                "this supervisor has no way to the database but through a connection pooler: the death of its machine is "
                "noticed after %g s instead of %g, and idle workers look every %g s instead of being rung for; "
                "STEPWELL_DIRECT_DATABASE_URL can name the database itself",
                settings.lease_seconds, settings.lost_lock_seconds, settings.poll_seconds,
            )  # fmt: skip
        self._told = True

    async def _serve(self, connection: Connection) -> None:
        """Tick on this connection until it fails."""
        # After an outage the others come back one by one: they wait at most so long between two attempts.
        settle_seconds = 0.0 if self._attempts == 1 else LONGEST_WAIT_SECONDS
        observer = Observer(self._settings, settle_seconds=settle_seconds)
        server = await self._server_behind(connection)
        beat_due = 0.0
        while True:
            now = time.monotonic()
            self._poked.clear()
            await self._sort_locks(connection)
            if now >= beat_due:
                await self._beat(connection)
                beat_due = now + self._settings.beat_seconds
            found = await self._server_behind(connection)
            if found != server:
                server, observer = found, Observer(self._settings, settle_seconds=LONGEST_WAIT_SECONDS)
                self._on_lost()
            await self._observe(connection, observer)
            self._online, self._ticked_at = True, time.monotonic()
            self.started.set()
            # Not wait_for: before Python 3.12 it may swallow a cancellation that comes with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(now + self._look_seconds - self._ticked_at):
                    await self._poked.wait()

    async def _sort_locks(self, connection: Connection) -> None:
        await self._take_locks(connection)
        await self._give_locks_back(connection)

    async def _take_locks(self, connection: Connection) -> None:
        if is_pooled(connection):
            for adopted in self._adopted.values():
                adopted.set()
            return
        missing = sorted(self._adopted.keys() - self._locked)
        if not missing:
            return
        cursor = await connection.execute(load("lock_workers"), [missing])
        self._locked |= {row[0] for row in await cursor.fetchall()}
        for worker_id in missing:
            if worker_id not in self._locked:
                logger.debug("the lock of worker %d is still held by an earlier session", worker_id)
            elif worker_id in self._adopted:  # else abandoned meanwhile: the next tick unlocks it
                self._adopted[worker_id].set()

    async def _give_locks_back(self, connection: Connection) -> None:
        idle = sorted(self._locked - self._adopted.keys())
        if idle:
            await connection.execute(load("unlock_workers"), [idle])
            self._locked -= set(idle)

    async def _beat(self, connection: Connection) -> None:
        if self._adopted:
            beat = {"workers": sorted(self._adopted), "locking": not is_pooled(connection)}
            cursor = await connection.execute(load("beat"), beat)
            self._on_beat({row[0] for row in await cursor.fetchall()})

    async def _server_behind(self, connection: Connection) -> tuple[Any, ...] | None:
        """Tell the server that a pooler leads to just now; None without a pooler, where a connection ends with its server."""
        if not is_pooled(connection):
            return None
        row: tuple[Any, ...] | None = await (await connection.execute(load("which_server"))).fetchone()
        return row

    async def _observe(self, connection: Connection, observer: Observer) -> None:
        seen = await sightings(connection)
        verdicts = observer.look(seen, time.monotonic(), own=self._adopted)
        if verdicts:
            self._on_verdicts(verdicts)

    def _lose(self) -> None:
        """Forget what the session held."""
        self._online, self._ticked_at = False, None
        self._locked.clear()
        self._on_lost()
