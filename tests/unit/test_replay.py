from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from outbox.errors import PayloadError, Permanent, StepFailed
from tests.unit.drives import Run, record
from worker.context import sleep, wait
from worker.definitions import collecting, step, workflow
from worker.replay.decisions import Await, AwaitChild, Block, Fail, Finish, Sleep


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    with collecting():
        yield


@dataclass
class Lead:
    id: int
    tags: list[str]


@dataclass
class OutOfStock(Exception):
    item: str


class TestCalls:
    def test_an_async_body_awaits_async_steps_and_calls_def_steps(self):
        @step
        async def add(a: int, b: int) -> int:
            return a + b

        @step
        def double(a: int) -> int:
            return a * 2

        @workflow
        async def flow(a: int) -> int:
            return double(await add(a, b=2))

        run = Run(flow, a=1)
        assert run.finish() == Finish("6")
        assert [(each.path, each.step.name) for each in run.decisions[:-1]] == [
            ((1,), "add"),
            ((2,), "double"),
        ]
        assert run.decisions[0].arguments == '{"a":1,"b":2}'

    def test_a_def_body_calls_def_steps_and_waits_for_async_ones(self):
        @step
        async def add(a: int, b: int) -> int:
            return a + b

        @step
        def double(a: int) -> int:
            return a * 2

        @workflow
        def flow(a: int) -> int:
            wait(sleep(5))
            return wait(add(double(a), 1))

        run = Run(flow, a=4)
        assert run.finish() == Finish("9")
        assert run.decisions[0] == Sleep((1,), 5.0, None)

    def test_wait_also_works_in_an_async_body_and_on_a_coroutine_of_steps(self):
        @step
        async def add(a: int, b: int) -> int:
            return a + b

        async def add_twice(a: int) -> int:
            return await add(await add(a, 1), 1)

        @workflow
        async def flow() -> int:
            return wait(add(0, 1)) + wait(add_twice(10))

        assert Run(flow).finish() == Finish("13")

    def test_an_async_step_takes_its_number_when_it_is_awaited(self):
        @step
        async def one(name: str) -> str:
            return name

        @workflow
        async def flow() -> list[str]:
            later = one("later")
            sooner = one("sooner")
            return [await sooner, await later]

        run = Run(flow)
        assert run.finish() == Finish('["sooner","later"]')
        assert [decision.arguments for decision in run.decisions[:-1]] == [
            '{"name":"sooner"}',
            '{"name":"later"}',
        ]

    def test_a_step_that_nobody_awaits_blocks_a_body_that_returns(self):
        @step
        async def forgotten() -> None: ...

        @workflow
        async def flow() -> None:
            forgotten()

        verdict = Run(flow).finish()
        assert isinstance(verdict, Block)
        assert "test_replay.py:" in verdict.error["message"]
        assert "step 'forgotten' was never awaited" in verdict.error["message"]

    def test_a_sleep_that_nobody_waits_for_blocks_as_well(self):
        @workflow
        def flow() -> str:
            sleep(60)
            return "rested"

        verdict = Run(flow).finish()
        assert isinstance(verdict, Block)
        assert "a sleep was never awaited" in verdict.error["message"]

    def test_a_body_that_fails_before_it_awaits_all_its_calls_fails(self):
        @step
        async def one(name: str) -> str:
            return name

        @workflow
        async def flow() -> None:
            calls = [one("a"), one("b")]
            await calls[0]
            raise ValueError("enough")

        assert isinstance(Run(flow).finish(), Fail)

    def test_a_suspended_body_does_not_warn_of_calls_it_had_no_chance_to_await(self):
        @step
        async def one() -> None: ...

        @workflow
        async def flow() -> None:
            first, second = one(), one()
            await first
            await second

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Run(flow).start()
            gc.collect()

    def test_a_call_cannot_be_awaited_twice(self):
        @step
        async def one() -> int:
            return 1

        @workflow
        async def flow() -> int:
            call = one()
            await call
            return await call

        outcome = Run(flow).finish()
        assert isinstance(outcome, Fail)
        assert "awaited already" in outcome.error["message"]

    def test_a_step_calls_other_steps_as_plain_functions(self):
        @step
        def inner(a: int) -> int:
            return a + 1

        @step
        def outer(a: int) -> int:
            return inner(a) * 10

        @workflow
        def flow() -> int:
            return outer(1)

        run = Run(flow)
        assert run.finish() == Finish("20")
        assert len(run.history) == 1

    def test_a_workflow_called_in_a_body_is_a_run_of_its_own(self):
        @workflow
        def part(a: int) -> int:
            return a + 1

        @workflow
        async def whole() -> int:
            return part(1) + part(2)

        run = Run(whole)
        decision = run.start()
        assert isinstance(decision, Await)
        (wait,) = decision.waits
        assert wait.fresh
        assert wait.call == AwaitChild((1,), part, '{"a":1}', of=(1,), starts=True)
        run.history = [record(at, "part", kind="child", value=at * 10, seq=at) for at in (1, 2)]
        assert run.finish() == Finish("30")

    def test_async_comprehensions_and_generators_of_a_body_may_await_steps(self):
        @step
        async def square(a: int) -> int:
            return a * a

        @workflow
        async def flow() -> list[int]:
            async def squares() -> Any:
                for a in range(3):
                    yield await square(a)

            return [each async for each in squares()] + [await square(a) for a in (3, 4)]

        assert Run(flow).finish() == Finish("[0,1,4,9,16]")


class TestValues:
    def test_a_body_sees_decoded_values_live_and_replayed_alike(self):
        seen = []

        @step
        async def load(lead: Lead) -> Any:
            lead.tags.append("seen by the step only")
            return (1, 2)

        @workflow
        async def flow(lead: Lead) -> Any:
            result = await load(lead)
            seen.append((result, list(lead.tags)))
            return None

        run = Run(flow, lead={"id": 1, "tags": ["a"]})
        run.finish()
        run.finish()
        assert seen == [([1, 2], ["a"]), ([1, 2], ["a"])]

    def test_a_list_as_result_belongs_to_the_body(self):
        shared = [1]

        @step
        async def load() -> list[int]:
            return shared

        @workflow
        async def flow() -> list[int]:
            first = await load()
            first.append(9)
            return await load()

        assert Run(flow).finish() == Finish("[1]")

    def test_arguments_are_what_they_were_at_the_call(self):
        @step
        async def note(tags: list[str]) -> None: ...

        @workflow
        async def flow(lead: Lead) -> int:
            await note(lead.tags)
            lead.tags.append("b")
            await note(lead.tags)
            return len(lead.tags)

        run = Run(flow, lead={"id": 1, "tags": ["a"]})
        assert run.finish() == Finish("2")
        assert [each.arguments for each in run.decisions[:-1]] == ['{"tags":["a"]}', '{"tags":["a","b"]}']

    def test_arguments_that_cannot_be_encoded_are_an_error_at_the_call(self):
        @step
        async def note(value: Any) -> None: ...

        @workflow
        async def flow() -> str:
            try:
                await note(object())
            except PayloadError as error:
                return str(error)
            return "no error"

        outcome = Run(flow).finish()
        assert isinstance(outcome, Finish)
        assert "step note" in outcome.value

    def test_a_result_that_cannot_be_encoded_fails_the_run(self):
        @workflow
        def flow() -> Any:
            return object()

        outcome = Run(flow).finish()
        assert isinstance(outcome, Fail)
        assert "the result of workflow flow" in outcome.error["message"]

    def test_input_that_cannot_be_decoded_blocks(self):
        @workflow
        def flow(lead: Lead) -> None: ...

        outcome = Run(flow, lead={"id": "x", "tags": []}).finish()
        assert isinstance(outcome, Block)
        assert outcome.reason == "input cannot be decoded"
        assert "lead.id" in outcome.error["message"]

    def test_a_recorded_result_that_no_longer_fits_blocks(self):
        @step
        async def load() -> int:
            return 1

        @workflow
        async def flow() -> int:
            try:
                return await load()
            except Exception:
                return 0

        run = Run(flow)
        run.history = [record(1, "load", value="text", seq=1)]
        outcome = run.finish()
        assert isinstance(outcome, Block)
        assert outcome.reason == "recorded result cannot be decoded"
        assert "the result of step load" in outcome.error["message"]


class TestErrors:
    def test_a_body_sees_stepfailed_with_type_message_and_data(self):
        @step
        async def pay() -> None:
            raise Permanent("card expired")

        @workflow
        async def flow() -> list[str]:
            try:
                await pay()
            except StepFailed as error:
                return [error.type.rpartition(".")[2], error.message]
            return []

        assert Run(flow).finish() == Finish('["Permanent","card expired"]')

    def test_classes_named_in_raises_are_rebuilt_live_and_replayed(self):
        caught = []

        @step(raises=OutOfStock)
        def reserve(item: str) -> None:
            raise OutOfStock(item)

        @workflow
        def flow() -> str:
            try:
                reserve("chair")
            except OutOfStock as error:
                caught.append(error)
                return error.item
            return ""

        run = Run(flow)
        assert run.finish() == run.finish() == Finish('"chair"')
        assert caught == [OutOfStock("chair")] * 2

    def test_an_error_that_nobody_catches_fails_the_run_with_the_steps_own_fault(self):
        @step
        async def pay() -> None:
            raise ValueError("no such card")

        @workflow
        async def flow() -> None:
            await pay()

        outcome = Run(flow).finish()
        assert isinstance(outcome, Fail)
        assert (outcome.error["type"], outcome.error["message"]) == ("ValueError", "no such card")

    @pytest.mark.parametrize(
        "error", [ValueError("x"), RecursionError(), MemoryError(), StopIteration(3), Permanent("x")]
    )
    def test_ordinary_errors_of_a_body_fail_the_run(self, error: Exception):
        @workflow
        def flow() -> None:
            raise error

        assert isinstance(Run(flow).finish(), Fail)

    def test_endless_recursion_in_a_body_fails_the_run(self):
        def deeper(a: int) -> int:
            return deeper(a + 1)

        @workflow
        def flow() -> int:
            return deeper(1)

        outcome = Run(flow).finish()
        assert isinstance(outcome, Fail)
        assert outcome.error["type"] == "RecursionError"

    @pytest.mark.parametrize(
        "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("odd")]
    )
    def test_what_would_end_the_process_blocks_the_run_and_harms_nobody(self, error: BaseException):
        @workflow
        async def flow() -> None:
            raise error

        outcome = Run(flow).finish()
        assert isinstance(outcome, Block)
        assert outcome.reason == f"the body raised {type(error).__name__}"

    def test_an_error_whose_text_cannot_be_made_fails_the_run(self):
        class Odd(Exception):
            def __str__(self) -> str:
                raise ZeroDivisionError

        @workflow
        async def flow() -> None:
            raise Odd

        assert isinstance(Run(flow).finish(), Fail)
