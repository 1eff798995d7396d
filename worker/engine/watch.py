"""What is told of claims while they are worked on: spans to a trace, events to hooks.

A `Watch` belongs to one claim and is told by `Claimed` what happens to it. It decides nothing, never waits, and what goes
wrong in it is logged and goes no further. Where nobody traces and no hook is registered there is no watch, and all that
it costs is to see that.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import Context
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from uuid import UUID

from worker import events
from worker.engine.claims import Claim, Mail
from worker.engine.hooks import Hooks
from worker.engine.transitions import Writing
from worker.engine.turns import Turn
from worker.registry import Registry
from worker.replay.decisions import Block, DoStep, Fail
from worker.replay.records import Record
from worker.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from worker.engine.traced import ClaimTrace

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

CLOSE_SECONDS = 2.0
"""How long an engine that ends waits for its hooks."""


def _unfailing(method: Callable[P, R]) -> Callable[P, R | None]:
    """Keep the failure of what only watches from what is watched."""

    @functools.wraps(method)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(*args, **kwargs)
        except Exception:
            logger.warning("a claim could not be watched (%s)", method.__name__, exc_info=True)
            return None

    return tried


class Watcher:
    """Makes the watches of one engine, of worker `worker`. `plain`: what errors say may leave for a trace."""

    def __init__(self, tracing: Tracing | None, hooks: Hooks | None, worker: int, *, plain: bool) -> None:
        self._tracing = tracing
        self._hooks = hooks
        self._worker = worker
        self._plain = plain

    @classmethod
    def of(cls, registry: Registry, tracing: Tracing | None, worker: int, *, plain: bool) -> Watcher | None:
        """Return a watcher, None if nobody wants to know."""
        if tracing is None and not registry.hooks:
            return None
        return cls(tracing, Hooks(registry.hooks) if registry.hooks else None, worker, plain=plain)

    @property
    def traces(self) -> bool:
        """Whether it needs the contexts in which runs were enqueued."""
        return self._tracing is not None

    @_unfailing
    def watch(
        self, claim: Claim, queue: str, stored: str | None, history: Sequence[Record], mail: Iterable[Mail],
        received_at: int,
    ) -> Watch:  # fmt: skip
        """Return the watch of a claim of a run, or of a step on its own; for what else, see `ClaimTrace`."""
        trace = None
        if self._tracing is not None:
            trace = self._traced(self._tracing, claim, queue, stored, history, mail, received_at)
        return Watch(claim, trace, self._hooks, self._worker)

    @_unfailing
    def _traced(
        self, tracing: Tracing, claim: Claim, queue: str, stored: str | None, history: Sequence[Record],
        mail: Iterable[Mail], received_at: int,
    ) -> ClaimTrace:  # fmt: skip
        from worker.engine.traced import ClaimTrace

        trace = ClaimTrace(
            tracing,
            claim,
            stored,
            queue=queue,
            worker=self._worker,
            plain=self._plain,
            received_at=received_at,
        )
        trace.reads(mail)
        if claim.kind == "run" and claim.attempt == 1 and claim.epoch:
            trace.close_epochs(history)
        return trace

    @_unfailing
    def reclaimed(self, dead: int, detector: str, tasks: int) -> None:
        """Tell that a worker is dead and what it had claimed is free."""
        if self._hooks is not None:
            at = datetime.now(UTC)
            self._hooks.tell(
                events.WorkerReclaimed(at=at, worker=self._worker, dead=dead, detector=detector, tasks=tasks)
            )

    def close(self) -> None:
        """Tell the hooks what they have not heard yet, for a moment, and let them go. Safe twice."""
        if self._hooks is not None:
            self._hooks.close(CLOSE_SECONDS)


class Watch:
    """What is told of one claim."""

    def __init__(self, claim: Claim, trace: ClaimTrace | None, hooks: Hooks | None, worker: int) -> None:
        self._claim = claim
        self._trace = trace
        self._hooks = hooks
        self._worker = worker
        self._since = time.monotonic() - claim.running_for
        self._failure: tuple[DoStep, int, BaseException, float | None] | None = None
        self._number = 0

    @_unfailing
    def enter(self) -> None:
        """Take note that the work on this claim begins, in the task that does it."""
        if self._claim.kind == "run" and self._claim.attempt == 1:
            self._tell(events.RunStarted)
        if self._trace is not None:
            self._trace.enter()

    @_unfailing
    def context_of_body(self) -> Context | None:
        """Return what a body is to begin in; None: in an empty one."""
        return None if self._trace is None else self._trace.context_of_body()

    @_unfailing
    def reads(self, mail: Iterable[Mail]) -> None:
        """Take note of what was sent to the run, read again."""
        if self._trace is not None:
            self._trace.reads(mail)

    async def during(self, step: DoStep, number: int, execution: Awaitable[R]) -> R:
        """Await an execution, the one with this number of its call in this epoch; its span is the current one meanwhile."""
        token = self._begin(step, number)
        try:
            return await execution
        finally:
            self._end(token)

    @_unfailing
    def failed(
        self, step: DoStep, error: BaseException, fault: Mapping[str, Any], wait_seconds: float | None
    ) -> None:
        """Take note that the execution has failed, and is tried again after so long or not (None).

        Its record, which comes next, has `fault`.
        """
        self._failure = (step, self._number, error, wait_seconds)
        if self._trace is not None:
            self._trace.failed(fault)

    @_unfailing
    def sends(self, writing: Writing) -> None:
        """Take note that a write is on its way."""
        if self._trace is not None:
            self._trace.sends(writing)

    @_unfailing
    def written(self, turn: Turn, writing: Writing) -> None:
        """Take note that a write is durable, and tell what it says."""
        if self._hooks is not None:
            self._tell_what_happened(turn, writing)
        self._failure = None
        if self._trace is not None:
            self._trace.written(turn, writing)

    @_unfailing
    def lost(self) -> None:
        """Forget what was not written: the claim was lost."""
        self._failure = None
        if self._trace is not None:
            self._trace.lost()

    # -- executions

    @_unfailing
    def _begin(self, step: DoStep, number: int) -> Any:
        self._number = number
        if self._hooks is not None:
            self._tell(events.StepStarted, step=step.step.name, path=step.path, execution=number)
        return None if self._trace is None else self._trace.begin(step, number)

    @_unfailing
    def _end(self, token: Any) -> None:
        if self._trace is not None and token is not None:
            self._trace.end(token)

    # -- events

    def _tell_what_happened(self, turn: Turn, writing: Writing) -> None:
        for row in writing.records:
            if row.kind == "step" and row.outcome == "interrupted" and row.error is None:
                self._tell(events.StepInterrupted, step=row.name, path=tuple(row.path), execution=row.n)
        if self._failure is not None:
            step, number, error, wait_seconds = self._failure
            about: dict[str, Any] = {
                "step": step.step.name, "path": step.path, "execution": number, "error": error,
            }  # fmt: skip
            if wait_seconds is None:
                self._tell(events.StepFailed, **about)
            else:
                self._tell(events.StepRetried, wait_seconds=wait_seconds, **about)
        decision = turn.decision
        if isinstance(decision, Block):
            self._tell(events.RunBlocked, reason=decision.reason, error=decision.error)
        elif writing.end is not None:
            fault: Mapping[str, Any] | None = decision.error if isinstance(decision, Fail) else None
            seconds = time.monotonic() - self._since
            self._tell(events.RunEnded, state=writing.end.state, error=fault, seconds=seconds)

    def _tell(self, kind: Callable[..., events.RunEvent], **about: Any) -> None:
        if self._hooks is None:
            return
        claim = self._claim
        run_id: UUID = claim.run_id
        self._hooks.tell(
            kind(
                at=datetime.now(UTC),
                worker=self._worker,
                run_id=run_id,
                workflow=claim.workflow,
                epoch=claim.epoch,
                trace_id=None if self._trace is None else self._trace.trace_id,
                **about,
            )
        )
