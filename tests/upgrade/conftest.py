"""A database as the previous release has left it, and that release."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox.database import connect
from tests.postgres import Cluster
from tests.upgrade import previous
from tests.upgrade.versions import install


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The previous release, unpacked."""
    return previous.unpacked(tmp_path_factory.mktemp("previous"))


@pytest.fixture
def old_url(cluster: Cluster) -> Iterator[str]:
    """A fresh database with the schema of the previous release."""
    with cluster.database(template=None) as url:
        with connect(url, application_name="test") as connection:
            install(connection, previous.SCHEMA_VERSION)
        yield url


@pytest.fixture
def old_db(old_url: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """An autocommit connection to `old_url`."""
    with connect(old_url, application_name="test") as connection:
        yield connection
