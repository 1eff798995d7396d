"""Engines crash at random under load. Whatever happens, the ledger outside and the history agree."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from tenacity import stop_after_attempt, wait_none

from tests.engines import Lab, Running, keep_house_often
from worker import NOT_DONE, current_step, retrying, sleep, step, transaction, workflow
from worker.definitions import Registry, Workflow, collecting

RUNS = 100
CRASHES = 10


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        await opened.execute("create table crm (n int primary key)")
        yield opened


class World:
    """What has taken effect outside: by (run, path) how often; and what a verification finds."""

    def __init__(self) -> None:
        self.effects: Counter[tuple[str, int]] = Counter()
        self.verified: Counter[tuple[str, int]] = Counter()

    def note(self) -> None:
        info = current_step()
        self.effects[str(info.run_id), info.path[0]] += 1

    def find(self) -> Any:
        info = current_step()
        key = str(info.run_id), info.path[0]
        if self.effects[key]:
            self.verified[key] += 1
            return "found"
        return NOT_DONE


def definitions(world: World, dice: random.Random) -> tuple[Registry, Workflow[..., Any]]:
    with collecting() as registry:

        @step
        async def send(n: int) -> int:
            await asyncio.sleep(dice.uniform(0, 0.02))
            world.note()
            await asyncio.sleep(dice.uniform(0, 0.02))
            return n

        @step
        def tell(n: int) -> int:
            world.note()
            return n

        async def find(n: int) -> Any:
            return world.find()

        @step(verify=find, retry=retrying(stop=stop_after_attempt(3), wait=wait_none()))
        async def deliver(n: int) -> str:
            await asyncio.sleep(dice.uniform(0, 0.02))
            world.note()
            await asyncio.sleep(dice.uniform(0, 0.02))
            if n % 5 == 0 and current_step().execution == 1:
                raise ConnectionError("lost after the last byte")
            return "sent"

        @transaction
        async def save(connection: psycopg.AsyncConnection[Any], n: int) -> None:
            await connection.execute("insert into crm values (%s)", [n])
            await asyncio.sleep(dice.uniform(0, 0.01))

        @workflow
        async def everything(n: int) -> int:
            await send(n)
            tell(n)
            await save(n)
            await sleep(0.03)
            await deliver(n)
            return tell(n)

    return registry, everything


@pytest.mark.parametrize("seed", [1, 2])
async def test_engines_that_crash_at_random_repeat_only_what_they_say_they_did(
    lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)  # suspects are many
    dice, world = random.Random(seed), World()
    registry, flow = definitions(world, dice)
    await lab.enqueue_many(flow, [{"n": n} for n in range(RUNS)])
    engines: list[Running] = []
    try:
        for _ in range(CRASHES):
            while len(engines) < 3:
                engines.append(lab.start(registry, concurrency=20))
            await asyncio.sleep(dice.uniform(0.02, 0.15))
            # A death that is nobody's poison: interruptions of innocents must never block a run.
            await engines.pop(dice.randrange(3)).crash(poison_after=1000)
        engines.append(lab.start(registry, concurrency=20))
        await lab.all_succeeded(RUNS)
        for engine in engines:
            await engine.claiming()
            await engine.drain()
    finally:
        for engine in engines:
            await engine.destroy()
    await check(lab, world)


async def check(lab: Lab, world: World) -> None:
    """See that each effect beyond the first has an interruption (or failure) on record, and verified ones none."""
    rows = await lab.execute(
        "select run_id::text, path[1], name, count(*) filter (where n > 0)::int from stepwell.outbox"
        " where kind = 'step' group by 1, 2, 3"
    )
    recorded = {(run, path): unfinished for run, path, _, unfinished in rows}
    verifiable = {(run, path) for run, path, name, _ in rows if name == "deliver"}
    assert len(recorded) == 5 * RUNS
    for key, effects in world.effects.items():
        assert 1 <= effects <= 1 + recorded[key]
        if key in verifiable:
            assert effects == 1
    assert await lab.execute("select count(*) from crm") == [(RUNS,)]
    assert await lab.execute("select count(*) from stepwell.workers") == [(0,)]
    finals = await lab.execute("select count(*) from stepwell.outbox where kind = 'step' and n = 0")
    assert finals == [(5 * RUNS,)]
    assert (await lab.totals("step"))["completed"] == 5 * RUNS
