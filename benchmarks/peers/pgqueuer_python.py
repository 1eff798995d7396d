"""PgQueuer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import contract

if TYPE_CHECKING:
    from pgqueuer import PgQueuer
    from pgqueuer.models import Job
    from pgqueuer.queries import Queries

BATCH = 500
BULK = 1_000  # jobs in a call

DESCRIPTION = {
    "name": "PgQueuer",
    "version": "1.6.0",
    "language": "python",
    "requires": ["pgqueuer[asyncpg]==1.6.0"],
    "durable": False,
    "sleeps": False,
    "works": ["job", "mark", "linger"],
    "left": "select count(*) from pgqueuer where status in ('queued', 'picked')",
    "done": "select count(*) from pgqueuer_log where status = 'successful'",
    "settings": [
        (
            "asyncpg and uvloop: its benchmarks find asyncpg 1.7 times as fast as psycopg, and its command line runs"
            " workers on uvloop"
        ),
        (
            "one QueueManager on one connection in a process: the documentation wants a direct connection, not a pool,"
            " for the manager, and one process for each core"
        ),
        (
            f"batch_size {BATCH}, default 10: the documentation advises to increase it when jobs are short; from 10 to"
            f" {BATCH} the CPU of a job falls by half, beyond it by nothing. max_concurrent_tasks stays unlimited."
        ),
        "autovacuum as `pgq autovac` sets it, which the documentation's checklist asks for",
        "durability durable, the default: the faster levels lose jobs or their log when Postgres crashes",
        "heartbeat_timeout 30 s, the default, bounds the recovery; LISTEN/NOTIFY wakes an idle worker",
        f"bulk: enqueue() with lists of {BULK:,} on one connection: 10,000 were no faster",
    ],
    "remark": "deletes a finished job and keeps a line in its log; a job that is recovered runs from its start",
}


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    import uvloop

    uvloop.run(coroutine)


def install() -> None:
    run(create())


async def create() -> None:
    queries = await connected()
    await queries.install()
    await queries.optimize_autovacuum()


async def connected() -> Queries:
    import asyncpg
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.queries import Queries

    return Queries(AsyncpgDriver(await asyncpg.connect(contract.url())))


@asynccontextmanager
async def client() -> AsyncIterator[contract.Client]:
    queries = await connected()

    async def single(work: str, word: str) -> None:
        await queries.enqueue(work, word.encode())

    async def bulk(work: str, words: list[str]) -> None:
        for chunk in contract.chunks(words, BULK):
            await queries.enqueue([work] * len(chunk), [word.encode() for word in chunk], [0] * len(chunk))

    yield contract.Client(single, bulk)


def work() -> None:
    run(serve())


async def serve() -> None:
    import asyncpg
    from pgqueuer import PgQueuer

    manager = PgQueuer.from_asyncpg_connection(await asyncpg.connect(contract.url()))
    register(manager)
    contract.ready()  # it listens before it looks into the queue for the first time, so no job is missed
    await manager.run(batch_size=BATCH)


def register(manager: PgQueuer) -> None:
    @manager.entrypoint("job")
    async def job(_job: Job) -> None:
        contract.effect()

    @manager.entrypoint("mark")
    async def mark(job: Job) -> None:
        contract.mark(job.payload.decode())
        contract.effect()

    @manager.entrypoint("linger")
    async def linger(_job: Job) -> None:
        contract.first_of_linger()
        await contract.second_of_linger()


PEER = contract.Peer(DESCRIPTION, install, client, work, run)

if __name__ == "__main__":
    contract.main(PEER)
