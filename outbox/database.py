"""Open connections; only `outbox.pools` does so beside it. Also what keeps them alive, and what to do when they break.

Every connection made here
  - gives up on a silent peer within about ten seconds (TCP keepalives, `tcp_user_timeout`), and has the
    server notice within a second that its client has gone in the middle of a statement;
  - runs in UTC and UTF-8;
  - reads `json` as the very text that was stored. `jsonb` is decoded as usual;
  - knows whether it goes through a connection pooler, and what to leave undone there (`outbox.sessions`).

What a URL says wins over these defaults, except for the application name, by which reclaim finds the
backends of a dead worker. No error raised here repeats a password.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg
import tenacity
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow
from psycopg_pool import PoolClosed

from outbox import embedded, sessions
from outbox.errors import ConfigError
from outbox.queries import load
from outbox.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT_SECONDS = 5
PREPARE_AFTER = 5  # psycopg's own default
FIRST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 2.0
LINGER_SECONDS = 1.0

_DEFAULTS: dict[str, Any] = {
    "client_encoding": "UTF8",
    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

# Beside class 08 (connection exceptions): shut down, crashed, starting up, no connection slot left.
_TOO_MANY_CONNECTIONS = "53300"
_DISCONNECT_STATES = frozenset({"57P01", "57P02", "57P03", _TOO_MANY_CONNECTIONS})
# A refusal that waiting does not cure. libpq reports no SQLSTATE for a failed connect, only its text.
# PgBouncer has words of its own, and repeats those of the server.
_REFUSALS = re.compile(
    r"FATAL:\s+(?:server login has been failing, cached error: )?"
    r'(?:"?\w+"? authentication failed|(?:role|database) ".*" does not exist|no pg_hba\.conf entry'
    r'|no such (?:user|database)|database ".*" is disabled|login rejected|unsupported (?:options )?startup parameter)'
    r"|no password supplied"
)
# No slot of max_connections, or none that is not reserved; the limit of a role or a database; the pooler's.
_FULL = re.compile(
    r"too many clients already|remaining connection slots are reserved|too many connections for (?:role|database)"
    r"|no more connections allowed|client connections exceeded"
)


# -- where the database is ---------------------------------------------------------------------------


def url_of(settings: Settings) -> str:
    """Return the URL that was set, or that of the running embedded Postgres.

    Raise ConfigError, saying what to do, when there is neither.
    """
    if settings.database_url:
        return settings.database_url
    running = embedded.running_url(settings.data_dir)
    if running is None:
        raise ConfigError(
            "no database: STEPWELL_DATABASE_URL is not set and no embedded Postgres runs in "
            f"{settings.data_dir}; set the variable, or start the embedded one with `stepwell worker APP`"
        )
    return running


def direct_url(settings: Settings, url: str) -> str:
    """Return where a session of one's own is to be had: the database itself, if `url` leads through a pooler."""
    return settings.direct_database_url or url


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """Yield the URL of the database, with the embedded one started for as long when no URL is set.

    At the end the embedded server is stopped if it was started here and nobody else is connected.
    """
    if settings.database_url:
        yield settings.database_url
        return
    with EmbeddedPostgres(settings) as server:
        yield server.url


class EmbeddedPostgres:
    """The Postgres of one directory, shared by every Stepwell process that works there.

    `start` joins a running server or starts one. `stop` is safe twice and before `start`; it stops only
    a server that this object started, and not while others are connected: they would lose it.
    """

    def __init__(self, settings: Settings, version: int = 18) -> None:
        self.data_dir = settings.data_dir
        self.started_here = False
        self._version = version
        self._server: embedded.Server | None = None
        self._url: str | None = None

    @property
    def url(self) -> str:
        """Return the URL; only after `start`."""
        if self._url is None:
            raise ConfigError(f"the embedded Postgres in {self.data_dir} has not been started")
        return self._url

    def start(self, timeout_seconds: float = 60.0) -> str:
        """Have the server accept connections and return its URL; raise ConfigError if it will not."""
        self._server = embedded.Server(self.data_dir, embedded.binaries(self._version))
        try:
            return self._start(self._server, time.monotonic() + timeout_seconds)
        except BaseException:  # Ctrl-C too: nobody else would stop what was begun here
            self.stop()
            raise

    def _start(self, server: embedded.Server, deadline: float) -> str:
        while True:
            self.started_here = server.start(deadline - time.monotonic()) or self.started_here
            self._url = server.running_url()
            try:
                connect(self.url, application_name="stepwell start").close()
                return self.url
            except (psycopg.OperationalError, ConfigError):  # it was dying as we found it: start another
                if time.monotonic() >= deadline:
                    raise
                time.sleep(FIRST_WAIT_SECONDS)

    def stop(self) -> None:
        """Stop the server if it was started here and no other client is connected.

        Close your own connections first: they count as others.
        """
        if self._server is None or not self.started_here:
            return
        if not self._others_are_connected():
            self._server.stop()
        self.started_here = False

    def _others_are_connected(self) -> bool:
        """Tell whether anybody else stays connected; a session of our own needs a moment to end."""
        deadline = time.monotonic() + LINGER_SECONDS
        try:
            with connect(self.url, application_name="stepwell stop") as connection:
                while (row := connection.execute(load("count_other_clients")).fetchone()) and row[0] > 0:
                    if time.monotonic() >= deadline:
                        return True
                    time.sleep(FIRST_WAIT_SECONDS)
        except (psycopg.Error, ConfigError) as error:
            logger.warning("the embedded Postgres is stopped without knowing who uses it: %s", error)
        return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


# -- single connections ------------------------------------------------------------------------------


def connect(
    url: str, *, application_name: str, autocommit: bool = True, json_as_text: bool = True
) -> psycopg.Connection[TupleRow]:
    """Open a connection, in one attempt of at most five seconds per host.

    Pass `json_as_text=False` for a connection that user code gets. Raises psycopg.OperationalError when the
    database cannot be reached or refuses, ConfigError for a URL that cannot be read.
    """
    connection: psycopg.Connection[TupleRow] = psycopg.connect(
        parameters(url, application_name), autocommit=True, prepare_threshold=PREPARE_AFTER
    )
    try:
        sessions.settle(connection, application_name, json_as_text=json_as_text)
        connection.autocommit = autocommit
    except BaseException:
        connection.close()
        raise
    return connection


async def connect_async(
    url: str, *, application_name: str, autocommit: bool = True, json_as_text: bool = True
) -> psycopg.AsyncConnection[TupleRow]:
    """Open an asynchronous connection; see `connect`."""
    connection: psycopg.AsyncConnection[TupleRow] = await psycopg.AsyncConnection.connect(
        parameters(url, application_name), autocommit=True, prepare_threshold=PREPARE_AFTER
    )
    try:
        await sessions.settle_async(connection, application_name, json_as_text=json_as_text)
        await connection.set_autocommit(autocommit)
    except BaseException:
        await connection.close()
        raise
    return connection


def parameters(url: str, application_name: str) -> str:
    """Return the conninfo string for `url` with our defaults under what it says itself.

    Several hosts, `target_session_attrs`, `service` and the rest of libpq's parameters pass through.
    """
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise ConfigError(_UNREADABLE) from None  # the original quotes the part it stumbled over
    if _is_misread(given):
        raise ConfigError(_UNREADABLE)
    return make_conninfo("", **{**_DEFAULTS, **given, "application_name": application_name})


_UNREADABLE = (
    "the database URL cannot be read: write postgresql://user:password@host:5432/database, "
    "with special characters in user and password percent-encoded (@ as %40, / as %2F)"
)


def _is_misread(given: dict[str, Any]) -> bool:
    """Tell whether an unencoded @, : or / in a password has spilled into another part.

    libpq would go on with it, and quote a piece of the password in its error.
    """
    ports = str(given.get("port") or "")
    return (
        "@" in str(given.get("host") or "")
        or re.fullmatch(r"[\d,]*", ports) is None
        or ("@" in str(given.get("dbname") or "") and "user" not in given)
    )


# -- lost connections --------------------------------------------------------------------------------


def is_disconnect(error: BaseException) -> bool:
    """Tell whether `error` means that the connection is gone or cannot be had, so that a new one may do.

    True for a broken connection, a server that shuts down, crashes, starts up, or has no slot left, a host that
    cannot be reached, and answers that nobody has asked for: a pooler hands on what the server said when it went.
    False for a refusal that waiting does not cure (wrong password, no such database) and for every error of a
    statement. Looks through SQLAlchemy's wrapper.
    """
    original = getattr(error, "orig", None)
    if isinstance(original, BaseException):
        return bool(getattr(error, "connection_invalidated", False)) or is_disconnect(original)
    if not isinstance(error, psycopg.Error) or isinstance(error, PoolClosed | psycopg.errors.PipelineAborted):
        return False
    if error.sqlstate is not None:
        ended = error.diag.severity_nonlocalized in ("FATAL", "PANIC")  # either ends the session
        return ended or error.sqlstate.startswith("08") or error.sqlstate in _DISCONNECT_STATES
    if isinstance(error, psycopg.InternalError):
        return True  # without a SQLSTATE it is psycopg that does not understand what it hears
    return isinstance(error, psycopg.OperationalError) and _REFUSALS.search(str(error)) is None


def is_full(error: BaseException) -> bool:
    """Tell whether the database, or a pooler before it, has no connection left to give."""
    if not isinstance(error, psycopg.Error):
        return False
    return error.sqlstate == _TOO_MANY_CONNECTIONS or _FULL.search(str(error)) is not None


def retry_connecting(
    operation: Callable[[], T],
    *,
    give_up_after_seconds: float | None,
    stopping: threading.Event | None = None,
) -> T:
    """Return what `operation` returns, repeating it for as long as it ends in a disconnect.

    Waits double from 0.05 to 2 seconds, with jitter. `give_up_after_seconds=None` repeats for ever; when
    the time is up or `stopping` is set, the last error is raised. Any other error is raised at once.
    """
    try:
        return operation()  # nearly always; tenacity's own work would show in every statement
    except Exception as error:
        if not is_disconnect(error):
            raise
        failed: list[Exception] = [error]

    def attempt() -> T:
        if failed:
            raise failed.pop()
        return operation()

    event = stopping or threading.Event()
    retrying = tenacity.Retrying(
        stop=_stop_after(give_up_after_seconds) | tenacity.stop_when_event_set(event),
        sleep=tenacity.sleep_using_event(event),
        **_POLICY,
    )
    result = retrying(attempt)
    _report_recovery(retrying)
    return result


async def retry_connecting_async(
    operation: Callable[[], Awaitable[T]], *, give_up_after_seconds: float | None
) -> T:
    """Await `operation()`, repeating it as `retry_connecting` does. Cancelling ends a wait at once."""
    try:
        return await operation()  # nearly always, as above
    except Exception as error:
        if not is_disconnect(error):
            raise
        failed: list[Exception] = [error]

    async def attempt() -> T:
        if failed:
            raise failed.pop()
        return await operation()

    retrying = tenacity.AsyncRetrying(stop=_stop_after(give_up_after_seconds), **_POLICY)
    result: T = await retrying(attempt)
    _report_recovery(retrying)
    return result


def _stop_after(seconds: float | None) -> tenacity.stop.stop_base:
    return tenacity.stop_never if seconds is None else tenacity.stop_after_delay(seconds)


def _wait(state: tenacity.RetryCallState) -> float:
    """Return half to all of the doubled wait: a fleet must not come back in step after a restart."""
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(state.attempt_number - 1, 16))
    return random.uniform(longest / 2, longest)


def _report_loss(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    level = logging.WARNING if state.attempt_number == 1 else logging.DEBUG
    full = error is not None and is_full(error)
    what = "has no connection left for this process" if full else "cannot be reached"
    logger.log(level, "the database %s, trying again: %s", what, " ".join(str(error).split()))


def _report_recovery(retrying: tenacity.BaseRetrying) -> None:
    attempts = retrying.statistics.get("attempt_number", 1)
    if attempts > 1:
        logger.info("the database can be reached again, after %d attempts", attempts)


_POLICY: dict[str, Any] = {
    "retry": tenacity.retry_if_exception(is_disconnect),
    "wait": _wait,
    "before_sleep": _report_loss,
    "reraise": True,
}
