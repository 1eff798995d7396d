"""What a drive comes to: the values that `Replay` hands to the engine."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from worker.replay.records import Path, Record

if TYPE_CHECKING:
    from worker.definitions import Step, Workflow


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


class TakeSignal(msgspec.Struct, frozen=True, gc=False):
    """Wait for a signal of this name, at most so many seconds if there is a limit."""

    path: Path
    name: str
    seconds: float | None


class AwaitChild(msgspec.Struct, frozen=True):
    """Wait for the run that the call at `of` is. `starts`: it is this very call, with `input` as JSON text."""

    path: Path
    workflow: Workflow[..., Any]
    input: str
    of: Path
    starts: bool


Asked = DoStep | Sleep | TakeSignal | AwaitChild
"""What one call asks for."""


class Wait(msgspec.Struct, frozen=True):
    """One of several calls that the body waits for, or one that is not executed under the run's own claim.

    `fresh`: no drive that is written down has come to it, so that whatever it needs is still to be made. Calls of
    one `join` that are branches by themselves (`alone`) need to wake the run only when all are done, or, if the join
    `fails_fast`, when one has failed.
    """

    call: Asked
    fresh: bool
    join: Path | None = None
    alone: bool = False
    fails_fast: bool = False


class Window(msgspec.Struct, frozen=True, gc=False):
    """At most `limit` of the branches of the join at `path` are executed at a time."""

    path: Path
    limit: int


class Await(msgspec.Struct, frozen=True):
    """Wait for these calls."""

    waits: tuple[Wait, ...]
    windows: tuple[Window, ...] = ()


class Settle(msgspec.Struct, frozen=True, gc=False):
    """Wait until no call at or below these paths is executed any more, by anybody: the undo has to know how they end.

    `fresh`: no drive that is written down has come to this.
    """

    paths: tuple[Path, ...]
    fresh: bool


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The body has returned: `value` is its result as JSON text."""

    value: str


class Fail(msgspec.Struct, frozen=True, gc=False):
    """The body has raised: `error` is the fault."""

    error: dict[str, Any]


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """The run was cancelled, and the body has ended."""


class Continue(msgspec.Struct, frozen=True, gc=False):
    """The run starts anew with this input (JSON text) and no history."""

    input: str


class Block(msgspec.Struct, frozen=True, gc=False):
    """The run needs a person: `reason` says in a few words why, `error` is the fault with the details."""

    reason: str
    error: dict[str, Any]


Decision = DoStep | Sleep | Await | Settle | Finish | Fail | Cancel | Continue | Block


class Drift(msgspec.Struct, frozen=True, gc=False):
    """A recorded step that was called with other arguments in this replay: by fingerprints, and now with `arguments`."""

    path: Path
    name: str
    recorded: int
    computed: int
    arguments: str
