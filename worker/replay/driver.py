"""Drive a body from its history to the calls that are not recorded, and tell what to do there.

A body runs in a greenlet of its own, an async one as a bare coroutine inside of it; branches of a join that are
coroutines have greenlets too (`worker.replay.course`). Each call takes the next path. Where nothing more is recorded,
what the body waits for becomes a decision. The engine carries it out, records it, and delivers the record: the body
sees the same decoded text now and in every replay (I12).

When a body has failed or was cancelled, its completed steps are undone, the last one first: these are calls as well,
each at the path of its step with a 0 behind it.

This module does no I/O and reads no clock; it knows no database and no event loop. What must be switched off
around a body (the running loop, above all) is handed in as a `Guard`.

A body cannot escape its verdict. Once it has left its history or done what cannot be repeated, whatever it
catches and however it ends, the decision is Block. One that will not unwind is abandoned after a bound.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextvars import Context
from datetime import datetime
from typing import TYPE_CHECKING, Any

from greenlet import GreenletExit, getcurrent  # type: ignore[import-untyped]  # ships no types

from outbox.codec import encode_fault
from outbox.errors import HistoryMismatch, NotDeterministic, PayloadError, StepFailed, Suspended
from worker.context import current_drive
from worker.replay import bodies
from worker.replay.asides import Asides, ContinuedError
from worker.replay.cursor import described, mismatch
from worker.replay.decisions import (
    Await,
    Block,
    Cancel,
    Continue,
    Decision,
    DoStep,
    Drift,
    Fail,
    Finish,
    Settle,
    Sleep,
    Wait,
    Window,
)
from worker.replay.frames import calling_line
from worker.replay.guards import UNGUARDED, Guard
from worker.replay.records import Path, Record, RunFacts, dotted, is_undo, visible
from worker.replay.strands import Waiting

if TYPE_CHECKING:
    from worker.definitions import Workflow

__all__ = [
    "Await",
    "Block",
    "Cancel",
    "Continue",
    "Decision",
    "DoStep",
    "Drift",
    "Fail",
    "Finish",
    "Guard",
    "Path",
    "Record",
    "Replay",
    "RunFacts",
    "Settle",
    "Sleep",
    "visible",
]

log = logging.getLogger(__name__)

UNTOUCHED = -1
"""The `driven` of a run of which no drive is written down."""


class Replay(Asides):
    """One drive of one run. `history` is what `visible` returned; `drifts` are the drifts met in it.

    `driven` is the seq up to which what the body did is written down. `attempted`: an earlier claim may have come to
    the first call of an untouched run. `began_at` is when it started anew, if it did. `context` is a fresh one that the
    body begins with, by default an empty one.
    """

    __slots__ = (
        "_arguments", "_cancelled", "_context", "_ended_as", "_input", "_settling", "_undoing_now",
    )  # fmt: skip

    def __init__(
        self,
        workflow: Workflow[..., Any],
        input: str,
        facts: RunFacts,
        history: Sequence[Record] = (),
        *,
        driven: int = UNTOUCHED,
        attempted: bool = False,
        began_at: datetime | None = None,
        guard: Guard = UNGUARDED,
        context: Context | None = None,
    ) -> None:
        super().__init__(workflow, facts, history, driven, attempted, guard)
        self._input = input
        self._context = context
        if began_at is not None:
            self._now = began_at
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._ended_as: Decision | None = None
        self._cancelled: Cancel | Fail | None = None
        self._undoing_now = False
        self._settling: Settle | None = None

    # -- for the engine

    def start(self) -> Decision:
        """Run the body through its recorded history and return what it comes to first."""
        try:
            self._arguments = self._workflow.signature.decode_arguments(
                self._input, where=f"the input of {self._workflow.arguments_where}"
            )
        except PayloadError as error:
            return Block("input cannot be decoded", encode_fault(error))
        before = self._guard.enter()
        try:
            main = self._strand = self._main_strand
            main.body, _ = bodies.begin(self._main, self._context)
            self._run_to_rest()
        finally:
            self._guard.leave(before)
        return self._decided()

    def deliver(self, record: Record) -> Decision:
        """Hand the body the final record of a call that it waits for, and return what it comes to next.

        Or hand it a cancellation: it is raised where the body stands.
        """
        self.hand(record)
        return self._decided()

    def hand(self, record: Record) -> None:
        """Hand the body a record; `decide` says what it has come to."""
        if record.kind != "cancel":
            waiting = self._waiting.get(record.path)
            if record.n or waiting is None:
                waits = ", ".join(dotted(path) for path in self._waiting) or "nothing"
                raise ValueError(f"the body waits for a final record of {waits}, got {record!r}")
            if record.kind != waiting.call.kind:
                raise ValueError(f"the call at {dotted(record.path)} is no {record.kind}, got {record!r}")
        self._live = True
        before = self._guard.enter()
        try:
            self._hand_over(record)
            self._run_to_rest()
        finally:
            self._guard.leave(before)

    def waits_for(self, path: Path) -> bool:
        """Tell whether the body still waits for the call at this path."""
        return self._stop is None and path in self._waiting

    def decide(self) -> Decision:
        """Return what the body has come to after `hand`."""
        return self._decided()

    def settled(self) -> Decision:
        """Go on to the undo: nobody executes a call any more of which it has to know how it ends.

        What it calls from here on is not written down: a drive that was stopped here every time has come no further.
        """
        self._settling = None
        self._live = True
        before = self._guard.enter()
        try:
            self._runnable.append((self._main_strand, None))
            self._run_to_rest()
        finally:
            self._guard.leave(before)
        return self._decided()

    def close(self) -> None:
        """Discard the body: its `finally` blocks run, its calls are refused. Safe twice; never raises."""
        main = self._main_strand
        body, main.body = main.body, None
        if body is None:
            return
        branches = {w.strand for w in self._waiting.values() if w.strand is not None} | {
            s for s, _ in self._runnable
        }
        waiting, self._waiting = self._waiting, {}
        self._runnable.clear()
        if self._stop is None:
            self._stop = Suspended(f"the run {self.facts.id} goes on elsewhere or later")
        before = self._guard.enter()
        try:
            for strand in sorted(branches - {main}, key=lambda each: each.prefix, reverse=True):
                self._close_with_its_waiters(strand)
            self._strand = main
            if not main.ended:
                bodies.throw(body, self._stop)
        except Exception:
            log.exception("a body could not be discarded", extra={"run_id": self.facts.id})
        finally:
            self._guard.leave(before)
            waiting.clear()
        if main.ended:
            bodies.give_back(body)
        else:
            self._abandon(body)

    def _close_with_its_waiters(self, strand: Any) -> None:
        main = self._main_strand
        while strand is not None and strand is not main:
            self._close_strand(strand)
            strand = strand.join.waiter if strand.join is not None else None

    # -- the body's greenlet

    def _main(self) -> None:
        """Run the body to its end; whatever happens in it becomes a decision."""
        main = self._main_strand
        main.body = getcurrent()
        current_drive.set(self)
        args, kwargs = self._arguments
        try:
            result = self._workflow.function(*args, **kwargs)
            if self._workflow.is_async:
                result = self.wait(result)
            decision = self._returned(result)
        except BaseException as error:  # noqa: BLE001 - user code: it must never take the worker down
            decision = self._raised(error)
        if self._stop is None and isinstance(decision, Fail | Cancel):
            try:
                decision = self._undone(decision)
            except BaseException as error:  # noqa: BLE001 - it is discarded while it waits, or cannot be undone
                self._condemn(error)
                decision = self._verdict
        self._ended_as = decision
        main.ended = True
        if self._stop is not None:
            self._stop.__traceback__ = None  # it holds the frames that hold us: a cycle for every parked run
        if isinstance(self._stop, GreenletExit):  # the greenlet is going away, with its thread
            raise self._stop

    def _returned(self, result: Any) -> Decision | None:
        if self._stop is not None:
            return self._verdict
        if self._successor is not None:
            swallowed = "the body has caught what continue_as() ends it with, and gone on; let BaseException pass in it"
            self.report(NotDeterministic(f"{self._workflow.where}: {swallowed}"))
            return self._verdict
        if self._cancelled is not None:
            return self._cancelled
        left = self._cursor.left_over()
        if left is not None:
            self.report(mismatch(described(left), "its end without that call", self._workflow.where))
            return self._verdict
        if self._forgotten:  # what a body drops because it fails, it fails for that reason alone
            self.report(NotDeterministic(self._forgotten))
            return self._verdict
        return Finish(self._workflow.signature.encode_result(result, where=self._workflow.result_where))

    def _raised(self, error: BaseException) -> Decision | None:
        if self._stop is not None:
            return self._verdict
        if self._cancelled is not None:
            return self._cancelled
        if self._successor is not None and isinstance(error, ContinuedError):
            return Continue(self._successor)
        if isinstance(error, Exception):
            explained = self._guard.explain(error)
            left = self._left_before_undo()
            if explained is None and left is None:
                return Fail(encode_fault(error))
            if explained is not None:
                error = NotDeterministic(explained)
            elif left is not None:
                ended = f"its end without that call, by {type(error).__qualname__}"
                error = mismatch(described(left), ended, calling_line(error.__traceback__))
        self.report(error)
        return self._verdict

    def _left_before_undo(self) -> Record | None:
        left = self._cursor.left_over()
        return None if left is not None and is_undo(left.path) else left

    def _cancel(self, record: Record) -> None:
        super()._cancel(record)
        if not self._undoing_now:
            self._cancelled = Cancel() if record.error is None else Fail(record.error)

    def _is_undoing(self) -> bool:
        return self._undoing_now

    def _undone(self, decision: Decision) -> Decision | None:
        """Undo the completed steps, then let the decision stand. One that cannot be undone needs a person."""
        self._undoing_now = True
        begun = self._cursor.has_begun_undo()
        if begun:
            self.begin_nobody()
        main = self._main_strand
        undoing = self._undoing
        if undoing is None:
            return self._all_undone(decision)
        paths = undoing.unsettled()
        if paths and not begun:  # else they were settled before the first undo
            self._settling = Settle(paths, self.fresh)
            self._away(main)
        # Passes over what is recorded of calls that nobody waited for. A cancellation changes nothing any more.
        while (record := self._cursor.peek()) is not None and record.kind == "cancel":
            self._cancel(self._cursor.take())
        for path, call in undoing.calls(self, self._cursor.ignored):
            call.once()
            try:
                self._perform_at(path, call, main)
            except Exception as error:  # noqa: BLE001 - its failure is recorded, and a person is told
                cause = error if isinstance(error, StepFailed) else None
                return Block("an undo failed", encode_fault(cause or error))
        return self._all_undone(decision)

    def _all_undone(self, decision: Decision) -> Decision | None:
        left = self._cursor.left_over()
        if left is not None:
            self.report(mismatch(described(left), "the end of its undo", self._workflow.where))
            return self._verdict
        return decision

    # -- decisions

    def _decided(self) -> Decision:
        """Return what the body has come to. Give the greenlet back if it has ended, discard it if it is blocked."""
        main = self._main_strand
        if self._stop is not None:
            self.close()
            assert self._verdict is not None, "a body ended without a verdict although nobody has closed it"
            return self._verdict
        if main.ended:
            if main.body is not None:
                bodies.give_back(main.body)
                main.body = None
            assert self._ended_as is not None, "a body has ended without a decision"
            return self._ended_as
        if self._settling is not None:
            return self._settling
        try:
            if len(self._waiting) == 1:
                ((path, waiting),) = self._waiting.items()
                asked = waiting.call.decision(path, self._executions(waiting))
                if type(asked) is DoStep and asked.drift:
                    self._drifted(_drift_of(asked))
                if self._is_inline(asked, waiting):
                    return asked  # type: ignore[return-value]  # a step or a sleep
            return self._awaiting()
        except HistoryMismatch as mismatched:
            self._condemn(mismatched)
            return self._decided()

    def _is_inline(self, asked: Any, waiting: Waiting) -> bool:
        """Tell whether a call is carried out under the run's own claim: the only one that the body waits for.

        In a branch, one that an earlier drive has come to may be a task of its own; only the claim can tell.
        """
        own = waiting.fresh or (
            waiting.join is None and (waiting.strand is None or not waiting.strand.prefix)
        )
        return own and (type(asked) is Sleep or (type(asked) is DoStep and asked.step.queue is None))

    def _awaiting(self) -> Await:
        self.branched = True
        waits = []
        limits: dict[Path, Window] = {}
        for path, waiting in self._waiting.items():
            asked = waiting.call.decision(path, self._executions(waiting))
            join = waiting.join
            waits.append(
                Wait(
                    asked,
                    waiting.fresh,
                    None if join is None else join.path,
                    alone=join is not None and join.call.mode != "first",
                    fails_fast=join is not None and join.call.mode == "all",
                )
            )
            if waiting.fresh and join is not None and join.call.limit and type(asked) is DoStep:
                limits[join.path] = Window(join.path, join.call.limit)
        return Await(tuple(waits), tuple(limits.values()))


def _drift_of(asked: DoStep) -> Drift:
    others = [each.fingerprint for each in asked.earlier if each.fingerprint not in (None, asked.fingerprint)]
    assert others[0] is not None
    return Drift(asked.path, asked.step.name, others[0], asked.fingerprint, asked.arguments)
