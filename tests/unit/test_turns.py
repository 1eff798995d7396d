"""Where a claim stands after a write that was applied, and after one that came too late."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from worker.engine.claims import Claim
from worker.engine.turns import Release, Standing, Turn
from worker.replay.records import Record

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def claim(**given: object) -> Claim:
    """Return the second claim of a run: the first died at its second call."""
    run_id = uuid4()
    values: dict[str, object] = {
        "task": 1, "run_id": run_id, "kind": "run", "name": "w", "attempt": 2, "position": 3, "doing": [2], "wakeups": 0,
        "seq": 1, "interrupted": True, "interruptions": 1, "cancelling": True, "turn": 1, "group": 10, "due_in": None,
        "waited": None, "deadline_in": None, "running_for": 0.0, "now": NOW, "epoch": 0, "created_at": NOW, "version": "",
        "labels": None, "input": "{}", "path": [], "parent": None, "workflow": "w", "args": None, "driven": 1,
        "pending": 0, "signals": 0, "seed": run_id, "key_epoch": 0, "base_epoch": 0, "awaited": False,
    }  # fmt: skip
    return Claim(**(values | given))  # type: ignore[arg-type]  # one field at a time


def recorded(seq: int, kind: str = "step") -> Record:
    path, n = ((), 2) if kind == "cancel" else ((seq,), 0)
    outcome = "cancelled" if kind == "cancel" else "completed"
    return Record(path, n, kind, "w", outcome, "1", None, None, NOW, seq=seq)


@pytest.fixture
def standing() -> Standing:
    return Standing(claim(), [recorded(1)], time.monotonic())


def test_an_interruption_whose_record_came_too_late_is_still_to_be_recorded(standing: Standing) -> None:
    standing.interrupted = False  # as whoever has put its record into a write
    standing.start_over([recorded(1), recorded(2)])
    assert standing.interrupted


def test_an_interruption_that_is_recorded_is_not_recorded_again(standing: Standing) -> None:
    writing = standing.move(Turn(Release()), (2,))
    standing.applied(writing)
    standing.start_over([recorded(1), recorded(2)])
    assert not standing.interrupted


def test_a_cancellation_whose_record_came_too_late_is_still_to_be_recorded(standing: Standing) -> None:
    standing.cancelled = True  # as whoever has handed it to the body
    standing.start_over([recorded(1), recorded(2)])
    assert not standing.cancelled


def test_a_cancellation_that_somebody_else_has_recorded_is_taken_note_of(standing: Standing) -> None:
    standing.start_over([recorded(1), recorded(2, "cancel")])
    assert standing.cancelled
    assert standing.remaining() is None


def test_what_follows_is_numbered_behind_what_was_recorded_meanwhile(standing: Standing) -> None:
    standing.start_over([recorded(1), recorded(2)])
    assert standing.record_sleep((3,)).seq == 3
