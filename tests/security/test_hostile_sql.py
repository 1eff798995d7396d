"""What anybody may send by SQL: it comes back as it was, or is refused; whoever executes it goes on working."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from outbox import Client, RunBlocked, RunFailed
from outbox.database import connect
from tests.engines import Lab, keep_house_often, until
from tests.postgres import Cluster
from tests.security.hostile import JSON_TEXTS, TEXTS, bounded, json_texts, storable
from tests.security.members import Db
from worker import emit, set_state, step, wait_signal, workflow
from worker.definitions import Registry, Workflow, collecting


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[str]:
    """A database for all examples: one of its own for each would take half a second."""
    with cluster.database() as url:
        yield url


@pytest.fixture
def shared_db(shared: str) -> Iterator[Db]:
    with connect(shared, application_name="test") as connection:
        yield connection


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


def everything(db: Db) -> tuple[Any, ...] | None:
    """Return how much there is in the tables to which producers add."""
    return db.execute(
        """select (select count(*) from stepwell.runs), (select count(*) from stepwell.tasks),
                  (select count(*) from stepwell.keys), (select count(*) from stepwell.signals)"""
    ).fetchone()


def tried(db: Db, statement: str, parameters: Any) -> tuple[Any, psycopg.Error | None]:
    """Return the row of a statement, or its refusal, after having seen that this has left nothing behind."""
    before = everything(db)
    try:
        return db.execute(statement.encode(), parameters).fetchone(), None
    except psycopg.Error as error:
        refusal = error
    assert everything(db) == before
    # A mistake in the data or in the call (22), or a limit of Postgres (54): nothing else.
    assert (refusal.sqlstate or "")[:2] in ("22", "54"), refusal
    return None, refusal


def refused(db: Db, statement: str, parameters: Any) -> psycopg.Error | None:
    return tried(db, statement, parameters)[1]


# -- names and keys ------------------------------------------------------------------------------------


@bounded(150)
@given(workflow=storable, key=st.none() | storable, queue=st.none() | storable, more=storable)
def test_names_and_keys_are_kept_to_the_letter_or_refused(
    shared_db: Db, workflow: str, key: str | None, queue: str | None, more: str
) -> None:
    db = shared_db
    parameters = {"w": workflow, "k": key, "q": queue, "m": more}
    statement = (
        "select id, created from stepwell.enqueue_many(%(w)s, array['{}']::json[], array[%(k)s]::text[],"
        " queue => %(q)s, lane => %(m)s, tenant => %(m)s, labels => jsonb_build_object('m', %(m)s::text),"
        " version => %(m)s)"
    )
    fits = (
        1 <= len(workflow.encode()) <= 255
        and "@" not in workflow
        and not workflow.startswith("step:")
        and (key is None or len(key.encode()) <= 512)
        and (queue is None or 1 <= len(queue.encode()) <= 255)
        and queue != "stepwell"
        and len(more.encode()) <= 255
    )
    made, error = tried(db, statement, parameters)
    assert (error is None) == fits, error
    if made is None:
        assert str(error).startswith("stepwell: ")
        return
    run, created = made
    if created:
        found = "select workflow, key, queue, lane, tenant, version, labels ->> 'm' from stepwell.runs where id = %s"
        wanted = (workflow, key, "default" if queue is None else queue, more, more, more, more)
        assert db.execute(found, [run]).fetchone() == wanted
    if key is not None:
        assert db.execute(statement.encode(), parameters).fetchone() == (run, False)


def test_a_key_of_a_megabyte_is_refused_in_a_sentence(shared_db: Db) -> None:
    for key in ("k" * 2**20, "é" * 300):
        error = refused(shared_db, "select stepwell.enqueue('w', key => %s)", [key])
        assert error is not None
        assert error.diag.message_primary == "stepwell: a key has more than 512 bytes"
    for option in ("lane", "tenant", "version", "queue"):
        error = refused(shared_db, f"select stepwell.enqueue('w', {option} => %s)", ["x" * 2**20])
        assert error is not None
        assert "255 bytes" in str(error.diag.message_primary)


@pytest.mark.parametrize(
    "options",
    [
        "labels => '[1]'", "labels => '\"x\"'", "labels => 'null'", "labels => '{\"a\": 1e400}'",
        "labels => ('{\"a\": ' || repeat('[', 3000) || repeat(']', 3000) || '}')::jsonb",
        "labels => ('{\"a\": ' || repeat('9', 5000) || '}')::jsonb",
        "at => 'infinity'", "at => '-infinity'", "at => '20000-01-01'", "at => '0100-01-01 BC'",
        "delay => '200000 years'", "delay => '-200000 years'", "deadline => '200000 years'",
        "deadline => '10000 years'", "deadline => '2000000000 years'", "delay => 'infinity'",
        "priority => -1", "priority => 10", "priority => null", "priority => 2147483647", "delay => '1s', at => now()",
        "queue => ''", "queue => 'stepwell'", "key => repeat('k', 513)", "input => '[]'", "input => 'null'",
        "input => '1'", "input => null", "version => repeat('x', 256)",
        "version => (select string_agg(md5(i::text), '') from generate_series(1, 2000) i)",
    ],
)  # fmt: skip
def test_what_could_not_be_carried_further_is_refused(shared_db: Db, cluster: Cluster, options: str) -> None:
    if cluster.version < 17 and "delay => 'infinity'" in options:
        pytest.skip("no interval is infinite before PostgreSQL 17")
    assert refused(shared_db, f"select stepwell.enqueue('w', {options})", None) is not None


@pytest.mark.parametrize(
    "call",
    [
        "enqueue(null)", "enqueue('')", "enqueue('step:w')", "enqueue('step:')", "enqueue('w@1')", "enqueue('@')",
        "enqueue_many(null, null, array['k'])", "enqueue_many('w', array[null]::json[])",
        "enqueue_many('w', array['1']::json[])", "enqueue_many('w', array['{}', '[]']::json[])",
        "enqueue_many('w', array['{}']::json[], array['a', 'b'])",
        "enqueue_many('w', array['{}']::json[], array[]::text[])",
    ],
)  # fmt: skip
def test_calls_that_mean_nothing_are_refused_whole(shared_db: Db, call: str) -> None:
    error = refused(shared_db, f"select stepwell.{call}", None)
    assert error is not None
    assert str(error.diag.message_primary).startswith("stepwell: ")


@pytest.mark.parametrize(
    "error",
    [
        '{"type": "E", "message": "m", "data": 1e400}', '{"type": "E", "message": "\\u0000"}',
        '{"type": "E", "message": "m", "data": ' + "[" * 500 + "]" * 500 + "}", '{"type": 1, "message": "m"}', "[]",
    ],
)  # fmt: skip
def test_an_operator_resolves_no_step_by_an_error_that_no_worker_could_read(
    shared_db: Db, error: str
) -> None:
    statement = "select stepwell.resolve(gen_random_uuid(), '{1}', error => %s)"
    assert refused(shared_db, statement, [error]) is not None


def test_an_operator_forks_into_no_version_that_no_index_takes(shared_db: Db) -> None:
    made = shared_db.execute("select stepwell.enqueue('w')").fetchone()
    assert made is not None
    error = refused(shared_db, "select stepwell.fork(%s, '{1}', version => repeat('x', 256))", made)
    assert error is not None
    assert "255 bytes" in str(error)


def test_calls_for_nobody_do_nothing(shared_db: Db) -> None:
    before = everything(shared_db)
    for call in (
        "signal(null, 'go')", "signal(gen_random_uuid(), 'go', '1')", "cancel(null)", "cancel(gen_random_uuid())",
    ):  # fmt: skip
        assert shared_db.execute(f"select stepwell.{call}".encode()).fetchone() == (False,)
    shared_db.execute("select * from stepwell.enqueue_many('w', null)")
    shared_db.execute("select * from stepwell.enqueue_many('w', array[]::json[])")
    assert everything(shared_db) == before


# -- payloads: what Postgres takes comes back as text, to the letter -------------------------------------


@bounded(120)
@given(text=json_texts)
def test_json_is_stored_to_the_letter(shared_db: Db, text: str) -> None:
    made = shared_db.execute("select stepwell.enqueue('w', %s)", [f'{{"a":{text}}}']).fetchone()
    found = shared_db.execute("select input::text from stepwell.runs where id = %s", made)
    assert found.fetchone() == (f'{{"a":{text}}}',)


@bounded(80)
@given(name=storable, payload=json_texts)
def test_signals_are_stored_to_the_letter_or_refused(shared_db: Db, name: str, payload: str) -> None:
    row = shared_db.execute("select stepwell.enqueue('w', key => 'signalled')").fetchone()
    assert row is not None
    error = refused(shared_db, "select stepwell.signal(%s, %s, %s)", [row[0], name, payload])
    fits = 1 <= len(name.encode()) <= 255 and not name.startswith("stepwell:")
    assert (error is None) == fits, error
    if fits:
        found = shared_db.execute("select name, payload::text from stepwell.signals order by id desc limit 1")
        assert found.fetchone() == (name, payload)


# -- and whoever executes it goes on working --------------------------------------------------------------


def echoing(executed: list[Any]) -> tuple[Registry, Workflow[..., Any], Workflow[..., Any]]:
    with collecting() as registry:

        @step
        async def note(value: Any) -> Any:
            executed.append(value)
            return value

        @workflow
        async def echo(a: Any) -> Any:
            set_state("a", a)
            emit("a", a)
            return await note(a)

        @workflow
        async def asks(kind: str) -> Any:
            if kind == "any":
                return await note(await wait_signal("go"))
            return await note(await wait_signal("go", type=int))

    return registry, echo, asks


def is_decodable(text: str) -> bool:
    """Tell what the codec can carry: by Python's own reader, which is not ours."""
    if "\\u0000" in text or len(text) > 1_000_000:
        return False
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


DEEP = 500
"""From here on it depends on how deep the reader stands already, and on the release of Python."""


def _depth(text: str) -> int:
    return max(text.count("["), text.count('{"a":'))


async def test_hostile_inputs_are_executed_exactly_or_block_their_run_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    executed: list[Any] = []
    registry, echo, _ = echoing(executed)
    async with lab.engine(registry) as running:
        runs: dict[UUID, str] = {}
        neighbours = []
        for number, text in enumerate(JSON_TEXTS):
            rows = await lab.execute("select stepwell.enqueue('echo', %s)", [f'{{"a":{text}}}'])
            runs[rows[0][0]] = text
            neighbours.append((await lab.enqueue(echo, {"a": number}), number))
        for run, number in neighbours:
            assert await lab.succeeded(run) == number
        for run, text in runs.items():
            state, output, error = await lab.ended(run)
            if _depth(text) >= DEEP:
                assert state in ("succeeded", "blocked", "failed"), text[:60]
            elif not is_decodable(text):
                assert state in ("blocked", "failed"), (text[:60], state)
                assert error["type"].endswith("PayloadError"), (text[:60], error)
            elif state != "succeeded":
                # What is ours by its name, or does not fit the limits, is refused where it is written.
                assert error["type"].endswith("PayloadError"), (text[:60], error)
                assert "stepwell:" in text or "1e-400" in text or len(text) > 4000, (text[:60], error)
            else:
                assert same(output, json.loads(text)), text[:60]
        assert not running.task.done()
        assert running.engine._claimant.connections == 1
    # All of them can be looked at, and listed with the others.
    with Client(lab.url) as client:
        assert len(client.list(limit=1000)) == len(runs) + len(neighbours)
        for run in runs:
            assert client.get(run).id == run
            client.history(run), client.tasks(run), client.why(run), client.state(run)
            list(client.stream(run, follow=False))
            try:
                client.result(run, timeout=5)
            except (RunBlocked, RunFailed):
                continue


def same(one: Any, other: Any) -> bool:
    """Compare as JSON does: 1 is not true, -0.0 is not 0.0, and order counts."""
    return repr(one) == repr(other) or (
        isinstance(one, float) and isinstance(other, float | int) and math.isclose(one, other, rel_tol=0)
    )


async def test_hostile_signals_fail_their_run_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_house_often(monkeypatch)
    executed: list[Any] = []
    registry, _, asks = echoing(executed)
    async with lab.engine(registry) as running:
        waiting = []
        for text in JSON_TEXTS:
            for kind in ("any", "int"):
                run = await lab.enqueue(asks, {"kind": kind})
                await lab.execute("select stepwell.signal(%s, 'go', %s)", [run, text])
                waiting.append((run, kind, text))
        good = await lab.enqueue(asks, {"kind": "int"})
        await lab.execute("select stepwell.signal(%s, 'go', '7')", [good])
        assert await lab.succeeded(good) == 7
        for run, kind, text in waiting:
            state, output, error = await lab.ended(run)
            if _depth(text) >= DEEP:
                assert state in ("succeeded", "blocked", "failed"), text[:60]
            elif state == "succeeded":
                assert same(output, json.loads(text)), text[:60]
                assert kind == "any" or type(output) is int
            else:
                assert state in ("failed", "blocked")
                assert error["type"].rpartition(".")[2] in ("PayloadError", "DataRefused"), (text[:60], error)
                assert kind == "int" or not is_decodable(text) or "stepwell:" in text or len(text) > 4000, (
                    text[:60]
                )
        assert not running.task.done()
        assert running.engine._claimant.connections == 1
    with Client(lab.url) as client:
        assert len(client.list(limit=1000)) == len(waiting) + 1
        for run, _, _ in waiting:
            client.history(run)


async def test_names_that_workers_have_for_other_things_do_not_stop_them(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown names of every spelling: set aside, shown, and in nobody's way. That of a step is refused."""
    keep_house_often(monkeypatch)
    registry, echo, _ = echoing([])
    async with lab.engine(registry) as running:
        enqueued = 0
        for name in TEXTS:
            try:
                await lab.execute(
                    "select stepwell.enqueue(%s, '{\"a\": 1}', queue => 'default', version => %s)",
                    [name, name],
                )
                enqueued += 1
            except (psycopg.DataError, UnicodeEncodeError):
                continue
        with pytest.raises(psycopg.DataError, match="not begin with"):
            await lab.execute("select stepwell.enqueue('step:note', '{\"value\": 1}')")

        async def set_aside() -> bool:
            rows = await lab.execute("select count(*) from stepwell.tasks where state = 'shelved'")
            return rows[0][0] == enqueued

        assert enqueued > 50
        await until(set_aside, 20)
        assert await lab.succeeded(await lab.enqueue(echo, {"a": 1})) == 1
        assert not running.task.done()
    with Client(lab.url) as client:
        assert len(client.list(limit=1000)) == enqueued + 1
