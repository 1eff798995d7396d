"""The spans of one claim, below the span of its run.

    enqueue WORKFLOW          by whoever enqueued it, if that one traces
      run WORKFLOW            one for each epoch of a run, from its first claim to its end
        claim WORKFLOW        each claim: of the run, of a step that is a task of its own
        step STEP             each execution, undo STEP that of an undo
        signal NAME           each signal that was taken, with a link to who sent it
        commit                each write: what happened, and what becomes of the task

Several processes make these, at times that lie far apart, and any of them may be killed at any moment. So the span of a
run and those of executions have ids that follow from the run (`outbox.tracing`). Whoever claims a run knows its span
without having seen it, and puts its own below; the claimant that writes the end of the run is the one that sends it. An
execution that was interrupted is sent by whoever records that, under the id that it had in the process that died, so that
what was sent from inside of it hangs below it as well.

A span of an execution is sent when its record is durable, so a claim that was lost tells nothing that another one tells.
Steps that a replay answers from their records are not executed, and have no span here. Where the span of the run is not
sampled, nothing below it is made; that it is not is handed on to steps and children all the same.

What is sent of an error is its type, and its message and stack only where payloads are not sealed.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from outbox.tracing import SCOPE, TraceContext, span_id_of, trace_id_of
from worker.engine.claims import Claim, Mail
from worker.engine.transitions import ChildRow, RecordRow, Taken, Writing
from worker.engine.turns import Turn
from worker.replay.decisions import Block, DoStep
from worker.replay.records import Path, Record, dotted, is_undo
from worker.telemetry.tracing import Attributes, Kind, Tracing

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.trace import Span

_CUT_SHORT = "interrupted"
_POISON = "PoisonStep"
"""The error of a run that the database has ended, without a claimant: see `reclaim_v1`."""


class Execution:
    """An execution that is under way, or whose record is: its span, and when it ended (nanoseconds since 1970)."""

    __slots__ = ("ended_at", "number", "path", "span")

    def __init__(self, path: Path, number: int, span: Span) -> None:
        self.path = path
        self.number = number
        self.span = span
        self.ended_at: int | None = None


class ClaimTrace:
    """The spans of one claim. `stored` is the context in which its run was enqueued, `queue` where it was claimed.

    `plain`: what errors say may be sent. `received_at` is when the claim was answered, in nanoseconds since 1970.
    """

    def __init__(
        self, tracing: Tracing, claim: Claim, stored: str | None, *, queue: str, worker: int, plain: bool,
        received_at: int,
    ) -> None:  # fmt: skip
        self._tracing = tracing
        self._claim = claim
        self._plain = plain
        self._stored = None if stored is None else TraceContext.of(stored)
        # On each span, so few: they are the most of what a span costs.
        self._common: Attributes = {
            "stepwell.run.id": str(claim.run_id),
            "stepwell.workflow": claim.workflow,
            "stepwell.worker": str(worker),
        }
        self._messaging: Attributes = {
            **self._common,
            "messaging.system": SCOPE,
            "messaging.destination.name": queue,
            "messaging.message.id": str(claim.run_id),
        }
        self._mail: dict[int, Mail] = {}
        self._execution: Execution | None = None
        self._sent_at = received_at
        self._run = self._run_span(claim.epoch, received_at - self._age())
        # What is below it is sampled with it: a part of a run would have no parent.
        self._is_sampled = self._run.is_recording()
        if self._is_sampled:
            self._claimed(received_at)

    @property
    def trace_id(self) -> str:
        """The trace id of the run, in hex."""
        return f"{self._run.get_span_context().trace_id:032x}"

    # -- the run

    def enter(self) -> None:
        """Make the run's span the current one of this task, for what it logs."""
        self._tracing.enter(self._run)

    def context_of_body(self) -> contextvars.Context:
        """Return what the body begins in, which has a context of its own: the run's span is the current one, for its logs."""
        return self._tracing.inside(self._run)

    def reads(self, mail: Iterable[Mail]) -> None:
        """Take note of what was sent to the run."""
        self._mail = {each.id: each for each in mail}

    def close_epochs(self, history: Sequence[Record]) -> None:
        """Send the span of the epoch before this one where no claimant has: its run was rewound, or died of poison."""
        if not self._is_sampled:
            return
        claim = self._claim
        opening = next((r for r in history if r.kind == "epoch" and r.epoch == claim.epoch), None)
        if opening is None or opening.outcome not in ("retry", "resolve", "rewind"):
            return
        before = claim.epoch - 1
        ended = next((r for r in history if r.kind == "run" and r.epoch == before), None)
        if ended is not None and (ended.error or {}).get("type") != _POISON:
            return
        began = next((r.at for r in history if r.kind == "epoch" and r.epoch == before), claim.created_at)
        span = self._run_span(before, _ns(began))
        outcome = "rewound" if ended is None else ended.outcome
        span.set_attribute("stepwell.outcome", outcome)
        if ended is not None:
            self._tracing.fail(span, _POISON)
        span.end(_ns(opening.at if ended is None else ended.at))

    def _run_span(self, epoch: int, at: int) -> Span:
        """Return the span of the run in an epoch; whoever sees it end ends it, anybody else only refers to it."""
        claim = self._claim
        about: dict[str, Any] = {
            **self._messaging,
            "messaging.operation.name": "run",
            "messaging.operation.type": "process",
            "stepwell.epoch": epoch,
        }
        if claim.version:
            about["stepwell.workflow.version"] = claim.version
        return self._tracing.start(
            f"run {claim.workflow}",
            kind="CONSUMER",
            parent=self._stored,
            attributes=about,
            at=at,
            trace_id=None if self._stored is not None else trace_id_of(claim.run_id),
            span_id=span_id_of(claim.run_id, epoch),
        )

    def _age(self) -> int:
        """Return since when the run is at work, in nanoseconds: a step on its own knows only when it was enqueued."""
        claim = self._claim
        seconds = claim.running_for if claim.kind == "run" else (claim.now - claim.created_at).total_seconds()
        return int(seconds * 1e9)

    def _claimed(self, received_at: int) -> None:
        claim = self._claim
        about: dict[str, Any] = {"stepwell.attempt": claim.attempt}
        if claim.waited is not None:
            about["stepwell.waited_seconds"] = max(0.0, claim.waited)
        if claim.interrupted:
            about["stepwell.interruptions"] = claim.interruptions
        name = claim.workflow if claim.kind == "run" else claim.name.removeprefix("step:")
        self._below(f"claim {name}", "receive", received_at, about, "CLIENT", operation="claim").end()

    def _below(
        self, name: str, type_: str | None, at: int, about: Attributes, kind: Kind = "INTERNAL", *,
        operation: str = "", span_id: int | None = None, links: Sequence[TraceContext] = (),
    ) -> Span:  # fmt: skip
        """Return a span below that of the run. One of messaging has a type and an operation."""
        attributes = {**(self._common if type_ is None else self._messaging), **about}
        if type_ is not None:
            attributes |= {"messaging.operation.type": type_, "messaging.operation.name": operation}
        return self._tracing.start(
            name, kind=kind, parent=self._run, attributes=attributes, at=at, span_id=span_id, links=links
        )

    # -- executions

    def begin(self, step: DoStep, number: int) -> Token[Context]:
        """Make the span of an execution the current one. One that was rolled back for no fault of its goes on."""
        if not self._is_sampled:
            return self._tracing.enter(self._run)
        running = self._execution
        if running is None or (running.path, running.number) != (step.path, number):
            running = self._execution = Execution(
                step.path, number, self._execution_span(step.step.name, step.path, number, time.time_ns())
            )
        else:
            running.span.add_event("repeated")
        return self._tracing.enter(running.span)

    def end(self, token: Token[Context]) -> None:
        """Take note that the function of the step has returned, or was given up."""
        self._tracing.leave(token)
        if self._execution is not None:
            self._execution.ended_at = time.time_ns()

    def failed(self, fault: Mapping[str, Any]) -> None:
        """Take note of how the execution under way has failed, as that is recorded: bounded, and text that can be sent."""
        if self._execution is None:
            return
        told = (
            {"type": "type", "message": "message", "trace": "stacktrace"} if self._plain else {"type": "type"}
        )
        event = {f"exception.{name}": str(fault[key]) for key, name in told.items() if key in fault}
        self._execution.span.add_event("exception", event)
        self._tracing.fail(self._execution.span, str(fault["type"]))

    def _execution_span(self, name: str, path: Path, number: int, at: int) -> Span:
        claim = self._claim
        about: dict[str, Any] = {
            "stepwell.step": name,
            "stepwell.path": dotted(path),
            "stepwell.execution": number,
            "stepwell.attempt": claim.attempt,
        }
        return self._below(
            f"{'undo' if is_undo(path) else 'step'} {name}", None, at, about,
            span_id=span_id_of(claim.run_id, claim.epoch, path, number),
        )  # fmt: skip

    # -- writes

    def sends(self, writing: Writing) -> None:
        """Take note that a write is on its way. The runs that it makes go on from this one."""
        self._sent_at = time.time_ns()
        for extra in writing.extras:
            if type(extra) is ChildRow:
                extra.trace = self._tracing.context_of(self._run).text()

    def written(self, turn: Turn, writing: Writing) -> None:
        """Send what a write tells, which is durable now."""
        if not self._is_sampled:
            return
        now = time.time_ns()
        for row in writing.records:
            if row.kind == "step":
                self._recorded(row)
        for extra in writing.extras:
            if type(extra) is Taken:
                self._took(self._mail.pop(extra.signal, None), now)
        then = writing.transition.then
        about: dict[str, Any] = {"stepwell.then": then, "stepwell.records": len(writing.records)}
        self._below("commit", "settle", self._sent_at, about, "CLIENT", operation="commit").end(now)
        if writing.end is not None:
            self._end(writing.end.state, (writing.end.error or {}).get("type"), now)
        elif isinstance(turn.decision, Block):  # of a step on its own, by which its run is blocked
            self._end("blocked", turn.decision.error.get("type"), now)
        elif then == "continue":
            self._end("continued", None, now)
        if then != "move":  # given back before it was recorded, it is executed again under the same number
            self._execution = None

    def lost(self) -> None:
        """Forget the execution: whoever has the claim tells of it. Of a step that nobody waited for, nobody else does."""
        running, self._execution = self._execution, None
        if running is not None and self._claim.kind == "step":
            self._close(running, "refused", "Fenced")

    def _recorded(self, row: RecordRow) -> None:
        """Send the span of an execution whose record is durable."""
        running, path = self._execution, tuple(row.path)
        if running is not None and running.path == path and row.n in (0, running.number):
            self._execution = None
            self._close(running, row.outcome, None if row.outcome == "completed" else _type_of(row))
        elif row.outcome == _CUT_SHORT:
            # When it began nobody knows any more, so that it has no length.
            at = _ns(row.at)
            span = self._execution_span(row.name, path, row.n, at)
            self._close(Execution(path, row.n, span), row.outcome, _CUT_SHORT, at)

    def _close(self, execution: Execution, outcome: str, error: str | None, at: int | None = None) -> None:
        execution.span.set_attribute("stepwell.outcome", outcome)
        if error is not None:
            self._tracing.fail(execution.span, error)
        execution.span.end(execution.ended_at if at is None else at)

    def _took(self, mail: Mail | None, at: int) -> None:
        """Send the span of a signal that was taken. Results of children are in the trace already."""
        if mail is None or mail.name.startswith("stepwell:"):
            return
        sender = None if mail.trace is None else TraceContext.of(mail.trace)
        self._below(
            f"signal {mail.name}", "receive", at, {"stepwell.signal": mail.name}, "CONSUMER", operation="signal",
            links=() if sender is None else (sender,),
        ).end(at)  # fmt: skip

    def _end(self, outcome: str, error: str | None, at: int) -> None:
        """Send the span of the run, and that of an execution that has ended it without a record."""
        if self._execution is not None:
            self._close(self._execution, outcome, error)
            self._execution = None
        self._run.set_attribute("stepwell.outcome", outcome)
        if outcome in ("failed", "blocked"):
            self._tracing.fail(self._run, error or outcome)
        self._run.end(at)


def _type_of(row: RecordRow) -> str:
    return str((row.error or {}).get("type", row.outcome))


def _ns(moment: datetime) -> int:
    """Return nanoseconds since 1970, without the detour by a float that loses a microsecond."""
    return round(moment.timestamp() * 1_000_000) * 1000
