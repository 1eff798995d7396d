"""The database goes away, as a whole or one connection at a time; the engine waits, goes on, and repeats nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from tests.effects import Gate
from tests.engines import Lab
from tests.postgres import Cluster
from tests.waiting import wait_until_async
from worker import sleep, step, transaction, workflow
from worker.definitions import Workflow, collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        await opened.execute("create table crm (n int, note text)")
        yield opened


class Load:
    """Runs of an async step, a transaction, a nap, and a def step. `executed` counts effects outside."""

    def __init__(self, pace_seconds: float = 0.01) -> None:
        self.executed: Counter[tuple[str, int]] = Counter()
        with collecting() as self.registry:

            @step
            async def send(n: int) -> None:
                self.executed["send", n] += 1
                await asyncio.sleep(pace_seconds)

            @transaction
            def save(connection: psycopg.Connection[Any], n: int) -> None:
                connection.execute("insert into crm values (%s, 'saved')", [n])

            @transaction
            async def note(connection: psycopg.AsyncConnection[Any], n: int) -> None:
                await connection.execute("insert into crm values (%s, 'noted')", [n])

            @step
            def tell(n: int) -> int:
                self.executed["tell", n] += 1
                return n

            @workflow
            async def loading(n: int) -> int:
                await send(n)
                save(n)
                await sleep(0.01)
                await note(n)
                return tell(n)

        self.flow: Workflow[..., Any] = loading

    async def check(self, lab: Lab, count: int) -> None:
        """See that every run has succeeded and that every effect has happened once."""
        await lab.all_succeeded(count)
        assert self.executed == {(name, n): 1 for name in ("send", "tell") for n in range(count)}
        rows = await lab.execute("select count(*), count(distinct (n, note)) from crm")
        assert rows == [(2 * count, 2 * count)]
        assert await lab.execute("select count(*) from stepwell.outbox where outcome = 'interrupted'") == [
            (0,)
        ]
        assert await lab.totals("step") == {"completed": 4 * count}
        assert await lab.totals("run") == {"succeeded": count}


async def test_connections_that_are_terminated_one_by_one_lose_and_repeat_nothing(lab: Lab) -> None:
    load = Load()
    async with lab.engine(load.registry, concurrency=200) as engine:
        await lab.enqueue_many(load.flow, [{"n": n} for n in range(200)])
        terminated: set[int] = set()
        while (await lab.states()).get("open"):
            for pid in await lab.backends(engine.id):
                await lab.execute("select pg_terminate_backend(%s)", [pid])
                terminated.add(pid)
                await asyncio.sleep(0.03)
            if len(terminated) > 20:
                break
        assert len(terminated) > 4
        await load.check(lab, 200)
        assert await lab.is_registered(engine.id)


@pytest.mark.parametrize("mode", ["immediate", "fast"])
async def test_a_restart_in_the_middle_of_the_load_loses_and_repeats_nothing(
    lab: Lab, cluster: Cluster, mode: Any
) -> None:
    load = Load()
    async with lab.engine(load.registry, concurrency=50) as engine:
        await lab.enqueue_many(load.flow, [{"n": n} for n in range(300)])
        await wait_until_async(lambda: len(load.executed) > 60)
        await asyncio.to_thread(cluster.restart, mode)
        await load.check(lab, 300)
        assert await lab.is_registered(engine.id)  # nobody is dead because the database restarted
        assert engine.engine.vitals().connected


async def test_two_engines_survive_a_restart_and_share_the_rest(lab: Lab, cluster: Cluster) -> None:
    load = Load()
    async with lab.engine(load.registry, concurrency=30), lab.engine(load.registry, concurrency=30):
        await lab.enqueue_many(load.flow, [{"n": n} for n in range(200)])
        await wait_until_async(lambda: len(load.executed) > 40)
        await asyncio.to_thread(cluster.restart, "immediate")
        await load.check(lab, 200)
    workers = await lab.execute("select count(distinct worker) from stepwell.outbox")
    assert workers == [(2,)]


async def test_an_engine_that_starts_without_a_database_waits_for_it(lab: Lab, cluster: Cluster) -> None:
    load = Load()
    await lab.enqueue_many(load.flow, [{"n": n} for n in range(5)])
    await asyncio.to_thread(cluster.stop, "immediate")
    engine = lab.start(load.registry)
    try:
        for _ in range(30):
            await asyncio.sleep(0.01)
            assert not engine.task.done()
            assert not engine.engine.vitals().claiming
            assert not engine.engine.vitals().connected
        await asyncio.to_thread(cluster.start)
        await load.check(lab, 5)
        await engine.drain()
    finally:
        await engine.destroy()


@pytest.mark.parametrize("ending", ["drain", "stop"])
async def test_an_engine_that_waits_for_its_first_connection_ends_when_told(
    lab: Lab, cluster: Cluster, ending: str
) -> None:
    await asyncio.to_thread(cluster.stop, "immediate")
    engine = lab.start(Load().registry)
    try:
        for _ in range(10):
            await asyncio.sleep(0.01)
        getattr(engine.engine, ending)()
        await engine.ended(5)
    finally:
        await engine.destroy()
        await asyncio.to_thread(cluster.start)


async def test_a_stop_does_not_wait_for_a_database_that_is_away(lab: Lab, cluster: Cluster) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def stand() -> None:
            await gate.passed()

        @workflow
        async def standing() -> None:
            await stand()

    async with lab.engine(registry) as engine:
        run = await lab.enqueue(standing)
        await gate.reached()
        await asyncio.to_thread(cluster.stop, "immediate")
        gate.open()
        await wait_until_async(lambda: engine.engine.vitals().pending == 1)
        engine.engine.stop()
        await engine.ended(5)
    await asyncio.to_thread(cluster.start)
    await lab.reclaim(engine.id)
    async with lab.engine(registry):
        await lab.succeeded(run)


async def test_a_timer_that_came_due_during_an_outage_is_made_up_for(lab: Lab, cluster: Cluster) -> None:
    with collecting() as registry:

        @workflow
        async def napping() -> str:
            await sleep(0.3)
            return "awake"

    async with lab.engine(registry):
        run = await lab.enqueue(napping)
        await lab.waits(run)
        await asyncio.to_thread(cluster.stop, "fast")
        await asyncio.sleep(0.4)
        await asyncio.to_thread(cluster.start)
        assert await lab.succeeded(run) == "awake"
