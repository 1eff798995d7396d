"""The claimants' protocol, call by call, for tests that attack it: workers without a process, on connections of their own.

What a `Worker` sends goes through `worker.engine.transitions`, so the wire format is the product's. Every statement is a
transaction of its own unless the connection is in one (`lab.connection(autocommit=False)`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, LiteralString, Self, TypeVar
from uuid import UUID

import msgspec
import psycopg
from psycopg.rows import TupleRow

from outbox.database import connect
from tests.pooler import direct
from tests.waiting import wait_until
from worker.engine.claims import Claim
from worker.engine.transitions import (
    ChildRow,
    EndRow,
    EndState,
    Extra,
    RecordRow,
    TaskRow,
    Then,
    Transition,
    Writing,
    encode,
)
from worker.queries import load

Db = psycopg.Connection[TupleRow]
T = TypeVar("T")

FENCED, APPLIED, ALREADY, BEHIND, CANCELLING, PAUSING = 0, 1, 2, 3, 4, 8
NO_FLOORS = [0] * 20
STATEMENT_SECONDS = 20
"""A statement that a test leaves waiting for a lock ends by itself."""
TABLES = (
    "runs",
    "keys",
    "tasks",
    "outbox",
    "signals",
    "state",
    "stream",
    "workers",
    "workflows",
    "counters",
    "doorbell",
    "exporter",
)

_ids = itertools.count(2_000_001)


class Held:
    """A claimed task: builds the transitions of its claimant, at the position that it has reached."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.task, self.run = claim.task, claim.run_id
        self.attempt, self.position, self.wakeups = claim.attempt, claim.position, claim.wakeups

    def record(
        self, *path: int, n: int = 0, outcome: str = "completed", value: str | None = '"done"', **more: Any
    ) -> RecordRow:
        """Return the record of an execution of a step."""
        return RecordRow(
            path, n, "step", more.pop("name", "send"), outcome,
            datetime.now(UTC), value=None if value is None else msgspec.Raw(value.encode()), **more,
        )  # fmt: skip

    def move(self, *records: RecordRow, doing: Sequence[int] | None = (1,), **more: Any) -> Writing:
        return self._writing("move", records, doing=doing, **more)

    def park(
        self,
        *records: RecordRow,
        doing: Sequence[int] | None = (1,),
        delay: float | None = None,
        **more: Any,
    ) -> Writing:
        return self._writing("park", records, doing=doing, delay=delay, **more)

    def release(self, *records: RecordRow, **more: Any) -> Writing:
        return self._writing("release", records, **more)

    def wake(self) -> Writing:
        return self._writing("wake", ())

    def done(self, *records: RecordRow, **more: Any) -> Writing:
        """Return the end of a step or timer that is a task of its own."""
        return self._writing("done", records, **more)

    def hold(self, *records: RecordRow, **more: Any) -> Writing:
        return self._writing("hold", records, **more)

    def continue_(self, *records: RecordRow, **more: Any) -> Writing:
        """Return the beginning of a new epoch; its input is an extra."""
        return self._writing("continue", records, **more)

    def finish(
        self, *records: RecordRow, state: EndState = "succeeded", output: str | None = '"out"', **more: Any
    ) -> Writing:
        """Return the end of the run: its record comes after the others."""
        error = None if state == "succeeded" else {"type": "E", "message": "it ended"}
        ended = RecordRow(
            (), 0, "run", self.claim.name, state, datetime.now(UTC), error=error
        )  # fmt: skip
        raw = msgspec.Raw(output.encode()) if output is not None and error is None else None
        return self._writing("finish", (*records, ended), end=EndRow(state, raw, error), **more)

    def _writing(
        self,
        then: Then,
        records: Sequence[RecordRow],
        end: EndRow | None = None,
        extras: Sequence[Extra] = (),
        *,
        family: bool = False,
        **more: Any,
    ) -> Writing:
        """Return a transition; `more` are fields of it."""
        if self.claim.parent is not None:
            more["doing"] = self.claim.path
        transition = Transition(
            self.task, self.attempt, self.position, self.run, self.claim.epoch or 0, then, self.wakeups,
            parent=self.claim.parent, **more,
        )  # fmt: skip
        return Writing(transition, tuple(records), end, tuple(extras), family)


def step_at(*path: int, wakes: int = 1, name: str = "step:send", **more: Any) -> TaskRow:
    """Return the row of a call that becomes a task of its own."""
    return TaskRow(kind="step", path=path, name=name, wakes=wakes, args=msgspec.Raw(b'{"n": 1}'), **more)


def timer_at(*path: int, delay: float = 0.0, wakes: int = 3) -> TaskRow:
    """Return the row of a sleep beside other calls."""
    said = b'{"kind":"sleep","name":"sleep","outcome":"completed"}'
    return TaskRow(
        kind="timer", path=path, name="sleep", wakes=wakes, delay=delay, args=msgspec.Raw(said)
    )  # fmt: skip


def child_at(*path: int, workflow: str = "child", counted: bool = False, **more: Any) -> ChildRow:
    """Return the row of a run that is called."""
    given = {"version": "", "queue": "default", "input": msgspec.Raw(b'{"a": 1}'), **more}
    return ChildRow(path=path, workflow=workflow, counted=counted, **given)


class Worker:
    """A registered worker; `on` gives the same worker another connection."""

    def __init__(self, db: Db, names: Sequence[str], queues: Sequence[str], id: int) -> None:
        self.db, self.names, self.queues, self.id = db, list(names), list(queues), id

    def register(self) -> Self:
        self.db.execute(load("register"), (self.id, None, "host", 1, "", self.queues, self.names))
        return self

    def on(self, db: Db) -> Worker:
        return Worker(db, self.names, self.queues, self.id)

    def claim(
        self,
        at_most: int = 1,
        *,
        queue: str = "default",
        floors: Sequence[int] = NO_FLOORS,
        alone: bool = False,
        limits: tuple[int | None, int | None] = (1_048_576, 1_048_576),
    ) -> list[Held]:
        parameters = (self.id, queue, self.names, at_most, list(floors), alone, *limits)
        return [Held(Claim(*row)) for row in self.db.execute(load("claim"), parameters)]

    def take(self, **more: Any) -> Held:
        """Claim the one task that there is to claim."""
        (held,) = self.claim(**more)
        return held

    def flush(self, *writings: Writing) -> list[int]:
        """Flush; return the verdicts as the database gives them."""
        row = self.db.execute(load("flush"), (self.id, *encode(writings))).fetchone()
        assert row is not None
        codes: list[int] = row[0]
        return codes

    def apply(self, held: Held, writing: Writing) -> None:
        """Flush what must be applied; the claim goes on from there."""
        assert self.flush(writing) == [APPLIED]
        held.position += 1

    def apply_wakes(self) -> int:
        """Claim and apply the wakes that there are; return how many."""
        wakes = self.claim(0)
        assert all(held.claim.kind == "wake" for held in wakes)
        if wakes:
            assert self.flush(*(held.wake() for held in wakes)) == [APPLIED] * len(wakes)
        return len(wakes)


class Lab:
    """A database with the schema and, unless told otherwise, nothing in it; closes what it opened."""

    def __init__(self, url: str, *, emptied: bool = True) -> None:
        self.url = url
        self._stack = ExitStack()
        self.db = self.connection()
        if emptied:
            self.db.execute(f"truncate {', '.join('stepwell.' + table for table in TABLES)}".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def connection(self, *, autocommit: bool = True) -> Db:
        """Open another connection. A transaction that is open on it at the end of the test is rolled back."""
        db = connect(direct(self.url), application_name="test", autocommit=True)
        self._stack.callback(db.close)
        db.execute(f"set statement_timeout = '{STATEMENT_SECONDS}s'".encode())
        db.autocommit = autocommit
        return db

    def worker(self, *names: str, queues: Sequence[str] = ("default",), db: Db | None = None) -> Worker:
        """Register a worker, by default for the name `w` and on the lab's own connection."""
        return Worker(db or self.db, names or ("w",), queues, next(_ids)).register()

    def enqueue(
        self, count: int = 1, workflow: str = "w", *, db: Db | None = None, **options: Any
    ) -> list[UUID]:
        """Enqueue so many runs, one after the other; return their ids in order."""
        named = "".join(f", {name} => %({name})s" for name in options)
        statement = f"select stepwell.enqueue(%(workflow)s, '{{}}'{named}) from generate_series(1, %(count)s)"
        rows = (db or self.db).execute(statement.encode(), {"workflow": workflow, "count": count, **options})
        return [row[0] for row in rows]

    def cancel(self, run: UUID, *, db: Db | None = None) -> bool:
        return bool(self.one("select stepwell.cancel(%s)", run, db=db))

    def retry(self, run: UUID) -> int | None:
        epoch: int | None = self.one("select stepwell.retry(%s)", run)
        return epoch

    def promote(self, at_most: int = 1000) -> int:
        return int(self.one("select promoted from stepwell.promote_v1(%s)", at_most))

    def die(self, worker: Worker, *, poison_after: int = 3) -> int:
        """Bury a worker and reclaim everything; return how many tasks it held."""
        assert self.one("select stepwell.bury_v1(%s)", worker.id)
        return int(
            self.one("select reclaimed from stepwell.reclaim_v1(%s, %s, 1000)", worker.id, poison_after)
        )

    def one(self, statement: LiteralString, *parameters: Any, db: Db | None = None) -> Any:
        """Return the first column of the first row."""
        row = (db or self.db).execute(statement, parameters or None).fetchone()
        assert row is not None
        return row[0]

    def rows(self, statement: LiteralString, *parameters: Any) -> list[tuple[Any, ...]]:
        return list(self.db.execute(statement, parameters or None))

    def call(self, run: UUID, *path: int, columns: str = "state") -> Any:
        """Return some columns of the task of one of the run's calls, as `task` does."""
        row = self.db.execute(
            f"select {columns} from stepwell.tasks where run_id = %s and path = %s and kind <> 'wake'".encode(),
            [run, list(path)],
        ).fetchone()
        return None if row is None else row if len(row) > 1 else row[0]

    def calls(self, run: UUID) -> dict[str, str]:
        """Return the state of each task of the run's calls, by path."""
        rows = self.rows(
            "select path, state from stepwell.tasks where run_id = %s and path > '{}' order by path", run
        )
        return {".".join(map(str, path)): state for path, state in rows}

    def task(self, task: int, columns: str = "state") -> Any:
        """Return some columns of a task's row: a tuple if they are several; None when it is gone."""
        row = self.db.execute(
            f"select {columns} from stepwell.tasks where id = %s".encode(), [task]
        ).fetchone()
        return None if row is None else row if len(row) > 1 else row[0]

    def state(self, run: UUID) -> str:
        """Return the run's state as people mean it."""
        return str(self.one("select status from stepwell.run_status where id = %s", run))

    def history(self, run: UUID) -> list[tuple[Any, ...]]:
        """Return (seq, epoch, path, n, outcome) of each record, in order."""
        return self.rows(
            "select seq, epoch, path, n, outcome from stepwell.outbox where run_id = %s order by seq", run
        )

    def total(self, kind: str, outcome: str) -> int:
        """Return what the counters say."""
        return int(
            self.one(
                "select coalesce(sum(value), 0) from stepwell.counters where kind = %s and outcome = %s",
                kind,
                outcome,
            )
        )

    def snapshot(self) -> list[tuple[Any, ...]]:
        """Return everything that a claimant may write, as text: equal before and after what must write nothing."""
        return [
            row
            for table in ("runs", "tasks", "outbox", "counters")
            for row in self.db.execute(f"select t::text from stepwell.{table} t order by 1".encode())
        ]

    def wait_for_lock(self, db: Db) -> None:
        """Wait until the statement that runs on a connection waits for a lock."""
        pid = db.info.backend_pid
        wait_until(
            lambda: self.one("select cardinality(pg_blocking_pids(%s)) > 0", pid),
            what="a lock to be waited for",
        )


@contextmanager
def meanwhile(work: Callable[[], T]) -> Iterator[Future[T]]:
    """Run `work` in a thread while the block is executed; its answer is in the future."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)
