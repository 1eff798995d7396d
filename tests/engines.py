"""Engines of the test's own process: run one, watch it, let it crash, look at what it left in the database.

A crash is simulated as what the database sees of a SIGKILL: from one moment on the engine writes nothing and
releases nothing, its backends are gone, and then somebody buries and reclaims it. What its steps did before
(lists in the test's memory) has happened, as it would have happened in the world outside.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self, TypeVar, cast
from uuid import UUID

import pytest
from prometheus_client import REGISTRY
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

from outbox.database import connect_async, retry_connecting_async
from outbox.settings import Settings
from tests.pooler import direct
from tests.waiting import wait_until_async
from worker.definitions import Registry, Workflow
from worker.engine.engine import Engine
from worker.engine.transitions import Writing
from worker.queries import load
from worker.telemetry.tracing import Tracing

T = TypeVar("T")

_ids = itertools.count(5_000_001)

SMALL: dict[str, Any] = {"concurrency": 50, "threads": 8, "connections": 4, "grace_seconds": 10.0}
END_SECONDS = 60.0


class Run(NamedTuple):
    """A run as its row tells it."""

    state: str
    output: Any
    error: Any


class Task(NamedTuple):
    """The run's own task."""

    state: str
    attempt: int
    doing: list[int] | None
    interruptions: int
    claimed_by: int | None


class Lab:
    """One database with engines in it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection: AsyncConnection[TupleRow] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            await self._connection.close()

    # -- producing

    async def enqueue(
        self, workflow: Workflow[..., Any] | str, input: dict[str, Any] | None = None, **options: Any
    ) -> UUID:
        """Enqueue by SQL. `options` are the named parameters of stepwell.enqueue."""
        name = workflow if isinstance(workflow, str) else workflow.name
        given = [sql.SQL("{} => {}").format(sql.Identifier(o), sql.Placeholder(o)) for o in options]
        statement = sql.SQL("select stepwell.enqueue({})").format(
            sql.SQL(", ").join([sql.SQL("%(w)s, %(i)s"), *given])
        )
        rows = await self.execute(statement, {"w": name, "i": json.dumps(input or {}), **options})
        run: UUID = rows[0][0]
        return run

    async def enqueue_many(
        self, workflow: Workflow[..., Any], inputs: Sequence[dict[str, Any]]
    ) -> list[UUID]:
        """Enqueue one run for each input, in one statement."""
        rows = await self.execute(
            "select id from stepwell.enqueue_many(%s, %s::json[])",
            [workflow.name, [json.dumps(i) for i in inputs]],
        )
        return [row[0] for row in rows]

    async def cancel(self, run: UUID) -> bool:
        return bool((await self.execute("select stepwell.cancel(%s)", [run]))[0][0])

    async def retry(self, run: UUID) -> int | None:
        epoch: int | None = (await self.execute("select stepwell.retry(%s)", [run]))[0][0]
        return epoch

    # -- looking

    async def run(self, run: UUID) -> Run:
        rows = await self.execute("select state, output, error from stepwell.runs where id = %s", [run])
        state, output, error = rows[0]
        return Run(state, _loaded(output), _loaded(error))

    async def task(self, run: UUID) -> Task | None:
        rows = await self.execute(
            "select state, attempt, doing, interruptions, claimed_by from stepwell.tasks"
            " where run_id = %s and kind = 'run'",
            [run],
        )
        return Task(*rows[0]) if rows else None

    async def status(self, run: UUID) -> str:
        return str((await self.execute("select status from stepwell.run_status where id = %s", [run]))[0][0])

    async def history(self, run: UUID) -> list[tuple[str, int, str]]:
        """Return (path, n, outcome) of each step and sleep, in the order in which they happened."""
        rows = await self.execute(
            "select path, n, outcome from stepwell.outbox where run_id = %s and kind in ('step', 'sleep')"
            " order by seq",
            [run],
        )
        return [(".".join(map(str, path)), n, outcome) for path, n, outcome in rows]

    async def errors(self, run: UUID) -> list[Any]:
        """Return the errors of the recorded executions, in order."""
        rows = await self.execute(
            "select error from stepwell.outbox where run_id = %s and kind = 'step' order by seq", [run]
        )
        return [_loaded(row[0]) for row in rows]

    async def ended(self, run: UUID, timeout: float = END_SECONDS) -> Run:
        """Wait until the run is no longer open."""

        async def end() -> Run | None:
            row = await self.run(run)
            return None if row.state == "open" else row

        return await until(end, timeout, what=f"the end of {run}")

    async def succeeded(self, run: UUID, timeout: float = END_SECONDS) -> Any:
        """Wait until the run succeeds, and return its output."""
        row = await self.ended(run, timeout)
        assert row.state == "succeeded", row
        return row.output

    async def waits(self, run: UUID, state: str = "waiting", timeout: float = END_SECONDS) -> None:
        """Wait until the run's task is in this state."""

        async def there() -> bool:
            task = await self.task(run)
            return task is not None and task.state == state

        await until(there, timeout, what=f"{run} to be {state}")

    async def all_succeeded(self, count: int, timeout: float = 60.0) -> None:
        """Wait until `count` runs have succeeded and nothing is left to do."""

        async def done() -> bool:
            return (await self.states()).get("open", 0) == 0

        try:
            await until(done, timeout, what=f"{count} runs to end")
        except AssertionError as error:
            left = await self.execute(
                "select run_id, state, attempt, position, doing, interruptions, claimed_by from stepwell.tasks limit 5"
            )
            raise AssertionError(f"{error}: {await self.states()}, left {left}") from None
        assert await self.states() == {"succeeded": count}
        assert await self.execute("select count(*) from stepwell.tasks") == [(0,)]

    async def states(self) -> dict[str, int]:
        return dict(await self.execute("select state, count(*)::int from stepwell.runs group by state"))

    async def totals(self, kind: str) -> dict[str, int]:
        """Return what the flushes counted, by outcome."""
        return dict(
            await self.execute(
                "select outcome, sum(value)::int from stepwell.counters where kind = %s group by outcome",
                [kind],
            )
        )

    async def execute(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        """Execute one statement; after a restart of the database on a new connection."""

        async def once() -> list[tuple[Any, ...]]:
            if self._connection is None or self._connection.closed:
                self._connection = await connect_async(direct(self.url), application_name="test")
            cursor = await self._connection.execute(statement, parameters)
            return await cursor.fetchall() if cursor.description else []

        return await retry_connecting_async(once, give_up_after_seconds=20.0)

    # -- engines

    @asynccontextmanager
    async def engine(
        self,
        registry: Registry,
        *,
        queues: Sequence[str] = ("default",),
        tracing: Tracing | None = None,
        **settings: Any,
    ) -> AsyncIterator[Running]:
        """Run an engine that claims; drain it at the end, unless it has ended."""
        running = self.start(registry, queues=queues, tracing=tracing, **settings)
        try:
            await running.claiming()
            yield running
            await running.drain()
        finally:
            await running.destroy()

    def start(
        self,
        registry: Registry,
        *,
        queues: Sequence[str] = ("default",),
        url: str | None = None,
        tracing: Tracing | None = None,
        **settings: Any,
    ) -> Running:
        """Start an engine without waiting for it; the caller has to `destroy` it."""
        if direct(self.url) != self.url:  # behind a pooler nobody rings
            settings.setdefault("poll_seconds", 0.1)
        return Running(
            self, registry, Settings(**{**SMALL, **settings}), queues, url or self.url, tracing=tracing
        )

    async def reclaim(self, worker_id: int, *, poison_after: int = 3) -> None:
        """Bury a worker, end its backends and free its tasks, as a supervisor does."""
        await self.execute("select stepwell.bury_v1(%s)", [worker_id])
        await self.terminate(worker_id)
        while (
            await self.execute(
                "select remaining or reclaimed > 0 from stepwell.reclaim_v1(%s, %s, 1000)",
                [worker_id, poison_after],
            )
        )[0][0]:
            pass

    async def backends(self, worker_id: int) -> list[int]:
        """Return the backends of a worker; behind a pooler those only that are in a transaction of its."""
        return [pid for pid, _ in await self.execute(load("backends"), {"worker": worker_id})]

    async def terminate(self, worker_id: int) -> None:
        """End all backends of a worker, and wait until they are gone."""

        async def gone() -> bool:
            for pid in await self.backends(worker_id):
                await self.execute("select pg_terminate_backend(%s)", [pid])
            return not await self.backends(worker_id)

        await until(gone, what="the backends to end")

    async def disconnected(self, worker_id: int) -> None:
        """Wait until the server has noticed that a worker has closed all of its connections."""

        async def gone() -> bool:
            return not await self.backends(worker_id)

        await until(gone, what="the connections to be closed")

    async def is_registered(self, worker_id: int) -> bool:
        return bool(await self.execute("select 1 from stepwell.workers where id = %s", [worker_id]))


class Running:
    """One engine that runs in the loop of the test."""

    def __init__(
        self, lab: Lab, registry: Registry, settings: Settings, queues: Sequence[str], url: str,
        *, tracing: Tracing | None = None,
    ) -> None:  # fmt: skip
        self.id = next(_ids)
        self.engine = Engine(registry, settings, url=url, worker_id=self.id, queues=queues, tracing=tracing)
        self.task = asyncio.create_task(self.engine.run())
        self._lab = lab
        self._commit = self.engine._committer.commit

    async def claiming(self) -> None:
        """Wait until the engine is registered and claims, or has ended."""
        await wait_until_async(lambda: self.task.done() or self.engine.vitals().claiming)

    async def drain(self, timeout: float = END_SECONDS) -> None:
        """Drain, and see that the engine leaves in order. Nothing happens if it has ended."""
        if not self.task.done():
            self.engine.drain()
            await self.ended(timeout)

    async def ended(self, timeout: float = END_SECONDS) -> None:
        """Wait until `run` returns; raise what it raises."""
        await asyncio.wait({self.task}, timeout=timeout)
        assert self.task.done(), "the engine does not end"
        self.task.result()

    async def crash(self, *, reclaim: bool = True, poison_after: int = 3) -> None:
        """Die as by SIGKILL; then, with `reclaim`, have the tasks freed."""
        self.lose_writes(lambda _: True)
        await self._lab.terminate(self.id)
        await self.destroy()
        await self._lab.terminate(self.id)  # what had been connecting just then
        if reclaim:
            await self._lab.reclaim(self.id, poison_after=poison_after)

    async def destroy(self) -> None:
        """End the engine whatever it does; safe at any time."""
        if not self.task.done():
            self.task.cancel()
        for _ in range(200):
            await asyncio.wait({self.task}, timeout=0.05)
            if self.task.done():
                break
            for task in list(self.engine._tasks):
                task.cancel()
        assert self.task.done(), "the engine cannot be cancelled"
        if not self.task.cancelled():
            self.task.exception()

    # -- between the engine and its committer

    def lose_writes(self, which: Callable[[Writing], bool]) -> asyncio.Event:
        """Let these writings never reach the database. The event tells that one was lost."""
        lost = asyncio.Event()
        commit = self.engine._committer.commit

        def losing(writing: Writing) -> asyncio.Future[Any]:
            if not which(writing):
                return commit(writing)
            lost.set()
            return asyncio.get_running_loop().create_future()

        self._intercept(losing)
        return lost

    def lose_answers(self, which: Callable[[Writing], bool]) -> asyncio.Event:
        """Let the engine never learn that these writings were applied. The event tells that one was."""
        applied = asyncio.Event()
        commit = self.engine._committer.commit

        def deaf(writing: Writing) -> asyncio.Future[Any]:
            future = commit(writing)
            if not which(writing):
                return future
            future.add_done_callback(lambda _: applied.set())
            return asyncio.get_running_loop().create_future()

        self._intercept(deaf)
        return applied

    def spoil(self, change: Callable[[Writing], None]) -> None:
        """Change writings before they are sent."""
        commit = self.engine._committer.commit

        def spoiling(writing: Writing) -> asyncio.Future[Any]:
            change(writing)
            return commit(writing)

        self._intercept(spoiling)

    def _intercept(self, commit: Callable[[Writing], asyncio.Future[Any]]) -> None:
        self.engine._committer.commit = commit  # type: ignore[method-assign,assignment]


def at(path: int, n: int = 0) -> Callable[[Writing], bool]:
    """Return the predicate of the writing that records this execution."""
    return lambda writing: any(tuple(r.path) == (path,) and r.n == n for r in writing.records)


def moving_to(path: int) -> Callable[[Writing], bool]:
    """Return the predicate of the writing that moves the task to this call."""
    return lambda writing: (
        writing.transition.then == "move" and tuple(writing.transition.doing or ()) == (path,)
    )


def parking(writing: Writing) -> bool:
    """Tell whether a writing parks its run."""
    return writing.transition.then == "park"


async def until(condition: Callable[[], Awaitable[T | None]], timeout: float = 10.0, *, what: str = "") -> T:
    """Return the first truthy answer of an async `condition`."""
    answer: T = await wait_until_async(cast("Callable[[], Any]", condition), timeout, what=what)
    return answer


def keep_house_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have strays, unknown names and suspects noticed in a moment instead of in seconds."""
    monkeypatch.setattr("worker.engine.caretaker.HOUSEKEEPING_SECONDS", 0.1)
    monkeypatch.setattr("worker.engine.caretaker.TICK_SECONDS", 0.1)


def counted(name: str) -> float:
    """Return the value of a metric without labels."""
    return REGISTRY.get_sample_value(name) or 0.0


def _loaded(text: str | None) -> Any:
    return None if text is None else json.loads(text)
