"""Group commit: every transition of one process goes through here.

Whatever queued up while the previous flush was on the wire goes out as the next one: hundreds of runs in one
round trip and one WAL flush, without a timer. A flush is bounded in rows and bytes.

It guarantees that `commit` returns only after the transition is durable, was refused by the fence, or was refused
for its data; and that a lost connection never decides which: the flush is resent verbatim on a new one, where it
waits for the row locks of the old backend and is answered *already* if that one had committed (I10). It does
not guarantee an order between transitions of different runs.

One task runs `run`; any number of tasks await `commit`. Cancelling one of them does not take its transition back.
A flush refused for its data (SQLSTATE class 22, 23, 54) is halved until the offender is alone (I16); that one gets
its error, the others are written. After any other error, a deadlock as well as a full disk or a statement that an
operator has cancelled, the flush is resent until it comes through: what has happened must not be forgotten, or it
would be done again. Who watches the process sees that flushes are pending and none comes back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import psycopg
from psycopg import AsyncConnection

from outbox.database import is_disconnect, retry_connecting_async
from outbox.settings import Settings
from outbox.transient import is_bad_data, is_conflict
from worker.engine.transitions import Receipt, Verdict, Writing, encode, receipt_of
from worker.queries import load
from worker.telemetry import metrics

logger = logging.getLogger(__name__)

Connect = Callable[[], Awaitable[AsyncConnection[Any]]]

CONFLICT_SECONDS = 0.01
"""How long a flush waits after a deadlock or a serialization failure."""
REFUSED_SECONDS = 1.0
"""How long it waits after an error that is nobody's data."""


class Committer:
    """Commits for one worker, over one connection that `connect` opens in autocommit mode."""

    def __init__(self, connect: Connect, worker_id: int, *, max_rows: int, max_bytes: int) -> None:
        self.flushes = 0
        self._connect = connect
        self._worker_id = worker_id
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._queue: deque[tuple[Writing, asyncio.Future[Receipt]]] = deque()
        self._waking = asyncio.Event()
        self._idle = asyncio.Event()
        self._connection: AsyncConnection[Any] | None = None
        self._in_flush = 0
        self._ended = False

    @property
    def pending(self) -> int:
        """Return how many transitions are not answered yet."""
        return len(self._queue) + self._in_flush

    @property
    def connected(self) -> bool:
        """Tell whether the last flush found its connection alive."""
        return self._connection is not None and not self._connection.broken

    def commit(self, writing: Writing) -> asyncio.Future[Receipt]:
        """Queue a transition; await the answer. Once `run` has ended, the answer is a cancellation."""
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        if self._ended:
            future.cancel()
            return future
        self._queue.append((writing, future))
        self._waking.set()
        return future

    async def run(self) -> None:
        """Flush what is queued, for ever. Cancelling it ends everybody who waits for an answer."""
        try:
            while True:
                await self._waking.wait()
                await self.run_once()
        finally:
            self._ended = True
            _end(self._queue)

    async def run_once(self) -> int:
        """Flush one batch; return how many transitions it had."""
        batch = self._take()
        if batch:
            self._in_flush = len(batch)
            try:
                await self._flush(batch)
            finally:
                self._in_flush = 0
                _end(batch)
        self._idle.set()
        return len(batch)

    async def settled(self) -> None:
        """Return when nothing is pending."""
        while self._queue or self._in_flush:
            self._idle.clear()
            await self._idle.wait()

    async def close(self) -> None:
        """Close the connection; safe twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def _take(self) -> list[tuple[Writing, asyncio.Future[Receipt]]]:
        batch: list[tuple[Writing, asyncio.Future[Receipt]]] = []
        size = 0
        while self._queue and len(batch) < self._max_rows:
            size += self._queue[0][0].size()
            if batch and size > self._max_bytes:
                break
            batch.append(self._queue.popleft())
        if not self._queue:
            self._waking.clear()
        return batch

    async def _flush(self, batch: list[tuple[Writing, asyncio.Future[Receipt]]]) -> None:
        started = time.monotonic()
        try:
            codes = await self._send([writing for writing, _ in batch])
        except psycopg.Error as error:
            if len(batch) == 1:
                _answer(batch[0][1], Receipt(Verdict.FENCED, refused=_said(error)))
                return
            half = len(batch) // 2
            await self._flush(batch[:half])
            await self._flush(batch[half:])
            return
        self.flushes += 1
        metrics.COMMIT_SECONDS.observe(time.monotonic() - started)
        metrics.COMMIT_BATCH.observe(len(batch))
        for (_, future), code in zip(batch, codes, strict=True):
            _answer(future, receipt_of(code))

    async def _send(self, writings: list[Writing]) -> list[int]:
        statement = load("flush")
        parameters = (self._worker_id, *encode(writings))

        async def once() -> list[int]:
            while True:
                if self._connection is None or self._connection.closed:
                    self._connection = await self._connect()
                try:
                    cursor = await self._connection.execute(statement, parameters, prepare=True, binary=True)
                    row = await cursor.fetchone()
                except psycopg.Error as error:
                    if is_disconnect(error):
                        await self.close()
                        raise
                    if is_bad_data(error):
                        raise
                    await self._wait_after(error, len(writings))
                else:
                    codes: list[int] = row[0] if row else []
                    return codes

        return await retry_connecting_async(once, give_up_after_seconds=None)

    async def _wait_after(self, error: psycopg.Error, rows: int) -> None:
        if is_conflict(error):
            await asyncio.sleep(CONFLICT_SECONDS)
            return
        logger.error("a flush of %d transitions is refused and will be sent again: %s", rows, _said(error))
        await self.close()  # another connection may reach a server that can write
        await asyncio.sleep(REFUSED_SECONDS)


def flush_rows(settings: Settings) -> int:
    """Return how many transitions one flush takes: at most half of what can be in flight.

    So this process drives one half while the database writes the other, instead of both waiting in turn.
    """
    return min(settings.flush_max_rows, max(32, settings.concurrency // 2))


def _end(unanswered: Iterable[tuple[Writing, asyncio.Future[Receipt]]]) -> None:
    """End those who wait for an answer that will not come: nothing is left that would give it."""
    for _, future in unanswered:
        future.cancel()


def _answer(future: asyncio.Future[Receipt], receipt: Receipt) -> None:
    if not future.done():
        future.set_result(receipt)


def _said(error: psycopg.Error) -> str:
    """Return the database's message without the values in it, which may be payload."""
    message = error.diag.message_primary or str(error)
    return f"{message} (SQLSTATE {error.sqlstate})"
