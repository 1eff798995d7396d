"""Draft the migration that a changed `schema.sql` needs: `python -m tests.upgrade.draft NAME`, or `make migration NAME=…`.

Installs what the migrations make and what `schema.sql` makes, compares the catalogs, and prints what the next file could
hold. Functions are written as `schema.sql` has them: those that are new with their privileges, those with other
parameters or in another language after the former one was set aside. Of everything else it only says what is missing: a person has to
think about how to get there while everybody works (CONTRIBUTING.md).
"""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from outbox import migrations, schema
from outbox.database import connect
from tests import postgres
from tests.upgrade.catalog import Catalog, catalog, differences
from tests.upgrade.versions import install

ROLES = ("stepwell_producer", "stepwell_worker", "stepwell_viewer")
HEADER = """-- Purpose: … and why.
-- Transaction: one.
-- Locks: none.
"""
# A role may be missing where the one that installs may not create it.
GRANT = """do $$
begin
    if exists (select from pg_roles where rolname = '{role}') then
        grant execute on function {functions} to {role};
    end if;
end
$$;
"""


def draft(have: Catalog, want: Catalog, whole: str, version: int) -> str:
    """Return the text of the migration to `version` that makes a schema that is wanted, written in `whole`, of another."""
    before = {name: made for (sort, name), made in have.items() if sort == "function"}
    after = {name: made for (sort, name), made in want.items() if sort == "function"}
    replaced = {
        name for name in before.keys() & after.keys()
        if before[name] != after[name] and _language(before[name]) == _language(after[name])
    }  # fmt: skip
    same = {name for name in before.keys() & after.keys() if before[name] == after[name]}
    aside, made = before.keys() - same - replaced, after.keys() - same - replaced
    parts = [HEADER]
    if aside:
        moved = [f"alter function {name} set schema stepwell_before_{version};\n" for name in sorted(aside)]
        parts.append(f"create schema stepwell_before_{version};\n" + "".join(moved))
    parts += [
        _written(name, whole).replace("create function", "create or replace function", 1)
        for name in sorted(replaced)
    ]
    parts += [_written(name, whole) for name in sorted(made)]
    if made:
        parts.append(f"revoke all on function {', '.join(sorted(made))} from public;\n")
    for role in ROLES:
        granted = sorted(name for name in made if f"{role}=X/" in (after[name][1] or ""))
        if granted:
            parts.append(GRANT.format(role=role, functions=", ".join(granted)))
    left = [line for line in differences(have, want) if not line.startswith("function ")]
    return "\n".join([*parts, *(f"-- TO DO: {line}\n" for line in left)])


def _language(made: Any) -> str:
    found = re.search(r"^ LANGUAGE (\w+)", made[0], re.MULTILINE)
    assert found is not None, made[0]
    return found[1]


def _bare(signature: str) -> str:
    return signature.partition("(")[0].removeprefix("stepwell.")


def _written(signature: str, whole: str) -> str:
    """Return a function as `schema.sql` has it."""
    pattern = rf"^create function stepwell\.{_bare(signature)}\(.*?^\$\$;\n"
    found = re.findall(pattern, whole, re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        return f"-- TO DO: {signature}, which schema.sql has {len(found)} times\n"
    return str(found[0])


@click.command()
@click.argument("name")
def main(name: str) -> None:
    """Print a draft of the next migration, and into which file it belongs."""
    version = migrations.numbered()[-1].version + 1
    with (
        postgres.running(18) as cluster,
        cluster.database(template=None) as upgraded,
        cluster.database(template=None) as fresh,
        connect(upgraded, application_name="draft") as have,
        connect(fresh, application_name="draft") as want,
    ):
        install(have, version - 1)
        want.execute(schema.schema_sql().encode())
        if not differences(catalog(have), catalog(want)):
            click.echo("schema.sql is what the migrations make: there is nothing to write", err=True)
            return
        click.echo(draft(catalog(have), catalog(want), schema.schema_sql(), version), nl=False)
        click.echo(
            f"for outbox/migrations/{version:04}_{name}.sql, with SCHEMA_VERSION = {version} in outbox/schema.py",
            err=True,
        )


if __name__ == "__main__":
    sys.exit(main())
