"""Transactional steps: the user's writes and the record of their completion commit together, or not at all.

The worker opens a transaction and gives the step its connection or session. When the step has returned, the
fenced completion (`commit_step_v1`) and COMMIT travel together, so no task row stays locked while anything
waits for this process. A transaction-local setting is the canary: if it is gone, the step has ended the
transaction itself, nothing binds its writes to the record, and the run is blocked rather than silently wrong. A
step that fails after it has committed is found out as well: see `_rolled_back`.

SQLAlchemy sessions join the outer transaction through savepoints, so ``session.commit()`` and ``rollback()`` work
and stay inside; a raw commit or rollback on a connection raises.

What can go wrong, and what the caller learns: an error of the step (`Raised`, rolled back); a serialization
failure or a connection lost before COMMIT was sent (`Repeat`, rolled back); the answer to COMMIT lost
(`Uncertain`: a flush that only bumps the position tells); the claim lost (`Lost`, rolled back); the canary
(`EndedByStep`); a completion that the database refuses (`Refused`, rolled back).
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from outbox import database, sessions
from outbox.transient import is_bad_data, is_conflict, is_transient
from worker.context import executing
from worker.kinds import TransactionKind
from worker.queries import load
from worker.steps.connections import Sources
from worker.steps.execution import (
    Call,
    CutShort,
    Executor,
    Raised,
    Returned,
    TimedOut,
    awaited,
    uninterrupted,
)
from worker.steps.forks import ForksEnd

_OPENING = (
    "select set_config('stepwell.canary', %s, true), pg_current_xact_id()::text,"
    " pg_try_advisory_xact_lock_shared(-%s::bigint)"
)
"""The lock marks the backend as this worker's for those who have to end it (backends.sql), whatever the step makes of
its session's name. Nobody is kept out by it; that it may be refused is of no account."""
_FATE = "select pg_xact_status(%s::xid8)"


class Committed(NamedTuple):
    """The step's writes and its completion are durable. `code` is the answer of the flush."""

    code: int


class Repeat(NamedTuple):
    """Nothing was written; the execution can be repeated. `begun`: the step had been called."""

    error: BaseException
    begun: bool = True


class Uncertain(NamedTuple):
    """The answer to COMMIT was lost."""


class Lost(NamedTuple):
    """The claim was lost; nothing was written."""


class EndedByStep(NamedTuple):
    """The step ended the transaction that it was given."""


class Refused(NamedTuple):
    """The database refused the data of the completion; nothing was written."""

    message: str


TransactionOutcome = (
    Committed | Raised | Repeat | Uncertain | Lost | EndedByStep | Refused | TimedOut | CutShort
)

Documents = tuple[str, str, str, str | None]
Conclude = Callable[[Any], Documents]
"""Turns the step's value into the documents of its completion. Called once, in the engine's loop; may raise."""


class Transactions:
    """Runs transactional steps for one worker, over at most `limit` connections of each kind that is used."""

    def __init__(self, url: str, worker_id: int, limit: int, executor: Executor) -> None:
        self._worker_id = worker_id
        self._executor = executor
        self.connections = asyncio.Semaphore(limit)
        """A slot for each transactional step that executes; the caller takes one before it executes such a step."""
        self._sources = Sources(url, f"stepwell {worker_id}", limit)

    async def execute(self, call: Call, timeout: float | None, conclude: Conclude) -> TransactionOutcome:
        """Execute a transactional step, and commit it with what `conclude` makes of its value."""
        kind = call.step.transaction
        assert kind is not None
        attempt = _Attempt(call, self._worker_id, conclude)
        if kind.is_async:
            answer = await self._in_loop(kind, attempt, timeout)
        else:
            answer = await self._in_thread(kind, attempt, timeout)
        if attempt.ended:
            return EndedByStep()
        return attempt.outcome(answer.error) if isinstance(answer, Raised) else answer

    async def close(self) -> None:
        """Close every connection; safe twice."""
        await self._sources.close()

    async def _in_thread(self, kind: TransactionKind, attempt: _Attempt, timeout: float | None) -> Any:
        loop = asyncio.get_running_loop()
        source = self._sources.of(kind)

        def concluded(value: Any) -> Documents:
            documents = Future[Documents]()

            def conclude() -> None:
                try:
                    documents.set_result(attempt.concluded(value))
                except BaseException as error:  # noqa: BLE001 - it belongs to the thread that waits
                    documents.set_exception(error)

            loop.call_soon_threadsafe(conclude)
            return documents.result()

        def work() -> Committed:
            with (
                source.opened(_OPENING, (attempt.canary, self._worker_id)) as (connection, driver, row),
                _rolled_back(driver, attempt, row[1]),
                source.given(kind, connection) as given,
            ):
                args, kwargs = attempt.call.bound()
                with _guarded(driver, _forbidden):
                    with ForksEnd():
                        value = attempt.call.step.function(given, *args, **kwargs)
                    _check_open(driver, attempt)
                    if kind is TransactionKind.SQLALCHEMY_SESSION:
                        given.commit()
                documents = concluded(value)
                return Committed(*sessions.commit(driver, load("commit_step"), attempt.parameters(documents)))

        answer = await self._executor.in_thread(attempt.call, work, timeout, lambda: attempt.concluding)
        if isinstance(answer, Returned):
            return answer.value
        if isinstance(answer, TimedOut | CutShort):
            attempt.abandoned = True
        return answer

    async def _in_loop(self, kind: TransactionKind, attempt: _Attempt, timeout: float | None) -> Any:
        source = self._sources.of_async(kind)
        try:
            async with (
                source.opened(_OPENING, (attempt.canary, self._worker_id)) as (connection, driver, row),
                _rolled_back_async(driver, attempt, row[1]),
                source.given(kind, connection) as given,
            ):
                args, kwargs = attempt.call.bound()
                with _guarded(driver, _forbidden_async), executing(attempt.call.facts, attempt.call.info):
                    answer = await awaited(_called(attempt, driver, given, args, kwargs), timeout)
                if not isinstance(answer, Returned):
                    raise _RolledBackError(answer)
                documents = attempt.concluded(answer.value)
                committing = sessions.commit_async(driver, load("commit_step"), attempt.parameters(documents))
                return Committed(*await uninterrupted(committing))
        except _RolledBackError as rolled_back:
            return rolled_back.answer
        except Exception as error:  # noqa: BLE001 - judged by the caller
            return Raised(error)


class _Attempt:
    """One execution of a transactional step, and how far it has come."""

    def __init__(self, call: Call, worker_id: int, conclude: Conclude) -> None:
        self.call = call
        self.canary = secrets.token_hex(8)
        self.transaction = ""
        self.ended = False
        self.concluding = False
        self.committed = False
        self.abandoned = False
        self._worker_id = worker_id
        self._conclude = conclude

    def concluded(self, value: Any) -> Documents:
        """Return the documents of the completion. From here on only the database knows the outcome."""
        if self.abandoned:
            raise _AbandonedError
        self.concluding = True
        return self._conclude(value)

    def learn(self, row: tuple[str]) -> None:
        """Take note of the fate of the transaction that the step was given. Before its end only the step can commit it."""
        if row == ("committed",):
            self.ended, self.committed = not self.concluding, self.concluding

    def parameters(self, documents: Documents) -> dict[str, Any]:
        names = ("transitions", "records", "ends", "extras")
        return {"worker": self._worker_id, **dict(zip(names, documents, strict=True)), "canary": self.canary}

    def outcome(self, error: BaseException) -> TransactionOutcome:
        """Judge what was raised, by the step, by the database, or on the way."""
        original: Any = getattr(error, "orig", None) or error
        state = getattr(original, "sqlstate", None) or ""
        disconnected = database.is_disconnect(error)
        if not self.transaction and (disconnected or _is_none_free(error) or is_transient(original)):
            return Repeat(error, begun=False)
        if disconnected:
            return Uncertain() if self.concluding else Repeat(error)
        if self.committed and state != "SW002":
            return Uncertain()  # what has failed is what gives a pooler's session back
        if state == "SW004" or is_conflict(original) or (self.concluding and is_transient(original)):
            return Repeat(error)
        if state == "SW001":
            return Lost()
        if state == "SW002":
            return EndedByStep()
        if is_bad_data(original) and "flush_v1" in (original.diag.context or ""):
            return Refused(f"{original.diag.message_primary} (SQLSTATE {state})")
        return Raised(error, final=self.concluding and not state)


def _is_none_free(error: BaseException) -> bool:
    """Tell whether all connections of SQLAlchemy's pool are taken, by steps that were abandoned."""
    loaded = sys.modules.get("sqlalchemy.exc")
    return loaded is not None and isinstance(error, loaded.TimeoutError)


class _AbandonedError(Exception):
    """The step answered after it had been given up."""


class _EndedError(Exception):
    """The step has ended its transaction."""


class _RolledBackError(Exception):
    """The step has not returned; what it wrote is rolled back on the way out."""

    def __init__(self, answer: Raised | TimedOut | CutShort) -> None:
        super().__init__()
        self.answer = answer


async def _called(
    attempt: _Attempt, driver: Any, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    value = await attempt.call.step.function(given, *args, **kwargs)
    _check_open(driver, attempt)
    if attempt.call.step.transaction is TransactionKind.SQLALCHEMY_ASYNC_SESSION:
        await given.commit()
    return value


def _check_open(driver: Any, attempt: _Attempt) -> None:
    """Raise when no transaction is open any more; costs nothing, as the driver keeps the status."""
    attempt.ended = driver.info.transaction_status is TransactionStatus.IDLE
    if attempt.ended:
        raise _EndedError


@contextmanager
def _rolled_back(driver: Any, attempt: _Attempt, transaction: str) -> Iterator[None]:
    """Roll back on an error, which SQLAlchemy does not when a raw commit was refused on the way.

    A step that had committed before it failed must not be executed again: the transaction's own fate tells.
    """
    attempt.transaction = transaction
    try:
        yield
    except BaseException:
        if not driver.closed:
            sessions.roll_back(driver)
            with driver.cursor(row_factory=tuple_row) as cursor:
                attempt.learn(cursor.execute(_FATE, (transaction,)).fetchone())
        raise


@asynccontextmanager
async def _rolled_back_async(driver: Any, attempt: _Attempt, transaction: str) -> AsyncIterator[None]:
    """Roll back on an error; see `_rolled_back`."""
    attempt.transaction = transaction
    try:
        yield
    except BaseException:
        if not driver.closed:
            await sessions.roll_back_async(driver)
            async with driver.cursor(row_factory=tuple_row) as cursor:
                attempt.learn(await (await cursor.execute(_FATE, (transaction,))).fetchone())
        raise


@contextmanager
def _guarded(driver: Any, forbidden: Callable[..., Any]) -> Iterator[None]:
    """Make raw commits and rollbacks of the driver's connection raise, whoever calls them."""
    driver.commit = driver.rollback = forbidden
    try:
        yield
    finally:
        del driver.commit, driver.rollback


def _forbidden(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "the transaction of a step belongs to Stepwell, which commits it together with the step's completion: "
        "do not commit or roll it back; raise an exception to roll back, or use a savepoint"
    )


async def _forbidden_async(*_: Any, **__: Any) -> None:
    _forbidden()
