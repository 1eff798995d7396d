"""stepwell.pause and resume: what stands still, what ends first, and that nothing is lost meanwhile."""

from __future__ import annotations

from uuid import UUID

import msgspec
import pytest

from tests.protocol import APPLIED, Held, Lab, Worker, meanwhile
from worker.engine.transitions import TaskRow

PAUSING = 8


@pytest.fixture
def worker(lab: Lab) -> Worker:
    return lab.worker("w", "step:send", queues=("default", "stepwell"))


def pause(lab: Lab, run: UUID) -> bool:
    return bool(lab.one("select stepwell.pause(%s)", run))


def resume(lab: Lab, run: UUID) -> bool:
    return bool(lab.one("select stepwell.resume(%s)", run))


def states(lab: Lab, run: UUID) -> dict[str, str]:
    """Return the state of the run's task and of those of its calls, by their paths."""
    rows = lab.rows(
        "select array_to_string(path, '.'), state from stepwell.tasks where run_id = %s and kind <> 'wake'",
        run,
    )
    return dict(rows)


def step_row(*path: int, wakes: int = 1, held: bool = False, windowed: bool = False) -> TaskRow:
    return TaskRow(
        kind="step", path=path, name="step:send", args=msgspec.Raw(b"{}"), wakes=wakes, held=held, windowed=windowed
    )  # fmt: skip


def spread(lab: Lab, worker: Worker, *rows: TaskRow) -> tuple[UUID, Held]:
    """A run that waits for calls."""
    (run,) = lab.enqueue()
    held = worker.take()
    worker.apply(held, held.park(awaits=[], extras=rows, seen=0))
    return run, held


# -- the run's own task --------------------------------------------------------------------------------


def test_a_run_that_nobody_has_claimed_is_paused_and_resumed_as_it_was(lab: Lab, worker: Worker) -> None:
    (run,) = lab.enqueue()
    assert pause(lab, run)
    assert pause(lab, run)
    assert lab.state(run) == "paused"
    assert worker.claim() == []
    assert resume(lab, run)
    assert not resume(lab, run)
    assert lab.state(run) == "pending"
    assert worker.take().run == run


def test_a_run_that_has_ended_or_is_unknown_is_not_paused(lab: Lab, worker: Worker) -> None:
    (run,) = lab.enqueue()
    held = worker.take()
    worker.apply(held, held.finish())
    assert not pause(lab, run)
    assert not resume(lab, run)
    assert lab.one("select stepwell.pause(gen_random_uuid())") is False


def test_a_delayed_run_does_not_start_early_by_being_paused(lab: Lab) -> None:
    (run,) = lab.enqueue(delay="1 hour")
    assert pause(lab, run)
    lab.promote()
    assert resume(lab, run)
    assert states(lab, run) == {"": "waiting"}
    assert pause(lab, run)
    lab.db.execute("update stepwell.tasks set due_at = clock_timestamp() - interval '1 s'")
    assert lab.promote() == 0
    assert lab.state(run) == "paused"
    assert resume(lab, run)
    assert states(lab, run) == {"": "ready"}


@pytest.mark.parametrize("then", ["move", "park", "release", "continue"])
def test_what_is_executed_ends_first(lab: Lab, worker: Worker, then: str) -> None:
    (run,) = lab.enqueue()
    held = worker.take()
    assert pause(lab, run)
    assert lab.state(run) == "running"
    if then == "move":
        assert worker.flush(held.move(held.record(1), doing=(2,))) == [APPLIED + PAUSING]
        assert states(lab, run) == {"": "claimed"}
        held.position += 1
        assert worker.flush(held.release()) == [APPLIED + PAUSING]
    elif then == "park":
        assert worker.flush(held.park(delay=60.0)) == [APPLIED + PAUSING]
        assert lab.one("select due_at > clock_timestamp() from stepwell.tasks")
    else:
        assert worker.flush(held._writing(then, ())) == [APPLIED + PAUSING]  # type: ignore[arg-type]
    assert lab.state(run) == "paused"
    assert worker.claim() == []
    assert resume(lab, run)
    assert worker.take().run == run


def test_a_run_may_end_while_it_is_being_paused(lab: Lab, worker: Worker) -> None:
    (run,) = lab.enqueue()
    held = worker.take()
    assert pause(lab, run)
    worker.flush(held.finish())
    assert lab.state(run) == "succeeded"
    assert not resume(lab, run)


def test_a_paused_run_whose_worker_dies_stays_paused(lab: Lab, worker: Worker) -> None:
    (run,) = lab.enqueue()
    worker.take()
    assert pause(lab, run)
    lab.die(worker)
    assert lab.state(run) == "paused"
    assert resume(lab, run)
    assert lab.worker().take().claim.interrupted


def test_a_pause_waits_for_the_flush_that_is_under_way(lab: Lab, worker: Worker) -> None:
    (run,) = lab.enqueue()
    held = worker.take()
    flushing, pausing = lab.connection(autocommit=False), lab.connection()
    assert worker.on(flushing).flush(held.park(delay=60.0)) == [APPLIED]
    with meanwhile(lambda: lab.one("select stepwell.pause(%s)", run, db=pausing)) as answer:
        lab.wait_for_lock(pausing)
        flushing.commit()
    assert answer.result() is True
    assert lab.state(run) == "paused"


def test_a_claim_passes_over_a_run_that_is_just_being_paused(lab: Lab, worker: Worker) -> None:
    (run,) = lab.enqueue()
    pausing = lab.connection(autocommit=False)
    assert lab.one("select stepwell.pause(%s)", run, db=pausing)
    assert worker.claim() == []
    pausing.commit()
    assert worker.claim() == []


def test_signals_that_come_meanwhile_are_found(lab: Lab, worker: Worker) -> None:
    (run,) = lab.enqueue()
    held = worker.take()
    worker.apply(held, held.park(awaits=["go"]))
    assert pause(lab, run)
    assert lab.one("select stepwell.signal(%s, 'go')", run)
    assert worker.apply_wakes() == 1
    assert lab.state(run) == "paused"
    assert resume(lab, run)
    assert worker.take().claim.signals == 1


def test_a_suspect_remains_one(lab: Lab) -> None:
    (run,) = lab.enqueue()
    for _ in range(2):
        dying = lab.worker()
        dying.claim(alone=False) or dying.claim(alone=True)
        lab.die(dying)
    assert states(lab, run) == {"": "suspect"}
    assert pause(lab, run)
    assert resume(lab, run)
    assert states(lab, run) == {"": "suspect"}


def test_cancelling_a_paused_run_lets_it_go_on_to_its_end(lab: Lab, worker: Worker) -> None:
    run, _ = spread(lab, worker, step_row(1, 1, 1), step_row(1, 2, 1))
    executed = worker.take()
    assert pause(lab, run)
    assert lab.cancel(run)
    worker.apply_wakes()
    assert states(lab, run)[""] == "ready"
    assert not lab.rows("select from stepwell.tasks where paused")
    # What was being executed is told of the cancellation, and goes on as it must: not into a pause that nobody ends.
    assert worker.flush(executed.release()) == [APPLIED + 4]
    assert executed.task not in [
        t for (t,) in lab.rows("select id from stepwell.tasks where state = 'paused'")
    ]


# -- calls ---------------------------------------------------------------------------------------------


def test_calls_are_paused_with_their_run(lab: Lab, worker: Worker) -> None:
    timer = TaskRow(kind="timer", path=(1, 4, 1), name="sleep", delay=3600.0, wakes=3)
    run, _ = spread(
        lab, worker, step_row(1, 1, 1), step_row(1, 2, 1), step_row(1, 3, 1), timer,
        TaskRow(kind="window", path=(2,), name="window", released=1),
        step_row(2, 1, 1, windowed=True), step_row(2, 2, 1, held=True, windowed=True),
    )  # fmt: skip
    retried, executed = worker.claim(2)
    worker.apply(retried, retried.park(delay=3600.0))
    before = states(lab, run)
    assert pause(lab, run)
    assert lab.state(run) == "running"
    assert states(lab, run) == {
        "": "paused", "1.1.1": "paused", "1.2.1": "claimed", "1.3.1": "paused", "1.4.1": "paused", "2": "waiting",
        "2.1.1": "paused", "2.2.1": "waiting",
    }  # fmt: skip
    assert worker.claim(5) == []
    lab.promote()
    assert resume(lab, run)
    assert states(lab, run) == {**before, "": "ready"}
    assert worker.flush(executed.done(executed.record(1, 2, 1))) == [APPLIED]


def test_a_step_that_ends_meanwhile_is_counted_and_found(lab: Lab, worker: Worker) -> None:
    run, parent = spread(lab, worker, step_row(1, 1, 1))
    held = worker.take()
    assert pause(lab, run)
    assert worker.flush(held.done(held.record(1, 1, 1))) == [APPLIED + PAUSING]
    assert lab.state(run) == "paused"
    assert lab.task(parent.task, "pending, wakeups") == (0, 1)
    assert resume(lab, run)
    assert worker.take().task == parent.task


def test_a_step_that_has_to_be_repeated_is_so_after_the_pause(lab: Lab, worker: Worker) -> None:
    run, _ = spread(lab, worker, step_row(1, 1, 1))
    held = worker.take()
    assert pause(lab, run)
    assert worker.flush(held.park(held.record(1, 1, 1, n=1, outcome="failed"), delay=3600.0)) == [
        APPLIED + PAUSING
    ]
    assert states(lab, run)["1.1.1"] == "paused"
    assert resume(lab, run)
    assert states(lab, run)["1.1.1"] == "waiting"


def test_a_step_that_needs_a_person_is_not_set_free_by_a_pause(lab: Lab, worker: Worker) -> None:
    run, _ = spread(lab, worker, step_row(1, 1, 1), step_row(1, 2, 1))
    first, second = worker.claim(2)
    worker.apply(first, first.hold())
    assert pause(lab, run)
    assert worker.flush(second.hold()) == [APPLIED + PAUSING]
    assert resume(lab, run)
    assert states(lab, run) == {"": "ready", "1.1.1": "waiting", "1.2.1": "waiting"}


def test_the_next_of_a_window_waits_for_the_end_of_the_pause(lab: Lab, worker: Worker) -> None:
    run, _ = spread(
        lab, worker, TaskRow(kind="window", path=(1,), name="window", released=1),
        step_row(1, 1, 1, windowed=True), step_row(1, 2, 1, held=True, windowed=True),
        step_row(1, 3, 1, held=True, windowed=True),
    )  # fmt: skip
    held = worker.take()
    assert pause(lab, run)
    assert worker.flush(held.done(held.record(1, 1, 1))) == [APPLIED + PAUSING]
    assert states(lab, run)["1.2.1"] == "paused"
    assert resume(lab, run)
    assert (states(lab, run)["1.2.1"], states(lab, run)["1.3.1"]) == ("ready", "waiting")


def test_calls_made_while_the_run_is_being_paused_are_paused(lab: Lab, worker: Worker) -> None:
    (run,) = lab.enqueue()
    held = worker.take()
    assert pause(lab, run)
    rows = [
        step_row(1, 1, 1),
        step_row(1, 2, 1, held=True, windowed=True),
        TaskRow(kind="timer", path=(1, 3, 1), name="sleep", delay=3600.0, wakes=3),
    ]
    assert worker.flush(held.park(awaits=[], extras=rows)) == [APPLIED + PAUSING]
    assert states(lab, run) == {"": "paused", "1.1.1": "paused", "1.2.1": "waiting", "1.3.1": "paused"}
    assert resume(lab, run)
    assert states(lab, run) == {"": "ready", "1.1.1": "ready", "1.2.1": "waiting", "1.3.1": "waiting"}


def test_a_claimed_step_of_a_dead_worker_stays_paused(lab: Lab, worker: Worker) -> None:
    run, _ = spread(lab, worker, step_row(1, 1, 1))
    worker.take()
    assert pause(lab, run)
    lab.die(worker)
    assert states(lab, run) == {"": "paused", "1.1.1": "paused"}
    assert resume(lab, run)
    assert states(lab, run) == {"": "ready", "1.1.1": "ready"}


def test_pauses_and_flushes_of_many_runs_lock_in_one_order(lab: Lab, worker: Worker) -> None:
    runs = lab.enqueue(20)
    claimed = worker.claim(20)
    flushing, pausing = lab.connection(autocommit=False), lab.connection()
    with meanwhile(lambda: lab.one("select stepwell.pause_many(%s)", runs[::-1], db=pausing)) as answer:
        for held in claimed[:10]:
            worker.on(flushing).flush(held.park(delay=60.0))
        flushing.commit()
    assert len(answer.result()) == 20
    assert {lab.state(run) for run in runs} == {"paused", "running"}
    resumed: list[UUID] = lab.one("select stepwell.resume_many(%s)", runs)
    assert set(resumed) == set(runs)
