"""Fixtures: one Postgres cluster for the session, a database of its own for each test.

With `--pgbouncer` what tests/integration tests reaches the database through a PgBouncer in transaction mode (`tests.pooler`),
while the connections that tests look with go around it. A test that is marked `direct` goes around it altogether.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest
import pytest_asyncio
from psycopg.rows import TupleRow

from outbox.database import connect, connect_async
from tests import postgres
from tests.pooler import Pooler, Unavailable, direct
from tests.postgres import Cluster

TIER = Path(__file__).parent / "integration"

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("stepwell", deadline=None)
hypothesis.settings.load_profile("stepwell")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres",
        type=int,
        choices=postgres.VERSIONS,
        default=18,
        help="major version to test on: 18 and 16 are embedded, 15 is the system's",
    )
    parser.addoption(
        "--pgbouncer", action="store_true", help="have what is tested go through a real PgBouncer"
    )


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running server with the template of the schema. A test may stop, restart or kill it."""
    with postgres.running(request.config.getoption("--postgres")) as started:
        started.make_template()
        yield started


@pytest.fixture(scope="session")
def pooler(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Pooler | None]:
    """The PgBouncer of the session, None without `--pgbouncer`."""
    if not request.config.getoption("--pgbouncer"):
        yield None
        return
    with Pooler(cluster) as started:
        yield started


@pytest.fixture(scope="module")
def bouncer(cluster: Cluster) -> Iterator[Pooler]:
    """A PgBouncer for tests of what is behind one."""
    try:
        with Pooler(cluster) as started:
            yield started
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def database_url(request: pytest.FixtureRequest, cluster: Cluster, pooler: Pooler | None) -> Iterator[str]:
    """A fresh database with the schema; dropped afterwards, whoever is still connected."""
    with cluster.database() as url:
        yield _by_way_of(pooler, request, url)


@pytest.fixture
def empty_database_url(
    request: pytest.FixtureRequest, cluster: Cluster, pooler: Pooler | None
) -> Iterator[str]:
    """A fresh database without the schema."""
    with cluster.database(template=None) as url:
        yield _by_way_of(pooler, request, url)


@pytest.fixture(autouse=True)
def _quick_polls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Behind a pooler workers are not rung for; have those that go by the environment look often."""
    # Not the fixture: what a test patches by that one has to be put right before its other fixtures end.
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--pgbouncer") and TIER in request.path.parents:
            patch.setenv("STEPWELL_POLL_SECONDS", "0.1")
        yield


def _by_way_of(pooler: Pooler | None, request: pytest.FixtureRequest, url: str) -> str:
    if pooler is None or TIER not in request.path.parents or request.node.get_closest_marker("direct"):
        return url
    return pooler.warmed(url)


@pytest.fixture
def db(database_url: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """An autocommit connection to the database of `database_url`."""
    with connect(direct(database_url), application_name="test") as connection:
        yield connection


@pytest_asyncio.fixture
async def adb(database_url: str) -> AsyncIterator[psycopg.AsyncConnection[TupleRow]]:
    """An asynchronous autocommit connection to the database of `database_url`."""
    async with await connect_async(direct(database_url), application_name="test") as connection:
        yield connection
