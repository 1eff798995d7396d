"""Keep N worker processes alive, and everybody else's under observation. No user code runs here.

Tasks of the one event loop:
  - the *heartbeat* holds the database session: locks and beats for the children, looks at all workers;
  - the *undertaker* reclaims what dead workers held, on a connection of its own;
  - one *keeper* for each of the N places: lock a fresh worker id, spawn, watch until it exits, report the
    obituary, wait (not at all after a first crash), again.

At each failure:
  - a child dies, stops (SIGSTOP) or hangs: its tasks are ready again at once, another takes its place;
  - a child cannot start because of its configuration, and none ever could: the supervisor ends with the
    child's sentence instead of restarting it for ever;
  - the database is away: children and supervisor wait; obituaries and new children wait with them;
  - the supervisor dies: the kernel closes the children's pipes, they exit at once, and with its session go
    their locks, so that the other supervisors reclaim in about `lost_lock_seconds`;
  - the supervisor is stopped or cut off: others reclaim after `lease_seconds`; its children are refused by
    the database, exit with status 75 and are replaced.

SIGTERM and SIGINT drain; a second one stops. Heartbeats go on until the last child has exited.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import psycopg

from outbox.database import connect_async, direct_url, retry_connecting_async
from outbox.errors import ConfigError, SchemaError
from outbox.schema import check_async
from outbox.settings import Settings
from worker.engine.vitals import Vitals
from worker.queries import load
from worker.supervision import children
from worker.supervision.children import Backoff, Child, Exit
from worker.supervision.heartbeat import Heartbeat
from worker.supervision.liveness import Detector, Undertaker, Verdict
from worker.supervision.pipe import EXIT_CONFIG, EXIT_DRAINED, Briefing, News
from worker.telemetry.logs import LogFormat

logger = logging.getLogger(__name__)

EXIT_CUT_SHORT = 1
"""The supervisor's status when a child had to be killed, or was told to stop, before it had drained."""
EXIT_FAILED = 70
"""Its status when it met an error of its own."""
EXIT_NO_ROOM = 71
"""What counts as the status of a child that the system could not start."""
MARGIN_SECONDS = 10.0
"""On top of the grace time: what a child may need to give back the rest and to end."""
STOP_SECONDS = 2.0
"""From telling children to stop until they are killed."""
SETTLE_SECONDS = 5.0
"""How long the last obituaries are waited for at the end; after that, other observers see to them."""
MOST_UNTOLD = 100
"""Dead workers that are remembered until a child is ready to be told of them."""
PULSE_SECONDS = 0.5
ALIVE_SECONDS = 10.0


EventKind = Literal["spawned", "ready", "exited", "verdict", "reclaimed", "draining", "stopping"]


@dataclass(frozen=True, slots=True)
class ChildVitals:
    """One place of a supervisor, as it is now."""

    pid: int
    worker_id: int
    ready: bool
    vitals: Vitals | None


@dataclass(frozen=True, slots=True)
class SupervisorVitals:
    """What the health endpoints and systemd need. `schema_ok` holds from the first connection on."""

    alive: bool
    connected: bool
    schema_ok: bool
    claiming: bool
    ending: bool
    children: tuple[ChildVitals, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: for progress displays and tests, not for decisions."""

    kind: EventKind
    worker_id: int | None = None
    pid: int | None = None
    detail: str = ""


class Supervisor:
    """Runs `processes` worker processes for APP until it is told to drain.

    `child_command` replaces the command line of a child (for tests). `on_event` gets each `Event`; `on_reclaim`
    gets detector and number of freed tasks for each dead worker. Both are called from the event loop.
    """

    def __init__(
        self,
        settings: Settings,
        url: str,
        *,
        app: str,
        processes: int,
        queues: Sequence[str] = ("default",),
        child_command: Sequence[str] | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_reclaim: Callable[[Detector, int], None] | None = None,
        log_format: LogFormat = "text",
    ) -> None:
        if processes < 1:
            raise ConfigError(f"processes must be at least 1, got {processes}")
        self.id = _random_id()
        self.complaint: str | None = None
        self._settings = settings
        self._url = url
        self._app = app
        self._processes = processes
        self._queues = tuple(queues)
        self._command = list(child_command or children.command())
        self._on_event = on_event or (lambda _event: None)
        self._on_reclaim = on_reclaim or (lambda _detector, _tasks: None)
        self._log_format: LogFormat = log_format
        self._children: dict[int, Child] = {}
        self._untold: deque[News] = deque(maxlen=MOST_UNTOLD)
        self._was_ready = False
        self._ending = asyncio.Event()
        self._stopping = asyncio.Event()
        self._status = EXIT_DRAINED
        self._pulse_at = time.monotonic()
        self._undertaker = Undertaker(self._connect, settings, on_reclaim=self._note_reclaim)
        self._heartbeat = Heartbeat(
            self._connect,
            settings,
            on_verdicts=self._note_verdicts,
            on_beat=self._note_beat,
            on_lost=self._undertaker.forget_verdicts,
        )

    # -- from outside ------------------------------------------------------------------------------

    async def run(self) -> int:
        """Run until drained; return the exit status. Once per object.

        Where it is 2, `complaint` holds the sentence for the person at the terminal; it is not logged.
        SIGTERM and SIGINT are handled meanwhile if this is the main thread.
        """
        works = (self._heartbeat.run(), self._undertaker.run(), self._pulse(), self._compare_addresses())
        background = [asyncio.create_task(self._guarded(work)) for work in works]
        keepers = [asyncio.create_task(self._guarded(self._keep())) for _ in range(self._processes)]
        with self._signals():
            try:
                await self._ending.wait()
                await self._end_children(keepers)
                await self._undertaker.settle(SETTLE_SECONDS)
            finally:
                for task in (*keepers, *background):
                    task.cancel()
                await asyncio.gather(*keepers, *background, return_exceptions=True)
        return self._status

    def drain(self) -> None:
        """Have the children drain, and end when they have; safe twice."""
        if not self._ending.is_set():
            self._emit("draining")
            self._ending.set()
            for child in self._children.values():
                child.terminate()

    def stop(self) -> None:
        """End now: children are killed after a moment; safe twice and without `drain` before."""
        self.drain()
        if not self._stopping.is_set():
            self._emit("stopping")
            self._status = self._status or EXIT_CUT_SHORT
            self._stopping.set()
            for child in self._children.values():
                child.terminate()

    def vitals(self) -> SupervisorVitals:
        """Return how it goes; may be called from any thread."""
        return SupervisorVitals(
            alive=time.monotonic() - self._pulse_at < ALIVE_SECONDS,
            connected=self._heartbeat.connected,
            schema_ok=self._heartbeat.schema_ok,
            claiming=any(child.vitals.claiming for child in [*self._children.values()] if child.vitals),
            ending=self._ending.is_set(),
            children=tuple(
                ChildVitals(child.pid, child.worker_id, child.ready, child.vitals)
                for child in [*self._children.values()]
            ),
        )

    # -- a place and its children ------------------------------------------------------------------

    async def _keep(self) -> None:
        """Keep one worker process alive until the end."""
        backoff = Backoff()
        while await self._adopted(worker_id := _random_id()):
            end = await self._attend(worker_id)
            self._undertaker.report(worker_id, "obituary")
            self._heartbeat.abandon(worker_id)
            self._judge(end)
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff.after(end.status, end.lived_seconds)):
                    await self._ending.wait()

    async def _adopted(self, worker_id: int) -> bool:
        """Lock this id and start beating for it; false when the end comes first."""
        ways = [
            asyncio.ensure_future(each) for each in (self._heartbeat.adopt(worker_id), self._ending.wait())
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
        if self._ending.is_set():
            self._heartbeat.abandon(worker_id)
        return not self._ending.is_set()

    async def _attend(self, worker_id: int) -> Exit:
        """Have a worker process under this id, from its start to its end."""
        briefing = Briefing(
            settings=self._settings,
            url=self._url,
            app=self._app,
            worker_id=worker_id,
            supervisor_id=self.id,
            queues=self._queues,
            log_level=logging.getLogger().getEffectiveLevel(),
            log_format=self._log_format,
        )
        try:
            child = Child.spawn(self._command, briefing, self._note_ready)
        except OSError as error:
            logger.error("a worker process cannot be started: %s", error)
            return Exit(EXIT_NO_ROOM, 0.0, ready=False)
        self._children[worker_id] = child
        self._emit("spawned", worker_id, child.pid)
        try:
            end = await child.attend()
        except BaseException:
            child.kill("its supervisor ends")
            raise
        finally:
            del self._children[worker_id]
        self._emit("exited", worker_id, child.pid, str(end))
        return end

    def _judge(self, end: Exit) -> None:
        """Take note of how a child ended."""
        if self._ending.is_set():
            self._status = self._status or (EXIT_CUT_SHORT if end.killed_because else EXIT_DRAINED)
        elif end.status != EXIT_CONFIG:
            logger.warning(
                "a worker process %s after %.1f s; another takes its place", end, end.lived_seconds
            )
        elif self._was_ready:
            logger.error("a worker process cannot start, others go on: %s", end.complaint)
        else:
            self._fail(end.complaint or "a worker process refuses its configuration; its log says why")

    async def _end_children(self, keepers: list[asyncio.Task[None]]) -> None:
        """Give the children the grace time to drain, then a moment to stop, then none."""
        stopping = asyncio.create_task(self._stopping.wait())
        gone = asyncio.create_task(asyncio.wait(keepers))
        try:
            limit = self._settings.grace_seconds + MARGIN_SECONDS
            await asyncio.wait({stopping, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                self.stop()
                await asyncio.wait({gone}, timeout=STOP_SECONDS)
            for child in self._children.values():
                child.kill("it did not end in time")
            await asyncio.wait({gone}, timeout=SETTLE_SECONDS)
        finally:
            stopping.cancel()
            gone.cancel()

    # -- what the parts report ---------------------------------------------------------------------

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        """Open a connection for a session of our own, to the database itself if its address is known."""
        return await self._connect_to(direct_url(self._settings, self._url))

    async def _connect_to(self, url: str) -> psycopg.AsyncConnection[Any]:
        return await connect_async(url, application_name=f"stepwell supervisor {self.id}")

    async def _compare_addresses(self) -> None:
        """Fail if the two addresses lead to two databases: the workers of one would be beaten for in the other."""
        direct = direct_url(self._settings, self._url)
        if direct == self._url:
            return
        await self._heartbeat.started.wait()  # it says first what else is wrong
        found = set()
        for url in (direct, self._url):
            connect = partial(self._connect_to, url)
            async with await retry_connecting_async(connect, give_up_after_seconds=None) as connection:
                await check_async(connection)
                found.add(await (await connection.execute(load("which_database"))).fetchone())
        if len(found) > 1:
            raise ConfigError(
                "STEPWELL_DATABASE_URL and STEPWELL_DIRECT_DATABASE_URL lead to two databases; they have to be two ways to one"
            )

    def _note_ready(self, child: Child) -> None:
        self._was_ready = True
        self._emit("ready", child.worker_id, child.pid)
        self._tell_news()

    def _note_beat(self, known: set[int]) -> None:
        for child in self._children.values():
            child.note_beat(child.worker_id in known)

    def _note_verdicts(self, verdicts: list[Verdict]) -> None:
        for each in verdicts:
            if self._undertaker.report(each.worker_id, each.detector):
                logger.warning("worker %d is dead (%s): %s", each.worker_id, each.detector, each.reason)
                self._emit("verdict", each.worker_id, None, each.detector)

    def _note_reclaim(self, worker_id: int, detector: Detector, tasks: int) -> None:
        self._on_reclaim(detector, tasks)
        self._emit("reclaimed", worker_id, None, detector)
        self._untold.append(News(worker_id, detector, tasks))
        self._tell_news()

    def _tell_news(self) -> None:
        """Tell one child of dead workers: hooks are user code, which runs in children only. It waits for one that is ready."""
        while self._untold and any(child.tell(self._untold[0]) for child in self._children.values()):
            self._untold.popleft()

    def _emit(
        self, kind: EventKind, worker_id: int | None = None, pid: int | None = None, detail: str = ""
    ) -> None:
        self._on_event(Event(kind, worker_id, pid, detail))

    def _fail(self, complaint: str) -> None:
        if self.complaint is None:
            self.complaint, self._status = complaint, EXIT_CONFIG
            self.drain()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work; if it fails, end in order: a part of this process is missing."""
        try:
            await work
        except (SchemaError, ConfigError) as error:
            self._fail(str(error))
        except psycopg.Error as error:
            self._fail(f"the database refuses the supervisor: {error}")
        except Exception:
            logger.exception("the supervisor failed and ends")
            self._status = EXIT_FAILED
            self.stop()

    async def _pulse(self) -> None:
        while True:
            self._pulse_at = time.monotonic()
            await asyncio.sleep(PULSE_SECONDS)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT, where that is possible."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._ending.is_set():
            logger.info("%s again: stopping now", number.name)
            self.stop()
        else:
            logger.info("%s: draining; once more to stop now", number.name)
            self.drain()


def _random_id() -> int:
    """Return an id from 1 to 2**63 - 1, as the database wants it."""
    return secrets.randbelow(2**63 - 1) + 1
