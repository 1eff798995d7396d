"""Where the testing kit's databases live."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from outbox import embedded
from outbox.database import connect
from tests.postgres import Cluster
from worker.testing import servers


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://host/shop", "postgresql://host/new"),
        (
            "postgres://u:p%2F@host:5432/shop?sslmode=disable",
            "postgres://u:p%2F@host:5432/new?sslmode=disable",
        ),
        ("postgresql://", "postgresql:///new"),
        ("postgresql://h1,h2:5433/?dbname=shop&user=u", "postgresql://h1,h2:5433/new?user=u"),
        (
            "postgresql://postgres@/x?host=/tmp/a&port=5432",
            "postgresql://postgres@/new?host=/tmp/a&port=5432",
        ),
        ("postgresql://host?dbname=shop", "postgresql://host/new"),
        ("host=/tmp dbname=shop user=u", "host=/tmp dbname=new user=u"),
    ],
)
def test_a_url_leads_to_another_database_of_the_same_server(url: str, expected: str) -> None:
    found = servers.with_database(url, "new")
    assert found == expected or ("://" not in url and conninfo_to_dict(found) == conninfo_to_dict(expected))


def test_a_database_is_copied_from_its_template(cluster: Cluster) -> None:
    cluster.start()
    with servers.Server(cluster.url()) as server, server.template() as template:
        with connect(template, application_name="test") as connection:
            connection.execute("create table ours (id int)")
        with server.database(template) as first, server.database(template) as second:
            assert first != second
            for url in (first, second):
                with connect(url, application_name="test") as connection:
                    connection.execute("insert into ours values (1)")
                    assert connection.execute("select count(*) from stepwell.runs, ours").fetchone() == (0,)


def test_a_restart_of_the_server_in_a_test_is_survived(cluster: Cluster) -> None:
    cluster.start()
    with servers.Server(cluster.url()) as server:
        with server.database() as url:
            cluster.restart()
            with connect(url, application_name="test"):
                pass  # still connected when it is dropped, or not
        with server.database():
            pass


def test_the_server_of_a_killed_session_is_removed_by_the_next() -> None:
    script = (
        "import os, signal\n"
        "from worker.testing import servers\n"
        "with servers.embedded_server() as url:\n"
        "    print(url, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    url, _ = killed.communicate(timeout=60)
    home = Path(url.partition("host=")[2].partition("&")[0]).parent
    assert str(killed.pid) in home.name
    assert embedded.Server(home, embedded.binaries(servers.VERSION)).pid is not None
    with servers.embedded_server() as own:
        assert not home.exists()
        assert str(os.getpid()) in own
        with connect(own, application_name="test") as connection:
            assert connection.execute("select 1").fetchone() == (1,)
