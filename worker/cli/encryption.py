"""`stepwell encryption`: make a key for payloads, and tell which keys are still in use."""

from __future__ import annotations

import base64
import secrets
from datetime import UTC, datetime

import click

from outbox.sealing import KEY_BYTES, Keyring
from outbox.settings import Settings
from worker.cli.connecting import session
from worker.cli.options import database_option, json_option
from worker.cli.rendering import console, plain, print_json, table
from worker.queries import load


@click.group()
def encryption() -> None:
    """Make keys for payloads, and tell which are in use."""


@encryption.command("key")
@click.option("--id", "name", help="The id of the key.  [default: the year and month]")
def make_key(name: str | None) -> None:
    """Print a new key, as STEPWELL_ENCRYPTION_KEYS and STEPWELL_ENCRYPTION_KEYS_FILE take it."""
    name = name or f"{datetime.now(UTC):%Y-%m}"
    line = f"{name}:{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}"
    Keyring.of(line)
    click.echo(line)


@encryption.command("status")
@json_option
@database_option
def status(settings: Settings, as_json: bool) -> None:
    """Count the values that are sealed with each key. A key that is not listed is not needed any more.

    Every table is read: on a large database that takes a while.
    """
    here = settings.keyring().ids
    counts: dict[str, dict[str, int]] = {key: {} for key in here}
    with session(settings) as opened:
        for place, key, count in opened.connection.execute(load("cli_sealed")):
            counts.setdefault(key, {})[place] = count
    if as_json:
        keys = [
            {"key": key, "here": key in here, "seals": key in here[:1], "values": places}
            for key, places in counts.items()
        ]
        print_json({"keys": keys})
        return
    if not counts:
        click.echo("nothing is sealed, and no key is given", err=True)
        return
    drawn = table("key", "values", "")
    for key, places in counts.items():
        where = ", ".join(f"{place} {count:,}" for place, count in sorted(places.items()))
        what = "" if key in here else "not given here"
        what = "seals new values" if key in here[:1] else what
        told = "; ".join(each for each in (what, where) if each)
        drawn.add_row(plain(key), plain(f"{sum(places.values()):,}"), plain(told))
    console().print(drawn)
