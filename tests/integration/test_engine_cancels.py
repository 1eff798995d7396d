"""Cancellations: what becomes of a run that somebody ends, of the step that it is at, and of its body."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from tenacity import stop_after_attempt, wait_none

from tests.effects import Gate
from tests.engines import Lab, Running, until
from worker import Cancelled, continue_as, current_step, retrying, sleep, step, wait_signal, workflow
from worker.definitions import Registry, Workflow, collecting
from worker.engine.transitions import Writing


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


async def told(lab: Lab, run: UUID) -> None:
    """Wait until the database says that the run is to be cancelled."""

    async def cancelling() -> bool:
        rows = await lab.execute(
            "select cancelling from stepwell.tasks where run_id = %s and kind = 'run'", [run]
        )
        return bool(rows and rows[0][0])

    await until(cancelling)


async def applied(lab: Lab) -> bool:
    """Tell whether every cancellation has reached its run."""
    return await lab.execute("select count(*) from stepwell.tasks where kind = 'wake'") == [(0,)]


async def recorded(lab: Lab, run: UUID) -> list[tuple[str, list[int], int, str]]:
    """Return (kind, path, n, outcome) of everything in the history, in order."""
    return await lab.execute(
        "select kind, path, n, outcome from stepwell.outbox where run_id = %s order by seq", [run]
    )


def cancelling(writing: Writing) -> bool:
    """Tell whether a writing records a cancellation."""
    return any(record.kind == "cancel" for record in writing.records)


def cancellable(gate: Gate, executed: list[int]) -> tuple[Registry, Workflow[..., Any]]:
    with collecting() as registry:

        @step
        async def work(n: int) -> None:
            executed.append(n)
            await gate.passed()

        @workflow
        async def working(nap: float = 0) -> None:
            if nap:
                await sleep(nap)
            await work(1)
            await work(2)

    return registry, working


async def test_a_pending_run_is_cancelled_at_once(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    registry, working = cancellable(gate, executed)
    async with lab.engine(registry):
        run = await lab.enqueue(working, delay=timedelta(hours=1))
        assert await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
        assert not await lab.cancel(run)
        assert await lab.execute("select count(*) from stepwell.tasks") == [(0,)]
    assert executed == []


async def test_a_sleeping_run_is_cancelled_at_once(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    registry, working = cancellable(gate, executed)
    async with lab.engine(registry):
        run = await lab.enqueue(working, {"nap": 3600})
        await lab.waits(run)
        started = time.monotonic()
        await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
        assert time.monotonic() - started < 5
    assert executed == []


async def test_an_async_step_ends_at_once_when_its_run_is_cancelled(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    registry, working = cancellable(gate, executed)
    async with lab.engine(registry):
        run = await lab.enqueue(working)
        await gate.reached()
        assert await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
    assert executed == [1]
    assert await recorded(lab, run) == [
        ("step", [1], 1, "interrupted"),
        ("cancel", [], 2, "cancelled"),
        ("run", [], 0, "cancelled"),
    ]
    assert await lab.totals("run") == {"cancelled": 1}


async def test_a_def_step_runs_to_its_end_when_its_run_is_cancelled(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    with collecting() as registry:

        @step
        def work(n: int) -> None:
            executed.append(n)
            gate.passed_in_thread()

        @workflow
        def working() -> None:
            work(1)
            work(2)

    async with lab.engine(registry):
        run = await lab.enqueue(working)
        await gate.reached()
        assert await lab.cancel(run)
        await told(lab, run)
        assert (await lab.run(run)).state == "open"
        gate.open()
        assert (await lab.ended(run)).state == "cancelled"
    assert executed == [1]
    assert await recorded(lab, run) == [
        ("step", [1], 0, "completed"),
        ("cancel", [], 2, "cancelled"),
        ("run", [], 0, "cancelled"),
    ]


# -- the body cleans up ------------------------------------------------------------------------------


def tidying(gate: Gate, executed: list[str]) -> tuple[Registry, Workflow[..., Any]]:
    """Return a workflow that stands at a gate, and releases what it has reserved when it is cancelled."""
    with collecting() as registry:

        @step
        async def work(name: str) -> str:
            executed.append(name)
            if name == "hold":
                await gate.passed()
            return name

        @workflow
        async def reserve(nap: float = 0) -> str:
            try:
                if nap:
                    await sleep(nap)
                await work("hold")
            except Cancelled:
                await work("release")
                await sleep(0.05)
                await work("tell")
                raise
            return "kept"

    return registry, reserve


@pytest.mark.parametrize("nap", [0, 3600])
async def test_the_body_of_a_cancelled_run_cleans_up_with_steps_and_sleeps(lab: Lab, nap: float) -> None:
    gate, executed = Gate(), list[str]()
    registry, reserve = tidying(gate, executed)
    async with lab.engine(registry):
        run = await lab.enqueue(reserve, {"nap": nap})
        if nap:
            await lab.waits(run)
        else:
            await gate.reached()
        assert await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
    assert executed == ([] if nap else ["hold"]) + ["release", "tell"]
    kinds = [kind for kind, *_ in await recorded(lab, run)]
    assert kinds == ([] if nap else ["step"]) + ["cancel", "step", "sleep", "step", "run"]


async def test_a_run_cannot_stay_alive_by_catching_its_cancellation(lab: Lab) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def work() -> None:
            await gate.passed()

        @workflow
        async def stubborn() -> str:
            try:
                await work()
            except Cancelled:
                pass
            return "done"

    async with lab.engine(registry):
        run = await lab.enqueue(stubborn)
        await gate.reached()
        assert await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"


async def test_a_worker_that_dies_while_a_body_cleans_up_is_followed_by_another_that_goes_on(
    lab: Lab,
) -> None:
    gate, executed = Gate(), list[str]()
    registry, reserve = tidying(gate, executed)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(reserve)
        await gate.reached()
        lost = engine.lose_writes(lambda writing: any(r.path == (2,) for r in writing.records))
        await lab.cancel(run)
        await lost.wait()
        await engine.crash()
    async with lab.engine(registry):
        assert (await lab.ended(run)).state == "cancelled"
    assert executed == ["hold", "release", "release", "tell"]
    assert [r for r in await recorded(lab, run) if r[0] == "cancel"] == [("cancel", [], 2, "cancelled")]
    assert await lab.history(run) == [
        ("1", 1, "interrupted"),
        ("2", 1, "interrupted"),
        ("2", 0, "completed"),
        ("3", 0, "completed"),
        ("4", 0, "completed"),
    ]


async def crashed_before_the_cancellation_was_recorded(lab: Lab, engine: Running, run: UUID) -> None:
    lost = engine.lose_writes(cancelling)
    await lab.cancel(run)
    await lost.wait()
    await engine.crash()


async def test_the_step_at_which_a_worker_died_is_interrupted_and_not_the_one_that_cleans_up(
    lab: Lab,
) -> None:
    gate, executed = Gate(), list[str]()
    registry, reserve = tidying(gate, executed)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(reserve)
        await gate.reached()
        await crashed_before_the_cancellation_was_recorded(lab, engine, run)
    async with lab.engine(registry):
        assert (await lab.ended(run)).state == "cancelled"
    assert executed == ["hold", "release", "tell"]
    assert [each[:2] for each in await lab.history(run)] == [("1", 1), ("2", 0), ("3", 0), ("4", 0)]


# -- when, and by whom -------------------------------------------------------------------------------


async def test_a_run_is_cancelled_although_every_slot_is_taken(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    registry, working = cancellable(gate, executed)
    async with lab.engine(registry, concurrency=1):
        await lab.enqueue(working)
        await gate.reached()
        waiting = await lab.enqueue(working)
        await lab.cancel(waiting)
        assert (await lab.ended(waiting)).state == "cancelled"
        gate.open()


async def test_a_cancellation_survives_the_worker_that_was_told(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    registry, working = cancellable(gate, executed)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(working)
        await gate.reached()
        await crashed_before_the_cancellation_was_recorded(lab, engine, run)
        await told(lab, run)
    gate.open()
    async with lab.engine(registry):
        assert (await lab.ended(run)).state == "cancelled"
    assert executed == [1]


async def test_a_cancelled_run_can_be_retried_and_goes_on_where_it_was(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    registry, working = cancellable(gate, executed)
    async with lab.engine(registry):
        run = await lab.enqueue(working)
        await gate.reached()
        await lab.cancel(run)
        await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
        gate.open()
        assert await lab.retry(run) == 1
        assert (await lab.ended(run)).state == "succeeded"
    assert executed == [1, 1, 2]


async def test_a_cancellation_of_a_run_that_has_ended_changes_nothing(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    registry, working = cancellable(gate, executed)
    async with lab.engine(registry):
        run = await lab.enqueue(working)
        await gate.reached()
        other = Lab(lab.url)
        await other.execute("begin")
        await other.cancel(run)  # asked while it runs, committed when it has ended
        gate.open()
        await lab.succeeded(run)
        await other.execute("commit")
        await other.__aexit__()

        await until(lambda: applied(lab))
        assert (await lab.run(run)).state == "succeeded"


async def test_a_run_that_starts_anew_before_its_cancellation_comes_is_cancelled(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def rounds(n: int) -> None:
            await wait_signal("on")
            continue_as(n + 1)

    async with lab.engine(registry):
        run = await lab.enqueue(rounds, {"n": 0})
        await lab.waits(run)
        other = Lab(lab.url)
        await other.execute("begin")
        await other.cancel(run)  # asked in the first round, committed in the third
        for _ in range(2):
            await lab.execute("select stepwell.signal(%s, 'on')", [run])

        async def third() -> bool:
            return await lab.execute("select epoch from stepwell.runs") == [(2,)]

        await until(third)
        await lab.waits(run)
        await other.execute("commit")
        await other.__aexit__()
        assert (await lab.ended(run)).state == "cancelled"


# -- while what was done is being undone


def undone_after_a_failure(
    gate: Gate, executed: list[int], *, queue: str | None = None, failing: int = 0
) -> tuple[Registry, Workflow[..., Any]]:
    """Return a workflow that fails, and whose undo stands at the gate. Its executions up to `failing` fail behind it."""
    with collecting() as registry:

        @step(queue=queue, retry=retrying(stop=stop_after_attempt(5), wait=wait_none()))
        async def refund() -> None:
            execution = current_step().execution
            executed.append(execution)
            await gate.passed()
            if execution <= failing:
                raise ConnectionError("down")

        @step(undo=refund)
        async def charge() -> None:
            pass

        @workflow
        async def charging() -> None:
            await charge()
            raise ValueError("no")

    return registry, charging


@pytest.mark.parametrize("queue", [None, "elsewhere"])
@pytest.mark.parametrize("reason", ["a cancellation", "the deadline"])
async def test_an_undo_is_not_cut_short(lab: Lab, reason: str, queue: str | None) -> None:
    gate, executed = Gate(), list[int]()
    registry, charging = undone_after_a_failure(gate, executed, queue=queue)
    async with lab.engine(registry, queues=["default", "elsewhere"]):
        options = {"deadline": timedelta(seconds=1)} if reason == "the deadline" else {}
        run = await lab.enqueue(charging, **options)
        await gate.reached()
        if reason == "the deadline":
            await until(lambda: passed(lab, run))
        else:
            await lab.cancel(run)
            await until(lambda: applied(lab))
        gate.open()
        assert (await lab.ended(run)).state == "failed"
    assert executed == [1]


async def passed(lab: Lab, run: UUID) -> bool:
    """Tell whether the run's deadline has passed, and whoever keeps it has had the time to notice."""
    late = "select deadline_at + interval '0.3 seconds' < clock_timestamp() from stepwell.runs where id = %s"
    return bool((await lab.execute(late, [run]))[0][0])


async def test_an_undo_in_which_a_worker_died_goes_on_when_the_run_is_cancelled(lab: Lab) -> None:
    gate, executed = Gate(), list[int]()
    registry, charging = undone_after_a_failure(gate, executed, failing=2)
    async with lab.engine(registry) as dying:
        run = await lab.enqueue(charging)
        await gate.reached()
        await dying.crash()
    await lab.cancel(run)
    gate.open()
    async with lab.engine(registry):
        assert (await lab.ended(run)).state == "failed"
    assert executed == [1, 2, 3]
    assert await lab.history(run) == [
        ("1", 0, "completed"),
        ("1.0", 1, "interrupted"),
        ("1.0", 2, "failed"),
        ("1.0", 0, "completed"),
    ]


async def test_an_undo_that_is_retried_goes_on_though_the_deadline_has_passed(lab: Lab) -> None:
    executed: list[int] = []
    with collecting() as registry:

        @step
        async def refund() -> None:
            executed.append(current_step().execution)
            if executed == [1]:
                raise ConnectionError("down")

        @step(undo=refund)
        async def charge() -> None:
            pass

        @workflow
        async def charging() -> None:
            await charge()
            raise ValueError("no")

    async with lab.engine(registry):
        run = await lab.enqueue(charging, deadline=timedelta(seconds=1))
        assert (await lab.ended(run)).state == "blocked"
    assert await lab.retry(run) == 1
    await until(lambda: passed(lab, run))
    async with lab.engine(registry):
        assert (await lab.ended(run)).state == "failed"
    assert executed == [1, 2]
