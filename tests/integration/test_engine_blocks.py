"""Runs that need a person: bodies that cannot be replayed, histories that do not fit, and what resumes them."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from tests.effects import Gate
from tests.engines import Lab, Run, counted, keep_house_often
from worker import sleep, step, workflow
from worker.definitions import Registry, Workflow, collecting
from worker.engine.advance import Advance
from worker.engine.turns import Turn
from worker.replay.decisions import DoStep
from worker.steps.execution import Outcome


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


async def blocked(lab: Lab, run: Any) -> Run:
    ended = await lab.ended(run)
    assert ended.state == "blocked", ended
    return ended


# -- bodies that do what a replay cannot repeat


async def io_of_its_own() -> None:
    await asyncio.open_connection("127.0.0.1", 9)


async def loops() -> None:
    asyncio.get_running_loop().create_task(asyncio.sleep(0))


async def swallows() -> None:
    try:
        await asyncio.sleep(0.01)
    except Exception:
        pass


async def swallows_everything() -> None:
    while True:
        try:
            await asyncio.sleep(0)
        except BaseException:
            pass


WANDERINGS: dict[str, Callable[[], Any]] = {
    "gather": lambda: asyncio.gather(asyncio.sleep(0), asyncio.sleep(0)),
    "sleep(0)": lambda: asyncio.sleep(0),
    "sleep": lambda: asyncio.sleep(0.01),
    "wait_for": lambda: asyncio.wait_for(asyncio.sleep(0), 1),
    "I/O": io_of_its_own,
    "create_task": loops,
    "to_thread": lambda: asyncio.to_thread(time.monotonic),
    "swallowed": swallows,
    "swallowed for ever": swallows_everything,
}


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("name", WANDERINGS)
async def test_a_body_that_wanders_off_is_blocked_and_resumed_after_the_fix(lab: Lab, name: str) -> None:
    executed: list[int] = []
    fixed = False
    with collecting() as registry:

        @step
        async def work(n: int) -> None:
            executed.append(n)

        @workflow
        async def wandering() -> str:
            await work(1)
            if not fixed:
                await WANDERINGS[name]()
            await work(2)
            return "home"

    async with lab.engine(registry):
        run = await lab.enqueue(wandering)
        reason = (await blocked(lab, run)).error
        assert reason["type"] == "outbox.errors.NotDeterministic"
        assert reason["reason"] == "not deterministic"
        assert "test_engine_blocks.py:" in reason["message"]  # the line of the body
        assert executed == [1]
        fixed = True
        assert await lab.retry(run) == 1
        assert await lab.succeeded(run) == "home"
        # The engine's own loop and tasks have taken no harm.
        assert await lab.succeeded(await lab.enqueue(wandering)) == "home"
    assert executed == [1, 2, 1, 2]
    gc.collect()  # what the body has left behind, while its warnings are expected


async def test_a_def_body_that_uses_the_network_is_blocked(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        def calling() -> None:
            with socket.create_connection(("127.0.0.1", 9), timeout=1):
                pass

        @workflow
        def dozing() -> None:
            time.sleep(0.01)

    async with lab.engine(registry):
        for flow in (calling, dozing):
            reason = (await blocked(lab, await lab.enqueue(flow))).error
            assert reason["reason"] == "not deterministic"
            assert "test_engine_blocks.py:" in reason["message"]


async def test_a_body_that_swallows_exceptions_of_its_steps_is_its_own_business(lab: Lab) -> None:
    with collecting() as registry:

        @step
        async def broken() -> None:
            raise ValueError("no")

        @workflow
        async def swallowing() -> str:
            try:
                await broken()
            except Exception:
                pass
            await sleep(0.05)  # parks: the body is thrown away, which no except Exception swallows
            return "went on"

    async with lab.engine(registry):
        assert await lab.succeeded(await lab.enqueue(swallowing)) == "went on"


async def test_a_body_that_swallows_its_suspension_is_parked_all_the_same(lab: Lab) -> None:
    entered: list[int] = []
    with collecting() as registry:

        @workflow
        async def clinging() -> str:
            entered.append(1)
            try:
                await sleep(0.1)
            except BaseException:
                await sleep(3600)
            return "awake"

    async with lab.engine(registry):
        assert await lab.succeeded(await lab.enqueue(clinging)) == "awake"
    assert len(entered) == 2


# -- histories that do not fit


def version(
    body: Callable[[Any, Any], Any], gate: Gate, **options: Any
) -> tuple[Registry, Workflow[..., Any]]:
    with collecting() as registry:

        @step
        async def a(n: int = 0) -> str:
            return f"a{n}"

        @step
        async def b(n: int = 0) -> str:
            await gate.passed()
            return f"b{n}"

        @workflow(name="flow", **options)
        async def flow() -> Any:
            return await body(a, b)

    return registry, flow


async def a_then_b(a: Any, b: Any) -> list[str]:
    return [await a(1), await b(2)]


async def b_then_a(a: Any, b: Any) -> list[str]:
    return [await b(2), await a(1)]


async def only_a(a: Any, b: Any) -> list[str]:
    return [await a(1)]


async def sleep_then_b(a: Any, b: Any) -> list[str]:
    await sleep(0)
    return [await b(2)]


async def other_arguments(a: Any, b: Any) -> list[str]:
    return [await a(1000), await b(2)]


@pytest.mark.parametrize(
    ("changed", "got"),
    [(b_then_a, "step b at 1"), (sleep_then_b, "sleep at 1")],
    ids=["another step", "another kind"],
)
async def test_a_changed_order_of_steps_blocks_an_open_run_until_it_is_put_right(
    lab: Lab, changed: Callable[[Any, Any], Any], got: str
) -> None:
    gate = Gate()
    old, flow = version(a_then_b, gate)
    new, _ = version(changed, gate)
    async with lab.engine(old) as engine:
        run = await lab.enqueue(flow)
        await gate.reached()
        await engine.crash()
    gate.open()
    async with lab.engine(new):
        reason = (await blocked(lab, run)).error
    assert reason["reason"] == "history mismatch"
    assert reason["type"] == "outbox.errors.HistoryMismatch"
    assert reason["data"] == {"expected": "step a at 1 (completed)", "got": got}
    assert "test_engine_blocks.py:" in reason["message"]
    async with lab.engine(old):
        await lab.retry(run)
        assert await lab.succeeded(run) == ["a1", "b2"]


async def test_a_step_that_was_removed_is_a_left_over_record(lab: Lab) -> None:
    gate = Gate()
    old, flow = version(a_then_b, gate)

    async def nothing(a: Any, b: Any) -> list[str]:
        return []

    new, _ = version(nothing, gate)
    async with lab.engine(old) as engine:
        run = await lab.enqueue(flow)
        await gate.reached()
        await engine.crash()
    gate.open()
    async with lab.engine(new):
        reason = (await blocked(lab, run)).error
        assert reason["data"]["expected"] == "step a at 1 (completed)"
    async with lab.engine(old):
        await lab.retry(run)
        await lab.succeeded(run)


async def test_steps_that_were_appended_do_no_harm(lab: Lab) -> None:
    gate = Gate()
    old, flow = version(only_a, gate)
    new, _ = version(a_then_b, gate)
    async with lab.engine(old) as engine:
        lost = engine.lose_answers(lambda w: any(r.kind == "step" for r in w.records))
        run = await lab.enqueue(flow)
        await lost.wait()
        await engine.crash()
    assert await lab.succeeded(run) == ["a1"]  # it had ended with its last step: one flush
    gate.open()
    async with lab.engine(new):
        assert await lab.succeeded(await lab.enqueue(flow)) == ["a1", "b2"]


@pytest.mark.parametrize("strict", [False, True])
async def test_other_arguments_are_drift_which_only_a_strict_workflow_blocks(lab: Lab, strict: bool) -> None:
    gate = Gate()
    old, flow = version(a_then_b, gate, strict=strict)
    new, _ = version(other_arguments, gate, strict=strict)
    async with lab.engine(old) as engine:
        run = await lab.enqueue(flow)
        await gate.reached()
        await engine.crash()
    gate.open()
    drift = counted("stepwell_replay_drift_total")
    async with lab.engine(new):
        if strict:
            reason = (await blocked(lab, run)).error
            assert reason["reason"] == "history mismatch"
            assert "other arguments" in reason["message"]
        else:
            assert await lab.succeeded(run) == ["a1", "b2"]  # the recorded value stands
    assert counted("stepwell_replay_drift_total") == drift + 1
    if strict:
        async with lab.engine(old):
            await lab.retry(run)
            assert await lab.succeeded(run) == ["a1", "b2"]


async def test_a_recorded_result_that_no_longer_fits_its_annotation_blocks(lab: Lab) -> None:
    gate = Gate()
    results: list[Any] = ["text"]

    def made(annotation: Any) -> tuple[Registry, Workflow[..., Any]]:
        async def find() -> Any:
            return results[0]

        find.__annotations__["return"] = annotation
        with collecting() as registry:
            found = step(name="find")(find)

            @step
            async def then() -> None:
                await gate.passed()

            @workflow
            async def flow() -> Any:
                value = await found()
                await then()
                return value

        return registry, flow

    old, flow = made(str)
    new, _ = made(int)
    async with lab.engine(old) as engine:
        run = await lab.enqueue(flow)
        await gate.reached()
        await engine.crash()
    gate.open()
    async with lab.engine(new):
        assert (await blocked(lab, run)).error["reason"] == "recorded result cannot be decoded"
    async with lab.engine(old):
        await lab.retry(run)
        assert await lab.succeeded(run) == "text"


# -- input


@pytest.mark.parametrize(
    ("input", "field"),
    [({"n": "seven"}, "n"), ({}, "n"), ({"n": 1, "m": 2}, "m"), ({"n": {"deep": [1]}}, "n")],
    ids=["wrong type", "missing", "unknown", "wrong shape"],
)
async def test_input_that_cannot_be_decoded_blocks_and_names_the_field(
    lab: Lab, input: dict[str, Any], field: str
) -> None:
    with collecting() as registry:

        @workflow
        async def counting(n: int) -> int:
            return n

    async with lab.engine(registry):
        run = await lab.enqueue(counting, input)
        reason = (await blocked(lab, run)).error
        assert reason["reason"] == "input cannot be decoded"
        assert reason["type"] == "outbox.errors.PayloadError"
        assert field in reason["message"]
        await lab.execute("""update stepwell.runs set input = '{"n": 7}' where id = %s""", [run])
        await lab.retry(run)
        assert await lab.succeeded(run) == 7


async def test_a_result_of_the_run_that_cannot_be_encoded_fails_it(lab: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def opaque() -> Any:
            return object()

    async with lab.engine(registry):
        failed = await lab.ended(await lab.enqueue(opaque))
    assert (failed.state, failed.error["type"]) == ("failed", "outbox.errors.PayloadError")


# -- retry


async def test_a_retry_keeps_what_completed_and_tries_what_failed(lab: Lab) -> None:
    executed: list[str] = []
    broken = [True]
    with collecting() as registry:

        @step
        async def good() -> str:
            executed.append("good")
            return "good"

        @step
        async def bad() -> str:
            executed.append("bad")
            if broken[0]:
                raise ValueError("still broken")
            return "mended"

        @workflow
        async def mending() -> list[str]:
            return [await good(), await bad()]

    async with lab.engine(registry):
        run = await lab.enqueue(mending)
        for epoch in (1, 2):
            assert (await lab.ended(run)).state == "failed"
            assert await lab.retry(run) == epoch
        assert (await lab.ended(run)).state == "failed"
        broken[0] = False
        await lab.retry(run)
        assert await lab.succeeded(run) == ["good", "mended"]
        assert await lab.retry(run) is None
    assert executed == ["good", "bad", "bad", "bad", "bad"]
    assert await lab.totals("run") == {"failed": 3, "succeeded": 1}


async def test_a_bug_of_ours_blocks_the_run_that_met_it_instead_of_executing_its_step_for_ever(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    executed: list[str] = []
    after = Advance._after

    def cursed(self: Advance, step: DoStep, outcome: Outcome) -> Turn:
        if self.claim.name == "unlucky":
            raise RuntimeError("a bug")
        return after(self, step, outcome)

    with collecting() as registry:

        @step
        async def work(name: str) -> str:
            executed.append(name)
            return name

        @workflow
        async def unlucky() -> str:
            return await work("unlucky")

        @workflow
        async def lucky() -> str:
            return await work("lucky")

    async with lab.engine(registry):
        monkeypatch.setattr(Advance, "_after", cursed)
        run = await lab.enqueue(unlucky)
        reason = (await blocked(lab, run)).error
        assert (reason["reason"], reason["message"]) == ("Stepwell failed", "a bug")
        assert await lab.succeeded(await lab.enqueue(lucky)) == "lucky"
        assert executed == ["unlucky", "lucky"]
        monkeypatch.setattr(Advance, "_after", after)
        await lab.retry(run)
        assert await lab.succeeded(run) == "unlucky"
