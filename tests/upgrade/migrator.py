"""A migrate that a test can kill: `python -m tests.upgrade.migrator URL FILE…`.

As `stepwell migrate`, of a release that has the migrations in these files beside those that there are.
"""

# ruff: noqa: T201 - a script that prints

from __future__ import annotations

import re
import sys
from pathlib import Path

from outbox import migrations, schema
from outbox.database import connect


def main(url: str, files: list[str]) -> None:
    found = migrations.numbered()
    for file in map(Path, files):
        match = re.fullmatch(r"(\d{4})_(\w+)", file.stem)
        assert match is not None
        found.append(migrations.read(int(match[1]), match[2], file.read_text()))
    schema.SCHEMA_VERSION = found[-1].version
    migrations.numbered = lambda: found
    with connect(url, application_name="stepwell cli") as connection:
        for title in schema.migrate(connection, tell=lambda sentence: print(sentence, flush=True)):
            print(f"applied {title}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
