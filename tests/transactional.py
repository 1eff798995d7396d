"""A workflow around one transactional step, of any of the six kinds."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from tests.engines import Lab
from worker import sleep, step, transaction, workflow
from worker.definitions import Workflow, collecting

KINDS = (
    "psycopg.Connection",
    "psycopg.AsyncConnection",
    "sqlalchemy.Connection",
    "sqlalchemy.Session",
    "sqlalchemy.AsyncConnection",
    "sqlalchemy.AsyncSession",
)
SYNC_AND_ASYNC = (
    "psycopg.Connection",
    "sqlalchemy.Session",
    "psycopg.AsyncConnection",
    "sqlalchemy.AsyncSession",
)

SAVE = "insert into crm (note, tx) values ('{}', txid_current())"


class Business:
    """The step `save`, of one kind: it writes a row, then does what the test wants with what it was given.

    `then` is called with the given connection or session and a function that executes SQL on it; it may be async
    in the async kinds. The workflow goes on with a step, or a sleep, or nothing.
    """

    def __init__(self, kind: str, then: Callable[..., Any] | None = None, **options: Any) -> None:
        self.executions = 0
        self.went_on: list[Any] = []
        self.is_async = "Async" in kind

        def run(given: Any, statement: str) -> Any:
            return given.execute(text(statement) if kind.startswith("sqlalchemy") else statement)

        def sync_body(given: Any, note: str) -> str:
            self.executions += 1
            run(given, SAVE.format(note))
            said = then(given, lambda statement: run(given, statement)) if then is not None else None
            return f"saved {note}" if said is None else said

        async def async_body(given: Any, note: str) -> str:
            self.executions += 1
            await run(given, SAVE.format(note))
            said = then(given, lambda statement: run(given, statement)) if then is not None else None
            if inspect.isawaitable(said):
                said = await said
            return f"saved {note}" if said is None else said

        with collecting() as self.registry:
            save: Any = self._step(kind, sync_body, async_body, options)

            @step
            async def after(said: str) -> str:
                self.went_on.append(said)
                return f"{said} and went on"

            @workflow
            async def saving(note: str = "x", follow: str = "step") -> str:
                said = save(note)
                if self.is_async:
                    said = await said
                if follow == "step":
                    return await after(said)
                if follow == "sleep":
                    await sleep(0.2)
                return str(said)

        self.flow: Workflow[..., Any] = saving

    @staticmethod
    def _step(
        kind: str,
        sync_body: Callable[..., str],
        async_body: Callable[..., Awaitable[str]],
        options: dict[str, Any],
    ) -> Any:
        match kind:
            case "psycopg.Connection":

                @transaction(name="save", **options)
                def save_p(given: psycopg.Connection[Any], note: str) -> str:
                    return sync_body(given, note)

                return save_p
            case "sqlalchemy.Connection":

                @transaction(name="save", **options)
                def save_c(given: Connection, note: str) -> str:
                    return sync_body(given, note)

                return save_c
            case "sqlalchemy.Session":

                @transaction(name="save", **options)
                def save_s(given: Session, note: str) -> str:
                    return sync_body(given, note)

                return save_s
            case "psycopg.AsyncConnection":

                @transaction(name="save", **options)
                async def save_ap(given: psycopg.AsyncConnection[Any], note: str) -> str:
                    return await async_body(given, note)

                return save_ap
            case "sqlalchemy.AsyncConnection":

                @transaction(name="save", **options)
                async def save_ac(given: AsyncConnection, note: str) -> str:
                    return await async_body(given, note)

                return save_ac

        @transaction(name="save", **options)
        async def save_as(given: AsyncSession, note: str) -> str:
            return await async_body(given, note)

        return save_as


async def notes(lab: Lab) -> list[str]:
    return [row[0] for row in await lab.execute("select note from crm order by id")]
