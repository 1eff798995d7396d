"""The protocol in memory: what a flush, a wake, a death or a retry does to runs, in a few lines of Python each.

`test_protocol_model` has the database and a `World` do the same things, and compares the two after every step. A world
knows no SQL, no locks and no connections: a statement takes place as a whole, or not at all. What order the database
alone decides (`turn`), and which tasks a chunk takes, it is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from tests.protocol import ALREADY, APPLIED, BEHIND, CANCELLING, FENCED
from worker.engine.transitions import Taken, Writing

Path = tuple[int, ...]


@dataclass
class Task:
    """A run's own task. `due` is in how many seconds: None, 0.0, or later than any test."""

    priority: int
    id: int = 0
    turn: int = 0
    state: str = "ready"
    owner: int | None = None
    attempt: int = 0
    position: int = 0
    seq: int = 0
    doing: Path | None = None
    fresh: bool = True
    interrupted: bool = False
    interruptions: int = 0
    solo_deaths: int = 0
    solo: bool = False
    cancelling: bool = False
    wakeups: int = 0
    signals: int = 0
    awaits: tuple[str, ...] | None = None
    due: float | None = None

    def facts(self) -> tuple[Any, ...]:
        """Return what must agree with the table, in the order of FACTS."""
        return (
            self.id, self.priority, self.state, self.owner, self.attempt, self.position, self.seq, self.doing,
            self.fresh, self.interrupted, self.interruptions, self.solo_deaths, self.solo, self.cancelling,
            self.wakeups, self.signals, self.awaits, self.due is not None,
        )  # fmt: skip

    def readied(self) -> None:
        """Give up the claim, or the wait; what died twice at its step is a suspect."""
        self.state = "suspect" if self.interruptions >= 2 else "ready"
        self.owner, self.fresh = None, False


FACTS = """
select run_id, id, priority, state, claimed_by, attempt, position, seq, doing, fresh, interrupted, interruptions,
       solo_deaths, solo, cancelling, wakeups, signals, awaits, due_at is not null
from stepwell.tasks where kind = 'run'
"""


@dataclass
class Run:
    priority: int = 5
    epoch: int = 0
    state: str = "open"
    seq: int = 0
    task: Task | None = None

    def __post_init__(self) -> None:
        self.task = Task(self.priority)

    def end(self, state: str) -> None:
        assert self.task is not None
        self.state, self.seq, self.task = state, self.task.seq, None


@dataclass
class Wake:
    """A wake task: of the cancellation that was meant for `epoch`, or of a signal."""

    run: UUID
    epoch: int | None = None
    signal: int | None = None
    owner: int | None = None
    attempt: int = 0
    position: int = 0
    seq: int = 0
    cancelling: bool = False


@dataclass(frozen=True)
class Fact:
    """A row of the history; `at` is for telling a resend from another record, where a claimant wrote it."""

    seq: int
    kind: str
    name: str
    outcome: str
    worker: int | None
    at: datetime | None = None


@dataclass
class World:
    """`told`: the workers that have to hear that a run of theirs is cancelled. `leases`: those that are idle."""

    runs: dict[UUID, Run] = field(default_factory=dict)
    wakes: dict[int, Wake] = field(default_factory=dict)
    mail: dict[int, tuple[UUID, str]] = field(default_factory=dict)
    history: dict[tuple[UUID, int, Path, int], Fact] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)

    # -- what is there

    def tasks(self, *states: str) -> Iterator[Task]:
        return (
            run.task for run in self.runs.values() if run.task and (not states or run.task.state in states)
        )

    def task(self, run: UUID) -> Task:
        task = self.runs[run].task
        assert task is not None
        return task

    def due(self) -> list[Task]:
        return [task for task in self.tasks("waiting") if task.due == 0.0]

    def mail_of(self, run: UUID) -> set[int]:
        return {each for each, (to, _) in self.mail.items() if to == run}

    def owned(self, worker: int) -> set[int]:
        """Return the ids of what a worker has claimed."""
        wakes = {each for each, wake in self.wakes.items() if wake.owner == worker}
        return wakes | {task.id for task in self.tasks() if task.owner == worker}

    def counters(self) -> Counter[tuple[str, str, str]]:
        return Counter(
            (f.kind, f.name, f.outcome) for f in self.history.values() if f.kind in ("run", "step")
        )

    # -- claims

    def claimable(self, *, alone: bool, locked: Collection[int] = ()) -> tuple[set[int], list[int]]:
        """Return the wakes, all of which a claim takes, and the tasks in the order in which it takes them.

        Of suspects it takes any.
        """
        wakes = {w for w, wake in self.wakes.items() if wake.owner is None and w not in locked}
        found = (task for task in self.tasks("suspect" if alone else "ready") if task.id not in locked)
        return wakes, [task.id for task in sorted(found, key=lambda t: (t.priority, t.fresh, t.turn))]

    def claim(self, me: int, ids: Iterable[int], *, alone: bool) -> None:
        for each in ids:
            row = self._row(each)
            assert row is not None
            row.owner, row.attempt = me, row.attempt + 1
            if isinstance(row, Task):
                row.state, row.solo = "claimed", alone
            self.leases.discard(me)

    def stands(self, me: int, task: int, attempt: int, position: int) -> bool:
        row = self._row(task)
        return row is not None and (row.owner, row.attempt, row.position) == (me, attempt, position)

    def _row(self, id: int) -> Task | Wake | None:
        return self.wakes.get(id) or next((task for task in self.tasks() if task.id == id), None)

    # -- flushes

    def verdicts(self, me: int, writings: Sequence[Writing]) -> list[int]:
        """Return what a flush would be answered now."""
        return [self._verdict(me, each) for each in writings]

    def _verdict(self, me: int, writing: Writing) -> int:
        x, row = writing.transition, self._row(writing.transition.task)
        said = CANCELLING if row is not None and row.cancelling else 0
        if row is not None and row.attempt == x.attempt:
            if row.owner == me and row.position == x.position:
                return said + (BEHIND if x.strict and row.seq != x.seen else APPLIED)
            if row.owner == me and row.position > x.position:
                return said + ALREADY
            if row.owner is None and row.position == x.position + 1:
                return said + ALREADY
        return ALREADY if self._recorded(me, writing) else said + FENCED

    def _recorded(self, me: int, writing: Writing) -> bool:
        x = writing.transition
        found = ((self.history.get((x.run_id, x.epoch, tuple(r.path), r.n)), r.at) for r in writing.records)
        return any(fact is not None and (fact.worker, fact.at) == (me, at) for fact, at in found)

    def apply(self, me: int, writings: Sequence[Writing], codes: Sequence[int]) -> None:
        """Apply those of a flush that were answered so: wakes come last."""
        applied = [each for each, code in zip(writings, codes, strict=True) if code % 4 == APPLIED]
        for each in applied:
            if each.transition.then != "wake":
                self._advance(me, each)
        wakes = [self.wakes.pop(each.transition.task) for each in applied if each.transition.then == "wake"]
        self._tell(wakes)
        self._cancel(me, wakes)

    def _advance(self, me: int, writing: Writing) -> None:
        x, run = writing.transition, self.runs[writing.transition.run_id]
        task = self.task(x.run_id)
        for r in writing.records:
            task.seq += 1
            fact = Fact(task.seq, r.kind, r.name, r.outcome, me, r.at)
            self._record(x.run_id, x.epoch, tuple(r.path), r.n, fact)
        for extra in writing.extras:
            if isinstance(extra, Taken):
                self.mail.pop(extra.signal, None)
        task.position += 1
        if x.then == "finish":
            assert writing.end is not None
            run.end(writing.end.state)
            return
        waits = (
            x.then == "park" and x.wakeups == task.wakeups and (not task.cancelling or x.cancelled)
            and (x.delay is not None or x.awaits is not None)
        )  # fmt: skip
        self._proceed(task, writing)
        if x.then == "continue":
            run.epoch, task.seq, task.signals = run.epoch + 1, task.seq + 1, len(self.mail_of(x.run_id))
            self._record(x.run_id, run.epoch, (), 1, Fact(task.seq, "epoch", "w", "continue", None))
        if waits:
            task.state, task.owner, task.fresh = "waiting", None, False
        elif x.then != "move":
            task.readied()

    def _proceed(self, task: Task, writing: Writing) -> None:
        """Bring a task to where it is now: what died at another step counts no more."""
        x = writing.transition
        doing = None if x.doing is None else tuple(x.doing)
        stays = x.then == "release" or doing == task.doing or (task.doing is None and task.interrupted)
        if not stays:
            task.interruptions = task.solo_deaths = 0
        if x.then != "release":
            task.doing, task.interrupted = doing, False
            task.awaits = None if x.awaits is None else tuple(x.awaits)
            task.due = x.delay if x.then == "park" else None
        task.signals -= x.took
        task.cancelling = task.cancelling and x.cancelled is None

    def _record(self, run: UUID, epoch: int, path: Path, n: int, fact: Fact) -> None:
        assert (run, epoch, path, n) not in self.history  # I9
        self.history[run, epoch, path, n] = fact

    # -- wakes

    def _tell(self, wakes: Sequence[Wake]) -> None:
        for run, count in Counter(wake.run for wake in wakes if wake.signal is not None).items():
            task = self.runs[run].task
            if task is not None:
                task.signals, task.wakeups = task.signals + count, task.wakeups + 1
                if task.state == "waiting" and self.awaited(run):
                    task.readied()

    def awaited(self, run: UUID) -> set[int]:
        """Return those of the signals to a run that it waits for."""
        awaits = self.task(run).awaits or ()
        return {each for each, (to, name) in self.mail.items() if to == run and name in awaits}

    def _cancel(self, me: int, wakes: Sequence[Wake]) -> None:
        meant = {wake.run for wake in wakes if wake.signal is None and self._is_meant(wake)}
        for run in meant:
            epoch, task = self.runs[run].epoch, self.runs[run].task
            if task is None or (run, epoch, (), 2) in self.history:
                continue
            if task.attempt == 0 and task.seq == 0:
                self._end(run, "cancelled", me)
                continue
            task.cancelling, task.wakeups = True, task.wakeups + 1
            if task.owner is None:
                task.readied()
            else:
                self.told.add(task.owner)

    def _is_meant(self, wake: Wake) -> bool:
        """Tell whether the run is still in the epoch that is to be cancelled, or has only started anew since."""
        since = range(wake.epoch + 1, self.runs[wake.run].epoch + 1)
        return all(self.history[wake.run, epoch, (), 1].outcome == "continue" for epoch in since)

    def _end(self, run: UUID, state: str, me: int) -> None:
        """End a run in a way that no claimant decided."""
        task = self.task(run)
        task.seq += 1
        self._record(run, self.runs[run].epoch, (), 0, Fact(task.seq, "run", "w", state, me))
        self.runs[run].end(state)

    # -- time, death, retries

    def promote(self) -> int:
        due = self.due()
        for task in due:
            task.readied()
        return len(due)

    def reclaim(self, dead: int, freed: Collection[int], *, poison_after: int) -> None:
        """Free some of what a dead worker holds."""
        for each in freed:
            wake = self.wakes.get(each)
            if wake is not None:
                wake.owner = None
        for run, model in self.runs.items():
            task = model.task
            if task is None or task.id not in freed:
                continue
            if task.solo and task.solo_deaths + 1 >= poison_after:
                self._end(run, "blocked", dead)
                continue
            task.interrupted, task.interruptions = True, task.interruptions + 1
            task.solo_deaths, task.solo = task.solo_deaths + task.solo, False
            task.readied()

    def retry(self, run: UUID) -> int | None:
        model = self.runs[run]
        if model.state not in ("failed", "cancelled", "blocked"):
            return None
        model.epoch, model.state, model.seq = model.epoch + 1, "open", model.seq + 1
        model.task = Task(model.priority, fresh=False, seq=model.seq, signals=len(self.mail_of(run)))
        self._record(run, model.epoch, (), 1, Fact(model.seq, "epoch", "w", "retry", None))
        return model.epoch
