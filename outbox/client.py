"""`Client`: a thin runner over the statements that `AsyncClient` carries out as well."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from typing_extensions import TypeVar

from outbox import exchange, history, reasons, statements
from outbox.exchange import Following, Progress, StreamItem
from outbox.handles import Run
from outbox.history import HistoryRecord, RunInfo, TaskInfo
from outbox.invocations import (
    Target,
    WorkflowLike,
    any_needs_names,
    batches,
    checked_chunk,
    chunks,
    function_of,
)
from outbox.outcomes import outcome, pauses, timed_out
from outbox.producing import enqueueing, enqueueing_many, signalling
from outbox.repairing import Repairs
from outbox.runners import Runner
from outbox.settings import Settings
from outbox.statements import Duration, Key, Options, RunLike, key_text, run_uuid
from outbox.transactions import Transaction

R = TypeVar("R", default=Any)


class Client(Repairs):
    """Enqueue runs, wait for them, read them. Safe for use by many threads; close it, or use it in a `with`.

    Without `tx` every call is a transaction of its own, committed when it returns. With `tx` it joins that
    transaction (a psycopg connection, or a SQLAlchemy connection or session) and never commits or rolls it back.

    A connection is made at the first call that needs one. While the database cannot be reached, calls wait for it,
    half a minute at most, and then raise psycopg.OperationalError. A call that may have been carried out when the
    connection broke is repeated only where that is harmless: reads, `cancel`, and enqueueing with keys. Such a
    repetition may find its own first attempt; `created` is False then.
    """

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        self._runner = Runner(url, settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Safe twice."""
        self._runner.close()

    def enqueue(
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
        tx: Transaction | None = None,
        **kwargs: Any,
    ) -> Run[R]:
        """Enqueue one run of `workflow` with these arguments.

        By function, arguments are checked and encoded by its annotations. By name, one mapping is the whole input
        (parameter name to value), keywords are parameters, and other positional arguments are named by what the
        workers have published. A parameter that has the name of an option is passed by position or in the mapping.

        `key`: a second run of this workflow with the same key is not created; the first one is returned and the
        new arguments are ignored. `priority`: 0 first to 9 last. `delay` (seconds or a timedelta) or `at`: when to
        start. `deadline`: how long after now the run fails with DeadlineExceeded. `version`: only workers that have this
        version of the workflow take the run; by default that of the function, by name the one published last. `trace`:
        the W3C context that the run goes on from; by default that of a span of this call, if the process uses
        OpenTelemetry.

        Raises PayloadError for arguments that do not fit, ConfigError for options, SchemaError, UnknownWorkflow.
        """
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
            schema = self._runner.run(statements.workflow_schema(target.name, options.version), tx)
            target = target.knowing(schema)
        text = target.encode(args, kwargs, self._runner.settings.max_payload_bytes)
        with enqueueing(target.name, options) as this:
            statement = statements.enqueue(target.name, text, text_key, this.options)
            run, created = self._runner.run(statement, tx)
            this.note(run, created=created)
        return Run(run, created, target.name, self, function_of(workflow))

    def enqueue_many(
        self,
        workflow: WorkflowLike[R] | str,
        inputs: Iterable[Any],
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
        tx: Transaction | None = None,
        chunk: int = 1000,
    ) -> Iterator[Run[R]]:
        """Enqueue a run for each item, any number of them, and yield the runs in their order.

        Lazy: nothing is enqueued until the result is iterated. `chunk` items (or 8 MiB of them) go out in one round
        trip, which without `tx` is one transaction. An item is the one argument of the workflow, or a tuple of its
        arguments; by name it is the input (a mapping). `key` is called with each item. The runs go on with the trace
        around the iteration; without one each has a trace of its own.

        Raises PayloadError for an item, naming its number; what was yielded before stays, the item's own chunk is
        not sent.
        """
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
            chunks(inputs, checked_chunk(chunk)),
            target,
            function=function_of(workflow),
            key=key,
            options=options,
            tx=tx,
        )

    def get(self, run: RunLike) -> RunInfo:
        """Return one run. Raises RunNotFound."""
        return self._runner.run(history.run_info(run_uuid(run), self._runner.keyring))

    def list(
        self,
        workflow: str | None = None,
        status: str | None = None,
        limit: int = 100,
        before: RunLike | None = None,
    ) -> builtins.list[RunInfo]:
        """Return the newest runs first; `before` is the last id of the page before."""
        return self._runner.run(
            history.runs(
                workflow, status, limit, None if before is None else run_uuid(before), self._runner.keyring
            )
        )

    def history(self, run: RunLike) -> builtins.list[HistoryRecord]:
        """Return what has happened in a run, in order; nothing for an unknown run."""
        return self._runner.run(history.history(run_uuid(run), self._runner.keyring))

    def tasks(self, run: RunLike) -> builtins.list[TaskInfo]:
        """Return what is left to do for a run; nothing for one that has ended."""
        return self._runner.run(history.tasks(run_uuid(run)))

    def why(self, run: RunLike) -> str | None:
        """Return the sentence that says why a run is not running; None if it runs or has ended well or badly.

        Takes a second look after a beat when only that shows whether a worker is alive. Raises RunNotFound.
        """
        statement = reasons.situation(run_uuid(run), self._runner.keyring)
        first = self._runner.run(statement)
        if not first.needs_second_look():
            return reasons.explain(first)
        time.sleep(self._runner.settings.beat_seconds * reasons.BEATS_BETWEEN_LOOKS)
        return reasons.explain(self._runner.run(statement), first)

    def result(
        self, run: RunLike, timeout: Duration | None = None, *, workflow: WorkflowLike[R] | None = None
    ) -> R:
        """Wait for the end of a run and return its result: plain JSON, or as `workflow` annotates it.

        `timeout` in seconds; None waits for ever, 0 looks once. Raises RunFailed, RunCancelled, RunBlocked,
        ResultTimeout, RunNotFound.
        """
        asked = run_uuid(run)
        statement = outcome(asked, self._runner.keyring)
        for pause in pauses(timeout):
            if (found := self._runner.run(statement)) is not None:
                return found.value(workflow)
            time.sleep(pause)
        if (found := self._runner.run(statement)) is None:
            raise timed_out(asked, timeout)
        return found.value(workflow)

    def cancel(self, run: RunLike, *, tx: Transaction | None = None) -> bool:
        """Ask for the end of a run; return whether it was open. An unknown run was not.

        A run that waits ends within moments, one that executes a step at the end of that step.
        """
        return self._runner.run(statements.cancel(run_uuid(run)), tx)

    def signal(self, run: RunLike, name: str, payload: Any = None, *, tx: Transaction | None = None) -> bool:
        """Send a signal to a run, which takes it by `wait_signal(name)`; return whether it was open. A blocked run was.

        Signals are kept until they are taken, so it may be sent before the run waits for it. `payload` is anything with
        a JSON form. Raises ConfigError for the name, PayloadError. When the connection breaks it is not sent again:
        each signal is taken once, so sending it twice is not the same as once.
        """
        limit, keyring = self._runner.settings.max_payload_bytes, self._runner.keyring
        to = run_uuid(run)
        with signalling(to, name) as trace:
            return self._runner.run(exchange.signal(to, name, payload, limit, keyring, trace), tx)

    def state(self, run: RunLike) -> dict[str, Any]:
        """Return what a run shows of itself by `set_state` and `progress`: key to value. Raises RunNotFound."""
        return self._runner.run(exchange.state(run_uuid(run), self._runner.keyring))

    def progress(self, run: RunLike) -> Progress | None:
        """Return how far a run is, None if its body does not say. Raises RunNotFound."""
        return self._runner.run(exchange.progress(run_uuid(run), self._runner.keyring))

    def stream(
        self,
        run: RunLike,
        name: str | None = None,
        *,
        after: int = 0,
        follow: bool = True,
        timeout: Duration | None = None,
    ) -> Iterator[StreamItem]:
        """Yield what a run emits, live, in order, each item once, until the run has ended or is blocked.

        `name`: only this stream of it. `after`: go on behind the item with this `position`. Without `follow` it ends
        with what is there. What was emitted before a rewind or a fresh start of the run stays, and what comes after
        follows it. `timeout`: how long to wait for the next item, in seconds; None waits for ever.

        Raises ResultTimeout, RunNotFound; how the run has ended is for `result` to say.
        """
        following = Following(
            run_uuid(run), name, after, follow=follow, timeout=timeout, keyring=self._runner.keyring
        )
        return self._followed(following)

    def _followed(self, following: Following) -> Iterator[StreamItem]:
        while not following.over:
            yield from following.take(self._runner.run(following.statement()))
            time.sleep(following.pause())

    def _enqueued(
        self,
        chunked: Iterator[Sequence[Any]],
        target: Target,
        *,
        function: WorkflowLike[R] | None,
        key: Callable[[Any], Key | None] | None,
        options: Options,
        tx: Transaction | None,
    ) -> Iterator[Run[R]]:
        number = 0
        for items in chunked:
            if target.published is None and any_needs_names(target, items):
                schema = self._runner.run(statements.workflow_schema(target.name, options.version), tx)
                target = target.knowing(schema)
            for batch in batches(target, items, number, key, self._runner.settings.max_payload_bytes):
                with enqueueing_many(target.name, options, len(batch.texts)) as given:
                    statement = statements.enqueue_many(target.name, batch.texts, batch.keys, given)
                    enqueued = self._runner.run(statement, tx)
                for run, created in enqueued:
                    yield Run(run, created, target.name, self, function)
            number += len(items)
