"""Several calls at once, in memory: what they come to depends on the order of the records and on nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from outbox.errors import RunFailed, StepFailed
from tests.unit.drives import FACTS, record
from worker import Cancelled, call, first, gather, map, sleep, start, step, wait, wait_signal, workflow
from worker.definitions import collecting
from worker.replay.decisions import Await, AwaitChild, Block, Cancel, DoStep, Finish, TakeSignal
from worker.replay.driver import Replay
from worker.replay.records import Record

with collecting():

    @step
    async def one(n: int) -> Any:
        raise AssertionError("not executed here")

    @step
    def two(n: int) -> Any:
        raise AssertionError("not executed here")

    @step(queue="gpu")
    async def elsewhere() -> None: ...

    @step
    async def refund(n: int, receipt: str) -> None: ...

    @step(undo=refund)
    async def charge(n: int) -> str: ...

    @workflow
    async def child(n: int) -> int: ...


def drive(body: Any, *history: Record, driven: int = -1) -> Replay:
    with collecting():
        flow = workflow(name="flow")(body)
    return Replay(flow, "{}", FACTS, numbered(*history), driven=driven)


def numbered(*history: Record) -> list[Record]:
    return [msgspec.structs.replace(each, seq=seq) for seq, each in enumerate(history, 1)]


def paths(decision: Any) -> list[tuple[int, ...]]:
    assert isinstance(decision, Await), decision
    return [each.call.path for each in decision.waits]


def done(path: tuple[int, ...], name: str, value: Any = None, kind: str = "step") -> Record:
    return record(path, name, value=value, kind=kind)


def broken(path: tuple[int, ...], name: str) -> Record:
    return record(path, name, error={"type": "ValueError", "message": "no"})


def test_the_calls_of_a_join_are_asked_for_together() -> None:
    async def body() -> Any:
        return await gather(one(1), call(two, 2), sleep(5), wait_signal("go"), child(3))

    decision = drive(body).start()
    assert paths(decision) == [(1, 1, 1), (1, 2, 1), (1, 3, 1), (1, 4, 1), (1, 5, 1)]
    assert all(each.fresh for each in decision.waits)
    assert [type(each.call).__name__ for each in decision.waits] == [
        "DoStep", "DoStep", "Sleep", "TakeSignal", "AwaitChild",
    ]  # fmt: skip


def test_what_an_earlier_drive_has_come_to_is_not_fresh() -> None:
    async def body() -> None:
        async def branch(n: int) -> None:
            await one(n)
            await one(n + 10)

        await gather(branch(1), branch(2))

    decision = drive(body, done((1, 1, 1), "one", 1), driven=0).start()
    assert [(each.call.path, each.fresh) for each in decision.waits] == [
        ((1, 2, 1), False),
        ((1, 1, 2), True),
    ]


def test_values_come_in_the_order_of_the_calls() -> None:
    async def body() -> Any:
        return [await gather(one(1), one(2)), await map(one, [1, 2]), await gather()]

    history = [
        done((1, 2, 1), "one", "b"), done((1, 1, 1), "one", "a"), done((2, 1, 1), "one", "c"), done((2, 2, 1), "one", "d"),
    ]  # fmt: skip
    assert drive(body, *history).start() == Finish('[["a","b"],["c","d"],[]]')


@pytest.mark.parametrize("order", list(itertools.permutations([(1, 1, 1), (1, 2, 1), (1, 2, 2), (1, 3, 1)])))
def test_branches_run_in_the_order_of_the_records(order: tuple[tuple[int, ...], ...]) -> None:
    if order.index((1, 2, 1)) > order.index((1, 2, 2)):
        return

    async def body() -> Any:
        seen: list[str] = []

        async def branch(name: str, calls: int) -> None:
            seen.append(f"{name} begins")
            for n in range(calls):
                await one(n)
                seen.append(f"{name}{n}")

        await gather(branch("a", 1), branch("b", 2), branch("c", 1))
        return seen

    outcome = drive(body, *(done(path, "one", 0) for path in order)).start()
    names = {(1, 1, 1): "a0", (1, 2, 1): "b0", (1, 2, 2): "b1", (1, 3, 1): "c0"}
    expected = ["a begins", "b begins", "c begins", *(names[path] for path in order)]
    assert isinstance(outcome, Finish)
    assert outcome.value == str(expected).replace("'", '"').replace(", ", ",")


def test_live_and_replayed_branches_see_the_same() -> None:
    def make() -> Any:
        async def body() -> Any:
            seen: list[Any] = []

            async def branch(n: int) -> None:
                seen.append(await one(n))
                seen.append(await one(n))

            await gather(branch(1), branch(2))
            return seen

        return body

    records = [done((1, 2, 1), "one", "x"), done((1, 1, 1), "one", "y"), done((1, 2, 2), "one", "z")]
    last = done((1, 1, 2), "one", "w")
    live = drive(make())
    live.start()
    for each in [*numbered(*records), last]:
        outcome = live.deliver(each)
    assert outcome == drive(make(), *records, last).start() == Finish('["x","y","z","w"]')


def test_the_first_failure_in_order_is_raised_and_the_rest_is_dropped() -> None:
    async def body() -> Any:
        try:
            await gather(one(1), one(2), one(3))
        except StepFailed as error:
            return [str(error), await one(4)]

    late = done((1, 3, 1), "one", 3)
    replay = drive(body, done((1, 1, 1), "one", 1), broken((1, 2, 1), "one"), late, driven=0)
    decision = replay.start()
    assert isinstance(decision, DoStep)
    assert decision.path == (2,)
    effects = replay.take_effects()
    assert effects is not None
    assert effects.dropped == [(1,)]
    again = drive(body, done((1, 1, 1), "one", 1), broken((1, 2, 1), "one"), late, done((2,), "one", 4))
    assert again.start() == Finish('["ValueError: no",4]')


def test_errors_can_be_values() -> None:
    async def body() -> Any:
        a, b = await gather(one(1), one(2), return_errors=True)
        return [a, type(b).__name__]

    assert drive(body, broken((1, 2, 1), "one"), done((1, 1, 1), "one", 1)).start() == Finish(
        '[1,"StepFailed"]'
    )


def test_the_first_to_end_wins_and_what_the_others_record_is_passed_over() -> None:
    async def body() -> Any:
        async def slow() -> Any:
            await one(1)
            return await one(2)

        winner = await first(slow(), wait_signal("go", type=str))
        return [winner.index, winner.value, await one(3)]

    history = [
        done((1, 1, 1), "one", 1), done((1, 2, 1), "go", "yes", "signal"), done((1, 1, 2), "one", 2), done((2,), "one", 3),
    ]  # fmt: skip
    assert drive(body, *history).start() == Finish('[1,"yes",3]')


def test_a_branch_that_is_dropped_makes_no_more_calls() -> None:
    attempts: list[str] = []

    async def body() -> Any:
        async def losing() -> None:
            try:
                await one(1)
            finally:
                attempts.append("finally")
                await one(2)

        await first(losing(), sleep(1))
        return "on"

    assert drive(body, record((1, 2, 1))).start() == Finish('"on"')
    assert attempts == ["finally"]


def test_joins_nest() -> None:
    async def body() -> Any:
        async def branch(n: int) -> Any:
            inner = await gather(one(n), one(n))
            return [inner, two(n)]

        return await gather(branch(1), gather(one(9)))

    history = [
        done((1, 2, 1, 1, 1), "one", 9), done((1, 1, 1, 2, 1), "one", "b"), done((1, 1, 1, 1, 1), "one", "a"),
        done((1, 1, 2), "two", "c"),
    ]  # fmt: skip
    assert drive(body, *history).start() == Finish('[[["a","b"],"c"],[9]]')


def test_def_bodies_join_as_well() -> None:
    def body() -> Any:
        return wait(gather(call(two, 1), one(2)))

    assert drive(body, done((1, 2, 1), "one", 2), done((1, 1, 1), "two", 1)).start() == Finish("[1,2]")


@pytest.mark.parametrize(
    ("history", "got"),
    [
        ([done((1, 1, 2), "one", 1)], "step one at 1.1.1, step one at 1.2.1"),
        ([done((1, 3, 1), "one", 1)], "step one at 1.1.1, step one at 1.2.1"),
        ([done((1, 2, 1), "two", 1)], "step one at 1.2.1"),
        ([done((1,), "one", 1)], "step one at 1.1.1, step one at 1.2.1"),
    ],
)
def test_a_record_that_no_branch_waits_for_blocks(history: list[Record], got: str) -> None:
    async def body() -> None:
        await gather(one(1), one(2))

    outcome = drive(body, *history).start()
    assert isinstance(outcome, Block)
    assert outcome.error["data"]["got"] == got


def test_a_step_with_a_queue_is_never_executed_under_the_claim_of_its_run() -> None:
    async def body() -> None:
        await elsewhere()

    assert paths(drive(body).start()) == [(1,)]


def test_the_last_call_of_a_join_that_is_new_is_executed_under_the_claim() -> None:
    async def body() -> None:
        async def branch() -> None:
            await one(1)
            await one(2)

        await gather(branch(), one(3))

    history = [done((1, 2, 1), "one", 3), done((1, 1, 1), "one", 1)]
    assert isinstance(drive(body, *history, driven=1).start(), DoStep)
    assert paths(drive(body, *history, driven=2).start()) == [(1, 1, 2)]  # it may be a task


def test_a_limit_is_a_window_over_tasks_of_steps_and_starts_children_one_by_one() -> None:
    async def steps() -> None:
        await map(one, range(5), limit=2)

    decision = drive(steps).start()
    assert [(each.path, each.limit) for each in decision.windows] == [((1,), 2)]
    assert len(decision.waits) == 5

    async def children() -> Any:
        return await map(child, range(3), limit=2)

    replay = drive(children)
    assert paths(replay.start()) == [(1, 1, 1), (1, 2, 1)]
    assert paths(replay.deliver(done((1, 2, 1), "child", 1, "child"))) == [(1, 1, 1), (1, 3, 1)]


def test_a_child_is_waited_for_by_its_call_or_by_its_handle() -> None:
    async def body() -> Any:
        handle = start(child, 1)
        before = await child(2)
        return [before, await handle]

    replay = drive(body)
    (wait_,) = replay.start().waits
    assert isinstance(wait_.call, AwaitChild)
    assert (wait_.call.path, wait_.call.of, wait_.call.starts) == ((2,), (2,), True)
    effects = replay.take_effects()
    assert effects is not None
    assert [(each.path, each.input) for each in effects.starting] == [((1,), '{"n":1}')]
    (wait_,) = replay.deliver(done((2,), "child", 5, "child")).waits
    assert (wait_.call.path, wait_.call.of, wait_.call.starts) == ((3,), (1,), False)
    assert replay.deliver(done((3,), "child", 6, "child")) == Finish("[5,6]")


def test_the_failure_of_a_child_is_raised() -> None:
    async def body() -> Any:
        try:
            await child(1)
        except RunFailed as error:
            return [str(error.run_id), error.error]

    error = {"type": "RunFailed", "message": "m", "data": {"run": str(FACTS.id), "error": {"type": "E"}}}
    failed = record((1,), "child", kind="child", error=error)
    assert drive(body, failed).start() == Finish(f'["{FACTS.id}",{{"type":"E"}}]')


def test_a_signal_that_does_not_come_is_a_time_out() -> None:
    async def body() -> Any:
        try:
            return await wait_signal("go", timeout=3)
        except TimeoutError as error:
            return str(error)

    (wait_,) = drive(body).start().waits
    assert wait_.call == TakeSignal((1,), "go", 3)
    late = record((1,), "go", kind="signal", error={"type": "TimeoutError", "message": "late"})
    assert drive(body, late).start() == Finish('"late"')


def cancelled(seq: int = 0) -> Record:
    return record((), "flow", kind="cancel", n=2, outcome="cancelled", seq=seq)


def test_a_cancellation_is_raised_where_the_body_stands_and_lets_it_clean_up() -> None:
    async def body() -> None:
        try:
            await gather(one(1), sleep(9))
        except Cancelled:
            await one(2)

    replay = drive(body)
    replay.start()
    decision = replay.deliver(cancelled())
    assert isinstance(decision, DoStep)
    assert decision.path == (2,)
    assert replay.deliver(done((2,), "one", 2)) == Cancel()
    assert drive(body, cancelled(), done((1, 1, 1), "one", 0), done((2,), "one", 2)).start() == Cancel()
