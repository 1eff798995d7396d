"""DBOS Transact for Python."""

from __future__ import annotations

import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import contract

if TYPE_CHECKING:
    from dbos import EnqueueOptions

APPLICATION = "bench"
QUEUE = "bench"
SLEEPERS = "sleepers"
CONCURRENCY = 100
POLL_SECONDS = 0.1
CONNECTIONS = 20
BULK = 1_000  # workflows in a transaction

DESCRIPTION = {
    "name": "DBOS",
    "version": "3.4.0",
    "language": "python",
    "requires": ["dbos==3.4.0"],
    "durable": True,
    "sleeps": True,
    "works": ["job", "one", "two", "ten", "mark", "linger", "sleep"],
    "left": "select count(*) from dbos.workflow_status where status in ('ENQUEUED', 'PENDING')",
    "done": "select count(*) from dbos.workflow_status where status = 'SUCCESS'",
    "settings": [
        "a registered queue and coroutine workflows, as in the maker's own benchmark of queues",
        (
            f"worker_concurrency {CONCURRENCY}, no global concurrency: the documentation recommends limits by worker"
            " over the global one, which all workers would have to count together"
        ),
        (
            f"polling_interval_sec {POLL_SECONDS}, default 1.0: a worker takes at most worker_concurrency workflows"
            " a poll, so that with the default it would have to hoard a second's work, or idle"
        ),
        (
            f"sys_db_pool_size {CONNECTIONS}, the default, and max_executor_threads {CONNECTIONS}, default unbounded:"
            " a coroutine workflow uses a thread only for its statements, and each thread more than there are"
            " connections only waits (512 threads, as in the maker's benchmark, took a fifth more CPU)"
        ),
        (
            "sleep: on a queue of its own without worker_concurrency, as a sleeping workflow stays in its worker, where"
            " it would hold one of the slots"
        ),
        "executor_id: one of its own for each process, as the documentation asks for where there are several",
        f"bulk: enqueue_in_transaction() of the client, {BULK:,} to a transaction; there is no call for many",
    ],
    "remark": "what a killed worker had taken is recovered only by a restart under the same executor_id, or by"
    " Conductor, a service outside of the database; with one executor_id for all, a process that starts would"
    " run again what the living ones are running",
}


def install() -> None:
    from dbos import DBOS

    launch()
    DBOS.register_queue(QUEUE, worker_concurrency=CONCURRENCY, polling_interval_sec=POLL_SECONDS)
    DBOS.register_queue(SLEEPERS)
    DBOS.destroy()


def launch() -> None:
    from dbos import DBOS, DBOSConfig

    config: DBOSConfig = {
        "name": APPLICATION,
        "application_version": "1",
        "executor_id": str(uuid.uuid4()),
        "system_database_url": contract.url(),
        "sys_db_pool_size": CONNECTIONS,
        "max_executor_threads": CONNECTIONS,
        "log_level": "WARNING",
    }
    DBOS(config=config)
    register()
    DBOS.launch()


@asynccontextmanager
async def client() -> AsyncIterator[contract.Client]:
    import sqlalchemy
    from dbos import DBOSClient

    engine = sqlalchemy.create_engine(
        sqlalchemy.make_url(contract.url()).set(drivername="postgresql+psycopg")
    )
    dbos = DBOSClient(system_database_engine=engine, application_name=APPLICATION)

    async def single(work: str, word: str) -> None:
        dbos.enqueue(options(work), word)

    async def bulk(work: str, words: list[str]) -> None:
        for chunk in contract.chunks(words, BULK):
            with engine.begin() as connection:
                for word in chunk:
                    dbos.enqueue_in_transaction(connection, options(work), word)

    yield contract.Client(single, bulk)
    dbos.destroy()


def options(work: str) -> EnqueueOptions:
    return {"queue_name": SLEEPERS if work == "sleep" else QUEUE, "workflow_name": work}


def work() -> None:
    launch()
    contract.ready()
    threading.Event().wait()


def register() -> None:
    from dbos import DBOS

    @DBOS.workflow(name="job")
    async def job(_word: str) -> None:
        contract.effect()

    @DBOS.step()
    async def step() -> None:
        contract.effect()

    def register_steps(name: str, count: int) -> None:
        @DBOS.workflow(name=name)
        async def workflow(_word: str) -> None:
            for _ in range(count):
                await step()

    register_steps("one", 1)
    register_steps("two", 2)
    register_steps("ten", 10)

    @DBOS.step()
    async def write(word: str) -> None:
        contract.mark(word)
        contract.effect()

    @DBOS.workflow(name="mark")
    async def mark(word: str) -> None:
        await write(word)

    @DBOS.step()
    async def first() -> None:
        contract.first_of_linger()

    @DBOS.step()
    async def second() -> None:
        await contract.second_of_linger()

    @DBOS.workflow(name="linger")
    async def linger(_word: str) -> None:
        await first()
        await second()

    @DBOS.workflow(name="sleep")
    async def sleep(_word: str) -> None:
        await DBOS.sleep_async(86_400)


PEER = contract.Peer(DESCRIPTION, install, client, work)

if __name__ == "__main__":
    contract.main(PEER)
