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
    NOT_DONE,
    StepFailed,
    call,
    continue_as,
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
SIDE = "side"
"""The queue of the steps that have one of their own."""
ASIDE = ("far", "off", "lend", "loan")
"""The steps that are executed there, or undone there."""


# -- making them up


class Maker:
    """Makes programs up. `depth` bounds how deep they nest."""

    def __init__(self, seed: int, depth: int = 3) -> None:
        self._random = random.Random(seed)
        self._depth = depth
        self._ids = 0

    def program(self) -> list[Node]:
        """Return a program: a sequence that may start anew or fail at its end."""
        self._ids = 0
        nodes = self._sequence(self._depth, at_most=5, may_fail=True)
        return nodes + self._ending(self._depth, raising=0.25)

    def _ending(self, depth: int, raising: float) -> list[Node]:
        if depth > 0 and self._random.random() < 0.15:
            return [self._node("again", self._child(depth - 1))]
        return [self._node("raise")] if self._random.random() < raising else []

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
            *ASIDE,
            "checked",
            "held",
            "rash",
            "wild",
            "letters",
            "overdue",
        ]
        inner = [
            "gather", "gather", "settled", "map", "limited", "race", "dash", "try", "child", "started", "handles", "left",
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
                return self._node(kind, _attended(self._branch(depth - 1)))
            case "try":
                return self._node(kind, [*self._sequence(depth - 1, 2, may_fail=True), self._node("fail")])
            case "child" | "started":
                return self._node(kind, self._child(depth - 1))
            case "left":
                return self._node(kind, self._child(depth - 1), self._random.random() < 0.5)
            case "letters":
                return self._node(kind, self._random.randint(2, 3), self._random.choice(["gather", "after"]))
            case _:
                return self._node(kind)

    def _child(self, depth: int) -> list[Node]:
        return self._sequence(depth, 3, may_fail=True) + self._ending(depth, raising=0.3)

    def _branch(self, depth: int, *, may_fail: bool = False) -> list[Node]:
        """Return a branch: mostly one leaf, which is a branch as it is."""
        if self._random.random() < 0.6:
            return self._sequence(depth, 3, may_fail=may_fail)
        return [self._any(0)]

    def _frail(self) -> list[list[Node]]:
        """Return branches of which it does not matter whether they come to their end."""
        leaves = ["book", "book", "wary", "ask", "tell", "nap", "rash", "wild", *ASIDE]
        return [
            [self._node(self._random.choice(leaves)) for _ in range(self._random.randint(1, 2))]
            for _ in range(self._random.randint(2, 3))
        ]

    def _node(self, kind: str, *rest: Any) -> Node:
        self._ids += 1
        return [kind, self._ids, *rest]


def _attended(part: Any) -> Any:
    """Return part of a program without steps that a person has to look at: nobody is asked while the run waits for more."""
    if not isinstance(part, list) or part[:1] in (["child"], ["started"], ["handles"], ["left"]):
        return part
    return ["checked", *part[1:]] if part[:1] == ["held"] else [_attended(each) for each in part]


def signals_of(nodes: list[Node]) -> Iterator[tuple[str, str]]:
    """Return name and payload of the signals that a program waits for; children get theirs from their parent's input."""
    for kind, number, *rest in nodes:
        if kind == "signal":
            yield f"s{number}", f"s{number}"
        elif kind == "letters":
            yield from ((f"s{number}", f"letter {n}") for n in range(rest[0]))
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
            case "race" | "try" | "child" | "started" | "left" | "again":
                yield from chancy_of(rest[0])


def careful_of(nodes: list[Node]) -> Iterator[int]:
    """Return the ids of what takes effect once even if its worker is killed: it is looked at what has come of it.

    Not in children that are begun by `start`: a retry of their parent may begin them again. And not where several of a join
    may be held at once: to say how one of them ended opens the run again, and has the others executed again unseen. That is a
    fault of `resolve` which this will show when it is mended.
    """
    for kind, number, *rest in nodes:
        if kind in ("checked", "held"):
            yield number
        elif kind in ("race", "try", "child", "again"):
            yield from careful_of(rest[0])
        elif kind in ("gather", "settled"):
            careful = [number for branch in rest[0] for number in careful_of(branch)]
            holding = [branch for branch in rest[0] if _holds(branch)]
            yield from careful if len(holding) < 2 else ()


def _holds(nodes: list[Node]) -> bool:
    """Tell whether there is a step among these that waits for a person when its worker dies."""
    return any(
        kind == "held"
        or (kind in ("race", "try", "child", "again") and _holds(rest[0]))
        or (kind in ("gather", "settled") and any(_holds(branch) for branch in rest[0]))
        for kind, _, *rest in nodes
    )


# -- carrying them out


def ledger() -> Path:
    return Path(os.environ["STEPWELL_TEST_HOME"]) / "ledger"


def noted(tag: str, number: int, detail: Any = "") -> str:
    """Append an effect to the ledger, which is outside the database; return what it says."""
    said = f"{tag} {number} {detail}".strip()
    line = f"{said}\t{current_step().idempotency_key}\n"
    descriptor = os.open(ledger(), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
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


@step(queue=SIDE)
async def far(tag: str, number: int) -> str:
    return noted(tag, number)


@step(queue=SIDE, retry=QUICKLY)
def off(tag: str, number: int) -> str:
    if current_step().execution <= 1:
        raise ConnectionError(f"not yet, {number}")
    return noted(tag, number)


@transaction(queue=SIDE, retry=PATIENTLY)
def unbook_aside(connection: psycopg.Connection, tag: str, number: int, receipt: str) -> None:
    if current_step().execution == 1 + number % 2:
        raise ConnectionError(f"not yet, {number}")
    _saved(connection, tag, number, f"unbook {receipt}")


@transaction(queue=SIDE, undo=unbook)
def lend(connection: psycopg.Connection, tag: str, number: int) -> str:
    return _saved(connection, tag, number, "book")


@transaction(undo=unbook_aside)
def loan(connection: psycopg.Connection, tag: str, number: int) -> str:
    return _saved(connection, tag, number, "book")


@transaction
def unbook_rashly(connection: psycopg.Connection, tag: str, number: int, receipt: str) -> None:
    if current_step().execution == 1:
        raise ConnectionError(f"not before somebody has looked, {number}")
    _saved(connection, tag, number, f"unbook {receipt}")


@transaction(undo=unbook_rashly)
def rash(connection: psycopg.Connection, tag: str, number: int) -> str:
    return _saved(connection, tag, number, "book")


@transaction(queue=SIDE)
def unbook_wildly(connection: psycopg.Connection, tag: str, number: int, receipt: str) -> None:
    if current_step().execution == 1:
        raise ConnectionError(f"not before somebody has looked, {number}")
    _saved(connection, tag, number, f"unbook {receipt}")


@transaction(undo=unbook_wildly)
def wild(connection: psycopg.Connection, tag: str, number: int) -> str:
    return _saved(connection, tag, number, "book")


def was_noted(tag: str, number: int) -> Any:
    """Return what a step has noted, if it did."""
    key = current_step().idempotency_key
    lines = ledger().read_text().splitlines() if ledger().exists() else []
    return f"{tag} {number}" if any(line.partition("\t")[2] == key for line in lines) else NOT_DONE


@step(verify=was_noted)
async def checked(tag: str, number: int) -> str:
    return noted(tag, number)


@step(on_crash="hold")
async def held(tag: str, number: int) -> str:
    return noted(tag, number)


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
        case "left" | "again" | "raise":
            return _begun_or_ended(tag, node)
        case _:
            return await _leaf(tag, kind, number, *rest)


def _begun_or_ended(tag: str, node: Node) -> str:
    kind, number, *rest = node
    if kind == "raise":
        raise ValueError(f"at the end, {number}")
    if kind == "again":
        continue_as(f"{tag}/{number}", rest[0])
    start(interpret, f"{tag}/{number}", rest[0], detached=rest[1])
    return "left to itself"


async def _handles(tag: str, number: int, children: list[list[Node]], how: str) -> Any:
    handles = [start(interpret, f"{tag}/{number}.{n}", child) for n, child in enumerate(children)]
    if how == "twice":
        return [[await _awaited(each) for each in handles] for _ in range(2)]
    beside = [ask(tag, number)] if how == "beside" else []
    values = await gather(*handles, *beside, return_errors=True)
    return [type(value).__name__ if isinstance(value, Exception) else value for value in values]


async def _letters(number: int, count: int, how: str) -> list[Any]:
    if how == "after":
        return [await wait_signal(f"s{number}") for _ in range(count)]
    waits = [wait_signal(f"s{number}", timeout=LONG_SECONDS if n else None) for n in range(count)]
    return list(await gather(*waits))


def _branch(tag: str, nodes: list[Node]) -> Any:
    """Return a call as it is where a branch is nothing else, so that both sorts of branches are run."""
    kind, number = nodes[0][:2]
    if len(nodes) == 1 and kind in STEPS:
        called = STEPS[kind]
        return called(tag, number) if called.is_async else call(called, tag, number)
    return _sequence(tag, nodes)


async def _leaf(tag: str, kind: str, number: int, *rest: Any) -> Any:
    if kind in STEPS:
        called = STEPS[kind]
        return await called(tag, number) if called.is_async else called(tag, number)
    match kind:
        case "nap":
            return await sleep(0.05)
        case "signal":
            return (
                await wait_signal(f"s{number}", timeout=LONG_SECONDS)
                if "/" not in tag
                else await ask(tag, number)
            )
        case "letters":
            return await _letters(number, *rest) if "/" not in tag else await ask(tag, number)
        case "overdue":
            try:
                return await wait_signal(f"never{number}", timeout=0.05)
            except TimeoutError:
                return "overdue"
        case "show":
            return set_state(f"n{number}", number)
        case "patch":
            # False as well for a run whose worker died at its very beginning: it might have been one of before.
            return patched(f"p{number}") in {True, False}
    raise AssertionError(kind)


STEPS: dict[str, Any] = {
    "ask": ask, "tell": tell, "flaky": flaky, "fail": fail, "save": save, "book": book, "wary": wary,
    "far": far, "off": off, "lend": lend, "loan": loan, "checked": checked, "held": held, "rash": rash, "wild": wild,
}  # fmt: skip


async def _awaited(child: Any) -> Any:
    try:
        return await child
    except Exception as error:
        return type(error).__name__


def _told(value: Any) -> Any:
    return f"{type(value).__name__}: {value}" if isinstance(value, Exception) else value
