"""The directory through which the processes of one supervisor share what they count.

In prometheus_client's multiprocess mode each process writes its values to files of its own, named by
process id, and whoever serves them adds them up. Two things are left to us:

  - the mode is chosen by an environment variable at the *first import* of prometheus_client, so the
    directory has to exist before anything imports it, in the supervisor and in its children;
  - files of dead processes pile up. Their gauges must go, or a dead worker's slots count for ever; their
    counters must stay, or totals would fall. So counters are folded into one file, and the rest deleted.

What this does not guarantee: a process that takes the id of one that died a moment ago, before its files
were folded, may go on in them, which adds up to the same; if it opens one just as it is folded, what it
counts until its next restart is lost.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "stepwell-metrics-"
_FOLDED = "dead"  # stands where other files have a process id
_COLLECT_TRIES = 5


@contextmanager
def shared_directory() -> Iterator[Path]:
    """Yield a fresh directory, named by the environment variable for this process and its children.

    Enter it before anything imports prometheus_client. It is removed at the end; the next one to enter
    removes those of supervisors that were killed, which a file lock on the directory tells from the living.
    """
    _remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = _lock(directory)
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(directory)
    try:
        yield directory
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
        shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """Return a descriptor that locks `directory` until it is closed; None when somebody else holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned() -> None:
    for found in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or gone already
            # A directory made this moment is not locked yet, and has no files yet: leave empty ones alone.
            if next(found.iterdir(), None) is None:
                continue
            lock = _lock(found)
            if lock is not None:
                shutil.rmtree(found, ignore_errors=True)
                os.close(lock)


class ProcessFiles:
    """A prometheus collector over the files of one directory. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()

    def collect(self) -> list[Metric]:
        """Return the metrics of all processes, added up."""
        from prometheus_client.multiprocess import MultiProcessCollector

        with self._lock:
            self._fold_dead()
            collector = MultiProcessCollector(None, str(self._directory))  # type: ignore[no-untyped-call]  # of theirs
            return _collected(collector)

    def fold_dead(self) -> None:
        """Keep the counters of processes that are gone and delete their files."""
        with self._lock:
            self._fold_dead()

    def _fold_dead(self) -> None:
        for file in self._directory.glob("*.db"):
            kind, _, owner = file.stem.rpartition("_")
            if owner != _FOLDED and not _is_alive(int(owner)):
                if not kind.startswith("gauge"):
                    _add(file, into=file.with_name(f"{kind}_{_FOLDED}.db"))
                file.unlink(missing_ok=True)


def _collected(collector: object) -> list[Metric]:
    """Return what the collector reads; once more when it met a file that a process was just creating."""
    for remaining in reversed(range(_COLLECT_TRIES)):
        try:
            return list(collector.collect())  # type: ignore[attr-defined]  # theirs is untyped
        except (struct.error, RuntimeError, ValueError, FileNotFoundError):
            if not remaining:
                raise
    raise AssertionError("unreachable")


def _add(file: Path, *, into: Path) -> None:
    """Add the values of one file to those of another, which is created when it is missing."""
    from prometheus_client.mmap_dict import MmapedDict

    target = MmapedDict(str(into))  # type: ignore[no-untyped-call]  # theirs is untyped, here and below
    try:
        for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
            target.write_value(key, target.read_value(key)[0] + value, 0.0)  # type: ignore[no-untyped-call]
    except struct.error:
        pass  # killed while it created the file: nothing was counted yet
    finally:
        target.close()  # type: ignore[no-untyped-call]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
