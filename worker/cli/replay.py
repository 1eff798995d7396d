"""`stepwell replay`: recorded histories against the code, before it is deployed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
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
from worker.cli.mistakes import FAILED, Mistake, spelled_out
from worker.cli.options import database_option, duration, json_option
from worker.cli.recorded import from_file
from worker.cli.rendering import print_json
from worker.definitions import Workflow
from worker.engine.recorded import from_database
from worker.engine.sandbox import Sandbox
from worker.engine.sealed import rehearsed
from worker.replay.rehearsal import Mismatch, RecordedRun

_UNENDED = ("open", "blocked")
_MOST_SHOWN = 200


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
@click.option(
    "--allow-drift", is_flag=True, help="Runs whose recorded steps get other arguments now are no failure."
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Runs that have not ended, of workflows or versions that APP does not define, are no failure: others have them.",
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
    allow_drift: bool,
    allow_missing: bool,
    as_json: bool,
) -> None:
    """Drive recorded histories against the code of APP and tell which runs it does not fit.

    Nothing is executed and nothing written: steps give what is recorded. A run that the code merely takes further
    than before is fine. Status 1 if a run would be blocked, if one would drift (a recorded step is called with other
    arguments), or if one that has not ended would have no code any more.
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
        outcome = _Outcome()
        for mismatch in _rehearsed(runs, load_app(app).workflows, settings.keyring(), outcome):
            if not as_json and not (mismatch.drift and allow_drift):
                _tell(mismatch)
    if as_json:
        print_json(msgspec.to_builtins(outcome))
    else:
        _summarize(outcome, app, allow_drift=allow_drift, allow_missing=allow_missing)
    if (
        outcome.mismatches
        or (outcome.drifts and not allow_drift)
        or (outcome.without_code and not allow_missing)
    ):
        sys.exit(FAILED)


class _Outcome(msgspec.Struct):
    """What came of a rehearsal: the runs that would be blocked, and those that only drift.

    Of workflows, or versions, that APP does not define the runs are counted: those that have not ended as
    `without_code`, the others as `left_out`.
    """

    replayed: int = 0
    mismatches: list[Mismatch] = []
    drifts: list[Mismatch] = []
    without_code: dict[str, int] = {}
    left_out: dict[str, int] = {}


def _rehearsed(
    runs: Iterable[RecordedRun],
    workflows: Mapping[str, Workflow[..., Any]],
    keyring: Keyring,
    outcome: _Outcome,
) -> Iterator[Mismatch]:
    """Rehearse the runs; yield what is found as it is found, and take note of it in `outcome`."""
    guard = Sandbox()
    for run in runs:
        found = workflows.get(run.claimed_as)
        if found is None:
            missing = outcome.without_code if run.state in _UNENDED else outcome.left_out
            missing[run.claimed_as] = missing.get(run.claimed_as, 0) + 1
            continue
        outcome.replayed += 1
        mismatch = rehearsed(run, found, keyring, guard)
        if mismatch is not None:
            (outcome.drifts if mismatch.drift else outcome.mismatches).append(mismatch)
            yield mismatch


def _tell(mismatch: Mismatch) -> None:
    click.echo(f"run {mismatch.run} of {mismatch.workflow} ({mismatch.state}): {mismatch.reason}")
    click.echo(f"  {' '.join(mismatch.message.split())}")
    if mismatch.expected is not None:
        click.echo(f"  recorded: {mismatch.expected}")
        click.echo(f"  the code: {mismatch.got}")
    if mismatch.arguments is not None:
        shown = spelled_out(mismatch.arguments)
        click.echo(f"      with: {shown if len(shown) <= _MOST_SHOWN else f'{shown[:_MOST_SHOWN]}…'}")


def _summarize(outcome: _Outcome, app: str, *, allow_drift: bool, allow_missing: bool) -> None:
    if outcome.left_out:
        click.echo(
            f"left out, because they have ended and {app} does not define them: {_counted(outcome.left_out)}",
            err=True,
        )
    if outcome.without_code:
        open_ones = (
            f"would have no code, because {app} does not define them: {_counted(outcome.without_code)}"
        )
        hint = "" if allow_missing else "; --allow-missing if other workers carry them"
        click.echo(f"{open_ones}{hint}", err=True)
    told = f"{outcome.replayed:,} replayed, {len(outcome.mismatches):,} would be blocked"
    if outcome.drifts:
        told += f", {len(outcome.drifts):,} would drift{' (allowed)' if allow_drift else ''}"
    if outcome.without_code:
        total = sum(outcome.without_code.values())
        told += f", {total:,} would have no code{' (allowed)' if allow_missing else ''}"
    click.echo(told)


def _counted(names: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(names.items()))
