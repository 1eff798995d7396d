"""What happens to runs, for whoever wants to be told: an error tracker, a chat channel, metrics of one's own.

::

    from worker import events, on_event


    @on_event
    def tell(event: events.Event) -> None:
        match event:
            case events.StepFailed(step=step, error=error):
                sentry_sdk.capture_exception(error, tags={"step": step, "run": str(event.run_id)})
            case events.RunBlocked(workflow=workflow, reason=reason):
                slack.post(f"{workflow} is blocked: {reason}")

Hooks are called in the worker process in which something happened, in one thread that does nothing else, one event after
the other. So they may block, and what they raise is logged; the work goes on meanwhile. Nothing is recorded of it: an
event is told once at most. One whose process dies just then is not told, nor are those beyond the thousand that wait for
slow hooks. What has to be known for certain is in the history of the run.

Whatever was recorded is told once it is durable. A step is started before that, so one that is interrupted has no other
end than `StepInterrupted`, which the worker tells that takes the run over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar
from uuid import UUID

from outbox.errors import ConfigError
from worker.registry import registry

__all__ = [
    "Event",
    "RunBlocked",
    "RunEnded",
    "RunEvent",
    "RunStarted",
    "StepEvent",
    "StepFailed",
    "StepInterrupted",
    "StepRetried",
    "StepStarted",
    "WorkerReclaimed",
    "on_event",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened: when, by the clock of the worker that tells it, and the id of that worker."""

    at: datetime
    worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent(Event):
    """Something that has happened to a run. `trace_id` in hex, None where runs are not traced."""

    run_id: UUID
    workflow: str
    epoch: int
    trace_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(RunEvent):
    """A worker has taken a run that nobody had taken yet, or not since it was retried or rewound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(RunEvent):
    """A run has ended. `error` is what is recorded: type, message, perhaps data. `seconds` since it was first taken."""

    state: Literal["succeeded", "failed", "cancelled"]
    error: Mapping[str, Any] | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBlocked(RunEvent):
    """A run needs a person. `reason` says in a few words why, `error` has the details."""

    reason: str
    error: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent(RunEvent):
    """Something that has happened to a step: the nth `execution` of the call at `path`, counted from 1 in this epoch."""

    step: str
    path: tuple[int, ...]
    execution: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted(StepEvent):
    """A step is about to be executed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRetried(StepEvent):
    """A step has failed, or has not answered in time (TimeoutError), and is tried again after `wait_seconds`."""

    error: BaseException
    wait_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed(StepEvent):
    """A step has failed for good. What the body makes of that is another matter."""

    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInterrupted(StepEvent):
    """An execution has never answered: its process died, or was drained before it was done, or the run was cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReclaimed(Event):
    """A worker is dead, and what it had claimed is free. Told by one process of the supervisor that freed it.

    `detector` is how that was noticed: obituary (its supervisor saw it end), lost_lock or lease. `tasks`: how many it
    had claimed.
    """

    dead: int
    detector: str
    tasks: int


H = TypeVar("H", bound=Callable[[Event], object])


def on_event(hook: H) -> H:
    """Have a plain function called with every event of the worker processes that load this module.

    Returns the function, so that it can stand as a decorator. Raises ConfigError for what is no plain function, or cannot
    be called with one event.
    """
    if not _is_plain(hook):
        raise ConfigError(f"on_event takes a plain function of one event, got {hook!r}")
    registry().add_hook(hook)
    return hook


def _is_plain(given: object) -> bool:
    """Tell whether calling this with an event does what it has to do; a coroutine or a generator would do nothing."""
    if not callable(given):
        return False
    for called in (given, type(given).__call__):
        if any(
            test(called)
            for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        ):
            return False
    try:
        inspect.signature(given).bind(None)
    except TypeError:
        return False
    except ValueError:  # something built in that does not say what it takes
        return True
    return True
