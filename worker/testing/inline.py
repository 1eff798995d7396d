"""A worker in the test's own process: one engine, in an event loop of a thread of its own.

The test's thread commands and watches, and asks the database whether anything is left to do. So a step that blocks
the event loop keeps the worker from ending, and never the test.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import secrets
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar
from uuid import UUID

from outbox.database import connect_async
from outbox.settings import Settings
from worker.registry import Registry
from worker.replay.records import Path
from worker.supervision.liveness import reclaim
from worker.telemetry import tracing
from worker.testing.crashes import Crash, Execution, MortalEngine

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOP_SECONDS = 5.0
"""How long a worker that was told to stop has to end: longer than an engine waits for what it cancels."""
RECLAIM_SECONDS = 10.0


class LoopThread:
    """An event loop that runs in a thread until it is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="stepwell testing", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a task there, in the context of the caller."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def tell(self, act: Callable[[], object]) -> None:
        """Call something there, soon."""
        self._loop.call_soon_threadsafe(act)

    def leave(self) -> None:
        """Have the loop end when it can, and do not wait for it."""
        self.tell(self._loop.stop)

    def close(self) -> None:
        """End the loop and its thread. One that a step blocks is left behind."""
        self.leave()
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            logger.warning("a step blocks the event loop of the test's worker, which is left behind")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            if left:
                self._loop.run_until_complete(asyncio.wait(left, timeout=STOP_SECONDS))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()


class InlineWorker:
    """One engine at work on `queues`, from its making to `drain` or `stop`."""

    def __init__(
        self,
        loop: LoopThread,
        registry: Registry,
        settings: Settings,
        *,
        url: str,
        queues: Sequence[str],
        crashes: Sequence[Crash],
    ) -> None:
        self.id = secrets.randbits(62) + 1
        self.queues = frozenset(queues)
        self._loop = loop

        async def made() -> MortalEngine:
            return MortalEngine(
                registry, settings, url=url, worker_id=self.id, queues=queues, crashes=crashes,
                tracing=None if settings.tracing is False else tracing.of_process(),
            )  # fmt: skip

        self._engine = loop.start(made()).result(STOP_SECONDS)
        self._running = loop.start(self._engine.run())

    @property
    def ended(self) -> bool:
        """Tell whether the engine has ended, by a crash or an error."""
        return self._running.done()

    def executing(self) -> dict[tuple[UUID, Path], Execution]:
        """Return what is being executed, by run and path."""
        return dict(self._engine.executing)

    def watch(self, seconds: float) -> None:
        """Return when the engine has ended, or after so long."""
        concurrent.futures.wait({self._running}, timeout=seconds)

    def drain(self, seconds: float) -> None:
        """Have the engine end in order, if it has not ended; raise what it raises, TimeoutError if it does not end."""
        self._loop.tell(self._engine.drain)
        self._running.result(seconds)

    def stop(self) -> bool:
        """End the engine at once; tell whether that was possible. Raises nothing."""
        self._loop.tell(self._engine.stop)
        self.watch(STOP_SECONDS)
        return self.ended


async def reclaimed(url: str, worker_id: int, poison_after: int) -> None:
    """Free what a dead worker had claimed, as its supervisor would."""
    async with await connect_async(url, application_name="stepwell testing") as connection:
        done = await reclaim(
            connection, worker_id, "obituary", poison_after=poison_after, pass_seconds=RECLAIM_SECONDS
        )
    if not done.finished:
        raise TimeoutError(
            f"the claims of a crashed worker could not be reclaimed within {RECLAIM_SECONDS:g} s: "
            "something holds locks on its tasks"
        )
