"""The calls of async steps and of sleeps: awaitables that are performed when they are awaited."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.definitions import Step
    from worker.replay import Replay


class Call:
    """A call that is performed when it is awaited, once, like a coroutine."""

    __slots__ = ("_drive", "_performed")

    def __init__(self, drive: Replay) -> None:
        self._drive = drive
        self._performed = False

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.perform()
        yield  # makes this a generator: it ends before it yields, because a call switches away instead

    def __del__(self) -> None:
        if not self._performed and not self._drive.discarding():
            warnings.warn(f"{self._what()} was never awaited", RuntimeWarning, stacklevel=2, source=self)

    def perform(self) -> Any:
        """Make the call, and return its value."""
        if self._performed:
            raise RuntimeError(f"{self._what()} was awaited already; call it again to make another call")
        self._performed = True
        return self._perform()

    def _what(self) -> str:
        raise NotImplementedError

    def _perform(self) -> Any:
        raise NotImplementedError


class StepCall(Call):
    """The call of an async step."""

    __slots__ = ("_args", "_kwargs", "_step")

    def __init__(self, drive: Replay, step: Step[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._drive = drive
        self._performed = False
        self._step, self._args, self._kwargs = step, args, kwargs

    def _what(self) -> str:
        return f"step {self._step.name!r}"

    def _perform(self) -> Any:
        return self._drive.perform_step(self._step, self._args, self._kwargs)


class SleepCall(Call):
    """The call of a durable sleep."""

    __slots__ = ("_seconds", "_until")

    def __init__(self, drive: Replay, seconds: float | None, until: datetime | None) -> None:
        super().__init__(drive)
        self._seconds, self._until = seconds, until

    def _what(self) -> str:
        return "a sleep"

    def _perform(self) -> None:
        self._drive.perform_sleep(self._seconds, self._until)
