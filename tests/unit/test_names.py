"""What a process claims, and what it leaves to newer workers for a while."""

from __future__ import annotations

import asyncio

import pytest

from tests.waiting import wait_until_async
from worker import step, workflow
from worker.definitions import collecting
from worker.engine import names
from worker.engine.names import Names
from worker.registry import Registry


def some() -> Registry:
    with collecting() as registry:

        @step(queue="elsewhere")
        async def far() -> None: ...

        @workflow
        async def one() -> None: ...

        @workflow(version="2")
        async def two() -> None: ...

    return registry


async def test_what_was_left_is_claimed_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LEFT_SECONDS", 0.05)
    returned = asyncio.Event()
    mine = Names(some(), returned.set)
    claimed = mine.claimed
    assert claimed == mine.all == ["one", "step:far", "two@2"]
    mine.leave("two@2")
    assert claimed == ["one", "step:far"]
    assert mine.all == ["one", "step:far", "two@2"]
    await returned.wait()
    assert claimed == mine.all
    assert claimed is mine.claimed


async def test_whatever_is_left_again_meanwhile_is_left_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    returned: list[float] = []
    mine = Names(some(), lambda: returned.append(loop.time()))
    monkeypatch.setattr(names, "LEFT_SECONDS", 0.05)
    mine.leave("one")
    monkeypatch.setattr(names, "LEFT_SECONDS", 0.2)
    again = loop.time()
    mine.leave("one")
    mine.leave("two@2")
    assert mine.claimed == ["step:far"]
    await wait_until_async(lambda: mine.claimed == mine.all)
    assert len(returned) == 2
    assert min(returned) >= again + 0.2
