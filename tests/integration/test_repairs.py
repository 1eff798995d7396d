"""What `Client` and `AsyncClient` offer for runs that went wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from outbox import (
    AsyncClient,
    Client,
    ConfigError,
    PayloadError,
    ResultTimeout,
    RunConflict,
    RunNotFound,
)
from tests.flows import Flow
from tests.protocol import APPLIED, Held, Lab, Worker
from worker.engine.transitions import EndState, RecordRow

UNKNOWN = uuid4()


@pytest.fixture
def client(lab: Lab) -> Iterator[Client]:
    with Client(lab.url) as opened:
        yield opened


@pytest.fixture
def worker(lab: Lab) -> Worker:
    return lab.worker("w", "v")


def run_of(
    lab: Lab, worker: Worker, *outcomes: str, state: EndState | None = "failed", workflow: str = "w"
) -> UUID:
    """A run whose steps came out like this; it has ended, or waits (`state` None)."""
    (run,) = lab.enqueue(workflow=workflow)
    held = worker.take()
    records = [outcome_of(held, path, outcome) for path, outcome in enumerate(outcomes, 1)]
    worker.apply(
        held, held.park(*records, delay=3600.0) if state is None else held.finish(*records, state=state)
    )
    return run


def outcome_of(held: Held, path: int, outcome: str) -> RecordRow:
    match outcome:
        case "completed":
            return held.record(path)
        case "undone":
            return held.record(path - 1, 0)
        case "held":
            return held.record(path, n=1, outcome="interrupted", value=None)
        case _:
            return held.record(path, outcome="failed", value=None, error={"type": "E", "message": "no"})


def test_a_run_is_rewound(lab: Lab, client: Client, worker: Worker) -> None:
    run = run_of(lab, worker, "completed", "completed", state="succeeded")
    assert client.rewind(run, "2") == 1
    assert [(each.path, each.outcome) for each in client.history(run)][-1] == ((), "rewind")
    with pytest.raises(RunConflict, match=rf"is open: pause it first \(`stepwell runs pause {run}`\)"):
        client.rewind(run, 1)
    with pytest.raises(RunNotFound):
        client.rewind(UNKNOWN, 1)
    held = worker.take()
    assert client.pause(run)
    with pytest.raises(RunConflict, match="is paused, but still executes a step"):
        client.rewind(run, 1)
    assert worker.flush(held.release()) == [APPLIED + 8]
    with pytest.raises(RunConflict, match="nothing recorded at 7"):
        client.rewind(run, 7)
    assert client.rewind(str(run), (1,)) == 2


def test_a_run_is_forked(lab: Lab, client: Client, worker: Worker) -> None:
    run = run_of(lab, worker, "completed", "failed")
    made = client.fork(run, 2)
    assert client.get(made).status == "waiting"
    assert [(each.path, each.outcome) for each in client.history(made)] == [((1,), "completed"), ((), "fork")]
    other = client.fork(run, "2", input={"x": 1}, version="2")
    assert (client.get(other).input, client.get(other).version) == ({"x": 1}, "2")
    with pytest.raises(RunNotFound):
        client.fork(UNKNOWN, 1)
    with pytest.raises(RunConflict, match="has not come to call 9"):
        client.fork(run, 9)
    with pytest.raises(PayloadError, match="a mapping, parameter name to value"):
        client.fork(run, 1, input=[1])  # type: ignore[arg-type]


def test_a_held_step_is_resolved(lab: Lab, client: Client, worker: Worker) -> None:
    for given in (
        {"value": {"paid": 3}},
        {"error": "declined"},
        {"error": {"type": "Declined", "message": "no"}},
        {},
    ):
        run = run_of(lab, worker, "completed", "held", state="blocked")
        assert client.resolve(run, 2, **given) == 1
        last = client.history(run)[-1]
        told = (
            {"type": "Resolved", "message": "declined"}
            if given.get("error") == "declined"
            else given.get("error")
        )
        assert (last.path, last.n, last.outcome) == ((2,), 0, "failed" if "error" in given else "completed")
        assert (last.value, last.error) == (given.get("value"), told)
        lab.db.execute("delete from stepwell.tasks")
    with pytest.raises(RunConflict, match="is open; only a step of a blocked or failed run"):
        client.resolve(run, 2, 1)
    with pytest.raises(RunNotFound):
        client.resolve(UNKNOWN, 2, 1)
    with pytest.raises(ConfigError, match="not by both"):
        client.resolve(run, 2, 1, error="no")
    with pytest.raises(ConfigError, match="a text, or a mapping"):
        client.resolve(run, 2, error={"type": "E"})
    with pytest.raises(RunConflict, match=r"step send at 1 has completed \(rewind to it"):
        client.resolve(run_of(lab, worker, "completed", "held", state="blocked"), 1, 1)


def test_a_run_that_has_undone_its_steps_says_how_to_go_on(lab: Lab, client: Client, worker: Worker) -> None:
    run = run_of(lab, worker, "completed", "undone", "failed")
    said = f"has undone its steps.*`stepwell runs rewind {run} --to 1`"
    with pytest.raises(RunConflict, match=said):
        client.retry(run)
    with pytest.raises(RunConflict, match=said):
        client.resolve(run, 3, 1)
    assert client.rewind(run, 1) == 1


def test_a_run_is_paused_and_resumed_by_its_handle(client: Client) -> None:
    run = client.enqueue("w")
    assert run.pause()
    assert run.info().status == "paused"
    assert [info.id for info in client.list(status="paused")] == [run.id]
    assert "stepwell runs resume" in (client.why(run.id) or "")
    assert run.resume()
    assert not run.resume()
    assert client.list(status="paused") == []
    assert not client.pause(UNKNOWN)


@pytest.mark.parametrize("path", ["", "x", "1..2", "1.x", -1, (), (1, "x"), None, 1 << 31, [1] * 65, 1.5])
def test_what_is_no_path_is_refused(client: Client, path: Any) -> None:
    with pytest.raises(ConfigError, match="not the path of a call"):
        client.rewind(UNKNOWN, path)


async def test_the_asynchronous_client_does_the_same(lab: Lab, worker: Worker) -> None:
    run = run_of(lab, worker, "completed", "held", state="blocked")
    async with AsyncClient(lab.url) as client:
        assert await client.find("w", "blocked") == [run]
        made = await client.fork(run, 2)
        assert await client.resolve(run, 2, "done") == 1
        assert await client.pause(run)
        assert await client.rewind(run, 1) == 2
        assert not await client.resume(run)
        with pytest.raises(RunConflict):
            await client.retry(run)
        assert {each async for each in client.change("pause", [run, made])} == {run, made}
        handle = await client.enqueue("w", version="2")
        assert await handle.pause()
        assert await handle.resume()
        assert (await handle.info()).version == "2"


# -- many ----------------------------------------------------------------------------------------------


def test_runs_are_found_by_what_they_have_in_common(lab: Lab, client: Client, worker: Worker) -> None:
    failed = run_of(lab, worker, "failed")
    odd = run_of(lab, worker, workflow="v")
    lab.db.execute(
        "update stepwell.runs set error = %s where id = %s",
        [json.dumps({"type": "OddError", "message": "100% of _it_", "reason": "history mismatch"}), odd],
    )
    blocked = run_of(lab, worker, state="blocked")
    succeeded = run_of(lab, worker, "completed", state="succeeded")
    waiting = run_of(lab, worker, state=None)
    (pending,) = lab.enqueue()
    assert client.find() == [failed, odd, blocked, succeeded, waiting, pending]
    assert client.find(status="failed") == [failed, odd]
    assert client.find("w", "failed") == [failed]
    assert client.find("w") == [failed, blocked, succeeded, waiting, pending]
    for status, run in (
        ("blocked", blocked),
        ("succeeded", succeeded),
        ("waiting", waiting),
        ("pending", pending),
    ):
        assert client.find(status=status) == [run]
    assert client.find(status="cancelled") == client.find(status="paused") == []
    assert client.find(error_like="100% OF _it") == client.find(error_like="odderror") == [odd]
    assert client.find(error_like="history mismatch", status="failed") == [odd]
    assert client.find(error_like="ended") == [failed, blocked]
    assert client.find(error_like="10__ of") == client.find(error_like="ended", status="waiting") == []
    assert client.find(since=60.0) == client.find()
    assert client.find(since=60.0, status="failed", error_like="ended") == [failed]
    assert client.find(limit=2) == [failed, odd]
    assert client.retry(failed) == 1
    assert client.find(status="failed") == [odd]
    for wrong in ({"status": "open"}, {"limit": 0}, {"since": -1.0}):
        with pytest.raises(ConfigError):
            client.find(**wrong)


def test_only_what_was_enqueued_lately_is_found(lab: Lab, client: Client, worker: Worker) -> None:
    run = run_of(lab, worker, "failed")
    old = UUID(int=run.int - (3600_000 << 80))
    for table, column in (("runs", "id"), ("outbox", "run_id")):
        lab.db.execute(f"update stepwell.{table} set {column} = %s".encode(), [old])
    assert client.find(status="failed", since=3500) == client.find(since=3500) == []
    assert client.find(status="failed", since=3700) == client.find(since=3700) == [old]


def test_many_runs_are_changed_in_chunks(lab: Lab, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.repairing.RUNS_AT_ONCE", 3)
    runs = lab.enqueue(8)
    assert set(client.change("pause", runs)) == set(runs)
    assert client.find(status="paused") == sorted(runs)
    assert set(client.change("resume", [*runs[:4], UNKNOWN])) == set(runs[:4])
    changing = client.change("resume", (str(run) for run in runs[4:]))
    assert lab.one("select count(*) from stepwell.tasks where paused") == 4
    next(changing)
    assert lab.one("select count(*) from stepwell.tasks where paused") == 1
    assert set(client.change("cancel", [*runs, UNKNOWN])) == set(runs)
    lab.worker().apply_wakes()
    assert set(client.change("retry", [*runs, UNKNOWN])) == set(runs)
    assert list(client.change("retry", runs)) == []


# -- versions ------------------------------------------------------------------------------------------


def test_a_run_is_enqueued_for_the_version_that_is_asked_for(lab: Lab, client: Client) -> None:
    lab.db.execute(
        "insert into stepwell.workflows (name, version, input_schema, queue, seen_at) values"
        " ('flow', '', %s, 'q0', now()), ('flow', '1', %s, 'q1', now() + '1 s')",
        [json.dumps({"properties": {"old": {}}}), json.dumps({"properties": {"new": {}}})],
    )
    plain, second = Flow(lambda old: old), Flow(lambda old: old, version="2")
    plain.name = second.name = "flow"
    cases = [
        (client.enqueue("flow", 1), "1", {"new": 1}),
        (client.enqueue("flow", 1, version=""), "", {"old": 1}),
        (client.enqueue("flow", {"x": 1}, version="7"), "7", {"x": 1}),
        (client.enqueue(plain, 1), "", {"old": 1}),
        (client.enqueue(second, 1), "2", {"old": 1}),
        (client.enqueue(second, 1, version="3"), "3", {"old": 1}),
        (next(client.enqueue_many(second, [1])), "2", {"old": 1}),
        (next(client.enqueue_many("flow", [1], version="")), "", {"old": 1}),
    ]
    for run, version, given in cases:
        info = run.info()
        assert (info.version, info.input) == (version, given)
        name = lab.one("select name from stepwell.tasks where run_id = %s", run.id)
        assert name == (f"flow@{version}" if version else "flow")


def test_the_run_that_enqueue_returns_stands_for_its_id(client: Client) -> None:
    run = client.enqueue("w")
    assert client.get(run).id == run.id
    assert (client.state(run), client.progress(run), client.history(run)) == ({}, None, [])
    assert list(client.stream(run, follow=False)) == []
    assert [each.kind for each in client.tasks(run)] == ["run"]
    assert client.why(run) is not None
    assert client.signal(run, "go")
    assert client.pause(run)
    assert client.resume(run)
    assert list(client.change("cancel", [run])) == [run.id]
    assert client.cancel(run.info())
    assert client.list(before=run) == []
    with pytest.raises(ResultTimeout):
        client.result(run, 0)
    for other in (object(), 7, "7"):
        with pytest.raises(RunNotFound):
            client.get(other)  # type: ignore[arg-type]  # what has no run's id


def test_a_run_is_mended_by_its_handle(lab: Lab, client: Client, worker: Worker) -> None:
    run = client.enqueue("w", key=1)
    held = worker.take()
    worker.apply(
        held, held.finish(outcome_of(held, 1, "completed"), outcome_of(held, 2, "held"), state="blocked")
    )
    assert run.resolve(2, "done") == 1
    assert run.pause()
    assert run.rewind(2) == 2
    held = worker.take()
    worker.apply(held, held.finish(outcome_of(held, 2, "failed"), state="failed"))
    assert run.retry() == 3
    with pytest.raises(RunConflict):
        run.retry()
    forked = run.fork(2, input={"x": 1})
    assert (forked.created, forked.workflow) == (True, "w")
    assert forked.info().input == {"x": 1}


async def test_the_handle_of_the_asynchronous_client_does_the_same(lab: Lab, worker: Worker) -> None:
    async with AsyncClient(lab.url) as client:
        run = await client.enqueue("w")
        held = worker.take()
        worker.apply(
            held, held.finish(outcome_of(held, 1, "completed"), outcome_of(held, 2, "held"), state="blocked")
        )
        assert (await client.state(run), await client.progress(run)) == ({}, None)
        assert [each async for each in client.stream(run, follow=False)] == []
        assert await run.resolve(2, "done") == 1
        assert await client.pause(run)
        assert await run.rewind(1) == 2
        held = worker.take()
        worker.apply(held, held.finish(outcome_of(held, 1, "failed"), state="failed"))
        assert await run.retry() == 3
        assert (await (await run.fork(1)).info()).workflow == "w"
