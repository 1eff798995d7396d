"""Turns, and the standing of a claim: what an advance wants written, and how it is put into a fenced write.

A `Turn` is a decision with the records that must be durable before it is acted upon. `Standing` knows where the
claim stands (the fence, the call it is at, the run's clock) and turns turns into `Writing`s. No I/O.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Any, assert_never

import msgspec

from outbox.codec import encode_fault
from outbox.errors import DeadlineExceeded
from worker.engine.claims import Claim
from worker.engine.sealed import Seals
from worker.engine.transitions import (
    Continued,
    EndRow,
    Extra,
    RecordRow,
    Stopping,
    Then,
    Transition,
    Writing,
)
from worker.replay.decisions import (
    Await,
    Block,
    Cancel,
    Continue,
    Decision,
    DoStep,
    Fail,
    Finish,
    Settle,
    Sleep,
)
from worker.replay.records import VOIDED, Path, Record, RunFacts

DEADLINE_MARGIN_SECONDS = 0.05
"""Added to a wait that a deadline cuts, so that the deadline has passed for certain when it ends."""


class Park(msgspec.Struct, frozen=True, gc=False):
    """Wait at `path`, so many seconds or until a moment, without a claim."""

    path: Path
    seconds: float | None
    until: datetime | None = None


class Release(msgspec.Struct, frozen=True, gc=False):
    """Give the run back: this process is leaving, or needs to be alone."""


class Spread(msgspec.Struct, frozen=True):
    """Park, at `path` if it is one that the task keeps the time for, until one of several calls is done, or a signal of `awaits` is there, or the time has come."""

    path: Path | None
    awaits: tuple[str, ...]
    seconds: float | None = None
    until: datetime | None = None


class Done(msgspec.Struct, frozen=True, gc=False):
    """A step that is a task of its own is over."""


class Hold(msgspec.Struct, frozen=True, gc=False):
    """A step that is a task of its own waits for a person."""


class Turn(msgspec.Struct, frozen=True, gc=False):
    """What to do next, what has to be durable before, and whether it is.

    `extras` go out with it. `strict`: the records are in order only if nothing else was recorded meanwhile. `took`: how
    many signals they take; `asides`: how many of them are patches.
    """

    decision: Decision | Park | Spread | Done | Hold | Release
    records: tuple[Record, ...] = ()
    wait_seconds: float = 0.0
    written: bool = False
    extras: tuple[Extra, ...] = ()
    strict: bool = False
    took: int = 0
    asides: int = 0


class Standing:
    """Where one claim stands. `history` is what is recorded of the run, or of the step that the claim is.

    `claimed_at` is this process's monotonic time of the claim. `doing` is the call that the task row is at,
    `due_in` how long it still had to wait there when it was claimed, `interrupted` whether the claim before died
    without a record of it. What it writes goes through `seals`, if payloads are sealed.
    """

    def __init__(
        self, claim: Claim, history: list[Record], claimed_at: float, seals: Seals | None = None
    ) -> None:
        self.claim = claim
        self._seals = seals
        self.facts = RunFacts(
            id=claim.run_id,
            workflow=claim.workflow,
            created_at=claim.created_at,
            seed=claim.seed,
            epoch=claim.epoch,
            labels={} if claim.labels is None else msgspec.json.decode(claim.labels),
            key_epoch=claim.key_epoch,
        )
        self.driven = claim.driven
        self.pending = claim.pending
        self.cancelled = False
        """Whether the cancellation of this epoch is recorded."""
        self.branched = False
        """Whether the run may have tasks beside its own."""
        self.doing: Path | None = None if claim.doing is None else tuple(claim.doing)
        if claim.kind == "step":
            self.doing = tuple(claim.path)
        self.interrupted = claim.interrupted
        self._due_at = None if claim.due_in is None else claimed_at + claim.due_in
        self._position = claim.position
        self._seq = claim.seq
        self._claimed_at = claimed_at
        self._last_at = claim.created_at
        self.take_in(history)
        self._deadline = None if claim.deadline_in is None else claimed_at + claim.deadline_in

    def take_in(self, history: list[Record]) -> None:
        """Take note of what is recorded by now."""
        if history:
            self._last_at = max(self._last_at, history[-1].at)
            self._seq = max(self._seq, history[-1].seq)
        self.cancelled = bool(history) and any(
            r.kind == "cancel" and r.epoch == self.claim.epoch for r in history
        )

    def start_over(self, history: list[Record]) -> None:
        """Take note of what is recorded by now; what this claim wanted to record and did not is to be recorded still."""
        self.take_in(history)
        if self._position == self.claim.position:
            self.interrupted = self.claim.interrupted

    @property
    def attempted(self) -> bool:
        """Whether an earlier claim, of which nothing is written down, may have come to the first call."""
        return self.claim.interrupted and self.claim.doing is None

    # -- the call that the claim is at

    def due_in(self, path: Path) -> float | None:
        """Return how long the call at `path` has still to wait, None if nothing is known of a wait there."""
        if self._due_at is None or self.doing != path:
            return None
        return self._due_at - time.monotonic()

    def executions(self, step: DoStep) -> list[Record]:
        """Return the executions of this epoch that did not complete the call."""
        if not step.earlier:
            return []
        return [r for r in step.earlier if r.epoch == self.claim.epoch and r.outcome != VOIDED]

    @property
    def returned(self) -> bool:
        """Tell whether the call that the claim came with may have been begun, or waited for, by an earlier claim."""
        return self.interrupted or self._due_at is not None

    @property
    def fence(self) -> int:
        """One integer that grows with every claim and transition of the run."""
        return self.claim.epoch << 48 | self.claim.attempt << 24 | self._position

    # -- time

    def now(self) -> datetime:
        """Return the database's time, carried on by the monotonic clock; never before the last record."""
        elapsed = timedelta(0, time.monotonic() - self._claimed_at)
        return max(self._last_at, self.claim.now + elapsed)

    def remaining(self) -> float | None:
        """Return the seconds until the run's deadline, None if it has none, or none that counts any more."""
        return None if self._deadline is None or self.cancelled else self._deadline - time.monotonic()

    def deadline_passed(self) -> Fail | None:
        """Return the end of the run when its deadline has passed."""
        if self._deadline is None or self.cancelled or self._deadline > time.monotonic():
            return None
        return Fail(_deadline_fault())

    def cut_by_deadline(self, seconds: float) -> float:
        """Return how long to wait so that neither the wait nor the deadline is missed."""
        remaining = self.remaining()
        return seconds if remaining is None else min(seconds, max(0.0, remaining) + DEADLINE_MARGIN_SECONDS)

    def seconds(self) -> float:
        """Return the time since the run was first claimed."""
        return self.claim.running_for + time.monotonic() - self._claimed_at

    # -- records

    def record_step(
        self,
        step: DoStep,
        n: int,
        outcome: str,
        *,
        value: str | None = None,
        error: dict[str, Any] | None = None,
    ) -> Record:
        """Record an execution of a step: `n` 0 for the final outcome."""
        return self.record(step.path, n, "step", step.step.name, outcome, value, error, step.fingerprint)

    def record_interruption(self, step: DoStep, error: dict[str, Any] | None = None) -> Record:
        """Record that an execution never answered."""
        return self.record_step(step, len(self.executions(step)) + 1, "interrupted", error=error)

    def record_sleep(self, path: Path) -> Record:
        """Record that a sleep is over."""
        return self.record(path, 0, "sleep", "sleep", "completed")

    def record_cancellation(self) -> Record:
        """Record that the run was cancelled."""
        return self.record((), 2, "cancel", self.claim.workflow, "cancelled")

    def record_deadline(self) -> Record:
        """Record that the run's deadline has passed, which ends the run as a cancellation does."""
        return self.record((), 2, "cancel", self.claim.workflow, "cancelled", error=_deadline_fault())

    def record_patch(self, number: int, name: str) -> Record:
        """Record that the run takes the way of a patch."""
        return self.record((0, number), 0, "patch", name, "completed")

    def record(
        self,
        path: Path,
        n: int,
        kind: str,
        name: str,
        outcome: str,
        value: str | None = None,
        error: dict[str, Any] | None = None,
        fingerprint: int | None = None,
    ) -> Record:
        at = self._last_at = self.now()
        return Record(
            path, n, kind, name, outcome, value, error, fingerprint, at, self._seq + 1, self.claim.epoch
        )

    # -- writing

    def writing(self, turn: Turn) -> Writing | None:
        """Return what has to be written for a turn; None for a step that may start without.

        Only a careful step is moved to before it starts: it matters whether it had started.
        """
        decision = turn.decision
        if type(decision) is DoStep:  # first of all, and cheaper than a match
            if (
                not turn.records
                and not turn.extras
                and (not decision.step.is_careful or self.doing == decision.path)
            ):
                return None
            return self.move(turn, decision.path)
        match decision:
            case Park() | Spread() | Settle():
                return self._parking(turn, decision)
            case Finish() | Fail() | Block() | Cancel():
                return self._ending(turn, decision)
            case Release():
                return self._transition("release", turn)
            case Done():
                return self._transition("done", turn)
            case Hold():
                return self._transition("hold", turn)
            case Continue(given):
                anew = Continued(input=msgspec.Raw(given.encode()))
                return self._transition("continue", turn, more=(anew,))
            case Sleep() | DoStep() | Await():
                raise AssertionError("a wait is prepared before it is written, a step was seen to above")
            case _:
                assert_never(decision)

    def move(self, turn: Turn, path: Path) -> Writing:
        """Return the transition that keeps the claim, at `path`."""
        return self._transition("move", turn, doing=path)

    def applied(self, writing: Writing) -> None:
        """Take note that the database has applied a writing."""
        self._position += 1
        self._seq += len(writing.records)
        self.driven = self._seq
        self.interrupted = False
        self._due_at = None
        if writing.transition.doing is not None:
            self.doing = tuple(writing.transition.doing)

    def _transition(
        self,
        then: Then,
        turn: Turn,
        *,
        doing: Path | None = None,
        delay: float | None = None,
        until: datetime | None = None,
        awaits: tuple[str, ...] | None = None,
        ended: Record | None = None,
        end: EndRow | None = None,
        more: tuple[Extra, ...] = (),
    ) -> Writing:
        claim = self.claim
        rows = [_row(record) for record in turn.records]
        if ended is not None:
            rows.append(_row(ended))
        transition = Transition(
            claim.task, claim.attempt, self._position, claim.run_id, claim.epoch, then, claim.wakeups, doing,
            delay, until, self._seq, turn.strict, claim.parent, awaits, turn.took,
        )  # fmt: skip
        if claim.parent is not None:
            transition.doing = claim.path  # a part of the fence
        if self.cancelled:
            transition.cancelled = True
        if turn.asides:
            transition.asides = turn.asides
        family = then == "continue" or (end is not None and (self.branched or claim.awaited))
        writing = Writing(transition, rows, end, (*turn.extras, *more) if more else turn.extras, family)
        return writing if self._seals is None else self._seals.sealed(writing)

    def _parking(self, turn: Turn, decision: Park | Spread | Settle) -> Writing:
        match decision:
            case Park(path, seconds, until):
                return self._transition("park", turn, doing=path, delay=seconds, until=until)
            case Spread(path, awaits, seconds, until):
                return self._transition("park", turn, doing=path, delay=seconds, until=until, awaits=awaits)
            case Settle():
                return self._transition("park", turn, doing=self.doing)

    def _ending(self, turn: Turn, decision: Finish | Fail | Block | Cancel) -> Writing:
        if isinstance(decision, Block) and self.claim.parent is not None:
            reason = {**decision.error, "reason": decision.reason}
            return self._transition("hold", turn, more=(Stopping(epoch=self.claim.epoch, reason=reason),))
        match decision:
            case Finish(value):
                end = EndRow("succeeded", msgspec.Raw(value.encode()))
            case Fail(error):
                end = EndRow("failed", None, error)
            case Block(why, error):
                end = EndRow("blocked", None, {**error, "reason": why})
            case Cancel():
                end = EndRow("cancelled")
        ended = self.record((), 0, "run", self.claim.workflow, end.state, error=end.error)
        return self._transition("finish", turn, ended=ended, end=end)


def with_earlier(step: DoStep, record: Record) -> DoStep:
    """Return the execution with one more that came before it."""
    return msgspec.structs.replace(step, earlier=(*step.earlier, record))


def _deadline_fault() -> dict[str, Any]:
    return encode_fault(DeadlineExceeded("the run's deadline has passed"))


def _row(record: Record) -> RecordRow:
    value = None if record.value is None else msgspec.Raw(record.value.encode())
    return RecordRow(
        record.path, record.n, record.kind, record.name, record.outcome, record.at, value, record.error,
        record.fingerprint,
    )  # fmt: skip
