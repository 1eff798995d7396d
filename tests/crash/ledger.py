"""The ledger: what steps say that they have done, kept by a process that no fault of the tests touches.

It runs outside of Postgres and of the workers, behind a loopback socket, and appends each fact as one line of JSON to a
file. A fact is acknowledged after the file was synced, and the step waits for that: what a step goes on from is in the
ledger, whatever dies next. The order of the lines is the order in which the facts came.

Steps call `report` (in `def` and transactional steps) or `report_async`; the test holds a `Ledger` and reads `facts`.
A report whose acknowledgement was lost is sent again under the same id, and counts once.

It ends when its standard input does: with the test, however that ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from worker import StepInfo

ADDRESS_VARIABLE = "STEPWELL_TEST_LEDGER"
ROOT = Path(__file__).parents[2]
TRY_SECONDS = 5.0
GIVE_UP_SECONDS = 60.0
YES, NO = b"y", b"n"


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that happened. `at` is the wall clock where it happened, `clock` the monotonic one of its machine."""

    id: str
    what: str
    step: str
    run: str
    path: str
    execution: int
    key: str
    fence: int
    transactional: bool
    pid: int
    at: float
    clock: float


# -- in the steps


def report(what: str, step: str, *, transactional: bool = False) -> None:
    """Have the ledger write down `what` the current step does; return when that is durable."""
    _send(_line(what, step, transactional))


async def report_async(what: str, step: str, *, transactional: bool = False) -> None:
    """As `report`, from an async step."""
    # In a thread, so that a step that is cancelled meanwhile leaves no connection in the middle of a line.
    await asyncio.to_thread(_send, _line(what, step, transactional))


def has_taken_effect() -> bool:
    """Ask the ledger whether the current call has taken effect: what a `verify` function asks of a provider."""
    return _send(b"?" + _step().idempotency_key.encode() + b"\n") == YES


def _line(what: str, step: str, transactional: bool) -> bytes:
    info = _step()
    fact = Fact(
        uuid.uuid4().hex, what, step, str(info.run_id), ".".join(map(str, info.path)), info.execution,
        info.idempotency_key, info.fence, transactional, os.getpid(), time.time(), time.monotonic(),
    )  # fmt: skip
    return json.dumps([getattr(fact, each.name) for each in fields(Fact)]).encode() + b"\n"


def _step() -> StepInfo:
    from worker import current_step  # not for the ledger's own process, which has to start fast

    return current_step()


_idle: deque[socket.socket] = deque()
"""Connections that nobody uses just now."""


def _send(line: bytes) -> bytes:
    """Send a line until it is answered."""
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while True:
        try:
            connection = _idle.pop() if _idle else _connect()
        except IndexError:
            continue  # another thread has taken the last one
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
            continue
        try:
            connection.sendall(line)
            answer = connection.recv(1)
        except OSError:
            answer = b""
        if answer:
            _idle.append(connection)
            return answer
        connection.close()


def _connect() -> socket.socket:
    host, _, port = os.environ[ADDRESS_VARIABLE].rpartition(":")
    connection = socket.create_connection((host, int(port)), TRY_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def disconnect() -> None:
    """Close the connections of this process that nobody uses."""
    while _idle:
        _idle.pop().close()


# -- in the test


class Ledger:
    """A running ledger that writes to `path`; safe to stop twice. A file that is there already is continued."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.ledger", str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().decode().strip()

    @property
    def environment(self) -> dict[str, str]:
        """What the workers have to find in their environment."""
        return {ADDRESS_VARIABLE: self.address}

    def facts(self) -> list[Fact]:
        """Return all facts so far, in the order in which they came."""
        return list(read(self.path))

    def stop(self) -> None:
        """Have it end, and wait for that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def read(path: Path) -> Iterator[Fact]:
    """Yield the facts in a file, each once; a line that is not whole was never acknowledged."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                fact = Fact(*json.loads(line))
            except ValueError:
                continue
            if fact.id not in seen:
                seen.add(fact.id)
                yield fact


# -- the process


class _Book:
    """The file. What came while the last lines were synced goes out together."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # what a ledger that was killed left half written
        self.effects = {fact.key for fact in read(Path(path)) if fact.what == "effect"}
        self._queue: list[tuple[bytes, asyncio.Future[None]]] = []
        self._came = asyncio.Event()

    async def answer(self, line: bytes) -> bytes:
        """Return the answer to a question, or to a fact when it is durable."""
        if line.startswith(b"?"):
            return YES if line[1:-1].decode() in self.effects else NO
        await self._write(line)
        fact = Fact(*json.loads(line))
        if fact.what == "effect":
            self.effects.add(fact.key)
        return YES

    async def _write(self, line: bytes) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((line, done))
        self._came.set()
        await done

    async def run(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            batch, self._queue = self._queue, []
            await asyncio.to_thread(self._append, b"".join(line for line, _ in batch))
            for _, done in batch:
                if not done.done():
                    done.set_result(None)

    def _append(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)


async def _serve(path: str) -> None:
    book = _Book(path)

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                writer.write(await book.answer(line))
                await writer.drain()
        except ConnectionError:
            pass  # its worker was killed
        finally:
            writer.close()

    server = await asyncio.start_server(attend, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    sys.stdout.write(f"{host}:{port}\n")
    sys.stdout.flush()
    writing: asyncio.Task[Any] = asyncio.create_task(book.run())
    ending = asyncio.create_task(asyncio.to_thread(sys.stdin.buffer.read))
    await asyncio.wait({writing, ending}, return_when=asyncio.FIRST_COMPLETED)
    os._exit(1 if writing.done() else 0)  # whoever still writes is gone, or about to be killed


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
