"""Install the schema, bring it up to date, and check that it fits.

`migrate` is for one connection with the right to create: any number may call it at once, one at a time
works, and workers work on. `check` is for everybody else, needs no rights, and names the command to run.

A migration that is cut short, by whatever, leaves nothing that the next one does not put right: see
`outbox.migrations`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
from psycopg.errors import (
    DeadlockDetected,
    DuplicateSchema,
    InsufficientPrivilege,
    LockNotAvailable,
    UniqueViolation,
)
from psycopg.rows import TupleRow, tuple_row

from outbox import migrations, sessions
from outbox.errors import SchemaError
from outbox.migrations import Migration, Script
from outbox.queries import load

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 8
OLDEST_SERVER = 15  # what the tests cover
MIGRATE_LOCK_KEY = 0x5745_4C4C_5354_4550  # "WELLSTEP"
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.1
CLAIMANT_FUNCTIONS = (
    "register_v1", "claim_v1", "idle_v1", "flush_v1", "commit_step_v1", "promote_v1", "shelve_v1", "unshelve_v1",
    "bury_v1", "reclaim_v1",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Installed:
    """What a database holds. `version` is None when nothing is installed or this role may not look."""

    has_schema: bool
    has_migrations: bool
    may_read: bool
    functions: frozenset[str]
    version: int | None = None


def schema_sql() -> str:
    """Return schema.sql, from the installed package or from the root of a checkout."""
    packaged = files("outbox") / "schema.sql"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).resolve().parents[1] / "schema.sql").read_text(encoding="utf-8")


# -- migrate -----------------------------------------------------------------------------------------


def migrate(connection: psycopg.Connection[Any], tell: Callable[[str], object] | None = None) -> list[str]:
    """Bring the database up to date and return what was applied, "4 schema"; nothing when it is.

    The connection must be in autocommit mode: each migration commits by itself. `tell` is called with a sentence when
    one begins, or waits. A newer schema is left as it is. Raises SchemaError when the role may not, when another
    migrate takes over a minute, or when for a minute there is no moment without a transaction that is in the way; what
    was applied until then stays applied.
    """
    _require_server(connection)
    tell = tell or logger.info
    with _heard(connection, tell):
        if sessions.is_pooled(connection):
            return _migrate_lent(connection, tell)
        with _serialised(connection):
            scripts = _scripts_from(_inspect(connection))
            for script in scripts:
                _apply(connection, script, tell)
            return [script.title for script in scripts]


def _migrate_lent(connection: psycopg.Connection[Any], tell: Callable[[str], object]) -> list[str]:
    """Migrate through a connection pooler, where no lock can be held from one step to the next.

    Of two who take the same step the second one finds it recorded, and looks anew what there is to do.
    """
    applied: list[str] = []
    while scripts := _scripts_from(found := _inspect(connection)):
        script = scripts[0]
        if not script.in_transaction:
            raise SchemaError(
                f"migration {script.title} needs a session of its own, and this connection leads through a connection "
                "pooler: set STEPWELL_DIRECT_DATABASE_URL to the address of the database itself, and run "
                "`stepwell migrate` again; it goes on where it was"
            )
        try:
            _apply(connection, script, tell)
        except (UniqueViolation, DuplicateSchema):
            if _inspect(connection).version == found.version:
                raise
        else:
            applied.append(script.title)
    return applied


def pending(connection: psycopg.Connection[Any]) -> list[str]:
    """Return what `migrate` would apply, in its words."""
    return [script.title for script in _scripts_from(_inspect(connection))]


def print_plan(connection: psycopg.Connection[Any]) -> str:
    """Return what `migrate` would run, as one script for psql; empty when there is nothing to do."""
    return migrations.printed(_scripts_from(_inspect(connection)), MIGRATE_LOCK_KEY)


def installed_version(connection: psycopg.Connection[Any]) -> int | None:
    """Return the version of the schema; None when nothing is installed or this role may not look."""
    return _inspect(connection).version


def _scripts_from(found: Installed) -> list[Script]:
    if not found.has_schema:
        return [migrations.installing(schema_sql(), _all_versions(), PATIENCE_SECONDS)]
    if not found.has_migrations:
        raise SchemaError(
            "this database has a schema named stepwell that is not Stepwell's (it has no table "
            "stepwell.migrations): rename it, or choose another database"
        )
    if not found.may_read:
        raise SchemaError(
            "this role may not read stepwell.migrations: run `stepwell migrate` as the schema's owner"
        )
    version = found.version or 0
    return [
        migrations.applying(each, PATIENCE_SECONDS)
        for each in migrations.numbered()
        if version < each.version <= SCHEMA_VERSION
    ]


def _all_versions() -> list[Migration]:
    return [each for each in migrations.numbered() if each.version <= SCHEMA_VERSION]


def _apply(connection: psycopg.Connection[Any], script: Script, tell: Callable[[str], object]) -> None:
    tell(f"applying migration {script.title}")
    try:
        for statement in script.statements:
            connection.execute(statement.encode())
    except InsufficientPrivilege as error:
        raise SchemaError(
            f"the role {connection.info.user!r} may not install Stepwell in the database "
            f"{connection.info.dbname!r}, or change it there ({error.diag.message_primary}): run `stepwell migrate` "
            "as the owner of the schema, to install it as the owner of the database, or grant the role CREATE on it"
        ) from error
    except (LockNotAvailable, DeadlockDetected) as error:
        said = (error.diag.message_primary or "").removeprefix("stepwell: ")
        raise SchemaError(
            f"{said}; run `stepwell migrate` again when that has ended, or end it with "
            "`select pg_terminate_backend(PROCESS)`: it goes on where it was"
        ) from None
    finally:
        if not connection.closed:
            connection.rollback()  # of what has failed between begin and commit


@contextmanager
def _heard(connection: psycopg.Connection[Any], tell: Callable[[str], object]) -> Iterator[None]:
    """Pass on what the scripts say."""

    def heard(notice: psycopg.errors.Diagnostic) -> None:
        _pass_on(notice, tell)

    connection.add_notice_handler(heard)
    try:
        yield
    finally:
        connection.remove_notice_handler(heard)


@contextmanager
def _serialised(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Hold the advisory lock of migrations."""
    try:
        _take_turn(connection)
        try:
            for setting in migrations.SESSION:
                connection.execute(setting.encode())
            yield
        finally:
            if not connection.broken:  # otherwise the lock went with the session
                connection.execute("select pg_advisory_unlock(%s)", [MIGRATE_LOCK_KEY])
    finally:
        if not connection.broken:
            connection.execute("reset lock_timeout")
            connection.execute("reset statement_timeout")


def _take_turn(connection: psycopg.Connection[Any]) -> None:
    """Get the lock of migrations, asking for it again and again, but not for ever: whoever may connect can hold it.

    Whoever waits for it in the database does so in a transaction, and an index that is built concurrently waits for
    all transactions: he and its builder would wait for each other.
    """
    give_up = time.monotonic() + PATIENCE_SECONDS
    while connection.execute("select pg_try_advisory_lock(%s)", [MIGRATE_LOCK_KEY]).fetchone() != (True,):
        if time.monotonic() >= give_up:
            raise SchemaError(_who_migrates(connection))
        time.sleep(LOOK_SECONDS)


def _who_migrates(connection: psycopg.Connection[Any]) -> str:
    holder = connection.execute(load("migrate_holder"), {"key": MIGRATE_LOCK_KEY}).fetchone()
    who = "somebody who has gone meanwhile"
    if holder is not None:
        pid, role, name = holder
        who = (
            f"a session of role {role!r} (process {pid}, application {name!r}); if that is no migrate, "
            f"end it with `select pg_terminate_backend({pid})`"
        )
    return (
        f"another `stepwell migrate` was in the way for a minute, or what has taken its lock: {who}. "
        "Try again then; nothing was changed"
    )


def _pass_on(notice: psycopg.errors.Diagnostic, tell: Callable[[str], object]) -> None:
    said = notice.message_primary or ""
    if notice.severity_nonlocalized == "WARNING":
        logger.warning("the database says: %s", said)
    elif said.startswith("stepwell: "):
        tell(said.removeprefix("stepwell: "))


def _require_server(connection: psycopg.Connection[Any]) -> None:
    major = connection.info.server_version // 10000
    if major < OLDEST_SERVER:
        raise SchemaError(
            f"Stepwell needs PostgreSQL {OLDEST_SERVER} or newer; this server is version {major}"
        )


# -- check -------------------------------------------------------------------------------------------


def check(connection: psycopg.Connection[Any], functions: Collection[str] = ()) -> None:
    """Raise SchemaError, with the command to run, unless the schema is there and at least this release's.

    A newer one passes as long as it has `functions` (a worker's: CLAIMANT_FUNCTIONS). A role that may not
    read the version, a producer, is only told when the schema is missing.
    """
    _verify(_inspect(connection), functions)


async def check_async(connection: psycopg.AsyncConnection[Any], functions: Collection[str] = ()) -> None:
    """Raise what `check` raises."""
    cursor = connection.cursor(row_factory=tuple_row)
    found = _installed(await (await cursor.execute(load("inspect_schema"))).fetchone())
    if found.may_read:
        found = _with_version(found, await (await cursor.execute(load("schema_version"))).fetchone())
    _verify(found, functions)


def _inspect(connection: psycopg.Connection[Any]) -> Installed:
    cursor = connection.cursor(row_factory=tuple_row)
    found = _installed(cursor.execute(load("inspect_schema")).fetchone())
    if found.may_read:
        found = _with_version(found, cursor.execute(load("schema_version")).fetchone())
    return found


def _installed(row: TupleRow | None) -> Installed:
    assert row is not None  # the statement always answers with one row
    has_schema, has_migrations, may_read, functions = row
    return Installed(has_schema, has_migrations, may_read, frozenset(functions))


def _with_version(found: Installed, row: TupleRow | None) -> Installed:
    return replace(found, version=row[0] if row else None)


def _verify(found: Installed, functions: Collection[str]) -> None:
    if not found.has_migrations:
        raise SchemaError(
            "this database has no Stepwell schema (looked for table stepwell.migrations): "
            "run `stepwell migrate`"
        )
    if not found.may_read:
        logger.debug("the version of the schema is not checked: this role may not read it")
        return
    if found.version is None or found.version < SCHEMA_VERSION:
        raise SchemaError(
            f"this database has version {found.version or 0} of the Stepwell schema, this release needs "
            f"{SCHEMA_VERSION}: run `stepwell migrate`"
        )
    missing = [name for name in functions if name not in found.functions]
    if missing:
        raise SchemaError(
            f"this database has version {found.version} of the Stepwell schema, which has no "
            f"{', '.join(missing)} any more: this release is too old for it, install a newer one"
        )
