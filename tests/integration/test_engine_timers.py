"""Sleeps and deadlines: what happens to a run by the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from psycopg import AsyncConnection
from tenacity import stop_after_attempt, wait_fixed

from tests.effects import Gate
from tests.engines import Lab
from worker import now, retrying, sleep, sleep_until, step, transaction, wait, workflow
from worker.definitions import collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


async def lateness(lab: Lab) -> list[float]:
    """Return by how many seconds each recorded sleep ended after it was due, as its step noted."""
    rows = await lab.execute(
        "select extract(epoch from o.at - (o.value #>> '{}')::timestamptz)::float8 from stepwell.outbox o"
        " where o.kind = 'step'"
    )
    return [row[0] for row in rows]


# -- sleep


async def test_a_sleep_parks_the_run_and_holds_nothing(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def asynchronous() -> str:
            await sleep(0.6)
            return "awake"

        @workflow
        def synchronous() -> str:
            wait(sleep(timedelta(seconds=0.6)))
            return "awake"

    async with lab.engine(registry, concurrency=1) as engine:
        runs = [await lab.enqueue(flow) for flow in (asynchronous, synchronous)]
        for run in runs:
            await lab.waits(run)
            task = await lab.task(run)
            assert task is not None
            assert (task.claimed_by, task.doing) == (None, [1])
            assert await lab.status(run) == "waiting"
        assert engine.engine.vitals().in_flight == 0
        for run in runs:
            assert await lab.succeeded(run) == "awake"
            assert await lab.history(run) == [("1", 0, "completed")]


async def test_timers_are_precise_on_an_idle_engine(lab: Lab) -> None:
    with collecting() as registry:

        @step
        async def woken(due: datetime) -> datetime:
            return due

        @workflow
        async def sleeping(seconds: float) -> None:
            due = now() + timedelta(seconds=seconds)
            await sleep_until(due)
            await woken(due)

    async with lab.engine(registry):
        for seconds in (0.3, 1.0, 1.6, 0.45):
            await lab.enqueue(sleeping, {"seconds": seconds})
        await lab.all_succeeded(4)
    late = await lateness(lab)
    assert len(late) == 4
    assert min(late) >= 0
    assert min(late) < 0.2  # tens of milliseconds; the bound leaves room for a busy machine
    assert max(late) < 0.7


async def test_zero_and_past_times_do_not_park(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def hurried() -> str:
            await sleep(0)
            await sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
            await sleep_until(now() - timedelta(days=1))
            return "done"

    async with lab.engine(registry):
        run = await lab.enqueue(hurried)
        assert await lab.succeeded(run) == "done"
        attempts = await lab.execute("select count(*) from stepwell.outbox where kind = 'sleep'")
    assert attempts == [(3,)]
    assert await lab.history(run) == [(str(n), 0, "completed") for n in (1, 2, 3)]


async def test_a_thousand_sleepers_wake_and_none_is_forgotten(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def sleeping(seconds: float) -> None:
            await sleep(seconds)
            await sleep(0.1)

    async with lab.engine(registry):
        await lab.enqueue_many(sleeping, [{"seconds": 0.2 + n / 2000} for n in range(1000)])
        await lab.all_succeeded(1000)


async def test_an_enqueue_with_a_delay_starts_when_it_is_due(lab: Lab) -> None:
    with collecting() as registry:

        @step
        async def started(due: datetime) -> datetime:
            return due

        @workflow
        async def delayed(due: datetime) -> None:
            await started(due)

    async with lab.engine(registry):
        due = (await lab.execute("select clock_timestamp() + interval '0.5 s'"))[0][0]
        await lab.enqueue(delayed, {"due": due.isoformat()}, at=due)
        await lab.all_succeeded(1)
    assert 0 <= (await lateness(lab))[0] < 0.7


# -- deadline


async def failed_by_deadline(lab: Lab, run: Any, within: float) -> None:
    failed = await lab.ended(run)
    assert failed.state == "failed"
    assert failed.error["type"] == "outbox.errors.DeadlineExceeded"
    rows = await lab.execute(
        "select extract(epoch from finished_at - deadline_at)::float8 from stepwell.runs where id = %s", [run]
    )
    assert 0 <= rows[0][0] < within


@pytest.mark.parametrize("kind", ["async", "def"])
async def test_a_deadline_ends_a_running_step(lab: Lab, kind: str) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def asynchronous() -> None:
            await gate.passed()

        @step
        def synchronous() -> None:
            gate.passed_in_thread()

        @workflow
        async def late(kind: str) -> None:
            if kind == "async":
                await asynchronous()
            else:
                synchronous()

    async with lab.engine(registry):
        run = await lab.enqueue(late, {"kind": kind}, deadline=timedelta(seconds=0.6))
        await gate.reached()
        await failed_by_deadline(lab, run, 2)
        gate.open()
    assert await lab.history(run) == [("1", 1, "interrupted")]


async def test_a_deadline_ends_a_sleep_and_a_wait_for_a_retry(lab: Lab) -> None:
    with collecting() as registry:

        @step(retry=retrying(stop=stop_after_attempt(9), wait=wait_fixed(3600)))
        async def broken() -> None:
            raise ValueError

        @workflow
        async def sleeping() -> None:
            await sleep(3600)

        @workflow
        async def sleeping_until() -> None:
            await sleep_until(now() + timedelta(hours=1))

        @workflow
        async def retrying_later() -> None:
            await broken()

    async with lab.engine(registry):
        flows = (sleeping, sleeping_until, retrying_later)
        runs = [await lab.enqueue(flow, deadline=timedelta(seconds=0.8)) for flow in flows]
        for run in runs:
            await lab.waits(run)
        for run in runs:
            await failed_by_deadline(lab, run, 2)


async def test_a_deadline_that_passes_before_the_first_claim_executes_nothing(lab: Lab) -> None:
    executed: list[int] = []
    with collecting() as registry:

        @step
        async def work() -> None:
            executed.append(1)

        @workflow
        async def late() -> None:
            await work()

    run = await lab.enqueue(late, deadline=timedelta(seconds=0.05))
    delayed = await lab.enqueue(late, deadline=timedelta(seconds=0.3), delay=timedelta(seconds=0.5))
    await asyncio.sleep(0.06)
    async with lab.engine(registry):
        await failed_by_deadline(lab, run, 10)
        await failed_by_deadline(lab, delayed, 10)
    assert executed == []


@pytest.mark.parametrize("kind", ["thread", "connection"])
async def test_a_deadline_that_passes_while_a_step_waits_for_its_turn_executes_nothing(
    lab: Lab, kind: str
) -> None:
    gate, executed = Gate(), list[str]()
    with collecting() as registry:

        @step
        def in_thread(name: str) -> None:
            executed.append(name)
            gate.passed_in_thread()

        @transaction
        async def on_connection(connection: AsyncConnection[Any], name: str) -> None:
            executed.append(name)
            await gate.passed()

        @workflow
        async def busy(name: str) -> None:
            if kind == "thread":
                in_thread(name)
            else:
                await on_connection(name)

    async with lab.engine(registry, threads=1, connections=1):
        first = await lab.enqueue(busy, {"name": "first"})
        await gate.reached()
        late = await lab.enqueue(busy, {"name": "late"}, deadline=timedelta(seconds=0.3))
        await failed_by_deadline(lab, late, 2)
        gate.open()
        await lab.succeeded(first)
    assert executed == ["first"]
    assert await lab.history(late) == []


async def test_a_deadline_that_is_kept_changes_nothing(lab: Lab) -> None:
    with collecting() as registry:

        @step(timeout=30)
        async def work() -> str:
            return "in time"

        @workflow
        async def timely() -> str:
            await sleep(0.05)
            return await work()

    async with lab.engine(registry):
        assert await lab.succeeded(await lab.enqueue(timely, deadline=timedelta(minutes=1))) == "in time"


async def test_a_timeout_before_the_deadline_is_a_time_out_of_the_step(lab: Lab) -> None:
    with collecting() as registry:

        @step(timeout=0.1)
        async def slow() -> None:
            await asyncio.sleep(60)

        @workflow
        async def timing() -> None:
            await slow()

    async with lab.engine(registry):
        failed = await lab.ended(await lab.enqueue(timing, deadline=timedelta(minutes=1)))
    assert (failed.state, failed.error["type"]) == ("failed", "TimeoutError")
