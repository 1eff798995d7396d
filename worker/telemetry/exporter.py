"""Serve /metrics, /healthz and /readyz: one port for all processes of a supervisor.

Two sources meet in one answer. What the processes count comes from the files that they share
(`worker.telemetry.files`). What the database knows (exact totals, the depth of the queues, its health) comes
from `DatabaseMetrics`, and is exported once, however many supervisors run: by the one whose session holds
the exporter's advisory lock. The lock goes with its session, so another takes over within five seconds
of the end of a supervisor, and at once when it is scraped. Through a connection pooler there is no session for a lock; who
has no other way takes a lease instead, as long as nobody holds the lock, and another takes over within fifteen seconds.

A scrape waits, at most two seconds, for totals that were read after it arrived: what had been recorded
when it was sent is in the answer. Counting the queues reads the whole task table, so that is repeated only
when it is a second old and twenty times as old as it took. Between scrapes only the lock is looked after. If the database does not answer, its metrics
are absent: an old gauge would be believed.

Threads: one reads the database, one accepts requests, one for each request. None of them touches the
supervisor's loop; what the supervisor has to say for /readyz is asked through a function that must not
block. Nothing here is ever a reason for the supervisor to stop.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import psycopg
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import Metric

from outbox import schema
from outbox.database import connect
from outbox.errors import ConfigError, StepwellError
from outbox.sessions import is_pooled
from worker.queries import load
from worker.telemetry.files import ProcessFiles
from worker.telemetry.snapshot import Depths, Snapshot, families, read_depths, read_totals

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 5.0
LEASE_SECONDS = 15.0
SCRAPE_WAIT_SECONDS = 2.0
COUNT_AT_MOST_EVERY_SECONDS = 1.0
COUNT_REST_FACTOR = 20  # counting the queues takes at most a twentieth of one connection's time
STATEMENT_TIMEOUT = "5s"
REQUEST_TIMEOUT_SECONDS = 10
STOP_POLL_SECONDS = 0.1

NotReady = Callable[[], Sequence[str]]


# -- what the database knows -------------------------------------------------------------------------


class DatabaseMetrics:
    """Reads the database's metrics in a thread of its own; a prometheus collector over what it read.

    `stop` is safe twice and before `start`.
    """

    def __init__(self, url: str, *, on_refresh: Callable[[], None] = lambda: None) -> None:
        self._url = url
        self._on_refresh = on_refresh
        self._changed = threading.Condition()
        self._wanted = 0
        self._served = 0
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._connection: psycopg.Connection[Any] | None = None
        self._exports = False
        self._lease = secrets.randbelow(2**63)
        self._stranger: int | None = None
        self._depths: Depths | None = None
        self._snapshot: Snapshot | None = None
        self._count_again_at = 0.0
        self._problem: str | None = "the database has not been reached yet"

    def start(self) -> None:
        """Start to read, every few seconds and whenever somebody asks."""
        self._thread = threading.Thread(target=self._run, name="stepwell exporter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop reading and give the lock back. Waits for a statement that is under way, not for long."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=SCRAPE_WAIT_SECONDS)
            self._thread = None

    def collect(self) -> Iterator[Metric]:
        """Yield what a look at the database finds that begins now; nothing where another one exports."""
        self.problem()
        with self._changed:
            snapshot = self._snapshot
        if snapshot is not None:
            yield from families(snapshot)

    def problem(self) -> str | None:
        """Look at the database now and say in a sentence why it cannot be worked with, or None."""
        deadline = time.monotonic() + SCRAPE_WAIT_SECONDS
        with self._changed:
            self._wanted += 1
            ticket = self._wanted
            self._changed.notify_all()
            while self._served < ticket and not self._stopping:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    self._snapshot = None
                    return self._problem or f"the database has not answered within {SCRAPE_WAIT_SECONDS:g} s"
                self._changed.wait(remaining)
            return self._problem

    def _run(self) -> None:
        while (ticket := self._next_ticket()) is not None:
            snapshot, problem = self._look(asked=ticket > self._served)
            with self._changed:
                self._snapshot, self._problem = snapshot, problem
                self._served = ticket
                self._changed.notify_all()
        self._disconnect()

    def _next_ticket(self) -> int | None:
        """Wait until somebody asks or it is time again; return what will be answered, None at the end."""
        with self._changed:
            if self._served == self._wanted and not self._stopping:
                self._changed.wait(REFRESH_SECONDS)
            return None if self._stopping else self._wanted

    def _look(self, *, asked: bool) -> tuple[Snapshot | None, str | None]:
        """Read everything once, if somebody asked. Whatever goes wrong is the answer, and the next look connects anew."""
        try:
            self._on_refresh()
            connection = self._connected()
            with _limited(connection):
                exports = self._has_lock(connection)
            if not (exports and asked):
                # Who asks waits for a look of his own: without him, it is enough to be there and to have the lock.
                return (self._snapshot if exports else None), None
            with _limited(connection):
                return self._read(connection), None
        except (psycopg.Error, StepwellError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            self._report(problem)
        except Exception:
            logger.exception("the exporter could not read the database")
            problem = "the exporter could not read the database; its log says why"
        self._disconnect()
        return None, problem

    def _report(self, problem: str) -> None:
        known = self._problem is not None
        logger.log(logging.DEBUG if known else logging.WARNING, "the exporter has no database: %s", problem)

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None:
            connection = connect(self._url, application_name="stepwell exporter")
            try:
                schema.check(connection, schema.CLAIMANT_FUNCTIONS)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._exports, self._depths = None, False, None

    def _has_lock(self, connection: psycopg.Connection[Any]) -> bool:
        """Tell whether this session is the exporter, after trying to become it."""
        if is_pooled(connection):
            lease = {"holder": self._lease, "seconds": LEASE_SECONDS}
            self._exports = connection.execute(load("exporter_lease"), lease).fetchone() is not None
        elif not self._exports:
            row = connection.execute(load("exporter_lock")).fetchone()
            assert row is not None  # the statement always answers with one row
            self._exports, pid, role = row
            self._tell_of_stranger(pid, role)
        else:
            connection.execute("select 1")  # a session that is gone has lost the lock as well
        return self._exports

    def _tell_of_stranger(self, pid: int | None, role: str | None) -> None:
        """Warn, once, of a session that keeps everybody from exporting. Whoever may connect can take an advisory lock."""
        if pid is not None and pid != self._stranger:
            logger.warning(
                "the database's metrics are not exported: the exporter's lock is held by a session of role %r, which is no "
                "worker's; end it with `select pg_terminate_backend(%d)`",
                role,
                pid,
            )
        self._stranger = pid

    def _read(self, connection: psycopg.Connection[Any]) -> Snapshot:
        totals = read_totals(connection)
        started = time.monotonic()
        if self._depths is None or started >= self._count_again_at:
            self._depths = read_depths(connection)
            took = time.monotonic() - started
            self._count_again_at = started + max(COUNT_AT_MOST_EVERY_SECONDS, COUNT_REST_FACTOR * took)
        return Snapshot(totals, self._depths)


@contextmanager
def _limited(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Hold a transaction whose statements are given up after a while: set for a session, a pooler would hand that on."""
    with connection.transaction():
        connection.execute("select set_config('statement_timeout', %s, true)", [STATEMENT_TIMEOUT])
        yield


# -- the server --------------------------------------------------------------------------------------


class Exporter:
    """The HTTP server of one supervisor. Enter it to serve; leaving it, `stop`, is safe twice.

    `directory` is what `worker.telemetry.files.shared_directory` gave. `not_ready` says, in sentences, what keeps
    the workers from claiming, `is_alive` whether the supervisor's loop turns; both are called from a request's thread and
    must not block. `port` 0 takes a free one.
    """

    def __init__(
        self,
        url: str,
        *,
        directory: Path,
        host: str,
        port: int,
        not_ready: NotReady,
        is_alive: Callable[[], bool],
    ) -> None:
        files = ProcessFiles(directory)
        self._database = DatabaseMetrics(url, on_refresh=files.fold_dead)
        self._not_ready = not_ready
        self._is_alive = is_alive
        registry = CollectorRegistry()
        registry.register(files)
        registry.register(self._database)
        self._metrics = make_wsgi_app(registry)
        self._server = _bound(host, port, self._answer)
        self.address = f"http://{host}:{self._server.server_port}"

    @property
    def port(self) -> int:
        """The port that is served."""
        return self._server.server_port

    def start(self) -> None:
        """Serve from now on, in threads."""
        self._database.start()
        serve = partial(self._server.serve_forever, poll_interval=STOP_POLL_SECONDS)
        threading.Thread(target=serve, name="stepwell http", daemon=True).start()

    def stop(self) -> None:
        """Stop serving and free the port."""
        if self._server.fileno() >= 0:
            self._server.shutdown()
            self._server.server_close()
        self._database.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                body: Iterable[bytes] = self._metrics(environ, start_response)
                return body
            case "/healthz":
                if not self._is_alive():
                    return _json(start_response, "503 Service Unavailable", {"status": "hangs"})
                return _json(start_response, "200 OK", {"status": "alive"})
            case "/readyz":
                reasons = self._reasons()
                if reasons:
                    return _json(
                        start_response, "503 Service Unavailable", {"status": "not ready", "reasons": reasons}
                    )
                return _json(start_response, "200 OK", {"status": "ready"})
        return _json(
            start_response, "404 Not Found", {"error": "here are only /metrics, /healthz and /readyz"}
        )

    def _reasons(self) -> list[str]:
        problem = self._database.problem()
        return [*([problem] if problem else []), *self._not_ready()]


def _bound(host: str, port: int, application: Callable[..., Iterable[bytes]]) -> WSGIServer:
    try:
        return make_server(host, port, application, _Server, _Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {reason}; choose another --metrics-port"
        ) from None


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """Bind without the reverse look-up of the own address, which takes seconds where DNS is broken."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as the base class has it
        """Note that a request broke, most often because who asked has gone, without a traceback on stderr."""
        logger.debug("a request to the exporter broke: %r", sys.exception())


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT_SECONDS  # a client that never finishes its request must not keep a thread

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: a scrape is no event."""

    def address_string(self) -> str:
        return str(self.client_address[0])


def _json(start_response: StartResponse, status: str, content: dict[str, Any]) -> list[bytes]:
    body = json.dumps(content).encode() + b"\n"
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
