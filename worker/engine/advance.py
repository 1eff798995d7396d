"""Advance one claimed run: drive its body, execute what it decides, commit, until it parks or ends.

One `Advance` for each claim, in one task of the engine. A step that is the only thing that the body waits for is
executed under this claim; several calls at once, and steps with a queue of their own, become tasks, and the run parks
(`worker.engine.spreading`). `doing` is empty for a first call, whose step starts without a flush of its own; only a
step with `verify` or `hold` is moved to before it starts, because for those it matters whether it had started.

What this claim records itself (sleeps, signals, results of children, a cancellation) while tasks of its run may record
something as well, it records only if nothing else was (`strict`): the order of the records is what the body goes by.
Otherwise the history is read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from outbox.codec import encode_fault
from outbox.errors import HistoryMismatch, PayloadError
from worker.definitions import Workflow
from worker.engine.claimed import Claimed
from worker.engine.claims import Claim, Mail, max_passed_bytes
from worker.engine.mailbox import Mailbox, OversizeError
from worker.engine.means import Means
from worker.engine.reports import held, too_large
from worker.engine.sealed import Seals, opened_input, opened_records, unopened
from worker.engine.spreading import extras_of, held_only, settling, spread
from worker.engine.transitions import Extra
from worker.engine.turns import Park, Standing, Turn, with_earlier
from worker.replay.decisions import Await, Block, Decision, DoStep, Settle, Sleep
from worker.replay.driver import Replay
from worker.replay.records import Record, began_at, visible
from worker.telemetry import metrics


class Advance(Claimed):
    """One claim of one run. `history` is the run's recorded history, `mail` what was sent to it and not taken."""

    def __init__(
        self,
        claim: Claim,
        workflow: Workflow[..., Any],
        history: list[Record],
        mail: Iterable[Mail],
        means: Means,
        claimed_at: float,
    ) -> None:
        self._seals = Seals(means.keyring, claim.workflow) if means.keyring else None
        super().__init__(claim, Standing(claim, history, claimed_at, self._seals), means)
        self._workflow = workflow
        self._history: list[Record] | None = history
        self._mailbox = Mailbox(mail, means.keyring)
        self._replay: Replay | None = None
        self._step: DoStep | None = None
        """What it is about to execute, or executes, with the executions that it knows of."""

    # -- turns

    async def _opening(self, unwritten: tuple[Record, ...] = ()) -> Turn:
        """Return the first turn. `unwritten` is what this claim has executed of a step and could not write down."""
        standing = self._standing
        passed = standing.deadline_passed()
        if passed is not None and standing.driven < 0 and not self._history:
            return Turn(passed)  # there is nothing to clean up, nor to undo
        decision = self._driven(self._history or [])
        self._history = None  # the replay has what it needs of it
        if isinstance(decision, Block):
            return await self._objected(decision)
        executed = self._anew(decision, unwritten)
        if executed and executed[-1].n == 0:
            return Turn(self._delivered(executed[-1]), executed)
        cancelling = (self.claim.cancelling or self._cancelling) and not standing.cancelled
        if not cancelling and passed is None:
            return Turn(decision)
        if isinstance(decision, DoStep):
            executed = executed or self._died_in(decision)
        return self._cancelled(executed) if cancelling else self._expired(executed)

    async def _again(self, refused: Turn) -> Turn:
        """Drive anew: what was recorded meanwhile comes before what this claim wanted to record."""
        await self._read_again()
        return await self._opening(tuple(record for record in refused.records if record.kind == "step"))

    def _anew(self, decision: Decision, unwritten: tuple[Record, ...]) -> tuple[Record, ...]:
        """Return what this claim has executed of a step, to be written now.

        What others record beside it does not make the step wrong, nor another one the next.
        """
        if type(decision) is not DoStep or any(record.path != decision.path for record in unwritten):
            return ()
        if unwritten:
            self._standing.interrupted = False
        return tuple(
            self._standing.record_step(decision, each.n, each.outcome, value=each.value, error=each.error)
            for each in unwritten
        )

    async def _rewind(self) -> None:
        await self._read_again()
        self._driven(self._history or [])
        self._history = None

    async def _read_again(self) -> None:
        claim = self.claim
        self._history = (await self._means.reader.histories([claim]))[claim.run_id]
        mail = await self._means.reader.mail([claim.run_id])
        self._mailbox = Mailbox(mail[claim.run_id], self._means.keyring)
        if self.watch is not None:
            self.watch.reads(mail[claim.run_id])
        self._standing.start_over(self._history)

    def _driven(self, history: list[Record]) -> Decision:
        """Drive a new body through what is recorded."""
        self._close()
        self._step = None
        standing = self._standing
        if self.claim.oversize is not None:
            return self._oversize(self.claim.oversize)
        try:
            given, applying = self._opened(visible(history) if history else [])
        except HistoryMismatch as mismatch:
            return Block("history mismatch", encode_fault(mismatch))
        except PayloadError as error:
            return unopened(error)
        self._replay = Replay(
            self._workflow, given, standing.facts, applying, driven=standing.driven,
            attempted=standing.attempted, began_at=began_at(history) if self.claim.base_epoch else None, guard=self._means.guard,
            context=None if self.watch is None else self.watch.context_of_body(),
        )  # fmt: skip
        return self._replay.start()

    def _opened(self, records: list[Record]) -> tuple[str, list[Record]]:
        """Return the input and records as they were before they were sealed. Raises PayloadError."""
        claim, keyring = self.claim, self._means.keyring
        stored = claim.input
        assert stored is not None
        given = opened_input(stored, keyring, claim.workflow)
        if self._seals is not None:
            self._seals.take_in(stored, claim.seed)
        if records:
            records = opened_records(records, keyring, input=stored, seed=claim.seed)
        return given, records

    def _oversize(self, size: int) -> Block:
        claim, limit = self.claim, self._means.settings.max_payload_bytes
        if claim.awaited or claim.base_epoch:
            limit = max_passed_bytes(limit)
        advice = "enqueue anew with the address of the data, which are kept elsewhere, or raise the limit and retry"
        return too_large(f"the input of workflow {claim.workflow!r}", size, limit, advice)

    def _oversize_signal(self, mail: Mail) -> Block:
        return too_large(
            f"the payload of signal {mail.name!r}", mail.oversize or 0, self._means.settings.max_payload_bytes,
            f"raise the limit and retry, or delete row {mail.id} of stepwell.signals and send less",
        )  # fmt: skip

    def _concluded(self, record: Record) -> Turn:
        return Turn(self._delivered(record), (record,))

    def _delivered(self, record: Record) -> Decision:
        assert self._replay is not None
        return self._replay.deliver(record)

    def _cancelled(self, records: tuple[Record, ...] = ()) -> Turn:
        return self._ended_early(self._standing.record_cancellation(), records)

    def _expired(self, records: tuple[Record, ...] = ()) -> Turn:
        return self._ended_early(self._standing.record_deadline(), records)

    def _ended_early(self, record: Record, records: tuple[Record, ...]) -> Turn:
        """Have the body clean up. It and the undo are no more cut short by the deadline."""
        assert self._replay is not None
        strict = self._replay.branched
        self._standing.cancelled = True
        self._standing.interrupted = False  # what the body calls from now on, the last claim has not begun
        decision = self._delivered(record)
        if type(decision) is DoStep:
            decision = self._gone_on(decision, records)
        return Turn(decision, (*records, record), strict=strict)

    def _gone_on(self, step: DoStep, records: tuple[Record, ...]) -> DoStep:
        """Return the step with what this claim knows of its executions, if it was at it already: an undo goes on."""
        known = self._step if self._step is not None and self._step.path == step.path else step
        here = (record for record in records if record.path == step.path)
        return msgspec.structs.replace(step, earlier=(*known.earlier, *here))

    def _held(self, step: DoStep, records: tuple[Record, ...]) -> Turn:
        return Turn(held(step), records)

    def _close(self) -> None:
        if self._replay is not None:
            if self._replay.drifts:
                metrics.DRIFT.inc(len(self._replay.drifts))
            self._replay.close()
            self._replay = None

    # -- before a turn is written

    def _prepared(self, turn: Turn) -> Turn:
        """Return the turn with what was not the body's to decide: interruptions, holds, waits that are over."""
        while True:
            decision = turn.decision
            if type(decision) is DoStep:
                turn = self._prepared_step(decision, turn)
                break
            if type(decision) is Sleep:
                after = self._prepared_sleep(decision, turn)
            elif type(decision) is Await:
                after = self._prepared_await(decision, turn)
            elif type(decision) is Settle and not decision.fresh and not self._standing.pending:
                assert self._replay is not None
                # An undo that is a task of its own may have been made here before, and be over since this was read.
                after = msgspec.structs.replace(turn, decision=self._replay.settled(), strict=True)
            else:
                break
            if type(after.decision) is type(decision) and after is turn:
                break
            turn = after
        return self._with_effects(turn)

    def _with_effects(self, turn: Turn) -> Turn:
        """Add what the body has done beside its calls."""
        replay = self._replay
        if replay is None:
            return turn
        if replay.branched:
            self._standing.branched = True
        effects = replay.take_effects()
        if effects is None and type(turn.decision) is not Settle:
            return turn  # nearly always
        more: list[Extra] = []
        records: tuple[Record, ...] = ()
        if effects is not None:
            more = extras_of(effects)
            records = tuple(self._standing.record_patch(number, name) for number, name in effects.patches)
        if type(turn.decision) is Settle:
            more += settling(turn.decision)
        if not more and not records:
            return turn
        return msgspec.structs.replace(
            turn,
            records=(*turn.records, *records),
            extras=(*turn.extras, *more),
            asides=len(records),
            written=False,
        )

    def _prepared_step(self, step: DoStep, turn: Turn) -> Turn:
        standing, records = self._standing, turn.records
        self._step = step
        if not standing.returned and not step.earlier:
            return turn  # what is neither resumed nor repeated: nearly every step
        for recorded in self._died_in(step):
            records = (*records, recorded)
            step = with_earlier(step, recorded)
        executions = standing.executions(step)
        if executions and executions[-1].outcome == "interrupted" and step.step.on_crash == "hold":
            return msgspec.structs.replace(turn, decision=held(step), records=records)
        due_in = standing.due_in(step.path)
        if due_in is not None and due_in > 0 and not records:
            return msgspec.structs.replace(turn, decision=Park(step.path, standing.cut_by_deadline(due_in)))
        self._step = step
        return msgspec.structs.replace(turn, decision=step, records=records)

    def _died_in(self, step: DoStep) -> tuple[Record, ...]:
        """Return the record of the execution in which the last claim died, if it was one of this step."""
        standing = self._standing
        here = standing.doing == step.path or (standing.doing is None and not step.step.is_careful)
        if not (standing.interrupted and here):
            return ()
        standing.interrupted = False
        return (standing.record_interruption(step),)

    def _prepared_sleep(self, sleep: Sleep, turn: Turn) -> Turn:
        standing = self._standing
        left = standing.due_in(sleep.path)
        if left is None:
            left = (
                (sleep.until - standing.now()).total_seconds()
                if sleep.until is not None
                else sleep.seconds or 0.0
            )
        if left <= 0:
            recorded = standing.record_sleep(sleep.path)
            decision: Any = self._delivered(recorded)
            return msgspec.structs.replace(turn, decision=decision, records=(*turn.records, recorded))
        remaining = standing.remaining()
        if sleep.until is not None and (remaining is None or left < remaining):
            park = Park(sleep.path, None, sleep.until)
        else:
            park = Park(sleep.path, standing.cut_by_deadline(left))
        return msgspec.structs.replace(turn, decision=park)

    def _prepared_await(self, awaiting: Await, turn: Turn) -> Turn:
        """Take what has come of what is waited for; else spread what is to be executed, and park."""
        assert self._replay is not None
        standing = self._standing
        if len(awaiting.waits) == 1:
            ((wait,),) = (awaiting.waits,)
            if type(wait.call) in (DoStep, Sleep) and wait.call.path == standing.doing and not wait.fresh:
                return msgspec.structs.replace(turn, decision=wait.call)
        try:
            taken = self._mailbox.take(awaiting, standing, self._replay)
        except OversizeError as error:
            return msgspec.structs.replace(turn, decision=self._oversize_signal(error.mail))
        except PayloadError as error:
            return msgspec.structs.replace(turn, decision=unopened(error))
        if taken.records:
            return msgspec.structs.replace(
                turn,
                decision=self._replay.decide(),
                records=(*turn.records, *taken.records),
                extras=(*turn.extras, *taken.extras),
                took=turn.took + taken.signals,
                strict=turn.strict or self._replay.branched,
            )
        step = held_only(awaiting, standing)
        if step is not None:
            return msgspec.structs.replace(turn, decision=held(step))
        parking, rows = spread(awaiting, standing)
        return msgspec.structs.replace(turn, decision=parking, extras=(*turn.extras, *rows))
