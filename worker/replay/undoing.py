"""What has to be undone when a run fails or is cancelled: its completed steps, the last one first.

The undo of a step is a step itself. It is called with the arguments of the step by their names, and with its result in
the one parameter that has another name, if there is one: all as JSON, as they were recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from worker.replay.calls import Call, StepCall, UndoCall
from worker.replay.records import Path, Record

if TYPE_CHECKING:
    from worker.context import Drive


class Undoing:
    """The completed steps of a run that can be undone, and those that may still complete unwatched."""

    __slots__ = ("_completed", "_unwatched")

    def __init__(self) -> None:
        self._completed: list[tuple[int, Path, StepCall, str]] = []
        self._unwatched: dict[Path, StepCall] = {}

    def completed(self, call: Call, record: Record) -> None:
        """Take note of a completed call."""
        if isinstance(call, StepCall) and call.step.undo is not None:
            self._completed.append((record.seq, record.path, call, record.value or "null"))

    def unwatched(self, path: Path, call: Call) -> None:
        """Take note of a call that nobody waits for any more, though it may be executed right now."""
        if isinstance(call, StepCall) and call.step.undo is not None:
            self._unwatched[path] = call

    def unsettled(self) -> tuple[Path, ...]:
        """Return the calls of which it has to be known how they end."""
        return tuple(self._unwatched)

    def calls(self, drive: Drive, ignored: Iterable[Record]) -> list[tuple[Path, UndoCall]]:
        """Return the undo of each completed step with its path, the last one first."""
        for record in ignored:
            call = self._unwatched.get(record.path)
            if call is not None and record.n == 0 and record.outcome == "completed":
                self.completed(call, record)
        backwards = sorted(self._completed, key=lambda each: each[0], reverse=True)
        return [((*path, 0), _undo_of(drive, call, value)) for _, path, call, value in backwards]


def _undo_of(drive: Drive, call: StepCall, value: str) -> UndoCall:
    undo = call.step.undo
    assert undo is not None
    given: dict[str, msgspec.Raw] = msgspec.json.decode(call.arguments, type=dict[str, msgspec.Raw])
    known = set(call.step.signature.parameters)
    taken = {
        name: given[name] if name in known else msgspec.Raw(value.encode())
        for name in undo.signature.parameters
        if name in given or name not in known
    }
    return UndoCall(drive, undo, msgspec.json.encode(taken).decode())
