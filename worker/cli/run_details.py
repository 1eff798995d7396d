"""Everything that is told of one run, read from the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from outbox.history import HistoryRecord, RunInfo, TaskInfo, dotted
from worker.cli.connecting import Session
from worker.queries import load


@dataclass(frozen=True, slots=True)
class Child:
    """A run that the run has called. `path` is the call."""

    id: UUID
    workflow: str
    status: str
    path: tuple[int, ...]
    created_at: datetime | None = None

    def to_json(self) -> dict[str, str]:
        """Return what `--json` shows."""
        return {
            "id": str(self.id),
            "workflow": self.workflow,
            "status": self.status,
            "path": dotted(self.path),
        }


@dataclass(frozen=True, slots=True)
class Details:
    """One run, with all that is known about it."""

    run: RunInfo
    history: Sequence[HistoryRecord]
    tasks: Sequence[TaskInfo]
    children: Sequence[Child] = ()
    state: Mapping[str, Any] | None = None
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        return {
            "run": self.run.to_json(),
            "history": [record.to_json() for record in self.history],
            "tasks": [task.to_json() for task in self.tasks],
            "children": [child.to_json() for child in self.children],
            "state": dict(self.state or {}),
            "why": self.why,
        }


def details_of(opened: Session, run: UUID) -> Details:
    """Read everything about a run. Raises RunNotFound."""
    client = opened.client
    return Details(
        run=client.get(run),
        history=client.history(run),
        tasks=client.tasks(run),
        children=_children(opened, run),
        state=client.state(run),
        why=client.why(run),
    )


def _children(opened: Session, run: UUID) -> list[Child]:
    rows = opened.connection.execute(load("cli_children"), {"run": run})
    return [Child(child, workflow, status, tuple(path), made) for child, workflow, status, path, made in rows]
