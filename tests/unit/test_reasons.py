"""Why a run is not running: every situation has its own sentence."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from outbox.reasons import ANY_CHILD, COUNTED_AHEAD, Calls, Children, Situation, Worker, explain

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


def calls(state: str = "ready", count: int = 1, /, **more: Any) -> Calls:
    base = Calls(
        kind="step", name="step:charge", queue="default", state=state, tried=False, count=count, counted=count,
        path=(3, 1, 1), due_at=None, owners=(), serving=(7,), knowing=(7,),
    )  # fmt: skip
    return replace(base, **more)


def timer(name: str, seconds: float, count: int = 1) -> Calls:
    return calls(
        "waiting", count, kind="timer", name=name, counted=0, due_at=NOW + timedelta(seconds=seconds)
    )


GPU: dict[str, Any] = {"queue": "gpu", "serving": (), "knowing": ()}
CHILD = "019aa0c6-0000-7000-8000-0000000000c1"


def fault(type_: str, message: str) -> dict[str, str]:
    return {"type": type_, "message": message}


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
    "of a version that nobody has": (
        at("shelved", IGNORANT, version="2"),
        f"set aside: no live worker of queue 'default' has version '2' of workflow 'w': {START}",
    ),
    "paused": (at("paused", ALIVE), f"paused; `stepwell runs resume {RUN}` resumes it"),
    "paused, to be cancelled": (
        at("paused", ALIVE, cancel_asked=True), "to be cancelled: a worker is about to apply it"
    ),
    "waiting for a signal": (
        at("waiting", ALIVE, awaits=("approved",), doing=(2,)), "waiting for a signal 'approved' (call 2)"
    ),
    "waiting for a signal for a time": (
        at("waiting", ALIVE, awaits=("approved",), doing=(2,), due_at=NOW + timedelta(minutes=5)),
        "waiting for a signal 'approved' until 2026-01-02 03:09:05 UTC (in 5 min) (call 2)",
    ),
    "waiting for a signal, and another has come": (
        at("waiting", ALIVE, awaits=("approved",), sent=("aproved",)),
        "waiting for a signal 'approved'; sent but not waited for: 'aproved'",
    ),
    "waiting for a signal that has come": (
        at("waiting", ALIVE, awaits=("approved",), sent=("approved", "x")),
        "waiting for a signal 'approved'; 'approved' was sent: a worker is about to hand it over",
    ),
    "waiting for a signal that has come and nobody there": (
        at("waiting", DEAD, awaits=("approved",), sent=("approved",)),
        ("waiting for a signal 'approved'; 'approved' was sent: no worker is alive to do so, start one "
        "(`stepwell worker APP`)"),
    ),
    "waiting for a signal or a timer": (
        at("waiting", ALIVE, awaits=("a", "b"), calls=(timer("sleep", 90),), doing=(1,)),
        "waiting for the signals 'a', 'b', a timer until 2026-01-02 03:05:35 UTC (in 90 s) (call 1)",
    ),
    "waiting for a signal with a limit beside other calls": (
        at("waiting", ALIVE, awaits=("a",), calls=(timer("timeout", 90), timer("sleep", 95, 3)), doing=(1,)),
        ("waiting for a signal 'a' until 2026-01-02 03:05:35 UTC (in 90 s), 3 timers, the next at "
        "2026-01-02 03:05:40 UTC (in 95 s) (call 1)"),
    ),
    "its timer is overdue and nobody there": (
        at("waiting", DEAD, calls=(timer("sleep", -7200),)),
        ("waiting for a timer until 2026-01-02 01:04:05 UTC (2 h ago); its time has come and no worker is alive, "
        "start one (`stepwell worker APP`)"),
    ),
    "waiting for one step": (
        at("waiting", ALIVE, pending=1, calls=(calls(),), doing=(3,)), "waiting for step charge (call 3.1.1)"
    ),
    "waiting for steps": (
        at("waiting", ALIVE, pending=3, calls=(calls("ready", 3),), doing=(3,)), "waiting for 3 steps (call 3)"
    ),
    "its steps are executed": (
        at("waiting", ALIVE, pending=3, calls=(calls("claimed", owners=(7,)), calls("ready", 2))), None
    ),
    "its steps wait for a worker of their queue": (
        at("waiting", ALIVE, pending=3, doing=(3,),
           calls=(calls("claimed", owners=(7,)), calls("ready", 1, **GPU), calls("shelved", 1, **GPU, name="step:draw"))),
        ("waiting for 3 steps (call 3); 1 being executed; "
        "step charge (call 3.1.1) waits in queue 'gpu', which no live worker serves: start one (`stepwell worker APP --queue gpu`); "
        "step draw (call 3.1.1) waits in queue 'gpu', which no live worker serves: start one (`stepwell worker APP --queue gpu`)"),
    ),
    "its steps are known to nobody": (
        at("waiting", ALIVE, pending=2, calls=(calls("shelved", 2, knowing=()),)),
        ("waiting for 2 steps; 2× step charge wait in queue 'default', none of whose live workers knows it: start one with "
        "the APP that defines it (`stepwell worker APP`)"),
    ),
    "its step is held by the dead": (
        at("waiting", ALIVE, SILENT, pending=1, calls=(calls("claimed", owners=(8,)),)),
        ("waiting for step charge (call 3.1.1); step charge (call 3.1.1) is held by worker 8, which shows no sign of "
        "life"),
    ),
    "its step is tried again": (
        at("waiting", ALIVE, pending=1, calls=(calls("waiting", tried=True, due_at=NOW + timedelta(seconds=20)),)),
        ("waiting for step charge (call 3.1.1); step charge (call 3.1.1) is tried again at 2026-01-02 03:04:25 UTC "
        "(in 20 s)"),
    ),
    "its step is on hold": (
        at("waiting", ALIVE, pending=2, calls=(calls("waiting", tried=True), calls("ready", name="step:draw"))),
        ("waiting for 2 steps; step charge (call 3.1.1) is on hold after an interruption; once nothing else is waited "
        "for, the run is blocked for a person to decide"),
    ),
    "its step is paused": (
        at("waiting", ALIVE, pending=1, calls=(calls("paused"),)),
        f"waiting for step charge (call 3.1.1); step charge (call 3.1.1) is paused; `stepwell runs resume {RUN}` resumes",
    ),
    "its step is suspect": (
        at("waiting", ALIVE, pending=1, calls=(calls("suspect"),)),
        ("waiting for step charge (call 3.1.1); step charge (call 3.1.1) is suspect and will be tried alone"),
    ),
    "the window of a map is full": (
        at("waiting", ALIVE, pending=90, calls=(calls("ready", 10), calls("waiting", 80)), doing=(1,)),
        "waiting for 90 steps (call 1)",
    ),
    "waiting for a child": (
        at("waiting", ALIVE, awaits=(ANY_CHILD,), children=Children(open=1, first=CHILD), doing=(2,)),
        f"waiting for child run {CHILD} (call 2)",
    ),
    "waiting for a blocked child": (
        at("waiting", ALIVE, awaits=(ANY_CHILD,), children=Children(blocked=1, first_blocked=CHILD)),
        f"waiting for child run {CHILD} (blocked)",
    ),
    "waiting for children that are counted, and steps": (
        at("waiting", ALIVE, pending=5, calls=(calls("ready", 2),), children=Children(open=3, first=CHILD)),
        f"waiting for 2 steps, 3 child runs ({CHILD} the first of them)",
    ),
    "waiting for children, one blocked": (
        at("waiting", ALIVE, pending=3, children=Children(open=2, blocked=1, first="x", first_blocked=CHILD)),
        f"waiting for 3 child runs (blocked: {CHILD})",
    ),
    "waiting for a child whose result is there": (
        at("waiting", ALIVE, awaits=(ANY_CHILD,)), "waiting to be woken"
    ),
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
