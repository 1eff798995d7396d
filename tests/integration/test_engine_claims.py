"""What an engine takes: never too much, never what it does not know, and suspects only alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from outbox.settings import Settings
from tests.effects import Gate, two_steps
from tests.engines import Lab, keep_house_often, until
from worker import step, workflow
from worker.definitions import Registry, Workflow, collecting
from worker.engine.engine import Engine


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


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


async def test_many_suspects_are_taken_one_after_the_other_without_a_pause(lab: Lab) -> None:
    gate, executed = Gate(), list[tuple[str, int]]()
    registry, working = poisonous(gate, executed)
    await lab.enqueue_many(working, [{"name": str(n)} for n in range(20)])
    for death in (1, 2):
        async with lab.engine(registry) as engine:
            await gate.reached(20 * death)
            await engine.crash()
    executed.clear()
    gate.open()
    async with lab.engine(registry):  # keeps house as seldom as always
        await lab.all_succeeded(20, 10)
    assert [beside for _, beside in executed] == [1] * 20


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


async def test_a_suspect_that_executes_alone_can_be_cancelled(lab: Lab) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def work() -> None:
            await gate.passed()

        @workflow
        async def working() -> None:
            await work()

    run = await lab.enqueue(working)
    for death in (1, 2):
        async with lab.engine(registry) as engine:
            await gate.reached(death)
            await engine.crash()
    async with lab.engine(registry):
        await gate.reached(3)
        assert await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"


async def test_what_kills_its_worker_alone_is_blocked_and_its_neighbours_are_not(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    forever, once = Gate(), Gate()
    with collecting() as registry:

        @step
        async def kill() -> None:
            await forever.passed()

        @step
        async def live() -> str:
            await once.passed()
            return "alive"

        @workflow
        async def poison() -> None:
            await kill()

        @workflow
        async def neighbour() -> str:
            return await live()

    poisonous_run, innocent = await lab.enqueue(poison), await lab.enqueue(neighbour)
    for death in (1, 2):  # together: nobody knows whose fault it was
        async with lab.engine(registry) as engine:
            await forever.reached(death)
            await once.reached(death)
            await engine.crash(poison_after=2)
    once.open()
    for death in (3, 4):  # alone
        assert (await lab.run(poisonous_run)).state == "open"
        async with lab.engine(registry) as engine:
            await forever.reached(death)
            await engine.crash(poison_after=2)
    blocked = await lab.run(poisonous_run)
    assert blocked.state == "blocked"
    assert blocked.error["type"] == "PoisonStep"
    async with lab.engine(registry):
        assert await lab.succeeded(innocent) == "alive"
    assert once.entered == 3
    forever.open()
