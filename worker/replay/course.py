"""How a body runs: its strands, the calls that they wait for, and the records that are handed to them.

One strand runs at a time, until it waits. A record is handed over only when all of them wait, and the next one only
when all wait again: that is all the determinism that branches need. A call whose record is the next one and that
nobody else runs beside has it at once, without a switch: nearly every call of a replay.

Pure, as the rest of the package is.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Container, Sequence
from contextvars import copy_context
from datetime import datetime
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

from greenlet import getcurrent  # type: ignore[import-untyped]  # ships no types

from outbox.errors import Cancelled, HistoryMismatch, Suspended
from worker.replay import bodies
from worker.replay.calls import Call, JoinCall, StepCall
from worker.replay.cursor import Cursor, called, described, fits, mismatch
from worker.replay.decisions import Drift
from worker.replay.effects import Effects
from worker.replay.frames import suspended_line
from worker.replay.guards import Guard
from worker.replay.judging import Judged
from worker.replay.records import VOIDED, Path, Record, RunFacts, dotted
from worker.replay.strands import Join, Strand, Waiting
from worker.replay.undoing import Undoing

if TYPE_CHECKING:
    from worker.definitions import Workflow

log = logging.getLogger(__name__)

T = TypeVar("T")

_LIGHT = ("step", "sleep", "signal", "child")
"""The calls that need no strand to be a branch."""


class Course(Judged):
    """The strands of one body. `driven` is the seq up to which what the body did is written down."""

    __slots__ = (
        "_cursor",
        "_driven",
        "_effects",
        "_guard",
        "_live",
        "_now",
        "_runnable",
        "_seq",
        "_undoing",
        "_waiting",
        "branched",
        "drifts",
    )

    def __init__(
        self,
        workflow: Workflow[..., Any],
        facts: RunFacts,
        history: Sequence[Record],
        driven: int,
        guard: Guard,
    ) -> None:
        super().__init__(workflow, facts)
        self.drifts: list[Drift] = []
        self.branched = False
        """Whether calls of the run are tasks of their own, or were."""
        self._guard = guard
        self._cursor = Cursor(history)
        self._driven = driven
        self._live = False
        self._seq = 0
        self._now: datetime = facts.created_at
        self._runnable: deque[tuple[Strand, Any]] = deque()
        self._waiting: dict[Path, Waiting] = {}
        self._effects: Effects | None = None
        self._undoing: Undoing | None = None

    # -- what bodies call, by way of worker.replay.calls

    def perform(self, call: Call) -> Any:
        """Return the recorded outcome of a call, or have it carried out."""
        strand = self._strand
        if self._stop is not None or strand.closing or getcurrent() is not strand.body:
            self._refuse(call.what())
        strand.calls += 1
        return self._perform_at((*strand.prefix, strand.calls), call, strand)

    def join(self, call: JoinCall) -> Any:
        """Run branches side by side; return what they come to, or raise the failure that ends it."""
        strand = self._strand
        if self._stop is not None or strand.closing or getcurrent() is not strand.body:
            self._refuse(call.what())
        self.branched = True
        join = Join(call, strand.next_path(), strand)
        strand.waits_at = join.path
        self._begin_branches(join)
        if join.over:
            self._end_branches(join)
        else:
            got = self._away(strand)
            if isinstance(got, BaseException):
                raise got
        if join.error is not None:
            raise join.error
        return join.value

    def wait(self, awaitable: Awaitable[T]) -> T:
        """Perform the call behind an awaitable: a step's, a sleep's, or those of a coroutine that awaits them."""
        if isinstance(awaitable, Call):
            return awaitable.perform()  # type: ignore[no-any-return]  # what is called says what it gives
        iterator = awaitable.__await__()
        try:
            yielded = next(iterator)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # a StopIteration carries Any
        raise self._foreign(awaitable, yielded)

    def is_recorded(self, path: Path) -> bool:
        """Tell whether the result of the child that was called at a path is recorded."""
        return self._cursor.has_result(path)

    def waiting_beyond(self, known: Container[Path]) -> list[tuple[Path, Call]]:
        """Return the calls that the body has come to wait for after those at the paths that are known."""
        since = list(takewhile(lambda path: path not in known, reversed(self._waiting)))
        return [(path, self._waiting[path].call) for path in reversed(since)]

    @property
    def fresh(self) -> bool:
        """Whether what the body does now is not written down yet."""
        return self._live or self._seq > self._driven

    # -- calls

    def _perform_at(self, path: Path, call: Call, strand: Strand) -> Any:
        call.ask(path)
        record: Record | None = None
        if not self._runnable and not self._cursor.spent:
            try:
                record = self._cursor.take_for(path, call, alone=not self._waiting)
                if record is not None:
                    self._delivered(call, record)
            except HistoryMismatch as mismatched:
                self._block(mismatched)
        if record is None:
            self._waiting[path] = Waiting(path, call, self._live or self._seq > self._driven, strand)
            strand.waits_at = path
            got = self._away(strand)
            if isinstance(got, BaseException):
                raise got
            record = got
        assert record is not None
        try:
            return call.outcome(record)
        except HistoryMismatch as misfit:
            self._block(misfit)

    def _delivered(self, call: Call, record: Record) -> None:
        """Take note of a record that is about to be handed to its call."""
        self._now = record.at
        self._seq = record.seq
        mark = call.mark
        if record.fingerprint != mark and record.fingerprint is not None and mark is not None:
            arguments = call.arguments if isinstance(call, StepCall) else ""
            self._drifted(Drift(record.path, call.name, record.fingerprint, mark, arguments))
        if type(call) is StepCall and call.step.undo is not None and record.outcome == "completed":
            self._undoable().completed(call, record)

    def _undoable(self) -> Undoing:
        if self._undoing is None:
            self._undoing = Undoing()
        return self._undoing

    def _told(self) -> Effects:
        """Return where it is noted what the body does beside its calls."""
        if self._effects is None:
            self._effects = Effects()
        return self._effects

    def _drifted(self, drift: Drift) -> None:
        self.drifts.append(drift)
        if self._workflow.strict:
            raise mismatch(
                f"step {drift.name} at {dotted(drift.path)} with the recorded arguments",
                "that call with other arguments",
            )

    def _away(self, strand: Strand) -> Any:
        """Leave a strand until it is resumed. An exception that comes instead ends it, so it stays ended."""
        try:
            return bodies.leave(None)
        except BaseException as error:
            strand.closing = True
            if self._stop is None and strand is self._main_strand:
                self._stop = error
            raise

    # -- the hub: where strands are resumed from

    def _run_to_rest(self) -> None:
        """Let strands run, and hand out records, until each strand waits for what is not recorded."""
        while self._stop is None and not self._main_strand.ended:
            if self._runnable:
                self._resume(*self._runnable.popleft())
                continue
            if self._cursor.spent:
                return
            record = self._cursor.peek()
            if record is None:
                left = self._cursor.left_over(self._waiting)
                if left is not None:
                    self._condemn(mismatch(described(left), *self._pending()))
                return
            self._cursor.take()
            self._hand_over(record)

    def _resume(self, strand: Strand, value: Any) -> None:
        self._strand = strand
        strand.waits_at = ()
        if strand.body is None:
            context = strand.context
            assert context is not None
            bodies.begin(lambda: self._run_branch(strand), context)
        else:
            bodies.resume(strand.body, value)
        if strand.ended and strand is not self._main_strand:
            if strand.body is not None:
                bodies.give_back(strand.body)
                strand.body = None
            if self._stop is None:
                self._settle(strand.join, strand.branch, *strand.result)

    def _hand_over(self, record: Record) -> None:
        """Give a record to the call that waits for it; the strand behind it can run then."""
        if record.kind == "cancel":
            self._cancel(record)
            return
        waiting = self._waiting.pop(record.path, None)
        if not self._cursor.spent:
            self._cursor.concluded(record.path)
        try:
            if waiting is None:
                raise mismatch(described(record), *self._pending())
            call = waiting.call
            if not fits(record, call):
                raise self._misfit(record, waiting)
            self._delivered(call, record)
        except HistoryMismatch as mismatched:
            self._condemn(mismatched)
            return
        if waiting.strand is not None:
            self._runnable.append((waiting.strand, record))
        else:
            self._end_branch(waiting, record)

    def _cancel(self, record: Record) -> None:
        """Raise Cancelled where the body stands. Nobody waits for its branches any more."""
        self._now, self._seq = record.at, record.seq
        main = self._main_strand
        if main.waits_at and not self._is_undoing():
            self._drop(main.waits_at)
            self._runnable.append((main, Cancelled("the run was cancelled")))

    def _is_undoing(self) -> bool:
        raise NotImplementedError

    def _executions(self, waiting: Waiting) -> tuple[Record, ...]:
        """Return the recorded executions of a call that waits. Raises HistoryMismatch."""
        if self._cursor.spent:
            return ()
        records = self._cursor.executions(waiting.path)
        for record in records:
            if record.outcome != VOIDED and not fits(record, waiting.call):
                raise self._misfit(record, waiting)
        return tuple(record for record in records if fits(record, waiting.call))

    def _misfit(self, record: Record, waiting: Waiting) -> HistoryMismatch:
        return mismatch(described(record), called(waiting.call, waiting.path), self._line_of(waiting))

    def _pending(self) -> tuple[str, str | None]:
        """Return what the body waits for, and the line where."""
        waiting = list(self._waiting.values())
        calls = [called(each.call, each.path) for each in waiting[:3]]
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        return ", ".join(calls) + more, self._line_of(waiting[0]) if waiting else None

    def _line_of(self, waiting: Waiting) -> str:
        strand = waiting.strand or (waiting.join.waiter if waiting.join is not None else self._main_strand)
        return suspended_line(strand.body.gr_frame if strand.body is not None else None)

    # -- joins

    def _begin_branches(self, join: Join) -> None:
        """Start the branches: calls at once, coroutines as strands that run when this one waits."""
        lazily = join.call.limit is not None and any(not isinstance(b, StepCall) for b in join.call.branches)
        at_once = join.call.limit if lazily and join.call.limit is not None else len(join.call.branches)
        for _ in range(min(at_once, len(join.call.branches))):
            self._begin_next(join)

    def _begin_next(self, join: Join) -> bool:
        """Begin the next branch; tell whether the join is over by that."""
        if join.over:
            return True
        join.begun += 1
        branch = join.call.branches[join.begun - 1]
        prefix = (*join.path, join.begun)
        if isinstance(branch, Call) and branch.kind in _LIGHT:
            path = (*prefix, 1)
            try:
                branch.once()
                branch.ask(path)
            except Exception as error:  # noqa: BLE001 - a mistake of the body's, raised where it joins
                return join.settle(join.begun, None, error)
            self._waiting[path] = Waiting(path, branch, self.fresh, None, join, join.begun)
            return False
        strand = Strand(prefix, join, join.begun)
        strand.awaitable, strand.context = branch, copy_context()
        join.strands.append(strand)
        self._runnable.append((strand, None))
        return False

    def _run_branch(self, strand: Strand) -> None:
        """Run a branch that is a coroutine, in a greenlet of its own."""
        strand.body = getcurrent()
        try:
            strand.result = (self.wait(strand.awaitable), None)
        except BaseException as error:  # noqa: BLE001 - user code: raised again where it joins
            strand.result = (None, error)
        strand.ended = True

    def _end_branch(self, waiting: Waiting, record: Record) -> None:
        """End a branch that is a single call."""
        try:
            value, error = waiting.call.outcome(record), None
        except HistoryMismatch as misfit:
            self._condemn(misfit)
            return
        except Exception as failure:  # noqa: BLE001 - raised where it joins
            value, error = None, failure
        self._settle(waiting.join, waiting.branch, value, error)

    def _settle(self, join: Join | None, branch: int, value: Any, error: BaseException | None) -> None:
        assert join is not None
        if join.over:
            return
        over = join.settle(branch, value, error)
        if not over and join.begun < len(join.call.branches):
            over = self._begin_next(join)
        if over:
            self._end_branches(join)
            self._runnable.append((join.waiter, None))

    def _end_branches(self, join: Join) -> None:
        """Discard what is left of a join that is over."""
        if join.left or any(not strand.ended for strand in join.strands):
            self._drop(join.path)
        for branch in join.call.branches[join.begun :]:
            _never_begun(branch)

    def _drop(self, path: Path) -> None:
        """Wait no more for the calls at and below a path, and discard the branches that made them."""
        self._cursor.drop(path)
        dropped = [each for each in self._waiting if each[: len(path)] == path]
        created = False
        strands: set[Strand] = set()
        for each in dropped:
            waiting = self._waiting.pop(each)
            created = created or not waiting.fresh
            if isinstance(waiting.call, StepCall) and waiting.call.step.undo is not None:
                self._undoable().unwatched(each, waiting.call)
            if waiting.strand is not None and waiting.strand.prefix[: len(path)] == path:
                strands.add(waiting.strand)
        for strand, _ in self._runnable:
            if strand.prefix and strand.prefix[: len(path)] == path:
                strands.add(strand)
        self._runnable = deque(each for each in self._runnable if each[0] not in strands)
        if created and self.fresh:
            self._told().dropped.append(path)
        for strand in sorted(
            strands | self._joining_below(path, strands), key=lambda each: each.prefix, reverse=True
        ):
            self._close_strand(strand)

    def _joining_below(self, path: Path, strands: set[Strand]) -> set[Strand]:
        """Return the strands below a path that wait for a join of their own."""
        found: set[Strand] = set()
        for strand in strands:
            join = strand.join
            while join is not None and join.waiter.prefix and join.waiter.prefix[: len(path)] == path:
                found.add(join.waiter)
                join = join.waiter.join
        return found

    def _close_strand(self, strand: Strand) -> None:
        if strand.ended or strand.closing:
            return
        strand.closing = True
        if strand.body is None:
            _never_begun(strand.awaitable)
            return
        before, self._strand, self._closing = self._strand, strand, True
        try:
            bodies.throw(strand.body, Suspended("nobody waits for this branch any more"))
        except Exception:
            log.exception("a branch could not be discarded", extra={"run_id": self.facts.id})
        finally:
            self._strand, self._closing = before, False
        body, strand.body = strand.body, None
        (bodies.give_back if strand.has_ended() else self._abandon)(body)


def _never_begun(awaitable: Any) -> None:
    """Take note that a branch will never run, so that nobody complains of it."""
    if isinstance(awaitable, Call):
        awaitable.once()
    elif hasattr(awaitable, "close"):
        awaitable.close()
