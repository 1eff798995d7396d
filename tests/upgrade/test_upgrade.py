"""The whole upgrade, under load: migrate, then replace the workers one by one; and back again, and forth.

The previous release's workers and producers are at work on the previous schema, with open runs of every kind, while this
release migrates. A ledger outside the database, the checker of the crash tests and the server's own log are the witnesses:
no run fails, none is lost, no finished step is executed again, and nobody has waited for the migration for 100 ms.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Json

from outbox import migrations, schema
from outbox.database import connect
from tests.crash import checker
from tests.crash.chaos import APP, Load
from tests.crash.fleet import ROOT, Fleet, children_of
from tests.crash.ledger import Ledger
from tests.crash.plans import PLANS
from tests.postgres import Cluster
from tests.upgrade import previous
from tests.upgrade.catalog import catalog, differences
from tests.upgrade.lock_watch import LONGEST_MS, LockWatch, starved_ms
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.crash]

PROCESSES = 2
SETTINGS = {"concurrency": 40, "grace_seconds": 30.0}
TRANSACTION_SECONDS = 0.5
END_SECONDS = 180.0
# What must not be in anybody's log: these are what a schema that changes under a release looks like.
SYMPTOMS = re.compile(
    r"cached plan must not change|cache lookup failed|does not exist|is not unique|tuple concurrently|deadlock detected|Traceback"
)
OPEN_STATE = """
    select bool_or(t.kind = 'run' and t.state = 'claimed') and bool_or(t.kind = 'run' and t.state = 'ready')
           and bool_or(t.kind = 'run' and t.state = 'waiting' and t.due_at > clock_timestamp())
           and bool_or(t.awaits is not null) and bool_or(t.kind = 'step') and bool_or(t.pending > 0)
           and exists (select from stepwell.runs r where r.parent_id is not null and r.state = 'open')
    from stepwell.tasks t
"""
"""Whether a run is executed, one is ready, sleeps, waits for a signal, for a join; a step is on its own, a child is open."""


class Service:
    """A producer in a process of its own, of some release; it must not notice anything."""

    def __init__(self, url: str, release: Path, name: str, home: Path) -> None:
        self._home = home
        self._printed = home / f"producer-{name}"
        with self._printed.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.upgrade.producer", name],
                env=previous.environment(release, STEPWELL_DATABASE_URL=url), cwd=home,
                stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.release = release

    def stop(self) -> list[UUID]:
        """Have it end and return its runs; fail if it has failed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait(60)
        first, *lines = self._printed.read_text().splitlines()
        assert status == 0, lines[-20:]
        assert first == str(self.release / "outbox" / "__init__.py")
        return [UUID(line) for line in lines]


class SlowService(threading.Thread):
    """Enqueues in transactions that stay open for a while, one after the other: one is in every migration's way."""

    def __init__(self, url: str) -> None:
        super().__init__(name="slow service", daemon=True)
        self.runs: list[UUID] = []
        self.failure: BaseException | None = None
        self._url = url
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join(30)
        if self.failure is not None:
            raise self.failure

    def run(self) -> None:
        try:
            with psycopg.connect(self._url) as connection:
                while not self._done.is_set():
                    run = enqueue(connection, "short", len(self.runs))
                    self._done.wait(TRANSACTION_SECONDS)
                    connection.commit()
                    self.runs.append(run)
        except BaseException as error:
            self.failure = error


def enqueue(connection: psycopg.Connection[Any], workflow: str, n: int) -> UUID:
    row = connection.execute("select stepwell.enqueue(%s, %s)", (workflow, Json({"n": n}))).fetchone()
    assert row is not None
    run: UUID = row[0]
    return run


class Site:
    """A database, the workers of two releases on it, and what they have done."""

    def __init__(self, fleet: Fleet, ledger: Ledger, release: Path) -> None:
        self.fleet, self.ledger, self.old = fleet, ledger, release
        self.workers: dict[int, str] = {}
        """Process → the release that it is of."""

    def start(self, release: Path) -> subprocess.Popen[bytes]:
        """Start a supervisor of a release; return when its workers claim."""
        self.fleet.environment["PYTHONPATH"] = previous.environment(release)["PYTHONPATH"]
        found = subprocess.run(
            [sys.executable, "-c", "import worker; print(worker.__file__)"],
            env=self.fleet.environment, cwd=self.fleet.home, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert found.stdout.strip() == str(release / "worker" / "__init__.py")
        supervisor = self.fleet.start(PROCESSES)
        for pid in children_of(supervisor.pid):
            self.workers[pid] = "old" if release == self.old else "new"
        return supervisor

    def drain(self, supervisor: subprocess.Popen[bytes]) -> None:
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(90) == 0

    def go_on(self, runs: int = 60) -> None:
        """Wait until so many more runs have succeeded."""
        before = self.succeeded()
        wait_until(lambda: self.succeeded() >= before + runs, 120, what=f"{runs} more runs to succeed")

    def succeeded(self) -> int:
        return self.states().get("succeeded", 0)

    def states(self) -> dict[str, int]:
        rows = self.fleet.db.execute("select state, count(*)::int from stepwell.runs group by state")
        return dict(rows.fetchall())


@contextlib.contextmanager
def opened(url: str, release: Path, home: Path) -> Iterator[Site]:
    with Ledger(home / "ledger") as ledger:
        (home / "paid").mkdir()
        fleet = Fleet(url, home, app=APP, environment=ledger.environment, **SETTINGS)
        try:
            checker.install(fleet.db)
            yield Site(fleet, ledger, release)
        finally:
            fleet.stop()


def migrate(site: Site, url: str, watch: LockWatch) -> None:
    """Migrate while everybody works, and look whether anybody has noticed."""
    waited_for: list[str] = []
    with connect(url, application_name="migrator") as connection:
        pid = connection.info.backend_pid
        applied = schema.migrate(connection, tell=waited_for.append)
        starved = starved_ms(pid)
    assert applied == [str(each) for each in migrations.numbered() if each.version > previous.SCHEMA_VERSION]
    waits = watch.waits(pid)
    assert [wait for wait in waits if wait.waited_ms > LONGEST_MS + starved] == [], (
        f"it said {waited_for}, and had no CPU for {starved:.0f} ms"
    )


def test_a_release_is_replaced_by_the_next_one_under_load(
    cluster: Cluster, old_url: str, release: Path, tmp_path: Path, db: psycopg.Connection[Any]
) -> None:
    watch = LockWatch(cluster, str(conninfo_to_dict(old_url)["dbname"]))
    runs: list[UUID] = []
    with opened(old_url, release, tmp_path) as site, contextlib.ExitStack() as producers:
        waiting = [enqueue(site.fleet.db, "waiting", n) for n in range(10)]
        old = [site.start(release), site.start(release)]
        service = Service(old_url, release, "old", tmp_path)
        producers.callback(service.stop)
        load = Load(old_url, seed=1)
        load.start()
        producers.callback(load.stop)
        with SlowService(old_url) as slow:
            site.go_on()
            wait_until(
                lambda: site.fleet.db.execute(OPEN_STATE).fetchone() == (True,), 60, what="runs of every kind"
            )
            migrate(site, old_url, watch)
            site.go_on()  # with old workers and an old producer, on the new schema

            new = []
            for leaving in old:
                new.append(site.start(ROOT))
                site.go_on()  # both take what they get
                site.drain(leaving)
            runs += service.stop()
            service = Service(old_url, ROOT, "new", tmp_path)
            producers.callback(service.stop)
            site.go_on()

            back = site.start(release)  # the new release is no good: the former one comes back, one by one
            for leaving in new:
                site.drain(leaving)
            site.go_on()
            site.start(ROOT)
            site.drain(back)
            site.go_on()

        runs += [*service.stop(), *slow.runs, *waiting]
        load.ending = True
        for run in waiting:
            site.fleet.db.execute("select stepwell.signal(%s, 'go', '1')", (run,))
        wait_until(lambda: "open" not in site.states(), END_SECONDS, what="every run to end")
        load.stop()
        assert load.outages == 0
        runs += load.runs
        for each in site.fleet.living:
            site.drain(each)
        judge(site, runs)
        site.fleet.db.execute("drop trigger witness_asks on stepwell.outbox")
        with connect(old_url, application_name="test") as upgraded:
            assert differences(catalog(upgraded), catalog(db)) == []
    logs = {path.name: path.read_text() for path in tmp_path.glob("supervisor-*.log")}
    logs["the server"] = watch.said()
    assert {name: SYMPTOMS.findall(text) for name, text in logs.items() if SYMPTOMS.search(text)} == {}


def judge(site: Site, runs: list[UUID]) -> None:
    facts = site.ledger.facts()
    verdict = checker.check(site.fleet.db, facts, plans=PLANS)
    assert verdict.clean, verdict
    assert site.states() == {"succeeded": verdict.runs}
    known = {run for (run,) in site.fleet.db.execute("select id from stepwell.runs").fetchall()}
    assert set(runs) <= known
    # Nobody was killed: whatever took effect did so once.
    assert verdict.repeated_in_flight == 0
    worked = {site.workers.get(fact.pid) for fact in facts if fact.what == "effect"}
    assert worked == {"old", "new"}
    idle = set(site.workers) - {fact.pid for fact in facts}
    assert not idle, "each worker has had its share"
