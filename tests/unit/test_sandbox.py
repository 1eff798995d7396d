from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import logging.handlers
import os
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox.errors import Suspended
from tests.unit.drives import Run
from tests.waiting import wait_until_async
from worker.context import current_drive, sleep, wait
from worker.definitions import collecting, step, workflow
from worker.engine import sandbox
from worker.engine.sandbox import Sandbox
from worker.lint import RULES, library
from worker.parallel import first, gather
from worker.replay.decisions import Block, Finish

SANDBOX = Sandbox()

# Bodies of these tests hand coroutines to asyncio, which never gets to run them.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning")


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    with collecting():
        yield
    gc.collect()


@step
async def tick() -> int:
    return 1


def blocked(body: Callable[[], Any]) -> str:
    """Drive a body to its end, expect that it is blocked, and return the message."""
    with collecting():
        outcome = Run(workflow(name="flow")(body), guard=SANDBOX).finish()
    assert isinstance(outcome, Block), outcome
    assert outcome.reason == "not deterministic"
    return str(outcome.error["message"])


async def _fetch() -> None:
    reader, _ = await asyncio.open_connection("127.0.0.1", 9)
    await reader.read()


async def _asyncio_sleep() -> None:
    await asyncio.sleep(1)


async def _asyncio_sleep_zero() -> None:
    await asyncio.sleep(0)


async def _timeout() -> None:
    async with asyncio.timeout(1):
        await tick()


async def _endless_timeout() -> None:
    async with asyncio.timeout(None):
        await tick()


async def _wait_for() -> None:
    await asyncio.wait_for(tick(), 1)


async def _create_task() -> None:
    await asyncio.create_task(_fetch())


async def _gather() -> None:
    await asyncio.gather(_fetch(), _fetch())


async def _task_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_fetch())


async def _to_thread() -> None:
    await asyncio.to_thread(print)


async def _run_in_executor() -> None:
    await asyncio.get_running_loop().run_in_executor(None, print)


async def _loop_time() -> None:
    asyncio.get_event_loop().time()


async def _future() -> None:
    await asyncio.Future()


async def _event() -> None:
    await asyncio.Event().wait()


async def _current_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def _lock() -> None:
    lock = asyncio.Lock()
    async with lock, asyncio.timeout(1):
        await tick()


async def _joined() -> None:
    await gather(asyncio.sleep(1))


async def _joined_deep() -> None:
    await gather(tick(), gather(tick(), asyncio.Event().wait()))


async def _inner() -> None:
    await gather(tick(), asyncio.sleep(1))


async def _joined_below() -> None:
    await gather(tick(), _inner())


async def _first_of() -> None:
    await first(sleep(1), asyncio.sleep(0))


ASYNC_BODIES = {
    _fetch: "_fetch",
    _asyncio_sleep: "asyncio.sleep",
    _asyncio_sleep_zero: "asyncio.sleep(0)",
    _timeout: "asyncio.timeout",
    _endless_timeout: "asyncio.timeout",
    _wait_for: "asyncio.wait_for",
    _create_task: "asyncio.create_task",
    _gather: "asyncio.gather",
    _task_group: "asyncio.TaskGroup",
    _to_thread: "asyncio.to_thread",
    _run_in_executor: "run_in_executor",
    _loop_time: "(time)",
    _future: "the event loop",
    _event: "asyncio.Event",
    _current_task: "asyncio.current_task",
    _lock: "asyncio.timeout",
}


class TestAsyncio:
    @pytest.mark.parametrize("body", ASYNC_BODIES, ids=lambda body: body.__name__.strip("_"))
    @pytest.mark.parametrize("where", ["in a loop", "without a loop"])
    def test_what_needs_the_loop_blocks_and_names_the_line(self, body: Callable[[], Any], where: str):
        async def under_a_loop() -> str:
            return blocked(body)

        message = asyncio.run(under_a_loop()) if where == "in a loop" else blocked(body)
        line = int(message.split(":")[1])
        assert body.__code__.co_firstlineno < line <= body.__code__.co_firstlineno + 4, message
        if body is not _fetch:
            assert ASYNC_BODIES[body] in message

    def test_messages_say_what_to_do_instead(self):
        assert "sleep(…) of Stepwell" in blocked(_asyncio_sleep)
        assert "@step(timeout=…)" in blocked(_timeout)
        assert "use gather(…) of Stepwell" in blocked(_create_task)
        assert "do it in a @step" in blocked(_future)

    @pytest.mark.parametrize("name", sandbox._INSTEAD)
    def test_they_say_what_the_check_of_the_source_says(self, name: str):
        assert library.instead_of(name, RULES["asyncio"]) == sandbox._INSTEAD[name]

    @pytest.mark.parametrize(
        "body", [_joined, _joined_deep, _joined_below, _first_of], ids=lambda b: b.__name__
    )
    def test_a_branch_that_is_none_of_the_users_code_names_the_line_where_it_is_joined(
        self, body: Callable[[], Any]
    ):
        line = (_inner if body is _joined_below else body).__code__.co_firstlineno + 1
        assert blocked(body).startswith(f"{__file__}:{line}: ")

    def test_a_body_that_swallows_the_exception_is_blocked_all_the_same(self):
        async def swallows() -> int:
            try:
                await asyncio.sleep(1)
            except BaseException:
                pass
            return 1

        assert "asyncio.sleep" in blocked(swallows)

    def test_a_body_that_catches_exception_does_not_catch_this(self):
        seen = []

        async def catches() -> None:
            try:
                await asyncio.sleep(1)
            except Exception:
                seen.append("caught")

        blocked(catches)
        assert seen == []

    def test_asyncio_run_in_a_def_body_blocks(self):
        def runs() -> None:
            with contextlib.closing(_fetch()) as coroutine:
                asyncio.run(coroutine)

        assert "asyncio.run" in blocked(runs)

    # The half made loop is dropped, and complains of being half made.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
    def test_a_new_event_loop_in_a_body_blocks(self):
        def makes() -> None:
            asyncio.new_event_loop()

        assert "socket" in blocked(makes)
        gc.collect()

    async def test_the_engines_loop_and_task_are_untouched(self):
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for body in (_timeout, _current_task, _create_task):
            blocked(body)
        assert asyncio.get_running_loop() is loop
        assert asyncio.current_task() is task
        assert not task.cancelling()
        assert asyncio.all_tasks() == {task}
        async with asyncio.timeout(30):
            await asyncio.sleep(0)

    async def test_the_loop_is_back_while_the_body_is_suspended_and_after_it_has_failed(self):
        async def body() -> None:
            await tick()
            raise ValueError

        loop = asyncio.get_running_loop()
        with collecting():
            replay = Run(workflow(body), guard=SANDBOX).replay()
        replay.start()
        assert asyncio.get_running_loop() is loop
        replay.close()
        assert asyncio.get_running_loop() is loop

    def test_a_body_may_drive_a_body(self):
        @workflow
        async def inner() -> int:
            return await tick()

        @workflow
        def outer() -> str:
            return str(Run(inner, guard=SANDBOX).finish())

        assert Run(outer, guard=SANDBOX).finish() == Finish("\"Finish(value='1')\"")
        assert asyncio.events._get_running_loop() is None


class TestAsyncGenerators:
    async def test_generators_of_a_body_are_not_the_loops(self):
        closed = []

        async def numbers() -> AsyncIterator[int]:
            try:
                while True:
                    yield await tick()
            finally:
                try:
                    await sleep(1)  # an effect of a generator that is dropped: refused
                except Suspended:
                    closed.append(True)
                    raise

        async def body() -> int:
            generator = numbers()
            async for number in generator:
                del generator
                return number
            return 0

        with collecting():
            assert Run(workflow(body), guard=SANDBOX).finish() == Finish("1")
        gc.collect()
        assert closed == [True]

    async def test_all_others_are_the_loops_as_before(self):
        ended = []

        async def numbers(which: str) -> AsyncIterator[int]:
            try:
                yield 1
                yield 2
            finally:
                await asyncio.sleep(0)
                ended.append(which)

        before = sys.get_asyncgen_hooks()
        early = numbers("early")
        await anext(early)
        with collecting():
            Run(workflow(_returns), guard=SANDBOX).finish()
        late = numbers("late")
        await anext(late)
        del early, late
        gc.collect()
        assert ended == []  # the loop closes them, in a task
        await wait_until_async(lambda: sorted(ended) == ["early", "late"])
        hooks = sys.get_asyncgen_hooks()
        with collecting():
            for _ in range(3):
                Run(workflow(_returns), guard=SANDBOX).finish()
        assert sys.get_asyncgen_hooks() == hooks != before

    def test_without_a_loop_they_are_closed_where_they_are_dropped(self):
        ended = []

        async def numbers() -> AsyncIterator[int]:
            try:
                yield 1
            finally:
                ended.append(True)

        with collecting():
            Run(workflow(_returns), guard=SANDBOX).finish()
        generator = numbers()
        with pytest.raises(StopIteration, match="1"):
            anext(generator).send(None)
        del generator
        gc.collect()
        assert ended == [True]


async def _returns() -> int:
    return 1


def _connect() -> None:
    with contextlib.closing(socket.create_connection(("127.0.0.1", 9), timeout=1)):
        pass


def _resolve() -> None:
    socket.getaddrinfo("localhost", 80)


def _run_a_process() -> None:
    subprocess.run([sys.executable, "-c", ""], check=False)


def _system() -> None:
    os.system("true")


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _time_sleep() -> None:
    time.sleep(0.001)


def _thread() -> None:
    threading.Thread(target=print).start()


SYNC_BODIES = {
    _connect: "socket.",
    _resolve: "socket.getaddrinfo",
    _run_a_process: "subprocess.Popen",
    _system: "os.system",
    _fork: "os.fork",
    _time_sleep: "time.sleep",
    _thread: "_thread.start_new_thread",
}


class TestAudit:
    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(
                body,
                id=body.__name__.strip("_"),
                marks=pytest.mark.skipif(
                    body is _thread and sys.version_info < (3, 12),
                    reason="Python 3.11 does not audit threads",
                ),
            )
            for body in SYNC_BODIES
        ],
    )
    def test_network_processes_threads_and_sleeping_block_and_name_the_line(self, body: Callable[[], Any]):
        message = blocked(body)
        assert SYNC_BODIES[body] in message
        assert int(message.split(":")[1]) == body.__code__.co_firstlineno + 1

    def test_a_body_that_catches_exception_does_not_catch_this(self):
        def catches() -> None:
            with contextlib.suppress(Exception):
                _connect()

        assert "socket." in blocked(catches)

    def test_steps_and_everybody_else_may_do_all_of_it(self):
        @step
        def connects() -> str:
            try:
                _connect()
            except OSError:
                _time_sleep()
                _run_a_process()
                return "refused by the peer"
            return "connected"

        @workflow
        def flow() -> str:
            wait(sleep(1))
            return connects()

        assert Run(flow, guard=SANDBOX).finish() == Finish('"refused by the peer"')

    def test_another_thread_may_do_all_of_it_while_a_body_is_driven(self):
        gates = [threading.Event(), threading.Event()]
        failures: list[BaseException] = []

        def other() -> None:
            gates[0].wait(10)
            try:
                _time_sleep()
                socket.getaddrinfo("127.0.0.1", 80)
            except BaseException as error:
                failures.append(error)
            gates[1].set()

        @workflow
        def flow() -> None:
            gates[0].set()
            assert gates[1].wait(10)

        thread = threading.Thread(target=other)
        thread.start()
        assert Run(flow, guard=SANDBOX).finish() == Finish("null")
        thread.join()
        assert failures == []

    def test_a_module_that_a_body_imports_may_do_what_modules_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "probes_the_network.py").write_text("import socket\nsocket.socket().close()\n")
        monkeypatch.syspath_prepend(str(tmp_path))

        @workflow
        def flow() -> str:
            import probes_the_network

            assert isinstance(probes_the_network, types.ModuleType)
            return "imported"

        assert Run(flow, guard=SANDBOX).finish() == Finish('"imported"')

    def test_a_body_may_log_to_the_network(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            handler = logging.handlers.DatagramHandler(*server.getsockname())
            logger = logging.getLogger("a body that logs")
            logger.addHandler(handler)

            @workflow
            def flow() -> str:
                logger.warning("hello")
                return "logged"

            try:
                assert Run(flow, guard=SANDBOX).finish() == Finish('"logged"')
            finally:
                logger.removeHandler(handler)
                handler.close()

    def test_nothing_of_a_drive_is_left_behind(self):
        assert current_drive.get() is None
        _time_sleep()
