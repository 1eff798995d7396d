"""The steps from one version of the schema to the next, as `NNNN_name.sql`.

Version 1 is `schema.sql` itself. `schema.sql` always holds the whole schema of the newest version: an empty
database gets it in one piece, an older one gets the files between its version and the newest. The first
change therefore adds two files: `0001_schema.sql`, a copy of `schema.sql` as version 1 had it, and
`0002_….sql`, which makes the new `schema.sql` out of it. A test installs both ways and compares.

Each file runs in one transaction. Functions that workers call carry a version in their names (`claim_v1`),
so that two releases can share a database during a rolling deploy: a migration adds `_v2` beside `_v1`, a
later release removes `_v1`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Migration:
    """One step: it brings the schema from `version - 1` to `version`."""

    version: int
    name: str
    sql: str


def numbered() -> list[Migration]:
    """Return the numbered files in order of their versions."""
    found = []
    for file in files(__name__).iterdir():
        match = re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name)
        if match:
            found.append(Migration(int(match[1]), match[2], file.read_text(encoding="utf-8")))
    return sorted(found, key=lambda migration: migration.version)
