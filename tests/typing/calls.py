"""What type checkers know of definitions: this file must pass mypy --strict and pyright. It is never executed."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type
from uuid import UUID

import psycopg
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session
from tenacity import retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_exponential_jitter

from outbox import AsyncClient, AsyncRun, Client, Progress, Run
from worker import (
    NOT_DONE,
    Step,
    Workflow,
    current_run,
    current_step,
    events,
    now,
    on_event,
    random,
    retrying,
    sleep,
    sleep_until,
    step,
    transaction,
    uuid,
    wait,
    workflow,
)


@dataclass
class Lead:
    id: int


@dataclass
class OutOfStock(Exception):
    item: str


# Functions, bare and with options.


@step
async def send(lead: Lead, subject: str = "") -> str:
    return subject


@step
def score(lead: Lead, *, weight: float = 1.0) -> float:
    return weight


def was_sent(lead: Lead) -> object:
    return NOT_DONE


@step(
    name="send",
    retry=retrying(stop=stop_after_attempt(5) | stop_after_delay(60), wait=wait_exponential_jitter(1, 60)),
    timeout=timedelta(seconds=5),
    on_crash="hold",
    verify=was_sent,
    raises=OutOfStock,
)
async def send_carefully(lead: Lead) -> str:
    return ""


@step(retry=retrying(on=(OSError, ValueError)), raises=(OutOfStock,))
def reserve(lead: Lead) -> None: ...


@step(retry=retrying(on=retry_if_exception_type(OSError)))
def order(lead: Lead) -> bytes:
    return b""


# Transactions lose their first parameter.


@transaction
def save(session: Session, lead: Lead) -> int:
    return lead.id


@transaction(timeout=5)
async def save_async(session: AsyncSession, lead: Lead, note: str = "") -> int:
    return lead.id


@transaction
def insert(connection: Connection, lead: Lead) -> int:
    return lead.id


@transaction
async def insert_async(connection: AsyncConnection, lead: Lead) -> int:
    return lead.id


@transaction
def copy(connection: psycopg.Connection[Any], lead: Lead) -> list[int]:
    return []


@transaction(on_crash="retry")
async def copy_async(connection: psycopg.AsyncConnection[Any], lead: Lead) -> list[int]:
    return []


# Methods, decorated above and below.


class Shop:
    @staticmethod
    @step
    def static_below(a: int) -> str:
        return str(a)

    @step
    @staticmethod
    def static_above(a: int) -> str:
        return str(a)

    @staticmethod
    @step(timeout=1)
    async def static_async(a: int) -> str:
        return str(a)

    @transaction
    @staticmethod
    def static_save_above(session: Session, a: int) -> str:
        return str(a)

    @step
    @classmethod
    def of_class(cls, a: int) -> str:
        return str(a)

    @transaction
    @classmethod
    def save_of_class(cls, session: Session, a: int) -> str:
        return str(a)

    @staticmethod
    @transaction
    def static_save(session: Session, a: int) -> str:
        return str(a)

    @staticmethod
    @workflow
    async def sell(a: int) -> str:
        return str(a)

    @staticmethod
    @workflow(queue="slow")
    async def sell_slowly(a: int) -> str:
        return str(a)


@workflow
async def welcome(lead: Lead) -> int:
    coroutine: Coroutine[Any, Any, str] = send(lead, subject="x")
    assert_type(await coroutine, str)
    assert_type(await send(lead), str)
    assert_type(await send_carefully(lead), str)
    assert_type(score(lead, weight=2), float)
    assert_type(order(lead), bytes)

    assert_type(save(lead), int)
    assert_type(await save_async(lead, note="x"), int)
    assert_type(insert(lead), int)
    assert_type(await insert_async(lead), int)
    assert_type(copy(lead), list[int])
    assert_type(await copy_async(lead), list[int])

    assert_type(Shop.static_below(1), str)
    assert_type(Shop().static_below(1), str)
    assert_type(Shop.static_above(1), str)
    assert_type(await Shop.static_async(1), str)
    assert_type(Shop.static_save(1), str)
    assert_type(Shop.static_save_above(1), str)
    assert_type(await Shop.sell(1), str)
    assert_type(await Shop.sell_slowly(1), str)
    assert_type(Shop.of_class.name, str)
    assert_type(Shop.save_of_class.name, str)

    await sleep(5)
    await sleep(timedelta(days=1))
    await sleep_until(datetime(2030, 1, 1, tzinfo=UTC))
    assert_type(now(), datetime)
    assert_type(random(), float)
    assert_type(uuid(), UUID)
    assert_type(current_run().id, UUID)
    return 1


@workflow(name="welcome politely", queue="slow", strict=True)
def welcome_in_a_def(lead: Lead) -> int:
    assert_type(wait(send(lead)), str)
    assert_type(wait(save_async(lead)), int)
    wait(sleep(5))
    return save(lead)


@step
def knows_itself() -> str:
    assert_type(current_step().execution, int)
    return current_step().idempotency_key


# Definitions are what they are.


def check(lead: Lead) -> None:
    coroutine: Coroutine[Any, Any, int] = welcome(lead)
    assert_type(welcome_in_a_def(lead), int)
    named: str = welcome.name + send.name + save.name
    steps: list[Step[Any, Any]] = [send, score, save, save_async]
    workflows: list[Workflow[Any, Any]] = [welcome, welcome_in_a_def]
    assert steps, (workflows, named, coroutine)


# Whatever takes a run takes its handle.


def handles(client: Client) -> None:
    run: Run[int] = client.enqueue(welcome, Lead(1))
    assert_type(run.fork(2), Run[int])
    assert_type(client.state(run), dict[str, Any])
    assert_type(client.progress(run.info()), Progress | None)
    assert_type(client.fork(str(run.id), 1), UUID)
    assert_type([item.name for item in client.stream(run)], list[str])
    assert_type(list(client.change("retry", [run, run.id])), list[UUID])


async def handles_async(client: AsyncClient) -> None:
    run: AsyncRun[int] = await client.enqueue(welcome, Lead(1))
    assert_type(await run.fork(2), AsyncRun[int])
    assert_type(await client.state(run), dict[str, Any])
    assert_type(await client.retry(run), int)


# Hooks.


@on_event
def tell(event: events.Event) -> None:
    match event:
        case events.StepFailed(error=error, step=name):
            assert_type(error, BaseException)
            assert_type(name, str)
        case events.RunBlocked(reason=reason, run_id=run):
            assert_type(reason, str)
            assert_type(run, UUID)
        case _:
            assert_type(event.worker, int)


tell(events.WorkerReclaimed(at=datetime.now(UTC), worker=1, dead=2, detector="lease", tasks=3))
