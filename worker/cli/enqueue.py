"""`stepwell enqueue`: one run, or a run for each row of a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from outbox.errors import ResultTimeout, RunBlocked, RunCancelled, RunFailed, StepwellError
from outbox.handles import Run
from outbox.settings import Settings
from worker.cli.bulk import Summary, enqueue_rows
from worker.cli.connecting import Session, session
from worker.cli.contracts import contract_for
from worker.cli.json_text import read_json
from worker.cli.mistakes import FAILED, Mistake, one_line
from worker.cli.options import database_option, duration, json_option, labels, moment, traceparent
from worker.cli.rendering import print_json
from worker.cli.row_files import Source


@click.command()
@click.argument("workflow")
@click.argument("input_text", metavar="[JSON]", required=False)
@click.option("--key", help="A second run of WORKFLOW with this key is not created.")
@click.option("--queue", help="The queue.  [default: the workflow's own]")
@click.option("--version", help="The version of WORKFLOW.  [default: the current one]")
@click.option("--priority", type=click.IntRange(0, 9), default=5, show_default=True, help="0 goes first.")
@click.option("--delay", callback=duration, metavar="TIME", help="Start so much later: 90, 1.5h.")
@click.option(
    "--at", callback=moment, metavar="WHEN", help="Start at this time (ISO 8601, local without an offset)."
)
@click.option(
    "--label", "labels", callback=labels, multiple=True, metavar="NAME=VALUE", help="Can be repeated."
)
@click.option(
    "--deadline",
    callback=duration,
    metavar="TIME",
    help="Fail the run if it has not ended so long after now.",
)
@click.option(
    "--traceparent",
    "trace",
    callback=traceparent,
    metavar="CONTEXT",
    help="Go on with this trace, given as W3C traceparent.",
)
@click.option(
    "--wait", is_flag=True, help="Wait for the end, print the output; status 1 if it does not succeed."
)
@click.option("--timeout", callback=duration, metavar="TIME", help="With --wait: wait for so long at most.")
@click.option("--from", "file", metavar="FILE", help="Enqueue a run for each row of a .csv or .jsonl file.")
@click.option("--key-field", metavar="NAME", help="With --from: the column or field that is the key.")
@click.option(
    "--app", metavar="APP", help="Check by this module or file, not by what workers have published."
)
@click.option(
    "--allow-unknown", is_flag=True, help="Enqueue even if nobody knows WORKFLOW yet; it is not checked."
)
@json_option
@database_option
def enqueue(
    settings: Settings,
    workflow: str,
    input_text: str | None,
    file: str | None,
    key_field: str | None,
    version: str | None,
    key: str | None,
    wait: bool,
    timeout: float | None,
    app: str | None,
    allow_unknown: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Enqueue a run of WORKFLOW, or one for each row of a file.

    JSON is the input object, parameter name to value: '{"lead": {"id": 17}}'; "-" reads it from stdin. It prints
    the id of the run.

    With --from, the good rows go in and the bad ones into FILE.rejects.csv (or .rejects.jsonl), each with its
    reason. With --key-field, running it again enqueues nothing twice.
    """
    _require_sense(file, input_text=input_text, key=key, wait=wait, key_field=key_field, timeout=timeout)
    options["labels"] = options["labels"] or None
    source = Source.of(Path(file)) if file else None
    given = None if source else _input_object(input_text, workflow)
    with session(settings) as opened:
        contract = contract_for(
            workflow, opened.connection, app=app, allow_unknown=allow_unknown, version=version
        )
        options["queue"] = options["queue"] or contract.queue
        options["version"] = contract.version
        if source is not None:
            done = enqueue_rows(
                source, contract, opened.client, settings, key_field=key_field, options=options
            )
            _report(done, as_json)
            return
        checked = contract.checked(given or {}, f"input of workflow {workflow!r}")
        run = opened.client.enqueue(workflow, checked, key=key, **options)
        if wait:
            _wait(opened, run, timeout, as_json)
        elif as_json:
            print_json({"id": str(run.id), "created": run.created})
        else:
            click.echo(str(run.id))
            if not run.created:
                click.echo(
                    "stepwell: the key was known: this is its first run, nothing was enqueued", err=True
                )


def _require_sense(file: str | None, **given: Any) -> None:
    """Refuse options that have no meaning together."""
    if file:
        wrong = [name for name in ("input_text", "key", "wait") if given[name]]
        if wrong:
            shown = {"input_text": "JSON", "key": "--key (it takes --key-field)", "wait": "--wait"}[wrong[0]]
            raise click.UsageError(f"--from enqueues many runs and goes without {shown}")
    elif given["key_field"]:
        raise click.UsageError(
            "--key-field says which field of the rows of --from is the key; for one run give --key"
        )
    if given["timeout"] is not None and not given["wait"]:
        raise click.UsageError("--timeout says how long to --wait")


def _input_object(text: str | None, workflow: str) -> Mapping[str, Any]:
    """Return the input object of a JSON text; raises Mistake with the position of what is wrong."""
    if text is None:
        return {}
    where = f"input of workflow {workflow!r}"
    given = read_json(text, where)
    if not isinstance(given, dict):
        raise Mistake(
            f'{where} must be an object, parameter name to value, as {{"lead": …}}, got {_kind(given)}'
        )
    return given


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}.get(
        type(value), "a number"
    )


def _wait(opened: Session, run: Run[Any], timeout: float | None, as_json: bool) -> None:
    """Wait for the end; print the output, or end with status 1."""
    error: StepwellError | None = None
    output: Any = None
    try:
        output = run.result(timeout)
    except (RunFailed, RunCancelled, RunBlocked) as ended:
        error = ended
    except ResultTimeout:
        why = opened.client.why(run.id)
        late = f"run {run.id} has not ended within {timeout:g} s and goes on"
        raise ResultTimeout(f"{late}: {why}" if why else late) from None
    if as_json:
        info = run.info()
        told = {
            "id": str(run.id),
            "created": run.created,
            "status": info.status,
            "output": output,
            "error": info.error,
        }
        print_json(told)
    elif error is None:
        print_json(output)
    if error is not None:
        click.echo(f"stepwell: {one_line(error)}", err=True)
        sys.exit(FAILED)


def _report(done: Summary, as_json: bool) -> None:
    if as_json:
        print_json(done.to_json())
    else:
        where = f" (see {done.rejects_file})" if done.rejected else ""
        click.echo(
            f"enqueued {done.enqueued:,}, duplicates {done.duplicates:,}, rejected {done.rejected:,}{where}"
        )
    if done.rejected and not done.enqueued and not done.duplicates:
        sys.exit(FAILED)
