"""A worker dies at each boundary of a run; the next one goes on where the records end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from outbox.errors import StepFailed
from tests.effects import Gate, Ledger
from tests.engines import Lab, at, parking
from tests.waiting import wait_until_async
from worker import now, random, sleep, step, uuid, workflow
from worker.definitions import Registry, Workflow, collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


def three_steps(ledger: Ledger, gates: dict[str, Gate]) -> tuple[Registry, Workflow[..., Any]]:
    """Return a workflow of an async, a def and an async step; each stands at its gate before its effect."""
    with collecting() as registry:

        @step
        async def a() -> str:
            if "a" in gates:
                await gates["a"].passed()
            ledger.note("a")
            return "A"

        @step
        def b(before: str) -> str:
            if "b" in gates:
                gates["b"].passed_in_thread()
            ledger.note("b")
            return before + "B"

        @step
        async def c(before: str) -> str:
            ledger.note("c")
            return before + "C"

        @workflow
        async def three() -> str:
            return await c(b(await a()))

    return registry, three


@pytest.mark.parametrize(("path", "name"), [(1, "a"), (2, "b"), (3, "c")])
async def test_a_crash_between_effect_and_record_executes_that_step_again_with_the_same_key(
    lab: Lab, path: int, name: str
) -> None:
    ledger = Ledger()
    registry, three = three_steps(ledger, {})
    async with lab.engine(registry) as first:
        lost = first.lose_writes(at(path))
        run = await lab.enqueue(three)
        await wait_until_async(lost.is_set)
        await first.crash()
        assert ledger.names == "abc"[:path]
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "ABC"
    assert ledger.names == "abc"[:path] + "abc"[path - 1 :]
    assert [entry for entry in ledger if entry[0] == name] == [(name, 1, f"{path}"), (name, 2, f"{path}")]
    history = await lab.history(run)
    assert [row for row in history if row[1]] == [(f"{path}", 1, "interrupted")]
    assert [row for row in history if not row[1]] == [(f"{n}", 0, "completed") for n in (1, 2, 3)]


@pytest.mark.parametrize("path", [1, 2, 3])
async def test_a_crash_after_the_record_never_executes_that_step_again(lab: Lab, path: int) -> None:
    ledger = Ledger()
    registry, three = three_steps(ledger, {})
    async with lab.engine(registry) as first:
        applied = first.lose_answers(at(path))
        run = await lab.enqueue(three)
        await wait_until_async(applied.is_set)
        await first.crash()
        assert ledger.names == "abc"[:path]
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "ABC"
    assert ledger.names == "abc"
    # The move to the next call was recorded, so it counts as begun: nobody can know that it was not.
    interrupted = [("2", 1, "interrupted"), ("3", 1, "interrupted")][path - 1 : path]
    assert [row for row in await lab.history(run) if row[1]] == interrupted


@pytest.mark.parametrize("name", ["a", "b"])
async def test_a_crash_while_a_step_runs_executes_it_again(lab: Lab, name: str) -> None:
    ledger, gate = Ledger(), Gate()
    gates = {name: gate}
    registry, three = three_steps(ledger, gates)
    async with lab.engine(registry) as first:
        run = await lab.enqueue(three)
        await gate.reached()
        gates.clear()
        await first.crash()
        assert (task := await lab.task(run)) is not None
        assert (task.state, task.interruptions) == ("ready", 1)
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "ABC"
        gate.open()
    path = {"a": "1", "b": "2"}[name]
    assert next(entry for entry in ledger if entry[0] == name) == (name, 2, path)
    assert (path, 1, "interrupted") in await lab.history(run)


async def test_crash_after_crash_is_counted_and_recorded(lab: Lab) -> None:
    ledger, gate = Ledger(), Gate()
    registry, three = three_steps(ledger, {"a": gate})
    run = await lab.enqueue(three)
    async with lab.engine(registry) as engine:
        await gate.reached(1)
        await engine.crash()
    async with lab.engine(registry) as engine:
        await gate.reached(2)
        assert await lab.history(run) == [("1", 1, "interrupted")]
        await engine.crash()
    gate.open()
    # Two deaths make it a suspect; any worker with empty hands takes it.
    async with lab.engine(registry):
        assert await lab.succeeded(run) == "ABC"
    assert ledger[0] == ("a", 3, "1")
    assert (await lab.history(run))[:3] == [
        ("1", 1, "interrupted"),
        ("1", 2, "interrupted"),
        ("1", 0, "completed"),
    ]


async def test_a_crash_of_a_run_that_was_claimed_but_had_not_begun_loses_nothing(lab: Lab) -> None:
    ledger = Ledger()
    registry, three = three_steps(ledger, {})
    async with lab.engine(registry) as idle:
        await idle.crash(reclaim=False)
        # What its last statement still claims in a socket buffer, before the burial is seen.
        run = await lab.enqueue(three)
        await lab.execute(
            "select * from stepwell.claim_v1(%s, 'default', '{three}', 10, array_fill(0::bigint, array[20]))",
            [idle.id],
        )
        assert (await lab.status(run)) == "running"
        await lab.reclaim(idle.id)
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "ABC"
    assert ledger.names == "abc"


async def test_a_crash_while_parked_loses_nothing_and_counts_nothing(lab: Lab) -> None:
    ledger = Ledger()
    with collecting() as registry:

        @step
        async def a() -> None:
            ledger.note("a")

        @workflow
        async def sleeping() -> str:
            await a()
            await sleep(0.5)
            await a()
            return "awake"

    async with lab.engine(registry) as first:
        run = await lab.enqueue(sleeping)
        await lab.waits(run)
        await first.crash()
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "awake"
    assert ledger == [("a", 1, "1"), ("a", 1, "3")]
    assert await lab.history(run) == [("1", 0, "completed"), ("2", 0, "completed"), ("3", 0, "completed")]


async def test_a_crash_at_the_park_sleeps_for_the_rest_only(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def sleeping() -> None:
            await sleep(1.5)

    async with lab.engine(registry) as first:
        applied = first.lose_answers(parking)
        run = await lab.enqueue(sleeping)
        await wait_until_async(applied.is_set)
        await first.crash()
        async with lab.engine(registry):
            await lab.succeeded(run)
    rows = await lab.execute(
        "select extract(epoch from finished_at - created_at)::float8 from stepwell.runs where id = %s", [run]
    )
    assert 1.5 <= rows[0][0] < 2.9


async def test_now_random_and_uuid_are_the_same_after_a_crash(lab: Lab) -> None:
    seen: list[list[str]] = []
    gate = Gate()
    with collecting() as registry:

        @step
        async def a() -> None: ...

        @step
        async def b(values: list[str]) -> list[str]:
            seen.append(values)
            await gate.passed()
            return values

        @workflow
        async def drawing() -> list[str]:
            values = [str(now()), str(random()), str(uuid())]
            await a()
            await sleep(0)
            values += [str(now()), str(random()), str(uuid())]
            return await b(values)

    async with lab.engine(registry) as first:
        run = await lab.enqueue(drawing)
        await gate.reached(1)
        await first.crash()
        async with lab.engine(registry):
            await gate.reached(2)
            gate.open()
            output = await lab.succeeded(run)
    assert seen == [output, output]
    assert len(set(output)) == 6
    created = await lab.execute("select created_at from stepwell.runs where id = %s", [run])
    assert output[0] == str(created[0][0])


async def test_a_caught_failure_replays_as_it_happened(lab: Lab) -> None:
    ledger, gate = Ledger(), Gate()
    with collecting() as registry:

        @step
        async def broken() -> None:
            ledger.note("x")
            raise ValueError("out of order")

        @step
        async def mend(message: str) -> str:
            await gate.passed()
            ledger.note("m")
            return message

        @workflow
        async def mending() -> str:
            try:
                await broken()
            except StepFailed as error:
                return await mend(error.message)
            return "never"

    async with lab.engine(registry) as first:
        run = await lab.enqueue(mending)
        await gate.reached(1)
        await first.crash()
        gate.open()
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "out of order"
    assert ledger == [("x", 1, "1"), ("m", 2, "2")]
