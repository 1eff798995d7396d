"""What one look at the database finds, and the metrics that it becomes.

`read_totals` is cheap and made for each scrape; `read_depths` reads the whole task table, so the exporter spaces it.
Neither locks anything. What the database does not know, or will not tell this role, is absent or zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from worker.queries import load

TASK_STATES = ("ready", "claimed", "waiting", "shelved", "suspect", "paused")
DETECTORS = ("obituary", "lost_lock", "lease")

Labels = TypeVar("Labels", bound=tuple[str, ...])
Totals = Mapping[tuple[str, str, str], int]
"""(kind, name, outcome) → how many: ends of runs, outcomes of steps, workers that were declared dead."""


@dataclass(frozen=True, slots=True)
class Table:
    """How much room a table takes, with its indexes, and how many of its rows wait for vacuum."""

    size_bytes: int
    dead_rows: int


@dataclass(frozen=True, slots=True)
class Depths:
    """How full and how healthy the database is, at the time of one look."""

    tasks: dict[tuple[str, str], int]
    queue_workers: dict[str, int]
    oldest_ready_seconds: dict[str, float]
    blocked: int
    workers: int
    oldest_transaction_seconds: float
    tables: dict[str, Table]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one look found."""

    totals: Totals
    depths: Depths


# -- reading -----------------------------------------------------------------------------------------


def read_totals(connection: psycopg.Connection[Any]) -> Totals:
    """Read what was counted by the statements that wrote it."""
    rows = connection.execute(load("exporter_totals")).fetchall()
    return {(kind, name, outcome): count for kind, name, outcome, count in rows}


def read_depths(connection: psycopg.Connection[Any]) -> Depths:
    """Count the queues, and look at what may hold the database up."""
    tasks: dict[tuple[str, str], int] = {}
    serving: dict[str, int] = defaultdict(int)
    for queue, state, count in connection.execute(load("exporter_queues")):
        tasks |= {(queue, known): tasks.get((queue, known), 0) for known in TASK_STATES}
        if state is None:
            serving[queue] = count
        else:
            tasks[queue, state] = count
    queues = sorted({queue for queue, _ in tasks})
    oldest = dict.fromkeys(queues, 0.0)
    for queue, seconds in connection.execute(load("exporter_oldest_ready"), {"queues": queues}):
        oldest[queue] = max(0.0, seconds)
    row = connection.execute(load("exporter_health")).fetchone()
    assert row is not None  # the statement always answers with one row
    blocked, workers, oldest_transaction = row
    return Depths(
        tasks=tasks,
        queue_workers={queue: serving[queue] for queue in queues},
        oldest_ready_seconds=oldest,
        blocked=blocked,
        workers=workers,
        oldest_transaction_seconds=max(0.0, oldest_transaction),
        tables={name: Table(*rest) for name, *rest in connection.execute(load("exporter_tables"))},
    )


# -- naming ------------------------------------------------------------------------------------------


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what was found as metrics."""
    yield from _totals(snapshot.totals)
    yield from _queues(snapshot.depths)
    yield from _health(snapshot.depths)


def _totals(totals: Totals) -> Iterator[Metric]:
    by_kind: dict[str, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
    for (kind, name, outcome), count in sorted(totals.items()):
        by_kind[kind].append(((name, outcome), count))
    yield _counter("stepwell_runs", "Runs that ended.", ("workflow", "outcome"), by_kind["run"])
    yield _counter("stepwell_steps", "Outcomes of executions of steps.", ("step", "outcome"), by_kind["step"])
    # A rate over a series that begins at its first event misses that event: these are known, so they begin at zero.
    dead = dict.fromkeys(DETECTORS, 0) | {name: count for (name, _), count in by_kind["worker"]}
    yield _counter(
        "stepwell_reclaims",
        "Workers declared dead whose tasks were freed, by what noticed it: obituary, lost_lock or lease.",
        ("detector",),
        (((detector,), count) for detector, count in dead.items()),
    )


def _queues(depths: Depths) -> Iterator[Metric]:
    yield _gauge("stepwell_queue_tasks", "Tasks by queue and state.", ("queue", "state"), depths.tasks)
    yield _gauge(
        "stepwell_queue_workers",
        "Worker processes that claim from the queue.",
        ("queue",),
        _labelled(depths.queue_workers),
    )
    yield _gauge(
        "stepwell_queue_oldest_ready_seconds",
        "For how long the longest ready task of the queue has been ready.",
        ("queue",),
        _labelled(depths.oldest_ready_seconds),
    )


def _health(depths: Depths) -> Iterator[Metric]:
    yield GaugeMetricFamily("stepwell_runs_blocked", "Runs that need a person.", value=depths.blocked)
    yield GaugeMetricFamily(
        "stepwell_workers", "Worker processes registered and not declared dead.", value=depths.workers
    )
    yield GaugeMetricFamily(
        "stepwell_oldest_transaction_seconds",
        "Age of the oldest open transaction of the database; a high one holds back vacuum.",
        value=depths.oldest_transaction_seconds,
    )
    yield _gauge(
        "stepwell_table_bytes",
        "Room that the table takes with its indexes.",
        ("table",),
        _labelled({name: table.size_bytes for name, table in depths.tables.items()}),
    )
    yield _gauge(
        "stepwell_table_dead_rows",
        "Rows of the table that vacuum has not removed yet, as Postgres estimates them.",
        ("table",),
        _labelled({name: table.dead_rows for name, table in depths.tables.items()}),
    )


def _labelled(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(label,): value for label, value in values.items()}


def _counter(
    name: str, documentation: str, labels: Sequence[str], counts: Iterable[tuple[tuple[str, ...], int]]
) -> Metric:
    family = CounterMetricFamily(name, f"{documentation} Exact across any kill.", labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _gauge(name: str, documentation: str, labels: Sequence[str], values: Mapping[Labels, float]) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for labelled, value in sorted(values.items()):
        family.add_metric(labelled, value)
    return family
