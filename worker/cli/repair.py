"""`stepwell runs` for what went wrong: cancel, retry, pause and resume, one by one or many; fork, rewind, resolve."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import click

from outbox.errors import RunConflict
from outbox.outcomes import FORGOTTEN
from outbox.repairs import Action, call_path
from outbox.settings import Settings
from worker.cli.connecting import Session, session
from worker.cli.contracts import check_result, contract_for
from worker.cli.json_text import read_json
from worker.cli.mistakes import FAILED, Mistake, one_line, spelled_out
from worker.cli.options import database_option, json_option
from worker.cli.rendering import print_json
from worker.cli.run_ids import resolved
from worker.cli.selection import Selection, selecting_options

_EXAMPLES = 5
_LONGEST_ERROR = 80
_OPEN = ("pending", "running", "waiting")


@dataclass(frozen=True, slots=True)
class _Deed:
    """What a command does to runs: to one of them, which it returns what to tell of, or by `action` to many."""

    action: Action
    one: Callable[[Session, UUID], dict[str, Any]]
    done: str
    """behind the id of a run"""
    statuses: tuple[str, ...]
    """in which a run can be for it"""
    many_done: str
    """behind the number of runs"""


def _selecting(deed: _Deed) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function that holds the documentation: RUN…, or the options that choose among many."""

    def decorate(documented: Callable[..., None]) -> click.Command:
        @functools.wraps(documented)
        def command(
            settings: Settings,
            run: tuple[str, ...],
            workflow: str | None,
            status: str | None,
            error_like: str | None,
            since: float | None,
            as_json: bool,
            **asked: bool,
        ) -> None:
            chosen = (workflow, status, error_like, since) != (None, None, None, None)
            _require_sense(deed, given=bool(run), chosen=chosen, **asked)
            if run:
                _each(settings, run, deed, as_json)
                return
            statuses = deed.statuses if status is None else (status,)
            _all(settings, Selection(statuses, workflow, error_like, since), deed, as_json, **asked)

        click.option("--dry-run", is_flag=True, help="Only say how many runs are meant, and show some.")(
            command
        )
        click.option("--yes", is_flag=True, help="Do not ask.")(command)
        selecting_options(deed.statuses)(command)
        with_database = database_option(json_option(command))
        return click.command(deed.action)(click.argument("run", nargs=-1)(with_database))

    return decorate


def _cancel(opened: Session, run: UUID) -> dict[str, Any]:
    if not opened.client.cancel(run):
        raise RunConflict(f"run {run} has ended already")
    return {"cancelled": True}


def _retry(opened: Session, run: UUID) -> dict[str, Any]:
    return {"epoch": opened.client.retry(run)}


def _pause(opened: Session, run: UUID) -> dict[str, Any]:
    if not opened.client.pause(run):
        raise RunConflict(f"run {run} is not open, so there is nothing to pause")
    return {"paused": True}


def _resume(opened: Session, run: UUID) -> dict[str, Any]:
    if not opened.client.resume(run):
        raise RunConflict(f"run {run} is not paused")
    return {"paused": False}


@_selecting(_Deed("cancel", _cancel, "asked to end", (*_OPEN, "paused"), "asked to end"))
def cancel_runs() -> None:
    """Ask for the end of runs. One that executes a step ends when that step has.

    RUN is an id or the beginning of one. Without it, --workflow, --status, --error-like and --since choose among all.
    """


@_selecting(_Deed("retry", _retry, "is ready again", ("failed", "cancelled", "blocked"), "ready again"))
def retry_runs() -> None:
    """Resume failed, cancelled and blocked runs: what completed stays, what failed is tried anew.

    RUN is an id or the beginning of one. Without it, --workflow, --status, --error-like and --since choose among all.
    """


@_selecting(_Deed("pause", _pause, "is paused", _OPEN, "paused"))
def pause_runs() -> None:
    """Stop runs until they are resumed. What is being executed ends first.

    RUN is an id or the beginning of one. Without it, --workflow, --status, --error-like and --since choose among all.
    """


@_selecting(_Deed("resume", _resume, "goes on", ("paused",), "resumed"))
def resume_runs() -> None:
    """Have paused runs go on.

    RUN is an id or the beginning of one. Without it, --workflow, --status, --error-like and --since choose among all.
    """


@click.command("fork")
@click.argument("run")
@click.option("--from", "path", required=True, metavar="PATH", help="The call that is made anew: 3, 3.1.2.")
@click.option("--input", "input_text", metavar="JSON", help="Another input object; - reads it from stdin.")
@click.option("--version", help="Another version of the workflow.")
@click.option(
    "--app", metavar="APP", help="Check by this module or file, not by what workers have published."
)
@click.option(
    "--allow-unknown",
    is_flag=True,
    help="Fork even if nobody knows the workflow in this version; it is not checked.",
)
@json_option
@database_option
def fork_run(
    settings: Settings,
    run: str,
    path: str,
    input_text: str | None,
    version: str | None,
    app: str | None,
    allow_unknown: bool,
    as_json: bool,
) -> None:
    """Make a new run of what happened in RUN before a call, which goes on from there; print its id.

    RUN is left as it is. The steps of the new run have idempotency keys of their own. Another input, and another version,
    are checked as `stepwell enqueue` checks them.
    """
    given = None if input_text is None else read_json(input_text, "the input")
    if given is not None and not isinstance(given, dict):
        raise Mistake('the input must be an object, parameter name to value, as {"lead": …}')
    with session(settings) as opened:
        of = resolved(opened, run)
        if given is not None or version is not None:
            _check_fork(opened, of, given, version, app=app, allow_unknown=allow_unknown)
        made = opened.client.fork(of, path, input=given, version=version)
    if as_json:
        print_json({"id": str(made), "of": str(of)})
    else:
        click.echo(str(made))


def _check_fork(
    opened: Session,
    of: UUID,
    given: Mapping[str, Any] | None,
    version: str | None,
    *,
    app: str | None,
    allow_unknown: bool,
) -> None:
    """Check what a fork has that its run has not. Raises UnknownWorkflow, PayloadError."""
    info = opened.client.get(of)
    taken_over: Any = info.input  # which is sealed where its key is not here
    contract = contract_for(
        info.workflow,
        opened.connection,
        app=app,
        allow_unknown=allow_unknown,
        version=version or info.version,
    )
    if given is not None:
        contract.checked(given, f"input of workflow {info.workflow!r}")
    elif isinstance(taken_over, dict) and taken_over != json.loads(FORGOTTEN):
        contract.checked(taken_over, f"the input of run {of}")


@click.command("rewind")
@click.argument("run")
@click.option("--to", "path", required=True, metavar="PATH", help="The call that is made anew: 3, 3.1.2.")
@json_option
@database_option
def rewind_run(settings: Settings, run: str, path: str, as_json: bool) -> None:
    """Have RUN go on from a call as if neither that one nor anything after it had happened.

    For a run that has ended or is blocked; one that is open has to be paused first. Steps are executed again with other
    idempotency keys.
    """
    with session(settings) as opened:
        found = resolved(opened, run)
        epoch = opened.client.rewind(found, path)
    _tell(found, f"goes on from {path}", {"epoch": epoch}, as_json)


@click.command("resolve")
@click.argument("run")
@click.argument("path")
@click.option(
    "--value", metavar="JSON", help="The step has completed with this result; - reads it from stdin."
)
@click.option("--error", metavar="TEXT", help="The step has failed, with this message.")
@click.option("--app", metavar="APP", help="Check the value by the step of this module or file.")
@json_option
@database_option
def resolve_step(
    settings: Settings,
    run: str,
    path: str,
    value: str | None,
    error: str | None,
    app: str | None,
    as_json: bool,
) -> None:
    """Say how the step at PATH of RUN ended, which is held or has failed, and have RUN go on.

    What was said here and is wrong can be said otherwise, as long as RUN is blocked or has failed without having gone on
    from there.
    """
    if (value is None) == (error is None):
        raise Mistake("give --value or --error: how has the step ended?")
    result = (
        None if value is None else read_json(value, "the value", "; a text is written in quotes: '\"done\"'")
    )
    with session(settings) as opened:
        found = resolved(opened, run)
        if app is not None and value is not None:
            check_result(app, opened.client.history(found), call_path(path), result)
        epoch = opened.client.resolve(found, path, result, error=error)
    _tell(
        found, f"goes on, with {path} {'completed' if error is None else 'failed'}", {"epoch": epoch}, as_json
    )


COMMANDS: tuple[click.Command, ...] = (
    cancel_runs, retry_runs, pause_runs, resume_runs, rewind_run, fork_run, resolve_step,
)  # fmt: skip


def is_terminal() -> bool:
    """Tell whether there is somebody to ask."""
    return sys.stdin.isatty()


def _require_sense(deed: _Deed, *, given: bool, chosen: bool, yes: bool, dry_run: bool) -> None:
    """Refuse what does not say which runs are meant, or says it twice."""
    if given and (chosen or yes or dry_run):
        raise Mistake(
            "give the ids of runs, or choose among all by --workflow, --status, --error-like and --since, not both"
        )
    if not given and not chosen:
        raise Mistake(
            f"which runs to {deed.action}? give their ids, or choose among all by --workflow, --status, --error-like "
            "and --since"
        )


def _tell(run: UUID, done: str, more: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"id": str(run), **more})
    else:
        click.echo(f"{run} {done}")


def _each(settings: Settings, given: Sequence[str], deed: _Deed, as_json: bool) -> None:
    """Act on each run and tell; exit with status 1 if one could not be. An unknown id stops before the first."""
    results: list[dict[str, Any]] = []
    failed = False
    with session(settings) as opened:
        for found in [resolved(opened, text) for text in dict.fromkeys(given)]:
            try:
                results.append({"id": str(found), **deed.one(opened, found), "error": None})
                if not as_json:
                    click.echo(f"{found} {deed.done}")
            except RunConflict as error:
                failed = True
                results.append({"id": str(found), "error": one_line(error)})
                if not as_json:
                    click.echo(f"stepwell: {one_line(error)}", err=True)
    if as_json:
        print_json(results)
    if failed:
        sys.exit(FAILED)


def _all(
    settings: Settings, selection: Selection, deed: _Deed, as_json: bool, *, yes: bool, dry_run: bool
) -> None:
    """Act on all runs that are meant, after having said how many these are, and asked."""
    with session(settings) as opened:
        found = selection.find(opened)
        if not as_json or not (yes or dry_run):
            _show(opened, found, deed)
        changed = 0
        if found and not dry_run:
            if not yes and not _confirmed(len(found), deed):
                click.echo("nothing was changed", err=True)
                sys.exit(FAILED)
            changed = sum(1 for _ in opened.client.change(deed.action, found))
    if as_json:
        examples = [str(each) for each in found[:_EXAMPLES]]
        print_json({"matching": len(found), "changed": changed, "examples": examples, "dry_run": dry_run})
    elif found and not dry_run:
        left = len(found) - changed
        told = f"; {left:,} could not be, or not any more" if left else ""
        click.echo(f"{changed:,} {_runs(changed)} {deed.many_done}{told}")


def _show(opened: Session, found: Sequence[UUID], deed: _Deed) -> None:
    """Say how many runs are meant, and show a few of them."""
    click.echo(f"{len(found):,} {_runs(len(found))} to {deed.action}{':' if found else ''}", err=True)
    for each in found[:_EXAMPLES]:
        info = opened.client.get(each)
        fault = info.error or {}
        said = " ".join(f"{fault.get('type', '')}: {fault.get('message', '')}".split()) if fault else ""
        shown = said if len(said) <= _LONGEST_ERROR else f"{said[:_LONGEST_ERROR]}…"
        line = f"  {info.id}  {info.workflow}  {info.status}{f'  {shown}' if shown else ''}"
        click.echo(spelled_out(line), err=True)
    if len(found) > _EXAMPLES:
        click.echo(f"  … and {len(found) - _EXAMPLES:,} more", err=True)


def _confirmed(count: int, deed: _Deed) -> bool:
    if not is_terminal():
        raise Mistake(
            f"this would {deed.action} {count:,} {_runs(count)}, and there is no terminal to ask at: pass --yes"
        )
    return click.confirm(f"{deed.action} {count:,} {_runs(count)}?", err=True)


def _runs(count: int) -> str:
    return "run" if count == 1 else "runs"
