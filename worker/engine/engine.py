"""One worker process at work: claim → drive → execute → commit.

Tasks of one event loop, no threads that wait:

- *claiming* takes as many tasks as there are free slots (I2), starts an `Advance` for each, and looks idle when
  there is nothing: producers then ring (I1), and a lost ring costs one poll;
- *committing* is `worker.engine.committer`;
- *listening* turns a ring into a wake-up of the claim loop;
- *caring* is `worker.engine.caretaker`: due timers, audit, names that nobody knows.

It guarantees what the claims and the fence guarantee, and that a stop leaves nothing behind that the next claimant
would not find. `drain` stops claiming, gives runs back at their next step, lets executions end up to the grace
time and cuts the rest short; `stop` ends at once and leaves everything to the obituary. Losing the database ends
nothing: statements and flushes are repeated on new connections. The one thing that ends an engine by itself is
the database's word that its worker is dead (`DeclaredDead`).

A suspect, a task that two workers died of, is taken when nothing else is in flight: see `_quarantine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from psycopg import AsyncConnection

from outbox import database
from outbox.settings import Settings
from worker.engine.caretaker import Caretaker
from worker.engine.claimed import Claimed
from worker.engine.claims import Claim, Claimant
from worker.engine.committer import Committer, flush_rows
from worker.engine.doorbell import ANY_QUEUE, Doorbell
from worker.engine.intake import Intake
from worker.engine.means import Means
from worker.engine.names import Names
from worker.engine.sandbox import Sandbox
from worker.engine.transitions import applied_timer, applied_wake
from worker.engine.vitals import Vitals
from worker.engine.watch import Watcher
from worker.registry import Registry
from worker.steps.execution import Executor
from worker.steps.transactions import Transactions
from worker.telemetry import metrics
from worker.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 1.0
"""How often a worker without a free slot looks for cancellations."""
WORTH_CLAIMING = 0.25
"""While there is a backlog, slots are gathered until this part of them is free: one claim instead of many."""
GATHER_SECONDS = 0.02
"""… but no longer than this, or runs that take long would leave the rest of the slots empty."""
PATIENCE_SECONDS = 5.0
"""How long a busy worker leaves a suspect to an idle one. Doubled each time that it could not get its hands free."""
LONGEST_PATIENCE_SECONDS = 300.0
QUARANTINE_SECONDS = 5.0
"""How long a worker tries to get everything out of its hands before it gives up on a suspect."""
LATE_SECONDS = 0.5
"""How much longer than until its next look an idle worker asks to be rung: that look may come late."""
POKE_SECONDS = 0.01
"""How long after a ring the timers are looked at."""
CUT_SECONDS = 2.0
"""How long executions that were cut short have to come back."""


class _StoppedError(Exception):
    """Somebody has called `stop`."""


class Engine:
    """The engine of worker `worker_id` on `queues`. `run` it once, in a running event loop."""

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        *,
        url: str,
        worker_id: int,
        supervisor_id: int | None = None,
        queues: Sequence[str] = ("default",),
        release: str = "",
        tracing: Tracing | None = None,
    ) -> None:
        self.worker_id = worker_id
        self._registry = registry
        self._settings = settings
        self._url = url
        self._supervisor_id = supervisor_id
        self._queues = list(queues)
        self._release = release
        self._flying: dict[int, Claimed] = {}
        self._starting: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._backlog = False
        self._draining = False
        self._stopped = asyncio.Event()
        self._registered = False
        self._claiming = False
        self._alone = False
        self._suspected_at: float | None = None
        self._patience_seconds = PATIENCE_SECONDS
        self._turns = self._rotation = 0
        self._claimant = Claimant(self._connect, worker_id, max_payload_bytes=settings.max_payload_bytes)
        self._committer = Committer(
            self._connect, worker_id, max_rows=flush_rows(settings), max_bytes=settings.flush_max_bytes
        )
        self._executor = Executor(settings.threads)
        self._transactions = Transactions(url, worker_id, settings.connections, self._executor)
        self._doorbell = Doorbell(
            database.direct_url(settings, url), worker_id, self._queues, self._rung, self._cancellation_rung
        )
        self._names = Names(registry, self._changed.set)
        means = Means(
            self._committer, self._executor, self._transactions, settings, Sandbox(),
            leaving=lambda: self._draining or self._alone,
            leave=self._names.leave,
            reader=self._claimant,
        )  # fmt: skip
        self._watcher = Watcher.of(registry, tracing, worker_id, plain=not means.keyring)
        self._intake = Intake(self._claimant, registry, means, self._watcher)
        self._caretaker = Caretaker(
            self._claimant, self._committer, self._queues, self._names.all, self._held, self._changed.set, self._cancel,
            is_rung_for=lambda: self._doorbell.hears,
        )  # fmt: skip

    # -- lifecycle

    async def run(self) -> None:
        """Register, claim and execute until drained or stopped. Raises DeclaredDead."""
        background = [
            asyncio.create_task(part(), name=name)
            for name, part in (
                ("committer", self._committer.run),
                ("doorbell", self._doorbell.run),
                ("stop", self._stop),
            )
        ]
        try:
            await self._until_failure(self._register(), background)
            background.append(asyncio.create_task(self._caretaker.run(), name="caretaker"))
            background.append(asyncio.create_task(self._measure_lag(), name="lag"))
            self._claiming = True
            await self._until_failure(self._claim_until_drained(), background)
            self._claiming = False
            await self._until_failure(self._drained(), background)
            await self._until_failure(self._claimant.unregister(), background)
        except _StoppedError:
            pass
        finally:
            self._claiming = False
            await self._dismantle(background)

    def drain(self) -> None:
        """Stop claiming; `run` returns when what is in flight has ended or the grace time is over."""
        if not self._registered:
            self.stop()  # nothing is in flight, and the database may be away
        self._draining = True
        self._changed.set()

    def stop(self) -> None:
        """End now, whatever the database does: what is in flight is left to whoever reclaims it."""
        self._draining = True
        self._stopped.set()

    def tell_reclaimed(self, dead: int, detector: str, tasks: int) -> None:
        """Tell this process's hooks that another worker is dead, and that what it had claimed is free."""
        if self._watcher is not None:
            self._watcher.reclaimed(dead, detector, tasks)

    def vitals(self) -> Vitals:
        """Return the counters that a beat carries to the supervisor."""
        return Vitals(
            loop=self._turns,
            flushes=self._committer.flushes,
            pending=self._committer.pending,
            connected=self._claimant.connected,
            claiming=self._claiming and not self._draining,
            in_flight=len(self._flying),
        )

    async def _register(self) -> None:
        await self._claimant.publish(
            (w.name, w.version, msgspec.json.encode(w.signature.json_schema()).decode(), w.queue)
            for w in self._registry.workflows.values()
        )
        await self._claimant.register(
            supervisor=self._supervisor_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            release=self._release,
            queues=self._queues,
            names=self._names.all,
        )
        self._registered = True
        logger.info("claiming %s from %s", ", ".join(self._names.all), ", ".join(self._queues))

    async def _stop(self) -> None:
        await self._stopped.wait()
        raise _StoppedError

    async def _until_failure(self, work: Any, background: Sequence[asyncio.Task[Any]]) -> None:
        """Await `work`, or the first background part that fails: none of them ends by itself."""
        main = asyncio.ensure_future(work)
        try:
            await asyncio.wait({main, *background}, return_when=asyncio.FIRST_COMPLETED)
            for task in (main, *background):
                if task.done():
                    task.result()
        finally:
            main.cancel()
            await asyncio.wait({main}, timeout=CUT_SECONDS)

    async def _dismantle(self, background: Sequence[asyncio.Task[Any]]) -> None:
        """Cancel everything. What does not come back in time is left behind; it can write nothing any more."""
        ending = {*background, *self._tasks}
        for task in ending:
            task.cancel()
        ended, left = await asyncio.wait(ending, timeout=CUT_SECONDS)
        for task in ended:
            if not task.cancelled():
                task.exception()  # seen: `run` raises the one that counts
        if left:
            logger.warning("%d executions do not let themselves be cancelled and are left behind", len(left))
        self._executor.close()
        metrics.hand_over()
        for part in (self._transactions, self._doorbell, self._claimant, self._committer):
            await part.close()
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.close)

    async def _connect(self) -> AsyncConnection[Any]:
        return await database.connect_async(self._url, application_name=f"stepwell {self.worker_id}")

    # -- claiming

    async def _claim_until_drained(self) -> None:
        while not self._draining:
            if self._backlog:
                await self._gather_slots()
            if await self.run_once() == 0:
                await self._idle()
            else:
                await asyncio.sleep(0)  # what was claimed takes off before the next claim is sent

    async def _gather_slots(self) -> None:
        """Wait for a moment until a claim is worth its commit."""
        deadline = time.monotonic() + GATHER_SECONDS
        while len(self._flying) > self._settings.concurrency * (1 - WORTH_CLAIMING):
            self._changed.clear()
            left = deadline - time.monotonic()
            if left <= 0 or self._draining:
                break
            await self._wait(left)

    async def run_once(self) -> int:
        """Claim once from each queue, as far as there are free slots; return how many tasks were claimed."""
        claimed = 0
        self._changed.clear()  # before the first look: what is rung for during the others must not be forgotten
        for turn in range(len(self._queues)):
            queue = self._queues[(self._rotation + turn) % len(self._queues)]
            free = self._settings.concurrency - len(self._flying)
            claims = await self._claimant.claim(queue, self._names.claimed, max(0, free))
            await self._start(claims, queue)
            claimed += len(claims)
            self._backlog = 0 < free <= len(claims)
        self._rotation += 1
        self._turns += 1
        if self._caretaker.suspects and not self._draining and self._may_be_alone():
            await self._quarantine()
        return claimed

    async def _idle(self) -> None:
        """Wait for a slot, a ring or the next poll; with free slots, ask producers to ring if that can be heard."""
        full = len(self._flying) >= self._settings.concurrency
        # Wakes and timers are applied without a slot.
        queues, seconds = (
            ([ANY_QUEUE], CANCEL_SECONDS) if full else (self._queues, self._settings.poll_seconds)
        )
        asks = self._doorbell.hears
        rung = asks and await self._claimant.idle(
            queues, self._settings.doorbell_seconds, at_least_seconds=seconds + LATE_SECONDS
        )
        # What came before the lease.
        if asks and not (rung or full or self._draining) and await self.run_once():
            return
        if not self._draining:
            await self._wait(seconds)

    async def _wait(self, seconds: float) -> None:
        # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the event.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _start(self, claims: Sequence[Claim], queue: str) -> None:
        if not claims:
            return
        metrics.CLAIMS.inc(len(claims))
        # Held from here on, or the audit would take them for strays while their histories are read.
        self._starting = {claim.task for claim in claims}
        for claim in claims:
            if claim.kind not in ("run", "step"):
                self._spawn(self._apply(claim)).add_done_callback(self._tasks.discard)
        async for claimed in self._intake.taken(claims, queue):
            self._take_off(claimed)
        self._starting = set()
        self._count_slots()

    def _take_off(self, claimed: Claimed) -> None:
        waited = claimed.claim.waited
        if waited is not None:
            metrics.claim_wait.observe(max(0.0, waited))
        self._flying[claimed.claim.task] = claimed
        self._spawn(claimed.run()).add_done_callback(functools.partial(self._landed, claimed))

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        return task

    def _landed(self, advance: Claimed, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The run stays claimed; the audit will find the stray and release it.
            logger.error("an advance failed", exc_info=error, extra={"run_id": str(advance.claim.run_id)})
        if self._flying.get(advance.claim.task) is advance:
            del self._flying[advance.claim.task]
        if advance.parked:
            self._caretaker.poke()
        if not self._flying:
            self._count_slots()
        self._changed.set()

    async def _apply(self, claim: Claim) -> None:
        """Apply a fact to a run, or a timer that is due."""
        writing = applied_wake if claim.kind == "wake" else applied_timer
        await self._committer.commit(writing(claim))
        # What it has readied was rung for, but maybe before this worker asked to be rung.
        self._changed.set()

    def _cancel(self, tasks: Sequence[int]) -> None:
        for task in tasks:
            if (claimed := self._flying.get(task)) is not None:
                claimed.cancel()

    def _cancellation_rung(self) -> None:
        self._spawn(self._caretaker.look_for_cancellations()).add_done_callback(self._tasks.discard)

    def _rung(self) -> None:
        self._changed.set()
        # What was enqueued may have a delay. Most has none, and is not to wait for a look at the timers.
        asyncio.get_running_loop().call_later(POKE_SECONDS, self._caretaker.poke)

    def _held(self) -> set[int]:
        return self._starting | set(self._flying)

    def _count_slots(self) -> None:
        metrics.count_slots(len(self._flying), self._settings.concurrency)

    # -- alone with a suspect

    def _may_be_alone(self) -> bool:
        """Tell whether it is time to look after a suspect: at once when idle, else when nobody idle has for a while."""
        if not self._flying:
            return True
        if self._suspected_at is None:
            self._suspected_at = time.monotonic()
        return time.monotonic() - self._suspected_at >= self._patience_seconds

    async def _quarantine(self) -> None:
        """Give everything back, take suspects, one after the other, and do nothing else beside each.

        If it kills this process, nothing else was in flight: what dies alone often enough is the poison, and its
        neighbours never are.
        """
        self._caretaker.suspects = False
        self._suspected_at = None
        self._alone = True
        try:
            if not await self._emptied(time.monotonic() + QUARANTINE_SECONDS):
                self._patience_seconds = min(2 * self._patience_seconds, LONGEST_PATIENCE_SECONDS)
                return
            self._patience_seconds = PATIENCE_SECONDS
            deadline = time.monotonic() + QUARANTINE_SECONDS
            for queue in self._queues:
                while await self._run_suspect(queue) and time.monotonic() < deadline:
                    pass  # the hands are free already
        finally:
            self._alone = False

    async def _run_suspect(self, queue: str) -> bool:
        """Take one suspect and wait until it is done; tell whether there was one."""
        claims = await self._claimant.claim(queue, self._names.claimed, 0, alone=True)
        self._alone = False
        await self._start(claims, queue)
        while self._flying and not self._draining:
            self._changed.clear()
            cancellations = await self._claimant.claim(queue, self._names.claimed, 0)
            await self._start(cancellations, queue)
            await self._wait(CANCEL_SECONDS)
        self._alone = True
        return not self._draining and any(claim.kind in ("run", "step") for claim in claims)

    async def _emptied(self, deadline: float) -> bool:
        """Wait until nothing is in flight; tell whether that was before `deadline` (monotonic)."""
        while self._flying:
            self._changed.clear()
            left = deadline - time.monotonic()
            if left <= 0 or not self._flying:
                break
            await self._wait(left)
        return not self._flying

    # -- draining

    async def _drained(self) -> None:
        """Let executions end within the grace time, cut the rest short, and have everything written."""
        if not await self._emptied(time.monotonic() + self._settings.grace_seconds):
            logger.warning("%d executions are cut short, the grace time is over", len(self._flying))
            for advance in list(self._flying.values()):
                advance.cut()
            await self._emptied(time.monotonic() + CUT_SECONDS)
        await self._committer.settled()

    async def _measure_lag(self) -> None:
        while True:
            started = time.monotonic()
            await asyncio.sleep(0.5)
            metrics.LOOP_LAG.observe(max(0.0, time.monotonic() - started - 0.5))
            self._turns += 1
            self._count_slots()
            metrics.hand_over()
