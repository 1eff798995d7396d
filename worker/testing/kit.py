"""`StepwellTest`: a database, a worker and a clock for one test.

Nothing is executed until the test calls `run_until_idle`. Then a real engine works in a thread of this process
until the database says that nothing is ready, claimed or due any more, and leaves in order. So between two calls
everything stands still, and the test can look, move the time, or prepare a crash.

Time is moved by moving what is stored into the past: what was due in a month is due now, what was recorded today
was recorded a month ago, and every duration between two stored times stays what it was.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Self
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow
from typing_extensions import TypeVar

from outbox import Run
from outbox.database import connect
from outbox.errors import ConfigError
from outbox.invocations import WorkflowLike, function_of
from outbox.settings import Settings
from outbox.statements import Key, RunLike, key_text, run_uuid
from worker.definitions import Step
from worker.engine.recorded import from_database
from worker.engine.sandbox import Sandbox
from worker.engine.sealed import rehearsed
from worker.queries import load
from worker.registry import Registry
from worker.registry import registry as process_registry
from worker.replay.records import dotted
from worker.replay.rehearsal import Mismatch
from worker.testing import accounts
from worker.testing.clients import LookingClient
from worker.testing.crashes import Crash, Moment
from worker.testing.inline import STOP_SECONDS, InlineWorker, LoopThread, reclaimed
from worker.testing.servers import require_session

R = TypeVar("R", default=Any)

TIMEOUT_SECONDS = 30.0
LOOK_SECONDS = 0.005
"""How often the database is asked whether anything is left to do."""
MOST_ADVANCES = 1000
MOST_TOLD = 10
EVER_SECONDS = 1e11
SETTINGS: Mapping[str, Any] = {
    "concurrency": 20,
    "threads": 8,
    "connections": 4,
    "poll_seconds": 0.1,
    "grace_seconds": 5.0,
}
"""What suits a test better than the default; the environment is not asked."""


class NotIdle(AssertionError):
    """There was something left to do that was not done in time, or that nobody can do."""


class _Look(NamedTuple):
    """What is left to do, as testing_look.sql tells it."""

    busy: int
    strangers: list[str] | None
    queues: list[str] | None
    next_in: float | None
    workers: int


class StepwellTest:
    """Stepwell for one test, on the database at `url`. Use it in a `with`, or as the fixture `stepwell`.

    `registry` holds the workflows that its worker knows; None means those of this process. `settings` are those of
    a worker, by name.
    """

    def __init__(
        self,
        url: str,
        *,
        registry: Registry | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        **settings: Any,
    ) -> None:
        self.url = url
        """The URL of the test's database."""
        self._settings = Settings(**{"database_url": url, **SETTINGS, **settings})
        keys = {name: getattr(self._settings, name) for name in ("encryption_keys", "encryption_keys_file")}
        self.client = LookingClient(url, replace(Settings.load(database_url=url), **keys))
        """An `outbox.Client` on it. Its `result` does not wait, unless it is told how long."""
        self.enqueue = self.client.enqueue
        """`Client.enqueue`."""
        self._registry = registry
        self._timeout_seconds = timeout_seconds
        self._crashes: list[Crash] = []
        self._working = threading.Lock()
        self._loop: LoopThread | None = None
        self._connection: psycopg.Connection[TupleRow] | None = None
        self._own = connect(url, application_name="stepwell testing")
        require_session(self._own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the worker's thread. Safe twice."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()
        if self._connection is not None:
            self._connection.close()
        self.client.close()
        self._own.close()

    @property
    def connection(self) -> psycopg.Connection[TupleRow]:
        """A connection to the test's database for what is not Stepwell's, in autocommit mode."""
        if self._connection is None:
            self._connection = connect(self.url, application_name="test", json_as_text=False)
        return self._connection

    # -- executing

    def run_until_idle(self, *, advancing: bool = False, timeout_seconds: float | None = None) -> None:
        """Execute until nothing is ready, being executed or due.

        What waits for a time, a sleep as well as a retry, still waits then; with `advancing` time is moved on to
        the next such moment until nothing waits for a time any more. Raises NotIdle when that takes longer than
        the time limit, naming what each run is doing, or when a run's workflow is not known here.
        """
        limit = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + limit
        with self._exclusively():
            for _ in range(MOST_ADVANCES):
                self._work(deadline, limit)
                next_in = self._look().next_in
                if not advancing or next_in is None:
                    return
                self._backdate(max(0.0, next_in))
        raise NotIdle(
            f"still waiting for a time after it was advanced {MOST_ADVANCES} times:\n{self._unfinished({})}"
        )

    async def run_until_idle_async(
        self, *, advancing: bool = False, timeout_seconds: float | None = None
    ) -> None:
        """Do what `run_until_idle` does, while the event loop of an async test goes on."""
        await asyncio.to_thread(self.run_until_idle, advancing=advancing, timeout_seconds=timeout_seconds)

    def advance(self, *, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0) -> None:
        """Let so much time pass. What becomes due is executed by the next `run_until_idle`.

        Stored times are moved into the past: due times, deadlines, the times of what has happened. Times inside of
        inputs and results, and in tables of your own, stay what they are.
        """
        passed = seconds + 60 * (minutes + 60 * (hours + 24 * days))
        if passed < 0:
            raise ValueError("time does not go back")
        with self._exclusively():
            self._backdate(passed)

    @contextmanager
    def crash_at(
        self,
        step: Step[..., Any] | str,
        moment: Moment,
        *,
        times: int | None = 1,
        execution: int | None = None,
    ) -> Iterator[Crash]:
        """Let workers die at a step, in this block: *before* it is called, *after*, or when *recording* is done.

        `run_until_idle` then reclaims what the dead worker had claimed and goes on with a fresh one. `times`: how
        often; None: each time. `execution`: only in the nth execution of a call. Raises AssertionError at the end of
        the block if that has not happened so often.
        """
        name = step if isinstance(step, str) else step.name
        if isinstance(step, str) and name not in self._known().steps:
            raise ConfigError(
                f"there is no step {name!r}; there are {', '.join(sorted(self._known().steps))}"
            )
        if moment not in ("before", "after", "recording"):
            raise ConfigError(f"a worker crashes before, after or recording, not {moment!r}")
        crash = Crash(name, moment, times, execution)
        self._crashes.append(crash)
        try:
            yield crash
        finally:
            self._crashes.remove(crash)
        wanted = 1 if times is None else times
        if crash.count < wanted:
            where = name if execution is None else f"execution {execution} of {name}"
            raise AssertionError(
                f"no worker has crashed at {where} ({moment})"
                if crash.count == 0
                else f"workers have crashed {crash.count} times at {where} ({moment}), not {wanted} times"
            )

    # -- asserting

    def assert_enqueued(
        self,
        workflow: WorkflowLike[R] | str,
        *,
        key: Key | None = None,
        input: Mapping[str, Any] | None = None,
        queue: str | None = None,
        count: int | None = None,
    ) -> list[Run[R]]:
        """Assert that runs of `workflow` were enqueued, `count` of them or else at least one, and return them.

        Only what is given is compared; of the input only the parameters that are given, by their JSON.
        """
        name = workflow if isinstance(workflow, str) else workflow.name
        expected = accounts.Expected.of(name, key_text(key), input, queue)
        runs = accounts.enqueued(self._own, self._settings.keyring())
        found = [run for run in runs if expected.is_met_by(run)]
        if not found if count is None else len(found) != count:
            raise AssertionError(accounts.complaint(expected, count, len(found), runs))
        return [Run(run.id, True, name, self.client, function_of(workflow)) for run in found]

    def check_replay(self, run: RunLike | None = None) -> None:
        """Assert that the bodies as they are now fit what is recorded: of one run, or of all.

        Each body is driven through its history, as it would be after a crash; nothing is executed. A run that would
        be blocked, or that calls a step with other arguments than before, is told with the call and the line.
        """
        ids = None if run is None else [run_uuid(run)]
        self._require_fit(self._mismatches(ids))

    def check_end(self) -> None:
        """Assert what the fixture asserts when a test has passed.

        The replay fits, and no run is blocked that the test has not asked about by `result`, `get` or `info`.
        """
        blocked = [
            run for run in accounts.enqueued(self._own, self._settings.keyring()) if run.status == "blocked"
        ]
        unseen = [run for run in blocked if run.id not in self.client.looked_at]
        if unseen:
            why = "\n".join(f"  {run}: {self.client.why(run.id)}" for run in unseen[:MOST_TOLD])
            raise AssertionError(
                f"{len(unseen)} runs are blocked, and the test has not looked at them:\n{why}"
            )
        known = {run.id for run in blocked}
        self._require_fit([each for each in self._mismatches(None) if each.run not in known])

    def describe(self) -> str:
        """Return what has become of each run, for a person."""
        return accounts.told(self._own, self.client, self._settings.keyring())

    # -- the worker

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        if not self._working.acquire(blocking=False):
            raise RuntimeError(
                "this test's worker is at work already: await it, or call from one thread only"
            )
        try:
            yield
        finally:
            self._working.release()

    def _work(self, deadline: float, limit: float) -> None:
        """Have workers work, one after the other, until nothing is left to do."""
        while (look := self._look()).busy or look.strangers:
            self._employ(look, deadline, limit)

    def _employ(self, look: _Look, deadline: float, limit: float) -> None:
        """Have one worker work until nothing is left that it can do, or until it dies."""
        worker = self._hired(look)
        self.client.working = True
        try:
            while not worker.ended:
                look = self._look()
                if look.workers and not look.busy:
                    if look.strangers:
                        raise NotIdle(self._unknown(look.strangers))
                    break
                if look.queues and worker.queues.isdisjoint(look.queues):
                    break  # what is left is on queues that came up meanwhile: for a worker that serves them
                if time.monotonic() > deadline:
                    raise NotIdle(f"not idle after {limit:g} s:\n{self._unfinished(worker.executing())}")
                worker.watch(LOOK_SECONDS)
            worker.drain(max(STOP_SECONDS, deadline - time.monotonic()))
        finally:
            self.client.working = False
            self._abandoned(worker)

    def _look(self) -> _Look:
        row = self._own.execute(load("testing_look")).fetchone()
        assert row is not None, "an aggregate answers with one row"
        return _Look(*row)

    def _hired(self, look: _Look) -> InlineWorker:
        registry = self._known()
        queues = {"default", *(each.queue for each in registry.workflows.values()), *(look.queues or ())}
        self._loop = self._loop or LoopThread()
        worker = InlineWorker(
            self._loop, registry, self._settings, url=self.url, queues=sorted(queues), crashes=self._crashes
        )
        self._own.execute(load("lock_workers"), ([worker.id],))  # by this lock `why` knows that it lives
        return worker

    def _abandoned(self, worker: InlineWorker) -> None:
        """End a worker whatever it does, and free what it has claimed."""
        ended = worker.stop()
        self._own.execute(load("unlock_workers"), ([worker.id],))
        if not ended and self._loop is not None:  # a step blocks it: the next worker gets another one
            self._loop.leave()
            self._loop = None
        if self._look().workers:  # it did not leave in order
            self._loop = self._loop or LoopThread()
            self._loop.start(reclaimed(self.url, worker.id, self._settings.poison_after)).result()

    def _known(self) -> Registry:
        known = process_registry() if self._registry is None else self._registry
        known.resolve()
        return known

    def _backdate(self, seconds: float) -> None:
        with self._own.transaction():
            for (statement,) in self._own.execute(load("testing_backdating")).fetchall():
                self._own.execute(statement, {"seconds": seconds})
            # Arguments that were made of `now()` differ from now on, although the body is what it was.
            self._own.execute(load("testing_forget_fingerprints"))

    # -- telling

    def _unfinished(self, doing: Mapping[tuple[UUID, tuple[int, ...]], Any]) -> str:
        """Return what each run that has not ended is doing, a line for each."""
        now = time.monotonic()
        lines = []
        for run in accounts.enqueued(self._own, self._settings.keyring()):
            if run.status not in ("pending", "running", "waiting"):
                continue
            steps = [
                f"executing step {each.step} (call {dotted(path)}, execution {each.number}) for {now - each.since:.1f} s"
                for (owner, path), each in doing.items()
                if owner == run.id
            ]
            why = "; ".join(steps) or self.client.why(run.id) or "claimed, but no step is being executed"
            lines.append(f"  {run}: {why}")
            if len(lines) == MOST_TOLD:
                lines.append("  …")
                break
        return (
            "\n".join(lines)
            or "  no run is open, but tasks are left; this should not happen, please report it"
        )

    def _unknown(self, names: Sequence[str]) -> str:
        known = ", ".join(sorted(self._known().workflows)) or "none"
        return (
            f"there are tasks that nobody can execute, of: {', '.join(names)}. Workflows that are known here: {known}. "
            "Import the module that defines what is missing, name your app in the ini option stepwell_app, or override "
            "the fixture stepwell_registry"
        )

    def _mismatches(self, ids: Sequence[UUID] | None) -> list[Mismatch]:
        workflows, keyring, guard = self._known().workflows, self._settings.keyring(), Sandbox()
        found = []
        for run in from_database(self._own, ids=ids, since=None if ids else EVER_SECONDS):
            if run.claimed_as in workflows:
                mismatch = rehearsed(run, workflows[run.claimed_as], keyring, guard)
                found += [mismatch] if mismatch else []
        return found

    @staticmethod
    def _require_fit(mismatches: Sequence[Mismatch]) -> None:
        if not mismatches:
            return
        lines = []
        for each in mismatches[:MOST_TOLD]:
            lines.append(f"  {each.workflow} ({each.run}): {each.reason}: {each.message}")
            if each.expected is not None:
                lines.append(f"    recorded: {each.expected}\n    the code: {each.got}")
        told = "\n".join(lines)
        raise AssertionError(
            f"{len(mismatches)} runs would not survive a crash, their replay differs:\n{told}"
        )
