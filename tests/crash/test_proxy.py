"""The proxy of the crash tests loses what it is told to lose, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from outbox.database import connect
from tests.crash.proxy import Proxy
from tests.postgres import Cluster
from tests.waiting import wait_until

DB = psycopg.Connection[Any]


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    with Proxy(cluster) as running:
        yield running


@pytest.fixture
def by_way(proxy: Proxy, database_url: str, db: DB) -> Iterator[DB]:
    db.execute("create table notes (text text)")
    with connect(proxy.url(urlsplit(database_url).path[1:]), application_name="by way") as connection:
        yield connection


def _note(connection: DB, text: str) -> None:
    connection.execute("insert into notes values (%s)", (text,), prepare=True)


def _notes(db: DB) -> list[str]:
    return [text for (text,) in db.execute("select text from notes order by text").fetchall()]


def test_the_proxy_forwards(by_way: DB, db: DB) -> None:
    _note(by_way, "one")
    assert by_way.execute("select count(*) from generate_series(1, 100000) g, notes").fetchone() == (100000,)
    with by_way.pipeline():
        _note(by_way, "two")
        _note(by_way, "three")
    assert _notes(db) == ["one", "three", "two"]


def test_a_request_that_is_cut_before_never_comes_to_the_server(proxy: Proxy, by_way: DB, db: DB) -> None:
    _note(by_way, "one")
    trap = proxy.arm("insert into notes", "cut_before", request=b"two")
    with pytest.raises(psycopg.OperationalError):
        _note(by_way, "two")
    trap.wait()
    assert _notes(db) == ["one"]


def test_a_request_that_is_cut_after_was_carried_out(proxy: Proxy, by_way: DB, db: DB) -> None:
    trap = proxy.arm("insert into notes", "cut_after", request=b"two")
    _note(by_way, "one")
    with pytest.raises(psycopg.OperationalError):
        _note(by_way, "two")
    trap.wait()
    assert _notes(db) == ["one", "two"]


def test_a_held_request_comes_to_the_server_after_its_client_is_gone(
    proxy: Proxy, by_way: DB, db: DB
) -> None:
    trap = proxy.arm("insert into notes", "hold")
    by_way.pgconn.send_query(b"insert into notes values ('one')")
    trap.wait()
    by_way.close()
    assert _notes(db) == []
    trap.release()
    wait_until(lambda: _notes(db) == ["one"])


def _failing(connection: DB, text: str) -> None:
    try:
        _note(connection, text)
    except psycopg.OperationalError:
        return


def test_a_held_answer_belongs_to_what_the_server_has_done(proxy: Proxy, by_way: DB, db: DB) -> None:
    trap = proxy.arm("insert into notes", "hold_answer")
    client = threading.Thread(target=_note, args=(by_way, "one"))
    client.start()
    trap.wait()
    assert _notes(db) == ["one"]
    assert client.is_alive()
    trap.release()
    client.join(10)
    assert not client.is_alive()


def test_a_trap_may_wait_for_a_certain_answer(proxy: Proxy, by_way: DB) -> None:
    trap = proxy.arm("generate_series", "cut_after", answer=b"42")
    assert by_way.execute("select g from generate_series(1, 3) g").fetchall() == [(1,), (2,), (3,)]
    with pytest.raises(psycopg.OperationalError):
        by_way.execute("select g from generate_series(42, 42) g")
    assert trap.times == 1


def test_a_frozen_proxy_keeps_what_comes_and_a_black_hole_loses_it(proxy: Proxy, by_way: DB, db: DB) -> None:
    proxy.freeze()
    client = threading.Thread(target=_note, args=(by_way, "one"))
    client.start()
    proxy.thaw()
    client.join(10)
    assert _notes(db) == ["one"]

    proxy.blackhole()
    client = threading.Thread(target=_failing, args=(by_way, "two"))
    client.start()
    wait_until(lambda: any(link.tainted for link in list(proxy._links)))
    proxy.restore()
    client.join(10)
    assert _notes(db) == ["one"]
    assert by_way.broken


def test_connections_are_cut_by_the_name_of_their_application(proxy: Proxy, by_way: DB) -> None:
    assert proxy.cut("somebody else") == 0
    assert proxy.cut("by way") == 1
    with pytest.raises(psycopg.OperationalError):
        by_way.execute("select 1")


def test_the_proxy_outlives_a_restart_of_the_server(
    cluster: Cluster, proxy: Proxy, database_url: str
) -> None:
    url = proxy.url(urlsplit(database_url).path[1:])
    with connect(url, application_name="before") as connection:
        cluster.restart("immediate")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    with connect(url, application_name="after") as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_a_frozen_server_answers_nobody_until_it_is_thawed(cluster: Cluster, by_way: DB) -> None:
    cluster.freeze()
    client = threading.Thread(target=_note, args=(by_way, "one"))
    try:
        client.start()
        wait_until(lambda: {_state(pid) for pid in cluster.processes()} == {"T"})
        assert client.is_alive()
    finally:
        cluster.thaw()
    client.join(10)
    assert not client.is_alive()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
