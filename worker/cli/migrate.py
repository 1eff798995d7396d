"""`stepwell migrate`: install the schema and keep it up to date."""

from __future__ import annotations

import sys

import click

from outbox import schema
from outbox.database import connect, direct_url
from outbox.settings import Settings
from worker.cli.connecting import APPLICATION_NAME, database
from worker.cli.mistakes import FAILED
from worker.cli.options import database_option, json_option
from worker.cli.rendering import print_json


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with status 1 if there is something to do.")
@click.option(
    "--print", "print_sql", is_flag=True, help="Change nothing; print the SQL that would be run, for psql."
)
@json_option
@database_option
def migrate(settings: Settings, check: bool, print_sql: bool, as_json: bool) -> None:
    """Install Stepwell's schema, or bring it up to date.

    Workers may be at work meanwhile, those of the release before as well. Running it again does nothing, or goes on
    where it was cut short; any number may run at once. The role needs the right to create a schema, or owns it.
    """
    if check and print_sql:
        raise click.UsageError("give --check or --print, not both")
    with (
        database(settings, migrated=False) as url,
        connect(direct_url(settings, url), application_name=APPLICATION_NAME) as connection,
    ):
        if print_sql:
            click.echo(schema.print_plan(connection), nl=False)
            return
        pending = schema.pending(connection) if check else []
        applied = [] if check else schema.migrate(connection, tell=_say)
        version = schema.installed_version(connection)
    if as_json:
        print_json({"applied": applied, "pending": pending})
    elif pending:
        click.echo(f"behind: {', '.join(pending)} to apply; run `stepwell migrate`")
    elif applied:
        click.echo(f"applied {', '.join(applied)}")
    else:
        click.echo(f"up to date (version {version})")
    if pending:
        sys.exit(FAILED)


def _say(sentence: str) -> None:
    click.echo(f"stepwell: {sentence}", err=True)
