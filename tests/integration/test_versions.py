"""Runs of a version go to the workers that carry it, wait while nobody does, and are known by it everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from outbox import AsyncClient
from tests.effects import Gate
from tests.engines import Lab, until
from worker import step, workflow
from worker.definitions import Registry, Workflow, collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


def carrying(
    *versions: str, gate: Gate | None = None, **made: Any
) -> tuple[Registry, dict[str, Workflow[..., Any]]]:
    """An app with these versions of one workflow, which says which of them it is."""
    found = {}
    with collecting() as registry:

        @step
        async def say(version: str) -> str:
            if gate is not None:
                await gate.passed()
            return version

        for version in versions:

            def body(version: str = version) -> Any:
                async def which() -> str:
                    return await say(version)

                return which

            found[version] = workflow(name="which", version=version, **made)(body())
    registry.resolve()
    return registry, found


async def test_each_run_goes_to_the_worker_that_carries_its_version(lab: Lab) -> None:
    old, _ = carrying("", "1")
    new, _ = carrying("2", "10")
    async with lab.engine(old), lab.engine(new), AsyncClient(lab.url) as client:
        runs = {v: [await client.enqueue("which", version=v) for _ in range(5)] for v in ("", "1", "2", "10")}
        for version, handles in runs.items():
            assert [await run.result(20) for run in handles] == [version] * 5
        assert await (await client.enqueue("which")).result(20) == "10"


async def test_a_run_waits_for_a_worker_of_its_version_and_says_so(lab: Lab) -> None:
    old, defined = carrying("1")
    new, _ = carrying("2")
    async with lab.engine(new, poll_seconds=0.1) as other, AsyncClient(lab.url) as client:
        await lab.execute("select pg_advisory_lock(%s)", [other.id])  # as its supervisor would
        run = await client.enqueue(defined["1"])
        await lab.waits(run.id, "shelved")
        why = await client.why(run.id)
        assert why is not None
        assert "no live worker" in why
        assert "version '1'" in why
        assert (await run.info()).status == "pending"
        async with lab.engine(old):
            assert await run.result(20) == "1"


async def test_new_runs_get_the_version_that_lives_whoever_registered_last(lab: Lab) -> None:
    new, _ = carrying("2")
    old, _ = carrying("1")
    async with AsyncClient(lab.url) as client, lab.engine(new):
        async with lab.engine(old):
            assert await (await client.enqueue("which")).result(20) == "1"
        run = await client.enqueue("which")
        assert (await run.info()).version == "2"
        assert await run.result(20) == "2"
    assert (await lab.execute("select stepwell.current_version('which'), stepwell.current_version('x')"))[0] == (
        "1", None,
    )  # fmt: skip


async def test_a_repaired_run_keeps_its_version(lab: Lab) -> None:
    gate = Gate()
    registry, defined = carrying("1", "2", gate=gate)
    async with AsyncClient(lab.url) as client, lab.engine(registry):
        gate.open()
        run = await client.enqueue(defined["1"])
        assert await run.result(20) == "1"
        made = await client.fork(run.id, 1)
        assert await client.result(made, 20) == "1"
        await client.rewind(run.id, 1)
        assert await run.result(20) == "1"
        # The history of one version does not fit another one, or does by chance: that is for whoever asks for it.
        other = await client.fork(run.id, 1, version="2")
        assert await client.result(other, 20) == "2"
        assert {info.version for info in await client.list("which")} == {"1", "2"}


async def test_a_child_is_called_in_the_version_of_its_definition(lab: Lab) -> None:
    registry, defined = carrying("1", "2")
    with collecting() as callers:

        @workflow
        async def calling() -> list[Any]:
            return [await defined["1"](), await defined["2"]()]

    registry.add_workflow(calling)
    async with AsyncClient(lab.url) as client, lab.engine(registry):
        assert await (await client.enqueue(calling)).result(20) == ["1", "2"]
        assert callers.workflows


async def test_an_old_worker_drains_while_the_new_one_takes_what_is_its_own(lab: Lab) -> None:
    """A rolling deploy of another version: the old one's runs end with the old one."""
    gate = Gate()
    old, before = carrying("1", gate=gate)
    new, after = carrying("1", "2")
    async with AsyncClient(lab.url) as client:
        async with lab.engine(old) as leaving:
            runs = [await client.enqueue(before["1"]) for _ in range(20)]
            await gate.reached()
            async with lab.engine(new):
                gate.open()
                runs += [await client.enqueue(after["2"]) for _ in range(20)]
                await leaving.drain()
                got = await asyncio.gather(*(run.result(20) for run in runs))
        assert got == ["1"] * 20 + ["2"] * 20

        async def nothing_left() -> bool:
            return await lab.execute("select count(*) from stepwell.tasks") == [(0,)]

        await until(nothing_left)
