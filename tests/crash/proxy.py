"""A TCP proxy before a Postgres, which loses what the tests tell it to lose.

It listens on the loopback and forwards to the server's Unix socket. It knows as much of the protocol as it needs: it
forwards what a client sends in whole requests (up to Sync), knows which statements a request executes, also prepared
ones, and which application a connection belongs to, so that a `Trap` can strike at a certain one:

  cut_before   the server never sees the request; both sides are closed
  cut_after    the server has answered, the client never learns; both sides are closed
  hold         the request waits until the trap is released, even if its client is dead by then
  hold_answer  the server has answered; the answer waits until the trap is released

Beside traps: `cut` closes connections, `freeze` lets nothing through until `thaw`, `blackhole` swallows everything, in
both directions and without a word, until `restore`.

The proxy runs in a thread of its own with an event loop; its methods may be called from any other thread.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar
from urllib.parse import quote

from outbox import embedded
from tests.postgres import Cluster

Action = Literal["cut_before", "cut_after", "hold", "hold_answer"]
T = TypeVar("T")

CHUNK_BYTES = 65_536
ENDS_REQUEST = b"SQHpXdcf"
SYNC = b"S\0\0\0\4"
ENCRYPTION_REQUESTS = (80877103, 80877104)
CANCEL_REQUEST = 80877102


class Trap:
    """What happens to the next request (to every one, if not `once`) that executes `statement`.

    Only to one of `application` if that is given, that contains `request`, and whose answer contains `answer`; an
    application that begins with ``!`` means every other one.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, statement: str, action: Action, *, request: bytes = b"",
        answer: bytes = b"", application: str = "", once: bool = True,
    ) -> None:  # fmt: skip
        self.action = action
        self.times = 0
        """How often it was sprung."""
        self._loop = loop
        self._statement = statement
        self._request = request
        self._answer = answer
        self._application = application
        self._once = once
        self.armed = True
        self._sprung = threading.Event()
        self._released = asyncio.Event()
        self._cuts = False

    def wait(self, timeout: float = 20.0) -> None:
        """Return when it is sprung; fail the test when that takes too long."""
        assert self._sprung.wait(timeout), (
            f"nothing ran into the trap {self.action} for {self._statement} in {timeout:g} s"
        )

    def release(self, *, cut: bool = False) -> None:
        """Disarm it, and let go on what it holds, or close it."""
        self.armed = False
        self._cuts = cut
        self._loop.call_soon_threadsafe(self._released.set)

    def takes(self, link: _Link, statements: str, request: bytes) -> bool:
        """Tell whether a request is one for this trap."""
        other = self._application.startswith("!")
        return (
            self.armed
            and self._statement in statements
            and self._request in request
            and (not self._application or (link.application == self._application.lstrip("!")) != other)
        )

    def fits(self, answer: bytes) -> bool:
        """Tell whether the answer is the one that was meant."""
        return self.armed and self._answer in answer

    def spring(self) -> None:
        """Take note that it has caught something."""
        self.armed = not self._once and self.armed
        self.times += 1
        self._sprung.set()

    async def held(self) -> bool:
        """Wait until it is released; return whether what it held may go on."""
        await self._released.wait()
        return not self._cuts


@dataclass(eq=False)
class _Link:
    """One connection through the proxy."""

    client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    application: str = ""
    server: asyncio.StreamReader | None = None
    to_server: asyncio.StreamWriter | None = None
    prepared: dict[bytes, str] = field(default_factory=dict)
    captures: list[Trap] = field(default_factory=list)
    tainted: bool = False

    def close(self) -> None:
        for writer in (self.to_client, self.to_server):
            if writer is not None:
                writer.close()


class Proxy:
    """A proxy before the server of `cluster`, also while that is down, or before what listens at the socket `server`.

    `in_turn`: a client is slow between its requests; no traps then.
    """

    def __init__(self, cluster: Cluster, server: Path | None = None, *, in_turn: bool = False) -> None:
        self._server = server or cluster.server.socket_dir() / f".s.PGSQL.{embedded.PORT}"
        self._in_turn = in_turn
        self._loop = asyncio.new_event_loop()
        self._links: set[_Link] = set()
        self._traps: list[Trap] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._swallows = False
        self.port = 0
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="proxy", daemon=True)
        self._thread.start()
        ready.wait(10)

    # -- for the test

    def url(self, dbname: str) -> str:
        """Return the URL of a database by way of the proxy."""
        return (
            f"postgresql://{embedded.SUPERUSER}@127.0.0.1:{self.port}/{quote(dbname)}"
            "?sslmode=disable&gssencmode=disable"
        )

    def arm(
        self, statement: str, action: Action, *, request: bytes = b"", answer: bytes = b"", application: str = "",
        once: bool = True,
    ) -> Trap:  # fmt: skip
        """Set a trap; see `Trap`."""
        trap = Trap(
            self._loop, statement, action, request=request, answer=answer, application=application, once=once
        )

        def add() -> None:
            self._traps = [*(each for each in self._traps if each.armed), trap]

        self._call(add)
        return trap

    def cut(self, application: str = "") -> int:
        """Close the connections of an application, or all; return how many."""

        def close() -> int:
            chosen = [each for each in self._links if application in ("", each.application)]
            for link in chosen:
                link.close()
            return len(chosen)

        return self._call(close)

    def freeze(self) -> None:
        """Let nothing through; what comes meanwhile is kept."""
        self._call(self._flowing.clear)

    def thaw(self) -> None:
        """Let go on what was frozen."""
        self._call(self._flowing.set)

    def blackhole(self) -> None:
        """Swallow everything, in silence, as a network that drops packets."""

        def swallow() -> None:
            self._swallows = True

        self._call(swallow)

    def restore(self) -> None:
        """Forward again; connections that have lost something are closed, as their peers would find out."""

        def forward() -> None:
            self._swallows = False
            for link in [each for each in self._links if each.tainted]:
                link.close()

        self._call(forward)

    def stop(self) -> None:
        """Close everything; safe twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _call(self, work: Callable[[], T]) -> T:
        async def once() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(once(), self._loop).result(10)

    # -- in the loop

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._attend, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for link in self._links:
            link.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _attend(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        link = _Link(client, to_client)
        self._links.add(link)
        ways: list[asyncio.Task[None]] = []
        try:
            if await self._opened(link):
                both = (_in_turn(link),) if self._in_turn else (self._requests(link), self._answers(link))
                ways = [asyncio.create_task(each) for each in both]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, EOFError):
            pass  # one of the two has gone
        finally:
            link.close()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._links.discard(link)

    async def _opened(self, link: _Link) -> bool:
        """Connect to the server with the client's startup message."""
        while True:
            head = await link.client.readexactly(8)
            length, code = struct.unpack("!II", head)
            message = head + await link.client.readexactly(length - 8)
            if code not in ENCRYPTION_REQUESTS:
                break
            link.to_client.write(b"N")
        await self._flowing.wait()
        if code != CANCEL_REQUEST:
            words = message[8:].split(b"\0")
            link.application = dict(zip(words[::2], words[1::2], strict=False)).get(
                b"application_name", b""
            ).decode()  # fmt: skip
        link.server, link.to_server = await asyncio.open_unix_connection(str(self._server))
        link.to_server.write(message)
        return True

    async def _requests(self, link: _Link) -> None:
        assert link.to_server is not None
        while True:
            request, statements = await _request(link)
            trap = next((each for each in self._traps if each.takes(link, statements, request)), None)
            if trap is not None and not await self._caught(trap, link):
                return
            await self._flowing.wait()
            if self._swallows:
                link.tainted = True
                continue
            link.to_server.write(request)
            await link.to_server.drain()

    async def _caught(self, trap: Trap, link: _Link) -> bool:
        """Do what the trap wants before the request is sent; return whether it is."""
        match trap.action:
            case "cut_before":
                trap.spring()
                return False
            case "hold":
                trap.spring()
                return await trap.held()
            case "cut_after" | "hold_answer":
                link.captures.append(trap)
        return True

    async def _answers(self, link: _Link) -> None:
        assert link.server is not None
        while data := await link.server.read(CHUNK_BYTES):
            if link.captures:
                trap = link.captures.pop()
                data = await _answer(link.server, data)
                if trap.fits(data):
                    trap.spring()
                    if trap.action == "cut_after" or not await trap.held():
                        return
            await self._flowing.wait()
            if self._swallows:
                link.tainted = True
                continue
            link.to_client.write(data)
            await link.to_client.drain()


async def _in_turn(link: _Link) -> None:
    """Forward what comes behind a Sync only when that has been answered, as if it had been sent that much later."""
    assert link.server is not None
    assert link.to_server is not None
    while True:
        link.to_client.write(await _answer(link.server, b""))
        request = b""
        while not (request.startswith(b"Q") or request.endswith(SYNC)):
            request, _ = await _request(link)
            link.to_server.write(request)


async def _request(link: _Link) -> tuple[bytes, str]:
    """Return the next whole request of a client, and the text of the statements that it executes."""
    parts: list[bytes] = []
    statements: list[str] = []
    while True:
        head = await link.client.readexactly(5)
        body = await link.client.readexactly(struct.unpack("!I", head[1:])[0] - 4)
        parts += (head, body)
        kind = head[:1]
        if kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            link.prepared[name] = text.decode(errors="replace")
        elif kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            statements.append(link.prepared.get(name, ""))
        elif kind == b"Q":
            statements.append(body.decode(errors="replace"))
        if kind in ENDS_REQUEST:
            return b"".join(parts), "\n".join(statements)


async def _answer(server: asyncio.StreamReader, data: bytes) -> bytes:
    """Return the answer that begins with `data` as a whole, up to ReadyForQuery."""
    position = 0
    while True:
        while len(data) < position + 5:
            data += await _more(server)
        kind, length = data[position : position + 1], struct.unpack_from("!I", data, position + 1)[0]
        position += 1 + length
        while len(data) < position:
            data += await _more(server)
        if kind == b"Z":
            return data


async def _more(server: asyncio.StreamReader) -> bytes:
    data = await server.read(CHUNK_BYTES)
    if not data:
        raise EOFError
    return data
