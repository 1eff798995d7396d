"""What was sent to a run is handed to its body in the order in which it came, whenever somebody looks.

A run in memory: a `Mailbox` and a `Replay` as the engine uses them, without a database. It is looked after by claim
after claim, each of which drives the body anew from the history.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.errors import RunFailed
from tests.unit.drives import FACTS
from tests.unit.test_turns import claim
from worker import first, gather, start, wait_signal, workflow
from worker.definitions import Workflow, collecting
from worker.engine.claims import Mail
from worker.engine.mailbox import Mailbox, OversizeError
from worker.engine.spreading import ANY_CHILD, spread
from worker.engine.transitions import ChildRow, Taken
from worker.engine.turns import Standing
from worker.replay.decisions import Await, Decision, Finish
from worker.replay.driver import Replay
from worker.replay.records import Record

NOW = datetime(2026, 1, 1, tzinfo=UTC)

with collecting():

    @workflow
    async def child(n: int) -> int: ...


def flow_of(body: Any) -> Workflow[..., Any]:
    with collecting():
        return workflow(name="flow")(body)


def signals(*sent: tuple[str, Any]) -> list[Mail]:
    return [Mail(n, name, msgspec.json.encode(value).decode()) for n, (name, value) in enumerate(sent, 1)]


def result(id: int, path: str, output: Any, state: str = "succeeded") -> Mail:
    said = {"run": str(UUID(int=id)), "state": state, "output": output, "error": None}
    return Mail(id, f"stepwell:child:{path}", msgspec.json.encode(said).decode())


class Run:
    """A run in memory, with what was sent to it and is not taken yet."""

    def __init__(self, flow: Workflow[..., Any], **input: Any) -> None:
        self.flow = flow
        self.input = msgspec.json.encode(input).decode()
        self.history: list[Record] = []
        self.driven = -1
        self.inbox: list[Mail] = []

    def look(self, *sent: Mail) -> Decision:
        """Have a claim take what has come, until it would park; return what the body stands at."""
        self.inbox += sent
        standing = Standing(
            claim(seq=len(self.history), epoch=0, cancelling=False), self.history, time.monotonic()
        )
        replay = Replay(self.flow, self.input, FACTS, list(self.history), driven=self.driven)
        mailbox = Mailbox(self.inbox)
        decision = replay.start()
        while isinstance(decision, Await):
            taken = mailbox.take(decision, standing, replay)
            if not taken.records:
                break
            self._note(taken.records)
            gone = {extra.signal for extra in taken.extras if isinstance(extra, Taken)}
            assert len(gone) == taken.signals
            self.inbox = [mail for mail in self.inbox if mail.id not in gone]
            decision = replay.decide()
        self.driven = len(self.history)
        replay.close()
        return decision

    def _note(self, records: Iterable[Record]) -> None:
        for record in records:
            self.history.append(msgspec.structs.replace(record, seq=len(self.history) + 1, at=NOW))

    @property
    def told(self) -> list[tuple[tuple[int, ...], Any]]:
        return [(each.path, each.value) for each in self.history]


# -- in the order in which it came ---------------------------------------------------------------------


async def drops_two() -> Any:
    await first(wait_signal("x"), gather(wait_signal("a"), wait_signal("a")))
    return [await wait_signal("a"), await wait_signal("a")]


async def drops_the_first_of_two() -> Any:
    got = await gather(first(wait_signal("x"), wait_signal("a")), wait_signal("a"))
    return [got[1], await wait_signal("a")]


async def takes_two_in_a_branch() -> Any:
    async def two() -> Any:
        return [await wait_signal("a"), await wait_signal("a")]

    return (await first(two(), wait_signal("x"))).value


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (drops_two, [("x", 0), ("a", 1), ("a", 2)]),
        (drops_the_first_of_two, [("x", 0), ("a", 1), ("a", 2)]),
        (takes_two_in_a_branch, [("a", 1), ("a", 2), ("x", 0)]),
    ],
)
def test_signals_of_one_name_are_first_in_first_out_whatever_else_is_taken(
    body: Any, sent: list[tuple[str, Any]], at_once: bool
) -> None:
    run = Run(flow_of(body))
    portions = [signals(*sent)] if at_once else [[each] for each in signals(*sent)]
    for portion in portions:
        decision = run.look(*portion)
    assert decision == Finish("[1,2]")


# -- the results of children ---------------------------------------------------------------------------


def test_a_child_tells_once_what_becomes_of_it_and_every_await_is_answered() -> None:
    async def body() -> Any:
        handle = start(child, 1)
        both = await gather(handle, handle)
        return [*both, await handle]

    run = Run(flow_of(body))
    run.look()
    assert run.look(result(1, "1", 5)) == Finish("[5,5,5]")
    assert run.told == [((2, 1, 1), "5"), ((2, 2, 1), "5"), ((3,), "5")]
    assert run.look() == Finish("[5,5,5]")


def test_a_child_that_failed_fails_every_await() -> None:
    async def body() -> Any:
        handle = start(child, 1)
        errors = list(await gather(handle, handle, return_errors=True))
        try:
            await handle
        except RunFailed as error:
            errors.append(error)
        return [type(each).__name__ for each in errors]

    run = Run(flow_of(body))
    run.look()
    assert run.look(result(1, "1", None, "failed")) == Finish('["RunFailed","RunFailed","RunFailed"]')
    assert run.look() == Finish('["RunFailed","RunFailed","RunFailed"]')


def test_a_second_result_of_a_child_changes_no_answer() -> None:
    """As when a child that failed is retried before its parent has looked."""

    async def body() -> Any:
        handle = start(child, 1)
        return [type(each).__name__ for each in await gather(handle, handle, return_errors=True)]

    run = Run(flow_of(body))
    run.look()
    assert run.look(result(1, "1", None, "failed"), result(2, "1", 5)) == Finish('["RunFailed","RunFailed"]')


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_child_that_had_gone_wrong_before_a_retry_is_begun_again_and_waited_for(state: str) -> None:
    async def body() -> Any:
        return await start(child, 1)

    run = Run(flow_of(body))
    assert isinstance(run.look(result(1, "1", None, state)), Await)
    assert run.history == []
    succeeded = Run(flow_of(body))
    assert succeeded.look(result(1, "1", None, state), result(2, "1", 5)) == Finish("5")


def test_an_answer_that_is_known_is_given_before_what_came_after_it() -> None:
    async def body() -> Any:
        handle = start(child, 1)

        async def twice() -> Any:
            return [await handle, await handle]

        return (await first(twice(), gather(handle, handle, wait_signal("y")), wait_signal("x"))).value

    at_once = Run(flow_of(body))
    assert at_once.look(result(1, "1", 5), *[Mail(2, "x", "0")]) == Finish("[5,5]")
    by_and_by = Run(flow_of(body))
    by_and_by.look()
    assert by_and_by.look(result(1, "1", 5)) == Finish("[5,5]")
    assert by_and_by.told == at_once.told


# -- what cannot be read -------------------------------------------------------------------------------


def test_what_was_taken_before_something_that_was_not_read_is_kept() -> None:
    async def body() -> Any:
        return list(await gather(wait_signal("a"), wait_signal("b")))

    replay = Replay(flow_of(body), "{}", FACTS)
    standing = Standing(claim(seq=0, cancelling=False), [], time.monotonic())
    decision = replay.start()
    assert isinstance(decision, Await)
    mailbox = Mailbox([Mail(1, "a", "1"), Mail(2, "b", None, 9)])
    taken = mailbox.take(decision, standing, replay)
    assert ([each.path for each in taken.records], taken.signals) == ([(1, 1, 1)], 1)
    for _ in range(2):
        decision = replay.decide()
        assert isinstance(decision, Await)
        with pytest.raises(OversizeError) as caught:
            mailbox.take(decision, standing, replay)
        assert caught.value.mail.id == 2


# -- whenever it is looked at --------------------------------------------------------------------------

NAMES = "abc"
CHILDREN = 2

_leaf = st.one_of(
    st.tuples(st.just("signal"), st.sampled_from(NAMES)),
    st.tuples(st.just("child"), st.integers(0, CHILDREN - 1)),
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.tuples(st.sampled_from(["gather", "first", "after"]), several)


programs = st.lists(st.recursive(_leaf, _nested, max_leaves=8), min_size=1, max_size=4)
letters = st.lists(
    st.one_of(st.sampled_from(NAMES), st.integers(0, CHILDREN - 1)), max_size=12
)  # a signal of this name, or the result of this child
cuts = st.lists(st.booleans(), min_size=12, max_size=12)


async def _interpreted(program: list[Any], handles: list[Any]) -> Any:
    return [await _done(op, handles) for op in program]


def _done(op: Any, handles: list[Any]) -> Any:
    kind, given = op
    if kind == "signal":
        return wait_signal(given)
    if kind == "child":
        return handles[given]
    if kind == "after":
        return _interpreted(given, handles)
    return {"gather": gather, "first": first}[kind](*[_done(each, handles) for each in given])


with collecting():

    @workflow
    async def interpreter(program: Any) -> Any:
        return await _interpreted(program, [start(child, n) for n in range(CHILDREN)])


def _sent(plan: list[str | int]) -> Iterator[Mail]:
    reported: set[int] = set()
    for n, each in enumerate(plan, 1):
        if isinstance(each, str):
            yield Mail(n, each, str(n))
        elif each not in reported:
            reported.add(each)
            yield result(n, str(each + 1), n)


@settings(max_examples=150, deadline=None)
@given(program=programs, plan=letters, cut=cuts)
def test_it_makes_no_difference_when_what_has_come_is_looked_at(
    program: Any, plan: list[str | int], cut: list[bool]
) -> None:
    whole, portioned = Run(interpreter, program=program), Run(interpreter, program=program)
    mail = list(_sent(plan))
    expected = whole.look(*mail)
    portion: list[Mail] = []
    for each, here in zip(mail, cut, strict=False):
        portion.append(each)
        if here:
            portioned.look(*portion)
            portion = []
    ended = portioned.look(*portion)
    assert portioned.told == whole.told
    assert [each.id for each in portioned.inbox] == [each.id for each in whole.inbox]
    assert ended == expected if isinstance(expected, Finish) else type(ended) is type(expected)
    for name in NAMES:  # first in, first out
        taken = [int(each.value or "0") for each in whole.history if each.name == name]
        left = [each.id for each in whole.inbox if each.name == name]
        assert taken + left == sorted(taken + left)


# -- what wakes a run that waits for children ----------------------------------------------------------


@pytest.mark.parametrize(
    ("join", "counted"),
    [
        (lambda hs: gather(*hs), 0),
        (lambda hs: gather(*hs, return_errors=True), 0),
        (lambda hs: first(gather(*hs), wait_signal("x")), 0),
        (lambda hs: gather(*hs, child(3), child(4)), 2),
    ],
    ids=["gather", "return_errors", "first", "with calls"],
)
def test_a_run_that_waits_for_handles_is_woken_by_any_result(join: Any, counted: int) -> None:
    async def body() -> Any:
        await join([start(child, n) for n in range(2)])

    replay = Replay(flow_of(body), "{}", FACTS)
    decision = replay.start()
    assert isinstance(decision, Await)
    parking, rows = spread(decision, Standing(claim(seq=0, pending=0), [], time.monotonic()))
    assert ANY_CHILD in parking.awaits
    assert sum(row.counted for row in rows if isinstance(row, ChildRow)) == counted
