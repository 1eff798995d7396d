"""What the tests of named holes run in real processes: steps that kill, deadlock, and stand at gates."""

from __future__ import annotations

import asyncio
import ctypes
import resource
import threading
import time

import psycopg

from tests.crash.flows import note
from tests.crash.gates import HOME, closed
from worker import current_step, gather, sleep, step, transaction, workflow

PATIENCE_SECONDS = 120.0
EVERY_SECONDS = 0.1
"""Seldom enough for hundreds that stand at one gate."""

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


async def stand(gate: str) -> None:
    """Wait in the loop until the gate is open."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while closed(gate) and time.monotonic() < deadline:  # noqa: ASYNC110 - a file opens it, from another process
        await asyncio.sleep(EVERY_SECONDS)


def stand_in_thread(gate: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while closed(gate) and time.monotonic() < deadline:
        time.sleep(EVERY_SECONDS)


@step
async def live(n: int) -> int:
    note("start", f"live-{n}")
    await stand("live")
    note("effect", f"live-{n}")
    return n


@step
async def segfault() -> None:
    note("start", "segfault")
    await stand("segfault")
    ctypes.string_at(0)


@step
async def deadlock() -> str:
    """Have the loop wait for what only the loop could give; the second execution finds no lock."""
    note("start", "deadlock")
    if not (HOME / "deadlocked").exists():
        (HOME / "deadlocked").touch()
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    note("effect", "deadlock")
    return "alive"


@transaction
def book(connection: psycopg.Connection) -> str:
    note("start", "book")
    run = str(current_step().run_id)
    connection.execute("insert into saved (run, name, size) values (%s, 'booked', 1)", (run,))
    note("effect", "book")
    if current_step().execution == 1:
        stand_in_thread("book")
    return run


@workflow
async def living(n: int) -> int:
    return await live(n)


@workflow
async def poisoned() -> None:
    await segfault()


@workflow
async def deadlocked() -> str:
    return await deadlock()


@workflow
async def side_by_side(n: int) -> list[int]:
    return list(await gather(live(n), live(n + 1)))


@workflow
async def booking() -> str:
    return book()


@workflow
async def resting(n: int, seconds: float) -> int:
    """A step on either side of a rest."""
    await live(n)
    await sleep(seconds)
    return await live(-n)
