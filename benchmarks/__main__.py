"""`python -m benchmarks`: every scenario, repeated in turn, with minimum, median and maximum of each figure."""

from __future__ import annotations

import json
import platform
import signal
import statistics
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks import backlog, outages, scenarios, waiting
from benchmarks.machine import Bench, bench

Figures = dict[str, float]
Scenario = Callable[[Bench], Figures]


def _plan(runs: int) -> dict[str, Scenario]:
    """Return what is measured by default: a round takes most of a minute."""
    return {
        "pgbench, one transaction per step, 8 clients": lambda b: scenarios.floor(b, 4),
        "two steps, 1 process": lambda b: scenarios.throughput(b, "two_steps", 1, runs // 2),
        "two steps, 2 processes": lambda b: scenarios.throughput(b, "two_steps", 2, runs),
        "ten steps, 2 processes": lambda b: scenarios.throughput(b, "ten_steps", 2, runs // 5),
        "enqueue in bulk": lambda b: scenarios.enqueue_in_bulk(b, runs),
        "enqueue to start, idle": lambda b: scenarios.start_latency(b, 110),
        "recovery from kill -9 of a worker": lambda b: scenarios.recovery(b, "worker", 10),
    }


def _long_plan(long: int) -> dict[str, Scenario]:
    """Return what waits for long, or handles a lot: measured with `--all`, or when it is asked for by name."""
    return {
        "recovery from kill -9 of the tree": lambda b: scenarios.recovery(b, "tree", 20),
        "recovery from a network that falls silent": lambda b: outages.silence(b, 8),
        "ten restarts of the database under load": lambda b: outages.restarts(b, 10),
        "map over 10,000 steps, 2 processes": lambda b: waiting.fan_out(b, 10_000),
        "cancel a run that sleeps, idle": lambda b: waiting.cancel_latency(b, 200),
        "replay of 10,000 recorded steps": lambda b: waiting.replay(b, 10_000),
        "one run of 50,000 steps": lambda b: waiting.long_run(b, 50_000),
        "1,000,000 sleeping runs, 10,000 due": lambda b: waiting.sleepers(b, 1_000_000, 10_000),
        f"{long:,} ready runs": lambda b: backlog.growth(b, long),
    }


@click.command()
@click.option("--repeat", default=3, show_default=True, help="Measurements of each scenario.")
@click.option("--runs", default=20_000, show_default=True, help="Runs in one measurement of throughput.")
@click.option(
    "--backlog", "backlog_runs", default=10_000_000, show_default=True, help="Runs in the long queue."
)
@click.option("--postgres", default=18, show_default=True, help="Major version: 15 (the system's), 16 or 18.")
@click.option("--only", default="", help="Scenarios whose name contains this, of all that there are.")
@click.option("--all", "whole", is_flag=True, help="Measure all, which takes a quarter of an hour a round.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all measurements here.")
def main(
    repeat: int, runs: int, backlog_runs: int, postgres: int, only: str, whole: bool, json_file: Path | None
) -> None:
    """Measure this machine."""
    plan = _plan(runs) | (_long_plan(backlog_runs) if whole or only else {})
    plan = {name: scenario for name, scenario in plan.items() if only in name}
    if not plan:
        raise click.UsageError(f"no scenario's name contains {only!r}")
    taken: dict[str, list[Figures]] = defaultdict(list)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    with bench(postgres) as machine:
        click.echo(
            f"PostgreSQL {postgres}, Python {platform.python_version()} ({_build()}), {platform.machine()}, durable commits"
        )
        for round_ in range(1, repeat + 1):
            for name, scenario in plan.items():
                began = time.monotonic()
                figures = scenario(machine)
                taken[name].append(figures)
                said = " · ".join(f"{key} {value:,.3g}" for key, value in figures.items())
                click.echo(f"[{round_}/{repeat}] {name}: {said}  ({time.monotonic() - began:.0f} s)")
    click.echo()
    for line in table(taken):
        click.echo(line)
    if json_file is not None:
        json_file.write_text(json.dumps(taken, indent=2) + "\n")


def _build() -> str:
    """Say how this Python was built: it makes up to a quarter of a difference to what a worker does in a second."""
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return "optimized build" if optimized else "plain build"


def table(taken: dict[str, list[Figures]]) -> list[str]:
    """Return the figures as a Markdown table, and the ratios to pgbench of the same round."""
    lines = ["| scenario | figure | min | median | max |", "|---|---|---|---|---|"]
    for name, rounds in taken.items():
        lines += [_row(name, figure, [each[figure] for each in rounds]) for figure in rounds[0]]
    floors = next((rounds for name, rounds in taken.items() if name.startswith("pgbench")), [])
    for name, rounds in taken.items():
        if floors and name.startswith("two steps"):
            pairs = zip(rounds, floors, strict=True)
            lines.append(
                _row(name, "× pgbench", [a["runs_per_second"] / b["runs_per_second"] for a, b in pairs])
            )
    return lines


def _row(name: str, figure: str, values: list[float]) -> str:
    cells = (min(values), statistics.median(values), max(values))
    return f"| {name} | {figure.replace('_', ' ')} | " + " | ".join(f"{cell:,.3g}" for cell in cells) + " |"


if __name__ == "__main__":
    main()
