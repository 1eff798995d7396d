"""What is exchanged with a run while it runs: `stepwell signal`, `stepwell runs state`, `stepwell runs stream`."""

from __future__ import annotations

from typing import Any

import click

from outbox.errors import RunConflict
from outbox.exchange import StreamItem
from outbox.settings import Settings
from worker.cli.connecting import session
from worker.cli.json_text import STDIN, given_text, read_json
from worker.cli.options import database_option, json_option
from worker.cli.rendering import compact, console, json_text, moment_text, one_line, plain, print_json
from worker.cli.run_ids import resolved
from worker.cli.run_view import state_view


@click.command()
@click.argument("run")
@click.argument("name")
@click.argument("payload", required=False)
@click.option("--text", "as_text", is_flag=True, help="PAYLOAD is a text, and not JSON.")
@json_option
@database_option
def signal(
    settings: Settings, run: str, name: str, payload: str | None, as_text: bool, as_json: bool
) -> None:
    """Send the signal NAME to a run, which takes it by wait_signal.

    PAYLOAD is JSON: 17, '{"by": "Ada"}', '"a text"'; "-" reads it from stdin. With --text it is a text as it is. Without
    it the payload is null. RUN is an id, or the beginning of one if that is unique.
    """
    value = _payload(payload, name, as_text)
    with session(settings) as opened:
        found = resolved(opened, run)
        if not opened.client.signal(found, name, value):
            raise RunConflict(f"run {found} has ended already, so nobody takes the signal")
    if as_json:
        print_json({"id": str(found), "sent": True})
    else:
        click.echo(f"{found} was sent {name!r}")


@click.command("state")
@click.argument("run")
@json_option
@database_option
def show_state(settings: Settings, run: str, as_json: bool) -> None:
    """Show what a run shows of itself: its progress, and what its body has set by set_state."""
    with session(settings) as opened:
        state = opened.client.state(resolved(opened, run))
    if as_json:
        print_json(state)
    elif state:
        out = console()
        for line in state_view(state, longest=None):
            out.print(line, soft_wrap=True)
    else:
        click.echo("it shows nothing of itself", err=True)


@click.command("stream")
@click.argument("run")
@click.argument("name", required=False)
@click.option("--follow", is_flag=True, help="Go on until the run has ended or is blocked.")
@click.option(
    "--after", type=click.IntRange(0), default=0, metavar="POSITION", help="Go on behind this item."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each item.")
@database_option
def follow_stream(
    settings: Settings, run: str, name: str | None, follow: bool, after: int, as_json: bool
) -> None:
    """Print what a run has emitted, all of it or the stream NAME."""
    with session(settings) as opened:
        items = opened.client.stream(resolved(opened, run), name, after=after, follow=follow)
        out = console()
        for item in items:
            if as_json:
                click.echo(json_text(item.to_json()))
            else:
                out.print(_line(item), soft_wrap=True)


def _line(item: StreamItem) -> Any:
    return plain(f"{moment_text(item.at)}  {item.name}  {one_line(compact(item.value))}")


def _payload(text: str | None, name: str, as_text: bool) -> Any:
    where = f"the payload of signal {name!r}"
    if text is None:
        return None
    if as_text:
        return given_text(text)
    hint = "" if text == STDIN else "; with --text it is taken as a text"
    return read_json(text, where, hint)
