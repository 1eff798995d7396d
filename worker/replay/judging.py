"""What a body must not do, and what becomes of a drive in which it did.

A body cannot escape its verdict: whatever it catches and however it ends, the decision is Block. One that will not
unwind is abandoned after a bound.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from greenlet import getcurrent  # type: ignore[import-untyped]  # ships no types

from outbox.errors import NotDeterministic, Suspended
from worker.replay import bodies
from worker.replay.decisions import Block
from worker.replay.frames import awaiting_line, calling_line
from worker.replay.records import RunFacts
from worker.replay.strands import Strand
from worker.replay.verdicts import fault_of, named, reason_of

if TYPE_CHECKING:
    from worker.definitions import Workflow

log = logging.getLogger(__name__)

MAX_REFUSALS = 100
"""How often a body may swallow the exception that ends it before it is abandoned."""


class Judged:
    """A drive that may come to be blocked."""

    __slots__ = (
        "_closing", "_forgotten", "_main_strand", "_refusals", "_stop", "_strand", "_verdict", "_workflow", "facts",
    )  # fmt: skip

    def __init__(self, workflow: Workflow[..., Any], facts: RunFacts) -> None:
        self.facts = facts
        self._workflow = workflow
        self._main_strand = self._strand = Strand()
        self._closing = False
        self._forgotten = ""
        self._stop: BaseException | None = None
        self._verdict: Block | None = None
        self._refusals = 0

    def report(self, violation: BaseException) -> None:
        """Remember that the body did what a replay cannot repeat, even if it swallows the exception."""
        if self._stop is None:
            self._stop = violation
            self._verdict = Block(reason_of(violation), fault_of(violation))

    def forgotten(self, what: str) -> None:
        """Remember a call that the body has dropped: it was never made, which no body means."""
        if not self._main_strand.ended and not self._forgotten:
            self._forgotten = f"{calling_line()}: {what} was never awaited, so it did not happen; await it, in a def body wait(…)"

    def line(self) -> str:
        """Return the line of the user's code that runs now; of a branch that is none of theirs, where it is joined."""
        return calling_line(beyond=self._joining())

    def _joining(self) -> Iterator[FrameType]:
        """Yield where the strands stand that wait for the one that runs, from the inside out."""
        join = self._strand.join
        while join is not None:
            body = join.waiter.body
            if body is not None and body.gr_frame is not None:
                yield body.gr_frame
            join = join.waiter.join

    def discarding(self) -> bool:
        """Tell whether the body is past its verdict, or it or a branch of it is being discarded."""
        return self._stop is not None or self._closing

    def _condemn(self, error: BaseException) -> None:
        """Settle that the run is blocked."""
        if self._stop is None:
            self._stop = error
            self._verdict = Block(reason_of(error), fault_of(error))

    def _block(self, error: BaseException) -> NoReturn:
        """End the drive with Block. The body stands still until it is discarded."""
        self._condemn(error)
        bodies.leave(None)
        raise error

    def _refuse(self, name: str) -> NoReturn:
        """Refuse a call of a body that is past its verdict, or of code that only looks as if it were the body."""
        strand = self._strand
        if getcurrent() is not strand.body and not (strand.body is None and self._stop is not None):
            violation = NotDeterministic(
                f"{calling_line()}: {name} is called from another thread or greenlet than the body it belongs to; "
                "a body does one thing after the other, so call it in the body itself"
            )
            self.report(violation)
            raise violation
        self._refusals += 1
        if self._refusals > MAX_REFUSALS:
            bodies.leave(None)  # never resumed: see close()
        raise self._stop or Suspended("nobody waits for this branch any more")

    def _foreign(self, awaitable: Any, yielded: Any) -> NotDeterministic:
        """Unwind a coroutine that awaits what Stepwell does not know, and return what to raise."""
        violation = NotDeterministic(
            f"{awaiting_line(awaitable, self._joining())}: the body of workflow {self._workflow.name!r} awaits {named(yielded)}. "
            "A body is replayed, so it may await only steps and Stepwell's own sleep; move I/O into a @step"
        )
        self.report(violation)
        throw = getattr(awaitable, "throw", None)
        if throw is None:
            return violation
        for _ in range(MAX_REFUSALS):
            try:
                throw(violation)
            except BaseException:  # noqa: BLE001 - it unwinds in one way or another
                return violation
        self._abandon(awaitable)
        return violation

    def _abandon(self, body: object) -> None:
        bodies.abandon(body)
        log.warning(
            "a body swallows the exception that ends it and was abandoned; let BaseException pass in it",
            extra={"run_id": self.facts.id, "workflow": self._workflow.name},
        )
