"""One claim being worked on: what the advance of a run and a step on its own have in common.

A claim is a loop over `Turn`s: what to do next, with the records that must be durable before it is acted upon (I7).
Nothing here decides whether the claim still stands: each write carries the fence, and the first that is refused ends the
work, silently for the run, counted for the operator.

Executions are counted by what is recorded. One that was interrupted is recorded by the next claimant, in the flush
before it acts: `claim.interrupted` says that the last claim died, `doing` which call it was at.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, assert_never

import msgspec

from outbox.codec import encode_fault
from worker.context import StepInfo
from worker.engine import reports
from worker.engine.claims import Claim
from worker.engine.means import Means
from worker.engine.transitions import Documents, Receipt, Verdict, Writing, encode, receipt_of
from worker.engine.turns import Park, Release, Standing, Turn, with_earlier
from worker.engine.watch import Watch
from worker.replay.decisions import Block, DoStep
from worker.replay.records import Path, Record, is_undo
from worker.retries import Retry, failures_of
from worker.steps.execution import (
    Answered,
    Call,
    CutShort,
    Outcome,
    Raised,
    TimedOut,
    uncancel,
)
from worker.steps.transactions import (
    Committed,
    EndedByStep,
    Lost,
    Refused,
    Repeat,
    TransactionOutcome,
    Uncertain,
)
from worker.telemetry import metrics

logger = logging.getLogger(__name__)

HELD_WAIT_SECONDS = 1.0
"""A retry that waits longer than this holds no slot: the run parks."""
BUSY_THREAD_SECONDS = 1.0
"""How long a call waits whose abandoned thread still lives in this process."""
UNWRITABLE_SECONDS = 5.0
"""How long a run waits whose very end is refused: only a person can help, and its step must not be executed again."""
MAX_REPEATS = 20
REPEAT_SECONDS = 0.05


class Claimed:
    """One claim. `parked` tells how it came out, `watch` is told what happens. Subclasses say what its turns are."""

    def __init__(self, claim: Claim, standing: Standing, means: Means) -> None:
        self.claim = claim
        self.parked = False
        self.watch: Watch | None = None
        self._means = means
        self._standing = standing
        self._repeats = self._begun = 0
        self._task: asyncio.Task[Any] | None = None
        self._interruptible = False
        self._executing_async = False
        self._cancelling = False

    # -- for the engine

    async def run(self) -> None:
        """Work until the task is parked or done, or the claim is lost."""
        self._task = asyncio.current_task()
        if self.watch is not None:
            self.watch.enter()
        try:
            turn: Turn | None = await self._opening()
            while turn is not None:
                turn = await self._carry_out(turn)
        except Exception as error:
            logger.exception("an advance failed", extra={"run_id": str(self.claim.run_id)})
            await self._give_up(error)
        finally:
            self._close()

    def cut(self) -> None:
        """End the execution or wait that is under way; it is recorded as interrupted, and the run released."""
        if self._interruptible and self._task is not None:
            self._task.cancel()

    def cancel(self) -> None:
        """Take note that the run is to be cancelled: an async step ends now, a def step at its end.

        What is being undone is undone whatever else becomes of the run.
        """
        if not self._standing.cancelled and not self._cancelling:
            self._cancelling = True
            if self._executing_async:
                self.cut()

    async def _give_up(self, error: Exception) -> None:
        """Block the run after a bug of ours: given back, it would meet it again, and execute its step each time."""
        turn = Turn(reports.bug(error))
        if (writing := self._standing.writing(turn)) is not None:
            self._judged(await self._means.committer.commit(writing), turn, writing)

    async def _objected(self, block: Block) -> Turn:
        """Leave a run to workers that came later, if there are any: it may have gone on under their code."""
        if not await self._means.reader.is_superseded(self.claim.name):
            return Turn(block)
        logger.info(
            "a run does not fit what is here (%s), but there are newer workers: it is given back", block.reason,
            extra={"run_id": str(self.claim.run_id)},
        )  # fmt: skip
        self._means.leave(self.claim.name)
        return Turn(Release())

    # -- what subclasses say

    async def _opening(self) -> Turn:
        """Return the first turn."""
        raise NotImplementedError

    async def _again(self, refused: Turn) -> Turn:
        """Return what to do instead of a strict turn: the history has gone on since. See `Turn`."""
        raise NotImplementedError

    def _prepared(self, turn: Turn) -> Turn:
        """Return the turn with what has to be known or recorded before it is written."""
        raise NotImplementedError

    def _concluded(self, record: Record) -> Turn:
        """Return what follows the final record of a step."""
        raise NotImplementedError

    def _cancelled(self, records: tuple[Record, ...] = ()) -> Turn:
        """Return what follows a cancellation."""
        raise NotImplementedError

    def _expired(self, records: tuple[Record, ...] = ()) -> Turn:
        """Return what follows when the run's deadline has passed."""
        raise NotImplementedError

    def _held(self, step: DoStep, records: tuple[Record, ...]) -> Turn:
        """Return what follows the interruption of a step that is not to be executed again."""
        raise NotImplementedError

    async def _rewind(self) -> None:
        """Forget that a step was concluded: what was decided because of it is not recorded."""

    def _close(self) -> None:
        """Drop what is held in memory."""

    # -- the loop

    async def _carry_out(self, turn: Turn) -> Turn | None:
        """Write what the turn needs to be durable, then act on it; None when this claim is over."""
        if not turn.written:
            turn = self._prepared(turn)
            writing = self._standing.writing(turn)
            if writing is not None:
                if self.watch is not None:
                    self.watch.sends(writing)
                receipt = await self._means.committer.commit(writing)
                if receipt.refused is not None and isinstance(turn.decision, Block):
                    reports.log_unwritable(self.claim.run_id)
                    await asyncio.sleep(UNWRITABLE_SECONDS)
                if receipt.verdict is Verdict.BEHIND:
                    self._cancelling |= receipt.cancelling
                    return await self._again(turn)
                after = self._judged(receipt, turn, writing)
                if after is not turn:
                    return after
        if type(turn.decision) is DoStep:
            return await self._execute(turn.decision, turn.wait_seconds)
        return None

    def _judged(self, receipt: Receipt, turn: Turn, writing: Writing) -> Turn | None:
        """Return the same turn when it was applied and can be acted upon, else what to do instead."""
        if receipt.refused is not None:
            return Turn(reports.refused(receipt.refused))
        if receipt.verdict is Verdict.FENCED:
            self._lost()
            return None
        driven = self._standing.driven
        self._standing.applied(writing)
        if self.watch is not None:
            self.watch.written(turn, writing)
        if writing.end is None:
            reports.log_growth(self.claim.run_id, self.claim.workflow, driven, self._standing.driven)
        else:
            metrics.run_seconds(self.claim.workflow).observe(self._standing.seconds())
            reports.log_end(self.claim.run_id, self.claim.workflow, writing.end)
        self.parked = writing.transition.then == "park"
        if writing.transition.then != "move":
            return None
        if (receipt.cancelling or self._cancelling) and not self._standing.cancelled:
            return self._cancelled()
        return Turn(Release()) if receipt.pausing or self._means.leaving() else turn

    def _lost(self) -> None:
        metrics.FENCED.inc()
        self._log_lost()
        if self.watch is not None:
            self.watch.lost()

    def _log_lost(self) -> None:
        logger.warning("a claim was lost; its write was refused", extra={"run_id": str(self.claim.run_id)})

    # -- executing

    async def _execute(self, step: DoStep, wait_seconds: float) -> Turn | None:
        self._interruptible = True
        self._executing_async = step.step.is_async and not is_undo(step.path)
        try:
            if wait_seconds:
                await asyncio.sleep(wait_seconds)
            slots = self._means.slots(step.step)
            if not slots:
                return await self._execute_now(step)
            async with AsyncExitStack() as taken:
                await self._take(step, slots, taken)
                return await self._execute_now(step)
        except asyncio.CancelledError:
            if not uncancel():
                raise
            # It waited for its turn: nothing had started.
            return self._cancelled() if self._cancelling else Turn(Release())
        finally:
            self._interruptible = self._executing_async = False

    async def _take(self, step: DoStep, slots: Sequence[asyncio.Semaphore], taken: AsyncExitStack) -> None:
        """Wait for the slots that a step needs, but not beyond the deadline, which is found to have passed then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._remaining(step)):
                for slot in slots:
                    await taken.enter_async_context(slot)

    async def _execute_now(self, step: DoStep) -> Turn | None:
        instead = self._instead_of(step)
        if instead is not None:
            return instead
        started = time.monotonic()
        try:
            if step.step.transaction is not None:
                return await self._execute_transaction(step)
            return self._after(step, await self._watched(step, self._outcome(step)))
        finally:
            metrics.step_seconds(step.step.name).observe(time.monotonic() - started)

    def _watched(self, step: DoStep, execution: Awaitable[Any]) -> Awaitable[Any]:
        if self.watch is None:
            return execution
        return self.watch.during(step, len(self._standing.executions(step)) + 1, execution)

    def _instead_of(self, step: DoStep) -> Turn | None:
        """Return what has to be done instead of executing a step now."""
        if self._cancelling and not self._standing.cancelled:
            return self._cancelled()
        if self._means.leaving():
            return Turn(Release())
        if self._means.executor.is_abandoned(self.claim.run_id, step.path):
            return Turn(Park(step.path, BUSY_THREAD_SECONDS))
        return self._expired() if self._is_late(step) else None

    def _outcome(self, step: DoStep) -> Awaitable[Outcome]:
        call, timeout = self._call(step), self._timeout(step)
        if step.earlier and step.step.verify is not None:
            return self._means.executor.execute_unless_done(call, timeout)
        return self._means.executor.execute(call, timeout)

    def _call(self, step: DoStep) -> Call:
        claim, standing = self.claim, self._standing
        info = StepInfo(
            claim.run_id, step.path, len(step.earlier) + 1, standing.fence, claim.key_epoch, step.step.name
        )
        return Call(step.step, step.arguments, standing.facts, info, self._means.settings.max_payload_bytes)

    def _timeout(self, step: DoStep) -> float | None:
        timeout, remaining = step.step.timeout, self._remaining(step)
        if timeout is None or remaining is None:
            return remaining if timeout is None else timeout
        return min(timeout, remaining)

    def _remaining(self, step: DoStep) -> float | None:
        """Return the seconds until the run's deadline, None if there is none that an execution has to mind."""
        return None if is_undo(step.path) else self._standing.remaining()

    def _is_late(self, step: DoStep) -> bool:
        return not is_undo(step.path) and self._standing.deadline_passed() is not None

    # -- after an execution

    def _after(self, step: DoStep, outcome: Outcome) -> Turn:
        match outcome:
            case Answered(value):
                return self._concluded(self._standing.record_step(step, 0, "completed", value=value))
            case Raised(error, final):
                return self._failed(step, error, final=final)
            case TimedOut():
                return self._timed_out(step)
            case CutShort():
                interruption = self._standing.record_interruption(step)
                return (
                    self._cancelled((interruption,)) if self._cancelling else Turn(Release(), (interruption,))
                )
            case _:
                assert_never(outcome)

    def _timed_out(self, step: DoStep) -> Turn:
        if self._is_late(step):
            return self._expired((self._standing.record_interruption(step),))
        if step.step.on_crash == "hold":
            return self._held(step, (self._standing.record_interruption(step),))
        return self._failed(
            step, TimeoutError(f"no answer within {step.step.timeout or 0:g} s"), interrupted=True
        )

    def _failed(
        self, step: DoStep, error: BaseException, *, final: bool = False, interrupted: bool = False
    ) -> Turn:
        """Judge a failure by the step's policy: deliver it, or try again here or later.

        A time-out is an interruption that the policy counts.
        """
        standing = self._standing
        fault = (
            {"type": "TimeoutError", "message": str(error)}
            if interrupted
            else encode_fault(error, step.step.raises)
        )
        executions = standing.executions(step)
        outcome = "interrupted" if interrupted else "failed"
        failed = standing.record_step(step, len(executions) + 1, outcome, error=fault)
        verdict = None
        if step.step.retry is not None and not final:
            verdict = step.step.retry.decide(failures_of([*executions, failed]), error)
        if self.watch is not None:
            self.watch.failed(step, error, fault, verdict.seconds if isinstance(verdict, Retry) else None)
        if not isinstance(verdict, Retry):
            return self._concluded(standing.record_step(step, 0, "failed", error=fault))
        wait = verdict.seconds
        if self._means.executor.is_abandoned(self.claim.run_id, step.path):
            wait = max(wait, HELD_WAIT_SECONDS + BUSY_THREAD_SECONDS)
        if wait > HELD_WAIT_SECONDS:
            return Turn(Park(step.path, standing.cut_by_deadline(wait)), (failed,))
        return Turn(with_earlier(step, failed), (failed,), wait_seconds=wait)

    # -- transactional steps

    async def _execute_transaction(self, step: DoStep) -> Turn | None:
        concluded: list[tuple[Turn, Writing]] = []

        def conclude(value: Any) -> Documents:
            recorded = self._standing.record_step(step, 0, "completed", value=call.encoded(value))
            turn = self._prepared(self._concluded(recorded))
            writing = self._standing.writing(turn)
            assert writing is not None
            if self.watch is not None:
                self.watch.sends(writing)
            concluded.append((turn, writing))
            return encode([writing])

        call = self._call(step)
        execution = self._means.transactions.execute(call, self._timeout(step), conclude)
        outcome: TransactionOutcome = await self._watched(step, execution)
        if isinstance(outcome, Uncertain):
            outcome = await self._resolved(step, ConnectionError("the connection was lost at COMMIT"))
        elif isinstance(outcome, Repeat) and outcome.begun:
            # Time has gone by, and the claim maybe with it: what was called is not called again without asking.
            outcome = await self._resolved(step, outcome.error)
        if isinstance(outcome, Committed):
            self._repeats = self._begun = 0
            turn, writing = concluded[0]
            after = self._judged(receipt_of(outcome.code), turn, writing)
            return msgspec.structs.replace(turn, written=True) if after is turn else after
        if isinstance(outcome, Lost):
            self._lost()  # counted first of all: whoever reads the history may learn there that it is dead
            return None
        if concluded:
            await self._rewind()
        match outcome:
            case Raised() | TimedOut() | CutShort():
                return self._after(step, outcome)
            case Repeat() as repeat:
                return self._repeated(step, repeat)
            case EndedByStep():
                return Turn(reports.ended_transaction(step))
            case Refused(message):
                return Turn(reports.refused(message))
            case _:
                assert_never(outcome)

    async def _resolved(self, step: DoStep, error: BaseException) -> Committed | Repeat | Lost:
        """Find out what has become of a transaction, and of the claim: a flush that only bumps the position tells.

        If nothing was committed, `error` is why the step is repeated. The flush waits for the old backend. Once it is applied, that one is fenced. Where it is answered *already*, the old
        backend had committed, or the flush had been applied before and is a resend: the history knows.
        """
        turn = Turn(step)
        probe = self._standing.move(turn, step.path)
        receipt = await self._means.committer.commit(probe)
        if receipt.verdict is Verdict.FENCED:
            return Lost()
        if receipt.verdict is Verdict.ALREADY and await self._is_recorded(step.path):
            return Committed(Verdict.ALREADY.value + 4 * receipt.cancelling)
        self._standing.applied(probe)
        return Repeat(error)

    async def _is_recorded(self, path: Path) -> bool:
        """Tell whether a call has its outcome. Nobody else writes it while this claim stands."""
        history = (await self._means.reader.histories([self.claim]))[self.claim.run_id]
        return any(r.path == path and r.n == 0 and r.epoch == self.claim.epoch for r in history)

    def _repeated(self, step: DoStep, repeat: Repeat) -> Turn:
        """Execute again what was rolled back for a reason that is not the step's.

        A database that is away is waited for as long as it takes; losing the connection again and again, once the
        step has been called, is an error.
        """
        self._repeats += 1
        self._begun += repeat.begun
        if self._begun > MAX_REPEATS:
            return self._failed(step, repeat.error)
        logger.info(
            "a transactional step is repeated: %s",
            reports.kind_of(repeat.error),
            extra={"run_id": str(self.claim.run_id)},
        )
        return Turn(step, wait_seconds=min(HELD_WAIT_SECONDS, REPEAT_SECONDS * self._repeats), written=True)
