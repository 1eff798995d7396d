"""Runs with calls that are tasks of their own, under any interleaving: what is pending is what is there to be done.

Runs spread steps in joins and windows, drop them, and end; steps are done, fail, wait, are given back and held; workers
die at any moment, and what was sent is sent again. After every step the counts must agree with the rows that they count,
and at the end everything can be worked off: no run waits for ever.
"""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.integration.calls import FAULT
from tests.protocol import ALREADY, APPLIED, FENCED, Held, Lab, Worker, step_at, timer_at
from worker.engine.transitions import Dropped, Extra, Settled, TaskRow, Writing

POISON_AFTER = 2
WORKERS = 3

RUNS = "select run_id, id, state, pending, seq, due_at, awaits from stepwell.tasks where kind = 'run'"
PENDING = """
select run_id, count(*)::int from stepwell.tasks
where kind = 'step' and wakes in (1, 2) group by run_id
"""
RECORDED = "select run_id, count(*)::int, max(seq) from stepwell.outbox group by run_id"
WINDOWS = """
select w.path[1], count(*) filter (where s.state <> 'waiting' or s.attempt > 0)::int,
       count(*) filter (where s.state = 'waiting' and s.attempt = 0)::int
from stepwell.tasks w
join stepwell.tasks s on s.run_id = w.run_id and s.windowed and s.path[1:cardinality(s.path) - 2] = w.path
where w.kind = 'window' and s.id <> all (%s)
group by w.id, w.path
"""


SEEDS = st.integers(0, 2**32)
"""Choices are made by a generator of their own: which tasks there are to choose from, the database decides."""


class Machine(RuleBasedStateMachine):
    """Up to three workers over connections of their own, one statement at a time."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab(self.url)
        self.runs: list[UUID] = []
        self.workers: list[Worker] = []
        self.dead: list[Worker] = []
        self.hands: dict[int, list[Held]] = {}
        self.sent: dict[int, list[tuple[Writing, bool]]] = {}
        self.joins: dict[UUID, list[int]] = {}
        self.limits: dict[int, int] = {}
        self.on_hold: set[int] = set()
        self.numbers = 0
        self.connections = [self.lab.connection() for _ in range(WORKERS)]

    def teardown(self) -> None:
        try:
            self._work_off()
            self._audit()
        finally:
            self.lab.__exit__()

    @initialize(runs=st.integers(1, 4), workers=st.integers(1, WORKERS))
    def begin(self, runs: int, workers: int) -> None:
        for run in self.lab.enqueue(runs):
            self.runs.append(run)
            self.joins[run] = []
        for _ in range(workers):
            self.register()

    # -- producers

    @precondition(lambda self: self.runs)
    @rule(seed=SEEDS, cancel=st.booleans())
    def tell(self, seed: int, cancel: bool) -> None:
        run = random.Random(seed).choice(self.runs)
        if cancel:
            self.lab.cancel(run)
        else:
            self.lab.one("select stepwell.signal(%s, 'go')", run)

    # -- workers

    @precondition(lambda self: len(self.workers) < WORKERS)
    @rule()
    def register(self) -> None:
        taken = {worker.db for worker in self.workers}
        db = next(db for db in self.connections if db not in taken)
        worker = self.lab.worker("w", "step:send", db=db)
        self.workers.append(worker)
        self.hands[worker.id], self.sent[worker.id] = [], []

    @precondition(lambda self: self.workers)
    @rule(seed=SEEDS, at_most=st.integers(0, 6), alone=st.sampled_from([False, False, True]))
    def claim(self, seed: int, at_most: int, alone: bool) -> None:
        worker = random.Random(seed).choice(self.workers)
        self.hands[worker.id] += worker.claim(at_most, alone=alone)

    @precondition(lambda self: self.workers)
    @rule(seed=SEEDS, rounds=st.integers(1, 4), at_most=st.integers(1, 6), woken=st.booleans())
    def work(self, seed: int, rounds: int, at_most: int, woken: bool) -> None:
        """Claim, and flush most of what was claimed, a few times: nothing happens otherwise."""
        chance = random.Random(seed)
        worker = chance.choice(self.workers)
        for _ in range(rounds):
            for run in self.runs if woken else ():
                self.lab.one("select stepwell.signal(%s, 'go')", run)
            held = worker.claim(at_most)
            self.hands[worker.id] += held
            flushed = [each for each in held if chance.random() < 0.75]
            if flushed:
                self._flush(worker, flushed, [self._any_writing(each, chance) for each in flushed])
            self.what_is_pending_is_what_is_there_to_be_done()

    @precondition(lambda self: any(self.hands.values()))
    @rule(seed=SEEDS)
    def flush(self, seed: int) -> None:
        """Flush for some of the claims that a worker ever had, lost ones and those of the dead among them."""
        chance = random.Random(seed)
        worker = chance.choice([w for w in self.workers + self.dead if self.hands[w.id]])
        hands = self.hands[worker.id]
        held = chance.sample(hands, chance.randint(1, min(5, len(hands))))
        self._flush(worker, held, [self._any_writing(each, chance) for each in held])

    def _flush(self, worker: Worker, held: list[Held], writings: list[Writing]) -> None:
        mine = [self._holds(worker, each) for each in held]
        gone = [path for each, w, m in zip(held, writings, mine, strict=True) if m for path in _left(each, w)]
        mine = [m and not _is_below(each, gone) for m, each in zip(mine, held, strict=True)]
        codes = worker.flush(*writings)
        assert [code % 4 for code in codes] == [APPLIED if each else FENCED for each in mine]
        self.sent[worker.id] = list(zip(writings, mine, strict=True))
        told = any(each.claim.kind == "wake" for each in held)
        for each, writing, applied in zip(held, writings, mine, strict=True):
            if applied:
                each.position += 1
                if each.claim.kind == "run" and writing.transition.then == "park" and not told:
                    state = self.lab.task(each.task, "state, wakeups")
                    assert state != ("waiting", state[1]) or state[1] == each.wakeups
                if writing.transition.then == "hold":
                    self.on_hold.add(each.task)
        kept = [each for each in self.hands[worker.id] if each not in held or self.lab.task(each.task)]
        self.hands[worker.id] = kept[-20:]

    def _holds(self, worker: Worker, held: Held) -> bool:
        fence = (worker.id, held.attempt, held.position)
        return bool(self.lab.task(held.task, "claimed_by, attempt, position") == fence)

    # -- what is written

    def _any_writing(self, held: Held, chance: random.Random) -> Writing:
        self.numbers += 1
        match held.claim.kind:
            case "wake":
                return held.wake()
            case "timer":
                return held.done(held.record(*held.claim.path))
            case "step":
                return self._step_writing(held, chance.choice(STEP_ENDS))
            case _:
                return self._run_writing(held, chance)

    def _step_writing(self, held: Held, then: str) -> Writing:
        path = held.claim.path
        again = held.record(*path, n=self.numbers, outcome="failed", value=None, error=FAULT)
        match then:
            case "complete":
                return held.done(held.record(*path))
            case "fail":
                return held.done(again, held.record(*path, outcome="failed", value=None, error=FAULT))
            case "park":
                return held.park(again, delay=0.0)
            case "move":
                return held.move(again)
            case "hold":
                return held.hold(again)
            case _:
                return held.release(again)

    def _run_writing(self, held: Held, chance: random.Random) -> Writing:
        record = held.record(self.numbers)
        awaits = chance.choice([None, ["go"], ["go"]])
        then = chance.choice(RUN_ENDS)
        extras: list[Extra] = []
        if then in ("drop", "replace") and self.joins[held.run]:
            path = (chance.choice(self.joins[held.run]),)
            extras.append(Dropped(path=path))
            if chance.random() < 0.5:
                extras.append(Settled(path=path))
        if then in ("spread", "replace"):
            extras += self._join(held.run, chance)
        match then:
            case "release":
                return held.release(record)
            case "finish":
                return held.finish(record, family=True)
            case "wait":
                return held.park(record, awaits=["go"])
            case _:
                return held.park(record, extras=extras, awaits=awaits)

    def _join(self, run: UUID, chance: random.Random) -> list[Extra]:
        join, count = self.numbers, chance.randint(1, 4)
        wakes = chance.choice([1, 1, 2, 3])
        limit = chance.choice([None, 1, 2])
        self.joins[run].append(join)
        rows: list[Extra] = [
            step_at(join, k, 1, wakes=wakes, windowed=limit is not None, held=limit is not None and k > limit)
            for k in range(1, count + 1)
        ]
        if limit is not None:
            self.limits[join] = limit
            rows.append(TaskRow(kind="window", path=(join,), name="window", released=limit))
        if chance.random() < 0.5:
            rows.append(timer_at(join, count + 1, 1))
        return rows

    @precondition(lambda self: any(self.sent.values()))
    @rule(seed=SEEDS)
    def resend(self, seed: int) -> None:
        """Resend a whole flush verbatim, or what is left of it after it was halved."""
        chance = random.Random(seed)
        worker = chance.choice([w for w in self.workers + self.dead if self.sent[w.id]])
        sent = [each for each in self.sent[worker.id] if each[0].transition.then != "wake"]
        half = chance.randint(0, len(sent))
        for part in (sent[:half], sent[half:]):
            if part:
                codes = worker.flush(*(writing for writing, _ in part))
                assert [code % 4 for code in codes] == [ALREADY if applied else FENCED for _, applied in part]

    @rule()
    def promote(self) -> None:
        self.lab.promote()

    # -- death

    @precondition(lambda self: self.workers)
    @rule(seed=SEEDS)
    def die(self, seed: int) -> None:
        worker = random.Random(seed).choice(self.workers)
        self._die(worker)
        self.dead.append(worker)

    def _die(self, worker: Worker) -> None:
        self.lab.die(worker, poison_after=POISON_AFTER)
        self.workers.remove(worker)

    # -- what must hold

    @invariant()
    def what_is_pending_is_what_is_there_to_be_done(self) -> None:
        counted = dict(self.lab.rows(PENDING))
        for run, _, state, pending, _, due_at, awaits in self.lab.rows(RUNS):
            assert pending == counted.get(run, 0)
            assert state != "waiting" or pending or due_at is not None or awaits is not None

    @invariant()
    def seq_has_no_gaps(self) -> None:
        drawn = {row[0]: row[4] for row in self.lab.rows(RUNS)}
        for run, count, last in self.lab.rows(RECORDED):
            assert count == last
            assert drawn.get(run, last) == last

    @invariant()
    def a_window_is_as_wide_as_it_may_be(self) -> None:
        for join, inside, outside in self.lab.rows(WINDOWS, list(self.on_hold)):
            assert inside == min(self.limits[join], inside + outside)

    def _work_off(self) -> None:
        """Bring everything to an end with one new worker."""
        for worker in list(self.workers):
            self._die(worker)
        self.register()
        (worker,) = self.workers
        for round_ in range(20 + 10 * len(self.runs)):
            if not self.lab.one("select exists (select from stepwell.tasks)"):
                return
            for (run,) in self.lab.rows("select run_id from stepwell.tasks where awaits is not null"):
                self.lab.one("select stepwell.signal(%s, 'go')", run)
            self.lab.promote()
            held = worker.claim(100, alone=bool(round_ % 2))
            self.hands[worker.id] = held
            if held:
                self._flush(worker, held, [self._last_writing(each) for each in held])
            for check in (self.what_is_pending_is_what_is_there_to_be_done, self.seq_has_no_gaps):
                check()
        raise AssertionError(f"not everything could be worked off: {self.lab.rows(RUNS)}")

    def _last_writing(self, held: Held) -> Writing:
        self.numbers += 1
        match held.claim.kind:
            case "wake":
                return held.wake()
            case "run":
                return held.finish(family=True)
            case _:
                return held.done(held.record(*held.claim.path))

    def _audit(self) -> None:
        lab = self.lab
        ends: list[Any] = [
            row[0] for row in lab.rows("select run_id from stepwell.outbox where kind = 'run'")
        ]
        assert sorted(ends) == sorted(self.runs)
        counters = "select kind, name, outcome, sum(value)::int from stepwell.counters group by 1, 2, 3 order by 1, 2, 3"
        recorded = (
            "select kind, name, outcome, count(*)::int from stepwell.outbox group by 1, 2, 3 order by 1, 2, 3"
        )
        assert lab.rows(counters) == lab.rows(recorded)


RUN_ENDS = ["spread", "spread", "spread", "drop", "drop", "replace", "replace", "wait", "release", "finish"]


def _left(held: Held, writing: Writing) -> list[tuple[UUID, list[int], bool]]:
    """Return what of its run a writing leaves behind: everything when it ends, timers when it drops them."""
    if writing.transition.then == "finish":
        return [(held.run, [], True)]
    return [(held.run, list(each.path), False) for each in writing.extras if isinstance(each, Dropped)]


def _is_below(held: Held, gone: list[tuple[UUID, list[int], bool]]) -> bool:
    """Tell whether a claimed call is among what its run has left behind in the same flush."""
    claim = held.claim
    return claim.parent is not None and any(
        claim.run_id == run and claim.path[: len(path)] == path and (ended or claim.kind == "timer")
        for run, path, ended in gone
    )


STEP_ENDS = ["complete", "complete", "fail", "park", "move", "hold", "release"]


def test_any_interleaving_leaves_nothing_that_waits_for_ever(lab: Lab) -> None:
    class Here(Machine):
        url = lab.url

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
