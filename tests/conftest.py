"""Fixtures: one Postgres cluster for the session, a database of its own for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import hypothesis
import psycopg
import pytest
import pytest_asyncio
from psycopg.rows import TupleRow

from outbox.database import connect, connect_async
from tests import postgres
from tests.postgres import Cluster

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


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running server with the template of the schema. A test may stop, restart or kill it."""
    with postgres.running(request.config.getoption("--postgres")) as started:
        started.make_template()
        yield started


@pytest.fixture
def database_url(cluster: Cluster) -> Iterator[str]:
    """A fresh database with the schema; dropped afterwards, whoever is still connected."""
    with cluster.database() as url:
        yield url


@pytest.fixture
def empty_database_url(cluster: Cluster) -> Iterator[str]:
    """A fresh database without the schema."""
    with cluster.database(template=None) as url:
        yield url


@pytest.fixture
def db(database_url: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """An autocommit connection to `database_url`."""
    with connect(database_url, application_name="test") as connection:
        yield connection


@pytest_asyncio.fixture
async def adb(database_url: str) -> AsyncIterator[psycopg.AsyncConnection[TupleRow]]:
    """An asynchronous autocommit connection to `database_url`."""
    async with await connect_async(database_url, application_name="test") as connection:
        yield connection
