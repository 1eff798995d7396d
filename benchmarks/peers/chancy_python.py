"""Chancy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import contract

if TYPE_CHECKING:
    from chancy import Chancy, Job

MODULE = "chancy_python"  # a job names its function by this file, which its worker imports
QUEUE = "default"  # which a worker declares in any case, with an executor that starts processes
CONCURRENCY = 1_000

DESCRIPTION = {
    "name": "Chancy",
    "version": "0.26.0",
    "language": "python",
    "requires": ["chancy==0.26.0", "psycopg[binary]>=3.3.6"],
    "durable": False,
    "sleeps": False,
    "works": ["job", "mark", "linger"],
    "left": "select count(*) from chancy_jobs where state in ('pending', 'running', 'retrying')",
    "done": "select count(*) from chancy_jobs where state = 'succeeded'",
    "settings": [
        (
            "AsyncExecutor: the documentation's choice for many jobs at once without the overhead of processes or"
            " threads, which the default, ProcessExecutor, has"
        ),
        (
            f"concurrency {CONCURRENCY:,}, default 100: a fetch takes as many jobs as there are free slots, so this is"
            " also its batch, as large as that in which a worker writes what has finished"
        ),
        (
            "eager_polling: fetches again as soon as a job ends, meant for queues that always have some; without it a"
            " worker would wait 5 s (polling_interval, default) between two fetches"
        ),
        "notifications, the default, wake an idle worker",
        "send_outgoing_interval 1 s, the default: what has finished is written once a second",
        "the default plugins; Recovery looks every 60 s for workers that have been silent for 90 s: defaults",
        "psycopg[binary]: psycopg's implementation in C, where the package alone brings the one in Python",
        "log level WARNING: it would write a line for each job",
        "bulk: push_many(), 1,000 to a transaction, its default",
    ],
    "remark": "a job that is recovered runs from its start; finished jobs that were not yet written when a worker"
    " was killed run again",
}


def install() -> None:
    asyncio.run(create())


async def create() -> None:
    from chancy import Chancy, Queue

    async with application() as app:
        await app.migrate()
        await app.declare(
            Queue(QUEUE, concurrency=CONCURRENCY, executor=Chancy.Executor.Async, eager_polling=True)
        )


def application() -> Chancy:
    from chancy import Chancy

    log = logging.getLogger("chancy")
    log.setLevel(logging.WARNING)
    return Chancy(contract.url(), log=log)


@asynccontextmanager
async def client() -> AsyncIterator[contract.Client]:
    from chancy import Job

    def job(work: str, word: str) -> Job:
        return Job(func=f"{MODULE}.{work}", kwargs={"word": word}, queue=QUEUE)

    async with application() as app:
        await app.pool.wait()

        async def single(work: str, word: str) -> None:
            await app.push(job(work, word))

        async def bulk(work: str, words: list[str]) -> None:
            async for _references in app.push_many([job(work, word) for word in words]):
                pass

        yield contract.Client(single, bulk)


def work() -> None:
    asyncio.run(serve())


async def serve() -> None:
    from chancy import Worker

    async with application() as app, Worker(app, register_signal_handlers=False) as worker:
        contract.ready()
        await worker.wait_for_shutdown()


async def job(word: str) -> None:
    contract.effect()


async def mark(word: str) -> None:
    contract.mark(word)
    contract.effect()


async def linger(word: str) -> None:
    contract.first_of_linger()
    await contract.second_of_linger()


PEER = contract.Peer(DESCRIPTION, install, client, work)

if __name__ == "__main__":
    contract.main(PEER)
