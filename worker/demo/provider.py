"""The messaging provider of the demo: SMTP in, a Maildir out, no deduplication.

One asyncio loop serves all connections; threads write the messages, because each waits for the disk.
What is sent twice is stored twice, and that is the point: nothing here hides a workflow engine's faults.

A message is stored when all of it has arrived and it was ended by the lone dot, and then it is stored
also when its client dies in that moment. One that breaks off is dropped. The client's connection stays
listed in the Maildir (`maildir.Maildir.opened`) until neither can happen any more.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope, Session

from worker.demo.maildir import Maildir

logger = logging.getLogger(__name__)

CLIENT_TIMEOUT_SECONDS = 30.0
MESSAGE_MAX_BYTES = 1_048_576
HOST_NAME = "provider.example"


class Connection(SMTP):
    """One client's connection: which entries of the list are its own, and what it has yet to store."""

    def __init__(self, provider: Provider, **options: Any) -> None:
        super().__init__(provider, **options)
        self.provider = provider
        self.entries: list[Path] = []
        self.deliveries: set[asyncio.Future[None]] = set()

    def connection_lost(self, error: Exception | None) -> None:
        # This cancels the conversation, so no delivery can begin after it; those that have begun go on.
        super().connection_lost(error)
        self.provider.end(self)


class Provider:
    """The handler of all connections. `latency_seconds` is spent half before a message, half on it."""

    def __init__(self, maildir: Maildir, threads: Executor, latency_seconds: float = 0.0) -> None:
        self._maildir = maildir
        self._threads = threads
        self._half_latency_seconds = latency_seconds / 2
        self._ending: set[asyncio.Task[None]] = set()

    def connection(self) -> Connection:
        """Return the protocol of one new connection, for `loop.create_server`."""
        return Connection(
            self,
            hostname=HOST_NAME,
            ident="stepwell demo provider",
            timeout=CLIENT_TIMEOUT_SECONDS,
            data_size_limit=MESSAGE_MAX_BYTES,
            enable_SMTPUTF8=True,
            loop=asyncio.get_running_loop(),
        )

    # -- the hooks of aiosmtpd, which finds them by name -------------------------------------------------

    async def handle_HELO(  # noqa: N802
        self, server: Connection, session: Session, _envelope: Envelope, hostname: str
    ) -> str:
        await self._begin(server, session, hostname)
        return f"250 {HOST_NAME}"

    async def handle_EHLO(  # noqa: N802
        self, server: Connection, session: Session, _envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        await self._begin(server, session, hostname)
        return responses

    async def handle_DATA(  # noqa: N802
        self, server: Connection, _session: Session, envelope: Envelope
    ) -> str:
        content = envelope.original_content or b""
        delivery = asyncio.ensure_future(self._deliver(content, list(envelope.rcpt_tos)))
        server.deliveries.add(delivery)
        delivery.add_done_callback(server.deliveries.discard)
        try:
            await asyncio.shield(delivery)
        except OSError as error:
            logger.error("message not stored", extra={"reason": str(error)})
            return "451 4.3.0 the message could not be stored, try again later"
        return "250 2.0.0 stored"

    def end(self, connection: Connection) -> None:
        """Take a closed connection off the list, once nothing of it can be stored any more."""
        task = asyncio.ensure_future(self._end(connection))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _begin(self, server: Connection, session: Session, hostname: str) -> None:
        # Listed before the answer: whoever has sent a message was on the list by then.
        server.entries.append(self._maildir.opened(hostname))
        session.host_name = hostname
        await asyncio.sleep(self._half_latency_seconds)

    async def _deliver(self, content: bytes, recipients: list[str]) -> None:
        await asyncio.sleep(self._half_latency_seconds)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._maildir.store, content, recipients)

    async def _end(self, connection: Connection) -> None:
        if connection.deliveries:
            await asyncio.wait(list(connection.deliveries))
        for entry in connection.entries:
            self._maildir.closed(entry)
