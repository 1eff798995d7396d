"""stepwell.retry: a new epoch of a run that ended badly, once, with a deadline of its own."""

from __future__ import annotations

import pytest

from tests.protocol import ALREADY, FENCED, Held, Lab, Worker, meanwhile
from worker.engine.transitions import EndState

BAD_ENDS: tuple[EndState, ...] = ("failed", "cancelled", "blocked")


def end(worker: Worker, state: EndState = "failed", *, records: int = 1) -> Held:
    """Claim the only task, record some steps and end its run."""
    held = worker.take()
    first = held.claim.seq + 1
    steps = [held.record(step, outcome="completed") for step in range(first, first + records)]
    worker.apply(held, held.finish(*steps, state=state))
    return held


@pytest.mark.parametrize("state", BAD_ENDS)
def test_a_run_that_ended_badly_is_opened_again(lab: Lab, state: EndState) -> None:
    (run,) = lab.enqueue(priority=3, queue="mail", lane="l", tenant="t")
    worker = lab.worker(queues=("mail",))
    held = worker.take(queue="mail")
    worker.apply(held, held.finish(held.record(1), state=state))
    assert lab.retry(run) == 1
    assert lab.rows("select state, epoch, output, error, finished_at from stepwell.runs") == [
        ("open", 1, None, None, None)
    ]
    assert lab.rows("select name, queue, priority, lane, tenant, state, fresh, cancelling from stepwell.tasks") == [
        ("w", "mail", 3, "l", "t", "ready", False, False)
    ]  # fmt: skip
    assert [row[2:] for row in lab.history(run)] == [([1], 0, "completed"), ([], 0, state), ([], 1, "retry")]
    again = worker.take(queue="mail")
    assert (again.claim.epoch, again.claim.seq, again.claim.attempt) == (1, 3, 1)
    assert again.task != held.task


def test_a_run_that_is_open_or_has_succeeded_or_is_unknown_is_not_retried(lab: Lab) -> None:
    (run,) = lab.enqueue()
    assert lab.retry(run) is None
    worker = lab.worker()
    held = worker.take()
    assert lab.retry(run) is None
    worker.apply(held, held.finish())
    assert lab.retry(run) is None
    assert lab.one("select stepwell.retry(gen_random_uuid())") is None
    assert lab.rows("select from stepwell.tasks") == []


def test_each_epoch_may_record_the_same_calls_and_ends_anew(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    for epoch in range(3):
        held = worker.take()
        assert held.claim.epoch == epoch
        worker.apply(
            held,
            held.finish(
                held.record(1, outcome="failed", value=None), state="failed" if epoch < 2 else "succeeded"
            ),
        )
        assert lab.retry(run) == (epoch + 1 if epoch < 2 else None)
    assert [(seq, epoch) for seq, epoch, *_ in lab.history(run)] == [
        (1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2), (8, 2)
    ]  # fmt: skip
    assert lab.total("run", "failed") == 2
    assert lab.total("run", "succeeded") == 1


def test_of_two_retries_at_once_one_opens_the_run(lab: Lab) -> None:
    (run,) = lab.enqueue()
    end(lab.worker())
    first, second = lab.connection(autocommit=False), lab.connection()
    assert lab.one("select stepwell.retry(%s)", run, db=first) == 1
    with meanwhile(lambda: lab.one("select stepwell.retry(%s)", run, db=second)) as answer:
        lab.wait_for_lock(second)
        first.commit()
    assert answer.result() is None
    assert lab.one("select count(*) from stepwell.tasks") == 1


def test_the_claimant_of_the_epoch_before_is_fenced(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    sent = held.finish(state="failed")
    worker.apply(held, sent)
    assert lab.retry(run) == 1
    assert worker.flush(sent) == [ALREADY]
    assert lab.worker().flush(held.move(held.record(9))) == [FENCED]
    assert worker.flush(held.move(held.record(9))) == [FENCED]
    assert lab.state(run) == "waiting"


def test_each_retry_has_the_deadline_that_the_run_was_given(lab: Lab) -> None:
    (run,) = lab.enqueue(deadline="10 minutes")
    worker = lab.worker()
    for epoch in (1, 2, 3):
        end(worker, records=0)
        # The run was enqueued, or retried last, an hour ago.
        lab.db.execute("update stepwell.outbox set at = at - interval '1 hour'")
        lab.db.execute(
            "update stepwell.runs set deadline_at = deadline_at - interval '1 hour', created_at = created_at - interval '1 hour'"
        )
        assert lab.retry(run) == epoch
        left = lab.one(
            "select extract(epoch from deadline_at - clock_timestamp())::float8 from stepwell.runs"
        )
        assert 0 < 600 - left < 60


def test_a_run_without_a_deadline_gets_none(lab: Lab) -> None:
    (run,) = lab.enqueue()
    end(lab.worker())
    assert lab.retry(run) == 1
    assert lab.one("select deadline_at from stepwell.runs") is None
