"""Older versions of the schema, and migrations that are not there."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from outbox import migrations, schema
from outbox.migrations import Migration


def install(connection: psycopg.Connection[Any], version: int) -> None:
    """Install a version of the schema in an empty database, as its release did and its successors went on."""
    first, *later = migrations.numbered()
    scripts = [migrations.installing(first.sql, [first], 60)]
    scripts += [migrations.applying(each, 60) for each in later if each.version <= version]
    for script in scripts:
        for statement in script.statements:
            connection.execute(statement.encode())


def migration(name: str, sql: str, *, locks: str = "none", transaction: str = "one") -> Migration:
    """Return a migration that follows this release's, as it would be read from a file."""
    header = f"-- Purpose: a test.\n-- Transaction: {transaction}.\n-- Locks: {locks}.\n\n"
    return migrations.read(schema.SCHEMA_VERSION + 1, name, header + textwrap.dedent(sql).lstrip())


def release_next(monkeypatch: pytest.MonkeyPatch, made: Sequence[Migration]) -> None:
    """Pretend that the next release has these migrations beside those that there are; their versions follow."""
    known = migrations.numbered()
    last = schema.SCHEMA_VERSION
    more = [
        Migration(last + i, each.name, each.sql, each.locks, each.in_transaction)
        for i, each in enumerate(made, 1)
    ]
    whole = schema.schema_sql() + "".join(each.sql for each in more)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", last + len(more))
    monkeypatch.setattr(schema, "schema_sql", lambda: whole)
    monkeypatch.setattr(migrations, "numbered", lambda: known + more)
