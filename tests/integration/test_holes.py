"""Named holes of the protocol: what a naive version loses, repeats, or waits for ever with.

What sits in a socket buffer is played with SIGSTOP to the server's own process behind a connection: what is sent to it
meanwhile is in the kernel, and comes when it goes on. Holes that have their place elsewhere are not repeated here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from psycopg.conninfo import conninfo_to_dict

from outbox.database import connect, connect_async
from tests.effects import Gate
from tests.engines import Lab as Engines
from tests.engines import Running, counted, keep_house_often, until
from tests.integration.calls import branches, completed, joined, knowing, only
from tests.integration.supervising import QUICK, supervising
from tests.pooler import direct
from tests.postgres import Cluster
from tests.protocol import (
    ALREADY,
    APPLIED,
    FENCED,
    NO_FLOORS,
    Db,
    Held,
    Lab,
    Worker,
    meanwhile,
)
from tests.transactional import Business, notes
from tests.waiting import wait_until, wait_until_async
from worker import gather, sleep, step, wait_signal, workflow
from worker.definitions import collecting
from worker.engine.committer import Committer
from worker.engine.transitions import Receipt, Verdict, Writing, encode
from worker.queries import load

# -- left in a socket buffer -------------------------------------------------------------------------


class Sent:
    """A statement whose bytes the kernel has taken, and which nobody has read yet."""

    def __init__(self, db: Db, statement: str, parameters: tuple[Any, ...]) -> None:
        self._wire = db.pgconn
        self._wire.send_query(psycopg.ClientCursor(db).mogrify(statement.encode(), parameters).encode())
        wait_until(lambda: self._wire.flush() == 0)

    def answer(self) -> tuple[str | None, list[bytes | None]]:
        """Return the SQLSTATE, if it is an error, and the first row: waits for both."""
        first = None
        while result := self._wire.get_result():
            first = first or result
        assert first is not None
        state = first.error_field(psycopg.pq.DiagnosticField.SQLSTATE)
        row = [first.get_value(0, column) for column in range(first.nfields)] if first.ntuples else []
        return state.decode() if state else None, row


@contextmanager
def frozen(db: Db) -> Iterator[None]:
    """Stop the server's process behind a connection for as long as the block."""
    pid = db.info.backend_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: process_state(pid) == "T", what="the backend to stand still")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def sent_claim(worker: Worker) -> Sent:
    parameters = (worker.id, "default", worker.names, 10, NO_FLOORS, False, None, None)
    return Sent(worker.db, load("claim"), parameters)


def sent_flush(worker: Worker, *writings: Writing) -> Sent:
    return Sent(worker.db, load("flush"), (worker.id, *encode(writings)))


@pytest.mark.parametrize("reclaimed", [False, True])
def test_a_claim_left_in_the_socket_buffer_of_a_dead_worker_claims_nothing(lab: Lab, reclaimed: bool) -> None:
    lab.enqueue(3)
    worker = lab.worker(db=lab.connection())
    with frozen(worker.db):
        claim = sent_claim(worker)
        if reclaimed:
            assert lab.die(worker) == 0
        else:
            assert lab.one("select stepwell.bury_v1(%s)", worker.id)
    assert claim.answer() == ("SW003", [])
    assert lab.rows("select distinct state, claimed_by from stepwell.tasks") == [("ready", None)]


FLUSHES: dict[str, Callable[[Held], Writing]] = {
    "move": lambda held: held.move(held.record(1), doing=(2,)),
    "park": lambda held: held.park(held.record(1), doing=(2,), delay=0.0),
    "finish": lambda held: held.finish(held.record(1)),
}


@pytest.mark.parametrize("then", FLUSHES)
def test_a_flush_that_comes_after_its_own_resend_writes_nothing(lab: Lab, then: str) -> None:
    """The connection was given up, and the resend overtakes what is still in its buffer."""
    lab.enqueue()
    old = lab.worker(db=lab.connection())
    held = old.take()
    writing = FLUSHES[then](held)
    with frozen(old.db):
        late = sent_flush(old, writing)
        assert old.on(lab.connection()).flush(writing) == [APPLIED]
        before = lab.snapshot()
    assert late.answer() == (None, [b"{%d}" % ALREADY])
    assert lab.snapshot() == before


@pytest.mark.parametrize("then", FLUSHES)
@pytest.mark.parametrize("taken", [False, True])
def test_a_flush_that_comes_after_its_worker_was_reclaimed_writes_nothing(
    lab: Lab, then: str, taken: bool
) -> None:
    lab.enqueue()
    dead, heir = lab.worker(db=lab.connection()), lab.worker()
    held = dead.take()
    with frozen(dead.db):
        late = sent_flush(dead, FLUSHES[then](held))
        assert lab.die(dead) == 1
        if taken:
            again = heir.take()
            heir.apply(again, again.move(again.record(1, value='"of the heir"'), doing=(2,)))
        before = lab.snapshot()
    assert late.answer() == (None, [b"{%d}" % FENCED])
    assert lab.snapshot() == before


@pytest.mark.parametrize("then", FLUSHES)
@pytest.mark.parametrize("applied", [False, True])
async def test_a_flush_of_one_is_sent_again_as_it_was_when_its_connection_is_lost(
    lab: Lab, then: str, applied: bool
) -> None:
    """Whether the database had it or not: the answer tells, and it never is *fenced*."""
    lab.enqueue()
    worker = lab.worker()
    writing = FLUSHES[then](worker.take())
    lost: list[bool] = []

    async def connecting() -> psycopg.AsyncConnection[Any]:
        connection: Any = await connect_async(lab.url, application_name="test")
        execute = connection.execute

        async def losing(*args: Any, **kwargs: Any) -> Any:
            if lost:
                return await execute(*args, **kwargs)
            if applied:
                await execute(*args, **kwargs)
            lost.append(True)
            await connection.close()
            raise psycopg.OperationalError("the connection was lost")

        connection.execute = losing
        return connection  # type: ignore[no-any-return]  # what was patched is still one

    committer = Committer(connecting, worker.id, max_rows=500, max_bytes=4_194_304)
    try:
        answer = committer.commit(writing)
        await committer.run_once()
        assert await answer == Receipt(Verdict.ALREADY if applied else Verdict.APPLIED)
    finally:
        await committer.close()
    assert lost == [True]
    assert lab.total("step", "completed") == 1


# -- two flushes with crossed parents ----------------------------------------------------------------


@pytest.mark.parametrize("rounds", range(4))
def test_two_flushes_of_steps_with_crossed_parents_both_come_through(lab: Lab, rounds: int) -> None:
    """Each has a step of either run, the steps of the one made before those of the other and the other way round."""
    worker = knowing(lab)
    runs = [joined(lab, worker, *branches(2)) for _ in range(2)]
    by_call = {(each.run, each.claim.path[1]): each for each in only("step:send", worker).claim(4)}
    mine, theirs = ([by_call[run.run, branch] for run in runs] for branch in (1, 2))
    if rounds % 2:
        mine.reverse()
    if rounds < 2:
        theirs.reverse()
    gate, one, other = lab.connection(autocommit=False), lab.connection(), lab.connection()
    gate.execute("select from stepwell.tasks where id = any(%s) for update", [[each.task for each in runs]])
    with (
        meanwhile(lambda: worker.on(one).flush(*(completed(each) for each in mine))) as first,
        meanwhile(lambda: worker.on(other).flush(*(completed(each) for each in theirs))) as second,
    ):
        for each in (one, other):
            lab.wait_for_lock(each)
        gate.commit()
    assert first.result() == second.result() == [APPLIED, APPLIED]
    assert [lab.task(run.task, "state, pending") for run in runs] == [("ready", 0)] * 2


@pytest.mark.parametrize("parent_first", [False, True])
def test_a_flush_of_a_run_and_one_of_its_step_that_both_know_each_other_come_through(
    lab: Lab, parent_first: bool
) -> None:
    """The one has run A and a step of run B, the other run B and a step of run A."""
    worker = knowing(lab)
    runs = [joined(lab, worker, *branches(1), awaits=["go"]) for _ in range(2)]
    steps = {each.run: each for each in only("step:send", worker).claim(2)}
    for run in runs:
        assert lab.one("select stepwell.signal(%s, 'go')", run.run)
    assert worker.apply_wakes() == 2
    again = {each.run: each for each in only("w", worker).claim(2)}
    a, b = (run.run for run in runs)
    mine = [again[a].move(again[a].record(7)), completed(steps[b])]
    theirs = [again[b].move(again[b].record(7)), completed(steps[a])]
    if not parent_first:
        mine.reverse()
        theirs.reverse()
    gate, one, other = lab.connection(autocommit=False), lab.connection(), lab.connection()
    gate.execute("select from stepwell.tasks where id = any(%s) for update", [[each.task for each in runs]])
    with (
        meanwhile(lambda: worker.on(one).flush(*mine)) as first,
        meanwhile(lambda: worker.on(other).flush(*theirs)) as second,
    ):
        for each in (one, other):
            lab.wait_for_lock(each)
        gate.commit()
    assert first.result() == second.result() == [APPLIED, APPLIED]
    assert lab.total("step", "completed") == 4


# -- a claim that was committed but not answered -----------------------------------------------------


@pytest_asyncio.fixture
async def engines(database_url: str) -> AsyncIterator[Engines]:
    async with Engines(database_url) as opened:
        await opened.execute("create table crm (id serial primary key, note text, tx bigint)")
        yield opened


def lose_an_answer(engine: Running) -> list[int]:
    """Let one claim be committed without its worker hearing of it; return the list that gets how many tasks it had."""
    lost: list[int] = []
    connection: Any = engine.engine._claimant._connection
    execute = connection.execute

    async def deaf(statement: Any, *args: Any, **kwargs: Any) -> Any:
        cursor = await execute(statement, *args, **kwargs)
        if statement == load("claim") and cursor.rowcount and not lost:
            lost.append(cursor.rowcount)
            await connection.close()
            raise psycopg.OperationalError("the answer was lost")
        return cursor

    connection.execute = deaf
    return lost


async def test_what_a_claim_took_whose_answer_was_lost_is_executed_once_and_by_the_same_worker(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    executed: Counter[int] = Counter()
    with collecting() as registry:

        @step
        async def work(n: int) -> None:
            executed[n] += 1

        @workflow
        async def working(n: int) -> None:
            await work(n)

    async with engines.engine(registry, concurrency=5) as engine:
        lost = lose_an_answer(engine)
        await engines.enqueue_many(working, [{"n": n} for n in range(20)])
        await engines.all_succeeded(20)
        assert engine.engine.vitals().claiming
    assert lost[0] > 0
    assert executed == dict.fromkeys(range(20), 1)
    assert await engines.execute("select count(*) from stepwell.outbox where outcome = 'interrupted'") == [
        (0,)
    ]


# -- a value that is refused among five hundred ------------------------------------------------------

MOST_FLUSHES = 19
"""Of 500, halved nine times: one whole, and two at each of nine levels at most."""


def not_json(held: Held) -> Writing:
    return held.move(held.record(1, value='{"a": }'))


def impossible(held: Held) -> Writing:
    return held.move(held.record(1, outcome="perhaps"))


def recorded_twice(held: Held) -> Writing:
    return held.move(held.record(1), held.record(1, value='"other"'))


@pytest.mark.parametrize("spoilt", [not_json, impossible, recorded_twice])
@pytest.mark.parametrize("place", [0, 317, 499])
async def test_one_value_that_is_refused_stops_none_of_the_499_others_and_is_found_by_halving(
    lab: Lab, spoilt: Callable[[Held], Writing], place: int
) -> None:
    lab.enqueue(500)
    worker = lab.worker()
    claimed = worker.claim(500)

    async def connecting() -> psycopg.AsyncConnection[Any]:
        return await connect_async(lab.url, application_name="test")

    committer = Committer(connecting, worker.id, max_rows=500, max_bytes=4_194_304)
    sent: list[int] = []
    send = committer._send

    async def counting(writings: list[Writing]) -> list[int]:
        sent.append(len(writings))
        return await send(writings)

    committer._send = counting  # type: ignore[method-assign]
    writings = [spoilt(held) if n == place else held.move(held.record(1)) for n, held in enumerate(claimed)]
    try:
        answers = [committer.commit(writing) for writing in writings]
        assert await committer.run_once() == 500
        receipts: list[Receipt] = await asyncio.gather(*answers)
    finally:
        await committer.close()
    refused = receipts.pop(place)
    assert refused.refused
    assert {each.verdict for each in receipts} == {Verdict.APPLIED}
    assert sent[0] == 500
    assert len(sent) <= MOST_FLUSHES
    assert lab.one("select count(*) from stepwell.outbox") == 499
    assert lab.history(claimed[place].run) == []


# -- an open transaction of a service ----------------------------------------------------------------


async def test_what_a_service_leaves_open_holds_up_no_worker_and_takes_place_when_it_commits(
    engines: Engines,
) -> None:
    """It has signalled, cancelled and enqueued, and thinks. Every run but the one it made ends meanwhile."""
    gate = Gate()
    with collecting() as registry:

        @step
        async def work() -> None:
            await gate.passed()

        @workflow
        async def working() -> str:
            await work()
            await work()
            return "worked"

        @workflow
        async def waiting(name: str) -> str:
            return await wait_signal(name, type=str)

    async with engines.engine(registry), Engines(engines.url) as service:
        executing = [await engines.enqueue(working) for _ in range(20)]
        signalled = await engines.enqueue(waiting, {"name": "sooner"})
        told = await engines.enqueue(waiting, {"name": "later"})
        await gate.reached(20)
        await engines.waits(signalled)
        await engines.waits(told)

        await service.execute("begin")
        for run in executing[:10]:
            await service.cancel(run)
        for run in (signalled, told):
            await service.execute("select stepwell.signal(%s, 'later', '\"said\"')", [run])
        made = await service.enqueue(working, key="k")

        gate.open()
        for run in executing:
            assert await engines.succeeded(run) == "worked"
        await engines.execute("select stepwell.signal(%s, 'sooner', '\"said sooner\"')", [signalled])
        assert await engines.succeeded(signalled) == "said sooner"
        assert await engines.succeeded(await engines.enqueue(working)) == "worked"
        assert await engines.status(told) == "waiting"

        await service.execute("commit")
        assert await engines.succeeded(told) == "said"
        assert await engines.succeeded(made) == "worked"
        await until(nothing_left(engines), what="the wakes to be applied")
    assert await engines.states() == {"succeeded": 24}


def nothing_left(engines: Engines) -> Callable[[], Awaitable[bool]]:
    async def is_done() -> bool:
        return await engines.execute("select count(*) from stepwell.tasks") == [(0,)]

    return is_done


# -- transactional steps at stricter levels ----------------------------------------------------------

LEVELS = ["repeatable read", "serializable"]
SYNC_AND_ASYNC = ["psycopg.Connection", "sqlalchemy.AsyncSession"]


async def set_level(engines: Engines, level: str) -> None:
    name = conninfo_to_dict(engines.url)["dbname"]
    await engines.execute(f"alter database {name} set default_transaction_isolation = '{level}'")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_stale_transaction_with_an_old_snapshot_commits_nothing(
    engines: Engines, kind: str, level: str
) -> None:
    """Its snapshot still shows the claim that was taken away meanwhile: the fence must not go by that."""
    await set_level(engines, level)
    gate = Gate()

    def wait_the_first_time(given: Any, run: Any) -> Any:
        if business.executions > 1:
            return None
        return gate.passed() if "Async" in kind else gate.passed_in_thread()

    business = Business(kind, wait_the_first_time)
    fenced = counted("stepwell_fenced_writes_total")
    stale = engines.start(business.registry, concurrency=1)  # it takes nothing else
    try:
        run = await engines.enqueue(business.flow)
        await gate.reached()
        await engines.execute("update stepwell.tasks set state = 'ready', claimed_by = null")
        async with engines.engine(business.registry):
            assert await engines.succeeded(run) == "saved x and went on"
            before = await engines.execute("select seq, outcome from stepwell.outbox order by seq")
            gate.open()
            await stale.drain()
    finally:
        gate.open()
        await stale.destroy()
    assert await notes(engines) == ["x"]
    assert await engines.execute("select seq, outcome from stepwell.outbox order by seq") == before
    assert counted("stepwell_fenced_writes_total") == fenced + 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_runs_that_contend_for_one_row_add_up_at_a_stricter_level(
    engines: Engines, kind: str, level: str
) -> None:
    """Each conflict repeats the execution, nothing is added twice and nothing is lost; all of Stepwell runs at that level."""
    await set_level(engines, level)
    await engines.execute("create table stock (n int)")
    await engines.execute("insert into stock values (0)")

    def adding(given: Any, run: Any) -> Any:
        return run("update stock set n = n + 1")

    async def adding_async(given: Any, run: Any) -> None:
        await run("update stock set n = n + 1")

    business = Business(kind, adding_async if "Async" in kind else lambda g, r: (adding(g, r), None)[1])
    async with engines.engine(business.registry, connections=4, concurrency=4):
        await engines.enqueue_many(business.flow, [{"note": str(n)} for n in range(24)])
        await engines.all_succeeded(24)
    assert await engines.execute("select n from stock") == [(24,)]
    assert sorted(await notes(engines)) == sorted(str(n) for n in range(24))
    assert await engines.totals("step") == {"completed": 48}


# -- a COMMIT without an answer, and a question without one ------------------------------------------


def lose_the_answer_to_a_probe(engine: Running) -> list[bool]:
    """Let the first flush without a record be applied without its worker hearing of it; the list tells of it."""
    lost: list[bool] = []
    committer = engine.engine._committer
    connect_it = committer._connect

    async def connecting() -> Any:
        connection: Any = await connect_it()
        execute = connection.execute

        async def deaf(statement: Any, parameters: Any = None, **kwargs: Any) -> Any:
            cursor = await execute(statement, parameters, **kwargs)
            if statement == load("flush") and not lost and parameters[2] == "[]":
                lost.append(True)
                await connection.close()
                raise psycopg.OperationalError("the answer was lost")
            return cursor

        connection.execute = deaf
        return connection

    committer._connect = connecting
    return lost


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_step_that_was_rolled_back_at_commit_is_repeated_although_the_question_was_resent(
    engines: Engines, kind: str
) -> None:
    """*Already* says then that the question was applied before, and not that the step was committed."""
    await engines.execute("create sequence commits")
    await engines.execute(
        "create function die() returns trigger language plpgsql as $$ begin"
        " if nextval('commits') = 1 then perform pg_terminate_backend(pg_backend_pid()); end if; return null; end $$"
    )
    await engines.execute(
        "create constraint trigger dying after insert on crm deferrable initially deferred"
        " for each row execute function die()"
    )
    business = Business(kind)
    async with engines.engine(business.registry) as engine:
        lost = lose_the_answer_to_a_probe(engine)
        run = await engines.enqueue(business.flow)
        assert await engines.succeeded(run) == "saved x and went on"
    assert lost == [True]
    assert business.executions == 2
    assert await notes(engines) == ["x"]


# -- what a replay sees ------------------------------------------------------------------------------


async def test_branches_that_append_to_one_list_replay_as_they_ran(engines: Engines) -> None:
    """The second ends first. Ordered by their paths, what a replay sees is not what happened."""
    gates = {"a": Gate(), "b": Gate()}
    lists: list[list[str]] = []
    with collecting() as registry:

        @step
        async def work(name: str) -> str:
            await gates[name].passed()
            return name

        @step
        async def keep(said: list[str]) -> None:
            lists.append(said)

        @workflow
        async def appending() -> list[str]:
            said: list[str] = []

            async def branch(name: str) -> None:
                said.append(await work(name))

            await gather(branch("a"), branch("b"))
            await keep(said)
            await sleep(0.01)
            await keep(said)
            return said

    async with engines.engine(registry):
        run = await engines.enqueue(appending)
        for gate in gates.values():
            await gate.reached()
        gates["b"].open()
        await until(first_record(engines, run), what="the end of the second branch")
        gates["a"].open()
        assert await engines.succeeded(run) == ["b", "a"]
    assert lists == [["b", "a"]] * 2


def first_record(engines: Engines, run: Any) -> Callable[[], Awaitable[bool]]:
    async def is_there() -> bool:
        return bool(await engines.history(run))

    return is_there


async def test_a_body_sees_at_once_what_a_replay_would_see(engines: Engines) -> None:
    """Not what the step has returned, which it may still change, but what is recorded of it."""
    kept: list[Any] = []
    told: list[list[Any]] = []
    with collecting() as registry:

        @step
        async def give() -> Any:
            kept.append({"pair": ("a", "b"), "more": ["c"]})
            return kept[-1]

        @step
        async def spoil() -> None:
            kept[-1]["more"].append("changed by a step")

        @step
        async def tell(seen: list[Any]) -> None:
            told.append(seen)

        @workflow
        async def giving() -> list[Any]:
            value = await give()
            await spoil()
            seen = [type(value["pair"]).__name__, value["more"]]
            await tell(seen)
            await sleep(0.01)
            return seen

    async with engines.engine(registry):
        run = await engines.enqueue(giving)
        assert await engines.succeeded(run) == ["list", ["c"]]
    assert told == [["list", ["c"]]]


# -- the clock that decides --------------------------------------------------------------------------


def test_what_is_due_is_decided_by_stored_times_alone_and_what_is_ready_by_none(lab: Lab) -> None:
    """A clock that was put back leaves times in the future: of all that is there only timers wait for them."""
    ready, parked = lab.enqueue(2)
    worker = lab.worker()
    both = {held.run: held for held in worker.claim(2)}
    worker.apply(both[ready], both[ready].release())
    worker.apply(both[parked], both[parked].park(delay=3600.0))
    for table, column in (
        ("runs", "created_at"),
        ("tasks", "started_at"),
        ("workers", "started_at"),
        ("doorbell", "until"),
    ):
        lab.db.execute(f"update stepwell.{table} set {column} = now() + interval '1 day'".encode())
    again = worker.take()
    assert again.run == ready
    worker.apply(again, again.finish(again.record(1)))
    assert lab.state(ready) == "succeeded"
    assert lab.promote() == 0
    lab.db.execute("update stepwell.tasks set due_at = due_at - interval '1 day'")
    assert lab.promote() == 1
    assert worker.take().run == parked


# -- the database goes away for longer than any detector waits ---------------------------------------

OUTAGE_SECONDS = 1.5 * QUICK["lease_seconds"]


async def test_an_outage_longer_than_the_lease_reclaims_nobody(cluster: Cluster, database_url: str) -> None:
    """When they come back, every beat is older than the lease, and every lock is lost."""
    async with (
        supervising(database_url) as one,
        supervising(database_url) as two,
        supervising(database_url) as three,
    ):
        all_three = (one, two, three)
        await wait_until_async(lambda: all(it.pids for it in all_three), 60, what="three workers")
        before = {worker_id for it in all_three for worker_id in it.worker_ids}
        await asyncio.to_thread(cluster.stop, "immediate")
        down = time.monotonic()
        await wait_until_async(lambda: time.monotonic() - down >= OUTAGE_SECONDS, 10, what="the outage")
        await asyncio.to_thread(cluster.start)
        with connect(direct(database_url), application_name="test") as db:
            beats = "select id, beat from stepwell.workers"
            came_back: dict[int, int] = dict(db.execute(beats).fetchall())
            assert came_back.keys() == before
            enough = 1.5 * QUICK["lease_seconds"] / QUICK["beat_seconds"]

            def beaten() -> bool:
                now: dict[int, int] = dict(db.execute(beats).fetchall())
                return all(now.get(id_, beat + enough) >= beat + enough for id_, beat in came_back.items())

            await wait_until_async(beaten, 60, what="any detector to have had its time")
        assert [it.reclaims for it in all_three] == [[], [], []]
        assert {worker_id for it in all_three for worker_id in it.worker_ids} == before
