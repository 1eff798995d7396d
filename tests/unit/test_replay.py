from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest

from outbox.errors import PayloadError, Permanent, StepFailed
from tests.unit.drives import CREATED, FACTS, Run, record
from worker.context import current_run, now, random, sleep, sleep_until, uuid, wait
from worker.decisions import Block, DoStep, Fail, Finish, Sleep
from worker.definitions import collecting, step, workflow
from worker.replay import Replay


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

    def test_an_async_step_that_nobody_awaits_warns_like_a_coroutine(self):
        @step
        async def forgotten() -> None: ...

        @workflow
        async def flow() -> None:
            forgotten()

        with pytest.warns(RuntimeWarning, match="step 'forgotten' was never awaited"):
            assert Run(flow).finish() == Finish("null")

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

    def test_a_workflow_called_in_a_body_is_the_plain_function(self):
        @step
        def one() -> int:
            return 1

        @workflow
        def part() -> int:
            return one() + one()

        @workflow
        async def whole() -> int:
            return part() + one()

        run = Run(whole)
        assert run.finish() == Finish("3")
        assert [each.path for each in run.history] == [(1,), (2,), (3,)]

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


class TestSleeps:
    def test_sleep_takes_seconds_or_a_timedelta_and_sleep_until_a_moment(self):
        @workflow
        async def flow() -> None:
            await sleep(1)
            await sleep(timedelta(minutes=1))
            await sleep_until(CREATED)

        run = Run(flow)
        assert run.finish() == Finish("null")
        assert run.decisions[:-1] == [
            Sleep((1,), 1.0, None),
            Sleep((2,), 60.0, None),
            Sleep((3,), None, CREATED),
        ]

    @pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
    def test_a_duration_that_is_none_is_refused(self, seconds: float):
        with pytest.raises(ValueError, match="not negative"):
            sleep(seconds)

    def test_a_moment_without_a_time_zone_is_refused(self):
        with pytest.raises(ValueError, match="time zone"):
            sleep_until(CREATED.replace(tzinfo=None))


class TestDeterminism:
    def test_now_is_the_time_of_the_last_record_delivered(self):
        seen = []

        @workflow
        async def flow() -> None:
            seen.append(now())
            await sleep(1)
            seen.append(now())
            seen.append(now())

        run = Run(flow)
        run.finish()
        run.finish()
        assert seen == [CREATED, run.history[0].at, run.history[0].at] * 2

    def test_random_and_uuid_repeat_and_follow_from_the_seed(self):
        @workflow
        async def flow() -> list[Any]:
            drawn = [random(), uuid()]
            await sleep(1)
            return [*drawn, random(), uuid()]

        run = Run(flow)
        first = run.finish()
        assert isinstance(first, Finish)
        assert run.finish() == first
        drawn = msgspec.json.decode(first.value)
        assert len(set(drawn)) == 4
        assert 0 <= drawn[0] < 1
        assert UUID(drawn[1]).version == 4
        other = Run(flow, facts=msgspec.structs.replace(FACTS, seed="another"))
        assert other.finish() != first

    def test_current_run_tells_the_facts_of_the_run(self):
        @workflow
        async def flow() -> str:
            return str(current_run().id)

        assert Run(flow).finish() == Finish(f'"{FACTS.id}"')


class TestHistory:
    def test_recorded_calls_are_delivered_without_a_decision(self):
        @step
        async def one(a: int) -> int:
            raise AssertionError("it is recorded")

        @workflow
        async def flow() -> int:
            await sleep(3)
            return await one(1) + await one(2)

        run = Run(flow)
        run.history = [record(1, seq=1), record(2, "one", value=10, seq=2), record(3, "one", value=20, seq=3)]
        assert run.start() == Finish("30")

    @pytest.mark.parametrize(
        ("history", "expected", "got"),
        [
            ([record(1, "other", value=1)], "step other at 1 (completed)", "step one at 1"),
            ([record(1)], "sleep at 1 (completed)", "step one at 1"),
            ([record(2, "one", value=1)], "step one at 2 (completed)", "step one at 1"),
            ([record(1, "one", value=1), record(3)], "sleep at 3 (completed)", "sleep at 2"),
            (
                [record(1, "one", value=1), record(2, "one", value=1)],
                "step one at 2 (completed)",
                "sleep at 2",
            ),
            (
                [record(1, "one", value=1), record(2), record(3)],
                "sleep at 3 (completed)",
                "its end without that call",
            ),
            (
                [record(2, "one", n=1, outcome="interrupted")],
                "step one at 2 (interrupted)",
                "step one at 1",
            ),
            (
                [record(1, "two", n=1, outcome="interrupted")],
                "step two at 1 (interrupted)",
                "step one at 1",
            ),
            (
                [record(1, "one", value=1), record(2), record(3, "one", n=1, outcome="interrupted")],
                "step one at 3 (interrupted)",
                "its end without that call",
            ),
        ],
    )
    def test_a_history_that_does_not_fit_blocks_with_expected_and_got(self, history, expected, got):
        @step
        async def one() -> int:
            return 1

        @workflow
        async def flow() -> None:
            try:
                await one()
                await sleep(1)
            except Exception:
                pass

        run = Run(flow)
        run.history = history
        outcome = run.start()
        assert isinstance(outcome, Block)
        assert outcome.reason == "history mismatch"
        assert outcome.error["data"] == {"expected": expected, "got": got}
        assert "test_replay.py:" in outcome.error["message"]
        assert "trace" not in outcome.error

    def test_a_body_that_fails_before_the_end_of_its_history_is_blocked_and_not_failed(self):
        @workflow
        async def flow() -> None:
            raise ValueError("a bug in the new code")

        run = Run(flow)
        run.history = [record(1)]
        outcome = run.start()
        assert isinstance(outcome, Block)
        assert outcome.error["data"]["got"] == "its end without that call, by ValueError"

    def test_executions_that_did_not_complete_go_with_the_decision(self):
        @step
        async def one(a: int) -> int:
            return a

        @workflow
        async def flow() -> int:
            return await one(1)

        failed = record(1, "one", n=1, error={"type": "ValueError", "message": "x"}, seq=1)
        interrupted = record(1, "one", n=2, outcome="interrupted", seq=2)
        run = Run(flow)
        run.history = [failed, interrupted]
        decision = run.start()
        assert isinstance(decision, DoStep)
        assert decision.earlier == (failed, interrupted)
        run.history.append(record(1, "one", value=5, seq=3))
        assert run.start() == Finish("5")

    def test_records_of_the_run_and_of_epochs_are_not_the_drivers_business(self):
        @workflow
        async def flow() -> None:
            await sleep(1)

        run = Run(flow)
        run.history = [
            record((), "flow", kind="run", outcome="blocked"),
            record((), "flow", kind="epoch", n=1, outcome="retry"),
            record(1),
        ]
        assert run.start() == Finish("null")

    def test_other_arguments_are_drift_and_only_noted(self):
        @step
        async def one(a: int) -> int:
            return a

        @workflow
        async def flow(a: int) -> int:
            return await one(a)

        before, after = Run(flow, a=1), Run(flow, a=2)
        before.finish()
        after.history = before.history
        replay = after.replay()
        assert replay.start() == Finish("1")
        assert [(drift.path, drift.name) for drift in replay.drifts] == [((1,), "one")]

    def test_other_arguments_block_a_strict_workflow(self):
        @step
        async def one(a: int) -> int:
            return a

        @workflow(strict=True)
        async def flow(a: int) -> int:
            return await one(a)

        before, after = Run(flow, a=1), Run(flow, a=2)
        before.finish()
        assert before.start() == Finish("1")
        after.history = before.history
        outcome = after.start()
        assert isinstance(outcome, Block)
        assert "other arguments" in outcome.error["message"]

    @pytest.mark.parametrize("strict", [False, True])
    def test_other_arguments_than_in_an_earlier_execution_are_drift_too(self, strict: bool):
        @step
        async def one(a: int) -> int:
            return a

        @workflow(strict=strict)
        async def flow(a: int) -> int:
            return await one(a)

        run = Run(flow, a=1)
        run.history = [record(1, "one", n=1, outcome="interrupted", fingerprint=1, seq=1)]
        decision = run.start()
        assert isinstance(decision, Block) if strict else decision.drift


class TestDeliver:
    def test_only_the_final_record_of_the_call_that_waits_is_taken(self):
        @workflow
        async def flow() -> None:
            await sleep(1)

        replay = Replay(flow, "{}", FACTS)
        with pytest.raises(ValueError, match="no call"):
            replay.deliver(record(1))
        replay.start()
        for wrong in (record(2), record(1, "one"), record(1, n=1)):
            with pytest.raises(ValueError, match="at 1 waits"):
                replay.deliver(wrong)
        assert replay.deliver(record(1)) == Finish("null")
        with pytest.raises(ValueError, match="no call"):
            replay.deliver(record(1))
