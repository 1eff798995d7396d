"""How a run ended: the statement that asks, how long to wait between looks, and what the answer means."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from typing_extensions import TypeVar

from outbox.codec import decode
from outbox.errors import ResultTimeout, RunBlocked, RunCancelled, RunFailed, RunNotFound
from outbox.invocations import WorkflowLike
from outbox.queries import load
from outbox.statements import Duration, Rows, Statement, seconds_of

R = TypeVar("R", default=Any)

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5

_UNHAPPY = {"failed": RunFailed, "cancelled": RunCancelled, "blocked": RunBlocked}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run, as recorded: `output` and `error` are JSON text."""

    run: UUID
    state: str
    output: str | None
    error: str | None

    def value(self, workflow: WorkflowLike[R] | None) -> R:
        """Return the output: plain JSON, or as `workflow` annotates it.

        Raises RunFailed, RunCancelled or RunBlocked for a run that did not succeed.
        """
        if self.state in _UNHAPPY:
            where = f"error of run {self.run}"
            raise _UNHAPPY[self.state](
                self.run, None if self.error is None else decode(self.error, where=where)
            )
        text, where = self.output or "null", f"output of run {self.run}"
        value: R = (
            decode(text, where=where)
            if workflow is None
            else workflow.signature.decode_result(text, where=where)
        )
        return value


def outcome(run: UUID) -> Statement[Outcome | None]:
    """Read how a run ended, None while it is open. Raises RunNotFound."""

    def read(rows: Rows) -> Outcome | None:
        if not rows:
            raise RunNotFound(f"there is no run {run}, or the transaction that enqueues it has not committed")
        state, output, error = rows[0]
        return None if state == "open" else Outcome(run, state, output, error)

    return Statement(load("run_outcome"), {"run": run}, read)


def pauses(timeout: Duration | None) -> Iterator[float]:
    """Yield how long to wait between looks, 20 ms growing to half a second, until `timeout` is over."""
    deadline = math.inf if timeout is None else time.monotonic() + seconds_of(timeout, "timeout")
    pause = FIRST_PAUSE_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        yield min(pause, left)
        pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)


def timed_out(run: UUID, timeout: Duration | None) -> ResultTimeout:
    """Return the error for a run that has not ended in time."""
    return ResultTimeout(
        f"run {run} has not ended within {timeout} s; it goes on, `why` may say what it waits for"
    )
