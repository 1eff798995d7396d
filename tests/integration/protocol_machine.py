"""What the rules of `test_protocol_model` are made of: each thing is done in the database and in a `World`, and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from hypothesis.stateful import invariant

from tests.integration.protocol_world import FACTS, Fact, Run, Wake, World
from tests.integration.protocol_writings import next_writing
from tests.integration.stateful import CountingMachine, pick
from tests.protocol import APPLIED, Db, Held, Worker
from worker.engine.transitions import Writing

S = TypeVar("S")
T = TypeVar("T")

POISON_AFTER = 2
WORKERS = 3
PRODUCERS = 2
TURNS = "select run_id, id, turn from stepwell.tasks where kind = 'run'"
HISTORY = "select run_id, epoch, path, n, seq, kind, name, outcome, worker from stepwell.outbox"
COUNTERS = "select kind, name, outcome, sum(value)::int from stepwell.counters group by 1, 2, 3"
WAKES = "select id, claimed_by from stepwell.tasks where kind = 'wake'"
NEWEST_WAKE = "select max(id) from stepwell.tasks where kind = 'wake'"
NEWEST_SIGNAL = "select max(id) from stepwell.signals"


@dataclass
class Producer:
    """A service's transaction that stays open: what it has inserted is nobody's yet (I15)."""

    db: Db
    runs: dict[UUID, Run] = field(default_factory=dict)
    wakes: dict[int, Wake] = field(default_factory=dict)
    mail: dict[int, tuple[UUID, str]] = field(default_factory=dict)
    rings: set[str] = field(default_factory=set)

    def is_busy(self) -> bool:
        return bool(self.runs or self.wakes)


class Batch(NamedTuple):
    """What a worker flushes at once."""

    worker: Worker
    held: Sequence[Held]
    writings: Sequence[Writing]

    def send(self, db: Db | None = None) -> list[int]:
        return (self.worker.on(db) if db else self.worker).flush(*self.writings)


class Machine(CountingMachine):
    """Up to three workers over connections of their own; two services whose transactions stay open meanwhile.

    Whoever waited for one of these would run into the time limit of its statement. `open` and `late` are for two
    statements at a time, see `overtaken`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lab.db.execute("listen stepwell")
        self.world = World()
        self.workers: list[Worker] = []
        self.dead: list[Worker] = []
        self.hands: dict[int, list[Held]] = {}
        self.sent: dict[int, list[list[tuple[Writing, int]]]] = {}
        self.known: dict[tuple[int, int], set[int]] = {}
        self.numbers = 0
        self.may_ring: set[str] = set()
        self.must_ring: set[str] = set()
        self.connections = [self.lab.connection() for _ in range(WORKERS)]
        self.producers = [Producer(self.lab.connection(autocommit=False)) for _ in range(PRODUCERS)]

    # -- producers

    def enqueue(self, count: int = 1, priority: int = 5, producer: Producer | None = None) -> None:
        db = self.lab.db if producer is None else producer.db
        made = {run: Run(priority) for run in self.lab.enqueue(count, db=db, priority=priority)}
        (self.world if producer is None else producer).runs.update(made)
        self._rings("default", producer)
        self.seen["enqueue" if producer is None else "open enqueue"] += 1

    def tell(self, run: UUID, *, cancels: bool, producer: Producer | None = None) -> bool:
        """Cancel a run or send it the signal `go`; return whether it was open."""
        model, into = self.world.runs[run], self.world if producer is None else producer
        db = self.lab.db if producer is None else producer.db
        if cancels:
            answer = self.lab.cancel(run, db=db)
            assert answer == (model.state == "open")
        else:
            answer = self.lab.one("select stepwell.signal(%s, 'go')", run, db=db)
            assert answer == (model.state in ("open", "blocked"))
        if not answer:
            return False
        wake = Wake(run, epoch=model.epoch)
        if not cancels:
            wake = Wake(run, signal=self.lab.one(NEWEST_SIGNAL, db=db))
            into.mail[wake.signal] = (run, "go")
        into.wakes[self.lab.one(NEWEST_WAKE, db=db)] = wake
        self._rings("stepwell", producer)
        self.seen["open " * (producer is not None) + ("cancel" if cancels else "signal")] += 1
        return True

    def in_state(self, *states: str) -> list[UUID]:
        return [run for run, model in self.world.runs.items() if model.state in states]

    def _rings(self, queue: str, producer: Producer | None) -> None:
        if self.world.leases:
            (self.must_ring if producer is None else producer.rings).add(queue)

    def end(self, producer: Producer, *, commits: bool) -> None:
        self.seen["late commit" if commits else "late rollback"] += producer.is_busy()
        if commits:
            producer.db.commit()
            self.world.runs |= producer.runs
            self.world.wakes |= producer.wakes
            self.world.mail |= producer.mail
            self.must_ring |= producer.rings
        else:
            producer.db.rollback()
        producer.runs, producer.wakes, producer.mail, producer.rings = {}, {}, {}, set()

    # -- claims

    def enlist(self) -> Worker:
        taken = {worker.db for worker in self.workers}
        worker = self.lab.worker(db=next(db for db in self.connections if db not in taken))
        self.workers.append(worker)
        self.hands[worker.id], self.sent[worker.id] = [], []
        return worker

    def claim_for(self, worker: Worker, at_most: int, *, alone: bool = False) -> list[Held]:
        self.learn_turns()
        expected = self.world.claimable(alone=alone)
        return self.claimed(worker, worker.claim(at_most, alone=alone), expected, at_most, alone=alone)

    def learn_turns(self) -> None:
        """The order in which tasks of one statement become ready is the database's alone."""
        for run, *drawn in self.lab.rows(TURNS):
            task = self.world.task(run)
            task.id, task.turn = drawn

    def claimed(
        self, worker: Worker, claimed: list[Held], expected: tuple[set[int], list[int]], at_most: int, *, alone: bool
    ) -> list[Held]:  # fmt: skip
        """Compare an answer to what there was to claim: all wakes, and of the tasks no more than were asked for (I2)."""
        ids = [held.task for held in claimed]
        wakes, tasks = expected
        assert set(ids[: len(wakes)]) == wakes
        taken = ids[len(wakes) :]
        if alone:  # any of the suspects
            assert len(taken) == min(1, len(tasks))
            assert set(taken) <= set(tasks)
        else:
            assert taken == tasks[:at_most]
        self.world.claim(worker.id, ids, alone=alone)
        for held in claimed:
            self._compare(held)
            self.known[held.task, held.attempt] = self.world.mail_of(held.run)
        self.hands[worker.id] = self.hands[worker.id][-12:] + claimed
        self.seen["claimed"] += len(taken)
        self.seen["claimed alone"] += alone and len(taken)
        return claimed

    def _compare(self, held: Held) -> None:
        claim = held.claim
        if claim.kind == "wake":
            wake = self.world.wakes[held.task]
            assert (claim.epoch, claim.attempt) == (wake.epoch, wake.attempt)
            return
        task = self.world.task(held.run)
        doing = None if claim.doing is None else tuple(claim.doing)
        assert (claim.epoch, claim.attempt, claim.position, claim.seq, doing, claim.wakeups, claim.signals) == (
            self.world.runs[held.run].epoch, task.attempt, task.position, task.seq, task.doing, task.wakeups, task.signals,
        )  # fmt: skip
        assert (claim.interrupted, claim.interruptions, claim.cancelling) == (
            task.interrupted, task.interruptions, task.cancelling,
        )  # fmt: skip

    def stands(self, worker: Worker, held: Held) -> bool:
        return self.world.stands(worker.id, held.task, held.attempt, held.position)

    def standing(self, index: int, count: int = 1) -> tuple[Worker, list[Held]]:
        """Return a worker with so many claims of runs that stand; what is missing is enqueued and claimed."""
        worker = pick(self.workers, index)
        while True:
            found = [h for h in self.hands[worker.id] if h.claim.kind == "run" and self.stands(worker, h)]
            if len(found) >= count:
                return worker, [pick(found, index + k) for k in range(count)]
            self.enqueue(1)
            self.claim_for(worker, 1)

    # -- flushes

    def flush_one(self, index: int, then: str) -> Worker:
        """Flush for a claim that stands; return whose it was."""
        worker, (held,) = self.standing(index)
        self.flush_for(Batch(worker, [held], [self.writing(held, then)]))
        return worker

    def flush_for(self, batch: Batch) -> list[int]:
        expected = self.verdicts(batch)
        assert batch.send() == expected
        self.answered(batch, expected)
        return expected

    def flush_in_turn(self, first: Batch, second: Batch, *, commits: bool) -> tuple[list[int], list[int]]:
        """Flush while another flush is under way, which this one has to wait for; return both answers."""
        expected = self.verdicts(first)
        one, answer = self.overtaken(first.send, second.send, commits=commits)
        assert one == expected
        if commits:
            self.answered(first, expected)
        late = self.verdicts(second)
        assert answer() == late
        self.answered(second, late)
        return expected, late

    def verdicts(self, batch: Batch) -> list[int]:
        return self.world.verdicts(batch.worker.id, batch.writings)

    def answered(self, batch: Batch, codes: Sequence[int]) -> None:
        """Do in the world what a flush was answered that it has done."""
        worker, held, writings = batch
        self.world.apply(worker.id, writings, codes)
        for each, writing, code in zip(held, writings, codes, strict=True):
            self.count(code)
            if code % 4 == APPLIED:
                each.position += 1
                self.seen[f"then {writing.transition.then}"] += 1
                self.seen["signal taken"] += writing.transition.took
        self.sent[worker.id] = [*self.sent[worker.id][-2:], list(zip(writings, codes, strict=True))]

    def writing(self, held: Held, then: str) -> Writing:
        """Return what a claimant sends next; every record is of a call of its own."""
        if held.claim.kind == "wake":
            return held.wake()
        self.numbers += 1
        known = self.known.get((held.task, held.attempt), set())
        return next_writing(self.world, held, then, self.numbers, known)

    # -- death

    def bereaved(self) -> list[Worker]:
        """Return the dead who still hold something."""
        return [each for each in self.dead if self.world.owned(each.id)]

    def bury(self, worker: Worker) -> None:
        assert self.lab.one("select stepwell.bury_v1(%s)", worker.id)
        self.mourn(worker)

    def mourn(self, worker: Worker) -> None:
        """Note that a worker was buried. Who keeps workers alive starts another when there is none."""
        self.workers.remove(worker)
        self.dead.append(worker)
        self.seen["burial"] += 1
        if not self.workers:
            self.enlist()

    def reclaim_from(self, worker: Worker, at_most: int = 1000) -> bool:
        """Reclaim a chunk; which tasks it takes is not determined. Return whether some are left."""
        owned = self.world.owned(worker.id)
        statement = "select reclaimed, remaining from stepwell.reclaim_v1(%s, %s, %s)"
        ((count, remaining),) = self.lab.rows(statement, worker.id, POISON_AFTER, at_most)
        assert count == min(at_most, len(owned))
        assert remaining == (len(owned) > at_most)
        left = self.lab.rows("select id from stepwell.tasks where claimed_by = %s", worker.id)
        self.freed(worker, owned - {row[0] for row in left})
        return bool(remaining)

    def freed(self, worker: Worker, ids: Collection[int]) -> None:
        self.world.reclaim(worker.id, ids, poison_after=POISON_AFTER)
        self.seen["reclaimed"] += len(ids)
        if not self.world.owned(worker.id):
            self.world.leases.discard(worker.id)

    # -- what must hold

    @invariant()
    def holds(self) -> None:
        self.tables_agree_with_the_model()
        self.histories_have_no_gaps()
        self.nobody_waits_for_what_is_there()
        self.it_rings_for_the_idle_only()

    def tables_agree_with_the_model(self) -> None:
        """What every claim, flush and death has done, and nothing else (I2, I3, I8 to I11, I15, I16)."""
        lab, world = self.lab, self.world
        found = {row[0]: row[1:] for row in lab.rows(FACTS)}
        self.learn_turns()
        assert {run: _in_tuples(row) for run, row in found.items()} == {
            run: model.task.facts() for run, model in world.runs.items() if model.task is not None
        }
        runs = {row[0]: row[1:] for row in lab.rows("select id, state, epoch from stepwell.runs")}
        assert runs == {run: (model.state, model.epoch) for run, model in world.runs.items()}
        assert dict(lab.rows(WAKES)) == {each: wake.owner for each, wake in world.wakes.items()}
        assert {row[0] for row in lab.rows("select id from stepwell.signals")} == set(world.mail)
        history = sorted((*key, *_columns(fact)) for key, fact in world.history.items())
        assert sorted(map(_in_tuples, lab.rows(HISTORY))) == history
        assert {row[:3]: row[3] for row in lab.rows(COUNTERS)} == world.counters()

    def histories_have_no_gaps(self) -> None:
        """What there is in the world is what there is in the database."""
        drawn = Counter(key[0] for key in self.world.history)
        numbers = {(run, n) for run, count in drawn.items() for n in range(1, count + 1)}
        assert {(key[0], fact.seq) for key, fact in self.world.history.items()} == numbers

    def nobody_waits_for_what_is_there(self) -> None:
        """I5: a run waits for a signal that is there only while its wake has yet to be applied."""
        told_of = {wake.signal for wake in self.world.wakes.values()}
        for run, model in self.world.runs.items():
            if model.task is not None and model.task.state == "waiting":
                assert self.world.awaited(run) <= told_of

    def it_rings_for_the_idle_only(self) -> None:
        """I1; whoever executes a run that is cancelled is told in any case."""
        heard = {note.payload for note in self.lab.db.notifies(timeout=0)}
        told = {f"worker {each}" for each in self.world.told}
        assert self.must_ring <= heard
        assert heard - self.may_ring - self.must_ring == told
        self.seen["rung"] += bool(self.must_ring)
        self.may_ring = {"default", "stepwell"} if self.world.leases else set()
        self.must_ring, self.world.told = set(), set()

    # -- the end

    def work_off(self) -> None:
        """Bring everything to an end with one new worker."""
        for producer in self.producers:
            self.end(producer, commits=True)
        for worker in list(self.workers):
            self.bury(worker)
        for worker in self.dead:
            while self.reclaim_from(worker, 3):
                pass
        (worker,) = self.workers
        for round_ in range(2 * len(self.world.runs) + 3):
            self.tables_agree_with_the_model()
            if not self.world.wakes and not any(self.world.tasks()):
                return
            for run, model in self.world.runs.items():
                if model.task is not None and model.task.state == "waiting" and model.task.due != 0.0:
                    self.tell(run, cancels=False)
            assert self.lab.promote() == self.world.promote()
            held = self.claim_for(worker, 100, alone=bool(round_ % 2))
            if held:
                self.flush_for(Batch(worker, held, [self.writing(each, "finish") for each in held]))
        raise AssertionError("not everything could be worked off")

    def audit(self) -> None:
        """Each run has ended once in each of its epochs, or has continued in the next."""
        ended = Counter((run, epoch) for (run, epoch, _, _), fact in self._facts("run"))
        went_on = Counter(
            (run, epoch - 1) for (run, epoch, _, _), f in self._facts("epoch") if f.outcome == "continue"
        )
        runs = self.world.runs.items()
        assert ended + went_on == Counter((run, n) for run, model in runs for n in range(model.epoch + 1))

    def _facts(self, kind: str) -> list[tuple[tuple[UUID, int, tuple[int, ...], int], Fact]]:
        return [(key, fact) for key, fact in self.world.history.items() if fact.kind == kind]


def _in_tuples(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(each) if isinstance(each, list) else each for each in row)


def _columns(fact: Fact) -> tuple[Any, ...]:
    return fact.seq, fact.kind, fact.name, fact.outcome, fact.worker
