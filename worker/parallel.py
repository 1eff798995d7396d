"""Several calls at once: `gather`, `map`, `first`, and `call` for def steps in them.

A branch is a call (of a step, a workflow, `sleep`, `wait_signal`), or a coroutine that makes any number of calls, one
after the other. Steps in branches become tasks of their own, which any worker takes. In an async body what these
functions return is awaited, in a def body it goes through `wait`.

Outside of a run they do the same with asyncio, so that bodies can be called and tested as plain functions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, ParamSpec, TypeVar, overload

from outbox.errors import ConfigError
from worker.context import current_drive
from worker.replay.calls import ChildCall, First, JoinCall, StepCall

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")

MAX_BRANCHES = 100_000


@overload
def call(function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]: ...
@overload
def call(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]: ...
def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Return the call of a step or workflow without making it: ``gather(call(save, lead), send(lead))``.

    A def step that is called makes its call at once; this is how it gets into a join. Raises ConfigError for anything
    that is neither a step nor a workflow.
    """
    from worker.definitions import Step, Workflow

    if not isinstance(function, Step | Workflow):
        raise ConfigError(
            f"call() takes a step or a workflow, got {function!r}; a coroutine is a branch as it is"
        )
    drive = current_drive.get()
    if drive is None:
        return _called_later(function, args, kwargs)
    args = function.payload_of(args)
    return StepCall(drive, function, args, kwargs) if isinstance(function, Step) else ChildCall(
        drive, function, args, kwargs
    )  # fmt: skip


@overload
def gather(a: Awaitable[A], /, *, return_errors: Literal[False] = False) -> Awaitable[tuple[A]]: ...
@overload
def gather(
    a: Awaitable[A], b: Awaitable[B], /, *, return_errors: Literal[False] = False
) -> Awaitable[tuple[A, B]]: ...
@overload
def gather(
    a: Awaitable[A], b: Awaitable[B], c: Awaitable[C], /, *, return_errors: Literal[False] = False
) -> Awaitable[tuple[A, B, C]]: ...
@overload
def gather(
    a: Awaitable[A],
    b: Awaitable[B],
    c: Awaitable[C],
    d: Awaitable[D],
    /,
    *,
    return_errors: Literal[False] = False,
) -> Awaitable[tuple[A, B, C, D]]: ...
@overload
def gather(*calls: Awaitable[T], return_errors: Literal[False] = False) -> Awaitable[tuple[T, ...]]: ...
@overload
def gather(*calls: Awaitable[T], return_errors: bool) -> Awaitable[tuple[T | Exception, ...]]: ...
def gather(*calls: Any, return_errors: bool = False) -> Any:
    """Make several calls at once, and return their values in the order of the calls.

    The first failure, in the order in which things happened, is raised, and nobody waits for the other branches any
    more: what of them has not started is not executed. With `return_errors` all end, and errors stand among the values.
    """
    _check(calls, "gather")
    drive = current_drive.get()
    if drive is None:
        return _gathered_plainly(calls, return_errors)
    return JoinCall(drive, calls, "settled" if return_errors else "all")


@overload
def map(
    function: Callable[[A], Awaitable[T]], items: Iterable[A], *, limit: int | None = None
) -> Awaitable[list[T]]: ...
@overload
def map(
    function: Callable[[A], T], items: Iterable[A], *, limit: int | None = None
) -> Awaitable[list[T]]: ...
def map(function: Any, items: Iterable[Any], *, limit: int | None = None) -> Any:
    """Call a step or workflow with each of up to 100,000 items, and return the values in their order.

    `limit`: at most so many are executed at a time. The first failure is raised, as by `gather`.
    """
    given = list(items)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"map(limit=…) takes a positive whole number, got {limit!r}")
    branches = [call(function, each) for each in given]
    _check(branches, "map")
    drive = current_drive.get()
    if drive is None:
        return _mapped_plainly(branches, limit)
    return JoinCall(drive, branches, "all", limit=limit, as_list=True)


def first(*calls: Awaitable[T]) -> Awaitable[First]:
    """Make several calls at once, and return the index and the value of the one that ends first.

    ``index, value = await first(wait_signal("approved"), sleep(86400))``. If it has failed, its error is raised. Nobody
    waits for the others any more.
    """
    if not calls:
        raise ValueError("first() takes at least one call")
    _check(calls, "first")
    drive = current_drive.get()
    return _first_plainly(calls) if drive is None else JoinCall(drive, calls, "first")


def _check(calls: Iterable[Any], name: str) -> None:
    count = 0
    for each in calls:
        count += 1
        if not hasattr(each, "__await__"):
            raise TypeError(
                f"{name}() takes calls and coroutines, got {each!r}; a def step is given as call(step, …)"
            )
    if count > MAX_BRANCHES:
        raise ValueError(f"{name}() takes at most {MAX_BRANCHES:,} branches, got {count:,}; work in portions")


async def _called_later(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = function(*args, **kwargs)
    return await value if hasattr(value, "__await__") else value


async def _gathered_plainly(calls: tuple[Any, ...], return_errors: bool) -> Any:
    return tuple(await asyncio.gather(*calls, return_exceptions=return_errors))


async def _mapped_plainly(calls: list[Any], limit: int | None) -> list[Any]:
    slots = asyncio.Semaphore(limit or max(1, len(calls)))

    async def within(each: Any) -> Any:
        async with slots:
            return await each

    return list(await asyncio.gather(*(within(each) for each in calls)))


async def _first_plainly(calls: tuple[Any, ...]) -> First:
    tasks = [asyncio.ensure_future(_awaited(each)) for each in calls]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        index, task = next((i, task) for i, task in enumerate(tasks) if task.done())
        return First(index, task.result())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable
