"""`stepwell runs`: list, show, cancel, retry, export."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psycopg

from outbox.errors import RunConflict, RunNotFound
from outbox.history import MAX_LIST, STATUSES, RunInfo
from outbox.settings import Settings
from worker.cli.connecting import Session, session
from worker.cli.mistakes import FAILED, Mistake, one_line
from worker.cli.options import database_option, duration, json_option
from worker.cli.recorded import line_of, to_file
from worker.cli.rendering import console, print_json, run_table, run_view
from worker.engine.recorded import from_database
from worker.queries import load

_SHORTEST_PREFIX = 4
_SHOWN_MATCHES = 5
_KEY_LOOKUP_TIMEOUT = "1s"


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
    """Draw a run: its steps, their executions and errors, what it waits for, and why it is not running."""
    with session(settings) as opened:
        found = _resolved(opened, run)
        info = opened.client.get(found)
        history = opened.client.history(found)
        tasks = opened.client.tasks(found)
        why = opened.client.why(found)
        key = None if as_json else _key_of(opened.connection, info)
    if as_json:
        print_json(
            {
                "run": info.to_json(),
                "history": [record.to_json() for record in history],
                "tasks": [task.to_json() for task in tasks],
                "why": why,
            }
        )
    else:
        console().print(run_view(info, history, tasks, key=key, why=why))


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
        ids = [_resolved(opened, text) for text in run] or None
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
        for found in [_resolved(opened, text) for text in dict.fromkeys(given)]:
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


def _resolved(opened: Session, text: str) -> UUID:
    """Return the id of the one run that begins with `text`. Raises RunNotFound, Mistake if there are several."""
    digits = text.strip().lower().replace("-", "")
    if not re.fullmatch(r"[0-9a-f]{1,32}", digits):
        raise RunNotFound(f"{text!r} is not the id of a run, nor the beginning of one")
    if len(digits) < _SHORTEST_PREFIX:
        raise Mistake(f"{text!r} is too short: give at least {_SHORTEST_PREFIX} characters of the run's id")
    bounds = {"lowest": UUID(digits.ljust(32, "0")), "highest": UUID(digits.ljust(32, "f"))}
    rows = opened.connection.execute(
        load("cli_runs_between"), {**bounds, "limit": _SHOWN_MATCHES + 1}
    ).fetchall()
    if not rows:
        raise RunNotFound(f"there is no run {text}" + ("" if len(digits) == 32 else "…"))
    if len(rows) > 1:
        shown = ", ".join(row[0] for row in rows[:_SHOWN_MATCHES]) + (
            ", …" if len(rows) > _SHOWN_MATCHES else ""
        )
        raise Mistake(f"{text} is the beginning of more than one run: {shown}")
    return UUID(rows[0][0])


def _key_of(connection: psycopg.Connection[Any], run: RunInfo) -> str | None:
    """Return the key of a run; None also if finding it takes too long, for it is found by reading all keys."""
    try:
        with connection.transaction():
            connection.execute("select set_config('statement_timeout', %s, true)", [_KEY_LOOKUP_TIMEOUT])
            row = connection.execute(
                load("cli_key_of_run"), {"workflow": run.workflow, "run": run.id}
            ).fetchone()
    except (psycopg.errors.QueryCanceled, psycopg.errors.InsufficientPrivilege):
        return None
    return row[0] if row else None
