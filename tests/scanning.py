"""Everything that a database holds of Stepwell's, as one text for each place: to look for what must not be there."""

from __future__ import annotations

from typing import Any

import psycopg


def everything(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """Return the text of each row of each table of the schema, by 'table, row'."""
    tables = connection.execute(
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = 'stepwell' and c.relkind in ('r', 'p') order by 1"
    ).fetchall()
    assert len(tables) >= 12
    found = {}
    for (table,) in tables:
        rows = connection.execute(f"select t::text from stepwell.{table} t".encode()).fetchall()
        found.update({f"{table}, {number}": row for number, (row,) in enumerate(rows)})
    return found


def places_of(connection: psycopg.Connection[Any], marker: str) -> dict[str, str]:
    """Return the rows that hold a text, whole or as a part of another, in small or capital letters."""
    return {place: row for place, row in everything(connection).items() if marker.lower() in row.lower()}
