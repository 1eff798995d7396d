"""Absurd, by its Python SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import contract

if TYPE_CHECKING:
    from absurd_sdk import AsyncAbsurd, AsyncTaskContext, JsonObject

QUEUE = "bench"
CONCURRENCY = 50  # and so many tasks in a claim
BULK = 1_000  # tasks in a transaction

DESCRIPTION = {
    "name": "Absurd",
    "version": "0.5.1",
    "language": "python",
    "requires": ["absurd-sdk==0.5.1", "absurdctl==0.5.1"],
    "durable": True,
    "sleeps": True,
    "works": ["job", "one", "two", "ten", "mark", "linger", "sleep"],
    "left": f"select count(*) from absurd.t_{QUEUE} where state in ('pending', 'running', 'sleeping')",
    "done": f"select count(*) from absurd.t_{QUEUE} where state = 'completed'",
    "settings": [
        "schema: as `absurdctl init` installs it, from the text that the package absurdctl carries",
        (
            "AsyncAbsurd with one worker in a process: to scale, the documentation advises more processes, whether"
            " the worker is sync or async; all tasks of a worker share its one connection"
        ),
        (
            f"concurrency {CONCURRENCY}, which is also the batch of a claim (batch_size defaults to it): the"
            " documentation's example of 4 claims more often; 200 was no faster"
        ),
        (
            "poll_interval 0.25 s, claim_timeout 120 s: defaults and the documentation's example; there is no"
            " notification, so the one bounds the latency of an idle worker, and the other the recovery"
        ),
        "unpartitioned queue, the default: partitions serve the clean-up of old tasks and need pg_cron",
        (
            f"bulk: spawn() on one connection, {BULK:,} to a transaction; there is no call for many tasks, but the"
            " client takes a connection of the caller's, in a transaction of the caller's"
        ),
    ],
    "remark": "a worker claims again only when the whole batch has ended, so that one long task holds up its"
    " other slots",
}


def install() -> None:
    asyncio.run(create())


async def create() -> None:
    import psycopg
    from absurd_sdk import AsyncAbsurd
    from absurdctl import BUNDLED_SCHEMA_SQL  # `absurdctl init` would need psql to apply it

    async with await psycopg.AsyncConnection.connect(contract.url(), autocommit=True) as connection:
        await connection.execute(BUNDLED_SCHEMA_SQL)
        await AsyncAbsurd(connection, queue_name=QUEUE).create_queue()


@asynccontextmanager
async def client() -> AsyncIterator[contract.Client]:
    import psycopg
    from absurd_sdk import AsyncAbsurd

    async with await psycopg.AsyncConnection.connect(contract.url(), autocommit=True) as connection:
        app = AsyncAbsurd(connection, queue_name=QUEUE)

        async def single(work: str, word: str) -> None:
            await app.spawn(work, {"word": word}, queue=QUEUE)

        async def bulk(work: str, words: list[str]) -> None:
            for chunk in contract.chunks(words, BULK):
                async with connection.transaction():
                    for word in chunk:
                        await single(work, word)

        yield contract.Client(single, bulk)


def work() -> None:
    asyncio.run(serve())


async def serve() -> None:
    import psycopg
    from absurd_sdk import AsyncAbsurd

    async with await psycopg.AsyncConnection.connect(contract.url(), autocommit=True) as connection:
        app = AsyncAbsurd(connection, queue_name=QUEUE)
        register(app)
        contract.ready()
        await app.start_worker(concurrency=CONCURRENCY)


def register(app: AsyncAbsurd) -> None:
    @app.register_task("job")
    async def job(_params: JsonObject, _context: AsyncTaskContext) -> None:
        contract.effect()

    register_steps(app, "one", 1)
    register_steps(app, "two", 2)
    register_steps(app, "ten", 10)

    @app.register_task("mark")
    async def mark(params: JsonObject, context: AsyncTaskContext) -> None:
        async def write() -> None:
            contract.mark(params["word"])
            contract.effect()

        await context.step("write", write)

    @app.register_task("linger")
    async def linger(_params: JsonObject, context: AsyncTaskContext) -> None:
        async def first() -> None:
            contract.first_of_linger()

        await context.step("first", first)
        await context.step("second", contract.second_of_linger)

    @app.register_task("sleep")
    async def sleep(_params: JsonObject, context: AsyncTaskContext) -> None:
        await context.sleep_for("a day", 86_400)


def register_steps(app: AsyncAbsurd, name: str, count: int) -> None:
    async def step() -> None:
        contract.effect()

    @app.register_task(name)
    async def workflow(_params: JsonObject, context: AsyncTaskContext) -> None:
        for n in range(count):
            await context.step(f"step {n}", step)


PEER = contract.Peer(DESCRIPTION, install, client, work)

if __name__ == "__main__":
    contract.main(PEER)
