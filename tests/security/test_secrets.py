"""Passwords and payloads stay where they belong: not in logs, errors, `ps`, reprs, metrics or names of sessions."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict

from outbox import AsyncClient, Client, ConfigError, Settings
from outbox.database import connect
from outbox.settings import without_password
from tests.waiting import wait_until
from worker.cli import main
from worker.supervision.pipe import Briefing
from worker.supervision.supervisor import Supervisor

Db = psycopg.Connection[Any]

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "Geh31mnis"
PAYLOAD = "V3rtraul1ch"


# -- how an address is shown ---------------------------------------------------------------------------


ADDRESSES = [
    f"postgresql://me:{PASSWORD}@h:5432/d",
    f"postgresql://me:{PASSWORD}@h1:5432,h2:5432/d?sslmode=require",
    f"postgresql://me:a@b:{PASSWORD}@h/d",
    f"postgresql://me:{PASSWORD}/x@h/d",
    f"postgresql://me:{PASSWORD}?x#y@h/d",
    f"postgresql://:{PASSWORD}@h/d",
    f"postgresql://h/d?user=me&password={PASSWORD}",
    f"postgresql://h/d?password={PASSWORD}&user=me",
    f"postgresql://h/d?PASSWORD={PASSWORD}",
    f"postgresql://h/d?sslkey=k&sslpassword={PASSWORD}",
    f"postgresql://h/d?oauth_client_id=i&oauth_client_secret={PASSWORD}",
    f"postgresql://h/d?scram_client_key={PASSWORD}&scram_server_key={PASSWORD}",
    f"host=h password={PASSWORD} dbname=d",
    f"host=h password = '{PASSWORD} {PASSWORD}' dbname=d",
    f"host=h password='a\\' {PASSWORD}' dbname=d",
    f"host=h sslpassword={PASSWORD} dbname=d",
    f"host=h dbname='postgresql://me:{PASSWORD}@h/d'",
    # What is no address, by a slip, is shown by the error that says so.
    f"postgresql+psycopg://me:{PASSWORD}@h/d",
    f"mysql://me:{PASSWORD}@h/d",
    f"postgresql:/me:{PASSWORD}@h/d",
    f"postgresql:me:{PASSWORD}@h/d",
    f"postgres//me:{PASSWORD}@h/d",
    f"me:{PASSWORD}@h/d",
    f"//me:{PASSWORD}@h/d",
    f" postgresql://me:{PASSWORD}@h/d",
    f"jdbc:postgresql://h/d?user=me&password={PASSWORD}",
    f"postgresql://me:{PASSWORD}\n@h/d",
]


def chain_of(error: BaseException | None) -> str:
    """Return what a traceback would show of an error and all that led to it."""
    said = ""
    while error is not None:
        said += f"{error!r} {error}\n"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return said


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_secret_of_an_address_is_shown(address: str) -> None:
    assert PASSWORD not in without_password(address)
    try:
        settings = Settings(database_url=address)
    except ConfigError as error:
        shown = chain_of(error)
    else:
        shown = f"{settings!r} {settings} {[settings]}"
    assert PASSWORD not in shown


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_error_of_connecting_shows_a_secret(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever libpq makes of it, and whoever prints the whole chain of causes."""
    try:
        given = conninfo_to_dict(address)
    except psycopg.Error:
        given = {}
    if given.get("host") or given.get("dbname"):
        monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")  # resolves nothing
        monkeypatch.setenv("PGPORT", "9")
    with pytest.raises((psycopg.OperationalError, ConfigError, psycopg.ProgrammingError)) as raised:
        connect(address, application_name="test")
    assert PASSWORD not in chain_of(raised.value)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_variable_that_is_no_address_is_told_without_its_secret(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("STEPWELL_DATABASE_URL", address)
    monkeypatch.setenv("STEPWELL_DATABASE_ULR", address)  # which is warned of
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")
    monkeypatch.setenv("PGPORT", "9")
    result = CliRunner().invoke(main, ["migrate"])
    assert result.exit_code in (1, 2)
    assert PASSWORD not in result.output
    assert PASSWORD not in caplog.text
    assert "Traceback" not in result.output


async def test_nothing_that_holds_an_address_shows_it() -> None:
    url = f"postgresql://me:{PASSWORD}@h/d"
    settings = Settings(database_url=url)
    held: list[Any] = [settings, Client(url), AsyncClient(url), Client(settings=settings)]
    held.append(Supervisor(settings, url, app="flows.py", processes=1))
    held.append(Briefing(settings=settings, url=url, app="", worker_id=1, supervisor_id=1, queues=()))
    for each in held:
        assert PASSWORD not in repr(each) + str(each), type(each)


def test_no_help_text_repeats_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_DATABASE_URL", f"postgresql://me:{PASSWORD}@h/d")
    commands = [
        [],
        ["migrate"],
        ["worker"],
        ["enqueue"],
        ["signal"],
        ["runs"],
        ["replay"],
        ["check"],
        ["demo"],
    ]
    commands += [["runs", name] for name in ("list", "show", "cancel", "retry", "export", "fork", "stream")]
    for command in commands:
        result = CliRunner().invoke(main, [*command, "--help"])
        assert result.exit_code == 0, result.output
        assert PASSWORD not in result.output


# -- processes at work ---------------------------------------------------------------------------------


FLOWS = """
from dataclasses import dataclass

import psycopg
from sqlalchemy import text
from sqlalchemy.orm import Session
from tenacity import stop_after_attempt, wait_none

from worker import (
    emit, gather, retrying, set_state, sleep, start, step, transaction, wait_signal, workflow,
)

@dataclass
class Approval:
    by: int

@step
async def echo(text: str) -> str:
    return f"echo {text}"

@step(retry=retrying(stop=stop_after_attempt(3), wait=wait_none()))
def fails(text: str) -> None:
    raise ValueError(f"cannot do {text}")

@step
async def answers_nonsense(text: str) -> dict:
    return {text: object()}

@step(timeout=0.05)
async def takes_long(text: str) -> None:
    import asyncio
    await asyncio.sleep(60)

@step
def wants_a_number(number: int) -> int:
    return number

@transaction
def breaks_a_rule(session: Session, text_: str) -> None:
    for _ in range(2):
        session.execute(text("insert into rules values (:secret)"), {"secret": text_})

@transaction
def breaks_a_rule_of_psycopg(connection: psycopg.Connection, text_: str) -> None:
    for _ in range(2):
        connection.execute("insert into rules values (%s)", (text_,))

@transaction
def conflicts(session: Session, text_: str) -> str:
    session.execute(text("select conflict(:secret)"), {"secret": text_})
    return text_

class Uncertain:
    def before_sleep(self, state):
        raise RuntimeError(str(state.outcome.exception()))

def undecided(error):
    raise RuntimeError(f"what of {error}?")

@step(retry=retrying(stop=stop_after_attempt(2), wait=wait_none(), on=(ValueError,)))
async def fails_strangely(text: str) -> None:
    class Strange(Exception):
        def __str__(self) -> str:
            raise RuntimeError(text)
    raise Strange

@workflow
async def child(text: str) -> str:
    return await echo(text)

@workflow
async def good(text: str) -> str:
    set_state(text[:40], text)
    emit("log", text)
    await gather(echo(text), child(text))
    await sleep(0.01)
    return conflicts(text)

def each(name, body):
    body.__name__ = body.__qualname__ = name
    return workflow(body)

@workflow
async def failing(text: str) -> None:
    fails(text)

@workflow
async def nonsense(text: str) -> None:
    await answers_nonsense(text)

@workflow
async def late(text: str) -> None:
    await takes_long(text)

@workflow
async def broken(text: str) -> None:
    raise RuntimeError(f"the body says {text}")

@workflow
async def wandering(text: str) -> None:
    import asyncio
    await asyncio.sleep(0, text)

@workflow
async def unruly(text: str) -> None:
    breaks_a_rule(text)

@workflow
async def unruly_psycopg(text: str) -> None:
    breaks_a_rule_of_psycopg(text)

@workflow
async def strange(text: str) -> None:
    await fails_strangely(text)

@workflow
async def typed(number: int) -> int:
    return wants_a_number(number)

@workflow
async def asked() -> int:
    return (await wait_signal("approved", type=Approval)).by
"""

TABLES = """
create table rules (note text primary key);
create sequence conflicts;
create function conflict(note text) returns void language plpgsql as $$
begin
    if nextval('conflicts') <= 3 then
        raise exception 'could not serialize % ', note using errcode = '40001', detail = note, hint = note;
    end if;
end $$;
create sequence full_disks;
create function full_disk() returns trigger language plpgsql as $$
begin
    if nextval('public.full_disks') <= 2 then
        raise exception 'could not extend file' using errcode = '53100', detail = new.value::text;
    end if;
    return new;
end $$;
create trigger full_disk before insert on stepwell.outbox for each row execute function full_disk();
do $$ begin execute format('alter database %I set log_parameter_max_length_on_error = -1', current_database()); end $$;
"""

TEXTS = ("good", "failing", "nonsense", "late", "broken", "wandering", "unruly", "unruly_psycopg", "strange")


def environment(url: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "STEPWELL_DATABASE_URL": url}


def with_password(url: str) -> str:
    """Return the URL with a password, for which a server that trusts us does not ask."""
    return url.replace("postgres@", f"postgres:{PASSWORD}@")


@contextmanager
def started(directory: Path, url: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run `stepwell worker` with all that it says in a file."""
    (directory / "flows.py").write_text(FLOWS)
    log = directory / "worker.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "worker", "flows.py", "--log-level", "debug", *arguments],
            cwd=directory,
            env=environment(url),
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


def tree_of(pid: int) -> list[int]:
    """Return a process and all below it."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
        below.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += below.get(each, [])
    return found


def command_lines(pids: Sequence[int]) -> str:
    said = []
    for pid in pids:
        try:
            said.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
        except OSError:
            continue
    return "\n".join(said)


def stepwell(directory: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worker.cli", *arguments],
        cwd=directory, env=environment(url), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def are_settled(db: Db) -> None:
    """Wait until no run is open."""

    def left() -> list[tuple[str, str]]:
        return db.execute(
            "select workflow, status from stepwell.run_status where status in ('pending', 'running', 'waiting')"
        ).fetchall()

    wait_until(lambda: not left(), 60, what=f"the end of all runs; at first: {left()}")


@pytest.mark.crash
def test_neither_passwords_nor_payloads_leave_a_worker_whatever_goes_wrong(
    database_url: str, db: Db, tmp_path: Path
) -> None:
    db.execute(TABLES.encode())
    url = with_password(database_url)
    arguments = ("--processes", "2", "--metrics-port", "0", "--metrics-host", "127.0.0.1")
    with started(tmp_path, url, *arguments) as (process, log):
        address = wait_until(
            lambda: next((w for w in log.read_text().split() if w.startswith("http://")), "").partition("/metrics")[0],
            60, what="the exporter",
        )  # fmt: skip
        for name in TEXTS:
            db.execute(
                "select stepwell.enqueue(%s, %s, key => %s, labels => %s)",
                [name, json.dumps({"text": PAYLOAD}), PAYLOAD, json.dumps({"l": PAYLOAD})],
            )
        for wrong in (
            json.dumps({"number": PAYLOAD}),
            f'{{"{PAYLOAD}": 1}}',
            f'{{"number": "{PAYLOAD}\\u0000"}}',
        ):
            db.execute("select stepwell.enqueue('typed', %s)", [wrong])
        row = db.execute("select stepwell.enqueue('asked')").fetchone()
        assert row is not None
        db.execute("select stepwell.signal(%s, 'approved', %s)", [row[0], json.dumps({"by": PAYLOAD})])
        db.execute("select stepwell.signal(%s, %s, '1')", [row[0], PAYLOAD])
        are_settled(db)
        # The connections break, and the server is asked for what it does not have.
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        db.execute("select stepwell.enqueue('good', %s)", [json.dumps({"text": PAYLOAD})])
        are_settled(db)
        shown = command_lines(tree_of(process.pid))
        with urlopen(f"{address}/metrics", timeout=10) as answer:
            scraped = answer.read().decode()
        names = db.execute("select string_agg(application_name, ' ') from pg_stat_activity").fetchone()
        states = dict(
            db.execute("select workflow, min(state) from stepwell.runs group by workflow").fetchall()
        )
        held = db.execute(
            "select count(*) from stepwell.runs where error::text like %s", [f"%{PAYLOAD}%"]
        ).fetchone()
        open_files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"]

    said = log.read_text()
    assert states["good"] == "succeeded", states
    assert states["failing"] == states["unruly"] == "failed", states
    assert held is not None
    assert held[0] >= 5  # where errors are kept, they are whole: the test has provoked what it says
    assert "has failed" in said  # and the worker has told of it
    assert "run" in scraped
    assert "worker" in shown
    for where, text in (("the log", said), ("ps", shown), ("/metrics", scraped), ("sessions", str(names))):
        for secret in (PASSWORD, PAYLOAD):
            found = [line for line in text.splitlines() if secret in line]
            assert not found, f"{where}: {found[:3]}"
    for path in open_files:
        if path.name != "flows.py":
            assert PASSWORD not in path.read_text(errors="replace"), path


@pytest.mark.crash
@pytest.mark.parametrize("wrong", ["database", "role", "host", "port", "socket"])
def test_a_worker_that_cannot_connect_tells_no_password(
    database_url: str, tmp_path: Path, wrong: str
) -> None:
    url = {
        "database": with_password(database_url).replace("/test_", "/no_such_"),
        "role": database_url.replace("postgres@", f"nobody:{PASSWORD}@"),
        "host": f"postgresql://me:{PASSWORD}@no-such-host.invalid/d",
        "port": f"postgresql://me:{PASSWORD}@127.0.0.1:9/d",
        "socket": f"postgresql://me:{PASSWORD}@/d?host=/nonexistent",
    }[wrong]
    with started(tmp_path, url, "--metrics-port", "0", "--metrics-host", "127.0.0.1") as (process, log):
        wait_until(
            lambda: process.poll() is not None or "database" in log.read_text().split("serving", 1)[-1],
            60, what="a complaint",
        )  # fmt: skip
        shown = command_lines(tree_of(process.pid))
        said = log.read_text()
    assert PASSWORD not in said + shown
    assert "Traceback" not in said, said


def test_commands_tell_no_password_whatever_is_wrong(database_url: str, db: Db, tmp_path: Path) -> None:
    good, bad = with_password(database_url), f"postgresql://me:{PASSWORD}@127.0.0.1:9/d"
    db.execute("insert into stepwell.workflows values ('w', '', '{}')")
    told = [
        stepwell(tmp_path, good, "runs", "list"),
        stepwell(tmp_path, good, "enqueue", "w", "{}", "--json"),
        stepwell(tmp_path, good, "enqueue", "no_such", "{}"),
        stepwell(tmp_path, good, "enqueue", "w", "{"),
        stepwell(tmp_path, bad, "runs", "list"),
        stepwell(tmp_path, bad, "enqueue", "w", "{}"),
        stepwell(tmp_path, bad, "migrate"),
    ]
    assert [each.returncode for each in told] == [0, 0, 2, 2, 1, 1, 1]
    for each in told:
        assert PASSWORD not in each.stdout + each.stderr
        assert "Traceback" not in each.stderr
