"""What the claims of one process share: what they write through, execute with, read by and seal with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

from outbox.sealing import Keyring
from outbox.settings import Settings
from worker.definitions import Step
from worker.engine.claims import Claim, Mail
from worker.engine.committer import Committer
from worker.replay.guards import Guard
from worker.replay.records import Record
from worker.steps.execution import Executor
from worker.steps.transactions import Transactions


class Reader(Protocol):
    """What the claims of one process read: what is recorded of runs, what was sent to them, who came later."""

    async def histories(self, claims: Sequence[Claim]) -> dict[UUID, list[Record]]: ...
    async def mail(self, run_ids: Sequence[UUID]) -> dict[UUID, list[Mail]]: ...
    async def is_superseded(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Means:
    """What the claims of one process share.

    `leaving` tells whether runs are to be given back. `leave` has tasks of a name left to newer workers for a while.
    """

    committer: Committer
    executor: Executor
    transactions: Transactions
    settings: Settings
    guard: Guard
    leaving: Callable[[], bool]
    leave: Callable[[str], None]
    reader: Reader
    keyring: Keyring = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keyring", self.settings.keyring())

    def slots(self, step: Step[..., Any]) -> tuple[asyncio.Semaphore, ...]:
        """Return what an execution of the step needs beside its run's own slot: a connection, a thread."""
        connection = () if step.transaction is None else (self.transactions.connections,)
        return connection if step.is_async else (*connection, self.executor.threads)
