"""A worker played by hand: it claims and flushes through the protocol's functions, one run at a time."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg

_ids = itertools.count(1_000_001)

DEFAULTS = ("default",)


@dataclass
class Claim:
    """A claimed run task, as far as a flush needs it."""

    task: int
    run: UUID
    attempt: int
    position: int
    epoch: int
    wakeups: int
    doing: list[int] | None


@dataclass
class Claimant:
    """A registered worker without a process. With `lock`, a session holds its advisory lock as a supervisor does."""

    db: psycopg.Connection[Any]
    names: tuple[str, ...]
    queues: tuple[str, ...] = DEFAULTS
    lock: bool = True
    id: int = field(default_factory=lambda: next(_ids))

    def __post_init__(self) -> None:
        self.db.execute(
            "select stepwell.register_v1(%s, null, 'testhost', 4711, '', %s, %s)",
            [self.id, list(self.queues), list(self.names)],
        )
        if self.lock:
            self.db.execute("select pg_advisory_lock(%s)", [self.id])

    def claim(self, queue: str = "default", *, alone: bool = False) -> Claim:
        """Claim the next run, and apply nothing else."""
        row = self.db.execute(
            "select task, run_id, attempt, position, epoch, wakeups, doing"
            " from stepwell.claim_v1(%s, %s, %s, 1, array_fill(0::bigint, array[20]), %s) where kind = 'run'",
            [self.id, queue, list(self.names), alone],
        ).fetchone()
        assert row is not None, "nothing to claim"
        return Claim(*row)

    def flush(
        self,
        claim: Claim,
        then: str,
        *records: dict[str, Any],
        end: dict[str, Any] | None = None,
        **more: Any,
    ) -> int:
        """Write one transition down; returns the verdict."""
        transition = {
            "i": 1, "task": claim.task, "attempt": claim.attempt, "position": claim.position,
            "run_id": str(claim.run), "epoch": claim.epoch, "then": then, "records": len(records),
            "wakeups": claim.wakeups, **more,
        }  # fmt: skip
        rows = [
            {"i": 1, "task": claim.task, "run_id": str(claim.run), "epoch": claim.epoch, "k": k, **record}
            for k, record in enumerate(records, 1)
        ]
        ends = [{"i": 1, "task": claim.task, "run_id": str(claim.run), **end}] if end else []
        moment = "2026-01-02T03:04:05+00:00"
        row = self.db.execute(
            "select (stepwell.flush_v1(%s, %s, %s, %s))[1]",
            [
                self.id,
                json.dumps([transition]),
                json.dumps([{"at": moment, **row} for row in rows]),
                json.dumps(ends),
            ],
        ).fetchone()
        assert row is not None
        claim.position += 1
        return int(row[0])

    def succeed(self, claim: Claim, output: Any = None) -> None:
        """End the run well."""
        record = {"path": [], "n": 0, "kind": "run", "name": "w", "outcome": "succeeded"}
        assert self.flush(claim, "finish", record, end={"state": "succeeded", "output": output}) == 1

    def end(self, claim: Claim, state: str, type_: str = "ValueError", message: str = "it broke") -> None:
        """End the run as failed, cancelled or blocked."""
        error = {"type": type_, "message": message}
        record = {"path": [], "n": 0, "kind": "run", "name": "w", "outcome": state, "error": error}
        assert self.flush(claim, "finish", record, end={"state": state, "error": error}) == 1

    def record(
        self, path: list[int], n: int, outcome: str, name: str = "send", **more: Any
    ) -> dict[str, Any]:
        """Return the record of one execution of a step."""
        return {"path": path, "n": n, "kind": "step", "name": name, "outcome": outcome, **more}
