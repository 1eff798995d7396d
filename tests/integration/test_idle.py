"""What an idle worker asks of the database: little, and nothing that comes meanwhile goes unnoticed (I1)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from outbox.database import connect_async
from tests.protocol import Lab, Worker
from tests.waiting import wait_until
from worker.engine import claims
from worker.engine.claims import Claimant

QUEUES = ["default"]


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stands_in = Clock()
    monkeypatch.setattr(claims, "time", stands_in)
    return stands_in


@pytest.fixture
def worker(lab: Lab) -> Worker:
    return lab.worker()


@pytest_asyncio.fixture
async def claimant(lab: Lab, worker: Worker) -> AsyncIterator[Claimant]:
    made = Claimant(lambda: connect_async(lab.url, application_name="idling"), worker.id)
    try:
        yield made
    finally:
        await made.close()


async def rung(claimant: Claimant, queues: list[str] = QUEUES) -> bool:
    return await claimant.idle(queues, 5.0, at_least_seconds=1.5)


def leases(lab: Lab) -> list[tuple[str, int]]:
    """Return queue and transaction of each lease: another transaction has renewed it."""
    return lab.rows("select queue, xmin::text::bigint from stepwell.doorbell order by queue")


async def test_a_lease_that_is_held_is_not_asked_for_again_until_it_is_about_to_end(
    lab: Lab, claimant: Claimant, clock: Clock
) -> None:
    assert not await rung(claimant)  # what came before it may have gone unnoticed
    first = leases(lab)
    for _ in range(3):
        clock.now += 1.0
        assert await rung(claimant)
    assert leases(lab) == first
    clock.now += 1.0  # one second is left of it, and more is needed
    assert await rung(claimant)
    assert leases(lab) != first


async def test_what_came_in_a_gap_between_two_leases_is_to_be_looked_for(
    claimant: Claimant, clock: Clock
) -> None:
    assert not await rung(claimant)
    clock.now += 5.0
    assert not await rung(claimant)
    assert await rung(claimant)


async def test_a_lease_for_other_queues_is_another(lab: Lab, claimant: Claimant, clock: Clock) -> None:
    assert clock.now
    assert not await rung(claimant)
    assert not await rung(claimant, ["default", "mail"])
    assert [queue for queue, _ in leases(lab)] == ["default", "mail"]


async def test_a_claim_that_finds_something_ends_the_lease_and_one_that_does_not_keeps_it(
    lab: Lab, claimant: Claimant, clock: Clock
) -> None:
    assert clock.now
    assert not await rung(claimant)
    assert await claimant.claim("default", ["w"], 1) == []
    assert await rung(claimant)
    lab.enqueue(1)
    assert len(await claimant.claim("default", ["w"], 1)) == 1
    assert leases(lab) == []
    assert not await rung(claimant)
    assert len(leases(lab)) == 1


async def test_no_lease_is_believed_after_the_connection_was_lost(
    lab: Lab, claimant: Claimant, clock: Clock
) -> None:
    """The database may have crashed, and leases are not logged; or another one may have taken its place."""
    assert clock.now
    assert not await rung(claimant)
    lab.rows("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'idling'")
    wait_until(lambda: lab.rows("select from pg_stat_activity where application_name = 'idling'") == [])
    assert await claimant.claim("default", ["w"], 1) == []
    assert not await rung(claimant)


def test_an_empty_claim_does_not_wait_for_the_disk_and_one_that_finds_something_does(
    lab: Lab, worker: Worker
) -> None:
    with worker.db.transaction(force_rollback=True):
        assert worker.claim(1) == []
        assert worker.db.execute("show synchronous_commit").fetchone() == ("off",)
    lab.enqueue(1)
    with worker.db.transaction(force_rollback=True):
        assert len(worker.claim(1)) == 1
        assert worker.db.execute("show synchronous_commit").fetchone() == ("on",)
