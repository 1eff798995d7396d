"""The undo of what a run has done, in memory: which steps, in which order, and how it is resumed at any point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.drives import record
from tests.unit.test_replay_joins import broken, cancelled, charge, done, drive, one
from worker import Permanent, continue_as, first, gather, sleep
from worker.replay.decisions import Block, Cancel, Decision, DoStep, Fail, Settle
from worker.replay.records import Record

Body = Callable[[], Any]


def test_completed_steps_are_undone_in_reverse_order_with_their_arguments_and_results() -> None:
    async def body() -> None:
        await charge(1)
        await gather(charge(2), one(3))
        raise ValueError("no")

    history = [done((1,), "charge", "r1"), done((2, 1, 1), "charge", "r2"), done((2, 2, 1), "one", 3)]
    replay = drive(body, *history)
    decision = replay.start()
    assert isinstance(decision, DoStep)
    assert (decision.path, decision.arguments) == ((2, 1, 1, 0), '{"n":2,"receipt":"r2"}')
    decision = replay.deliver(done((2, 1, 1, 0), "refund"))
    assert isinstance(decision, DoStep)
    assert (decision.path, decision.arguments) == ((1, 0), '{"n":1,"receipt":"r1"}')
    outcome = replay.deliver(done((1, 0), "refund"))
    assert isinstance(outcome, Fail)
    again = drive(body, *history, done((2, 1, 1, 0), "refund"), done((1, 0), "refund")).start()
    assert again == outcome


def test_an_undo_that_fails_needs_a_person() -> None:
    async def body() -> None:
        await charge(1)
        raise ValueError("no")

    replay = drive(body, done((1,), "charge", "r1"))
    replay.start()
    outcome = replay.deliver(broken((1, 0), "refund"))
    assert isinstance(outcome, Block)
    assert outcome.reason == "an undo failed"


def test_the_undo_waits_for_calls_that_may_still_complete() -> None:
    async def body() -> None:
        await gather(charge(1), one(2))

    failing = broken((1, 2, 1), "one")
    decision = drive(body, failing, driven=0).start()
    assert decision == Settle(((1, 1, 1),), fresh=True)
    late = drive(body, failing, done((1, 1, 1), "charge", "r1"), driven=1)
    assert late.start() == Settle(((1, 1, 1),), fresh=False)
    decision = late.settled()
    assert isinstance(decision, DoStep)
    assert decision.path == (1, 1, 1, 0)


# -- joins that leave calls in flight which have to be undone


async def _fails_fast() -> None:
    await charge(0)
    await gather(charge(1), charge(2), one(3))


async def _loses_a_race() -> None:
    await charge(0)
    await first(charge(1), charge(2), sleep(5))
    raise Permanent("no")


async def _is_cancelled() -> None:
    await charge(0)
    await gather(charge(1), charge(2), sleep(86400))


LEAVING: dict[Body, Record] = {
    _fails_fast: broken((2, 3, 1), "one"),
    _loses_a_race: done((2, 3, 1), "sleep", kind="sleep"),
    _is_cancelled: cancelled(),
}


def _histories(body: Body) -> list[tuple[Record, ...]]:
    """Return the history of a run that is undone, after each of its records from the first undo on."""
    before = (done((1,), "charge", "r0"), LEAVING[body], done((2, 2, 1), "charge", "r2"))
    flaky = {"type": "ValueError", "message": "not yet"}
    undo = (
        record((2, 2, 1, 0), "refund", n=1, error=flaky),
        record((2, 2, 1, 0), "refund", n=2, outcome="interrupted"),
        done((2, 2, 1, 0), "refund"),
        record((1, 0), "refund", n=1, error=flaky),
        done((1, 0), "refund"),
    )
    return [(*before, *undo[:count]) for count in range(1, len(undo) + 1)]


@pytest.mark.parametrize("body", LEAVING, ids=lambda body: body.__name__.strip("_"))
def test_an_undo_that_has_begun_is_resumed_wherever_it_was_interrupted(body: Body) -> None:
    """What was in flight as it began was waited for then, once: calls that ended later than that there are none."""
    for history in _histories(body):
        replay = drive(body, *history, driven=len(history))
        decision = replay.start()
        if history[-1].path == (1, 0) and not history[-1].n:
            assert decision == (Cancel() if body is _is_cancelled else decision)
            assert isinstance(decision, Fail | Cancel), decision
        else:
            assert isinstance(decision, DoStep), decision
            waits_for = (1, 0) if len(history) > 5 else (2, 2, 1, 0)
            assert decision.path == waits_for
            assert len(decision.earlier) == {4: 1, 5: 2, 6: 0, 7: 1}[len(history)]
        replay.close()


@pytest.mark.parametrize("body", LEAVING, ids=lambda body: body.__name__.strip("_"))
def test_one_that_has_not_begun_waits_again_for_what_is_in_flight(body: Body) -> None:
    replay = drive(body, *_histories(body)[0][:2], driven=2)
    assert replay.start() == Settle(((2, 1, 1), (2, 2, 1)), fresh=False)


@pytest.mark.parametrize("body", LEAVING, ids=lambda body: body.__name__.strip("_"))
@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_parks_in_its_undo_is_discarded_like_any_other(
    body: Body, begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    history = _histories(body)[0] if begun else _histories(body)[0][:2]
    replay = drive(body, *history, driven=len(history))
    assert isinstance(replay.start(), DoStep if begun else Settle)
    replay.close()
    replay.close()
    assert not caplog.records


@pytest.mark.parametrize("body", [_fails_fast, _loses_a_race], ids=lambda body: body.__name__.strip("_"))
@pytest.mark.parametrize("at", [2, 3, 4, 5, 6, 7, 8])
def test_a_cancellation_that_comes_while_it_waits_or_undoes_changes_nothing(body: Body, at: int) -> None:
    for history in _histories(body):
        whole = (*history[:at], cancelled(), *history[at:])
        replay, other = (drive(body, *each, driven=len(each)) for each in (whole, history))
        assert _in_short(replay.start()) == _in_short(other.start())
        replay.close()
        other.close()


def _in_short(decision: Decision) -> Any:
    if isinstance(decision, DoStep):
        return decision.path, [(each.n, each.outcome) for each in decision.earlier]
    return decision


# -- what ends a body otherwise


def test_a_body_that_swallows_its_fresh_start_is_blocked() -> None:
    async def body() -> int:
        try:
            continue_as()
        except BaseException:
            return 1

    outcome = drive(body).start()
    assert isinstance(outcome, Block)
    assert "continue_as()" in outcome.error["message"]
    assert "let BaseException pass" in outcome.error["message"]


def test_a_body_that_cleans_up_and_fails_before_its_fresh_start_has_failed() -> None:
    async def body() -> None:
        try:
            continue_as()
        finally:
            raise ValueError("no")

    assert isinstance(drive(body).start(), Fail)


@pytest.mark.parametrize("error", [None, {"type": "DeadlineExceeded", "message": "late"}])
def test_a_body_that_would_start_anew_when_it_is_cancelled_ends_as_any_other(
    error: dict[str, Any] | None,
) -> None:
    async def body() -> None:
        await charge(1)
        try:
            await sleep(1000)
        finally:
            continue_as()

    replay = drive(body, done((1,), "charge", "r1"))
    replay.start()
    ending = record((), "flow", n=2, kind="cancel", outcome="cancelled", error=error, seq=2)
    decision = replay.deliver(ending)
    assert isinstance(decision, DoStep)
    assert decision.path == (1, 0)
    assert isinstance(replay.deliver(done((1, 0), "refund")), Fail if error else Cancel)
