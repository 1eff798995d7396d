"""Find the line of a body that something happened at, for messages. Only called when something is wrong."""

from __future__ import annotations

import inspect
import os
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

_OURS = f"{Path(__file__).parents[1]}{os.sep}"
_DEMO = f"{_OURS}demo{os.sep}"
_LIBRARIES = tuple(
    {f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def calling_line(trace: TracebackType | None = None, beyond: Iterable[FrameType] = ()) -> str:
    """Return `file:line` of the user's code that runs now, or that `trace` went through.

    Where that is none of the user's, it is that of what stands suspended in one of the frames `beyond`.
    """
    if trace is None:
        outward = chain(_outward(inspect.currentframe()), *map(_outward, beyond))
        return _line_of((frame, frame.f_lineno) for frame in outward)
    return _line_of(reversed([(each.tb_frame, each.tb_lineno) for each in _inward(trace)]))


def suspended_line(frame: FrameType | None) -> str:
    """Return `file:line` of the user's code at which something stands that is suspended in `frame`."""
    return _line_of((each, each.f_lineno) for each in _outward(frame))


def awaiting_line(awaitable: Any, beyond: Iterable[FrameType] = ()) -> str:
    """Return `file:line` of the await at which a suspended coroutine stands; `beyond` is as for `calling_line`."""
    frames = list(_awaited(awaitable))
    if not frames:
        return calling_line(beyond=beyond)
    outward = chain(reversed(frames), *map(_outward, beyond))
    return _line_of((frame, frame.f_lineno) for frame in outward)


def library_call(package: str) -> str | None:
    """Return the function of a library that runs now as its caller knows it: ``asyncio.sleep``."""
    called = None
    for frame in _outward(inspect.currentframe()):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] == package:
            called = frame.f_code.co_qualname.partition(".")[0]
        elif called is not None:
            break
    return f"{package}.{called.lower()}" if called else None


def passes_through(files: tuple[str, ...]) -> bool:
    """Tell whether the code that runs now was called through a file whose path contains one of `files`."""
    return any(
        part in frame.f_code.co_filename for frame in _outward(inspect.currentframe()) for part in files
    )


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _inward(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _awaited(coroutine: Any) -> Iterator[FrameType]:
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)  # a generator's frame is the inside of an awaitable
        if frame is not None:
            yield frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def _line_of(innermost_first: Iterable[tuple[FrameType, int]]) -> str:
    """Return the innermost line of the user's own code, or the outermost one of anybody but us."""
    outermost = "an unknown place"
    for frame, line in innermost_first:
        file = frame.f_code.co_filename
        if file.startswith("<frozen ") or (file.startswith(_OURS) and not file.startswith(_DEMO)):
            continue
        outermost = f"{file}:{line}"
        if not file.startswith(_LIBRARIES):
            return outermost
    return outermost
