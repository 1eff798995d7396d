"""Code that changes under running runs, and runs that never end: `patched`, `retire_patch`, `continue_as`, `start`."""

from __future__ import annotations

import math
from collections.abc import Awaitable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from outbox.errors import ConfigError
from worker.context import current_drive

if TYPE_CHECKING:
    from worker.definitions import Workflow

MAX_DEADLINE_SECONDS = 2e11
"""Six thousand years: no deadline may be beyond the year 9000, at enqueue as well."""


def patched(name: str) -> bool:
    """Tell whether this run takes the new way of a change in its code.

    ``if patched("check-address"): …``: true for runs that come here for the first time under this code, which is recorded; False for runs that have passed
    here before. So both ways stay in the code until the last run of the old one has ended; then `retire_patch`.
    """
    drive = current_drive.get()
    return True if drive is None else drive.patched(_checked(name, "patched"))


def retire_patch(name: str) -> None:
    """Say that no run of before the patch is left: its old way is gone from the code.

    A run that did go the old way is blocked here. Once all runs have begun under this code, remove the line.
    """
    drive = current_drive.get()
    if drive is not None:
        drive.patched(_checked(name, "retire_patch"), retired=True)


def continue_as(*args: Any, **kwargs: Any) -> NoReturn:
    """End this history and start the same run anew with these arguments: for runs that would never end.

    Never returns. The run keeps its id and its key; signals that were not taken stay. Raises PayloadError for arguments
    that the workflow does not take, and then nothing has happened.
    """
    drive = current_drive.get()
    if drive is None:
        raise ConfigError(
            "continue_as() starts a run anew, and outside of the body of a workflow there is none"
        )
    drive.continue_as(args, kwargs)
    raise AssertionError("continue_as() never returns")


def start(workflow: Workflow[..., Any], /, *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Start a child run and go on; await what is returned for its result, any number of times, alone or in joins.

    Two options beside the arguments of the workflow: ``detached=True`` lets it live on when this run is cancelled,
    ``deadline=`` (seconds, or a timedelta) limits it. Raises PayloadError for arguments that the workflow does not take.
    """
    from worker.definitions import Workflow as Defined

    detached, seconds = bool(kwargs.pop("detached", False)), _limit(kwargs.pop("deadline", None))
    if not isinstance(workflow, Defined):
        raise ConfigError(f"start() takes a workflow, got {workflow!r}")
    drive = current_drive.get()
    if drive is None:
        raise ConfigError(
            "start() starts a child of a run; outside of the body of a workflow enqueue it with a Client"
        )
    return drive.begin_child(workflow, workflow.payload_of(args), kwargs, detached=detached, deadline=seconds)


def _limit(deadline: Any) -> float | None:
    """Return how many seconds a child may take, None if it has no limit."""
    if deadline is None:
        return None
    seconds = deadline.total_seconds() if isinstance(deadline, timedelta) else deadline
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(
            f"start(deadline=…) takes a number of seconds that is not negative, or a timedelta, got {deadline!r}"
        )
    if seconds > MAX_DEADLINE_SECONDS:
        raise ValueError(f"start(deadline=…) must end before the year 9000, got {deadline!r}")
    return float(seconds)


def _checked(name: Any, function: str) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"{function}() takes the name of a patch, got {name!r}")
    return name
