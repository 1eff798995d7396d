"""A worker dies at each boundary of a run; the next one goes on where the records end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from outbox.errors import StepFailed
from tests.engines import Gate, Lab, at, moving_to, parking
from tests.waiting import wait_until_async
from worker import NOT_DONE, current_step, now, random, sleep, step, uuid, workflow
from worker.definitions import Registry, Workflow, collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


class Ledger(list[tuple[str, int, str]]):
    """What has taken effect outside of the database: (step, execution, idempotency key)."""

    def note(self, name: str) -> None:
        info = current_step()
        self.append((name, info.execution, info.idempotency_key.partition(":")[2]))

    @property
    def names(self) -> str:
        return "".join(name for name, _, _ in self)


def three_steps(ledger: Ledger, gates: dict[str, Gate]) -> tuple[Registry, Workflow[..., Any]]:
    """Return a workflow of an async, a def and an async step; each stands at its gate before its effect."""
    with collecting() as registry:

        @step
        async def a() -> str:
            if "a" in gates:
                await gates["a"].passed()
            ledger.note("a")
            return "A"

        @step
        def b(before: str) -> str:
            if "b" in gates:
                gates["b"].passed_in_thread()
            ledger.note("b")
            return before + "B"

        @step
        async def c(before: str) -> str:
            ledger.note("c")
            return before + "C"

        @workflow
        async def three() -> str:
            return await c(b(await a()))

    return registry, three


@pytest.mark.parametrize(("path", "name"), [(1, "a"), (2, "b"), (3, "c")])
async def test_a_crash_between_effect_and_record_executes_that_step_again_with_the_same_key(
    lab: Lab, path: int, name: str
) -> None:
    ledger = Ledger()
    registry, three = three_steps(ledger, {})
    async with lab.engine(registry) as first:
        lost = first.lose_writes(at(path))
        run = await lab.enqueue(three)
        await wait_until_async(lost.is_set)
        await first.crash()
        assert ledger.names == "abc"[:path]
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "ABC"
    assert ledger.names == "abc"[:path] + "abc"[path - 1 :]
    assert [entry for entry in ledger if entry[0] == name] == [(name, 1, f"{path}"), (name, 2, f"{path}")]
    history = await lab.history(run)
    assert [row for row in history if row[1]] == [(f"{path}", 1, "interrupted")]
    assert [row for row in history if not row[1]] == [(f"{n}", 0, "completed") for n in (1, 2, 3)]


@pytest.mark.parametrize("path", [1, 2, 3])
async def test_a_crash_after_the_record_never_executes_that_step_again(lab: Lab, path: int) -> None:
    ledger = Ledger()
    registry, three = three_steps(ledger, {})
    async with lab.engine(registry) as first:
        applied = first.lose_answers(at(path))
        run = await lab.enqueue(three)
        await wait_until_async(applied.is_set)
        await first.crash()
        assert ledger.names == "abc"[:path]
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "ABC"
    assert ledger.names == "abc"
    # The move to the next call was recorded, so it counts as begun: nobody can know that it was not.
    interrupted = [("2", 1, "interrupted"), ("3", 1, "interrupted")][path - 1 : path]
    assert [row for row in await lab.history(run) if row[1]] == interrupted


@pytest.mark.parametrize("name", ["a", "b"])
async def test_a_crash_while_a_step_runs_executes_it_again(lab: Lab, name: str) -> None:
    ledger, gate = Ledger(), Gate()
    gates = {name: gate}
    registry, three = three_steps(ledger, gates)
    async with lab.engine(registry) as first:
        run = await lab.enqueue(three)
        await gate.reached()
        gates.clear()
        await first.crash()
        assert (task := await lab.task(run)) is not None
        assert (task.state, task.interruptions) == ("ready", 1)
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "ABC"
        gate.open()
    path = {"a": "1", "b": "2"}[name]
    assert next(entry for entry in ledger if entry[0] == name) == (name, 2, path)
    assert (path, 1, "interrupted") in await lab.history(run)


async def test_crash_after_crash_is_counted_and_recorded(lab: Lab) -> None:
    ledger, gate = Ledger(), Gate()
    registry, three = three_steps(ledger, {"a": gate})
    run = await lab.enqueue(three)
    async with lab.engine(registry) as engine:
        await gate.reached(1)
        await engine.crash()
    async with lab.engine(registry) as engine:
        await gate.reached(2)
        assert await lab.history(run) == [("1", 1, "interrupted")]
        await engine.crash()
    gate.open()
    # Two deaths make it a suspect; any worker with empty hands takes it.
    async with lab.engine(registry):
        assert await lab.succeeded(run) == "ABC"
    assert ledger[0] == ("a", 3, "1")
    assert (await lab.history(run))[:3] == [
        ("1", 1, "interrupted"),
        ("1", 2, "interrupted"),
        ("1", 0, "completed"),
    ]


async def test_a_crash_of_a_run_that_was_claimed_but_had_not_begun_loses_nothing(lab: Lab) -> None:
    ledger = Ledger()
    registry, three = three_steps(ledger, {})
    async with lab.engine(registry) as idle:
        await idle.crash(reclaim=False)
        # What its last statement still claims in a socket buffer, before the burial is seen.
        run = await lab.enqueue(three)
        await lab.execute(
            "select * from stepwell.claim_v1(%s, 'default', '{three}', 10, array_fill(0::bigint, array[20]))",
            [idle.id],
        )
        assert (await lab.status(run)) == "running"
        await lab.reclaim(idle.id)
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "ABC"
    assert ledger.names == "abc"


async def test_a_crash_while_parked_loses_nothing_and_counts_nothing(lab: Lab) -> None:
    ledger = Ledger()
    with collecting() as registry:

        @step
        async def a() -> None:
            ledger.note("a")

        @workflow
        async def sleeping() -> str:
            await a()
            await sleep(0.5)
            await a()
            return "awake"

    async with lab.engine(registry) as first:
        run = await lab.enqueue(sleeping)
        await lab.waits(run)
        await first.crash()
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "awake"
    assert ledger == [("a", 1, "1"), ("a", 1, "3")]
    assert await lab.history(run) == [("1", 0, "completed"), ("2", 0, "completed"), ("3", 0, "completed")]


async def test_a_crash_at_the_park_sleeps_for_the_rest_only(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def sleeping() -> None:
            await sleep(1.5)

    async with lab.engine(registry) as first:
        applied = first.lose_answers(parking)
        run = await lab.enqueue(sleeping)
        await wait_until_async(applied.is_set)
        await first.crash()
        async with lab.engine(registry):
            await lab.succeeded(run)
    rows = await lab.execute(
        "select extract(epoch from finished_at - created_at)::float8 from stepwell.runs where id = %s", [run]
    )
    assert 1.5 <= rows[0][0] < 2.9


async def test_now_random_and_uuid_are_the_same_after_a_crash(lab: Lab) -> None:
    seen: list[list[str]] = []
    gate = Gate()
    with collecting() as registry:

        @step
        async def a() -> None: ...

        @step
        async def b(values: list[str]) -> list[str]:
            seen.append(values)
            await gate.passed()
            return values

        @workflow
        async def drawing() -> list[str]:
            values = [str(now()), str(random()), str(uuid())]
            await a()
            await sleep(0)
            values += [str(now()), str(random()), str(uuid())]
            return await b(values)

    async with lab.engine(registry) as first:
        run = await lab.enqueue(drawing)
        await gate.reached(1)
        await first.crash()
        async with lab.engine(registry):
            await gate.reached(2)
            gate.open()
            output = await lab.succeeded(run)
    assert seen == [output, output]
    assert len(set(output)) == 6
    created = await lab.execute("select created_at from stepwell.runs where id = %s", [run])
    assert output[0] == str(created[0][0])


async def test_a_caught_failure_replays_as_it_happened(lab: Lab) -> None:
    ledger, gate = Ledger(), Gate()
    with collecting() as registry:

        @step
        async def broken() -> None:
            ledger.note("x")
            raise ValueError("out of order")

        @step
        async def mend(message: str) -> str:
            await gate.passed()
            ledger.note("m")
            return message

        @workflow
        async def mending() -> str:
            try:
                await broken()
            except StepFailed as error:
                return await mend(error.message)
            return "never"

    async with lab.engine(registry) as first:
        run = await lab.enqueue(mending)
        await gate.reached(1)
        await first.crash()
        gate.open()
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "out of order"
    assert ledger == [("x", 1, "1"), ("m", 2, "2")]


# -- hold


def holding(ledger: Ledger, gate: Gate) -> tuple[Registry, Workflow[..., Any]]:
    with collecting() as registry:

        @step
        async def before() -> None: ...

        @step(on_crash="hold")
        async def pay(amount: int) -> str:
            ledger.note("p")
            await gate.passed()
            return f"paid {amount}"

        @workflow
        async def paying(prepare: bool = False) -> str:
            if prepare:
                await before()
            return await pay(5)

    return registry, paying


@pytest.mark.parametrize("prepare", [False, True])
async def test_an_interrupted_step_with_hold_waits_for_a_person(lab: Lab, prepare: bool) -> None:
    ledger, gate = Ledger(), Gate()
    registry, paying = holding(ledger, gate)
    path = "2" if prepare else "1"
    async with lab.engine(registry) as first:
        run = await lab.enqueue(paying, {"prepare": prepare})
        await gate.reached()
        task = await lab.task(run)
        assert task is not None
        assert task.doing == [int(path)]  # the move is committed before it starts
        await first.crash()
        gate.open()
        async with lab.engine(registry):
            blocked = await lab.ended(run)
            assert blocked.state == "blocked"
            assert blocked.error["reason"] == "held after an interruption"
            assert blocked.error["message"] == (
                f"step pay at {path} was interrupted and may have taken effect; "
                "find out, then retry the run to execute it again"
            )
            assert ledger.names == "p"
            assert await lab.retry(run) == 1
            assert await lab.succeeded(run) == "paid 5"
    assert [(name, key) for name, _, key in ledger] == [("p", path), ("p", path)]
    assert (path, 1, "interrupted") in await lab.history(run)


async def test_a_step_with_hold_that_had_not_started_is_executed(lab: Lab) -> None:
    ledger, gate = Ledger(), Gate()
    gate.open()
    registry, paying = holding(ledger, gate)
    async with lab.engine(registry) as first:
        lost = first.lose_writes(moving_to(1))
        run = await lab.enqueue(paying)
        await wait_until_async(lost.is_set)
        await first.crash()
        assert ledger == []
        async with lab.engine(registry):
            assert await lab.succeeded(run) == "paid 5"
    assert ledger == [("p", 1, "1")]


async def test_a_step_with_hold_whose_completion_was_recorded_is_not_held(lab: Lab) -> None:
    ledger, gate = Ledger(), Gate()
    gate.open()
    registry, paying = holding(ledger, gate)
    async with lab.engine(registry) as first:
        applied = first.lose_answers(at(1))
        run = await lab.enqueue(paying)
        await wait_until_async(applied.is_set)
        await first.crash()
        assert await lab.succeeded(run) == "paid 5"
    assert ledger.names == "p"


# -- verify


class Verified:
    """A step with verify, and what was asked of it."""

    def __init__(self, answers: list[Any], *, synchronous: bool = False) -> None:
        self.ledger = Ledger()
        self.asked: list[tuple[int, int]] = []
        self.gate = Gate()
        self.answers = answers

        def answer(lead: int) -> Any:
            self.asked.append((lead, current_step().execution))
            said = self.answers.pop(0)
            if isinstance(said, Exception):
                raise said
            return said

        async def answer_async(lead: int) -> Any:
            return answer(lead)

        with collecting() as self.registry:

            @step(verify=answer if synchronous else answer_async)
            async def send(lead: int) -> str:
                self.ledger.note("s")
                await self.gate.passed()
                return f"sent to {lead}"

            @workflow
            async def sending() -> str:
                return await send(7)

        self.flow: Workflow[..., Any] = sending


@pytest.mark.parametrize("synchronous", [False, True])
async def test_verify_completes_an_interrupted_step_without_executing_it(lab: Lab, synchronous: bool) -> None:
    verified = Verified(["found in the mailbox"], synchronous=synchronous)
    async with lab.engine(verified.registry) as first:
        run = await lab.enqueue(verified.flow)
        await verified.gate.reached()
        assert verified.asked == []  # never before the first execution
        task = await lab.task(run)
        assert task is not None
        assert task.doing == [1]
        await first.crash()
        async with lab.engine(verified.registry):
            assert await lab.succeeded(run) == "found in the mailbox"
    assert verified.asked == [(7, 2)]
    assert verified.ledger.names == "s"
    assert await lab.history(run) == [("1", 1, "interrupted"), ("1", 0, "completed")]


async def test_not_done_executes_the_step_again(lab: Lab) -> None:
    verified = Verified([NOT_DONE])
    async with lab.engine(verified.registry) as first:
        run = await lab.enqueue(verified.flow)
        await verified.gate.reached()
        await first.crash()
        verified.gate.open()
        async with lab.engine(verified.registry):
            assert await lab.succeeded(run) == "sent to 7"
    assert verified.asked == [(7, 2)]
    assert verified.ledger == [("s", 1, "1"), ("s", 2, "1")]


async def test_a_verify_that_raises_fails_the_step_and_executes_nothing(lab: Lab) -> None:
    verified = Verified([ConnectionError("the mailbox is closed")])
    async with lab.engine(verified.registry) as first:
        run = await lab.enqueue(verified.flow)
        await verified.gate.reached()
        await first.crash()
        verified.gate.open()
        async with lab.engine(verified.registry):
            failed = await lab.ended(run)
    assert (failed.state, failed.error["type"]) == ("failed", "ConnectionError")
    assert verified.ledger.names == "s"


async def test_verify_is_not_asked_when_the_step_had_not_started(lab: Lab) -> None:
    verified = Verified([])
    verified.gate.open()
    async with lab.engine(verified.registry) as first:
        lost = first.lose_writes(moving_to(1))
        run = await lab.enqueue(verified.flow)
        await wait_until_async(lost.is_set)
        await first.crash()
        async with lab.engine(verified.registry):
            assert await lab.succeeded(run) == "sent to 7"
    assert verified.asked == []


async def test_verify_is_asked_again_after_the_retry_of_a_failed_run(lab: Lab) -> None:
    verified = Verified([ConnectionError("closed"), "found at last"])
    async with lab.engine(verified.registry) as first:
        run = await lab.enqueue(verified.flow)
        await verified.gate.reached()
        await first.crash()
        async with lab.engine(verified.registry):
            assert (await lab.ended(run)).state == "failed"
            assert await lab.retry(run) == 1
            assert await lab.succeeded(run) == "found at last"
    assert verified.ledger.names == "s"
