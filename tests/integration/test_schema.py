"""Installing the schema, bringing it up to date, and refusing to work without it."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox import schema
from outbox.database import connect, connect_async
from outbox.errors import SchemaError
from tests.postgres import Cluster
from tests.upgrade.catalog import catalog, differences
from tests.upgrade.versions import migration, release_next
from tests.waiting import wait_until

Connection = psycopg.Connection[TupleRow]

WHOLE = f"{schema.SCHEMA_VERSION} schema"
ALL_VERSIONS = list(range(1, schema.SCHEMA_VERSION + 1))
COLOUR = migration("add_colour", "alter table stepwell.workers add column colour text;", locks="workers")


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
    assert schema.migrate(empty) == [WHOLE]
    assert schema.migrate(empty) == []
    assert versions(empty) == ALL_VERSIONS


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
    assert applied == [WHOLE]


@pytest.mark.direct("the test holds a session's lock")
def test_migrate_waits_for_the_one_that_is_at_work(empty_database_url: str) -> None:
    applied: list[str] = []

    def install() -> None:
        with connect(empty_database_url, application_name="second migrate") as connection:
            applied.extend(schema.migrate(connection))

    with connect(empty_database_url, application_name="test") as first:
        first.execute("select pg_advisory_lock(%s)", [schema.MIGRATE_LOCK_KEY])
        second = threading.Thread(target=install)
        second.start()
        asks = (
            "select count(*) = 1 from pg_stat_activity where application_name = 'second migrate' "
            "and query like '%pg_try_advisory_lock%'"
        )
        wait_until(lambda: first.execute(asks).fetchone() == (True,))
        assert applied == []
        first.execute("select pg_advisory_unlock(%s)", [schema.MIGRATE_LOCK_KEY])
        second.join()
    assert applied == [WHOLE]


@pytest.mark.direct("the test holds a session's lock")
def test_migrate_gives_up_on_one_that_does_not_end(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "PATIENCE_SECONDS", 0.05)
    with (
        connect(empty_database_url, application_name="test") as first,
        connect(empty_database_url, application_name="test") as second,
    ):
        first.execute("select pg_advisory_lock(%s)", [schema.MIGRATE_LOCK_KEY])
        with pytest.raises(SchemaError, match="another `stepwell migrate`"):
            schema.migrate(second)
        assert second.execute("show lock_timeout").fetchone() == ("0",)


@pytest.mark.direct("the test holds a session's lock")
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
    assert schema.migrate(empty) == [WHOLE]


def test_an_older_database_gets_only_what_is_new(db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    release_next(monkeypatch, [COLOUR])
    title = f"{schema.SCHEMA_VERSION} add_colour"
    assert schema.pending(db) == [title]
    said: list[str] = []
    assert schema.migrate(db, tell=said.append) == [title]
    assert said == [f"applying migration {title}"]
    assert versions(db) == [*ALL_VERSIONS, schema.SCHEMA_VERSION]
    assert db.execute("select colour from stepwell.workers").fetchall() == []
    assert schema.pending(db) == []


def test_an_empty_database_records_every_version_at_once(
    empty: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    release_next(monkeypatch, [COLOUR])
    assert schema.migrate(empty) == [f"{schema.SCHEMA_VERSION} schema"]
    assert versions(empty) == [*ALL_VERSIONS, schema.SCHEMA_VERSION]


def test_a_newer_database_is_left_as_it_is(db: Connection) -> None:
    db.execute("insert into stepwell.migrations (version, name) values (77, 'of a later release')")
    assert schema.migrate(db) == []
    assert schema.installed_version(db) == 77


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


def test_the_printed_plan_does_what_migrate_does(
    cluster: Cluster, empty: Connection, empty_database_url: str, db: Connection
) -> None:
    assert schema.pending(empty) == [WHOLE]
    cluster.psql(empty_database_url, schema.print_plan(empty))
    assert schema.pending(empty) == []
    assert schema.print_plan(empty) == ""
    assert differences(catalog(empty), catalog(db)) == []


def test_the_printed_plan_does_not_run_beside_a_migrate(
    cluster: Cluster, empty: Connection, empty_database_url: str, db: Connection
) -> None:
    plan = schema.print_plan(empty)
    empty.execute("select pg_advisory_lock(%s)", [schema.MIGRATE_LOCK_KEY])
    with pytest.raises(subprocess.CalledProcessError) as raised:
        cluster.psql(empty_database_url, plan)
    assert "another `stepwell migrate` is at work" in raised.value.stderr
    assert schema.pending(empty) == [WHOLE]


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
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 77)
    message = (
        rf"version {len(ALL_VERSIONS)} of the Stepwell schema, this release needs 77: run `stepwell migrate`"
    )
    with pytest.raises(SchemaError, match=message):
        schema.check(db)
    with pytest.raises(SchemaError, match=message):
        await schema.check_async(adb)


async def test_a_newer_schema_serves_as_long_as_it_has_the_functions(
    db: Connection, adb: psycopg.AsyncConnection[TupleRow]
) -> None:
    db.execute("insert into stepwell.migrations (version, name) values (77, 'of a later release')")
    schema.check(db, schema.CLAIMANT_FUNCTIONS)
    await schema.check_async(adb, schema.CLAIMANT_FUNCTIONS)
    db.execute("alter function stepwell.claim_v1 rename to claim_v2")
    schema.check(db)
    with pytest.raises(SchemaError, match=r"version 77 .* no claim_v1 any more"):
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
