"""What a drive comes to: the values that `Replay` hands to the engine."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from worker.replay.records import Path, Record

if TYPE_CHECKING:
    from worker.definitions import Step


class DoStep(msgspec.Struct, frozen=True, gc=False):
    """Execute a step. `arguments` is the JSON text that it gets its arguments from.

    `earlier` are the recorded executions of this call that did not complete it, in order, the voided ones
    included. `drift` says that they were called with other arguments.
    """

    path: Path
    step: Step[Any, Any]
    arguments: str
    fingerprint: int
    earlier: tuple[Record, ...]
    drift: bool


class Sleep(msgspec.Struct, frozen=True, gc=False):
    """Wait for so many seconds, or until a moment (UTC): exactly one of them is set."""

    path: Path
    seconds: float | None
    until: datetime | None


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The body has returned: `value` is its result as JSON text."""

    value: str


class Fail(msgspec.Struct, frozen=True, gc=False):
    """The body has raised: `error` is the fault."""

    error: dict[str, Any]


class Block(msgspec.Struct, frozen=True, gc=False):
    """The run needs a person: `reason` says in a few words why, `error` is the fault with the details."""

    reason: str
    error: dict[str, Any]


Decision = DoStep | Sleep | Finish | Fail | Block


class Drift(msgspec.Struct, frozen=True, gc=False):
    """A recorded step that was called with other arguments in this replay."""

    path: Path
    name: str
    recorded: int
    computed: int
