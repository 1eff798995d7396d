"""What is told of claims while they are worked on: spans to a trace.

A `Watch` belongs to one claim and is told by `Claimed` what happens to it. It decides nothing, never waits, and what goes
wrong in it is logged and goes no further. Where nobody traces there is no watch, and all that it costs is to see that.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from worker.engine.claims import Claim, Mail
from worker.engine.transitions import Writing
from worker.engine.turns import Turn
from worker.replay.decisions import DoStep
from worker.replay.records import Record
from worker.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from worker.engine.traced import ClaimTrace

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


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

    def __init__(self, tracing: Tracing, worker: int, *, plain: bool) -> None:
        self._tracing = tracing
        self._worker = worker
        self._plain = plain

    @classmethod
    def of(cls, tracing: Tracing | None, worker: int, *, plain: bool) -> Watcher | None:
        """Return a watcher, None if nobody wants to know."""
        return None if tracing is None else cls(tracing, worker, plain=plain)

    @property
    def traces(self) -> bool:
        """Whether it needs the contexts in which runs were enqueued."""
        return True

    @_unfailing
    def watch(
        self, claim: Claim, queue: str, stored: str | None, history: Sequence[Record], mail: Iterable[Mail],
        received_at: int,
    ) -> Watch:  # fmt: skip
        """Return the watch of a claim of a run, or of a step on its own; for what else, see `ClaimTrace`."""
        from worker.engine.traced import ClaimTrace

        trace = ClaimTrace(
            self._tracing,
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
        return Watch(trace)


class Watch:
    """What is told of one claim."""

    def __init__(self, trace: ClaimTrace) -> None:
        self._trace = trace

    @_unfailing
    def enter(self) -> None:
        """Take note that the work on this claim begins, in the task that does it."""
        self._trace.enter()

    @_unfailing
    def context_of_body(self) -> Context | None:
        """Return what a body is to begin in; None: in an empty one."""
        return self._trace.context_of_body()

    @_unfailing
    def reads(self, mail: Iterable[Mail]) -> None:
        """Take note of what was sent to the run, read again."""
        self._trace.reads(mail)

    async def during(self, step: DoStep, number: int, execution: Awaitable[R]) -> R:
        """Await an execution, the one with this number of its call in this epoch; its span is the current one meanwhile."""
        token = self._begin(step, number)
        try:
            return await execution
        finally:
            self._end(token)

    @_unfailing
    def failed(self, error: BaseException) -> None:
        """Take note that the execution has failed; its record comes next."""
        self._trace.failed(error)

    @_unfailing
    def sends(self, writing: Writing) -> None:
        """Take note that a write is on its way."""
        self._trace.sends(writing)

    @_unfailing
    def written(self, turn: Turn, writing: Writing) -> None:
        """Take note that a write is durable, and tell what it says."""
        self._trace.written(turn, writing)

    @_unfailing
    def lost(self) -> None:
        """Forget what was not written: the claim was lost."""
        self._trace.lost()

    # -- executions

    @_unfailing
    def _begin(self, step: DoStep, number: int) -> Any:
        return self._trace.begin(step, number)

    @_unfailing
    def _end(self, token: Any) -> None:
        if token is not None:
            self._trace.end(token)
