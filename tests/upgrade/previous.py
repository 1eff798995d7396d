"""The previous release, to run its workers and its producers beside this one's: `python -m tests.upgrade.previous TAG`.

It is kept as an archive beside this file, and not taken from the history: a shallow clone and a source distribution have
none, and a test that skips there is a test that nobody misses. 300 kB of what `git archive` has made, which knows its
commit: where the history is there, a test compares. After a release it is made anew from that release's tag.

Only what is imported is in it. What that imports in its turn is this environment's: a release works with all versions
of its dependencies that it allows.
"""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = Path(__file__).with_name("previous.tar.xz")
CONTENT = ("outbox", "worker", "schema.sql", "stepwell.py", "pyproject.toml", "LICENSE")
SCHEMA_VERSION = 1
"""Of that release."""


def unpacked(directory: Path) -> Path:
    """Unpack the previous release into an empty directory and return that, absolute."""
    with tarfile.open(ARCHIVE) as archive:
        # An archive of ours; Python before 3.11.4 has no filters.
        archive.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return directory.resolve()


def commit() -> str:
    """Return the commit that the archive was made of."""
    with tarfile.open(ARCHIVE) as archive:
        return archive.pax_headers["comment"]


def environment(release: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process that imports `release`, and the tests of this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STEPWELL_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, (release, ROOT))), **more}


def archived(what: str) -> bytes:
    """Return the archive of a commit or tag, uncompressed; raise CalledProcessError where the history lacks it."""
    return subprocess.run(
        ["git", "archive", "--format=tar", what, *CONTENT], cwd=ROOT, capture_output=True, check=True
    ).stdout


@click.command()
@click.argument("what", metavar="TAG")
def main(what: str) -> None:
    """Make the archive anew, of the release that has this tag; then set SCHEMA_VERSION here to that release's."""
    full = subprocess.run(
        ["git", "rev-parse", f"{what}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    ARCHIVE.write_bytes(lzma.compress(archived(full), preset=9 | lzma.PRESET_EXTREME))
    click.echo(f"{ARCHIVE.relative_to(ROOT)}: {ARCHIVE.stat().st_size:,} bytes of {full}")


if __name__ == "__main__":
    sys.exit(main())
