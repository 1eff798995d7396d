"""What any service imports: enqueue runs of workflows, wait for them, read them back.

::

    from outbox import Client

    client = Client()  # STEPWELL_DATABASE_URL, or the embedded Postgres if it runs
    run = client.enqueue(welcome_lead, lead, key=lead.id)  # or "welcome_lead"
    client.enqueue(welcome_lead, lead, key=lead.id, tx=session)  # in your own transaction
    run.result(timeout=30)
"""

from __future__ import annotations

from outbox.async_client import AsyncClient
from outbox.client import Client
from outbox.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    HistoryMismatch,
    NotDeterministic,
    PayloadError,
    Permanent,
    ResultTimeout,
    RetryAfter,
    RunBlocked,
    RunCancelled,
    RunConflict,
    RunFailed,
    RunNotFound,
    SchemaError,
    StepFailed,
    StepwellError,
    Suspended,
    UnknownWorkflow,
)
from outbox.exchange import Progress, StreamItem
from outbox.handles import AsyncRun, Run
from outbox.history import HistoryRecord, RunInfo, TaskInfo
from outbox.sealing import Sealed
from outbox.settings import Settings

__all__ = [
    "AsyncClient",
    "AsyncRun",
    "Cancelled",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "HistoryMismatch",
    "HistoryRecord",
    "NotDeterministic",
    "PayloadError",
    "Permanent",
    "Progress",
    "ResultTimeout",
    "RetryAfter",
    "Run",
    "RunBlocked",
    "RunCancelled",
    "RunConflict",
    "RunFailed",
    "RunInfo",
    "RunNotFound",
    "SchemaError",
    "Sealed",
    "Settings",
    "StepFailed",
    "StepwellError",
    "StreamItem",
    "Suspended",
    "TaskInfo",
    "UnknownWorkflow",
]
