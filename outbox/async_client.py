"""`AsyncClient`: a thin runner over the statements of `Client`."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from typing_extensions import TypeVar

from outbox import exchange, history, reasons, statements
from outbox.exchange import Following, Progress, StreamItem
from outbox.handles import AsyncRun
from outbox.history import HistoryRecord, RunInfo, TaskInfo
from outbox.invocations import (
    Target,
    WorkflowLike,
    any_needs_names,
    batches,
    checked_chunk,
    chunks_async,
    function_of,
)
from outbox.outcomes import outcome, pauses, timed_out
from outbox.producing import enqueueing, enqueueing_many, signalling
from outbox.repairing import AsyncRepairs
from outbox.runners import AsyncRunner
from outbox.settings import Settings
from outbox.statements import Duration, Key, Options, RunLike, key_text, run_uuid
from outbox.transactions import AsyncTransaction

R = TypeVar("R", default=Any)


class AsyncClient(AsyncRepairs):
    """The asynchronous `Client`: the same calls, awaited; one event loop at a time.

    `tx` is a psycopg AsyncConnection, or SQLAlchemy's AsyncConnection or AsyncSession.
    """

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        self._runner = AsyncRunner(url, settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Safe twice."""
        await self._runner.close()

    async def enqueue(
        self,
        workflow: WorkflowLike[R] | str,
        /,
        *args: Any,
        key: Key | None = None,
        queue: str | None = None,
        priority: int = 5,
        delay: Duration | None = None,
        at: datetime | None = None,
        labels: Mapping[str, Any] | None = None,
        deadline: Duration | None = None,
        lane: str | None = None,
        tenant: str | None = None,
        version: str | None = None,
        trace: str | None = None,
        tx: AsyncTransaction | None = None,
        **kwargs: Any,
    ) -> AsyncRun[R]:
        """Enqueue one run; see `Client.enqueue`."""
        target = Target.of(workflow, self._runner.keyring)
        options = Options.of(
            queue=target.queue if queue is None else queue,
            priority=priority,
            delay=delay,
            at=at,
            labels=labels,
            deadline=deadline,
            lane=lane,
            tenant=tenant,
            version=target.version if version is None else version,
            trace=trace,
        )
        text_key = key_text(key)
        if target.needs_names(args):
            schema = await self._runner.run(statements.workflow_schema(target.name, options.version), tx)
            target = target.knowing(schema)
        text = target.encode(args, kwargs, self._runner.settings.max_payload_bytes)
        with enqueueing(target.name, options) as this:
            statement = statements.enqueue(target.name, text, text_key, this.options)
            run, created = await self._runner.run(statement, tx)
            this.note(run, created=created)
        return AsyncRun(run, created, target.name, self, function_of(workflow))

    def enqueue_many(
        self,
        workflow: WorkflowLike[R] | str,
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        key: Callable[[Any], Key | None] | None = None,
        queue: str | None = None,
        priority: int = 5,
        delay: Duration | None = None,
        at: datetime | None = None,
        labels: Mapping[str, Any] | None = None,
        deadline: Duration | None = None,
        lane: str | None = None,
        tenant: str | None = None,
        version: str | None = None,
        trace: str | None = None,
        tx: AsyncTransaction | None = None,
        chunk: int = 1000,
    ) -> AsyncIterator[AsyncRun[R]]:
        """Enqueue a run for each item and yield the runs; `inputs` may be asynchronous. See `Client.enqueue_many`."""
        target = Target.of(workflow, self._runner.keyring)
        options = Options.of(
            queue=target.queue if queue is None else queue,
            priority=priority,
            delay=delay,
            at=at,
            labels=labels,
            deadline=deadline,
            lane=lane,
            tenant=tenant,
            version=target.version if version is None else version,
            trace=trace,
        )
        return self._enqueued(
            chunks_async(inputs, checked_chunk(chunk)),
            target,
            function=function_of(workflow),
            key=key,
            options=options,
            tx=tx,
        )

    async def get(self, run: RunLike) -> RunInfo:
        """Return one run. Raises RunNotFound."""
        return await self._runner.run(history.run_info(run_uuid(run), self._runner.keyring))

    async def list(
        self,
        workflow: str | None = None,
        status: str | None = None,
        limit: int = 100,
        before: RunLike | None = None,
    ) -> builtins.list[RunInfo]:
        """Return the newest runs first; `before` is the last id of the page before."""
        return await self._runner.run(
            history.runs(
                workflow, status, limit, None if before is None else run_uuid(before), self._runner.keyring
            )
        )

    async def history(self, run: RunLike) -> builtins.list[HistoryRecord]:
        """Return what has happened in a run, in order; nothing for an unknown run."""
        return await self._runner.run(history.history(run_uuid(run), self._runner.keyring))

    async def tasks(self, run: RunLike) -> builtins.list[TaskInfo]:
        """Return what is left to do for a run; nothing for one that has ended."""
        return await self._runner.run(history.tasks(run_uuid(run)))

    async def why(self, run: RunLike) -> str | None:
        """Return the sentence that says why a run is not running; see `Client.why`."""
        statement = reasons.situation(run_uuid(run), self._runner.keyring)
        first = await self._runner.run(statement)
        if not first.needs_second_look():
            return reasons.explain(first)
        await asyncio.sleep(self._runner.settings.beat_seconds * reasons.BEATS_BETWEEN_LOOKS)
        return reasons.explain(await self._runner.run(statement), first)

    async def result(
        self, run: RunLike, timeout: Duration | None = None, *, workflow: WorkflowLike[R] | None = None
    ) -> R:
        """Wait for the end of a run and return its result; see `Client.result`."""
        asked = run_uuid(run)
        statement = outcome(asked, self._runner.keyring)
        for pause in pauses(timeout):
            if (found := await self._runner.run(statement)) is not None:
                return found.value(workflow)
            await asyncio.sleep(pause)
        if (found := await self._runner.run(statement)) is None:
            raise timed_out(asked, timeout)
        return found.value(workflow)

    async def cancel(self, run: RunLike, *, tx: AsyncTransaction | None = None) -> bool:
        """Ask for the end of a run; return whether it was open. See `Client.cancel`."""
        return await self._runner.run(statements.cancel(run_uuid(run)), tx)

    async def signal(
        self, run: RunLike, name: str, payload: Any = None, *, tx: AsyncTransaction | None = None
    ) -> bool:
        """Send a signal to a run; return whether it was open. See `Client.signal`."""
        limit, keyring = self._runner.settings.max_payload_bytes, self._runner.keyring
        to = run_uuid(run)
        with signalling(to, name) as trace:
            return await self._runner.run(exchange.signal(to, name, payload, limit, keyring, trace), tx)

    async def state(self, run: RunLike) -> dict[str, Any]:
        """Return what a run shows of itself; see `Client.state`."""
        return await self._runner.run(exchange.state(run_uuid(run), self._runner.keyring))

    async def progress(self, run: RunLike) -> Progress | None:
        """Return how far a run is; see `Client.progress`."""
        return await self._runner.run(exchange.progress(run_uuid(run), self._runner.keyring))

    def stream(
        self,
        run: RunLike,
        name: str | None = None,
        *,
        after: int = 0,
        follow: bool = True,
        timeout: Duration | None = None,
    ) -> AsyncIterator[StreamItem]:
        """Yield what a run emits, live: ``async for item in client.stream(run)``. See `Client.stream`."""
        following = Following(
            run_uuid(run), name, after, follow=follow, timeout=timeout, keyring=self._runner.keyring
        )
        return self._followed(following)

    async def _followed(self, following: Following) -> AsyncIterator[StreamItem]:
        while not following.over:
            for item in following.take(await self._runner.run(following.statement())):
                yield item
            await asyncio.sleep(following.pause())

    async def _enqueued(
        self,
        chunked: AsyncIterator[Sequence[Any]],
        target: Target,
        *,
        function: WorkflowLike[R] | None,
        key: Callable[[Any], Key | None] | None,
        options: Options,
        tx: AsyncTransaction | None,
    ) -> AsyncIterator[AsyncRun[R]]:
        number = 0
        async for items in chunked:
            if target.published is None and any_needs_names(target, items):
                schema = await self._runner.run(statements.workflow_schema(target.name, options.version), tx)
                target = target.knowing(schema)
            for batch in batches(target, items, number, key, self._runner.settings.max_payload_bytes):
                with enqueueing_many(target.name, options, len(batch.texts)) as given:
                    statement = statements.enqueue_many(target.name, batch.texts, batch.keys, given)
                    enqueued = await self._runner.run(statement, tx)
                for run, created in enqueued:
                    yield AsyncRun(run, created, target.name, self, function)
            number += len(items)
