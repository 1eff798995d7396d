"""What `make migration` drafts does what it says."""

from __future__ import annotations

import psycopg
from psycopg.rows import TupleRow

from outbox import schema
from outbox.database import connect
from tests.upgrade.catalog import catalog, differences
from tests.upgrade.draft import draft

Connection = psycopg.Connection[TupleRow]


def changed(whole: str, *changes: tuple[str, str]) -> str:
    for before, after in changes:
        assert before in whole
        whole = whole.replace(before, after, 1)
    return whole


def test_a_draft_of_changed_functions_makes_what_schema_sql_makes(
    db: Connection, empty_database_url: str
) -> None:
    whole = changed(
        schema.schema_sql(),
        ("perform pg_notify('stepwell', on_queue);", "perform pg_notify('stepwell', upper(on_queue));"),
        ("trace text default null) returns boolean", "trace text default null, colour text default null) returns boolean"),
        ("-- Ask for the end of a run", ADDED + "-- Ask for the end of a run"),
        ("stepwell.signal, stepwell.cancel,", "stepwell.signal, stepwell.cancel, stepwell.added,"),
        (PAUSE, PAUSE_IN_PLPGSQL),
    )  # fmt: skip
    with connect(empty_database_url, application_name="test") as fresh:
        fresh.execute(whole.encode())
        want = catalog(fresh)
    text = draft(catalog(db), want, whole, 99)
    assert "TO DO" not in text
    assert "alter function stepwell.signal(uuid,text,json,text) set schema stepwell_before_99;" in text
    assert "alter function stepwell.pause(uuid) set schema stepwell_before_99;" in text
    assert "create or replace function stepwell.ring(" in text
    db.execute(text.encode())
    assert differences(catalog(db), want) == []


PAUSE = """    language sql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
    select cardinality(stepwell.pause_many(array[run])) > 0
$$;
"""
PAUSE_IN_PLPGSQL = """    language plpgsql
    set search_path = pg_catalog, stepwell, pg_temp
as $$
begin
    return cardinality(stepwell.pause_many(array[run])) > 0;
end
$$;
"""
ADDED = """create function stepwell.added(a int) returns int
    language sql
as $$
    select a
$$;

"""


def test_a_draft_says_what_it_leaves_to_a_person(db: Connection, empty_database_url: str) -> None:
    whole = changed(
        schema.schema_sql(),
        ("    seed        uuid, ", "    seed        uuid not null default gen_random_uuid(), "),
        ("create index tasks_due ", "create index tasks_soon "),
    )
    with connect(empty_database_url, application_name="test") as fresh:
        fresh.execute(whole.encode())
        want = catalog(fresh)
    left = [line for line in draft(catalog(db), want, whole, 99).splitlines() if "TO DO" in line]
    for thing in ("column runs.seed", "index stepwell.tasks_due", "index stepwell.tasks_soon"):
        assert any(line.startswith(f"-- TO DO: {thing}: ") for line in left), thing
