"""The database that a command works with: the caller's own, or the embedded one.

The caller's own database is never changed by anything but `stepwell migrate`. The embedded one is ours: it is
started when it does not run, gets the schema by itself, and stops with the command that started it unless
somebody else is connected. What was done to it is said in one line on stderr.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import click
import psycopg

from outbox import schema
from outbox.client import Client
from outbox.database import EmbeddedPostgres, connect
from outbox.settings import Settings

APPLICATION_NAME = "stepwell cli"


@dataclass(frozen=True, slots=True)
class Session:
    """A client, and a connection in autocommit mode for what a client does not do."""

    client: Client
    connection: psycopg.Connection[Any]


@contextmanager
def session(settings: Settings) -> Iterator[Session]:
    """Yield a session with the database of `settings`, whose schema fits. Raises SchemaError if it does not."""
    with (
        database(settings) as url,
        connect(url, application_name=APPLICATION_NAME) as connection,
    ):
        schema.check(connection)
        with Client(url, settings=settings) as client:
            yield Session(client, connection)


@contextmanager
def database(settings: Settings, *, migrated: bool = True) -> Iterator[str]:
    """Yield the URL of the database; the embedded one runs for as long, and has the schema if `migrated`."""
    if settings.database_url:
        yield settings.database_url
        return
    server = EmbeddedPostgres(settings)
    with _stopping_on_sigterm():
        try:
            url = server.start()
            applied = []
            if migrated:
                with connect(url, application_name=APPLICATION_NAME) as connection:
                    applied = schema.migrate(connection)
            _announce(server, applied)
            yield url
        finally:
            server.stop()


def _announce(server: EmbeddedPostgres, applied: list[str]) -> None:
    done = ["started for this command"] if server.started_here else ["already running"]
    if applied:
        whole = applied == [f"{schema.SCHEMA_VERSION} schema"]
        done.append("schema installed" if whole else "schema brought up to date")
    click.echo(
        f"stepwell: no database URL, so the embedded Postgres in {server.data_dir} ({', '.join(done)}): {server.url}",
        err=True,
    )


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that the server which it started is stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)
