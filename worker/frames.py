"""Find the line of a body that something happened at, for messages. Only called when something is wrong."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

_OURS = os.path.dirname(__file__) + os.sep
_DEMO = os.path.join(_OURS, "demo") + os.sep
_LIBRARIES = tuple(
    {os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def calling_line() -> str:
    """Return `file:line` of the code that called Stepwell, or a library that did."""
    return _line_of(_outward(sys._getframe(1)))


def awaiting_line(coroutine: Any) -> str:
    """Return `file:line` of the await at which a suspended coroutine stands."""
    return _line_of(reversed(list(_awaited(coroutine))))


def importing() -> bool:
    """Tell whether the code that runs is a module that is being imported."""
    return any(frame.f_code.co_filename.startswith("<frozen importlib") for frame in _outward(sys._getframe(1)))


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _awaited(coroutine: Any) -> Iterator[FrameType]:
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            yield frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def _line_of(innermost_first: Iterable[FrameType]) -> str:
    """Return the innermost line of the user's own code, or the outermost one of anybody but us."""
    outermost = "an unknown place"
    for frame in innermost_first:
        file = frame.f_code.co_filename
        if file.startswith("<frozen ") or (file.startswith(_OURS) and not file.startswith(_DEMO)):
            continue
        outermost = f"{file}:{frame.f_lineno}"
        if not file.startswith(_LIBRARIES):
            return outermost
    return outermost
