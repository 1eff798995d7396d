"""Calls that are tasks of their own: made by a park, executed by anybody, counted, and told to their run (I4, I5)."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.calls import (
    FAULT,
    WAKES_ALWAYS,
    WAKES_WHEN_ALL_ARE_DONE,
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
    BEHIND,
    FENCED,
    Lab,
    Worker,
    meanwhile,
    step_at,
    timer_at,
)
from worker.engine.transitions import TaskRow


@pytest.fixture
def worker(lab: Lab) -> Worker:
    return knowing(lab)


# -- what a step of its own is -------------------------------------------------------------------------


def test_a_park_makes_tasks_and_any_worker_takes_them(lab: Lab, worker: Worker) -> None:
    run = joined(
        lab, worker, step_at(1, 1, 1), step_at(1, 2, 1, queue="mail"), timer_at(1, 3, 1, delay=3600.0)
    )
    assert lab.calls(run.run) == {"1.1.1": "ready", "1.2.1": "ready", "1.3.1": "waiting"}
    assert (lab.task(run.task), pending(lab, run)) == ("waiting", 2)
    assert lab.worker().claim() == []  # who does not know the step
    (here,) = knowing(lab).claim(5)
    mail = lab.worker("step:send", queues=("mail",))
    (there,) = mail.claim(5, queue="mail")
    for held, path in (here, [1, 1, 1]), (there, [1, 2, 1]):
        claim = held.claim
        assert (claim.kind, claim.name, claim.path, claim.parent) == ("step", "step:send", path, run.task)
        assert (claim.run_id, claim.workflow, claim.args) == (run.run, "w", '{"n": 1}')


def test_resumed_work_and_its_calls_go_before_the_backlog(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(2))
    lab.enqueue(3)
    assert [held.run for held in worker.claim(3)][:2] == [run.run, run.run]


def test_a_step_goes_through_everything_that_a_run_goes_through(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(1))
    step = worker.take()
    worker.apply(step, step.move(step.record(1, 1, 1, n=1, outcome="failed", value=None, error=FAULT)))
    assert lab.task(step.task, "state, position") == ("claimed", 1)
    worker.apply(step, step.park(step.record(1, 1, 1, n=2, outcome="failed", value=None), delay=3600.0))
    assert lab.task(step.task) == "waiting"
    lab.db.execute("update stepwell.tasks set due_at = clock_timestamp() where due_at is not null")
    assert lab.promote() == 1
    step = worker.take()
    worker.apply(step, step.release(step.record(1, 1, 1, n=3, outcome="interrupted", value=None)))
    assert lab.task(step.task) == "ready"
    step = worker.take()
    assert (step.attempt, step.position) == (3, 3)
    assert lab.task(run.task, "state, seq, pending") == ("waiting", 3, 1)
    worker.apply(step, completed(step))
    assert lab.task(step.task) is None
    assert lab.task(run.task, "state, seq, pending") == ("ready", 4, 0)
    assert [(seq, n, outcome) for seq, _, _, n, outcome in lab.history(run.run)] == [
        (1, 1, "failed"), (2, 2, "failed"), (3, 3, "interrupted"), (4, 0, "completed"),
    ]  # fmt: skip
    assert lab.total("step", "completed") == 1


def test_every_transition_of_a_step_is_fenced(lab: Lab, worker: Worker) -> None:
    joined(lab, worker, *branches(1))
    doomed = knowing(lab)
    stale = doomed.take()
    lab.die(doomed)
    current = worker.take()
    before = lab.snapshot()
    for writing in (completed(stale), stale.hold(), stale.park(delay=1.0), stale.move(), stale.release()):
        assert doomed.flush(writing) == [FENCED]
        assert worker.flush(writing) == [FENCED]
    assert lab.snapshot() == before
    worker.apply(current, completed(current))


@pytest.mark.parametrize("stale_first", [True, False])
def test_a_stale_transition_does_nothing_beside_the_current_one_of_the_same_step(
    lab: Lab, worker: Worker, stale_first: bool
) -> None:
    """A worker may have both in one flush: it was given back a step that it still executes."""
    run = joined(lab, worker, *branches(1))
    stale = worker.take()
    worker.apply(stale, stale.release())
    for says in ("done", "hold", "park", "release"):
        current = worker.take()
        late = {
            "done": completed(stale), "hold": stale.hold(), "park": stale.park(delay=9.0), "release": stale.release(),
        }[says]  # fmt: skip
        both = [late, current.release()] if stale_first else [current.release(), late]
        codes = [FENCED, APPLIED] if stale_first else [APPLIED, FENCED]
        assert worker.flush(*both) == codes
        assert len(lab.calls(run.run)) == 1, "the step is still there"
        assert pending(lab, run) == 1
        assert lab.history(run.run) == []
    current = worker.take()
    worker.apply(current, completed(current))


def test_a_step_that_is_resent_was_applied_before(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(3))
    one, two, three = worker.claim(3)
    sent = (
        completed(one),
        two.park(two.record(1, 2, 1, n=1, outcome="failed", value=None), delay=60.0),
        three.hold(),
    )
    assert worker.flush(*sent) == [APPLIED] * 3
    before = lab.snapshot()
    assert worker.flush(*sent) == [ALREADY] * 3
    assert lab.snapshot() == before
    assert pending(lab, run) == 1


def test_a_spread_that_is_resent_makes_nothing_twice(lab: Lab, worker: Worker) -> None:
    lab.enqueue()
    held = worker.take()
    sent = held.park(held.record(1), extras=branches(3))
    assert worker.flush(sent) == [APPLIED]
    before = lab.snapshot()
    assert worker.flush(sent) == [ALREADY]
    assert lab.snapshot() == before
    assert pending(lab, held) == 3


def test_a_stale_spread_makes_nothing(lab: Lab, worker: Worker) -> None:
    lab.enqueue()
    doomed = knowing(lab)
    stale = doomed.take()
    lab.die(doomed)
    assert doomed.flush(stale.park(extras=branches(2))) == [FENCED]
    assert lab.calls(stale.run) == {}


def test_calls_that_are_there_already_are_not_counted_again(lab: Lab, worker: Worker) -> None:
    """A drive whose spread is known comes to the same calls: only the new ones are made."""
    run = joined(lab, worker, *branches(2), awaits=["go"])
    lab.one("select stepwell.signal(%s, 'go')", run.run)
    worker.apply_wakes()
    (again,) = [each for each in worker.claim(5) if each.claim.kind == "run"]
    worker.apply(again, again.park(extras=[*branches(3)]))
    assert pending(lab, run) == 3


def test_the_end_of_a_run_deletes_its_calls(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(2), timer_at(2, delay=3600.0), step_at(3, wakes=WAKES_ALWAYS))
    executed = next(each for each in worker.claim(5) if each.claim.path == [1, 1, 1])
    lab.db.execute("update stepwell.tasks set state = 'ready' where id = %s", [run.task])
    run = worker.take()
    worker.apply(run, run.finish(state="failed", family=True))
    assert lab.rows("select from stepwell.tasks") == []
    assert worker.flush(completed(executed)) == [FENCED]


# -- when the run is woken -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wakes", "one_completed", "one_failed", "all_completed"),
    [
        (WAKES_WHEN_ALL_ARE_DONE, "waiting", "waiting", "ready"),
        (WAKES_WHEN_ONE_FAILS, "waiting", "ready", "ready"),
        (WAKES_ALWAYS, "ready", "ready", "ready"),
        (0, "waiting", "waiting", "waiting"),
    ],
)
def test_a_run_is_woken_by(
    lab: Lab, worker: Worker, wakes: int, one_completed: str, one_failed: str, all_completed: str
) -> None:
    """The columns are what becomes of a run with three calls after one completion, one failure, all completions."""
    for end, expected in ((completed, one_completed), (failed, one_failed)):
        run = joined(lab, worker, *branches(3, wakes), awaits=["nothing"])
        first, *others = worker.claim(3)
        worker.apply(first, end(first))
        assert lab.task(run.task) == expected
        assert pending(lab, run) == (2 if wakes in (1, 2) else 0)
        for other in others:
            worker.apply(other, completed(other))
        assert lab.task(run.task) == all_completed
        lab.db.execute("delete from stepwell.tasks")


def test_an_execution_that_failed_and_is_tried_again_wakes_nobody(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(1, WAKES_WHEN_ONE_FAILS), step_at(2, wakes=WAKES_ALWAYS))
    for step in worker.claim(2):
        again = step.record(*step.claim.path, n=1, outcome="failed", value=None, error=FAULT)
        worker.apply(step, step.park(again, delay=60.0))
    assert lab.task(run.task, "state, pending, wakeups") == ("waiting", 1, 0)


@pytest.mark.parametrize("wakes", [WAKES_WHEN_ONE_FAILS, WAKES_ALWAYS])
def test_a_step_that_waits_for_a_person_wakes_its_run(lab: Lab, worker: Worker, wakes: int) -> None:
    run = joined(lab, worker, *branches(2, wakes))
    step, _ = worker.claim(2)
    worker.apply(step, step.hold())
    assert lab.task(run.task) == "ready"
    assert lab.task(step.task, "state, due_at") == ("waiting", None)


def test_a_timer_that_is_due_is_applied_by_any_worker_and_wakes_its_run(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, timer_at(1), *branches(1))
    assert lab.promote() == 1
    other = lab.worker("other", queues=("elsewhere",))
    (timer,) = other.claim(0, queue="elsewhere")
    record = timer.record(1, name="sleep")
    record.kind = "sleep"
    other.apply(timer, timer.done(record))
    assert lab.task(run.task, "state, pending, seq") == ("ready", 1, 1)
    assert lab.task(timer.task) is None


def test_a_completion_while_the_run_is_claimed_readies_it_when_it_parks(lab: Lab, worker: Worker) -> None:
    """It knew of the call, and could not know that it is done (I5)."""
    run = joined(lab, worker, *branches(1), awaits=["go"])
    step = worker.take()
    lab.one("select stepwell.signal(%s, 'go')", run.run)
    worker.apply_wakes()
    again = worker.take()
    worker.apply(step, completed(step))
    assert lab.task(run.task) == "claimed"
    worker.apply(again, again.park(awaits=["go"]))
    assert lab.task(run.task) == "ready"


@pytest.mark.parametrize("park_first", [True, False])
def test_a_park_and_the_last_completion_in_one_flush_ready_the_run(
    lab: Lab, worker: Worker, park_first: bool
) -> None:
    run = joined(lab, worker, *branches(1), awaits=["go"])
    step = worker.take()
    lab.one("select stepwell.signal(%s, 'go')", run.run)
    worker.apply_wakes()
    again = worker.take()
    pair = (again.park(awaits=["go"]), completed(step))
    assert worker.flush(*(pair if park_first else reversed(pair))) == [APPLIED, APPLIED]
    assert lab.task(run.task, "state, pending") == ("ready", 0)


def test_all_completions_of_a_join_in_one_flush_wake_it_once(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, *branches(10))
    assert worker.flush(*(completed(step) for step in worker.claim(10))) == [APPLIED] * 10
    assert lab.task(run.task, "state, pending, wakeups, seq") == ("ready", 0, 1, 10)


@pytest.mark.parametrize("first_commits", [True, False])
def test_the_last_two_completions_at_once_wake_the_run(lab: Lab, worker: Worker, first_commits: bool) -> None:
    """Each must see what the other has counted, or the run would wait for ever."""
    run = joined(lab, worker, *branches(2))
    one = knowing(lab, db=lab.connection(autocommit=False))
    other = knowing(lab, db=lab.connection())
    mine = one.take()
    one.db.commit()
    theirs = other.take()
    one.apply(mine, completed(mine))
    with meanwhile(lambda: other.flush(completed(theirs))) as answer:
        lab.wait_for_lock(other.db)
        if first_commits:
            one.db.commit()
        else:
            one.db.rollback()
    assert answer.result() == [APPLIED]
    if not first_commits:
        assert lab.task(run.task, "state, pending, seq") == ("waiting", 1, 1)
        mine.position -= 1
        one.apply(mine, completed(mine))
        one.db.commit()
    assert lab.task(run.task, "state, pending, seq") == ("ready", 0, 2)


@pytest.mark.parametrize("parks_first", [True, False])
def test_a_park_and_the_last_completion_at_once_ready_the_run(
    lab: Lab, worker: Worker, parks_first: bool
) -> None:
    run = joined(lab, worker, *branches(1), awaits=["go"])
    one = knowing(lab, db=lab.connection(autocommit=False))
    other = knowing(lab, db=lab.connection())
    step = worker.take()
    lab.one("select stepwell.signal(%s, 'go')", run.run)
    worker.apply_wakes()
    again = worker.take()
    works = ((worker, again.park(awaits=["go"])), (worker, completed(step)))
    (first, sent), (second, waits) = works if parks_first else reversed(works)
    assert first.on(one.db).flush(sent) == [APPLIED]
    with meanwhile(lambda: second.on(other.db).flush(waits)) as answer:
        lab.wait_for_lock(other.db)
        one.db.commit()
    assert answer.result() == [APPLIED]
    assert lab.task(run.task, "state, pending") == ("ready", 0)


def test_many_workers_draw_seq_without_gaps_and_wake_each_run_once(lab: Lab, worker: Worker) -> None:
    runs = [joined(lab, worker, *branches(15)) for _ in range(4)]
    workers = [knowing(lab, db=lab.connection()) for _ in range(4)]
    with ThreadPoolExecutor(len(workers)) as pool:
        done = [pool.submit(execute, each, random.Random(each.id)) for each in workers]
    assert sum(each.result() for each in done) == 60
    for run in runs:
        assert [seq for seq, *_ in lab.history(run.run)] == list(range(1, 21))
        assert lab.task(run.task, "state, pending, wakeups, seq") == ("ready", 0, 1, 20)
    assert lab.total("step", "completed") == 60


def execute(worker: Worker, chance: random.Random) -> int:
    """Execute steps in batches until there are none, a third of them with a failure before; return how many."""
    done = 0
    while steps := only("step:send", worker).claim(6):
        chance.shuffle(steps)
        writings = []
        for step in steps:
            path = step.claim.path
            earlier = [step.record(*path, n=1, outcome="failed", value=None)] if path[1] % 3 == 0 else []
            writings.append(step.done(*earlier, step.record(*path)))
        assert worker.flush(*writings) == [APPLIED] * len(steps)
        done += len(steps)
    return done


# -- the order of records ------------------------------------------------------------------------------


def test_a_strict_write_is_refused_when_something_else_was_recorded(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, step_at(1, wakes=WAKES_ALWAYS), step_at(2, wakes=WAKES_ALWAYS), awaits=["go"])
    one, other = worker.claim(2)
    worker.apply(one, completed(one))
    claimed = worker.take()
    assert claimed.claim.seq == 1
    worker.apply(other, completed(other))
    signal = claimed.record(3, name="go")
    signal.kind = "signal"
    before = lab.snapshot()
    assert worker.flush(claimed.park(signal, seen=1, strict=True, extras=branches(2))) == [BEHIND]
    assert lab.snapshot() == before
    assert lab.task(run.task) == "claimed"
    assert worker.flush(claimed.park(signal, seen=2, strict=True, awaits=["more"])) == [APPLIED]
    assert [seq for seq, *_ in lab.history(run.run)] == [1, 2, 3]


def test_what_a_drive_has_not_seen_is_not_taken_for_driven(lab: Lab, worker: Worker) -> None:
    run = joined(lab, worker, step_at(1, wakes=WAKES_ALWAYS), step_at(2, wakes=WAKES_ALWAYS), seen=0)
    assert lab.task(run.task, "driven") == 0
    one, other = worker.claim(2)
    worker.apply(one, completed(one))
    claimed = worker.take()
    worker.apply(other, completed(other))
    worker.apply(claimed, claimed.park(seen=1, awaits=["go"]))
    assert lab.task(run.task, "state, driven, seq") == ("ready", 1, 2)
    worker.apply_wakes()
    again = worker.take()
    assert (again.claim.driven, again.claim.seq) == (1, 2)


# -- windows -------------------------------------------------------------------------------------------


def test_a_window_readies_one_item_for_each_that_is_done(lab: Lab, worker: Worker) -> None:
    run = windowed(lab, worker, 5, 2)
    assert lab.calls(run.run) == {
        "1": "waiting", "1.1.1": "ready", "1.2.1": "ready", "1.3.1": "waiting", "1.4.1": "waiting", "1.5.1": "waiting"
    }  # fmt: skip
    one, two = worker.claim(5)
    worker.apply(two, two.park(two.record(1, 2, 1, n=1, outcome="failed", value=None), delay=60.0))
    assert worker.claim(5) == []  # a retry keeps its place
    worker.apply(one, failed(one))
    (three,) = worker.claim(5)
    assert three.claim.path == [1, 3, 1]
    worker.apply(three, three.hold())
    (four,) = worker.claim(5)
    assert four.claim.path == [1, 4, 1]
    done = completed(four)
    assert [worker.flush(done), worker.flush(done)] == [[APPLIED], [ALREADY]]
    assert [each.claim.path for each in worker.claim(5)] == [[1, 5, 1]]


def test_as_many_are_readied_as_are_done_in_one_flush_and_none_behind_the_last(
    lab: Lab, worker: Worker
) -> None:
    run = windowed(lab, worker, 7, 3)
    for expected in ([1, 2, 3], [4, 5, 6], [7], []):
        steps = only("step:send", worker).claim(10)
        assert [each.claim.path[1] for each in steps] == expected
        if steps:
            worker.flush(*(completed(each) for each in steps))
    assert (lab.task(run.task), pending(lab, run)) == ("ready", 0)


def test_the_items_of_a_window_that_were_done_before_a_retry_are_passed_over(
    lab: Lab, worker: Worker
) -> None:
    window = TaskRow(kind="window", path=(1,), name="window", released=1)
    rows = [step_at(1, k, 1, windowed=True, held=k > 1) for k in (1, 3, 6, 7)]
    joined(lab, worker, window, *rows)
    for k in (1, 3, 6, 7):
        (item,) = worker.claim(5)
        assert item.claim.path == [1, k, 1]
        worker.apply(item, completed(item))


def test_a_window_is_never_wider_than_its_limit_whoever_flushes(lab: Lab, worker: Worker) -> None:
    run = windowed(lab, worker, 40, 3)
    workers = [knowing(lab, db=lab.connection()) for _ in range(3)]
    widths: list[int] = []

    def execute(worker: Worker) -> int:
        done = 0
        while pending(lab_of[worker], run):
            for step in only("step:send", worker).claim(2):
                widths.append(lab_of[worker].one(IN_THE_WINDOW, run.run))
                worker.apply(step, completed(step))
                done += 1
        return done

    lab_of = {each: Lab(lab.url, emptied=False) for each in workers}
    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            assert sum(pool.map(execute, workers)) == 40
    finally:
        for each in lab_of.values():
            each.__exit__()
    assert max(widths) <= 3
    assert [seq for seq, *_ in lab.history(run.run)] == list(range(1, 41))


IN_THE_WINDOW = """
select count(*) from stepwell.tasks
where run_id = %s and kind = 'step' and state in ('ready', 'claimed')
"""
