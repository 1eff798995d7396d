"""Procrastinate. The file has this name so that it does not hide the package."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import contract

if TYPE_CHECKING:
    from procrastinate import App, JobContext

CONCURRENCY = 30
BULK = 1_000  # jobs in a call

DESCRIPTION = {
    "name": "Procrastinate",
    "version": "3.10.0",
    "language": "python",
    "requires": ["procrastinate==3.10.0", "psycopg[binary]>=3.3"],
    "durable": False,
    "sleeps": False,
    "works": ["job", "mark", "linger"],
    "left": "select count(*) from procrastinate_jobs"
    " where status in ('todo', 'doing') and task_name <> 'retry_stalled_jobs'",
    "done": "select count(*) from procrastinate_jobs"
    " where status = 'succeeded' and task_name <> 'retry_stalled_jobs'",
    "settings": [
        (
            f"async tasks, concurrency {CONCURRENCY}: the documentation's example; 10 and 100 were no faster, because a"
            " worker fetches its jobs one by one"
        ),
        f"max_size {CONCURRENCY + 1} of the pool: with short jobs as many connections as the concurrency, plus one",
        "psycopg[binary]: psycopg's implementation in C, where the package alone brings the one in Python",
        "LISTEN/NOTIFY, the default, wakes an idle worker; it polls every 5 s besides",
        (
            "stalled jobs are retried by the documentation's periodic task, every 10 s instead of every 10 minutes;"
            " 10 s is also how often a worker shows that it lives, and after 30 s without it is stalled: defaults"
        ),
        "delete_jobs never, the default: finished jobs are kept",
        f"bulk: batch_defer_async() with {BULK:,} jobs a call",
    ],
    "remark": "a job that is retried runs from its start",
}


def install() -> None:
    asyncio.run(create())


async def create() -> None:
    async with application().open_async() as app:
        await app.schema_manager.apply_schema_async()


def application(name: str = "bench") -> App:
    from procrastinate import App, PsycopgConnector
    from psycopg.conninfo import make_conninfo

    # It warns that a task's name follows from the module that was run as a script; ours have names.
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    conninfo = make_conninfo(contract.url(), application_name=name)
    app = App(connector=PsycopgConnector(conninfo=conninfo, max_size=CONCURRENCY + 1))
    register(app)
    return app


@asynccontextmanager
async def client() -> AsyncIterator[contract.Client]:
    async with application().open_async() as app:

        async def single(work: str, word: str) -> None:
            await app.tasks[work].defer_async(word=word)

        async def bulk(work: str, words: list[str]) -> None:
            for chunk in contract.chunks(words, BULK):
                await app.tasks[work].batch_defer_async(*({"word": word} for word in chunk))

        yield contract.Client(single, bulk)


def work() -> None:
    asyncio.run(serve())


async def serve() -> None:
    name = f"bench worker {os.getpid()}"
    async with application(name).open_async() as app:
        worker = app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False)
        running = asyncio.create_task(worker)
        await listening(app, name)
        contract.ready()
        await running


async def listening(app: App, name: str) -> None:
    """Return when the worker would hear of a new job: else the first would wait until it polls.

    The worker itself does not say so; its connection for LISTEN is the one whose last statement that was.
    """
    query = "select from pg_stat_activity where application_name = %(name)s and query ilike 'listen%%'"
    while not await app.connector.execute_query_all_async(query, name=name):  # noqa: ASYNC110 - nothing here is told
        await asyncio.sleep(0.005)


def register(app: App) -> None:
    @app.task(name="job")
    async def job(word: str) -> None:
        contract.effect()

    @app.task(name="mark")
    async def mark(word: str) -> None:
        contract.mark(word)
        contract.effect()

    @app.task(name="linger")
    async def linger(word: str) -> None:
        contract.first_of_linger()
        await contract.second_of_linger()

    @app.periodic(cron="* * * * * */10")
    @app.task(name="retry_stalled_jobs", queueing_lock="retry_stalled_jobs", pass_context=True)
    async def retry_stalled_jobs(context: JobContext, timestamp: int) -> None:
        for job in await context.app.job_manager.get_stalled_jobs():
            await context.app.job_manager.retry_job(job)


PEER = contract.Peer(DESCRIPTION, install, client, work)

if __name__ == "__main__":
    contract.main(PEER)
