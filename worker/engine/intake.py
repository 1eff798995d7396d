"""From claims to what works on them: read what each claim needs to know, and give it the steps and workflows it names."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from worker.engine.advance import Advance
from worker.engine.claimed import Claimed
from worker.engine.claims import Claim, Claimant
from worker.engine.errand import Errand
from worker.engine.means import Means
from worker.registry import Registry


class Intake:
    """Takes claims of runs and of steps in, for one engine."""

    def __init__(self, claimant: Claimant, registry: Registry, means: Means) -> None:
        self._claimant = claimant
        self._workflows = registry.workflows
        self._steps = {step.claimed_as: step for step in registry.steps.values()}
        self._means = means

    @property
    def names(self) -> list[str]:
        """What a claim has to name to be taken here, sorted."""
        return sorted({*self._workflows, *self._steps})

    async def taken(self, claims: Sequence[Claim]) -> AsyncIterator[Claimed]:
        """Yield what works on each of these claims: runs first, wakes and timers not at all."""
        now = time.monotonic()
        runs = [claim for claim in claims if claim.kind == "run"]
        steps = [claim for claim in claims if claim.kind == "step"]
        known = [claim for claim in runs if claim.seq > 0]
        histories = await self._claimant.histories(known) if known else {}
        addressed = [claim.run_id for claim in runs if claim.signals]
        mail = await self._claimant.mail(addressed) if addressed else {}
        for claim in runs:
            history, sent = histories.get(claim.run_id, []), mail.get(claim.run_id, [])
            workflow = self._workflows[claim.name]
            yield Advance(claim, workflow, history, sent, self._means, now)
        for claim in steps:
            known_before = claim.attempt > 1 or claim.epoch > claim.base_epoch
            past = await self._claimant.step_history(claim) if known_before else []
            yield Errand(claim, self._steps[claim.name], past, self._means, now)
