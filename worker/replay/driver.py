"""Drive a body from its history to the first call that is not recorded, and tell what to do there.

A body runs in a greenlet of its own, an async one as a bare coroutine inside of it. Each call of a step or a
sleep takes the next path; what is recorded is delivered at once, and at the first call that is not, the body is
switched away and the call becomes a decision. The engine carries it out, records it, and delivers the record:
the body sees the same decoded text now and in every replay (I12).

This module does no I/O and reads no clock; it knows no database and no event loop. What must be switched off
around a body (the running loop, above all) is handed in as a `Guard`.

A body cannot escape its verdict. Once it has left its history or done what cannot be repeated, whatever it
catches and however it ends, the decision is Block. One that will not unwind is abandoned after a bound.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from uuid import UUID

from greenlet import GreenletExit, getcurrent, greenlet  # type: ignore[import-untyped]  # ships no types

from outbox.codec import decode_fault, encode_fault, fingerprint
from outbox.errors import HistoryMismatch, NotDeterministic, PayloadError, Suspended
from worker.context import current_drive
from worker.replay import bodies
from worker.replay.calls import Call, SleepCall, StepCall
from worker.replay.cursor import Cursor, described, mismatch
from worker.replay.decisions import Block, Decision, DoStep, Drift, Fail, Finish, Sleep
from worker.replay.frames import awaiting_line, calling_line
from worker.replay.guards import UNGUARDED, Guard
from worker.replay.records import Path, Record, RunFacts, dotted, visible

if TYPE_CHECKING:
    from worker.definitions import Step, Workflow

__all__ = [
    "Block",
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
    "Sleep",
    "visible",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_REFUSALS = 100
"""How often a body may swallow the exception that ends it before it is abandoned."""


class Replay:
    """One drive of one run. `history` is what `visible` returned; `drifts` are the drifts met in it."""

    __slots__ = (
        "_arguments",
        "_body",
        "_calls",
        "_cursor",
        "_draws",
        "_ended",
        "_forgotten",
        "_guard",
        "_input",
        "_now",
        "_pending",
        "_refusals",
        "_stop",
        "_verdict",
        "_workflow",
        "drifts",
        "facts",
    )

    def __init__(
        self,
        workflow: Workflow[..., Any],
        input: str,
        facts: RunFacts,
        history: Sequence[Record] = (),
        *,
        guard: Guard = UNGUARDED,
    ) -> None:
        self.facts = facts
        self.drifts: list[Drift] = []
        self._workflow = workflow
        self._input = input
        self._guard = guard
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._cursor = Cursor(history)
        self._calls = 0
        self._draws = 0
        self._now = facts.created_at
        self._body: greenlet | None = None
        self._pending: tuple[Path, str] | None = None
        self._ended = False
        self._forgotten = ""
        self._stop: BaseException | None = None
        self._verdict: Block | None = None
        self._refusals = 0

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
            self._body, decision = bodies.begin(self._main)
        finally:
            self._guard.leave(before)
        return self._settled(decision)

    def deliver(self, record: Record) -> Decision:
        """Hand the body the final record of the call last decided, and return what it comes to next."""
        pending, body = self._pending, self._body
        if pending is None or body is None:
            raise ValueError("no call of this drive waits for a record")
        if record.n or record.path != pending[0] or record.kind != pending[1]:
            raise ValueError(f"the call at {dotted(pending[0])} waits for its final record, got {record!r}")
        self._pending = None
        before = self._guard.enter()
        try:
            decision = bodies.resume(body, record)
        finally:
            self._guard.leave(before)
        return self._settled(decision)

    def close(self) -> None:
        """Discard the body: its `finally` blocks run, its calls are refused. Safe twice; never raises."""
        body, self._body = self._body, None
        self._pending = None
        if body is None:
            return
        if self._stop is None:
            self._stop = Suspended(f"the run {self.facts.id} goes on elsewhere or later")
        before = self._guard.enter()
        try:
            bodies.throw(body, self._stop)
        except Exception:
            log.exception("a body could not be discarded", extra={"run_id": self.facts.id})
        finally:
            self._guard.leave(before)
        if self._ended:
            bodies.give_back(body)
        else:
            self._abandon(body)

    # -- for the body, by way of worker.context

    def step_call(self, step: Step[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Perform a def step and return its value; return an awaitable for an async one."""
        if step.is_async:
            return StepCall(self, step, args, kwargs)
        return self.perform_step(step, args, kwargs)

    def sleep_call(self, seconds: float | None, until: datetime | None) -> SleepCall:
        """Return the awaitable of a durable sleep."""
        return SleepCall(self, seconds, until)

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

    def now(self) -> datetime:
        """Return the time of the last record delivered, before any that of the run's creation."""
        return self._now

    def random(self) -> float:
        """Return the next number in [0, 1)."""
        return (int.from_bytes(self._drawn()[:8], "big") >> 11) * 2.0**-53

    def uuid(self) -> UUID:
        """Return the next UUID (version 4)."""
        return UUID(bytes=self._drawn(), version=4)

    def report(self, violation: BaseException) -> None:
        """Remember that the body did what a replay cannot repeat, even if it swallows the exception."""
        if self._stop is None:
            self._stop = violation
            self._verdict = Block(_reason(violation), _fault(violation))

    def forgotten(self, what: str) -> None:
        """Remember a call that the body has dropped: it was never made, which no body means."""
        if not self._ended and not self._forgotten:
            self._forgotten = f"{calling_line()}: {what} was never awaited, so it did not happen; await it, in a def body wait(…)"

    def discarding(self) -> bool:
        """Tell whether the body is past its verdict, or is being discarded."""
        return self._stop is not None

    def perform_step(self, step: Step[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Deliver the recorded outcome of a step, or have it executed."""
        if self._stop is not None or getcurrent() is not self._body:
            self._refuse(step.name)
        self._calls += 1
        path = (self._calls,)
        arguments = step.signature.encode_arguments(args, kwargs, where=step.arguments_where)
        mark = fingerprint(arguments)
        try:
            record = self._cursor.final(path, "step", step.name)
            decision: Decision | None = None
            if record is None:
                decision = self._do_step(path, step, arguments, mark)
            elif record.fingerprint != mark and record.fingerprint is not None:
                self._drifted(Drift(path, step.name, record.fingerprint, mark))
        except HistoryMismatch as mismatched:
            self._block(mismatched)
        if record is None:
            record = self._decide(path, "step", decision)
        self._now = record.at
        if record.outcome == "completed":
            return self._decoded(step, record)
        raise self._failure(step, record)

    def perform_sleep(self, seconds: float | None, until: datetime | None) -> None:
        """Return when the sleep is recorded as over."""
        if self._stop is not None or getcurrent() is not self._body:
            self._refuse("sleep")
        self._calls += 1
        path = (self._calls,)
        try:
            record = self._cursor.final(path, "sleep", "sleep")
            if record is None:
                self._cursor.executions(path, "sleep", "sleep")
        except HistoryMismatch as mismatched:
            self._block(mismatched)
        if record is None:
            record = self._decide(path, "sleep", Sleep(path, seconds, until))
        self._now = record.at

    # -- the body's greenlet

    def _main(self) -> Decision | None:
        """Run the body to its end; whatever happens in it becomes a decision."""
        self._body = getcurrent()
        current_drive.set(self)
        args, kwargs = self._arguments
        try:
            result = self._workflow.function(*args, **kwargs)
            if self._workflow.is_async:
                result = self.wait(result)
            decision = self._returned(result)
        except BaseException as error:  # noqa: BLE001 - user code: it must never take the worker down
            decision = self._raised(error)
        self._ended = True
        if self._stop is not None:
            self._stop.__traceback__ = None  # it holds the frames that hold us: a cycle for every parked run
        if isinstance(self._stop, GreenletExit):  # the greenlet is going away, with its thread
            raise self._stop
        return decision

    def _returned(self, result: Any) -> Decision | None:
        if self._stop is not None:
            return self._verdict
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
        if isinstance(error, Exception):
            explained = self._guard.explain(error)
            left = self._cursor.left_over()
            if explained is None and left is None:
                return Fail(encode_fault(error))
            if explained is not None:
                error = NotDeterministic(explained)
            elif left is not None:
                ended = f"its end without that call, by {type(error).__qualname__}"
                error = mismatch(described(left), ended, calling_line(error.__traceback__))
        self.report(error)
        return self._verdict

    def _settled(self, decision: Decision | None) -> Decision:
        """Tidy up after a switch: give the greenlet back if the body has ended, discard it if it is blocked."""
        if self._ended and self._body is not None:
            bodies.give_back(self._body)
            self._body = None
        if type(decision) is Block:
            self.close()
        assert decision is not None, "a body ended without a verdict although nobody has closed it"
        return decision

    # -- what a call comes to

    def _do_step(self, path: Path, step: Step[Any, Any], arguments: str, mark: int) -> DoStep:
        earlier = self._cursor.executions(path, "step", step.name)
        others = [each.fingerprint for each in earlier if each.fingerprint not in (None, mark)]
        if others:
            self._drifted(Drift(path, step.name, others[0], mark))
        return DoStep(path, step, arguments, mark, earlier, bool(others))

    def _drifted(self, drift: Drift) -> None:
        self.drifts.append(drift)
        if self._workflow.strict:
            raise _other_arguments(drift.path, drift.name)

    def _decide(self, path: Path, kind: str, decision: Decision | None) -> Record:
        """Switch away with a decision; what comes back is the record of the call."""
        self._pending = (path, kind)
        record: Record = self._away(decision)  # deliver() hands over nothing else
        return record

    def _away(self, decision: Decision | None) -> Any:
        """Leave the body until it is resumed. An exception that comes instead ends it, so it stays ended."""
        try:
            return bodies.leave(decision)
        except BaseException as error:
            if self._stop is None:
                self._stop = error
            raise

    def _decoded(self, step: Step[Any, Any], record: Record) -> Any:
        try:
            return step.signature.decode_result(record.value or "null", where=step.result_where)
        except PayloadError as error:
            misfit = HistoryMismatch(
                f"{error}; the recorded value stands, so mend the annotation of {step.where}",
                expected=str(step.signature.returns),
                got="a recorded value of another type",
            )
            self._block(misfit, "recorded result cannot be decoded")

    def _failure(self, step: Step[Any, Any], record: Record) -> Exception:
        if record.outcome != "failed":
            self._block(mismatch(described(record), "a call that can only complete or fail"))
        return decode_fault(record.error or {}, step.raises)

    # -- verdicts

    def _block(self, error: BaseException, reason: str | None = None) -> NoReturn:
        """End the drive with Block. The body stands still until `close` throws into it."""
        self._stop = error
        self._verdict = Block(reason or _reason(error), _fault(error))
        self._away(self._verdict)
        raise error

    def _refuse(self, name: str) -> NoReturn:
        """Refuse a call of a body that is past its verdict, or of code that only looks as if it were the body."""
        if getcurrent() is not self._body and not (self._body is None and self._stop is not None):
            violation = NotDeterministic(
                f"{calling_line()}: {name} is called from another thread or greenlet than the body it belongs to; "
                "a body does one thing after the other, so call it in the body itself"
            )
            self.report(violation)
            raise violation
        self._refusals += 1
        if self._refusals > _MAX_REFUSALS:
            bodies.leave(self._verdict)  # never resumed: see close()
        assert self._stop is not None
        raise self._stop

    def _foreign(self, awaitable: Any, yielded: Any) -> NotDeterministic:
        """Unwind a coroutine that awaits what Stepwell does not know, and return what to raise."""
        violation = NotDeterministic(
            f"{awaiting_line(awaitable)}: the body of workflow {self._workflow.name!r} awaits {_named(yielded)}. "
            "A body is replayed, so it may await only steps and Stepwell's own sleep; move I/O into a @step"
        )
        self.report(violation)
        throw = getattr(awaitable, "throw", None)
        if throw is None:
            return violation
        for _ in range(_MAX_REFUSALS):
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

    def _drawn(self) -> bytes:
        self._draws += 1
        return hashlib.blake2b(f"{self.facts.seed}:{self._draws}".encode(), digest_size=16).digest()


def _other_arguments(path: Path, name: str) -> HistoryMismatch:
    return mismatch(
        f"step {name} at {dotted(path)} with the recorded arguments", "that call with other arguments"
    )


def _named(yielded: Any) -> str:
    if yielded is None:
        return "a bare yield to the event loop (as asyncio.sleep(0) does)"
    kind = type(yielded)
    return f"{kind.__module__}.{kind.__qualname__}"


def _reason(violation: BaseException) -> str:
    if isinstance(violation, HistoryMismatch):
        return "history mismatch"
    if isinstance(violation, NotDeterministic):
        return "not deterministic"
    return f"the body raised {type(violation).__name__}"


def _fault(error: BaseException) -> dict[str, Any]:
    """Return the fault of a verdict. Ours name the line of the body; where in Stepwell we noticed helps nobody."""
    fault = encode_fault(error)
    if isinstance(error, HistoryMismatch | NotDeterministic):
        fault.pop("trace", None)
    if isinstance(error, HistoryMismatch):
        fault["data"] = {"expected": error.expected, "got": error.got}
    return fault
