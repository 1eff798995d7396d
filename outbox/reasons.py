"""Why a run is not running, as one sentence for people. Pure: `situation` reads, `explain` judges.

The database does not say who is alive: a worker's row holds a count of beats and no time. A worker counts as
alive while its supervisor holds the advisory lock on its id, which costs one look. Where a pooler hides that
lock, or the supervisor is gone, only a second look tells, a moment later: has the count of beats changed?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from outbox.codec import decode
from outbox.history import dotted, not_found
from outbox.queries import load
from outbox.sealing import NO_KEYS, Keyring
from outbox.statements import Rows, Statement

COUNTED_AHEAD = 10_000
LONGEST_MESSAGE = 300
BEATS_BETWEEN_LOOKS = 1.5
OVERDUE = timedelta(seconds=2)
ANY_CHILD = "stepwell:child"
"""What a run awaits that waits for the result of a child."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as its row shows it, seen from one run: does it serve the run's queue, know its workflow?"""

    id: int
    host: str
    pid: int
    beat: int
    dead: bool
    serves: bool
    knows: bool
    locked: bool

    def __str__(self) -> str:
        return f"worker {self.id} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of a run that are tasks of their own and have all of this in common. `path` is that of the first."""

    kind: str
    name: str
    queue: str
    state: str
    tried: bool
    """they were claimed before"""
    count: int
    counted: int
    """how many of them count in `pending` of their run"""
    path: tuple[int, ...]
    due_at: datetime | None
    """the first time"""
    owners: tuple[int, ...]
    """the workers that have claimed them, and of all workers"""
    serving: tuple[int, ...]
    """… those that serve their queue"""
    knowing: tuple[int, ...]
    """… and know their name as well"""

    def __str__(self) -> str:
        name = f"step {self.name.removeprefix('step:')}"
        return f"{name} (call {dotted(self.path)})" if self.count == 1 else f"{self.count:,}× {name}"


@dataclass(frozen=True, slots=True)
class Children:
    """How many runs that a run has called have not ended, and which is the first of each kind."""

    open: int = 0
    blocked: int = 0
    first: str | None = None
    first_blocked: str | None = None


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known of one run at one moment. What concerns its task is None when it has none."""

    run: UUID
    state: str
    error: Mapping[str, Any] | None
    now: datetime
    task_state: str | None
    queue: str
    workflow: str
    due_at: datetime | None
    doing: tuple[int, ...]
    attempt: int
    interruptions: int
    pending: int
    cancelling: bool
    claimed_by: int | None
    cancel_asked: bool
    step: str | None
    failures: int
    last_error: Mapping[str, Any] | None
    ahead: int
    workers: tuple[Worker, ...]
    version: str = ""
    awaits: tuple[str, ...] = ()
    calls: tuple[Calls, ...] = ()
    children: Children = Children()
    sent: tuple[str, ...] = ()

    def needs_second_look(self) -> bool:
        """Tell whether the sentence depends on workers that only a change of their beat shows to be alive."""
        if self.state != "open" or self.task_state is None:
            return False
        if self.task_state == "claimed":
            return any(w.id == self.claimed_by and not w.dead and not w.locked for w in self.workers)
        return any(not w.dead and not w.locked for w in self.workers)

    def alive(self, earlier: Situation | None) -> tuple[Worker, ...]:
        """Return the workers that live, as far as this look and an earlier one tell."""
        beats = {w.id: w.beat for w in earlier.workers} if earlier else {}
        return tuple(
            w for w in self.workers if not w.dead and (w.locked or beats.get(w.id, w.beat) != w.beat)
        )


def situation(run: UUID, keyring: Keyring = NO_KEYS) -> Statement[Situation]:
    """Read what `explain` judges. Raises RunNotFound."""

    def read(rows: Rows) -> Situation:
        if not rows:
            raise not_found(run)
        (state, error, now, task_state, queue, workflow, due_at, doing, attempt, interruptions, pending, cancelling,
         claimed_by, cancel_asked, step, failures, last_error, ahead, workers, version, awaits, calls, children,
         sent) = rows[0]  # fmt: skip
        return Situation(
            run=run,
            state=state,
            error=_fault(error, keyring),
            now=now,
            task_state=task_state,
            queue=queue or "",
            workflow=workflow or "",
            due_at=due_at,
            doing=tuple(doing or ()),
            attempt=attempt or 0,
            interruptions=interruptions or 0,
            pending=pending or 0,
            cancelling=bool(cancelling),
            claimed_by=claimed_by,
            cancel_asked=cancel_asked,
            step=step,
            failures=failures or 0,
            last_error=_fault(last_error, keyring),
            ahead=ahead or 0,
            workers=() if workers is None else decode(workers, tuple[Worker, ...], where="the workers"),
            version=version,
            awaits=tuple(awaits or ()),
            calls=() if calls is None else decode(calls, tuple[Calls, ...], where="the calls"),
            children=decode(children, Children, where="the children"),
            sent=tuple(sent or ()),
        )

    return Statement(load("run_situation"), {"run": run}, read)


def explain(it: Situation, earlier: Situation | None = None) -> str | None:
    """Return why the run is not running, or None if it runs or has ended."""
    if it.state == "blocked":
        return f"blocked{_cause(it.error)}; {after_the_fix(it.run)}"
    if it.state != "open":
        return None
    if it.task_state is None:
        return "open without a task, so nothing will ever run it; this should not happen, please report it"
    alive = it.alive(earlier)
    if it.task_state == "claimed":
        return _claimed(it, alive)
    if it.cancel_asked:
        return "to be cancelled: " + ("a worker is about to apply it" if alive else _NOBODY)
    if it.task_state == "paused":
        return f"paused; `stepwell runs resume {it.run}` resumes it"
    if it.task_state == "waiting" and (awaited := _awaited(it)):
        return _waiting_for(it, awaited, alive)
    return {"ready": _ready, "shelved": _shelved, "suspect": _suspect, "waiting": _waiting}[it.task_state](
        it, alive
    )


def after_the_fix(run: UUID) -> str:
    """Return what to do about a blocked run."""
    return f"after the fix, `stepwell runs retry {run}` resumes it"


_NOBODY = "no worker is alive to do so, start one (`stepwell worker APP`)"


def _claimed(it: Situation, alive: tuple[Worker, ...]) -> str | None:
    owner = next((w for w in it.workers if w.id == it.claimed_by), None)
    others = any(w.serves and w.knows for w in alive)
    heir = "another worker takes it over within seconds" if others else f"to take it over, {_start(it)}"
    if owner is None or owner.dead:
        return f"claimed by {owner or f'worker {it.claimed_by}'}, which was declared dead; {heir}"
    if owner not in alive:
        return f"claimed by {owner}, which shows no sign of life; {heir}"
    if it.cancelling or it.cancel_asked:
        return f"to be cancelled: {owner} stops it at the end of call {dotted(it.doing) or 'one'}"
    return None


def _ready(it: Situation, alive: tuple[Worker, ...]) -> str:
    if missing := _nobody_for(it, alive):
        return f"ready, but {missing}"
    if it.ahead == 0:
        return f"ready in queue {it.queue!r}, first in line for the next free slot"
    count = f"more than {COUNTED_AHEAD:,}" if it.ahead > COUNTED_AHEAD else f"{it.ahead:,}"
    return f"ready in queue {it.queue!r}, behind {count} ready task{'' if it.ahead == 1 else 's'}"


def _shelved(it: Situation, alive: tuple[Worker, ...]) -> str:
    missing = (
        _nobody_for(it, alive) or "a worker that knows it has just come and is about to make it ready again"
    )
    return f"set aside: {missing}"


def _suspect(it: Situation, alive: tuple[Worker, ...]) -> str:
    where = f" at call {dotted(it.doing)}" if it.doing else ""
    told = f"suspect: {it.interruptions} workers died while they had it{where}, so it will be tried alone"
    return f"{told}; {_nobody_for(it, alive) or 'it waits for a worker with nothing else in flight'}"


def _waiting(it: Situation, alive: tuple[Worker, ...]) -> str:
    if it.due_at is None:
        return f"waiting for {it.pending} other tasks of its own" if it.pending else "waiting to be woken"
    when = _moment(it.due_at, it.now)
    if it.now - it.due_at > OVERDUE and not alive:
        return f"waiting since its time came at {when}: no worker is alive, start one (`stepwell worker APP`)"
    path = dotted(it.doing)
    if it.step is not None and it.failures:
        times = f"{it.failures} failure{'' if it.failures == 1 else 's'}"
        return (
            f"waiting until {when} to retry step {it.step} (call {path}) after {times}{_cause(it.last_error)}"
        )
    if it.step is not None:
        return f"waiting until {when} to execute step {it.step} (call {path}) again after an interruption"
    return f"sleeping until {when} (call {path})" if path else f"to start at {when}"


# -- what happens elsewhere ----------------------------------------------------------------------------


def _awaited(it: Situation) -> str:
    """Return what the run waits for that is not its own task's to do; nothing if that is nothing."""
    signals = [repr(name) for name in it.awaits if name != ANY_CHILD]
    steps = [calls for calls in it.calls if calls.kind == "step"]
    timers = [calls for calls in it.calls if calls.kind == "timer" and calls.name == "sleep"]
    limits = [calls.due_at for calls in it.calls if calls.name == "timeout" and calls.due_at]
    parts = []
    if signals:
        until = f" until {_moment(min(limits), it.now)}" if limits else ""
        parts.append(f"{'a signal' if len(signals) == 1 else 'the signals'} {', '.join(signals)}{until}")
    if steps:
        count = sum(calls.count for calls in steps)
        parts.append(str(steps[0]) if count == 1 else f"{count:,} steps")
    if ANY_CHILD in it.awaits or it.pending > sum(calls.counted for calls in it.calls):
        parts.append(_child_runs(it.children))
    for calls in timers:
        when = _moment(calls.due_at or it.now, it.now)
        parts.append(
            f"a timer until {when}" if calls.count == 1 else f"{calls.count:,} timers, the next at {when}"
        )
    return ", ".join(part for part in parts if part)


def _child_runs(children: Children) -> str:
    count = children.open + children.blocked
    if not count:
        return ""
    blocked = f" (blocked: {children.first_blocked})" if children.first_blocked else ""
    if count == 1:
        return (
            f"child run {children.first or children.first_blocked}{' (blocked)' if children.blocked else ''}"
        )
    return f"{count:,} child runs{blocked or f' ({children.first} the first of them)'}"


def _waiting_for(it: Situation, awaited: str, alive: tuple[Worker, ...]) -> str | None:
    """Return what the run waits for and what is in the way; None if that is being executed."""
    living = {w.id for w in alive}
    executed = sum(
        calls.count for calls in it.calls if calls.state == "claimed" and living.intersection(calls.owners)
    )
    obstacles = [said for calls in it.calls if (said := _obstacle(it, calls, living))]
    if executed and not obstacles:
        return None
    there = [repr(name) for name in it.sent if name in it.awaits]
    if there:
        applying = "a worker is about to hand it over" if alive else _NOBODY
        obstacles.append(f"{', '.join(there)} was sent: {applying}")
    elif it.sent and any(name != ANY_CHILD for name in it.awaits):
        obstacles.append(f"sent but not waited for: {', '.join(map(repr, it.sent))}")
    overdue = [calls.due_at for calls in it.calls if calls.due_at and it.now - calls.due_at > OVERDUE]
    if not alive and (overdue or (it.due_at and it.now - it.due_at > OVERDUE)):
        obstacles.append("its time has come and no worker is alive, start one (`stepwell worker APP`)")
    until = f" until {_moment(it.due_at, it.now)}" if it.due_at else ""
    call = f" (call {dotted(it.doing)})" if it.doing and "(call " not in awaited else ""
    doing = [f"{executed:,} being executed"] if executed else []
    return "; ".join([f"waiting for {awaited}{until}{call}", *doing, *obstacles])


def _obstacle(it: Situation, calls: Calls, living: set[int]) -> str:
    """Return why these calls are not executed, if it is nothing that passes by itself in a moment."""
    if calls.kind != "step":
        return ""
    many = calls.count > 1
    match calls.state:
        case "claimed" if not living.intersection(calls.owners):
            owner = ", ".join(map(str, calls.owners))
            return f"{calls} {'are' if many else 'is'} held by worker {owner}, which shows no sign of life"
        case "paused":
            return f"{calls} {'are' if many else 'is'} paused; `stepwell runs resume {it.run}` resumes"
        case "ready" | "shelved" | "suspect":
            if nobody := _nobody_executes(calls, living):
                return f"{calls} {'wait' if many else 'waits'} in queue {calls.queue!r}, {nobody}"
            return f"{calls} {'are' if many else 'is'} suspect and will be tried alone" * (
                calls.state == "suspect"
            )
        case "waiting" if calls.due_at is not None:
            return f"{calls} {'are' if many else 'is'} tried again at {_moment(calls.due_at, it.now)}"
        case "waiting" if calls.tried:
            return f"{calls} {'are' if many else 'is'} on hold after an interruption; once nothing else is waited for, the run is blocked for a person to decide"
        case _:
            return ""


def _nobody_executes(calls: Calls, living: set[int]) -> str:
    queue = "" if calls.queue == "default" else f" --queue {calls.queue}"
    if not living.intersection(calls.serving):
        return f"which no live worker serves: start one (`stepwell worker APP{queue}`)"
    if not living.intersection(calls.knowing):
        return f"none of whose live workers knows it: start one with the APP that defines it (`stepwell worker APP{queue}`)"
    return ""


# -- parts ---------------------------------------------------------------------------------------------


def _nobody_for(it: Situation, alive: tuple[Worker, ...]) -> str | None:
    """Return that no live worker can take the run, and what to do, or None if one can."""
    serving = [w for w in alive if w.serves]
    if not serving:
        return f"no live worker serves queue {it.queue!r}: {_start(it)}"
    if not any(w.knows for w in serving):
        if it.version:
            return f"no live worker of queue {it.queue!r} has version {it.version!r} of workflow {it.workflow!r}: {_start(it)}"
        return f"no live worker of queue {it.queue!r} knows workflow {it.workflow!r}: {_start(it)}"
    return None


def _start(it: Situation) -> str:
    queue = "" if it.queue == "default" else f" --queue {it.queue}"
    return f"start one with the APP that defines {it.workflow!r} (`stepwell worker APP{queue}`)"


def _moment(then: datetime, now: datetime) -> str:
    seconds = (then - now).total_seconds()
    shown = f"{then.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"{shown} (in {_span(seconds)})" if seconds >= 0 else f"{shown} ({_span(-seconds)} ago)"


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _fault(error: str | None, keyring: Keyring) -> Mapping[str, Any] | None:
    return None if error is None else keyring.shown_fault(error, where="a recorded error")


def _cause(error: Mapping[str, Any] | None) -> str:
    """Return ': type: message' of a recorded fault, shortened."""
    fault = error or {}
    said = ": ".join(str(fault[part]) for part in ("type", "message") if fault.get(part))
    return f": {said[:LONGEST_MESSAGE]}{'…' if len(said) > LONGEST_MESSAGE else ''}" if said else ""
