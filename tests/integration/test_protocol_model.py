"""The protocol against a model of itself: any interleaving of workers that claim, flush, resend, die and are reclaimed.

After every step the tables, the history, the counters and what was rung must be what the model says
(`protocol_world`, and `protocol_machine` for how they are compared); at the end everything is worked off. Runs have no
calls that are tasks of their own here: `test_protocol_calls_model` has these. Of the invariants of the design, this
model checks

    I1   no notification while nobody holds a lease, but to the worker whose run is cancelled
    I2   a claim takes no more tasks than it was asked for, in order, and none twice
    I3   a dead worker claims nothing, also if its claim waited for its burial
    I5   a park that a wake has overtaken waits for nothing; nobody waits for a signal that is there
    I8   what has not the whole fence writes nothing
    I9   one final outcome for each path and epoch, and one end for each epoch
    I10  what was applied and is sent again is answered `already`, whatever has happened to its task meanwhile
    I11  who was buried claims nothing, and records nothing where its task was readied
    I15  open transactions of producers hold nobody up, and take place when they commit
    I16  a flush with a value that the database refuses does nothing, and without it everything

The others are not to be seen in the database, or not here: I4 in test_protocol_calls.py and test_protocol_calls_model.py,
I6 and I7 in test_engine_commits.py, which has the halving of I16 as well, I2 of a whole worker in test_engine_claims.py,
I12 in test_holes.py, I14 in tests/security/test_dependencies.py; I13 waits for messages.
"""

from __future__ import annotations

import psycopg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.integration.protocol_machine import (
    POISON_AFTER,
    PRODUCERS,
    WORKERS,
    Batch,
    Machine,
)
from tests.integration.protocol_writings import BAD_VALUES, THENS, spoiled
from tests.integration.stateful import pick, run_machine
from tests.protocol import ALREADY, APPLIED, BEHIND, FENCED, Held, Lab, Worker
from worker.engine.transitions import Writing

EXAMPLES = 60
STEPS = 25

INDEX = st.integers(0, 11)
THEN = st.sampled_from([*THENS, "behind"])
PARK = st.sampled_from(["await", "await for", "sleep"])
PRIORITY = st.sampled_from([5, 5, 3])

FLOOR = {
    **dict.fromkeys(("fenced", "applied", "already", "behind", "cancelling"), 10),
    **{f"then {then}": 3 for then in ("move", "park", "release", "finish", "continue", "wake")},
    **{f"resent {then}": 3 for then in ("move", "sleep", "release", "finish")},
    **dict.fromkeys(("open enqueue", "open cancel", "open signal"), 2),
    **dict.fromkeys(("late commit", "park overtaken"), 2),
    **dict.fromkeys(("park overtaken by a flush", "signal taken"), 1),
    **dict.fromkeys(("second outcome", "claimed alone", "promoted", "reclaimed", "rung", "worked off"), 3),
    "overtaken": 20,
}


class Protocol(Machine):
    """The rules. Those that need a claim to attack make one if nobody has any."""

    @initialize(runs=st.integers(1, 4), workers=st.integers(1, WORKERS))
    def begin(self, runs: int, workers: int) -> None:
        self.enqueue(runs)
        for _ in range(workers):
            self.enlist()

    # -- producers

    @rule(count=st.integers(1, 3), priority=PRIORITY)
    def enqueue_some(self, count: int, priority: int) -> None:
        self.enqueue(count, priority)

    @rule(index=INDEX, cancels=st.booleans())
    def tell_a_run(self, index: int, cancels: bool) -> None:
        self.tell(pick(list(self.world.runs), index), cancels=cancels)

    @rule(which=st.integers(0, PRODUCERS - 1), index=INDEX, cancels=st.sets(st.booleans(), min_size=1))
    def stay_open(self, which: int, index: int, cancels: set[bool]) -> None:
        """Leave a transaction open that has enqueued, and cancelled or signalled; the one before it commits."""
        producer, runs = self.producers[which], list(self.world.runs)
        self.end(producer, commits=True)
        self.enqueue(1, producer=producer)
        for k, each in enumerate(sorted(cancels)):
            self.tell(pick(runs, index + k), cancels=each, producer=producer)

    @precondition(lambda self: any(each.is_busy() for each in self.producers))
    @rule(index=INDEX, commits=st.booleans())
    def end_a_transaction(self, index: int, commits: bool) -> None:
        self.end(pick([each for each in self.producers if each.is_busy()], index), commits=commits)

    @rule(index=INDEX)
    def retry(self, index: int) -> None:
        if not self.in_state("failed", "cancelled", "blocked"):
            self.flush_one(index, "end")
        run = pick(self.in_state("failed", "cancelled", "blocked"), index)
        epoch = self.world.retry(run)
        assert epoch is not None
        assert self.lab.retry(run) == epoch
        for other in self.in_state("open", "succeeded"):
            assert self.lab.retry(other) is None
        if self.world.leases:
            self.must_ring.add("default")

    # -- workers

    @precondition(lambda self: len(self.workers) < WORKERS)
    @rule()
    def register(self) -> None:
        self.enlist()

    @rule(index=INDEX, seconds=st.sampled_from([60.0, -1.0]))
    def idle(self, index: int, seconds: float) -> None:
        """Take a lease, or one that has run out already."""
        worker = pick(self.workers, index)
        self.lab.db.execute("select stepwell.idle_v1(%s, %s, %s)", [worker.id, ["default"], seconds])
        (self.world.leases.add if seconds > 0 else self.world.leases.discard)(worker.id)

    @rule(index=INDEX, at_most=st.integers(0, 4), alone=st.booleans())
    def claim(self, index: int, at_most: int, alone: bool) -> None:
        self.claim_for(pick(self.workers, index), at_most, alone=alone)

    @rule(
        index=INDEX,
        at_most=st.integers(1, 4),
        thens=st.lists(THEN, min_size=1, max_size=4),
        alone=st.booleans(),
    )
    def work(self, index: int, at_most: int, thens: list[str], alone: bool) -> None:
        """Claim, and flush what was claimed at once."""
        worker = pick(self.workers, index)
        held = self.claim_for(worker, at_most, alone=alone and any(self.world.tasks("suspect")))
        if held:
            writings = [self.writing(each, pick(thens, k)) for k, each in enumerate(held)]
            self.flush_for(Batch(worker, held, writings))

    @precondition(lambda self: any(self.hands.values()))
    @rule(
        index=INDEX,
        which=st.sets(INDEX, min_size=1, max_size=4),
        thens=st.lists(THEN, min_size=1, max_size=4),
    )
    def flush(self, index: int, which: set[int], thens: list[str]) -> None:
        """Flush for some of the claims that a worker ever had, lost ones and those of the dead among them."""
        worker = pick([w for w in self.workers + self.dead if self.hands[w.id]], index)
        hands = self.hands[worker.id]
        held = list(dict.fromkeys(pick(hands, k) for k in sorted(which)))
        writings = [self.writing(each, pick(thens, k)) for k, each in enumerate(held)]
        self.flush_for(Batch(worker, held, writings))

    @rule(index=INDEX)
    def promote(self, index: int) -> None:
        if not self.world.due():
            self.flush_one(index, "sleep")
        expected = self.world.promote()
        assert self.lab.promote() == expected
        self.seen["promoted"] += expected

    # -- the fence (I8), resends (I10), parking and waking (I5)

    @rule(index=INDEX, then=st.sampled_from(THENS), moved=st.booleans())
    def send_wrong_fences(self, index: int, then: str, moved: bool) -> None:
        worker, (held,) = self.standing(index)
        if moved:
            self.flush_for(Batch(worker, [held], [self.writing(held, "move")]))
        for part, by in (("position", 1), ("position", -1), ("attempt", 1), ("attempt", -1), ("task", 10**9)):
            writing = self.writing(held, then)
            setattr(writing.transition, part, getattr(writing.transition, part) + by)
            self._send_in_vain(worker, writing, ALREADY if (part, by) == ("position", -1) else FENCED)
        stranger = Worker(worker.db, worker.names, worker.queues, 1)
        for other in [*self.workers, *self.dead, stranger]:
            if other is not worker:
                self._send_in_vain(other, self.writing(held, then), FENCED)
        self._send_in_vain(worker, self.writing(held, "behind"), BEHIND)
        codes = self.flush_for(Batch(worker, [held], [self.writing(held, then)]))
        assert codes[0] % 4 == APPLIED

    def _send_in_vain(self, worker: Worker, writing: Writing, verdict: int) -> None:
        expected = self.world.verdicts(worker.id, [writing])
        assert expected[0] % 4 == verdict
        assert worker.flush(writing) == expected
        self.count(*expected)

    @precondition(lambda self: any(self.sent.values()))
    @rule(index=INDEX, which=INDEX, half=st.integers(0, 3))
    def resend(self, index: int, which: int, half: int) -> None:
        """Resend a whole flush verbatim, or what is left of it after it was halved."""
        worker = pick([w for w in self.workers + self.dead if self.sent[w.id]], index)
        batch = pick(self.sent[worker.id], which)
        for part in (batch[:half], batch[half:]):
            if part:
                self._resend(worker, part)

    def _resend(self, worker: Worker, batch: list[tuple[Writing, int]]) -> None:
        writings = [writing for writing, _ in batch]
        expected = self.world.verdicts(worker.id, writings)
        for (writing, code), now in zip(batch, expected, strict=True):
            assert now % 4 != APPLIED
            assert code % 4 != APPLIED or not writing.records or now % 4 == ALREADY
        assert worker.flush(*writings) == expected
        self.count(*expected)

    @rule(index=INDEX, dies=st.booleans(), at_most=st.integers(1, 4))
    def resend_when_the_run_has_gone_on(self, index: int, dies: bool, at_most: int) -> None:
        """The answer is lost; the run is claimed again, by whomever, and goes on."""
        for then in ("move", "sleep", "release", "finish"):
            worker = self.flush_one(index, then)
            batch = self.sent[worker.id][-1]
            if dies:
                self.bury(worker)
                self.reclaim_from(worker)
            assert self.lab.promote() == self.world.promote()
            other = pick(self.workers, index + 1)
            again = self.claim_for(other, at_most)
            if again:
                self.flush_for(Batch(other, again, [self.writing(each, "move") for each in again]))
            self._resend(worker, batch)
            self.seen[f"resent {then}"] += 1

    @rule(index=INDEX, cancels=st.booleans(), then=PARK, same=st.booleans())
    def park_after_a_wake(self, index: int, cancels: bool, then: str, same: bool) -> None:
        worker, (held,) = self.standing(index)
        self.tell(held.run, cancels=cancels)
        waker = worker if same else pick(self.workers, index + 1)
        wakes = self.claim_for(waker, 0)
        self.flush_for(Batch(waker, wakes, [self.writing(each, "wake") for each in wakes]))
        self._park(worker, held, then, overtaken=not cancels or self.world.task(held.run).cancelling)

    def _park(self, worker: Worker, held: Held, then: str, *, overtaken: bool) -> None:
        writing = self.writing(held, then)
        self.flush_for(Batch(worker, [held], [writing]))
        task = self.world.task(held.run)
        if writing.transition.then == "park" and overtaken:
            assert task.state in ("ready", "suspect")
            assert self.lab.task(held.task) == task.state
            self.seen["park overtaken"] += 1

    # -- one final outcome (I9), one bad value (I16)

    @rule(
        index=INDEX, then=st.sampled_from(["move", "sleep", "release", "finish"]), company=st.integers(0, 2)
    )
    def record_a_final_outcome_twice(self, index: int, then: str, company: int) -> None:
        worker, (held, *others) = self.standing(index, 1 + company)
        first = self.writing(held, "move")
        path = first.records[0].path
        self.flush_for(Batch(worker, [held], [first]))
        second = self.writing(held, then)
        second.records[0].path, second.records[0].n = path, 0
        second.records[0].outcome = "failed" if company else "completed"
        good = [self.writing(each, "move") for each in others]
        with pytest.raises(psycopg.errors.UniqueViolation):
            worker.flush(*good, second)
        self._flush_the_good(worker, others, good)
        self.seen["second outcome"] += 1

    @rule(index=INDEX, then=st.sampled_from(["move", "sleep", "finish"]), place=st.integers(0, 2))
    def flush_bad_values(self, index: int, then: str, place: int) -> None:
        worker, (held, *others) = self.standing(index, 3)
        good = [self.writing(each, then) for each in others]
        for how in BAD_VALUES:
            with pytest.raises(psycopg.Error) as refused:
                worker.flush(*good[:place], spoiled(self.writing(held, then), how), *good[place:])
            assert (refused.value.sqlstate or "")[:2] in ("22", "23")
        self.tables_agree_with_the_model()
        self._flush_the_good(worker, others, good)

    def _flush_the_good(self, worker: Worker, held: list[Held], writings: list[Writing]) -> None:
        """What was refused on account of another is applied when it comes again without it."""
        if held:
            codes = self.flush_for(Batch(worker, held, writings))
            assert {code % 4 for code in codes} == {APPLIED}

    # -- death, and what the dead may still do

    @rule(index=INDEX)
    def bury_one(self, index: int) -> None:
        worker = pick(self.workers, index)
        self.bury(worker)
        self._claims_nothing(worker)

    @rule(index=INDEX, at_most=st.integers(1, 3))
    def reclaim(self, index: int, at_most: int) -> None:
        if not self.bereaved():
            self.bury(self.standing(index)[0])
        worker = pick(self.bereaved(), index)
        self.reclaim_from(worker, at_most)
        self._claims_nothing(worker)

    def _claims_nothing(self, worker: Worker) -> None:
        with pytest.raises(psycopg.Error, match="declared dead"):
            worker.claim(4)
        self.seen["dead claim refused"] += 1

    @rule(index=INDEX, times=st.integers(1, 4), company=st.booleans())
    def die_again_and_again(self, index: int, times: int, company: bool) -> None:
        """Whoever takes this run dies: it becomes a suspect, and is blocked if it dies alone."""
        for _ in range(times):
            worker = pick(self.workers, index)
            alone = any(self.world.tasks("suspect"))
            self.claim_for(worker, 2 if company else 1, alone=alone)
            self.bury(worker)
            self.reclaim_from(worker)

    # -- two statements at a time

    @rule(index=INDEX, then=st.sampled_from(THENS), commits=st.booleans())
    def resend_while_the_first_is_under_way(self, index: int, then: str, commits: bool) -> None:
        worker, (held,) = self.standing(index)
        batch = Batch(worker, [held], [self.writing(held, then)])
        _, code = self.flush_in_turn(batch, batch, commits=commits)
        assert code[0] % 4 == (ALREADY if commits else APPLIED)

    @rule(index=INDEX, cancels=st.booleans(), then=PARK, commits=st.booleans())
    def park_while_a_wake_is_applied(self, index: int, cancels: bool, then: str, commits: bool) -> None:
        worker, (held,) = self.standing(index)
        self.tell(held.run, cancels=cancels)
        waker = pick(self.workers, index + 1)
        wakes = [each for each in self.claim_for(waker, 0) if each.run == held.run]
        first = Batch(waker, wakes, [self.writing(each, "wake") for each in wakes])
        parking = self.writing(held, then)
        self.flush_in_turn(first, Batch(worker, [held], [parking]), commits=commits)
        task = self.world.task(held.run)
        if parking.transition.then == "park" and commits and (not cancels or task.cancelling):
            assert task.state in ("ready", "suspect")
            self.seen["park overtaken by a flush"] += 1

    @rule(index=INDEX, then=st.sampled_from(THENS), commits=st.booleans())
    def flush_while_being_reclaimed(self, index: int, then: str, commits: bool) -> None:
        worker, (held,) = self.standing(index)
        writing, owned = self.writing(held, then), self.world.owned(worker.id)
        self.bury(worker)
        reclaim = "select stepwell.reclaim_v1(%s, %s, 1000)"
        _, answer = self.overtaken(
            lambda db: db.execute(reclaim, [worker.id, POISON_AFTER]),
            lambda db: worker.on(db).flush(writing),
            commits=commits,
        )
        if commits:
            self.freed(worker, owned)
        expected = self.world.verdicts(worker.id, [writing])
        assert answer() == expected
        assert expected[0] % 4 == (FENCED if commits else APPLIED)
        self.answered(Batch(worker, [held], [writing]), expected)

    @rule(index=INDEX, at_most=st.integers(0, 2), commits=st.booleans())
    def claim_while_being_buried(self, index: int, at_most: int, commits: bool) -> None:
        worker = pick(self.workers, index)
        expected = self.world.claimable(alone=False)
        _, answer = self.overtaken(
            lambda db: db.execute("select stepwell.bury_v1(%s)", [worker.id]),
            lambda db: worker.on(db).claim(at_most),
            commits=commits,
        )
        if commits:
            self.mourn(worker)
            with pytest.raises(psycopg.Error, match="declared dead"):
                answer()
        else:
            self.claimed(worker, answer(), expected, at_most, alone=False)

    @rule(index=INDEX, at_most=st.integers(0, 2), commits=st.booleans())
    def bury_while_claiming(self, index: int, at_most: int, commits: bool) -> None:
        """A burial waits for the claim, or gives up for now; then what the claim took is there to be reclaimed."""
        worker = pick(self.workers, index)
        expected = self.world.claimable(alone=False)
        held, answer = self.overtaken(
            lambda db: worker.on(db).claim(at_most),
            lambda db: db.execute("select stepwell.bury_v1(%s)", [worker.id]),
            commits=commits,
        )
        if commits:
            self.claimed(worker, held, expected, at_most, alone=False)
        try:
            answer()
            self.mourn(worker)
        except psycopg.errors.LockNotAvailable:
            self.bury(worker)
        self.reclaim_from(worker)

    @rule(index=INDEX, at_most=st.integers(1, 2), alone=st.booleans(), commits=st.booleans())
    def claim_beside_a_claim(self, index: int, at_most: int, alone: bool, commits: bool) -> None:
        """Neither waits for the other, and they share nothing."""
        one, *others = self.workers if len(self.workers) > 1 else [*self.workers, self.enlist()]
        other = pick(others, index)
        expected = self.world.claimable(alone=alone)
        first = one.on(self.open).claim(at_most, alone=alone)
        beside = self.world.claimable(alone=alone, locked={each.task for each in first})
        second = other.claim(at_most, alone=alone)
        if commits:
            self.open.commit()
            self.claimed(one, first, expected, at_most, alone=alone)
        else:
            self.open.rollback()
        self.claimed(other, second, beside, at_most, alone=alone)
        self.seen["claim beside a claim"] += 1


def test_any_interleaving_does_what_the_model_says(lab: Lab) -> None:
    run_machine(Protocol, lab.url, FLOOR, examples=EXAMPLES, steps=STEPS)
