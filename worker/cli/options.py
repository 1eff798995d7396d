"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from outbox.errors import ConfigError
from outbox.settings import Settings
from outbox.tracing import context_text

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def database_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --database-url; the command gets `settings`."""

    @functools.wraps(command)
    def with_settings(*args: Any, database_url: str | None, **options: Any) -> Any:
        return command(*args, settings=Settings.load(database_url=database_url), **options)

    option = click.option(
        "--database-url",
        metavar="URL",
        help="Where Postgres is. `ps` shows options to everybody: give an address with a password by "
        "STEPWELL_DATABASE_URL.  [default: STEPWELL_DATABASE_URL, else an embedded one in .stepwell]",
    )
    return option(with_settings)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def duration(_ctx: click.Context, _param: click.Parameter, text: str | None) -> float | None:
    """Return seconds: a callback for options that take 90, 1.5h or 250ms."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|m|h|d)?", text.strip())
    if match is None:
        raise click.BadParameter(
            f"{text!r} is no duration: give seconds, or a number with ms, s, m, h or d, as 1.5h"
        )
    return float(match[1]) * _UNITS[match[2] or "s"]


def moment(_ctx: click.Context, _param: click.Parameter, text: str | None) -> datetime | None:
    """Return a time in ISO 8601, local time where it has no offset: a callback for options."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no time: write 2026-11-22T18:00 or 2026-11-22T17:00:00Z"
        ) from None
    return found if found.tzinfo else found.astimezone()


def traceparent(_ctx: click.Context, _param: click.Parameter, text: str | None) -> str | None:
    """Return a W3C trace context as it is: a callback for options."""
    try:
        return None if text is None else context_text(text)
    except ConfigError:
        raise click.BadParameter(
            f"{text!r} is no W3C traceparent: write 00-TRACE-SPAN-FLAGS in lower-case hex"
        ) from None


def labels(_ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """Return name → value: a callback for options that can be repeated."""
    found = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not given or not name:
            raise click.BadParameter(f"{text!r} is no label: write name=value")
        found[name] = value
    return found
