"""Small bounded loops that any worker may run: due timers, strays, names that nobody knows, suspects.

All of it is idempotent and skips what another worker has locked, so any number of workers do it side by side.
It shares the claimant's connection; a lost connection delays it and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from worker.engine.claims import Claimant, Held
from worker.engine.committer import Committer
from worker.engine.transitions import Transition, Writing

TICK_SECONDS = 1.0
"""The longest pause between two looks at the timers. A new timer of this process, or a ring, ends it sooner."""
HOUSEKEEPING_SECONDS = 6.0
PROMOTE_AT_MOST = 1000
SET_ASIDE_AT_MOST = 5000


class Caretaker:
    """Cares for `queues`. `held` returns the tasks that the engine knows it holds, `on_ready` wakes it.

    `on_cancelled` is told which of the tasks that are claimed here are to be cancelled. While `is_rung_for` says no,
    nobody else tells of them, and they are looked for at each turn.
    """

    def __init__(
        self,
        claimant: Claimant,
        committer: Committer,
        queues: Sequence[str],
        names: Sequence[str],
        held: Callable[[], set[int]],
        on_ready: Callable[[], None],
        on_cancelled: Callable[[Sequence[int]], None],
        is_rung_for: Callable[[], bool],
    ) -> None:
        self.suspects = False
        self._claimant = claimant
        self._committer = committer
        self._queues = list(queues)
        self._names = list(names)
        self._held = held
        self._on_ready = on_ready
        self._on_cancelled = on_cancelled
        self._is_rung_for = is_rung_for
        self._suspicious: set[Held] = set()
        self._connections = 0
        self._poked = asyncio.Event()
        self._house_kept_at = 0.0

    def poke(self) -> None:
        """Look at the timers now: one may have come that is due sooner."""
        self._poked.set()

    async def run(self) -> None:
        """Care, for ever."""
        while True:
            self._poked.clear()
            pause = await self.run_once()
            with contextlib.suppress(TimeoutError):  # not wait_for, see Engine._wait
                async with asyncio.timeout(pause):
                    await self._poked.wait()

    async def run_once(self) -> float:
        """Do what is due; return for how long nothing will be, in seconds."""
        promoted, next_in = await self._claimant.promote(PROMOTE_AT_MOST)
        if promoted:
            self._on_ready()
        if promoted == PROMOTE_AT_MOST:
            return 0.0
        reconnected = self._connections != self._claimant.connections
        now = time.monotonic()
        if reconnected or now - self._house_kept_at >= (
            TICK_SECONDS if self._suspicious else HOUSEKEEPING_SECONDS
        ):
            self._connections = self._claimant.connections
            self._house_kept_at = now
            await self._keep_house()
        elif not self._is_rung_for() and self._held():
            await self.look_for_cancellations()
        return TICK_SECONDS if next_in is None else min(max(next_in, 0.0), TICK_SECONDS)

    async def look_for_cancellations(self) -> None:
        """Tell the engine which of its runs are to be cancelled."""
        self._on_cancelled([each.task for each in await self._claimant.audit() if each.cancelling])

    async def _keep_house(self) -> None:
        await self._audit()
        for queue in self._queues:
            while await self._claimant.shelve(queue, SET_ASIDE_AT_MOST) >= SET_ASIDE_AT_MOST:
                pass
        if await self._claimant.unshelve(self._queues, self._names, SET_ASIDE_AT_MOST):
            self._on_ready()
        self.suspects = await self._claimant.suspects(self._queues, self._names)
        if self.suspects:
            self._on_ready()

    async def _audit(self) -> None:
        """Release claims that the database knows of and the engine does not.

        Only what was stray at two audits in a row: between the two a claim that was just being answered, or a
        flush that was just under way, has come through.
        """
        claimed = await self._claimant.audit()
        held = self._held()
        self._on_cancelled([each.task for each in claimed if each.cancelling])
        strays = {stray for stray in claimed if stray.task not in held}
        for stray in strays & self._suspicious:
            await self._committer.commit(
                Writing(
                    Transition(
                        stray.task, stray.attempt, stray.position, stray.run_id, 0, "release", wakeups=0
                    )
                )
            )
        self._suspicious = strays - self._suspicious
