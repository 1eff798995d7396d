"""What enqueueing gives back: the run as a handle on the client that enqueued it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic
from uuid import UUID

from typing_extensions import TypeVar

from outbox.history import RunInfo

if TYPE_CHECKING:
    from outbox.async_client import AsyncClient
    from outbox.client import Client
    from outbox.invocations import WorkflowLike

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
