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

Then = Literal["move", "park", "release", "finish", "wake"]
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


class Transition(msgspec.Struct, omit_defaults=True, gc=False):
    """One transition, as `flush_v1` reads it, with its fence: (task, attempt, the flushing worker, position).

    `records` and `i` are set when it is sent.
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
    records: int | None = None
    i: int | None = None


class Writing(msgspec.Struct, frozen=True, gc=False):
    """A transition with what belongs to it."""

    transition: Transition
    records: Sequence[RecordRow] = ()
    end: EndRow | None = None

    def size(self) -> int:
        """Return about how many bytes it takes on the wire."""
        size = ROW_BYTES
        for record in self.records:
            size += ROW_BYTES
            if record.value is not None:
                size += len(record.value)
        if self.end is not None and self.end.output is not None:
            size += len(self.end.output)
        return size


class Verdict(Enum):
    """What the database did with a transition."""

    FENCED = 0
    APPLIED = 1
    ALREADY = 2


_encode = msgspec.json.Encoder().encode


def encode(batch: Sequence[Writing]) -> tuple[str, str, str]:
    """Return the three JSON documents of `flush_v1` for a batch: transitions, records, ends."""
    records: list[RecordRow] = []
    ends: list[EndRow] = []
    for i, writing in enumerate(batch, 1):
        writing.transition.i = i
        writing.transition.records = len(writing.records)
        for k, record in enumerate(writing.records, 1):
            record.i, record.k = i, k
            records.append(record)
        if writing.end is not None:
            writing.end.i = i
            ends.append(writing.end)
    return _encode([w.transition for w in batch]).decode(), _encode(records).decode(), _encode(ends).decode()


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The database's answer. `refused` is its message when it refused the data of this transition."""

    verdict: Verdict
    cancelling: bool = False
    refused: str | None = None


_RECEIPTS = {
    verdict.value + 4 * cancelling: Receipt(verdict, cancelling)
    for verdict in Verdict
    for cancelling in (False, True)
}


def receipt_of(code: int) -> Receipt:
    """Return what an answer of `flush_v1` says of one transition."""
    return _RECEIPTS[code]
