"""`stepwell demo`: a thousand leads, two kills, and the proof that each was welcomed once."""

from __future__ import annotations

import click
from rich.console import Console

MAX_LEADS = 100_000


@click.command()
@click.option(
    "--leads",
    type=click.IntRange(1, MAX_LEADS),
    default=1000,
    show_default=True,
    help="How many rows to read.",
)
@click.option(
    "--processes", type=click.IntRange(1, 32), default=3, show_default=True, help="Worker processes."
)
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=9464, show_default=True)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the report as one JSON object, the rest on stderr."
)
@click.option("--keep", is_flag=True, help="Leave everything up until Ctrl-C, and say what to look at.")
@click.pass_context
def demo(
    ctx: click.Context, *, leads: int, processes: int, metrics_port: int, as_json: bool, keep: bool
) -> None:
    """Welcome a thousand leads while workers are killed, and count what arrived.

    Starts a Postgres of its own, a mail provider and a supervisor with workers; kills one worker at a third
    and the whole process tree at two thirds. Exits 0 only if every lead was welcomed once and saved once.
    """
    from worker.demo import scenario  # imports the engine: not for `stepwell --help`

    options = scenario.Options(
        leads=leads, processes=processes, metrics_port=metrics_port, keep=keep, json=as_json
    )
    try:
        report = scenario.run(options, Console(stderr=as_json))
    except scenario.Interrupted as stopped:
        click.echo(f"The demo was {stopped}; everything has been taken down.", err=True)
        ctx.exit(128 + stopped.number)
    ctx.exit(0 if report.ok else 1)
