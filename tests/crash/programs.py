"""Random workflow programs: as data, made from a seed, and the workflow that interprets them.

A program is a tree of nodes ``[kind, id, …]``; ids are unique within a program. What a program returns, and which
effects it has, depends on nothing but the program: not on the order in which its branches happened to run, nor on what
was killed on the way. So two runs of one program can be compared. All but the effects of what is below a join that ends
while others are under way (`chancy_of`): of these only what was booked and what was unbooked can be held against each
other.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import tenacity

from worker import (
    StepFailed,
    call,
    current_step,
    first,
    gather,
    map,
    patched,
    retrying,
    set_state,
    sleep,
    start,
    step,
    transaction,
    wait_signal,
    workflow,
)

Node = list[Any]

QUICKLY = retrying(stop=tenacity.stop_after_attempt(4), wait=tenacity.wait_fixed(0.02))
PATIENTLY = retrying(stop=tenacity.stop_after_attempt(4), wait=tenacity.wait_fixed(1.1))
"""So long that the run parks meanwhile."""
LONG_SECONDS = 3600.0


# -- making them up


class Maker:
    """Makes programs up. `depth` bounds how deep they nest."""

    def __init__(self, seed: int, depth: int = 3) -> None:
        self._random = random.Random(seed)
        self._depth = depth
        self._ids = 0

    def program(self) -> list[Node]:
        """Return a program: a sequence that may fail at its end."""
        self._ids = 0
        nodes = self._sequence(self._depth, at_most=5, may_fail=True)
        if self._random.random() < 0.25:
            nodes.append(self._node("raise"))
        return nodes

    def _sequence(self, depth: int, at_most: int, *, may_fail: bool = False) -> list[Node]:
        return [self._any(depth, may_fail=may_fail) for _ in range(self._random.randint(1, at_most))]

    def _any(self, depth: int, *, may_fail: bool = False) -> Node:
        """Return any node. One that may fail on the way is not a branch of a join that would end by that."""
        leaves = [
            "ask",
            "ask",
            "tell",
            "save",
            "save",
            "book",
            "wary",
            "flaky",
            "nap",
            "signal",
            "show",
            "patch",
        ]
        inner = [
            "gather", "gather", "settled", "map", "limited", "race", "dash", "try", "child", "started", "handles",
            *(["breaks"] if may_fail else []),
        ]  # fmt: skip
        kind = self._random.choice(leaves if depth == 0 else leaves + inner)
        match kind:
            case "breaks":
                return self._node(kind, [*self._frail(), [self._node("fail")]])
            case "dash":
                return self._node(kind, self._frail())
            case "handles":
                how = self._random.choice(["gather", "beside", "twice"])
                return self._node(
                    kind, [self._child(depth - 1) for _ in range(self._random.randint(1, 3))], how
                )
            case "gather" | "settled":
                settled = kind == "settled"
                branches = [
                    self._branch(depth - 1, may_fail=settled) for _ in range(self._random.randint(1, 4))
                ]
                if kind == "settled" and self._random.random() < 0.5:
                    branches.append([self._node("fail")])
                return self._node(kind, branches)
            case "map" | "limited":
                return self._node(kind, self._random.randint(0, 6))
            case "race":
                return self._node(kind, self._branch(depth - 1))
            case "try":
                return self._node(kind, [*self._sequence(depth - 1, 2, may_fail=True), self._node("fail")])
            case "child" | "started":
                return self._node(kind, self._child(depth - 1))
            case _:
                return self._node(kind)

    def _child(self, depth: int) -> list[Node]:
        nodes = self._sequence(depth, 3, may_fail=True)
        return [*nodes, self._node("raise")] if self._random.random() < 0.3 else nodes

    def _branch(self, depth: int, *, may_fail: bool = False) -> list[Node]:
        """Return a branch: mostly one leaf, which is a branch as it is."""
        if self._random.random() < 0.6:
            return self._sequence(depth, 3, may_fail=may_fail)
        return [self._any(0)]

    def _frail(self) -> list[list[Node]]:
        """Return branches of which it does not matter whether they come to their end."""
        leaves = ["book", "book", "wary", "ask", "tell", "nap"]
        return [
            [self._node(self._random.choice(leaves)) for _ in range(self._random.randint(1, 2))]
            for _ in range(self._random.randint(2, 3))
        ]

    def _node(self, kind: str, *rest: Any) -> Node:
        self._ids += 1
        return [kind, self._ids, *rest]


def signals_of(nodes: list[Node]) -> Iterator[str]:
    """Return the signals that a program waits for; children get theirs from their parent's input."""
    for kind, number, *rest in nodes:
        if kind == "signal":
            yield f"s{number}"
        elif kind in ("gather", "settled"):
            for branch in rest[0]:
                yield from signals_of(branch)
        elif kind in ("race", "try"):
            yield from signals_of(rest[0])


def chancy_of(nodes: list[Node]) -> Iterator[int]:
    """Return the ids of what may or may not take effect, depending on what happens to be first."""
    for kind, _, *rest in nodes:
        match kind:
            case "breaks" | "dash":
                yield from (node[1] for branch in rest[0] for node in branch)
            case "gather" | "settled" | "handles":
                for branch in rest[0]:
                    yield from chancy_of(branch)
            case "race" | "try" | "child" | "started":
                yield from chancy_of(rest[0])


# -- carrying them out


def noted(tag: str, number: int, detail: Any = "") -> str:
    """Append an effect to the ledger, which is outside the database; return what it says."""
    said = f"{tag} {number} {detail}".strip()
    line = f"{said}\t{current_step().idempotency_key}\n"
    descriptor = os.open(
        Path(os.environ["STEPWELL_TEST_HOME"]) / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT
    )
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
    return said


@step
async def ask(tag: str, number: int) -> str:
    return noted(tag, number)


@step
def tell(tag: str, number: int) -> str:
    return noted(tag, number)


@step(retry=QUICKLY)
async def flaky(tag: str, number: int) -> str:
    if current_step().execution <= 2:
        raise ConnectionError(f"not yet, {number}")
    return noted(tag, number)


@step
async def fail(tag: str, number: int) -> str:
    raise ValueError(f"never, {number}")


@step
async def item(asked: tuple[str, int, int]) -> int:
    tag, number, which = asked
    noted(tag, number, which)
    return which * which


@transaction
def save(connection: psycopg.Connection, tag: str, number: int) -> str:
    return _saved(connection, tag, number, "save")


@transaction
def unbook(connection: psycopg.Connection, tag: str, number: int, receipt: str) -> None:
    _saved(connection, tag, number, f"unbook {receipt}")


@transaction(undo=unbook)
def book(connection: psycopg.Connection, tag: str, number: int) -> str:
    return _saved(connection, tag, number, "book")


@transaction(retry=PATIENTLY)
def unbook_later(connection: psycopg.Connection, tag: str, number: int, receipt: str) -> None:
    if current_step().execution == 1 + number % 2:
        raise ConnectionError(f"not yet, {number}")
    _saved(connection, tag, number, f"unbook {receipt}")


@transaction(undo=unbook_later)
def wary(connection: psycopg.Connection, tag: str, number: int) -> str:
    return _saved(connection, tag, number, "book")


def _saved(connection: psycopg.Connection, tag: str, number: int, what: str) -> str:
    connection.execute("insert into saved (tag, number, what) values (%s, %s, %s)", (tag, number, what))
    return f"{what} {number}"


@workflow
async def interpret(tag: str, program: list[Any]) -> list[Any]:
    return await _sequence(tag, program)


async def _sequence(tag: str, nodes: list[Node]) -> list[Any]:
    return [await _one(tag, node) for node in nodes]


async def _one(tag: str, node: Node) -> Any:
    kind, number, *rest = node
    match kind:
        case "gather" | "settled":
            branches = [_branch(tag, branch) for branch in rest[0]]
            values = await gather(*branches, return_errors=kind == "settled")
            return [_told(value) for value in values]
        case "breaks":
            return await gather(*(_branch(tag, branch) for branch in rest[0]))
        case "dash":
            await first(*(_branch(tag, branch) for branch in rest[0]))
            return "dashed"
        case "handles":
            return await _handles(tag, number, *rest)
        case "map" | "limited":
            items = [(tag, number, which) for which in range(rest[0])]
            return await map(item, items, limit=2 if kind == "limited" else None)
        case "race":
            return list(await first(_sequence(tag, rest[0]), sleep(LONG_SECONDS)))
        case "try":
            try:
                await _sequence(tag, rest[0])
            except (StepFailed, ValueError) as error:
                return _told(error)
        case "child":
            return await _awaited(interpret(f"{tag}/{number}", rest[0]))
        case "started":
            handle = start(interpret, f"{tag}/{number}", rest[0])
            between = await ask(tag, number)
            return [between, await _awaited(handle)]
        case "raise":
            raise ValueError(f"at the end, {number}")
        case _:
            return await _leaf(tag, kind, number)


async def _handles(tag: str, number: int, children: list[list[Node]], how: str) -> Any:
    handles = [start(interpret, f"{tag}/{number}.{n}", child) for n, child in enumerate(children)]
    if how == "twice":
        return [[await _awaited(each) for each in handles] for _ in range(2)]
    beside = [ask(tag, number)] if how == "beside" else []
    values = await gather(*handles, *beside, return_errors=True)
    return [type(value).__name__ if isinstance(value, Exception) else value for value in values]


def _branch(tag: str, nodes: list[Node]) -> Any:
    """Return a call as it is where a branch is nothing else, so that both sorts of branches are run."""
    kind, number = nodes[0][:2]
    if len(nodes) == 1 and kind in ("ask", "flaky", "fail"):
        return {"ask": ask, "flaky": flaky, "fail": fail}[kind](tag, number)
    if len(nodes) == 1 and kind in ("tell", "save", "book", "wary"):
        return call({"tell": tell, "save": save, "book": book, "wary": wary}[kind], tag, number)
    return _sequence(tag, nodes)


async def _leaf(tag: str, kind: str, number: int) -> Any:
    match kind:
        case "ask":
            return await ask(tag, number)
        case "tell":
            return tell(tag, number)
        case "save":
            return save(tag, number)
        case "book":
            return book(tag, number)
        case "wary":
            return wary(tag, number)
        case "flaky":
            return await flaky(tag, number)
        case "fail":
            return await fail(tag, number)
        case "nap":
            return await sleep(0.05)
        case "signal":
            return (
                await wait_signal(f"s{number}", timeout=LONG_SECONDS)
                if "/" not in tag
                else await ask(tag, number)
            )
        case "show":
            return set_state(f"n{number}", number)
        case "patch":
            # False as well for a run whose worker died at its very beginning: it might have been one of before.
            return patched(f"p{number}") in {True, False}
    raise AssertionError(kind)


async def _awaited(child: Any) -> Any:
    try:
        return await child
    except Exception as error:
        return type(error).__name__


def _told(value: Any) -> Any:
    return f"{type(value).__name__}: {value}" if isinstance(value, Exception) else value
