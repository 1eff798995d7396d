"""What one claim opens when it has read, and seals before it writes. Pure; a replay knows nothing of keys.

A value is opened when it is handed to a body or a step, and not when it is read: a run whose key is not here is then
blocked, or given back, by itself, and what nobody looks at needs no key. Everything that a claim writes goes through
`Seals.sealed`, which is None where no key is given. Whether what is *read* is sealed is asked in any case, by how it begins:
a worker without keys must not take an envelope for the value.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec

from outbox.codec import encode_fault, fingerprint
from outbox.errors import PayloadError
from outbox.sealing import BEGINNING, MEMBER, Keyring, Veil, is_sealed
from worker.definitions import Workflow
from worker.engine.transitions import (
    ChildRow,
    Continued,
    EmittedRow,
    EndRow,
    Extra,
    RecordRow,
    StateRow,
    Stopping,
    TaskRow,
    Writing,
)
from worker.replay.decisions import Block
from worker.replay.guards import Guard
from worker.replay.records import Record
from worker.replay.rehearsal import Mismatch, RecordedCall, RecordedRun, rehearse


def unopened(error: PayloadError) -> Block:
    """Report what cannot be opened here. The reason is stored openly, so that it can be read without the key."""
    return Block(f"a sealed payload cannot be opened: {error}", encode_fault(error))


def opened_input(text: str, keyring: Keyring, workflow: str) -> str:
    """Return the input of a run. Raises PayloadError."""
    if not text.startswith(BEGINNING):
        return text
    return keyring.open(text, "input", workflow, where="the input")


def opened_records(
    records: list[Record], keyring: Keyring, *, input: str | None = None, seed: UUID | None = None
) -> list[Record]:
    """Return records as they were before they were sealed; `input` is that of their run, as it is stored.

    Raises PayloadError.
    """
    veil = None if input is None or seed is None or not is_sealed(input) else keyring.veil(input, seed)
    return [_opened(each, keyring, veil) for each in records] if veil or _any_sealed(records) else records


def _any_sealed(records: list[Record]) -> bool:
    for record in records:  # of every replay: a generator costs more
        if record.value is not None and record.value.startswith(BEGINNING):
            return True
        if record.error is not None and MEMBER in record.error:
            return True
    return False


def _opened(record: Record, keyring: Keyring, veil: Veil | None) -> Record:
    value, error, mark = record.value, record.error, record.fingerprint
    where = f"what is recorded of {record.kind} {record.name!r}"
    if value is not None and record.kind != "epoch":
        value = keyring.open(value, record.kind, record.name, where=where)
    if error is not None:
        error = keyring.open_fault(error, where=where)
    if veil is not None and mark is not None:
        mark = veil.reveal(mark)
    return msgspec.structs.replace(record, value=value, error=error, fingerprint=mark)


class Seals:
    """What a claim seals with: the keys, the workflow of its run, and what veils the fingerprints of that."""

    __slots__ = ("_keyring", "_veil", "_workflow")

    def __init__(self, keyring: Keyring, workflow: str) -> None:
        self._keyring = keyring
        self._workflow = workflow
        self._veil: Veil | None = None

    def take_in(self, input: str, seed: UUID) -> None:
        """Take note of the input of the run, as it is stored. Raises PayloadError without its key."""
        self._veil = self._keyring.veil(input, seed)

    def sealed(self, writing: Writing) -> Writing:
        """Return what is sent to the database instead of a writing."""
        return Writing(
            writing.transition,
            [self._record(row) for row in writing.records],
            None if writing.end is None else self._end(writing.end),
            [self._extra(row) for row in writing.extras],
            writing.family,
        )

    def _record(self, row: RecordRow) -> RecordRow:
        return msgspec.structs.replace(
            row,
            value=None if row.value is None else self._raw(row.value, row.kind, row.name),
            error=None if row.error is None else self._keyring.seal_fault(row.error),
            fingerprint=self._veiled(row.fingerprint),
        )

    def _end(self, end: EndRow) -> EndRow:
        return EndRow(
            end.state,
            None if end.output is None else self._raw(end.output, "output", self._workflow),
            None if end.error is None else self._keyring.seal_fault(end.error),
        )

    def _extra(self, row: Extra) -> Extra:
        match row:
            case TaskRow(kind="step", args=msgspec.Raw() as args, name=name):
                return msgspec.structs.replace(row, args=self._arguments(args, name))
            case ChildRow(input=given, workflow=workflow):
                return msgspec.structs.replace(row, input=self._raw(given, "input", workflow))
            case StateRow(key=key, value=value):
                return msgspec.structs.replace(row, value=self._raw(value, "state", key))
            case EmittedRow(name=name, value=value):
                return msgspec.structs.replace(row, value=self._raw(value, "stream", name))
            case Stopping(reason=reason):
                return msgspec.structs.replace(row, reason=self._keyring.seal_fault(reason))
            case Continued(input=given):
                return msgspec.structs.replace(row, input=self._raw(given, "input", self._workflow))
            case _:
                return row

    def _raw(self, value: msgspec.Raw, kind: str, name: str) -> msgspec.Raw:
        return msgspec.Raw(self._keyring.seal(bytes(value).decode(), kind, name).encode())

    def _veiled(self, mark: int | None) -> int | None:
        """Return a fingerprint as it is stored: not at all for a run that was enqueued in plain text, which has no key."""
        return None if mark is None or self._veil is None else self._veil.hide(mark)

    def _arguments(self, args: msgspec.Raw, name: str) -> msgspec.Raw:
        """Seal the arguments of a step on its own, with their fingerprint beside: who executes it has no input to veil by."""
        mark = self._veiled(fingerprint(bytes(args)))
        sealed = self._raw(args, "arguments", name)
        if mark is None:
            return sealed
        return msgspec.Raw(b'%b,"f":%d}}' % (bytes(sealed).removesuffix(b"}}"), mark))


class ErrandSeals(Seals):
    """What a step on its own seals with. `mark` is its fingerprint as it is stored, which came with the arguments."""

    __slots__ = ("mark",)

    def __init__(self, keyring: Keyring, workflow: str) -> None:
        super().__init__(keyring, workflow)
        self.mark: int | None = None

    def _veiled(self, mark: int | None) -> int | None:
        return None if mark is None else self.mark


class _Marked(msgspec.Struct):
    f: int | None = None


class _Arguments(msgspec.Struct):
    sealed: _Marked = msgspec.field(name=MEMBER)


def opened_arguments(text: str, keyring: Keyring, name: str) -> tuple[str, int | None]:
    """Return the arguments of a step that is a task named `name`, and their fingerprint if it came with them.

    Raises PayloadError.
    """
    if not is_sealed(text):
        return text, None
    opened = keyring.open(text, "arguments", name, where="the arguments")
    return opened, msgspec.json.decode(text, type=_Arguments).sealed.f


def rehearsed(
    run: RecordedRun, workflow: Workflow[..., Any], keyring: Keyring, guard: Guard
) -> Mismatch | None:
    """Drive `workflow` through a run as it is stored; return what is wrong with that, or with its keys.

    Of a sealed run no arguments are told.
    """
    given = bytes(run.input).decode()
    try:
        opened = opened_input(given, keyring, run.workflow)
        records = opened_records(
            [call.to_record() for call in run.history], keyring, input=given, seed=run.seed or run.id
        )
    except PayloadError as error:
        return Mismatch(run.id, run.workflow, run.state, "a sealed payload cannot be opened", str(error))
    plain = msgspec.structs.replace(
        run,
        input=msgspec.Raw(opened.encode()),
        history=[RecordedCall.of(record) for record in records],
    )
    found = rehearse(plain, workflow, guard=guard)
    return msgspec.structs.replace(found, arguments=None) if found is not None and is_sealed(given) else found
