"""What is switched off while a body is driven.

A body is replayed, so whatever it does besides calling steps would be done again and might come out otherwise.
Around every switch into a body, on the thread that drives it:

- the running event loop and the current task are replaced by stand-ins whose every use raises NotDeterministic.
  So `asyncio.sleep`, `timeout`, `create_task`, `gather`, `run_in_executor`, real I/O, and whatever else asks for
  the loop, are caught at the call, and can neither schedule on the engine's loop nor cancel the engine's task;
- async generators get hooks of their own, so that the engine's loop never closes the generators of a body;
- an audit hook refuses network connections, processes, threads (where Python tells: not in 3.11) and
  `time.sleep`. It is installed once for the process and looks at nothing unless a body is being driven on the
  thread that asks.

What it cannot see: a C library that opens its own sockets, files, clocks, global state. `stepwell check` looks
for those. A module that a body imports for the first time may do what modules do when they are imported.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from asyncio.events import _get_running_loop, _set_running_loop
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from threading import get_ident
from typing import Any, NoReturn, cast

from outbox.errors import NotDeterministic, Suspended
from worker.context import Drive, current_drive
from worker.replay.frames import calling_line, library_call, passes_through

_FORBIDDEN = frozenset(
    {
        "_thread.start_new_thread",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "pty.spawn",
        "socket.__new__",
        "socket.bind",
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.getnameinfo",
        "socket.sendmsg",
        "socket.sendto",
        "subprocess.Popen",
        "time.sleep",
    }
)

_HARMLESS = ("<frozen importlib", "logging/__init__.py")
"""Where a body may get to the network or a thread without any effect on its outcome: imports and log handlers."""

_JOIN = "use gather(…) of Stepwell"
_FIRST = "use gather(…) or first(…) of Stepwell"
_TIMEOUT = "give the step a timeout: @step(timeout=…)"
_ALONE = "leave it out, nothing else touches what a body holds; what steps share is guarded in the @step"

# What `stepwell check` says as well (worker.lint.library, which takes long to import): a test compares them.
_INSTEAD = {
    "asyncio.Barrier": _ALONE,
    "asyncio.Condition": _ALONE,
    "asyncio.Event": _ALONE,
    "asyncio.Lock": _ALONE,
    "asyncio.Queue": _ALONE,
    "asyncio.Semaphore": _ALONE,
    "asyncio.TaskGroup": _JOIN,
    "asyncio.as_completed": _FIRST,
    "asyncio.create_task": _JOIN,
    "asyncio.ensure_future": _JOIN,
    "asyncio.gather": _JOIN,
    "asyncio.run": "await it in an async body, in a def body wait(…) of Stepwell",
    "asyncio.sleep": "await sleep(…) of Stepwell, which is durable",
    "asyncio.timeout": _TIMEOUT,
    "asyncio.timeout_at": _TIMEOUT,
    "asyncio.to_thread": "make it a def @step, which has a thread",
    "asyncio.wait": _FIRST,
    "asyncio.wait_for": _TIMEOUT,
    "time.sleep": "await sleep(…) of Stepwell, which is durable, in a def body wait(sleep(…))",
}
_SPELLED = {name.lower(): name for name in _INSTEAD}
_OTHERWISE = "do it in a @step, whose result is recorded"

_driving: set[int] = set()
"""The threads that drive a body at this moment: all that the audit hook looks at in most cases."""


class _StandIn:
    """Stands where a body would find the loop or the task. Every use of it raises."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        object.__setattr__(self, "_what", what)

    def __getattribute__(self, name: str) -> Any:
        _refuse_loop(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        _refuse_loop(self, name)

    def __hash__(self) -> int:  # noqa: PLE0309 - it never returns
        _refuse_loop(self, "__hash__")

    def __eq__(self, other: object) -> bool:
        _refuse_loop(self, "__eq__")

    def __bool__(self) -> bool:  # noqa: PLE0304 - it never returns
        _refuse_loop(self, "__bool__")

    def __repr__(self) -> str:
        return "<nothing: the body of a workflow has no event loop>"


class _Refusing:
    """The drive of what is closed outside of its body: no call is performed."""

    def __getattr__(self, name: str) -> Any:
        raise Suspended("a generator that a body has dropped is being closed")


_LOOP = cast("asyncio.AbstractEventLoop", _StandIn("the event loop"))
_TASK = cast("asyncio.Task[Any]", _StandIn("the current task"))
_REFUSING = cast("Drive", _Refusing())


class Sandbox:
    """The guard of drives: `Replay(…, guard=sandbox)`. Entering and leaving allocate nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        _install_audit_hook()

    def enter(self) -> asyncio.AbstractEventLoop | None:
        """Switch off; the result is for `leave`."""
        loop = _get_running_loop()
        if loop is _LOOP:  # a body that drives a body, as a test may: all is off already
            return loop
        thread = get_ident()
        hooks = sys.get_asyncgen_hooks()
        if hooks[1] is not _finalizers.get(thread):
            _tell_generators_apart(thread, *hooks)
        _set_running_loop(_LOOP)
        _hide_task()
        _driving.add(thread)
        return loop

    def leave(self, before: asyncio.AbstractEventLoop | None) -> None:
        """Switch on what was on."""
        if before is _LOOP:
            return
        _driving.discard(get_ident())
        _show_task()
        _set_running_loop(before)

    def explain(self, error: Exception) -> str | None:
        """Say what the body did if asyncio itself has complained, as `asyncio.run` does, before it used the loop."""
        last, trace = None, error.__traceback__
        while trace is not None:
            last, trace = trace, trace.tb_next
        module = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
        if not isinstance(error, RuntimeError) or module.partition(".")[0] != "asyncio":
            return None
        instead = _INSTEAD["asyncio.run"] if "asyncio.run" in str(error) else _OTHERWISE
        return _message(calling_line(error.__traceback__), f"asyncio ({error})", instead)


if sys.version_info >= (3, 14):
    from asyncio.tasks import _swap_current_task

    # From 3.14 on the current task is kept beside the loop, not looked up by it, so it is swapped as well.
    _hidden: dict[int, Any] = {}

    def _hide_task() -> None:
        _hidden[get_ident()] = _swap_current_task(_LOOP, _TASK)

    def _show_task() -> None:
        _swap_current_task(_LOOP, _hidden.pop(get_ident(), None))

else:
    # The current task is looked up by the loop, whose stand-in cannot be hashed.
    def _hide_task() -> None: ...

    def _show_task() -> None: ...


def _refuse_loop(used: _StandIn, name: str) -> NoReturn:
    what = library_call("asyncio")
    _refuse(_SPELLED.get(what or "", what) or f"{object.__getattribute__(used, '_what')} ({name})")


def _refuse(what: str) -> NoReturn:
    drive = current_drive.get()
    line = calling_line() if drive is None else drive.line()
    violation = NotDeterministic(_message(line, what, _INSTEAD.get(what, _OTHERWISE)))
    if drive is not None:
        drive.report(violation)
    raise violation


def _message(line: str, what: str, instead: str) -> str:
    return f"{line}: the body of a workflow uses {what}, which a replay could not repeat; {instead}"


_finalizers: dict[int, Callable[..., Any]] = {}
"""The hook of `_tell_generators_apart` by thread."""


def _tell_generators_apart(thread: int, firstiter: Any, finalizer: Any) -> None:
    """Install hooks by which the engine's loop sees all async generators of this thread but those of bodies.

    They stay, until somebody installs others: to exchange them around each drive costs more than all the rest of it, for
    Python tells its audit hooks of each exchange. A generator is asked after its id: whatever is dropped by `dropped` has
    come through `iterated` first, so an id stands for the last that came.
    """
    of_bodies: set[int] = set()

    def iterated(generator: AsyncGenerator[Any, Any]) -> None:
        if get_ident() in _driving:
            of_bodies.add(id(generator))
            return
        of_bodies.discard(id(generator))
        if firstiter is not None:
            firstiter(generator)

    def dropped(generator: AsyncGenerator[Any, Any]) -> None:
        if id(generator) in of_bodies:
            of_bodies.discard(id(generator))
            _close_dropped(generator)
        elif finalizer is not None:
            finalizer(generator)
        else:
            with suppress(StopIteration):
                generator.aclose().send(None)

    _finalizers[thread] = dropped
    sys.set_asyncgen_hooks(iterated, dropped)


def _close_dropped(generator: AsyncGenerator[Any, Any]) -> None:
    """Close an async generator that nobody refers to any more, in whatever body happens to run."""
    token = current_drive.set(_REFUSING)
    try:
        generator.aclose().send(None)
    except (Exception, Suspended):  # noqa: BLE001, S110 - user code, and nobody is left to be told
        pass
    finally:
        current_drive.reset(token)


_hooked: list[bool] = []


def _install_audit_hook() -> None:
    """Install the hook, once for the process: it cannot be taken out again."""
    if _hooked:
        return
    _hooked.append(True)
    sys.addaudithook(_audit)
    if sys.version_info < (3, 13):
        time.sleep = _audited_sleep(time.sleep)


def _audited_sleep(plain: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return `time.sleep` with the audit event that Python raises from 3.13 on."""

    @functools.wraps(plain)
    def sleep(seconds: Any, /) -> None:
        _audit("time.sleep", (seconds,))
        plain(seconds)

    return sleep


def _audit(event: str, _args: tuple[Any, ...]) -> None:
    if not _driving or event not in _FORBIDDEN or get_ident() not in _driving:
        return
    if not passes_through(_HARMLESS):
        _refuse(event)
