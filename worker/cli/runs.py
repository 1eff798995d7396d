"""`stepwell runs`: list, show, cancel, retry, export; state and stream are in `worker.cli.exchanging`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from outbox.errors import RunConflict
from outbox.history import MAX_LIST, STATUSES
from outbox.settings import Settings
from worker.cli.connecting import Session, session
from worker.cli.exchanging import follow_stream, show_state
from worker.cli.mistakes import FAILED, Mistake, one_line
from worker.cli.options import database_option, duration, json_option
from worker.cli.recorded import line_of, to_file
from worker.cli.rendering import console, print_json
from worker.cli.run_details import details_of
from worker.cli.run_ids import resolved
from worker.cli.run_list import run_table
from worker.cli.run_view import run_view
from worker.engine.recorded import from_database


@click.group()
def runs() -> None:
    """List, show, cancel, retry and export runs. RUN is an id, or the beginning of one if that is unique."""


@runs.command("list")
@click.option("--workflow", help="Only runs of this workflow.")
@click.option("--status", type=click.Choice(STATUSES), help="Only runs in this status.")
@click.option(
    "--limit", type=click.IntRange(1, MAX_LIST), default=20, show_default=True, help="At most so many."
)
@json_option
@database_option
def list_runs(
    settings: Settings, workflow: str | None, status: str | None, limit: int, as_json: bool
) -> None:
    """List the newest runs."""
    with session(settings) as opened:
        found = opened.client.list(workflow=workflow, status=status, limit=limit)
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


runs.add_command(show_state)
runs.add_command(follow_stream)


@runs.command("cancel")
@click.argument("run", nargs=-1, required=True)
@json_option
@database_option
def cancel_runs(settings: Settings, run: tuple[str, ...], as_json: bool) -> None:
    """Ask for the end of runs. One that executes a step ends when that step has."""

    def cancel(opened: Session, found: UUID) -> dict[str, Any]:
        if not opened.client.cancel(found):
            raise RunConflict(f"run {found} has ended already")
        return {"cancelled": True}

    _each(settings, run, cancel, "asked to end", as_json)


@runs.command("retry")
@click.argument("run", nargs=-1, required=True)
@json_option
@database_option
def retry_runs(settings: Settings, run: tuple[str, ...], as_json: bool) -> None:
    """Resume failed, cancelled and blocked runs: what completed stays, what failed is tried anew."""

    def retry(opened: Session, found: UUID) -> dict[str, Any]:
        return {"epoch": opened.client.retry(found)}

    _each(settings, run, retry, "is ready again", as_json)


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


def _each(
    settings: Settings,
    given: Sequence[str],
    act: Callable[[Session, UUID], dict[str, Any]],
    done: str,
    as_json: bool,
) -> None:
    """Act on each run and tell; exit with status 1 if one could not be. An unknown id stops before the first."""
    results: list[dict[str, Any]] = []
    failed = False
    with session(settings) as opened:
        for found in [resolved(opened, text) for text in dict.fromkeys(given)]:
            try:
                results.append({"id": str(found), **act(opened, found), "error": None})
                if not as_json:
                    click.echo(f"{found} {done}")
            except RunConflict as error:
                failed = True
                results.append({"id": str(found), "error": one_line(error)})
                if not as_json:
                    click.echo(f"stepwell: {one_line(error)}", err=True)
    if as_json:
        print_json(results)
    if failed:
        sys.exit(FAILED)
