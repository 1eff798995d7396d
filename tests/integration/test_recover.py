"""The SQL of docs/operations.md's section Recover, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from uuid import UUID

from tests.protocol import Lab, child_at
from worker.engine.transitions import EndState

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
RECOVER = TEXT[TEXT.index("\n## Recover\n") : TEXT.index("\n## What was tried where\n")]
TABLES = ("runs", "outbox", "signals", "state", "stream", "keys")


def block(text: str) -> str:
    """Return the one SQL block of the section that has this text in it."""
    (found,) = [each for each in re.findall(r"```sql\n(.*?)```", RECOVER, re.DOTALL) if text in each]
    return str(found)


def ended(lab: Lab, state: EndState = "succeeded", *, days: int = 100, key: str | None = None) -> UUID:
    """Return a run that has ended so many days ago, with something in each table."""
    (run,) = lab.enqueue(key=key) if key else lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    assert worker.flush(held.finish(held.record(1), state=state)) == [1]
    lab.db.execute("insert into stepwell.signals (run_id, name) values (%s, 'late')", (run,))
    lab.db.execute("insert into stepwell.state values (%s, 'phase', '1')", (run,))
    lab.db.execute("insert into stepwell.stream values (%s, 0, 1, 'log', '1')", (run,))
    backdate(lab, run, days)
    return run


def backdate(lab: Lab, run: UUID, days: int) -> None:
    lab.db.execute(
        "update stepwell.runs set finished_at = now() - make_interval(days => %s) where id = %s", (days, run)
    )


def known(lab: Lab) -> set[UUID]:
    """Return the runs that there are."""
    return {row[0] for row in lab.rows("select id from stepwell.runs")}


def delete(lab: Lab) -> int:
    return int(answer(lab, block("with old as")))


def answer(lab: Lab, statement: str) -> Any:
    """Return the first column of the first row of a statement that is put together, or read from the page."""
    row = lab.db.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def counts(lab: Lab) -> list[int]:
    """Return how many rows each table has."""
    return [answer(lab, f"select count(*) from stepwell.{table}") for table in TABLES]


def test_what_ended_long_ago_is_deleted_with_all_that_belongs_to_it(lab: Lab) -> None:
    gone = {ended(lab, key="a"), ended(lab, "failed"), ended(lab, "cancelled")}
    assert delete(lab) == len(gone)
    assert counts(lab) == [0] * len(TABLES)
    assert delete(lab) == 0
    (again,) = lab.enqueue(key="a")
    assert again not in gone


def test_what_is_recent_open_blocked_or_has_still_to_do_stays(lab: Lab) -> None:
    kept = {ended(lab, days=80, key="b"), ended(lab, "blocked")}
    woken = ended(lab)
    lab.db.execute("select stepwell.wake(%s, 'cancel', '{\"epoch\": 0}')", (woken,))
    open_, *_ = lab.enqueue(delay="1 hour")
    before = counts(lab)
    assert delete(lab) == 0
    assert known(lab) == {*kept, woken, open_}
    assert counts(lab) == before


def test_a_family_goes_when_its_last_member_has_ended(lab: Lab) -> None:
    (parent,) = lab.enqueue()
    worker = lab.worker("w", "child")
    held = worker.take()
    worker.apply(held, held.move(extras=[child_at(1)], family=True))
    child = lab.one("select id from stepwell.runs where parent_id = %s", parent)
    of_child = worker.take()
    assert worker.flush(of_child.finish()) == [1]
    backdate(lab, child, 100)
    assert delete(lab) == 0  # the parent is open
    lab.worker("w").apply_wakes()
    assert worker.flush(held.finish(family=True)) == [1]
    assert delete(lab) == 0  # … or has ended now
    backdate(lab, parent, 100)
    lab.db.execute("update stepwell.runs set state = 'blocked' where id = %s", (parent,))
    assert delete(lab) == 0  # a person may have it go on
    lab.db.execute("update stepwell.runs set state = 'succeeded' where id = %s", (parent,))
    lab.db.execute("update stepwell.runs set state = 'open', finished_at = null where id = %s", (child,))
    assert delete(lab) == 0  # a child that goes on
    lab.db.execute(
        "update stepwell.runs set state = 'succeeded', finished_at = now() where id = %s", (child,)
    )
    backdate(lab, child, 100)
    assert delete(lab) == 2


def test_a_run_that_somebody_is_about_to_retry_is_left_alone(lab: Lab) -> None:
    run = ended(lab, "failed")
    other = lab.connection(autocommit=False)
    assert lab.one("select stepwell.retry(%s)", run, db=other) == 1
    assert delete(lab) == 0
    other.commit()
    assert lab.state(run) == "waiting"
    assert delete(lab) == 0


def test_a_part_of_what_has_failed_is_retried(lab: Lab) -> None:
    runs = []
    for _ in range(3):
        (run,) = lab.enqueue(workflow="order")
        worker = lab.worker("order")
        held = worker.take()
        assert worker.flush(held.finish(state="failed")) == [1]
        runs.append(run)
    lab.db.execute(
        'update stepwell.runs set error = \'{"type": "E", "message": "the provider is away"}\' where id = any (%s)',
        (runs[:2],),
    )
    statement = block("count(stepwell.retry(id))").replace("limit 100", "limit 1")
    assert [answer(lab, statement) for _ in range(3)] == [1, 1, 0]
    assert [lab.state(run) for run in runs] == ["waiting", "waiting", "failed"]


def test_what_has_happened_since_a_backup_is_told(lab: Lab) -> None:
    run = ended(lab, days=0)
    executed, enqueued = block("idempotency_key").split(";")[:2]
    since = "'2026-11-28 09:30+00'"
    assert since in executed
    assert since in enqueued
    moment = lab.one(
        "select quote_literal(created_at - interval '1 second') from stepwell.runs where id = %s", run
    )
    rows = lab.db.execute(executed.replace(since, moment).encode()).fetchall()
    assert [row[:2] for row in rows] == [(f"{run}:1", "send")]
    assert [row[0] for row in lab.db.execute(enqueued.replace(since, moment).encode())] == [run]
    later = "now() + interval '1 hour'"
    assert lab.db.execute(executed.replace(since, later).encode()).fetchall() == []
    assert lab.db.execute(enqueued.replace(since, later).encode()).fetchall() == []
