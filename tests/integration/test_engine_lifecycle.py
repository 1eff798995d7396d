"""One engine from its registration to its end: drain, stop, and the database's word that it is dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.effects import Gate, two_steps
from tests.engines import Lab, counted, keep_house_often
from tests.waiting import wait_until_async
from worker import step, workflow
from worker.definitions import collecting
from worker.engine.claims import DeclaredDead


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


# -- drain


async def test_a_drain_lets_executions_end_and_gives_their_runs_back(lab: Lab) -> None:
    gate, executed = Gate(), list[str]()
    registry, two = two_steps(gate, executed)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(two)
        await gate.reached()
        engine.engine.drain()
        late = await lab.enqueue(two)
        assert not engine.task.done()
        gate.open()
        await engine.ended()
        assert executed == ["first"]
        assert await lab.history(run) == [("1", 0, "completed")]
        task = await lab.task(run)
        assert task is not None
        assert (task.state, task.interruptions) == ("ready", 0)
        assert await lab.history(late) == []
        assert not await lab.is_registered(engine.id)
        await lab.disconnected(engine.id)
    async with lab.engine(registry):
        assert await lab.succeeded(run) == "done"
        assert await lab.succeeded(late) == "done"
    assert sorted(executed) == ["first", "first", "second", "second"]
    assert (await lab.history(run)) == [("1", 0, "completed"), ("2", 0, "completed")]


async def test_an_idle_engine_drains_at_once_and_waking_it_twice_is_harmless(lab: Lab) -> None:
    registry, _ = two_steps(Gate(), [])
    async with lab.engine(registry) as engine:
        engine.engine.drain()
        engine.engine.drain()
        await engine.ended(5)
        assert not await lab.is_registered(engine.id)
        assert not engine.engine.vitals().claiming
        engine.engine.stop()


async def test_an_async_execution_that_outlasts_the_grace_time_is_interrupted_and_released(lab: Lab) -> None:
    gate, executed = Gate(), list[str]()
    registry, two = two_steps(gate, executed)
    async with lab.engine(registry, grace_seconds=0.2) as engine:
        run = await lab.enqueue(two)
        await gate.reached()
        await engine.drain()
        assert await lab.history(run) == [("1", 1, "interrupted")]
        assert not await lab.is_registered(engine.id)
        task = await lab.task(run)
        assert task is not None
        assert (task.state, task.claimed_by) == ("ready", None)
    gate.open()
    async with lab.engine(registry):
        assert await lab.succeeded(run) == "done"
    assert executed == ["first", "first", "second"]


async def test_a_def_execution_that_outlasts_the_grace_time_is_abandoned_interrupted_and_released(
    lab: Lab,
) -> None:
    gate, executed = Gate(), list[str]()
    with collecting() as registry:

        @step
        def slow() -> str:
            executed.append("slow")
            gate.passed_in_thread()
            return f"answer {len(executed)}"

        @workflow
        def slowly() -> str:
            return slow()

    async with lab.engine(registry, grace_seconds=0.2) as engine:
        run = await lab.enqueue(slowly)
        await gate.reached()
        await engine.drain()
        assert await lab.history(run) == [("1", 1, "interrupted")]
        assert not await lab.is_registered(engine.id)
    gate.open()
    async with lab.engine(registry):
        assert await lab.succeeded(run) == "answer 2"


async def test_a_held_step_that_a_drain_cuts_short_waits_for_a_person(lab: Lab) -> None:
    gate = Gate()
    with collecting() as registry:

        @step(on_crash="hold")
        async def pay() -> None:
            await gate.passed()

        @workflow
        async def paying() -> None:
            await pay()

    async with lab.engine(registry, grace_seconds=0.2) as engine:
        run = await lab.enqueue(paying)
        await gate.reached()
        await engine.drain()
    async with lab.engine(registry):
        assert (await lab.ended(run)).error["type"] == "Held"


async def test_a_drain_ends_although_a_step_refuses_to_be_cancelled(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever swallows a cancellation for ever must not hold the process."""
    monkeypatch.setattr("worker.engine.engine.CUT_SECONDS", 0.2)
    gate = Gate()
    with collecting() as registry:

        @step
        async def stubborn() -> None:
            while True:
                try:
                    await gate.passed()
                    return
                except asyncio.CancelledError:
                    pass

        @workflow
        async def refusing() -> None:
            await stubborn()

    async with lab.engine(registry, grace_seconds=0.1) as engine:
        run = await lab.enqueue(refusing)
        await gate.reached()
        engine.engine.drain()
        try:
            await engine.ended(15)
        finally:
            gate.open()
        assert await lab.is_registered(engine.id)  # it still holds the claim: for an obituary
        task = await lab.task(run)
        assert task is not None
        assert task.claimed_by == engine.id


async def test_a_drain_waits_for_the_database(lab: Lab) -> None:
    """What was executed is written before the engine leaves."""
    gate, executed = Gate(), list[str]()
    registry, two = two_steps(gate, executed)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(two)
        await gate.reached()
        async with _locked(lab, run):
            gate.open()
            engine.engine.drain()
            await wait_until_async(lambda: engine.engine.vitals().pending == 1)
            await _turns()
            assert not engine.task.done()
        await engine.ended()
        assert await lab.history(run) == [("1", 0, "completed")]


# -- stop


async def test_a_stop_ends_at_once_and_nothing_is_lost(lab: Lab) -> None:
    gate, executed = Gate(), list[str]()
    registry, two = two_steps(gate, executed)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(two)
        await gate.reached()
        engine.engine.stop()
        await engine.ended(5)
        gate.open()
        if await lab.is_registered(engine.id):
            await lab.reclaim(engine.id)
    async with lab.engine(registry):
        assert await lab.succeeded(run) == "done"
    assert ("1", 1, "interrupted") in await lab.history(run)


async def test_a_stop_ends_a_drain_that_takes_too_long(lab: Lab) -> None:
    gate, executed = Gate(), list[str]()
    registry, two = two_steps(gate, executed)
    async with lab.engine(registry, grace_seconds=60) as engine:
        await lab.enqueue(two)
        await gate.reached()
        engine.engine.drain()
        await _turns()
        assert not engine.task.done()
        engine.engine.stop()
        await engine.ended(5)


async def test_a_stop_ends_at_once_although_the_step_cleans_up_slowly(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.engine.CUT_SECONDS", 0.2)
    gate, cleaning = Gate(), asyncio.Event()
    with collecting() as registry:

        @step
        async def untidy() -> None:
            try:
                await gate.passed()
            finally:
                cleaning.set()
                await asyncio.sleep(600)

        @workflow
        async def tidying() -> None:
            await untidy()

    async with lab.engine(registry) as engine:
        await lab.enqueue(tidying)
        await gate.reached()
        engine.engine.stop()
        await engine.ended(10)
        assert cleaning.is_set()


# -- declared dead


async def test_an_engine_that_was_buried_ends_with_declared_dead(lab: Lab) -> None:
    registry, _ = two_steps(Gate(), [])
    async with lab.engine(registry, poll_seconds=0.1) as engine:
        await lab.execute("select stepwell.bury_v1(%s)", [engine.id])
        with pytest.raises(DeclaredDead):
            await engine.ended(10)
        await lab.disconnected(engine.id)


@pytest.mark.parametrize("synchronous", [False, True])
async def test_an_engine_that_was_buried_ends_with_declared_dead_while_it_executes(
    lab: Lab, synchronous: bool
) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def waiting() -> None:
            await gate.passed()

        @step
        def waiting_in_thread() -> None:
            gate.passed_in_thread()

        @workflow
        async def stuck(synchronous: bool) -> None:
            if synchronous:
                waiting_in_thread()
            else:
                await waiting()

    async with lab.engine(registry, poll_seconds=0.1) as engine:
        await lab.enqueue(stuck, {"synchronous": synchronous})
        await gate.reached()
        await lab.execute("select stepwell.bury_v1(%s)", [engine.id])
        try:
            with pytest.raises(DeclaredDead):
                await engine.ended(10)
        finally:
            gate.open()


async def test_late_writes_of_a_buried_engine_are_refused_and_counted(lab: Lab) -> None:
    gate, executed = Gate(), list[str]()
    registry, two = two_steps(gate, executed)
    fenced = counted("stepwell_fenced_writes_total")
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(two)
        await gate.reached()
        # As after a freeze: somebody else has taken over, and this engine has not noticed yet.
        await engine.engine._claimant._lock.acquire()
        await lab.reclaim(engine.id)
        async with lab.engine(registry):
            await gate.reached(2)
            gate.open()
            assert await lab.succeeded(run) == "done"
        await wait_until_async(lambda: counted("stepwell_fenced_writes_total") > fenced)
        assert executed == ["first", "first", "second"]  # the stale one goes no further
        engine.engine._claimant._lock.release()
        with pytest.raises(DeclaredDead):
            await engine.ended(10)
    assert await lab.history(run) == [("1", 1, "interrupted"), ("1", 0, "completed"), ("2", 0, "completed")]


async def test_a_write_that_was_fenced_ends_the_local_execution_only(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim can be lost without the worker being dead: the engine goes on with everything else."""
    keep_house_often(monkeypatch)
    gate, executed = Gate(), list[str]()
    registry, two = two_steps(gate, executed)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(two)
        await gate.reached()
        await lab.execute("update stepwell.tasks set attempt = attempt + 1 where run_id = %s", [run])
        gate.open()
        other = await lab.enqueue(two)
        assert await lab.succeeded(other) == "done"
        assert await lab.history(run) == []
        # What the engine does not know that it holds, its audit gives back.
        assert await lab.succeeded(run) == "done"
        await engine.drain()


# -- small helpers


async def _turns() -> None:
    """Let everything that is ready run."""
    for _ in range(20):
        await asyncio.sleep(0.005)


class _locked:
    """Hold the row lock of a run's task, so that flushes wait."""

    def __init__(self, lab: Lab, run: object) -> None:
        self._other, self._run = Lab(lab.url), run

    async def __aenter__(self) -> None:
        await self._other.execute("begin")
        await self._other.execute("select from stepwell.tasks where run_id = %s for update", [self._run])

    async def __aexit__(self, *_: object) -> None:
        await self._other.execute("rollback")
        await self._other.__aexit__()
