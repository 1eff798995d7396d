"""`Client` and `AsyncClient` against a real database."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import pytest_asyncio
from psycopg.rows import TupleRow
from psycopg.types.json import Json

from outbox import (
    AsyncClient,
    Client,
    ConfigError,
    PayloadError,
    ResultTimeout,
    RunBlocked,
    RunCancelled,
    RunConflict,
    RunFailed,
    RunNotFound,
    SchemaError,
    Settings,
    UnknownWorkflow,
    runners,
)
from outbox.database import connect
from tests.claimant import Claimant
from tests.flows import Flow, Lead, count, welcome
from tests.postgres import Cluster
from tests.waiting import wait_until

Db = psycopg.Connection[TupleRow]


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(database_url) as opened:
        yield opened


@pytest_asyncio.fixture
async def aclient(database_url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(database_url) as opened:
        yield opened


def one(db: Db, statement: str, *parameters: Any) -> Any:
    row = db.execute(statement.encode(), parameters or None).fetchone()
    assert row is not None
    return row[0]


def inputs(db: Db) -> list[Any]:
    rows = db.execute(
        "select r.input::text from stepwell.runs r join stepwell.tasks t on t.run_id = r.id order by turn"
    )
    return [json.loads(text) for (text,) in rows]


# -- enqueue -----------------------------------------------------------------------------------------


def test_enqueue_by_function(client: Client, db: Db) -> None:
    run = client.enqueue(welcome, Lead(17), key=17)
    assert run.created
    assert run.workflow == "welcome"
    info = run.info()
    assert (info.id, info.workflow, info.status, info.queue) == (run.id, "welcome", "pending", "default")
    assert info.input == {"lead": {"id": 17, "name": "Ada"}, "greeting": "Hello"}
    assert one(db, "select key from stepwell.keys") == "17"


def test_a_function_brings_its_queue(client: Client) -> None:
    def mail() -> None: ...

    assert client.enqueue(Flow(mail, queue="mail")).info().queue == "mail"
    assert client.enqueue(Flow(mail, queue="mail"), queue="urgent").info().queue == "urgent"


def test_enqueue_by_name_accepts_unknown_names(client: Client, db: Db) -> None:
    client.enqueue("later", {"lead": {"id": 1}})
    client.enqueue("later", lead=Lead(2), n=3)
    assert inputs(db) == [{"lead": {"id": 1}}, {"lead": {"id": 2, "name": "Ada"}, "n": 3}]


def test_positional_arguments_by_name_are_named_by_what_workers_have_published(
    client: Client, db: Db
) -> None:
    with pytest.raises(UnknownWorkflow, match="no worker has published"):
        client.enqueue("welcome", Lead(1))
    db.execute(
        "insert into stepwell.workflows (name, version, input_schema, seen_at) values"
        " ('welcome', 'old', '{\"properties\": {\"old\": {}}}', now() - interval '1 day'), ('welcome', '', %s, now())",
        [Json(welcome.signature.json_schema())],
    )
    client.enqueue("welcome", Lead(1), "Hi")
    list(client.enqueue_many("welcome", [(Lead(2), "Hi"), Lead(3)]))
    assert [each["lead"]["id"] for each in inputs(db)] == [1, 2, 3]


def test_options_reach_the_database(client: Client, db: Db) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    run = client.enqueue(
        welcome, Lead(1), queue="mail", priority=0, at=at, labels={"source": "csv", "n": [1]}, deadline=7200,
        lane="l", tenant="t",
    )  # fmt: skip
    info = run.info()
    assert (info.queue, info.priority, info.labels) == ("mail", 0, {"source": "csv", "n": [1]})
    assert (info.status, info.task_state, info.due_at) == ("pending", "waiting", at)
    assert info.deadline_at is not None
    assert info.deadline_at - info.created_at == pytest.approx(timedelta(hours=2), abs=timedelta(seconds=1))
    assert db.execute("select lane, tenant from stepwell.runs").fetchone() == ("l", "t")


def test_a_delay_counts_by_the_clock_of_the_database(client: Client, db: Db) -> None:
    client.enqueue(welcome, Lead(1), delay=timedelta(minutes=2))
    client.enqueue(welcome, Lead(1), delay=120.0)
    spans = "select bool_and(t.due_at - r.created_at between '119 s' and '121 s') from stepwell.tasks t join stepwell.runs r on r.id = t.run_id"
    assert one(db, spans)


def test_a_known_key_gives_the_first_run_and_ignores_the_input(client: Client, db: Db) -> None:
    key = uuid4()
    first = client.enqueue(welcome, Lead(1), key=key)
    second = client.enqueue(welcome, Lead(2), key=str(key))
    assert (second.id, second.created) == (first.id, False)
    assert second == client.enqueue("welcome", key=key)
    assert [each["lead"]["id"] for each in inputs(db)] == [1]


def test_what_does_not_fit_enqueues_nothing(client: Client, db: Db) -> None:
    small = Client(
        settings=Settings(database_url=client._runner.settings.database_url, max_payload_bytes=100)
    )
    wrong: Any = "no lead"
    for call in (
        lambda: client.enqueue(welcome),
        lambda: client.enqueue(welcome, Lead(1), unknown=1),
        lambda: client.enqueue(welcome, Lead(1, name="\0")),
        lambda: client.enqueue(welcome, Lead(1), key=wrong * 100),
        lambda: client.enqueue("w", lead=object()),
        lambda: small.enqueue(welcome, Lead(1, name="x" * 100)),
        lambda: list(small.enqueue_many(welcome, [Lead(1), Lead(2, name="x" * 100)])),
    ):
        with pytest.raises(PayloadError):
            call()
    small.close()
    assert inputs(db) == []


# -- enqueue_many ------------------------------------------------------------------------------------


def test_many_are_streamed_lazily_and_in_order(client: Client, db: Db) -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for number in range(2500):
            taken += 1
            yield number

    runs = client.enqueue_many(count, source())
    assert (taken, one(db, "select count(*) from stepwell.runs")) == (0, 0)
    first = next(runs)
    assert (taken, one(db, "select count(*) from stepwell.runs")) == (1000, 1000)
    ids = [first.id, *(run.id for run in runs)]
    assert taken == len(set(ids)) == 2500
    stored: dict[Any, int] = dict(db.execute("select id, (input->>'n')::int from stepwell.runs").fetchall())
    assert [stored[run] for run in ids] == list(range(2500))


def test_each_chunk_is_committed_by_itself(client: Client, db: Db) -> None:
    runs = client.enqueue_many(count, range(25), chunk=10)
    next(runs)
    del runs  # the caller loses interest
    assert one(db, "select count(*) from stepwell.runs") == 10
    items: list[Any] = [*range(25), (1, "one too many"), *range(5)]
    with pytest.raises(PayloadError, match=r"inputs\[25\]"):
        list(client.enqueue_many(count, items, chunk=10))
    assert one(db, "select count(*) from stepwell.runs") == 30


def test_a_stream_with_keys_can_be_repeated(client: Client, db: Db) -> None:
    leads = [Lead(number % 40) for number in range(100)]
    first = list(client.enqueue_many(welcome, leads, key=lambda lead: lead.id, chunk=30))
    again = list(client.enqueue_many(welcome, leads, key=lambda lead: lead.id))
    assert [run.created for run in first] == [number < 40 for number in range(100)]
    assert not any(run.created for run in again)
    assert [run.id for run in again] == [run.id for run in first]
    assert one(db, "select count(*) from stepwell.runs") == 40


def test_options_of_a_stream_are_checked_at_the_call(client: Client) -> None:
    with pytest.raises(ConfigError, match="priority"):
        client.enqueue_many(count, [1], priority=11)
    with pytest.raises(ConfigError, match="chunk"):
        client.enqueue_many(count, [1], chunk=0)


async def test_the_asynchronous_client_streams_from_either_source(aclient: AsyncClient, db: Db) -> None:
    async def source() -> AsyncIterator[int]:
        for number in range(25):
            yield number

    first = [run.id async for run in aclient.enqueue_many(count, source(), chunk=10)]
    second = [run.id async for run in aclient.enqueue_many(count, range(25))]
    assert len({*first, *second}) == 50
    assert sorted(each["n"] for each in inputs(db)) == sorted([*range(25), *range(25)])


# -- result ------------------------------------------------------------------------------------------


def test_a_result_is_typed_by_the_function_and_plain_by_name(client: Client, db: Db) -> None:
    run = client.enqueue(welcome, Lead(1))
    worker = Claimant(db, ("welcome",))
    worker.succeed(worker.claim(), {"id": 1, "name": "Ada"})
    assert run.result() == Lead(1)
    assert client.result(run.id) == {"id": 1, "name": "Ada"}
    assert client.result(str(run.id), workflow=welcome) == Lead(1)


def test_a_result_may_be_null(client: Client, db: Db) -> None:
    run = client.enqueue("w")
    worker = Claimant(db, ("w",))
    worker.succeed(worker.claim())
    assert run.result(timeout=0) is None


def test_a_result_that_does_not_fit_the_annotation_is_a_payload_error(client: Client, db: Db) -> None:
    run = client.enqueue(count, 1)
    worker = Claimant(db, ("count",))
    worker.succeed(worker.claim(), "seventeen")
    with pytest.raises(PayloadError, match="output of run"):
        run.result()


@pytest.mark.parametrize(
    ("state", "error"), [("failed", RunFailed), ("cancelled", RunCancelled), ("blocked", RunBlocked)]
)
def test_an_unhappy_end_is_raised(client: Client, db: Db, state: str, error: type[RunFailed]) -> None:
    run = client.enqueue("w")
    worker = Claimant(db, ("w",))
    worker.end(worker.claim(), state)
    with pytest.raises(error, match="it broke") as raised:
        run.result()
    assert raised.value.run_id == run.id
    assert raised.value.error == {"type": "ValueError", "message": "it broke"}


def test_a_result_is_waited_for(client: Client, db: Db) -> None:
    run = client.enqueue(count, 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run.result, 30)
        with pytest.raises(ResultTimeout, match=f"run {run.id} has not ended within 0"):
            run.result(timeout=0)
        worker = Claimant(db, ("count",))
        worker.succeed(worker.claim(), 17)
        assert waiting.result(10) == 17


async def test_the_asynchronous_client_waits_as_well(aclient: AsyncClient, db: Db) -> None:
    run = await aclient.enqueue(welcome, Lead(1), key="k")
    assert not (await aclient.enqueue(welcome, Lead(1), key="k")).created
    with pytest.raises(ResultTimeout):
        await run.result(timeout=0.1)
    worker = Claimant(db, ("welcome",))
    worker.succeed(worker.claim(), {"id": 2, "name": "Bob"})
    assert await run.result(timeout=10) == Lead(2, "Bob")
    assert (await run.info()).status == "succeeded"
    assert not await run.cancel()


def test_the_result_of_a_run_that_does_not_exist(client: Client) -> None:
    with pytest.raises(RunNotFound, match="has not committed"):
        client.result(uuid4())
    with pytest.raises(RunNotFound, match="is not the id of a run"):
        client.result("17")


# -- cancel and retry --------------------------------------------------------------------------------


def test_cancel_asks_once_or_twice(client: Client, db: Db) -> None:
    run = client.enqueue("w")
    assert run.cancel()
    assert client.cancel(str(run.id))
    assert one(db, "select count(*) from stepwell.tasks where kind = 'wake'") == 2
    assert not client.cancel(uuid4())


@pytest.mark.parametrize("state", ["failed", "cancelled", "blocked"])
def test_retry_opens_what_ended_badly(client: Client, db: Db, state: str) -> None:
    run = client.enqueue("w")
    worker = Claimant(db, ("w",))
    worker.end(worker.claim(), state)
    assert client.retry(run.id) == 1
    info = run.info()
    assert (info.status, info.epoch, info.error, info.finished_at) == ("waiting", 1, None, None)
    worker.succeed(worker.claim(), 5)
    assert run.result() == 5


def test_retry_refuses_what_is_open_or_succeeded(client: Client, db: Db) -> None:
    run = client.enqueue("w")
    with pytest.raises(RunConflict, match=f"run {run.id} is open"):
        client.retry(run.id)
    worker = Claimant(db, ("w",))
    worker.succeed(worker.claim())
    with pytest.raises(RunConflict, match="is succeeded"):
        client.retry(run.id)
    with pytest.raises(RunNotFound):
        client.retry(uuid4())


async def test_the_asynchronous_client_retries(aclient: AsyncClient, db: Db) -> None:
    run = await aclient.enqueue("w")
    worker = Claimant(db, ("w",))
    worker.end(worker.claim(), "failed")
    assert await aclient.retry(run.id) == 1
    with pytest.raises(RunConflict):
        await aclient.retry(run.id)


# -- connections -------------------------------------------------------------------------------------


def test_a_database_without_the_schema_is_named(empty_database_url: str) -> None:
    with Client(empty_database_url) as client, pytest.raises(SchemaError, match="stepwell migrate"):
        client.enqueue("w")


async def test_the_asynchronous_client_names_it_as_well(empty_database_url: str) -> None:
    async with AsyncClient(empty_database_url) as client:
        with pytest.raises(SchemaError, match="stepwell migrate"):
            await client.enqueue("w")


def test_a_database_that_does_not_exist_is_said_at_once(cluster: Cluster) -> None:
    started = time.monotonic()
    with (
        Client(cluster.url("no_such_database")) as client,
        pytest.raises(psycopg.OperationalError, match="no_such"),
    ):
        client.enqueue("w")
    assert time.monotonic() - started < 5


def test_a_client_without_a_database_says_what_to_do(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPWELL_DATABASE_URL", raising=False)
    client = Client(settings=Settings(data_dir=tmp_path / "none"))
    with pytest.raises(ConfigError, match="STEPWELL_DATABASE_URL"):
        client.enqueue("w")


def test_the_url_comes_from_the_environment(
    database_url: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWELL_DATABASE_URL", database_url)
    with Client() as client:
        assert client.enqueue("w").created
    with Client(database_url, settings=Settings(database_url="postgresql://nowhere.invalid/x")) as client:
        assert client.enqueue("w").created
    assert one(db, "select count(*) from stepwell.runs") == 2


def test_a_closed_client_says_so(database_url: str) -> None:
    client = Client(database_url)
    client.close()
    client.close()
    with pytest.raises(ConfigError, match="closed"):
        client.enqueue("w")


async def test_a_closed_asynchronous_client_says_so(database_url: str) -> None:
    client = AsyncClient(database_url)
    await client.enqueue("w")
    await client.close()
    await client.close()
    with pytest.raises(ConfigError, match="closed"):
        await client.enqueue("w")


def test_many_threads_share_one_client(client: Client, db: Db) -> None:
    with ThreadPoolExecutor(24) as pool:
        runs = list(pool.map(lambda number: client.enqueue("w", key=number % 50), range(200)))
    assert len({run.id for run in runs}) == 50
    assert sum(run.created for run in runs) == 50
    assert one(db, "select count(*) from pg_stat_activity where application_name = 'stepwell client'") <= 8


def test_a_client_survives_a_fork(database_url: str, db: Db) -> None:
    script = """
import os, sys, warnings
warnings.simplefilter("ignore")
from outbox import Client
client = Client(sys.argv[1])
client.enqueue("parent")
child = os.fork()
if child == 0:
    client.enqueue("child")
    client.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
client.enqueue("parent")
client.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, database_url], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    names = [name for (name,) in db.execute("select workflow from stepwell.runs order by id")]
    assert names == ["parent", "child", "parent"]


# -- lost connections --------------------------------------------------------------------------------

CLIENTS = "from pg_stat_activity where application_name = 'stepwell client'"


def in_the_middle(url: str, db: Db, call: Any) -> Any:
    """Cut the connection of a call while the database works on it; return what the call gives or raises."""
    waiting = f"{CLIENTS} and wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as pool:
        with connect(url, application_name="test", autocommit=False) as blocker:
            blocker.execute("lock table stepwell.runs in access exclusive mode")
            calling = pool.submit(call)
            pid = wait_until(lambda: one(db, f"select max(pid) {waiting}"))
            db.execute("select pg_terminate_backend(%s)", [pid])
            wait_until(lambda: calling.done() or one(db, f"select max(pid) {waiting} and pid <> {pid}"))
        return calling.result(30)


def checkpoint(db: Db) -> None:
    """Make sequences safe against a crash.

    Those of a database that was copied from a template may count on WAL records that only the template has, until
    the first checkpoint; a crash before it would have them give numbers twice.
    """
    db.execute("checkpoint")


def test_a_connection_that_is_cut_between_two_calls_is_replaced(client: Client, db: Db) -> None:
    client.enqueue("w")
    db.execute(f"select pg_terminate_backend(pid, 10000) {CLIENTS}".encode())
    client.enqueue("w")
    assert one(db, "select count(*) from stepwell.runs") == 2


def test_an_enqueue_with_a_key_is_repeated_when_its_connection_is_cut(
    client: Client, database_url: str, db: Db
) -> None:
    client.list()
    run = in_the_middle(database_url, db, lambda: client.enqueue("w", key="k"))
    assert run.created
    assert one(db, "select count(*) from stepwell.runs") == 1


def test_an_enqueue_without_a_key_is_not_repeated_when_its_connection_is_cut(
    client: Client, database_url: str, db: Db
) -> None:
    client.list()
    with pytest.raises(psycopg.OperationalError):
        in_the_middle(database_url, db, lambda: client.enqueue("w"))
    assert one(db, "select count(*) from stepwell.runs") == 0


def test_a_signal_is_not_sent_again_when_its_connection_is_cut(
    client: Client, database_url: str, db: Db
) -> None:
    run = client.enqueue("w")
    with pytest.raises(psycopg.OperationalError):
        in_the_middle(database_url, db, lambda: run.signal("s"))
    assert one(db, "select count(*) from stepwell.signals") == 0


def test_a_stream_goes_on_over_a_restart_of_the_database(cluster: Cluster, client: Client, db: Db) -> None:
    checkpoint(db)

    def source() -> Iterator[int]:
        for number in range(30):
            if number == 15:
                cluster.restart("immediate")
            yield number

    runs = list(client.enqueue_many(count, source(), key=lambda number: number, chunk=5))
    assert len({run.id for run in runs}) == 30
    with connect(client._runner.settings.database_url or "", application_name="test") as fresh:
        assert one(fresh, "select count(*) from stepwell.runs") == 30


def test_calls_wait_for_a_database_that_is_down_but_not_for_ever(
    cluster: Cluster, client: Client, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(db)
    client.enqueue("w")
    monkeypatch.setattr(runners, "GIVE_UP_SECONDS", 0.2)
    monkeypatch.setattr(runners, "POOL_WAIT_SECONDS", 0.2)
    with Client(client._runner.settings.database_url) as other:
        cluster.stop("immediate")
        try:
            with pytest.raises(psycopg.OperationalError):
                other.enqueue("w")
        finally:
            cluster.start()
        monkeypatch.setattr(runners, "GIVE_UP_SECONDS", 30)
        assert other.enqueue("w").created


def test_a_deadlock_is_repeated_on_our_own_connection(client: Client, database_url: str, db: Db) -> None:
    """The stream waits for a key of a caller, who then wants a key of the stream: one of them must yield."""
    list(client.enqueue_many("w", [{}], key=lambda _: "warm"))
    with connect(database_url, application_name="caller", autocommit=False) as caller:
        caller.execute("set deadlock_timeout = '1min'")  # so that the client is the one to find it
        client.enqueue("w", key="b", tx=caller)
        with ThreadPoolExecutor(2) as pool:
            stream = pool.submit(
                lambda: list(
                    client.enqueue_many("w", [{"key": "a"}, {"key": "b"}], key=lambda item: item["key"])
                )
            )
            wait_until(lambda: one(db, f"select count(*) {CLIENTS} and wait_event_type = 'Lock'"))
            ours = pool.submit(lambda: client.enqueue("w", key="a", tx=caller))
            assert ours.result(20).created
            caller.commit()
            assert [run.created for run in stream.result(20)] == [False, False]
