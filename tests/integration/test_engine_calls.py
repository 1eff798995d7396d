"""Calls side by side, children, signals, cancellations and undo, on engines of the test's own process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from tests.effects import Gate, Ledger
from tests.engines import Lab
from tests.waiting import wait_until_async
from worker import (
    Cancelled,
    call,
    continue_as,
    current_step,
    emit,
    first,
    gather,
    map,
    now,
    set_state,
    sleep,
    start,
    step,
    transaction,
    wait_signal,
    workflow,
)
from worker.definitions import collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


async def drives(lab: Lab, run: Any) -> int:
    """Return how often the run's own task was claimed so far."""
    rows = await lab.execute("select attempt from stepwell.tasks where run_id = %s and kind = 'run'", [run])
    return int(rows[0][0]) if rows else 0


async def test_a_map_costs_one_replay_and_all_workers_take_part(lab: Lab) -> None:
    claims: list[int] = []
    with collecting() as registry:

        @step
        async def square(n: int) -> int:
            await asyncio.sleep(0.001)
            return n * n

        @step
        async def attempts() -> int:
            claims.append(current_step().fence >> 24 & 0xFFFFFF)
            return claims[0]

        @workflow
        async def flow() -> list[int]:
            squares = await map(square, range(300))
            return [sum(squares), await attempts()]

    async with lab.engine(registry, concurrency=20), lab.engine(registry, concurrency=20):
        run = await lab.enqueue(flow)
        assert await lab.succeeded(run) == [sum(n * n for n in range(300)), 2]
    workers = await lab.execute(
        "select count(distinct worker) from stepwell.outbox where run_id = %s and name = 'square'", [run]
    )
    assert workers == [(2,)]


async def test_a_step_with_a_queue_is_executed_by_workers_of_that_queue_only(lab: Lab) -> None:
    with collecting() as registry:

        @step(queue="gpu")
        def train(n: int) -> int:
            return n + 1

        @workflow
        async def flow() -> int:
            return train(1) + sum(await gather(call(train, 2), call(train, 3)))

    async with lab.engine(registry):
        run = await lab.enqueue(flow)

        async def waits_for_the_other() -> bool:
            rows = await lab.execute("select state from stepwell.tasks where kind = 'step' and queue = 'gpu'")
            return rows == [("ready",)] and await lab.status(run) == "waiting"

        await wait_until_async(waits_for_the_other)
        async with lab.engine(registry, queues=["gpu"]):
            assert await lab.succeeded(run) == 2 + 3 + 4


async def test_no_more_than_the_limit_are_executed_at_a_time(lab: Lab) -> None:
    running: set[int] = set()
    most: list[int] = []
    with collecting() as registry:

        @step
        async def item(n: int) -> int:
            running.add(n)
            most.append(len(running))
            await asyncio.sleep(0.005)
            running.discard(n)
            return n

        @workflow
        async def flow() -> list[int]:
            return await map(item, range(40), limit=3)

    async with lab.engine(registry), lab.engine(registry):
        assert await lab.succeeded(await lab.enqueue(flow)) == list(range(40))
    assert max(most) <= 3


@pytest.mark.parametrize("items", [4, 9])
async def test_a_run_that_is_retried_goes_on_in_the_middle_of_its_window(lab: Lab, items: int) -> None:
    gate = Gate()
    done: list[int] = []
    with collecting() as registry:

        @step
        async def item(n: int) -> int:
            if n > 1:
                await gate.passed()
            done.append(n)
            return n

        @workflow
        async def flow() -> list[int]:
            return await map(item, range(items), limit=2)

    async with lab.engine(registry):
        run = await lab.enqueue(flow)
        await gate.reached(2)
        await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
        assert sorted(done) == [0, 1]
        assert await lab.retry(run) == 1
        await gate.reached(4)
        gate.open()
        assert await lab.succeeded(run) == list(range(items))
    assert done.count(0) == done.count(1) == 1


async def test_a_failure_ends_its_join_and_what_has_not_started_is_not_executed(lab: Lab) -> None:
    ledger = Ledger()
    with collecting() as registry:

        @step
        async def fail() -> None:
            raise ValueError("no")

        @step(queue="elsewhere")
        async def never() -> None:
            ledger.note("never")

        @workflow
        async def flow() -> str:
            try:
                await gather(fail(), never())
            except Exception as error:
                return str(error)
            return "?"

    async with lab.engine(registry):
        assert await lab.succeeded(await lab.enqueue(flow)) == "ValueError: no"
        assert await lab.execute("select count(*) from stepwell.tasks") == [(0,)]
    async with lab.engine(registry, queues=["elsewhere"]):
        assert ledger == []


async def recorded(lab: Lab, step: str) -> None:
    """Wait until something is recorded of a step."""

    async def is_recorded() -> bool:
        return bool(await lab.execute("select 1 from stepwell.outbox where name = %s", [step]))

    await wait_until_async(is_recorded, what=f"a record of {step}")


async def test_a_step_is_executed_once_though_others_are_recorded_beside_it(lab: Lab) -> None:
    executed = Ledger()
    slow, tell = Gate(), Gate()
    with collecting() as registry:

        @step
        async def quick() -> str:
            await slow.reached()
            return "quick"

        @step
        async def late() -> None:
            await slow.passed()

        @step
        async def told() -> str:
            executed.note("told")
            await tell.passed()
            return "told"

        @workflow
        async def flow() -> list[Any]:
            return [await first(quick(), late()), await told(), await wait_signal("go")]

    async with lab.engine(registry):
        run = await lab.enqueue(flow)
        await lab.execute("select stepwell.signal(%s, 'go', '7')", [run])
        await tell.reached()
        slow.open()
        await recorded(lab, "late")
        tell.open()
        assert await lab.succeeded(run) == [[0, "quick"], "told", 7]
    assert executed == [("told", 1, "2")]


async def test_how_a_cancellation_cut_a_step_is_recorded_though_others_are_recorded_beside_it(
    lab: Lab,
) -> None:
    executed = Ledger()
    slow, charging = Gate(), Gate()
    with collecting() as registry:

        @step
        async def quick() -> str:
            await slow.reached()
            return "quick"

        @step
        async def late() -> None:
            await slow.passed()

        @step(on_crash="hold")
        async def charge() -> None:
            executed.note("charge")
            try:
                await charging.passed()
            except asyncio.CancelledError:
                await recorded(lab, "late")  # which is cut as well
                raise

        @workflow
        async def flow() -> None:
            await first(quick(), late())
            await charge()

    async with lab.engine(registry):
        run = await lab.enqueue(flow)
        await charging.reached()
        await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
        assert (await lab.history(run))[-1] == ("2", 1, "interrupted")
    assert executed == [("charge", 1, "2")]


@pytest.mark.direct("it is rung for")
async def test_an_async_step_is_interrupted_by_a_cancellation_wherever_it_is_executed(lab: Lab) -> None:
    gates = {name: Gate() for name in "ab"}
    cleaned = Ledger()
    with collecting() as registry:

        @step
        async def stand(name: str) -> None:
            await gates[name].passed()

        @step
        async def clean(name: str) -> None:
            cleaned.note(name)

        @workflow
        async def flow(name: str, *, beside: bool) -> None:
            try:
                if beside:
                    await gather(stand(name), sleep(1000))
                else:
                    await stand(name)
            except Cancelled:
                await clean(name)
                raise

    async with lab.engine(registry, poll_seconds=30.0):
        runs = [await lab.enqueue(flow, {"name": n, "beside": n == "b"}) for n in "ab"]
        for name in "ab":
            await gates[name].reached()
        for run in runs:
            assert await lab.cancel(run)
        for run in runs:
            assert (await lab.ended(run, 5.0)).state == "cancelled"
    assert sorted(cleaned.names) == ["a", "b"]
    assert await lab.execute("select count(*) from stepwell.tasks") == [(0,)]


async def test_cancelling_a_run_cancels_its_children_unless_they_are_detached(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def child() -> str:
            return str(await wait_signal("go"))

        @workflow
        async def parent() -> None:
            start(child, detached=True)
            await gather(child(), child())

    async with lab.engine(registry):
        run = await lab.enqueue(parent)

        async def all_wait() -> bool:
            return await lab.execute("select count(*) from stepwell.tasks where state = 'waiting'") == [(4,)]

        await wait_until_async(all_wait)
        await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"

        async def one_is_left() -> bool:
            rows = await lab.execute(
                "select state, count(*) from stepwell.runs group by state order by state"
            )
            return rows == [("cancelled", 3), ("open", 1)]

        await wait_until_async(one_is_left)


async def test_a_retried_parent_retries_the_child_that_failed(lab: Lab) -> None:
    broken = [True]
    with collecting() as registry:

        @step
        async def fragile() -> str:
            if broken:
                raise ConnectionError("down")
            return "up"

        @workflow
        async def child() -> str:
            return await fragile()

        @workflow
        async def parent() -> str:
            return await child()

    async with lab.engine(registry):
        run = await lab.enqueue(parent)
        ended = await lab.ended(run)
        assert ended.state == "failed"
        assert ended.error["type"] == "outbox.errors.RunFailed"
        broken.clear()
        assert await lab.retry(run) == 1
        assert await lab.succeeded(run) == "up"
    assert await lab.execute("select count(*) from stepwell.runs") == [(2,)]


async def test_a_run_that_starts_anew_keeps_its_id_and_forgets_its_history(lab: Lab) -> None:
    keys: list[str] = []
    with collecting() as registry:

        @step
        async def count(n: int) -> int:
            keys.append(current_step().idempotency_key)
            return n + 1

        @workflow
        async def forever(n: int) -> int:
            n = await count(n)
            emit("rounds", n)
            if n < 4:
                continue_as(n)
            return n

    async with lab.engine(registry):
        run = await lab.enqueue(forever, {"n": 0})
        assert await lab.succeeded(run) == 4
    assert keys == [f"{run}:1", f"{run}:1:1", f"{run}:1:2", f"{run}:1:3"]
    assert await lab.execute("select epoch, base_epoch, input::text from stepwell.runs") == [
        (3, 3, '{"n":3}')
    ]
    assert await lab.execute("select value::text from stepwell.stream order by epoch, n") == [
        ("1",),
        ("2",),
        ("3",),
        ("4",),
    ]


async def test_time_goes_on_when_a_run_starts_anew(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def rounds(before: list[datetime]) -> list[datetime]:
            before = [*before, now()]
            if len(before) < 3:
                await sleep(0.05)
                continue_as(before)
            return before

    async with lab.engine(registry):
        seen = await lab.succeeded(await lab.enqueue(rounds, {"before": []}))
    assert len(set(seen)) == 3
    assert seen == sorted(seen)


async def test_nothing_can_be_shown_and_emitted_as_well(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def flow() -> None:
            set_state("result", None)
            emit("results", None)

    async with lab.engine(registry):
        await lab.succeeded(await lab.enqueue(flow))
    assert await lab.execute(
        "select s.value::text, e.value::text from stepwell.state s, stepwell.stream e"
    ) == [("null", "null")]


async def test_what_a_body_shows_is_written_once_however_often_it_is_replayed(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def flow() -> None:
            for n in range(3):
                set_state("round", n)
                emit("rounds", n)
                await sleep(0.01)

    async with lab.engine(registry):
        run = await lab.enqueue(flow)
        await lab.succeeded(run)
    assert await lab.execute("select key, value::text from stepwell.state") == [("round", "2")]
    assert await lab.execute("select n, value::text from stepwell.stream order by n") == [
        (1, "0"),
        (2, "1"),
        (3, "2"),
    ]


async def test_signals_are_taken_once_in_their_order_and_a_late_one_is_kept(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def flow() -> list[Any]:
            taken = [await wait_signal("go", type=int) for _ in range(3)]
            late = await first(wait_signal("stop"), sleep(0.05))
            return [*taken, late.index]

    run = await lab.enqueue(flow)
    for n in range(4):
        await lab.execute("select stepwell.signal(%s, 'go', %s::json)", [run, json.dumps(n)])
    async with lab.engine(registry):
        assert await lab.succeeded(run) == [0, 1, 2, 1]
    assert await lab.execute("select payload::text from stepwell.signals") == [("3",)]


async def test_an_undo_that_failed_is_tried_again_by_a_retry_and_nothing_else_is(lab: Lab) -> None:
    broken = [True]
    done = Ledger()
    with collecting() as registry:

        @step
        async def refund(n: int) -> None:
            if broken and n == 1:
                raise ConnectionError("down")
            done.note(f"refund {n}")

        @step(undo=refund)
        async def charge(n: int) -> None:
            done.note(f"charge {n}")

        @workflow
        async def flow() -> None:
            await charge(1)
            await charge(2)
            raise ValueError("no")

    async with lab.engine(registry):
        run = await lab.enqueue(flow)
        blocked = await lab.ended(run)
        assert (blocked.state, blocked.error["reason"]) == ("blocked", "an undo failed")
        broken.clear()
        assert await lab.retry(run) == 1
        ended = await lab.ended(run)
        assert (ended.state, ended.error["message"]) == ("failed", "no")
    assert [name for name, _, _ in done] == ["charge 1", "charge 2", "refund 2", "refund 1"]


@pytest.mark.parametrize("reason", ["fails", "is cancelled", "runs out of time"])
async def test_however_a_run_goes_wrong_its_transactional_undo_happens_once(lab: Lab, reason: str) -> None:
    await lab.execute("create table booked (n int, what text)")
    with collecting() as registry:

        @transaction
        def unbook(connection: psycopg.Connection, n: int, result: str) -> None:
            connection.execute("insert into booked values (%s, %s)", (n, f"not {result}"))

        @transaction(undo=unbook)
        def book(connection: psycopg.Connection, n: int) -> str:
            connection.execute("insert into booked values (%s, %s)", (n, "booked"))
            return f"b{n}"

        @workflow
        async def flow() -> None:
            book(1)
            await gather(call(book, 2), call(book, 3))
            if reason == "fails":
                raise ValueError("no")
            await sleep(1000)

    async with lab.engine(registry), lab.engine(registry):
        options = {"deadline": "1 second"} if reason == "runs out of time" else {}
        run = await lab.enqueue(flow, **options)
        if reason == "is cancelled":
            await lab.waits(run)
            await lab.cancel(run)
        ended = await lab.ended(run)
        assert ended.state == ("cancelled" if reason == "is cancelled" else "failed")
    rows = await lab.execute("select n, what from booked order by n, what")
    assert rows == [(1, "booked"), (1, "not b1"), (2, "booked"), (2, "not b2"), (3, "booked"), (3, "not b3")]


@pytest.mark.parametrize("cancelled", [False, True], ids=["in peace", "though it is cancelled meanwhile"])
async def test_what_completed_while_its_run_was_failing_is_undone_in_the_queue_of_its_undo(
    lab: Lab, cancelled: bool
) -> None:
    charging, refunding = Gate(), Gate()
    done = Ledger()
    with collecting() as registry:

        @step(queue="elsewhere")
        async def refund() -> None:
            done.note("refund")
            await refunding.passed()

        @step(undo=refund)
        async def charge() -> None:
            await charging.passed()
            done.note("charge")

        @step
        async def fail() -> None:
            await charging.reached()
            raise ValueError("no")

        @workflow
        async def flow() -> None:
            await gather(fail(), charge())

    async with lab.engine(registry, queues=["default", "elsewhere"]):
        run = await lab.enqueue(flow)
        await recorded(lab, "fail")
        await lab.waits(run)
        charging.open()
        await refunding.reached()
        if cancelled:
            await lab.cancel(run)
            await lab.waits(run)
        refunding.open()
        assert (await lab.ended(run)).state == "failed"
        assert await lab.execute("select count(*) from stepwell.tasks") == [(0,)]
    assert [name for name, _, _ in done] == ["charge", "refund"]


@pytest.mark.parametrize("reason", ["a second cancellation", "the deadline"])
async def test_steps_that_clean_up_side_by_side_are_not_cut_short(lab: Lab, reason: str) -> None:
    gate = Gate()
    cleaned = Ledger()
    with collecting() as registry:

        @step
        async def clean(name: str) -> None:
            await gate.passed()
            cleaned.note(name)

        @workflow
        async def flow() -> None:
            try:
                await sleep(1000)
            except Cancelled:
                await gather(clean("a"), clean("b"))

    async with lab.engine(registry), lab.engine(registry):
        run = await lab.enqueue(flow, **({"deadline": "1 second"} if reason == "the deadline" else {}))
        await lab.waits(run)
        if reason != "the deadline":
            await lab.cancel(run)
        await gate.reached(2)
        if reason != "the deadline":
            await lab.cancel(run)
            await wait_until_async(lambda: _no_wakes(lab), what="the second cancellation to be applied")
        gate.open()
        assert (await lab.ended(run)).state == ("failed" if reason == "the deadline" else "cancelled")
    assert sorted(cleaned.names) == ["a", "b"]


async def _no_wakes(lab: Lab) -> bool:
    return await lab.execute("select count(*) from stepwell.tasks where kind = 'wake'") == [(0,)]
