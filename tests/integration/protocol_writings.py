"""What claimants send in `test_protocol_model`."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

import msgspec

from tests.integration.protocol_world import World
from tests.protocol import Held
from worker.engine.transitions import Continued, RecordRow, Taken, Writing

THENS = (
    "move", "fail", "sleep", "retry", "await", "await for", "note", "release", "give back", "finish", "end", "continue",
)  # fmt: skip
BAD_VALUES = ("no json", "nul", "too large", "no name", "unknown kind", "unknown outcome")


def next_writing(world: World, held: Held, then: str, number: int, known: Collection[int]) -> Writing:
    """Return what the claimant of a run sends next, of call `number`; `known` is the mail that it has read."""
    task = world.runs[held.run].task
    done, doing = held.record(number), (number + 1,)
    failed = held.record(number, n=1, outcome="failed", value=None)
    again = None if task is None else task.doing
    match then:
        case "move":
            return held.move(done, doing=doing, strict=number % 2 == 0, seen=task.seq if task else 0)
        case "behind":
            return held.move(done, doing=doing, strict=True, seen=task.seq + 1 if task else 0)
        case "fail":
            return held.move(failed, doing=again)
        case "sleep":
            return held.park(done, doing=doing, delay=0.0)
        case "retry":
            return held.park(failed, doing=again, delay=0.0)
        case "await" | "await for":
            here = world.mail_of(held.run).intersection(known)
            if here:
                done.kind, done.name = "signal", "go"
                return held.move(done, doing=doing, took=1, extras=[Taken(signal=min(here))])
            return held.park(done, doing=doing, awaits=["go"], delay=3600.0 if then == "await for" else None)
        case "note":
            return held.park(*_note(world, held), doing=doing, delay=0.0, cancelled=True)
        case "release":
            return held.release(held.record(number, n=1, outcome="interrupted", value=None))
        case "give back":
            return held.release()
        case "continue":
            return held.continue_(done, extras=[Continued(input=msgspec.Raw(b"{}"))])
        case _:
            return held.finish(done, state="failed" if then == "end" else "succeeded")


def _note(world: World, held: Held) -> list[RecordRow]:
    """Return the record that the cancellation was noted, unless there is one: it is noted once in an epoch."""
    if (held.run, held.claim.epoch, (), 2) in world.history:
        return []
    return [RecordRow((), 2, "cancel", "w", "cancelled", datetime.now(UTC))]


def spoiled(writing: Writing, how: str) -> Writing:
    """Spoil the first record, so that the database refuses it (I16)."""
    record: Any = writing.records[0]
    match how:
        case "no json":
            record.value = msgspec.Raw(b'{"')
        case "nul":
            record.name = "a\x00b"
        case "too large":
            record.n = 2**40
        case "no name":
            record.name = None
        case "unknown kind":
            record.kind = "kind"
        case _:
            record.outcome = "succeeded"
    return writing
