"""A rolling deploy under load, with real workers and two directories of code: nothing is blocked that fits, nothing
stranded, and what does not fit is what `stepwell replay` has said before.
"""

from __future__ import annotations

import json
import os
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
from psycopg.rows import TupleRow

from outbox import Client
from tests.pooler import direct
from tests.postgres import Cluster
from tests.waiting import wait_until

Db = psycopg.Connection[TupleRow]

ROOT = Path(__file__).resolve().parents[2]
LOAD_SECONDS = 0.01
END_SECONDS = 90.0

OLD = """
from worker import gather, sleep, step, workflow

@step
async def reserve(n: int) -> int:
    return n

@step
async def charge(n: int) -> str:
    return f"charged {n}"

@step
async def ship(n: int) -> str:
    return f"shipped {n}"

@workflow
async def order(n: int, nap: float = 0.0) -> str:
    reserved = await reserve(n)
    await sleep(nap)
    await charge(reserved)
    await sleep(nap)
    parts = await gather(ship(n), ship(n + 1))
    return parts[0]

@workflow
async def other(n: int, nap: float = 0.0) -> int:
    first = await reserve(n)
    await sleep(nap)
    return first + await reserve(n)
"""
# A way of its own for runs that have not come there yet; a step that does something else inside; one more workflow.
FITTING = (
    OLD.replace("import gather,", "import gather, patched,")
    .replace(
        "    await charge(reserved)\n",
        '    if patched("check-address"):\n        await check(n)\n    await charge(reserved)\n',
    )
    .replace('return f"shipped {n}"', 'return f"sent {n}"')
    + """
@step
async def check(n: int) -> bool:
    return True

@workflow
async def another(n: int) -> int:
    return await reserve(n)
"""
)
SWAPPED = OLD.replace(
    "    reserved = await reserve(n)\n    await sleep(nap)\n    await charge(reserved)\n",
    "    await charge(n)\n    reserved = await reserve(n)\n    await sleep(nap)\n",
)


class Site:
    """One database, and workers with the code of one directory or another."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home = url, home
        self.db: Db = psycopg.connect(direct(url), autocommit=True)
        self._workers: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "STEPWELL_DATABASE_URL": url, "PYTHONPATH": str(ROOT)}

    def code(self, name: str, text: str) -> Path:
        directory = self.home / name
        directory.mkdir()
        (directory / "flows.py").write_text(text)
        return directory

    def start(self, directory: Path) -> subprocess.Popen[bytes]:
        """Start a supervisor with two workers; return when they claim."""
        before = self._living()
        with (directory / f"worker-{len(self._workers)}.log").open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "worker.cli", "worker", "flows.py", "--processes", "2"],
                cwd=directory, env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip
        self._workers.append(worker)
        wait_until(lambda: self._living() >= before + 2, 60, what="the workers to register")
        return worker

    def drain(self, worker: subprocess.Popen[bytes]) -> None:
        worker.send_signal(signal.SIGTERM)
        worker.wait(40)

    def replay(self, directory: Path) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "worker.cli", "replay", "flows.py", "--json"],
            cwd=directory, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        told: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (1 if told["mismatches"] else 0), done.stderr
        return told

    def one(self, statement: str, *parameters: Any) -> Any:
        row = self.db.execute(statement.encode(), parameters or None).fetchone()
        assert row is not None
        return row[0]

    def states(self) -> dict[str, int]:
        return dict(
            self.db.execute("select state, count(*)::int from stepwell.runs group by state").fetchall()
        )

    def all_ended(self) -> None:
        try:
            wait_until(lambda: not self.states().get("open"), END_SECONDS, what="every run to end")
        except AssertionError as error:
            left = self.db.execute(
                "select t.run_id, t.kind, t.path, t.state, t.doing, t.attempt, t.name from stepwell.tasks t limit 5"
            ).fetchall()
            raise AssertionError(f"{error}: {self.states()}, left {left}") from None
        assert self.one("select count(*) from stepwell.tasks") == 0

    def close(self) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        self.db.close()

    def _living(self) -> int:
        return int(self.one("select count(*) from stepwell.workers where dead_at is null"))


@pytest.fixture
def site(cluster: Cluster, database_url: str, tmp_path: Path) -> Iterator[Site]:
    opened = Site(database_url, tmp_path)
    try:
        yield opened
    finally:
        opened.close()


class Load:
    """Runs that are enqueued one after the other, by name, until told otherwise."""

    def __init__(self, url: str) -> None:
        self.runs: list[UUID] = []
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def reach(self, count: int) -> None:
        wait_until(lambda: len(self.runs) >= count, 60, what=f"{count} runs to be enqueued")

    def _run(self) -> None:
        with Client(self._url) as client:
            while not self._stop.wait(LOAD_SECONDS):
                n = len(self.runs)
                name = "order" if n % 3 else "other"
                self.runs.append(client.enqueue(name, n=n, nap=n % 4 / 2).id)


def test_what_fits_goes_on_under_the_new_code_while_both_are_there(site: Site) -> None:
    before, after = site.code("before", OLD), site.code("after", FITTING)
    old = [site.start(before), site.start(before)]
    with Load(site.url) as load:
        load.reach(100)
        assert site.replay(after)["mismatches"] == []
        for leaving in old:
            site.start(after)
            load.reach(len(load.runs) + 100)  # both take what they get
            site.drain(leaving)
        load.reach(len(load.runs) + 50)
    site.all_ended()
    assert site.states() == {"succeeded": len(load.runs)}
    patched = "select count(distinct run_id) from stepwell.outbox where kind = 'patch'"
    assert 0 < site.one(patched) < len(load.runs)
    twice = (
        "select count(*) from (select from stepwell.outbox where n = 0 and kind = 'step'"
        " group by run_id, path having count(*) > 1) twice"
    )
    assert site.one(twice) == 0


def test_what_does_not_fit_is_blocked_as_predicted_and_goes_on_after_the_fix(site: Site) -> None:
    before, broken, fixed = site.code("before", OLD), site.code("broken", SWAPPED), site.code("fixed", OLD)
    old = site.start(before)
    with Client(site.url) as client:
        asleep = [client.enqueue(name, n=n, nap=4.0).id for n in range(20) for name in ("order", "other")]
        wait_until(
            lambda: site.one("select count(*) from stepwell.tasks where state = 'waiting'") == len(asleep), 30
        )
        site.drain(old)
        told = site.replay(broken)
        predicted = {UUID(each["run"]) for each in told["mismatches"]}
        assert told["replayed"] == len(asleep)
        assert len(predicted) == 20

        new = site.start(broken)
        fresh = [client.enqueue("order", n=n).id for n in range(20)]
        site.all_ended()
        assert site.states() == {"blocked": 20, "succeeded": len(asleep) - 20 + len(fresh)}
        blocked = client.find(status="blocked", error_like="history mismatch")
        assert set(blocked) == predicted
        explained = {UUID(each["run"]): each for each in told["mismatches"]}
        for run in blocked:
            error = client.get(run).error or {}
            said = explained[run]
            assert (error["data"]["expected"], error["data"]["got"]) == (said["expected"], said["got"])
            assert said["expected"] == "step reserve at 1 (completed)"
            assert said["got"] == "step charge at 1"

        site.drain(new)
        assert site.replay(fixed)["mismatches"] == []
        assert list(client.change("retry", blocked))
        site.start(fixed)
        site.all_ended()
        assert site.states() == {"succeeded": len(asleep) + len(fresh)}
        assert {client.result(run) for run in predicted} == {f"shipped {n}" for n in range(20)}


def test_a_run_that_newer_code_has_taken_further_is_left_to_it(site: Site) -> None:
    """An old worker that meets it gives it back, and nobody is needed."""
    before, after = site.code("before", OLD), site.code("after", FITTING)
    site.start(before)
    site.start(after)
    with Client(site.url) as client:
        runs = [client.enqueue("order", n=n, nap=0.3).id for n in range(60)]
        site.all_ended()
        assert site.states() == {"succeeded": len(runs)}
    (log,) = before.glob("*.log")
    assert "there are newer workers: it is given back" in log.read_text()


@pytest.mark.parametrize("failing", ["charge", "ship"])
def test_a_run_that_has_failed_is_retried_under_patched_code(site: Site, failing: str) -> None:
    """What it has passed before the patch it passes the old way again, although it is driven from the start."""
    said = {"charge": '    return f"charged {n}"', "ship": '    return f"shipped {n}"'}[failing]
    before = site.code("before", OLD.replace(said, '    raise ValueError("no")'))
    after = site.code("after", FITTING)
    old = site.start(before)
    with Client(site.url) as client:
        run = client.enqueue("order", n=1)
        wait_until(lambda: run.info().status == "failed", 60)
        site.drain(old)
        assert site.replay(after)["mismatches"] == []
        assert client.retry(run.id) == 1
        site.start(after)
        assert run.result(30) == "sent 1"
        taken = site.one("select count(*) from stepwell.outbox where kind = 'patch'")
        assert taken == (1 if failing == "charge" else 0)
