"""Why a flush is a function of several statements: what goes wrong with the same work in one statement with CTEs.

Each test does both, in the same situation: the naive statement, which must come out wrong (if a Postgres to come makes
it right, the test says so), and the flush, which must not.
"""

from __future__ import annotations

from typing import LiteralString

from tests.integration.calls import branches, completed, joined, knowing
from tests.protocol import APPLIED, FENCED, Db, Held, Lab, Worker, meanwhile

RECORD: LiteralString = """
insert into stepwell.outbox (run_id, epoch, path, n, seq, kind, name, outcome, worker)
select %(run)s, 0, '{9}', 0, 1, 'step', 'send', 'completed', %(worker)s
"""
FENCE: LiteralString = """
select from stepwell.tasks t
where t.id = %(task)s and t.attempt = %(attempt)s and t.claimed_by = %(worker)s and t.position = %(position)s
"""
LOCK: LiteralString = "select t.id from stepwell.tasks t where t.id = %(task)s for update"

LOCK_THAT_NOTHING_REFERS_TO: LiteralString = f"with locked as ({LOCK}) {RECORD} where exists ({FENCE})"
LOCK_AND_FENCE: LiteralString = f"""
with locked as materialized ({LOCK}) {RECORD} where exists (select from locked) and exists ({FENCE})
"""

PARK_AND_COUNT: LiteralString = """
with parked as (
    update stepwell.tasks t
    set state = case when t.pending > 0 then 'waiting' else 'ready' end, claimed_by = null, position = t.position + 1
    where t.id = %(task)s and t.claimed_by = %(worker)s returning t.id),
counted as (
    update stepwell.tasks t
    set pending = t.pending - 1, state = case when t.state = 'waiting' and t.pending = 1 then 'ready' else t.state end
    where t.id = %(task)s returning t.id)
select (select count(*) from parked), (select count(*) from counted)
"""


def being_taken_away(lab: Lab) -> tuple[Worker, Held, Db]:
    """Return a worker, its claim, and the transaction that is taking it away and has not committed yet."""
    lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    reclaimer = lab.connection(autocommit=False)
    assert lab.one("select stepwell.bury_v1(%s)", worker.id)
    reclaimer.execute("select stepwell.reclaim_v1(%s, 3, 10)", [worker.id])
    return worker, held, reclaimer


def by_one_statement(db: Db, statement: LiteralString, worker: Worker, held: Held) -> int:
    """Record a step by a naive statement; return how many records it has written."""
    fence = {"task": held.task, "attempt": held.attempt, "position": held.position}
    return db.execute(statement, {"run": held.run, "worker": worker.id, **fence}).rowcount


def test_a_lock_that_nothing_refers_to_is_not_taken_and_a_flush_takes_its_own(lab: Lab) -> None:
    worker, held, reclaimer = being_taken_away(lab)
    late = lab.connection()
    assert by_one_statement(late, LOCK_THAT_NOTHING_REFERS_TO, worker, held) == 1  # it did not even wait
    assert len(lab.history(held.run)) == 1

    with meanwhile(lambda: worker.on(late).flush(held.move(held.record(1)))) as answer:
        lab.wait_for_lock(late)
        reclaimer.commit()
    assert answer.result() == [FENCED]
    assert len(lab.history(held.run)) == 1


def test_what_locks_and_reads_at_once_reads_what_was_before_and_a_flush_what_it_waited_for(lab: Lab) -> None:
    worker, held, reclaimer = being_taken_away(lab)
    naive, late = lab.connection(), lab.connection()
    with (
        meanwhile(lambda: by_one_statement(naive, LOCK_AND_FENCE, worker, held)) as written,
        meanwhile(lambda: worker.on(late).flush(held.move(held.record(1)))) as answer,
    ):
        lab.wait_for_lock(naive)
        lab.wait_for_lock(late)
        reclaimer.commit()
    assert lab.task(held.task, "state, claimed_by") == ("ready", None)
    assert written.result() == 1  # it has waited, and then believes the claim that is gone
    assert answer.result() == [FENCED]
    assert [path for _, _, path, _, _ in lab.history(held.run)] == [[9]]


def test_a_row_that_is_updated_twice_at_once_is_updated_once_and_a_flush_adds_up(lab: Lab) -> None:
    """A run parks while the last call that it waits for is done: it has to be ready, or nobody ever wakes it."""
    worker = knowing(lab)
    run = joined(lab, worker, *branches(1), awaits=["go"])
    step = worker.take()
    lab.one("select stepwell.signal(%s, 'go')", run.run)
    worker.apply_wakes()
    again = worker.take()

    with lab.db.transaction(force_rollback=True):
        arms = lab.db.execute(PARK_AND_COUNT, {"task": run.task, "worker": worker.id}).fetchone()
        assert arms == (1, 0)
        assert lab.task(run.task, "state, pending") == ("waiting", 1)
    assert worker.flush(again.park(awaits=["go"]), completed(step)) == [APPLIED, APPLIED]
    assert lab.task(run.task, "state, pending") == ("ready", 0)
