"""bury_v1 and reclaim_v1: a dead worker's claims come free once, in chunks; suspects are tried alone; poison blocks."""

from __future__ import annotations

import psycopg
import pytest

from tests.protocol import ALREADY, APPLIED, FENCED, Held, Lab, Worker, meanwhile

BURY = "select stepwell.bury_v1(%s)"
RECLAIM = "select reclaimed, remaining from stepwell.reclaim_v1(%s, 3, %s)"


def reclaim(lab: Lab, worker: Worker, at_most: int = 1000) -> tuple[int, bool]:
    ((reclaimed, remaining),) = lab.rows(RECLAIM, worker.id, at_most)
    return reclaimed, remaining


def known(lab: Lab, worker: Worker) -> bool:
    return bool(lab.rows("select from stepwell.workers where id = %s", worker.id))


# -- burying -----------------------------------------------------------------------------------------


def test_burying_twice_keeps_the_first_moment_and_an_unknown_worker_is_nobody(lab: Lab) -> None:
    worker = lab.worker()
    assert lab.one(BURY, worker.id)
    moment = lab.one("select dead_at from stepwell.workers")
    assert lab.one(BURY, worker.id)
    assert lab.one("select dead_at from stepwell.workers") == moment
    assert not lab.one(BURY, worker.id + 1)


def test_a_burial_waits_for_a_claim_under_way_and_then_finds_its_tasks(lab: Lab) -> None:
    lab.enqueue(3)
    worker = lab.worker(db=lab.connection(autocommit=False))
    worker.db.commit()
    undertaker = lab.connection()
    assert len(worker.claim(3)) == 3
    with meanwhile(lambda: lab.one(BURY, worker.id, db=undertaker)) as buried:
        lab.wait_for_lock(undertaker)
        worker.db.commit()
    assert buried.result()
    assert reclaim(lab, worker) == (3, False)


def test_a_burial_gives_up_on_a_claim_that_does_not_end(lab: Lab) -> None:
    lab.enqueue()
    hanging = lab.worker(db=lab.connection(autocommit=False))
    hanging.db.commit()
    hanging.claim()
    with pytest.raises(psycopg.errors.LockNotAvailable):
        lab.one(BURY, hanging.id)
    assert lab.one("select dead_at is null from stepwell.workers")
    lab.db.execute("select pg_terminate_backend(%s, 5000)", [hanging.db.info.backend_pid])
    assert lab.one(BURY, hanging.id)
    assert lab.one("select state from stepwell.tasks") == "ready"


def test_nothing_is_taken_from_a_worker_that_was_not_buried(lab: Lab) -> None:
    lab.enqueue()
    worker = lab.worker()
    worker.take()
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        reclaim(lab, worker)


# -- freeing -----------------------------------------------------------------------------------------


def test_claims_come_free_in_chunks_and_the_worker_goes_last(lab: Lab) -> None:
    lab.enqueue(5)
    worker, other = lab.worker(), lab.worker()
    worker.claim(4)
    other.claim(1)
    lab.db.execute("select stepwell.idle_v1(%s, array['default'], 60)", [worker.id])
    assert lab.one(BURY, worker.id)
    assert reclaim(lab, worker, 2) == (2, True)
    assert known(lab, worker)
    assert reclaim(lab, worker, 2) == (2, False)
    assert not known(lab, worker)
    assert lab.rows("select from stepwell.doorbell") == []
    assert reclaim(lab, worker, 2) == (0, False)
    assert lab.rows(
        "select state, claimed_by, count(*)::int from stepwell.tasks group by 1, 2 order by 1"
    ) == [
        ("claimed", other.id, 1),
        ("ready", None, 4),
    ]


def test_a_row_that_a_live_backend_locks_is_passed_over_and_freed_later(lab: Lab) -> None:
    lab.enqueue(3)
    flushing = lab.connection(autocommit=False)
    worker = lab.worker()
    held, *_ = worker.claim(3)
    worker.on(flushing).apply(held, held.move(held.record(1), doing=(2,)))
    assert lab.one(BURY, worker.id)
    assert reclaim(lab, worker) == (2, True)
    assert reclaim(lab, worker) == (0, True)
    flushing.commit()
    assert reclaim(lab, worker) == (1, False)
    assert lab.task(held.task, "state, doing, position, seq") == ("ready", [2], 1, 1)


def test_a_run_that_parks_or_ends_while_its_worker_is_reclaimed_is_left_alone(lab: Lab) -> None:
    lab.enqueue(2)
    flushing = lab.connection(autocommit=False)
    worker = lab.worker()
    parked, ended = worker.claim(2)
    assert worker.on(flushing).flush(parked.park(delay=60.0), ended.finish()) == [APPLIED, APPLIED]
    assert lab.one(BURY, worker.id)
    assert reclaim(lab, worker) == (0, True)
    flushing.commit()
    assert reclaim(lab, worker) == (0, False)
    assert lab.task(parked.task, "state, interrupted") == ("waiting", False)
    assert lab.state(ended.run) == "succeeded"


def test_until_its_task_is_freed_a_dead_worker_may_still_record_what_it_did(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert lab.one(BURY, worker.id)
    worker.apply(held, held.move(held.record(1), doing=(2,)))
    assert reclaim(lab, worker) == (1, False)
    assert worker.flush(held.move(held.record(2))) == [FENCED]
    assert [path for _, _, path, _, _ in lab.history(run)] == [[1]]
    assert lab.worker().take().claim.seq == 1


def test_two_that_reclaim_at_once_share_the_work_and_lose_nothing(lab: Lab) -> None:
    lab.enqueue(6)
    worker = lab.worker()
    worker.claim(6)
    first, second = lab.connection(autocommit=False), lab.connection()
    assert lab.one(BURY, worker.id)
    assert first.execute(RECLAIM, [worker.id, 4]).fetchone() == (4, True)
    assert second.execute(RECLAIM, [worker.id, 100]).fetchone() == (2, True)
    assert first.execute(RECLAIM, [worker.id, 4]).fetchone() == (0, False)
    # What is not committed is not done.
    assert second.execute(RECLAIM, [worker.id, 100]).fetchone() == (0, True)
    first.commit()
    assert not known(lab, worker)
    assert second.execute(RECLAIM, [worker.id, 100]).fetchone() == (0, False)
    assert lab.rows("select state, interruptions, count(*)::int from stepwell.tasks group by 1, 2") == [
        ("ready", 1, 6)
    ]


def test_a_burial_that_meets_another_waits_and_finds_nobody(lab: Lab) -> None:
    worker = lab.worker()
    assert lab.one(BURY, worker.id)
    first, second = lab.connection(autocommit=False), lab.connection()
    assert first.execute(RECLAIM, [worker.id, 10]).fetchone() == (0, False)
    with meanwhile(lambda: lab.one(BURY, worker.id, db=second)) as answer:
        lab.wait_for_lock(second)
        first.commit()
    assert answer.result() is False


def test_the_next_claimant_goes_on_where_the_dead_one_was(lab: Lab) -> None:
    lab.enqueue()
    doomed = lab.worker()
    held = doomed.take()
    doomed.apply(held, held.move(held.record(1), doing=(2,)))
    lab.die(doomed)
    claim = lab.worker().take().claim
    assert (claim.attempt, claim.position, claim.doing, claim.seq) == (2, 1, [2], 1)
    assert (claim.interrupted, claim.interruptions) == (True, 1)


# -- suspects and poison -----------------------------------------------------------------------------


def dying(lab: Lab, *, alone: bool = False) -> Held:
    """Have a worker claim the only task and die of it."""
    worker = lab.worker()
    held = worker.take(alone=alone)
    lab.die(worker)
    return held


def test_a_task_that_two_workers_died_of_is_claimed_by_nobody_but_alone(lab: Lab) -> None:
    lab.enqueue()
    dying(lab)
    held = dying(lab)
    worker = lab.worker()
    assert lab.task(held.task, "state, interruptions, solo_deaths") == ("suspect", 2, 0)
    assert worker.claim(10) == []
    assert lab.worker("other").claim(alone=True) == []
    assert worker.claim(alone=True, queue="mail") == []
    lab.enqueue()
    assert [each.task for each in worker.claim(10, alone=True)] == [held.task]


@pytest.mark.parametrize("poison_after", [1, 3])
def test_a_task_that_kills_alone_often_enough_blocks_its_run(lab: Lab, poison_after: int) -> None:
    (run,) = lab.enqueue()
    dying(lab)
    dying(lab)
    for deaths in range(1, poison_after + 1):
        assert lab.state(run) == "waiting"
        worker = lab.worker()
        worker.take(alone=True)
        assert lab.die(worker, poison_after=poison_after) == 1, deaths
    assert lab.state(run) == "blocked"
    assert lab.one("select error->>'type' from stepwell.runs") == "PoisonStep"
    assert [outcome for *_, outcome in lab.history(run)] == ["blocked"]
    assert lab.rows("select from stepwell.tasks") == []
    assert lab.total("run", "blocked") == 1
    assert lab.retry(run) == 1
    assert lab.worker().take().claim.interruptions == 0


def test_innocent_neighbours_of_a_poison_are_never_blocked(lab: Lab) -> None:
    """However often they died beside it; only what died with nothing else in flight is to blame."""
    *innocent, poison = lab.enqueue(4)
    for _ in range(2):
        worker = lab.worker()
        assert len(worker.claim(10)) == 4
        assert lab.die(worker) == 4
    for _ in range(20):
        worker = lab.worker()
        held = worker.claim(alone=True) or worker.claim(10)
        if not held:
            break
        (only,) = held
        if only.run == poison:
            lab.die(worker)
        else:
            worker.apply(only, only.move(only.record(1), doing=(2,)))
            worker.apply(only, only.finish())
    assert [lab.state(run) for run in innocent] == ["succeeded"] * 3
    assert lab.state(poison) == "blocked"


def test_progress_clears_the_suspicion(lab: Lab) -> None:
    lab.enqueue()
    dying(lab)
    dying(lab)
    dying(lab, alone=True)
    worker = lab.worker()
    held = worker.take(alone=True)
    interruption = held.record(1, n=1, outcome="interrupted", value=None)
    worker.apply(held, held.move(interruption, doing=(1,)))
    assert lab.task(held.task, "interruptions, solo_deaths") == (3, 1)  # it is still at the call that killed
    worker.apply(held, held.move(held.record(1), doing=(2,)))
    assert lab.task(held.task, "interruptions, solo_deaths") == (0, 0)
    lab.die(worker)
    assert lab.task(held.task, "state, interruptions, solo_deaths") == ("ready", 1, 1)


def test_a_recorded_interruption_is_not_reported_again(lab: Lab) -> None:
    lab.enqueue()
    dying(lab)
    worker = lab.worker()
    held = worker.take()
    assert held.claim.interrupted
    worker.apply(held, held.move(held.record(1, n=1, outcome="interrupted", value=None)))
    worker.apply(held, held.release())
    claim = worker.take().claim
    assert (claim.interrupted, claim.interruptions) == (False, 1)


def test_a_release_keeps_an_interruption_that_is_not_recorded(lab: Lab) -> None:
    lab.enqueue()
    dying(lab)
    worker = lab.worker()
    held = worker.take()
    worker.apply(held, held.release())
    claim = worker.take().claim
    assert (claim.interrupted, claim.interruptions) == (True, 1)


@pytest.mark.parametrize("then", ["release", "park", "woken park"])
def test_a_suspect_that_is_given_back_remains_one(lab: Lab, then: str) -> None:
    lab.enqueue()
    dying(lab)
    dying(lab)
    worker = lab.worker()
    held = worker.take(alone=True)
    worker.apply(held, held.move(held.record(1, n=1, outcome="interrupted", value=None)))
    if then == "woken park":
        lab.db.execute("update stepwell.tasks set wakeups = wakeups + 1")
    worker.apply(held, held.release() if then == "release" else held.park(delay=0.0))
    assert lab.promote() == (then == "park")
    assert lab.worker().claim(10) == []
    assert worker.take(alone=True).claim.interruptions == 2


def test_a_run_that_parks_with_progress_is_no_suspect(lab: Lab) -> None:
    lab.enqueue()
    dying(lab)
    dying(lab)
    worker = lab.worker()
    held = worker.take(alone=True)
    worker.apply(held, held.move(held.record(1, n=1, outcome="interrupted", value=None)))
    worker.apply(held, held.park(held.record(1), doing=(2,), delay=0.0))
    assert lab.promote() == 1
    assert worker.take().claim.interruptions == 0


def test_a_stale_flush_of_the_last_victim_finds_the_run_blocked(lab: Lab) -> None:
    (run,) = lab.enqueue()
    dying(lab)
    dying(lab)
    worker = lab.worker()
    held = worker.take(alone=True)
    lab.die(worker, poison_after=1)
    assert worker.flush(held.finish(held.record(1))) in ([FENCED], [ALREADY])
    assert lab.state(run) == "blocked"
    assert [outcome for *_, outcome in lab.history(run)] == ["blocked"]
