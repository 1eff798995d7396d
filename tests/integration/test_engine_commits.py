"""Group commit: what is written, when, and what becomes of it when the database or the wire refuses."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest
import pytest_asyncio

from tests.effects import Gate
from tests.engines import Lab, Running, keep_house_often, until
from tests.waiting import wait_until_async
from worker import sleep, step, workflow
from worker.definitions import Workflow, collecting
from worker.engine.transitions import Writing


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


class Sending:
    """Two steps, the first of which has a value and is careful if asked; counts executions."""

    def __init__(self, gate: Gate | None = None, **options: Any) -> None:
        self.executed: Counter[tuple[str, int]] = Counter()
        with collecting() as self.registry:

            @step(**options)
            async def send(n: int) -> str:
                if gate is not None:
                    await gate.passed()
                self.executed["send", n] += 1
                return f"value {n}"

            @step
            async def after(n: int) -> None:
                self.executed["after", n] += 1

            @workflow
            async def sending(n: int) -> str:
                value = await send(n)
                await after(n)
                return value

        self.flow: Workflow[..., Any] = sending


def once(executed: Counter[tuple[str, int]], *numbers: int) -> bool:
    """Tell whether both steps of these runs were executed once, and nothing else."""
    return executed == {(name, n): 1 for name in ("send", "after") for n in numbers}


@asynccontextmanager
async def locked(lab: Lab, *runs: UUID) -> AsyncIterator[None]:
    """Hold the row locks of the runs' tasks, so that flushes wait."""
    async with Lab(lab.url) as other:
        await other.execute("begin")
        await other.execute(
            "select from stepwell.tasks where run_id = any(%s) order by id for update", [list(runs)]
        )
        yield
        await other.execute("rollback")


async def committer_waits(lab: Lab, engine: Running, backends: int = 1, *, but_not: int = 0) -> list[int]:
    """Wait until so many backends of the engine, `but_not` among them, wait for a lock; return their process ids."""

    async def waiting() -> list[int] | None:
        rows = await lab.execute(
            "select pid from pg_stat_activity where pid = any (%s) and wait_event_type = 'Lock'",
            [await lab.backends(engine.id)],
        )
        pids = [row[0] for row in rows]
        return pids if len(pids) == backends and but_not not in pids else None

    return await until(waiting)


# -- order


async def test_a_step_starts_only_when_the_completion_before_it_is_durable(lab: Lab) -> None:
    gate = Gate()
    sending = Sending(gate)
    async with lab.engine(sending.registry) as engine:
        run = await lab.enqueue(sending.flow, {"n": 1})
        await gate.reached()
        async with locked(lab, run):
            gate.open()
            await committer_waits(lab, engine)
            assert sending.executed == {("send", 1): 1}
        await lab.succeeded(run)
    assert once(sending.executed, 1)


async def test_one_flush_takes_what_queued_up_during_the_one_before(lab: Lab) -> None:
    gate = Gate()
    sending = Sending(gate)
    async with lab.engine(sending.registry, concurrency=40) as engine:
        runs = await lab.enqueue_many(sending.flow, [{"n": n} for n in range(40)])
        await gate.reached(40)
        flushes = engine.engine.vitals().flushes
        async with locked(lab, *runs):
            gate.open()
            await committer_waits(lab, engine)
            await wait_until_async(lambda: engine.engine.vitals().pending == 40)
        await lab.all_succeeded(40)
        assert engine.engine.vitals().flushes - flushes < 20  # 80 transitions
    assert once(sending.executed, *range(40))


async def test_a_flush_is_bounded_in_rows_and_in_bytes(lab: Lab) -> None:
    sizes: list[tuple[int, int]] = []
    with collecting() as registry:

        @step
        async def large() -> str:
            return "x" * 20_000

        @workflow
        async def flow() -> None:
            await large()

    async with lab.engine(registry, concurrency=200, flush_max_bytes=100_000) as engine:
        committer = engine.engine._committer
        send = committer._send

        async def sending(writings: list[Writing]) -> list[int]:
            sizes.append((len(writings), sum(w.size() for w in writings)))
            return await send(writings)

        committer._send = sending  # type: ignore[method-assign]
        await lab.enqueue_many(flow, [{}] * 200)
        await lab.all_succeeded(200)
    assert sum(rows for rows, _ in sizes) == 200
    assert max(rows for rows, _ in sizes) <= 5
    assert max(size for _, size in sizes) <= 100_000


# -- bad data


async def test_one_bad_value_blocks_its_run_and_nobody_elses(lab: Lab) -> None:
    await lab.execute(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise exception 'unsupported Unicode escape sequence' using errcode = '22P05'; end $$"
    )
    await lab.execute(
        "create trigger refusing before insert on stepwell.outbox for each row"
        " when (new.value::text in ('\"value 7\"', '\"value 8\"', '\"value 33\"')) execute function refuse()"
    )
    gate = Gate()
    sending = Sending(gate)
    async with lab.engine(sending.registry, concurrency=100) as engine:
        runs = await lab.enqueue_many(sending.flow, [{"n": n} for n in range(60)])
        await gate.reached(60)
        async with locked(lab, *runs):  # so that they go out together
            gate.open()
            await committer_waits(lab, engine)
            await wait_until_async(lambda: engine.engine.vitals().pending == 60)
        bad, good = [runs[7], runs[8], runs[33]], [r for n, r in enumerate(runs) if n not in (7, 8, 33)]
        for run in good:
            await lab.succeeded(run)
        for run in bad:
            blocked = await lab.ended(run)
            assert blocked.state == "blocked"
            assert blocked.error == {
                "type": "DataRefused",
                "message": "unsupported Unicode escape sequence (SQLSTATE 22P05)",
                "reason": "the database refuses the data",
            }
        assert sum(sending.executed.values()) == 60 + 57
        await lab.execute("drop trigger refusing on stepwell.outbox")
        for run in bad:
            assert await lab.retry(run) == 1
            await lab.succeeded(run)
    assert await lab.totals("run") == {"succeeded": 60, "blocked": 3}


async def test_a_value_that_is_no_json_spoils_its_own_run_only(lab: Lab) -> None:
    """It breaks the whole document that a flush sends: only halving finds out whose it is."""
    sending = Sending()

    def spoil(writing: Writing) -> None:
        for record in writing.records:
            if record.value is not None and bytes(record.value) == b'"value 3"':
                record.value = msgspec.Raw(b'{"a": }')

    async with lab.engine(sending.registry) as engine:
        engine.spoil(spoil)
        runs = await lab.enqueue_many(sending.flow, [{"n": n} for n in range(20)])
        for n, run in enumerate(runs):
            ended = await lab.ended(run)
            assert ended.state == ("blocked" if n == 3 else "succeeded")
    blocked = await lab.run(runs[3])
    assert blocked.error["type"] == "DataRefused"
    assert "22P02" in blocked.error["message"]


async def test_an_output_that_is_refused_blocks_the_run_without_it(lab: Lab) -> None:
    await lab.execute(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise exception 'too deep' using errcode = '54001'; end $$"
    )
    await lab.execute(
        "create trigger refusing before update on stepwell.runs for each row"
        " when (new.output is not null) execute function refuse()"
    )
    sending = Sending()
    async with lab.engine(sending.registry):
        run = await lab.enqueue(sending.flow, {"n": 1})
        blocked = await lab.ended(run)
    assert (blocked.state, blocked.output) == ("blocked", None)
    assert blocked.error["message"] == "too deep (SQLSTATE 54001)"
    # What was refused was the flush of the last step with the end: the step has no record.
    assert await lab.history(run) == [("1", 0, "completed")]


async def test_a_run_whose_very_end_is_refused_neither_spins_nor_is_executed_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    monkeypatch.setattr("worker.engine.claimed.UNWRITABLE_SECONDS", 0.3)
    sending = Sending()
    run = await lab.enqueue(sending.flow, {"n": 1})
    await lab.execute(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise exception 'no' using errcode = '23514'; end $$"
    )
    await lab.execute(
        "create trigger refusing before insert on stepwell.outbox for each row"
        f" when (new.run_id = '{run}') execute function refuse()"
    )
    async with lab.engine(sending.registry) as engine:
        sent = 0
        send = engine.engine._committer._send

        async def counting(writings: list[Writing]) -> list[int]:
            nonlocal sent
            sent += 1
            return await send(writings)

        engine.engine._committer._send = counting  # type: ignore[method-assign]
        await lab.enqueue(sending.flow, {"n": 2})
        await wait_until_async(lambda: sending.executed["after", 2] == 1 and sent >= 4)
        before = sent
        await asyncio.sleep(0.5)
        assert sent - before < 5
        assert sending.executed["send", 1] == 1
        await lab.execute("drop trigger refusing on stepwell.outbox")
        assert (await lab.ended(run)).state == "blocked"


# -- lost connections


async def test_a_flush_whose_backend_dies_is_resent(lab: Lab) -> None:
    gate = Gate()
    sending = Sending(gate)
    async with lab.engine(sending.registry) as engine:
        runs = await lab.enqueue_many(sending.flow, [{"n": n} for n in range(20)])
        await gate.reached(20)
        async with locked(lab, *runs):
            gate.open()
            (pid,) = await committer_waits(lab, engine)
            await lab.execute("select pg_terminate_backend(%s)", [pid])
            await committer_waits(lab, engine, but_not=pid)
        await lab.all_succeeded(20)
    assert once(sending.executed, *range(20))
    assert await lab.totals("step") == {"completed": 40}


class LostAnswers:
    """Lets some flushes be committed without the committer hearing of it."""

    def __init__(self, engine: Running, times: int) -> None:
        self.left = times
        committer = engine.engine._committer
        connect = committer._connect

        async def connecting() -> Any:
            connection = await connect()
            execute = connection.execute

            async def deaf(*args: Any, **kwargs: Any) -> Any:
                cursor = await execute(*args, **kwargs)
                if self.left:
                    self.left -= 1
                    await connection.close()
                    raise psycopg.OperationalError("the answer was lost")
                return cursor

            connection.execute = deaf  # type: ignore[method-assign]
            return connection

        committer._connect = connecting


async def test_a_flush_whose_answer_is_lost_was_applied_once(lab: Lab) -> None:
    """Moves, parks and ends alike: the resend is answered from the rows and from the history."""
    executed: Counter[tuple[str, int]] = Counter()
    with collecting() as registry:

        @step
        async def a(n: int) -> None:
            executed["a", n] += 1

        @workflow
        async def flow(n: int) -> int:
            await a(n)
            if n % 2:
                await sleep(0.05)
            await a(n + 1000)
            return n

    async with lab.engine(registry) as engine:
        answers = LostAnswers(engine, 5)
        await lab.enqueue_many(flow, [{"n": n} for n in range(100)])
        await lab.all_succeeded(100)
        assert answers.left == 0
    assert set(executed.values()) == {1}
    assert len(executed) == 200
    assert await lab.totals("step") == {"completed": 200}
    assert await lab.totals("run") == {"succeeded": 100}


async def test_a_resend_that_meets_its_own_old_backend_still_at_work_waits_for_it(lab: Lab) -> None:
    gate = Gate()
    sending = Sending(gate)
    async with lab.engine(sending.registry) as engine:
        runs = await lab.enqueue_many(sending.flow, [{"n": n} for n in range(10)])
        await gate.reached(10)
        committer = engine.engine._committer
        old: list[asyncio.Task[Any]] = []
        connection: Any = await committer._connect()
        committer._connection = connection  # nothing was flushed yet
        execute = connection.execute

        async def cut_off(*args: Any, **kwargs: Any) -> Any:
            old.append(asyncio.create_task(execute(*args, **kwargs)))
            await committer_waits(lab, engine)
            committer._connection = None  # the wire is gone; the server has not noticed
            raise psycopg.OperationalError("the connection was reset")

        connection.execute = cut_off
        async with locked(lab, *runs):
            gate.open()
            await committer_waits(lab, engine, 2)
        await lab.all_succeeded(10)
        await old[0]
        await connection.close()
    assert once(sending.executed, *range(10))
    assert await lab.totals("step") == {"completed": 20}


# -- errors that are nobody's data


@pytest.mark.parametrize("state", ["57014", "53100", "25006", "40001", "XX000"])
async def test_an_error_of_the_server_loses_no_record(
    lab: Lab, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that must not be executed twice is not, although the disk was full when it was to be recorded."""
    monkeypatch.setattr("worker.engine.committer.REFUSED_SECONDS", 0.05)
    await lab.execute("create sequence attempts")
    await lab.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin"
        f" if nextval('public.attempts') <= 2 then raise exception 'not now' using errcode = '{state}'; end if;"
        " return new; end $$"
    )
    await lab.execute(
        "create trigger refusing before insert on stepwell.outbox for each row when (new.name = 'send')"
        " execute function refuse()"
    )
    sending = Sending(on_crash="hold")
    async with lab.engine(sending.registry):
        run = await lab.enqueue(sending.flow, {"n": 1})
        assert await lab.succeeded(run) == "value 1"
    assert once(sending.executed, 1)
    assert await lab.history(run) == [("1", 0, "completed"), ("2", 0, "completed")]


async def test_a_flush_that_a_person_cancels_is_repeated(lab: Lab) -> None:
    gate = Gate()
    sending = Sending(gate, on_crash="hold")
    async with lab.engine(sending.registry) as engine:
        run = await lab.enqueue(sending.flow, {"n": 1})
        await gate.reached()
        async with locked(lab, run):
            gate.open()
            (pid,) = await committer_waits(lab, engine)
            await lab.execute("select pg_cancel_backend(%s)", [pid])
            await wait_until_async(lambda: engine.engine.vitals().pending == 1)
        assert await lab.succeeded(run) == "value 1"
    assert once(sending.executed, 1)


async def test_a_claim_that_a_person_cancels_does_not_end_the_engine(lab: Lab) -> None:
    gate = Gate()
    sending = Sending(gate)
    async with lab.engine(sending.registry, poll_seconds=0.05) as engine:
        first = await lab.enqueue(sending.flow, {"n": 1})
        await gate.reached()
        async with Lab(lab.url) as other:
            await other.execute("begin")
            await other.execute("lock table stepwell.workers in access exclusive mode")
            (pid,) = await committer_waits(lab, engine)
            await lab.execute("select pg_cancel_backend(%s)", [pid])
            await other.execute("rollback")
        gate.open()
        await lab.succeeded(first)
        await lab.succeeded(await lab.enqueue(sending.flow, {"n": 2}))
    assert once(sending.executed, 1, 2)
