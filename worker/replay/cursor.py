"""Where a drive stands in its history: what has been delivered, and what still must be."""

from __future__ import annotations

from collections.abc import Iterable

from outbox.errors import HistoryMismatch
from worker.replay.frames import calling_line
from worker.replay.records import VOIDED, Path, Record, dotted


class Cursor:
    """The history of one run, delivered in the order in which it happened.

    A body has to make the recorded calls, each at its place: whatever else it does raises HistoryMismatch.
    """

    __slots__ = ("_earlier", "_finals", "_next")

    def __init__(self, history: Iterable[Record]) -> None:
        self._finals: list[Record] = []
        self._earlier: dict[Path, list[Record]] = {}
        self._next = 0
        for record in history:
            if record.kind in ("run", "epoch"):
                continue
            if record.n == 0:
                self._finals.append(record)
            else:
                self._earlier.setdefault(record.path, []).append(record)

    def final(self, path: Path, kind: str, name: str) -> Record | None:
        """Return the final record of a call, which has to be the next one, or None when all are delivered."""
        if self._next == len(self._finals):
            return None
        record = self._finals[self._next]
        if record.path != path or not _fits(record, kind, name):
            raise mismatch(described(record), f"{_call(kind, name)} at {dotted(path)}")
        self._next += 1
        if self._earlier:
            self._earlier.pop(path, None)
        return record

    def executions(self, path: Path, kind: str, name: str) -> tuple[Record, ...]:
        """Return the executions of a call that has no final record. It is the last call that is recorded at all."""
        if not self._earlier:
            return ()
        here = self._earlier.pop(path, [])
        mine = tuple(record for record in here if _fits(record, kind, name))
        strange = next((record for record in here if record not in mine and record.outcome != VOIDED), None)
        left = strange or self.left_over()
        if left is not None:
            raise mismatch(described(left), f"{_call(kind, name)} at {dotted(path)}")
        return mine

    def left_over(self) -> Record | None:
        """Return a record that no call has asked for. A voided one may remain: the body may go another way now."""
        if self._next < len(self._finals):
            return self._finals[self._next]
        executions = (record for records in self._earlier.values() for record in records)
        return next((record for record in executions if record.outcome != VOIDED), None)


def mismatch(expected: str, got: str, line: str | None = None) -> HistoryMismatch:
    """Return the error that names both sides, and the line that the body has come to or the one given."""
    return HistoryMismatch(
        f"{line or calling_line()}: the history has {expected}, but the body came to {got}",
        expected=expected,
        got=got,
    )


def described(record: Record) -> str:
    """Return a record as messages name it."""
    return f"{_call(record.kind, record.name)} at {dotted(record.path)} ({record.outcome})"


def _fits(record: Record, kind: str, name: str) -> bool:
    return record.kind == kind and (kind != "step" or record.name == name)


def _call(kind: str, name: str) -> str:
    return f"{kind} {name}" if kind == "step" else kind
