from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest

from tests.unit.drives import CREATED, FACTS, Run
from worker.context import current_run, now, random, sleep, sleep_until, uuid
from worker.definitions import collecting, workflow
from worker.replay.decisions import Finish, Sleep


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    with collecting():
        yield


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
