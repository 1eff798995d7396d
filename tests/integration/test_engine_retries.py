"""Failures and time-outs of steps: when they are tried again, and what holds a slot meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tenacity import stop_after_attempt, stop_never, wait_fixed, wait_none

from outbox.errors import Permanent, RetryAfter, StepFailed
from tests.effects import Gate
from tests.engines import Lab, at, until
from tests.waiting import wait_until_async
from worker import NOT_DONE, current_step, retrying, step, workflow
from worker.definitions import Workflow, collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


class Script:
    """A step that raises or returns what its script says, one item for each execution."""

    def __init__(self, items: list[Any], **options: Any) -> None:
        self.items = items
        self.executions: list[int] = []
        self.asked: list[int] = []
        with collecting() as self.registry:

            @step(**options)
            async def call() -> Any:
                self.executions.append(current_step().execution)
                item = self.items.pop(0)
                if isinstance(item, Exception):
                    raise item
                return item

            @workflow
            async def calling() -> Any:
                return await call()

        self.flow: Workflow[..., Any] = calling


def policy(times: int, wait: float = 0.0, on: Any = Exception) -> Any:
    return retrying(stop=stop_after_attempt(times), wait=wait_fixed(wait) if wait else wait_none(), on=on)


async def test_a_bare_step_is_not_tried_again(lab: Lab) -> None:
    script = Script([ValueError("no"), "never"])
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        assert (await lab.ended(run)).state == "failed"
    assert script.executions == [1]
    assert await lab.history(run) == [("1", 0, "failed")]


async def test_failures_are_recorded_until_the_step_succeeds(lab: Lab) -> None:
    script = Script([ValueError("one"), OSError("two"), "three"], retry=policy(5, 0.01))
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        assert await lab.succeeded(run) == "three"
    assert script.executions == [1, 2, 3]
    assert await lab.history(run) == [("1", 1, "failed"), ("1", 2, "failed"), ("1", 0, "completed")]
    assert [error and error["message"] for error in await lab.errors(run)] == ["one", "two", None]
    assert await lab.totals("step") == {"failed": 2, "completed": 1}


async def test_the_last_failure_is_final_and_recorded_once(lab: Lab) -> None:
    script = Script([ValueError(str(n)) for n in range(9)], retry=policy(3))
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        failed = await lab.ended(run)
    assert (failed.state, failed.error["message"]) == ("failed", "2")
    assert script.executions == [1, 2, 3]
    assert await lab.history(run) == [
        ("1", 1, "failed"),
        ("1", 2, "failed"),
        ("1", 0, "failed"),
    ]


@pytest.mark.parametrize(
    "error", [Permanent("never again"), KeyError("not on the list")], ids=["permanent", "other class"]
)
async def test_what_the_policy_does_not_cover_is_final(lab: Lab, error: Exception) -> None:
    script = Script([error, "never"], retry=policy(5, on=ValueError))
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        assert (await lab.ended(run)).state == "failed"
    assert script.executions == [1]


async def test_retry_after_sets_the_wait_and_parks_when_it_is_long(lab: Lab) -> None:
    script = Script([RetryAfter(0.05), RetryAfter(1.2, "busy"), "done"], retry=policy(5, 0.01))
    async with lab.engine(script.registry, concurrency=1):
        run = await lab.enqueue(script.flow)
        await lab.waits(run)
        parked_at = time.monotonic()
        task = await lab.task(run)
        assert task is not None
        assert task.doing == [1]
        assert await lab.succeeded(run) == "done"
        assert 0.8 < time.monotonic() - parked_at < 3
    assert script.executions == [1, 2, 3]


async def test_a_long_wait_holds_no_slot_and_a_short_one_does(lab: Lab) -> None:
    with collecting() as registry:

        @step(retry=policy(9, 0.3))
        async def shortly() -> None:
            if current_step().execution < 3:
                raise ValueError

        @step(retry=policy(9, 1.1))
        async def later() -> None:
            if current_step().execution < 2:
                raise ValueError

        @workflow
        async def short() -> None:
            await shortly()

        @workflow
        async def long() -> None:
            await later()

    async with lab.engine(registry, concurrency=1) as engine:
        run = await lab.enqueue(short)
        seen: set[str] = set()
        while (task := await lab.task(run)) is not None:
            seen.add(task.state)
            await asyncio.sleep(0.01)
        assert seen <= {"ready", "claimed"}
        run = await lab.enqueue(long)
        await lab.waits(run)
        await wait_until_async(lambda: engine.engine.vitals().in_flight == 0)
        other = await lab.enqueue(short)
        await lab.succeeded(other)  # the only slot is free
        await lab.succeeded(run)


async def test_a_crash_does_not_reset_the_count(lab: Lab) -> None:
    script = Script([ValueError(str(n)) for n in range(9)], retry=policy(3))
    async with lab.engine(script.registry) as first:
        lost = first.lose_writes(at(1, 2))
        run = await lab.enqueue(script.flow)
        await wait_until_async(lost.is_set)
        await first.crash()
        assert await lab.history(run) == [("1", 1, "failed")]
        async with lab.engine(script.registry):
            assert (await lab.ended(run)).state == "failed"
    # The second execution died with its answer: it is interrupted, which says nothing against the step.
    assert await lab.history(run) == [
        ("1", 1, "failed"),
        ("1", 2, "interrupted"),
        ("1", 3, "failed"),
        ("1", 0, "failed"),
    ]
    assert script.executions == [1, 2, 3, 4]


async def test_a_crash_while_it_waits_for_the_retry_neither_shortens_nor_counts_it(lab: Lab) -> None:
    script = Script([RetryAfter(1.5), "done"], retry=policy(2))
    async with lab.engine(script.registry) as first:
        run = await lab.enqueue(script.flow)
        await lab.waits(run)
        failed_at = time.monotonic()
        await first.crash()
        async with lab.engine(script.registry):
            assert await lab.succeeded(run) == "done"
    assert 1.2 < time.monotonic() - failed_at < 4
    assert await lab.history(run) == [("1", 1, "failed"), ("1", 0, "completed")]


async def test_a_retry_of_the_run_tries_anew_and_counts_anew(lab: Lab) -> None:
    script = Script([ValueError("a"), ValueError("b"), ValueError("c"), "fine"], retry=policy(2))
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        assert (await lab.ended(run)).state == "failed"
        assert await lab.retry(run) == 1
        assert await lab.succeeded(run) == "fine"
        assert await lab.retry(run) is None
    assert script.executions == [1, 2, 3, 4]  # what the policy counts begins anew, what has happened does not


async def test_verify_is_asked_after_failures_too_but_not_before_the_first_execution(lab: Lab) -> None:
    answers: list[Any] = [NOT_DONE, "it had arrived"]
    asked: list[int] = []

    async def verify() -> Any:
        asked.append(current_step().execution)
        return answers.pop(0)

    script = Script(
        [ConnectionError("lost"), ConnectionError("lost again"), "never"], retry=policy(5), verify=verify
    )
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        assert await lab.succeeded(run) == "it had arrived"
    assert script.executions == [1, 2]
    assert asked == [2, 3]
    assert await lab.history(run) == [("1", 1, "failed"), ("1", 2, "failed"), ("1", 0, "completed")]


async def test_a_verify_that_raises_is_tried_again_by_the_policy(lab: Lab) -> None:
    answers: list[Any] = [ConnectionError("mailbox closed"), "found"]

    async def verify() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    script = Script([ConnectionError("lost"), "never"], retry=policy(5), verify=verify)
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        assert await lab.succeeded(run) == "found"
    assert script.executions == [1]
    assert await lab.history(run) == [("1", 1, "failed"), ("1", 2, "failed"), ("1", 0, "completed")]


async def test_a_policy_that_raises_stops_the_retries(lab: Lab) -> None:
    def broken(state: Any) -> bool:
        raise RuntimeError("the policy itself")

    script = Script([ValueError("no"), "never"], retry=retrying(stop=broken, wait=wait_none()))
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        assert (await lab.ended(run)).error["message"] == "no"


# -- time-outs


async def test_an_async_step_that_times_out_is_cancelled_and_counts_as_interrupted_failure(lab: Lab) -> None:
    ended: list[str] = []
    with collecting() as registry:

        @step(timeout=0.1, retry=policy(3))
        async def slow() -> str:
            try:
                if current_step().execution < 3:
                    await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            return "third time"

        @step(timeout=0.05)
        async def too_slow() -> None:
            await asyncio.sleep(60)

        @workflow
        async def timing() -> list[str]:
            said = [await slow()]
            try:
                await too_slow()
            except StepFailed as error:
                said += [error.type, error.message]
            return said

    async with lab.engine(registry):
        run = await lab.enqueue(timing)
        assert await lab.succeeded(run) == ["third time", "TimeoutError", "no answer within 0.05 s"]
    assert ended == ["cancelled", "cancelled"]
    assert await lab.history(run) == [
        ("1", 1, "interrupted"),
        ("1", 2, "interrupted"),
        ("1", 0, "completed"),
        ("2", 0, "failed"),
    ]


async def test_a_timeout_error_of_the_step_itself_is_an_ordinary_failure(lab: Lab) -> None:
    script = Script([TimeoutError("theirs"), "done"], timeout=60, retry=policy(2))
    async with lab.engine(script.registry):
        run = await lab.enqueue(script.flow)
        assert await lab.succeeded(run) == "done"
    assert await lab.history(run) == [("1", 1, "failed"), ("1", 0, "completed")]


async def test_a_def_step_that_times_out_is_abandoned_and_not_tried_again_here_while_its_thread_lives(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.claimed.HELD_WAIT_SECONDS", 0.1)
    monkeypatch.setattr("worker.engine.claimed.BUSY_THREAD_SECONDS", 0.2)
    gate, threads = Gate(), list[int]()
    with collecting() as registry:

        @step(timeout=0.1, retry=policy(9))
        def slow() -> str:
            threads.append(threading.get_ident())
            execution = current_step().execution
            if execution == 1:
                gate.passed_in_thread()
            return f"answer of {execution}"

        @workflow
        async def timing() -> str:
            return slow()

    async with lab.engine(registry) as engine:
        run = await lab.enqueue(timing)
        await lab.waits(run)

        # It comes back twice, finds the thread alive and parks again: without executing, without recording.
        async def came_back() -> bool:
            task = await lab.task(run)
            return task is not None and task.attempt >= 3 and task.state == "waiting"

        await until(came_back, 15)
        assert len(threads) == 1
        assert await lab.history(run) == [("1", 1, "interrupted")]
        gate.open()
        assert await lab.succeeded(run) == "answer of 2"  # the late answer of 1 was dropped
        assert engine.engine.vitals().in_flight == 0
    assert len(threads) == 2
    assert await lab.history(run) == [("1", 1, "interrupted"), ("1", 0, "completed")]


async def test_threads_that_were_abandoned_do_not_use_up_the_threads(lab: Lab) -> None:
    gate = Gate()
    with collecting() as registry:

        @step(timeout=0.1)
        def stuck() -> None:
            gate.passed_in_thread()

        @step
        def quick() -> str:
            return "quick"

        @workflow
        async def both() -> str:
            try:
                stuck()
            except StepFailed:
                return quick()
            return "never"

    async with lab.engine(registry, threads=2):
        try:
            runs = await lab.enqueue_many(both, [{}] * 10)
            for run in runs:
                assert await lab.succeeded(run) == "quick"
        finally:
            gate.open()


async def test_a_held_step_that_times_out_waits_for_a_person_and_is_executed_after_a_retry(lab: Lab) -> None:
    with collecting() as registry:

        @step(timeout=0.1, on_crash="hold", retry=policy(9))
        async def pay() -> str:
            if current_step().execution == 1:
                await asyncio.sleep(60)
            return "paid"

        @workflow
        async def paying() -> str:
            return await pay()

    async with lab.engine(registry):
        run = await lab.enqueue(paying)
        assert (await lab.ended(run)).error["type"] == "Held"
        assert await lab.history(run) == [("1", 1, "interrupted")]
        await lab.retry(run)
        assert await lab.succeeded(run) == "paid"


async def test_at_most_so_many_def_steps_run_at_a_time(lab: Lab) -> None:
    now_running, highest, lock = [0], [0], threading.Lock()
    with collecting() as registry:

        @step
        def busy() -> None:
            with lock:
                now_running[0] += 1
                highest[0] = max(highest[0], now_running[0])
            time.sleep(0.005)
            with lock:
                now_running[0] -= 1

        @workflow
        def using() -> None:
            busy()

    async with lab.engine(registry, threads=3):
        await lab.enqueue_many(using, [{}] * 60)
        await lab.all_succeeded(60)
    assert highest[0] == 3


async def test_retries_without_end_do_not_grow_the_wait_of_others(lab: Lab) -> None:
    stop = asyncio.Event()
    with collecting() as registry:

        @step(retry=retrying(stop=stop_never, wait=wait_fixed(0.01)))
        async def again() -> None:
            if not stop.is_set():
                raise ValueError

        @step
        async def fine() -> str:
            return "fine"

        @workflow
        async def failing() -> None:
            await again()

        @workflow
        async def working() -> str:
            return await fine()

    async with lab.engine(registry, concurrency=20):
        await lab.enqueue_many(failing, [{}] * 10)
        assert await lab.succeeded(await lab.enqueue(working), 5) == "fine"
        stop.set()
        await lab.all_succeeded(11)


async def test_a_cancellation_that_nobody_asked_for_is_a_failure(lab: Lab) -> None:
    with collecting() as registry:

        @step(timeout=30)
        async def confused() -> None:
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other

        @step(timeout=30)
        async def impatient() -> None:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)

        @workflow
        async def failing() -> list[str]:
            said = []
            for call in (confused(), impatient()):
                try:
                    await call
                except StepFailed as error:
                    said.append(error.type)
            return said

    async with lab.engine(registry):
        run = await lab.enqueue(failing)
        assert await lab.succeeded(run) == ["asyncio.exceptions.CancelledError", "TimeoutError"]
    assert await lab.history(run) == [("1", 0, "failed"), ("2", 0, "failed")]
