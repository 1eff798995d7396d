"""NOTIFY is anybody's: what who may only connect can learn from it, and do with it. A ring is a hint and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from tests.engines import Lab
from tests.security.members import Db, Member, member_of
from worker import step, workflow
from worker.definitions import Registry, collecting

SECRET = "a-secret-in-a-payload"


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


@pytest.fixture
def stranger(database_url: str, db: Db) -> Iterator[Member]:
    with member_of(None, database_url, db) as member:
        yield member


def heard(member: Member) -> list[tuple[str, str]]:
    """Return what has been rung for so far."""
    member.db.execute("select 1")  # brings what is under way
    return [(each.channel, each.payload) for each in member.db.notifies(timeout=0.2)]


def working(executed: list[int]) -> tuple[Registry, Any]:
    with collecting() as registry:

        @step
        async def work(n: int, secret: str) -> int:
            executed.append(n)
            return n

        @workflow
        async def plan(n: int, secret: str) -> int:
            return await work(n, secret)

    return registry, plan


async def test_who_listens_learns_names_of_queues_and_ids_of_workers_and_no_more(
    lab: Lab, stranger: Member
) -> None:
    registry, plan = working([])
    stranger.db.execute("listen stepwell")
    async with lab.engine(registry) as running:
        for n in range(3):  # one after the other: an idle worker is rung for
            run = await lab.enqueue(
                plan, {"n": n, "secret": SECRET}, key=f"{SECRET} {n}", labels=f'{{"a": "{SECRET}"}}'
            )
            await lab.execute("select stepwell.signal(%s, %s, %s)", [run, SECRET, f'"{SECRET}"'])
            assert await lab.succeeded(run) == n
        rung = await asyncio.to_thread(heard, stranger)
    assert rung, "nobody was rung for: the test proves nothing"
    assert {channel for channel, _ in rung} == {"stepwell"}
    assert {payload for _, payload in rung} <= {"default", "stepwell", f"worker {running.id}"}


async def test_rings_that_nobody_should_have_rung_do_no_harm(lab: Lab, stranger: Member) -> None:
    """Of every queue, of the worker itself as for a cancellation, of other workers, empty, long, and not ours at all."""
    executed: list[int] = []
    registry, plan = working(executed)
    async with lab.engine(registry) as running:
        false = [
            "default", "stepwell", f"worker {running.id}", "worker 1", "worker ", "worker -1", "worker x'; drop",
            "", "x" * 7999, "\x1b[2J", "\n", "%s{}", str(uuid4()), "select stepwell.cancel(null)", "\u202e", "🕳",
        ]  # fmt: skip
        runs = []
        for n, ring in enumerate(false * 3):
            await asyncio.to_thread(stranger.db.execute, "select pg_notify('stepwell', %s)", [ring])
            runs.append(await lab.enqueue(plan, {"n": n, "secret": ""}))
        for run in runs:
            await lab.succeeded(run)
        assert not running.task.done()
        assert running.engine._claimant.connections == 1
    assert sorted(executed) == list(range(len(runs)))
    assert await lab.totals("run") == {"succeeded": len(runs)}


async def test_a_false_ring_for_a_cancellation_cancels_nothing(lab: Lab, stranger: Member) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    with collecting() as registry:

        @step
        async def long() -> str:
            begun.set()
            await go_on.wait()
            return "to the end"

        @workflow
        async def plan() -> str:
            return await long()

    async with lab.engine(registry) as running:
        run = await lab.enqueue(plan)
        await asyncio.wait_for(begun.wait(), 10)
        looked = asyncio.Event()
        look = running.engine._caretaker.look_for_cancellations

        async def looking() -> None:
            await look()
            looked.set()

        running.engine._caretaker.look_for_cancellations = looking  # type: ignore[method-assign]
        await asyncio.to_thread(
            stranger.db.execute, "select pg_notify('stepwell', %s)", [f"worker {running.id}"]
        )
        await asyncio.wait_for(looked.wait(), 10)
        go_on.set()
        assert await lab.succeeded(run) == "to the end"
