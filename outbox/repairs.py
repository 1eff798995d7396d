"""What operators ask for runs that went wrong, as statements: retry, rewind, fork, resolve, pause, resume, and
forget. No I/O here.

They are functions of the database (see schema.sql) and need the rights of stepwell_worker. For many runs at once,
`matching` finds them, and the statements in bulk change some hundred of them in one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

from outbox.codec import encode
from outbox.errors import ConfigError, PayloadError, RunConflict
from outbox.history import STATUSES, dotted, history, not_found
from outbox.queries import load
from outbox.sealing import MEMBER, NO_KEYS, Keyring
from outbox.statements import Duration, Key, Rows, Statement, key_text, name_text, seconds_of, sought_text

CallPath = str | int | Sequence[int]
"""A call of a run: ``"3.1.2"``, ``3`` or ``(3, 1, 2)``."""

Action = Literal["retry", "cancel", "pause", "resume"]

RUNS_AT_ONCE = 500
MOST_FOUND = 1_000_000
LONGEST_PATH = 64


def call_path(path: CallPath) -> list[int]:
    """Return the path of a call as numbers. Raises ConfigError for anything that is none."""
    given: Sequence[Any]
    match path:
        case str():
            given = path.strip().split(".")
        case int():
            given = [path]
        case _:
            given = path
    try:
        numbers = [int(each) for each in given]
    except (TypeError, ValueError):
        numbers = []
    if not 1 <= len(numbers) <= LONGEST_PATH or not all(0 <= number < 1 << 31 for number in numbers):
        raise ConfigError(
            f"{path!r} is not the path of a call: write its numbers with points between them, as `stepwell runs show` "
            "does: 3 or 3.1.2"
        )
    return numbers


def retry(run: UUID) -> Statement[int]:
    """Open an ended run again; answers its new epoch. Raises RunNotFound, RunConflict."""

    def read(rows: Rows) -> int:
        epoch, state, undone = _known(rows, run)
        if epoch is None:
            raise RunConflict(
                _undone(run, undone, state)
                or f"run {run} {_changed(state)}; only a failed, cancelled or blocked run can be retried"
            )
        return int(epoch)

    return Statement(load("retry"), {"run": run}, read, repeatable=False)


def rewind(run: UUID, path: CallPath) -> Statement[int]:
    """Have a run go on from a call; answers its new epoch. Raises RunNotFound, RunConflict, ConfigError."""

    def read(rows: Rows) -> int:
        epoch, state, paused = _known(rows, run)
        if epoch is not None:
            return int(epoch)
        if paused:
            raise RunConflict(
                f"run {run} is paused, but still executes a step: rewind it when that has ended"
            )
        told = f"run {run} {_changed(state)}"
        raise RunConflict(
            f"{told}: pause it first (`stepwell runs pause {run}`), and rewind it then"
            if state == "open"
            else told
        )

    return Statement(load("rewind"), {"run": run, "path": call_path(path)}, read, repeatable=False)


def fork(
    run: UUID,
    path: CallPath,
    input: Mapping[str, Any] | None,
    version: str | None,
    max_bytes: int,
    keyring: Keyring = NO_KEYS,
    workflow: str = "",
) -> Statement[UUID]:
    """Make a run that goes on from a call of another one; answers its id.

    Another input is sealed as one of `workflow`. Raises RunNotFound, RunConflict, ConfigError, PayloadError.
    """
    if input is not None and not isinstance(input, Mapping):
        raise PayloadError(
            f"the input of a run is a mapping, parameter name to value, got `{type(input).__qualname__}`"
        )
    parameters = {
        "run": run,
        "path": call_path(path),
        "input": None
        if input is None
        else keyring.seal(
            encode(dict(input), where="input of the fork", max_bytes=max_bytes), "input", workflow
        ),
        "version": None if not version else name_text(version, "the version"),
    }

    def read(rows: Rows) -> UUID:
        if rows[0][0] is None:
            raise not_found(run)
        return UUID(rows[0][0])

    return Statement(load("fork"), parameters, read, repeatable=False)


def step_at(run: UUID, path: CallPath) -> Statement[str]:
    """Read the name of the step at a call of a run, by which its value is sealed; empty if there is none."""
    wanted = tuple(call_path(path))
    every = history(run)

    def read(rows: Rows) -> str:
        return next((each.name for each in every.decode(rows) if each.path == wanted), "")

    return Statement(every.sql, every.parameters, read)


def resolve(
    run: UUID,
    path: CallPath,
    value: Any,
    error: str | Mapping[str, Any] | None,
    max_bytes: int,
    keyring: Keyring = NO_KEYS,
    step: str = "",
) -> Statement[int]:
    """Say how a step ended; answers the run's new epoch. Raises RunNotFound, RunConflict, ConfigError, PayloadError.

    The value is sealed as one of `step`.
    """
    parameters = {"run": run, "path": call_path(path), "value": None, "error": None}
    if error is None:
        text = encode(value, where="the value of the step", max_bytes=max_bytes)
        parameters["value"] = keyring.seal(text, "step", step)
    else:
        fault = keyring.seal_fault(_fault(error, value))
        parameters["error"] = encode(fault, where="the error of the step")

    def read(rows: Rows) -> int:
        epoch, state, undone = _known(rows, run)
        if epoch is None:
            raise RunConflict(
                _undone(run, undone, state)
                or f"run {run} {_changed(state)}; only a step of a blocked or failed run can be resolved"
            )
        return int(epoch)

    return Statement(load("resolve"), parameters, read, repeatable=False)


def forget(key: Key, workflow: str | None) -> Statement[list[UUID]]:
    """Erase what came in under a key; answers the runs. Raises RunConflict while one of them is open, PayloadError."""
    if key is None:
        raise PayloadError("a key is a str, an int or a UUID, got None")
    parameters = {
        "key": key_text(key),
        "workflow": None if workflow is None else name_text(workflow, "the workflow name"),
    }
    return Statement(load("forget"), parameters, lambda rows: [UUID(each) for each in rows[0][0]])


def changed(action: Action, runs: Sequence[UUID]) -> Statement[list[UUID]]:
    """Retry, cancel, pause or resume these runs; answers those that are in a state for it. An unknown one is not."""

    def read(rows: Rows) -> list[UUID]:
        return [UUID(each) for each in rows[0][0] or ()]

    return Statement(load(f"{action}_many"), {"runs": list(runs)}, read, repeatable=action != "retry")


def matching(
    workflow: str | None,
    status: str | None,
    error_like: str | None,
    since: Duration | None,
    limit: int,
) -> Statement[list[UUID]]:
    """Find runs, the oldest first. Raises ConfigError."""
    if status is not None and status not in STATUSES:
        raise ConfigError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
    if not 1 <= limit <= MOST_FOUND:
        raise ConfigError(f"limit must be 1 to {MOST_FOUND:,}, got {limit!r}")
    parameters = {
        "workflow": sought_text(workflow, "the workflow name"),
        "status": status,
        "error_like": sought_text(error_like, "the text of the error"),
        "since": None if since is None else seconds_of(since, "since"),
        "limit": limit,
    }
    return Statement(load("find_runs"), parameters, lambda rows: [UUID(row[0]) for row in rows])


# -- parts -------------------------------------------------------------------------------------------


def _known(rows: Rows, run: UUID) -> Sequence[Any]:
    if not rows:
        raise not_found(run)
    return rows[0]


def _changed(state: str) -> str:
    return f"is {state}" if state in ("open", "succeeded") else "was opened by somebody else just now"


def _undone(run: UUID, undone: Sequence[int] | None, state: str) -> str | None:
    if undone is None or state == "blocked":
        return None
    place = dotted(undone)
    return (
        f"run {run} has undone its steps, so it cannot go on from them: `stepwell runs rewind {run} --to {place}` "
        f"executes them again, from the step at {place}"
    )


def _fault(error: str | Mapping[str, Any], value: Any) -> dict[str, Any]:
    if value is not None:
        raise ConfigError("a step is resolved by a value or by an error, not by both")
    if isinstance(error, str):
        return {"type": "Resolved", "message": error}
    fault = dict(error)
    if not all(isinstance(fault.get(part), str) for part in ("type", "message")):
        raise ConfigError(
            f'the error of a step is a text, or a mapping with the texts "type" and "message", got {error!r}'
        )
    if MEMBER in fault:
        raise ConfigError(f"{MEMBER!r} is a name of Stepwell's own, and cannot be part of an error")
    return fault
