"""`python -m benchmarks.smoke`: fail if Stepwell has become a lot slower, compared with Postgres in the same minute.

Two worker processes and pgbench's one transaction per step in turn. What counts is the best ratio of a few: a bad moment of
the disk or of a neighbour makes one of them worse, a change that has cost half of the throughput all of them.
"""

from __future__ import annotations

import sys

import click

from benchmarks import scenarios
from benchmarks.machine import bench

LEAST = 0.8
"""Measured on a machine with two cores: 1.4 to 4, see docs/benchmarks.md."""
ROUNDS = 3
RUNS = 8_000


@click.command()
@click.option("--postgres", default=18, show_default=True, help="Major version: 15 (the system's), 16 or 18.")
@click.option("--least", default=LEAST, show_default=True, help="Fail if even the best ratio is below this.")
def main(postgres: int, least: float) -> None:
    """Compare two-step runs with pgbench, and fail when they are far slower than they should be."""
    ratios = []
    with bench(postgres) as machine:
        for _ in range(ROUNDS):
            floor = scenarios.floor(machine, 3)["runs_per_second"]
            ours = scenarios.throughput(machine, "two_steps", 2, RUNS)["runs_per_second"]
            ratios.append(ours / floor)
            click.echo(
                f"two steps, 2 processes: {ours:,.0f} runs/s, pgbench {floor:,.0f}, ratio {ours / floor:.2f}"
            )
            if max(ratios) >= least:
                return
    click.echo(
        f"too slow: the best ratio to pgbench was {max(ratios):.2f}, at least {least:g} is expected", err=True
    )
    sys.exit(1)


if __name__ == "__main__":
    main()
