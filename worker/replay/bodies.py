"""Greenlets that bodies run in, used again and again: making one costs ten times a run's switches.

A greenlet is parked in the pool between two bodies. The pool belongs to one thread, like the greenlets in it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any

from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]  # ships no types

Main = Callable[[], Any]

_MAX_IDLE = 256


class _Pool(threading.local):
    """What one thread keeps."""

    def __init__(self) -> None:
        self.idle: list[greenlet] = []


_pool = _Pool()


def begin(main: Main, context: Context | None = None) -> tuple[greenlet, Any]:
    """Run `main` in a greenlet with a context of its own, until it switches away or returns."""
    idle = _pool.idle
    body = idle.pop() if idle else _parked()
    body.gr_context = Context() if context is None else context
    return body, resume(body, main)


def resume(body: greenlet, value: Any) -> Any:
    """Switch into `body` and return what comes back: what it switches with, or what its main returned."""
    here = getcurrent()
    if body.parent is not here:
        body.parent = here
    return body.switch(value)


def leave(value: Any) -> Any:
    """Switch away from the body that runs now, to whoever resumed it; return what it is resumed with."""
    driver: Any = getcurrent().parent  # every body has one
    return driver.switch(value)


def throw(body: greenlet, error: BaseException) -> Any:
    """Raise `error` in `body` where it switched away, and return what comes back."""
    here = getcurrent()
    if body.parent is not here:
        body.parent = here
    return body.throw(error)


def give_back(body: greenlet) -> None:
    """Take a greenlet whose main has returned, for the next body."""
    if len(_pool.idle) < _MAX_IDLE:
        body.gr_context = None
        _pool.idle.append(body)


def abandon(body: object) -> None:
    """Keep a greenlet or coroutine that refuses to end, for as long as the process lives.

    Python throws into it when its last reference goes, be it at the end of the process, and then it would run on,
    maybe for ever. So it gets one reference more than anybody will ever drop.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(body))


def _parked() -> greenlet:
    body = greenlet(_serve)
    body.switch()
    return body


def _serve() -> None:
    """Run one main after the other, each handed over by `begin`."""
    answer: Any = None
    while True:
        main = leave(answer)
        answer = main()
        del main
