"""What `Client` and `AsyncClient` offer for runs that went wrong: thin runners over `outbox.repairs`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any
from uuid import UUID

from outbox import repairs
from outbox.history import run_info
from outbox.repairs import MOST_FOUND, RUNS_AT_ONCE, Action, CallPath
from outbox.runners import AsyncRunner, Runner
from outbox.statements import Duration, Key, RunLike, run_uuid


class Repairs:
    """Retry, rewind, fork, resolve, pause, resume and forget runs. Needs the rights of stepwell_worker."""

    _runner: Runner

    def retry(self, run: RunLike) -> int:
        """Open a failed, cancelled or blocked run again and return its new epoch.

        What completed stays completed. Raises RunConflict when it is open or has succeeded, or has undone its steps
        (rewind it then), RunNotFound.
        """
        return self._runner.run(repairs.retry(run_uuid(run)))

    def rewind(self, run: RunLike, path: CallPath) -> int:
        """Have a run go on from a call as if neither that one nor anything after it had happened; return its new epoch.

        What happened before stays. From there on steps have other idempotency keys, the signals that were taken are
        there again, and children are on their own: cancelled if they are open and not detached. An open run has to be
        paused first, and goes on then. Raises RunConflict, also for a call that was never made, RunNotFound, ConfigError.
        """
        return self._runner.run(repairs.rewind(run_uuid(run), path))

    def fork(
        self,
        run: RunLike,
        path: CallPath,
        *,
        input: Mapping[str, Any] | None = None,
        version: str | None = None,
    ) -> UUID:
        """Make a run that has what happened in `run` before a call, and goes on from there; return its id.

        With the same input and version, or with others, which nobody checks here. `run` may be in any state, and is left as
        it is. Raises RunNotFound, RunConflict for a call that the run has not come to, ConfigError, PayloadError.
        """
        limit, keyring = self._runner.settings.max_payload_bytes, self._runner.keyring
        asked = run_uuid(run)
        sealing = bool(keyring) and input is not None
        workflow = self._runner.run(run_info(asked)).workflow if sealing else ""
        return self._runner.run(repairs.fork(asked, path, input, version, limit, keyring, workflow))

    def resolve(
        self,
        run: RunLike,
        path: CallPath,
        value: Any = None,
        *,
        error: str | Mapping[str, Any] | None = None,
    ) -> int:
        """Say how a step ended that is held, or has failed, and have the run go on; return its new epoch.

        With `error`, a message or a mapping with "type" and "message", the step has failed; else its result is `value`,
        which is not checked by the step's annotation. What was said so can be said otherwise until the run has gone on
        from there. Raises RunConflict unless the run is blocked or failed and the step is such a one, RunNotFound,
        ConfigError, PayloadError.
        """
        limit, keyring = self._runner.settings.max_payload_bytes, self._runner.keyring
        asked = run_uuid(run)
        step = self._runner.run(repairs.step_at(asked, path)) if keyring else ""
        return self._runner.run(repairs.resolve(asked, path, value, error, limit, keyring, step))

    def pause(self, run: RunLike) -> bool:
        """Stop a run until it is resumed; return whether it was open.

        What is being executed ends first. Time goes on: a sleep that is over meanwhile is over, a deadline too. Its
        children go on.
        """
        return self._runner.run(repairs.changed("pause", [run_uuid(run)])) != []

    def resume(self, run: RunLike) -> bool:
        """Have a paused run go on; return whether it was paused."""
        return self._runner.run(repairs.changed("resume", [run_uuid(run)])) != []

    def forget(self, key: Key, *, workflow: str | None = None) -> list[UUID]:
        """Erase what came in under an idempotency key, and what was made of it; return the runs.

        Of the runs of this key, of all that these have called, and of the forks of any of them: inputs, results, what
        their steps returned, messages and data of errors, signals, state and streams, labels, lanes and tenants, and the key
        itself, which is free again. What happened stays: names, outcomes, times. Such a run cannot go on any more. Without
        `workflow`, the key of all. Raises RunConflict while one of them is open: cancel it first.
        """
        return self._runner.run(repairs.forget(key, workflow))

    def find(
        self,
        workflow: str | None = None,
        status: str | None = None,
        *,
        error_like: str | None = None,
        since: Duration | None = None,
        limit: int = MOST_FOUND,
    ) -> list[UUID]:
        """Return the ids of runs, the oldest first, for `change`.

        `error_like`: a text that the type, the message or the reason of their error contains, in small or capital
        letters. `since`: enqueued in the last so many seconds.
        """
        return self._runner.run(repairs.matching(workflow, status, error_like, since, limit))

    def change(self, action: Action, runs: Iterable[RunLike]) -> Iterator[UUID]:
        """Retry, cancel, pause or resume many runs; yield those that were in a state for it.

        Lazy: nothing happens until the result is iterated. So many hundred at a time are one transaction.
        """
        ids = map(run_uuid, runs)
        while chunk := list(islice(ids, RUNS_AT_ONCE)):
            yield from self._runner.run(repairs.changed(action, chunk))


class AsyncRepairs:
    """The same, awaited; see `Repairs`."""

    _runner: AsyncRunner

    async def retry(self, run: RunLike) -> int:
        """Open a failed, cancelled or blocked run again and return its new epoch. See `Client.retry`."""
        return await self._runner.run(repairs.retry(run_uuid(run)))

    async def rewind(self, run: RunLike, path: CallPath) -> int:
        """Have a run go on from a call before; return its new epoch. See `Client.rewind`."""
        return await self._runner.run(repairs.rewind(run_uuid(run), path))

    async def fork(
        self,
        run: RunLike,
        path: CallPath,
        *,
        input: Mapping[str, Any] | None = None,
        version: str | None = None,
    ) -> UUID:
        """Make a run that goes on from a call of another one; return its id. See `Client.fork`."""
        limit, keyring = self._runner.settings.max_payload_bytes, self._runner.keyring
        asked = run_uuid(run)
        sealing = bool(keyring) and input is not None
        workflow = (await self._runner.run(run_info(asked))).workflow if sealing else ""
        return await self._runner.run(repairs.fork(asked, path, input, version, limit, keyring, workflow))

    async def resolve(
        self,
        run: RunLike,
        path: CallPath,
        value: Any = None,
        *,
        error: str | Mapping[str, Any] | None = None,
    ) -> int:
        """Say how a step ended; return the run's new epoch. See `Client.resolve`."""
        limit, keyring = self._runner.settings.max_payload_bytes, self._runner.keyring
        asked = run_uuid(run)
        step = await self._runner.run(repairs.step_at(asked, path)) if keyring else ""
        return await self._runner.run(repairs.resolve(asked, path, value, error, limit, keyring, step))

    async def pause(self, run: RunLike) -> bool:
        """Stop a run until it is resumed; return whether it was open. See `Client.pause`."""
        return await self._runner.run(repairs.changed("pause", [run_uuid(run)])) != []

    async def resume(self, run: RunLike) -> bool:
        """Have a paused run go on; return whether it was paused."""
        return await self._runner.run(repairs.changed("resume", [run_uuid(run)])) != []

    async def forget(self, key: Key, *, workflow: str | None = None) -> list[UUID]:
        """Erase what came in under an idempotency key; return the runs. See `Client.forget`."""
        return await self._runner.run(repairs.forget(key, workflow))

    async def find(
        self,
        workflow: str | None = None,
        status: str | None = None,
        *,
        error_like: str | None = None,
        since: Duration | None = None,
        limit: int = MOST_FOUND,
    ) -> list[UUID]:
        """Return the ids of runs, the oldest first. See `Client.find`."""
        return await self._runner.run(repairs.matching(workflow, status, error_like, since, limit))

    async def change(self, action: Action, runs: Iterable[RunLike]) -> AsyncIterator[UUID]:
        """Retry, cancel, pause or resume many runs; yield those that were in a state for it. See `Client.change`."""
        ids = map(run_uuid, runs)
        while chunk := list(islice(ids, RUNS_AT_ONCE)):
            for each in await self._runner.run(repairs.changed(action, chunk)):
                yield each
