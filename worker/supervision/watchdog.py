"""What whoever watches a worker process makes of what it says of itself. Pure: time is an argument.

The supervisor watches its children by these rules, and every supervisor the workers of the others (see
`worker.supervision.liveness`). Both judge by changes that they have seen themselves on their own monotonic clock, never by
time stamps that somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Hashable

from outbox.settings import Settings
from worker.engine.vitals import Vitals

LOOK_SECONDS = 0.25
"""How often a supervisor looks at each of its children."""
LOADING_SECONDS = 300.0
"""How long a child may take until its first beat. It holds nothing yet; and where the machine is so busy that loading
takes long, killing what loads only adds to that."""
LONGEST_GAP_SECONDS = 1.0
"""What a gap between two such looks counts at most."""


class Unchanged:
    """For how long a value has not changed, as far as somebody was there to see it.

    A gap between two looks counts as `longest_gap_seconds` at most: whoever was away himself (stopped, waiting
    for a lock, on a machine that slept) has seen nothing and must not hold the others for dead.
    """

    def __init__(self, longest_gap_seconds: float) -> None:
        self._longest_gap_seconds = longest_gap_seconds
        self._value: Hashable = self  # equal to nothing that is ever seen
        self._seen_at = 0.0
        self._seconds = 0.0

    def see(self, value: Hashable, now: float) -> float:
        """Look at `value` at the monotonic time `now`; return the seconds for which it has not changed."""
        if value == self._value:
            self._seconds += min(now - self._seen_at, self._longest_gap_seconds)
        else:
            self._value, self._seconds = value, 0.0
        self._seen_at = now
        return self._seconds


class Watchdog:
    """Says when a child has to be killed, and why.

    Stopped (state T) is judged apart and sooner: such a process holds its claims and its connections, and
    nothing of it can come back by itself.
    """

    def __init__(self, settings: Settings) -> None:
        self._stopped_after_seconds = settings.stopped_after_seconds
        self._hang_after_seconds = settings.hang_after_seconds
        self._stopped = Unchanged(LONGEST_GAP_SECONDS)
        self._beats = Unchanged(LONGEST_GAP_SECONDS)
        self._flushes = Unchanged(LONGEST_GAP_SECONDS)

    def look(self, *, stopped: bool, beats: int, vitals: Vitals | None, now: float) -> str | None:
        """Return why the child has to be killed, None while it has not.

        `beats` counts the beats received so far; `vitals` is what the last one said.
        """
        stopped_seconds = self._stopped.see(stopped, now)
        silent_seconds = self._beats.see(beats, now)
        stuck = vitals is not None and vitals.connected and vitals.pending > 0
        stuck_seconds = self._flushes.see((stuck, vitals.flushes if vitals else 0), now)
        if stopped and stopped_seconds >= self._stopped_after_seconds:
            return f"it has been stopped for {stopped_seconds:.1f} s"
        if not beats:
            slow = silent_seconds >= max(LOADING_SECONDS, self._hang_after_seconds)
            return f"it is still loading after {silent_seconds:.0f} s" if slow else None
        if silent_seconds >= self._hang_after_seconds:
            return f"its event loop has not answered for {silent_seconds:.1f} s"
        if stuck and stuck_seconds >= self._hang_after_seconds:
            return f"its committer is connected but has made no progress for {stuck_seconds:.1f} s"
        return None
