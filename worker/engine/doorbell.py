"""Hear the ring: a connection that only listens.

A ring says that there is something to claim on a queue. It may be lost (a broken connection, a database restart);
then the engine's next poll finds the work. So nothing here retries more than the connection itself.

Listening takes a session of one's own. Where the only way to the database is a connection pooler there is none: nothing is
heard, `hears` says so, and the engine polls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from psycopg import AsyncConnection

from outbox.database import connect_async, retry_connecting_async
from outbox.sessions import is_pooled

ANY_QUEUE = "stepwell"
"""The name that a ring has which concerns every idle worker."""


class Doorbell:
    """Calls `on_ring` whenever somebody rings for one of `queues`, or for all.

    Calls `on_cancel` when something that this worker executes is to be cancelled. `url` is that of the database itself.
    """

    def __init__(
        self,
        url: str,
        worker_id: int,
        queues: Sequence[str],
        on_ring: Callable[[], None],
        on_cancel: Callable[[], None],
    ) -> None:
        self._url = url
        self._application_name = f"stepwell {worker_id}"
        self._names = {*queues, ANY_QUEUE}
        self._on_ring = on_ring
        self._on_cancel = on_cancel
        self._own_name = f"worker {worker_id}"
        self._connection: AsyncConnection[Any] | None = None
        self.hears = False
        """Whether a ring would be heard just now."""

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
        self._connection = await connect_async(self._url, application_name=self._application_name)
        if is_pooled(self._connection):
            await self.close()
            await asyncio.Event().wait()  # for ever: a pooler does not go away from under a process
        await self._connection.execute("listen stepwell")
        self.hears = True
        self._on_ring()  # whoever is idle may ask to be rung for from now on
        try:
            async for notify in self._connection.notifies():
                if notify.payload in self._names:
                    self._on_ring()
                elif notify.payload == self._own_name:
                    self._on_cancel()
        finally:
            self.hears = False
