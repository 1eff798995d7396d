"""Migrating while everybody works: nobody waits for long, whatever is in the way, and whatever is cut short."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from outbox import migrations, schema
from outbox.database import connect
from outbox.errors import SchemaError
from outbox.migrations import Migration
from tests.postgres import Cluster
from tests.upgrade import previous
from tests.upgrade.lock_watch import LONGEST_MS, LockWatch, starved_ms
from tests.upgrade.versions import migration, release_next
from tests.waiting import wait_until

Connection = psycopg.Connection[TupleRow]

COLOUR = migration("colour", "alter table stepwell.tasks add column colour text;", locks="tasks")
INDEX = migration(
    "index",
    """
    drop index concurrently if exists stepwell.tasks_colour;
    create index concurrently tasks_colour on stepwell.tasks (name);
    """,
    transaction="none",
)
WAITING = "select exists (select from pg_stat_progress_create_index where phase like 'waiting for writers%')"


@contextlib.contextmanager
def in_a_thread(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run something beside the block, and raise at its end what it has raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(60)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


@contextlib.contextmanager
def open_transaction(url: str) -> Iterator[Connection]:
    """Yield a service's connection that has enqueued a run and not committed yet."""
    with connect(url, application_name="a service", autocommit=False) as service:
        service.execute("select stepwell.enqueue('slow')")
        yield service


class Producer:
    """Enqueues one run after the other until the end of the block, by a session of its own."""

    def __init__(self, url: str) -> None:
        self.enqueued = 0
        self._url = url
        self._done = threading.Event()
        self._around = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._around.enter_context(in_a_thread(self._run))
        self._around.callback(self._done.set)
        try:
            wait_until(lambda: self.enqueued > 5)
        except BaseException:
            self._around.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._around.close()

    def go_on(self, count: int = 20) -> None:
        before = self.enqueued
        wait_until(lambda: self.enqueued >= before + count)

    def _run(self) -> None:
        with connect(self._url, application_name="a producer") as connection:
            while not self._done.is_set():
                connection.execute("select stepwell.enqueue('quick')")
                self.enqueued += 1


def versions(connection: Connection) -> list[int]:
    rows = connection.execute("select version from stepwell.migrations order by 1").fetchall()
    return [version for (version,) in rows]


def valid(connection: Connection, index: str) -> bool | None:
    """Tell whether an index is there and can be used; None when it is not there."""
    row = connection.execute(
        "select indisvalid from pg_index where indexrelid = to_regclass(%s)", [f"stepwell.{index}"]
    ).fetchone()
    return row[0] if row else None


def linger(seconds: float) -> None:
    """Let a wait grow."""
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() > begun + seconds)


def dbname(url: str) -> str:
    return str(conninfo_to_dict(url)["dbname"])


# -- a lock that others are in the way of --------------------------------------------------------------


def test_nobody_waits_for_a_migration_that_waits_for_an_open_transaction(
    cluster: Cluster, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release_next(monkeypatch, [COLOUR])
    watch = LockWatch(cluster, dbname(database_url))
    said: list[str] = []
    with connect(database_url, application_name="migrator") as migrator:
        pid = migrator.info.backend_pid
        with (
            Producer(database_url) as producer,
            open_transaction(database_url) as service,
            in_a_thread(lambda: schema.migrate(migrator, tell=said.append)),
        ):
            in_the_way = f"waits for the transaction of process {service.info.backend_pid}"
            wait_until(lambda: any(in_the_way in each for each in said), what="tries in vain")
            linger(1.0)  # and some more
            producer.go_on()
            service.commit()
        assert versions(migrator)[-1] == schema.SCHEMA_VERSION
        longest = LONGEST_MS + starved_ms(pid)
        assert [wait for wait in watch.waits(pid) if wait.waited_ms > longest] == []


def test_without_that_everybody_would_wait(cluster: Cluster, database_url: str) -> None:
    """The same, the way one would write it: the watch sees who has to wait for whom."""
    watch = LockWatch(cluster, dbname(database_url))
    with connect(database_url, application_name="migrator") as migrator:
        pid = migrator.info.backend_pid
        with (
            Producer(database_url),
            open_transaction(database_url) as service,
            in_a_thread(lambda: migrator.execute("alter table stepwell.tasks add column colour text")),
        ):
            wait_until(lambda: "RowExclusiveLock on relation" in watch.said(), what="the producer to wait")
            linger(0.5)
            service.commit()
        assert [wait for wait in watch.waits(pid) if wait.waited_ms > LONGEST_MS + starved_ms(pid)]


def test_the_watch_tells_who_has_waited_for_how_long_behind_whom(cluster: Cluster, database_url: str) -> None:
    watch = LockWatch(cluster, dbname(database_url))
    with (
        connect(database_url, application_name="holder", autocommit=False) as holder,
        connect(database_url, application_name="other") as other,
    ):
        holder.execute("lock table stepwell.tasks in access exclusive mode")

        def read() -> None:
            with connect(database_url, application_name="reader") as reader:
                reader.execute("select count(*) from stepwell.tasks")

        with in_a_thread(read):
            wait_until(lambda: watch.waits(holder.info.backend_pid))
            linger(0.3)
            holder.commit()
        (wait,) = watch.waits(holder.info.backend_pid)
        assert wait.waited_ms > 400
        assert wait.lock.startswith("AccessShareLock on relation")
        assert watch.waits(other.info.backend_pid) == []


def test_a_migration_gives_up_and_says_who_was_in_the_way(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = versions(db)
    release_next(
        monkeypatch, [migration("first", "comment on table stepwell.runs is 'x';", locks="runs"), COLOUR]
    )
    monkeypatch.setattr(schema, "PATIENCE_SECONDS", 1.0)
    with open_transaction(database_url) as service:
        with pytest.raises(SchemaError) as raised:
            schema.migrate(db)
        message = str(raised.value)
        assert "found no moment in which no transaction was using what it changes" in message
        assert f"process {service.info.backend_pid} has one open" in message
        assert "run `stepwell migrate` again when that has ended" in message
        # What was done is done, and nothing is held that would keep the next one from trying.
        assert versions(db) == [*before, before[-1] + 1]
        held = "select count(*) from pg_locks where pid = pg_backend_pid() and locktype in ('advisory', 'relation') and mode <> 'AccessShareLock'"
        assert db.execute(held).fetchone() == (0,)
        service.commit()
    assert schema.migrate(db) == [f"{before[-1] + 2} colour"]


def test_a_prepared_transaction_in_the_way_is_told_as_such(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    release_next(monkeypatch, [COLOUR])
    monkeypatch.setattr(schema, "PATIENCE_SECONDS", 1.0)
    with open_transaction(database_url) as service:
        service.execute("prepare transaction 'forgotten'")
    with pytest.raises(SchemaError, match="of a prepared transaction"):
        schema.migrate(db)
    db.execute("rollback prepared 'forgotten'")


@pytest.mark.slow
def test_an_autovacuum_gives_way_to_a_migration(
    cluster: Cluster, database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so for whoever waits for a second; one who tries for 50 ms at a time would wait for its end."""
    release_next(monkeypatch, [COLOUR])
    watch = LockWatch(cluster, dbname(database_url))
    db.execute(
        "alter table stepwell.tasks set (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)"
    )
    db.execute(
        "insert into stepwell.tasks (run_id, name) select gen_random_uuid(), 'w' from generate_series(1, 20000)"
    )
    db.execute("delete from stepwell.tasks")
    at_work = "select count(*) from pg_stat_progress_vacuum where relid = 'stepwell.tasks'::regclass and datname = current_database()"
    wait_until(lambda: db.execute(at_work).fetchone() == (1,), 60, what="an autovacuum of the tasks")
    with connect(database_url, application_name="migrator") as migrator:
        assert schema.migrate(migrator) == [f"{schema.SCHEMA_VERSION} colour"]
    assert "canceling autovacuum task" in watch.said()


def test_no_lock_waits_for_a_client_that_is_frozen_or_gone(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the lock to the commit it is one statement, so its answer may as well never be read."""
    release_next(monkeypatch, [COLOUR])
    statement = migrations.applying(migrations.numbered()[-1], 60).statements[0]
    with connect(database_url, application_name="frozen") as frozen:
        frozen.pgconn.send_query(statement.encode())
        wait_until(lambda: versions(db)[-1] == schema.SCHEMA_VERSION, what="the version to be committed")
        db.execute("select stepwell.enqueue('w')")
        frozen.pgconn.finish()


def test_the_time_outs_of_a_role_cut_nothing_short(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeping = "do $$ begin perform pg_sleep(1.5); end $$;"
    release_next(monkeypatch, [migration("one", sleeping), migration("none", sleeping, transaction="none")])
    impatient = f"{database_url}&options=-c%20statement_timeout%3D1000%20-c%20lock_timeout%3D1"
    with connect(impatient, application_name="test") as connection:
        assert len(schema.migrate(connection)) == 2
        assert connection.execute("show statement_timeout").fetchone() == ("1s",)
        assert connection.execute("show lock_timeout").fetchone() == ("1ms",)


# -- what runs in no transaction -----------------------------------------------------------------------


def test_an_index_is_built_while_others_wait_for_their_turn_to_migrate(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for every transaction, and so would for theirs, if they waited for it in one."""
    release_next(monkeypatch, [INDEX])
    applied: list[str] = []

    def migrate() -> None:
        with connect(database_url, application_name="a migrate") as connection:
            applied.extend(schema.migrate(connection))

    with contextlib.ExitStack() as stack, open_transaction(database_url) as service:
        stack.enter_context(in_a_thread(migrate))
        wait_until(lambda: db.execute(WAITING).fetchone() == (True,), what="the index to wait")
        for _ in range(3):
            stack.enter_context(in_a_thread(migrate))
        asking = (
            "select count(*) from pg_stat_activity "
            "where application_name = 'a migrate' and query like '%advisory_lock%'"
        )
        wait_until(lambda: db.execute(asking).fetchone() == (3,), what="three more to ask for their turn")
        service.commit()
    assert applied == [f"{schema.SCHEMA_VERSION} index"]
    assert valid(db, "tasks_colour") is True


def test_rows_are_changed_in_batches_that_commit(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(25):
        db.execute("select stepwell.enqueue('w')")
    backfill = """
        do $$
        begin
            loop
                update stepwell.runs set tenant = 'none'
                where id in (select id from stepwell.runs where tenant is null limit 10);
                exit when not found;
                commit;
            end loop;
        end
        $$;
        """
    release_next(monkeypatch, [migration("tenant", backfill, transaction="none")])
    schema.migrate(db)
    assert db.execute(
        "select count(*), count(distinct xmin::text) from stepwell.runs where tenant = 'none'"
    ).fetchone() == (25, 3)


# -- what is cut short ---------------------------------------------------------------------------------


@pytest.fixture
def killed_while(database_url: str, db: Connection, tmp_path: Path) -> Callable[[Migration, str], None]:
    """Start a migrate in a process of its own, and SIGKILL it when a statement says that it has got so far."""

    def kill(made: Migration, so_far: str) -> None:
        file = tmp_path / f"{made.version:04}_{made.name}.sql"
        file.write_text(made.sql)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.upgrade.migrator", database_url, str(file)], cwd=previous.ROOT,
        )  # fmt: skip
        try:
            wait_until(lambda: db.execute(so_far.encode()).fetchone() == (True,), what=so_far)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        gone = "select count(*) = 0 from pg_stat_activity where application_name = 'stepwell cli'"
        wait_until(lambda: db.execute(gone).fetchone() == (True,), what="the server to notice")

    return kill


def test_an_index_that_a_kill_has_left_half_built_is_built_anew(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch,
    killed_while: Callable[[Migration, str], None],
) -> None:  # fmt: skip
    before = versions(db)
    with open_transaction(database_url):
        killed_while(INDEX, WAITING)
        assert valid(db, "tasks_colour") is False
        assert versions(db) == before
    release_next(monkeypatch, [INDEX])
    assert schema.migrate(db) == [f"{schema.SCHEMA_VERSION} index"]
    assert valid(db, "tasks_colour") is True
    assert schema.migrate(db) == []


def test_a_step_that_a_kill_has_cut_short_is_taken_anew(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch,
    killed_while: Callable[[Migration, str], None],
) -> None:  # fmt: skip
    slow = migration(
        "colour", "alter table stepwell.tasks add column colour text;\nselect pg_sleep(600);", locks="tasks"
    )
    in_the_middle = (
        "select exists (select from pg_locks where relation = 'stepwell.tasks'::regclass and granted"
        " and mode = 'AccessExclusiveLock')"
    )
    before = versions(db)
    killed_while(slow, in_the_middle)
    assert versions(db) == before
    release_next(monkeypatch, [COLOUR])
    assert schema.migrate(db) == [f"{schema.SCHEMA_VERSION} colour"]


def test_a_step_that_fails_leaves_nothing_and_lets_the_next_one_try(
    db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = versions(db)
    with monkeypatch.context() as first:
        release_next(first, [migration("colour", COLOUR.sql + "select 1 / 0;", locks="tasks")])
        with pytest.raises(psycopg.errors.DivisionByZero):
            schema.migrate(db)
    assert versions(db) == before
    release_next(monkeypatch, [COLOUR])
    assert schema.migrate(db) == [f"{schema.SCHEMA_VERSION} colour"]


def test_any_number_of_migrates_upgrade_once(old_url: str) -> None:
    applied: list[str] = []

    def migrate() -> None:
        with connect(old_url, application_name="test") as connection:
            applied.extend(schema.migrate(connection))

    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(in_a_thread(migrate))
    assert applied == [str(each) for each in migrations.numbered() if each.version > previous.SCHEMA_VERSION]


# -- a function whose parameters or language change ----------------------------------------------------

SIGNAL = "stepwell.signal(uuid, text, json, text)"
ANEW = """
    create function stepwell.signal(run uuid, name text, payload json default 'null', trace text default null, colour text default null)
    returns boolean language plpgsql security definer
        set search_path = pg_catalog, stepwell, pg_temp
    as $$ begin return colour is not null; end $$;
    revoke all on function stepwell.signal from public;
    """
MANY_SIGNALS = """
    select count(stepwell.signal(case when i > 40 then (select id from stepwell.runs limit 1) else gen_random_uuid() end, 'go'))
    from generate_series(1, 60) i where pg_sleep(0.03) is not null
"""
MANY_ENQUEUED = """
    select count(stepwell.enqueue('w', key => case when i > 40 then i::text end))
    from generate_series(1, 60) i where pg_sleep(0.03) is not null
"""


def many_calls(db: Connection, url: str, statement: str) -> int:
    """Call a function sixty times by one statement, and migrate in the middle of it; return how often it has answered.

    A session learns of what others have changed when it locks a table for the first time, as the 41st call does.
    """
    db.execute("select stepwell.enqueue('w')")
    answered: list[int] = []

    def call() -> None:
        with connect(url, application_name="a service") as service:
            row = service.execute(statement.encode()).fetchone()
            assert row is not None
            answered.append(row[0])

    with in_a_thread(call):
        under_way = (
            "select count(*) = 1 from pg_stat_activity where application_name = 'a service' and wait_event = 'PgSleep' "
            "and query_start < clock_timestamp() - interval '200 ms'"
        )
        wait_until(lambda: db.execute(under_way).fetchone() == (True,))
        schema.migrate(db)
    return answered[0]


def test_a_statement_goes_on_with_the_function_that_it_has_begun_with(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = f"stepwell_before_{schema.SCHEMA_VERSION + 1}"
    aside = f"create schema {home}; alter function {SIGNAL} set schema {home};"
    release_next(monkeypatch, [migration("colour", aside + ANEW)])
    assert many_calls(db, database_url, MANY_SIGNALS) == 60
    assert db.execute("select count(*) from stepwell.signals").fetchone() == (20,)
    run = db.execute("select id from stepwell.runs").fetchone()
    assert run is not None
    assert db.execute("select stepwell.signal(%s, 'go')", run).fetchone() == (False,)
    assert db.execute("select stepwell.signal(%s, 'go', colour => 'red')", run).fetchone() == (True,)


def test_dropped_under_it_the_function_would_fail(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is why it is set aside: see CONTRIBUTING.md."""
    release_next(monkeypatch, [migration("colour", f"drop function {SIGNAL};" + ANEW)])
    with pytest.raises(psycopg.Error, match=r"cache lookup failed for function|does not exist"):
        many_calls(db, database_url, MANY_SIGNALS)


def test_a_statement_goes_on_enqueueing_while_this_release_migrates(old_url: str, old_db: Connection) -> None:
    assert many_calls(old_db, old_url, MANY_ENQUEUED) == 60
    assert schema.pending(old_db) == []
