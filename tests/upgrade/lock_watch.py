"""Who had to wait for whom, and for how long, as the server itself says.

With `log_lock_waits` each backend that has waited for a lock for `deadlock_timeout` says so, and names who holds it and who
queues before it: nothing is sampled, so nothing is missed. Asked here for 100 ms. When it gets the lock it says after how
long. A wait is a migrator's doing if the migrator held the lock, or stood before the waiter in its queue.

On a machine with more to do than cores, a backend may wait because another one that holds a lock has no CPU. That is not
what a migration can help: `starved_ms` is how long the migrator's own backend was ready to run and did not, as the kernel
counts it, and may be taken off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.postgres import Cluster

LONGEST_MS = 100

_STILL = re.compile(
    r"process (\d+) still waiting for (\w+) on (.+?) after ([\d.]+) ms.*\n"
    r".*?DETAIL:\s+Process(?:es)? holding the lock: ([\d, ]+)\. Wait queue: ([\d, ]*)\."
)
_GOT = re.compile(r"process (\d+) acquired (\w+) on (.+?) after ([\d.]+) ms")


@dataclass(frozen=True, slots=True)
class Wait:
    """A backend that has waited for longer than 100 ms. `behind` are those that held the lock or were before it."""

    pid: int
    lock: str
    waited_ms: float
    behind: frozenset[int]


class LockWatch:
    """Reads the server's log from now on. Only sessions that begin after it count: they have the shorter time-out."""

    def __init__(self, cluster: Cluster, dbname: str) -> None:
        self._log: Path = cluster.log
        self._from = self._log.stat().st_size
        cluster.execute(f"alter database {dbname} set deadlock_timeout = '{LONGEST_MS}ms'")
        cluster.execute(f"alter database {dbname} set log_lock_waits = on")

    def said(self) -> str:
        """Return what the server has logged since."""
        with self._log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")

    def waits(self, behind: int) -> list[Wait]:
        """Return the waits, for a table, a row or whatever, that a backend is to blame for, by its process id."""
        text = self.said()
        got: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for match in _GOT.finditer(text):
            got.setdefault((match[1], match[3]), []).append((match.start(), float(match[4])))
        found: dict[tuple[str, str, int], Wait] = {}  # a wait is told more than once
        for match in _STILL.finditer(text):
            pid, mode, what, waited, holders, queue = match.groups()
            before = set(map(int, holders.split(", "))) | set(_numbers(queue.partition(pid)[0]))
            at, ms = next(
                (each for each in got.get((pid, what), ()) if each[0] > match.start()), (-1, float(waited))
            )
            if behind in before:
                found[pid, what, at] = Wait(int(pid), f"{mode} on {what}", ms, frozenset(before))
        return list(found.values())


def _numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


def starved_ms(backend_pid: int) -> float:
    """Return for how long a process has been ready to run without running, since it began."""
    return int(Path(f"/proc/{backend_pid}/schedstat").read_text().split()[1]) / 1e6


def exclusive_locks(connection: psycopg.Connection[Any]) -> set[str]:
    """Return the tables on which the open transaction has a lock that others can be in the way of, or it in theirs."""
    rows = connection.execute(
        """select distinct c.relname from pg_locks l join pg_class c on c.oid = l.relation
           where l.pid = pg_backend_pid() and l.locktype = 'relation' and c.relkind in ('r', 'p', 'v', 'm')
             and c.relnamespace = 'stepwell'::regnamespace
             and l.mode in ('ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
                            'AccessExclusiveLock')"""
    ).fetchall()
    return {name for (name,) in rows}
