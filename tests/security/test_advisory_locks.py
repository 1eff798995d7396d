"""Anybody who may connect can take advisory locks. What Stepwell makes of locks that strangers hold: nothing, or a sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outbox import Client, schema
from outbox.database import connect, connect_async
from outbox.errors import SchemaError
from outbox.settings import Settings
from tests.claimant import Claimant
from tests.postgres import Cluster
from tests.security.members import ROLES, Db, member_of
from tests.waiting import wait_until
from worker.queries import load
from worker.supervision.liveness import Observer, Sighting, sightings
from worker.telemetry.exporter import Exporter

STRANGERS = [None, "stepwell_producer", "stepwell_viewer"]


def locked(db: Db) -> dict[int, bool]:
    """Return which workers an observer sees with their lock."""
    return {row[0]: row[3] for row in db.execute(load("observe"))}


def registered(db: Db) -> int:
    """Return the id of a worker whose lock nobody holds."""
    return Claimant(db, ("w",), lock=False).id


@contextmanager
def login(owner: Db, url: str, name: str, options: str) -> Iterator[Db]:
    """Connect as a new login role."""
    owner.execute(f"create role {name} login {options}".encode())
    try:
        with connect(url.replace("postgres@", f"{name}@"), application_name="test") as connection:
            yield connection
    finally:
        owner.execute(f"drop owned by {name}; drop role {name}".encode())


# -- the lock of a worker ------------------------------------------------------------------------------


@pytest.mark.parametrize("role", STRANGERS)
def test_a_stranger_who_holds_the_lock_of_a_worker_is_not_taken_for_its_supervisor(
    role: str | None, database_url: str, db: Db
) -> None:
    worker = registered(db)
    with member_of(role, database_url, db) as stranger:
        for take in ("pg_advisory_lock", "pg_advisory_lock_shared"):
            stranger.db.execute(f"select {take}(%s)".encode(), [worker])
            assert locked(db) == {worker: False}


async def test_a_stranger_does_not_slow_down_the_detection_of_a_dead_worker(
    database_url: str, db: Db
) -> None:
    settings = Settings(database_url=database_url)
    worker = registered(db)
    with member_of("stepwell_viewer", database_url, db) as stranger:
        stranger.db.execute("select pg_advisory_lock(%s)", [worker])
        observer, verdicts = Observer(settings), []
        async with await connect_async(database_url, application_name="test") as observing:
            for tenths in range(40):  # of a second, on a clock of the test's own
                seen: list[Sighting] = await sightings(observing)
                verdicts = observer.look(seen, tenths / 10)
                if verdicts:
                    break
    assert [(each.worker_id, each.detector) for each in verdicts] == [(worker, "lost_lock")]
    assert tenths / 10 <= settings.lost_lock_seconds + 0.2


def test_whoever_may_be_a_supervisor_is_counted(database_url: str, db: Db) -> None:
    """A superuser, a member of the role, one who becomes it by SET ROLE, and one with a grant of its own."""
    worker = registered(db)
    assert locked(db) == {worker: False}
    db.execute("select pg_advisory_lock(%s)", [worker])
    assert locked(db) == {worker: True}
    db.execute("select pg_advisory_unlock(%s)", [worker])
    with login(db, database_url, "lock_inherits", "in role stepwell_worker") as held:
        held.execute("select pg_advisory_lock(%s)", [worker])
        assert locked(db) == {worker: True}
        assert locked(held) == {worker: True}, "as it sees itself"
    wait_until(lambda: locked(db) == {worker: False})
    with login(db, database_url, "lock_becomes", "noinherit in role stepwell_worker") as held:
        held.execute("set role stepwell_worker")
        held.execute("select pg_advisory_lock(%s)", [worker])
        assert locked(db) == {worker: True}
    wait_until(lambda: locked(db) == {worker: False})
    with login(db, database_url, "lock_granted", "") as held:
        held.execute("select pg_advisory_lock(%s)", [worker])
        assert locked(db) == {worker: False}
        db.execute("grant usage on schema stepwell to lock_granted")
        db.execute("grant select, update on stepwell.workers to lock_granted")
        assert locked(db) == {worker: True}


def test_a_plain_owner_of_the_schema_is_counted(cluster: Cluster, empty_database_url: str) -> None:
    with connect(empty_database_url, application_name="test") as superuser:
        name = superuser.info.dbname
        with login(superuser, empty_database_url, "lock_owner", "") as owner:
            superuser.execute(f"grant create on database {name} to lock_owner".encode())
            schema.migrate(owner)
            worker = registered(owner)
            assert locked(owner) == {worker: False}
            owner.execute("select pg_advisory_lock(%s)", [worker])
            assert locked(owner) == {worker: True}
            assert locked(superuser) == {worker: True}


def test_a_run_of_a_dead_worker_is_told_so_whatever_a_stranger_holds(database_url: str, db: Db) -> None:
    """As a viewer sees it, who may look at everything."""
    claimant = Claimant(db, ("w",), lock=False)
    run = db.execute("select stepwell.enqueue('w')").fetchone()
    assert run is not None
    claimant.claim()
    with (
        member_of("stepwell_viewer", database_url, db) as viewer,
        Client(viewer.url) as client,
    ):
        honest = client.why(run[0])
        assert honest is not None
        viewer.db.execute("select pg_advisory_lock(%s)", [claimant.id])
        assert client.why(run[0]) == honest


# -- the locks of the exporter and of migrations -------------------------------------------------------


def test_an_exporter_that_a_stranger_keeps_out_says_whose_session_that_is(
    database_url: str, db: Db, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taking = "select pg_advisory_lock(hashtext('stepwell'), hashtext('exporter'))"
    with member_of("stepwell_viewer", database_url, db) as stranger:
        stranger.db.execute(taking)
        with (
            caplog.at_level(logging.WARNING),
            Exporter(
                database_url,
                directory=tmp_path,
                host="127.0.0.1",
                port=0,
                not_ready=list,
                is_alive=lambda: True,
            ) as exporter,
        ):
            for _ in range(3):
                assert exporter._database.problem() is None, "no reason to take the worker out of service"
            assert list(exporter._database.collect()) == []
            told = [each.getMessage() for each in caplog.records if "exporter's lock" in each.getMessage()]
            assert len(told) == 1, "once, and not every few seconds"
            assert stranger.name in told[0]
            assert f"pg_terminate_backend({stranger.db.info.backend_pid})" in told[0]
            db.execute("select pg_terminate_backend(%s, 5000)", [stranger.db.info.backend_pid])
            wait_until(lambda: list(exporter._database.collect()) != [])


def test_an_exporter_that_another_one_keeps_out_says_nothing(
    database_url: str, db: Db, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with member_of("stepwell_worker", database_url, db) as colleague:
        colleague.db.execute("select pg_advisory_lock(hashtext('stepwell'), hashtext('exporter'))")
        with (
            caplog.at_level(logging.WARNING),
            Exporter(
                database_url,
                directory=tmp_path,
                host="127.0.0.1",
                port=0,
                not_ready=list,
                is_alive=lambda: True,
            ) as exporter,
        ):
            assert exporter._database.problem() is None
            assert list(exporter._database.collect()) == []
    assert caplog.records == []


def test_a_migrate_that_a_stranger_keeps_out_says_whose_session_that_is(
    database_url: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "PATIENCE_SECONDS", 0.05)
    with member_of(None, database_url, db) as stranger:
        stranger.db.execute("select pg_advisory_lock(%s)", [schema.MIGRATE_LOCK_KEY])
        with pytest.raises(SchemaError) as raised:
            schema.migrate(db)
        pid = stranger.db.info.backend_pid
        assert f"role '{stranger.name}' (process {pid}, application 'test')" in str(raised.value)
        assert f"pg_terminate_backend({pid})" in str(raised.value)
        db.execute("select pg_terminate_backend(%s, 5000)", [pid])
        assert schema.migrate(db) == []


def test_the_roles_are_those_that_were_meant() -> None:
    assert {each for each in STRANGERS if each} == set(ROLES) - {"stepwell_worker"}
