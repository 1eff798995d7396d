"""Recorded histories against the code as it is now: would a replay be blocked?

A `RecordedRun` is one line of an export: the run, its input and its history, their JSON as it was recorded. To
rehearse it is to drive the body through what is recorded, as a worker would, and to throw away what it decides next.
Pure, as the driver is: nothing is executed and nothing written.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from outbox.errors import HistoryMismatch
from worker.replay.decisions import Block
from worker.replay.driver import Replay
from worker.replay.guards import UNGUARDED, Guard
from worker.replay.records import Path, Record, RunFacts, began_at, visible

if TYPE_CHECKING:
    from worker.definitions import Workflow


class RecordedCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """One record of a history, as an export holds it."""

    path: Path
    n: int
    kind: str
    name: str
    outcome: str
    at: datetime
    seq: int
    epoch: int = 0
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # left out: none; null is a value
    error: dict[str, Any] | None = None
    fingerprint: int | None = None

    @classmethod
    def of(cls, record: Record) -> RecordedCall:
        """Return what an export holds of a record."""
        value = msgspec.UNSET if record.value is None else msgspec.Raw(record.value.encode())
        return cls(
            record.path, record.n, record.kind, record.name, record.outcome, record.at, record.seq, record.epoch,
            value, record.error, record.fingerprint,
        )  # fmt: skip

    def to_record(self) -> Record:
        """Return the record."""
        value = None if isinstance(self.value, msgspec.UnsetType) else bytes(self.value).decode()
        return Record(
            self.path, self.n, self.kind, self.name, self.outcome, value, self.error, self.fingerprint, self.at,
            self.seq, self.epoch,
        )  # fmt: skip


class RecordedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run with all that is recorded of it. `state` is open, blocked, or how it has ended."""

    id: UUID
    workflow: str
    version: str = ""
    state: str
    created_at: datetime
    epoch: int = 0
    key_epoch: int = 0
    seed: UUID | None = None
    labels: dict[str, Any] = {}
    input: msgspec.Raw
    history: Sequence[RecordedCall]

    @property
    def claimed_as(self) -> str:
        """What a worker has to know to take the run: its workflow, and behind an @ its version if it has one."""
        return f"{self.workflow}@{self.version}" if self.version else self.workflow


class Mismatch(msgspec.Struct, frozen=True):
    """Why a run would be blocked. `expected` is what its history has, `got` what the body came to, where known."""

    run: UUID
    workflow: str
    state: str
    reason: str
    message: str
    expected: str | None = None
    got: str | None = None


def rehearse(run: RecordedRun, workflow: Workflow[..., Any], *, guard: Guard = UNGUARDED) -> Mismatch | None:
    """Drive `workflow` through the history of `run`; return why that would block it, None if it would not."""
    facts = RunFacts(
        run.id, run.workflow, run.created_at, run.seed or run.id, run.epoch, run.labels, run.key_epoch
    )
    try:
        recorded = [call.to_record() for call in run.history]
        history = visible(recorded)
    except HistoryMismatch as error:
        return Mismatch(
            run.id, run.workflow, run.state, "history mismatch", str(error), error.expected, error.got
        )
    replay = Replay(
        workflow, bytes(run.input).decode(), facts, history, began_at=began_at(recorded), guard=guard
    )
    try:
        decision = replay.start()
    finally:
        replay.close()
    if not isinstance(decision, Block):
        return None
    details = decision.error.get("data") or {}
    return Mismatch(
        run.id, run.workflow, run.state, decision.reason, str(decision.error.get("message", "")),
        details.get("expected"), details.get("got"),
    )  # fmt: skip
