"""Where the code that runs now stands: in a driven body, in the execution of a step, or in neither.

In a body, `sleep`, `now`, `random`, `uuid` and `wait` ask the drive, so that a replay answers alike. Elsewhere
they are what their names say, so that workflows and steps can be called and tested as plain functions.
"""

from __future__ import annotations

import math
import random as _random
import uuid as _uuid
from collections.abc import Awaitable
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import msgspec

from outbox.errors import ConfigError, Suspended
from worker.replay.calls import SleepCall
from worker.replay.records import dotted

if TYPE_CHECKING:
    from worker.definitions import Workflow
    from worker.replay.calls import Call, JoinCall, Started
    from worker.replay.records import Path, Record, RunFacts

T = TypeVar("T")


class Drive(Protocol):
    """What a driven body can ask of its driver."""

    facts: RunFacts

    def perform(self, call: Call) -> Any:
        """Return the outcome of a call."""
        ...

    def join(self, call: JoinCall) -> Any:
        """Run branches side by side."""
        ...

    def discarding(self) -> bool:
        """Tell whether the body, or the branch that runs, is being discarded."""
        ...

    def forgotten(self, what: str) -> None:
        """Remember a call that was dropped without being made."""
        ...

    def patched(self, name: str, *, retired: bool = False) -> bool:
        """Tell whether this run takes the way that a patch has opened."""
        ...

    def show(self, key: str, value: Any) -> None:
        """Show a value to whoever looks at the run."""
        ...

    def emit(self, name: str, value: Any) -> None:
        """Append a value to a stream of the run."""
        ...

    def begin_child(
        self, workflow: Workflow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, detached: bool,
        deadline: float | None,
    ) -> Started:  # fmt: skip
        """Have a child made."""
        ...

    def answered(self, of: Path, record: Record) -> None:
        """Take note that what has become of a child is recorded, and how."""
        ...

    def is_recorded(self, path: Path) -> bool:
        """Tell whether the result of the child that was called at a path is recorded."""
        ...

    def continue_as(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        """Start the run anew."""
        ...

    def wait(self, awaitable: Awaitable[T]) -> T:
        """Perform the call behind an awaitable."""
        ...

    def now(self) -> datetime:
        """Return the time of the last record delivered."""
        ...

    def random(self) -> float:
        """Return the next number in [0, 1)."""
        ...

    def uuid(self) -> _uuid.UUID:
        """Return the next UUID."""
        ...

    def line(self) -> str:
        """Return the line of the user's code that runs now."""
        ...

    def report(self, violation: BaseException) -> None:
        """Remember that the body did what a replay cannot repeat, even if it swallows the exception."""
        ...


class StepInfo(msgspec.Struct, frozen=True):
    """The execution of a step, as the step itself may know it.

    `execution` counts from 1. `fence` is an integer that grows with every execution in this run, for stores that
    can compare it. `key_epoch` is the epoch of the run's last rewind or fresh start, `name` that of the step.
    """

    run_id: _uuid.UUID
    path: Path
    execution: int
    fence: int
    key_epoch: int = 0
    name: str = ""

    @property
    def idempotency_key(self) -> str:
        """What stays the same over all executions of this call, and differs from every other call's."""
        again = f":{self.key_epoch}" if self.key_epoch else ""
        return f"{self.run_id}:{dotted(self.path)}{again}"


current_drive: ContextVar[Drive | None] = ContextVar("stepwell_drive", default=None)
_execution: ContextVar[tuple[RunFacts, StepInfo] | None] = ContextVar("stepwell_execution", default=None)


class executing:  # noqa: N801 - a context manager; as a generator it would cost four times as much
    """Make `current_run()` and `current_step()` answer inside the execution of a step."""

    __slots__ = ("_execution", "_token")

    def __init__(self, facts: RunFacts, step: StepInfo) -> None:
        self._execution = (facts, step)

    def __enter__(self) -> None:
        self._token = _execution.set(self._execution)

    def __exit__(self, *_: object) -> None:
        _execution.reset(self._token)


def current_run() -> RunFacts:
    """Return the run that this body or step works for. Raises ConfigError outside of one."""
    drive = current_drive.get()
    if drive is not None:
        return drive.facts
    execution = _execution.get()
    if execution is None:
        raise ConfigError(
            "current_run() answers in the body of a workflow and in a step of a run, not outside of them"
        )
    return execution[0]


def current_step() -> StepInfo:
    """Return the execution of the step that calls. Raises ConfigError anywhere else, also in a body."""
    execution = _execution.get()
    if execution is None or current_drive.get() is not None:
        raise ConfigError(
            "current_step() answers in a step that is executed for a run, not in a body or outside of one"
        )
    return execution[1]


def whereabouts() -> tuple[RunFacts | None, StepInfo | None]:
    """Return the run that the code which runs now works for, and the execution if it is in one."""
    drive = current_drive.get()
    if drive is None:
        return _execution.get() or (None, None)
    try:
        return drive.facts, None
    except Suspended:  # a generator is closed outside of its body, for no run
        return None, None


def in_step() -> bool:
    """Tell whether the code that runs now is the execution of a step."""
    return _execution.get() is not None and current_drive.get() is None


def sleep(duration: float | timedelta) -> Awaitable[None]:
    """Wait durably for so many seconds.

    In an async body it is awaited, in a def body it goes through `wait`.
    """
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"sleep() takes a number of seconds that is not negative, got {duration!r}")
    drive = current_drive.get()
    return _sleep_plainly(seconds) if drive is None else SleepCall(drive, seconds, None)


def sleep_until(moment: datetime) -> Awaitable[None]:
    """Sleep durably until a moment, which must know its time zone. One that has passed returns at once."""
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise ValueError(f"sleep_until() takes a datetime with a time zone, got {moment!r}")
    drive = current_drive.get()
    if drive is None:
        return _sleep_plainly(max(0.0, (moment - datetime.now(UTC)).total_seconds()))
    return SleepCall(drive, None, moment.astimezone(UTC))


def wait(awaitable: Awaitable[T]) -> T:
    """Return the result of an async step or a sleep in a def body: ``wait(send_welcome(lead))``."""
    drive = current_drive.get()
    return _wait_plainly(awaitable) if drive is None else drive.wait(awaitable)


def now() -> datetime:
    """Return the time (UTC) of the last thing that happened in the run, the same in every replay."""
    drive = current_drive.get()
    return datetime.now(UTC) if drive is None else drive.now()


def random() -> float:
    """Return a number in [0, 1), the same in every replay."""
    drive = current_drive.get()
    return _random.random() if drive is None else drive.random()


def uuid() -> _uuid.UUID:
    """Return a random UUID (version 4), the same in every replay."""
    drive = current_drive.get()
    return _uuid.uuid4() if drive is None else drive.uuid()


async def _sleep_plainly(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)


def _wait_plainly(awaitable: Awaitable[T]) -> T:
    import asyncio

    async def awaited() -> T:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    raise ConfigError("wait() is for def bodies; here an event loop is running, so await the call instead")
