"""The calls of async steps and of sleeps: awaitables that are performed when they are awaited, once."""

from __future__ import annotations

from collections.abc import Generator
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.definitions import Step
    from worker.replay.driver import Replay


class Call:
    """A call that a body holds in its hand. One that it drops without awaiting it is told to the drive."""

    __slots__ = ("_drive", "_performed")

    _drive: Replay
    _performed: bool

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from ()  # makes this a generator, which a call needs no more: it switches away instead
        return self.perform()

    def __del__(self) -> None:
        if not self._performed and not self._drive.discarding():
            self._drive.forgotten(self.what())

    def perform(self) -> Any:
        """Make the call, and return its value."""
        raise NotImplementedError

    def what(self) -> str:
        """Return what is called, for messages."""
        raise NotImplementedError

    def _once(self) -> None:
        if self._performed:
            raise RuntimeError(f"{self.what()} was awaited already; call it again to make another call")
        self._performed = True


class StepCall(Call):
    """The call of an async step."""

    __slots__ = ("_args", "_kwargs", "_step")

    def __init__(
        self, drive: Replay, step: Step[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._performed = False
        self._drive = drive
        self._step = step
        self._args = args
        self._kwargs = kwargs

    def perform(self) -> Any:
        """Deliver the recorded outcome of the step, or have it executed."""
        self._once()
        return self._drive.perform_step(self._step, self._args, self._kwargs)

    def what(self) -> str:
        """Return the name of the step."""
        return f"step {self._step.name!r}"


class SleepCall(Call):
    """The call of a durable sleep."""

    __slots__ = ("_seconds", "_until")

    def __init__(self, drive: Replay, seconds: float | None, until: datetime | None) -> None:
        self._performed = False
        self._drive = drive
        self._seconds = seconds
        self._until = until

    def perform(self) -> None:
        """Return when the sleep is over."""
        self._once()
        self._drive.perform_sleep(self._seconds, self._until)

    def what(self) -> str:
        """Return what it is, there is no name."""
        return "a sleep"
