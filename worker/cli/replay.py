"""`stepwell replay`: recorded histories against the code, before it is deployed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import click
import msgspec

from outbox.sealing import Keyring
from outbox.settings import Settings
from worker.apps import load_app
from worker.cli.connecting import session
from worker.cli.mistakes import FAILED, Mistake
from worker.cli.options import database_option, duration, json_option
from worker.cli.recorded import from_file
from worker.cli.rendering import print_json
from worker.definitions import Workflow
from worker.engine.recorded import from_database
from worker.engine.sandbox import Sandbox
from worker.engine.sealed import rehearsed
from worker.replay.rehearsal import Mismatch, RecordedRun


@click.command()
@click.argument("app")
@click.option("--open", "unended", is_flag=True, help="Runs that have not ended.  [the default]")
@click.option(
    "--since", callback=duration, metavar="TIME", help="Runs enqueued in this time, also ended ones: 7d."
)
@click.option("--workflow", help="Only runs of this workflow.")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Runs of a file that `stepwell runs export` has written, without a database. Can be repeated.",
)
@json_option
@database_option
def replay(
    settings: Settings,
    app: str,
    unended: bool,
    since: float | None,
    workflow: str | None,
    files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Drive recorded histories against the code of APP and tell which runs it would block.

    Nothing is executed and nothing written: steps give what is recorded. A run that the code merely takes further
    than before is fine. Status 1 if a run would be blocked.
    """
    if files and (unended or since is not None):
        raise Mistake("--file brings its own runs: leave out --open and --since")
    if unended and since is not None:
        raise Mistake("--open and --since exclude each other: --since takes ended runs as well")
    with ExitStack() as stack:
        if files:
            runs: Iterable[RecordedRun] = chain.from_iterable(map(from_file, files))
        else:
            opened = stack.enter_context(session(settings))
            runs = from_database(opened.connection, since=since, workflow=workflow)
        if workflow is not None:
            runs = (run for run in runs if run.workflow == workflow)
        outcome = _rehearsed(runs, load_app(app).workflows, settings.keyring(), told=not as_json)
    if as_json:
        print_json(msgspec.to_builtins(outcome))
    else:
        _summarize(outcome, app)
    if outcome.mismatches:
        sys.exit(FAILED)


class _Outcome(msgspec.Struct):
    """What came of a rehearsal. `left_out` counts the runs of workflows, or versions, that APP does not define."""

    replayed: int = 0
    mismatches: list[Mismatch] = []
    left_out: dict[str, int] = {}


def _rehearsed(
    runs: Iterable[RecordedRun], workflows: Mapping[str, Workflow[..., Any]], keyring: Keyring, *, told: bool
) -> _Outcome:
    outcome, guard = _Outcome(), Sandbox()
    for run in runs:
        found = workflows.get(run.claimed_as)
        if found is None:
            outcome.left_out[run.claimed_as] = outcome.left_out.get(run.claimed_as, 0) + 1
            continue
        outcome.replayed += 1
        mismatch = rehearsed(run, found, keyring, guard)
        if mismatch is not None:
            outcome.mismatches.append(mismatch)
            if told:
                _tell(mismatch)
    return outcome


def _tell(mismatch: Mismatch) -> None:
    click.echo(f"run {mismatch.run} of {mismatch.workflow} ({mismatch.state}): {mismatch.reason}")
    click.echo(f"  {' '.join(mismatch.message.split())}")
    if mismatch.expected is not None:
        click.echo(f"  recorded: {mismatch.expected}")
        click.echo(f"  the code: {mismatch.got}")


def _summarize(outcome: _Outcome, app: str) -> None:
    if outcome.left_out:
        names = ", ".join(f"{name} ({count:,})" for name, count in sorted(outcome.left_out.items()))
        click.echo(f"left out, because {app} does not define them: {names}", err=True)
    click.echo(f"{outcome.replayed:,} replayed, {len(outcome.mismatches):,} would be blocked")
