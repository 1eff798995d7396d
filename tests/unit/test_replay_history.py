from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.drives import FACTS, Run, record
from worker.context import sleep
from worker.definitions import collecting, step, workflow
from worker.replay.decisions import Block, DoStep, Finish
from worker.replay.driver import Replay


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    with collecting():
        yield


class TestHistory:
    def test_recorded_calls_are_delivered_without_a_decision(self):
        @step
        async def one(a: int) -> int:
            raise AssertionError("it is recorded")

        @workflow
        async def flow() -> int:
            await sleep(3)
            return await one(1) + await one(2)

        run = Run(flow)
        run.history = [record(1, seq=1), record(2, "one", value=10, seq=2), record(3, "one", value=20, seq=3)]
        assert run.start() == Finish("30")

    @pytest.mark.parametrize(
        ("history", "expected", "got"),
        [
            ([record(1, "other", value=1)], "step other at 1 (completed)", "step one at 1"),
            ([record(1)], "sleep at 1 (completed)", "step one at 1"),
            ([record(2, "one", value=1)], "step one at 2 (completed)", "step one at 1"),
            ([record(1, "one", value=1), record(3)], "sleep at 3 (completed)", "sleep at 2"),
            (
                [record(1, "one", value=1), record(2, "one", value=1)],
                "step one at 2 (completed)",
                "sleep at 2",
            ),
            (
                [record(1, "one", value=1), record(2), record(3)],
                "sleep at 3 (completed)",
                "its end without that call",
            ),
            (
                [record(2, "one", n=1, outcome="interrupted")],
                "step one at 2 (interrupted)",
                "step one at 1",
            ),
            (
                [record(1, "two", n=1, outcome="interrupted")],
                "step two at 1 (interrupted)",
                "step one at 1",
            ),
            (
                [record(1, "one", value=1), record(2), record(3, "one", n=1, outcome="interrupted")],
                "step one at 3 (interrupted)",
                "its end without that call",
            ),
        ],
    )
    def test_a_history_that_does_not_fit_blocks_with_expected_and_got(self, history, expected, got):
        @step
        async def one() -> int:
            return 1

        @workflow
        async def flow() -> None:
            try:
                await one()
                await sleep(1)
            except Exception:
                pass

        run = Run(flow)
        run.history = history
        outcome = run.start()
        assert isinstance(outcome, Block)
        assert outcome.reason == "history mismatch"
        assert outcome.error["data"] == {"expected": expected, "got": got}
        assert "test_replay_history.py:" in outcome.error["message"]
        assert "trace" not in outcome.error

    def test_a_body_that_fails_before_the_end_of_its_history_is_blocked_and_not_failed(self):
        @workflow
        async def flow() -> None:
            raise ValueError("a bug in the new code")

        run = Run(flow)
        run.history = [record(1)]
        outcome = run.start()
        assert isinstance(outcome, Block)
        assert outcome.error["data"]["got"] == "its end without that call, by ValueError"

    def test_executions_that_did_not_complete_go_with_the_decision(self):
        @step
        async def one(a: int) -> int:
            return a

        @workflow
        async def flow() -> int:
            return await one(1)

        failed = record(1, "one", n=1, error={"type": "ValueError", "message": "x"}, seq=1)
        interrupted = record(1, "one", n=2, outcome="interrupted", seq=2)
        run = Run(flow)
        run.history = [failed, interrupted]
        decision = run.start()
        assert isinstance(decision, DoStep)
        assert decision.earlier == (failed, interrupted)
        run.history.append(record(1, "one", value=5, seq=3))
        assert run.start() == Finish("5")

    def test_records_of_the_run_and_of_epochs_are_not_the_drivers_business(self):
        @workflow
        async def flow() -> None:
            await sleep(1)

        run = Run(flow)
        run.history = [
            record((), "flow", kind="run", outcome="blocked"),
            record((), "flow", kind="epoch", n=1, outcome="retry"),
            record(1),
        ]
        assert run.start() == Finish("null")

    def test_other_arguments_are_drift_and_only_noted(self):
        @step
        async def one(a: int) -> int:
            return a

        @workflow
        async def flow(a: int) -> int:
            return await one(a)

        before, after = Run(flow, a=1), Run(flow, a=2)
        before.finish()
        after.history = before.history
        replay = after.replay()
        assert replay.start() == Finish("1")
        assert [(drift.path, drift.name) for drift in replay.drifts] == [((1,), "one")]

    def test_other_arguments_block_a_strict_workflow(self):
        @step
        async def one(a: int) -> int:
            return a

        @workflow(strict=True)
        async def flow(a: int) -> int:
            return await one(a)

        before, after = Run(flow, a=1), Run(flow, a=2)
        before.finish()
        assert before.start() == Finish("1")
        after.history = before.history
        outcome = after.start()
        assert isinstance(outcome, Block)
        assert "other arguments" in outcome.error["message"]

    @pytest.mark.parametrize("strict", [False, True])
    def test_other_arguments_than_in_an_earlier_execution_are_drift_too(self, strict: bool):
        @step
        async def one(a: int) -> int:
            return a

        @workflow(strict=strict)
        async def flow(a: int) -> int:
            return await one(a)

        run = Run(flow, a=1)
        run.history = [record(1, "one", n=1, outcome="interrupted", fingerprint=1, seq=1)]
        replay = run.replay()
        decision = replay.start()
        assert isinstance(decision, Block) if strict else decision.drift
        assert [(drift.path, drift.recorded) for drift in replay.drifts] == [((1,), 1)]


class TestDeliver:
    def test_only_the_final_record_of_the_call_that_waits_is_taken(self):
        @workflow
        async def flow() -> None:
            await sleep(1)

        replay = Replay(flow, "{}", FACTS)
        with pytest.raises(ValueError, match="waits for a final record of nothing"):
            replay.deliver(record(1))
        replay.start()
        for wrong in (record(2), record(1, n=1)):
            with pytest.raises(ValueError, match="waits for a final record of 1,"):
                replay.deliver(wrong)
        with pytest.raises(ValueError, match="the call at 1 is no step"):
            replay.deliver(record(1, "one"))
        assert replay.deliver(record(1)) == Finish("null")
        with pytest.raises(ValueError, match="waits for a final record of nothing"):
            replay.deliver(record(1))
