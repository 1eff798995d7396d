"""Transactional steps: the business rows and the record of the step commit together, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from tenacity import stop_after_attempt, wait_none

from outbox.errors import StepFailed
from tests.effects import Gate
from tests.engines import Lab
from tests.transactional import KINDS, SAVE, SYNC_AND_ASYNC, Business, notes
from tests.waiting import wait_until_async
from worker import retrying, transaction, workflow
from worker.definitions import collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        await opened.execute("create table crm (id serial primary key, note text, tx bigint)")
        yield opened


# -- together


@pytest.mark.parametrize("kind", KINDS)
async def test_rows_and_record_commit_in_one_transaction(lab: Lab, kind: str) -> None:
    business = Business(kind)
    async with lab.engine(business.registry, connections=2):
        runs = [await lab.enqueue(business.flow, {"note": str(n)}) for n in range(5)]
        for n, run in enumerate(runs):
            assert await lab.succeeded(run) == f"saved {n} and went on"
        last = await lab.enqueue(business.flow, {"note": "last", "follow": "nothing"})
        assert await lab.succeeded(last) == "saved last"
        asleep = await lab.enqueue(business.flow, {"note": "asleep", "follow": "sleep"})
        assert await lab.succeeded(asleep) == "saved asleep"
    assert sorted(await notes(lab)) == ["0", "1", "2", "3", "4", "asleep", "last"]
    together = await lab.execute(
        "select count(*) from crm join stepwell.outbox o on o.name = 'save'"
        " and o.xmin::text::bigint = crm.tx % (2::bigint ^ 32)::bigint"
    )
    assert together == [(7,)]
    assert await lab.totals("step") == {"completed": 12}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_crash_before_the_commit_leaves_nothing_and_the_step_is_executed_again(
    lab: Lab, kind: str
) -> None:
    gate = Gate()
    business = Business(
        kind, lambda given, run: gate.passed() if "Async" in kind else gate.passed_in_thread()
    )
    async with lab.engine(business.registry) as first:
        run = await lab.enqueue(business.flow)
        await gate.reached()
        await first.crash()
        assert await notes(lab) == []
        gate.open()
        async with lab.engine(business.registry):
            assert await lab.succeeded(run) == "saved x and went on"
    assert business.executions == 2
    assert await notes(lab) == ["x"]
    assert await lab.history(run) == [("1", 1, "interrupted"), ("1", 0, "completed"), ("2", 0, "completed")]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_exception_rolls_back(lab: Lab, kind: str) -> None:
    def explode(given: Any, run: Any) -> None:
        raise ValueError("no deal")

    business = Business(kind, explode, retry=retrying(stop=stop_after_attempt(2), wait=wait_none()))
    async with lab.engine(business.registry):
        failed = await lab.ended(await lab.enqueue(business.flow))
    assert (failed.state, failed.error["message"]) == ("failed", "no deal")
    assert business.executions == 2
    assert await notes(lab) == []


async def test_the_body_goes_on_after_a_failed_transaction_it_has_caught(lab: Lab) -> None:
    with collecting() as registry:

        @transaction
        def save(connection: psycopg.Connection[Any], note: str) -> str:
            connection.execute(SAVE.format(note))
            if note == "bad":
                raise ValueError("no deal")
            return note

        @workflow
        async def saving() -> list[str]:
            said = []
            for note in ("good", "bad", "better"):
                try:
                    said.append(save(note))
                except StepFailed as error:
                    said.append(error.message)
            return said

    async with lab.engine(registry):
        assert await lab.succeeded(await lab.enqueue(saving)) == ["good", "no deal", "better"]
    assert await notes(lab) == ["good", "better"]


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_result_that_cannot_be_encoded_rolls_back_and_is_not_tried_again(lab: Lab, kind: str) -> None:
    class Opaque: ...

    business = Business(kind, lambda given, run: Opaque(), retry=retrying())
    async with lab.engine(business.registry):
        failed = await lab.ended(await lab.enqueue(business.flow))
    assert (failed.state, failed.error["type"]) == ("failed", "outbox.errors.PayloadError")
    assert business.executions == 1
    assert await notes(lab) == []


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_time_out_rolls_back(lab: Lab, kind: str) -> None:
    gate = Gate()
    business = Business(
        kind, lambda given, run: gate.passed() if "Async" in kind else gate.passed_in_thread(), timeout=0.2
    )
    async with lab.engine(business.registry):
        failed = await lab.ended(await lab.enqueue(business.flow))
        gate.open()
        assert (failed.state, failed.error["type"]) == ("failed", "TimeoutError")
        await wait_until_async(lambda: business.executions == 1)
    assert await notes(lab) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_time_out_in_the_middle_of_a_statement_gives_the_connection_back(lab: Lab, kind: str) -> None:
    slow = [True]

    def sleeping(given: Any, run: Any) -> None:
        if slow and slow.pop():
            run("select pg_sleep(0.7)")

    async def sleeping_async(given: Any, run: Any) -> None:
        if slow and slow.pop():
            await run("select pg_sleep(60)")

    business = Business(kind, sleeping_async if "Async" in kind else sleeping, timeout=0.3)
    async with lab.engine(business.registry, connections=1):
        failed = await lab.ended(await lab.enqueue(business.flow, {"note": "slow"}))
        assert failed.error["type"] == "TimeoutError"
        business.registry.steps["save"].timeout = None
        assert await lab.succeeded(await lab.enqueue(business.flow)) == "saved x and went on"
    assert await notes(lab) == ["x"]


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_drain_that_cuts_a_transaction_short_rolls_back(lab: Lab, kind: str) -> None:
    gate = Gate()
    business = Business(
        kind, lambda given, run: gate.passed() if "Async" in kind else gate.passed_in_thread()
    )
    async with lab.engine(business.registry, grace_seconds=0.1) as engine:
        run = await lab.enqueue(business.flow)
        await gate.reached()
        draining = asyncio.create_task(engine.drain())
        await lab.waits(run, "ready")
        gate.open()
        await draining
    assert await notes(lab) == []
    assert await lab.history(run) == [("1", 1, "interrupted")]
    async with lab.engine(business.registry):
        await lab.succeeded(run)
    assert await notes(lab) == ["x"]


async def test_more_transactions_than_connections_wait_for_their_turn(lab: Lab) -> None:
    for kind in KINDS:
        business = Business(kind)
        await lab.execute("truncate stepwell.runs, crm")
        async with lab.engine(business.registry, connections=2) as engine:
            await lab.enqueue_many(business.flow, [{"note": str(n), "follow": "nothing"} for n in range(40)])
            await lab.all_succeeded(40)
            mine = await lab.backends(engine.id)
            assert len(mine) <= 5  # claimant, committer, doorbell, and two
        assert len(set(await notes(lab))) == 40


# -- commits and rollbacks of the step's own


@pytest.mark.parametrize("kind", ["sqlalchemy.Session", "sqlalchemy.AsyncSession"])
@pytest.mark.parametrize("fails", [False, True])
async def test_commit_and_rollback_of_a_session_stay_inside(lab: Lab, kind: str, fails: bool) -> None:
    def committing(session: Session, run: Any) -> None:
        session.commit()
        run(SAVE.format("rolled back"))
        session.rollback()
        run(SAVE.format("last"))
        if fails:
            raise ValueError("no deal")

    async def committing_async(session: AsyncSession, run: Any) -> None:
        await session.commit()
        await run(SAVE.format("rolled back"))
        await session.rollback()
        await run(SAVE.format("last"))
        if fails:
            raise ValueError("no deal")

    business = Business(kind, committing_async if "Async" in kind else committing)
    async with lab.engine(business.registry):
        ended = await lab.ended(await lab.enqueue(business.flow))
    assert ended.state == ("failed" if fails else "succeeded")
    assert await notes(lab) == ([] if fails else ["x", "last"])


@pytest.mark.parametrize("kind", [k for k in KINDS if "Session" not in k])
async def test_a_raw_commit_or_rollback_of_a_connection_is_refused(lab: Lab, kind: str) -> None:
    methods = ["commit", "rollback"]
    business = Business(kind, lambda given, run: getattr(given, methods.pop())())
    async with lab.engine(business.registry):
        for _ in range(2):
            failed = await lab.ended(await lab.enqueue(business.flow))
            assert failed.state == "failed"
            assert "belongs to Stepwell" in failed.error["message"]
    assert await notes(lab) == []


async def test_savepoints_of_the_step_are_its_own(lab: Lab) -> None:
    def nested(connection: psycopg.Connection[Any], run: Any) -> None:
        with connection.transaction():
            run(SAVE.format("kept"))
        try:
            with connection.transaction():
                run(SAVE.format("dropped"))
                run("select 1/0")
        except psycopg.errors.DivisionByZero:
            pass

    business = Business("psycopg.Connection", nested)
    async with lab.engine(business.registry):
        await lab.succeeded(await lab.enqueue(business.flow))
    assert await notes(lab) == ["x", "kept"]


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_transaction_that_the_step_has_ended_by_sql_blocks_the_run(lab: Lab, kind: str) -> None:
    statement = ""

    def ending(given: Any, run: Any) -> None:
        if statement:
            run(statement)

    async def ending_async(given: Any, run: Any) -> None:
        if statement:
            await run(statement)

    business = Business(kind, ending_async if "Async" in kind else ending)
    async with lab.engine(business.registry):
        for statement in ("commit", "rollback", "commit and chain"):
            await lab.execute("truncate crm")
            wrong = await lab.enqueue(business.flow)
            blocked = await lab.ended(wrong)
            assert blocked.state == "blocked", blocked
            assert blocked.error["type"] == "TransactionEnded"
            assert "step save ended the transaction that it was given" in blocked.error["message"]
            assert await lab.history(wrong) == []
            assert business.went_on == []
            assert await notes(lab) == ([] if statement == "rollback" else ["x"])
        statement = ""
        assert await lab.retry(wrong) == 1
        assert await lab.succeeded(wrong) == "saved x and went on"


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_step_that_commits_by_sql_and_then_fails_is_not_executed_again(lab: Lab, kind: str) -> None:
    def ending(given: Any, run: Any) -> None:
        run("commit")
        raise ValueError("after the fact")

    async def ending_async(given: Any, run: Any) -> None:
        await run("commit")
        await run("select 1/0")

    business = Business(
        kind,
        ending_async if "Async" in kind else ending,
        retry=retrying(stop=stop_after_attempt(5), wait=wait_none()),
    )
    async with lab.engine(business.registry):
        blocked = await lab.ended(await lab.enqueue(business.flow))
    assert (blocked.state, blocked.error["type"]) == ("blocked", "TransactionEnded")
    assert business.executions == 1
    assert await notes(lab) == ["x"]
