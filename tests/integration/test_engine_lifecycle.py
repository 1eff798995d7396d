"""One engine from its registration to its end: drain, stop, and the database's word that it is dead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from outbox.settings import Settings
from tests.engines import Gate, Lab, counted, until
from tests.waiting import wait_until_async
from worker import step, workflow
from worker.claims import DeclaredDead
from worker.definitions import Registry, Workflow, collecting
from worker.engine import Engine


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


def two_steps(gate: Gate, executed: list[str]) -> tuple[Registry, Workflow[..., Any]]:
    """Return a workflow whose async first step stands at the gate."""
    with collecting() as registry:

        @step
        async def first() -> None:
            executed.append("first")
            await gate.passed()

        @step
        async def second() -> str:
            executed.append("second")
            return "done"

        @workflow
        async def two() -> str:
            await first()
            return await second()

    return registry, two


def keep_house_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have strays, unknown names and suspects noticed in a moment instead of in seconds."""
    monkeypatch.setattr("worker.caretaker.HOUSEKEEPING_SECONDS", 0.1)
    monkeypatch.setattr("worker.caretaker.TICK_SECONDS", 0.1)


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


async def test_a_drain_ends_although_a_step_refuses_to_be_cancelled(lab: Lab) -> None:
    """Whoever swallows a cancellation for ever must not hold the process."""
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


async def test_a_stop_ends_at_once_although_the_step_cleans_up_slowly(lab: Lab) -> None:
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
    async with lab.engine(registry) as engine:
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

    async with lab.engine(registry) as engine:
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


# -- claiming


async def test_a_claim_whose_answer_was_lost_is_given_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_house_often(monkeypatch)
    gate, executed = Gate(), list[str]()
    gate.open()
    registry, two = two_steps(gate, executed)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(two, delay="1 hour")
        await lab.execute(
            "update stepwell.tasks set state = 'claimed', claimed_by = %s, due_at = null, attempt = 1"
            " where run_id = %s",
            [engine.id, run],
        )
        assert await lab.succeeded(run) == "done"
    assert executed == ["first", "second"]


async def test_never_more_runs_are_in_flight_than_there_are_slots(lab: Lab) -> None:
    flying: list[int] = [0]
    highest: list[int] = []
    with collecting() as registry:

        @step
        async def fly() -> None:
            flying[0] += 1
            highest.append(flying[0])
            await asyncio.sleep(0.001)
            flying[0] -= 1

        @workflow
        async def flight() -> None:
            await fly()
            await fly()

    await lab.enqueue_many(flight, [{}] * 2000)
    most_claimed = 0
    async with lab.engine(registry, concurrency=50) as engine:
        while (await lab.states()).get("open"):
            claimed = await lab.execute("select count(*) from stepwell.tasks where state = 'claimed'")
            most_claimed = max(most_claimed, claimed[0][0])
            assert engine.engine.vitals().in_flight <= 50
    assert await lab.states() == {"succeeded": 2000}
    assert most_claimed <= 50
    assert 10 < max(highest) <= 50
    assert len(highest) == 4000
    assert await lab.totals("step") == {"completed": 4000}
    assert await lab.totals("run") == {"succeeded": 2000}


async def test_queues_are_served_apart_and_all_of_them(lab: Lab) -> None:
    gate, executed = Gate(), list[str]()
    gate.open()
    registry, two = two_steps(gate, executed)
    async with lab.engine(registry, queues=("a", "b")):
        runs = [await lab.enqueue(two, queue=queue) for queue in ("a", "b", "a", "b")]
        elsewhere = await lab.enqueue(two, queue="c")
        for run in runs:
            await lab.succeeded(run)
        assert await lab.status(elsewhere) == "pending"


async def test_a_ring_is_not_lost_between_the_claims_of_two_queues(database_url: str) -> None:
    engine = Engine(Registry(), Settings(), url=database_url, worker_id=1, queues=("a", "b"))

    async def claim(queue: str, known: list[str], at_most: int, *, alone: bool = False) -> list[Any]:
        if queue == "a":
            engine._rung()  # somebody enqueues to the queue that was just looked at
        return []

    engine._claimant.claim = claim  # type: ignore[method-assign]
    await engine.run_once()
    assert engine._changed.is_set()


async def test_unknown_workflows_are_neither_claimed_nor_in_the_way(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    gate, executed = Gate(), list[str]()
    gate.open()
    registry, two = two_steps(gate, executed)
    with collecting() as other:

        @workflow
        def unheard_of() -> str:
            return "heard"

    await lab.execute(
        "select id from stepwell.enqueue_many('unheard_of', array_fill('{}'::json, array[3000]), priority => 0)"
    )
    started = time.monotonic()
    async with lab.engine(registry):
        assert await lab.succeeded(await lab.enqueue(two)) == "done"
        assert time.monotonic() - started < 5

        async def shelved() -> bool:
            rows = await lab.execute(
                "select count(*) from stepwell.tasks where state = 'shelved' and attempt = 0"
            )
            return bool(rows == [(3000,)])

        await until(shelved)
        async with lab.engine(other):
            await lab.all_succeeded(3001)


# -- suspects and poison


def poisonous(gate: Gate, executed: list[tuple[str, int]]) -> tuple[Registry, Workflow[..., Any]]:
    """Return a workflow that counts who runs beside it."""
    flying = [0]
    with collecting() as registry:

        @step
        async def work(name: str) -> None:
            flying[0] += 1
            executed.append((name, flying[0]))
            try:
                await gate.passed()
            finally:
                flying[0] -= 1

        @workflow
        async def working(name: str) -> str:
            await work(name)
            return name

    return registry, working


async def test_a_task_that_two_workers_died_of_is_run_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    gate, executed = Gate(), list[tuple[str, int]]()
    registry, working = poisonous(gate, executed)
    runs = [await lab.enqueue(working, {"name": name}) for name in ("x", "y")]
    for death in (1, 2):
        async with lab.engine(registry) as engine:
            await gate.reached(2 * death)
            await engine.crash()
    assert [await lab.status(run) for run in runs] == ["waiting", "waiting"]
    assert {(await lab.execute("select state from stepwell.tasks"))[0][0]} == {"suspect"}
    executed.clear()
    gate.open()
    async with lab.engine(registry):
        others = await lab.enqueue_many(working, [{"name": "z"}] * 20)
        for run in (*runs, *others):
            await lab.succeeded(run)
    assert [(name, beside) for name, beside in executed if name != "z"] in (
        [("x", 1), ("y", 1)],
        [("y", 1), ("x", 1)],
    )


async def test_waiting_for_a_suspect_does_not_spin(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_house_often(monkeypatch)
    gate, executed = Gate(), list[tuple[str, int]]()
    registry, working = poisonous(gate, executed)
    run = await lab.enqueue(working, {"name": "x"})
    for death in (1, 2):
        async with lab.engine(registry) as engine:
            await gate.reached(death)
            await engine.crash()
    async with lab.engine(registry) as engine:
        await gate.reached(3)
        engine.engine._rung()
        waits = 0
        wait = engine.engine._wait

        async def counting(seconds: float) -> None:
            nonlocal waits
            waits += 1
            await wait(seconds)

        engine.engine._wait = counting  # type: ignore[method-assign]
        await asyncio.sleep(0.3)
        assert waits < 20
        gate.open()
        await lab.succeeded(run)


async def test_a_suspect_that_executes_alone_can_be_cancelled_between_its_steps(lab: Lab) -> None:
    gates = [Gate(), Gate()]
    with collecting() as registry:

        @step
        async def work(n: int) -> None:
            await gates[n].passed()

        @workflow
        async def working() -> None:
            await work(0)
            await work(1)

    run = await lab.enqueue(working)
    for death in (1, 2):
        async with lab.engine(registry) as engine:
            await gates[0].reached(death)
            await engine.crash()
    async with lab.engine(registry):
        await gates[0].reached(3)
        assert await lab.cancel(run)

        async def told() -> bool:
            return bool(
                (await lab.execute("select bool_or(cancelling) from stepwell.tasks where kind = 'run'"))[0][0]
            )

        try:
            await until(told)
        finally:
            for gate in gates:
                gate.open()
        assert (await lab.ended(run)).state == "cancelled"


async def test_what_kills_its_worker_alone_is_blocked_and_its_neighbours_are_not(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    gate, executed = Gate(), list[tuple[str, int]]()
    registry, working = poisonous(gate, executed)
    poison = await lab.enqueue(working, {"name": "poison"}, priority=0)
    neighbour = await lab.enqueue(working, {"name": "neighbour"})
    for _ in range(2):
        async with lab.engine(registry) as engine:
            await wait_until_async(lambda: len(executed) == 2)
            await engine.crash(poison_after=2)
            executed.clear()
    # Alone, twice, with the poison; the neighbour is a suspect as well but is never executed beside it.
    deaths = 0
    gate_of_neighbour_open = False
    while deaths < 2:
        async with lab.engine(registry) as engine:
            await wait_until_async(lambda: len(executed) == 1)
            if executed[0][0] == "neighbour":
                gate.open()
                gate_of_neighbour_open = True
                await lab.succeeded(neighbour)
                executed.clear()
                gate.__init__()  # type: ignore[misc]
                await wait_until_async(lambda: len(executed) == 1)
            assert executed == [("poison", 1)]
            await engine.crash(poison_after=2)
            executed.clear()
            deaths += 1
    blocked = await lab.run(poison)
    assert blocked.state == "blocked"
    assert blocked.error["type"] == "PoisonStep"
    if not gate_of_neighbour_open:
        gate.open()
        async with lab.engine(registry):
            await lab.succeeded(neighbour)


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
