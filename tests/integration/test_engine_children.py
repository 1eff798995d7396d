"""Handles of children, and the order in which mail is taken, on engines of the test's own process, some of which die."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
import pytest_asyncio

from outbox.errors import PayloadError, RunFailed
from tests.effects import Gate, Ledger
from tests.engines import Lab, parking
from tests.pooler import direct
from tests.waiting import wait_until_async
from worker import continue_as, current_step, first, gather, sleep, start, step, wait_signal, workflow
from worker.definitions import Registry, Workflow, collecting
from worker.engine.recorded import from_database
from worker.engine.transitions import Writing
from worker.replay.rehearsal import rehearse


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


def replays_alike(lab: Lab, run: UUID, flow: Workflow[..., Any]) -> None:
    """Assert that a body can be driven through what is recorded of a run."""
    with psycopg.connect(direct(lab.url)) as connection:
        (recorded,) = from_database(connection, ids=[run])
    assert rehearse(recorded, flow) is None


def recording(*path: int) -> Callable[[Writing], bool]:
    """Return the predicate of the writing that records the call at a path."""
    return lambda writing: any(tuple(record.path) == path for record in writing.records)


async def ended_children(lab: Lab) -> None:
    """Wait until all children have ended, and their parents are told."""

    async def told() -> bool:
        rows = await lab.execute(
            "select count(*) filter (where parent_id is not null and state = 'open'),"
            " (select count(*) from stepwell.tasks where kind = 'wake') from stepwell.runs"
        )
        return rows == [(0, 0)]

    await wait_until_async(told, what="the children to end")


class Family:
    """A child that returns twice its number, or fails if that is negative, once `gate` is open; and a step."""

    def __init__(self) -> None:
        self.gate = Gate()
        with collecting() as registry:

            @step
            async def work(n: int) -> int:
                await self.gate.passed()
                if n < 0:
                    raise ValueError("negative")
                return 2 * n

            @step
            async def add(a: int, b: int) -> int:
                return a + b

            @workflow(queue="children")
            async def kid(n: int) -> int:
                return await work(n)

        self.registry, self.kid, self.add = registry, kid, add

    def parent(self, body: Any) -> tuple[Registry, Workflow[..., Any]]:
        with collecting() as registry:
            flow = workflow(name="parent")(body)
        self.registry.add_workflow(flow)
        assert registry.workflows
        return self.registry, flow


# -- joins of handles ----------------------------------------------------------------------------------


async def _gathered(family: Family) -> Any:
    return list(await gather(*[start(family.kid, n) for n in range(4)]))


async def _with_errors(family: Family) -> Any:
    hs = [start(family.kid, n) for n in (1, -1, 2)]
    return [
        each if isinstance(each, int) else type(each).__name__
        for each in await gather(*hs, return_errors=True)
    ]


async def _with_a_step_in_between(family: Family) -> Any:
    hs = [start(family.kid, n) for n in range(2)]
    before = await family.add(1, 2)
    return [before, *await gather(*hs)]


async def _among_steps_and_calls(family: Family) -> Any:
    hs = [start(family.kid, n) for n in range(2)]
    return list(await gather(family.add(1, 1), *hs, family.add(2, 2), family.kid(5)))


async def _inside_first(family: Family) -> Any:
    hs = [start(family.kid, n) for n in range(2)]
    index, value = await first(gather(*hs), sleep(1000))
    return [index, *value]


async def _first_of_handles(family: Family) -> Any:
    return (await first(start(family.kid, 3), wait_signal("never"))).value


async def _fails_fast(family: Family) -> Any:
    hs = [start(family.kid, -1), start(family.kid, 1)]
    try:
        await gather(family.add(1, 1), *hs, wait_signal("never"))
    except RunFailed:
        return [await hs[1]]


async def _begun_by_the_winner(family: Family) -> Any:
    async def branch() -> Any:
        handle = start(family.kid, 3)
        await family.add(1, 1)
        return [handle]

    async def loser() -> None:
        await wait_signal("never")

    won = await first(branch(), loser())
    return await won.value[0]


async def _begun_by_the_loser(family: Family) -> Any:
    begun: list[Any] = []

    async def branch() -> None:
        begun.append(start(family.kid, 4))
        await wait_signal("never")

    await first(branch(), family.add(1, 1))
    return await begun[0]


async def _begun_by_a_branch_of_one_that_fails_fast(family: Family) -> Any:
    begun: list[Any] = []

    async def leaf(n: int) -> None:
        begun.append(start(family.kid, n))

    async def inner() -> None:
        await gather(leaf(1), leaf(2))
        await wait_signal("never")

    async def failing() -> None:
        await family.add(1, 1)
        raise ValueError("no")

    try:
        await gather(inner(), failing(), family.kid(7))
    except ValueError:
        return list(await gather(*begun))


JOINS = [
    (_begun_by_the_winner, 6),
    (_begun_by_the_loser, 8),
    (_begun_by_a_branch_of_one_that_fails_fast, [2, 4]),
    (_gathered, [0, 2, 4, 6]),
    (_with_errors, [2, "RunFailed", 4]),
    (_with_a_step_in_between, [3, 0, 2]),
    (_among_steps_and_calls, [2, 0, 2, 4, 10]),
    (_inside_first, [0, 0, 2]),
    (_first_of_handles, 6),
    (_fails_fast, [2]),
]


@pytest.mark.parametrize("crashing", [False, True], ids=["", "crashing"])
@pytest.mark.parametrize(("body", "expected"), JOINS, ids=lambda it: getattr(it, "__name__", ""))
async def test_a_join_of_handles_ends_when_its_children_have(
    lab: Lab, body: Any, expected: Any, crashing: bool
) -> None:
    family = Family()

    async def parent() -> Any:
        return await body(family)

    registry, flow = family.parent(parent)
    async with lab.engine(registry, queues=["children"]):
        running = lab.start(registry)
        try:
            await running.claiming()
            run = await lab.enqueue(flow)
            await lab.waits(run)
            if crashing:
                await running.crash()
            family.gate.open()
            if crashing:
                await ended_children(lab)
                running = lab.start(registry)
            assert await lab.succeeded(run) == expected
        finally:
            await running.destroy()
    replays_alike(lab, run, flow)


async def test_a_parent_that_dies_with_half_the_results_goes_on_with_the_others(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def kid(n: int) -> int:
            return int(await wait_signal("go")) + n

        @workflow
        async def parent() -> list[int]:
            return list(await gather(*[start(kid, n) for n in range(3)]))

    kids = "select id from stepwell.runs where parent_id is not null order by parent_path"
    go = "select stepwell.signal(%s, 'go', '10')"
    dying = lab.start(registry)
    await dying.claiming()
    run = await lab.enqueue(parent)
    await lab.waits(run)
    ids = [row[0] for row in await lab.execute(kids)]
    applied = dying.lose_answers(recording(4, 2, 1))
    await lab.execute(go, [ids[1]])
    await wait_until_async(applied.is_set)
    await dying.crash()
    async with lab.engine(registry):
        await lab.waits(run)
        for each in (ids[2], ids[0]):
            await lab.execute(go, [each])
        assert await lab.succeeded(run) == [10, 11, 12]
    replays_alike(lab, run, parent)


# -- one handle, awaited again -------------------------------------------------------------------------


async def _one_after_the_other(family: Family) -> Any:
    handle = start(family.kid, 1)
    return [await handle, await family.add(1, 1), await handle, await handle]


async def _side_by_side(family: Family) -> Any:
    handle = start(family.kid, 1)
    return list(await gather(handle, handle, family.add(1, 1)))


async def _in_two_branches(family: Family) -> Any:
    handle = start(family.kid, 1)

    async def branch(n: int) -> int:
        return await family.add(n, await handle)

    return [*await gather(branch(1), branch(2)), await handle]


async def _failing(family: Family) -> Any:
    handle = start(family.kid, -1)
    said = []
    for _ in range(3):
        try:
            await handle
        except RunFailed as error:
            said.append(error.error["message"])
        await family.add(1, 1)
    return said


AGAIN = [
    (_one_after_the_other, [2, 2, 2, 2], (2,), (4,)),
    (_side_by_side, [2, 2, 2], (2, 1, 1), (2, 2, 1)),
    (_in_two_branches, [3, 4, 2], (2, 1, 1), (3,)),
    (_failing, ["negative"] * 3, (2,), (4,)),
]


@pytest.mark.parametrize(
    ("body", "expected", "first_path", "then"), AGAIN, ids=lambda it: getattr(it, "__name__", "")
)
@pytest.mark.parametrize("fate", ["lives", "loses the first", "has lost its answer", "loses a later one"])
async def test_a_handle_can_be_awaited_any_number_of_times(
    lab: Lab, body: Any, expected: Any, first_path: tuple[int, ...], then: tuple[int, ...], fate: str
) -> None:
    family = Family()

    async def parent() -> Any:
        return await body(family)

    registry, flow = family.parent(parent)
    family.gate.open()
    async with lab.engine(registry, queues=["children"]):
        running = lab.start(registry)
        await running.claiming()
        if fate != "lives":
            path = then if fate == "loses a later one" else first_path
            happened = (running.lose_answers if fate == "has lost its answer" else running.lose_writes)(
                recording(*path)
            )
            run = await lab.enqueue(flow)
            await wait_until_async(happened.is_set, what=f"{path} to be recorded")
            await running.crash()
            running = lab.start(registry)
        else:
            run = await lab.enqueue(flow)
        try:
            assert await lab.succeeded(run) == expected
        finally:
            await running.destroy()
    replays_alike(lab, run, flow)
    assert await lab.execute("select count(*) from stepwell.runs") == [(2,)]


async def test_a_run_that_is_retried_asks_a_child_that_failed_again_for_all_awaits(lab: Lab) -> None:
    broken = [True]
    with collecting() as registry:

        @step
        async def fragile() -> str:
            if broken:
                raise ConnectionError("down")
            return "up"

        @workflow
        async def kid() -> str:
            return await fragile()

        @workflow
        async def parent() -> list[str]:
            handle = start(kid)
            errors = await gather(handle, handle, return_errors=True)
            if any(isinstance(each, RunFailed) for each in errors):
                raise errors[0]
            return [*errors, await handle]

    async with lab.engine(registry):
        run = await lab.enqueue(parent)
        assert (await lab.ended(run)).state == "failed"
        broken.clear()
        assert await lab.retry(run) == 1
        assert await lab.succeeded(run) == ["up", "up", "up"]
    replays_alike(lab, run, parent)


async def test_a_run_that_is_rewound_to_a_later_await_is_answered_again(lab: Lab) -> None:
    family = Family()

    async def parent() -> Any:
        return await _one_after_the_other(family)

    registry, flow = family.parent(parent)
    family.gate.open()
    async with lab.engine(registry), lab.engine(registry, queues=["children"]):
        run = await lab.enqueue(flow)
        for to_path in ([4], [5], [3], [2], [4]):
            await lab.succeeded(run)
            await lab.execute("select stepwell.rewind(%s, %s::int[])", [run, to_path])
        assert await lab.succeeded(run) == [2, 2, 2, 2]
    replays_alike(lab, run, flow)


async def test_a_started_child_that_was_cancelled_with_its_parent_goes_on_with_it(lab: Lab) -> None:
    done = Ledger()
    with collecting() as registry:

        @step
        async def count(name: str) -> None:
            done.note(name)

        @workflow
        async def kid() -> int:
            await count("kid")
            return int(await wait_signal("on"))

        @workflow
        async def parent(beside: bool) -> int:
            handle = start(kid)
            if beside:
                await count("parent")
            return int(await handle)

    async with lab.engine(registry):
        for beside in (False, True):
            run = await lab.enqueue(parent, {"beside": beside})
            await _waiting_child(lab, run)
            await lab.cancel(run)
            assert (await lab.ended(run)).state == "cancelled"
            await ended_children(lab)
            assert await lab.retry(run) == 1
            child = await _waiting_child(lab, run)
            await lab.execute("select stepwell.signal(%s, 'on', '7')", [child])
            assert await lab.succeeded(run) == 7
            replays_alike(lab, run, parent)
    assert sorted(name for name, _, _ in done) == ["kid", "kid", "parent"]


async def _waiting_child(lab: Lab, run: UUID) -> UUID:
    """Return the child of a run, when it waits for its signal and the run for it."""
    found: list[UUID] = []

    async def waits() -> bool:
        rows = await lab.execute(
            "select r.id from stepwell.runs r join stepwell.tasks t on t.run_id = r.id and t.state = 'waiting'"
            " where r.parent_id = %s and r.parent_path is not null and t.awaits = array['on'] and not t.cancelling",
            [run],
        )
        found[:] = [row[0] for row in rows]
        return bool(found)

    await wait_until_async(waits, what="the child to wait for its signal")
    await lab.waits(run)
    return found[0]


@pytest.mark.parametrize("how", ["still cleans up", "is blocked in that", "goes on after that"])
async def test_a_run_that_is_retried_while_its_started_child_cleans_up_starts_another(
    lab: Lab, how: str
) -> None:
    gate = Gate()
    broken = [how != "still cleans up"]
    with collecting() as registry:

        @step
        async def refund() -> None:
            if broken.pop():
                raise ConnectionError("down")
            await gate.passed()

        @step(undo=refund)
        async def charge() -> None: ...

        @workflow
        async def kid() -> int:
            await charge()
            return int(await wait_signal("on"))

        @workflow
        async def parent() -> int:
            return int(await start(kid))

    async with lab.engine(registry):
        run = await lab.enqueue(parent)
        first_child = await _waiting_child(lab, run)
        await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
        if how != "still cleans up":
            assert (await lab.ended(first_child)).state == "blocked"
        broken.append(False)
        if how == "goes on after that":
            assert await lab.retry(first_child) == 1
        if how != "is blocked in that":
            await gate.reached()
        assert await lab.retry(run) == 1
        second_child = await _waiting_child(lab, run)
        if how == "is blocked in that":
            assert await lab.retry(first_child) == 1
        gate.open()
        assert (await lab.ended(first_child)).state == "cancelled"
        await lab.execute("select stepwell.signal(%s, 'on', '7')", [second_child])
        assert await lab.succeeded(run) == 7
    assert first_child != second_child


async def test_a_retried_run_hears_nothing_of_how_a_child_that_it_dropped_went_wrong(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def kid() -> int:
            return int(await wait_signal("on"))

        @workflow
        async def parent() -> int:
            return await kid()

    async with lab.engine(registry):
        run = await lab.enqueue(parent)
        child = await _waiting_child(lab, run)
        await lab.execute("select stepwell.pause(%s)", [run])
        await lab.cancel(child)
        await ended_children(lab)
        await lab.cancel(run)
        assert (await lab.ended(run)).state == "cancelled"
        assert await lab.retry(run) == 1
        child = await _waiting_child(lab, run)
        await lab.execute("select stepwell.signal(%s, 'on', '7')", [child])
        assert await lab.succeeded(run) == 7


async def test_a_run_hears_of_a_child_that_it_starts_when_another_one_has_failed_in_a_race(lab: Lab) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def work(n: int) -> int:
            if n == 1:
                raise ValueError("no")
            await gate.passed()
            return n

        @workflow
        async def kid(n: int) -> int:
            return await work(n)

        async def caught() -> str:
            try:
                await kid(1)
            except RunFailed as error:
                return type(error).__name__
            return "?"

        @workflow
        async def parent() -> list[Any]:
            which = await first(caught(), sleep(1000))
            return [which.value, await start(kid, 2)]

    async with lab.engine(registry):
        run = await lab.enqueue(parent)
        await gate.reached()
        await lab.waits(run)
        gate.open()
        assert await lab.succeeded(run) == ["RunFailed", 2]


async def test_a_rewound_run_makes_a_child_again_whose_result_it_never_took(lab: Lab) -> None:
    gate, done = Gate(), Ledger()
    broken = [True]
    with collecting() as registry:

        @step
        async def work() -> None:
            await gate.passed()
            if broken:
                raise ValueError("no")

        @step
        async def count() -> None:
            done.note("kid")

        @workflow
        async def kid() -> None:
            await count()

        @workflow
        async def parent() -> None:
            await gather(work(), kid())

    async with lab.engine(registry):
        run = await lab.enqueue(parent)
        await gate.reached()
        await lab.waits(run)
        await lab.execute("select stepwell.pause(%s)", [run])
        await ended_children(lab)
        gate.open()

        async def has_failed() -> bool:
            return bool(await lab.execute("select 1 from stepwell.outbox where run_id = %s", [run]))

        await wait_until_async(has_failed, what="the step to fail")
        await lab.execute("select stepwell.resume(%s)", [run])
        assert (await lab.ended(run)).state == "failed"
        broken.clear()
        await lab.execute("select stepwell.rewind(%s, '{}')", [run])
        await lab.succeeded(run)
        await ended_children(lab)
    assert done.names == "kidkid"


@pytest.mark.parametrize("undone", [1, 2], ids=["the first undo fails", "the second undo fails"])
async def test_a_retry_of_an_undo_begins_no_child_again(lab: Lab, undone: int) -> None:
    done = Ledger()
    with collecting() as registry:

        @step
        async def refund(n: int) -> None:
            done.note(f"refund {n}")
            if current_step().execution == 1 and n + undone == 3:
                raise ConnectionError("down")

        @step(undo=refund)
        async def charge(n: int) -> None: ...

        @step
        async def fail() -> None:
            done.note("kid")
            raise ValueError("no")

        @workflow
        async def kid() -> None:
            await fail()

        @workflow
        async def parent() -> None:
            await charge(1)
            start(kid)
            await charge(2)
            await wait_signal("on")
            raise ValueError("no")

    async with lab.engine(registry):
        run = await lab.enqueue(parent)
        await lab.waits(run)
        await ended_children(lab)
        await lab.execute("select stepwell.signal(%s, 'on')", [run])
        assert (await lab.ended(run)).state == "blocked"
        assert await lab.retry(run) == 1
        assert (await lab.ended(run)).state == "failed"
        await ended_children(lab)
    assert [name for name, _, _ in done].count("kid") == 1


# -- first in, first out -------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "one by one", "before a crash"])
async def test_what_a_branch_was_about_to_take_is_there_in_its_order_for_the_next(
    lab: Lab, when: str
) -> None:
    with collecting() as registry:

        @workflow
        async def flow() -> list[Any]:
            await first(wait_signal("x"), gather(wait_signal("a"), wait_signal("a")))
            return [await wait_signal("a"), await wait_signal("a")]

    async def send() -> None:
        for name, value in (("x", 0), ("a", 1), ("a", 2)):
            await lab.execute("select stepwell.signal(%s, %s, %s::json)", [run, name, json.dumps(value)])

    run = await lab.enqueue(flow)
    if when != "one by one":
        await send()
    if when == "before a crash":
        dying = lab.start(registry)
        lost = dying.lose_writes(lambda writing: bool(writing.records))
        await dying.claiming()
        await wait_until_async(lost.is_set)
        await dying.crash()
    async with lab.engine(registry):
        if when == "one by one":
            await lab.waits(run)
            await send()
        assert await lab.succeeded(run) == [1, 2]
    replays_alike(lab, run, flow)


# -- what is checked at the call -----------------------------------------------------------------------


async def test_a_child_with_arguments_that_do_not_fit_is_never_made(lab: Lab) -> None:
    ledger = Ledger()
    with collecting() as registry:

        @step
        async def note(what: str) -> None:
            ledger.note("note")

        @workflow
        async def kid(n: int) -> int:
            return n

        @workflow
        async def parent() -> list[str]:
            said = []
            for call in (lambda: start(kid, "zzz"), lambda: kid("zzz"), lambda: gather(kid("zzz"), kid(1))):
                try:
                    await call()
                except PayloadError as error:
                    said.append(str(error).partition(",")[0])
                await note("went on")
                await sleep(0.01)
            return said

    dying = lab.start(registry)
    applied = dying.lose_answers(parking)
    await dying.claiming()
    run = await lab.enqueue(parent)
    await wait_until_async(applied.is_set)
    await dying.crash()
    async with lab.engine(registry):
        assert await lab.succeeded(run) == ["workflow kid"] * 3
    assert [name for name, _, _ in ledger] == ["note"] * 3
    assert await lab.execute("select count(*) from stepwell.runs where workflow = 'kid'") == [(0,)]
    replays_alike(lab, run, parent)


async def test_a_run_that_cannot_start_anew_fails_with_its_history_and_can_be_retried(lab: Lab) -> None:
    following: list[Any] = ["notint"]
    done = Ledger()
    with collecting() as registry:

        @step
        async def once() -> None:
            done.note("once")

        @workflow
        async def flow(n: int) -> int:
            if n == 0:
                await once()
                continue_as(following[0])
            return n

    async with lab.engine(registry):
        run = await lab.enqueue(flow, {"n": 0})
        ended = await lab.ended(run)
        assert (ended.state, ended.error["type"]) == ("failed", "outbox.errors.PayloadError")
        assert "workflow flow, field n: expected `int`" in ended.error["message"]
        following[0] = 7
        assert await lab.retry(run) == 1
        assert await lab.succeeded(run) == 7
    assert [name for name, _, _ in done] == ["once"]


@pytest.mark.parametrize("wrong", ["x", float("nan"), 1e300, timedelta(seconds=-1)])
async def test_a_deadline_that_is_none_fails_where_it_is_given(lab: Lab, wrong: Any) -> None:
    with collecting() as registry:

        @workflow
        async def kid() -> None: ...

        @workflow
        async def parent() -> None:
            await start(kid, deadline=wrong)

    async with lab.engine(registry):
        ended = await lab.ended(await lab.enqueue(parent))
    assert (ended.state, ended.error["type"]) == ("failed", "ValueError")
    assert "start(deadline=…)" in ended.error["message"]
