"""`stepwell runs`: list, show, export; state and stream are in `worker.cli.exchanging`, the rest in `worker.cli.repair`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from outbox.history import MAX_LIST, STATUSES
from outbox.settings import Settings
from worker.cli import repair
from worker.cli.connecting import session
from worker.cli.exchanging import follow_stream, show_state
from worker.cli.mistakes import Mistake
from worker.cli.options import database_option, duration, json_option
from worker.cli.recorded import line_of, to_file
from worker.cli.rendering import console, print_json
from worker.cli.run_details import details_of
from worker.cli.run_ids import resolved
from worker.cli.run_list import run_table
from worker.cli.run_view import run_view
from worker.cli.selection import Selection, selecting_options
from worker.engine.recorded import from_database


@click.group()
def runs() -> None:
    """List, show, follow, repair and export runs. RUN is an id, or the beginning of one if that is unique."""


@runs.command("list")
@selecting_options(STATUSES)
@click.option(
    "--limit", type=click.IntRange(1, MAX_LIST), default=20, show_default=True, help="At most so many."
)
@json_option
@database_option
def list_runs(
    settings: Settings,
    workflow: str | None,
    status: str | None,
    error_like: str | None,
    since: float | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the newest runs."""
    with session(settings) as opened:
        if error_like is None and since is None:
            found = opened.client.list(workflow=workflow, status=status, limit=limit)
        else:
            ids = Selection([status], workflow, error_like, since).find(opened)
            found = [opened.client.get(each) for each in reversed(ids[-limit:])]
    if as_json:
        print_json([run.to_json() for run in found])
    elif found:
        out = console()
        out.print(run_table(found, out.width if out.file.isatty() else None), soft_wrap=True)
    else:
        click.echo("no runs", err=True)


@runs.command("show")
@click.argument("run")
@json_option
@database_option
def show_run(settings: Settings, run: str, as_json: bool) -> None:
    """Draw a run: its calls, their executions and errors, what it shows, what it waits for, and why it is not running."""
    with session(settings) as opened:
        details = details_of(opened, resolved(opened, run))
    if as_json:
        print_json(details.to_json())
    else:
        console().print(run_view(details))


for command in (show_state, follow_stream, *repair.COMMANDS):
    runs.add_command(command)


@runs.command("export")
@click.argument("run", nargs=-1)
@click.option("--open", "unended", is_flag=True, help="Runs that have not ended.  [the default without RUN]")
@click.option(
    "--since", callback=duration, metavar="TIME", help="Runs enqueued in this time, also ended ones: 7d."
)
@click.option("--workflow", help="Only runs of this workflow.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="The file to write.  [default: stdout]"
)
@database_option
def export_runs(
    settings: Settings,
    run: tuple[str, ...],
    unended: bool,
    since: float | None,
    workflow: str | None,
    output: Path | None,
) -> None:
    """Write runs with their inputs and histories, one JSON line for each, as `stepwell replay --file` reads them."""
    if bool(run) + unended + (since is not None) > 1:
        raise Mistake("give the ids of runs, or --open, or --since: one of them says which runs are meant")
    if run and workflow is not None:
        raise Mistake("--workflow chooses among many runs: leave it out where the runs are given")
    with session(settings) as opened:
        ids = [resolved(opened, text) for text in run] or None
        found = from_database(opened.connection, ids=ids, since=since, workflow=workflow)
        if output is not None:
            click.echo(f"{to_file(found, output):,} runs exported to {output}", err=True)
            return
        for each in found:
            sys.stdout.buffer.write(line_of(each))
