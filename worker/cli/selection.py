"""Which runs of many are meant: the options that say so, the same wherever runs are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import click

from worker.cli.connecting import Session
from worker.cli.options import duration

C = TypeVar("C", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Selection:
    """Runs of one workflow, in one of these statuses, by their error and their age. None: whatever that is."""

    statuses: Sequence[str | None]
    workflow: str | None
    error_like: str | None
    since: float | None

    def find(self, opened: Session) -> list[UUID]:
        """Return their ids, the oldest first."""
        found: set[UUID] = set()
        for status in self.statuses:
            found.update(
                opened.client.find(self.workflow, status, error_like=self.error_like, since=self.since)
            )
        return sorted(found)


def selecting_options(statuses: Sequence[str]) -> Callable[[C], C]:
    """Add --workflow, --status (or --state), --error-like and --since; the runs can be in one of `statuses`."""

    def decorate(command: C) -> C:
        for option in (
            click.option(
                "--since", callback=duration, metavar="TIME", help="Runs enqueued in this time: 2d."
            ),
            click.option("--error-like", metavar="TEXT", help="Runs whose error contains this text."),
            click.option(
                "--status", "--state", "status", type=click.Choice(statuses), help="Runs in this status."
            ),
            click.option("--workflow", help="Runs of this workflow."),
        ):
            command = option(command)
        return command

    return decorate
