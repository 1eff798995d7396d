"""Runs that call runs, and runs that begin anew."""

from __future__ import annotations

from uuid import UUID

import msgspec
import pytest

from tests.integration.calls import only, pending
from tests.integration.test_protocol_signals import mail
from tests.protocol import ALREADY, APPLIED, FENCED, Held, Lab, Worker, child_at, meanwhile, step_at, timer_at
from worker.engine.transitions import Continued, Dropped, EmittedRow, EndState, Extra, RecordRow, Writing

ANY_CHILD = "stepwell:child"


@pytest.fixture
def worker(lab: Lab) -> Worker:
    return lab.worker("w", "child", "step:send")


def parent_of(
    lab: Lab, worker: Worker, *rows: Extra, awaits: list[str] | None = None, key: str | None = None
) -> Held:
    """Return what was a claim of a run before it was parked with these calls."""
    lab.enqueue(key=key)
    held = only("w", worker).take()
    worker.apply(held, held.park(extras=rows, awaits=awaits))
    return held


def children(lab: Lab, run: UUID) -> list[tuple[str, str]]:
    """Return by which call each child of a run is waited for, and its state."""
    rows = lab.rows(
        "select coalesce(array_to_string(parent_path, '.'), ''), state from stepwell.runs where parent_id = %s",
        run,
    )
    return sorted((path, state) for path, state in rows)


def end_child(worker: Worker, state: EndState = "succeeded") -> Held:
    child = only("child", worker).take()
    worker.apply(child, child.finish(state=state, family=True))
    return child


def claimed_again(lab: Lab, worker: Worker, run: Held) -> Held:
    lab.one("select stepwell.signal(%s, 'go')", run.run)
    worker.apply_wakes()
    return only("w", worker).take()


# -- made ----------------------------------------------------------------------------------------------


def test_a_child_is_made_once_however_often_the_call_is_sent(lab: Lab, worker: Worker) -> None:
    lab.enqueue(tenant="t", priority=3)
    held = only("w", worker).take()
    sent = held.park(extras=[child_at(1, 1, 1, counted=True), child_at(1, 2, 1, counted=True)])
    assert worker.flush(sent) == [APPLIED]
    assert worker.flush(sent) == [ALREADY]
    assert children(lab, held.run) == [("1.1.1", "open"), ("1.2.1", "open")]
    assert pending(lab, held) == 2
    claim = only("child", worker).take().claim
    assert (claim.workflow, claim.input, claim.awaited) == ("child", '{"a": 1}', True)
    assert lab.rows("select distinct tenant, priority from stepwell.runs") == [("t", 3)]

    lab.db.execute("update stepwell.tasks set state = 'ready' where id = %s", [held.task])
    again = only("w", worker).take()
    worker.apply(again, again.park(extras=[child_at(1, 1, 1)], awaits=[ANY_CHILD]))
    assert len(children(lab, held.run)) == 2


@pytest.mark.parametrize(
    ("key", "of_child"),
    [("k", "w:k:1.2.1"), (None, None), ("k" * 510, "md5:")],
    ids=["a key", "none", "a long one"],
)
def test_the_key_of_a_run_makes_the_keys_of_its_children(
    lab: Lab, worker: Worker, key: str | None, of_child: str | None
) -> None:
    parent_of(lab, worker, child_at(1, 2, 1), awaits=[ANY_CHILD], key=key)
    made = lab.one("select key from stepwell.runs where workflow = 'child'")
    assert made is None if of_child is None else made.startswith(of_child)
    assert len(lab.rows("select from stepwell.keys where workflow = 'child'")) == (key is not None)


def test_a_child_may_have_a_queue_a_version_and_a_deadline(lab: Lab, worker: Worker) -> None:
    row = child_at(1, queue="mail", version="2", deadline=60.0)
    parent_of(lab, worker, row, awaits=[ANY_CHILD])
    found = lab.rows(
        "select r.queue, r.version, r.deadline_at > now(), t.name, t.queue from stepwell.runs r"
        " join stepwell.tasks t on t.run_id = r.id where r.workflow = 'child'"
    )
    assert found == [("mail", "2", True, "child@2", "mail")]


# -- reported ------------------------------------------------------------------------------------------


def test_the_result_of_a_child_is_sent_to_its_parent_and_wakes_it(lab: Lab, worker: Worker) -> None:
    run = parent_of(lab, worker, child_at(1), awaits=[ANY_CHILD])
    child = end_child(worker)
    assert lab.task(run.task) == "waiting"
    assert worker.apply_wakes() == 1
    assert lab.task(run.task, "state, signals") == ("ready", 1)
    (letter,) = mail(lab, run.run)
    assert letter.name == "stepwell:child:1"
    assert msgspec.json.decode(letter.payload) == {
        "run": str(child.run), "state": "succeeded", "output": "out", "error": None
    }  # fmt: skip


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_child_that_does_not_succeed_is_reported_and_wakes_its_parent_at_once(
    lab: Lab, worker: Worker, state: EndState
) -> None:
    run = parent_of(lab, worker, child_at(1, 1, 1, counted=True), child_at(1, 2, 1, counted=True))
    end_child(worker, state)
    assert worker.apply_wakes() == 1
    assert lab.task(run.task, "state, pending") == ("ready", 1)
    assert msgspec.json.decode(mail(lab, run.run)[0].payload)["state"] == state


def test_counted_children_wake_their_parent_when_the_last_has_succeeded(lab: Lab, worker: Worker) -> None:
    rows = [child_at(1, branch, 1, counted=True) for branch in (1, 2)]
    run = parent_of(lab, worker, *rows, step_at(1, 3, 1))
    end_child(worker)
    assert worker.apply_wakes() == 1
    step = only("step:send", worker).take()
    worker.apply(step, step.done(step.record(1, 3, 1)))
    assert lab.task(run.task, "state, pending") == ("waiting", 1)
    end_child(worker)
    assert worker.apply_wakes() == 1
    assert lab.task(run.task, "state, pending") == ("ready", 0)


def test_a_blocked_child_says_nothing_until_it_has_been_retried(lab: Lab, worker: Worker) -> None:
    run = parent_of(lab, worker, child_at(1, 1, 1, counted=True))
    child = end_child(worker, "blocked")
    assert worker.apply_wakes() == 0
    assert lab.task(run.task, "state, pending") == ("waiting", 1)
    assert lab.retry(child.run) == 1
    end_child(worker)
    assert worker.apply_wakes() == 1
    assert lab.task(run.task, "state, pending") == ("ready", 0)


def test_a_child_that_ends_without_a_worker_is_reported_too(lab: Lab, worker: Worker) -> None:
    run = parent_of(lab, worker, child_at(1), awaits=[ANY_CHILD])
    (child,) = lab.rows("select id from stepwell.runs where workflow = 'child'")[0]
    assert lab.cancel(child)
    assert worker.apply_wakes() == 1  # ends the child
    assert worker.apply_wakes() == 1  # tells the parent
    assert lab.task(run.task) == "ready"


def test_a_parent_that_has_ended_is_not_told(lab: Lab, worker: Worker) -> None:
    run = parent_of(lab, worker, child_at(1), awaits=["go"])
    again = claimed_again(lab, worker, run)
    worker.apply(again, again.finish(family=True))
    end_child(worker)
    worker.apply_wakes()
    assert lab.state(run.run) == "succeeded"
    assert lab.rows("select from stepwell.tasks") == []


def test_a_retried_parent_retries_its_failed_child_and_keeps_the_one_that_succeeded(
    lab: Lab, worker: Worker
) -> None:
    rows = [child_at(1, branch, 1, counted=True) for branch in (1, 2)]
    run = parent_of(lab, worker, *rows)
    for state in ("succeeded", "failed"):
        end_child(worker, state)
        assert worker.apply_wakes() == 1
    held = only("w", worker).take()
    worker.apply(held, held.finish(state="failed", family=True))
    assert lab.retry(run.run) == 1

    held = only("w", worker).take()
    worker.apply(held, held.park(extras=[child_at(1, branch, 1, counted=True) for branch in (1, 2)]))
    assert children(lab, run.run) == [("1.1.1", "succeeded"), ("1.2.1", "open")]
    worker.apply_wakes()
    again = end_child(worker)
    assert again.claim.epoch == 1
    worker.apply_wakes()
    assert lab.task(held.task, "state, pending") == ("ready", 0)
    assert [each.name for each in mail(lab, run.run)] == ["stepwell:child:1.1.1", "stepwell:child:1.2.1"]


# -- dropped, cancelled --------------------------------------------------------------------------------


def test_a_child_that_nobody_waits_for_any_more_is_cancelled_unless_it_is_detached(
    lab: Lab, worker: Worker
) -> None:
    rows = [
        child_at(1, 1, 1, counted=True),
        child_at(1, 2, 1, counted=True, detached=True),
        child_at(2, counted=True),
    ]
    run = parent_of(lab, worker, *rows, awaits=["go"])
    again = claimed_again(lab, worker, run)
    worker.apply(again, again.park(extras=[Dropped(path=(1,))], awaits=["go"]))
    assert pending(lab, run) == 1
    assert worker.apply_wakes() == 1
    assert children(lab, run.run) == [("", "cancelled"), ("", "open"), ("2", "open")]
    assert worker.apply_wakes() == 0  # nobody is told of it
    assert mail(lab, run.run)[0].name == "go"


@pytest.mark.parametrize("child_ends_first", [True, False])
def test_a_child_that_ends_while_it_is_dropped_is_counted_down_once(
    lab: Lab, worker: Worker, child_ends_first: bool
) -> None:
    """Or the parent would be woken before its next join is done."""
    run = parent_of(lab, worker, child_at(1, 1, 1, counted=True), awaits=["go"])
    again = claimed_again(lab, worker, run)
    child = only("child", worker).take()
    end = child.finish(family=True)
    drop = again.park(extras=[Dropped(path=(1,)), step_at(2, 1, 1), step_at(2, 2, 1)])
    first, second = worker.on(lab.connection(autocommit=False)), worker.on(lab.connection())
    sent = (end, drop) if child_ends_first else (drop, end)
    assert first.flush(sent[0]) == [APPLIED]
    with meanwhile(lambda: second.flush(sent[1])) as answer:
        lab.wait_for_lock(second.db)
        first.db.commit()
    assert answer.result() == [APPLIED]
    worker.apply_wakes()
    assert lab.task(run.task, "state, pending") == ("waiting", 2)


@pytest.mark.parametrize("wake_first", [True, False])
def test_a_child_that_has_ended_before_it_is_dropped_is_counted_down_once(
    lab: Lab, worker: Worker, wake_first: bool
) -> None:
    rows = [child_at(1, branch, 1, counted=True) for branch in (1, 2)]
    run = parent_of(lab, worker, *rows, awaits=["go"])
    again = claimed_again(lab, worker, run)
    end_child(worker)
    if wake_first:
        assert worker.apply_wakes() == 1
    worker.apply(again, again.park(extras=[Dropped(path=(1,)), step_at(2, 1, 1), step_at(2, 2, 1)]))
    worker.apply_wakes()
    assert pending(lab, run) == 2


def test_a_cancellation_reaches_the_children_but_not_the_detached(lab: Lab, worker: Worker) -> None:
    rows = [child_at(1, 1, 1, counted=True), child_at(1, 2, 1, counted=True), child_at(2, detached=True)]
    run = parent_of(lab, worker, *rows)
    executed = only("child", worker).take()
    assert lab.cancel(run.run)
    assert worker.apply_wakes() == 1
    assert worker.apply_wakes() == 2
    assert [state for _, state in children(lab, run.run)] == ["open", "cancelled", "open"]
    assert lab.task(executed.task, "cancelling")
    assert lab.task(run.task, "state, cancelling") == ("ready", True)


# -- begun anew ----------------------------------------------------------------------------------------


def begin_anew(held: Held, *records: RecordRow, extras: tuple[Extra, ...] = ()) -> Writing:
    return held.continue_(*records, extras=[*extras, Continued(input=msgspec.Raw(b'{"n": 2}'))])


def test_a_run_that_begins_anew_has_another_input_another_seed_and_no_history(
    lab: Lab, worker: Worker
) -> None:
    lab.enqueue()
    held = only("w", worker).take()
    sent = begin_anew(held, held.record(1), held.record(2))
    assert worker.flush(sent) == [APPLIED]
    before = lab.snapshot()
    assert worker.flush(sent) == [ALREADY]
    assert lab.snapshot() == before
    assert lab.history(held.run) == [
        (1, 0, [1], 0, "completed"), (2, 0, [2], 0, "completed"), (3, 1, [], 1, "continue")
    ]  # fmt: skip
    claim = only("w", worker).take().claim
    assert (claim.epoch, claim.base_epoch, claim.key_epoch, claim.seq) == (1, 1, 1, 3)
    assert (claim.input, claim.driven, claim.pending, claim.doing) == ('{"n": 2}', -1, 0, None)
    assert claim.seed not in (claim.run_id, None)


def test_a_claim_that_was_lost_begins_nothing_anew(lab: Lab, worker: Worker) -> None:
    lab.enqueue()
    doomed = lab.worker()
    held = doomed.take()
    lab.die(doomed)
    before = lab.snapshot()
    assert doomed.flush(begin_anew(held)) == [FENCED]
    assert lab.snapshot() == before


def test_what_belongs_to_the_epoch_before_does_not_come_into_the_next(lab: Lab, worker: Worker) -> None:
    rows = [step_at(1), step_at(2), timer_at(3, delay=60.0), child_at(4), child_at(5, detached=True)]
    run = parent_of(lab, worker, *rows, awaits=["go"])
    executed = only("step:send", worker).take()
    again = claimed_again(lab, worker, run)
    worker.apply(again, begin_anew(again))
    assert lab.calls(run.run) == {}
    assert worker.flush(executed.done(executed.record(1))) == [FENCED]
    assert children(lab, run.run) == [("", "open"), ("", "open")]
    held = only("w", worker).take()
    worker.apply(held, held.park(extras=[step_at(1), child_at(4)], awaits=[ANY_CHILD]))
    assert lab.calls(run.run) == {"1": "ready"}
    assert len(children(lab, run.run)) == 3


def test_signals_are_kept_for_the_next_epoch_and_results_of_children_are_not(
    lab: Lab, worker: Worker
) -> None:
    """The first call of the next epoch has the path of the first call of this one."""
    run = parent_of(lab, worker, child_at(1), child_at(2), awaits=["go"])
    end_child(worker)
    worker.apply_wakes()
    again = claimed_again(lab, worker, run)
    end_child(worker)  # no wake has told of it yet
    assert len(mail(lab, run.run)) == 3
    worker.apply(again, begin_anew(again))
    assert [each.name for each in mail(lab, run.run)] == ["go"]
    worker.apply_wakes()
    assert only("w", worker).take().claim.signals >= 1


def test_a_child_that_ends_while_its_parent_begins_anew_is_not_its_result(lab: Lab, worker: Worker) -> None:
    run = parent_of(lab, worker, child_at(1), awaits=["go"])
    again = claimed_again(lab, worker, run)
    child = only("child", worker).take()
    first, second = worker.on(lab.connection(autocommit=False)), worker.on(lab.connection())
    assert first.flush(child.finish(family=True)) == [APPLIED]
    with meanwhile(lambda: second.flush(begin_anew(again))) as answer:
        lab.wait_for_lock(second.db)
        first.db.commit()
    assert answer.result() == [APPLIED]
    assert [each.name for each in mail(lab, run.run)] == ["go"]


@pytest.mark.parametrize("anew", [True, False], ids=["begun anew", "retried"])
def test_a_child_of_an_earlier_epoch_is_not_counted_in_the_next(lab: Lab, worker: Worker, anew: bool) -> None:
    run = parent_of(lab, worker, child_at(1, 1, 1, counted=True), awaits=["go"])
    again = claimed_again(lab, worker, run)
    end_child(worker)
    if anew:
        worker.apply(again, begin_anew(again))
    else:
        worker.apply(again, again.finish(state="failed", family=True))
        assert lab.retry(run.run) == 1
    result, held = only("w", worker).claim(1)
    worker.apply(held, held.park(extras=[step_at(2, 1, 1), step_at(2, 2, 1)]))
    worker.apply(result, result.wake())
    assert lab.task(held.task, "state, pending") == ("waiting", 2)


def test_what_is_emitted_after_a_fresh_start_is_something_new(lab: Lab, worker: Worker) -> None:
    lab.enqueue()
    for _ in range(2):
        held = only("w", worker).take()
        emitted = EmittedRow(n=1, name="line", value=msgspec.Raw(b"1"))
        worker.apply(held, begin_anew(held, extras=(emitted,)))
    rows = lab.rows("select epoch, n from stepwell.stream where run_id = %s order by epoch", held.run)
    assert rows == [(0, 1), (1, 1)]
