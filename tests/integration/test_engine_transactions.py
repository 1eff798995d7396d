"""Transactional steps: the business rows and the record of the step commit together, or not at all."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session
from tenacity import stop_after_attempt, wait_none

from outbox.errors import StepFailed
from tests.engines import Gate, Lab, counted
from tests.postgres import Cluster
from tests.waiting import wait_until_async
from worker import retrying, sleep, step, transaction, workflow
from worker.definitions import Workflow, collecting

KINDS = (
    "psycopg.Connection",
    "psycopg.AsyncConnection",
    "sqlalchemy.Connection",
    "sqlalchemy.Session",
    "sqlalchemy.AsyncConnection",
    "sqlalchemy.AsyncSession",
)
SYNC_AND_ASYNC = (
    "psycopg.Connection",
    "sqlalchemy.Session",
    "psycopg.AsyncConnection",
    "sqlalchemy.AsyncSession",
)

SAVE = "insert into crm (note, tx) values ('{}', txid_current())"


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        await opened.execute("create table crm (id serial primary key, note text, tx bigint)")
        yield opened


class Business:
    """The step `save`, of one kind: it writes a row, then does what the test wants with what it was given.

    `then` is called with the given connection or session and a function that executes SQL on it; it may be async
    in the async kinds. The workflow goes on with a step, or a sleep, or nothing.
    """

    def __init__(self, kind: str, then: Callable[..., Any] | None = None, **options: Any) -> None:
        self.executions = 0
        self.went_on: list[Any] = []
        self.is_async = "Async" in kind

        def run(given: Any, statement: str) -> Any:
            return given.execute(text(statement) if kind.startswith("sqlalchemy") else statement)

        def sync_body(given: Any, note: str) -> str:
            self.executions += 1
            run(given, SAVE.format(note))
            said = then(given, lambda statement: run(given, statement)) if then is not None else None
            return f"saved {note}" if said is None else said

        async def async_body(given: Any, note: str) -> str:
            self.executions += 1
            await run(given, SAVE.format(note))
            said = then(given, lambda statement: run(given, statement)) if then is not None else None
            if inspect.isawaitable(said):
                said = await said
            return f"saved {note}" if said is None else said

        with collecting() as self.registry:
            save: Any = self._step(kind, sync_body, async_body, options)

            @step
            async def after(said: str) -> str:
                self.went_on.append(said)
                return f"{said} and went on"

            @workflow
            async def saving(note: str = "x", follow: str = "step") -> str:
                said = save(note)
                if self.is_async:
                    said = await said
                if follow == "step":
                    return await after(said)
                if follow == "sleep":
                    await sleep(0.2)
                return str(said)

        self.flow: Workflow[..., Any] = saving

    @staticmethod
    def _step(
        kind: str,
        sync_body: Callable[..., str],
        async_body: Callable[..., Awaitable[str]],
        options: dict[str, Any],
    ) -> Any:
        match kind:
            case "psycopg.Connection":

                @transaction(name="save", **options)
                def save_p(given: psycopg.Connection[Any], note: str) -> str:
                    return sync_body(given, note)

                return save_p
            case "sqlalchemy.Connection":

                @transaction(name="save", **options)
                def save_c(given: Connection, note: str) -> str:
                    return sync_body(given, note)

                return save_c
            case "sqlalchemy.Session":

                @transaction(name="save", **options)
                def save_s(given: Session, note: str) -> str:
                    return sync_body(given, note)

                return save_s
            case "psycopg.AsyncConnection":

                @transaction(name="save", **options)
                async def save_ap(given: psycopg.AsyncConnection[Any], note: str) -> str:
                    return await async_body(given, note)

                return save_ap
            case "sqlalchemy.AsyncConnection":

                @transaction(name="save", **options)
                async def save_ac(given: AsyncConnection, note: str) -> str:
                    return await async_body(given, note)

                return save_ac

        @transaction(name="save", **options)
        async def save_as(given: AsyncSession, note: str) -> str:
            return await async_body(given, note)

        return save_as


async def notes(lab: Lab) -> list[str]:
    return [row[0] for row in await lab.execute("select note from crm order by id")]


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
@pytest.mark.parametrize("method", ["commit", "rollback"])
async def test_a_raw_commit_or_rollback_of_a_connection_is_refused(lab: Lab, kind: str, method: str) -> None:
    business = Business(kind, lambda given, run: getattr(given, method)())
    async with lab.engine(business.registry):
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
@pytest.mark.parametrize("statement", ["commit", "rollback", "commit and chain"])
async def test_a_transaction_that_the_step_has_ended_by_sql_blocks_the_run(
    lab: Lab, kind: str, statement: str
) -> None:
    wrong = True

    def ending(given: Any, run: Any) -> None:
        if wrong:
            run(statement)

    async def ending_async(given: Any, run: Any) -> None:
        if wrong:
            await run(statement)

    business = Business(kind, ending_async if "Async" in kind else ending)
    async with lab.engine(business.registry):
        run = await lab.enqueue(business.flow)
        blocked = await lab.ended(run)
        assert blocked.state == "blocked", blocked
        assert blocked.error["type"] == "TransactionEnded"
        assert "step save ended the transaction that it was given" in blocked.error["message"]
        assert await lab.history(run) == []
        assert business.went_on == []
        assert await notes(lab) == ([] if statement == "rollback" else ["x"])
        wrong = False
        assert await lab.retry(run) == 1
        assert await lab.succeeded(run) == "saved x and went on"


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


async def test_a_step_that_always_loses_its_connection_fails_in_the_end(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.advance.MAX_REPEATS", 3)

    def dying(given: Any, run: Any) -> None:
        run("select pg_terminate_backend(pg_backend_pid())")

    business = Business("sqlalchemy.Connection", dying)
    async with lab.engine(business.registry):
        failed = await lab.ended(await lab.enqueue(business.flow))
    assert failed.state == "failed"
    assert business.executions == 4


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
@pytest.mark.parametrize("follow", ["step", "sleep", "nothing"])
async def test_a_backend_that_dies_at_commit_has_written_nothing_and_the_step_is_repeated(
    lab: Lab, kind: str, follow: str
) -> None:
    await lab.execute("create sequence commits")
    await lab.execute(
        "create function die() returns trigger language plpgsql as $$ begin"
        " if nextval('commits') = 1 then perform pg_terminate_backend(pg_backend_pid()); end if; return null; end $$"
    )
    await lab.execute(
        "create constraint trigger dying after insert on crm deferrable initially deferred"
        " for each row execute function die()"
    )
    business = Business(kind)
    async with lab.engine(business.registry):
        run = await lab.enqueue(business.flow, {"follow": follow})
        assert (await lab.succeeded(run)).startswith("saved x")
    assert business.executions == 2
    assert await notes(lab) == ["x"]
    assert [row for row in await lab.history(run) if row[0] == "1"] == [("1", 0, "completed")]


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
@pytest.mark.parametrize("follow", ["step", "sleep", "nothing"])
async def test_a_commit_whose_answer_is_lost_is_not_repeated(
    lab: Lab, kind: str, follow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_the_answer_of_the_next_pipeline(monkeypatch)
    business = Business(kind)
    async with lab.engine(business.registry):
        run = await lab.enqueue(business.flow, {"follow": follow})
        assert (await lab.succeeded(run)).startswith("saved x")
    assert business.executions == 1
    assert business.went_on == (["saved x"] if follow == "step" else [])
    assert await notes(lab) == ["x"]
    assert [row for row in await lab.history(run) if row[0] == "1"] == [("1", 0, "completed")]


def lose_the_answer_of_the_next_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1]
    pipeline, pipeline_async = psycopg.Connection.pipeline, psycopg.AsyncConnection.pipeline

    @contextmanager
    def lossy(self: Any) -> Iterator[Any]:
        with pipeline(self) as opened:
            yield opened
        if left:
            left.pop()
            self.close()
            raise psycopg.OperationalError("the answer was lost")

    @asynccontextmanager
    async def lossy_async(self: Any) -> AsyncIterator[Any]:
        async with pipeline_async(self) as opened:
            yield opened
        if left:
            left.pop()
            await self.close()
            raise psycopg.OperationalError("the answer was lost")

    monkeypatch.setattr(psycopg.Connection, "pipeline", lossy)
    monkeypatch.setattr(psycopg.AsyncConnection, "pipeline", lossy_async)


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_stale_transaction_is_refused_and_rolled_back(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.caretaker.HOUSEKEEPING_SECONDS", 0.1)
    monkeypatch.setattr("worker.caretaker.TICK_SECONDS", 0.1)
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


@pytest.mark.parametrize("kind", ["sqlalchemy.Session", "sqlalchemy.AsyncSession"])
async def test_a_long_outage_is_waited_for_and_is_no_failure_of_the_step(
    lab: Lab, cluster: Cluster, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.advance.MAX_REPEATS", 3)
    monkeypatch.setattr("worker.advance.REPEAT_SECONDS", 0.01)
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
