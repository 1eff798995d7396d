"""The protocol against a model of itself: any interleaving of workers that claim, flush, resend, die and are reclaimed.

After every step the tables must be what the model says; at the end everything is worked off, and then each run must
have ended once in each of its epochs, with a history without gaps, and the totals must be those of the history.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.protocol import ALREADY, APPLIED, CANCELLING, FENCED, Db, Held, Lab, Worker
from worker.engine.transitions import Writing

POISON_AFTER = 2
WORKERS = 3
PRODUCERS = 2

Doing = tuple[int, ...] | None


@dataclass
class Task:
    """A run's own task as the model has it. `turn` is the one thing that it takes from the database."""

    id: int = 0
    state: str = "ready"
    owner: int | None = None
    attempt: int = 0
    position: int = 0
    seq: int = 0
    doing: Doing = None
    fresh: bool = True
    interrupted: bool = False
    interruptions: int = 0
    solo_deaths: int = 0
    solo: bool = False
    cancelling: bool = False
    wakeups: int = 0
    turn: int = 0

    def facts(self) -> tuple[Any, ...]:
        """Return what must agree with the table, in the order of FACTS."""
        return (
            self.state, self.owner, self.attempt, self.position, self.seq, self.doing, self.fresh, self.interrupted,
            self.interruptions, self.solo_deaths, self.cancelling, self.wakeups,
        )  # fmt: skip

    def readied(self, state: str = "ready") -> None:
        self.state, self.owner, self.fresh = state, None, False


FACTS = """
select run_id, id, turn, state, claimed_by, attempt, position, seq, doing, fresh, interrupted, interruptions, solo_deaths,
       cancelling, wakeups
from stepwell.tasks where kind = 'run'
"""


@dataclass
class Run:
    epoch: int = 0
    state: str = "open"
    task: Task | None = field(default_factory=Task)
    seq: int = 0

    def end(self, state: str) -> None:
        assert self.task is not None
        self.state, self.seq, self.task = state, self.task.seq, None


@dataclass
class Wake:
    run: UUID
    epoch: int
    owner: int | None = None


@dataclass
class Producer:
    """A service's transaction that stays open: what it has inserted is nobody's yet (I15)."""

    db: Db
    enqueued: list[UUID] = field(default_factory=list)
    wakes: dict[int, Wake] = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """A transition as it was sent, and what it would do."""

    writing: Writing
    applied: bool


class Machine(RuleBasedStateMachine):
    """Up to three workers over connections of their own, one statement at a time, and services whose transactions
    stay open meanwhile: whoever waited for one of these would run into the time limit of its statement.
    """

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab(self.url)
        self.runs: dict[UUID, Run] = {}
        self.wakes: dict[int, Wake] = {}
        self.workers: list[Worker] = []
        self.dead: list[Worker] = []
        self.hands: dict[int, list[Held]] = {}
        self.sent: dict[int, list[Sent]] = {}
        self.numbers = 0
        self.connections = [self.lab.connection() for _ in range(WORKERS)]
        self.producers = [Producer(self.lab.connection(autocommit=False)) for _ in range(PRODUCERS)]

    def teardown(self) -> None:
        try:
            for producer in self.producers:
                self._end(producer, commits=True)
            self._work_off()
            self._audit()
        finally:
            self.lab.__exit__()

    # -- producers

    @rule(count=st.integers(1, 4))
    def enqueue(self, count: int) -> None:
        for run in self.lab.enqueue(count):
            self.runs[run] = Run()

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(list(self.runs)))
        open_ = self.runs[run].state == "open"
        assert self.lab.cancel(run) == open_
        if open_:
            newest = self.lab.one("select max(id) from stepwell.tasks where kind = 'wake'")
            self.wakes[newest] = Wake(run, self.runs[run].epoch)

    @rule(data=st.data(), count=st.integers(1, 2))
    def enqueue_and_stay_open(self, data: st.DataObject, count: int) -> None:
        producer = data.draw(st.sampled_from(self.producers))
        producer.enqueued += self.lab.enqueue(count, db=producer.db)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def cancel_and_stay_open(self, data: st.DataObject) -> None:
        producer = data.draw(st.sampled_from(self.producers))
        run = data.draw(st.sampled_from(list(self.runs)))
        open_ = self.runs[run].state == "open"
        assert self.lab.cancel(run, db=producer.db) == open_
        if open_:
            newest = self.lab.one("select max(id) from stepwell.tasks where kind = 'wake'", db=producer.db)
            producer.wakes[newest] = Wake(run, self.runs[run].epoch)

    @precondition(lambda self: any(each.enqueued or each.wakes for each in self.producers))
    @rule(data=st.data(), commits=st.booleans())
    def end_a_transaction(self, data: st.DataObject, commits: bool) -> None:
        busy = [each for each in self.producers if each.enqueued or each.wakes]
        self._end(data.draw(st.sampled_from(busy)), commits=commits)

    def _end(self, producer: Producer, *, commits: bool) -> None:
        if commits:
            producer.db.commit()
            self.runs |= {run: Run() for run in producer.enqueued}
            self.wakes |= producer.wakes
        else:
            producer.db.rollback()
        producer.enqueued, producer.wakes = [], {}

    @precondition(lambda self: any(run.state != "open" for run in self.runs.values()))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        ended = [run for run, model in self.runs.items() if model.state != "open"]
        run = data.draw(st.sampled_from(ended))
        model = self.runs[run]
        if model.state == "succeeded":
            assert self.lab.retry(run) is None
            return
        assert self.lab.retry(run) == model.epoch + 1
        model.epoch, model.state = model.epoch + 1, "open"
        model.task = Task(fresh=False, seq=model.seq + 1)

    # -- workers

    @precondition(lambda self: len(self.workers) < WORKERS)
    @rule()
    def register(self) -> None:
        taken = {worker.db for worker in self.workers}
        worker = self.lab.worker(db=next(db for db in self.connections if db not in taken))
        self.workers.append(worker)
        self.hands[worker.id], self.sent[worker.id] = [], []

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), at_most=st.integers(0, 4), alone=st.booleans())
    def claim(self, data: st.DataObject, at_most: int, alone: bool) -> None:
        self._claim(data.draw(st.sampled_from(self.workers)), at_most, alone)

    def _claim(self, worker: Worker, at_most: int, alone: bool) -> list[Held]:
        wakes = [wake_id for wake_id, wake in self.wakes.items() if wake.owner is None]
        claimed = worker.claim(at_most, alone=alone)
        taken = {held.task: held for held in claimed}
        assert len(taken) == len(claimed)
        for wake_id in wakes:
            held = taken.pop(wake_id)
            assert held.claim.epoch == self.wakes[wake_id].epoch
            self.wakes[wake_id].owner = worker.id
        claimable = self._claimable(alone)
        expected = claimable[: 1 if alone else at_most]
        if alone:  # any of the suspects
            assert len(taken) == len(expected)
            assert set(taken) <= {task.id for task in claimable}
        else:
            assert list(taken) == [task.id for task in expected]
        for held in taken.values():
            task = self._task(held.run)
            assert task is not None
            task.state, task.owner, task.solo, task.attempt = "claimed", worker.id, alone, task.attempt + 1
            assert held.claim.interrupted == task.interrupted
            assert held.claim.cancelling == task.cancelling
        self.hands[worker.id] += claimed
        return claimed

    def _claimable(self, alone: bool) -> list[Task]:
        tasks = [run.task for run in self.runs.values() if run.task is not None]
        wanted = "suspect" if alone else "ready"
        return sorted(
            (task for task in tasks if task.state == wanted), key=lambda task: (task.fresh, task.turn)
        )

    @precondition(lambda self: any(self.hands.values()))
    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        """Flush for some of the claims that a worker ever had, lost ones and those of the dead among them."""
        worker = data.draw(st.sampled_from([w for w in self.workers + self.dead if self.hands[w.id]]))
        held = data.draw(
            st.lists(st.sampled_from(self.hands[worker.id]), unique=True, min_size=1, max_size=4)
        )
        thens = [
            "wake" if each.claim.kind == "wake" else data.draw(st.sampled_from(["move", "park", "release", "finish"]))
            for each in held
        ]  # fmt: skip
        progress = data.draw(st.booleans())
        self._flush(worker, held, thens, progress)

    def _flush(self, worker: Worker, held: list[Held], thens: list[str], progress: bool) -> None:
        writings = [self._writing(each, then, progress) for each, then in zip(held, thens, strict=True)]
        mine = [self._holds(worker, each) for each in held]
        told = [
            mine[i] and (task := self._task(each.run)) is not None and task.cancelling and thens[i] != "wake"
            for i, each in enumerate(held)
        ]
        codes = worker.flush(*writings)
        for code, applied, cancelling in zip(codes, mine, told, strict=True):
            assert code == (APPLIED + CANCELLING * cancelling if applied else code // 4 * 4 + FENCED)
        self.sent[worker.id] = [Sent(w, applied) for w, applied in zip(writings, mine, strict=True)]
        for i in sorted(range(len(held)), key=lambda i: thens[i] == "wake"):  # wakes come last in a flush
            if mine[i]:
                self._apply(held[i], writings[i])
        self._apply_wakes([each for i, each in enumerate(held) if mine[i] and thens[i] == "wake"])

    def _holds(self, worker: Worker, held: Held) -> bool:
        if held.claim.kind == "wake":
            wake = self.wakes.get(held.task)
            return wake is not None and wake.owner == worker.id
        task = self._task(held.run)
        return (
            task is not None
            and (task.id, task.owner, task.attempt) == (held.task, worker.id, held.attempt)
            and task.position == held.position
        )

    def _writing(self, held: Held, then: str, progress: bool) -> Writing:
        if then == "wake":
            return held.wake()
        self.numbers += 1
        number, task = self.numbers, self._task(held.run)
        record = held.record(number) if progress else held.record(0, n=number, outcome="failed", value=None)
        doing = (number + 1,) if progress or task is None else task.doing
        noted = True if number % 3 == 0 else None  # as whoever has handed the body its cancellation
        match then:
            case "move":
                return held.move(record, doing=doing, cancelled=noted)
            case "park":
                return held.park(record, doing=doing, delay=0.0, cancelled=noted)
            case "release":
                return held.release(record, cancelled=noted)
            case _:
                return held.finish(record, state="failed" if number % 2 else "succeeded")

    def _apply(self, held: Held, writing: Writing) -> None:
        then = writing.transition.then
        if then == "wake":
            return
        task = self._task(held.run)
        assert task is not None
        held.position += 1
        task.position += 1
        task.seq += len(writing.records)
        if then == "finish":
            assert writing.end is not None
            self.runs[held.run].end(writing.end.state)
            return
        doing = None if writing.transition.doing is None else tuple(writing.transition.doing)
        same = then == "release" or doing == task.doing or (task.doing is None and task.interrupted)
        suspicious = same and task.interruptions >= 2
        if not same:
            task.interruptions = task.solo_deaths = 0
        if then != "release":
            task.doing, task.interrupted = doing, False
        noted = writing.transition.cancelled is not None
        if then == "park" and held.wakeups == task.wakeups and (noted or not task.cancelling):
            task.readied("waiting")
        elif then != "move":
            task.readied("suspect" if suspicious else "ready")
        task.cancelling = task.cancelling and not noted

    def _apply_wakes(self, held: list[Held]) -> None:
        meant = {w.run for each in held if (w := self.wakes.pop(each.task)).epoch == self.runs[w.run].epoch}
        for run in meant:
            task = self._task(run)
            if task is None:
                continue
            if task.attempt == 0 and task.seq == 0:
                task.seq = 1
                self.runs[run].end("cancelled")
                continue
            task.cancelling, task.wakeups = True, task.wakeups + 1
            if task.state != "claimed":
                task.readied("suspect" if task.interruptions >= 2 else "ready")

    @precondition(lambda self: any(self.sent.values()))
    @rule(data=st.data())
    def resend(self, data: st.DataObject) -> None:
        """Resend a whole flush verbatim, or what is left of it after it was halved."""
        worker = data.draw(st.sampled_from([w for w in self.workers + self.dead if self.sent[w.id]]))
        sent = [each for each in self.sent[worker.id] if each.writing.transition.then != "wake"]
        half = data.draw(st.integers(0, len(sent)))
        for part in (sent[:half], sent[half:]):
            if part:
                codes = worker.flush(*(each.writing for each in part))
                assert [code % 4 for code in codes] == [ALREADY if each.applied else FENCED for each in part]

    @rule()
    def promote(self) -> None:
        waiting = [
            run.task for run in self.runs.values() if run.task is not None and run.task.state == "waiting"
        ]
        assert self.lab.promote() == len(waiting)
        for task in waiting:
            task.state = "suspect" if task.interruptions >= 2 else "ready"

    # -- death

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def bury(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        assert self.lab.one("select stepwell.bury_v1(%s)", worker.id)
        self.workers.remove(worker)
        self.dead.append(worker)
        with pytest.raises(psycopg.Error, match="declared dead"):
            worker.claim()

    @precondition(lambda self: self.dead)
    @rule(data=st.data(), at_most=st.integers(1, 3))
    def reclaim(self, data: st.DataObject, at_most: int) -> None:
        self._reclaim(data.draw(st.sampled_from(self.dead)), at_most)

    def _reclaim(self, worker: Worker, at_most: int) -> bool:
        """Reclaim a chunk; which tasks it takes is not determined. Return whether some are left."""
        before = {run: replace(model.task) for run, model in self.runs.items() if model.task is not None}
        ((count, remaining),) = self.lab.rows(
            "select reclaimed, remaining from stepwell.reclaim_v1(%s, %s, %s)",
            worker.id,
            POISON_AFTER,
            at_most,
        )
        mine = {run for run, task in before.items() if task.owner == worker.id}
        wakes = {wake_id for wake_id, wake in self.wakes.items() if wake.owner == worker.id}
        assert count == min(at_most, len(mine) + len(wakes))
        assert remaining == (len(mine) + len(wakes) > at_most)
        still = {
            row[0] for row in self.lab.rows("select id from stepwell.tasks where claimed_by = %s", worker.id)
        }
        for wake_id in wakes - still:
            self.wakes[wake_id].owner = None
        for run in mine:
            task = self._task(run)
            assert task is not None
            if task.id in still:
                continue
            if task.solo and task.solo_deaths + 1 >= POISON_AFTER:
                task.seq += 1
                self.runs[run].end("blocked")
                continue
            task.readied("suspect" if task.interruptions >= 1 else "ready")
            task.interrupted, task.interruptions = True, task.interruptions + 1
            task.solo_deaths, task.solo = task.solo_deaths + task.solo, False
        return bool(remaining)

    # -- what must hold

    @invariant()
    def tables_agree_with_the_model(self) -> None:
        found = {row[0]: row for row in self.lab.rows(FACTS)}
        assert found.keys() == {run for run, model in self.runs.items() if model.task is not None}
        for run, row in found.items():
            task = self._task(run)
            assert task is not None
            task.id, task.turn = row[1], row[2]
            doing = None if row[8] is None else tuple(row[8])
            assert (*row[3:8], doing, *row[9:]) == task.facts()
        states = dict(self.lab.rows("select id, state from stepwell.runs"))
        assert states == {run: model.state for run, model in self.runs.items()}
        wakes = dict(self.lab.rows("select id, claimed_by from stepwell.tasks where kind = 'wake'"))
        assert wakes == {wake_id: wake.owner for wake_id, wake in self.wakes.items()}

    def _task(self, run: UUID) -> Task | None:
        return self.runs[run].task

    def _work_off(self) -> None:
        """Bring everything to an end with one new worker."""
        for worker in self.workers:
            assert self.lab.one("select stepwell.bury_v1(%s)", worker.id)
        for worker in self.workers + self.dead:
            while self._reclaim(worker, 3):
                pass
        self.workers, self.dead = [], []
        self.register()
        (worker,) = self.workers
        for round_ in range(2 * len(self.runs) + 2):
            self.tables_agree_with_the_model()
            if not self.wakes and all(run.task is None for run in self.runs.values()):
                return
            self.promote()
            self.tables_agree_with_the_model()
            held = self._claim(worker, 100, alone=bool(round_ % 2))
            if held:
                self._flush(
                    worker, held, ["wake" if h.claim.kind == "wake" else "finish" for h in held], True
                )
        raise AssertionError("not everything could be worked off")

    def _audit(self) -> None:
        lab = self.lab
        ends = "select run_id, epoch from stepwell.outbox where kind = 'run'"
        expected = [(run, epoch) for run, model in self.runs.items() for epoch in range(model.epoch + 1)]
        assert sorted(lab.rows(ends)) == sorted(expected)
        gaps = lab.rows(
            "select run_id from stepwell.outbox group by run_id having max(seq) <> count(*) or count(distinct seq) <> count(*)"
        )
        assert gaps == []
        assert lab.rows("select kind, name, outcome, sum(value)::int from stepwell.counters group by 1, 2, 3 order by 1, 2, 3") == lab.rows(
            "select kind, name, outcome, count(*)::int from stepwell.outbox where kind <> 'epoch' group by 1, 2, 3 order by 1, 2, 3"
        )  # fmt: skip


def test_any_interleaving_does_what_the_model_says(lab: Lab) -> None:
    class Here(Machine):
        url = lab.url

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
