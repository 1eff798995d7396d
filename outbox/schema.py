"""Install the schema, bring it up to date, and check that it fits.

`migrate` is for one connection with the right to create: any number may call it at once, one at a time
works. `check` is for everybody else, needs no rights, and names the command to run.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
from psycopg.errors import InsufficientPrivilege, LockNotAvailable
from psycopg.rows import TupleRow, tuple_row

from outbox import migrations
from outbox.errors import SchemaError
from outbox.migrations import Migration
from outbox.queries import load

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
OLDEST_SERVER = 15  # what the tests cover
MIGRATE_LOCK_KEY = 0x5745_4C4C_5354_4550  # "WELLSTEP"
LOCK_TIMEOUT = "60s"
CLAIMANT_FUNCTIONS = ("register_v1", "claim_v1", "flush_v1", "promote_v1", "bury_v1", "reclaim_v1")


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


def migrate(connection: psycopg.Connection[Any]) -> list[str]:
    """Bring the database up to date and return what was applied, "1 schema"; nothing when it is.

    The connection must be in autocommit mode: each step is a transaction of its own. A newer schema is
    left as it is. Raises SchemaError when the role may not, or when another migrate takes over a minute.
    """
    with _serialised(connection):
        steps = _steps_from(_inspect(connection))
        for step, versions in steps:
            _apply(connection, step, versions)
        return [_label(step) for step, _ in steps]


def pending(connection: psycopg.Connection[Any]) -> list[str]:
    """Return what `migrate` would apply, in its words."""
    return [_label(step) for step, _ in _steps_from(_inspect(connection))]


def print_plan(connection: psycopg.Connection[Any]) -> str:
    """Return the SQL that `migrate` would run, as one script; empty when there is nothing to do."""
    return "\n".join(_script(step, versions) for step, versions in _steps_from(_inspect(connection)))


def _steps_from(found: Installed) -> list[tuple[Migration, list[Migration]]]:
    """Return each step to run with the versions that it leaves recorded."""
    if not found.has_schema:
        whole = Migration(SCHEMA_VERSION, "schema", schema_sql())
        return [(whole, _all_versions())]
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
    return [(step, [step]) for step in migrations.numbered() if version < step.version <= SCHEMA_VERSION]


def _all_versions() -> list[Migration]:
    numbered = {step.version: step for step in migrations.numbered()}
    return [numbered.get(at, Migration(at, "schema", "")) for at in range(1, SCHEMA_VERSION + 1)]


def _apply(connection: psycopg.Connection[Any], step: Migration, versions: Sequence[Migration]) -> None:
    try:
        with connection.transaction():
            connection.execute(step.sql.encode())
            for version in versions:
                connection.execute(
                    load("record_migration"), {"version": version.version, "name": version.name}
                )
            if _is_whole(versions):
                connection.execute(load("prime_statistics"))
    except InsufficientPrivilege as error:
        raise SchemaError(
            f"the role {connection.info.user!r} may not install Stepwell in the database "
            f"{connection.info.dbname!r} ({error.diag.message_primary}): run `stepwell migrate` as the owner "
            "of the database, or grant the role CREATE on it"
        ) from error
    logger.info("applied migration %s", _label(step))


def _script(step: Migration, versions: Sequence[Migration]) -> str:
    row = "insert into stepwell.migrations (version, name) values ({}, '{}');"
    recorded = [row.format(one.version, one.name) for one in versions]
    primed = [load("prime_statistics") + ";"] if _is_whole(versions) else []
    return "\n".join([f"-- {_label(step)}", "begin;", step.sql, *recorded, *primed, "commit;", ""])


def _is_whole(versions: Sequence[Migration]) -> bool:
    return versions[0].version == 1


def _label(step: Migration) -> str:
    return f"{step.version} {step.name}"


@contextmanager
def _serialised(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Hold the advisory lock of migrations; and have what the scripts warn of logged."""
    _require_server(connection)
    connection.add_notice_handler(_log_notice)
    connection.execute(f"set lock_timeout = '{LOCK_TIMEOUT}'")
    try:
        _take_turn(connection)
        try:
            yield
        finally:
            if not connection.broken:  # otherwise the lock went with the session
                connection.execute("select pg_advisory_unlock(%s)", [MIGRATE_LOCK_KEY])
    except LockNotAvailable:
        raise SchemaError(
            "a transaction that uses the schema was in the way for a minute: try again when it has ended"
        ) from None
    finally:
        connection.remove_notice_handler(_log_notice)
        if not connection.broken:
            connection.execute("reset lock_timeout")


def _take_turn(connection: psycopg.Connection[Any]) -> None:
    """Wait for the lock of migrations, but not for ever: whoever may connect can hold it."""
    try:
        connection.execute("select pg_advisory_lock(%s)", [MIGRATE_LOCK_KEY])
    except LockNotAvailable:
        holder = connection.execute(load("migrate_holder"), {"key": MIGRATE_LOCK_KEY}).fetchone()
        who = "somebody who has gone meanwhile"
        if holder is not None:
            pid, role, name = holder
            who = (
                f"a session of role {role!r} (process {pid}, application {name!r}); if that is no migrate, "
                f"end it with `select pg_terminate_backend({pid})`"
            )
        raise SchemaError(
            f"another `stepwell migrate` was in the way for a minute, or what has taken its lock: {who}. "
            "Try again then; nothing was changed"
        ) from None


def _log_notice(notice: psycopg.errors.Diagnostic) -> None:
    if notice.severity_nonlocalized == "WARNING":
        logger.warning("the database says: %s", notice.message_primary)


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
