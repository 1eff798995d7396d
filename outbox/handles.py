"""What enqueueing gives back: the run as a handle on the client that enqueued it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic
from uuid import UUID

from typing_extensions import TypeVar

from outbox.exchange import Progress, StreamItem
from outbox.history import RunInfo
from outbox.statements import Duration

if TYPE_CHECKING:
    from outbox.async_client import AsyncClient
    from outbox.client import Client
    from outbox.invocations import WorkflowLike
    from outbox.repairs import CallPath
    from outbox.transactions import AsyncTransaction, Transaction

R_co = TypeVar("R_co", covariant=True, default=Any)


@dataclass(frozen=True, slots=True)
class Run(Generic[R_co]):
    """A run that was enqueued. `created` is False when its key was known: then it is the first run of that key."""

    id: UUID
    created: bool
    workflow: str
    _client: Client = field(repr=False, compare=False)
    _source: WorkflowLike[R_co] | None = field(repr=False, compare=False)

    def result(self, timeout: float | None = None) -> R_co:
        """Wait for the end and return the result, typed by the workflow's annotation. See `Client.result`."""
        return self._client.result(self.id, timeout, workflow=self._source)

    def info(self) -> RunInfo:
        """Return the run as it is now."""
        return self._client.get(self.id)

    def cancel(self) -> bool:
        """Ask for its end; return whether it was open."""
        return self._client.cancel(self.id)

    def pause(self) -> bool:
        """Stop it until it is resumed; return whether it was open. See `Client.pause`."""
        return self._client.pause(self.id)

    def resume(self) -> bool:
        """Have it go on after a pause; return whether it was paused."""
        return self._client.resume(self.id)

    def retry(self) -> int:
        """Open it again after it has failed, was cancelled or blocked; return its new epoch. See `Client.retry`."""
        return self._client.retry(self.id)

    def rewind(self, path: CallPath) -> int:
        """Have it go on from a call as if that had never been made; return its new epoch. See `Client.rewind`."""
        return self._client.rewind(self.id, path)

    def fork(
        self, path: CallPath, *, input: Mapping[str, Any] | None = None, version: str | None = None
    ) -> Run[R_co]:
        """Return a new run that has what happened in this one before a call, and goes on from it. See `Client.fork`."""
        made = self._client.fork(self.id, path, input=input, version=version)
        return Run(made, True, self.workflow, self._client, self._source)

    def resolve(
        self, path: CallPath, value: Any = None, *, error: str | Mapping[str, Any] | None = None
    ) -> int:
        """Say how a step of it ended, and have it go on; return its new epoch. See `Client.resolve`."""
        return self._client.resolve(self.id, path, value, error=error)

    def signal(self, name: str, payload: Any = None, *, tx: Transaction | None = None) -> bool:
        """Send it a signal; return whether it was open. See `Client.signal`."""
        return self._client.signal(self.id, name, payload, tx=tx)

    def state(self) -> dict[str, Any]:
        """Return what it shows of itself: key to value."""
        return self._client.state(self.id)

    def progress(self) -> Progress | None:
        """Return how far it is, None if its body does not say."""
        return self._client.progress(self.id)

    def stream(
        self, name: str | None = None, *, after: int = 0, follow: bool = True, timeout: Duration | None = None
    ) -> Iterator[StreamItem]:
        """Yield what it emits, live, until it has ended. See `Client.stream`."""
        return self._client.stream(self.id, name, after=after, follow=follow, timeout=timeout)


@dataclass(frozen=True, slots=True)
class AsyncRun(Generic[R_co]):
    """A run that was enqueued by an `AsyncClient`; see `Run`."""

    id: UUID
    created: bool
    workflow: str
    _client: AsyncClient = field(repr=False, compare=False)
    _source: WorkflowLike[R_co] | None = field(repr=False, compare=False)

    async def result(self, timeout: float | None = None) -> R_co:
        """Wait for the end and return the result, typed by the workflow's annotation. See `Client.result`."""
        return await self._client.result(self.id, timeout, workflow=self._source)

    async def info(self) -> RunInfo:
        """Return the run as it is now."""
        return await self._client.get(self.id)

    async def cancel(self) -> bool:
        """Ask for its end; return whether it was open."""
        return await self._client.cancel(self.id)

    async def pause(self) -> bool:
        """Stop it until it is resumed; return whether it was open. See `Client.pause`."""
        return await self._client.pause(self.id)

    async def resume(self) -> bool:
        """Have it go on after a pause; return whether it was paused."""
        return await self._client.resume(self.id)

    async def retry(self) -> int:
        """Open it again after it has failed, was cancelled or blocked; return its new epoch. See `Client.retry`."""
        return await self._client.retry(self.id)

    async def rewind(self, path: CallPath) -> int:
        """Have it go on from a call as if that had never been made; return its new epoch. See `Client.rewind`."""
        return await self._client.rewind(self.id, path)

    async def fork(
        self, path: CallPath, *, input: Mapping[str, Any] | None = None, version: str | None = None
    ) -> AsyncRun[R_co]:
        """Return a new run that has what happened in this one before a call, and goes on from it. See `Client.fork`."""
        made = await self._client.fork(self.id, path, input=input, version=version)
        return AsyncRun(made, True, self.workflow, self._client, self._source)

    async def resolve(
        self, path: CallPath, value: Any = None, *, error: str | Mapping[str, Any] | None = None
    ) -> int:
        """Say how a step of it ended, and have it go on; return its new epoch. See `Client.resolve`."""
        return await self._client.resolve(self.id, path, value, error=error)

    async def signal(self, name: str, payload: Any = None, *, tx: AsyncTransaction | None = None) -> bool:
        """Send it a signal; return whether it was open. See `Client.signal`."""
        return await self._client.signal(self.id, name, payload, tx=tx)

    async def state(self) -> dict[str, Any]:
        """Return what it shows of itself: key to value."""
        return await self._client.state(self.id)

    async def progress(self) -> Progress | None:
        """Return how far it is, None if its body does not say."""
        return await self._client.progress(self.id)

    def stream(
        self, name: str | None = None, *, after: int = 0, follow: bool = True, timeout: Duration | None = None
    ) -> AsyncIterator[StreamItem]:
        """Yield what it emits, live, until it has ended. See `Client.stream`."""
        return self._client.stream(self.id, name, after=after, follow=follow, timeout=timeout)
