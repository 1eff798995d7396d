"""Cancellation and wake-ups: in every order with claims, moves, parks and ends (I5), without blocking anybody (I15)."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

import pytest

from tests.protocol import APPLIED, CANCELLING, FENCED, Held, Lab, Worker, meanwhile
from worker.engine.transitions import Writing

TOLD = APPLIED + CANCELLING


def cancelled(lab: Lab, run: UUID) -> bool:
    """Tell whether a run has ended as cancelled, once, and left nothing behind."""
    ends = [(outcome, n) for _, _, path, n, outcome in lab.history(run) if path == []]
    tasks = lab.rows("select from stepwell.tasks where run_id = %s", run)
    return lab.state(run) == "cancelled" and ends == [("cancelled", 0)] and not tasks


# -- what a cancellation meets -----------------------------------------------------------------------


def ready(lab: Lab, worker: Worker) -> None:
    pass


def parked(lab: Lab, worker: Worker) -> None:
    held = worker.take()
    worker.apply(held, held.park(held.record(1), delay=3600.0))


def waiting_for_others(lab: Lab, worker: Worker) -> None:
    held = worker.take()
    worker.apply(held, held.park(held.record(1), awaits=["signal"]))


def released(lab: Lab, worker: Worker) -> None:
    held = worker.take()
    worker.apply(held, held.release())


def shelved(lab: Lab, worker: Worker) -> None:
    lab.db.execute("update stepwell.workers set names = array['other']")
    assert lab.one("select stepwell.shelve_v1('default', 10)") == 1


def suspect(lab: Lab, worker: Worker) -> None:
    for _ in range(2):
        dying = lab.worker()
        dying.take()
        lab.die(dying)
    assert lab.one("select state from stepwell.tasks") == "suspect"


def retried(lab: Lab, worker: Worker) -> None:
    held = worker.take()
    worker.apply(held, held.finish(held.record(1), state="failed"))
    assert lab.retry(held.run) == 1


@pytest.mark.parametrize("be", [ready, shelved])
def test_a_run_that_nobody_ever_claimed_ends_with_the_wake(
    lab: Lab, be: Callable[[Lab, Worker], None]
) -> None:
    (run,) = lab.enqueue()
    worker, other = lab.worker(), lab.worker("other")
    be(lab, worker)
    assert lab.cancel(run)
    assert other.apply_wakes() == 1  # any worker does it, whatever it knows
    assert cancelled(lab, run)
    assert [seq for seq, *_ in lab.history(run)] == [1]
    assert lab.total("run", "cancelled") == 1


@pytest.mark.parametrize("be", [parked, waiting_for_others, released, suspect, retried])
def test_a_run_that_nobody_executes_is_readied_so_that_its_body_can_clean_up(
    lab: Lab, be: Callable[[Lab, Worker], None]
) -> None:
    (run,) = lab.enqueue()
    worker, other = lab.worker(), lab.worker("other")
    be(lab, worker)
    history = lab.history(run)
    assert lab.cancel(run)
    assert other.apply_wakes() == 1
    wanted = "suspect" if be is suspect else "ready"
    assert lab.rows("select state, cancelling, fresh from stepwell.tasks") == [(wanted, True, False)]
    assert lab.history(run) == history

    held = worker.take(alone=be is suspect)
    assert held.claim.cancelling
    assert worker.flush(held.move(doing=(2,), cancelled=True)) == [TOLD]
    held.position += 1
    worker.apply(held, held.park(delay=3600.0, cancelled=True))  # the clean-up may wait as well
    assert lab.task(held.task) == "waiting"
    lab.db.execute("update stepwell.tasks set due_at = clock_timestamp()")
    assert lab.promote() == 1
    held = worker.take()
    assert not held.claim.cancelling
    worker.apply(held, held.finish(state="cancelled"))
    assert lab.state(run) == "cancelled"
    assert lab.total("run", "cancelled") == 1


def test_a_run_that_cleans_up_can_be_cancelled_again(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    for n in range(2):
        assert lab.cancel(run)
        assert worker.apply_wakes() == 1
        assert worker.flush(held.move(held.record(n + 1), doing=(n + 2,), cancelled=True)) == [TOLD]
        held.position += 1
    worker.apply(held, held.finish(state="cancelled"))


def test_a_delayed_run_is_cancelled_before_its_time(lab: Lab) -> None:
    (run,) = lab.enqueue(delay="1 hour")
    assert lab.cancel(run)
    assert lab.worker().apply_wakes() == 1
    assert cancelled(lab, run)


def test_the_worker_that_executes_a_run_is_told_at_its_next_move_and_ends_it(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert lab.cancel(run)
    assert lab.worker().apply_wakes() == 1
    assert lab.state(run) == "running"
    assert worker.flush(held.move(held.record(1), doing=(2,))) == [TOLD]
    held.position += 1
    assert worker.flush(held.finish(state="cancelled")) == [TOLD]
    assert cancelled(lab, run)


def test_a_run_that_comes_to_its_end_first_has_succeeded(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert lab.cancel(run)
    worker.apply(held, held.finish())
    assert lab.worker().apply_wakes() == 1
    assert lab.state(run) == "succeeded"
    assert not lab.cancel(run)
    assert lab.rows("select from stepwell.tasks") == []


def test_the_claimant_of_a_run_whose_worker_died_is_told_at_once(lab: Lab) -> None:
    (run,) = lab.enqueue()
    doomed, worker = lab.worker(), lab.worker()
    doomed.take()
    assert lab.cancel(run)
    assert worker.apply_wakes() == 1
    lab.die(doomed)
    held = worker.take()
    assert held.claim.cancelling
    assert worker.flush(held.finish(state="cancelled")) == [TOLD]
    assert cancelled(lab, run)


def test_a_wake_whose_worker_died_is_applied_by_another(lab: Lab) -> None:
    (run,) = lab.enqueue()
    doomed, worker = lab.worker(), lab.worker()
    assert lab.cancel(run)
    (wake,) = doomed.claim(0)
    assert lab.die(doomed) == 1
    assert worker.apply_wakes() == 1
    assert doomed.flush(wake.wake()) == [FENCED]
    assert cancelled(lab, run)
    assert lab.total("run", "cancelled") == 1


def test_two_cancellations_end_a_run_once(lab: Lab) -> None:
    one_by_one, together, executed = lab.enqueue(3)
    worker = lab.worker()
    lab.db.execute("update stepwell.tasks set priority = 0 where run_id = %s", [executed])
    held = worker.take()
    assert held.run == executed

    for run in (together, together, executed, executed):
        assert lab.cancel(run)
    assert worker.apply_wakes() == 4  # in one flush
    assert cancelled(lab, together)
    assert worker.flush(held.move()) == [TOLD]
    held.position += 1
    assert worker.flush(held.finish(state="cancelled")) == [TOLD]
    assert cancelled(lab, executed)

    late = lab.connection(autocommit=False)
    assert lab.cancel(one_by_one, db=late)
    assert lab.cancel(one_by_one)
    assert worker.apply_wakes() == 1
    late.commit()
    assert worker.apply_wakes() == 1
    assert cancelled(lab, one_by_one)
    assert lab.total("run", "cancelled") == 3


def test_a_cancellation_does_not_outlive_the_epoch_it_was_meant_for(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert lab.cancel(run)
    worker.apply(held, held.finish(state="failed"))
    assert lab.retry(run) == 1
    assert worker.apply_wakes() == 1
    assert lab.state(run) == "waiting"
    held = worker.take()
    assert not held.claim.cancelling
    assert lab.cancel(run)
    assert worker.apply_wakes() == 1
    assert worker.flush(held.move()) == [TOLD]


def test_a_run_and_its_cancellation_in_one_transaction_come_to_one_end(lab: Lab) -> None:
    producer = lab.connection(autocommit=False)
    (run,) = lab.enqueue(db=producer)
    assert lab.cancel(run, db=producer)
    producer.commit()
    assert lab.worker().apply_wakes() == 1
    assert cancelled(lab, run)


# -- parking and waking meet (I5) --------------------------------------------------------------------


def test_a_wake_before_the_claim_is_known_to_the_claimant(lab: Lab) -> None:
    lab.enqueue()
    worker = lab.worker()
    lab.db.execute("update stepwell.tasks set wakeups = wakeups + 1")
    held = worker.take()
    worker.apply(held, held.park(awaits=["signal"]))
    assert lab.task(held.task) == "waiting"


def test_a_park_that_nothing_would_end_is_ready_at_once(lab: Lab) -> None:
    lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    worker.apply(held, held.park())
    assert lab.task(held.task) == "ready"


def test_a_wake_between_claim_and_park_readies_the_run_at_once(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert lab.cancel(run)
    assert lab.worker().apply_wakes() == 1
    assert worker.flush(held.park(held.record(1), delay=3600.0)) == [TOLD]
    assert lab.task(held.task) == "ready"
    assert worker.take().claim.cancelling


@pytest.mark.parametrize("park_first", [True, False])
def test_a_park_and_a_wake_in_one_flush_ready_the_run(lab: Lab, park_first: bool) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert lab.cancel(run)
    (wake,) = worker.claim(0)
    pair = (held.park(held.record(1), delay=3600.0), wake.wake())
    assert worker.flush(*(pair if park_first else reversed(pair))) == [APPLIED, APPLIED]
    assert worker.take().claim.cancelling


def test_an_end_and_a_wake_in_one_flush_keep_the_end(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert lab.cancel(run)
    (wake,) = worker.claim(0)
    assert worker.flush(held.finish(held.record(1)), wake.wake()) == [APPLIED, APPLIED]
    assert lab.state(run) == "succeeded"
    assert lab.rows("select from stepwell.tasks") == []


def test_a_move_and_a_wake_in_one_flush_are_both_applied(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert lab.cancel(run)
    (wake,) = worker.claim(0)
    assert worker.flush(held.move(held.record(1)), wake.wake()) == [APPLIED, APPLIED]
    held.position += 1
    assert worker.flush(held.move(held.record(2))) == [TOLD]


ENDINGS = ("move", "park", "release", "finish")


def ending(held: Held, then: str) -> Writing:
    return held.park(delay=3600.0) if then == "park" else getattr(held, then)()


@pytest.mark.parametrize("then", ENDINGS)
def test_a_wake_waits_for_a_flush_under_way_and_acts_on_what_it_left(lab: Lab, then: str) -> None:
    (run,) = lab.enqueue()
    worker, waker = lab.worker(db=lab.connection(autocommit=False)), lab.worker(db=lab.connection())
    worker.db.commit()
    held = worker.take()
    worker.db.commit()
    assert lab.cancel(run)
    (wake,) = waker.claim(0)
    worker.apply(held, ending(held, then))
    with meanwhile(lambda: waker.flush(wake.wake())) as answer:
        lab.wait_for_lock(waker.db)
        worker.db.commit()
    assert answer.result() == [APPLIED]
    if then == "move":
        assert worker.flush(held.move()) == [TOLD]
    elif then == "finish":
        assert lab.state(run) == "succeeded"
    else:
        assert lab.task(held.task, "state, cancelling") == ("ready", True)


@pytest.mark.parametrize("then", ENDINGS)
def test_a_flush_waits_for_a_wake_under_way_and_learns_of_it(lab: Lab, then: str) -> None:
    (run,) = lab.enqueue()
    worker, waker = lab.worker(db=lab.connection()), lab.worker(db=lab.connection(autocommit=False))
    waker.db.commit()
    held = worker.take()
    assert lab.cancel(run)
    assert waker.apply_wakes() == 1
    with meanwhile(lambda: worker.flush(ending(held, then))) as answer:
        lab.wait_for_lock(worker.db)
        waker.db.commit()
    assert answer.result() == [TOLD]
    if then == "finish":
        assert lab.state(run) == "succeeded"
    elif then == "move":
        assert lab.task(held.task, "state, cancelling") == ("claimed", True)
    else:
        assert lab.task(held.task, "state, cancelling") == ("ready", True)


def test_a_wake_waits_for_a_claim_under_way_and_tells_its_worker(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker, waker = lab.worker(db=lab.connection(autocommit=False)), lab.worker(db=lab.connection())
    worker.db.commit()
    held = worker.take()
    assert lab.cancel(run)
    (wake,) = waker.claim(0)
    with meanwhile(lambda: waker.flush(wake.wake())) as answer:
        lab.wait_for_lock(waker.db)
        worker.db.commit()
    assert answer.result() == [APPLIED]
    assert worker.flush(held.move()) == [TOLD]


def test_a_claim_passes_over_a_run_that_a_wake_is_ending(lab: Lab) -> None:
    ending, other = lab.enqueue(2)
    waker = lab.worker(db=lab.connection(autocommit=False))
    waker.db.commit()
    assert lab.cancel(ending)
    assert waker.apply_wakes() == 1
    assert [held.run for held in lab.worker().claim(5)] == [other]
    waker.db.commit()
    assert cancelled(lab, ending)


# -- producers block nobody (I15) --------------------------------------------------------------------


def test_whatever_a_producer_leaves_open_blocks_no_claimant(lab: Lab) -> None:
    executed, waiting = lab.enqueue(2, key=None)
    producer = lab.connection(autocommit=False)
    worker, doomed = lab.worker(), lab.worker()
    held = worker.take()
    lab.enqueue(key="known")
    for run in (executed, waiting):
        assert lab.cancel(run, db=producer)
    lab.enqueue(3, db=producer)
    lab.enqueue(delay="1 hour", db=producer)
    assert lab.enqueue(key="known", db=producer) == lab.enqueue(key="known")
    lab.enqueue(key="new", db=producer)

    # What the producer has locked is nothing that existed before, and no table against writing.
    modes = lab.rows(
        "select distinct mode from pg_locks where pid = %s and locktype in ('relation', 'tuple')",
        producer.info.backend_pid,
    )
    assert {mode for (mode,) in modes} <= {"AccessShareLock", "RowShareLock", "RowExclusiveLock"}
    assert len(lab.rows("select id from stepwell.tasks for update nowait")) == 3
    assert len(lab.rows("select id from stepwell.runs for update nowait")) == 3

    lab.db.execute("set lock_timeout = '1ms'")  # whoever has to wait fails
    worker.apply(held, held.move(held.record(1), doing=(2,)))
    worker.apply(held, held.park(delay=0.0))
    assert lab.promote() == 1
    assert lab.one("select stepwell.shelve_v1('default', 100)") == 0
    doomed.claim(5)
    assert lab.die(doomed) == 3
    for held in worker.claim(5):
        worker.apply(held, held.finish(state="failed"))
    assert lab.retry(executed) == 1
    lab.enqueue()
    assert lab.cancel(executed)
    assert worker.apply_wakes() == 1
    lab.worker()
    producer.commit()
    assert worker.apply_wakes() == 2
    assert lab.state(waiting) == "failed"


def test_a_producer_waits_only_for_another_with_the_same_key(lab: Lab) -> None:
    first, second = lab.connection(autocommit=False), lab.connection()
    (run,) = lab.enqueue(key="k", db=first)
    with meanwhile(lambda: lab.enqueue(key="k", db=second)) as answer:
        lab.wait_for_lock(second)
        first.commit()
    assert answer.result() == [run]
    assert lab.one("select count(*) from stepwell.tasks") == 1


def test_a_producer_that_rolls_back_leaves_its_key_to_the_one_that_waits(lab: Lab) -> None:
    first, second = lab.connection(autocommit=False), lab.connection()
    (gone,) = lab.enqueue(key="k", db=first)
    with meanwhile(lambda: lab.enqueue(key="k", db=second)) as answer:
        lab.wait_for_lock(second)
        first.rollback()
    (run,) = answer.result()
    assert run != gone
    assert lab.rows("select run_id from stepwell.tasks") == [(run,)]


def test_a_producer_that_must_wait_for_nobody_does_not_wait_for_claimants(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker(db=lab.connection(autocommit=False))
    worker.db.commit()
    held = worker.take()
    worker.apply(held, held.finish())
    lab.db.execute("set lock_timeout = '1ms'")
    assert lab.cancel(run)
    lab.enqueue()
    worker.db.commit()
    assert lab.worker().apply_wakes() == 1
    assert lab.state(run) == "succeeded"
