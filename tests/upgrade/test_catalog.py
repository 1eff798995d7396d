"""An upgraded database is a fresh one."""

from __future__ import annotations

import subprocess

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox import migrations, schema
from outbox.database import connect
from outbox.migrations import Migration
from tests.postgres import Cluster
from tests.upgrade.catalog import catalog, differences
from tests.upgrade.lock_watch import exclusive_locks
from tests.upgrade.versions import install

Connection = psycopg.Connection[TupleRow]

LATER = [each for each in migrations.numbered() if each.version > 1]


def test_every_version_has_its_migration() -> None:
    assert [each.version for each in migrations.numbered()] == list(range(1, schema.SCHEMA_VERSION + 1))


@pytest.mark.parametrize("version", range(1, schema.SCHEMA_VERSION + 1))
def test_a_database_that_was_upgraded_equals_a_fresh_one(
    cluster: Cluster, db: Connection, empty_database_url: str, version: int
) -> None:
    with connect(empty_database_url, application_name="test") as upgraded:
        install(upgraded, version)
        assert len(schema.migrate(upgraded)) == schema.SCHEMA_VERSION - version
        assert differences(catalog(upgraded), catalog(db)) == []
        rows = "select version, name from stepwell.migrations order by 1"
        assert upgraded.execute(rows).fetchall() == db.execute(rows).fetchall()


def test_the_printed_script_upgrades_as_migrate_does(
    cluster: Cluster, old_url: str, old_db: Connection, db: Connection
) -> None:
    script = schema.print_plan(old_db)
    cluster.psql(old_url, script)
    assert schema.pending(old_db) == []
    assert differences(catalog(old_db), catalog(db)) == []
    assert schema.print_plan(old_db) == ""


def test_a_printed_script_that_is_run_once_more_changes_nothing(
    cluster: Cluster, old_url: str, old_db: Connection
) -> None:
    script = schema.print_plan(old_db)
    cluster.psql(old_url, script)
    before = catalog(old_db)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        cluster.psql(old_url, script)
    assert "migrations_pkey" in raised.value.stderr
    assert catalog(old_db) == before


# -- what each migration may do ------------------------------------------------------------------------


FILES = (
    "select relname, pg_relation_filenode(oid) from pg_class where relnamespace = 'stepwell'::regnamespace"
)
FUNCTIONS = """
    select p.oid, n.nspname, p.oid::regprocedure::text, l.lanname
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace join pg_language l on l.oid = p.prolang
    where n.nspname ~ '^stepwell(_before_[0-9]+)?$'
"""


@pytest.mark.parametrize("migration", LATER, ids=str)
def test_a_migration_says_what_it_locks_and_breaks_nothing_that_is_in_use(
    empty_database_url: str, migration: Migration
) -> None:
    with connect(empty_database_url, application_name="test") as connection:
        install(connection, migration.version - 1)
        there = {name for sort, name in catalog(connection) if sort == "relation"}
        files = dict(connection.execute(FILES).fetchall())
        functions = {oid: rest for oid, *rest in connection.execute(FUNCTIONS)}
        if migration.in_transaction:
            with connection.transaction():
                connection.execute(migration.sql.encode())
                assert exclusive_locks(connection) & there == set(migration.locks)
        else:
            for statement in migrations.split(migration.sql) * 2:  # it may be cut short, and begins anew then
                connection.execute(statement.encode())
        rewritten = {name for name, file in connection.execute(FILES) if files.get(name, file) != file}
        assert not rewritten, "everybody would wait for that; see CONTRIBUTING.md"
        now = {oid: language for oid, *_, language in connection.execute(FUNCTIONS)}
        for oid, (home, name, language) in functions.items():
            assert home != "stepwell" or now.get(oid) == language, f"set {name} aside; see CONTRIBUTING.md"


def test_tasks_that_nobody_would_have_claimed_come_back(old_db: Connection) -> None:
    for priority in (-1, 0, 5, 9, 12):
        run = old_db.execute("select stepwell.enqueue('w')").fetchone()
        assert run is not None
        old_db.execute("update stepwell.tasks set priority = %s where run_id = %s", [priority, run[0]])
    schema.migrate(old_db)
    assert old_db.execute("select priority from stepwell.tasks order by id").fetchall() == [
        (0,), (0,), (5,), (9,), (9,),
    ]  # fmt: skip
    with pytest.raises(psycopg.errors.CheckViolation):
        old_db.execute("update stepwell.tasks set priority = 10")


# -- the comparison itself -----------------------------------------------------------------------------


def test_the_comparison_sees_a_difference(db: Connection) -> None:
    changes = [
        "alter table stepwell.workers add column colour text",
        "alter table stepwell.runs alter column queue set default 'other'",
        "alter table stepwell.runs alter column queue drop not null",
        "alter table stepwell.runs alter column output set storage extended",
        "alter table stepwell.runs alter column workflow set statistics 500",
        "alter table stepwell.tasks add constraint tasks_seq check (seq >= 0) not valid",
        "alter table stepwell.tasks validate constraint tasks_seq",
        "drop index stepwell.tasks_due",
        "create index tasks_due on stepwell.tasks (due_at) where state = 'waiting'",
        "update pg_index set indisvalid = false where indexrelid = 'stepwell.tasks_due'::regclass",
        "alter function stepwell.ring(text) set work_mem = '5MB'",
        "alter function stepwell.ring(text) security definer",
        "create or replace function stepwell.poisoned(poison_after int) returns json language sql immutable as 'select null::json'",
        "grant select on stepwell.runs to stepwell_producer",
        "grant select (id) on stepwell.tasks to stepwell_producer",
        "grant execute on function stepwell.ring to public",
        "grant usage on schema stepwell to public",
        "alter table stepwell.tasks set (fillfactor = 71)",
        "alter table stepwell.runs set (toast.autovacuum_enabled = false)",
        "alter table stepwell.doorbell set logged",
        "alter table stepwell.runs enable row level security",
        "alter sequence stepwell.turns cache 7",
        "alter type stepwell.transition_v1 add attribute colour text",
        "create type stepwell.colour as enum ('red')",
        "alter type stepwell.colour add value 'green'",
        "create statistics stepwell.both on queue, name from stepwell.tasks",
        "create rule quiet as on update to stepwell.migrations do instead nothing",
        "comment on table stepwell.runs is 'other'",
        "alter default privileges in schema stepwell grant select on tables to stepwell_viewer",
    ]  # fmt: skip
    before = catalog(db)
    for change in changes:
        db.execute(change.encode())
        after = catalog(db)
        assert differences(before, after), change
        before = after


def test_the_comparison_takes_no_notice_of_the_order_in_which_things_were_made(db: Connection) -> None:
    db.execute("grant select on stepwell.keys to stepwell_producer")
    db.execute("alter table stepwell.keys add column one int, add column other int")
    db.execute("alter table stepwell.keys set (fillfactor = 80, parallel_workers = 2)")
    before = catalog(db)
    db.execute("alter table stepwell.keys drop column one")
    db.execute("alter table stepwell.keys add column one int")
    db.execute("revoke select on stepwell.keys from stepwell_viewer, stepwell_producer")
    db.execute("grant select on stepwell.keys to stepwell_viewer")
    db.execute("grant select on stepwell.keys to stepwell_producer")
    db.execute("alter table stepwell.keys reset (fillfactor)")
    db.execute("alter table stepwell.keys set (fillfactor = 80)")
    assert differences(before, catalog(db)) == []


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("-- only\n-- comments\n", []),
        ("-- Purpose: one.\n\nselect 1;\n\nselect 2\n", ["-- Purpose: one.\n\nselect 1", "select 2"]),
        ("select ';'; select \"a;b\" -- no; end\n; do $$ begin; end; $$; ",
         ["select ';'", 'select "a;b" -- no; end', "do $$ begin; end; $$"]),
        ("do $a$ select $$;$$; $a$; /* not; one */ select 'it''s;'", ["do $a$ select $$;$$; $a$", "/* not; one */ select 'it''s;'"]),
        ("select 3 - 1 / 2; select $1", ["select 3 - 1 / 2", "select $1"]),
    ],
)  # fmt: skip
def test_a_script_is_split_where_its_statements_end(text: str, statements: list[str]) -> None:
    assert migrations.split(text) == statements


@pytest.mark.parametrize(
    "text",
    [
        "select 1",
        "-- Transaction: one.\nselect 1",
        "-- Locks: none.\nselect 1",
        "-- Transaction: some.\n-- Locks: none.\nselect 1",
        "-- Transaction: one.\n-- Locks: the tasks.\nselect 1",
    ],
)
def test_a_migration_whose_header_leaves_something_out_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"0002_some\.sql must begin with comments"):
        migrations.read(2, "some", text)


def test_a_migration_is_read_from_its_header() -> None:
    text = "-- Purpose: one.\n-- Transaction: none.\n-- Locks: runs, tasks.\n\nselect 1;\n"
    assert migrations.read(2, "some", text) == Migration(2, "some", text, ("runs", "tasks"), False)
