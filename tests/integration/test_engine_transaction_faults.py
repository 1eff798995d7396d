"""Transactional steps that meet errors of the database, lost connections, lost answers and lost claims."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from tenacity import stop_after_attempt, wait_none

from outbox import sessions
from tests.effects import Gate
from tests.engines import Lab, counted, keep_house_often
from tests.postgres import Cluster
from tests.transactional import KINDS, SYNC_AND_ASYNC, Business, notes
from tests.waiting import wait_until_async
from worker import retrying, step, workflow
from worker.definitions import collecting
from worker.steps import transactions


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        await opened.execute("create table crm (id serial primary key, note text, tx bigint)")
        yield opened


# -- errors of the database


@pytest.mark.parametrize("kind", KINDS)
async def test_a_database_error_that_the_step_swallows_fails_it(lab: Lab, kind: str) -> None:
    def swallowing(given: Any, run: Any) -> None:
        try:
            run("select 1/0")
        except Exception:
            pass

    async def swallowing_async(given: Any, run: Any) -> None:
        try:
            await run("select 1/0")
        except Exception:
            pass

    business = Business(kind, swallowing_async if "Async" in kind else swallowing)
    async with lab.engine(business.registry):
        failed = await lab.ended(await lab.enqueue(business.flow))
    assert failed.state == "failed", failed
    assert await notes(lab) == []
    assert await lab.totals("step") == {"failed": 1}


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_constraint_that_is_checked_at_commit_fails_the_step(lab: Lab, kind: str) -> None:
    await lab.execute("alter table crm add constraint once unique (note) deferrable initially deferred")
    business = Business(kind, retry=retrying(stop=stop_after_attempt(2), wait=wait_none()))
    async with lab.engine(business.registry):
        assert await lab.succeeded(await lab.enqueue(business.flow)) == "saved x and went on"
        run = await lab.enqueue(business.flow)
        failed = await lab.ended(run)
    assert failed.state == "failed"
    assert failed.error["type"].endswith(("UniqueViolation", "IntegrityError"))
    assert business.executions == 3
    assert business.went_on == ["saved x"]
    assert await notes(lab) == ["x"]
    assert await lab.history(run) == [("1", 1, "failed"), ("1", 0, "failed")]


@pytest.mark.direct("PgBouncer takes no options of an address")
@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_serialization_failure_repeats_the_execution(lab: Lab, kind: str) -> None:
    await lab.execute("create table stock (n int)")
    await lab.execute("insert into stock values (1)")
    gate = Gate()

    def decrementing(given: Any, run: Any) -> None:
        run("select n from stock")
        gate.passed_in_thread()
        run("update stock set n = n - 1")

    async def decrementing_async(given: Any, run: Any) -> None:
        await run("select n from stock")
        await gate.passed()
        await run("update stock set n = n - 1")

    business = Business(kind, decrementing_async if "Async" in kind else decrementing)
    url = f"{lab.url}&options=-c%20default_transaction_isolation%3Drepeatable%5C%20read"
    engine = lab.start(business.registry, url=url)
    try:
        run = await lab.enqueue(business.flow)
        await gate.reached()
        await lab.execute("update stock set n = n + 10")
        gate.open()
        assert await lab.succeeded(run) == "saved x and went on"
        await engine.drain()
    finally:
        await engine.destroy()
    assert business.executions == 2
    assert await lab.execute("select n from stock") == [(10,)]
    assert await notes(lab) == ["x"]
    assert await lab.history(run) == [("1", 0, "completed"), ("2", 0, "completed")]  # not its failure


async def test_data_that_the_database_refuses_in_the_record_blocks_the_run_and_rolls_back(lab: Lab) -> None:
    await refuse_records(lab, "save")
    business = Business("psycopg.Connection")
    async with lab.engine(business.registry):
        run = await lab.enqueue(business.flow)
        blocked = await lab.ended(run)
        assert (blocked.state, blocked.error["type"]) == ("blocked", "DataRefused")
        assert "22P05" in blocked.error["message"]
        assert await notes(lab) == []
        await lab.execute("drop trigger refusing on stepwell.outbox")
        await lab.retry(run)
        await lab.succeeded(run)
    assert await notes(lab) == ["x"]


async def test_a_server_that_cannot_write_just_now_repeats_the_execution(lab: Lab) -> None:
    await lab.execute("create sequence attempts")
    await lab.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin"
        " if nextval('public.attempts') <= 2 then raise exception 'not now' using errcode = '53100'; end if;"
        " return new; end $$"
    )
    await lab.execute(
        "create trigger refusing before insert on stepwell.outbox for each row when (new.name = 'save')"
        " execute function refuse()"
    )
    business = Business("psycopg.Connection")
    async with lab.engine(business.registry):
        assert await lab.succeeded(await lab.enqueue(business.flow)) == "saved x and went on"
    assert business.executions == 3
    assert await notes(lab) == ["x"]


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_transaction_that_could_not_be_opened_just_now_is_no_failure_of_the_step(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.claimed.MAX_REPEATS", 1)
    monkeypatch.setattr("worker.steps.transactions._OPENING", f"{transactions._OPENING}, public.flaky()")
    await lab.execute("create sequence attempts")
    await lab.execute(
        "create function flaky() returns int language plpgsql as $$ begin"
        " if nextval('public.attempts') <= 3 then raise exception 'out of memory' using errcode = '53200'; end if;"
        " return 1; end $$"
    )
    business = Business(kind)
    async with lab.engine(business.registry):
        assert await lab.succeeded(await lab.enqueue(business.flow)) == "saved x and went on"
    assert business.executions == 1


async def refuse_records(lab: Lab, name: str) -> None:
    """Have the database refuse the completions of a step for their data."""
    await lab.execute(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise exception 'unsupported Unicode escape sequence' using errcode = '22P05'; end $$"
    )
    await lab.execute(
        f"create trigger refusing before insert on stepwell.outbox for each row when (new.name = '{name}')"
        " execute function refuse()"
    )


# -- lost connections


@pytest.mark.parametrize("kind", KINDS)
async def test_a_connection_lost_in_the_step_repeats_it(lab: Lab, kind: str) -> None:
    first = [True]

    def dying(given: Any, run: Any) -> None:
        if first and first.pop():
            run("select pg_terminate_backend(pg_backend_pid())")

    async def dying_async(given: Any, run: Any) -> None:
        if first and first.pop():
            await run("select pg_terminate_backend(pg_backend_pid())")

    business = Business(kind, dying_async if "Async" in kind else dying)
    async with lab.engine(business.registry):
        run = await lab.enqueue(business.flow)
        assert await lab.succeeded(run) == "saved x and went on"
    assert business.executions == 2
    assert await notes(lab) == ["x"]
    assert await lab.history(run) == [("1", 0, "completed"), ("2", 0, "completed")]


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_step_that_has_lost_its_claim_with_its_connection_is_not_called_again_here(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a worker that was frozen in the step: somebody else may have finished it."""
    keep_house_often(monkeypatch)
    gate = Gate()
    first = [True]

    def dying(given: Any, run: Any) -> None:
        if first and first.pop():
            gate.passed_in_thread()
            run("select pg_terminate_backend(pg_backend_pid())")

    async def dying_async(given: Any, run: Any) -> None:
        if first and first.pop():
            await gate.passed()
            await run("select pg_terminate_backend(pg_backend_pid())")

    business = Business(kind, dying_async if "Async" in kind else dying)
    fenced = counted("stepwell_fenced_writes_total")
    async with lab.engine(business.registry):
        run = await lab.enqueue(business.flow)
        await gate.reached()
        await lab.execute("update stepwell.tasks set attempt = attempt + 1 where run_id = %s", [run])
        gate.open()
        assert await lab.succeeded(run) == "saved x and went on"  # given back by the audit
    assert business.executions == 2
    assert counted("stepwell_fenced_writes_total") == fenced + 1
    assert await notes(lab) == ["x"]


async def test_a_step_that_always_loses_its_connection_fails_in_the_end(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.claimed.MAX_REPEATS", 3)

    def dying(given: Any, run: Any) -> None:
        run("select pg_terminate_backend(pg_backend_pid())")

    business = Business("sqlalchemy.Connection", dying)
    async with lab.engine(business.registry):
        failed = await lab.ended(await lab.enqueue(business.flow))
    assert failed.state == "failed"
    assert business.executions == 4


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_backend_that_dies_at_commit_has_written_nothing_and_the_step_is_repeated(
    lab: Lab, kind: str
) -> None:
    await lab.execute("create sequence commits")
    await lab.execute(
        "create function die() returns trigger language plpgsql as $$ begin"
        " if nextval('commits') % 2 = 1 then perform pg_terminate_backend(pg_backend_pid()); end if; return null; end $$"
    )
    await lab.execute(
        "create constraint trigger dying after insert on crm deferrable initially deferred"
        " for each row execute function die()"
    )
    business = Business(kind)
    async with lab.engine(business.registry):
        for follow in ("step", "sleep", "nothing"):
            run = await lab.enqueue(business.flow, {"note": follow, "follow": follow})
            assert (await lab.succeeded(run)).startswith(f"saved {follow}")
            assert (await lab.history(run))[0] == ("1", 0, "completed")
    assert business.executions == 6
    assert await notes(lab) == ["step", "sleep", "nothing"]


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_commit_whose_answer_is_lost_is_not_repeated(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_lost = lose_answers_of_commits(monkeypatch)
    business = Business(kind)
    async with lab.engine(business.registry):
        for n, follow in enumerate(("step", "sleep", "nothing"), 1):
            run = await lab.enqueue(business.flow, {"note": follow, "follow": follow})
            assert (await lab.succeeded(run)).startswith(f"saved {follow}")
            assert (await lab.history(run))[0] == ("1", 0, "completed")
            await wait_until_async(lambda n=n: len(answers_lost) == n)  # its client may lag behind the server
    assert business.executions == 3
    assert business.went_on == ["saved step"]
    assert await notes(lab) == ["step", "sleep", "nothing"]


def lose_answers_of_commits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every commit come through without its client hearing of it; return the list that grows by each."""
    lost: list[str] = []
    commit, commit_async = sessions.commit, sessions.commit_async

    def lossy(connection: Any, *args: Any) -> None:
        commit(connection, *args)
        lost.append("sync")
        connection.close()
        raise psycopg.OperationalError("the answer was lost")

    async def lossy_async(connection: Any, *args: Any) -> None:
        await commit_async(connection, *args)
        lost.append("async")
        await connection.close()
        raise psycopg.OperationalError("the answer was lost")

    monkeypatch.setattr(sessions, "commit", lossy)
    monkeypatch.setattr(sessions, "commit_async", lossy_async)
    return lost


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_stale_transaction_is_refused_and_rolled_back(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    gate = Gate()
    business = Business(
        kind, lambda given, run: gate.passed() if "Async" in kind else gate.passed_in_thread()
    )
    fenced = counted("stepwell_fenced_writes_total")
    async with lab.engine(business.registry):
        run = await lab.enqueue(business.flow)
        await gate.reached()
        await lab.execute("update stepwell.tasks set attempt = attempt + 1 where run_id = %s", [run])
        gate.open()
        await wait_until_async(lambda: counted("stepwell_fenced_writes_total") == fenced + 1)
        assert await lab.succeeded(run) == "saved x and went on"  # given back by the audit
    assert business.executions == 2
    assert await notes(lab) == ["x"]


@pytest.mark.direct("it counts repeats, and a pooler has the first one wait for the server")
@pytest.mark.parametrize("kind", ["sqlalchemy.Session", "sqlalchemy.AsyncSession"])
async def test_a_long_outage_is_waited_for_and_is_no_failure_of_the_step(
    lab: Lab, cluster: Cluster, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.claimed.MAX_REPEATS", 3)
    monkeypatch.setattr("worker.engine.claimed.REPEAT_SECONDS", 0.01)
    before = Gate()
    business = Business(kind)
    with collecting() as registry:

        @step
        async def wait_for_outage() -> None:
            await before.passed()

        saving = business.registry.steps["save"]
        registry.add_step(saving)

        @workflow
        async def outlasting() -> Any:
            await wait_for_outage()
            said = saving("x")
            return await said if business.is_async else said

    gate = Gate()
    repeats = 0
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(outlasting)
        await before.reached()
        transactions = engine.engine._transactions
        execute = transactions.execute

        async def executing(*args: Any) -> Any:
            nonlocal repeats
            if repeats == 0:
                await asyncio.to_thread(cluster.stop, "immediate")
                gate.open()
            repeats += 1
            if repeats == 10:
                await asyncio.to_thread(cluster.start)
            return await execute(*args)

        transactions.execute = executing  # type: ignore[method-assign,assignment]
        before.open()
        await gate.passed()
        assert await lab.succeeded(run, 40) == "saved x"
    assert repeats >= 10
    assert business.executions == 1
    assert await notes(lab) == ["x"]
