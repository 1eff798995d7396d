"""Bodies that hold on, swallow, wander off, or await what is not theirs."""

from __future__ import annotations

import contextvars
import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import greenlet
import pytest

from outbox.errors import HistoryMismatch, NotDeterministic, Suspended
from tests.unit.drives import FACTS, Run, execute, record
from worker.context import current_drive, sleep, wait
from worker.definitions import collecting, step, workflow
from worker.replay import bodies
from worker.replay.decisions import Block, DoStep, Finish, Sleep
from worker.replay.driver import Replay


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    with collecting():
        yield


@step
async def beat(a: int = 1) -> int:
    return a


class TestClose:
    @pytest.mark.parametrize("is_async", [True, False])
    def test_a_discarded_body_is_unwound_by_suspended(self, is_async: bool):
        seen: list[Any] = []

        @workflow
        async def flow() -> None:
            try:
                await sleep(1)
            except BaseException as error:
                seen.append(type(error))
                raise
            finally:
                seen.append("finally")

        @workflow
        def plain() -> None:
            try:
                wait(sleep(1))
            except BaseException as error:
                seen.append(type(error))
                raise
            finally:
                seen.append("finally")

        Run(flow if is_async else plain).start()
        assert seen == [Suspended, "finally"]

    def test_close_is_safe_twice_before_start_and_after_the_end(self):
        @workflow
        async def flow() -> None: ...

        replay = Replay(flow, "{}", FACTS)
        replay.close()
        assert replay.start() == Finish("null")
        replay.close()
        replay.close()

    def test_a_call_in_a_finally_block_is_refused_with_suspended_again(self):
        seen = []

        @workflow
        async def flow() -> None:
            try:
                await sleep(1)
            finally:
                try:
                    await beat()
                except Suspended:
                    seen.append("refused")
                    raise

        Run(flow).start()
        assert seen == ["refused"]

    def test_a_body_that_returns_or_raises_when_it_is_discarded_does_no_harm(self):
        @workflow
        async def returns() -> int:
            try:
                await sleep(1)
            except BaseException:
                return 1
            return 2

        @workflow
        async def raises() -> None:
            try:
                await sleep(1)
            except BaseException:
                raise ValueError from None

        assert isinstance(Run(returns).start(), Sleep)
        assert isinstance(Run(raises).start(), Sleep)
        assert Run(returns).finish() == Finish("2")

    def test_a_body_that_never_lets_go_is_abandoned_with_a_warning(self, caplog: pytest.LogCaptureFixture):
        @workflow
        async def clings() -> None:
            while True:
                try:
                    await beat()
                except BaseException:
                    pass

        with caplog.at_level(logging.WARNING):
            assert isinstance(Run(clings).start(), DoStep)
        assert "was abandoned" in caplog.text

    def test_the_exception_that_discards_is_not_an_exception_that_bodies_catch(self):
        @workflow
        async def flow() -> str:
            try:
                await beat()
            except Exception:
                return "swallowed"
            return "went on"

        assert Run(flow).finish() == Finish('"went on"')


class TestSwallowing:
    def test_a_body_that_swallows_a_mismatch_is_blocked_all_the_same(self):
        @workflow
        async def flow() -> int:
            try:
                await beat()
            except BaseException:
                pass
            return 7

        run = Run(flow)
        run.history = [record(1)]
        outcome = run.start()
        assert isinstance(outcome, Block)
        assert outcome.reason == "history mismatch"

    def test_the_body_sees_the_mismatch_as_it_is(self):
        seen = []

        @workflow
        async def flow() -> None:
            try:
                await beat()
            except BaseException as error:
                seen.append(error)
                raise

        run = Run(flow)
        run.history = [record(1)]
        run.start()
        assert [type(error) for error in seen] == [HistoryMismatch]

    def test_a_body_that_swallows_and_calls_on_gets_no_further(self):
        seen = []

        @workflow
        async def flow() -> None:
            for _ in range(3):
                try:
                    await beat()
                except BaseException:
                    seen.append("swallowed")
            seen.append("end")

        run = Run(flow)
        run.history = [record(1)]
        assert isinstance(run.start(), Block)
        assert seen == ["swallowed"] * 3 + ["end"]

    def test_a_mismatch_that_a_body_swallows_for_ever_blocks_and_abandons_it(self):
        @workflow
        async def clings() -> None:
            while True:
                try:
                    await beat()
                except BaseException:
                    pass

        run = Run(clings)
        run.history = [record(1)]
        assert isinstance(run.start(), Block)


class _Bare:
    """Awaitable, and not ours."""

    def __await__(self) -> Any:
        yield "something"


class TestForeignAwaits:
    @pytest.mark.parametrize("swallow", [False, True])
    def test_a_foreign_awaitable_blocks_and_names_the_line(self, swallow: bool):
        @workflow
        async def flow() -> None:
            try:
                await _Bare()
            except NotDeterministic:
                if not swallow:
                    raise

        outcome = Run(flow).finish()
        assert isinstance(outcome, Block)
        assert outcome.reason == "not deterministic"
        assert f"{__file__}:{_line_of('await _Bare()')}" in outcome.error["message"]
        assert "builtins.str" in outcome.error["message"]

    def test_a_foreign_await_in_a_function_of_the_body_is_named_there(self):
        async def fetch() -> None:
            await _Bare()  # fetched here

        @workflow
        async def flow() -> None:
            await fetch()

        outcome = Run(flow).finish()
        assert isinstance(outcome, Block)
        assert f":{_line_of('# fetched here')}:" in outcome.error["message"]

    def test_a_body_that_awaits_foreign_things_for_ever_blocks(self):
        @workflow
        async def flow() -> None:
            while True:
                try:
                    await _Bare()
                except BaseException:
                    pass

        assert isinstance(Run(flow).finish(), Block)

    def test_wait_refuses_what_is_not_ours(self):
        @workflow
        def flow() -> None:
            wait(_Bare())

        outcome = Run(flow).finish()
        assert isinstance(outcome, Block)
        assert "test_replay_bodies.py:" in outcome.error["message"]

    def test_a_call_from_another_greenlet_blocks(self):
        @step
        def effect() -> None:
            raise AssertionError

        @workflow
        def flow() -> None:
            inner = greenlet.greenlet(effect)
            inner.gr_context = contextvars.copy_context()
            try:
                inner.switch()
            except NotDeterministic:
                pass

        outcome = Run(flow).finish()
        assert isinstance(outcome, Block)
        assert "another thread or greenlet" in outcome.error["message"]

    def test_a_call_from_another_thread_with_the_bodys_context_blocks(self):
        @step
        def effect() -> None:
            raise AssertionError("executed although no record of it exists")

        @workflow
        def flow() -> None:
            context = contextvars.copy_context()
            seen: list[BaseException] = []

            def elsewhere() -> None:
                try:
                    context.run(effect)
                except BaseException as error:
                    seen.append(error)

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert isinstance(seen[0], NotDeterministic)

        outcome = Run(flow).finish()
        assert isinstance(outcome, Block)
        assert "another thread" in outcome.error["message"]


def test_a_process_ends_with_abandoned_bodies_in_it():
    program = """
from tests.unit.drives import Run
from worker.definitions import step, workflow

@step
async def beat() -> None: ...

@workflow
async def clings() -> None:
    while True:
        try:
            await beat()
        except BaseException:
            pass

Run(clings).start()
Run(clings).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=30, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


class TestContexts:
    def test_interleaved_runs_keep_their_context_variables_apart(self):
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

        @workflow
        async def flow(name: str) -> list[str]:
            seen = [variable.get()]
            variable.set(name)
            await beat()
            seen.append(variable.get())
            await beat()
            return [*seen, variable.get()]

        runs = [Run(flow, name=name) for name in "abc"]
        replays = [run.replay() for run in runs]
        outcomes = [replay.start() for replay in replays]
        for seq in (1, 2):
            outcomes = [
                replay.deliver(execute(outcome, seq))
                for replay, outcome in zip(replays, outcomes, strict=True)
            ]
        assert outcomes == [Finish(f'["unset","{name}","{name}"]') for name in "abc"]
        assert variable.get() == "unset"
        assert current_drive.get() is None

    def test_a_body_finds_no_context_of_its_driver(self):
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
        variable.set("the driver's")

        @workflow
        def flow() -> str:
            return variable.get()

        assert Run(flow).finish() == Finish('"unset"')

    @pytest.mark.parametrize("finish", [True, False])
    def test_a_drive_leaves_nothing_to_the_garbage_collector(self, finish: bool):
        @workflow
        async def flow() -> int:
            return await beat() + await beat()

        def drive() -> None:
            run = Run(flow)
            run.finish() if finish else run.start()

        def garbage() -> int:
            gc.collect()
            drive()
            return gc.collect()

        drive()
        gc.disable()
        try:
            # What other tests have left behind may end at any moment, but not each time.
            assert min(garbage() for _ in range(3)) == 0
        finally:
            gc.enable()

    def test_greenlets_are_used_again_for_other_bodies(self):
        @workflow
        async def flow() -> int:
            return await beat()

        for _ in range(3):
            Run(flow).finish()
        idle = len(bodies._pool.idle)
        for _ in range(20):
            Run(flow).finish()
            Run(flow).start()
        assert len(bodies._pool.idle) == idle


def _line_of(text: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line and "_line_of" not in line)
