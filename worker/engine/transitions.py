"""Transitions: what a claimant asks the database to write, and how it travels.

A transition is one fenced write on one claimed task: what happened (`records`), and what becomes of the task
(`then`). Values are JSON text already and are spliced in as they are. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from typing import Any, Literal
from uuid import UUID

import msgspec

from worker.engine.claims import Claim

Then = Literal["move", "park", "release", "finish", "wake", "done", "hold", "continue"]
EndState = Literal["succeeded", "failed", "cancelled", "blocked"]

ROW_BYTES = 400
"""What a row weighs on the wire beside its payload, roughly."""


class RecordRow(msgspec.Struct, omit_defaults=True, gc=False):
    """One row for the outbox, as `flush_v1` reads it. `i` and `k` are set when it is sent.

    `i` is the place of the transition that it belongs to, which says of which run and epoch it is.
    """

    path: Sequence[int]
    n: int
    kind: str
    name: str
    outcome: str
    at: datetime
    value: msgspec.Raw | None = None
    error: dict[str, Any] | None = None
    fingerprint: int | None = None
    i: int = 0
    k: int = 0


class EndRow(msgspec.Struct, omit_defaults=True, gc=False):
    """How the run of transition `i` ends, as `flush_v1` reads it."""

    state: EndState
    output: msgspec.Raw | None = None
    error: dict[str, Any] | None = None
    i: int = 0


class Extra(msgspec.Struct, omit_defaults=True, gc=False):
    """One thing that few transitions have, as `spread_v1` reads it: each class is a list there. `i` is set when sent."""

    i: int = 0


class TaskRow(Extra, omit_defaults=True, gc=False, kw_only=True):
    """A call that becomes a task of its own, or the window of a map."""

    kind: Literal["step", "timer", "window"]
    path: Sequence[int]
    name: str
    queue: str | None = None
    args: msgspec.Raw | None = None
    delay: float | None = None
    until: datetime | None = None
    wakes: int = 0
    held: bool = False
    windowed: bool = False
    released: int = 0


class ChildRow(Extra, omit_defaults=True, gc=False, kw_only=True):
    """A run that the body has called, or begun."""

    path: Sequence[int]
    workflow: str
    version: str
    queue: str
    input: msgspec.Raw
    counted: bool = False
    detached: bool = False
    begun: bool = False
    deadline: float | None = None
    trace: str | None = None


class Dropped(Extra, omit_defaults=True, gc=False, kw_only=True):
    """Nobody waits any more for the calls at and below `path`."""

    path: Sequence[int]


class Settled(Extra, omit_defaults=True, gc=False, kw_only=True):
    """Wait for those calls at and below `path` that nobody waited for any more and that somebody still executes."""

    path: Sequence[int]


class Taken(Extra, omit_defaults=True, gc=False, kw_only=True):
    """A signal that is recorded, and thereby taken."""

    signal: int


class StateRow(Extra, omit_defaults=True, gc=False, kw_only=True):
    """What the run shows of itself under `key`."""

    key: str
    value: msgspec.Raw


class EmittedRow(Extra, omit_defaults=True, gc=False, kw_only=True):
    """The nth value that the run has emitted in its epoch."""

    n: int
    name: str
    value: msgspec.Raw


class Stopping(Extra, omit_defaults=True, gc=False, kw_only=True):
    """The run of this step is to be blocked."""

    epoch: int
    reason: dict[str, Any]


class Continued(Extra, omit_defaults=True, gc=False, kw_only=True):
    """The run starts anew with this input."""

    input: msgspec.Raw


_LISTS: dict[type[Extra], str] = {
    TaskRow: "tasks",
    ChildRow: "children",
    Dropped: "dropped",
    Settled: "settled",
    Taken: "taken",
    StateRow: "states",
    EmittedRow: "emitted",
    Stopping: "stopping",
    Continued: "continued",
}


class Transition(msgspec.Struct, omit_defaults=True, gc=False):
    """One transition, as `flush_v1` reads it, with its fence: (task, attempt, the flushing worker, position).

    `seen` is the seq of the history that the drive knew; `strict`: apply only if that was all of it. `parent` is the
    run's own task where this one is that of a call, and `doing` its path then. `records` and `i` are set when it is sent.
    """

    task: int
    attempt: int
    position: int
    run_id: UUID
    epoch: int
    then: Then
    wakeups: int
    doing: Sequence[int] | None = None
    delay: float | None = None
    until: datetime | None = None
    seen: int = -1
    strict: bool = False
    parent: int | None = None
    awaits: Sequence[str] | None = None
    took: int = 0
    asides: int = 0
    cancelled: bool | None = None
    records: int | None = None
    i: int | None = None


class Writing(msgspec.Struct, frozen=True, gc=False):
    """A transition with what belongs to it. `family`: the run has parents or tasks that its end concerns."""

    transition: Transition
    records: Sequence[RecordRow] = ()
    end: EndRow | None = None
    extras: Sequence[Extra] = ()
    family: bool = False

    def size(self) -> int:
        """Return about how many bytes it takes on the wire."""
        size = ROW_BYTES
        for record in self.records:
            size += ROW_BYTES
            if record.value is not None:
                size += len(record.value)
        if self.end is not None and self.end.output is not None:
            size += len(self.end.output)
        for extra in self.extras:
            size += ROW_BYTES + _payload_size(extra)
        return size


class _TimerRecord(msgspec.Struct):
    kind: str
    name: str
    outcome: str
    error: dict[str, Any] | None = None


def applied_wake(claim: Claim) -> Writing:
    """Return what applies a wake task to its run."""
    return Writing(
        Transition(claim.task, claim.attempt, claim.position, claim.run_id, claim.epoch or 0, "wake", 0)
    )


def applied_timer(claim: Claim) -> Writing:
    """Return what ends a timer that is due: its record is in its arguments."""
    said = msgspec.json.decode(claim.args or "", type=_TimerRecord)
    record = RecordRow(claim.path, 0, said.kind, said.name, said.outcome, claim.now, error=said.error)
    transition = Transition(
        claim.task, claim.attempt, claim.position, claim.run_id, claim.epoch, "done", 0, claim.path,
        parent=claim.parent,
    )  # fmt: skip
    return Writing(transition, (record,))


class Verdict(Enum):
    """What the database did with a transition."""

    FENCED = 0
    APPLIED = 1
    ALREADY = 2
    BEHIND = 3


_encode = msgspec.json.Encoder().encode


Documents = tuple[str, str, str, str | None]
"""What `flush_v1` takes: transitions, records, ends, extras."""


def encode(batch: Sequence[Writing]) -> Documents:
    """Return the JSON documents of `flush_v1` for a batch."""
    records: list[RecordRow] = []
    ends: list[EndRow] = []
    extras: dict[str, list[Extra]] | None = None
    for i, writing in enumerate(batch, 1):
        writing.transition.i = i
        writing.transition.records = len(writing.records)
        for k, record in enumerate(writing.records, 1):
            record.i, record.k = i, k
            records.append(record)
        if writing.end is not None:
            writing.end.i = i
            ends.append(writing.end)
        if writing.extras or writing.family:
            extras = {} if extras is None else extras
            for extra in writing.extras:
                extra.i = i
                extras.setdefault(_LISTS[type(extra)], []).append(extra)
    return (
        _encode([w.transition for w in batch]).decode(),
        _encode(records).decode(),
        _encode(ends).decode(),
        None if extras is None else _encode(extras).decode(),
    )


def _payload_size(extra: Extra) -> int:
    match extra:
        case (
            TaskRow(args=payload)
            | ChildRow(input=payload)
            | StateRow(value=payload)
            | EmittedRow(value=payload)
        ):
            return 0 if payload is None else len(payload)
        case _:
            return 0


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The database's answer. `refused` is its message when it refused the data of this transition."""

    verdict: Verdict
    cancelling: bool = False
    pausing: bool = False
    refused: str | None = None


_RECEIPTS = {
    verdict.value + 4 * cancelling + 8 * pausing: Receipt(verdict, cancelling, pausing)
    for verdict in Verdict
    for cancelling in (False, True)
    for pausing in (False, True)
}


def receipt_of(code: int) -> Receipt:
    """Return what an answer of `flush_v1` says of one transition."""
    return _RECEIPTS[code]
