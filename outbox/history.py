"""Reading runs, their history and their tasks: records, and the statements that fetch them. No I/O here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from outbox.codec import decode
from outbox.errors import ConfigError, RunNotFound
from outbox.exchange import PROGRESS, Progress, progress_of
from outbox.queries import load
from outbox.sealing import NO_KEYS, Keyring
from outbox.statements import Rows, Statement, sought_text
from outbox.tracing import trace_id_of

STATUSES = ("pending", "running", "waiting", "paused", "succeeded", "failed", "cancelled", "blocked")
MAX_LIST = 10_000


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One run as it is now. What concerns its task (`attempt` to `interruptions`) is None once it has ended."""

    id: UUID
    workflow: str
    status: str
    """pending, running, waiting, paused, succeeded, failed, cancelled or blocked"""
    queue: str
    priority: int
    labels: Mapping[str, Any]
    epoch: int
    """how often it was retried, rewound, forked or started anew"""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_at: datetime | None
    input: dict[str, Any]
    output: Any
    error: dict[str, Any] | None
    """type, message and perhaps data and trace"""
    attempt: int | None
    """how often it was claimed"""
    doing: tuple[int, ...] | None
    """the call that it is at"""
    due_at: datetime | None
    task_state: str | None
    claimed_by: int | None
    interruptions: int | None
    """claims that died at `doing`"""
    version: str = ""
    """of its workflow, empty if it has none"""
    parent: UUID | None = None
    """the run that has called it"""
    progress: Progress | None = None
    """how far it is, if its body says so"""
    key: str | None = None
    """by which it was enqueued; of a child it is made from its parent's"""
    trace_id: str = ""
    """in hex: of the trace that it goes on with, where its workers trace"""

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        return {name: _shown(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class HistoryRecord:
    """One thing that has happened in a run and will not be done again."""

    seq: int
    """the order in which things happened"""
    epoch: int
    path: tuple[int, ...]
    n: int
    """0 the final outcome of the call, otherwise its nth execution, which failed or was interrupted"""
    kind: str
    """step, sleep, signal, child, patch; at the empty path run (its end), cancel, epoch (how a new one was opened)"""
    name: str
    outcome: str
    value: Any
    error: dict[str, Any] | None
    fingerprint: int | None
    worker: int | None
    at: datetime

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        return {name: _shown(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """Something that is left to do for a run."""

    id: int
    kind: str
    """run (its own), step, timer or window (of its calls), wake (a fact to apply to it)"""
    path: tuple[int, ...]
    name: str
    """what a worker must know: WORKFLOW or WORKFLOW@VERSION, step:NAME"""
    queue: str
    priority: int
    state: str
    """ready, claimed, waiting, paused, shelved (no live worker knows its name) or suspect (will be tried alone)"""
    due_at: datetime | None
    attempt: int
    doing: tuple[int, ...] | None
    interruptions: int
    cancelling: bool
    claimed_by: int | None
    awaits: tuple[str, ...] = ()
    """of the run's own: the signals that it waits for; stepwell:child for the result of a child"""

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        return {name: _shown(getattr(self, name)) for name in self.__slots__}


def dotted(path: Sequence[int]) -> str:
    """Return a path as people write it: 3.1.2; empty for the run itself."""
    return ".".join(map(str, path))


# -- statements --------------------------------------------------------------------------------------


def run_info(run: UUID, keyring: Keyring = NO_KEYS) -> Statement[RunInfo]:
    """Read one run. Raises RunNotFound."""

    def read(rows: Rows) -> RunInfo:
        if not rows:
            raise not_found(run)
        return _run_info(rows[0], keyring)

    return Statement(load("run_info"), {"run": run}, read)


def runs(
    workflow: str | None,
    status: str | None,
    limit: int,
    before: UUID | None,
    keyring: Keyring = NO_KEYS,
) -> Statement[list[RunInfo]]:
    """Read the newest runs, newest first, older than run `before`."""
    if status is not None and status not in STATUSES:
        raise ConfigError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
    if not 1 <= limit <= MAX_LIST:
        raise ConfigError(f"limit must be 1 to {MAX_LIST:,}, got {limit!r}; page with before=")
    sought = sought_text(workflow, "the workflow name")
    parameters = {"workflow": sought, "status": status, "limit": limit, "before": before}
    return Statement(load("list_runs"), parameters, lambda rows: [_run_info(row, keyring) for row in rows])


def history(run: UUID, keyring: Keyring = NO_KEYS) -> Statement[list[HistoryRecord]]:
    """Read what has happened in a run, in order; nothing for an unknown run."""

    def read(rows: Rows) -> list[HistoryRecord]:
        return [_record(run, row, keyring) for row in rows]

    return Statement(load("run_history"), {"run": run}, read)


def tasks(run: UUID) -> Statement[list[TaskInfo]]:
    """Read what is left to do for a run; nothing for one that has ended."""
    return Statement(load("run_tasks"), {"run": run}, lambda rows: [_task(row) for row in rows])


def not_found(run: UUID) -> RunNotFound:
    """Return the error for an id that no run has."""
    return RunNotFound(f"there is no run {run}")


# -- rows --------------------------------------------------------------------------------------------


def _run_info(row: Sequence[Any], keyring: Keyring) -> RunInfo:
    (run, workflow, status, queue, priority, labels, epoch, created_at, started_at, finished_at, deadline_at,
     given, output, error, attempt, doing, due_at, task_state, claimed_by, interruptions, version, parent,
     progress, key, trace) = row  # fmt: skip
    where = f"a value of run {run}"
    return RunInfo(
        id=UUID(run),
        workflow=workflow,
        status=status,
        queue=queue,
        priority=priority,
        labels=_json(labels, run) or {},
        epoch=epoch,
        created_at=created_at,
        started_at=started_at,
        finished_at=finished_at,
        deadline_at=deadline_at,
        input=keyring.shown(given, "input", workflow, where=where),
        output=None if output is None else keyring.shown(output, "output", workflow, where=where),
        error=None if error is None else keyring.shown_fault(error, where=where),
        attempt=attempt,
        doing=_path(doing),
        due_at=due_at,
        task_state=task_state,
        claimed_by=claimed_by,
        interruptions=interruptions,
        version=version,
        parent=None if parent is None else UUID(parent),
        progress=progress_of(
            None if progress is None else keyring.shown(progress, "state", PROGRESS, where=where)
        ),
        key=key,
        trace_id=f"{trace_id_of(UUID(run), trace):032x}",
    )


def _record(run: UUID, row: Sequence[Any], keyring: Keyring) -> HistoryRecord:
    seq, epoch, path, n, kind, name, outcome, value, error, fingerprint, worker, at = row
    where = f"a value of run {run}"
    of = "input" if kind == "epoch" else kind  # a fresh start records what it starts with
    return HistoryRecord(
        seq,
        epoch,
        tuple(path),
        n,
        kind,
        name,
        outcome,
        None if value is None else keyring.shown(value, of, name, where=where),
        None if error is None else keyring.shown_fault(error, where=where),
        fingerprint,
        worker,
        at,
    )


def _task(row: Sequence[Any]) -> TaskInfo:
    (
        number,
        kind,
        path,
        name,
        queue,
        priority,
        state,
        due_at,
        attempt,
        doing,
        interruptions,
        cancelling,
        owner,
        awaits,
    ) = row
    return TaskInfo(
        number, kind, tuple(path), name, queue, priority, state, due_at, attempt, _path(doing), interruptions,
        cancelling, owner, tuple(awaits or ()),
    )  # fmt: skip


def _json(text: str | None, run: object) -> Any:
    return None if text is None else decode(text, where=f"a value of run {run}")


def _path(path: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if path is None else tuple(path)


def _shown(value: Any) -> Any:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Progress):
        return value.to_json()
    if isinstance(value, tuple):
        return list(value) if value and isinstance(value[0], str) else dotted(value)
    return value
