"""Runs with calls that are tasks of their own, under any interleaving: what is pending is what is there to be done.

Runs spread steps in joins and windows, drop them, and end; steps are done, fail, wait, are given back and held; workers
die at any moment, and what was sent is sent again. After every step the counts must agree with the rows that they count,
and at the end everything can be worked off: no run waits for ever.

Of the invariants of the design, this model checks I4 (a run is woken when the last of the calls that it waits for is
done, which is counted under its lock), I5 (a park that one of its calls, or anything else, has overtaken does not wait),
I8 and I10 (what a flush is answered, and what it is answered when it is sent again), for calls that are tasks of their
own. `test_protocol_model` says which other test checks the rest.
"""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from tests.integration.calls import FAULT, completed, failed, only
from tests.integration.stateful import CountingMachine, run_machine
from tests.protocol import ALREADY, APPLIED, FENCED, Held, Lab, Worker, step_at, timer_at
from worker.engine.transitions import Dropped, Extra, Settled, TaskRow, Writing

POISON_AFTER = 2
WORKERS = 3

RUNS = "select run_id, id, state, pending, seq, due_at, awaits from stepwell.tasks where kind = 'run'"
PENDING = """
select run_id, count(*)::int from stepwell.tasks
where kind = 'step' and wakes in (1, 2) group by run_id
"""
FENCES = "select id, claimed_by, attempt, position, wakeups, cancelling, state from stepwell.tasks where id = any (%s)"
DUE = "select exists (select from stepwell.tasks where state = 'waiting' and due_at < clock_timestamp())"
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


EXAMPLES = 40
STEPS = 25

FLOOR = {
    **dict.fromkeys(("fenced", "applied", "already"), 10),
    "cancelling": 3,
    **{f"then {then}": 3 for then in ("move", "park", "release", "finish", "done", "hold", "wake")},
    **dict.fromkeys(
        ("park overtaken", "park overtaken by a call", "last call of two", "promoted", "worked off"), 3
    ),
}


class Calls(CountingMachine):
    """Up to three workers over connections of their own, one statement at a time unless it says otherwise."""

    def __init__(self) -> None:
        super().__init__()
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

    @initialize(runs=st.integers(1, 4), workers=st.integers(1, WORKERS))
    def begin(self, runs: int, workers: int) -> None:
        self._enqueue(runs)
        for _ in range(workers):
            self.register()

    # -- producers

    def _enqueue(self, count: int) -> UUID:
        """Enqueue runs; return the last one."""
        for run in self.lab.enqueue(count):
            self.runs.append(run)
            self.joins[run] = []
        return self.runs[-1]

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
            if woken:
                self.lab.rows("select stepwell.signal(id, 'go') from unnest(%s) id", self.runs)
            held = worker.claim(at_most)
            self.hands[worker.id] += held
            flushed = [each for each in held if chance.random() < 0.75]
            if flushed:
                self._flush(worker, flushed, [self._any_writing(each, chance) for each in flushed])
                self._resend(worker, chance)
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
        before = self._rows(held)
        mine = [before.get(h.task, ())[:3] == (worker.id, h.attempt, h.position) for h in held]
        gone = [path for each, w, m in zip(held, writings, mine, strict=True) if m for path in _left(each, w)]
        mine = [m and not _is_below(each, gone) for m, each in zip(mine, held, strict=True)]
        codes = worker.flush(*writings)
        assert [code % 4 for code in codes] == [APPLIED if each else FENCED for each in mine]
        self._applied(worker, held, writings, mine)
        after = self._rows(held)
        alone = len({each.run for each in held}) == len(held)
        for each, writing, applied in zip(held, writings, mine, strict=True):
            if applied and each.claim.kind == "run" and writing.transition.then == "park":
                overtaken = before[each.task][3:5] != (each.wakeups, False)
                self._parked(after[each.task][5], writing, overtaken=overtaken, alone=alone)
        self.count(*codes)

    def _rows(self, held: list[Held]) -> dict[int, tuple[Any, ...]]:
        rows = self.lab.rows(FENCES, [each.task for each in held])
        return {row[0]: row[1:] for row in rows}

    def _applied(self, worker: Worker, held: list[Held], writings: list[Writing], mine: list[bool]) -> None:
        for each, writing, applied in zip(held, writings, mine, strict=True):
            each.position += applied
            self.seen[f"then {writing.transition.then}"] += applied
            if applied and writing.transition.then == "hold":
                self.on_hold.add(each.task)
        self.sent[worker.id] = list(zip(writings, mine, strict=True))
        left = self._rows(held)
        kept = [each for each in self.hands[worker.id] if each not in held or each.task in left]
        self.hands[worker.id] = kept[-20:]

    def _parked(self, state: str, writing: Writing, *, overtaken: bool, alone: bool) -> None:
        """I5: whoever was woken between its claim and its park does not wait. With nothing in between, it does."""
        if overtaken:
            assert state in ("ready", "suspect")
            self.seen["park overtaken"] += 1
        elif alone and writing.transition.awaits:
            assert state == "waiting"

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

    # -- a call ends while its run is claimed, or while another one does

    @precondition(lambda self: self.workers)
    @rule(seed=SEEDS, wakes=st.sampled_from([1, 2, 3]))
    def park_after_a_call_has_ended(self, seed: int, wakes: int) -> None:
        """The run spreads a call, is woken by a signal, and parks without knowing that the call has ended since."""
        chance = random.Random(seed)
        worker, other = chance.choice(self.workers), chance.choice(self.workers)
        held, call, _ = self._spread(worker, other, 1 + (wakes == 2), wakes)
        self.lab.one("select stepwell.signal(%s, 'go')", held.run)
        self._apply_wakes(worker)
        again = self._take(worker, "w", held.run)
        self._flush(other, [call], [failed(call) if wakes == 2 else completed(call)])
        self.numbers += 1
        record, awaits = again.record(self.numbers), chance.choice([None, ["stay"]])
        self._flush(worker, [again], [again.park(record, extras=self._join(held.run, chance), awaits=awaits)])
        self.seen["park overtaken by a call"] += 1

    @precondition(lambda self: self.workers)
    @rule(seed=SEEDS, wakes=st.sampled_from([1, 2]), commits=st.booleans())
    def two_calls_end_at_the_same_moment(self, seed: int, wakes: int, commits: bool) -> None:
        """The second waits for the run's task, and counts after the first, if that comes to anything."""
        chance = random.Random(seed)
        worker, other = chance.choice(self.workers), chance.choice(self.workers)
        held, *calls = self._spread(worker, other, 2, wakes)
        writings = [completed(each) for each in calls]
        first, answer = self.overtaken(
            lambda db: other.on(db).flush(writings[0]),
            lambda db: other.on(db).flush(writings[1]),
            commits=commits,
        )
        assert first == answer() == [APPLIED]
        ended = slice(0 if commits else 1, 2)
        self._applied(other, calls[ended], writings[ended], [True, True][ended])
        assert self.lab.task(held.task, "pending, state") == ((0, "ready") if commits else (1, "waiting"))
        self.seen["last call of two"] += commits

    def _spread(self, worker: Worker, other: Worker, count: int, wakes: int) -> list[Held]:
        """Return what was a claim of a new run before it was parked with calls, and the claims of two of these."""
        run = self._enqueue(1)
        held = self._take(worker, "w", run)
        self.numbers += 2
        join, record = self.numbers, held.record(self.numbers - 1)
        rows: list[Extra] = [step_at(join, k, 1, wakes=wakes) for k in range(1, count + 1)]
        self._flush(worker, [held], [held.park(record, extras=rows, awaits=["go"])])
        self.joins[run].append(join)
        calls = [self._take(other, "step:send", run, join, k, 1) for k in range(1, count + 1)]
        return [held, calls[0], calls[-1]] if count == 1 else [held, *calls]

    def _take(self, worker: Worker, name: str, run: UUID, *path: int) -> Held:
        """Claim what is known by a name, and return the claim of a run, or of a call of it."""
        for each in only(name, worker).claim(100):
            self.hands[worker.id].append(each)
        found = [
            h
            for h in self.hands[worker.id]
            if h.run == run and tuple(h.claim.path) == path and h.claim.kind != "wake"
        ]
        return found[-1]

    def _apply_wakes(self, worker: Worker) -> None:
        wakes = [each for each in worker.claim(0) if each.claim.kind == "wake"]
        self._flush(worker, wakes, [each.wake() for each in wakes])

    @precondition(lambda self: any(self.sent.values()))
    @rule(seed=SEEDS)
    def resend(self, seed: int) -> None:
        """Resend a whole flush verbatim, or what is left of it after it was halved."""
        chance = random.Random(seed)
        self._resend(chance.choice([w for w in self.workers + self.dead if self.sent[w.id]]), chance)

    def _resend(self, worker: Worker, chance: random.Random) -> None:
        sent = [each for each in self.sent[worker.id] if each[0].transition.then != "wake"]
        half = chance.randint(0, len(sent))
        for part in (sent[:half], sent[half:]):
            if part:
                codes = worker.flush(*(writing for writing, _ in part))
                assert [code % 4 for code in codes] == [ALREADY if applied else FENCED for _, applied in part]
                self.count(*codes)

    @precondition(lambda self: self.lab.one(DUE))
    @rule()
    def promote(self) -> None:
        self.seen["promoted"] += self.lab.promote()

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

    def work_off(self) -> None:
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

    def audit(self) -> None:
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


STEP_ENDS = ["complete", "complete", "fail", "park", "move", "move", "hold", "release"]


def test_any_interleaving_leaves_nothing_that_waits_for_ever(lab: Lab) -> None:
    run_machine(Calls, lab.url, FLOOR, examples=EXAMPLES, steps=STEPS)
