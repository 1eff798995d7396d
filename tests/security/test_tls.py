"""What a URL says of TLS reaches every connection: of clients, workers, transactional steps, supervisor and exporter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import psycopg
import pytest

from outbox import AsyncClient, Client
from outbox.database import connect, connect_async, parameters
from outbox.pools import async_pool, pool
from tests.security.tls import HOST, PASSWORD, Encrypted, encrypted_postgres
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]

FLOWS = """
import psycopg
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from worker import step, transaction, workflow

SAW = "insert into seen select '{}', ssl from pg_stat_ssl where pid = pg_backend_pid()"

@transaction
def by_psycopg(connection: psycopg.Connection) -> None:
    connection.execute(SAW.format("psycopg"))

@transaction
async def by_async_psycopg(connection: psycopg.AsyncConnection) -> None:
    await connection.execute(SAW.format("async psycopg"))

@transaction
def by_connection(connection: Connection) -> None:
    connection.execute(text(SAW.format("sqlalchemy")))

@transaction
def by_session(session: Session) -> None:
    session.execute(text(SAW.format("session")))

@transaction
async def by_async_connection(connection: AsyncConnection) -> None:
    await connection.execute(text(SAW.format("async sqlalchemy")))

@transaction
async def by_async_session(session: AsyncSession) -> None:
    await session.execute(text(SAW.format("async session")))

@workflow
async def everything() -> str:
    by_psycopg()
    await by_async_psycopg()
    by_connection()
    by_session()
    await by_async_connection()
    await by_async_session()
    return "done"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Encrypted]:
    try:
        with encrypted_postgres() as running:
            yield running
    except LookupError as missing:
        pytest.skip(str(missing))


@contextmanager
def started(directory: Path, url: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run `stepwell worker` with what it says in a file."""
    (directory / "flows.py").write_text(FLOWS)
    log = directory / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "worker", "flows.py", *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "STEPWELL_DATABASE_URL": url},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def rows(server: Encrypted, statement: str) -> list[tuple[Any, ...]]:
    with connect(server.local_url, application_name="test") as db:
        return db.execute(statement.encode()).fetchall()


def is_ready(address: str) -> bool:
    try:
        with urlopen(f"{address}/readyz", timeout=10) as answer:
            return bool(answer.status == 200)
    except HTTPError:  # 503: a beat is late
        return False


SESSIONS = (
    "select a.application_name, s.ssl, s.version, coalesce(s.client_dn, ''), a.usename"
    " from pg_stat_activity a join pg_stat_ssl s using (pid)"
    " where a.backend_type = 'client backend' and a.usename like 'with_%'"
)


@pytest.mark.crash
def test_every_backend_of_a_worker_tree_is_encrypted(server: Encrypted, tmp_path: Path) -> None:
    url = server.url_with_certificate()
    arguments = ("--processes", "2", "--metrics-port", "0", "--metrics-host", "127.0.0.1")
    with started(tmp_path, url, *arguments) as (process, log):
        address = wait_until(
            lambda: next((w for w in log.read_text().split() if w.startswith("http://")), "").partition("/metrics")[0],
            60, what="the exporter",
        )  # fmt: skip
        with Client(url) as client:
            runs = [client.enqueue("everything") for _ in range(4)]
            assert [run.result(timeout=60) for run in runs] == ["done"] * 4
        wait_until(lambda: is_ready(address), what="the supervisor to be ready")
        sessions = rows(server, SESSIONS)
        assert process.poll() is None

    names = {name for name, *_ in sessions}
    assert any(name == "stepwell exporter" for name in names), names
    assert any("supervisor" in name for name in names), names
    assert sum(name.removeprefix("stepwell ").isdigit() for name in names) == 2, names
    # Claimant, committer, doorbell of two processes; the supervisor's; the exporter's.
    assert len(sessions) >= 8
    for name, encrypted, version, shown, _ in sessions:
        assert (encrypted, version in ("TLSv1.2", "TLSv1.3")) == (True, True), name
        assert "with_certificate" in shown, name
    seen = rows(server, "select step, bool_and(ssl), count(*) from seen group by step")
    assert sorted(seen) == sorted(
        (kind, True, 4)
        for kind in ("psycopg", "async psycopg", "sqlalchemy", "session", "async sqlalchemy", "async session")
    )


@pytest.mark.crash
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sslrootcert": "wrong"}, "certificate verify failed"),
        ({"sslmode": "disable", "sslrootcert": None}, "no pg_hba.conf entry"),
        ({"sslrootcert": "/nonexistent/ca.crt"}, 'root certificate file "/nonexistent/ca.crt" does not exist'),
    ],
)  # fmt: skip
def test_a_worker_that_does_not_trust_the_server_says_why_and_does_no_work(
    server: Encrypted, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    if options["sslrootcert"] == "wrong":
        options = {"sslrootcert": server.wrong.certificate}
    before = rows(server, "select count(*) from stepwell.workers")
    with started(tmp_path, server.url(**options)) as (_, log):
        wait_until(lambda: told in log.read_text(), 60, what=f"{told!r} in the log: {log.read_text()}")
        said = log.read_text()
    assert rows(server, "select count(*) from stepwell.workers") == before
    assert PASSWORD not in said
    assert "Traceback" not in said, said


async def test_every_way_to_connect_is_encrypted(server: Encrypted) -> None:
    query = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
    url = server.url(channel_binding="require", require_auth="scram-sha-256")
    with connect(url, application_name="one") as one:
        assert one.execute(query).fetchone() == (True,)
    async with await connect_async(url, application_name="two") as two:
        assert await (await two.execute(query)).fetchone() == (True,)
    with pool(url, application_name="three", max_size=1) as many, many.connection() as three:
        assert three.execute(query).fetchone() == (True,)
    async with async_pool(url, application_name="four", max_size=1) as several, several.connection() as four:
        assert await (await four.execute(query)).fetchone() == (True,)
    with Client(url) as client:
        run = client.enqueue("nobody", key="tls").id
    async with AsyncClient(url) as aclient:
        assert (await aclient.enqueue("nobody", key="tls")).id == run


async def test_a_certificate_of_another_authority_is_refused_at_every_door(server: Encrypted) -> None:
    url = server.url(sslrootcert=server.wrong.certificate)
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        connect(url, application_name="one")
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        await connect_async(url, application_name="two")


def test_a_server_of_another_name_is_refused(server: Encrypted) -> None:
    url = server.url().replace(HOST, "elsewhere.stepwell.test")
    with pytest.raises(psycopg.OperationalError, match="does not match host name"):
        connect(url, application_name="one")


def test_channel_binding_is_refused_where_there_is_nothing_to_bind_to(server: Encrypted) -> None:
    url = server.url_with_certificate(channel_binding="require")  # no password is exchanged
    with pytest.raises(psycopg.OperationalError, match="channel binding required"):
        connect(url, application_name="one")


OPTIONS = {
    "sslmode": "verify-ca",
    "sslrootcert": "/etc/ssl/a ca.crt",
    "sslcert": "/home/me/c.crt",
    "sslkey": "/home/me/c.key",
    "sslpassword": "secret",
    "sslcrl": "/etc/ssl/a.crl",
    "sslsni": "0",
    "ssl_min_protocol_version": "TLSv1.3",
    "channel_binding": "require",
    "require_auth": "scram-sha-256",
    "gssencmode": "disable",
    "target_session_attrs": "read-write",
}


@pytest.mark.parametrize("form", ["url", "conninfo"])
def test_every_option_of_a_url_reaches_libpq(form: str) -> None:
    from urllib.parse import quote

    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    given = (
        "postgresql://me@h/d?"
        + "&".join(f"{name}={quote(value, safe='')}" for name, value in OPTIONS.items())
        if form == "url"
        else make_conninfo("", host="h", dbname="d", user="me", **OPTIONS)
    )
    sent = conninfo_to_dict(parameters(given, "me"))
    assert {name: sent.get(name) for name in OPTIONS} == OPTIONS


def test_a_command_tells_in_one_sentence_that_it_does_not_trust_the_server(
    server: Encrypted, tmp_path: Path
) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "worker.cli", "runs", "list"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={
            **os.environ, "PYTHONPATH": str(ROOT),
            "STEPWELL_DATABASE_URL": server.url(sslrootcert=server.wrong.certificate),
        },
    )  # fmt: skip
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.count("\n") == 1
    assert "certificate verify failed" in said.stderr
    assert PASSWORD not in said.stderr


def test_a_wrong_password_is_told_without_it(server: Encrypted, tmp_path: Path) -> None:
    url = server.url().replace("a-Pass", "an-0ther-Pass")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed") as refused:
        connect(url, application_name="one")
    assert "0ther" not in str(refused.value)
    with started(tmp_path, url) as (process, log):
        wait_until(lambda: "password authentication failed" in log.read_text(), 60, what="a complaint")
        assert "0ther" not in "".join(
            path.read_text() for path in Path(f"/proc/{process.pid}").glob("cmdline")
        )
        said = log.read_text()
    assert "0ther" not in said
    assert "Traceback" not in said, said
