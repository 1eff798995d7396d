"""What is measured of each system. A function takes one measurement on a fresh database and returns its figures.

A figure that is NaN was asked for and not reached within the time that it is given.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg

from benchmarks.machine import Bench, stuck_transaction, wait_for
from benchmarks.peers.stage import OUR_APPLICATION, FailedError, Stage, stage
from benchmarks.peers.systems import STEPS, System, UnavailableError

Figures = dict[str, float]

WARM = 0.05
"""The part of the runs that is not counted: workers open connections, load code, fill caches."""
WARMING = 20
"""How many runs have started before latencies are measured."""
DRAIN_SECONDS = 300.0
OVER_SECONDS = 60.0
"""How long what has taken effect may take to be recorded."""
RECOVERY_SECONDS = 180.0
IDLE_SECONDS = 10.0
SLEEPERS_SECONDS = 120.0
BACKLOG_SECONDS = 120.0
"""How long a backlog may take to be enqueued."""


class TooFewError(FailedError):
    """The runs were over too soon. `runs_per_second` has the right order of magnitude, and no more."""

    def __init__(self, runs: int, runs_per_second: float) -> None:
        super().__init__(f"{runs} runs are over before they can be measured")
        self.runs_per_second = runs_per_second


def drain(
    bench: Bench, system: System, work: str, processes: int, runs: int, *, stuck: bool = False
) -> Figures:
    """Drain runs that were enqueued beforehand; count every effect; say what each run has cost.

    `stuck`: a transaction that began before they were enqueued stays open meanwhile. Raises TooFewError.
    """
    with stage(bench, system) as on, contextlib.ExitStack() as open_transactions:
        if stuck:
            open_transactions.enter_context(stuck_transaction(on.url, application_name=OUR_APPLICATION))
        on.enqueue(work, runs)
        if not stuck:
            on.settle()
        return _drained(on, work, processes, runs)


def _drained(on: Stage, work: str, processes: int, runs: int, *, of: int | None = None) -> Figures:
    """Start the workers and drain `runs`, all that there are unless `of` says how many there are."""
    steps = STEPS[work]
    at_first, started = on.cost(), time.monotonic()
    for _ in range(processes):
        on.start_worker()
    on.wait_for_effects(max(1, int(runs * steps * WARM)), DRAIN_SECONDS, every=0.002)
    before = on.cost()
    began, early = time.monotonic(), on.took_effect()
    on.wait_for_effects(runs * steps, DRAIN_SECONDS, every=0.002)
    ended, late, after = time.monotonic(), on.took_effect(), on.cost()
    counted = (late - early) / steps
    if counted < runs / 2:
        raise TooFewError(runs, runs / (ended - started))
    figures = {"runs_per_second": counted / (ended - began)}
    if of is not None:
        return figures
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: on.left() == 0, OVER_SECONDS, every=0.1)
    if left := on.left():
        raise FailedError(f"{left} of {runs} runs are not over although every step took effect")
    if on.took_effect() != runs * steps:
        raise FailedError(f"{on.took_effect()} effects instead of {runs * steps}")
    on.stop()  # a backend says how much it has committed now and then, and at its end
    commits = on.cost().commits - at_first.commits
    return figures | after.since(before, counted) | {"commits_per_run": commits / runs}


def enqueue(bench: Bench, system: System, mode: str, runs: int) -> Figures:
    """Enqueue from one client, one by one or in bulk."""
    with stage(bench, system) as on:
        seconds = on.enqueue(system.first_work(), runs, mode)
        if (left := on.left()) != runs:
            raise FailedError(f"{left} of {runs} runs were enqueued")
        return {"runs_per_second": runs / seconds}


def latency(bench: Bench, system: System, processes: int, count: int, per_second: float) -> Figures:
    """Enqueue at a steady rate, one by one, and see when each step starts."""
    with stage(bench, system) as on:
        for _ in range(processes):
            on.start_worker()
        on.run("drip", WARMING, 20)  # everything is loaded
        wait_for(lambda: len(on.marked()) >= WARMING, OVER_SECONDS)
        enqueued = {
            word: int(at)
            for word, at in (line.split() for line in on.run("drip", count, per_second).splitlines())
        }
        try:
            wait_for(lambda: len(on.marked()) >= WARMING + count, OVER_SECONDS, every=0.05)
        except TimeoutError:
            raise FailedError(f"{len(on.marked()) - WARMING} of {count} runs have started") from None
        waits = sorted((at - enqueued[word]) / 1e6 for word, at, _ in on.marked()[WARMING:])
        took = (max(enqueued.values()) - min(enqueued.values())) / 1e9
        return {
            "p50_ms": statistics.median(waits),
            "p99_ms": waits[math.ceil(0.99 * len(waits)) - 1],
            "enqueued_per_second": (count - 1) / took,
        }


def recovery(bench: Bench, system: System, number: signal.Signals) -> Figures:
    """Kill or stop the process that executes a second step, and see when another process executes it."""
    with stage(bench, system) as on:
        for _ in range(2):
            on.start_worker()
        on.enqueue("linger", 1)
        wait_for(lambda: any(word == "second" for word, _, _ in on.marked()), OVER_SECONDS)
        (victim,) = (pid for word, _, pid in on.marked() if word == "second")
        struck = time.monotonic_ns()
        os.kill(victim, number)
        figures = {"seconds": math.nan}
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: [w for w, _, _ in on.marked()].count("second") > 1, RECOVERY_SECONDS)
            again = next(at for word, at, pid in on.marked() if word == "second" and at > struck)
            figures["seconds"] = (again - struck) / 1e9
        figures["first_step_repeated"] = Counter(word for word, _, _ in on.marked())["first"] - 1.0
        return figures


def recoveries(bench: Bench, systems: list[System], number: signal.Signals) -> dict[str, Figures | str]:
    """Measure `recovery` of many systems at once: nearly all of it is waiting."""

    def one(system: System) -> Figures | str:
        try:
            return recovery(bench, system, number)
        except (FailedError, UnavailableError, TimeoutError, psycopg.Error) as error:
            return str(error)

    with ThreadPoolExecutor(len(systems)) as threads:
        return dict(zip((each.name for each in systems), threads.map(one, systems), strict=True))


def backlog(bench: Bench, system: System, waiting: int, runs: int) -> Figures:
    """Drain the first runs of a backlog."""
    with stage(bench, system) as on:
        on.enqueue(system.first_work(), waiting)
        on.settle()
        return _drained(
            on, system.first_work(), 1, runs, of=waiting
        )  # the first of two would have the small one for itself


def idle(bench: Bench, system: System) -> Figures:
    """Leave one worker idle, and see what it costs."""
    with stage(bench, system) as on:
        on.start_worker()
        on.enqueue(system.first_work(), 20)
        on.wait_for_effects(20, OVER_SECONDS)
        wait_for(lambda: on.left() == 0, OVER_SECONDS)
        time.sleep(2)
        before, began = on.cost(), time.monotonic()
        time.sleep(IDLE_SECONDS)
        after, seconds = on.cost(), time.monotonic() - began
        figures = {
            "percent_of_a_core": 100 * (after.worker_cpu - before.worker_cpu) / seconds,
            "commits_per_second": (after.commits - before.commits) / seconds,
            "memory_mb": on.memory_mb(),
        }
        if after.statements is not None and before.statements is not None:
            figures["statements_per_second"] = (after.statements - before.statements) / seconds
        return figures


def sleepers(bench: Bench, system: System, sleeping: int) -> Figures:
    """Put so many runs to sleep, and see what one worker holds meanwhile."""
    with stage(bench, system) as on:
        on.start_worker()
        before = on.memory_mb()
        on.enqueue("sleep", sleeping)
        settled_at = time.monotonic() + SLEEPERS_SECONDS
        last = -1.0
        while time.monotonic() < settled_at:  # until all have come to their sleep: nobody is at work any more
            spent = on.cost().worker_cpu
            if spent - last < 0.2:
                break
            last = spent
            time.sleep(2)
        return {"memory_mb": on.memory_mb(), "memory_mb_before": before, "sleeping": float(on.left())}
