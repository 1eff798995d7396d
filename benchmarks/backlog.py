"""What is measured of a queue that is very long, or that an old transaction keeps from being cleaned up."""

from __future__ import annotations

import time

from benchmarks.machine import Bench, stuck_transaction, wait_for
from outbox.database import connect

SHORT = 10_000
CHUNK = 50_000
"""Runs that one transaction enqueues."""
PROCESSES = (1, 2, 4)
STUCK = "beside_a_stuck_transaction"
LOAD = """
select count(*) from stepwell.enqueue_many(
    'one_step', array(select json_build_object('n', n) from generate_series(%s::bigint, %s) n))
"""


def growth(bench: Bench, waiting: int) -> dict[str, float]:
    """Drain the first runs of so long a queue, and of a short one before and after it: runs per second, and the ratio.

    Both with one, two and four worker processes, and with two beside a transaction that is older than all of it. It takes
    minutes to enqueue ten million runs, and 15 GB of disk.
    """
    short = [_rates(bench, SHORT)]
    long = _rates(bench, waiting)
    short.append(_rates(bench, SHORT))
    figures: dict[str, float] = {}
    for name, rate in long.items():
        figures[f"{name}_runs_per_second"] = rate
        figures[f"{name}_by_short"] = rate / (sum(each[name] for each in short) / len(short))
    figures[f"{STUCK}_by_none"] = long[STUCK] / long[_named(2)]
    return figures


def _rates(bench: Bench, waiting: int) -> dict[str, float]:
    url = bench.fresh()
    _load(url, 1, waiting)
    rates = {}
    for processes in PROCESSES:
        rates[_named(processes)] = _rate(bench, url, processes)
        _load(url, 1, SHORT)  # as many as were drained, at the end of the queue
    with stuck_transaction(url, application_name="bench"):
        _load(url, 1, SHORT)
        rates[STUCK] = _rate(bench, url, 2)
    return rates


def _named(processes: int) -> str:
    return f"{processes}_process{'es' * (processes > 1)}"


def _load(url: str, first: int, last: int) -> None:
    with connect(url, application_name="bench") as db:
        for start in range(first, last + 1, CHUNK):
            db.execute(LOAD, (start, min(last, start + CHUNK - 1)))
        if last > SHORT:
            db.execute("vacuum analyze stepwell.tasks")
        db.execute("checkpoint")


def _rate(bench: Bench, url: str, processes: int) -> float:
    """Drain 9,000 runs, the first 1,000 uncounted."""
    with connect(url, application_name="bench") as db:

        def done() -> int:
            row = db.execute(
                "select coalesce(sum(value), 0)::int from stepwell.counters where kind = 'run'"
            ).fetchone()
            return int(row[0]) if row else 0

        before = done()
        with bench.workers(url, processes):
            wait_for(lambda: done() - before >= SHORT // 10, 120, every=0.002)
            began, early = time.monotonic(), done()
            wait_for(lambda: done() - before >= SHORT * 9 // 10, 120, every=0.002)
            return (done() - early) / (time.monotonic() - began)
