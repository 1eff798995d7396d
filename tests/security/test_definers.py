"""What runs with the owner's rights cannot be turned against the owner: whatever the caller's session looks like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from uuid import UUID

import psycopg
import pytest

from tests.security.members import Db, Member, member_of

PINNED = "search_path=pg_catalog, stepwell, pg_temp"

UNPINNED = frozenset(
    {
        "new_id",
        "claimed_as",
        "at_or_after",
        "comes_after",
        "poisoned",
        "beyond",
        "forgotten_fault",
        "size_of",
        "fits",
    }
)
"""One expression each, of what pg_catalog has. Called by the others, they are read by the path of these."""


@pytest.fixture
def producer(database_url: str, db: Db) -> Iterator[Member]:
    with member_of("stepwell_producer", database_url, db) as member:
        yield member


def everything_works(producer: Member) -> UUID:
    """Call all that a producer may call; return a run."""
    run: UUID = producer.one(
        "select stepwell.enqueue('w', '{\"a\": 1}'::pg_catalog.json, key => 'k', labels => '{}')"
    )
    assert producer.one("select stepwell.enqueue('w', key => 'k')") == run
    many = "select id from stepwell.enqueue_many('w', array['{}']::pg_catalog.json[], keys => array['k'])"
    assert producer.one(many) == run
    assert producer.one("select stepwell.signal(%s, 'go', '1'::pg_catalog.json)", run)
    assert producer.one("select stepwell.cancel(%s)", run)
    assert producer.one("select stepwell.current_version('w')") == "7"
    return run


def what_is_there(db: Db) -> tuple[int, ...] | None:
    return db.execute(
        """select (select count(*) from stepwell.runs), (select count(*) from stepwell.keys),
                  (select count(*) from stepwell.tasks), (select count(*) from stepwell.signals)"""
    ).fetchone()


def publish(db: Db) -> None:
    db.execute("insert into stepwell.workflows values ('w', '7', '{}')")


def test_every_function_that_could_be_misled_pins_its_search_path(db: Db) -> None:
    rows = db.execute(
        "select proname, prosecdef, coalesce(proconfig, '{}') from pg_proc where pronamespace = 'stepwell'::regnamespace"
    ).fetchall()
    unpinned = {name for name, _, config in rows if PINNED not in config}
    assert unpinned == UNPINNED
    assert not {name for name, definer, _ in rows if definer} & unpinned


def test_no_function_builds_a_statement_out_of_text(db: Db) -> None:
    """EXECUTE of a text that a caller has a say in would be the owner's statement."""
    rows = db.execute(
        """select proname from pg_proc
           where pronamespace = 'stepwell'::regnamespace and prosrc ~* '\\mexecute\\M' and prosrc !~* 'for execute'"""
    ).fetchall()
    assert rows == []


def test_objects_of_the_caller_are_never_reached(producer: Member, db: Db) -> None:
    """Tables, functions, operators, types and casts under every name that the functions could use for theirs."""
    publish(db)
    db.execute(f"create schema hostile authorization {producer.name}".encode())
    mine = producer.db
    tables = db.execute(
        "select relname from pg_class where relnamespace = 'stepwell'::regnamespace and relkind in ('r', 'v', 'S')"
    ).fetchall()
    for (table,) in tables:
        mine.execute(f"create temp table {table} (caught text)".encode())
        mine.execute(f"create table hostile.{table} (caught text)".encode())
    spy = "begin raise exception 'caught as %', current_user; end"
    shadowed = 0
    functions = db.execute(
        """select p.proname, pg_get_function_identity_arguments(p.oid), p.prorettype::regtype::text
           from pg_proc p
           where p.prokind = 'f' and p.prorettype <> 'trigger'::regtype and not p.proretset
             and (p.pronamespace = 'stepwell'::regnamespace
                  or p.pronamespace = 'pg_catalog'::regnamespace and p.proname in (
                      'octet_length', 'json_typeof', 'jsonb_typeof', 'clock_timestamp', 'cardinality', 'isfinite',
                      'json_build_object', 'array_position', 'pg_notify', 'gen_random_uuid', 'nextval', 'now',
                      'encode', 'set_bit', 'overlay', 'uuid_send', 'int8send'))"""
    ).fetchall()
    for name, arguments, returns in functions:
        for schema in ("hostile", "pg_temp"):
            with suppress(psycopg.errors.FeatureNotSupported, psycopg.errors.DuplicateFunction):  # of "any"
                mine.execute(
                    f"create function {schema}.{name}({arguments}) returns {returns}"
                    f" language plpgsql as $spy$ {spy} $spy$".encode()
                )
                shadowed += 1
    assert shadowed > 80
    for kind in ("text", "uuid", "int"):
        mine.execute(
            f"create function hostile.spy({kind}, {kind}) returns bool language plpgsql as $spy$ {spy} $spy$".encode()
        )
    for operator in ("=", "<>", "<", ">", "<=", ">="):
        for kind in ("text", "uuid", "int"):
            mine.execute(
                f"create operator hostile.{operator} (leftarg = {kind}, rightarg = {kind}, function = hostile.spy)".encode()
            )
    for kind in ("text", "json", "uuid", "int4range", "transition_v1"):
        mine.execute(f"create domain hostile.{kind} as pg_catalog.bool".encode())

    for path in ("pg_temp, hostile, stepwell, pg_catalog", "hostile, pg_catalog", "pg_temp", "hostile", ""):
        mine.execute("select pg_catalog.set_config('search_path', %s, false)", [path])
        everything_works(producer)
    mine.execute("set search_path = pg_catalog")
    with pytest.raises(psycopg.errors.RaiseException, match="caught as"):  # they would have been heard of
        mine.execute("select hostile.octet_length('x'::text)")
    for (table,) in tables:
        for schema in ("pg_temp", "hostile"):
            assert producer.one(f"select count(*) from {schema}.{table}") == 0
    assert what_is_there(db) == (1, 1, 11, 5)


def test_settings_of_the_callers_session_change_nothing(producer: Member, db: Db) -> None:
    publish(db)
    settings = {
        "datestyle": "SQL, DMY",
        "intervalstyle": "sql_standard",
        "timezone": "Pacific/Kiritimati",
        "bytea_output": "escape",
        "extra_float_digits": "-15",
        "client_encoding": "LATIN1",
        "array_nulls": "off",
        "transform_null_equals": "on",
        "quote_all_identifiers": "on",
        "backslash_quote": "off",
        "check_function_bodies": "off",
        "default_transaction_isolation": "serializable",
        "role": "none",
        "row_security": "off",
        "session_preload_libraries": None,
        "work_mem": "64",
        "enable_indexscan": "off",
        "lc_numeric": "C",
        "application_name": "stepwell 1",
    }  # fmt: skip
    for name, value in settings.items():
        if value is not None:
            producer.db.execute("select set_config(%s, %s, false)", [name, value])
    run = everything_works(producer)
    assert run.version == 7
    row = db.execute(
        "select abs(extract(epoch from clock_timestamp() - created_at)) < 600, input::text from stepwell.runs"
    ).fetchone()
    assert row == (True, '{"a": 1}')


def test_the_owners_rights_end_with_the_call(producer: Member, db: Db) -> None:
    """Also where it fails in the middle of a transaction, with a savepoint around it."""
    publish(db)
    everything_works(producer)
    with producer.db.transaction(), suppress(psycopg.Error), producer.db.transaction():
        producer.db.execute("select stepwell.enqueue('w', '[1]')")
    assert producer.one("select current_user") == producer.name
    assert producer.is_refused("select * from stepwell.runs")


def test_what_a_caller_is_told_of_an_error_holds_nothing_of_others(producer: Member, db: Db) -> None:
    """A key that is known gives the run that has it; neither that nor a refusal shows an input."""
    secret = "a-secret-of-somebody-else"
    db.execute("select stepwell.enqueue('w', %s, key => 'k')", [f'{{"a": "{secret}"}}'])
    heard: list[str] = []
    producer.db.add_notice_handler(lambda notice: heard.append(str(notice.message_primary)))
    said: list[str] = []
    for statement in (
        "select stepwell.enqueue('w', '{\"a\": 2}', key => 'k')",
        "select stepwell.enqueue('w', '{\"a\": ', key => 'k')",
        "select stepwell.enqueue('w', key => repeat('k', 600))",
        "select stepwell.enqueue(null, key => 'k')",
        "select stepwell.enqueue('w', key => 'k', priority => 99)",
        "select stepwell.signal((select stepwell.enqueue('w', key => 'k')), 'go', '1')",
    ):
        try:
            said.append(str(producer.db.execute(statement.encode()).fetchall()))
        except psycopg.Error as error:
            diagnosis = error.diag
            said += [
                str(error),
                *map(str, (diagnosis.message_detail, diagnosis.context, diagnosis.internal_query)),
            ]
    assert len(said) > 6
    assert secret not in " ".join([*said, *heard])
