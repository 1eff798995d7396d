"""Drive bodies without a database: what the tests of definitions, replay and sandbox share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from outbox.codec import encode, encode_fault
from worker.definitions import Workflow
from worker.replay.decisions import Block, Decision, DoStep, Fail, Finish, Sleep
from worker.replay.driver import Replay
from worker.replay.guards import UNGUARDED, Guard
from worker.replay.records import Record, RunFacts

CREATED = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
FACTS = RunFacts(UUID(int=7), "a workflow", CREATED, "seed")


def record(
    path: tuple[int, ...] | int,
    name: str = "sleep",
    *,
    value: Any = None,
    error: dict[str, Any] | None = None,
    n: int = 0,
    outcome: str | None = None,
    fingerprint: int | None = None,
    seq: int = 0,
    epoch: int = 0,
    kind: str | None = None,
) -> Record:
    """Return a record of a step, or of a sleep if it has no other name."""
    return Record(
        path=path if isinstance(path, tuple) else (path,),
        n=n,
        kind=kind or ("sleep" if name == "sleep" else "step"),
        name=name,
        outcome=outcome or ("failed" if error else "completed"),
        value=None if error else encode(value, where="a test"),
        error=error,
        fingerprint=fingerprint,
        at=CREATED + timedelta(seconds=seq),
        seq=seq,
        epoch=epoch,
    )


def execute(decision: DoStep | Sleep, seq: int) -> Record:
    """Carry a decision out at once, as the engine would, and return its final record."""
    if isinstance(decision, Sleep):
        return record(decision.path, seq=seq)
    step = decision.step
    args, kwargs = step.signature.decode_arguments(decision.arguments, where="a test")
    try:
        value = step.function(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = _finished(value)
    except Exception as error:
        fault = encode_fault(error, step.raises)
        return record(decision.path, step.name, error=fault, fingerprint=decision.fingerprint, seq=seq)
    return record(decision.path, step.name, value=value, fingerprint=decision.fingerprint, seq=seq)


def _finished(coroutine: Any) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a step of these tests awaits nothing real")


class Run:
    """A run in memory: it drives a workflow, executes what is decided, and keeps the history."""

    def __init__(
        self, workflow: Workflow[..., Any], *, facts: RunFacts = FACTS, guard: Guard = UNGUARDED, **input: Any
    ):
        self.workflow, self.facts, self.guard = workflow, facts, guard
        self.input = encode(input, where="a test")
        self.history: list[Record] = []
        self.decisions: list[Decision] = []

    def replay(self) -> Replay:
        return Replay(self.workflow, self.input, self.facts, list(self.history), guard=self.guard)

    def start(self) -> Decision:
        """Drive to the first decision and discard the body."""
        replay = self.replay()
        try:
            return replay.start()
        finally:
            replay.close()

    def finish(self, crash: Callable[[], bool] = lambda: False) -> Finish | Fail | Block:
        """Drive to the end. `crash` is asked at each point where a worker may die, and tells whether it does."""
        while True:
            outcome = self._attempt(crash)
            if outcome is not None:
                return outcome

    def _attempt(self, crash: Callable[[], bool]) -> Finish | Fail | Block | None:
        replay = self.replay()
        try:
            decision = replay.start()
            while isinstance(decision, DoStep | Sleep):
                self.decisions.append(decision)
                if crash():  # decided, not executed
                    return None
                done = execute(decision, len(self.history) + 1)
                self.history.append(done)
                if crash():  # recorded, not delivered
                    return None
                decision = replay.deliver(done)
            self.decisions.append(decision)
            return None if crash() else decision  # ended, not recorded
        finally:
            replay.close()
