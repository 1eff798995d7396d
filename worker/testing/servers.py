"""Where test databases live: a Postgres of the session's own, or one that the user names.

A `Server` makes databases by copying a template and drops them. Each carries the name of the session that made it,
and the session keeps one connection open under that name: so what a killed session left behind is known by its
having no such connection any more, on whatever machine it ran, and the next session drops it.

The session's own server is the embedded one, in a directory of its own. Nothing is synced to disk: what a test
has written need not survive the machine.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from outbox import embedded, schema
from outbox.database import connect
from outbox.errors import ConfigError
from outbox.sessions import is_pooled
from worker.queries import load

logger = logging.getLogger(__name__)

VERSION = 18
HOME_PREFIX = "stepwell-testing-"
MEMORY_NEEDED_BYTES = 4 * 2**30
_SETTINGS = {
    **embedded.SERVER_SETTINGS,
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_wal_size": "256MB",
    "cluster_name": "stepwell-testing",
}
_URL = re.compile(r"(?P<server>postgres(?:ql)?://[^/?]*)(?:/[^?]*)?(?P<options>\?.*)?")


class Server:
    """Databases that come and go on one Postgres. `url` leads to any database there; its role may create others."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = f"{os.getpid()}_{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)
        self._connection: psycopg.Connection[Any] | None = None

    def __enter__(self) -> Self:
        self._remove_left_behind()
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()

    @contextmanager
    def database(self, template: str | None = None) -> Iterator[str]:
        """Yield the URL of a new database; drop it afterwards, whoever is still connected.

        `template` is the URL of a database of this server that nobody is connected to; None stands for an empty one.
        """
        name = f"stepwell_test_{self._session}_{next(self._numbers)}"
        try:
            self._execute(
                sql.SQL("create database {} template {}").format(
                    sql.Identifier(name),
                    sql.Identifier("template0" if template is None else _name_in(template)),
                )
            )
        except psycopg.errors.InsufficientPrivilege as error:
            raise ConfigError(
                f"the role of the tests' database URL may not create databases ({error.diag.message_primary}): "
                "grant it CREATEDB, or name another one"
            ) from None
        try:
            yield with_database(self.url, name)
        finally:
            self._execute(_dropping(name))

    @contextmanager
    def template(self) -> Iterator[str]:
        """Yield the URL of a new database with Stepwell's schema, to be copied for each test."""
        with self.database() as url:
            with connect(url, application_name="stepwell testing") as connection:
                schema.migrate(connection)
            yield url

    def _remove_left_behind(self) -> None:
        for (name,) in self._execute(load("testing_left_behind")):
            logger.info("dropping %s, which an earlier test session has left behind", name)
            self._execute(_dropping(name))

    def _execute(self, statement: Any) -> list[tuple[Any, ...]]:
        """Execute one statement on the session's connection, on a new one if a test has restarted the server."""
        if self._connection is not None and not self._is_alive(self._connection):
            self._connection.close()
            self._connection = None
        if self._connection is None:
            self._connection = connect(self.url, application_name=f"stepwell testing {self._session}")
            require_session(self._connection)
        cursor = self._connection.execute(statement)
        return cursor.fetchall() if cursor.description else []

    @staticmethod
    def _is_alive(connection: psycopg.Connection[Any]) -> bool:
        try:
            connection.execute("select")
        except psycopg.OperationalError:
            return False
        return True


def require_session(connection: psycopg.Connection[Any]) -> None:
    """Close a connection whose session is not its own and raise ConfigError: tests go by names and locks of sessions."""
    if is_pooled(connection):
        connection.close()
        raise ConfigError(
            "the tests' database URL leads through a connection pooler, which lends sessions; give the tests the address "
            "of the database itself"
        )


@contextmanager
def embedded_server() -> Iterator[str]:
    """Yield the URL of a Postgres that lives as long as this block, in a directory that is deleted then."""
    binaries = embedded.binaries(VERSION)
    _remove_homes_left_behind(binaries)
    home = Path(tempfile.mkdtemp(prefix=f"{HOME_PREFIX}{os.getpid()}-", dir=_places()[0]))
    home.chmod(0o755)  # the account that runs Postgres for root passes through
    server = embedded.Server(home, binaries, _SETTINGS)
    try:
        server.start()
        url = server.running_url()
        assert url is not None, "the server has just answered"
        yield url
    finally:
        server.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


def with_database(url: str, name: str) -> str:
    """Return `url`, a URL or a conninfo string, with another database in it."""
    match = _URL.fullmatch(url)
    if match is None:
        return make_conninfo(url, dbname=name)
    options = [
        each for each in (match["options"] or "?")[1:].split("&") if each and not _names_database(each)
    ]
    return f"{match['server']}/{name}{'?' if options else ''}{'&'.join(options)}"


def _names_database(option: str) -> bool:
    return option.partition("=")[0] == "dbname"


def _name_in(url: str) -> str:
    name = conninfo_to_dict(url)["dbname"]
    assert isinstance(name, str)
    return name


def _dropping(name: str) -> sql.Composed:
    return sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))


def _places() -> list[Path]:
    """Return where a server's directory may be, best first: in memory a database is copied in half the time."""
    memory, disk = Path("/dev/shm"), Path("/var/tmp")  # noqa: S108 - where the system keeps such data
    found = [disk if disk.is_dir() else Path(tempfile.gettempdir())]
    if (
        memory.is_dir()
        and os.access(memory, os.W_OK)
        and shutil.disk_usage(memory).free > MEMORY_NEEDED_BYTES
    ):
        found.insert(0, memory)
    return found


def _remove_homes_left_behind(binaries: Path) -> None:
    """Stop and delete the servers of sessions that were killed."""
    for home in itertools.chain.from_iterable(place.glob(f"{HOME_PREFIX}*") for place in _places()):
        match = re.fullmatch(rf"{HOME_PREFIX}(\d+)-.*", home.name)
        if match is None or home.stat().st_uid != os.geteuid() or _lives(int(match[1])):
            continue
        embedded.Server(home, binaries).stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
