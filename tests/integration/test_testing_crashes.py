"""Simulated crashes: at the right moment, no more often than asked, and leaving what a killed process leaves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncSession
from tenacity import stop_after_attempt, wait_none

from outbox.errors import RunBlocked
from tests.waiting import wait_until
from worker import NOT_DONE, current_step, retrying, sleep, step, transaction, workflow
from worker.definitions import Registry, Step, collecting
from worker.testing import StepwellTest

pytestmark = pytest.mark.direct("the kit refuses a pooler: its database is a test's own")

effects: Counter[str] = Counter()
keys: set[str] = set()

with collecting() as REGISTRY:

    @step
    async def in_loop(note: str) -> str:
        effects["in_loop"] += 1
        keys.add(current_step().idempotency_key)
        return note

    @step
    def in_thread(note: str) -> str:
        effects["in_thread"] += 1
        keys.add(current_step().idempotency_key)
        return note

    @transaction
    def with_psycopg(connection: psycopg.Connection[Any], note: str) -> None:
        effects["with_psycopg"] += 1
        connection.execute("insert into crm values (%s)", [note])

    @transaction
    def with_sqlalchemy(connection: Connection, note: str) -> None:
        effects["with_sqlalchemy"] += 1
        connection.execute(text("insert into crm values (:note)"), {"note": note})

    @transaction
    async def with_session(session: AsyncSession, note: str) -> None:
        effects["with_session"] += 1
        await session.execute(text("insert into crm values (:note)"), {"note": note})

    @transaction
    def refusing(connection: psycopg.Connection[Any], note: str) -> None:
        connection.execute("insert into crm values (%s)", [note])
        effects["refusing"] += 1
        if effects["refusing"] == 1:
            raise ValueError("not this time")

    async def has_arrived(note: str) -> str | object:
        effects["asked"] += 1
        return note if effects["verified"] else NOT_DONE

    @step(verify=has_arrived)
    async def verified(note: str) -> str:
        effects["verified"] += 1
        return note

    @step(on_crash="hold")
    async def held(note: str) -> str:
        effects["held"] += 1
        return note

    @step(retry=retrying(stop=stop_after_attempt(3), wait=wait_none()))
    async def flaky(note: str) -> str:
        effects["flaky"] += 1
        if effects["flaky"] == 1:
            raise OSError("once")
        return note

    STEPS: dict[str, Step[..., Any]] = {
        each.name: each
        for each in (
            in_loop, in_thread, with_psycopg, with_sqlalchemy, with_session, verified, held, flaky, refusing,
        )
    }  # fmt: skip

    @workflow
    async def flow(name: str, note: str = "a") -> str:
        called: Any = STEPS[name]
        result = called(note)
        if called.is_async:
            await result
        await in_loop("last")
        return name

    @workflow
    async def sleepy(note: str) -> None:
        await in_loop(note)
        await sleep(3600)
        await in_loop(note)


@pytest.fixture
def stepwell_registry() -> Registry:
    effects.clear()
    keys.clear()
    return REGISTRY


@pytest.fixture
def stepwell_url(database_url: str) -> str:
    return database_url


@pytest.fixture
def crm(stepwell: StepwellTest) -> psycopg.Connection[Any]:
    stepwell.connection.execute("create table crm (note text)")
    return stepwell.connection


def rows(crm: psycopg.Connection[Any]) -> int:
    return len(crm.execute("select from crm").fetchall())


@pytest.mark.parametrize(("moment", "executions"), [("before", 1), ("after", 2), ("recording", 1)])
@pytest.mark.parametrize("name", ["in_thread", "in_loop"])
def test_a_step_is_repeated_only_when_nothing_of_it_is_recorded(
    stepwell: StepwellTest, name: str, moment: Any, executions: int
) -> None:
    with stepwell.crash_at(STEPS[name], moment, execution=1) as crash:
        run = stepwell.enqueue(flow, name)
        stepwell.run_until_idle()
    assert run.result() == name
    assert crash.count == 1
    assert effects[name] == executions + (name == "in_loop")
    assert len(keys) == 2  # the same over executions of one call


@pytest.mark.parametrize("moment", ["before", "after", "recording"])
@pytest.mark.parametrize("name", ["with_psycopg", "with_sqlalchemy", "with_session"])
def test_a_transaction_takes_place_once(
    stepwell: StepwellTest, crm: psycopg.Connection[Any], name: str, moment: Any
) -> None:
    with stepwell.crash_at(STEPS[name], moment):
        run = stepwell.enqueue(flow, name)
        stepwell.run_until_idle()
    assert run.result() == name
    assert rows(crm) == 1
    assert effects[name] == (2 if moment == "after" else 1)


def test_what_a_transaction_raised_before_the_crash_is_forgotten(
    stepwell: StepwellTest, crm: psycopg.Connection[Any]
) -> None:
    with stepwell.crash_at(refusing, "after"):
        run = stepwell.enqueue(flow, "refusing")
        stepwell.run_until_idle()
    assert run.result() == "refusing"
    assert rows(crm) == 1


def test_the_dead_worker_leaves_its_claim_and_the_next_one_goes_on(stepwell: StepwellTest) -> None:
    with stepwell.crash_at(in_thread, "after"):
        run = stepwell.enqueue(flow, "in_thread")
        stepwell.run_until_idle()
    history = [(r.path, r.n, r.outcome) for r in stepwell.client.history(run.id) if r.kind == "step"]
    assert history == [((1,), 1, "interrupted"), ((1,), 0, "completed"), ((2,), 0, "completed")]
    workers = {r.worker for r in stepwell.client.history(run.id)}
    assert len(workers) == 1
    assert stepwell.connection.execute("select from stepwell.workers").fetchall() == []
    backends = "select count(*) from pg_stat_activity where application_name ~ '^stepwell \\d+$' and datname = current_database()"
    wait_until(lambda: stepwell.connection.execute(backends).fetchone() == (0,))


def test_a_crash_strikes_so_often_and_in_the_execution_that_was_asked_for(stepwell: StepwellTest) -> None:
    with stepwell.crash_at(in_loop, "after", times=2) as crash:
        run = stepwell.enqueue(flow, "in_thread")
        stepwell.run_until_idle()
    assert run.result() == "in_thread"
    assert (crash.count, effects["in_loop"]) == (2, 3)

    with stepwell.crash_at("flaky", "recording", execution=1):  # what is recorded is a failure
        run = stepwell.enqueue(flow, "flaky")
        stepwell.run_until_idle()
    assert run.result() == "flaky"
    assert effects["flaky"] == 2

    effects.clear()
    with stepwell.crash_at("flaky", "before", execution=2):
        run = stepwell.enqueue(flow, "flaky")
        stepwell.run_until_idle()
    assert run.result() == "flaky"
    assert effects["flaky"] == 2


def test_a_step_that_always_kills_its_worker_is_taken_for_poison(stepwell: StepwellTest) -> None:
    with stepwell.crash_at(in_thread, "before", times=None) as crash:
        run = stepwell.enqueue(flow, "in_thread")
        others = [stepwell.enqueue(flow, "in_loop") for _ in range(5)]
        stepwell.run_until_idle()
    assert crash.count >= 3
    with pytest.raises(RunBlocked, match="PoisonStep"):
        run.result()
    assert [other.result() for other in others] == ["in_loop"] * 5
    stepwell.client.retry(run.id)
    stepwell.run_until_idle()
    assert run.result() == "in_thread"


def test_careful_steps_are_careful(stepwell: StepwellTest) -> None:
    with stepwell.crash_at(verified, "after"):
        run = stepwell.enqueue(flow, "verified")
        stepwell.run_until_idle()
    assert run.result() == "verified"
    assert (effects["verified"], effects["asked"]) == (1, 1)

    with stepwell.crash_at(held, "before"):
        run = stepwell.enqueue(flow, "held")
        stepwell.run_until_idle()
    with pytest.raises(RunBlocked):
        run.result()
    stepwell.client.retry(run.id)
    stepwell.run_until_idle()
    assert (run.result(), effects["held"]) == ("held", 1)


def test_a_crash_later_in_a_run_comes_after_the_time_was_advanced(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(sleepy, "a")
    stepwell.run_until_idle()
    with stepwell.crash_at(in_loop, "recording"):
        stepwell.run_until_idle(advancing=True)
    assert run.result() is None
    assert effects["in_loop"] == 2


@pytest.mark.parametrize("moment", ["before", "after", "recording"])
def test_neighbours_lose_nothing(stepwell: StepwellTest, crm: psycopg.Connection[Any], moment: Any) -> None:
    names = ["with_psycopg", "in_thread", "in_loop"] * 10
    runs = [stepwell.enqueue(flow, name) for name in names]
    with (
        stepwell.crash_at(with_psycopg, moment, times=2) as first,
        stepwell.crash_at(in_loop, moment) as second,
    ):
        stepwell.run_until_idle()
    assert [run.result() for run in runs] == names
    assert (first.count, second.count) == (2, 1)
    assert rows(crm) == 10


def crash_without(stepwell: StepwellTest, at: Step[..., Any], **options: Any) -> None:
    with stepwell.crash_at(at, "after", **options):
        stepwell.enqueue(flow, "in_thread")
        stepwell.run_until_idle()


def test_a_block_without_its_crash_fails(stepwell: StepwellTest) -> None:
    with pytest.raises(AssertionError, match=r"no worker has crashed at held \(after\)$"):
        crash_without(stepwell, held)
    said = r"crashed 1 times at execution 1 of in_thread \(after\), not 2 times"
    with pytest.raises(AssertionError, match=said):
        crash_without(stepwell, in_thread, times=2, execution=1)
    with pytest.raises(ZeroDivisionError), stepwell.crash_at(held, "after"):
        raise ZeroDivisionError  # the test's own error is the one that counts


def test_after_its_block_nothing_crashes(stepwell: StepwellTest) -> None:
    with stepwell.crash_at(in_thread, "after"):
        stepwell.enqueue(flow, "in_thread")
        stepwell.run_until_idle()
    effects.clear()
    stepwell.enqueue(flow, "in_thread")
    stepwell.run_until_idle()
    assert effects == {"in_thread": 1, "in_loop": 1}
