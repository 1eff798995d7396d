"""What each role can do and, above all, what it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox import Client, ConfigError, SchemaError
from outbox.database import connect
from tests.claimant import Claimant
from tests.flows import Lead, welcome
from tests.security.members import Member, member_of

Db = psycopg.Connection[TupleRow]

TABLES = (
    "runs", "keys", "tasks", "outbox", "signals", "state", "stream", "workers", "workflows", "counters", "doorbell", "exporter",
    "migrations",
)  # fmt: skip
PRODUCERS_OWN = ("enqueue", "enqueue_many", "signal", "cancel", "current_version")


@pytest.fixture
def producer(database_url: str, db: Db) -> Iterator[Member]:
    with member_of("stepwell_producer", database_url, db) as member:
        yield member


@pytest.fixture
def viewer(database_url: str, db: Db) -> Iterator[Member]:
    with member_of("stepwell_viewer", database_url, db) as member:
        yield member


@pytest.fixture
def worker(database_url: str, db: Db) -> Iterator[Member]:
    with member_of("stepwell_worker", database_url, db) as member:
        yield member


@pytest.fixture
def stranger(database_url: str, db: Db) -> Iterator[Member]:
    with member_of("pg_signal_backend", database_url, db) as member:
        yield member


def functions(db: Db) -> list[tuple[str, str]]:
    """Return (name, a call of it with nulls) for every function of the schema."""
    rows = db.execute(
        """select p.proname, format('stepwell.%I(%s)', p.proname,
                  (select string_agg(format('null::%s', format_type(a, null)), ', ' order by i)
                   from unnest(p.proargtypes) with ordinality as u (a, i)))
           from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = 'stepwell'"""
    ).fetchall()
    assert len(rows) > 10
    return [(name, call) for name, call in rows]


# -- producer ----------------------------------------------------------------------------------------


def test_a_producer_enqueues_signals_and_cancels_through_sql(producer: Member, db: Db) -> None:
    run = producer.one("select stepwell.enqueue('w', key => 'k')")
    assert producer.one("select stepwell.enqueue('w', key => 'k')") == run
    assert producer.one("select count(*) from stepwell.enqueue_many('w', array['{}', '{}']::json[])") == 2
    assert producer.one("select stepwell.signal(%s, 'go', '{\"a\": 1}')", run)
    assert producer.one("select stepwell.cancel(%s)", run)
    row = db.execute("select count(*) filter (where kind = 'run'), count(*) from stepwell.tasks").fetchone()
    assert row == (3, 5)


def test_a_producer_enqueues_signals_and_cancels_through_the_client(producer: Member) -> None:
    with Client(producer.url) as client:
        run = client.enqueue(welcome, Lead(1), key=1)
        assert not client.enqueue("welcome", lead={"id": 1}, key=1).created
        assert len(list(client.enqueue_many(welcome, [Lead(2), Lead(3)]))) == 2
        assert run.signal("approved", {"by": "Ada"})
        assert run.cancel()
        with connect(producer.url, application_name="test", autocommit=False) as tx:
            client.enqueue(welcome, Lead(4), tx=tx)


def test_a_producer_reads_no_table_but_what_the_workers_publish(producer: Member, db: Db) -> None:
    db.execute("select stepwell.enqueue('w', '{\"secret\": 1}', key => 'k')")
    assert not producer.is_refused("select * from stepwell.workflows")
    for table in {*TABLES, "run_status"} - {"workflows"}:
        assert producer.is_refused(f"select * from stepwell.{table}"), table


def test_a_producer_writes_no_table(producer: Member) -> None:
    for table in TABLES:
        assert producer.is_refused(f"insert into stepwell.{table} default values"), table
        assert producer.is_refused(f"delete from stepwell.{table}"), table
        assert producer.is_refused(f"truncate stepwell.{table}"), table
    assert producer.is_refused("select nextval('stepwell.turns')")
    assert producer.is_refused("create table stepwell.mine (a int)")


def test_a_producer_calls_nothing_but_its_four_functions(producer: Member, db: Db) -> None:
    for name, call in functions(db):
        if name not in PRODUCERS_OWN:
            assert producer.is_refused(f"select {call}"), name


def test_the_client_tells_a_producer_which_role_reads(producer: Member) -> None:
    with Client(producer.url) as client:
        with pytest.raises(ConfigError, match="stepwell_viewer to read"):
            client.get(uuid4())
        with pytest.raises(ConfigError, match="stepwell_viewer to read"):
            client.state(uuid4())
        with pytest.raises(ConfigError, match="stepwell_viewer to read"):
            next(client.stream(uuid4()))
        with pytest.raises(ConfigError, match="stepwell_worker to retry"):
            client.retry(uuid4())


# -- viewer ------------------------------------------------------------------------------------------


def test_a_viewer_reads_everything(viewer: Member, db: Db) -> None:
    db.execute("select stepwell.enqueue('w', '{\"a\": 1}', key => 'k')")
    for table in (*TABLES, "run_status"):
        viewer.db.execute(f"select * from stepwell.{table}".encode())
    claimant = Claimant(db, ("w",))
    run = claimant.claim().run
    with Client(viewer.url) as client:
        assert client.get(run).input == {"a": 1}
        assert [info.id for info in client.list()] == [run]
        assert client.history(run) == []
        assert (client.state(run), client.progress(run)) == ({}, None)
        assert list(client.stream(run, follow=False)) == []
        assert [task.state for task in client.tasks(run)] == ["claimed"]
        assert client.why(run) is None


def test_a_viewer_writes_nothing(viewer: Member) -> None:
    for table in TABLES:
        assert viewer.is_refused(f"insert into stepwell.{table} default values"), table
        assert viewer.is_refused(f"delete from stepwell.{table}"), table
        assert viewer.is_refused(f"truncate stepwell.{table}"), table
    for table, column in (("runs", "state"), ("tasks", "state"), ("outbox", "outcome"), ("workers", "beat")):
        assert viewer.is_refused(f"update stepwell.{table} set {column} = null"), table
        assert viewer.is_refused(f"select * from stepwell.{table} for update"), table
    assert viewer.is_refused("select nextval('stepwell.turns')")


def test_a_viewer_calls_no_function(viewer: Member, db: Db) -> None:
    for name, call in functions(db):
        assert viewer.is_refused(f"select {call}"), name
    with Client(viewer.url) as client, pytest.raises(ConfigError, match="stepwell_producer to enqueue"):
        client.enqueue("w")
    with (
        Client(viewer.url) as client,
        pytest.raises(ConfigError, match="stepwell_producer to enqueue, signal"),
    ):
        client.signal(uuid4(), "s")


# -- worker ------------------------------------------------------------------------------------------


def test_a_worker_runs_the_protocol(worker: Member, db: Db) -> None:
    runs = [db.execute("select stepwell.enqueue('w')").fetchone() for _ in range(2)]
    assert all(runs)
    claimant = Claimant(worker.db, ("w",))
    claim = claimant.claim()
    assert claimant.flush(claim, "move", claimant.record([0], 0, "completed"), doing=[1]) == 1
    claimant.succeed(claim)
    other = claimant.claim()
    claimant.end(other, "failed")
    worker.db.execute("select * from stepwell.promote_v1(10)")
    worker.db.execute("select stepwell.shelve_v1('default', 10)")
    worker.db.execute("select stepwell.idle_v1(%s, '{default}', 1)", [claimant.id])
    assert worker.one("select stepwell.bury_v1(%s)", claimant.id)
    assert worker.one("select reclaimed from stepwell.reclaim_v1(%s, 3, 10)", claimant.id) == 0
    with Client(worker.url) as client:
        assert client.retry(other.run) == 1
        assert client.enqueue("w").created


def test_a_worker_does_not_change_the_schema(worker: Member) -> None:
    assert worker.one("select count(*) from stepwell.migrations") >= 1
    for statement in (
        "insert into stepwell.migrations (version, name) values (99, 'x')",
        "update stepwell.migrations set version = 0",
        "delete from stepwell.migrations",
        "create table stepwell.mine (a int)",
        "drop table stepwell.doorbell",
        "alter table stepwell.runs add column mine int",
        "truncate stepwell.outbox",
        "create or replace function stepwell.cancel(run uuid) returns boolean language sql as 'select true'",
    ):
        assert worker.is_refused(statement), statement


# -- strangers, and enemies --------------------------------------------------------------------------


def test_who_has_none_of_the_roles_can_do_nothing(stranger: Member, db: Db) -> None:
    for name, call in functions(db):
        assert stranger.is_refused(f"select {call}"), name
    for table in TABLES:
        assert stranger.is_refused(f"select * from stepwell.{table}"), table
    with Client(stranger.url) as client, pytest.raises((ConfigError, SchemaError), match="stepwell"):
        client.enqueue("w")


def test_every_security_definer_function_pins_its_search_path(db: Db) -> None:
    rows = db.execute(
        """select p.proname, p.proconfig from pg_proc p join pg_namespace n on n.oid = p.pronamespace
           where n.nspname = 'stepwell' and p.prosecdef"""
    ).fetchall()
    assert {name for name, _ in rows} == set(PRODUCERS_OWN)
    for name, config in rows:
        assert "search_path=pg_catalog, stepwell, pg_temp" in config, name


def test_a_hostile_search_path_has_no_effect(producer: Member, db: Db) -> None:
    """Objects of the caller under the names that the functions use are not the ones that they reach."""
    db.execute(f"create schema hostile authorization {producer.name}".encode())
    spy = "returns {type} language plpgsql as $$ begin perform set_config('test.caught', current_user, false); return {value}; end $$"
    mine = producer.db
    mine.execute("create table hostile.caught (who text)")
    for signature, type_, value in (
        ("octet_length(text)", "int", "1"),
        ("coalesce_(text)", "text", "''"),
        ("clock_timestamp()", "timestamptz", "pg_catalog.now()"),
        ("json_typeof(json)", "text", "'object'"),
        ("cardinality(anyarray)", "int", "1"),
        ("new_id()", "uuid", "gen_random_uuid()"),
        ("ring(text)", "void", ""),
        ("pg_notify(text, text)", "void", ""),
    ):
        mine.execute(f"create function hostile.{signature} {spy.format(type=type_, value=value)}".encode())
        mine.execute(f"create function pg_temp.{signature} {spy.format(type=type_, value=value)}".encode())
    mine.execute(
        "create function hostile.enqueue_many(text, json[]) returns table (id uuid, created boolean) language sql as 'select null::uuid, true'"
    )
    for table in ("runs", "keys", "tasks", "doorbell", "outbox", "signals"):
        mine.execute(f"create temp table {table} (like hostile.caught)".encode())
        mine.execute(f"create table hostile.{table} (like hostile.caught)".encode())
    mine.execute("create type hostile.json as (a int)")
    mine.execute("create operator hostile.= (leftarg = text, rightarg = text, function = pg_catalog.textne)")
    mine.execute("set search_path = pg_temp, hostile, pg_catalog")

    run = producer.one("select stepwell.enqueue('w', key => 'k')")
    assert producer.one("select stepwell.enqueue('w', key => 'k')") == run
    many = "select id from stepwell.enqueue_many('w', array['{}']::pg_catalog.json[], keys => array['k'])"
    assert producer.one(many) == run
    assert producer.one("select stepwell.signal(%s, 'go')", run)
    assert producer.one("select stepwell.cancel(%s)", run)

    assert producer.one("select coalesce(current_setting('test.caught', true), '')") == ""
    for table in ("runs", "keys", "tasks", "signals"):
        assert producer.one(f"select count(*) from pg_temp.{table}") == 0
        assert producer.one(f"select count(*) from hostile.{table}") == 0
    row = db.execute(
        "select (select count(*) from stepwell.runs), (select count(*) from stepwell.keys),"
        " (select count(*) from stepwell.tasks)"
    ).fetchone()
    assert row == (1, 1, 3)
