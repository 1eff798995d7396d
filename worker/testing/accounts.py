"""What a test's database holds, as a test asks for it and as a person reads it: runs that were enqueued, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

from outbox.client import Client
from outbox.codec import decode, encode
from outbox.history import HistoryRecord, dotted
from outbox.sealing import Keyring
from worker.queries import load

MOST_SHOWN = 20
LONGEST_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Enqueued:
    """One run of the test's database."""

    id: UUID
    workflow: str
    key: str | None
    queue: str
    status: str
    input: dict[str, Any]
    error: dict[str, Any] | None

    def __str__(self) -> str:
        key = "" if self.key is None else f" key={self.key!r}"
        queue = "" if self.queue == "default" else f" queue={self.queue!r}"
        return f"{self.workflow}{key}{queue} input={_shortened(json.dumps(self.input, ensure_ascii=False, separators=(',', ':')))} ({self.status})"


@dataclass(frozen=True, slots=True)
class Expected:
    """What of a run is asked for: None is anything, `input` names the parameters that matter."""

    workflow: str
    key: str | None
    input: Mapping[str, Any] | None
    queue: str | None

    @classmethod
    def of(
        cls, workflow: str, key: str | None, input: Mapping[str, Any] | None, queue: str | None
    ) -> Expected:
        """Return what to compare with what is stored. Raises PayloadError for an input without a JSON form."""
        where = f"the expected input of {workflow}"
        plain = None if input is None else decode(encode(dict(input), where=where), where=where)
        return cls(workflow, key, plain, queue)

    def is_met_by(self, run: Enqueued) -> bool:
        """Tell whether this is such a run."""
        return (
            run.workflow == self.workflow
            and (self.key is None or run.key == self.key)
            and (self.queue is None or run.queue == self.queue)
            and all(
                name in run.input and run.input[name] == value for name, value in (self.input or {}).items()
            )
        )

    def __str__(self) -> str:
        given = {"key": self.key, "queue": self.queue}
        told = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if self.input is not None:
            told.append(f"input={_shortened(encode(self.input, where='input'))}")
        return " ".join([self.workflow, *told])


def enqueued(connection: psycopg.Connection[Any], keyring: Keyring) -> list[Enqueued]:
    """Read every run, in the order of their enqueueing."""
    return [
        Enqueued(
            run, workflow, key, queue, status,
            keyring.shown(given, "input", workflow, where=f"the input of run {run}"),
            None if error is None else keyring.shown_fault(error, where=f"the error of run {run}"),
        )
        for run, workflow, key, queue, status, given, error in connection.execute(load("testing_runs"))
    ]  # fmt: skip


def complaint(expected: Expected, count: int | None, found: int, all_runs: Iterable[Enqueued]) -> str:
    """Return why an expectation is not met, with what was enqueued instead."""
    wanted = (
        "a run" if count is None else "no run" if count == 0 else f"{count} run{'' if count == 1 else 's'}"
    )
    return f"expected {wanted} of {expected}, found {found or 'none'}.\n{listed(all_runs)}"


def listed(runs: Iterable[Enqueued]) -> str:
    """Return what was enqueued, a line for each run."""
    lines = [f"  {run}" for run in runs]
    if not lines:
        return "Nothing was enqueued."
    more = [f"  … and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
    return "\n".join(["Enqueued were:", *lines[:MOST_SHOWN], *more])


def told(connection: psycopg.Connection[Any], client: Client, keyring: Keyring) -> str:
    """Return what has become of each run: how it stands and why, with its history unless it has succeeded."""
    runs = enqueued(connection, keyring)
    lines = []
    for run in runs[:MOST_SHOWN]:
        lines.append(str(run))
        if run.status != "succeeded":
            why = client.why(run.id)
            history = [each for each in client.history(run.id) if each.kind != "run" or why is None]
            lines += [f"    {_record(record)}" for record in history[-MOST_SHOWN:]]
            lines += [f"    {why}"] if why else []
    if len(runs) > MOST_SHOWN:
        lines.append(f"… and {len(runs) - MOST_SHOWN} more")
    return "\n".join(lines)


def _record(record: HistoryRecord) -> str:
    execution = f" (execution {record.n})" if record.n else ""
    error = "" if record.error is None else f": {record.error.get('type')}: {record.error.get('message')}"
    return _shortened(f"{dotted(record.path)} {record.name} {record.outcome}{execution}{error}".strip())


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"
