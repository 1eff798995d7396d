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
from worker.engine.transitions import EndRow, EndState, RecordRow, Then, Transition, Writing
from worker.replay.decisions import Block, Decision, DoStep, Fail, Finish, Sleep
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


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """End the run as cancelled."""


class Turn(msgspec.Struct, frozen=True, gc=False):
    """What to do next, what has to be durable before, and whether it is."""

    decision: Decision | Park | Release | Cancel
    records: tuple[Record, ...] = ()
    wait_seconds: float = 0.0
    written: bool = False


class Standing:
    """Where one claim stands. `history` is everything recorded of the run, this claim's own records included.

    `claimed_at` is this process's monotonic time of the claim. `doing` is the call that the task row is at,
    `due_in` how long it still had to wait there when it was claimed, `interrupted` whether the claim before died
    without a record of it.
    """

    def __init__(self, claim: Claim, history: list[Record], claimed_at: float) -> None:
        self.claim = claim
        self.history = history
        self.facts = RunFacts(
            id=claim.run_id,
            workflow=claim.name,
            created_at=claim.created_at,
            seed=claim.run_id,
            epoch=claim.epoch,
            labels={} if claim.labels is None else msgspec.json.decode(claim.labels),
        )
        self.doing: Path | None = None if claim.doing is None else tuple(claim.doing)
        self.interrupted = claim.interrupted
        self._due_at = None if claim.due_in is None else claimed_at + claim.due_in
        self._position = claim.position
        self._seq = claim.seq
        self._claimed_at = claimed_at
        self._last_at = history[-1].at if history else claim.created_at
        self._deadline = None if claim.deadline_in is None else claimed_at + claim.deadline_in

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
        """Return the seconds until the run's deadline, None if it has none."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def deadline_passed(self) -> Fail | None:
        """Return the end of the run when its deadline has passed."""
        if self._deadline is None or self._deadline > time.monotonic():
            return None
        return Fail(encode_fault(DeadlineExceeded("the run's deadline has passed")))

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
        return self._record(step.path, n, "step", step.step.name, outcome, value, error, step.fingerprint)

    def record_interruption(self, step: DoStep, error: dict[str, Any] | None = None) -> Record:
        """Record that an execution never answered."""
        return self.record_step(step, len(self.executions(step)) + 1, "interrupted", error=error)

    def record_sleep(self, path: Path) -> Record:
        """Record that a sleep is over."""
        return self._record(path, 0, "sleep", "sleep", "completed")

    def _record(
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
            if not turn.records and (not decision.step.is_careful or self.doing == decision.path):
                return None
            return self.move(turn, decision.path)
        match decision:
            case Park() as park:
                return self._transition("park", turn, doing=park.path, delay=park.seconds, until=park.until)
            case Release():
                return self._transition("release", turn)
            case Finish() as finish:
                return self._ending(turn, "succeeded", output=msgspec.Raw(finish.value.encode()))
            case Fail() as fail:
                return self._ending(turn, "failed", error=fail.error)
            case Block() as block:
                return self._ending(turn, "blocked", error={**block.error, "reason": block.reason})
            case Cancel():
                return self._ending(turn, "cancelled")
            case Sleep() | DoStep():
                raise AssertionError("a sleep is prepared before it is written, a step was seen to above")
            case _:
                assert_never(decision)

    def move(self, turn: Turn, path: Path) -> Writing:
        """Return the transition that keeps the claim, at `path`."""
        return self._transition("move", turn, doing=path)

    def applied(self, turn: Turn, writing: Writing) -> None:
        """Take note that the database has applied a writing of this turn."""
        self._position += 1
        self._seq += len(writing.records)
        self.interrupted = False
        self._due_at = None
        self.history.extend(turn.records)
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
        ended: Record | None = None,
        end: EndRow | None = None,
    ) -> Writing:
        claim = self.claim
        rows = [_row(record) for record in turn.records]
        if ended is not None:
            rows.append(_row(ended))
        transition = Transition(
            claim.task, claim.attempt, self._position, claim.run_id, claim.epoch, then, claim.wakeups, doing,
            delay, until,
        )  # fmt: skip
        return Writing(transition, rows, end)

    def _ending(
        self,
        turn: Turn,
        state: EndState,
        *,
        output: msgspec.Raw | None = None,
        error: dict[str, Any] | None = None,
    ) -> Writing:
        claim = self.claim
        ended = self._record((), 0, "run", claim.name, state, error=error)
        end = EndRow(state, output, error)
        return self._transition("finish", turn, ended=ended, end=end)


def _row(record: Record) -> RecordRow:
    value = None if record.value is None else msgspec.Raw(record.value.encode())
    return RecordRow(
        record.path, record.n, record.kind, record.name, record.outcome, record.at, value, record.error,
        record.fingerprint,
    )  # fmt: skip
