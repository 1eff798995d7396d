"""When a failed step is tried again: tenacity's policies, judged from recorded failures.

A policy is a pure function of what is recorded and of the error at hand, so a restart of the worker never
resets the count. Nothing here sleeps: the wait is returned, and becomes a due time in the database.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import tenacity
from tenacity.asyncio.retry import async_retry_base
from tenacity.retry import retry_base

from outbox.errors import ConfigError, Permanent, RetryAfter
from worker.replay.records import Record

log = logging.getLogger(__name__)

DEFAULT_STOP = tenacity.stop_after_attempt(5)
DEFAULT_WAIT = tenacity.wait_exponential_jitter(initial=1, max=60)

Policy = Callable[[tenacity.RetryCallState], Any]
On = type[BaseException] | tuple[type[BaseException], ...] | Policy


@dataclass(frozen=True, slots=True)
class Stop:
    """The failure is final. `reason` says why, for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retry:
    """The step is tried again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """An execution that counts as a failure, and when it ended."""

    at: datetime


def failures_of(earlier: Sequence[Record]) -> list[Failure]:
    """Return the recorded executions that count: those that failed, and those that ran out of time.

    An execution that was interrupted otherwise says nothing about the step, and one that a retry of the run
    has voided counts no more.
    """
    return [Failure(record.at) for record in earlier if record.n and _counts(record)]


def _counts(record: Record) -> bool:
    timed_out = record.outcome == "interrupted" and (record.error or {}).get("type") == "TimeoutError"
    return record.outcome == "failed" or timed_out


class RetryPolicy:
    """When to stop, how long to wait, and on which errors. Made by `retrying`."""

    __slots__ = ("_on", "_retrying", "_stop", "_wait")

    def __init__(self, stop: Policy, wait: Policy, on: Policy) -> None:
        self._stop, self._wait, self._on = stop, wait, on
        self._retrying = tenacity.Retrying(stop=stop, wait=wait, retry=on)

    def decide(
        self, failures: Sequence[Failure], error: BaseException, *, started_at: datetime | None = None
    ) -> Stop | Retry:
        """Judge the last of `failures`, which ended with `error`.

        `started_at` is when the first execution began, as far as it is known; else time counts from the end of
        the first failure. A policy that raises stops the retries.
        """
        if isinstance(error, Permanent):
            return Stop("the error is permanent")
        state = self._state(failures, error, started_at)
        try:
            if not isinstance(error, RetryAfter) and not self._on(state):
                return Stop(f"{type(error).__name__} is not among the errors that are tried again")
            state.upcoming_sleep = (
                error.seconds if isinstance(error, RetryAfter) else _seconds(self._wait(state))
            )
            if self._stop(state):
                return Stop(f"the policy allows no more after {_times(state.attempt_number)}")
        except Exception as broken:
            log.warning("retry policy raised", exc_info=broken)
            return Stop(f"the retry policy raised {type(broken).__name__}: {broken}")
        return Retry(state.upcoming_sleep)

    def _state(
        self, failures: Sequence[Failure], error: BaseException, started_at: datetime | None
    ) -> tenacity.RetryCallState:
        state = tenacity.RetryCallState(self._retrying, None, (), {})
        state.attempt_number = max(1, len(failures))
        state.outcome = tenacity.Future(state.attempt_number)
        state.outcome.set_exception(error)
        state.start_time = 0.0
        state.outcome_timestamp = _elapsed(failures, started_at)
        return state

    def __repr__(self) -> str:
        return f"retrying(stop={self._stop!r}, wait={self._wait!r}, on={self._on!r})"


def retrying(*, stop: Policy | None = None, wait: Policy | None = None, on: On = Exception) -> RetryPolicy:
    """Return a retry policy for `@step(retry=…)` and `@transaction(retry=…)`.

    `stop` and `wait` are tenacity's objects, by default ``stop_after_attempt(5)`` and
    ``wait_exponential_jitter(initial=1, max=60)``; ``stop_never`` tries for ever. `on` is an exception class, a
    tuple of them or a tenacity retry object, by default every Exception. `Permanent` stops in any case, and
    `RetryAfter(seconds)` is tried again whatever `on` says, as long as `stop` allows.
    """
    return RetryPolicy(
        _checked("stop", stop, DEFAULT_STOP),
        _checked("wait", wait, DEFAULT_WAIT),
        _checked("on", _condition(on), None),
    )


def _condition(on: On) -> Policy:
    classes = on if isinstance(on, tuple) else (on,)
    if classes and all(isinstance(each, type) and issubclass(each, BaseException) for each in classes):
        return tenacity.retry_if_exception_type(classes)  # type: ignore[arg-type]  # checked one line above
    if isinstance(on, tuple):
        raise ConfigError(f"retrying(on=…) takes exception classes or a tenacity retry object, got {on!r}")
    return on


def _checked(parameter: str, given: Policy | None, default: Policy | None) -> Policy:
    policy = default if given is None else given
    if isinstance(policy, async_retry_base):
        raise ConfigError(f"retrying({parameter}=…) takes a policy that is not async, got {policy!r}")
    if (
        not callable(policy)
        or isinstance(policy, type)
        or (parameter != "on" and isinstance(policy, retry_base))
    ):
        raise ConfigError(f"retrying({parameter}=…) takes a tenacity {parameter} object, got {given!r}")
    return policy


def _seconds(wait: Any) -> float:
    seconds = wait.total_seconds() if isinstance(wait, timedelta) else float(wait)
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _elapsed(failures: Sequence[Failure], started_at: datetime | None) -> float:
    if not failures:
        return 0.0
    return max(0.0, (failures[-1].at - (started_at or failures[0].at)).total_seconds())


def _times(count: int) -> str:
    return "one failure" if count == 1 else f"{count} failures"
