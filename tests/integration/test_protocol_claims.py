"""claim_v1: how many (I2), for whom (I3), in which order, under which names; timers; the doorbell (I1)."""

from __future__ import annotations

from typing import LiteralString
from uuid import UUID

import psycopg
import pytest

from tests.protocol import APPLIED, CANCELLING, NO_FLOORS, Db, Lab, Worker, meanwhile
from worker.engine import claims
from worker.engine.claims import Claimant

# -- how many (I2) -----------------------------------------------------------------------------------


def test_a_claim_takes_what_was_asked_for_and_no_more(lab: Lab) -> None:
    lab.enqueue(5)
    one, other = lab.worker(), lab.worker()
    assert len(one.claim(2)) == 2
    assert len(other.claim(2)) == 2
    assert one.claim(0) == []
    assert len(one.claim(10)) == 1
    assert lab.rows("select claimed_by, count(*)::int from stepwell.tasks group by 1 order by 1") == [
        (one.id, 3),
        (other.id, 2),
    ]


def test_nothing_is_claimed_twice(lab: Lab) -> None:
    lab.enqueue(60)
    workers = [lab.worker(db=lab.connection(autocommit=False)) for _ in range(3)]
    held = [each for worker in workers for each in worker.claim(20)]  # none of the three has committed
    assert len({each.task for each in held}) == 60


def test_a_claim_answers_the_run_and_its_fence(lab: Lab) -> None:
    (run,) = lab.enqueue(deadline="1 hour", labels='{"b": 1, "a": 2}', version="7")
    claim = lab.worker("w@7").take().claim
    assert (claim.run_id, claim.kind, claim.name, claim.attempt, claim.position) == (run, "run", "w@7", 1, 0)
    assert (claim.doing, claim.seq, claim.interrupted, claim.cancelling, claim.epoch) == (
        None,
        0,
        False,
        False,
        0,
    )
    assert (claim.workflow, claim.version) == ("w", "7")
    assert claim.labels is not None
    assert claim.deadline_in is not None
    assert 0 < claim.deadline_in <= 3600


# -- for whom (I3) -----------------------------------------------------------------------------------


def test_a_worker_that_is_dead_or_unknown_claims_nothing(lab: Lab) -> None:
    lab.enqueue()
    dead, forgotten = lab.worker(), lab.worker()
    assert lab.one("select stepwell.bury_v1(%s)", dead.id)
    lab.die(forgotten)
    for worker in (dead, forgotten):
        for alone in (False, True):
            with pytest.raises(psycopg.Error) as refused:
                worker.claim(alone=alone)
            assert refused.value.sqlstate == "SW003"
    assert lab.one("select state from stepwell.tasks") == "ready"


def test_a_claim_that_waits_for_the_burial_is_refused(lab: Lab) -> None:
    lab.enqueue()
    worker = lab.worker(db=lab.connection())
    undertaker = lab.connection(autocommit=False)
    undertaker.execute("select stepwell.bury_v1(%s)", [worker.id])
    with meanwhile(worker.claim) as answer:
        lab.wait_for_lock(worker.db)
        undertaker.commit()
    error = answer.exception()
    assert isinstance(error, psycopg.Error)
    assert error.sqlstate == "SW003"
    assert lab.one("select state from stepwell.tasks") == "ready"


def test_a_claim_goes_on_when_the_burial_comes_to_nothing(lab: Lab) -> None:
    lab.enqueue()
    worker = lab.worker(db=lab.connection())
    undertaker = lab.connection(autocommit=False)
    undertaker.execute("select stepwell.bury_v1(%s)", [worker.id])
    with meanwhile(worker.claim) as answer:
        lab.wait_for_lock(worker.db)
        undertaker.rollback()
    assert len(answer.result()) == 1


def test_a_beat_and_a_claim_do_not_wait_for_each_other(lab: Lab) -> None:
    lab.enqueue()
    supervisor = lab.connection(autocommit=False)
    worker = lab.worker(db=lab.connection(autocommit=False))
    worker.db.commit()
    supervisor.execute("update stepwell.workers set beat = beat + 1 where id = %s", [worker.id])
    worker.db.execute("set lock_timeout = '1s'")
    assert len(worker.claim()) == 1
    supervisor.execute("update stepwell.workers set beat = beat + 1 where id = %s", [worker.id])


# -- in which order ----------------------------------------------------------------------------------


def test_the_first_priority_goes_first_and_within_one_the_first_to_become_ready(lab: Lab) -> None:
    late = lab.enqueue(2, priority=9)
    middle = lab.enqueue(2)
    first = lab.enqueue(2, priority=0)
    more = lab.enqueue(1)
    assert [held.run for held in lab.worker().claim(20)] == [*first, *middle, *more, *late]


def test_work_that_goes_on_comes_before_the_backlog_of_its_priority(lab: Lab) -> None:
    worker, doomed = lab.worker(), lab.worker()
    woken, released, parked = lab.enqueue(3)
    holding = worker.claim(3)
    (lost,) = lab.enqueue()
    doomed.take()
    (failed,) = lab.enqueue()
    ending = worker.take()
    worker.apply(ending, ending.finish(state="failed"))
    urgent = lab.enqueue(1, priority=4)
    backlog = lab.enqueue(3)

    by_run = {held.run: held for held in holding}
    worker.apply(by_run[parked], by_run[parked].park(delay=0.0))
    worker.apply(by_run[released], by_run[released].release())
    lab.db.execute("update stepwell.tasks set wakeups = wakeups + 1 where run_id = %s", [woken])
    worker.apply(by_run[woken], by_run[woken].park())
    assert lab.die(doomed) == 1
    assert lab.retry(failed) == 1
    assert lab.promote() == 1
    assert [held.run for held in worker.claim(20)] == [
        *urgent, released, woken, lost, failed, parked, *backlog
    ]  # fmt: skip


def test_queues_are_claimed_apart(lab: Lab) -> None:
    (mail,) = lab.enqueue(queue="mail")
    (other,) = lab.enqueue()
    worker = lab.worker(queues=("default", "mail"))
    assert [held.run for held in worker.claim(5, queue="mail")] == [mail]
    assert [held.run for held in worker.claim(5)] == [other]


# -- floors ------------------------------------------------------------------------------------------


def test_a_floor_hides_what_was_ready_before_it_and_only_in_its_group(lab: Lab) -> None:
    (early,) = lab.enqueue()
    worker = lab.worker()
    turn = lab.one("select turn from stepwell.tasks where run_id = %s", early)
    (late,) = lab.enqueue()
    (urgent,) = lab.enqueue(priority=0)
    fresh = 2 * 5 + 1
    floors = [turn + 1 if group == fresh else 0 for group in range(20)]
    assert [held.run for held in worker.claim(5, floors=floors)] == [urgent, late]
    assert [held.run for held in worker.claim(5, floors=NO_FLOORS)] == [early]


async def test_a_slow_committer_is_hidden_no_longer_than_a_floor_lives(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(claims, "time", clock)
    slow = lab.connection(autocommit=False)
    (hidden,) = lab.enqueue(db=slow)  # it has drawn its turn, and does not commit
    (seen,) = lab.enqueue()

    async def connect() -> psycopg.AsyncConnection[object]:
        return await psycopg.AsyncConnection.connect(lab.url, autocommit=True)

    claimant = Claimant(connect, lab.worker().id)
    try:
        assert [claim.run_id for claim in await claimant.claim("default", ["w"], 5)] == [seen]
        slow.commit()
        clock.now += claims.FLOOR_SECONDS * 0.9
        (later,) = lab.enqueue()
        assert [claim.run_id for claim in await claimant.claim("default", ["w"], 5)] == [later]
        clock.now += claims.FLOOR_SECONDS * 0.2
        assert [claim.run_id for claim in await claimant.claim("default", ["w"], 5)] == [hidden]
    finally:
        await claimant.close()


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


# -- names -------------------------------------------------------------------------------------------


def test_only_names_that_are_known_are_claimed(lab: Lab) -> None:
    lab.enqueue(3, "stranger")
    (mine,) = lab.enqueue()
    assert [held.run for held in lab.worker().claim(5)] == [mine]


def test_what_no_live_worker_knows_is_set_aside_and_comes_back_with_one_who_does(lab: Lab) -> None:
    strangers = lab.enqueue(3, "stranger")
    known = lab.enqueue(2)
    elsewhere = lab.enqueue(1, "stranger", queue="mail")
    worker = lab.worker()
    lab.worker("stranger", queues=("mail",))
    assert lab.one("select stepwell.shelve_v1('default', 100)") == 3
    assert states(lab) == {**dict.fromkeys(strangers, "shelved"), **dict.fromkeys(known + elsewhere, "ready")}
    assert worker.claim(0, floors=NO_FLOORS) == []

    newcomer = lab.worker("stranger", "other")
    assert "shelved" not in states(lab).values()
    assert [held.run for held in newcomer.claim(10)] == strangers


def test_a_worker_that_is_dead_knows_nothing(lab: Lab) -> None:
    lab.worker()
    gone = lab.worker("stranger")
    lab.enqueue(1, "stranger")
    assert lab.one("select stepwell.shelve_v1('default', 100)") == 0
    assert lab.one("select stepwell.bury_v1(%s)", gone.id)
    assert lab.one("select stepwell.shelve_v1('default', 100)") == 1


def test_nothing_is_set_aside_while_nobody_lives(lab: Lab) -> None:
    """The statement of a worker that was just declared dead must not set the whole queue aside."""
    lab.enqueue(3)
    worker = lab.worker()
    assert lab.one("select stepwell.bury_v1(%s)", worker.id)
    assert lab.one("select stepwell.shelve_v1('default', 100)") == 0


def test_setting_aside_hides_nothing_that_is_known(lab: Lab) -> None:
    worker = lab.worker(db=lab.connection())
    known = lab.enqueue(2)
    lab.enqueue(2, "stranger")
    caretaker = lab.connection(autocommit=False)
    assert lab.one("select stepwell.shelve_v1('default', 100)", db=caretaker) == 2
    assert [held.run for held in worker.claim(5)] == known


def test_setting_aside_takes_no_row_that_was_claimed_meanwhile(lab: Lab) -> None:
    claiming = lab.connection(autocommit=False)
    stranger = lab.worker("stranger", queues=("mail",), db=claiming)
    claiming.commit()
    lab.worker()
    lab.enqueue(2, "stranger")
    (held,) = stranger.claim(1)
    assert lab.one("select stepwell.shelve_v1('default', 100)") == 1
    claiming.commit()
    assert lab.task(held.task) == "claimed"


def test_what_is_set_aside_during_a_registration_comes_back_with_the_next_housekeeping(lab: Lab) -> None:
    strangers = lab.enqueue(2, "stranger")
    lab.worker()
    caretaker = lab.connection(autocommit=False)
    assert lab.one("select stepwell.shelve_v1('default', 100)", db=caretaker) == 2
    newcomer = lab.worker("stranger")  # it cannot see yet what is being set aside
    caretaker.commit()
    assert newcomer.claim(5) == []
    assert lab.one("select stepwell.unshelve_v1(%s, %s, 100)", newcomer.queues, newcomer.names) == 2
    assert [held.run for held in newcomer.claim(5)] == strangers
    assert lab.one("select stepwell.shelve_v1('default', 100)") == 0


def test_what_was_set_aside_comes_back_bounded_and_only_as_far_as_it_is_known(lab: Lab) -> None:
    lab.enqueue(3, "stranger")
    lab.enqueue(1, "other")
    lab.worker()
    assert lab.one("select stepwell.shelve_v1('default', 100)") == 4
    unshelve: LiteralString = "select stepwell.unshelve_v1(array['default'], array['stranger'], 2)"
    assert [lab.one(unshelve) for _ in range(3)] == [2, 1, 0]


def states(lab: Lab) -> dict[UUID, str]:
    return dict(lab.rows("select run_id, state from stepwell.tasks"))


# -- timers ------------------------------------------------------------------------------------------


def test_what_is_due_becomes_ready_in_the_order_in_which_it_was_due(lab: Lab) -> None:
    runs = lab.enqueue(4)
    worker = lab.worker()
    held = worker.claim(4)
    for each, ago in zip(held, (1, 3, 2, -60), strict=True):
        worker.apply(each, each.park(delay=-float(ago)))
    assert lab.one("select promoted from stepwell.promote_v1(2)") == 2
    assert lab.rows("select promoted, next_in > 0 from stepwell.promote_v1(2)") == [(1, True)]
    assert [each.run for each in worker.claim(4)] == [runs[1], runs[2], runs[0]]


def test_a_delayed_run_waits_for_its_time(lab: Lab) -> None:
    lab.enqueue(delay="1 hour")
    worker = lab.worker()
    assert lab.promote() == 0
    assert worker.claim() == []
    lab.db.execute("update stepwell.tasks set due_at = clock_timestamp()")
    assert lab.promote() == 1
    assert worker.take().claim.waited is not None


def test_two_that_promote_share_the_work(lab: Lab) -> None:
    lab.enqueue(4)
    worker = lab.worker()
    for held in worker.claim(4):
        worker.apply(held, held.park(delay=0.0))
    first = lab.connection(autocommit=False)
    assert lab.one("select promoted from stepwell.promote_v1(3)", db=first) == 3
    assert lab.promote() == 1


@pytest.mark.parametrize(
    "option", ["at => 'infinity'", "at => '-infinity'", "deadline => 'infinity'", "delay => 'infinity'"]
)
def test_a_time_without_end_is_refused_before_it_stops_a_worker(lab: Lab, option: str) -> None:
    with pytest.raises(psycopg.errors.DataError):
        lab.db.execute(f"select stepwell.enqueue('w', {option})".encode())
    assert lab.rows("select from stepwell.tasks") == []


# -- the doorbell (I1) -------------------------------------------------------------------------------


def rings(listener: Db) -> list[str]:
    """Return the queues that were rung for: what was committed before a statement has come with its answer."""
    listener.execute("select 1")
    return sorted(note.payload for note in listener.notifies(timeout=0))


def idle(lab: Lab, worker: Worker, *queues: str, seconds: float = 60.0) -> None:
    lab.db.execute("select stepwell.idle_v1(%s, %s, %s)", [worker.id, list(queues), seconds])


def everything_that_may_ring(lab: Lab) -> int:
    """Do everything that may ring; return the worker whose run is cancelled, and who is told in any case."""
    worker = lab.worker()
    lab.enqueue(3)
    released, parked, held = worker.claim(3)
    assert worker.flush(released.release(), parked.park(delay=0.0)) == [APPLIED, APPLIED]
    assert lab.promote() == 1
    assert lab.cancel(held.run)
    assert worker.apply_wakes() == 1
    assert worker.flush(held.finish(state="cancelled")) == [APPLIED + CANCELLING]
    assert lab.retry(held.run) == 1
    assert len(worker.claim(10)) == 3
    assert lab.die(worker) == 3
    lab.db.execute("delete from stepwell.tasks")
    return worker.id


def test_a_busy_system_sends_no_notify(lab: Lab) -> None:
    listener = lab.connection()
    listener.execute("listen stepwell")
    idle(lab, lab.worker(), "mail")
    idle(lab, lab.worker(), "default", seconds=-1.0)
    told = everything_that_may_ring(lab)
    assert rings(listener) == ["stepwell", f"worker {told}"]  # any idle worker will do for a cancellation
    lab.db.execute("delete from stepwell.doorbell")
    told = everything_that_may_ring(lab)
    assert rings(listener) == [f"worker {told}"]  # rare, and it must not wait for its next flush


def test_all_that_readies_a_task_rings_for_a_worker_that_is_idle(lab: Lab) -> None:
    listener = lab.connection()
    listener.execute("listen stepwell")
    idle(lab, lab.worker(), "default")
    told = everything_that_may_ring(lab)
    # for three runs at once, a release, a timer, a retry, a reclaim; and for a cancellation
    assert rings(listener) == ["default"] * 5 + ["stepwell", f"worker {told}"]


def test_a_claim_that_finds_work_ends_the_lease(lab: Lab) -> None:
    worker, other = lab.worker(), lab.worker()
    for each in (worker, other):
        idle(lab, each, "default", "mail")
    assert worker.claim() == []
    assert lab.one("select count(*) from stepwell.doorbell") == 4
    lab.enqueue()
    worker.take()
    assert lab.rows("select distinct worker from stepwell.doorbell") == [(other.id,)]


def test_a_lease_can_be_renewed(lab: Lab) -> None:
    worker = lab.worker()
    idle(lab, worker, "default", seconds=-1.0)
    idle(lab, worker, "default")
    assert lab.rows("select queue, until > clock_timestamp() from stepwell.doorbell") == [("default", True)]
