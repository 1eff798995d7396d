"""Children in memory: their handles, what is recorded of them, and what they are called with."""

from __future__ import annotations

import gc
import json
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from outbox.errors import PayloadError, RunFailed
from tests.unit.drives import FACTS, record
from worker import continue_as, first, gather, map, start, step, wait, wait_signal, workflow
from worker.definitions import collecting
from worker.replay.decisions import Await, AwaitChild, Block, Continue, DoStep, Fail, Finish
from worker.replay.driver import Replay
from worker.replay.records import Record, visible

FAULT = {"type": "RunFailed", "message": "m", "data": {"run": str(FACTS.id), "error": {"type": "E"}}}

with collecting():

    @step
    async def one(n: int) -> int: ...

    @workflow
    async def child(n: int) -> int: ...


def drive(body: Any, *history: Record, driven: int = -1, given: str = "{}") -> Replay:
    with collecting():
        flow = workflow(name="flow")(body)
    numbered = [msgspec.structs.replace(each, seq=seq) for seq, each in enumerate(history, 1)]
    return Replay(flow, given, FACTS, visible(numbered), driven=driven)


def came(*path: int, value: Any = None) -> Record:
    return record(path, "child", value=value, kind="child")


def failed(*path: int) -> Record:
    return record(path, "child", error=FAULT, kind="child")


def awaited(decision: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return for each child that is waited for the path of the call, and of what it is the result."""
    assert isinstance(decision, Await), decision
    return [(w.call.path, w.call.of) for w in decision.waits if isinstance(w.call, AwaitChild)]


def started(replay: Replay) -> list[tuple[tuple[int, ...], str]]:
    effects = replay.take_effects()
    return [] if effects is None else [(each.path, each.input) for each in effects.starting]


# -- handles -------------------------------------------------------------------------------------------


async def awaits_twice() -> Any:
    handle = start(child, 1)
    return [await handle, await one(1), await handle]


def test_each_await_of_a_handle_is_a_call_of_its_own_and_all_know_what_is_recorded_of_the_first() -> None:
    replay = drive(awaits_twice)
    assert awaited(replay.start()) == [((2,), (1,))]
    assert (replay.has_answers(), replay.answer((1,))) == (False, None)
    result = came(2, value=5)
    assert isinstance(replay.deliver(result), DoStep)
    assert awaited(replay.deliver(record(3, "one", value=6))) == [((4,), (1,))]
    assert (replay.has_answers(), replay.answer((1,))) == (True, result)
    assert replay.deliver(came(4, value=5)) == Finish("[5,6,5]")


def test_a_handle_that_is_awaited_twice_is_replayed_from_any_point() -> None:
    history = [came(2, value=5), record(3, "one", value=6), came(4, value=5)]
    assert drive(awaits_twice, *history).start() == Finish("[5,6,5]")
    replay = drive(awaits_twice, *history[:2], driven=2)
    assert awaited(replay.start()) == [((4,), (1,))]
    known = replay.answer((1,))
    assert known is not None
    assert (known.path, known.value) == ((2,), "5")
    assert started(drive(awaits_twice, *history[:2])) == []


def test_a_history_in_which_two_awaits_took_different_results_comes_out_as_it_did() -> None:
    """A child that failed, and was retried before its parent asked for it again, has told two results."""

    async def body() -> Any:
        handle = start(child, 1)
        try:
            await handle
        except RunFailed:
            await wait_signal("mended")
        return await handle

    mended = record((3,), "mended", kind="signal")
    assert drive(body, failed(2), mended, came(4, value=5)).start() == Finish("5")


def test_branches_may_await_one_handle_at_the_same_time() -> None:
    async def body() -> Any:
        handle = start(child, 1)
        return list(await gather(handle, handle, one(1)))

    replay = drive(body)
    assert awaited(replay.start()) == [((2, 1, 1), (1,)), ((2, 2, 1), (1,))]
    assert awaited(replay.deliver(came(2, 1, 1, value=5))) == [((2, 2, 1), (1,))]
    assert replay.answer((1,)) is not None
    replay.hand(came(2, 2, 1, value=5))
    assert replay.deliver(record((2, 3, 1), "one", value=6)) == Finish("[5,5,6]")


def test_a_failure_that_was_caught_is_raised_by_the_next_await_as_well() -> None:
    async def body() -> Any:
        handle = start(child, 1)
        said = []
        for _ in range(2):
            try:
                await handle
            except RunFailed as error:
                said.append(error.error)
        return said

    assert awaited(drive(body, failed(2)).start()) == [((3,), (1,))]
    assert drive(body, failed(2), failed(3)).start() == Finish('[{"type":"E"},{"type":"E"}]')


def test_a_retry_begins_a_child_again_if_no_await_of_it_got_past_its_failure() -> None:
    async def body() -> Any:
        handle = start(child, 1)
        try:
            await handle
        except RunFailed:
            pass
        return await handle

    opening = record((), "flow", kind="epoch", n=1, outcome="retry", epoch=1)
    replay = drive(body, failed(2), failed(3), opening)
    assert awaited(replay.start()) == [((2,), (1,))]
    assert replay.answer((1,)) is None
    assert started(replay) == [((1,), '{"n":1}')]


def test_what_a_branch_that_nobody_waits_for_any_more_got_of_a_child_is_known_after_it() -> None:
    async def body() -> Any:
        handle = start(child, 1)

        async def slow() -> Any:
            return [await handle, await wait_signal("never")]

        await first(slow(), wait_signal("go"))
        return await handle

    history = [came(2, 1, 1, value=5), record((2, 2, 1), "go", kind="signal")]
    replay = drive(body, *history)
    assert awaited(replay.start()) == [((3,), (1,))]
    known = replay.answer((1,))
    assert known is not None
    assert known.value == "5"


def test_what_waits_since_is_told_in_order() -> None:
    async def body() -> Any:
        async def branch(n: int) -> None:
            await wait_signal("go")
            await gather(wait_signal(f"a{n}"), wait_signal(f"b{n}"))

        await gather(branch(1), branch(2))

    replay = drive(body)
    known = {wait.call.path for wait in replay.start().waits}
    assert replay.waiting_beyond(known) == []
    for branch in (1, 2):
        replay.hand(record((1, branch, 1), "go", kind="signal"))
    assert [call.name for _, call in replay.waiting_beyond(known)] == ["a1", "b1", "a2", "b2"]
    known |= {path for path, _ in replay.waiting_beyond(known)}
    assert replay.waiting_beyond(known) == []


# -- what they are called with -------------------------------------------------------------------------

WRONG: list[Any] = ["zzz", None, 1.5]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "call",
    [
        child,
        lambda wrong: gather(child(wrong), child(1)),
        lambda wrong: map(child, [1, wrong]),
        lambda wrong: start(child, wrong),
    ],
    ids=["call", "gather", "map", "start"],
)
def test_a_child_is_not_made_with_what_its_workflow_does_not_take(call: Any, wrong: Any) -> None:
    async def body() -> Any:
        try:
            await call(wrong)
        except PayloadError as error:
            return [str(error), await one(1)]

    replay = drive(body)
    decision = replay.start()
    assert isinstance(decision, DoStep), decision
    assert started(replay) == []
    ended = replay.deliver(record(decision.path, "one", value=2))
    assert isinstance(ended, Finish)
    message, value = json.loads(ended.value)
    assert message.startswith("workflow child, field n: expected `int`")
    assert value == 2
    assert drive(body, record(decision.path, "one", value=2), driven=0).start() == ended


@pytest.mark.parametrize("limit", [None, 1])
def test_what_a_join_did_not_come_to_was_not_forgotten_by_the_body(limit: int | None) -> None:
    async def body() -> str:
        try:
            await (
                gather(child(1.5), child(1), child(2)) if limit is None else map(child, [1.5, 1], limit=limit)
            )
        except PayloadError:
            pass
        gc.collect()
        return "caught"

    assert drive(body).start() == Finish('"caught"')


def test_a_run_that_does_not_catch_it_fails() -> None:
    async def body() -> Any:
        start(child, "zzz")  # type: ignore[arg-type]  # that is the point

    ended = drive(body).start()
    assert isinstance(ended, Fail)
    assert "workflow child, field n: expected `int`" in ended.error["message"]


def test_a_child_whose_result_is_recorded_keeps_it_though_its_workflow_takes_other_arguments_by_now() -> None:
    async def body() -> Any:
        return [await child("zzz"), *await gather(child(None))]  # type: ignore[arg-type]

    assert drive(body, came(1, value=5), came(2, 1, 1, value=6)).start() == Finish("[5,6]")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_run_does_not_start_anew_with_what_it_does_not_take(wrong: Any) -> None:
    async def body(n: int) -> Any:
        try:
            continue_as(wrong)
        except PayloadError as error:
            return str(error)

    ended = drive(body, given='{"n":1}').start()
    assert isinstance(ended, Finish)
    assert "workflow flow, field n: expected `int`" in ended.value


def test_a_run_starts_anew_with_what_it_takes() -> None:
    async def body(n: int, *, more: list[int] | None = None) -> Any:
        continue_as(n + 1, more=[2])

    assert drive(body, given='{"n":1}').start() == Continue('{"n":2,"more":[2]}')


# -- their deadlines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", ["x", "5", float("nan"), float("inf"), -1, -0.5, True, [], 10**400, 1e300, timedelta(seconds=-1)]
)
def test_a_deadline_is_a_number_of_seconds(wrong: Any) -> None:
    async def body() -> Any:
        try:
            start(child, 1, deadline=wrong)
        except ValueError as error:
            return str(error)

    replay = drive(body)
    ended = replay.start()
    assert isinstance(ended, Finish), ended
    assert ended.value.startswith('"start(deadline=…) ')
    assert started(replay) == []


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), (0, 0.0), (60, 60.0), (0.5, 0.5), (timedelta(hours=1), 3600.0)],
)
def test_a_deadline_reaches_the_child_in_seconds(given: Any, seconds: float | None) -> None:
    def body() -> Any:
        return wait(start(child, 1, deadline=given))

    replay = drive(body)
    assert not isinstance(replay.start(), Block)
    effects = replay.take_effects()
    assert effects is not None
    assert [each.deadline for each in effects.starting] == [seconds]
