"""A worker dies at every boundary of a run that fails: each transactional undo still happens exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import psycopg
import pytest

from outbox.errors import RunCancelled, RunFailed
from tests.pooler import direct
from worker import Step, call, gather, sleep, step, transaction, workflow
from worker.definitions import Registry, collecting
from worker.testing import StepwellTest

with collecting() as REGISTRY:

    @transaction
    def unbook(connection: psycopg.Connection[Any], place: str, receipt: str) -> None:
        connection.execute("insert into booked values (%s)", [f"-{receipt}"])

    @transaction(undo=unbook)
    def book(connection: psycopg.Connection[Any], place: str) -> str:
        connection.execute("insert into booked values (%s)", [f"+{place}"])
        return place

    @step
    async def tell(place: str) -> None: ...

    @workflow
    async def trip(*, fails: bool) -> None:
        book("flight")
        await gather(call(book, "hotel"), call(book, "car"))
        await tell("guest")
        if fails:
            raise ValueError("no visa")
        await sleep(86400)


@pytest.fixture
def stepwell_registry() -> Registry:
    return REGISTRY


@pytest.fixture
def stepwell_url(database_url: str) -> str:
    return direct(database_url)  # the testing kit's, which refuses a pooler


@pytest.fixture
def trips(stepwell: StepwellTest) -> Iterator[StepwellTest]:
    stepwell.connection.execute("create table booked (what text)")
    yield stepwell
    rows = stepwell.connection.execute("select what from booked").fetchall()
    assert sorted(row[0] for row in rows) == ["+car", "+flight", "+hotel", "-car", "-flight", "-hotel"]


@pytest.mark.parametrize("when", ["before", "after", "recording"])
@pytest.mark.parametrize("crashing", [book, unbook, tell], ids=lambda each: each.name)
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_fails_undoes_what_it_did_once(
    trips: StepwellTest, crashing: Step[..., Any], when: Literal["before", "after", "recording"], times: int
) -> None:
    with trips.crash_at(crashing, when, times=1 if crashing is tell else times):
        run = trips.enqueue(trip, fails=True)
        trips.run_until_idle()
    with pytest.raises(RunFailed, match="no visa"):
        run.result(0)


@pytest.mark.parametrize("when", ["before", "after", "recording"])
def test_a_run_that_is_cancelled_undoes_what_it_did_once(
    trips: StepwellTest, when: Literal["before", "after", "recording"]
) -> None:
    run = trips.enqueue(trip, fails=False)
    trips.run_until_idle()
    with trips.crash_at(unbook, when, times=2):
        run.cancel()
        trips.run_until_idle()
    with pytest.raises(RunCancelled):
        run.result(0)
