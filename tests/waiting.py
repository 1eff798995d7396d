"""Wait for a condition instead of for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

EVERY_SECONDS = 0.02


def wait_until(
    condition: Callable[[], T], timeout: float = 60.0, *, what: str = "", every: float = EVERY_SECONDS
) -> T:
    """Return the first truthy answer of `condition`; fail the test when `timeout` seconds bring none.

    It is asked again `every` so many seconds: more seldom where asking costs something.
    """
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(_complaint(condition, timeout, what, answer))
        time.sleep(every)
    return answer


async def wait_until_async(
    condition: Callable[[], Awaitable[T] | T], timeout: float = 60.0, *, what: str = ""
) -> T:
    """Return the first truthy answer of `condition`, a plain or an async function."""
    deadline = time.monotonic() + timeout
    while True:
        said = condition()
        answer: T = await said if inspect.isawaitable(said) else said
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise AssertionError(_complaint(condition, timeout, what, answer))
        await asyncio.sleep(EVERY_SECONDS)


def _complaint(condition: object, timeout: float, what: str, answer: object) -> str:
    wanted = what or getattr(condition, "__qualname__", repr(condition))
    return f"still waiting after {timeout:g} s for: {wanted} (last answer: {answer!r})"
