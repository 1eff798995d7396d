"""How long a supervisor may take to end: what whoever stops it from outside has to wait for."""

from __future__ import annotations

from worker.supervision import supervisor


def longest_stop_seconds(grace_seconds: float) -> float:
    """Return the seconds from SIGTERM until a supervisor has ended, at the most."""
    for_children = supervisor.MARGIN_SECONDS + supervisor.STOP_SECONDS + supervisor.SETTLE_SECONDS
    for_obituaries = supervisor.SETTLE_SECONDS
    return grace_seconds + for_children + for_obituaries
