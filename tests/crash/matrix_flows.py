"""What the crash matrix runs: one step of each kind and policy, in each situation in which a fault may find it.

A step reports to the ledger before it does anything and when it has taken effect; gates, which are files, hold it before
and after its effect. `tag` names the run's gates and files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psycopg
import tenacity

from tests.crash.gates import HOME, pass_gate, pass_gate_async
from tests.crash.ledger import has_taken_effect, report, report_async
from worker import (
    NOT_DONE,
    call,
    current_step,
    gather,
    retrying,
    sleep,
    step,
    transaction,
    wait_signal,
    workflow,
)

NAP_SECONDS = 3600.0
"""What the test does not wait for: it has the time come."""
AGAIN = retrying(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_fixed(NAP_SECONDS))


def fail_once(tag: str) -> None:
    """Fail the first time, where the test wants it."""
    wanted = HOME / f"fails-{tag}"
    if wanted.exists():
        wanted.unlink()
        raise ConnectionError("the first time it fails")


def was_done(tag: str) -> object:
    return tag if has_taken_effect() else NOT_DONE


def act(name: str, tag: str) -> str:
    """Do what every def step does."""
    report("start", name)
    fail_once(tag)
    pass_gate(f"before-{tag}")
    report("effect", name)
    pass_gate(f"after-{tag}")
    return tag


async def act_async(name: str, tag: str) -> str:
    """Do what every async step does."""
    await report_async("start", name)
    fail_once(tag)
    await pass_gate_async(f"before-{tag}")
    await report_async("effect", name)
    await pass_gate_async(f"after-{tag}")
    return tag


@step(retry=AGAIN)
def sync_retry(tag: str) -> str:
    return act("sync_retry", tag)


@step(retry=AGAIN, verify=was_done)
def sync_verify(tag: str) -> str:
    return act("sync_verify", tag)


@step(retry=AGAIN, on_crash="hold")
def sync_hold(tag: str) -> str:
    return act("sync_hold", tag)


@step(retry=AGAIN)
async def async_retry(tag: str) -> str:
    return await act_async("async_retry", tag)


@step(retry=AGAIN, verify=was_done)
async def async_verify(tag: str) -> str:
    return await act_async("async_verify", tag)


@step(retry=AGAIN, on_crash="hold")
async def async_hold(tag: str) -> str:
    return await act_async("async_hold", tag)


BOOK = "insert into witness.booked (run, path, step, fence, pid) values (%s, %s, %s, %s, %s)"


def booking(name: str) -> tuple[Any, ...]:
    info = current_step()
    return (info.run_id, ".".join(map(str, info.path)), name, info.fence, os.getpid())


@transaction(retry=AGAIN)
def transactional_retry(connection: psycopg.Connection, tag: str) -> str:
    report("start", "transactional_retry", transactional=True)
    fail_once(tag)
    pass_gate(f"before-{tag}")
    connection.execute(BOOK, booking("transactional_retry"))
    report("effect", "transactional_retry", transactional=True)
    pass_gate(f"after-{tag}")
    return tag


@transaction(retry=AGAIN)
async def transactional_async_retry(connection: psycopg.AsyncConnection, tag: str) -> str:
    await report_async("start", "transactional_async_retry", transactional=True)
    fail_once(tag)
    await pass_gate_async(f"before-{tag}")
    await connection.execute(BOOK, booking("transactional_async_retry"))
    await report_async("effect", "transactional_async_retry", transactional=True)
    await pass_gate_async(f"after-{tag}")
    return tag


@step
async def opening(tag: str) -> str:
    await report_async("start", "opening")
    await report_async("effect", "opening")
    return tag


@step
async def closing(tag: str) -> str:
    await report_async("start", "closing")
    await report_async("effect", "closing")
    return tag


SYNC: dict[str, Callable[[str], str]] = {
    "sync_retry": sync_retry,
    "sync_verify": sync_verify,
    "sync_hold": sync_hold,
    "transactional_retry": transactional_retry,
}
ASYNC: dict[str, Callable[[str], Any]] = {
    "async_retry": async_retry,
    "async_verify": async_verify,
    "async_hold": async_hold,
    "transactional_async_retry": transactional_async_retry,
}


async def tested(tag: str, variant: str) -> str:
    return SYNC[variant](tag) if variant in SYNC else await ASYNC[variant](tag)


def branch(tag: str, variant: str) -> Any:
    return call(SYNC[variant], tag) if variant in SYNC else ASYNC[variant](tag)


@workflow
async def errand(tag: str, variant: str) -> str:
    return await tested(tag, variant)


@workflow
async def trip(tag: str, variant: str, shape: str) -> list[Any]:
    """Execute the step that is tested, in a certain situation, and one after it."""
    done: list[Any] = []
    if shape == "child":
        done.append(await errand(tag, variant))
    elif shape == "join":
        done += await gather(*(branch(f"{tag}-{number}", variant) for number in range(3)))
    else:
        if shape == "between":
            done.append(await opening(tag))
        done.append(await tested(tag, variant))
    if shape == "timer":
        await sleep(NAP_SECONDS)
    elif shape == "signal":
        done.append(await wait_signal("go", type=str))
    done.append(await closing(tag))
    return done
