"""Hear the ring: a connection that only listens.

A ring says that there is something to claim on a queue. It may be lost (a broken connection, a database restart);
then the engine's next poll finds the work. So nothing here retries more than the connection itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from psycopg import AsyncConnection

from outbox.database import retry_connecting_async

ANY_QUEUE = "stepwell"
"""The name that a ring has which concerns every idle worker."""


class Doorbell:
    """Calls `on_ring` whenever somebody rings for one of `queues`, or for all.

    Calls `on_cancel` when something that this worker executes is to be cancelled.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[AsyncConnection[Any]]],
        queues: Sequence[str],
        on_ring: Callable[[], None],
        on_cancel: Callable[[], None],
        worker_id: int,
    ) -> None:
        self._connect = connect
        self._names = {*queues, ANY_QUEUE}
        self._on_ring = on_ring
        self._on_cancel = on_cancel
        self._own_name = f"worker {worker_id}"
        self._connection: AsyncConnection[Any] | None = None

    async def run(self) -> None:
        """Listen for ever."""
        while True:
            await retry_connecting_async(self._listen, give_up_after_seconds=None)

    async def close(self) -> None:
        """Close the connection; safe twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _listen(self) -> None:
        await self.close()
        self._connection = await self._connect()
        await self._connection.execute("listen stepwell")
        async for notify in self._connection.notifies():
            if notify.payload in self._names:
                self._on_ring()
            elif notify.payload == self._own_name:
                self._on_cancel()
