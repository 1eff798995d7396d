"""The functions that bodies and steps call, where there is no body: they are what their names say."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from outbox.errors import ConfigError
from tests.unit.drives import FACTS, Run
from worker.context import (
    StepInfo,
    current_run,
    current_step,
    executing,
    now,
    random,
    sleep,
    sleep_until,
    uuid,
    wait,
)
from worker.definitions import collecting, step, workflow
from worker.replay.decisions import Finish

STEP = StepInfo(run_id=FACTS.id, path=(3,), execution=1, fence=1)


class TestOutsideOfARun:
    def test_now_random_and_uuid_are_real(self):
        assert abs(datetime.now(UTC) - now()) < timedelta(minutes=1)
        assert 0 <= random() < 1
        assert uuid() != uuid()
        assert isinstance(uuid(), UUID)

    async def test_sleeps_are_real(self):
        await sleep(0)
        await sleep(timedelta(microseconds=1))
        await sleep_until(datetime.now(UTC) - timedelta(hours=1))

    def test_wait_runs_what_is_awaited(self):
        async def three() -> int:
            await sleep(0)
            return 3

        assert wait(three()) == 3
        wait(sleep(0))

    async def test_wait_where_a_loop_runs_says_to_await(self):
        call = sleep(0)
        with pytest.raises(ConfigError, match="await the call instead"):
            wait(call)
        await call

    def test_a_def_workflow_with_async_steps_can_be_called_plainly(self):
        with collecting():

            @step
            async def one() -> int:
                return 1

            @workflow
            def flow() -> int:
                wait(sleep(0))
                return wait(one()) + 1

        assert flow() == 2
        assert Run(flow).finish() == Finish("2")

    def test_there_is_no_current_run_or_step(self):
        with pytest.raises(ConfigError, match=r"current_run\(\)"):
            current_run()
        with pytest.raises(ConfigError, match=r"current_step\(\)"):
            current_step()


class TestInAStep:
    def test_run_and_step_are_known_while_it_is_executed(self):
        with executing(FACTS, STEP):
            assert current_run() is FACTS
            assert current_step() is STEP
        with pytest.raises(ConfigError):
            current_step()

    async def test_they_are_known_in_the_tasks_and_threads_of_the_step(self):
        with executing(FACTS, STEP):
            assert await asyncio.to_thread(current_step) is STEP
            assert await asyncio.create_task(_step()) is STEP


async def _step() -> StepInfo:
    return current_step()


def test_a_body_has_a_run_and_no_step():
    with collecting():

        @workflow
        def flow() -> str:
            try:
                current_step()
            except ConfigError:
                return str(current_run().id)
            return "a step"

    with executing(FACTS, STEP):
        assert Run(flow).finish() == Finish(f'"{FACTS.id}"')
