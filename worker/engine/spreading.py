"""What becomes of several calls at once: tasks of their own for steps and timers, runs for workflows.

One join of calls that are branches by themselves is counted: its tasks wake the run when the last of them is done, so
that it costs one replay however many they are (I4). Every other call wakes the run when it is done. Pure.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from worker.engine.mailbox import timed_out
from worker.engine.transitions import ChildRow, Dropped, EmittedRow, Extra, Settled, StateRow, TaskRow
from worker.engine.turns import Spread, Standing
from worker.replay.decisions import Asked, Await, AwaitChild, DoStep, Settle, Sleep, TakeSignal, Wait, Window
from worker.replay.effects import Effects
from worker.replay.records import Path

COUNTED, COUNTED_FAILING, ALWAYS = 1, 2, 3
"""When a task wakes its run: see `wakes` in schema.sql."""

ANY_CHILD = "stepwell:child"
"""The signal that the result of any child is."""


def spread(awaiting: Await, standing: Standing) -> tuple[Spread, tuple[Extra, ...]]:
    """Return how to park, and the rows for the calls that no drive has come to before."""
    counted = None if standing.pending else _counted(awaiting)
    alone = len(awaiting.waits) == 1
    released = {window.path: _released(awaiting, window) for window in awaiting.windows}
    rows: list[Extra] = [
        TaskRow(kind="window", path=path, name="window", released=last) for path, last in released.items()
    ]
    awaits: set[str] = set()
    seconds: float | None = None
    for wait in awaiting.waits:
        match wait.call:
            case DoStep() as step if wait.fresh:
                rows.append(_step_row(step, wait, counted, released.get(wait.join) if wait.join else None))
            case Sleep() as sleep if wait.fresh:
                rows.append(_sleep_row(sleep))
            case TakeSignal() as signal:
                awaits.add(signal.name)
                if alone:
                    seconds = _left(signal, standing, fresh=wait.fresh)
                elif wait.fresh and signal.seconds is not None:
                    rows.append(_timeout_row(signal))
            case AwaitChild() as child:
                is_counted = child.starts and wait.alone and wait.join == counted
                if wait.fresh and child.starts:
                    rows.append(_child_row(child, counted=is_counted))
                if not (wait.fresh and is_counted):
                    awaits.add(ANY_CHILD)
            case _:
                pass
    remaining = standing.remaining()
    if remaining is not None:
        seconds = standing.cut_by_deadline(remaining if seconds is None else seconds)
    # The task is at no call, unless it keeps the time of one: a step at which it were would be taken for its own.
    at = awaiting.waits[0].call.path if alone and isinstance(awaiting.waits[0].call, TakeSignal) else None
    return Spread(at, tuple(sorted(awaits)), seconds), tuple(rows)


def held_only(awaiting: Await, standing: Standing) -> DoStep | None:
    """Return a step that waits for a person, if nothing else is waited for."""
    held = [
        wait.call
        for wait in awaiting.waits
        if isinstance(wait.call, DoStep) and _is_held(wait.call, standing)
    ]
    return held[0] if len(held) == len(awaiting.waits) else None


def extras_of(effects: Effects) -> list[Extra]:
    """Return the rows for what a body has done beside its calls."""
    rows: list[Extra] = [Dropped(path=path) for path in effects.dropped]
    rows += [StateRow(key=key, value=_raw(value)) for key, value in effects.states.items()]
    rows += [EmittedRow(n=each.n, name=each.name, value=_raw(each.value)) for each in effects.emitted]
    rows += [
        ChildRow(
            path=each.path, workflow=each.workflow.name, version=each.workflow.version, queue=each.workflow.queue,
            input=_raw(each.input), detached=each.detached, begun=True, deadline=each.deadline,
        )
        for each in effects.starting
    ]  # fmt: skip
    return rows


def settling(decision: Settle) -> list[Extra]:
    """Return what makes the run wait for the calls that somebody may still execute."""
    return [Settled(path=path) for path in decision.paths] if decision.fresh else []


def _counted(awaiting: Await) -> Path | None:
    """Return the join with the most calls of its own that are new: the one whose tasks are counted."""
    sizes = Counter(
        wait.join for wait in awaiting.waits if wait.alone and wait.fresh and _can_count(wait.call)
    )
    return sizes.most_common(1)[0][0] if sizes else None


def _can_count(call: Asked) -> bool:
    """Tell whether what is made for a call can count down its join. A child that was started is made already."""
    return isinstance(call, DoStep) or (isinstance(call, AwaitChild) and call.starts)


def _released(awaiting: Await, window: Window) -> int:
    """Return the number of the last item that a window lets begin at once: of those that are left, after a retry."""
    left = [wait.call.path[-2] for wait in awaiting.waits if wait.fresh and wait.join == window.path]
    return sorted(left)[: window.limit][-1]


def _step_row(step: DoStep, wait: Wait, counted: Path | None, released: int | None) -> TaskRow:
    wakes = ALWAYS
    if wait.alone and wait.join == counted:
        wakes = COUNTED_FAILING if wait.fails_fast else COUNTED
    return TaskRow(
        kind="step", path=step.path, name=step.step.claimed_as, queue=step.step.queue, args=_raw(step.arguments),
        wakes=wakes, windowed=released is not None, held=released is not None and step.path[-2] > released,
    )  # fmt: skip


def _sleep_row(sleep: Sleep) -> TaskRow:
    record = b'{"kind":"sleep","name":"sleep","outcome":"completed"}'
    return TaskRow(
        kind="timer", path=sleep.path, name="sleep", delay=sleep.seconds, until=sleep.until, wakes=ALWAYS,
        args=msgspec.Raw(record),
    )  # fmt: skip


def _timeout_row(signal: TakeSignal) -> TaskRow:
    record = {
        "kind": "signal", "name": signal.name, "outcome": "failed", "error": timed_out(signal.name, signal.seconds),
    }  # fmt: skip
    return TaskRow(
        kind="timer", path=signal.path, name="timeout", delay=signal.seconds, wakes=ALWAYS,
        args=msgspec.Raw(msgspec.json.encode(record)),
    )  # fmt: skip


def _child_row(child: AwaitChild, *, counted: bool) -> ChildRow:
    workflow = child.workflow
    return ChildRow(
        path=child.path, workflow=workflow.name, version=workflow.version, queue=workflow.queue,
        input=_raw(child.input), counted=counted,
    )  # fmt: skip


def _left(signal: TakeSignal, standing: Standing, *, fresh: bool) -> float | None:
    """Return how long the only call still waits: as the task has kept it, else from now on."""
    left = standing.due_in(signal.path)
    return left if left is not None else signal.seconds if fresh else None


def _is_held(step: DoStep, standing: Standing) -> bool:
    executions = standing.executions(step)
    return bool(executions) and executions[-1].outcome == "interrupted" and step.step.on_crash == "hold"


def _raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())
