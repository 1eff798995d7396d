"""Random programs, driven through random crashes: they must come out as if nothing had happened.

A program is data, interpreted by a workflow body, so that hypothesis can make it up and make it smaller. Its
steps give another answer each time they are executed, so that an execution too many shows in what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.errors import StepFailed
from tests.unit.drives import Run, record
from worker.context import now, random, sleep, uuid, wait
from worker.definitions import collecting, step, workflow
from worker.engine.sandbox import Sandbox
from worker.replay.decisions import Block, DoStep, Sleep
from worker.replay.records import visible

Op = list[Any]


@dataclass
class Refused(Exception):
    reason: str
    count: int


class World:
    """What lies outside of Stepwell: it counts what is done to it."""

    def __init__(self) -> None:
        self.effects: list[tuple[str, Any]] = []

    def answer(self, name: str, argument: Any) -> int:
        self.effects.append((name, argument))
        return len(self.effects)


WORLD = World()

with collecting():

    @step
    async def ask(argument: Any) -> int:
        return WORLD.answer("ask", argument)

    @step
    def tell(argument: Any) -> list[int]:
        return [WORLD.answer("tell", argument)]

    @step(raises=Refused)
    async def refuse(argument: Any) -> None:
        raise Refused("no", WORLD.answer("refuse", argument))

    @step
    def fail(argument: Any) -> None:
        raise ValueError(WORLD.answer("fail", argument))

    @workflow
    async def async_flow(program: list[Any]) -> list[Any]:
        seen: list[Any] = []
        await _interpret(program, seen)
        return seen

    @workflow
    def def_flow(program: list[Any]) -> list[Any]:
        seen: list[Any] = []
        wait(_interpret(program, seen))
        return seen


async def _interpret(program: list[Op], seen: list[Any]) -> None:
    for kind, *rest in program:
        if kind == "if":
            branch = rest[0] if len(seen) % 2 else rest[1]
            await _interpret(branch, seen)
        elif kind == "loop":
            for _ in range(rest[0]):
                await _interpret(rest[1], seen)
        elif kind == "try":
            try:
                await _interpret(rest[0], seen)
            except (StepFailed, Refused, ValueError) as error:
                seen.append([type(error).__name__, str(error)])
            finally:
                seen.append("finally")
        else:
            await _OPERATIONS[kind](seen)


async def _ask(seen: list[Any]) -> None:
    seen.append(await ask(seen[-2:]))


async def _tell(seen: list[Any]) -> None:
    given = tell(seen[-1:])
    given.append(0)  # the body may do with its copy what it likes
    seen.append(given)


async def _refuse(seen: list[Any]) -> None:
    await refuse(len(seen))


async def _fail(seen: list[Any]) -> None:
    fail(len(seen))


async def _raise(seen: list[Any]) -> None:
    raise ValueError(f"by the body after {len(seen)}")


async def _sleep(seen: list[Any]) -> None:
    await sleep(len(seen))


async def _draw(seen: list[Any]) -> None:
    seen.append([random(), str(uuid())])


async def _now(seen: list[Any]) -> None:
    seen.append(str(now()))


_OPERATIONS: dict[str, Callable[[list[Any]], Any]] = {
    "ask": _ask,
    "tell": _tell,
    "refuse": _refuse,
    "fail": _fail,
    "raise": _raise,
    "sleep": _sleep,
    "draw": _draw,
    "now": _now,
}

_simple: st.SearchStrategy[Op] = st.sampled_from(sorted(_OPERATIONS)).map(lambda kind: [kind])


def _nested(inner: st.SearchStrategy[Op]) -> st.SearchStrategy[Op]:
    body = st.lists(inner, max_size=4)
    return st.one_of(
        st.tuples(st.just("if"), body, body).map(list),
        st.tuples(st.just("loop"), st.integers(0, 3), body).map(list),
        st.tuples(st.just("try"), body).map(list),
    )


programs = st.lists(st.recursive(_simple, _nested, max_leaves=12), max_size=8)
crashes = st.lists(st.booleans(), max_size=30)
flows = st.sampled_from([async_flow, def_flow])

SANDBOX = Sandbox()


def _crash(points: list[bool]) -> Callable[[], bool]:
    """Return what tells at each point whether the worker dies there; it survives once the list is used up."""
    ahead: Iterator[bool] = iter(points)
    return lambda: next(ahead, False)


def _run(
    flow: Any, program: list[Op], points: list[bool] | None = None
) -> tuple[Any, list[tuple[str, Any]], Run]:
    """Drive a program to its end; return how it ended, its effects, and the run."""
    WORLD.effects = []
    run = Run(flow, program=program, guard=SANDBOX)
    outcome = run.finish(_crash(points or []))
    return outcome, WORLD.effects, run


def _without_trace(outcome: Any) -> Any:
    error = getattr(outcome, "error", None)
    return {**error, "trace": None} if error else outcome


@settings(max_examples=100, deadline=None)
@given(flow=flows, program=programs, points=crashes)
def test_an_interrupted_run_comes_out_like_an_uninterrupted_one(
    flow: Any, program: list[Op], points: list[bool]
):
    expected, effects, whole = _run(flow, program)
    outcome, repeated, broken = _run(flow, program, points)
    assert not isinstance(expected, Block), expected
    assert _without_trace(outcome) == _without_trace(expected)
    assert repeated == effects
    assert broken.history == whole.history


@settings(max_examples=60, deadline=None)
@given(flow=flows, program=programs)
def test_every_prefix_of_a_history_leads_to_the_decision_that_was_made_there(flow: Any, program: list[Op]):
    _, effects, run = _run(flow, program)
    history, decisions = run.history, run.decisions
    for length, decision in enumerate(decisions):
        run.history = history[:length]
        assert _without_trace(run.start()) == _without_trace(decision)
    assert WORLD.effects == effects, "a replay has no effects"


@settings(max_examples=60, deadline=None)
@given(flow=flows, program=programs, data=st.data())
def test_a_history_with_a_record_missing_never_ends_otherwise_without_saying_so(
    flow: Any, program: list[Op], data: st.DataObject
):
    _, _, run = _run(flow, program)
    if len(run.history) < 2:
        return
    missing = data.draw(st.integers(0, len(run.history) - 2))
    run.history = run.history[:missing] + run.history[missing + 1 :]
    outcome = run.start()
    assert isinstance(outcome, Block)
    assert outcome.reason == "history mismatch"


@settings(max_examples=60, deadline=None)
@given(flow=flows, program=programs, points=crashes)
def test_a_failed_run_that_is_retried_fits_its_history(flow: Any, program: list[Op], points: list[bool]):
    """What a retry voids is executed again, the rest is not, and never do the two contradict each other."""
    _, _, run = _run(flow, program)
    seq = len(run.history)
    opening = record((), flow.name, kind="epoch", n=1, outcome="retry", seq=seq + 1, epoch=1)
    run.history = visible([*run.history, opening])
    kept = [each for each in run.history if each.n == 0]
    replay = run.replay()
    outcome = replay.start()
    assert not isinstance(outcome, Block), outcome
    if isinstance(outcome, DoStep):
        assert outcome.path == (len(kept) + 1,)
        assert [each.outcome for each in outcome.earlier] == ["voided"]
    assert not isinstance(outcome, Sleep)
    replay.close()


@pytest.mark.parametrize("flow", [async_flow, def_flow])
def test_a_program_that_does_everything_is_driven_through_a_crash_at_every_point(flow: Any):
    program = [
        ["ask"],
        ["draw"],
        ["try", [["tell"], ["refuse"]]],
        ["sleep"],
        ["if", [["ask"]], [["tell"], ["now"]]],
        ["loop", 2, [["ask"], ["try", [["fail"]]], ["now"]]],
        ["fail"],
    ]
    expected, effects, _ = _run(flow, program)
    for point in range(30):
        outcome, repeated, _ = _run(flow, program, [False] * point + [True])
        assert _without_trace(outcome) == _without_trace(expected)
        assert repeated == effects
