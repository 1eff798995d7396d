"""The scripted kills: one worker at a third of the runs, the whole process tree at two thirds.

A kill waits until what it hits has work in flight, and the second also until the first is recovered from,
so that each is measured for itself. `recovery_seconds` is the time from the SIGKILL until no task is
claimed by the killed workers any more: from then on others may take all that they had begun.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import psycopg

from worker.demo.processes import Workers
from worker.demo.queries import load
from worker.demo.report import Kill, tasks


@dataclass
class Strike:
    """One kill that has happened."""

    what: str
    worker_ids: list[int]
    claims: int
    at: float
    """On the monotonic clock."""
    recovery_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """A live worker and how much it holds."""

    worker_id: int
    pid: int
    claims: int


class Kills:
    """Strike when it is due, and watch how long what was struck stays claimed. Call `tick` often."""

    def __init__(self, connection: psycopg.Connection[Any], workers: Workers, runs: int) -> None:
        self._connection = connection
        self._workers = workers
        self._due_at = (runs // 3, runs * 2 // 3)
        self._strikes: list[Strike] = []

    def tick(self, ended: int) -> str | None:
        """Do what is due with `ended` runs; return what has happened, for people, if anything has."""
        last = self._strikes[-1] if self._strikes else None
        if last is not None and last.recovery_seconds is None:
            return self._look_at(last)
        if len(self._strikes) == len(self._due_at) or ended < self._due_at[len(self._strikes)]:
            return None
        return self._strike_tree() if self._strikes else self._strike_worker()

    @property
    def pending(self) -> bool:
        """Tell whether a killed worker still holds something."""
        return any(strike.recovery_seconds is None for strike in self._strikes)

    def results(self) -> list[Kill]:
        """Return the kills that have happened."""
        return [Kill(strike.what, strike.claims, strike.recovery_seconds) for strike in self._strikes]

    def _strike_worker(self) -> str | None:
        victim = next(iter(self._holders()), None)
        if victim is None or not victim.claims:
            return None
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself: the next look finds another
            return None
        self._strikes.append(Strike("a worker", [victim.worker_id], victim.claims, time.monotonic()))
        return f"kill -9 of worker process {victim.pid}, which holds {tasks(victim.claims)}"

    def _strike_tree(self) -> str | None:
        victims = self._holders()
        claims = sum(victim.claims for victim in victims)
        supervisor = self._workers.pid
        if not claims or supervisor is None:
            return None
        self._workers.kill_tree([victim.pid for victim in victims])
        at = time.monotonic()
        # Whoever is listed now is dead: nobody has been started since.
        ids = [holder.worker_id for holder in self._holders()]
        self._strikes.append(Strike("the whole tree", ids, claims, at))
        self._workers.start()
        return f"kill -9 of the supervisor {supervisor} and all below it, which hold {tasks(claims)}; starting anew"

    def _look_at(self, strike: Strike) -> str | None:
        row = self._connection.execute(load("claims_of"), (strike.worker_ids,)).fetchone()
        if row is None or row[0]:
            return None
        strike.recovery_seconds = time.monotonic() - strike.at
        return f"nothing is held by the dead any more after {strike.recovery_seconds:.2f} s"

    def _holders(self) -> list[Holder]:
        return [Holder(*row) for row in self._connection.execute(load("holders")).fetchall()]
