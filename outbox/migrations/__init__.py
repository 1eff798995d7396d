"""The steps from one version of the schema to the next, as `NNNN_name.sql`, and what is sent to take them.

`schema.sql` always holds the whole schema of the newest version: an empty database gets it in one piece, an older one
gets the files between its version and the newest. Version 1 is the schema of the first release. A test installs both
ways and compares. A file that has been released is never changed, and nothing goes back to an older version: code does,
because each version serves the release before it as well. So functions that workers call carry a version in their names
(`claim_v1`): a migration adds `_v2` beside `_v1`, a later release removes `_v1`.

Workers are at work meanwhile. A file is one step, as its header says:

    -- Purpose: …
    -- Transaction: one.
    -- Locks: tasks, runs.       or none

It runs in one transaction, together with the record of its version. A lock that it queues for would keep everybody
waiting who comes after it, for as long as somebody has a transaction open; so it is tried for a moment, again and again
(`queries/patiently.sql`). `Locks` names the tables on which it takes a lock that others can be in the way of.

    -- Transaction: none.

is for what runs in none (`create index concurrently`) or in many (a `do` that commits after each batch). Each statement
is sent by itself, the version is recorded after the last one. What was cut short is done again from the first one, so
they have to be repeatable: `drop index concurrently if exists` comes before `create index concurrently`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from outbox.queries import load


@dataclass(frozen=True, slots=True)
class Migration:
    """One step: it brings the schema from `version - 1` to `version`. `locks` are tables without their schema."""

    version: int
    name: str
    sql: str
    locks: tuple[str, ...] = ()
    in_transaction: bool = True

    def __str__(self) -> str:
        return f"{self.version} {self.name}"


@dataclass(frozen=True, slots=True)
class Script:
    """What is sent to a connection in autocommit mode, statement by statement, by `migrate` as by psql."""

    title: str
    statements: tuple[str, ...]
    in_transaction: bool = True


def numbered() -> list[Migration]:
    """Return the numbered files in order of their versions."""
    found = []
    for file in files(__name__).iterdir():
        match = re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name)
        if match:
            found.append(read(int(match[1]), match[2], file.read_text(encoding="utf-8")))
    return sorted(found, key=lambda migration: migration.version)


def read(version: int, name: str, text: str) -> Migration:
    """Return the migration that a file holds; a header that leaves something out is a programming error."""
    if version == 1:  # schema.sql as it was, which has no such header
        return Migration(version, name, text)
    transaction = re.search(r"^-- Transaction: (one|none)\.$", text, re.MULTILINE)
    locks = re.search(r"^-- Locks: (\w+(?:, \w+)*)\.$", text, re.MULTILINE)
    if transaction is None or locks is None:
        raise ValueError(
            f"{version:04}_{name}.sql must begin with comments: its Purpose:, its Transaction: (one. or none.) and "
            "its Locks: (tables, or none.)"
        )
    tables = () if locks[1] == "none" else tuple(locks[1].split(", "))
    return Migration(version, name, text, tables, transaction[1] == "one")


# -- what is sent ------------------------------------------------------------------------------------


def installing(sql: str, versions: Sequence[Migration], patience_seconds: float) -> Script:
    """Return what installs the whole schema, of the last of these versions, in one transaction."""
    waiting = f"set local lock_timeout = '{patience_seconds * 1000:.0f}ms'"  # for another one that installs
    recorded = [_record(each) for each in versions]
    return Script(
        f"{versions[-1].version} schema",
        ("begin", waiting, sql, *recorded, load("prime_statistics"), "commit"),
    )


def applying(migration: Migration, patience_seconds: float) -> Script:
    """Return what takes one step, trying for `patience_seconds` to get its locks."""
    if migration.in_transaction:
        return Script(str(migration), (_patiently(migration, patience_seconds), DURABLY))
    return Script(str(migration), (*split(migration.sql), _record(migration)), in_transaction=False)


SESSION = ("set lock_timeout = 0", "set statement_timeout = 0")
"""What scripts rely on, whatever a role has by default. An index waits for every transaction that was there before it."""

DURABLY = "do $$ begin perform pg_catalog.pg_logical_emit_message(true, 'stepwell', 'migrated'); end $$"
"""A commit that waits for the disk: what was committed before it is durable then."""


def _patiently(migration: Migration, patience_seconds: float) -> str:
    tag = "$migration$"
    while tag in migration.sql:
        tag = f"{tag[:-1]}_$"
    filled = {
        "<tables>": f"{{{','.join(migration.locks)}}}",
        "<seconds>": f"{patience_seconds:g}",
        "<record>": _record(migration),
        "<title>": str(migration),
        "<migration>": f"{tag}\n{migration.sql}{tag}",  # the last one: nothing in it is filled in
    }
    text: str = load("patiently")
    for name, value in filled.items():
        text = text.replace(name, value)
    return text


def _record(migration: Migration) -> str:
    row = "insert into stepwell.migrations (version, name) values ({}, '{}')"  # of a file's name: \w+
    return row.format(migration.version, migration.name)


_TOKEN = re.compile(
    r"""--[^\n]* | /\*.*?\*/          # comments, texts, names and quoted bodies: whatever they hold, it ends nothing
      | '(?:[^']|'')*'
      | "[^"]*"
      | (?P<tag>\$\w*\$) .*? (?P=tag)
      | (?P<end>;)
      | [^;'"$/-]+ | .
    """,
    re.VERBOSE | re.DOTALL,
)


def split(sql: str) -> list[str]:
    """Return the statements of a script, without their semicolons and without what holds only comments."""
    statements, begin = [], 0
    for token in _TOKEN.finditer(sql):
        if token["end"]:
            statements.append(sql[begin : token.start()])
            begin = token.end()
    statements.append(sql[begin:])
    return [each.strip() for each in statements if re.sub(r"--[^\n]*", "", each).strip()]


def printed(scripts: Sequence[Script], lock_key: int) -> str:
    """Return scripts as one that psql runs; empty if there are none.

    It takes the lock of migrations for its session, or ends: psql could only wait for it in a transaction, which would
    keep an index that the other one builds waiting.
    """
    if not scripts:
        return ""
    alone = (
        "do $$ begin if not pg_catalog.pg_try_advisory_lock("
        f"{lock_key}) then raise 'another `stepwell migrate` is at work: run this when it has ended'; end if; end $$"
    )
    lines = ["\\set ON_ERROR_STOP on", *(f"{each};" for each in (*SESSION, alone))]
    for script in scripts:
        lines += ["", f"-- {script.title}", *(f"{each};" for each in script.statements)]
    return "\n".join([*lines, ""])
