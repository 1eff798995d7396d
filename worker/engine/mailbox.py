"""What was sent to a run, and is taken by its calls: signals, and the results of its children.

Each is taken once, by the flush that records it, first in first out for each name; a result answers every call that waits
for it. Pure: it is handed what was read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Any, NamedTuple

import msgspec

from outbox.errors import PayloadError
from outbox.sealing import NO_KEYS, Keyring
from worker.engine.claims import Mail
from worker.engine.transitions import Dropped, Extra, Taken
from worker.engine.turns import Standing
from worker.replay.decisions import Asked, Await, AwaitChild, TakeSignal
from worker.replay.driver import Replay
from worker.replay.records import Path, Record, dotted

CHILD = "stepwell:child:"
"""What stands before the path of the call in the name under which a child's result is sent."""


class OversizeError(Exception):
    """The signal `mail`, which is to be taken now, was too large to be read."""

    def __init__(self, mail: Mail) -> None:
        super().__init__(mail.name)
        self.mail = mail


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


_Addressed = TakeSignal | AwaitChild
"""The calls that wait for mail, …"""

_ADDRESSED = ("signal", "child")
"""… and their kinds."""

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

        One at a time, and the oldest that somebody waits for by then: so it makes no difference whether what has come came
        before this look or by and by. What one takes may end the wait of another, which then takes nothing, or have the
        body wait for more. Raises PayloadError for what cannot be opened and OversizeError for what was not read, once
        nothing is to be handed before it.
        """
        records: list[Record] = []
        extras: list[Extra] = []
        waiting = _Waiting(self._mail, replay)
        if self._mail or replay.has_answers():
            for wait in awaiting.waits:
                waiting.add(wait.call.path, wait.call)
        while (found := waiting.oldest()) is not None:
            call, sent = found
            try:
                record = _record(sent, call, standing, self._keyring)
            except (PayloadError, OversizeError):
                if not records:
                    raise
                break  # it is come upon again when what was taken before it is seen to
            waiting.took(call, sent)
            replay.hand(record)
            waiting.look()
            records.append(record)
            if isinstance(sent, Mail):
                extras.append(Taken(signal=sent.id))
            if isinstance(call, TakeSignal) and call.seconds is not None:
                extras.append(Dropped(path=call.path))
        if not records and (late := _timed_out(awaiting, standing)) is not None:
            replay.hand(late)
            records.append(late)
        taken = sum(isinstance(extra, Taken) for extra in extras)
        return TakenMail(tuple(records), tuple(extras), taken)


class _Waiting:
    """The calls that wait for mail, those of one name in their order, and which of it is handed to whom next.

    A child tells its result once: what is recorded of it answers every other call that waits for it, before any mail.
    """

    def __init__(self, mail: dict[str, deque[Mail]], replay: Replay) -> None:
        self._mail = mail
        self._replay = replay
        self._paths: set[Path] = set()
        self._calls: dict[str, deque[_Addressed]] = {}
        self._oldest: list[tuple[int, str]] = []
        self._answered: deque[AwaitChild] = deque()

    def add(self, path: Path, call: Asked) -> None:
        """Take note of a call that the body waits for."""
        self._paths.add(path)
        if not isinstance(call, TakeSignal | AwaitChild):
            return
        name = _name_of(call)
        if isinstance(call, AwaitChild) and self._replay.answer(call.of) is not None:
            self._answered.append(call)
            return
        if isinstance(call, AwaitChild) and self._replay.begins(call.of) and name in self._mail:
            # It is begun again because it had failed, or was cancelled with its parent, and will tell anew.
            self._mail[name] = deque(each for each in self._mail[name] if not _tells_of_failure(each))
        if mail := self._mail.get(name):
            if name not in self._calls:
                self._calls[name] = deque()
                heappush(self._oldest, (mail[0].id, name))
            self._calls[name].append(call)

    def look(self) -> None:
        """Take note of the calls that the body has come to by what it was handed."""
        for path, call in self._replay.waiting_beyond(self._paths):
            self.add(path, call.decision(path, ())) if call.kind in _ADDRESSED else self._paths.add(path)

    def oldest(self) -> tuple[_Addressed, Mail | Record] | None:
        """Return what is to be handed next, and to whom."""
        while self._answered:
            child = self._answered[0]
            if self._replay.waits_for(child.path) and (record := self._replay.answer(child.of)) is not None:
                return child, record
            self._answered.popleft()
        while self._oldest:
            _, name = self._oldest[0]
            mail, calls = self._mail[name], self._calls[name]
            while calls and not self._replay.waits_for(calls[0].path):
                calls.popleft()
            if mail and calls:
                return calls[0], mail[0]
            heappop(self._oldest)
            del self._calls[name]
        return None

    def took(self, call: _Addressed, sent: Mail | Record) -> None:
        """Take note that a call is handed what was sent."""
        if isinstance(sent, Record):
            self._answered.popleft()
            return
        mail, calls = self._mail[sent.name], self._calls[sent.name]
        mail.popleft()
        calls.popleft()
        heappop(self._oldest)
        if isinstance(call, AwaitChild):
            self._answered.extend(each for each in calls if isinstance(each, AwaitChild))
            calls.clear()
        if mail and calls:
            heappush(self._oldest, (mail[0].id, sent.name))
        else:
            del self._calls[sent.name]


def _tells_of_failure(mail: Mail) -> bool:
    return mail.payload is not None and msgspec.json.decode(mail.payload, type=_Result).state != "succeeded"


def _name_of(call: _Addressed) -> str:
    return call.name if isinstance(call, TakeSignal) else f"{CHILD}{dotted(call.of)}"


def _opened(mail: Mail, call: _Addressed, keyring: Keyring) -> _Opened:
    if mail.payload is None:
        raise OversizeError(mail)
    if isinstance(call, TakeSignal):
        return keyring.open(mail.payload, "signal", call.name, where=f"the payload of signal {call.name!r}")
    result = msgspec.json.decode(mail.payload, type=_Result)
    name, output = call.workflow.name, bytes(result.output).decode()
    result.output = msgspec.Raw(
        keyring.open(output, "output", name, where=f"the result of workflow {name!r}").encode()
    )
    if result.error is not None:
        result.error = keyring.open_fault(result.error, where=f"the error of workflow {name!r}")
    return result


def _record(sent: Mail | Record, call: _Addressed, standing: Standing, keyring: Keyring) -> Record:
    """Return the record by which a call takes what was sent, or is answered as another call was."""
    if isinstance(sent, Record):
        return standing.record(call.path, 0, "child", sent.name, sent.outcome, sent.value, sent.error)
    result = _opened(sent, call, keyring)
    if isinstance(result, str):
        return standing.record(call.path, 0, "signal", sent.name, "completed", result)
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
