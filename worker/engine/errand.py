"""Execute one step that is a task of its own: a branch of a join, or one with a queue of its own.

The loop, the retries and the fence are those of `worker.engine.claimed`. What is different is the end: nobody drives a
body here, the task is done, and the database tells the run.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from outbox.codec import fingerprint
from outbox.errors import PayloadError
from worker.definitions import Step
from worker.engine.claimed import Claimed
from worker.engine.claims import Claim, max_passed_bytes
from worker.engine.means import Means
from worker.engine.reports import too_large
from worker.engine.sealed import ErrandSeals, opened_arguments, opened_records, unopened
from worker.engine.turns import Done, Hold, Park, Standing, Turn, with_earlier
from worker.replay.decisions import DoStep, Fail
from worker.replay.records import Record, visible

logger = logging.getLogger(__name__)


class Errand(Claimed):
    """One claim of one step. `history` is what is recorded of this call, its epochs' openings included."""

    def __init__(
        self, claim: Claim, step: Step[..., Any], history: list[Record], means: Means, claimed_at: float
    ) -> None:
        self._seals = ErrandSeals(means.keyring, claim.workflow) if means.keyring else None
        super().__init__(claim, Standing(claim, history, claimed_at, self._seals), means)
        self._step = step
        self._history = history

    async def _opening(self) -> Turn:
        standing = self._standing
        if self.claim.oversize is not None:
            limit = max_passed_bytes(self._means.settings.max_payload_bytes)
            what = f"the arguments of step {self._step.name!r}"
            return await self._objected(
                too_large(what, self.claim.oversize, limit, "raise the limit and retry")
            )
        try:
            step = self._opened()
        except PayloadError as error:
            return await self._objected(unopened(error))
        records: tuple[Record, ...] = ()
        if standing.interrupted:
            standing.interrupted = False
            recorded = standing.record_interruption(step)
            records = (recorded,)
            step = with_earlier(step, recorded)
        if self.claim.cancelling:
            return Turn(Done(), records)
        executions = standing.executions(step)
        if executions and executions[-1].outcome == "interrupted" and step.step.on_crash == "hold":
            return Turn(Hold(), records)
        due_in = standing.due_in(step.path)
        if due_in is not None and due_in > 0 and not records:
            return Turn(Park(step.path, due_in))
        return Turn(step, records)

    def _opened(self) -> DoStep:
        """Return what is to be executed. Raises PayloadError."""
        claim, keyring = self.claim, self._means.keyring
        arguments, mark = opened_arguments(claim.args or "{}", keyring, claim.name)
        if self._seals is not None:
            self._seals.mark = mark
        earlier = tuple(opened_records(_earlier(self._history), keyring))
        path = tuple(claim.path)
        return DoStep(path, self._step, arguments, fingerprint(arguments), earlier, drift=False)

    def _prepared(self, turn: Turn) -> Turn:
        """Return the turn: it is the run that fails when its deadline has passed, and it is told."""
        return msgspec.structs.replace(turn, decision=Done()) if isinstance(turn.decision, Fail) else turn

    def _concluded(self, record: Record) -> Turn:
        return Turn(Done(), (record,))

    def _log_lost(self) -> None:
        logger.info(
            "a step's claim was lost, or its run has ended without it; its write was refused",
            extra={"run_id": str(self.claim.run_id)},
        )

    def _cancelled(self, records: tuple[Record, ...] = ()) -> Turn:
        return Turn(Done(), records)

    def _expired(self, records: tuple[Record, ...] = ()) -> Turn:
        return Turn(Done(), records)

    def _held(self, step: DoStep, records: tuple[Record, ...]) -> Turn:  # noqa: ARG002 - the run says which it was
        return Turn(Hold(), records)


def _earlier(history: list[Record]) -> list[Record]:
    """Return the executions that have come before, those that a retry has voided among them."""
    return [record for record in visible(history) if record.n and record.kind == "step"]
