"""`python -m benchmarks.peers`: measure Stepwell and the others in turn, and write tables and charts."""

from __future__ import annotations

import functools
import itertools
import json
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import psycopg

from benchmarks import scenarios as ours
from benchmarks.machine import Bench, bench, installed_version
from benchmarks.peers import report, scenarios
from benchmarks.peers.report import Taken
from benchmarks.peers.scenarios import Figures
from benchmarks.peers.stage import FailedError
from benchmarks.peers.systems import ROOT, System, UnavailableError, found

SETTINGS = {"max_connections": "400", "listen_addresses": "127.0.0.1"}
CALIBRATION_RUNS = 200
FEWEST, MOST = 100, 100_000
SLEEPERS_ENQUEUE_SECONDS = 15
"""How long it may take to enqueue runs that sleep, by what a system enqueues while no worker is busy beside it."""
FAILURES = (FailedError, UnavailableError, TimeoutError, psycopg.Error, OSError, subprocess.SubprocessError)


class Session:
    """All measurements of one call, kept in a file as they come."""

    def __init__(self, machine: Bench, systems: list[System], seconds: float, json_file: Path) -> None:
        self.machine = machine
        self.systems = systems
        self.taken: Taken = {}
        self.earlier: Taken = {}
        self.about: dict[str, Any] = {}
        self._seconds = seconds
        self._json_file = json_file
        self.rates: dict[tuple[str, str], float] = {}

    def measure(self, scenario: str, name: str, measuring: Callable[[], Figures]) -> None:
        """Take one measurement, or note why there is none."""
        began = time.monotonic()
        try:
            result: Figures | str = measuring()
        except FAILURES as error:
            result = str(error) or type(error).__name__
        self.note(scenario, name, result, time.monotonic() - began)

    def note(self, scenario: str, name: str, result: Figures | str, seconds: float) -> None:
        self.taken.setdefault(scenario, {}).setdefault(name, []).append(result)
        said = (
            result
            if isinstance(result, str)
            else " · ".join(f"{key.replace('_', ' ')} {value:,.4g}" for key, value in result.items())
        )
        click.echo(f"[{datetime.now(UTC):%H:%M:%S}] {scenario}: {name}: {said}  ({seconds:.0f} s)")
        self._json_file.write_text(
            json.dumps({"about": self.about, "taken": self.all_taken()}, indent=1, allow_nan=True) + "\n"
        )

    def all_taken(self) -> Taken:
        """Return what was measured, with what an earlier call has measured of other scenarios."""
        return self.earlier | self.taken

    def drain(self, system: System, work: str, processes: int, **options: Any) -> Figures:
        """Drain about as many runs as take so many seconds, by what is known of the system's rate."""
        key = (system.name, f"{work} {processes}")
        runs = self._sized(self.rates[key]) if key in self.rates else CALIBRATION_RUNS
        while True:
            try:
                figures = scenarios.drain(self.machine, system, work, processes, runs, **options)
            except scenarios.TooFewError as error:  # over before it could be measured
                if runs == MOST:
                    raise
                rate, wanted = error.runs_per_second, 10 * runs
            else:
                rate = self.rates[key] = figures["runs_per_second"]
                if self._sized(rate) <= 2 * runs:
                    return figures
                wanted = runs
            runs = min(MOST, max(wanted, self._sized(rate)))

    def enqueue(self, system: System, mode: str) -> Figures:
        key = (system.name, f"enqueue {mode}")
        if key not in self.rates:
            self.rates[key] = scenarios.enqueue(self.machine, system, mode, CALIBRATION_RUNS)[
                "runs_per_second"
            ]
        figures = scenarios.enqueue(self.machine, system, mode, self._sized(self.rates[key]))
        self.rates[key] = figures["runs_per_second"]
        return figures

    def half_capacity(self, system: System) -> Figures:
        """Latency at half of what two workers can do, or of what one client can enqueue one by one."""
        work = system.first_work()
        for key, measuring in (
            (f"{work} 2", lambda: self.drain(system, work, 2)),
            ("enqueue single", lambda: self.enqueue(system, "single")),
        ):
            if (system.name, key) not in self.rates:
                measuring()
        rate = min(self.rates[system.name, f"{work} 2"], self.rates[system.name, "enqueue single"]) / 2
        return scenarios.latency(self.machine, system, 2, max(50, int(rate * self._seconds)), rate)

    def backlog(self, system: System, waiting: int) -> Figures:
        enqueued = self.rates.get((system.name, "enqueue bulk"), math.inf)
        if waiting / enqueued > scenarios.BACKLOG_SECONDS:
            raise FailedError(f"left out: to enqueue them would take {waiting / enqueued / 60:.0f} minutes")
        rate = self.rates.get((system.name, f"{system.first_work()} 1"), 1000.0)
        return scenarios.backlog(self.machine, system, waiting, min(self._sized(rate), waiting))

    def _sized(self, rate: float) -> int:
        return max(FEWEST, min(MOST, int(rate * self._seconds)))


def _in_turn(session: Session) -> dict[str, Callable[[System], Figures] | None]:
    """Return what is measured again in each round, by name: system by system."""
    works = {"one step": "one", "two steps": "two", "ten steps": "ten", "jobs": "job"}
    plan: dict[str, Callable[[System], Figures] | None] = {
        "enqueue in bulk": lambda s: session.enqueue(s, "bulk"),
        "enqueue one by one": lambda s: session.enqueue(s, "single"),
    }
    for name, work in works.items():
        for processes in (1, 2):
            plan[f"{name}, {processes} worker{'s' * (processes > 1)}"] = _drained(session, work, processes)
    plan["start, at 20 a second"] = lambda s: scenarios.latency(session.machine, s, 1, 200, 20)
    plan["start, at half of capacity"] = session.half_capacity
    return plan


def _drained(session: Session, work: str, processes: int) -> Callable[[System], Figures] | None:
    def measuring(system: System) -> Figures:
        # Stepwell has no jobs that leave nothing behind: beside them stands its run of one recorded step.
        doing = "one" if work == "job" and system.is_ours else work
        if not system.can(doing):
            raise _NotApplicable
        return session.drain(system, doing, processes)

    return measuring


class _NotApplicable(Exception):
    """The system has no such thing."""


def _once(session: Session, big: int) -> dict[str, Callable[[System], Figures]]:
    """Return what is measured once."""

    def sleeping(system: System) -> Figures:
        if not system.said["sleeps"]:
            raise _NotApplicable
        key = (system.name, "enqueue bulk")
        if key not in session.rates:
            session.enqueue(system, "bulk")
        return scenarios.sleepers(
            session.machine, system, min(100_000, int(session.rates[key] * SLEEPERS_ENQUEUE_SECONDS))
        )

    def stuck(system: System) -> Figures:
        return session.drain(system, system.first_work(), 2, stuck=True)

    return {
        "beside a stuck transaction, 2 workers": stuck,
        "backlog of 10,000": lambda s: session.backlog(s, 10_000),
        f"backlog of {big:,}": lambda s: session.backlog(s, big),
        "an idle worker": lambda s: scenarios.idle(session.machine, s),
        "sleeping runs": sleeping,
    }


@click.command()
@click.option(
    "--repeat", default=3, show_default=True, help="Rounds, in each of which every system has its turn."
)
@click.option(
    "--seconds", default=4.0, show_default=True, help="About how long a measurement of a rate takes."
)
@click.option("--postgres", default=0, help="Major version; by default the system's if it has one, else 18.")
@click.option("--only", default="", help="Systems whose program's name contains this; Stepwell always.")
@click.option("--scenario", default="", help="Scenarios whose name contains this.")
@click.option("--big", default=1_000_000, show_default=True, help="The large backlog.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    default=Path("bench-peers.json"),
    show_default=True,
)
@click.option("--add", is_flag=True, help="Keep what the file has of scenarios that are not measured now.")
@click.option("--write/--no-write", default=True, help="Write tables and charts into docs/.")
def main(
    repeat: int,
    seconds: float,
    postgres: int,
    only: str,
    scenario: str,
    big: int,
    json_file: Path,
    add: bool,
    write: bool,
) -> None:
    """Measure Stepwell and other systems, each set up as its documentation advises."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    version = postgres or installed_version() or 18
    # The embedded one has no pg_stat_statements.
    preloaded = {"shared_preload_libraries": "pg_stat_statements"} if version == installed_version() else {}
    with bench(version, **SETTINGS, **preloaded) as machine:
        systems = _installed(found(only))
        session = Session(machine, systems, seconds, json_file)
        session.about = _about(version, systems)
        if add and json_file.exists():
            session.earlier = json.loads(json_file.read_text())["taken"]
        for round_ in range(repeat):
            _floors(session, scenario)
            for name, measuring in _in_turn(session).items():
                if scenario in name and measuring is not None:
                    click.echo(f"-- round {round_ + 1} of {repeat}: {name}")
                    _each(session, name, systems, measuring)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            name = f"recovery from {number.name}"
            if scenario in name:
                for system, result in scenarios.recoveries(machine, systems, number).items():
                    session.note(name, system, result, 0)
        for name, measuring in _once(session, big).items():
            if scenario in name:
                _each(session, name, systems, measuring)
    taken = session.all_taken()
    for line in report.tables(taken):
        click.echo(line)
    if write:
        report.write(ROOT / "docs", session.about, taken)


def _installed(systems: list[System]) -> list[System]:
    """Install what each requires; leave out, aloud, what cannot be had."""
    ready = []
    for system in systems:
        try:
            click.echo(f"{system.name} {system.said['version']} …")
            system.install()
            ready.append(system)
        except UnavailableError as error:
            click.echo(f"left out: {error}")
    return ready


def _floors(session: Session, scenario: str) -> None:
    """Postgres itself, in the same round."""
    if scenario and scenario not in "pgbench":
        return
    measured = {
        report.FLOOR: ours.floor,
        "rows inserted in batches of 500": ours.ceiling,
    }
    for (scenario_name, measuring), clients in itertools.product(measured.items(), (1, 8)):
        name = f"pgbench, {clients} client{'s' * (clients > 1)}"
        session.measure(
            scenario_name, name, functools.partial(measuring, session.machine, 5, clients=clients)
        )


def _each(session: Session, name: str, systems: list[System], measuring: Callable[[System], Figures]) -> None:
    for system in systems:
        try:
            session.measure(name, system.name, functools.partial(measuring, system))
        except _NotApplicable:
            continue


def _about(version: int, systems: list[System]) -> dict[str, Any]:
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "postgres": version,
        "python": platform.python_version(),
        "machine": report.machine(),
        "systems": [system.said for system in systems],
    }


if __name__ == "__main__":
    main()
