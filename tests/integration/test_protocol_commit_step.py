"""commit_step_v1: the user's writes and the completion of the step commit together, or neither does."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.protocol import APPLIED, CANCELLING, Db, Held, Lab, Worker, meanwhile
from worker.engine.transitions import Writing, encode
from worker.queries import load

CANARY = "c4n4ry"


@pytest.fixture
def user(lab: Lab) -> Iterator[Db]:
    """The transaction of a step, with a write of the user's in it."""
    lab.db.execute("drop table if exists business")
    lab.db.execute("create table business (what text)")
    db = lab.connection(autocommit=False)
    db.execute("select set_config('stepwell.canary', %s, true)", [CANARY])
    db.execute("insert into business values ('written')")
    yield db
    db.close()
    lab.db.execute("drop table business")


def commit_step(worker: Worker, db: Db, writing: Writing, canary: str = CANARY) -> int:
    documents = dict(zip(("transitions", "records", "ends", "extras"), encode([writing]), strict=True))
    row = db.execute(load("commit_step"), {"worker": worker.id, **documents, "canary": canary}).fetchone()
    assert row is not None
    return int(row[0])


def refused(worker: Worker, db: Db, writing: Writing, canary: str = CANARY) -> str | None:
    """Return the SQLSTATE with which the completion is refused; the connection then does what a worker does."""
    with pytest.raises(psycopg.Error) as error:
        commit_step(worker, db, writing, canary)
    db.commit()  # of a failed transaction: a rollback
    return error.value.sqlstate


def written(lab: Lab) -> int:
    return int(lab.one("select count(*) from business"))


def claimed(lab: Lab) -> tuple[Worker, Held]:
    lab.enqueue()
    worker = lab.worker()
    return worker, worker.take()


@pytest.mark.parametrize("ends", [False, True])
def test_the_writes_and_the_completion_commit_together(lab: Lab, user: Db, ends: bool) -> None:
    worker, held = claimed(lab)
    record = held.record(1)
    writing = held.finish(record) if ends else held.move(record, doing=(2,))
    assert commit_step(worker, user, writing) == APPLIED
    assert (written(lab), lab.history(held.run)) == (0, [])
    user.commit()
    assert written(lab) == 1
    assert len(lab.history(held.run)) == 1 + ends
    assert lab.total("step", "completed") == 1
    assert lab.state(held.run) == ("succeeded" if ends else "running")


def test_a_rollback_leaves_neither(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    before = lab.snapshot()
    assert commit_step(worker, user, held.move(held.record(1))) == APPLIED
    user.rollback()
    assert written(lab) == 0
    assert lab.snapshot() == before


def test_a_step_that_ended_its_transaction_is_found_out(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    before = lab.snapshot()
    user.commit()
    user.execute("insert into business values ('in another transaction')")
    assert refused(worker, user, held.move(held.record(1))) == "SW002"
    assert written(lab) == 1  # what the step committed by itself; that is why its run is blocked
    assert lab.snapshot() == before


def test_a_step_that_rolled_its_transaction_back_is_found_out(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    user.rollback()
    user.execute("insert into business values ('in another transaction')")
    assert refused(worker, user, held.move(held.record(1))) == "SW002"
    assert written(lab) == 0


def test_the_canary_of_another_execution_does_not_count(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    assert refused(worker, user, held.move(held.record(1)), "another") == "SW002"
    assert written(lab) == 0


def test_a_connection_that_never_had_a_canary_is_refused(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    assert refused(worker, lab.connection(autocommit=False), held.move(held.record(1))) == "SW002"


def test_the_canary_survives_savepoints(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    user.execute("savepoint s")
    user.execute("insert into business values ('undone')")
    user.execute("rollback to savepoint s")
    assert commit_step(worker, user, held.move(held.record(1))) == APPLIED
    user.commit()
    assert written(lab) == 1


def test_a_lost_claim_takes_the_writes_of_the_user_along(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    lab.die(worker)
    before = lab.snapshot()
    assert refused(worker, user, held.move(held.record(1))) == "SW001"
    assert written(lab) == 0
    assert lab.snapshot() == before


@pytest.mark.parametrize("ends", [False, True])
def test_a_completion_that_was_recorded_already_does_not_write_again(lab: Lab, user: Db, ends: bool) -> None:
    worker, held = claimed(lab)
    writing = held.finish(held.record(1)) if ends else held.move(held.record(1), doing=(2,))
    assert worker.flush(writing) == [APPLIED]
    assert refused(worker, user, writing) == "SW001"
    assert written(lab) == 0


def test_a_completion_is_told_that_its_run_is_to_be_cancelled(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    assert lab.cancel(held.run)
    assert lab.worker().apply_wakes() == 1
    assert commit_step(worker, user, held.move(held.record(1))) == APPLIED + CANCELLING
    user.commit()
    assert written(lab) == 1


def test_a_claim_lost_while_the_completion_waits_takes_the_writes_along(lab: Lab, user: Db) -> None:
    worker, held = claimed(lab)
    reclaimer = lab.connection(autocommit=False)
    assert lab.one("select stepwell.bury_v1(%s)", worker.id)
    reclaimer.execute("select stepwell.reclaim_v1(%s, 3, 10)", [worker.id])
    with meanwhile(lambda: refused(worker, user, held.move(held.record(1)))) as state:
        lab.wait_for_lock(user)
        reclaimer.commit()
    assert state.result() == "SW001"
    assert written(lab) == 0
    assert lab.history(held.run) == []


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_stricter_transaction_of_the_user_does_not_trust_its_old_snapshot(lab: Lab, level: str) -> None:
    worker, held = claimed(lab)
    db = lab.connection(autocommit=False)
    db.execute(f"set transaction isolation level {level}".encode())
    db.execute("select set_config('stepwell.canary', %s, true)", [CANARY])
    db.execute("select count(*) from stepwell.runs")  # the snapshot is taken here, and shows the claim
    lab.die(worker)
    assert refused(worker, db, held.move(held.record(1))) == "40001"
    assert lab.history(held.run) == []

    again = lab.worker()
    held = again.take()
    db.execute(f"set transaction isolation level {level}".encode())
    db.execute("select set_config('stepwell.canary', %s, true)", [CANARY])
    assert commit_step(again, db, held.move(held.record(1))) == APPLIED
    db.commit()
    assert len(lab.history(held.run)) == 1


def test_after_a_lost_answer_a_bare_move_tells_whether_the_transaction_was_committed(
    lab: Lab, user: Db
) -> None:
    worker, held = claimed(lab)
    assert commit_step(worker, user, held.move(held.record(1), doing=(2,))) == APPLIED
    probing = lab.connection()
    with meanwhile(lambda: worker.on(probing).flush(held.move())) as answer:
        lab.wait_for_lock(probing)  # the old backend has not come to its COMMIT yet
        lab.db.execute("select pg_terminate_backend(%s)", [user.info.backend_pid])
    assert answer.result() == [APPLIED]
    assert written(lab) == 0
    late = lab.connection(autocommit=False)
    late.execute("select set_config('stepwell.canary', %s, true)", [CANARY])
    assert refused(worker, late, held.move(held.record(1), doing=(2,))) == "SW001"
    assert lab.history(held.run) == []
