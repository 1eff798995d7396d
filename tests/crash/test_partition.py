"""A tree of workers that falls silent: packets are dropped, no connection is closed, nobody is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.island import Island, island, obstacle
from outbox import embedded
from outbox.database import connect
from outbox.schema import migrate
from tests import postgres
from tests.crash.fleet import APP, Fleet
from tests.waiting import wait_until

pytestmark = pytest.mark.crash


@pytest.fixture(scope="module")
def ground() -> Iterator[Island]:
    if (why := obstacle()) is not None:
        pytest.skip(why)
    with island() as made:
        yield made


@pytest.fixture
def reachable(ground: Island, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a fresh database on a server that the island reaches by TCP."""
    home = Path(tempfile.mkdtemp(prefix=postgres.PREFIX, dir=postgres.places()[0]))
    home.chmod(0o755)
    server = embedded.Server(
        home,
        postgres.binaries(request.config.getoption("--postgres")),
        {**postgres.SETTINGS, "listen_addresses": ground.host},
    )
    try:
        server.start()
        with (home / "postgres" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.199.0.0/16 trust\n")
        with connect(server.running_url() or "", application_name="tests") as admin:
            admin.execute("select pg_reload_conf()")
            migrate(admin)
        yield f"postgresql://postgres@{ground.host}:{embedded.PORT}/postgres"
    finally:
        server.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


class Islanders:
    """A supervisor with one worker on the island."""

    def __init__(self, fleet: Fleet, ground: Island) -> None:
        self.log = fleet.home / "islanders.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ground.inside(sys.executable, "-m", "worker.cli", "worker", str(APP), "--processes", "1"),
                env=fleet.environment, stdout=log, stderr=log, cwd=fleet.home,
            )  # fmt: skip

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def fleet(reachable: str, tmp_path: Path) -> Iterator[Fleet]:
    started = Fleet(reachable, tmp_path, lost_lock_seconds=1.0, lease_seconds=3.0, grace_seconds=2.0)
    try:
        yield started
    finally:
        started.stop()


def test_a_silent_tree_is_replaced_and_what_it_writes_late_is_refused(fleet: Fleet, ground: Island) -> None:
    islanders = Islanders(fleet, ground)
    try:
        with fleet.gate("before-greet"):
            run = fleet.enqueue("journey", name="Ann")
            fleet.reached("before-greet")
            silent = fleet.holder(run)
            fleet.start()
            ground.fall_silent()
            wait_until(lambda: fleet.holder(run).pid != silent.pid, 60, what="the run to be taken over")
        fleet.wait_for(run, "succeeded")  # while the island is silent still, and executes the step as well
        ground.be_heard()
        wait_until(
            lambda: _living(fleet) == 2 and silent.pid not in _pids(fleet),
            60,
            what="the island to register anew",
        )
        last = fleet.enqueue("nap", seconds=0.0)
        fleet.wait_for(last, "succeeded")
    finally:
        islanders.end()
    effects = fleet.effects()
    assert effects.pop("greet") in (2, 3), "by the silent worker and by its successor, and of the last run"
    assert effects == {"count": 1, "save": 1, "pay": 1}
    assert fleet.history(run)[:2] == [("greet", 1, "interrupted"), ("greet", 0, "completed")]
    # By its late write, its next claim or its supervisor, whatever comes first, it learns that it was given up.
    assert "was declared dead" in islanders.log.read_text()


def _living(fleet: Fleet) -> int:
    row = fleet.db.execute("select count(*) from stepwell.workers where dead_at is null").fetchone()
    assert row is not None
    return int(row[0])


def _pids(fleet: Fleet) -> set[int]:
    return {row[0] for row in fleet.db.execute("select pid from stepwell.workers where dead_at is null")}
