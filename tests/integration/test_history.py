"""Reading runs back: one, many, their history, their tasks, and why they are not running."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox import AsyncClient, Client, ConfigError, Progress, RunNotFound, Settings
from outbox.database import connect
from outbox.history import STATUSES
from tests.claimant import Claimant

Db = psycopg.Connection[TupleRow]

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(settings=Settings(database_url=database_url, beat_seconds=0.1)) as opened:
        yield opened


@pytest.fixture
def worker(db: Db) -> Claimant:
    return Claimant(db, ("w",))


def ended(client: Client, worker: Claimant, state: str) -> Any:
    run = client.enqueue("w")
    claim = worker.claim()
    if state == "succeeded":
        worker.succeed(claim)
    else:
        worker.end(claim, state)
    return run.id


# -- one run -----------------------------------------------------------------------------------------


def test_a_run_from_its_first_to_its_last_day(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w", {"b": 1e16, "a": [1, None, "é"]}, labels={"source": "csv"})
    info = run.info()
    assert (info.status, info.attempt, info.started_at, info.task_state) == ("pending", 0, None, "ready")
    assert list(info.input.items()) == [("b", 1e16), ("a", [1, None, "é"])]
    assert info.labels == {"source": "csv"}

    claim = worker.claim()
    assert worker.flush(claim, "move", worker.record([0], 0, "completed", value=17), doing=[1, 2]) == 1
    info = run.info()
    assert (info.status, info.attempt, info.claimed_by, info.doing) == ("running", 1, worker.id, (1, 2))
    assert info.started_at is not None

    assert worker.flush(claim, "park", delay=3600, doing=[1, 2]) == 1
    info = run.info()
    assert (info.status, info.task_state, info.claimed_by) == ("waiting", "waiting", None)
    assert info.due_at is not None

    worker.db.execute("update stepwell.tasks set state = 'ready', due_at = null")
    worker.succeed(worker.claim(), {"id": 5})
    info = run.info()
    assert (info.status, info.output, info.error) == ("succeeded", {"id": 5}, None)
    assert info.finished_at is not None
    assert (info.attempt, info.doing, info.task_state, info.interruptions) == (None, None, None, None)


def test_an_unknown_run_is_not_found(client: Client) -> None:
    for ask in (client.get, client.why):
        with pytest.raises(RunNotFound, match="there is no run"):
            ask(uuid4())
    assert client.history(uuid4()) == []
    assert client.tasks(uuid4()) == []


def test_a_run_as_json(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w", {"a": 1})
    worker.flush(worker.claim(), "move", doing=[1, 2])
    shown = client.get(run.id).to_json()
    assert json.loads(json.dumps(shown)) == shown
    assert (shown["id"], shown["doing"], shown["labels"], shown["output"]) == (str(run.id), "1.2", {}, None)
    assert datetime.fromisoformat(shown["created_at"]).tzinfo is not None
    assert list(shown) == [
        "id", "workflow", "status", "queue", "priority", "labels", "epoch", "created_at", "started_at", "finished_at",
        "deadline_at", "input", "output", "error", "attempt", "doing", "due_at", "task_state", "claimed_by",
        "interruptions", "version", "parent", "progress", "key", "trace_id",
    ]  # fmt: skip


# -- history and tasks -------------------------------------------------------------------------------


def test_a_history_is_told_in_order(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w")
    claim = worker.claim()
    fault = {"type": "SMTPError", "message": "busy"}
    worker.flush(claim, "move", worker.record([0], 1, "failed", error=fault), doing=[0])
    worker.flush(
        claim, "move", worker.record([0], 0, "completed", value={"id": 1}, fingerprint=-5), doing=[1]
    )
    worker.end(claim, "failed")
    client.retry(run.id)

    history = client.history(run.id)
    told = [(r.seq, r.epoch, r.path, r.n, r.kind, r.name, r.outcome) for r in history]
    assert told == [
        (1, 0, (0,), 1, "step", "send", "failed"),
        (2, 0, (0,), 0, "step", "send", "completed"),
        (3, 0, (), 0, "run", "w", "failed"),
        (4, 1, (), 1, "epoch", "w", "retry"),
    ]
    assert history[0].error == fault
    assert (history[1].value, history[1].fingerprint, history[1].worker) == ({"id": 1}, -5, worker.id)
    assert history[1].at == MOMENT
    shown = history[1].to_json()
    assert json.loads(json.dumps(shown)) == shown
    assert {"seq", "path", "n", "name", "outcome", "value", "error", "worker", "at"} <= set(shown)
    assert shown["path"] == "0"


def test_the_tasks_of_a_run_are_its_own_and_its_wakes(client: Client, worker: Claimant) -> None:
    run, other = client.enqueue("w"), client.enqueue("w")
    worker.flush(worker.claim(), "move", doing=[3, 1])
    run.cancel()
    other.cancel()
    tasks = client.tasks(run.id)
    assert [(task.kind, task.state, task.queue, task.doing) for task in tasks] == [
        ("run", "claimed", "default", (3, 1)),
        ("wake", "ready", "stepwell", None),
    ]
    shown = [task.to_json() for task in tasks]
    assert json.loads(json.dumps(shown)) == shown
    assert (shown[0]["doing"], shown[0]["path"]) == ("3.1", "")


async def test_the_asynchronous_client_reads_the_same(
    client: Client, worker: Claimant, database_url: str
) -> None:
    run = client.enqueue("w")
    worker.flush(worker.claim(), "move", worker.record([0], 0, "completed", value=1), doing=[1])
    async with AsyncClient(database_url) as aclient:
        assert await aclient.get(run.id) == client.get(run.id)
        assert await aclient.list() == client.list()
        assert await aclient.history(run.id) == client.history(run.id)
        assert await aclient.tasks(run.id) == client.tasks(run.id)
        assert await aclient.why(run.id) is None
        assert await aclient.cancel(run.id)
        assert "to be cancelled" in str(await aclient.why(run.id))


# -- many runs ---------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first_and_in_pages(client: Client) -> None:
    ids = [client.enqueue("w" if number % 2 else "v").id for number in range(10)]
    newest_first = sorted(ids, reverse=True)
    assert [info.id for info in client.list()] == newest_first
    page = client.list(limit=4)
    assert [info.id for info in page] == newest_first[:4]
    assert [info.id for info in client.list(limit=4, before=page[-1].id)] == newest_first[4:8]
    assert {info.workflow for info in client.list(workflow="v")} == {"v"}
    assert client.list(workflow="none") == []


def test_runs_are_listed_by_status(client: Client, worker: Claimant, db: Db) -> None:
    expected = {
        state: ended(client, worker, state) for state in ("succeeded", "failed", "cancelled", "blocked")
    }
    retried = ended(client, worker, "failed")
    client.retry(retried)
    expected["running"] = worker.claim().run
    assert expected["running"] == retried
    expected["waiting"] = client.enqueue("w").id
    worker.flush(worker.claim(), "park", delay=3600, doing=[0])
    expected["pending"] = client.enqueue("w", delay=3600).id
    for status, run in expected.items():
        assert [(info.id, info.status) for info in client.list(status=status)] == [(run, status)], status
        assert client.list(status=status, workflow="v") == []
        assert client.list(status=status, before=run) == []
    assert len(client.list()) == 7


STATES = ("ready", "claimed", "waiting", "shelved", "suspect", "paused")


def test_the_lists_by_status_are_what_the_view_says(client: Client, db: Db) -> None:
    """Every state of the run's own task, whatever is claimed beside it."""
    cases = [
        (state, attempt, fresh, driven, beside)
        for state in STATES
        for attempt, fresh, driven in (
            (0, True, -1),
            (0, False, -1),
            (2, False, -1),
            (2, False, 3),
            (2, True, 0),
        )
        for beside in ((), ("claimed",), ("ready", "waiting"), ("ready", "claimed"))
    ]
    for kind, (state, attempt, fresh, driven, beside) in zip(itertools.cycle(("step", "timer")), cases):
        run = client.enqueue("w").id
        db.execute(
            "update stepwell.tasks set state = %s, attempt = %s, fresh = %s, driven = %s, claimed_by = %s, paused = %s"
            " where run_id = %s",
            [state, attempt, fresh, driven, 1 if state == "claimed" else None, state == "paused", run],
        )
        for number, each in enumerate(beside, 1):
            db.execute(
                "insert into stepwell.tasks (run_id, kind, path, name, state, claimed_by)"
                " values (%s, %s, array[1, %s, 1], 'step:s', %s, %s)",
                [run, kind, number, each, 1 if each == "claimed" else None],
            )
        if beside:
            client.cancel(run)
    db.execute("update stepwell.tasks set state = 'claimed', claimed_by = 1 where kind = 'wake'")
    seen = 0
    for status in STATUSES:
        rows = db.execute("select id from stepwell.run_status where status = %s order by id desc", [status])
        expected = [row[0] for row in rows]
        assert [info.id for info in client.list(status=status, workflow="w")] == expected[:100], status
        listed = client.list(status=status, limit=1000)
        assert [info.id for info in listed] == expected
        assert all(info.status == status for info in listed)
        if expected:
            page = client.list(status=status, limit=3, before=expected[4])
            assert [info.id for info in page] == expected[5:8]
        seen += len(expected)
    assert seen == len(cases)


def test_runs_of_a_version_are_listed_by_the_name_of_their_workflow(
    client: Client, worker: Claimant, db: Db
) -> None:
    row = db.execute("select stepwell.enqueue('w', version => '2')").fetchone()
    assert row is not None
    for status in ("pending", None):
        assert [(info.id, info.version) for info in client.list("w", status)] == [(row[0], "2")]
        assert client.list("w@2", status) == []
    assert [task.name for task in client.tasks(row[0])] == ["w@2"]


def test_progress_and_the_parent_are_read_with_a_run(client: Client, db: Db) -> None:
    parent, run = client.enqueue("w"), client.enqueue("w")
    assert (run.info().parent, run.info().progress) == (None, None)
    db.execute(
        "update stepwell.runs set parent_id = %s, parent_path = '{1}' where id = %s", [parent.id, run.id]
    )
    db.execute("insert into stepwell.state values (%s, 'progress', '{\"done\":3,\"total\":null}')", [run.id])
    assert (run.info().parent, run.info().progress) == (parent.id, Progress(3))
    assert client.list()[0] == run.info()
    assert run.info().to_json()["progress"] == {"done": 3, "total": None}
    db.execute("update stepwell.state set value = '[]'")
    assert run.info().progress is None


def test_the_tasks_of_a_run_are_those_of_its_calls_too(client: Client, db: Db) -> None:
    run = client.enqueue("w")
    db.execute("update stepwell.tasks set awaits = '{approved,stepwell:child}'")
    for kind, path, name in (
        ("step", "{3,1,1}", "step:s"), ("timer", "{3,2,1}", "sleep"), ("window", "{3}", "window"), ("wake", "{}", "signal")
    ):  # fmt: skip
        db.execute(
            "insert into stepwell.tasks (run_id, kind, path, name, queue) values (%s, %s, %s, %s, 'stepwell')",
            [run.id, kind, path, name],
        )
    tasks = client.tasks(run.id)
    assert [(task.kind, task.path) for task in tasks] == [
        ("run", ()), ("step", (3, 1, 1)), ("timer", (3, 2, 1)), ("window", (3,)), ("wake", ())
    ]  # fmt: skip
    assert [task.awaits for task in tasks] == [("approved", "stepwell:child"), (), (), (), ()]
    shown = [task.to_json() for task in tasks]
    assert json.loads(json.dumps(shown)) == shown
    assert (shown[0]["awaits"], shown[1]["path"]) == (["approved", "stepwell:child"], "3.1.1")


def test_a_run_that_failed_twice_is_listed_once(client: Client, worker: Claimant) -> None:
    run = ended(client, worker, "failed")
    client.retry(run)
    worker.end(worker.claim(), "failed")
    assert [info.id for info in client.list(status="failed")] == [run]


@pytest.mark.parametrize("wrong", [{"status": "lost"}, {"limit": 0}, {"limit": 1_000_000}])
def test_a_list_that_cannot_be_is_refused(client: Client, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        client.list(**wrong)


# -- why ---------------------------------------------------------------------------------------------


def test_why_of_a_run_that_ended_or_runs_is_nothing(client: Client, worker: Claimant) -> None:
    for state in ("succeeded", "failed", "cancelled"):
        assert client.why(ended(client, worker, state)) is None
    run = client.enqueue("w")
    worker.claim()
    assert client.why(run.id) is None


def test_why_of_a_blocked_run(client: Client, worker: Claimant) -> None:
    run = ended(client, worker, "blocked")
    assert (
        client.why(run)
        == f"blocked: ValueError: it broke; after the fix, `stepwell runs retry {run}` resumes it"
    )


def test_why_of_a_queue_without_a_worker(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w", queue="mail")
    assert "no live worker serves queue 'mail'" in str(client.why(run.id))
    Claimant(worker.db, ("other",), queues=("mail",))
    assert "no live worker of queue 'mail' knows workflow 'w'" in str(client.why(run.id))
    Claimant(worker.db, ("w",), queues=("mail",))
    assert client.why(run.id) == "ready in queue 'mail', first in line for the next free slot"


def test_why_of_a_run_that_was_set_aside(client: Client, worker: Claimant) -> None:
    run = client.enqueue("unknown")
    worker.db.execute("select stepwell.shelve_v1('default', 10)")
    assert client.get(run.id).task_state == "shelved"
    assert "set aside: no live worker of queue 'default' knows workflow 'unknown'" in str(client.why(run.id))


def test_why_counts_the_tasks_that_go_first(client: Client, worker: Claimant) -> None:
    for _ in range(3):
        client.enqueue("w")
    run = client.enqueue("w")
    client.enqueue("w")
    client.enqueue("w", priority=0)
    client.enqueue("w", queue="mail")
    client.enqueue("w", priority=9)
    assert client.why(run.id) == "ready in queue 'default', behind 4 ready tasks"


def test_why_of_a_run_that_is_to_start_later(client: Client, worker: Claimant) -> None:
    assert str(client.why(client.enqueue("w", delay=3600).id)).startswith("to start at ")


def test_why_of_a_sleeping_run(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w")
    claim = worker.claim()
    worker.flush(claim, "park", worker.record([0], 0, "completed"), delay=3600, doing=[1])
    said = str(client.why(run.id))
    assert said.startswith("sleeping until ")
    assert said.endswith("(call 1)")


def test_why_of_a_run_that_waits_to_retry_a_step(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w")
    claim = worker.claim()
    for n in (1, 2, 3):
        fault = {"type": "SMTPError", "message": f"busy {n}"}
        outcome = "failed" if n != 2 else "interrupted"
        worker.flush(claim, "move", worker.record([0], n, outcome, "send_welcome", error=fault), doing=[0])
    worker.flush(claim, "park", delay=3600, doing=[0])
    said = str(client.why(run.id))
    assert "to retry step send_welcome (call 0) after 2 failures: SMTPError: busy 3" in said


def test_why_forgets_the_failures_that_a_retry_has_voided(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w")
    claim = worker.claim()
    worker.flush(claim, "move", worker.record([0], 1, "failed", error={"type": "Old"}), doing=[0])
    worker.flush(claim, "move", worker.record([0], 0, "failed", error={"type": "Old"}), doing=[1])
    worker.end(claim, "failed")
    client.retry(run.id)
    claim = worker.claim()
    worker.flush(claim, "move", worker.record([0], 1, "failed", error={"type": "New"}), doing=[0])
    worker.flush(claim, "park", delay=3600, doing=[0])
    assert "after 1 failure: New" in str(client.why(run.id))


def test_why_of_a_run_whose_worker_is_dead(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w")
    worker.claim()
    other = Claimant(worker.db, ("w",))
    worker.db.execute("select stepwell.bury_v1(%s)", [worker.id])
    said = str(client.why(run.id))
    assert said.startswith(
        f"claimed by worker {worker.id} (host testhost, pid 4711), which was declared dead"
    )
    assert said.endswith("another worker takes it over within seconds")
    worker.db.execute("select stepwell.reclaim_v1(%s, 3, 10)", [worker.id])
    worker.db.execute("select stepwell.reclaim_v1(%s, 3, 10)", [worker.id])
    assert client.why(run.id) == "ready in queue 'default', first in line for the next free slot"
    assert other.claim().run == run.id


def test_why_of_a_suspect(client: Client, db: Db) -> None:
    run = client.enqueue("w")
    for _ in range(2):
        worker = Claimant(db, ("w",))
        worker.claim()
        db.execute("select stepwell.bury_v1(%s)", [worker.id])
        db.execute("select stepwell.reclaim_v1(%s, 3, 10)", [worker.id])
    assert client.get(run.id).task_state == "suspect"
    said = str(client.why(run.id))
    assert said.startswith(
        "suspect: 2 workers died while they had it, so it will be tried alone; no live worker"
    )


def test_why_of_a_run_whose_worker_has_no_lock_looks_for_its_beat(
    client: Client, database_url: str, db: Db
) -> None:
    worker = Claimant(db, ("w",), lock=False)
    run = client.enqueue("w")
    worker.claim()
    assert "which shows no sign of life" in str(client.why(run.id))
    stopped = threading.Event()

    def beat() -> None:
        with connect(database_url, application_name="supervisor") as supervisor:
            while not stopped.wait(0.01):
                supervisor.execute("update stepwell.workers set beat = beat + 1")

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        assert client.why(run.id) is None
    finally:
        stopped.set()
        heart.join()


def test_why_of_a_run_that_is_to_be_cancelled(client: Client, worker: Claimant) -> None:
    run = client.enqueue("w")
    assert run.cancel()
    assert client.why(run.id) == "to be cancelled: a worker is about to apply it"
    worker.db.execute("delete from stepwell.tasks where kind = 'wake'")
    worker.claim()
    worker.db.execute("update stepwell.tasks set cancelling = true")
    assert str(client.why(run.id)).startswith(
        f"to be cancelled: worker {worker.id} (host testhost, pid 4711) stops it"
    )
