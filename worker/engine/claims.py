"""The claimant's side of the protocol: claim, look idle, read histories, audit.

One `Claimant` for each process, over one connection that only the engine's claim loop and the caretaker use,
one statement at a time. It guarantees that what it returns was committed as claimed by this worker. It does not
guarantee that the claim still stands when the caller acts on it: every write is fenced (see `worker.engine.committer`).

When the connection breaks, the statement under way is repeated on a new one; when the server could not do it just
now (see `outbox.transient`), after a second. A claim that had been committed
while its answer was lost then belongs to this worker without it knowing; the audit finds such strays.
When the database says that this worker is dead (SQLSTATE SW003), `DeclaredDead` ends the process: its
supervisor starts a fresh one, which registers anew.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import psycopg
from psycopg import AsyncConnection

from outbox.codec import DEFAULT_MAX_BYTES
from outbox.database import is_disconnect, retry_connecting_async
from outbox.transient import is_transient
from worker.queries import load
from worker.replay.records import Record

logger = logging.getLogger(__name__)

GROUPS = 20
"""Ten priorities, each resumed work before fresh work."""
FLOOR_SECONDS = 1.0
"""How long a lower bound on `turn` is believed: a slow committer may have drawn an earlier one."""
HISTORY_RUNS = 100
"""Histories read in one statement."""

REFUSED_SECONDS = 1.0
"""How long a statement waits that the server could not do just now."""

Connect = Callable[[], Awaitable[AsyncConnection[Any]]]


class DeclaredDead(Exception):
    """The database holds this worker for dead: whatever it still does is fenced."""


class Claim(msgspec.Struct, frozen=True, gc=False):
    """One claimed task, as `claim_v1` answers it, with its run unless it is a wake.

    `workflow` is the run's, `name` what the claimant has to know: the workflow with its version, or a step. `parent`
    is the run's own task where this is one of its calls, with the arguments `args`. `driven` is the seq up to which
    what the body did is written down. `awaited`: another run waits for this one.

    `due_in`, `waited` and `deadline_in` are seconds relative to `now`, the database's clock at the claim. `oversize`: the
    input, or the arguments, have so many bytes, which is too much, and were not read.
    """

    task: int
    run_id: UUID
    kind: str
    name: str
    attempt: int
    position: int
    doing: list[int] | None
    wakeups: int
    seq: int
    interrupted: bool
    interruptions: int
    cancelling: bool
    turn: int
    group: int
    due_in: float | None
    waited: float | None
    deadline_in: float | None
    running_for: float
    now: datetime
    epoch: int
    created_at: datetime
    version: str
    labels: str | None
    input: str | None
    path: list[int]
    parent: int | None
    workflow: str
    args: str | None
    driven: int
    pending: int
    signals: int
    seed: UUID
    key_epoch: int
    base_epoch: int
    awaited: bool
    oversize: int | None = None


class Held(NamedTuple):
    """A claim that the database knows of."""

    task: int
    attempt: int
    position: int
    run_id: UUID
    cancelling: bool


class Mail(NamedTuple):
    """Something that was sent to a run: its payload as JSON text; None if it is too large to be read, `oversize` bytes.

    `trace` is the context in which it was sent, if that is known.
    """

    id: int
    name: str
    payload: str | None
    oversize: int | None = None
    trace: str | None = None


class _Floors:
    """For each queue the turns below which everything is claimed, forgotten once a second."""

    def __init__(self) -> None:
        self._floors: dict[str, list[int]] = {}
        self._forget_at = 0.0

    def of(self, queue: str) -> list[int]:
        moment = time.monotonic()
        if moment >= self._forget_at:
            self._floors.clear()
            self._forget_at = moment + FLOOR_SECONDS
        return self._floors.setdefault(queue, [0] * GROUPS)

    def raise_to(self, queue: str, claims: Iterable[Claim]) -> None:
        floors = self._floors.get(queue)
        if floors is not None:
            for claim in claims:
                if claim.kind in ("run", "step") and claim.turn >= floors[claim.group]:
                    floors[claim.group] = claim.turn + 1


class Claimant:
    """Claims for one worker. `connect` opens a connection in autocommit mode.

    What has more than `max_payload_bytes` is not read: SQL takes inputs and signals of any size.
    """

    def __init__(
        self, connect: Connect, worker_id: int, *, max_payload_bytes: int = DEFAULT_MAX_BYTES
    ) -> None:
        self.worker_id = worker_id
        self._limits = (max_payload_bytes, max_passed_bytes(max_payload_bytes))
        self._connect = connect
        self._connection: AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()
        self._floors = _Floors()
        self._rung_for: list[str] = []
        self._rung_until = 0.0
        self.connections = 0

    @property
    def connected(self) -> bool:
        """Tell whether the last statement found its connection alive."""
        return self._connection is not None and not self._connection.broken

    async def close(self) -> None:
        """Close the connection; safe twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def register(
        self,
        *,
        supervisor: int | None,
        host: str,
        pid: int,
        release: str,
        queues: list[str],
        names: list[str],
    ) -> None:
        """Insert the worker's row; from here on it may claim."""
        await self._run("register", (self.worker_id, supervisor, host, pid, release, queues, names))

    async def publish(self, workflows: Iterable[tuple[str, str, str, str]]) -> None:
        """Publish (name, version, input schema as JSON, queue) of each workflow, the highest version of each last."""
        for workflow in sorted(workflows, key=_by_version):
            await self._run("publish_workflow", workflow)

    async def unregister(self) -> None:
        """Delete the worker's row, unless it still holds claims."""
        await self._run("unregister", {"me": self.worker_id})

    async def claim(self, queue: str, known: list[str], at_most: int, *, alone: bool = False) -> list[Claim]:
        """Claim up to `at_most` tasks of `queue` whose names are `known`, and all wakes; or one suspect, alone.

        Raises DeclaredDead.
        """
        floors = self._floors.of(queue)
        parameters = (self.worker_id, queue, known, at_most, floors, alone, *self._limits)
        rows = await self._run("claim", parameters)
        claims = [Claim(*row) for row in rows]
        self._floors.raise_to(queue, claims)
        if claims:
            self._rung_until = 0.0  # a claim that finds something gives the lease back
        return claims

    async def idle(self, queues: list[str], lease_seconds: float, *, at_least_seconds: float) -> bool:
        """Have producers of these queues ring for so long, for `at_least_seconds` from now on.

        Return whether they have been asked to all along since the claim before this: nothing has come without a ring then.
        """
        asked_at = time.monotonic()
        rung = asked_at < self._rung_until and queues == self._rung_for
        if not rung or self._rung_until < asked_at + at_least_seconds:
            await self._run("idle", (self.worker_id, queues, lease_seconds))
            self._rung_for, self._rung_until = queues, asked_at + lease_seconds
        return rung

    async def histories(self, claims: Sequence[Claim]) -> dict[UUID, list[Record]]:
        """Return the history of each claimed run since it began or started anew, in order of seq."""
        found: dict[UUID, list[Record]] = {claim.run_id: [] for claim in claims}
        whole = [claim.run_id for claim in claims if not claim.base_epoch]
        for start in range(0, len(whole), HISTORY_RUNS):
            for row in await self._run("history", (whole[start : start + HISTORY_RUNS],)):
                found[row[0]].append(record_of(row[1:]))
        for claim in claims:
            if claim.base_epoch:
                rows = await self._run("history_since", (claim.run_id, claim.base_epoch))
                found[claim.run_id] = [record_of(row[1:]) for row in rows]
        return found

    async def step_history(self, claim: Claim) -> list[Record]:
        """Return what is recorded of a claimed step, and of the epochs of its run, in order of seq."""
        parameters = {
            "run": claim.run_id, "path": claim.path, "base": claim.base_epoch, "epoch": claim.epoch,
        }  # fmt: skip
        return [record_of(row[1:]) for row in await self._run("step_history", parameters)]

    async def mail(self, run_ids: Sequence[UUID]) -> dict[UUID, list[Mail]]:
        """Return what was sent to each run and is not taken yet, in the order in which it came."""
        found: dict[UUID, list[Mail]] = {run_id: [] for run_id in run_ids}
        for run_id, *mail in await self._run("mail", {"runs": list(run_ids), "max_bytes": self._limits[0]}):
            found[run_id].append(Mail(*mail))
        return found

    async def traces(self, run_ids: Sequence[UUID]) -> dict[UUID, str]:
        """Return in which context each run was enqueued, where that is known."""
        return dict(await self._run("traces", (list(run_ids),)))

    async def is_superseded(self, name: str) -> bool:
        """Tell whether workers that came after this one and its siblings carry a name."""
        return bool((await self._run("superseded", {"me": self.worker_id, "name": name}))[0][0])

    async def audit(self) -> list[Held]:
        """Return every claim that the database says this worker holds."""
        return [Held(*row) for row in await self._run("audit", (self.worker_id,))]

    async def promote(self, at_most: int) -> tuple[int, float | None]:
        """Ready what is due; return how many, and in how many seconds the next is due."""
        promoted, next_in = (await self._run("promote", (at_most,)))[0]
        return promoted, next_in

    async def shelve(self, queue: str, at_most: int) -> int:
        """Set ready tasks aside that no live worker of the queue knows; return how many."""
        return int((await self._run("shelve", (queue, at_most)))[0][0])

    async def unshelve(self, queues: list[str], known: list[str], at_most: int) -> int:
        """Ready what was set aside and is known here; return how many."""
        return int((await self._run("unshelve", (queues, known, at_most)))[0][0])

    async def suspects(self, queues: list[str], known: list[str]) -> bool:
        """Tell whether a suspect waits here to be tried alone."""
        return bool((await self._run("suspects", (queues, known)))[0][0])

    async def _run(self, name: str, parameters: Sequence[Any] | dict[str, Any]) -> list[tuple[Any, ...]]:
        """Execute one statement and return its rows, on a new connection as often as it takes."""
        statement = load(name)

        async def once() -> list[tuple[Any, ...]]:
            while True:
                connection = await self._connected()
                try:
                    cursor = await connection.execute(statement, parameters, prepare=True, binary=True)
                    answered = cursor.pgresult is not None and cursor.pgresult.nfields
                    return await cursor.fetchall() if answered else []
                except psycopg.Error as error:
                    if is_disconnect(error):
                        await self.close()
                        raise
                    if not is_transient(error):
                        raise
                    said = error.diag.message_primary  # the rest of the error may quote parameters
                    logger.warning("statement %s is refused and will be sent again: %s", name, said)
                await self.close()
                await asyncio.sleep(REFUSED_SECONDS)

        async with self._lock:
            try:
                return await retry_connecting_async(once, give_up_after_seconds=None)
            except psycopg.errors.Error as error:
                if error.sqlstate == "SW003":
                    raise DeclaredDead(str(error)) from error
                raise

    async def _connected(self) -> AsyncConnection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = await self._connect()
            self.connections += 1
            self._rung_until = 0.0  # no lease outlives a crash of the database, or a failover
        return self._connection


def max_passed_bytes(max_payload_bytes: int) -> int:
    """Return the limit of what bodies pass to steps, to children and to their successors.

    That is measured when it is passed, by the default: a replay knows no settings, for it must not come out differently
    under others.
    """
    return max(max_payload_bytes, DEFAULT_MAX_BYTES)


def record_of(row: Sequence[Any]) -> Record:
    """Return the record in a row of history.sql, without its run id."""
    path, n, kind, name, outcome, value, error, fingerprint, at, seq, epoch = row
    return Record(
        path=tuple(path), n=n, kind=kind, name=name, outcome=outcome, value=value,
        error=None if error is None else msgspec.json.decode(error),
        fingerprint=fingerprint, at=at, seq=seq, epoch=epoch,
    )  # fmt: skip


def _by_version(published: tuple[str, str, str, str]) -> list[Any]:
    """Sort by name and version: in it, numbers count as numbers."""
    name, version, *_ = published
    parts = re.split(r"(\d+)", version)
    return [name, *(int(part) if i % 2 else part for i, part in enumerate(parts))]
