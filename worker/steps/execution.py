"""One execution of a step: decode its arguments, run it, and say how it ended.

An async step runs in the engine's loop, within the task of its run; a def step in a thread. `Executor` bounds
the threads. A timed-out def step cannot be stopped: it is abandoned in its thread, whatever it still returns is
dropped, and the process does not try that call again while the thread lives (`is_abandoned`).

Everything that user code raises ends here, except a cancellation that the engine asked for: that is `CutShort`.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar
from uuid import UUID

import msgspec

from worker.context import StepInfo, executing
from worker.definitions import NOT_DONE, Step
from worker.replay.records import Path, RunFacts
from worker.steps.forks import ForksEnd

T = TypeVar("T")

SPARE_THREADS = 1024
"""Room for abandoned threads above the bound; a thread is only made when none is idle."""


class Answered(msgspec.Struct, frozen=True, gc=False):
    """The step returned; its value as JSON text."""

    value: str


class Returned(msgspec.Struct, frozen=True, gc=False):
    """User code returned a value, not encoded yet."""

    value: Any


class Raised(msgspec.Struct, frozen=True):
    """The step raised. `final`: trying again cannot help, for the effect has happened."""

    error: BaseException
    final: bool = False


class TimedOut(msgspec.Struct, frozen=True, gc=False):
    """The step did not answer in time."""


class CutShort(msgspec.Struct, frozen=True, gc=False):
    """The engine ended the execution before it answered."""


class NotDone(msgspec.Struct, frozen=True, gc=False):
    """A verification found that the effect has not happened."""


Outcome = Answered | Raised | TimedOut | CutShort


class Call(msgspec.Struct, frozen=True, gc=False):
    """A step with what it is called with."""

    step: Step[Any, Any]
    arguments: str
    facts: RunFacts
    info: StepInfo
    max_bytes: int

    def bound(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return freshly decoded (args, kwargs): what the step changes in them, nobody else sees."""
        return self.step.signature.decode_arguments(self.arguments, where=self.step.arguments_where)

    def encoded(self, value: Any) -> str:
        """Return the result as JSON text. Raises PayloadError."""
        return self.step.signature.encode_result(
            value, where=self.step.result_where, max_bytes=self.max_bytes
        )


class Executor:
    """Runs steps for one engine; at most `threads` def steps at a time."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads + SPARE_THREADS, thread_name_prefix="stepwell-step")
        self.threads = asyncio.Semaphore(threads)
        """A slot for each def step that executes; the caller takes one before it executes such a step."""
        self._abandoned: set[tuple[UUID, Path]] = set()

    def close(self) -> None:
        """Let idle threads end. Does not wait for abandoned ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def is_abandoned(self, run_id: UUID, path: Path) -> bool:
        """Tell whether a thread of this process still executes an earlier, abandoned execution."""
        return bool(self._abandoned) and (run_id, path) in self._abandoned

    async def execute(self, call: Call, timeout: float | None) -> Outcome:
        """Execute a step that is not transactional."""
        answer = await self._answer(call, call.step.function, call.step.is_async, timeout)
        return _encoded(call, answer.value) if isinstance(answer, Returned) else answer

    async def execute_unless_done(self, call: Call, timeout: float | None) -> Outcome:
        """Ask the step's `verify` first; execute it only if nothing has taken effect."""
        verified = await self.verify(call, timeout)
        return await self.execute(call, timeout) if isinstance(verified, NotDone) else verified

    async def verify(self, call: Call, timeout: float | None) -> Outcome | NotDone:
        """Ask the step's `verify` whether an earlier execution took effect, and with which result."""
        function = call.step.verify
        assert function is not None
        is_async = inspect.iscoroutinefunction(function)
        async with nullcontext() if is_async or not call.step.is_async else self.threads:
            answer = await self._answer(call, function, is_async, timeout)
        if not isinstance(answer, Returned):
            return answer
        return NotDone() if answer.value is NOT_DONE else _encoded(call, answer.value)

    async def in_thread(
        self, call: Call, function: Callable[[], Any], timeout: float | None, committing: Callable[[], bool]
    ) -> Returned | Raised | TimedOut | CutShort:
        """Run `function` in a thread; return Returned, Raised, TimedOut or CutShort.

        Once `committing` answers true, the time-out and a cut no longer count: the outcome is on its way to the
        database and only the database can tell it.
        """
        context = contextvars.copy_context()
        future = asyncio.get_running_loop().run_in_executor(
            self._pool, lambda: context.run(_caught, call, function)
        )
        ending: TimedOut | CutShort = TimedOut()
        try:
            await asyncio.wait({future}, timeout=timeout)
        except asyncio.CancelledError:
            uncancel()
            ending = CutShort()
        if not future.done() and committing():
            await uninterrupted(_settled(future))
        if future.done():
            return future.result()
        key = (call.info.run_id, call.info.path)
        self._abandoned.add(key)
        future.add_done_callback(lambda _: self._abandoned.discard(key))
        return ending

    async def _answer(
        self, call: Call, function: Callable[..., Any], is_async: bool, timeout: float | None
    ) -> Returned | Raised | TimedOut | CutShort:
        try:
            args, kwargs = call.bound()
        except BaseException as error:  # noqa: BLE001 - the classes of the arguments are user code
            return Raised(error, final=True)
        if not is_async:
            return await self.in_thread(call, lambda: function(*args, **kwargs), timeout, _never)
        with executing(call.facts, call.info):
            return await awaited(function(*args, **kwargs), timeout)


async def awaited(
    coroutine: Coroutine[Any, Any, Any], timeout: float | None
) -> Returned | Raised | TimedOut | CutShort:
    """Await user code; return Returned, Raised, TimedOut or CutShort."""
    limit = None
    try:
        with ForksEnd():
            if timeout is None:
                return Returned(await coroutine)
            async with asyncio.timeout(timeout) as limit:
                return Returned(await coroutine)
    except asyncio.CancelledError as error:
        return CutShort() if uncancel() else Raised(error)
    except TimeoutError as error:
        return TimedOut() if limit is not None and limit.expired() else Raised(error)
    except BaseException as error:  # noqa: BLE001 - user code: SystemExit must not end the worker
        return Raised(error)


async def uninterrupted(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await to the end what only the database can decide, whoever wants to cancel meanwhile."""
    task = asyncio.ensure_future(coroutine)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.done():
                break
            uncancel()
    return task.result()


def _caught(call: Call, function: Callable[[], Any]) -> Returned | Raised:
    with executing(call.facts, call.info):
        try:
            with ForksEnd():
                return Returned(function())
        except BaseException as error:  # noqa: BLE001 - user code, see above
            return Raised(error)


def _encoded(call: Call, value: Any) -> Outcome:
    try:
        return Answered(call.encoded(value))
    except BaseException as error:  # noqa: BLE001 - a PayloadError, or what the class of the value has raised
        return Raised(error, final=True)


def uncancel() -> bool:
    """Take back a cancellation that was asked of this task; tell whether there was one."""
    task = asyncio.current_task()
    asked = False
    while task is not None and task.cancelling():
        task.uncancel()
        asked = True
    return asked


async def _settled(future: asyncio.Future[Any]) -> None:
    await asyncio.wait({future})


def _never() -> bool:
    return False
