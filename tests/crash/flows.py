"""What the crash tests run. Every effect goes to a ledger outside the database; gates hold a step where it is killed."""

from __future__ import annotations

import os
from typing import Any

import psycopg
import tenacity

from tests.crash.gates import HOME, pass_gate, pass_gate_async
from worker import NOT_DONE, current_step, retrying, sleep, step, transaction, workflow


def note(what: str, step_name: str) -> None:
    """Append one line to the ledger, whole and durable in the page cache: kills of processes do not lose it."""
    key = current_step().idempotency_key
    line = f"{what} {step_name} {key} {current_step().fence} {os.getpid()}\n"
    descriptor = os.open(HOME / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@step
async def greet(name: str) -> str:
    note("start", "greet")
    await pass_gate_async("before-greet")
    note("effect", "greet")
    await pass_gate_async("after-greet")
    return f"hello {name}"


@step
def count(text: str) -> int:
    note("start", "count")
    pass_gate("before-count")
    note("effect", "count")
    pass_gate("after-count")
    return len(text)


@transaction
def save(connection: psycopg.Connection, name: str, size: int) -> int:
    note("start", "save")
    pass_gate("before-save")
    connection.execute(
        "insert into saved (run, name, size) values (%s, %s, %s)", (str(current_step().run_id), name, size)
    )
    note("effect", "save")
    pass_gate("after-save")
    return size


def was_paid(name: str) -> object:
    return f"paid {name}" if (HOME / f"paid-{name}").exists() else NOT_DONE


@step(verify=was_paid, retry=retrying(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_fixed(0.1)))
async def pay(name: str) -> str:
    note("start", "pay")
    await pass_gate_async("before-pay")
    (HOME / f"paid-{name}").touch(exist_ok=False)
    note("effect", "pay")
    await pass_gate_async("after-pay")
    return f"paid {name}"


@step(on_crash="hold")
async def fire(name: str) -> str:
    note("start", "fire")
    await pass_gate_async("before-fire")
    note("effect", "fire")
    return name


@workflow
async def journey(name: str) -> list[Any]:
    """An async, a def and a transactional step, with a rest between."""
    greeting = await greet(name)
    size = count(greeting)
    await sleep(0.8)
    saved = save(name, size)
    return [greeting, size, saved, await pay(name)]


@workflow
async def launch(name: str) -> str:
    return await fire(name)


@workflow
async def nap(seconds: float) -> str:
    await sleep(seconds)
    return await greet("sleeper")
