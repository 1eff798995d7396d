"""Named holes that need real processes: frozen in a transaction, segfaults, deadlocks, outages, clocks that jump."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from outbox.database import connect
from tests import postgres
from tests.crash.fleet import ROOT, Fleet
from tests.integration.supervising import is_gone
from tests.postgres import Cluster
from tests.waiting import wait_until

pytestmark = pytest.mark.crash

APP = ROOT / "tests" / "crash" / "hole_flows.py"
QUICK: dict[str, Any] = {
    "beat_seconds": 0.2,
    "lost_lock_seconds": 1.0,
    "lease_seconds": 3.0,
    "grace_seconds": 5.0,
}
END_SECONDS = 60.0


@contextmanager
def started(url: str, home: Path, supervisors: int, **settings: Any) -> Iterator[Fleet]:
    fleet = Fleet(url, home, app=APP, **{**QUICK, **settings})
    try:
        for _ in range(supervisors):
            fleet.start()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def fleet(database_url: str, tmp_path: Path) -> Iterator[Fleet]:
    """Two supervisors on this host, with a worker each."""
    with started(database_url, tmp_path, 2) as running:
        yield running


def workers(fleet: Fleet) -> dict[int, int]:
    """Return the process id of each worker that lives, by its id."""
    return dict(fleet.db.execute("select id, pid from stepwell.workers where dead_at is null").fetchall())


def ended(fleet: Fleet, *runs: UUID) -> Counter[str]:
    """Wait until nothing is open; return how many of the runs ended how."""
    states = "select state, count(*)::int from stepwell.runs where id = any (%s) group by state"

    def done() -> dict[str, int] | None:
        found: dict[str, int] = dict(fleet.db.execute(states, (list(runs),)).fetchall())
        return None if "open" in found else found

    return Counter(wait_until(done, END_SECONDS, what="the runs to end"))


def nothing_is_interrupted(fleet: Fleet) -> bool:
    said = fleet.db.execute("select from stepwell.outbox where outcome = 'interrupted'").fetchall()
    held = fleet.db.execute("select from stepwell.tasks where interruptions > 0").fetchall()
    return not said and not held


def starts(fleet: Fleet, step: str) -> int:
    """Return how many executions of a step, or of all steps whose names begin so, have started."""
    return sum(line[0] == "start" and line[1].startswith(step) for line in fleet._ledger())


def tree_of(pid: int) -> list[int]:
    """Return a supervisor and its children."""
    return [pid, *(int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """SIGSTOP the processes for as long as the block, children first: their supervisor would kill them."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


# -- what kills the process, or makes it useless -----------------------------------------------------


@pytest.mark.slow
def test_a_segfault_with_200_runs_in_flight_blocks_one_and_199_succeed(
    database_url: str, tmp_path: Path
) -> None:
    with started(database_url, tmp_path, 0, poison_after=2, concurrency=200) as fleet:
        with fleet.gate("live"):
            with fleet.gate("segfault"):
                poisoned = fleet.enqueue("poisoned")
                living = [fleet.enqueue("living", n=n) for n in range(199)]
                fleet.start()
                wait_until(
                    lambda: starts(fleet, "live") + starts(fleet, "segfault") == 200, 60, what="200 in flight"
                )
                assert len(workers(fleet)) == 1
            twice = "select from stepwell.tasks where run_id = %s and interruptions >= 2"
            wait_until(lambda: fleet.db.execute(twice, (poisoned,)).fetchall(), 60, what="the second death")
        assert ended(fleet, poisoned, *living) == {"succeeded": 199, "blocked": 1}
        row = fleet.db.execute(
            "select state, error ->> 'type' from stepwell.runs where id = %s", (poisoned,)
        ).fetchone()
        assert row == ("blocked", "PoisonStep")
        assert fleet.effects() == {f"live-{n}": 1 for n in range(199)}
        assert starts(fleet, "segfault") == 4  # two deaths in company, two alone
        assert fleet.db.execute("select count(*) from stepwell.tasks").fetchone() == (0,)


@pytest.mark.slow
def test_a_worker_whose_event_loop_is_deadlocked_is_killed_and_its_runs_go_on(
    database_url: str, tmp_path: Path
) -> None:
    with started(database_url, tmp_path, 1, hang_after_seconds=8.0) as fleet:
        ((worker, pid),) = workers(fleet).items()
        with fleet.gate("live"):
            beside = fleet.enqueue("living", n=1)
            wait_until(lambda: starts(fleet, "live") == 1, 60, what="the run beside it")
            stuck = fleet.enqueue("deadlocked")
            wait_until(lambda: starts(fleet, "deadlock") == 1, 60, what="the deadlock")
            wait_until(lambda: worker not in workers(fleet) and workers(fleet), 60, what="another worker")
            assert is_gone(pid)
        assert ended(fleet, stuck, beside) == {"succeeded": 2}
        assert fleet.effects() == {"deadlock": 1, "live-1": 1}
        assert (fleet.history(stuck), fleet.history(beside)) == (
            [("deadlock", 1, "interrupted"), ("deadlock", 0, "completed")],
            [("live", 1, "interrupted"), ("live", 0, "completed")],
        )


def test_when_the_supervisor_alone_is_killed_its_worker_ends_and_the_other_takes_over(fleet: Fleet) -> None:
    before = workers(fleet)
    with fleet.gate("live"):
        run = fleet.enqueue("living", n=1)
        wait_until(lambda: starts(fleet, "live") == 1, 60, what="the step to run")
        held = fleet.holder(run)
        os.kill(held.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: starts(fleet, "live") == 2, 60, what="another worker to take over")
        assert is_gone(held.pid)
    assert ended(fleet, run) == {"succeeded": 1}
    assert fleet.effects() == {"live-1": 1}
    # The other supervisor of this host, and its worker, have nothing to do with it.
    assert workers(fleet) == {worker: pid for worker, pid in before.items() if pid != held.pid}


# -- frozen in a transaction -------------------------------------------------------------------------


@pytest.fixture
def holding(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that holds locks until it is closed."""
    with closing(connect(database_url, application_name="test", autocommit=False)) as connection:
        yield connection


def test_a_worker_frozen_in_a_flush_that_holds_a_task_lock_does_not_keep_it(
    fleet: Fleet, holding: psycopg.Connection[Any]
) -> None:
    """It has locked the run of its step and waits for the step's own row when all of its tree stands still."""
    with fleet.gate("live"):
        run = fleet.enqueue("side_by_side", n=1)
        wait_until(lambda: starts(fleet, "live") == 2, 60, what="both steps to run")
        step, owner, pid = row(
            fleet,
            "select t.id, t.claimed_by, w.pid from stepwell.tasks t join stepwell.workers w on w.id = t.claimed_by"
            " where t.run_id = %s and t.kind = 'step' order by t.id limit 1",
            run,
        )
        (parent,) = row(fleet, "select id from stepwell.tasks where run_id = %s and kind = 'run'", run)
        holding.execute("select from stepwell.tasks where id = %s for update", (step,))
    waiting = (
        "select from pg_stat_activity where application_name = %s and wait_event_type = 'Lock'"
        " and query like '%%flush_v1%%'"
    )
    name = f"stepwell {owner}"
    wait_until(
        lambda: fleet.db.execute(waiting, (name,)).fetchall(), 60, what="its flush to wait with the lock"
    )
    assert not lockable(fleet, parent)
    with stopped(*reversed(tree_of(parent_of(pid)))):
        wait_until(lambda: owner not in workers(fleet), 60, what="the worker to be buried")
        wait_until(lambda: lockable(fleet, parent), 60, what="the lock of the run to come free")
        holding.close()
        assert ended(fleet, run) == {"succeeded": 1}
    wait_until(lambda: len(workers(fleet)) == 2, 60, what="the frozen tree to start afresh")
    assert owner not in workers(fleet)
    assert row(fleet, "select output from stepwell.runs where id = %s", run) == ([1, 2],)
    finals = [each for each in fleet.history(run) if each[1] == 0]
    assert finals == [("live", 0, "completed"), ("live", 0, "completed")]


def test_a_tree_frozen_after_its_business_write_neither_stops_its_heir_nor_writes_twice(
    fleet: Fleet,
) -> None:
    """The heir writes the same key: it waits for the frozen transaction, until that is ended with its backend."""
    fleet.db.execute("create unique index on saved (run)")
    with fleet.gate("book"):
        run = fleet.enqueue("booking")
        wait_until(lambda: fleet.effects()["book"] == 1, 60, what="the business write")
        held = fleet.holder(run)
        with stopped(*reversed(tree_of(held.supervisor_pid))):
            assert ended(fleet, run) == {"succeeded": 1}
            frozen = set(fleet.db.execute("select seq, outcome, worker from stepwell.outbox").fetchall())
    wait_until(lambda: len(workers(fleet)) == 2, 60, what="the frozen tree to start afresh")
    assert held.pid not in workers(fleet).values()
    assert fleet.db.execute("select name, size from saved").fetchall() == [("booked", 1)]
    assert set(fleet.db.execute("select seq, outcome, worker from stepwell.outbox").fetchall()) == frozen
    assert fleet.history(run) == [("book", 1, "interrupted"), ("book", 0, "completed")]


def row(fleet: Fleet, statement: str, *parameters: Any) -> tuple[Any, ...]:
    found = fleet.db.execute(statement.encode(), parameters).fetchone()
    assert found is not None
    return found


def lockable(fleet: Fleet, task: int) -> bool:
    """Tell whether nobody locks the row of a task."""
    found = fleet.db.execute("select from stepwell.tasks where id = %s for update skip locked", (task,))
    return bool(found.fetchall())


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# -- the database goes away for longer than any detector waits ---------------------------------------

OUTAGE_SECONDS = 6.0


@pytest.mark.slow
def test_when_all_come_back_at_once_from_an_outage_of_six_seconds_nobody_is_reclaimed(
    cluster: Cluster, database_url: str, tmp_path: Path
) -> None:
    """Each beat is then older than the lease: judged by that, the first to be back would bury all others."""
    with started(database_url, tmp_path, 3) as fleet:
        before = workers(fleet)
        assert len(before) == 3
        with fleet.gate("live"):
            runs = [fleet.enqueue("resting", n=n, seconds=0.1) for n in range(1, 31)]
            wait_until(lambda: starts(fleet, "live") == 30, 60, what="all runs to be in flight")
            cluster.stop("immediate")
            down = time.monotonic()
        wait_until(lambda: fleet.effects().total() == 30, 60, what="the steps to end without a database")
        wait_until(lambda: time.monotonic() - down >= OUTAGE_SECONDS, 10, what="the outage")
        cluster.start()
        fleet.db.close()
        fleet.db = psycopg.connect(database_url, autocommit=True)
        assert ended(fleet, *runs) == {"succeeded": 30}
        outlast_the_lease(fleet)
        assert workers(fleet) == before
        assert nothing_is_interrupted(fleet)
        assert fleet.effects() == {f"live-{n}": 1 for n in range(-30, 31) if n}


def outlast_the_lease(fleet: Fleet) -> None:
    """Wait until each worker has been beaten for so often that any detector would have had its time."""
    beats = "select id, beat from stepwell.workers"
    wanted = 1.3 * QUICK["lease_seconds"] / QUICK["beat_seconds"]
    goal = {worker: beat + wanted for worker, beat in fleet.db.execute(beats).fetchall()}

    def beaten() -> bool:
        now: dict[int, int] = dict(fleet.db.execute(beats).fetchall())
        return all(now.get(worker, beat) >= beat for worker, beat in goal.items())

    wait_until(beaten, END_SECONDS, what="the beats")


# -- clocks ------------------------------------------------------------------------------------------

SHIFTED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) {
    char text[32] = {0};
    int file = open(getenv("SHIFT_FILE"), O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    long got = read(file, text, sizeof text - 1);
    close(file);
    return got > 0 ? atol(text) : 0;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int said = real(at, zone);
    at->tv_sec += shift();
    return said;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int said = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += shift();
    return said;
}
"""
"""Moves the wall clock of a process, and leaves its monotonic clock alone, as whoever sets a clock does."""


class Clock:
    """The wall clock of the processes that are started with `environment`."""

    def __init__(self, home: Path) -> None:
        self._file = home / "shift"
        library = home / "shifted.so"
        (home / "shifted.c").write_text(SHIFTED)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", library, home / "shifted.c", "-ldl"], check=True
        )
        self.environment = {"LD_PRELOAD": str(library), "SHIFT_FILE": str(self._file)}
        self.put(0)

    def put(self, seconds: int) -> None:
        """Have it go wrong by so much from now on."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.chmod(0o644)
        fresh.replace(self._file)


@pytest.fixture
def clock() -> Iterator[Clock]:
    if shutil.which("cc") is None:
        pytest.skip("moving a clock needs a C compiler")
    # Where the account that runs Postgres for root can read it.
    home = Path(tempfile.mkdtemp(prefix="stepwell-clock-", dir="/var/tmp"))
    home.chmod(0o755)
    yield Clock(home)
    shutil.rmtree(home)


@pytest.fixture
def clocked(cluster: Cluster, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Another server of the same version, whose clock can be moved."""
    with monkeypatch.context() as patched:
        for name, value in clock.environment.items():
            patched.setenv(name, value)
        with postgres.running(cluster.version) as own:
            patched.undo()
            own.make_template()
            yield own


HOUR = 3600


def rests_until_told(fleet: Fleet, seconds: float) -> UUID:
    """Return a run that has parked for so long."""
    run = fleet.enqueue("resting", n=77, seconds=seconds)
    fleet.wait_for(run, "waiting")
    return run


@pytest.mark.slow
def test_a_clock_of_the_database_that_jumps_kills_nobody_and_moves_timers_only(
    clocked: Cluster, clock: Clock, tmp_path: Path
) -> None:
    """Beats are counted and not dated, and observers go by their own monotonic clocks."""
    with clocked.database() as url, started(url, tmp_path, 2) as fleet:
        before = workers(fleet)
        sleeper = rests_until_told(fleet, HOUR)
        begun = row(fleet, "select clock_timestamp()")[0]
        runs: list[UUID] = []
        for jump in (2 * HOUR, -2 * HOUR, 0):
            with fleet.gate("live"):
                runs.append(fleet.enqueue("living", n=len(runs)))
                fleet.reached("live")
                clock.put(jump)
                moved = row(fleet, "select extract(epoch from clock_timestamp() - %s)::float8", begun)[0]
                assert abs(moved - jump) < HOUR / 2
                outlast_the_lease(fleet)
            assert ended(fleet, *runs) == {"succeeded": len(runs)}
            if jump > 0:  # its time has come
                assert ended(fleet, sleeper) == {"succeeded": 1}
                sleeper = rests_until_told(fleet, HOUR)
        assert fleet.status(sleeper) == "waiting"
        assert workers(fleet) == before
        assert nothing_is_interrupted(fleet)
        assert {name: n for name, n in fleet.effects().items() if "77" not in name} == {
            f"live-{n}": 1 for n in range(3)
        }


@pytest.mark.slow
def test_a_clock_of_the_workers_that_jumps_changes_nothing(
    clock: Clock, database_url: str, tmp_path: Path
) -> None:
    with started(database_url, tmp_path, 0) as fleet:
        honest = fleet.environment
        fleet.environment = {**honest, **clock.environment}
        fleet.start()
        fleet.environment = honest
        fleet.start()
        before = workers(fleet)
        runs: list[UUID] = []
        for jump in (2 * HOUR, -2 * HOUR, 0):
            with fleet.gate("live"):
                runs += [
                    fleet.enqueue("resting", n=n, seconds=0.5) for n in range(len(runs) + 1, len(runs) + 11)
                ]
                wait_until(lambda: fleet.db.execute(IN_FLIGHT).fetchone() == (10,), 60, what="ten in flight")
                clock.put(jump)
                outlast_the_lease(fleet)
            assert ended(fleet, *runs) == {"succeeded": len(runs)}
        assert workers(fleet) == before
        assert nothing_is_interrupted(fleet)
        assert fleet.effects() == {f"live-{n}": 1 for n in range(-30, 31) if n}
        took = row(fleet, "select max(finished_at - created_at) < interval '30 minutes' from stepwell.runs")
        assert took == (True,)


IN_FLIGHT = "select count(*)::int from stepwell.tasks where state = 'claimed'"


@pytest.mark.slow
@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_death_is_noticed_as_fast_as_ever_after_the_clock_has_jumped(
    clocked: Cluster, clock: Clock, tmp_path: Path, jump: int
) -> None:
    with clocked.database() as url, started(url, tmp_path, 2) as fleet:
        with fleet.gate("live"):
            run = fleet.enqueue("living", n=1)
            fleet.reached("live")
            clock.put(jump)
            fleet.kill(fleet.holder(run), "tree")
            wait_until(lambda: starts(fleet, "live") == 2, 60, what="the other supervisor to notice")
        assert ended(fleet, run) == {"succeeded": 1}
        assert fleet.effects() == {"live-1": 1}
