"""Why a run waits, told of runs that a real worker has parked: signals, steps elsewhere, children, versions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import psycopg
import pytest_asyncio
from psycopg.rows import TupleRow

from outbox import AsyncClient, Settings
from tests.effects import Gate
from tests.engines import Lab
from tests.waiting import wait_until_async
from worker import call, first, gather, sleep, step, wait_signal, workflow
from worker.definitions import collecting

Db = psycopg.Connection[TupleRow]


@pytest_asyncio.fixture
async def client(database_url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(settings=Settings(database_url=database_url, beat_seconds=0.1)) as opened:
        yield opened


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


def keep_alive(db: Db, worker: int) -> None:
    """Hold the lock of a worker, as its supervisor does."""
    db.execute("select pg_advisory_lock(%s)", [worker])


async def why(lab: Lab, client: AsyncClient, run: UUID) -> str:
    await lab.waits(run)
    return str(await client.why(run))


async def test_a_run_that_waits_for_a_signal_says_which_and_until_when(
    lab: Lab, client: AsyncClient, db: Db
) -> None:
    with collecting() as registry:

        @workflow
        async def patient() -> Any:
            return await wait_signal("approved")

        @workflow
        async def limited() -> Any:
            return await wait_signal("approved", timeout=3600)

        @workflow
        async def either() -> Any:
            return await first(wait_signal("approved", timeout=1800), sleep(3600))

    async with lab.engine(registry) as engine:
        keep_alive(db, engine.id)
        run = await client.enqueue(patient)
        assert await why(lab, client, run.id) == "waiting for a signal 'approved' (call 1)"
        await run.signal("aproved")
        assert (await why(lab, client, run.id)).endswith("(call 1); sent but not waited for: 'aproved'")
        said = await why(lab, client, (await client.enqueue(limited)).id)
        assert said.startswith("waiting for a signal 'approved' until 20")
        assert said.endswith("(call 1)")
        said = await why(lab, client, (await client.enqueue(either)).id)
        assert said.startswith("waiting for a signal 'approved' until 20")
        assert ", a timer until 20" in said
        tasks = await client.tasks(run.id)
        assert tasks[0].awaits == ("approved",)


async def test_a_run_whose_steps_wait_for_workers_of_another_queue_says_so(
    lab: Lab, client: AsyncClient, db: Db
) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def here() -> None:
            await gate.passed()

        @step(queue="gpu")
        def charge(n: int) -> int:
            return n

        @workflow
        async def spread() -> Any:
            return await gather(here(), call(charge, 1), call(charge, 2))

    stuck = "2× step charge wait in queue 'gpu', which no live worker serves: start one (`stepwell worker APP --queue gpu`)"
    async with lab.engine(registry) as engine:
        keep_alive(db, engine.id)
        run = await client.enqueue(spread)
        await gate.reached()
        assert await why(lab, client, run.id) == f"waiting for 3 steps; 1 being executed; {stuck}"
        assert (await client.get(run.id)).status == "running"
        assert [info.id for info in await client.list(status="running")] == [run.id]
        assert await client.list(status="waiting") == []
        gate.open()

        async def one_is_done() -> bool:
            return await client.why(run.id) == f"waiting for 2 steps; {stuck}"

        await wait_until_async(one_is_done)
        assert [info.id for info in await client.list(status="waiting")] == [run.id]
    async with lab.engine(registry, queues=("default", "gpu")):
        assert await run.result(timeout=20) == [None, 1, 2]


async def test_a_run_that_waits_for_children_names_them(lab: Lab, client: AsyncClient, db: Db) -> None:
    with collecting() as registry:

        @workflow
        async def child(n: int) -> int:
            await wait_signal("go")
            return n

        @workflow
        async def one() -> int:
            return await child(1)

        @workflow
        async def three() -> Any:
            return await gather(child(1), child(2), child(3))

    def children(run: UUID) -> list[UUID]:
        return [
            row[0]
            for row in db.execute("select id from stepwell.runs where parent_id = %s order by id", [run])
        ]

    async with lab.engine(registry) as engine:
        keep_alive(db, engine.id)
        run = await client.enqueue(one)
        said = await why(lab, client, run.id)
        assert said == f"waiting for child run {children(run.id)[0]}"
        assert (await client.get(children(run.id)[0])).parent == run.id
        run = await client.enqueue(three)
        said = await why(lab, client, run.id)
        assert said == f"waiting for 3 child runs ({children(run.id)[0]} the first of them)"


async def test_a_run_of_a_version_that_nobody_has_says_which(lab: Lab, client: AsyncClient, db: Db) -> None:
    with collecting() as registry:

        @workflow(version="1")
        async def versioned() -> None: ...

    async with lab.engine(registry) as engine:
        keep_alive(db, engine.id)
        run = (await lab.execute("select stepwell.enqueue('versioned', version => '2')"))[0][0]
        said = str(await client.why(run))
        assert "no live worker of queue 'default' has version '2' of workflow 'versioned'" in said
