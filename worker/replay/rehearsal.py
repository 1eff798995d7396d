"""Recorded histories against the code as it is now: would a replay be blocked?

A `RecordedRun` is one line of an export: the run, its input and its history, their JSON as it was recorded. To
rehearse it is to drive the body through what is recorded, as a worker would, and to throw away what it decides next.
Pure, as the driver is: nothing is executed and nothing written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from outbox.errors import HistoryMismatch
from worker.replay.decisions import Block, Drift
from worker.replay.driver import Replay
from worker.replay.guards import UNGUARDED, Guard
from worker.replay.records import Path, Record, RunFacts, began_at, dotted, visible

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
    """Why a run would be blocked, or, with `drift`, that it would only be told of: a call with other arguments.

    `expected` is what its history has, `got` what the body came to, where known; `arguments`, their JSON, are those that
    the body has now. What was recorded are not the arguments but their fingerprint.
    """

    run: UUID
    workflow: str
    state: str
    reason: str
    message: str
    expected: str | None = None
    got: str | None = None
    arguments: str | None = None
    drift: bool = False


def rehearse(run: RecordedRun, workflow: Workflow[..., Any], *, guard: Guard = UNGUARDED) -> Mismatch | None:
    """Drive `workflow` through the history of `run`; return what is wrong with that, None if it fits.

    A run that would be blocked is told as such, whether or not it drifts as well. Whatever else comes out of a drive
    is a mismatch of this run, so that the others are still rehearsed.
    """
    try:
        return _rehearsed(run, workflow, guard)
    except HistoryMismatch as error:
        return _mismatch(run, "history mismatch", str(error), error.expected, error.got)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - user code was driven, and our control flow is no Exception
        return _mismatch(run, "it could not be rehearsed", f"{type(error).__name__}: {error}")


def _rehearsed(run: RecordedRun, workflow: Workflow[..., Any], guard: Guard) -> Mismatch | None:
    block, drifts = _driven(run, workflow, guard)
    if block is None and drifts:
        # Once more, to the first call that drifts: as one that stops there, the drive names the line.
        stopped, _ = _driven(run, _strict(workflow), guard)
        return _drifting(run, drifts, "" if stopped is None else str(stopped.error.get("message", "")))
    if block is None:
        return None
    details = block.error.get("data") or {}
    message = str(block.error.get("message", ""))
    return _mismatch(run, block.reason, message, details.get("expected"), details.get("got"))


def _driven(
    run: RecordedRun, workflow: Workflow[..., Any], guard: Guard
) -> tuple[Block | None, Sequence[Drift]]:
    """Drive a body; return why that would block its run, if it would, and its drifts. Raises HistoryMismatch."""
    facts = RunFacts(
        run.id, run.workflow, run.created_at, run.seed or run.id, run.epoch, run.labels, run.key_epoch
    )
    recorded = [call.to_record() for call in run.history]
    replay = Replay(
        workflow,
        bytes(run.input).decode(),
        facts,
        visible(recorded),
        began_at=began_at(recorded),
        guard=guard,
    )
    try:
        decision = replay.start()
    finally:
        replay.close()
    return (decision if isinstance(decision, Block) else None), replay.drifts


def _strict(workflow: Workflow[..., Any]) -> Workflow[..., Any]:
    strict = copy.copy(workflow)
    strict.strict = True
    return strict


def _drifting(run: RecordedRun, drifts: Sequence[Drift], message: str) -> Mismatch:
    first, more = drifts[0], len(drifts) - 1
    call = f"step {first.name} at {dotted(first.path)}"
    if more:
        message += f"; so does it in {more:,} later {'call' if more == 1 else 'calls'}"
    return Mismatch(
        run.id, run.workflow, run.state, "would drift", message, f"{call}, arguments {_shown(first.recorded)}",
        f"{call}, arguments {_shown(first.computed)}", first.arguments, drift=True,
    )  # fmt: skip


def _shown(fingerprint: int) -> str:
    return f"#{fingerprint & (1 << 64) - 1:016x}"


def _mismatch(
    run: RecordedRun, reason: str, message: str, expected: str | None = None, got: str | None = None
) -> Mismatch:
    return Mismatch(run.id, run.workflow, run.state, reason, message, expected, got)
