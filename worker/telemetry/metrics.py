"""What the worker processes count and time, as prometheus_client objects.

The names are those of the metrics without their prefix, so that call sites read as sentences:
``metrics.CLAIMS.inc(3)``. What is timed for each step or run goes through a `Tally`. `prometheus_client` decides at its first import, by ``PROMETHEUS_MULTIPROC_DIR``,
whether values live in memory or in files that every process of a supervisor shares; the supervisor's
command sets the variable before it imports this module, and its children inherit it. Without it (a test,
a REPL) the objects count in memory and nobody serves them.

Files may lose what a killed process had not written, so these are good for rates and latencies. Totals that
must be exact (``stepwell_runs_total``, ``stepwell_steps_total``, ``stepwell_reclaims_total``) are counted by the
database instead; see `worker.telemetry.snapshot`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Callable
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

# Seconds between half a millisecond, what a commit on a fast disk takes, and ten minutes.
_BRIEF = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)

CLAIMS = Counter("stepwell_claims_total", "Tasks claimed.")
CLAIM_WAIT = Histogram(
    "stepwell_claim_wait_seconds",
    "Time from when a task was due (or enqueued) until a worker claimed it.",
    buckets=_LONG,
)
COMMIT_BATCH = Histogram(
    "stepwell_commit_batch_size",
    "Transitions in one flush of a worker's group commit.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
)
COMMIT_SECONDS = Histogram(
    "stepwell_commit_seconds", "Time of one flush, from sending it until it is durable.", buckets=_BRIEF
)
FENCED = Counter("stepwell_fenced_writes_total", "Transitions refused because the claim had been lost.")
DRIFT = Counter(
    "stepwell_replay_drift_total", "Replayed calls whose arguments differ from those that were recorded."
)
SLOTS = Gauge(
    "stepwell_slots",
    "Places for runs in flight of the live worker processes, by state: busy or free.",
    ["state"],
    multiprocess_mode="livesum",
)
LOOP_LAG = Histogram(
    "stepwell_loop_lag_seconds",
    "How much later than due a worker's event loop woke up; high when a step blocks the loop.",
    buckets=_BRIEF,
)
STEP_SECONDS = Histogram(
    "stepwell_step_seconds", "Time of one execution of a step, however it ended.", ["step"], buckets=_LONG
)
RUN_SECONDS = Histogram(
    "stepwell_run_seconds",
    "Time from the first claim of a run until its end, waits included.",
    ["workflow"],
    buckets=_LONG,
)


class Tally:
    """Observations of one histogram, handed over in bulk.

    Observing them one by one takes a twentieth of what it costs to drive a run of short steps. Used in one thread.
    """

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._seen: list[float] = []
        self.observe: Callable[[float], None] = self._seen.append
        _tallies.append(self)

    def hand_over(self) -> None:
        """Observe what was seen since the last time: as `Histogram.observe` does, with one addition for each bucket."""
        histogram: Any = self._histogram
        if self._seen:
            bounds = histogram._upper_bounds  # noqa: SLF001 - theirs has no way to add many; a test compares
            for bucket, count in Counted(bisect_left(bounds, value) for value in self._seen).items():
                histogram._buckets[bucket].inc(count)  # noqa: SLF001 - as above
            histogram._sum.inc(sum(self._seen))  # noqa: SLF001 - as above
            self._seen.clear()


_tallies: list[Tally] = []


def hand_over() -> None:
    """Hand over what all tallies of this process have seen."""
    for tally in _tallies:
        tally.hand_over()


claim_wait = Tally(CLAIM_WAIT)


def count_slots(busy: int, concurrency: int) -> None:
    """Say how many places for runs in flight are taken, out of how many."""
    SLOTS.labels("busy").set(busy)
    SLOTS.labels("free").set(max(0, concurrency - busy))


@cache
def step_seconds(step: str) -> Tally:
    """Return the tally of one step."""
    return Tally(STEP_SECONDS.labels(step))


@cache
def run_seconds(workflow: str) -> Tally:
    """Return the tally of one workflow."""
    return Tally(RUN_SECONDS.labels(workflow))
