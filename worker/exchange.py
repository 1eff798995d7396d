"""What a run exchanges with the world while it runs: signals in, state, progress and streams out.

All of it belongs into bodies. What is shown and emitted is sent with the next write of the run, and only once however
often the body is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable
from datetime import timedelta
from typing import Any, TypeVar, overload

from outbox.errors import ConfigError
from outbox.exchange import PROGRESS
from outbox.statements import exchanged_name
from worker.context import current_drive, in_step
from worker.replay.calls import SignalCall

T = TypeVar("T")


@overload
def wait_signal(name: str, *, timeout: float | timedelta | None = None) -> Awaitable[Any]: ...
@overload
def wait_signal(name: str, *, timeout: float | timedelta | None = None, type: type[T]) -> Awaitable[T]: ...
def wait_signal(name: str, *, timeout: float | timedelta | None = None, type: Any = Any) -> Awaitable[Any]:
    """Wait for the next signal of this name, and return its payload, decoded as `type`.

    Signals are kept until they are taken, first in, first out; each is taken once. Raises TimeoutError when none has come
    for `timeout` seconds, and PayloadError when its payload does not fit. In a def body it goes through `wait`.
    """
    exchanged_name(name, "wait_signal")
    drive = current_drive.get()
    if drive is None:
        raise ConfigError(
            "wait_signal() answers in the body of a workflow that is run, nobody sends signals elsewhere"
        )
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(
            f"wait_signal(timeout=…) takes a number of seconds that is not negative, got {timeout!r}"
        )
    return SignalCall(drive, name, seconds, type)


def set_state(key: str, value: Any) -> None:
    """Show `value` (anything with a JSON form) under `key` to whoever reads the state of the run: `client.state(run)`."""
    exchanged_name(key, "set_state")
    drive = _drive("set_state")
    if drive is not None:
        drive.show(key, value)


def progress(done: float, total: float | None = None) -> None:
    """Show how far the run is, for progress bars: the state `progress`, ``{"done": 3, "total": 10}``."""
    for given in (done, total):
        if given is not None and (type(given) not in (int, float) or not given >= 0):
            raise ValueError(f"progress() takes numbers that are not negative, got {given!r}")
    drive = _drive("progress")
    if drive is not None:
        drive.show(PROGRESS, {"done": done, "total": total})


def emit(name: str, value: Any) -> None:
    """Append `value` to the stream `name` of the run, which `client.stream(run, name)` follows."""
    exchanged_name(name, "emit")
    drive = _drive("emit")
    if drive is not None:
        drive.emit(name, value)


def _drive(function: str) -> Any:
    drive = current_drive.get()
    if drive is None and in_step():
        raise ConfigError(
            f"{function}() belongs into the body of a workflow: call it there with what the step returns"
        )
    return drive
