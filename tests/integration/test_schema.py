"""Installing the schema, bringing it up to date, and refusing to work without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox import migrations, schema
from outbox.database import connect, connect_async
from outbox.errors import SchemaError
from outbox.migrations import Migration
from tests.postgres import Cluster
from tests.waiting import wait_until

Connection = psycopg.Connection[TupleRow]


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Connection]:
    with connect(empty_database_url, application_name="test") as connection:
        yield connection


@contextmanager
def as_role(cluster: Cluster, url: str, role: str, grants: str = "") -> Iterator[Connection]:
    """Connect to the database of `url` as a fresh login role."""
    with connect(url, application_name="test") as owner:
        owner.execute(f"create role {role} login".encode())
        try:
            if grants:
                owner.execute(grants.encode())
            with connect(url.replace("postgres@", f"{role}@"), application_name="test") as connection:
                yield connection
        finally:
            owner.execute(f"drop owned by {role}; drop role {role}".encode())


def versions(connection: Connection) -> list[int]:
    return [
        version for (version,) in connection.execute("select version from stepwell.migrations order by 1")
    ]


# -- migrate -----------------------------------------------------------------------------------------


def test_migrate_installs_an_empty_database_once(empty: Connection) -> None:
    assert schema.migrate(empty) == ["1 schema"]
    assert schema.migrate(empty) == []
    assert versions(empty) == [1]


def test_two_migrates_at_once_install_once(empty_database_url: str) -> None:
    applied: list[str] = []

    def install() -> None:
        with connect(empty_database_url, application_name="test") as connection:
            applied.extend(schema.migrate(connection))

    threads = [threading.Thread(target=install) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert applied == ["1 schema"]


def test_migrate_waits_for_the_one_that_is_at_work(empty_database_url: str) -> None:
    applied: list[str] = []

    def install() -> None:
        with connect(empty_database_url, application_name="second migrate") as connection:
            applied.extend(schema.migrate(connection))

    with connect(empty_database_url, application_name="test") as first:
        first.execute("select pg_advisory_lock(%s)", [schema.MIGRATE_LOCK_KEY])
        second = threading.Thread(target=install)
        second.start()
        waits = (
            "select count(*) = 1 from pg_stat_activity where application_name = 'second migrate' "
            "and wait_event_type = 'Lock' and wait_event = 'advisory'"
        )
        wait_until(lambda: first.execute(waits).fetchone() == (True,))
        assert applied == []
        first.execute("select pg_advisory_unlock(%s)", [schema.MIGRATE_LOCK_KEY])
        second.join()
    assert applied == ["1 schema"]


def test_migrate_gives_up_on_one_that_does_not_end(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOCK_TIMEOUT", "50ms")
    with (
        connect(empty_database_url, application_name="test") as first,
        connect(empty_database_url, application_name="test") as second,
    ):
        first.execute("select pg_advisory_lock(%s)", [schema.MIGRATE_LOCK_KEY])
        with pytest.raises(SchemaError, match="another `stepwell migrate`"):
            schema.migrate(second)
        assert second.execute("show lock_timeout").fetchone() == ("0",)


def test_migrate_releases_its_lock(empty_database_url: str, empty: Connection) -> None:
    schema.migrate(empty)
    with connect(empty_database_url, application_name="test") as other:
        assert other.execute("select pg_try_advisory_lock(%s)", [schema.MIGRATE_LOCK_KEY]).fetchone() == (
            True,
        )


def test_a_migration_that_fails_leaves_nothing_behind(
    empty: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "schema_sql", lambda: "create schema stepwell; select 1/0;")
    with pytest.raises(psycopg.errors.DivisionByZero):
        schema.migrate(empty)
    assert empty.execute("select to_regnamespace('stepwell')").fetchone() == (None,)
    monkeypatch.undo()
    assert schema.migrate(empty) == ["1 schema"]


def test_an_older_database_gets_only_what_is_new(db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    release_2(monkeypatch)
    assert schema.pending(db) == ["2 add_colour"]
    assert schema.migrate(db) == ["2 add_colour"]
    assert versions(db) == [1, 2]
    assert db.execute("select colour from stepwell.workers").fetchall() == []
    assert schema.pending(db) == []


def test_an_empty_database_records_every_version_at_once(
    empty: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    release_2(monkeypatch)
    assert schema.migrate(empty) == ["2 schema"]
    assert versions(empty) == [1, 2]


def test_a_newer_database_is_left_as_it_is(db: Connection) -> None:
    db.execute("insert into stepwell.migrations (version, name) values (7, 'of a later release')")
    assert schema.migrate(db) == []


def test_a_schema_of_somebody_else_is_not_touched(empty: Connection) -> None:
    empty.execute("create schema stepwell")
    with pytest.raises(SchemaError, match="not Stepwell's"):
        schema.migrate(empty)


def test_a_role_without_the_right_is_told_who_may(cluster: Cluster, empty_database_url: str) -> None:
    with (
        as_role(cluster, empty_database_url, "nobody_special") as connection,
        pytest.raises(SchemaError, match=r"'nobody_special' may not install .*grant the role CREATE"),
    ):
        schema.migrate(connection)


def test_an_old_server_is_refused(empty: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "OLDEST_SERVER", 99)
    with pytest.raises(SchemaError, match="needs PostgreSQL 99 or newer"):
        schema.migrate(empty)


def test_installing_leaves_statistics_of_a_busy_system_and_no_rows(db: Connection) -> None:
    for table in ("runs", "tasks", "outbox"):
        assert db.execute(f"select count(*) from stepwell.{table}".encode()).fetchone() == (0,)
    known = "select tablename, attname, n_distinct from pg_stats where schemaname = 'stepwell'"
    found = {(table, column): distinct for table, column, distinct in db.execute(known)}
    assert found["tasks", "run_id"] == -1
    assert found["tasks", "state"] == 5
    assert found["tasks", "claimed_by"] == 8
    assert ("runs", "id") in found
    assert ("outbox", "run_id") in found


# -- the plan ----------------------------------------------------------------------------------------


def test_the_printed_plan_does_what_migrate_does(cluster: Cluster, empty: Connection) -> None:
    assert schema.pending(empty) == ["1 schema"]
    empty.execute(schema.print_plan(empty).encode())
    assert schema.pending(empty) == []
    assert schema.print_plan(empty) == ""
    with cluster.database() as url, connect(url, application_name="test") as installed:
        assert catalog(empty) == catalog(installed)


# -- check -------------------------------------------------------------------------------------------


def test_check_accepts_what_migrate_installed(db: Connection) -> None:
    schema.check(db)
    schema.check(db, schema.CLAIMANT_FUNCTIONS)


async def test_check_names_the_command_where_nothing_is_installed(
    empty: Connection, empty_database_url: str
) -> None:
    expected = (
        "this database has no Stepwell schema (looked for table stepwell.migrations): run `stepwell migrate`"
    )
    with pytest.raises(SchemaError) as raised:
        schema.check(empty)
    assert str(raised.value) == expected
    async with await connect_async(empty_database_url, application_name="test") as connection:
        with pytest.raises(SchemaError) as raised:
            await schema.check_async(connection)
    assert str(raised.value) == expected


async def test_check_names_both_versions_where_an_older_one_is(
    db: Connection, adb: psycopg.AsyncConnection[TupleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    message = r"version 1 of the Stepwell schema, this release needs 2: run `stepwell migrate`"
    with pytest.raises(SchemaError, match=message):
        schema.check(db)
    with pytest.raises(SchemaError, match=message):
        await schema.check_async(adb)


async def test_a_newer_schema_serves_as_long_as_it_has_the_functions(
    db: Connection, adb: psycopg.AsyncConnection[TupleRow]
) -> None:
    db.execute("insert into stepwell.migrations (version, name) values (7, 'of a later release')")
    schema.check(db, schema.CLAIMANT_FUNCTIONS)
    await schema.check_async(adb, schema.CLAIMANT_FUNCTIONS)
    db.execute("alter function stepwell.claim_v1 rename to claim_v2")
    schema.check(db)
    with pytest.raises(SchemaError, match=r"version 7 .* no claim_v1 any more"):
        schema.check(db, schema.CLAIMANT_FUNCTIONS)


def test_a_producer_passes_without_reading_the_version(cluster: Cluster, database_url: str) -> None:
    with as_role(cluster, database_url, "shop", "grant stepwell_producer to shop") as connection:
        schema.check(connection)
        with pytest.raises(SchemaError, match="schema's owner"):
            schema.migrate(connection)


def test_a_worker_may_read_the_version_but_not_change_it(cluster: Cluster, database_url: str) -> None:
    with as_role(cluster, database_url, "engine", "grant stepwell_worker to engine") as connection:
        schema.check(connection, schema.CLAIMANT_FUNCTIONS)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("delete from stepwell.migrations")


# -- schema.sql equals the migrations -----------------------------------------------------------------


def test_the_whole_schema_equals_the_sum_of_its_migrations(cluster: Cluster) -> None:
    numbered = migrations.numbered()
    steps = [step.sql for step in numbered] or [schema.schema_sql()]
    assert [step.version for step in numbered] in ([], list(range(1, schema.SCHEMA_VERSION + 1)))
    with cluster.database(template=None) as url, connect(url, application_name="test") as stepwise:
        for step in steps:
            stepwise.execute(step.encode())
        with cluster.database() as whole_url, connect(whole_url, application_name="test") as whole:
            assert catalog(stepwise) == catalog(whole)


def test_the_comparison_sees_a_difference(cluster: Cluster, db: Connection) -> None:
    changes: list[Callable[[], object]] = [
        lambda: db.execute("alter table stepwell.workers add column colour text"),
        lambda: db.execute("drop index stepwell.tasks_due"),
        lambda: db.execute("alter function stepwell.ring(text) set work_mem = '5MB'"),
        lambda: db.execute("grant select on stepwell.runs to stepwell_producer"),
        lambda: db.execute("alter table stepwell.tasks set (fillfactor = 71)"),
    ]
    before = catalog(db)
    for change in changes:
        change()
        after = catalog(db)
        assert after != before
        before = after


def catalog(connection: Connection) -> dict[str, list[TupleRow]]:
    """Return what the schema consists of, in words that do not depend on object ids or order of creation."""
    return {what: connection.execute(query.encode()).fetchall() for what, query in CATALOG.items()}


_HERE = "= 'stepwell'::regnamespace"
CATALOG = {
    "relations": f"""select relname, relkind, relpersistence, reloptions::text, relacl::text
                     from pg_class where relnamespace {_HERE} order by 1""",
    "columns": f"""select c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                          a.attidentity, a.attstorage, pg_get_expr(d.adbin, d.adrelid)
                   from pg_class c
                   join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                   left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
                   where c.relnamespace {_HERE} order by 1, 2""",
    "constraints": f"""select conrelid::regclass::text, conname, pg_get_constraintdef(oid)
                       from pg_constraint where connamespace {_HERE} order by 1, 2""",
    "indexes": "select indexname, indexdef from pg_indexes where schemaname = 'stepwell' order by 1",
    "functions": f"""select oid::regprocedure::text, pg_get_functiondef(oid), proacl::text
                     from pg_proc where pronamespace {_HERE} and prokind in ('f', 'p') order by 1""",
    "views": f"""select relname, pg_get_viewdef(oid) from pg_class
                 where relnamespace {_HERE} and relkind = 'v' order by 1""",
    "triggers": f"""select t.tgrelid::regclass::text, t.tgname, pg_get_triggerdef(t.oid)
                    from pg_trigger t join pg_class c on c.oid = t.tgrelid
                    where c.relnamespace {_HERE} and not t.tgisinternal order by 1, 2""",
    "types": f"""select typname, typtype from pg_type
                 where typnamespace {_HERE} and typtype <> 'b' order by 1""",
    "privileges": f"select nspacl::text from pg_namespace where oid {_HERE}",
    "comments": f"""select c.relname, d.objsubid, d.description from pg_description d
                    join pg_class c on c.oid = d.objoid and d.classoid = 'pg_class'::regclass
                    where c.relnamespace {_HERE} order by 1, 2""",
}


def release_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be the next release: one more column on workers."""
    change = "alter table stepwell.workers add column colour text;"
    first, second = Migration(1, "schema", schema.schema_sql()), Migration(2, "add_colour", change)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    monkeypatch.setattr(schema, "schema_sql", lambda: first.sql + change)
    monkeypatch.setattr(migrations, "numbered", lambda: [first, second])
