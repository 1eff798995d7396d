"""Runs with calls that are tasks of their own, for the tests of the protocol."""

from __future__ import annotations

from typing import Any

from tests.protocol import Db, Held, Lab, Worker, step_at
from worker.engine.transitions import Extra, TaskRow, Writing

WAKES_WHEN_ALL_ARE_DONE, WAKES_WHEN_ONE_FAILS, WAKES_ALWAYS = 1, 2, 3
FAULT = {"type": "E", "message": "no"}


def knowing(lab: Lab, db: Db | None = None) -> Worker:
    """Register a worker that executes runs and steps."""
    worker = lab.worker("w", "step:send", db=db)
    if db is not None and not db.autocommit:
        db.commit()
    return worker


def joined(lab: Lab, worker: Worker, *rows: Extra, **more: Any) -> Held:
    """Return what was a claim of a run before it was parked with these calls."""
    lab.enqueue()
    held = only("w", worker).take()
    worker.apply(held, held.park(extras=rows, **more))
    return held


def only(name: str, worker: Worker) -> Worker:
    """Return the same worker, claiming nothing else."""
    return Worker(worker.db, [name], worker.queues, worker.id)


def branches(count: int, wakes: int = WAKES_WHEN_ALL_ARE_DONE) -> list[Extra]:
    return [step_at(1, branch, 1, wakes=wakes) for branch in range(1, count + 1)]


def completed(held: Held) -> Writing:
    return held.done(held.record(*held.claim.path))


def failed(held: Held) -> Writing:
    return held.done(held.record(*held.claim.path, outcome="failed", value=None, error=FAULT))


def pending(lab: Lab, held: Held) -> int:
    return int(lab.task(held.task, "pending"))


def windowed(lab: Lab, worker: Worker, items: int, limit: int) -> Held:
    window = TaskRow(kind="window", path=(1,), name="window", released=limit)
    rows = [step_at(1, k, 1, windowed=True, held=k > limit) for k in range(1, items + 1)]
    return joined(lab, worker, window, *rows)
