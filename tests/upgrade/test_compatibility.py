"""Two releases and two schemas: who works with whom, and who refuses, with the sentence that says what to run."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import TupleRow

import worker.queries
from outbox import AsyncClient, Client, migrations, schema
from outbox.database import connect
from outbox.errors import SchemaError
from tests.upgrade import previous
from tests.upgrade.versions import install

Connection = psycopg.Connection[TupleRow]

APP = """
from worker import sleep, step, workflow

@step
async def greet(name: str) -> str:
    return f"hello {name}"

@workflow
async def welcome(name: str) -> str:
    greeting = await greet(name)
    await sleep(0.1)
    return greeting
"""
WORK = """
import os

import outbox
from outbox import Client, schema
from outbox.database import connect

url = os.environ["STEPWELL_DATABASE_URL"]
print(outbox.__file__)
with connect(url, application_name="test") as connection:
    schema.check(connection, schema.CLAIMANT_FUNCTIONS)
    print(schema.migrate(connection), schema.pending(connection), repr(schema.print_plan(connection)))
with Client() as client:
    run = client.enqueue("welcome", name="Ada", key="ada")
    print(client.enqueue("welcome", name="Ada", key="ada").created)
    print(run.result(timeout=60))
    print([each.name for each in client.history(run.id)])
    print(client.signal(run.id, "late"), client.cancel(run.id))
"""


def run_python(arguments: list[str], url: str, home: Path, release: Path | None) -> str:
    """Run Python with a release, or with this one; return what it has printed."""
    found = previous.environment(release or previous.ROOT, STEPWELL_DATABASE_URL=url)
    done = subprocess.run(
        [sys.executable, "-P", *arguments], env=found, cwd=home, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.crash
@pytest.mark.parametrize("version", range(previous.SCHEMA_VERSION, schema.SCHEMA_VERSION + 1))
def test_the_previous_release_works_with_every_schema_up_to_this_one(
    empty_database_url: str, release: Path, tmp_path: Path, version: int
) -> None:
    """Its workers, its clients and its migrate, which leaves a newer schema as it is."""
    with connect(empty_database_url, application_name="test") as connection:
        install(connection, version)
    (tmp_path / "flows.py").write_text(APP)
    with worker_of(release, empty_database_url, tmp_path):
        said = run_python(["-c", WORK], empty_database_url, tmp_path, release).splitlines()
    assert said[0] == str(release / "outbox" / "__init__.py")
    assert said[1:] == [
        "[] [] ''",
        "False",
        "hello Ada",
        "['greet', 'sleep', 'welcome']",
        "False False",
    ]


@contextlib.contextmanager
def worker_of(release: Path, url: str, home: Path) -> Iterator[None]:
    """Have a supervisor of a release at work inside the block; at its end it drains."""
    log = home / "worker.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.cli", "worker", "flows.py"],
            env=previous.environment(release, STEPWELL_DATABASE_URL=url), cwd=home, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0, log.read_text()


def test_the_command_upgrades_and_says_what_it_is_at(old_url: str, tmp_path: Path) -> None:
    def migrate(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "worker.cli", "migrate", *options],
            env=previous.environment(previous.ROOT, STEPWELL_DATABASE_URL=old_url),
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    titles = [str(each) for each in migrations.numbered() if each.version > previous.SCHEMA_VERSION]
    behind = migrate("--check")
    assert behind.returncode == 1
    assert behind.stdout == f"behind: {', '.join(titles)} to apply; run `stepwell migrate`\n"
    done = migrate()
    assert done.returncode == 0
    assert done.stdout == f"applied {', '.join(titles)}\n"
    assert done.stderr == "".join(f"stepwell: applying migration {title}\n" for title in titles)
    assert migrate().stdout == f"up to date (version {schema.SCHEMA_VERSION})\n"


def test_a_worker_of_this_release_refuses_the_previous_schema(old_url: str, tmp_path: Path) -> None:
    (tmp_path / "flows.py").write_text(APP)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "worker.cli", "worker", "flows.py"],
        env={**os.environ, "STEPWELL_DATABASE_URL": old_url, "PYTHONPATH": str(previous.ROOT)},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"stepwell: {refusal(previous.SCHEMA_VERSION)}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("version", range(previous.SCHEMA_VERSION, schema.SCHEMA_VERSION))
async def test_clients_of_this_release_refuse_a_schema_that_is_half_way(
    empty_database_url: str, version: int
) -> None:
    with connect(empty_database_url, application_name="test") as connection:
        install(connection, version)
        with pytest.raises(SchemaError, match=re.escape(refusal(version))):
            schema.check(connection, schema.CLAIMANT_FUNCTIONS)
    with Client(empty_database_url) as client, pytest.raises(SchemaError, match=re.escape(refusal(version))):
        client.enqueue("welcome")
    async with AsyncClient(empty_database_url) as client:
        with pytest.raises(SchemaError, match=re.escape(refusal(version))):
            await client.enqueue("welcome")


def refusal(version: int) -> str:
    return (
        f"this database has version {version} of the Stepwell schema, this release needs {schema.SCHEMA_VERSION}: "
        "run `stepwell migrate`"
    )


def test_a_worker_asks_for_every_function_of_the_protocol_that_it_calls() -> None:
    called = set()
    for file in files(worker.queries).iterdir():
        if file.name.endswith(".sql"):
            called |= set(re.findall(r"stepwell\.(\w+_v\d+)\(", file.read_text(encoding="utf-8")))
    assert set(schema.CLAIMANT_FUNCTIONS) == called


# -- the archive ---------------------------------------------------------------------------------------


def test_what_has_been_released_is_not_changed(release: Path) -> None:
    """A database may have been there: whoever changes such a migration makes two schemas of one version."""
    ours = {each.version: each.sql for each in migrations.numbered()}
    found = {
        int(file.name[:4]): file.read_text(encoding="utf-8")
        for file in (release / "outbox" / "migrations").glob("[0-9]*_*.sql")
    }
    if previous.SCHEMA_VERSION == 1:
        found[1] = (release / "schema.sql").read_text(encoding="utf-8")
    assert sorted(found) == list(range(1, previous.SCHEMA_VERSION + 1))
    assert {version: ours[version] for version in found} == found


def test_the_archive_is_what_the_commit_holds() -> None:
    try:
        whole = previous.archived(previous.commit())
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("no history here: a source distribution, or a shallow clone")
    kept = lzma.decompress(previous.ARCHIVE.read_bytes())
    assert contents(kept) == contents(whole)


def contents(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {each.name: found.read() for each in opened if (found := opened.extractfile(each)) is not None}
