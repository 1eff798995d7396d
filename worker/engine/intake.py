"""From claims to what works on them: read what each claim needs to know, and give it the steps and workflows it names."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from worker.engine.advance import Advance
from worker.engine.claimed import Claimed
from worker.engine.claims import Claim, Claimant, Mail
from worker.engine.errand import Errand
from worker.engine.means import Means
from worker.engine.watch import Watcher
from worker.registry import Registry
from worker.replay.records import Record


class Intake:
    """Takes claims of runs and of steps in, for one engine. `watcher` is None where nobody wants to know of them."""

    def __init__(self, claimant: Claimant, registry: Registry, means: Means, watcher: Watcher | None) -> None:
        self._claimant = claimant
        self._workflows = registry.workflows
        self._steps = {step.claimed_as: step for step in registry.steps.values()}
        self._means = means
        self._watcher = watcher

    async def taken(self, claims: Sequence[Claim], queue: str) -> AsyncIterator[Claimed]:
        """Yield what works on each of these claims, which are of one queue: runs first, wakes and timers not at all."""
        now, received_at = time.monotonic(), time.time_ns()
        runs = [claim for claim in claims if claim.kind == "run"]
        steps = [claim for claim in claims if claim.kind == "step"]
        known = [claim for claim in runs if claim.seq > 0]
        histories = await self._claimant.histories(known) if known else {}
        addressed = [claim.run_id for claim in runs if claim.signals]
        mail = await self._claimant.mail(addressed) if addressed else {}
        contexts = {}
        if self._watcher is not None and self._watcher.traces and (runs or steps):
            contexts = await self._claimant.traces([claim.run_id for claim in (*runs, *steps)])

        def watched(claimed: Claimed, history: Sequence[Record], sent: Sequence[Mail] = ()) -> Claimed:
            if self._watcher is not None:
                stored = contexts.get(claimed.claim.run_id)
                claimed.watch = self._watcher.watch(claimed.claim, queue, stored, history, sent, received_at)
            return claimed

        for claim in runs:
            history, sent = histories.get(claim.run_id, []), mail.get(claim.run_id, [])
            workflow = self._workflows[claim.name]
            yield watched(Advance(claim, workflow, history, sent, self._means, now), history, sent)
        for claim in steps:
            known_before = claim.attempt > 1 or claim.epoch > claim.base_epoch
            past = await self._claimant.step_history(claim) if known_before else []
            yield watched(Errand(claim, self._steps[claim.name], past, self._means, now), past)
