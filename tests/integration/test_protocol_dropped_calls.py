"""Calls that nobody waits for any more, that are cancelled, or whose workers die."""

from __future__ import annotations

import pytest

from tests.integration.calls import (
    WAKES_WHEN_ONE_FAILS,
    branches,
    completed,
    failed,
    joined,
    knowing,
    only,
    pending,
    windowed,
)
from tests.protocol import (
    ALREADY,
    APPLIED,
    CANCELLING,
    FENCED,
    Db,
    Held,
    Lab,
    Worker,
    meanwhile,
    step_at,
    timer_at,
)
from worker.engine.transitions import Dropped, Settled, Stopping

POISON_AFTER = 2


@pytest.fixture
def worker(lab: Lab) -> Worker:
    return knowing(lab)


def woken(lab: Lab, worker: Worker, run: Held) -> Held:
    """Have a run that waits for the signal claimed again."""
    assert lab.one("select stepwell.signal(%s, 'go')", run.run)
    assert worker.apply_wakes() == 1
    return only("w", worker).take()


# -- dropped -------------------------------------------------------------------------------------------


def test_what_nobody_has_claimed_is_not_executed_and_what_is_executed_wakes_nobody(
    lab: Lab, worker: Worker
) -> None:
    timers = (timer_at(1, 4, 1, delay=3600.0), timer_at(2, delay=3600.0))
    run = joined(lab, worker, *branches(3), step_at(10, 1, 1), *timers, awaits=["go"])
    executed = only("step:send", worker).take()
    assert executed.claim.path == [1, 1, 1]
    again = woken(lab, worker, run)
    worker.apply(again, again.park(extras=[Dropped(path=(1,))], awaits=["go"]))
    assert lab.calls(run.run) == {"1.1.1": "claimed", "2": "waiting", "10.1.1": "ready"}
    assert pending(lab, run) == 1
    worker.apply(executed, failed(executed))
    assert lab.task(run.task, "state, pending, seq, wakeups") == ("waiting", 1, 1, 1)
    assert lab.calls(run.run) == {"2": "waiting", "10.1.1": "ready"}


def test_only_what_is_at_and_below_the_path_is_dropped(lab: Lab, worker: Worker) -> None:
    paths = [(1,), (1, 1, 1), (1, 2, 1), (1, 2, 1, 3, 1), (1, 20, 1), (2,), (12,)]
    run = joined(lab, worker, *(step_at(*path) for path in paths), awaits=["go"])
    again = woken(lab, worker, run)
    worker.apply(again, again.move(extras=[Dropped(path=(1, 2))]))
    assert list(lab.calls(run.run)) == ["1", "1.1.1", "1.20.1", "2", "12"]
    assert pending(lab, run) == 5
    worker.apply(again, again.park(extras=[Dropped(path=(1,)), Dropped(path=(12,))], awaits=["go"]))
    assert list(lab.calls(run.run)) == ["2"]
    assert pending(lab, run) == 1


def test_what_replaces_dropped_calls_in_the_same_flush_is_made(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(2), awaits=["go"])
    again = woken(lab, worker, run)
    worker.apply(again, again.park(extras=[Dropped(path=(1,)), step_at(2, 1, 1), step_at(2, 2, 1)]))
    assert lab.calls(run.run) == {"2.1.1": "ready", "2.2.1": "ready"}
    assert pending(lab, run) == 2


def test_a_timer_that_is_just_being_applied_is_dropped_too(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, timer_at(1), awaits=["go"])
    assert lab.promote() == 1
    (timer,) = worker.claim(0)
    again = woken(lab, worker, run)
    worker.apply(again, again.park(extras=[Dropped(path=(1,))], awaits=["go"]))
    record = timer.record(1, name="sleep")
    record.kind = "sleep"
    assert worker.flush(timer.done(record)) == [FENCED]
    assert lab.history(run.run) == []


@pytest.mark.parametrize("drops_first", [True, False])
def test_a_timer_that_is_dropped_in_the_flush_that_applies_it_is_not_recorded(
    lab: Lab, worker: Worker, drops_first: bool
) -> None:
    run = joined(lab, worker, timer_at(1), *branches(1), awaits=["go"])
    assert lab.promote() == 1
    (timer,) = worker.claim(0)
    again = woken(lab, worker, run)
    drop, apply = (
        again.park(again.record(3), extras=[Dropped(path=(1,))], awaits=["go"]),
        timer.done(timer.record(1)),
    )
    sent, answers = [drop, apply], [APPLIED, FENCED]
    assert worker.flush(*(sent if drops_first else sent[::-1])) == (answers if drops_first else answers[::-1])
    assert [each[2] for each in lab.history(run.run)] == [[3]]
    assert lab.task(run.task, "seq") == 1


def test_a_step_that_is_recorded_in_the_flush_that_ends_its_run_comes_too_late(
    lab: Lab, worker: Worker
) -> None:
    run = joined(lab, worker, *branches(1), awaits=["go"])
    step = only("step:send", worker).take()
    again = woken(lab, worker, run)
    assert worker.flush(completed(step), again.finish(family=True)) == [FENCED, APPLIED]
    assert [each[2:] for each in lab.history(run.run)] == [([], 0, "succeeded")]


def test_a_step_that_waits_for_a_person_is_not_counted_when_it_is_dropped(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(2, WAKES_WHEN_ONE_FAILS), step_at(3))
    one, other = only("step:send", worker).claim(2)
    worker.apply(one, one.hold())
    again = only("w", worker).take()
    worker.apply(other, failed(other))
    worker.apply(again, again.park(extras=[Dropped(path=(1,)), step_at(2, 1, 1), step_at(2, 2, 1)]))
    assert pending(lab, run) == 3


def test_nobody_has_to_look_at_a_step_that_nobody_waits_for(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(2), awaits=["go"])
    one, other = only("step:send", worker).claim(2)
    again = woken(lab, worker, run)
    worker.apply(again, again.park(extras=[Dropped(path=(1,))], awaits=["go"]))
    worker.apply(one, one.hold())
    assert list(lab.calls(run.run)) == ["1.2.1"]
    again = woken(lab, worker, run)
    worker.apply(again, again.park(extras=[Settled(path=(1,))]))
    assert lab.task(run.task, "state, pending") == ("waiting", 1)
    worker.apply(other, other.hold())
    assert lab.task(run.task, "state, pending") == ("ready", 0)


@pytest.mark.parametrize("claim_commits", [True, False])
def test_a_call_is_dropped_while_it_is_being_claimed(lab: Lab, worker: Worker, claim_commits: bool) -> None:
    """The claim decides which of the two it is: executed, or gone."""
    run = joined(lab, worker, *branches(2), awaits=["go"])
    again = woken(lab, worker, run)
    claiming = knowing(lab, db=lab.connection(autocommit=False))
    (executed,) = only("step:send", claiming).claim(1)
    flushing = worker.on(lab.connection())
    with meanwhile(lambda: flushing.flush(again.park(extras=[Dropped(path=(1,))], awaits=["go"]))) as answer:
        lab.wait_for_lock(flushing.db)
        if claim_commits:
            claiming.db.commit()
        else:
            claiming.db.rollback()
    assert answer.result() == [APPLIED]
    assert lab.calls(run.run) == ({"1.1.1": "claimed"} if claim_commits else {})
    assert pending(lab, run) == 0
    if claim_commits:
        assert claiming.flush(completed(executed)) == [APPLIED]
        claiming.db.commit()
        assert lab.task(run.task, "state, seq") == ("waiting", 1)


def test_a_window_that_is_dropped_readies_nothing(lab: Lab, worker: Worker) -> None:
    lab.enqueue()
    run = windowed(lab, worker, 4, 1)
    (step,) = only("step:send", worker).claim(5)
    lab.db.execute("update stepwell.tasks set state = 'ready' where id = %s", [run.task])
    again = only("w", worker).take()
    assert again.run == run.run
    worker.apply(again, again.park(extras=[Dropped(path=(1,))], awaits=["go"]))
    worker.apply(step, completed(step))
    assert lab.calls(run.run) == {}
    assert lab.task(run.task) == "waiting"


def test_what_is_still_executed_can_be_waited_for_again(lab: Lab, worker: Worker) -> None:
    """The undo has to know how they end."""
    run = joined(lab, worker, *branches(4), awaits=["go"])
    one, other = only("step:send", worker).claim(2)
    again = woken(lab, worker, run)
    settling = [Dropped(path=(1,)), Settled(path=(1,))]
    worker.apply(again, again.park(extras=settling))
    assert lab.task(run.task, "state, pending") == ("waiting", 2)
    for step in (one, other):
        assert lab.task(run.task) == "waiting"
        worker.apply(step, completed(step))
    assert lab.task(run.task, "state, pending") == ("ready", 0)


def test_if_nothing_is_executed_any_more_there_is_nothing_to_wait_for(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(2), awaits=["go"])
    again = woken(lab, worker, run)
    worker.apply(again, again.park(extras=[Dropped(path=(1,)), Settled(path=(1,))]))
    assert lab.task(run.task, "state, pending") == ("ready", 0)


# -- cancelled -----------------------------------------------------------------------------------------


def rings(listener: Db) -> list[str]:
    listener.execute("select 1")
    return sorted(note.payload for note in listener.notifies(timeout=0))


def test_a_cancellation_reaches_the_steps_that_others_execute(lab: Lab, worker: Worker) -> None:
    listener = lab.connection()
    listener.execute("listen stepwell")
    run = joined(lab, worker, *branches(3))
    here, there = knowing(lab), knowing(lab)
    mine, theirs = here.take(), there.take()
    assert lab.cancel(run.run)
    assert worker.apply_wakes() == 1
    assert rings(listener) == sorted([f"worker {here.id}", f"worker {there.id}"])
    cancelling = "select claimed_by from stepwell.tasks where kind = 'step' and cancelling order by 1"
    assert lab.rows(cancelling) == [(here.id,), (there.id,)]
    assert lab.task(run.task, "state, cancelling") == ("ready", True)
    assert here.flush(mine.move(mine.record(1, 1, 1, n=1, outcome="failed", value=None))) == [
        APPLIED + CANCELLING
    ]
    assert there.flush(theirs.done()) == [APPLIED + CANCELLING]


def test_a_step_whose_worker_died_with_its_cancellation_is_told_when_it_is_claimed(
    lab: Lab, worker: Worker
) -> None:
    run = joined(lab, worker, *branches(1))
    doomed = knowing(lab)
    doomed.take()
    assert lab.cancel(run.run)
    assert worker.apply_wakes() == 1
    lab.die(doomed)
    assert only("step:send", worker).take().claim.cancelling


# -- died ----------------------------------------------------------------------------------------------


def test_a_step_of_a_dead_worker_is_executed_by_another_and_counted_once(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(2))
    doomed = knowing(lab)
    lost = doomed.take()
    assert lab.die(doomed) == 1
    one, other = worker.claim(2)
    again = one if one.task == lost.task else other
    assert (again.claim.interrupted, again.claim.interruptions, again.attempt) == (True, 1, 2)
    assert doomed.flush(completed(lost)) == [FENCED]
    interruption = again.record(*again.claim.path, n=1, outcome="interrupted", value=None)
    worker.apply(again, again.move(interruption))
    worker.apply(again, completed(again))
    assert lab.task(run.task, "pending, seq") == (1, 2)


def test_a_step_that_was_recorded_before_its_worker_died_is_not_executed_again(
    lab: Lab, worker: Worker
) -> None:
    run = joined(lab, worker, *branches(1))
    doomed = knowing(lab)
    step = doomed.take()
    sent = completed(step)
    assert doomed.flush(sent) == [APPLIED]
    assert lab.die(doomed) == 0
    assert doomed.flush(sent) == [ALREADY]
    assert lab.task(run.task, "state, seq") == ("ready", 1)


def test_a_step_that_two_workers_died_of_is_tried_alone_and_then_blocks_its_run(
    lab: Lab, worker: Worker
) -> None:
    run = joined(lab, worker, *branches(2))
    poison = only("step:send", worker).take()
    worker.apply(poison, poison.release())
    lab.db.execute("update stepwell.tasks set priority = 0 where id = %s", [poison.task])
    for death in range(1, 5):
        doomed = knowing(lab)
        step = only("step:send", doomed).take(alone=death > 2)
        assert step.task == poison.task
        lab.die(doomed, poison_after=POISON_AFTER)
    assert lab.task(poison.task) == "waiting"
    assert lab.state(run.run) != "blocked"  # its task is not locked by the reclaim: a flush has to tell it
    assert worker.apply_wakes() == 1
    assert lab.state(run.run) == "blocked"
    assert lab.one("select error ->> 'type' from stepwell.runs") == "PoisonStep"
    assert lab.rows("select from stepwell.tasks") == []
    assert [each[2:] for each in lab.history(run.run)] == [([], 0, "blocked")]


def test_a_run_that_is_executed_meanwhile_is_blocked_by_its_step(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(1), awaits=["go"])
    step = only("step:send", worker).take()
    again = woken(lab, worker, run)
    stopping = Stopping(epoch=0, reason={"type": "E", "message": "no such argument"})
    worker.apply(step, step.hold(extras=[stopping]))
    assert worker.apply_wakes() == 1
    assert lab.state(run.run) == "blocked"
    assert worker.flush(again.move(again.record(2))) == [FENCED]
    assert lab.total("run", "blocked") == 1


def test_a_step_cannot_block_a_later_epoch_of_its_run(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(1), awaits=["go"])
    step = only("step:send", worker).take()
    again = woken(lab, worker, run)
    worker.apply(step, step.hold(extras=[Stopping(epoch=0, reason={"type": "E", "message": "no"})]))
    worker.apply(again, again.finish(state="failed", family=True))
    assert lab.retry(run.run) == 1
    assert worker.apply_wakes() == 1
    assert lab.one("select state from stepwell.runs") == "open"
    assert lab.one("select count(*) from stepwell.tasks") == 1


def test_flushes_of_steps_of_the_same_runs_do_not_deadlock(lab: Lab, worker: Worker) -> None:
    """Each holds a step of either run: the tasks of the runs are locked in order of id, whatever the order sent."""
    runs = [joined(lab, worker, *branches(2)) for _ in range(2)]
    steps = only("step:send", worker).claim(4)
    mine, theirs = ([each for each in steps if each.claim.path[1] == branch] for branch in (1, 2))
    one, other = (worker.on(lab.connection()) for _ in range(2))
    gate = lab.connection(autocommit=False)
    gate.execute("select from stepwell.tasks where id = any(%s) for update", [[each.task for each in runs]])
    with (
        meanwhile(lambda: one.flush(*(completed(each) for each in mine))) as first,
        meanwhile(lambda: other.flush(*(completed(each) for each in reversed(theirs)))) as second,
    ):
        for each in (one, other):
            lab.wait_for_lock(each.db)
        gate.commit()
    assert first.result() == second.result() == [APPLIED, APPLIED]
    assert [lab.task(run.task, "state, pending") for run in runs] == [("ready", 0)] * 2
