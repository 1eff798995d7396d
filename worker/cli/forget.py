"""`stepwell forget`: erase what came in under an idempotency key, and what was made of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import click

from outbox.errors import RunConflict
from outbox.settings import Settings
from worker.cli.connecting import Session, session
from worker.cli.json_text import given_text
from worker.cli.mistakes import FAILED, Failed, Mistake
from worker.cli.options import database_option, duration, json_option
from worker.cli.rendering import print_json
from worker.queries import load

_EXAMPLES = 5
_ENDED = ("succeeded", "failed", "cancelled", "blocked")
_LOOK_SECONDS = 0.1


class _Kept(NamedTuple):
    """A run that holds something of the key."""

    id: UUID
    workflow: str
    status: str


@click.command()
@click.option(
    "--key",
    required=True,
    metavar="KEY",
    help="The idempotency key; - reads it from stdin, which `ps` does not show.",
)
@click.option("--workflow", help="Only the key of this workflow.")
@click.option("--cancel", is_flag=True, help="Cancel what is open first, and wait for its end.")
@click.option(
    "--wait",
    callback=duration,
    default="30s",
    show_default=True,
    metavar="TIME",
    help="How long to wait for that.",
)
@click.option("--dry-run", is_flag=True, help="Only say how many runs are meant, and show some.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@database_option
def forget(
    settings: Settings,
    key: str,
    workflow: str | None,
    cancel: bool,
    wait: float,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Erase what came in under KEY, and what was made of it. It does not come back.

    Of the runs of this key, of all that these have called, and of the forks of any of them: inputs, results, what their
    steps returned, messages of errors, signals, state and streams, labels, lanes and tenants, and the key itself, which is
    free again. What happened stays: names, outcomes, times. Such a run cannot go on, be retried or forked.
    """
    key = given_text(key).rstrip("\r\n")
    with session(settings) as opened:
        found = _kept(opened, key, workflow)
        if not as_json or not (yes or dry_run):
            _show(found)
        done: Sequence[UUID] = ()
        if found and not dry_run:
            if not cancel:
                _require_ended(found)
            if not yes and not _confirmed(len(found)):
                click.echo("nothing was erased", err=True)
                sys.exit(FAILED)
            if cancel:
                _end(opened, key, workflow, wait)
            done = opened.client.forget(key, workflow=workflow)
    if as_json:
        print_json({"matching": len(found), "forgotten": [str(each) for each in done], "dry_run": dry_run})
    elif done:
        click.echo(f"{_runs(len(done))} forgotten")


def _kept(opened: Session, key: str, workflow: str | None) -> list[_Kept]:
    rows = opened.connection.execute(load("cli_family"), {"key": key, "workflow": workflow})
    return [_Kept(*row) for row in rows]


def _require_ended(found: Sequence[_Kept]) -> None:
    unended = [run for run in found if run.status not in _ENDED]
    if unended:
        more = f", and {len(unended) - 1:,} more" if len(unended) > 1 else ""
        raise RunConflict(
            f"run {unended[0].id} is {unended[0].status}{more}: what is open is not forgotten; --cancel cancels it first"
        )


def _end(opened: Session, key: str, workflow: str | None, wait: float) -> None:
    """Cancel what is open, and return when nothing is. Raises Failed if that takes too long."""
    deadline = time.monotonic() + wait
    asked: set[UUID] = set()
    while unended := [run for run in _kept(opened, key, workflow) if run.status not in _ENDED]:
        asked.update(opened.client.change("cancel", {run.id for run in unended} - asked))
        if time.monotonic() >= deadline:
            raise Failed(
                f"run {unended[0].id} was asked to end, and is still {unended[0].status}: nothing was erased; "
                f"`stepwell runs show {unended[0].id}` says what it waits for"
            )
        time.sleep(_LOOK_SECONDS)


def _show(found: Sequence[_Kept]) -> None:
    """Say how many runs are meant, and show a few of them."""
    click.echo(f"{_runs(len(found))} to forget{':' if found else ''}", err=True)
    for run in found[:_EXAMPLES]:
        click.echo(f"  {run.id}  {run.workflow}  {run.status}", err=True)
    if len(found) > _EXAMPLES:
        click.echo(f"  … and {len(found) - _EXAMPLES:,} more", err=True)


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise Mistake(
            f"this would erase the payloads of {_runs(count)}, and there is no terminal to ask at: pass --yes"
        )
    return click.confirm(f"erase the payloads of {_runs(count)}? They do not come back", err=True)


def _runs(count: int) -> str:
    return f"{count:,} {'run' if count == 1 else 'runs'}"
