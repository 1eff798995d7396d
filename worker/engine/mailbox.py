"""What was sent to a run, and is taken by its calls: signals, and the results of its children.

Each is taken once, by the flush that records it, first in first out for each name. Pure: it is handed what was read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from outbox.sealing import NO_KEYS, Keyring
from worker.engine.claims import Mail
from worker.engine.transitions import Dropped, Extra, Taken
from worker.engine.turns import Standing
from worker.replay.decisions import Await, AwaitChild, TakeSignal, Wait
from worker.replay.driver import Replay
from worker.replay.records import Record, dotted

CHILD = "stepwell:child:"
"""What stands before the path of the call in the name under which a child's result is sent."""


class TakenMail(NamedTuple):
    """What was taken, how many: the records of it, and what the flush has to do besides."""

    records: tuple[Record, ...]
    extras: tuple[Extra, ...]
    signals: int


class _Result(msgspec.Struct):
    run: str
    state: str
    output: msgspec.Raw = msgspec.Raw(b"null")
    error: dict[str, Any] | None = None


_Opened = str | _Result
"""The payload of a signal as JSON text, or the result of a child."""


class Mailbox:
    """What was sent to one run and is not taken yet, sealed or not."""

    def __init__(self, mail: Iterable[Mail], keyring: Keyring = NO_KEYS) -> None:
        self._keyring = keyring
        self._mail: dict[str, deque[Mail]] = {}
        for each in mail:
            self._mail.setdefault(each.name, deque()).append(each)

    def take(self, awaiting: Await, standing: Standing, replay: Replay) -> TakenMail:
        """Hand the body what has come, in the order in which it came, and the time-out that is over.

        What one takes may end the wait of another, which then takes nothing. Raises PayloadError for what cannot be
        opened, before it has handed anything.
        """
        found: list[tuple[Mail, Wait, _Opened]] = []
        for wait in awaiting.waits:
            waiting = self._mail.get(_name_of(wait)) if self._mail else None
            if waiting:
                found.append((waiting[0], wait, _opened(waiting[0], wait, self._keyring)))
                waiting.popleft()
        records: list[Record] = []
        extras: list[Extra] = []
        for mail, wait, opened in sorted(found, key=lambda each: each[0].id):
            if not replay.waits_for(wait.call.path):
                self._mail[mail.name].appendleft(mail)
                continue
            record = _record(opened, wait, standing)
            replay.hand(record)
            records.append(record)
            extras.append(Taken(signal=mail.id))
            if isinstance(wait.call, TakeSignal) and wait.call.seconds is not None:
                extras.append(Dropped(path=wait.call.path))
        if not records and (late := _timed_out(awaiting, standing)) is not None:
            replay.hand(late)
            records.append(late)
        taken = sum(isinstance(extra, Taken) for extra in extras)
        return TakenMail(tuple(records), tuple(extras), taken)


def _name_of(wait: Wait) -> str:
    match wait.call:
        case TakeSignal(name=name):
            return name
        case AwaitChild(of=of):
            return f"{CHILD}{dotted(of)}"
        case _:
            return ""


def _opened(mail: Mail, wait: Wait, keyring: Keyring) -> _Opened:
    call = wait.call
    if isinstance(call, TakeSignal):
        return keyring.open(mail.payload, "signal", call.name, where=f"the payload of signal {call.name!r}")
    assert isinstance(call, AwaitChild)
    result = msgspec.json.decode(mail.payload, type=_Result)
    name, output = call.workflow.name, bytes(result.output).decode()
    result.output = msgspec.Raw(
        keyring.open(output, "output", name, where=f"the result of workflow {name!r}").encode()
    )
    if result.error is not None:
        result.error = keyring.open_fault(result.error, where=f"the error of workflow {name!r}")
    return result


def _record(result: _Opened, wait: Wait, standing: Standing) -> Record:
    call = wait.call
    if isinstance(result, str):
        assert isinstance(call, TakeSignal)
        return standing.record(call.path, 0, "signal", call.name, "completed", result)
    assert isinstance(call, AwaitChild)
    if result.state == "succeeded":
        return standing.record(
            call.path, 0, "child", call.workflow.name, "completed", bytes(result.output).decode()
        )
    kind = "RunCancelled" if result.state == "cancelled" else "RunFailed"
    said = (result.error or {}).get("message", "")
    error = {
        "type": kind,
        "message": f"run {result.run} {result.state}{f': {said}' if said else ''}",
        "data": {"run": result.run, "error": result.error},
    }
    return standing.record(call.path, 0, "child", call.workflow.name, "failed", None, error)


def _timed_out(awaiting: Await, standing: Standing) -> Record | None:
    """Return the record of a wait that is over, where the run's own task kept the time."""
    if len(awaiting.waits) != 1 or not isinstance(awaiting.waits[0].call, TakeSignal):
        return None
    call, fresh = awaiting.waits[0].call, awaiting.waits[0].fresh
    left = standing.due_in(call.path)
    if left is None and fresh and call.seconds == 0:
        left = 0.0
    if left is None or left > 0:
        return None
    return standing.record(
        call.path, 0, "signal", call.name, "failed", None, timed_out(call.name, call.seconds)
    )


def timed_out(name: str, seconds: float | None) -> dict[str, Any]:
    """Return the fault of a signal that has not come in time."""
    return {"type": "TimeoutError", "message": f"no signal {name!r} within {seconds or 0:g} s"}
