"""Forks, rewinds, resolutions and pauses as a body lives through them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest_asyncio

from outbox import AsyncClient, RunFailed
from tests.effects import Gate
from tests.engines import Lab, until
from worker import current_step, gather, now, random, sleep, start, step, uuid, wait_signal, workflow
from worker.definitions import Registry, collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


@pytest_asyncio.fixture
async def client(lab: Lab) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(lab.url) as opened:
        yield opened


async def _length_of(executed: list[int], length: int) -> bool:
    return len(executed) >= length


class Effects(list[tuple[str, str]]):
    """What steps have done: (what, idempotency key)."""

    def note(self, what: str) -> None:
        self.append((what, current_step().idempotency_key))

    @property
    def names(self) -> list[str]:
        return [what for what, _ in self]

    def keys(self, what: str) -> list[str]:
        return [key for each, key in self if each == what]


async def test_a_fork_draws_the_same_numbers_and_has_keys_of_its_own(lab: Lab, client: AsyncClient) -> None:
    effects = Effects()
    broken = True
    with collecting() as registry:

        @step
        async def note(what: str) -> str:
            effects.note(what)
            if broken and what == "c":
                raise ValueError("no")
            return what

        @workflow
        async def drawing() -> list[Any]:
            said = [now().isoformat(), random(), str(uuid())]
            for what in "abc":
                await note(what)
                said += [random(), str(uuid())]
            return said

    async with lab.engine(registry):
        run = await client.enqueue(drawing)
        assert (await lab.ended(run.id)).state == "failed"
        broken = False
        made = await client.fork(run.id, 2)
        forked = await lab.succeeded(made)
        await client.retry(run.id)
        assert await run.result(20) == forked
        second = await client.fork(made, 3)
        assert await lab.succeeded(second) == forked
    assert effects.names == ["a", "b", "c", "b", "c", "c", "c"]
    assert [key.partition(":")[0] for key in effects.keys("c")] == [
        str(run.id),
        str(made),
        str(run.id),
        str(second),
    ]
    assert len(set(effects.keys("c"))) == 3


async def test_a_rewound_run_executes_again_with_other_keys_what_came_after(
    lab: Lab, client: AsyncClient
) -> None:
    effects = Effects()
    with collecting() as registry:

        @step
        async def note(what: str) -> int:
            effects.note(what)
            return len(effects)

        @workflow
        async def noting() -> list[int]:
            first = await note("a")
            both = await gather(note("b"), note("c"))
            return [first, *both, await note("d")]

    async with lab.engine(registry):
        run = await client.enqueue(noting)
        assert sorted(await run.result(20)) == [1, 2, 3, 4]
        assert await client.rewind(run.id, 2) == 1
        assert await lab.succeeded(run.id) != [1, 2, 3, 4]
        assert await client.rewind(run.id, 3) == 2
        assert (await lab.succeeded(run.id))[3] == 8
    assert sorted(effects.names) == ["a", "b", "b", "c", "c", "d", "d", "d"]
    assert [key.rpartition(":")[2] for key in effects.keys("d")] == ["3", "1", "2"]
    assert effects.keys("a") == [f"{run.id}:1"]


async def test_signals_are_taken_again_after_a_rewind(lab: Lab, client: AsyncClient) -> None:
    with collecting() as registry:

        @step
        async def passing(text: str) -> str:
            return text

        @workflow
        async def listening() -> list[str]:
            said = [await wait_signal("say", type=str)]
            said.append(await passing("between"))
            said.append(await wait_signal("say", type=str))
            return said

    async with lab.engine(registry):
        run = await client.enqueue(listening)
        for text in ("one", "two", "three"):
            await run.signal("say", text)
        assert await run.result(20) == ["one", "between", "two"]
        await client.rewind(run.id, 1)
        assert await lab.succeeded(run.id) == ["one", "between", "two"]
        await client.rewind(run.id, 3)
        assert await lab.succeeded(run.id) == ["one", "between", "two"]
    assert await lab.execute("select payload #>> '{}' from stepwell.signals") == [("three",)]


async def test_a_held_step_is_resolved_and_the_body_sees_it(lab: Lab, client: AsyncClient) -> None:
    gate = Gate()
    executed: list[Any] = []
    with collecting() as registry:

        @step(on_crash="hold")
        async def charge(n: int) -> str:
            executed.append(n)
            await gate.passed()
            return "charged"

        @workflow
        async def paying(n: int) -> str:
            try:
                return await charge(n)
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        @workflow
        async def paying_two() -> list[str]:
            return list(await gather(charge(7), charge(8)))

    engine = lab.start(registry)
    await engine.claiming()
    runs = [await client.enqueue(paying, n) for n in (1, 2)]
    both = await client.enqueue(paying_two)
    await gate.reached(4)
    await engine.crash()
    async with lab.engine(registry):
        for run in (*runs, both):
            assert (await lab.ended(run.id)).state == "blocked"
        await client.resolve(runs[0].id, 1, "charged by hand")
        await client.resolve(runs[1].id, 1, error="the bank says no")
        assert await runs[0].result(20) == "charged by hand"
        assert "the bank says no" in await runs[1].result(20)
        assert await client.resolve(both.id, "1.1.1", "by hand") == 1
        gate.open()
        assert await both.result(20) == ["by hand", "charged"]
    assert sorted(executed) == [1, 2, 7, 8, 8]


async def test_a_value_of_the_wrong_type_is_said_anew_and_nothing_is_executed_for_that(
    lab: Lab, client: AsyncClient
) -> None:
    gate = Gate()
    executed: list[int] = []
    with collecting() as registry:

        @step(on_crash="hold")
        async def charge() -> str:
            await gate.passed()
            return "charged"

        @step
        async def note(n: int) -> int:
            executed.append(n)
            return n

        @workflow
        async def paying() -> list[str | int]:
            return [await note(1), *await gather(charge(), note(2)), await note(3)]

    engine = lab.start(registry)
    await engine.claiming()
    run = await client.enqueue(paying)
    await gate.reached(1)
    await until(lambda: _length_of(executed, 2), what="the other branch")
    await engine.crash()
    async with lab.engine(registry):
        held = await lab.ended(run.id)
        assert (held.state, held.error["reason"]) == ("blocked", "held after an interruption")
        assert "`stepwell runs resolve RUN 2.1.1 --value JSON`" in held.error["message"]
        assert await client.resolve(run.id, "2.1.1", 17) == 1
        blocked = await lab.ended(run.id)
        assert (blocked.state, blocked.error["reason"]) == ("blocked", "recorded result cannot be decoded")
        again = f"if a person gave it, `stepwell runs resolve {run.id} 2.1.1 --value …` gives another"
        assert again in blocked.error["message"]
        assert await client.resolve(run.id, "2.1.1", "seventeen") == 2
        assert await run.result(20) == [1, "seventeen", 2, 3]
    assert executed == [1, 2, 3]


async def test_a_failed_step_is_resolved(lab: Lab, client: AsyncClient) -> None:
    with collecting() as registry:

        @step
        async def charge() -> int:
            raise ValueError("no")

        @step
        async def ship(paid: int) -> int:
            return paid + 1

        @workflow
        async def buying() -> int:
            return await ship(await charge())

    async with lab.engine(registry):
        run = await client.enqueue(buying)
        assert (await lab.ended(run.id)).state == "failed"
        assert await client.resolve(run.id, 1, 41) == 1
        assert await run.result(20) == 42


async def test_an_undone_run_is_rewound_to_where_its_undo_ended(lab: Lab, client: AsyncClient) -> None:
    effects = Effects()
    broken = True
    with collecting() as registry:

        @step
        async def release(n: int) -> None:
            effects.note(f"release {n}")

        @step(undo=release)
        async def reserve(n: int) -> None:
            effects.note(f"reserve {n}")

        @step
        async def charge() -> str:
            if broken:
                raise ValueError("no")
            return "charged"

        @workflow
        async def buying() -> str:
            await reserve(1)
            await reserve(2)
            return await charge()

    async with lab.engine(registry):
        run = await client.enqueue(buying)
        assert (await lab.ended(run.id)).state == "failed"
        broken = False
        made = await client.fork(run.id, 3)
        assert await lab.succeeded(made) == "charged"
        await client.rewind(run.id, 1)
        assert await run.result(20) == "charged"
    assert effects.names == ["reserve 1", "reserve 2", "release 2", "release 1", "reserve 1", "reserve 2"]
    assert len(set(effects.keys("reserve 1"))) == 2


# -- pauses --------------------------------------------------------------------------------------------


def steps_of(gate: Gate, executed: list[str]) -> Registry:
    with collecting() as registry:

        @step
        async def work(what: str) -> str:
            executed.append(what)
            if what.startswith("slow"):
                await gate.passed()
            return what

        @workflow
        async def one_by_one() -> list[str]:
            return [await work(what) for what in ("slow", "b", "c")]

        @workflow
        async def side_by_side() -> list[str]:
            done = await gather(*(work(what) for what in ("slow 1", "slow 2", "c")))
            return [*done, await work("last")]

        @workflow
        async def napping() -> str:
            await sleep(0.2)
            return await work("awake")

        @workflow
        async def listening() -> str:
            return await wait_signal("go", type=str)

    return registry


async def settled(lab: Lab, run: UUID) -> None:
    """Wait until nothing of a paused run is executed any more."""

    async def paused() -> bool:
        return await lab.status(run) == "paused"

    await until(paused, what="the run to be paused")


async def test_a_paused_run_ends_the_step_that_it_is_at_and_no_other(lab: Lab, client: AsyncClient) -> None:
    gate = Gate()
    executed: list[Any] = []
    async with lab.engine(steps_of(gate, executed)):
        run = await client.enqueue("one_by_one")
        await gate.reached()
        assert await run.pause()
        assert (await run.info()).status == "running"
        gate.open()
        await settled(lab, run.id)
        assert executed == ["slow"]
        assert await lab.history(run.id) == [("1", 0, "completed")]
        assert await run.resume()
        assert await run.result(20) == ["slow", "b", "c"]
    assert executed == ["slow", "b", "c"]


async def test_steps_side_by_side_are_paused_and_their_ends_are_not_lost(
    lab: Lab, client: AsyncClient
) -> None:
    gate = Gate()
    executed: list[Any] = []
    async with lab.engine(steps_of(gate, executed)):
        run = await client.enqueue("side_by_side")
        await gate.reached(2)
        await until(lambda: at_least(lab, run.id, 1))
        assert await run.pause()
        gate.open()
        await settled(lab, run.id)
        await until(lambda: at_least(lab, run.id, 3))
        assert sorted(executed) == ["c", "slow 1", "slow 2"]
        assert await run.resume()
        assert await run.result(20) == ["slow 1", "slow 2", "c", "last"]
    assert len(executed) == 4


async def at_least(lab: Lab, run: UUID, count: int) -> bool:
    return len(await lab.history(run)) >= count


async def test_a_sleep_that_is_over_and_a_signal_that_has_come_are_found_after_the_pause(
    lab: Lab, client: AsyncClient
) -> None:
    executed: list[str] = []
    async with lab.engine(steps_of(Gate(), executed)):
        napping, listening = await client.enqueue("napping"), await client.enqueue("listening")
        await lab.waits(listening.id)
        await lab.waits(napping.id)
        for run in (napping, listening):
            assert await run.pause()
        await listening.signal("go", "went")
        due = "select due_at < clock_timestamp() from stepwell.tasks where run_id = %s"

        async def over() -> bool:
            return bool((await lab.execute(due, [napping.id]))[0][0])

        await until(over)
        await lab.waits(listening.id, "paused")
        assert executed == []
        for run in (napping, listening):
            assert await run.resume()
        assert await napping.result(20) == "awake"
        assert await listening.result(20) == "went"


async def test_a_sleep_that_was_paused_takes_no_longer_and_no_shorter(lab: Lab, client: AsyncClient) -> None:
    with collecting() as registry:

        @workflow
        async def napping() -> float:
            before = now()
            await sleep(1.0)
            return (now() - before).total_seconds()

    async with lab.engine(registry):
        run = await client.enqueue(napping)
        await lab.waits(run.id)
        assert await run.pause()
        assert await run.resume()
        assert 1.0 <= await run.result(20) < 3.0


async def test_a_paused_run_is_cancelled(lab: Lab, client: AsyncClient) -> None:
    gate = Gate()
    executed: list[Any] = []
    async with lab.engine(steps_of(gate, executed)):
        run = await client.enqueue("side_by_side")
        await gate.reached(2)
        assert await run.pause()
        assert await run.cancel()
        assert (await lab.ended(run.id)).state == "cancelled"
        assert await lab.execute("select count(*) from stepwell.tasks") == [(0,)]


async def test_many_runs_are_paused_and_resumed_under_load_and_none_is_lost(
    lab: Lab, client: AsyncClient
) -> None:
    with collecting() as registry:

        @step
        async def work(n: int) -> int:
            return n

        @workflow
        async def loaded(n: int) -> int:
            first = await gather(*(work(k) for k in range(3)))
            await sleep(0.05)
            return sum(first) + await work(n)

    async with lab.engine(registry), lab.engine(registry):
        runs = [run.id async for run in client.enqueue_many(loaded, range(150))]
        for _ in range(8):
            chosen = runs[::2]
            async for _ in client.change("pause", chosen):
                pass
            await asyncio.sleep(0.05)
            async for _ in client.change("resume", chosen):
                pass
        await lab.all_succeeded(150)


# -- children ------------------------------------------------------------------------------------------


async def test_the_failed_child_of_a_join_is_retried_with_its_parent(lab: Lab, client: AsyncClient) -> None:
    effects = Effects()
    broken = True
    with collecting() as registry:

        @step
        async def unpack(n: int) -> None:
            effects.note(f"unpack {n}")

        @step(undo=unpack)
        async def pack(n: int) -> int:
            effects.note(f"pack {n}")
            return n

        @step
        async def send(n: int) -> int:
            if broken and n == 2:
                raise ValueError("no")
            return n

        @workflow
        async def parcel(n: int) -> int:
            return await pack(n) + await send(n)

        @workflow
        async def parcels() -> list[int]:
            return list(await gather(*(parcel(n) for n in range(3))))

    async with lab.engine(registry):
        run = await client.enqueue(parcels)
        try:
            await run.result(20)
        except RunFailed:
            broken = False
        await until(lambda: none_open(lab))
        await client.retry(run.id)
        assert await run.result(20) == [0, 2, 4]
    assert effects.names.count("pack 2") == 2
    assert effects.names.count("unpack 2") == 1


async def test_a_rewound_parent_makes_its_children_anew(lab: Lab, client: AsyncClient) -> None:
    with collecting() as registry:

        @step
        async def work(n: int) -> int:
            return n

        @workflow
        async def child(n: int) -> int:
            return await work(n)

        @workflow
        async def parent() -> list[int]:
            started = start(child, 1)
            second = await child(2)
            return [await started, second, await child(3)]

    async with lab.engine(registry):
        run = await client.enqueue(parent)
        assert await run.result(20) == [1, 2, 3]
        await client.rewind(run.id, 2)
        assert await run.result(20) == [1, 2, 3]
        rows = await lab.execute(
            "select parent_path, count(*) from stepwell.runs where workflow = 'child' group by 1 order by 1"
        )
        assert rows == [([1], 1), ([2], 1), ([4], 1), (None, 2)]


async def test_a_started_child_whose_result_is_recorded_is_not_begun_again(
    lab: Lab, client: AsyncClient
) -> None:
    executed: list[str] = []
    broken = True
    with collecting() as registry:

        @step
        async def work(what: str) -> str:
            executed.append(what)
            if what == "fails" or (broken and what == "last"):
                raise ValueError("no")
            return what

        @workflow
        async def child(what: str) -> str:
            return await work(what)

        @workflow
        async def parent() -> list[str]:
            failing, going, unwatched = start(child, "fails"), start(child, "goes"), start(child, "later")
            said = [await going]
            try:
                await failing
            except RunFailed:
                said.append("failed")
            await sleep(0.01)
            said.append(await work("last"))
            await sleep(0.01)
            return [*said, await unwatched]

    async with lab.engine(registry):
        run = await client.enqueue(parent)
        assert (await lab.ended(run.id)).state == "failed"
        await until(lambda: none_open(lab))
        assert sorted(executed) == ["fails", "goes", "last", "later"]
        broken = False
        await client.retry(run.id)
        assert await run.result(20) == ["goes", "failed", "last", "later"]
        assert sorted(executed) == ["fails", "goes", "last", "last", "later"]
        made = await client.fork(run.id, 7)
        assert await lab.succeeded(made) == ["goes", "failed", "last", "later"]
        assert sorted(executed) == ["fails", "goes", "last", "last", "last", "later", "later"]


async def none_open(lab: Lab) -> bool:
    return await lab.execute("select count(*) from stepwell.runs where state = 'open'") == [(0,)]
