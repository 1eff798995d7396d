"""Signals, state, progress and streams of running runs, as services see them by way of the clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import pytest_asyncio
from psycopg.rows import TupleRow

from outbox import (
    AsyncClient,
    Client,
    ConfigError,
    PayloadError,
    Progress,
    ResultTimeout,
    RunNotFound,
    Settings,
)
from tests.claimant import Claimant
from tests.effects import Gate
from tests.engines import Lab
from tests.waiting import wait_until_async
from worker import emit, progress, set_state, step, wait_signal, workflow
from worker.definitions import collecting

Db = psycopg.Connection[TupleRow]


@dataclass
class Approval:
    by: str
    at: datetime


APPROVAL = Approval("Ada", datetime(2026, 1, 2, tzinfo=UTC))


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(database_url) as opened:
        yield opened


@pytest_asyncio.fixture
async def aclient(database_url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(database_url) as opened:
        yield opened


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


def signals(db: Db) -> list[tuple[str, Any]]:
    rows = db.execute("select name, payload::text from stepwell.signals order by id")
    return [(name, json.loads(text)) for name, text in rows]


def emitted(db: Db, run: UUID, first: int, last: int, *, name: str = "log", epoch: int = 0) -> None:
    """Emit the numbers from first to last, as a flush does."""
    db.execute(
        "insert into stepwell.stream (run_id, epoch, n, name, value)"
        " select %s, %s, i, %s, to_json(i) from generate_series(%s::int, %s) i",
        [run, epoch, name, first, last],
    )


def values(items: Any) -> list[Any]:
    return [item.value for item in items]


# -- signals -----------------------------------------------------------------------------------------


def test_a_signal_is_kept_for_an_open_run(client: Client, db: Db) -> None:
    run = client.enqueue("w")
    assert client.signal(run.id, "approved", APPROVAL)
    assert client.signal(str(run.id), "approved")
    assert run.signal("other", [1])
    assert signals(db) == [
        ("approved", {"by": "Ada", "at": "2026-01-02T00:00:00Z"}),
        ("approved", None),
        ("other", [1]),
    ]
    assert [task.name for task in client.tasks(run.id) if task.kind == "wake"] == ["signal"] * 3


def test_whether_the_run_was_open_is_answered_and_a_blocked_one_is(client: Client, db: Db) -> None:
    worker = Claimant(db, ("w",))
    for state, was_open in (("blocked", True), ("failed", False), ("cancelled", False)):
        run = client.enqueue("w")
        worker.end(worker.claim(), state)
        assert run.signal("s") is was_open, state
    assert client.signal(uuid4(), "s") is False
    assert len(signals(db)) == 1


def test_a_signal_that_cannot_be_sends_nothing(client: Client, database_url: str, db: Db) -> None:
    run = client.enqueue("w")
    with pytest.raises(ConfigError, match="Stepwell's own"):
        run.signal("stepwell:child:1", {})
    with pytest.raises(PayloadError, match="the payload of signal 's'"):
        run.signal("s", float("nan"))
    with pytest.raises(RunNotFound):
        client.signal("17", "s")
    small = Client(settings=Settings(database_url=database_url, max_payload_bytes=10))
    with small, pytest.raises(PayloadError, match="max_payload_bytes"):
        small.signal(run.id, "s", "x" * 10)
    assert signals(db) == []


async def test_a_run_takes_what_both_clients_send(
    lab: Lab, client: Client, aclient: AsyncClient, db: Db
) -> None:
    with collecting() as registry:

        @workflow
        async def approving() -> list[Any]:
            first = await wait_signal("approved", type=Approval)
            return [first.by, await wait_signal("approved")]

    async with lab.engine(registry):
        run = await aclient.enqueue(approving)
        await lab.waits(run.id)
        assert await run.signal("approved", APPROVAL)
        assert await asyncio.to_thread(client.signal, run.id, "approved", "again")
        assert await run.result(timeout=20) == ["Ada", "again"]
    assert not await run.signal("approved")
    assert signals(db) == []


# -- state -------------------------------------------------------------------------------------------


async def test_what_a_run_shows_is_read_while_it_runs_and_afterwards(
    lab: Lab, client: Client, aclient: AsyncClient
) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def work() -> None:
            await gate.passed()

        @workflow
        async def showing() -> None:
            set_state("phase", {"name": "first"})
            progress(1, 4)
            await work()
            set_state("phase", "last")
            progress(4, 4)

    async with lab.engine(registry):
        run = await aclient.enqueue(showing)
        await gate.reached()
        assert await run.state() == {"phase": {"name": "first"}, "progress": {"done": 1, "total": 4}}
        assert await run.progress() == Progress(1, 4)
        gate.open()
        await run.result(timeout=20)
    assert await asyncio.to_thread(client.state, run.id) == {
        "phase": "last", "progress": {"done": 4, "total": 4}
    }  # fmt: skip
    assert await asyncio.to_thread(client.progress, str(run.id)) == Progress(4, 4)


async def test_a_run_that_shows_nothing_and_one_that_is_not_there(
    client: Client, aclient: AsyncClient
) -> None:
    run = client.enqueue("w")
    assert (run.state(), run.progress(), await aclient.progress(run.id)) == ({}, None, None)
    for ask in (client.state, client.progress, lambda run: list(client.stream(run))):
        with pytest.raises(RunNotFound):
            ask(uuid4())
    with pytest.raises(RunNotFound):
        await anext(aclient.stream(uuid4()))


# -- streams -----------------------------------------------------------------------------------------


async def test_a_stream_is_followed_live_and_ends_with_its_run(lab: Lab, aclient: AsyncClient) -> None:
    gates = [Gate() for _ in range(3)]
    with collecting() as registry:

        @step
        async def work(n: int) -> int:
            await gates[n].passed()
            return n

        @workflow
        async def emitting() -> str:
            for n in range(3):
                emit("before", n)
                emit("after", {"n": await work(n)})
            emit("before", "the end")
            return "done"

    async with lab.engine(registry):
        run = await aclient.enqueue(emitting)
        seen: list[Any] = []

        async def follow() -> None:
            async for item in run.stream():
                seen.append((item.n, item.name, item.value))  # noqa: PERF401 - looked at while it grows

        reading = asyncio.create_task(follow())
        for n, gate in enumerate(gates):
            await wait_until_async(lambda n=n: len(seen) == 2 * n + 1, what=f"item {2 * n + 1}")
            gate.open()
        await asyncio.wait_for(reading, 20)
    assert seen == [
        (1, "before", 0), (2, "after", {"n": 0}), (3, "before", 1), (4, "after", {"n": 1}), (5, "before", 2),
        (6, "after", {"n": 2}), (7, "before", "the end"),
    ]  # fmt: skip
    assert [item.value async for item in run.stream("after")] == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_many_items_come_in_order_exactly_once_and_from_anywhere_on(client: Client, db: Db) -> None:
    run = client.enqueue("w")
    emitted(db, run.id, 1, 250)
    emitted(db, run.id, 251, 251, name="other")
    emitted(db, run.id, 1, 3, epoch=2)  # after a rewind
    there = list(run.stream(follow=False))
    assert values(there) == [*range(1, 252), 1, 2, 3]
    for number in (0, 99, 250, 253):
        assert values(run.stream(after=there[number].position, follow=False)) == values(there[number + 1 :])
    assert values(run.stream("other", follow=False)) == [251]
    assert values(run.stream("log", after=there[249].position, follow=False)) == [1, 2, 3]
    assert list(run.stream("none", follow=False)) == []


def test_a_reader_sees_what_comes_while_it_waits(client: Client, db: Db) -> None:
    run = client.enqueue("w")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: values(run.stream("log")))
        emitted(db, run.id, 1, 3)
        time.sleep(0.1)  # so that it has looked and waits; that it has not does no harm
        emitted(db, run.id, 4, 4, name="other")
        emitted(db, run.id, 5, 6)
        worker = Claimant(db, ("w",))
        worker.succeed(worker.claim())
        assert reading.result(20) == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("state", ["failed", "cancelled", "blocked"])
def test_a_stream_ends_however_its_run_does(client: Client, db: Db, state: str) -> None:
    run = client.enqueue("w")
    emitted(db, run.id, 1, 2)
    worker = Claimant(db, ("w",))
    worker.end(worker.claim(), state)
    assert values(run.stream()) == [1, 2]


async def test_a_stream_that_stays_silent_times_out_and_can_be_resumed(
    client: Client, aclient: AsyncClient, db: Db
) -> None:
    run = client.enqueue("w")
    emitted(db, run.id, 1, 2)
    items = run.stream(timeout=0)
    seen = [next(items), next(items)]
    assert values(seen) == [1, 2]
    with pytest.raises(ResultTimeout, match="emitted nothing for 0"):
        next(items)
    emitted(db, run.id, 3, 3)
    assert [item.value async for item in aclient.stream(run.id, after=seen[-1].position, follow=False)] == [3]
    with pytest.raises(ResultTimeout):
        await anext(aclient.stream(run.id, after=3, timeout=0.05))


def test_options_of_a_stream_are_checked_at_the_call(client: Client) -> None:
    with pytest.raises(ConfigError, match="after="):
        client.stream(uuid4(), after=-1)
