"""Sequential steps: what a body calls, what it gets, and what is written down of it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
import pytest_asyncio

from outbox.errors import StepFailed
from tests.engines import Lab
from tests.forks import ended
from worker import current_run, current_step, step, transaction, wait, workflow
from worker.definitions import collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


@dataclass
class Lead:
    id: int
    name: str
    at: datetime


@dataclass
class NoSuchLead(Exception):
    lead: int
    reason: str


class Opaque(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


async def test_async_and_def_steps_run_in_order_in_async_and_in_def_bodies(lab: Lab) -> None:
    calls: list[tuple[str, int, bool]] = []
    main = threading.get_ident()

    with collecting() as registry:

        @step
        async def add(n: int, by: int = 1) -> int:
            calls.append(("add", n, threading.get_ident() == main))
            return n + by

        @step
        def double(n: int) -> int:
            calls.append(("double", n, threading.get_ident() == main))
            return 2 * n

        @workflow
        async def asynchronous(n: int) -> list[int]:
            first = await add(n)
            second = double(first)
            return [first, second, await add(second, by=10)]

        @workflow
        def synchronous(n: int) -> list[int]:
            first = wait(add(n))
            second = double(first)
            return [first, second, wait(add(second, by=10))]

        @workflow
        def empty() -> None:
            return None

    async with lab.engine(registry):
        for flow in (asynchronous, synchronous):
            calls.clear()
            run = await lab.enqueue(flow, {"n": 3})
            assert await lab.succeeded(run) == [4, 8, 18]
            assert calls == [("add", 3, True), ("double", 4, False), ("add", 8, True)]
            assert await lab.history(run) == [
                ("1", 0, "completed"),
                ("2", 0, "completed"),
                ("3", 0, "completed"),
            ]
        assert await lab.succeeded(await lab.enqueue(empty)) is None
    assert await lab.totals("run") == {"succeeded": 3}
    assert await lab.totals("step") == {"completed": 6}
    assert await lab.execute("select count(*) from stepwell.tasks") == [(0,)]


async def test_a_body_and_a_step_see_decoded_copies_of_typed_values(lab: Lab) -> None:
    seen: list[Any] = []
    lead = {"id": 7, "name": "Ñandú", "at": "2026-11-01T10:00:00Z"}

    with collecting() as registry:

        @step
        async def rename(lead: Lead, tags: list[str]) -> Lead:
            tags.append("changed by the step")
            lead.name = lead.name.upper()
            return lead

        @workflow
        async def renaming(lead: Lead) -> dict[str, Lead]:
            tags = ["a"]
            renamed = await rename(lead, tags)
            seen.append((lead.name, tags, renamed.at, renamed is lead))
            return {"lead": renamed}

    async with lab.engine(registry):
        output = await lab.succeeded(await lab.enqueue(renaming, {"lead": lead}))
    assert output == {"lead": {**lead, "name": "ÑANDÚ"}}
    assert seen == [("Ñandú", ["a"], datetime(2026, 11, 1, 10, tzinfo=UTC), False)]


async def test_a_step_knows_its_run_and_its_execution(lab: Lab) -> None:
    seen: list[Any] = []

    with collecting() as registry:

        @step
        async def asynchronous() -> None:
            seen.append((current_run(), current_step()))

        @step
        def synchronous() -> None:
            seen.append((current_run(), current_step()))

        @workflow
        async def knowing() -> str:
            await asynchronous()
            synchronous()
            return str(current_run().id)

    async with lab.engine(registry):
        run = await lab.enqueue(knowing, labels='{"source": "web"}')
        assert await lab.succeeded(run) == str(run)
    assert [(facts.id, facts.workflow, facts.labels) for facts, _ in seen] == [
        (run, "knowing", {"source": "web"})
    ] * 2
    steps = [info for _, info in seen]
    assert [(s.run_id, s.path, s.execution, s.idempotency_key) for s in steps] == [
        (run, (1,), 1, f"{run}:1"),
        (run, (2,), 1, f"{run}:2"),
    ]
    assert 0 < steps[0].fence < steps[1].fence


async def test_a_failed_step_reaches_the_body_as_step_failed_which_may_catch_it(lab: Lab) -> None:
    caught: list[tuple[str, str, Any]] = []

    with collecting() as registry:

        @step
        async def find(lead: int) -> str:
            raise NoSuchLead(lead, "gone")

        @step
        def explode() -> None:
            raise Opaque(17)

        @workflow
        async def catching() -> str:
            for call in (lambda: find(4), explode):
                try:
                    result = call()
                    if result is not None:
                        await result
                except StepFailed as error:
                    caught.append((error.type, error.message, error.data))
            return "went on"

    async with lab.engine(registry):
        run = await lab.enqueue(catching)
        assert await lab.succeeded(run) == "went on"
    assert caught == [
        (f"{__name__}.NoSuchLead", "(4, 'gone')", {"lead": 4, "reason": "gone"}),
        (f"{__name__}.Opaque", "code 17", None),
    ]
    assert await lab.history(run) == [("1", 0, "failed"), ("2", 0, "failed")]


async def test_classes_named_in_raises_are_rebuilt_and_others_are_not(lab: Lab) -> None:
    caught: list[Any] = []

    with collecting() as registry:

        @step(raises=NoSuchLead)
        async def find(lead: int) -> str:
            if lead > 0:
                raise NoSuchLead(lead, "gone")
            raise Opaque(lead)

        @workflow
        async def catching() -> None:
            for lead in (4, 0):
                try:
                    await find(lead)
                except Exception as error:
                    caught.append(error)

    async with lab.engine(registry):
        await lab.succeeded(await lab.enqueue(catching))
    rebuilt, plain = caught
    assert isinstance(rebuilt, NoSuchLead)
    assert (rebuilt.lead, rebuilt.reason) == (4, "gone")
    assert isinstance(plain, StepFailed)  # nothing is guessed from its args
    assert plain.type.endswith("Opaque")


async def test_an_error_that_the_body_lets_through_fails_the_run(lab: Lab) -> None:
    with collecting() as registry:

        @step
        async def find() -> str:
            raise NoSuchLead(9, "gone")

        @workflow
        async def failing_step() -> None:
            await find()

        @workflow
        async def failing_body() -> None:
            raise Opaque(3)

        @step
        async def leave() -> None:
            raise SystemExit(3)

        @workflow
        async def exiting_step() -> None:
            await leave()

    async with lab.engine(registry):
        by_step = await lab.ended(await lab.enqueue(failing_step))
        by_body = await lab.ended(await lab.enqueue(failing_body))
        by_exit = await lab.ended(await lab.enqueue(exiting_step))
    assert (by_step.state, by_step.error["type"], by_step.error["data"]) == (
        "failed",
        f"{__name__}.NoSuchLead",
        {"lead": 9, "reason": "gone"},
    )
    assert (by_body.state, by_body.error["message"]) == ("failed", "code 3")
    assert "Opaque(3)" in by_body.error["trace"]
    assert (by_exit.state, by_exit.error["type"]) == ("failed", "SystemExit")
    assert await lab.totals("run") == {"failed": 3}


async def test_what_cannot_be_encoded_is_an_error_of_the_step_that_is_not_tried_again(lab: Lab) -> None:
    executed: list[int] = []

    with collecting() as registry:

        @step
        async def opaque() -> Any:
            executed.append(1)
            return object()

        @step
        async def large(n: int) -> str:
            executed.append(2)
            return "x" * n

        @workflow
        async def encoding() -> list[str]:
            said = []
            for call in (opaque(), large(2000), large(10)):
                try:
                    said.append(str(await call)[:10])
                except StepFailed as error:
                    said.append(error.type.rpartition(".")[2])
            return said

    async with lab.engine(registry, max_payload_bytes=1000):
        assert await lab.succeeded(await lab.enqueue(encoding)) == ["PayloadError", "PayloadError", "x" * 10]
    assert executed == [1, 2, 2]


async def test_methods_can_be_steps_and_workflows(lab: Lab) -> None:
    async with lab.engine(onboarding):
        run = await lab.enqueue("Onboarding.welcome", {"name": "Ada"})
        assert await lab.succeeded(run) == "Onboarding greets Ada"


with collecting() as onboarding:

    class Onboarding:
        @staticmethod
        @step
        def greet(who: str, name: str) -> str:
            return f"{who} greets {name}"

        @classmethod
        @workflow
        def welcome(cls, name: str) -> str:
            return Onboarding.greet(cls.__name__, name)


async def test_many_runs_interleave_without_mixing_their_contexts(lab: Lab) -> None:
    with collecting() as registry:

        @step
        async def own(run: UUID) -> bool:
            return current_run().id == run == current_step().run_id

        @step
        def own_in_thread(run: UUID) -> bool:
            return current_run().id == run == current_step().run_id

        @workflow
        async def mixing() -> bool:
            mine = current_run().id
            good = await own(mine)
            good = own_in_thread(mine) and good
            return good and current_run().id == mine

    async with lab.engine(registry):
        runs = await lab.enqueue_many(mixing, [{}] * 200)
        await lab.all_succeeded(200)
        outputs = await lab.execute("select distinct output::text from stepwell.runs")
    assert len(runs) == 200
    assert outputs == [("true",)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["def", "transaction", "async"])
async def test_a_process_that_a_step_forks_ends_with_the_step(lab: Lab, kind: str) -> None:
    """It would go on as a worker, on the sessions of this one, and take the exit for a failure."""
    children: list[int] = []

    def fork() -> None:
        child = os.fork()
        if not child:
            sys.exit(3)
        children.append(child)

    with collecting() as registry:

        @step(name="def")
        def in_thread() -> None:
            fork()

        @step(name="async")
        async def in_loop() -> None:
            fork()

        @transaction(name="transaction")
        def writing(connection: psycopg.Connection) -> None:
            fork()
            connection.execute("create table written ()")

        @workflow
        async def flow(kind: str) -> None:
            match kind:
                case "def":
                    in_thread()
                case "transaction":
                    writing()
                case _:
                    await in_loop()

    async with lab.engine(registry):
        run = await lab.enqueue(flow, {"kind": kind})
        await lab.succeeded(run)
        with ended(children[0]) as status:
            assert status == 3
        await lab.succeeded(await lab.enqueue(flow, {"kind": "def"}))  # the sessions are as good as before
    assert await lab.history(run) == [("1", 0, "completed")]
    for child in children[1:]:
        with ended(child) as status:
            assert status == 3
