"""A worker process: briefed by its supervisor, it loads APP and runs one engine until told otherwise.

Threads: the event loop in the main thread (the engine, and a beat to the supervisor every half second, so that
a loop that hangs is noticed), and one that listens to the supervisor. When the supervisor is gone, the process
ends at once, without drain: by the end of file that the listening thread sees, and on Linux also by the
kernel's signal, which needs no GIL. SIGTERM drains, a second one stops; SIGINT is the supervisor's business.

Exit status: 0 drained or stopped · 2 the configuration cannot work (the sentence goes to the supervisor, which
says it once for all of its children) · 75 declared dead, a fresh process may start at once · 76 orphaned ·
anything else is a crash.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from psycopg.errors import InsufficientPrivilege, InvalidSchemaName, UndefinedFunction

from outbox.errors import ConfigError, SchemaError
from worker.apps import load_app
from worker.engine.claims import DeclaredDead
from worker.engine.engine import Engine
from worker.registry import Registry
from worker.supervision.pipe import (
    BEAT_SECONDS,
    DEAD,
    EXIT_CONFIG,
    EXIT_CRASHED,
    EXIT_DECLARED_DEAD,
    EXIT_DRAINED,
    EXIT_ORPHANED,
    FD_VARIABLE,
    Briefing,
    ChildPipe,
    beat_line,
    complaint_line,
    read_news,
)
from worker.telemetry import tracing
from worker.telemetry.logs import set_up_logs

logger = logging.getLogger(__name__)

EXIT_SECONDS = 3.0
"""How long exit handlers and abandoned threads may hold a process that is done."""
FLUSH_SECONDS = 2.0
"""How long a process that is done sends the spans that it has still to send."""
GC_THRESHOLD = 10_000
"""New containers before the youngest are collected; Python's own 700 is a fraction of what is in flight."""
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Work until told to end; return the exit status. The process must end soon after."""
    descriptor = os.environ.pop(FD_VARIABLE, "")
    if not descriptor.isdigit():
        sys.stderr.write("a worker process is started by its supervisor: run `stepwell worker APP`\n")
        return EXIT_CONFIG
    _die_with_the_supervisor()
    pipe = ChildPipe.inherited(int(descriptor))
    line = pipe.receive()
    if line is None:
        _orphaned()
    briefing = Briefing.from_line(line)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it was blocked until now
    set_up_logs(briefing.log_level, briefing.log_format, worker=briefing.worker_id)
    status = WorkerProcess(pipe, briefing).run()
    _end_within(EXIT_SECONDS, status)
    return status


class WorkerProcess:
    """One engine under one supervisor."""

    def __init__(self, pipe: ChildPipe, briefing: Briefing) -> None:
        self._pipe = pipe
        self._briefing = briefing
        self._engine: Engine | None = None
        self._draining = False
        self._declared_dead = False

    def run(self) -> int:
        """Load APP, work, and return the exit status."""
        loop = asyncio.new_event_loop()
        threading.Thread(
            target=self._pipe.listen,
            args=(lambda line: loop.call_soon_threadsafe(self._hear, line), _orphaned),
            name="supervisor",
            daemon=True,
        ).start()
        try:
            registry = load_app(self._briefing.app)
            traced = tracing.of_worker(self._briefing.settings, self._briefing.worker_id)
            _spare_the_collector()
            try:
                # The loop is not closed: that would wait for threads that a timed-out step has left behind.
                return loop.run_until_complete(self._serve(registry, traced))
            finally:
                if traced is not None:
                    traced.flush(FLUSH_SECONDS)
        except DeclaredDead:
            logger.warning("this worker was declared dead; a fresh process takes its place")
            return EXIT_DECLARED_DEAD
        except (ConfigError, SchemaError) as error:
            return self._complain(str(error))
        except (InsufficientPrivilege, InvalidSchemaName, UndefinedFunction) as error:
            return self._complain(f"the database refuses the worker: {error.diag.message_primary}")
        except Exception:
            logger.exception("the worker process failed")
            return EXIT_CRASHED

    async def _serve(self, registry: Registry, traced: tracing.Tracing | None) -> int:
        """Run the engine, and beat meanwhile."""
        briefing = self._briefing
        engine = self._engine = Engine(
            registry,
            briefing.settings,
            url=briefing.url,
            worker_id=briefing.worker_id,
            supervisor_id=briefing.supervisor_id,
            queues=briefing.queues,
            release=_release(),
            tracing=traced,
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_sigterm)
        beating = asyncio.create_task(self._beat(engine))
        try:
            await engine.run()
        finally:
            beating.cancel()
        return EXIT_DECLARED_DEAD if self._declared_dead else EXIT_DRAINED

    async def _beat(self, engine: Engine) -> None:
        """Send the engine's counters to the supervisor, from the event loop: that is what they prove."""
        while True:
            self._pipe.send(beat_line(engine.vitals()))
            await asyncio.sleep(BEAT_SECONDS)

    def _on_sigterm(self) -> None:
        assert self._engine is not None  # the handler is installed after it
        if self._draining:
            self._engine.stop()
        else:
            self._draining = True
            self._engine.drain()

    def _hear(self, line: bytes) -> None:
        """Act on a line from the supervisor, in the event loop."""
        if line == DEAD:
            self._declared_dead = True
            if self._engine is not None:
                self._engine.stop()
        elif (news := read_news(line)) is not None and self._engine is not None:
            self._engine.tell_reclaimed(news.dead, news.detector, news.tasks)

    def _complain(self, sentence: str) -> int:
        self._pipe.send(complaint_line(sentence))
        return EXIT_CONFIG


def _release() -> str:
    try:
        return version("stepwell")
    except PackageNotFoundError:  # a checkout that was not installed
        return ""


def _die_with_the_supervisor() -> None:
    """Have the kernel kill this process with its parent, where it can; the pipe's end of file does it anywhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _spare_the_collector() -> None:
    """Keep what was imported out of garbage collections, and have fewer of them.

    What is in flight is many small objects that live for a few milliseconds and are freed by their counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 10, 10)


def _orphaned() -> NoReturn:
    os._exit(EXIT_ORPHANED)


def _end_within(seconds: float, status: int) -> None:
    """End the process with this status after so long, whatever threads and exit handlers still do."""
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
