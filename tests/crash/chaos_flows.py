"""What a chaos run executes: short and long runs, retries, sleeps, joins, children, signals, each kind of step and policy.

Each step tells the ledger that it starts and that it has taken effect; `tests.crash.plans` says which steps a run has to have
completed.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import psycopg
import tenacity

from tests.crash.ledger import report, report_async
from tests.crash.plans import MANY
from worker import (
    NOT_DONE,
    call,
    current_step,
    gather,
    map,
    retrying,
    sleep,
    start,
    step,
    transaction,
    wait_signal,
    workflow,
)

HOME = Path(os.environ.get("STEPWELL_TEST_HOME", "."))
TAKES_SECONDS = 0.03
"""A step takes up to seven times as long, so that there is something in flight whenever something strikes."""

_patient = retrying(stop=tenacity.stop_after_attempt(50), wait=tenacity.wait_random(0.0, 1.4))


def _part(n: int) -> float:
    return n % 8 * TAKES_SECONDS / 2


@step
async def greet(n: int) -> int:
    await report_async("start", "greet")
    await asyncio.sleep(_part(n))
    await report_async("effect", "greet")
    await asyncio.sleep(_part(n))
    return n


@step
def count(n: int) -> int:
    report("start", "count")
    time.sleep(_part(n))
    report("effect", "count")
    time.sleep(_part(n))
    return n + 1


@transaction
def book(connection: psycopg.Connection, n: int) -> int:
    report("start", "book", transactional=True)
    info = current_step()
    connection.execute(
        "insert into witness.booked (run, path, step, fence, pid) values (%s, %s, 'book', %s, %s)",
        (info.run_id, ".".join(str(part) for part in info.path), info.fence, os.getpid()),
    )
    time.sleep(_part(n))
    report("effect", "book", transactional=True)
    return n


@step(retry=_patient)
async def stumble(n: int) -> int:
    """Fail as often as its number says, before anything happens."""
    await report_async("start", "stumble")
    if current_step().execution <= n % 4:
        raise ConnectionError("not yet")
    await report_async("effect", "stumble")
    return n


def _paid() -> Path:
    return HOME / "paid" / current_step().idempotency_key.replace(":", "-")


def was_paid(n: int) -> object:
    """Look for what an execution leaves behind."""
    return n if _paid().exists() else NOT_DONE


@step(verify=was_paid, retry=_patient)
def pay(n: int) -> int:
    report("start", "pay")
    _paid().touch(exist_ok=False)
    report("effect", "pay")
    return n


@step(on_crash="hold")
async def fire(n: int) -> int:
    await report_async("start", "fire")
    await asyncio.sleep(_part(n))
    await report_async("effect", "fire")
    return n


@workflow
async def short(n: int) -> int:
    return book(await greet(n))


@workflow
def plain(n: int) -> int:
    return book(count(n))


@workflow
async def long(n: int) -> int:
    for _ in range(MANY):
        n = count(await greet(n))
    return book(n)


@workflow
async def stumbling(n: int) -> list[int]:
    return [await stumble(n), await stumble(n + 1), await stumble(n + 2)]


@workflow
async def sleepy(n: int) -> int:
    await sleep(n % 3 * 0.7)
    await greet(n)
    await sleep(n % 5 * 0.3)
    return book(n)


@workflow
async def careful(n: int) -> int:
    return await fire(pay(n))


@workflow
async def fanning(n: int) -> Any:
    joined = await gather(greet(n), call(count, n), call(book, n), sleep(0.2))
    mapped = await map(greet, range(MANY), limit=5 if n % 2 else None)
    return [joined, mapped, count(n)]


@workflow
async def parent(n: int) -> Any:
    begun = start(plain, n)
    first = await short(n)
    return [first, await begun, count(n)]


@workflow
async def waiting(n: int) -> Any:
    await greet(n)
    said = await wait_signal("go")
    return [said, book(n)]
