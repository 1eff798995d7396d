"""The facts that a replay starts from: a run, and what of its history still applies.

Values only: this module reads nothing and decides nothing about the world outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from outbox.errors import HistoryMismatch

Path = tuple[int, ...]

VOIDED = "voided"
"""Outcome of an execution that a retry has voided. It is seen in memory only, never stored: it no longer
counts as a failure, but it did happen, so that `verify` is asked before the step is executed again."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """One row of a run's history.

    `n` is 0 for the final outcome of the call at `path`, else the nth execution of it that failed or was
    interrupted. `value` is the recorded JSON text, `error` the recorded fault.
    """

    path: Path
    n: int
    kind: str
    name: str
    outcome: str
    value: str | None
    error: dict[str, Any] | None
    fingerprint: int | None
    at: datetime
    seq: int = 0
    epoch: int = 0


class RunFacts(msgspec.Struct, frozen=True):
    """What a body may know of its own run; the same in every replay of the epoch.

    `seed` is what the numbers and UUIDs of the body are drawn from, by its text. `key_epoch` is the epoch of the last
    rewind or fresh start: from then on its idempotency keys are others.
    """

    id: UUID
    workflow: str
    created_at: datetime
    seed: UUID | str
    epoch: int = 0
    labels: dict[str, Any] = {}
    key_epoch: int = 0


def dotted(path: Path) -> str:
    """Return the path as people read it: ``3.1.2``."""
    return str(path[0]) if len(path) == 1 else ".".join(map(str, path))


def visible(history: Iterable[Record]) -> list[Record]:
    """Return the records that a replay has to deliver, in the order in which they happened.

    Records of the run itself are left out. Each record that opens an epoch voids what its kind says of
    everything before it. Raises HistoryMismatch for a kind that this release does not know.
    """
    standing: list[Record] = []
    for record in sorted(history, key=_by_seq):
        if record.kind == "epoch":
            standing = _void(standing, record)
        elif record.kind != "run":
            standing.append(record)
    return standing


def began_at(history: Iterable[Record]) -> datetime | None:
    """Return when the history that still counts began, if that is a fresh start; else it is the run's creation."""
    return max((r.at for r in history if r.kind == "epoch" and r.outcome == "continue"), default=None)


def _by_seq(record: Record) -> int:
    return record.seq


def _void(standing: list[Record], opening: Record) -> list[Record]:
    match opening.outcome:
        case "retry":
            return _retried(standing)
        case "resolve":
            return _retried(_without_what_was_said(standing, _step_in(opening)))
        case "rewind":
            return _before(standing, _place_in(opening))
        case "fork":
            return standing
        case "continue":
            return []
        case unknown:
            raise HistoryMismatch(
                f"epoch {opening.epoch} was opened by {unknown!r}, which this release of Stepwell does not know; "
                "let a worker of the newer release take the run",
                expected="retry, resolve, rewind, fork or continue",
                got=unknown,
            )


def _retried(standing: list[Record]) -> list[Record]:
    if any(is_undo(record.path) for record in standing):
        return _void_undo_failures(standing)
    return _void_failures(_without_cancellation(standing))


def _without_what_was_said(standing: list[Record], path: Path) -> list[Record]:
    """Void the result of a step that a person gave: it was no execution, and its successor is recorded next."""
    return [r for r in standing if r.path != path or r.n or r.kind != "step" or r.outcome != "completed"]


def _step_in(opening: Record) -> Path:
    return msgspec.json.decode(opening.value or '{"at":[]}', type=_Step).at


class _Step(msgspec.Struct):
    at: Path


def _without_cancellation(standing: list[Record]) -> list[Record]:
    """Void a cancellation, and what the body did to clean up after it."""
    cancelled = next((at for at, record in enumerate(standing) if record.kind == "cancel"), len(standing))
    return standing[:cancelled]


def _place_in(opening: Record) -> Path:
    return msgspec.json.decode(opening.value or '{"to":[]}', type=_Place).to


class _Place(msgspec.Struct):
    to: Path


def _before(standing: list[Record], path: Path) -> list[Record]:
    """Void the first record at or below a path, and all after it: not even that they happened counts any more."""
    return list(itertools.takewhile(lambda record: record.path[: len(path)] != path, standing))


def _void_undo_failures(standing: list[Record]) -> list[Record]:
    """Void what failed of an undo. Once it has begun there is no way but back, after a cancellation as well."""
    return [_voided(r) if is_undo(r.path) and (r.outcome == "failed" or r.n) else r for r in standing]


def _void_failures(standing: list[Record]) -> list[Record]:
    """Void the failed outcomes that the body did not get past.

    A failure that the body caught and went on from has to stand: what it did next is recorded too, and
    would not fit a history in which that step is executed again afterwards.
    """
    final = {record.path for record in standing if record.n == 0}
    failed = [record.path for record in standing if record.n == 0 and record.outcome == "failed"]
    lasting = {
        record.path
        for record in standing
        if (
            record.outcome != "failed"
            if record.n == 0
            else record.path not in final and record.outcome != VOIDED
        )
    }
    voided = {path for path in failed if not any(_comes_after(other, path) for other in lasting)}
    return [_voided(record) if record.path in voided else record for record in standing]


def is_undo(path: Path) -> bool:
    """Tell whether a path is that of the undo of a call: the call's own, with a 0 behind it."""
    return bool(path) and path[-1] == 0


def _comes_after(other: Path, path: Path) -> bool:
    """Tell whether the body can only have made the call at `other` after the answer of the one at `path`.

    Even positions of a path number calls, odd ones the branches of a join, which do not wait for each other.
    """
    for position, (theirs, ours) in enumerate(zip(other, path, strict=False)):
        if theirs != ours:
            return position % 2 == 0 and theirs > ours
    return False


def _voided(record: Record) -> Record:
    """Return the record as an execution that has happened and does not count: never as a final outcome."""
    return msgspec.structs.replace(record, n=record.n or _AFTER_ALL, outcome=VOIDED)


_AFTER_ALL = 1 << 30
"""The n of a voided final outcome, which came after every counted execution of its path."""
