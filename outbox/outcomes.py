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
from outbox.errors import ResultTimeout, RunBlocked, RunCancelled, RunConflict, RunFailed, RunNotFound
from outbox.invocations import WorkflowLike
from outbox.queries import load
from outbox.sealing import NO_KEYS, Keyring
from outbox.statements import Duration, Rows, Statement, seconds_of

R = TypeVar("R", default=Any)

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5
FORGOTTEN = '{"stepwell:forgotten":true}'
"""What stands in place of a payload that was erased."""

_UNHAPPY = {"failed": RunFailed, "cancelled": RunCancelled, "blocked": RunBlocked}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run: `output` is JSON text, opened, `error` the recorded fault."""

    run: UUID
    state: str
    output: str | None
    error: dict[str, Any] | None

    def value(self, workflow: WorkflowLike[R] | None) -> R:
        """Return the output: plain JSON, or as `workflow` annotates it.

        Raises RunFailed, RunCancelled or RunBlocked for a run that did not succeed.
        """
        if self.state in _UNHAPPY:
            raise _UNHAPPY[self.state](self.run, self.error)
        text, where = self.output or "null", f"output of run {self.run}"
        if text == FORGOTTEN:
            raise RunConflict(f"run {self.run} was forgotten: its result is not there any more")
        value: R = (
            decode(text, where=where)
            if workflow is None
            else workflow.signature.decode_result(text, where=where)
        )
        return value


def outcome(run: UUID, keyring: Keyring = NO_KEYS) -> Statement[Outcome | None]:
    """Read how a run ended, None while it is open. Raises RunNotFound, PayloadError for an output without its key."""

    def read(rows: Rows) -> Outcome | None:
        if not rows:
            raise RunNotFound(f"there is no run {run}, or the transaction that enqueues it has not committed")
        state, output, error, workflow = rows[0]
        if state == "open":
            return None
        if output is not None:
            output = keyring.open(output, "output", workflow, where=f"output of run {run}")
        fault = None if error is None else keyring.shown_fault(error, where=f"error of run {run}")
        return Outcome(run, state, output, fault)

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
