"""Why a run is not running: every situation has its own sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from outbox.reasons import COUNTED_AHEAD, Situation, Worker, explain

RUN = UUID("019aa0c6-0000-7000-8000-000000000001")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

ALIVE = Worker(id=7, host="h", pid=42, beat=3, dead=False, serves=True, knows=True, locked=True)
SILENT = replace(ALIVE, id=8, locked=False)
DEAD = replace(ALIVE, id=9, dead=True, locked=False)
IGNORANT = replace(ALIVE, id=10, knows=False)
ELSEWHERE = replace(ALIVE, id=11, serves=False)

START = "start one with the APP that defines 'w' (`stepwell worker APP`)"


def at(task_state: str | None = "ready", /, *workers: Worker, **more: Any) -> Situation:
    base = Situation(
        run=RUN, state="open", error=None, now=NOW, task_state=task_state, queue="default", workflow="w", due_at=None,
        doing=(), attempt=0, interruptions=0, pending=0, cancelling=False, claimed_by=None, cancel_asked=False,
        step=None, failures=0, last_error=None, ahead=0, workers=workers,
    )  # fmt: skip
    return replace(base, **more)


def fault(type_: str, message: str) -> str:
    return json.dumps({"type": type_, "message": message})


CASES: dict[str, tuple[Situation, str | None]] = {
    "it has ended": (at(None, state="succeeded"), None),
    "it runs": (at("claimed", ALIVE, claimed_by=7), None),
    "blocked": (
        at(None, state="blocked", error=fault("HistoryMismatch", "expected a, got b")),
        f"blocked: HistoryMismatch: expected a, got b; after the fix, `stepwell runs retry {RUN}` resumes it",
    ),
    "without a task": (
        at(None),
        "open without a task, so nothing will ever run it; this should not happen, please report it",
    ),
    "its worker is dead": (
        at("claimed", DEAD, ALIVE, claimed_by=9),
        "claimed by worker 9 (host h, pid 42), which was declared dead; another worker takes it over within seconds",
    ),
    "its worker is dead and it was the only one": (
        at("claimed", DEAD, claimed_by=9),
        f"claimed by worker 9 (host h, pid 42), which was declared dead; to take it over, {START}",
    ),
    "its worker is gone": (
        at("claimed", ALIVE, claimed_by=5),
        "claimed by worker 5, which was declared dead; another worker takes it over within seconds",
    ),
    "its worker shows no sign of life": (
        at("claimed", SILENT, ALIVE, claimed_by=8),
        "claimed by worker 8 (host h, pid 42), which shows no sign of life; another worker takes it over within seconds",
    ),
    "to be cancelled in a step": (
        at("claimed", ALIVE, claimed_by=7, cancelling=True, doing=(3, 1)),
        "to be cancelled: worker 7 (host h, pid 42) stops it at the end of call 3.1",
    ),
    "to be cancelled while it waits": (
        at("waiting", ALIVE, cancel_asked=True),
        "to be cancelled: a worker is about to apply it",
    ),
    "to be cancelled and nobody there": (
        at("ready", DEAD, cancel_asked=True),
        "to be cancelled: no worker is alive to do so, start one (`stepwell worker APP`)",
    ),
    "first in line": (
        at("ready", ALIVE),
        "ready in queue 'default', first in line for the next free slot",
    ),
    "behind one": (at("ready", ALIVE, ahead=1), "ready in queue 'default', behind 1 ready task"),
    "behind many": (at("ready", ALIVE, ahead=1234), "ready in queue 'default', behind 1,234 ready tasks"),
    "behind more than is counted": (
        at("ready", ALIVE, ahead=COUNTED_AHEAD + 1),
        "ready in queue 'default', behind more than 10,000 ready tasks",
    ),
    "no worker": (at("ready"), f"ready, but no live worker serves queue 'default': {START}"),
    "no worker on this queue": (
        at("ready", ELSEWHERE, queue="mail"),
        ("ready, but no live worker serves queue 'mail': start one with the APP that defines 'w' "
        "(`stepwell worker APP --queue mail`)"),
    ),
    "only dead and silent workers": (
        at("ready", DEAD, SILENT),
        f"ready, but no live worker serves queue 'default': {START}",
    ),
    "no worker knows it": (
        at("ready", IGNORANT),
        f"ready, but no live worker of queue 'default' knows workflow 'w': {START}",
    ),
    "set aside": (
        at("shelved", IGNORANT),
        f"set aside: no live worker of queue 'default' knows workflow 'w': {START}",
    ),
    "set aside until just now": (
        at("shelved", ALIVE),
        "set aside: a worker that knows it has just come and is about to make it ready again",
    ),
    "suspect": (
        at("suspect", ALIVE, interruptions=2, doing=(1,)),
        ("suspect: 2 workers died while they had it at call 1, so it will be tried alone; "
        "it waits for a worker with nothing else in flight"),
    ),
    "suspect and nobody there": (
        at("suspect", interruptions=2),
        ("suspect: 2 workers died while they had it, so it will be tried alone; "
        f"no live worker serves queue 'default': {START}"),
    ),
    "sleeping": (
        at("waiting", ALIVE, due_at=NOW + timedelta(seconds=90), doing=(2,), attempt=1),
        "sleeping until 2026-01-02 03:05:35 UTC (in 90 s) (call 2)",
    ),
    "to start later": (
        at("waiting", ALIVE, due_at=NOW + timedelta(days=3)),
        "to start at 2026-01-05 03:04:05 UTC (in 3 d)",
    ),
    "to be tried again": (
        at("waiting", ALIVE, due_at=NOW + timedelta(minutes=5), doing=(0,), attempt=2, step="send_welcome",
           failures=2, last_error=fault("SMTPError", "busy")),
        ("waiting until 2026-01-02 03:09:05 UTC (in 5 min) to retry step send_welcome (call 0) after 2 failures: "
        "SMTPError: busy"),
    ),
    "to be tried again after an interruption": (
        at("waiting", ALIVE, due_at=NOW + timedelta(seconds=2.5), doing=(0,), attempt=2, step="send_welcome"),
        ("waiting until 2026-01-02 03:04:07 UTC (in 2.5 s) to execute step send_welcome (call 0) again "
        "after an interruption"),
    ),
    "overdue and nobody there": (
        at("waiting", due_at=NOW - timedelta(hours=5), doing=(0,), attempt=1),
        ("waiting since its time came at 2026-01-01 22:04:05 UTC (5 h ago): no worker is alive, start one "
        "(`stepwell worker APP`)"),
    ),
    "waiting for others": (at("waiting", ALIVE, pending=3), "waiting for 3 other tasks of its own"),
    "waiting to be woken": (at("waiting", ALIVE), "waiting to be woken"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_sentence_when(case: str) -> None:
    situation, sentence = CASES[case]
    assert explain(situation) == sentence


def test_a_long_message_is_cut() -> None:
    said = explain(at(None, state="blocked", error=fault("E", "x" * 5000)))
    assert said is not None
    assert len(said) < 500
    assert "x…; after the fix" in said


def test_a_worker_without_its_lock_is_alive_if_its_beat_changes() -> None:
    first = at("claimed", SILENT, claimed_by=8)
    assert first.needs_second_look()
    assert explain(at("claimed", replace(SILENT, beat=4), claimed_by=8), first) is None
    assert "no sign of life" in str(explain(first, first))


@pytest.mark.parametrize(
    "situation",
    [
        at(None, SILENT, state="succeeded"),
        at(None, SILENT, state="blocked"),
        at("claimed", ALIVE, SILENT, claimed_by=7),
        at("claimed", DEAD, claimed_by=9),
        at("ready", ALIVE, DEAD),
        at("ready"),
    ],
)
def test_one_look_is_enough_when_no_beat_decides(situation: Situation) -> None:
    assert not situation.needs_second_look()


def test_a_silent_worker_needs_a_second_look() -> None:
    assert at("ready", SILENT).needs_second_look()
    assert at("waiting", SILENT).needs_second_look()
