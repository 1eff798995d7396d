"""What work costs in statements, each of which is a transaction, exactly: it does not depend on the machine.

Statements that find nothing are left out: how often an idle worker looks depends on the time that has gone by.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from outbox import Client, database
from tests.engines import Lab
from worker import map, sleep, step, transaction, workflow
from worker import queries as statements
from worker.definitions import Registry, collecting

RUNS = 30
"""No more than go into one flush of an engine of `Lab`, which is half of what it has in flight."""

IDLE = {
    "idle",
    "promote",
    "audit",
    "shelve",
    "suspects",
    "unshelve",
    "register",
    "publish_workflow",
    "unregister",
}


class Bill(Counter[str]):
    """How many statements of each name found something to do, over all connections of engines."""

    def __init__(self) -> None:
        super().__init__()
        files = Path(statements.__file__).parent.glob("*.sql")
        self._names = {statements.load(file.stem): file.stem for file in files}

    def attach(self, connection: psycopg.AsyncConnection[Any]) -> None:
        execute: Callable[..., Awaitable[psycopg.AsyncCursor[Any]]] = connection.execute

        async def counting(query: Any, *args: Any, **options: Any) -> psycopg.AsyncCursor[Any]:
            cursor = await execute(query, *args, **options)
            name = self._names.get(query, str(query))
            if name not in IDLE and cursor.rowcount > 0:
                self[name] += 1
            return cursor

        connection.execute = counting  # type: ignore[assignment]  # it is called with a text alone


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


@pytest.fixture
def bill(monkeypatch: pytest.MonkeyPatch) -> Bill:
    """Count what engines execute from here on."""
    counted = Bill()
    connect = database.connect_async

    async def connecting(*args: Any, **options: Any) -> psycopg.AsyncConnection[Any]:
        connection = await connect(*args, **options)
        if str(options.get("application_name", "")).startswith("stepwell "):
            counted.attach(connection)
        return connection

    monkeypatch.setattr(database, "connect_async", connecting)
    return counted


def flows() -> Registry:
    with collecting() as registry:

        @step
        async def tick(n: int = 0) -> int:
            return n

        @step(verify=lambda: None)
        async def careful() -> None:
            pass

        @transaction
        async def save(connection: psycopg.AsyncConnection[Any]) -> None:
            await connection.execute("select 1")

        @workflow
        async def no_steps() -> None:
            pass

        @workflow
        async def one_step() -> None:
            await tick()

        @workflow
        async def two_steps() -> None:
            await tick()
            await tick()

        @workflow
        async def ten_steps() -> None:
            for _ in range(10):
                await tick()

        @workflow
        async def one_careful_step() -> None:
            await careful()

        @workflow
        async def one_transaction() -> None:
            await save()

        @workflow
        async def one_sleep() -> None:
            await sleep(0.01)

    return registry


@pytest.mark.parametrize(
    ("workflow", "flushes"),
    [("no_steps", 1), ("one_step", 1), ("two_steps", 2), ("ten_steps", 10), ("one_careful_step", 2)],
)
async def test_runs_at_once_cost_one_claim_and_one_commit_for_each_step(
    lab: Lab, bill: Bill, workflow: str, flushes: int
) -> None:
    registry = flows()
    runs = await lab.enqueue_many(registry.workflows[workflow], [{}] * RUNS)
    async with lab.engine(registry):
        await asyncio.gather(*(lab.ended(run) for run in runs))
    assert bill == {"claim": 1, "flush": flushes}


async def test_a_single_run_costs_no_more(lab: Lab, bill: Bill) -> None:
    registry = flows()
    async with lab.engine(registry):
        await lab.ended(await lab.enqueue(registry.workflows["two_steps"]))
    assert bill == {"claim": 1, "flush": 2}


async def test_a_run_that_parks_costs_one_claim_and_one_commit_more(lab: Lab, bill: Bill) -> None:
    registry = flows()
    async with lab.engine(registry):
        await lab.ended(await lab.enqueue(registry.workflows["one_sleep"]))
    assert bill == {"claim": 2, "flush": 2}


async def test_a_transaction_is_committed_on_its_own_connection(lab: Lab, bill: Bill) -> None:
    registry = flows()
    async with lab.engine(registry):
        await lab.ended(await lab.enqueue(registry.workflows["one_transaction"]))
    assert bill == {"claim": 1}


async def test_a_map_costs_its_parent_two_claims(lab: Lab, bill: Bill) -> None:
    with collecting() as registry:

        @step
        async def item(n: int) -> int:
            return n

        @workflow
        async def mapped() -> int:
            return sum(await map(item, range(RUNS)))

    async with lab.engine(registry):
        assert await lab.succeeded(await lab.enqueue(mapped)) == sum(range(RUNS))
    assert bill == {"claim": 3, "flush": 3, "history": 1}


def test_a_thousand_runs_are_enqueued_by_one_statement(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[str] = []
    execute = psycopg.Cursor.execute

    def counting(cursor: psycopg.Cursor[Any], query: Any, *args: Any, **options: Any) -> Any:
        executed.append(str(query))
        return execute(cursor, query, *args, **options)

    with Client(database_url) as client:
        client.enqueue("tick", {})
        monkeypatch.setattr(psycopg.Cursor, "execute", counting)
        assert len(list(client.enqueue_many("tick", ({"n": n} for n in range(1000))))) == 1000
    assert len([each for each in executed if "enqueue_many" in each]) == len(executed) == 1
