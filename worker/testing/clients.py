"""The client of a test: it never waits for a run that nobody executes, and remembers which runs it was asked about."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from typing_extensions import TypeVar

from outbox import Client, ResultTimeout, RunInfo, Settings
from outbox.invocations import WorkflowLike
from outbox.statements import Duration, RunLike, run_uuid

R = TypeVar("R", default=Any)


class LookingClient(Client):
    """A `Client` that looks at once.

    `looked_at` are the runs whose end the test has asked for. `working` tells whether the test's worker is at work:
    while it is not, it is no news that nothing is.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        super().__init__(url, settings=settings)
        self.looked_at: set[UUID] = set()
        self.working = False

    def get(self, run: RunLike) -> RunInfo:
        """Return one run. Raises RunNotFound."""
        self.looked_at.add(run_uuid(run))
        return super().get(run)

    def result(
        self, run: RunLike, timeout: Duration | None = None, *, workflow: WorkflowLike[R] | None = None
    ) -> R:
        """Return the result of a run that has ended; with `timeout` wait for its end, in seconds.

        Raises what `Client.result` raises, ResultTimeout at once for a run that is still open.
        """
        self.looked_at.add(run_uuid(run))
        if timeout is not None:
            return super().result(run, timeout, workflow=workflow)
        try:
            return super().result(run, 0, workflow=workflow)
        except ResultTimeout:
            why = self.why(run) or "it is being executed"
        raise ResultTimeout(
            f"run {run_uuid(run)} has not ended: {why}. In a test nothing is executed until it calls run_until_idle(), "
            "and what waits for a time waits for advance(…)"
        )

    def why(self, run: RunLike) -> str | None:
        """Return why a run is not running, as `Client.why` does."""
        if not self.working and super().get(run).task_state in ("ready", "shelved", "suspect"):
            return "ready for run_until_idle()"
        return super().why(run)
