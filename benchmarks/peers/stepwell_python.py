"""Stepwell, as README.md of this directory wants a system to be."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as the app of a worker it is not run as a script

import contract

from outbox import AsyncClient
from outbox.database import connect
from worker import sleep, step, workflow

FLOWS = {
    "one": "one",
    "two": "two",
    "ten": "ten",
    "mark": "marking",
    "linger": "lingering",
    "sleep": "sleeping",
}

DESCRIPTION = {
    "name": "Stepwell",
    "version": "0.1.0",
    "language": "python",
    "requires": [],
    "durable": True,
    "sleeps": True,
    "works": list(FLOWS),
    "left": "select count(*) from stepwell.runs where state = 'open'",
    "done": "select count(*) from stepwell.runs where state = 'succeeded'",
    "settings": ["everything as it is by default: up to 200 runs in flight in each worker process"],
    "remark": "Every step is recorded, and its record kept",
}


@step
async def plain(n: int) -> int:
    contract.effect()
    return n


@step
async def mark(word: str) -> None:
    contract.mark(word)
    contract.effect()


@step
async def first_of_linger() -> None:
    contract.first_of_linger()


@step
async def second_of_linger() -> None:
    await contract.second_of_linger()


@workflow
async def one(word: str) -> int:
    return await plain(1)


@workflow
async def two(word: str) -> int:
    return await plain(await plain(1))


@workflow
async def ten(word: str) -> int:
    n = 0
    for _ in range(10):
        n = await plain(n)
    return n


@workflow
async def marking(word: str) -> None:
    await mark(word)


@workflow
async def lingering(word: str) -> None:
    await first_of_linger()
    await second_of_linger()


@workflow
async def sleeping(word: str) -> None:
    await sleep(86400)


def install() -> None:
    subprocess.run([*STEPWELL, "migrate"], env=environment(), check=True)


@asynccontextmanager
async def client() -> AsyncIterator[contract.Client]:
    async with AsyncClient(contract.url()) as opened:

        async def single(work: str, word: str) -> None:
            await opened.enqueue(FLOWS[work], {"word": word})

        async def bulk(work: str, words: list[str]) -> None:
            async for _ in opened.enqueue_many(FLOWS[work], ({"word": word} for word in words)):
                pass

        yield contract.Client(single, bulk)


def work() -> None:
    """Run a supervisor with one worker, in this process; it is ready when its worker is registered."""
    started = subprocess.Popen([*STEPWELL, "worker", __file__, "--processes", "1"], env=environment())
    wait_for_a_worker(started.pid)
    contract.ready()
    started.wait()


def wait_for_a_worker(supervisor: int) -> None:
    """Return when a worker of a supervisor is registered."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    with connect(contract.url(), application_name="bench") as db:
        pids: list[int] = []
        while db.execute("select from stepwell.workers where pid = any (%s)", [pids]).fetchone() is None:
            time.sleep(0.02)
            pids = [int(pid) for pid in children.read_text().split()]


STEPWELL = [sys.executable, "-m", "worker.cli"]


def environment() -> dict[str, str]:
    return {**os.environ, "STEPWELL_DATABASE_URL": contract.url(), "STEPWELL_POISON_AFTER": "1000"}


if __name__ == "__main__":
    contract.main(contract.Peer(DESCRIPTION, install, client, work))
