"""flush_v1: the fence (I8), resends (I10), one final outcome (I9), numbers without gaps, locks in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.protocol import ALREADY, APPLIED, FENCED, Db, Held, Lab, Worker, meanwhile, step_at
from worker.engine.transitions import Transition, Writing

# -- the fence ---------------------------------------------------------------------------------------


def another_worker(lab: Lab, worker: Worker, writing: Writing) -> list[int]:
    return lab.worker().flush(writing)


def wrong(**change: Any) -> Callable[[Lab, Worker, Writing], list[int]]:
    def send(lab: Lab, worker: Worker, writing: Writing) -> list[int]:
        for name, value in change.items():
            setattr(writing.transition, name, value)
        return worker.flush(writing)

    return send


STALE = {
    "worker": another_worker,
    "attempt": wrong(attempt=2),
    "earlier attempt": wrong(attempt=0),
    "position ahead": wrong(position=1),
    "task": wrong(task=-1),
    "run": wrong(run_id=UUID(int=1)),
}


@pytest.mark.parametrize("then", ["move", "park", "release", "finish"])
@pytest.mark.parametrize("stale", STALE)
def test_a_transition_with_a_wrong_fence_writes_nothing(lab: Lab, stale: str, then: str) -> None:
    lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    before = lab.snapshot()
    writing = getattr(held, then)(held.record(1))
    assert STALE[stale](lab, worker, writing) == [FENCED]
    assert lab.snapshot() == before


@pytest.mark.parametrize("then", ["move", "park", "release", "finish"])
def test_a_claim_that_was_reclaimed_writes_nothing(lab: Lab, then: str) -> None:
    (run,) = lab.enqueue()
    stale = lab.worker()
    held = stale.take()
    lab.die(stale)
    before = lab.snapshot()
    assert stale.flush(getattr(held, then)(held.record(1))) == [FENCED]
    assert lab.snapshot() == before

    lab.worker().take()
    before = lab.snapshot()
    assert stale.flush(getattr(held, then)(held.record(1))) == [FENCED]
    assert lab.snapshot() == before
    assert lab.history(run) == []


@pytest.mark.parametrize("then", ["move", "park", "release", "finish"])
def test_a_claim_of_a_run_that_a_restore_has_taken_away_writes_nothing_over_one_with_its_id(
    lab: Lab, then: str
) -> None:
    """Put back, a database gives the ids of tasks once more: to other runs, and maybe to the worker that had them."""
    lab.enqueue()
    worker = lab.worker()
    gone = worker.take()
    lab.db.execute("delete from stepwell.tasks")
    lab.db.execute("delete from stepwell.runs")
    lab.db.execute("select setval('stepwell.tasks_id_seq', %s, false)", [gone.task])
    (run,) = lab.enqueue()
    held = worker.take()
    assert (held.task, held.attempt, held.position) == (gone.task, gone.attempt, gone.position)
    before = lab.snapshot()
    assert worker.flush(getattr(gone, then)(gone.record(1))) == [FENCED]
    assert lab.snapshot() == before
    assert worker.flush(held.finish(held.record(1))) == [APPLIED]
    assert lab.state(run) == "succeeded"


def test_a_claim_of_a_call_writes_nothing_over_another_one_that_got_its_id_in_a_restore(lab: Lab) -> None:
    """Of one run, whose join was lost and is made again: in it, the calls get the ids of each other."""
    lab.enqueue()
    worker = lab.worker("w", "step:send")
    held = worker.take()
    worker.apply(held, held.park(extras=[step_at(1, 1, 1), step_at(1, 2, 1)]))
    gone = worker.claim(2)
    ids = {call.task for call in gone}
    for then, now in (([1, 1, 1], [9]), ([1, 2, 1], [1, 1, 1]), ([9], [1, 2, 1])):
        lab.db.execute("update stepwell.tasks set path = %s::int[] where path = %s::int[]", (now, then))
    before = lab.snapshot()
    for call in gone:
        assert worker.flush(call.done(call.record(*call.claim.path))) == [FENCED]
        assert worker.flush(call.park(call.record(*call.claim.path, n=1, outcome="failed"), delay=1.0)) == [
            FENCED
        ]
    assert lab.snapshot() == before
    assert {row[0] for row in lab.rows("select id from stepwell.tasks where path > '{}'")} == ids


def test_a_fenced_transition_does_not_stop_the_others_of_its_flush(lab: Lab) -> None:
    lab.enqueue(3)
    worker = lab.worker()
    first, stale, third = worker.claim(3)
    stale.attempt += 1
    writings = [held.finish(held.record(1)) for held in (first, stale, third)]
    assert worker.flush(*writings) == [APPLIED, FENCED, APPLIED]
    assert lab.history(stale.run) == []
    assert [lab.state(held.run) for held in (first, stale, third)] == ["succeeded", "running", "succeeded"]


def test_a_flush_that_waited_sees_what_it_waited_for(lab: Lab) -> None:
    """The fence is tested after the lock, in a new statement: the old snapshot still showed the claim."""
    lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    reclaimer, late = lab.connection(autocommit=False), lab.connection()
    assert lab.one("select stepwell.bury_v1(%s)", worker.id)
    reclaimer.execute("select stepwell.reclaim_v1(%s, 3, 10)", [worker.id])
    with meanwhile(lambda: worker.on(late).flush(held.move(held.record(1)))) as answer:
        lab.wait_for_lock(late)
        reclaimer.commit()
    assert answer.result() == [FENCED]
    assert lab.history(held.run) == []


# -- resends -----------------------------------------------------------------------------------------

ENDS_OF_A_FLUSH = {
    "move": lambda held: held.move(held.record(1), doing=(2,)),
    "park": lambda held: held.park(held.record(1), doing=(2,), delay=0.0),
    "release": lambda held: held.release(held.record(1, n=1, outcome="interrupted", value=None)),
    "finish": lambda held: held.finish(held.record(1)),
}


@pytest.fixture(params=ENDS_OF_A_FLUSH)
def writing_of(request: pytest.FixtureRequest) -> Callable[[Held], Writing]:
    make: Callable[[Held], Writing] = ENDS_OF_A_FLUSH[request.param]
    return make


def test_a_resend_is_answered_already_and_writes_nothing(
    lab: Lab, writing_of: Callable[[Held], Writing]
) -> None:
    lab.enqueue()
    worker = lab.worker()
    writing = writing_of(worker.take())
    assert worker.flush(writing) == [APPLIED]
    before = lab.snapshot()
    assert worker.on(lab.connection()).flush(writing) == [ALREADY]
    assert lab.snapshot() == before


def test_a_resend_is_answered_already_when_the_run_has_gone_on(
    lab: Lab, writing_of: Callable[[Held], Writing]
) -> None:
    (run,) = lab.enqueue()
    worker, other = lab.worker(), lab.worker()
    held = worker.take()
    writing = writing_of(held)
    worker.apply(held, writing)
    if writing.transition.then == "move":
        lab.die(worker)
    lab.promote()
    if writing.transition.then != "finish":
        other.take()
    before = lab.snapshot()
    assert worker.flush(writing) == [ALREADY]
    assert lab.snapshot() == before

    for again in lab.rows("select id from stepwell.tasks where run_id = %s", run):
        lab.db.execute("delete from stepwell.tasks where id = %s", again)
    assert worker.flush(writing) == [ALREADY]


def test_a_resend_is_answered_already_when_this_worker_has_claimed_the_run_again(
    lab: Lab, writing_of: Callable[[Held], Writing]
) -> None:
    lab.enqueue()
    worker = lab.worker()
    writing = writing_of(worker.take())
    assert worker.flush(writing) == [APPLIED]
    lab.promote()
    worker.claim()
    assert worker.flush(writing) == [ALREADY]


def test_a_resend_waits_for_the_first_backend_and_is_answered_already(
    lab: Lab, writing_of: Callable[[Held], Writing]
) -> None:
    lab.enqueue()
    worker = lab.worker()
    writing = writing_of(worker.take())
    old, new = lab.connection(autocommit=False), lab.connection()
    assert worker.on(old).flush(writing) == [APPLIED]
    with meanwhile(lambda: worker.on(new).flush(writing)) as answer:
        lab.wait_for_lock(new)
        old.commit()
    assert answer.result() == [ALREADY]
    assert lab.total("step", writing.records[0].outcome) == 1


def test_a_resend_is_applied_when_the_first_backend_comes_to_nothing(
    lab: Lab, writing_of: Callable[[Held], Writing]
) -> None:
    lab.enqueue()
    worker = lab.worker()
    writing = writing_of(worker.take())
    old, new = lab.connection(autocommit=False), lab.connection()
    assert worker.on(old).flush(writing) == [APPLIED]
    with meanwhile(lambda: worker.on(new).flush(writing)) as answer:
        lab.wait_for_lock(new)
        lab.db.execute("select pg_terminate_backend(%s)", [old.info.backend_pid])
    assert answer.result() == [APPLIED]
    assert lab.total("step", writing.records[0].outcome) == 1


def test_of_a_resent_batch_each_transition_is_answered_for_itself(lab: Lab) -> None:
    lab.enqueue(4)
    worker = lab.worker()
    ended, moved, lost, new = worker.claim(4)
    ended_by, moved_by = ended.finish(ended.record(1)), moved.move(moved.record(1))
    assert worker.flush(ended_by, moved_by) == [APPLIED, APPLIED]
    lost.attempt += 1
    verdicts = worker.flush(new.move(new.record(1)), lost.move(lost.record(1)), moved_by, ended_by)
    assert verdicts == [APPLIED, FENCED, ALREADY, ALREADY]


def test_a_move_without_a_record_tells_whether_the_one_before_it_was_committed(lab: Lab) -> None:
    """What the worker asks after it lost the answer to COMMIT: *already* = it was, *applied* = it never will be."""
    lab.enqueue(2)
    worker = lab.worker()
    committed, lost = worker.claim(2)
    assert worker.flush(committed.move(committed.record(1))) == [APPLIED]
    assert worker.flush(committed.move()) == [ALREADY]
    assert worker.flush(lost.move()) == [APPLIED]
    assert worker.flush(lost.move(lost.record(1))) == [ALREADY]  # it came late, and has written nothing
    assert lab.history(lost.run) == []


# -- history -----------------------------------------------------------------------------------------


def test_a_second_final_outcome_is_refused_and_with_it_the_whole_flush(lab: Lab) -> None:
    lab.enqueue(2)
    worker = lab.worker()
    held, neighbour = worker.claim(2)
    worker.apply(held, held.move(held.record(1), doing=(2,)))
    before = lab.snapshot()
    with pytest.raises(psycopg.errors.UniqueViolation):
        worker.flush(neighbour.move(neighbour.record(1)), held.move(held.record(1, value='"other"')))
    assert lab.snapshot() == before


def test_an_impossible_record_is_refused(lab: Lab) -> None:
    lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    for record in (
        held.record(1, outcome="succeeded"),
        held.record(1, n=-1, outcome="failed"),
        held.record(1, n=1, outcome="completed"),
        held.record(outcome="completed"),
    ):
        if not record.path:
            record.kind = "run"
        with pytest.raises(psycopg.errors.CheckViolation):
            worker.flush(held.move(record))
    assert lab.history(held.run) == []


def test_numbers_grow_without_gaps_over_records_flushes_claims_and_retries(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    broken = held.record(1, n=1, outcome="failed", value=None)
    worker.apply(held, held.move(broken, held.record(1), held.record(2), doing=(3,)))
    worker.apply(held, held.move(doing=(4,)))
    worker.apply(held, held.park(held.record(4), delay=0.0))
    lab.promote()

    held = worker.take()
    worker.apply(held, held.release(held.record(5, n=1, outcome="interrupted", value=None)))
    held = worker.take()
    lab.die(worker)

    other = lab.worker()
    held = other.take()
    assert held.claim.seq == 5
    other.apply(held, held.finish(held.record(5), state="failed"))
    assert lab.retry(run) == 1
    held = other.take()
    assert held.claim.seq == 8
    other.apply(held, held.finish(held.record(6), held.record(7)))

    assert [row[0] for row in lab.history(run)] == list(range(1, 12))
    assert [(list(path), n) for _, _, path, n, _ in lab.history(run)] == [
        ([1], 1), ([1], 0), ([2], 0), ([4], 0), ([5], 1), ([5], 0), ([], 0), ([], 1), ([6], 0), ([7], 0), ([], 0),
    ]  # fmt: skip


# -- what it costs, and whom it meets ----------------------------------------------------------------


def test_a_move_stays_within_its_page(lab: Lab) -> None:
    lab.enqueue()
    db = lab.connection(autocommit=False)
    worker = lab.worker(db=db)
    held = worker.take()
    for step in (1, 2, 3):
        db.commit()
        updated, hot = updates_of_tasks(db)
        worker.apply(held, held.move(held.record(step), doing=(step + 1,)))
        assert updates_of_tasks(db) == (updated + 1, hot + 1)


def updates_of_tasks(db: Db) -> tuple[int, int]:
    """Return how many updates of tasks, and of these how many without new index entries, are not yet in the statistics.

    Nothing is moved there while a transaction is open.
    """
    row = db.execute(
        "select pg_stat_get_xact_tuples_updated(t), pg_stat_get_xact_tuples_hot_updated(t)"
        " from (values ('stepwell.tasks'::regclass)) v (t)"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def test_a_stale_claim_does_not_take_the_records_of_its_workers_next_claim_for_its_own(lab: Lab) -> None:
    lab.enqueue(1)
    worker = lab.worker()
    (stale,) = worker.claim()
    late = stale.finish(stale.record(1))
    assert worker.flush(stale.release()) == [APPLIED]
    (current,) = worker.claim()
    assert worker.flush(current.finish(current.record(1))) == [APPLIED]
    assert worker.flush(late) == [FENCED]


def test_two_flushes_with_the_same_tasks_in_opposite_order_do_not_deadlock(lab: Lab) -> None:
    lab.enqueue(2)
    worker = lab.worker()
    one, two = worker.claim(2)
    writings = [one.move(one.record(1)), two.move(two.record(1))]
    gate, first, second = lab.connection(autocommit=False), lab.connection(), lab.connection()
    # The gate holds the row with the lower id: whoever locked in the order of its batch would hold the other.
    gate.execute("select from stepwell.tasks where id = %s for update", [one.task])
    with (
        meanwhile(lambda: worker.on(first).flush(*reversed(writings))) as backwards,
        meanwhile(lambda: lab.wait_for_lock(first)) as first_waits,
    ):
        first_waits.result()
        free = lab.connection()
        locked = free.execute(
            "select id from stepwell.tasks where id = %s for update skip locked", [two.task]
        ).fetchone()
        assert locked == (two.task,)
        again = [Writing(copied(w.transition), w.records, w.end) for w in writings]
        with meanwhile(lambda: worker.on(second).flush(*again)) as forwards:
            lab.wait_for_lock(second)
            gate.commit()
    assert sorted([tuple(backwards.result()), tuple(forwards.result())]) == [
        (APPLIED, APPLIED),
        (ALREADY, ALREADY),
    ]


def copied(transition: Transition) -> Transition:
    """Return an equal transition: what is sent is numbered in place."""
    return Transition(**{name: getattr(transition, name) for name in transition.__struct_fields__})
