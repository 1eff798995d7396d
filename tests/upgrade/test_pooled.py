"""Migrating through a PgBouncer, where no lock can be held from one step to the next."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox import migrations, schema
from outbox.database import connect
from outbox.errors import SchemaError
from outbox.migrations import Migration
from tests.pooler import Pooler
from tests.postgres import Cluster
from tests.upgrade import previous
from tests.upgrade.versions import migration, release_next


def migrated(url: str) -> list[str]:
    with connect(url, application_name="a migrate") as connection:
        return schema.migrate(connection)


def test_an_older_database_is_brought_up_to_date_through_a_pooler(
    bouncer: Pooler, old_url: str, old_db: psycopg.Connection[TupleRow]
) -> None:
    later = [str(each) for each in migrations.numbered() if each.version > previous.SCHEMA_VERSION]
    assert migrated(bouncer.warmed(old_url)) == later
    assert migrated(bouncer.warmed(old_url)) == []
    assert schema.installed_version(old_db) == schema.SCHEMA_VERSION


@pytest.mark.parametrize("installed", [True, False], ids=["older", "empty"])
def test_of_several_who_migrate_at_once_each_step_is_taken_by_one(
    bouncer: Pooler, cluster: Cluster, old_url: str, installed: bool
) -> None:
    many = 4
    with cluster.database(template=None) as empty, ThreadPoolExecutor(many) as threads:
        url = bouncer.warmed(old_url if installed else empty)
        ready = Barrier(many)

        def all_at_once(_: int) -> list[str]:
            ready.wait(30)
            return migrated(url)

        applied = [title for each in threads.map(all_at_once, range(many)) for title in each]
    later = [str(each) for each in migrations.numbered() if each.version > previous.SCHEMA_VERSION]
    assert sorted(applied) == (later if installed else [f"{schema.SCHEMA_VERSION} schema"])


def test_a_step_that_needs_a_session_says_where_to_go_and_goes_on_there(
    bouncer: Pooler, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    first = migration("colour", "alter table stepwell.tasks add column colour text;", locks="tasks")
    second = migration(
        "index",
        """
        drop index concurrently if exists stepwell.tasks_colour;
        create index concurrently tasks_colour on stepwell.tasks (name);
        """,
        transaction="none",
    )
    release_next(monkeypatch, [first, second])
    with pytest.raises(SchemaError, match=r"index needs a session of its own.*STEPWELL_DIRECT_DATABASE_URL"):
        migrated(bouncer.warmed(database_url))
    assert migrated(database_url) == [f"{schema.SCHEMA_VERSION} index"]


def test_a_step_that_fails_by_itself_is_not_taken_for_anybody_elses(
    bouncer: Pooler, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    twice = "insert into stepwell.migrations (version, name) values (1, 'again');"
    release_next(monkeypatch, [Migration(0, "twice", twice)])
    with pytest.raises(psycopg.errors.UniqueViolation):
        migrated(bouncer.warmed(database_url))
