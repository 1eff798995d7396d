"""How many pages a claim reads, when tasks that are done or that nobody knows stand before the one it wants.

Each test measures the naive way as well, and sees it read in proportion to what stands before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import psycopg
import pytest
import pytest_asyncio

from tests import engines
from tests.effects import Gate, two_steps
from tests.engines import until
from tests.protocol import APPLIED, NO_FLOORS, Held, Lab, Worker
from tests.waiting import wait_until
from worker import workflow
from worker.definitions import collecting
from worker.engine import claims
from worker.engine.claims import Claim, Claimant

FEW = 10
"""Entries of indexes that a claim of one task reads when nothing is in its way."""
PAGES_APART = 20
"""By so many pages claims of one task may differ: where the new version of its row goes is not up to them."""
ROWS_ON_A_PAGE = 60
"""Of tasks, generously: about twenty fit."""
ENTRIES_ON_A_PAGE = 150
"""Of an index, stingily: those that are known to be dead are passed over page by page until a vacuum comes."""

READ = """
select coalesce(sum(pg_stat_get_xact_blocks_fetched(c.oid)), 0)::int,
       coalesce(sum(pg_stat_get_xact_tuples_returned(c.oid)) filter (where c.relkind = 'i'), 0)::int
from pg_class c
where c.oid = 'stepwell.tasks'::regclass
   or c.oid in (select i.indexrelid from pg_index i where i.indrelid = 'stepwell.tasks'::regclass)
"""


class Read(NamedTuple):
    """What was read of the tasks: pages of the table and of its indexes, entries of the indexes."""

    pages: int
    entries: int

    @classmethod
    def between(cls, before: Any, after: Any) -> Read:
        return cls(*(int(late - early) for early, late in zip(before, after, strict=True)))


def reading(worker: Worker, floors: Sequence[int] = NO_FLOORS) -> Read:
    """Return what a claim of one task reads, and undo it."""
    with worker.db.transaction(force_rollback=True):
        before = worker.db.execute(READ).fetchone()
        assert len(worker.claim(1, floors=floors)) == 1
        return Read.between(before, worker.db.execute(READ).fetchone())


# -- behind what is done: floors -----------------------------------------------------------------------


class Measured:
    """The claimant of the product, for a worker of the test; says what each of its claims reads."""

    def __init__(self, lab: Lab, worker: Worker) -> None:
        self._lab, self._worker = lab, worker
        self._claimant = Claimant(self._connect, worker.id)
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        self._connection = await psycopg.AsyncConnection.connect(self._lab.url)
        return self._connection

    async def finish(self, count: int) -> Read:
        """Claim, measure that, and finish what was claimed."""
        await self._claimant.claim("default", ["nobody"], 1)  # it is connected, then
        assert self._connection is not None
        await self._connection.commit()
        before = await (await self._connection.execute(READ)).fetchone()
        claimed = await self._claimant.claim("default", ["w"], count)
        read = Read.between(before, await (await self._connection.execute(READ)).fetchone())
        await self._connection.commit()
        assert len(claimed) == count
        self._end(claimed)
        return read

    def _end(self, claimed: Sequence[Claim]) -> None:
        assert self._worker.flush(*(Held(claim).finish() for claim in claimed)) == [APPLIED] * len(claimed)

    async def close(self) -> None:
        await self._claimant.close()


class Clock:
    """Stands in for the module `time`: floors are forgotten when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest_asyncio.fixture
async def measured(lab: Lab) -> AsyncIterator[Measured]:
    opened = Measured(lab, lab.worker())
    try:
        yield opened
    finally:
        await opened.close()


async def test_under_an_old_open_transaction_a_claim_reads_as_little_behind_2000_done_tasks_as_behind_few(
    lab: Lab, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as somebody might still see the rows that are gone, no index forgets them."""
    clock, rounds, batch = Clock(), 8, 250
    monkeypatch.setattr(claims, "time", clock)
    lab.enqueue(rounds * (batch + 1) + 3)
    old = lab.connection(autocommit=False)
    old.execute("set transaction isolation level repeatable read")
    old.execute("select from stepwell.tasks limit 1")

    naive_worker, done = lab.worker(), 0
    reads: list[Read] = []
    naive: list[Read] = []
    for _ in range(rounds):
        await measured.finish(batch)
        reads.append(await measured.finish(1))
        done += batch + 1
        naive.append(reading(naive_worker))
        assert naive[-1].entries >= done
    assert naive[-1].pages - naive[0].pages >= (done - batch) // ROWS_ON_A_PAGE
    assert max(read.entries for read in reads) <= FEW
    assert max(read.pages for read in reads) - min(read.pages for read in reads) <= PAGES_APART

    # A floor is believed for a second only, for the sake of those who commit late: one claim in a second pays.
    clock.now += claims.FLOOR_SECONDS
    assert (await measured.finish(1)).entries >= done
    assert (await measured.finish(1)).entries <= FEW


# -- behind what nobody knows: setting aside -----------------------------------------------------------


def after_the_first(worker: Worker) -> Read:
    """Return what a claim reads once one has come by and has marked the entries of what is gone.

    It cannot mark them for as long as another session may still see the rows: one that analyses the table, say.
    """
    wait_until(lambda: reading(worker).entries <= FEW, what="the entries of what is gone to be marked")
    return reading(worker)


@pytest.mark.parametrize("strangers", [1000, 4000])
def test_a_claim_reads_all_that_nobody_knows_until_it_is_set_aside(lab: Lab, strangers: int) -> None:
    worker = lab.worker()
    lab.enqueue()
    alone = reading(worker)
    lab.enqueue(strangers, "stranger", priority=0)
    naive = [reading(worker) for _ in range(3)]
    assert min(read.entries for read in naive) >= strangers
    assert min(read.pages for read in naive) >= alone.pages + strangers // ROWS_ON_A_PAGE

    assert lab.one("select stepwell.shelve_v1('default', 5000)") == strangers
    assert after_the_first(worker).pages <= alone.pages + PAGES_APART + strangers // ENTRIES_ON_A_PAGE

    newcomer = lab.worker("stranger")
    assert lab.rows("select distinct state from stepwell.tasks") == [("ready",)]
    assert len(newcomer.claim(strangers)) == strangers


async def test_a_worker_sets_aside_what_nobody_knows_and_the_registration_of_one_who_does_brings_it_back(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks it to; and more than it takes at a time."""
    strangers = 2000
    monkeypatch.setattr("worker.engine.caretaker.SET_ASIDE_AT_MOST", strangers // 4)
    registry, _ = two_steps(Gate(), [])
    with collecting() as knowing:

        @workflow
        def unheard_of() -> str:
            return "heard"

    async def leave_aside(*_: object) -> int:
        return 0

    with Lab(database_url) as lab:
        worker = lab.worker()
        lab.enqueue()
        alone = reading(worker)
        lab.enqueue(strangers, "unheard_of", priority=0)
        assert reading(worker).entries >= strangers

        async with engines.Lab(database_url) as running:

            async def set_aside() -> bool:
                return bool(
                    lab.one("select count(*) from stepwell.tasks where state = 'shelved'") == strangers
                )

            async with running.engine(registry):
                await until(set_aside, what="strangers to be set aside")
                allowed = alone.pages + PAGES_APART + strangers // ENTRIES_ON_A_PAGE
                assert after_the_first(worker).pages <= allowed

                monkeypatch.setattr(
                    Claimant, "unshelve", leave_aside
                )  # so it is the registration that does it

                async def heard() -> bool:
                    return (await running.states()).get("succeeded") == strangers

                async with running.engine(knowing):
                    await until(heard, 60.0, what="what was set aside to be executed")
