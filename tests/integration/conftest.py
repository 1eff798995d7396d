"""Fixtures of the tests against a real Postgres."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.postgres import Cluster
from tests.protocol import Lab


@pytest.fixture(scope="session")
def shared_database_url(cluster: Cluster) -> Iterator[str]:
    """A database with the schema that tests share, one after the other: a fresh one costs half a second."""
    with cluster.database() as url:
        yield url


@pytest.fixture
def lab(cluster: Cluster, shared_database_url: str) -> Iterator[Lab]:
    """The shared database, emptied, with what a test of the protocol needs around it."""
    cluster.start()  # an earlier test may have left it down
    with Lab(shared_database_url) as opened:
        yield opened
