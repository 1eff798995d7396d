"""Where a drive stands in its history: what has been delivered, and what still must be."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from outbox.errors import HistoryMismatch
from worker.replay.frames import calling_line
from worker.replay.records import VOIDED, Path, Record, dotted, is_undo

if TYPE_CHECKING:
    from worker.replay.calls import Call


class Cursor:
    """The history of one run, delivered in the order in which it happened.

    A body has to make the recorded calls, each at its place: whatever else it does raises HistoryMismatch. What was
    recorded of calls that nobody waits for any more (`drop`) is passed over, and kept in `ignored`.
    """

    __slots__ = ("_dropped", "_earlier", "_finals", "_next", "_results", "ignored", "patches", "spent")

    def __init__(self, history: Iterable[Record]) -> None:
        self.ignored: list[Record] = []
        self.patches: set[str] = set()
        self._finals: list[Record] = []
        self._earlier: dict[Path, list[Record]] = {}
        self._dropped: set[Path] = set()
        self._results: set[Path] | None = None
        self._next = 0
        for record in history:
            if record.kind in ("run", "epoch"):
                continue
            if record.kind == "patch":
                self.patches.add(record.name)
            elif record.n == 0 or record.kind == "cancel":
                self._finals.append(record)
            else:
                self._earlier.setdefault(record.path, []).append(record)
        self.spent = not self._finals and not self._earlier
        """Whether it is known that nothing is left."""

    def peek(self) -> Record | None:
        """Return the next record that somebody has to wait for, None when all are delivered."""
        while self._next < len(self._finals):
            record = self._finals[self._next]
            if not self._dropped or not self._is_dropped(record.path):
                return record
            self.ignored.append(record)
            self._next += 1
        return None

    def take(self) -> Record:
        """Deliver the record that was peeked at."""
        record = self._finals[self._next]
        self._next += 1
        self.concluded(record.path)
        return record

    def take_for(self, path: Path, call: Call, *, alone: bool) -> Record | None:
        """Deliver the next record if it is this call's. If the body waits for this call `alone`, it has to be."""
        record = (
            self.peek()
            if self._dropped
            else self._finals[self._next]
            if self._next < len(self._finals)
            else None
        )
        if record is None or record.kind == "cancel":
            return None
        if record.path != path:
            if alone:
                raise mismatch(described(record), called(call, path))
            return None
        if not fits(record, call):
            raise mismatch(described(record), called(call, path))
        self._next += 1
        if self._earlier:
            self._earlier.pop(path, None)
        return record

    def executions(self, path: Path) -> Sequence[Record]:
        """Return the executions of the call at a path that has no final record."""
        return self._earlier.get(path, ()) if self._earlier else ()

    def concluded(self, path: Path) -> None:
        """Forget the executions of a call that has its final record."""
        if self._earlier:
            self._earlier.pop(path, None)

    def has_result(self, path: Path) -> bool:
        """Tell whether the result of a child is recorded at a path, whether it was delivered or not."""
        if self._results is None:
            self._results = {record.path for record in self._finals if record.kind == "child"}
        return path in self._results

    def drop(self, path: Path) -> None:
        """Pass over what is recorded of the calls at and below a path from here on."""
        self._dropped.add(path)

    def left_over(self, waited_for: Collection[Path] = ()) -> Record | None:
        """Return a record that no call has asked for. A voided one may remain: the body may go another way now."""
        if self.spent:
            return None
        record = self.peek()
        if record is not None and record.kind != "cancel":
            return record
        self.spent = record is None and not self._earlier
        executions = (
            record
            for path, records in self._earlier.items()
            if path not in waited_for and not self._is_dropped(path)
            for record in records
        )
        return next((record for record in executions if record.outcome != VOIDED), None)

    def has_begun_undo(self) -> bool:
        """Tell whether something is recorded of an undo that was not delivered yet."""
        return any(is_undo(record.path) for record in self._finals[self._next :]) or any(
            map(is_undo, self._earlier)
        )

    def _is_dropped(self, path: Path) -> bool:
        if not path or is_undo(path):  # the undo of a call is waited for, whatever has become of the call
            return False
        return any(path[:length] in self._dropped for length in range(1, len(path) + 1))


def mismatch(expected: str, got: str, line: str | None = None) -> HistoryMismatch:
    """Return the error that names both sides, and the line that the body has come to or the one given."""
    return HistoryMismatch(
        f"{line or calling_line()}: the history has {expected}, but the body came to {got}",
        expected=expected,
        got=got,
    )


def described(record: Record) -> str:
    """Return a record as messages name it."""
    return f"{_named(record.kind, record.name)} at {dotted(record.path)} ({record.outcome})"


def called(call: Call, path: Path) -> str:
    """Return a call as messages name it."""
    return f"{_named(call.kind, call.name)} at {dotted(path)}"


def fits(record: Record, call: Call) -> bool:
    """Tell whether a record can be one of a call."""
    return record.kind == call.kind and record.name == call.name


def _named(kind: str, name: str) -> str:
    return kind if kind == name else f"{kind} {name}"
