"""Workers that die at a given moment, as far as the database and the steps can tell.

A crash stands for a SIGKILL: from that moment on the engine writes nothing and starts nothing, its connections
close without a word, and its claims stay behind for whoever reclaims them. What it cannot do is stop the thread of
another `def` step that is being executed just then: that one runs to its end, unheard.

There are three moments at which it matters that a step was interrupted:

- *before*: the step is claimed, and its function is not called any more;
- *after*: the function has done what it does, and nothing of it is recorded. A transactional step is there before
  its COMMIT, so that what it has written is rolled back;
- *recording*: the record is committed, and the worker dies before it learns of that.

`MortalEngine` puts itself between the engine and what executes, and between the engine and its committer; nothing
in those knows of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn
from uuid import UUID

from outbox.settings import Settings
from worker.engine.engine import Engine
from worker.engine.transitions import Receipt, Verdict, Writing
from worker.registry import Registry
from worker.replay.records import Path
from worker.steps.execution import Answered, Call, Outcome, Raised
from worker.steps.transactions import Committed, Conclude, Documents, TransactionOutcome
from worker.telemetry.tracing import Tracing

Moment = Literal["before", "after", "recording"]

_WRITTEN = (Verdict.APPLIED, Verdict.ALREADY)


@dataclass
class Crash:
    """When workers are to die: at this moment of the step's executions, `times` at most (None: of each one).

    `execution` counts from 1; None means whichever comes. `count` tells how often it has happened.
    """

    step: str
    moment: Moment
    times: int | None = 1
    execution: int | None = None
    count: int = field(default=0, init=False)

    def strikes(self, moment: Moment, step: str, execution: int | None) -> bool:
        """Tell whether a worker dies here."""
        return (
            moment == self.moment
            and step == self.step
            and (self.times is None or self.count < self.times)
            and (self.execution is None or execution == self.execution)
        )


class Execution(NamedTuple):
    """An execution that is under way; `since` is in monotonic seconds."""

    step: str
    number: int
    since: float


class _DiedError(Exception):
    """Takes a transaction back whose worker is dead."""


class MortalEngine(Engine):
    """An engine that dies when one of `crashes` strikes: `run` returns then, and `died` is true."""

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        *,
        url: str,
        worker_id: int,
        queues: Sequence[str],
        crashes: Sequence[Crash],
        tracing: Tracing | None = None,
    ) -> None:
        super().__init__(registry, settings, url=url, worker_id=worker_id, queues=queues, tracing=tracing)
        self.died = False
        self.executing: dict[tuple[UUID, Path], Execution] = {}
        self._crashes = crashes
        self._numbers: dict[tuple[UUID, Path], int] = {}
        self._do_commit = self._committer.commit
        self._do_execute = self._executor.execute
        self._do_transact = self._transactions.execute
        # On the objects themselves: whoever has one of them gets what stands between.
        self._committer.commit = self._commit  # type: ignore[method-assign]  # the same signature, see above
        self._executor.execute = self._execute  # type: ignore[method-assign]  # the same signature, see above
        self._transactions.execute = self._transact  # type: ignore[method-assign]  # the same signature, see above

    # -- between

    async def _execute(self, call: Call, timeout: float | None) -> Outcome:
        async with self._noted(call):
            outcome = await self._do_execute(call, timeout)
            if self.died or (isinstance(outcome, Answered | Raised) and self._strikes("after", call)):
                self._die()
            return outcome

    async def _transact(self, call: Call, timeout: float | None, conclude: Conclude) -> TransactionOutcome:
        def concluded(value: Any) -> Documents:
            if self.died or self._strikes("after", call):
                self._end()
                raise _DiedError
            return conclude(value)

        async with self._noted(call):
            outcome = await self._do_transact(call, timeout, concluded)
            if (
                self.died
                or (isinstance(outcome, Committed) and self._strikes("recording", call))
                or (isinstance(outcome, Raised) and self._strikes("after", call))
            ):
                self._die()
            return outcome

    def _commit(self, writing: Writing) -> asyncio.Future[Receipt]:
        if self.died:
            return self._cancelled()
        answered = self._do_commit(writing)
        crash = self._recording(writing)
        if crash is None:
            return answered
        heard: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()

        def hear(answer: asyncio.Future[Receipt]) -> None:
            if self.died or answer.cancelled() or heard.done():
                heard.cancel()
            elif answer.result().refused is None and answer.result().verdict in _WRITTEN:
                crash.count += 1
                self._end()
                heard.cancel()
            else:
                heard.set_result(answer.result())

        answered.add_done_callback(hear)
        return heard

    # -- dying

    async def run_once(self) -> int:
        """Claim, unless dead."""
        return 0 if self.died else await super().run_once()

    def _end(self) -> None:
        self.died = True
        self.stop()

    def _die(self) -> NoReturn:
        """End the task of this run as the engine would, which ends with all of them."""
        self._end()
        raise asyncio.CancelledError

    @staticmethod
    def _cancelled() -> asyncio.Future[Receipt]:
        """Return what a committer answers that has ended."""
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        future.cancel()
        return future

    # -- looking

    @asynccontextmanager
    async def _noted(self, call: Call) -> AsyncIterator[None]:
        """Let it be seen that a step is being executed; die before it is, where that is due."""
        if self.died or self._strikes("before", call):
            self._die()
        key = (call.info.run_id, call.info.path)
        self._numbers[key] = call.info.execution
        self.executing[key] = Execution(call.step.name, call.info.execution, time.monotonic())
        try:
            yield
        finally:
            del self.executing[key]

    def _strikes(self, moment: Moment, call: Call) -> bool:
        for crash in self._crashes:
            if crash.strikes(moment, call.step.name, call.info.execution):
                crash.count += 1
                return True
        return False

    def _recording(self, writing: Writing) -> Crash | None:
        """Return the crash that follows the commit of this writing."""
        for record in writing.records:
            if record.kind == "step" and record.outcome in ("completed", "failed"):
                number = self._numbers.get((writing.transition.run_id, tuple(record.path)))
                for crash in self._crashes:
                    if crash.strikes("recording", record.name, number):
                        return crash
        return None
