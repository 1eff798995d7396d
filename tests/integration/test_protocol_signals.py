"""Signals, and what a run shows of itself: buffered, in order, taken once, and sent without blocking anybody (I15)."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import msgspec
import psycopg
import pytest

from tests.protocol import ALREADY, APPLIED, FENCED, Db, Held, Lab, Worker, meanwhile
from worker.engine.claims import Mail
from worker.engine.transitions import EmittedRow, RecordRow, StateRow, Taken
from worker.queries import load


def send(lab: Lab, run: UUID, name: str = "go", payload: str = "null", db: Db | None = None) -> bool:
    return bool(lab.one("select stepwell.signal(%s, %s, %s)", run, name, payload, db=db))


def mail(lab: Lab, run: UUID, max_bytes: int | None = None) -> list[Mail]:
    """Return what a worker reads of what was sent and is not taken yet."""
    parameters = {"runs": [run], "max_bytes": max_bytes}
    return [Mail(*row[1:]) for row in lab.db.execute(load("mail"), parameters)]


def taking(held: Held, path: int, letter: Mail) -> tuple[RecordRow, Taken]:
    record = held.record(path, value=letter.payload, name=letter.name)
    record.kind = "signal"
    return record, Taken(signal=letter.id)


def waiting(lab: Lab, worker: Worker, *names: str) -> Held:
    """Return what was a claim of a run that waits for signals now."""
    lab.enqueue()
    held = worker.take()
    worker.apply(held, held.park(awaits=names))
    return held


# -- sending -------------------------------------------------------------------------------------------


def test_a_signal_wakes_the_run_that_waits_for_it(lab: Lab) -> None:
    worker = lab.worker()
    run = waiting(lab, worker, "other", "go")
    assert send(lab, run.run, payload='{"b": 1, "a": 1e16}')
    assert lab.task(run.task) == "waiting"
    assert lab.worker("stranger").apply_wakes() == 1
    assert lab.task(run.task) == "ready"
    held = worker.take()
    assert held.claim.signals == 1
    assert [(each.name, each.payload) for each in mail(lab, run.run)] == [("go", '{"b": 1, "a": 1e16}')]


def test_a_signal_that_nobody_waits_for_is_kept_and_wakes_nobody(lab: Lab) -> None:
    worker = lab.worker()
    run = waiting(lab, worker, "other")
    assert send(lab, run.run)
    assert worker.apply_wakes() == 1
    assert lab.task(run.task, "state, signals") == ("waiting", 1)


def test_signals_before_the_first_claim_are_known_to_it(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    assert send(lab, run, payload="1")
    assert worker.apply_wakes() == 1
    assert lab.rows("select state, fresh from stepwell.tasks") == [("ready", True)]
    assert worker.take().claim.signals == 1


def test_signals_of_one_name_are_read_in_the_order_in_which_they_came(lab: Lab) -> None:
    (run,) = lab.enqueue()
    for n in range(5):
        assert send(lab, run, "ab"[n % 2], str(n))
    assert [(each.name, each.payload) for each in mail(lab, run)] == [
        ("a", "0"), ("b", "1"), ("a", "2"), ("b", "3"), ("a", "4"),
    ]  # fmt: skip


def test_a_signal_between_claim_and_park_readies_the_run_at_once(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert send(lab, run)
    assert worker.apply_wakes() == 1
    worker.apply(held, held.park(awaits=["go"]))
    assert lab.task(held.task) == "ready"


def test_a_park_and_a_signal_in_one_flush_ready_the_run(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert send(lab, run)
    (wake,) = worker.claim(0)
    assert worker.flush(held.park(awaits=["go"]), wake.wake()) == [APPLIED, APPLIED]
    assert lab.task(held.task, "state, signals") == ("ready", 1)


@pytest.mark.parametrize("parks_first", [True, False])
def test_a_park_and_a_signal_at_once_ready_the_run(lab: Lab, parks_first: bool) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert send(lab, run)
    (wake,) = worker.claim(0)
    first, second = worker.on(lab.connection(autocommit=False)), worker.on(lab.connection())
    sent = [held.park(awaits=["go"]), wake.wake()]
    if not parks_first:
        sent.reverse()
    assert first.flush(sent[0]) == [APPLIED]
    with meanwhile(lambda: second.flush(sent[1])) as answer:
        lab.wait_for_lock(second.db)
        first.db.commit()
    assert answer.result() == [APPLIED]
    assert lab.task(held.task) == "ready"


def test_who_sends_in_an_open_transaction_blocks_nobody(lab: Lab) -> None:
    worker = lab.worker()
    run = waiting(lab, worker, "go")
    producer = lab.connection(autocommit=False)
    assert send(lab, run.run, payload="1", db=producer)
    lab.db.execute("set lock_timeout = '1ms'")
    assert send(lab, run.run, payload="2")
    assert worker.apply_wakes() == 1
    held = worker.take()
    (letter,) = mail(lab, run.run)
    record, taken = taking(held, 1, letter)
    worker.apply(held, held.park(record, extras=[taken], took=1, awaits=["go"]))
    assert lab.cancel(run.run)
    assert worker.apply_wakes() == 1
    held = worker.take()
    worker.apply(held, held.finish(state="cancelled")) if not held.claim.cancelling else worker.flush(
        held.finish(state="cancelled")
    )
    producer.commit()
    assert worker.apply_wakes() == 1  # for a run that has ended meanwhile
    assert lab.rows("select from stepwell.tasks") == []


def test_a_signal_that_was_rolled_back_was_never_sent(lab: Lab) -> None:
    worker = lab.worker()
    run = waiting(lab, worker, "go")
    producer = lab.connection(autocommit=False)
    assert send(lab, run.run, db=producer)
    producer.rollback()
    assert worker.apply_wakes() == 0
    assert mail(lab, run.run) == []


def test_a_run_that_has_ended_or_is_unknown_takes_no_signals(lab: Lab) -> None:
    worker = lab.worker()
    for state in ("succeeded", "failed", "cancelled"):
        (run,) = lab.enqueue()
        held = worker.take()
        worker.apply(held, held.finish(state=state))
        assert not send(lab, run)
    assert not send(lab, uuid4())
    assert lab.rows("select from stepwell.signals") == []
    assert worker.apply_wakes() == 0


def test_what_is_sent_to_a_blocked_run_is_there_when_it_is_retried(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    worker.apply(held, held.finish(state="blocked"))
    assert send(lab, run)
    assert worker.apply_wakes() == 1
    assert lab.retry(run) == 1
    assert worker.take().claim.signals == 1


@pytest.mark.parametrize("name", [None, "", "x" * 256, "stepwell:child:1"])
def test_a_name_that_is_none_is_refused(lab: Lab, name: Any) -> None:
    (run,) = lab.enqueue()
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        send(lab, run, name)


# -- taking --------------------------------------------------------------------------------------------


def test_a_signal_is_taken_by_the_flush_that_records_it_and_by_no_other(lab: Lab) -> None:
    worker = lab.worker()
    run = waiting(lab, worker, "go")
    for n in range(2):
        assert send(lab, run.run, payload=str(n))
    assert worker.apply_wakes() == 2
    held = worker.take()
    record, taken = taking(held, 1, mail(lab, run.run)[0])
    sent = held.park(record, extras=[taken], took=1, awaits=["go"])
    assert worker.flush(sent) == [APPLIED]
    assert lab.task(run.task, "state, signals, seq") == ("waiting", 1, 1)
    assert [each.payload for each in mail(lab, run.run)] == ["1"]
    assert worker.flush(sent) == [ALREADY]
    assert lab.task(run.task, "signals") == 1
    assert [each.payload for each in mail(lab, run.run)] == ["1"]


def test_a_signal_that_a_lost_claim_wanted_to_take_is_left_to_the_next(lab: Lab) -> None:
    (run,) = lab.enqueue()
    doomed, worker = lab.worker(), lab.worker()
    assert send(lab, run)
    assert worker.apply_wakes() == 1
    stale = doomed.take()
    (letter,) = mail(lab, run)
    lab.die(doomed)
    record, taken = taking(stale, 1, letter)
    assert doomed.flush(stale.move(record, extras=[taken], took=1)) == [FENCED]
    assert mail(lab, run) == [letter]
    held = worker.take()
    assert held.claim.signals == 1
    worker.apply(held, held.move(*taking(held, 1, letter)[:1], extras=[taken], took=1))
    assert mail(lab, run) == []


def test_a_signal_that_is_taken_before_its_wake_is_applied_is_not_counted_twice(lab: Lab) -> None:
    """A claim reads what is there, also what no wake has told of yet."""
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert send(lab, run)
    (letter,) = mail(lab, run)
    record, taken = taking(held, 1, letter)
    worker.apply(held, held.move(record, extras=[taken], took=1))
    assert worker.apply_wakes() == 1
    assert lab.task(held.task, "signals") == 0


# -- showing -------------------------------------------------------------------------------------------


def raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


def test_what_a_run_shows_is_the_last_of_each_key_however_often_it_is_sent(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    for n in range(2):
        shown = [StateRow(key="progress", value=raw(str(n))), StateRow(key=f"key {n}", value=raw('"x"'))]
        sent = held.move(extras=shown, doing=(n + 1,))
        assert [worker.flush(sent), worker.flush(sent)] == [[APPLIED], [ALREADY]]
        held.position += 1
    held.attempt += 1
    assert worker.flush(held.move(extras=[StateRow(key="progress", value=raw("99"))])) == [FENCED]
    assert lab.rows("select key, value::text from stepwell.state where run_id = %s order by key", run) == [
        ("key 0", '"x"'), ("key 1", '"x"'), ("progress", "1"),
    ]  # fmt: skip


def test_what_a_run_emits_is_there_once_also_when_a_retry_emits_it_again(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    emitted = [EmittedRow(n=n, name="line", value=raw(str(n))) for n in (1, 2)]
    worker.apply(held, held.move(extras=emitted))
    worker.apply(held, held.finish(state="failed"))
    assert lab.retry(run) == 1
    held = worker.take()
    again = [EmittedRow(n=n, name="line", value=raw(str(n))) for n in (1, 2, 3)]
    worker.apply(held, held.move(extras=again))
    assert lab.rows("select n, value::text from stepwell.stream where run_id = %s order by n", run) == [
        (1, "1"), (2, "2"), (3, "3"),
    ]  # fmt: skip
