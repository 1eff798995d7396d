"""What hooks are told of runs, and that nothing else comes of it."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from uuid import uuid4

import pytest_asyncio
from tenacity import stop_after_attempt, wait_fixed

from tests.effects import Gate
from tests.engines import Lab
from tests.spans import Memory
from tests.waiting import wait_until_async
from worker import events, gather, on_event, retrying, sleep, step, workflow
from worker.definitions import Registry, collecting

E = TypeVar("E", bound=events.Event)
GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
CHAPTER = GUIDE.partition("\n## Events\n")[2].partition("\n## ")[0]


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


class Told(list[Any]):
    """What a hook of a registry is told."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        registry.add_hook(self.append)

    @property
    def names(self) -> list[str]:
        return [type(each).__name__ for each in self]

    def of(self, kind: type[E]) -> list[E]:
        return [each for each in self if isinstance(each, kind)]


class MailboxFullError(Exception):
    """What a step raises."""


async def test_a_run_is_told_from_start_to_end(lab: Lab) -> None:
    with collecting() as registry:

        @step
        async def send(to: str) -> str:
            return to

        @workflow(name="welcome")
        async def welcome() -> str:
            await sleep(0.01)
            return await send("Ada")

    told = Told(registry)
    async with lab.engine(registry) as engine:
        run = await lab.enqueue(welcome)
        await lab.succeeded(run)
    assert told.names == ["RunStarted", "StepStarted", "RunEnded"]
    for each in told:
        assert (each.run_id, each.workflow, each.worker, each.epoch) == (run, "welcome", engine.id, 0)
        assert each.trace_id is None
        assert each.at.tzinfo is not None
    (started,), (ended,) = told.of(events.StepStarted), told.of(events.RunEnded)
    assert (started.step, started.path, started.execution) == ("send", (2,), 1)
    assert (ended.state, ended.error) == ("succeeded", None)
    assert 0 < ended.seconds < 60


async def test_failures_are_told_with_what_was_raised(lab: Lab) -> None:
    raised: list[BaseException] = []
    with collecting() as registry:

        @step(retry=retrying(stop=stop_after_attempt(2), wait=wait_fixed(0.01)))
        def send() -> None:
            error = MailboxFullError(f"try {len(raised)}")
            raised.append(error)
            raise error

        @workflow
        async def welcome() -> None:
            send()

    told = Told(registry)
    async with lab.engine(registry):
        run = await lab.enqueue(welcome)
        assert (await lab.ended(run)).state == "failed"
    assert told.names == ["RunStarted", "StepStarted", "StepRetried", "StepStarted", "StepFailed", "RunEnded"]
    (retried,), (failed,), (ended,) = (
        told.of(events.StepRetried), told.of(events.StepFailed), told.of(events.RunEnded),
    )  # fmt: skip
    assert [retried.error, failed.error] == raised
    assert failed.error.__traceback__ is not None
    assert (retried.wait_seconds, retried.execution, failed.execution) == (0.01, 1, 2)
    assert ended.state == "failed"
    assert ended.error is not None
    assert ended.error["message"].endswith("try 1")


async def test_a_blocked_run_is_told_with_the_reason(lab: Lab) -> None:
    with collecting() as registry:

        @step
        async def note() -> None: ...

        @workflow
        async def forgetful() -> None:
            note()  # never awaited

    told = Told(registry)
    async with lab.engine(registry):
        run = await lab.enqueue(forgetful)
        assert (await lab.ended(run)).state == "blocked"
    assert told.names == ["RunStarted", "RunBlocked"]
    assert told[1].reason == (await lab.run(run)).error["reason"]
    assert "note" in told[1].error["message"]


async def test_a_cancelled_run_and_its_step_that_was_cut_short_are_told(lab: Lab) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def slow() -> None:
            await gate.passed()

        @workflow
        async def flow() -> None:
            await slow()

    told = Told(registry)
    async with lab.engine(registry):
        run = await lab.enqueue(flow)
        await gate.reached()
        await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
    assert told.names == ["RunStarted", "StepStarted", "StepInterrupted", "RunEnded"]
    assert told[3].state == "cancelled"
    gate.open()


async def test_what_the_last_worker_died_of_is_told_by_the_next(lab: Lab) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def slow() -> None:
            await gate.passed()

        @workflow
        async def flow() -> None:
            await slow()

    told = Told(registry)
    async with lab.engine(registry) as first:
        run = await lab.enqueue(flow)
        await gate.reached()
        await first.crash()
    gate.open()
    async with lab.engine(registry) as second:
        await lab.succeeded(run)
    assert [(type(each).__name__, each.worker) for each in told] == [
        ("RunStarted", first.id), ("StepStarted", first.id),
        ("StepInterrupted", second.id), ("StepStarted", second.id), ("RunEnded", second.id),
    ]  # fmt: skip
    assert [told[2].execution, told[3].execution] == [1, 2]


async def test_steps_that_are_tasks_of_their_own_are_told(lab: Lab) -> None:
    with collecting() as registry:

        @step
        async def work(n: int) -> int:
            if n < 0:
                raise MailboxFullError("negative")
            return n

        @workflow
        async def spread() -> list[Any]:
            return [type(each).__name__ for each in await gather(work(1), work(-1), return_errors=True)]

    told = Told(registry)
    async with lab.engine(registry):
        run = await lab.enqueue(spread)
        assert await lab.succeeded(run) == ["int", "StepFailed"]
    assert sorted(told.names) == ["RunEnded", "RunStarted", "StepFailed", "StepStarted", "StepStarted"]
    assert isinstance(told.of(events.StepFailed)[0].error, MailboxFullError)


async def test_a_retried_run_starts_and_ends_once_more(lab: Lab) -> None:
    broken = True
    with collecting() as registry:

        @step
        async def fickle() -> None:
            if broken:
                raise ValueError("no")

        @workflow
        async def flow() -> None:
            await fickle()

    told = Told(registry)
    async with lab.engine(registry):
        run = await lab.enqueue(flow)
        await lab.ended(run)
        broken = False
        await lab.retry(run)
        await lab.succeeded(run)
    assert [(each.epoch, each.state) for each in told.of(events.RunEnded)] == [
        (0, "failed"),
        (1, "succeeded"),
    ]
    assert [each.epoch for each in told.of(events.RunStarted)] == [0, 1]


async def test_a_hook_that_waits_or_raises_holds_up_nothing(lab: Lab) -> None:
    go_on = threading.Event()
    with collecting() as registry:

        @step
        async def send(n: int) -> int:
            return n

        @workflow
        async def flow(n: int) -> int:
            return await send(n)

        @on_event
        def stuck(_: events.Event) -> None:
            assert go_on.wait(10)
            raise MailboxFullError("after all")

    async with lab.engine(registry):
        runs = [await lab.enqueue(flow, {"n": n}) for n in range(30)]
        assert [await lab.succeeded(run) for run in runs] == list(range(30))
        assert not go_on.is_set()
        go_on.set()


async def test_events_name_the_trace(lab: Lab) -> None:
    memory = Memory()
    with collecting() as registry:

        @workflow
        async def flow() -> int:
            return 7

    told = Told(registry)
    async with lab.engine(registry, tracing=memory.tracing()):
        await lab.succeeded(await lab.enqueue(flow))
    await wait_until_async(lambda: len(told) == 2)
    assert {each.trace_id for each in told} == {memory.spans.one("run flow").trace_id}


def test_the_guide_tells_of_each_event_and_its_example_works() -> None:
    kinds = {name for name in events.__all__ if name not in ("Event", "RunEvent", "StepEvent", "on_event")}
    assert set(re.findall(r"^\| `(\w+)` \|", CHAPTER, re.MULTILINE)) == kinds
    captured: list[Any] = []
    posted: list[str] = []
    names: dict[str, Any] = {
        "sentry_sdk": SimpleNamespace(capture_exception=lambda error, tags: captured.append((error, tags))),
        "post_to_chat": posted.append,
    }
    with collecting() as registry:
        for block in re.findall(r"^```python\n(.*?)^```", CHAPTER, re.MULTILINE | re.DOTALL):
            exec(compile(block, "guide", "exec"), names)
    (hook,) = registry.hooks
    error = MailboxFullError("no")
    about: dict[str, Any] = {
        "at": datetime.now(UTC), "worker": 1, "run_id": uuid4(), "workflow": "welcome", "epoch": 0, "trace_id": None,
    }  # fmt: skip
    hook(events.StepFailed(step="send", path=(1,), execution=1, error=error, **about))
    hook(events.RunBlocked(reason="history mismatch", error={}, **about))
    hook(events.RunStarted(**about))
    assert captured == [(error, {"step": "send", "run": str(about["run_id"])})]
    assert posted == ["welcome needs a person: history mismatch"]
