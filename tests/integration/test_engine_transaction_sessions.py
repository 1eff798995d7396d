"""What a transactional step does to its session stays with that step, and cannot loosen what Stepwell promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from psycopg.rows import dict_row

from outbox.database import connect
from tests.engines import Lab
from tests.postgres import Cluster
from tests.transactional import KINDS, SYNC_AND_ASYNC, Business, notes
from tests.waiting import wait_until_async
from worker import current_step, transaction, workflow
from worker.definitions import collecting
from worker.supervision.liveness import end_backends

pytestmark = pytest.mark.direct("a session is used again; test_pooler.py does the same to those of a pooler")

SPOILING = (
    "set application_name = 'a service'",
    "set search_path = pg_temp",
    "set timezone = 'Asia/Tokyo'",
    "set statement_timeout = '1min'",
    "set synchronous_commit = off",
    "set default_transaction_isolation = 'serializable'",
    "set client_connection_check_interval = 0",
    "set app.tenant = 'somebody'",
    "set default_transaction_read_only = on",
    "create temp table crm (note text)",
    "select pg_advisory_lock(42)",
    "listen spoilt",
    "declare spoilt cursor with hold for select 1",
)
LOOKING = """
select (select json_object_agg(name, setting order by name) from pg_settings
        where name in ('application_name', 'search_path', 'TimeZone', 'statement_timeout', 'synchronous_commit',
                       'default_transaction_isolation', 'client_connection_check_interval',
                       'default_transaction_read_only'))::text
    || coalesce(current_setting('app.tenant', true), '') || current_user
    || coalesce(to_regclass('pg_temp.crm')::text, '')
    || (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid())
    || (select count(*) from pg_listening_channels()) || (select count(*) from pg_cursors where name = 'spoilt')
"""


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        await opened.execute("create table crm (id serial primary key, note text, tx bigint)")
        yield opened


class Visitor:
    """What the step does: as many things as there are in `todo`, else it looks at its session."""

    def __init__(self, kind: str) -> None:
        self.todo: tuple[str, ...] = ()
        self.backends: list[int] = []
        then = self._visit_async if "Async" in kind else self._visit
        self.business = Business(kind, then)

    def _visit(self, _: Any, run: Any) -> str | None:
        self.backends.append(_value(run("select pg_backend_pid()")))
        for each in self.todo:
            run(each)
        return None if self.todo else str(_value(run(LOOKING)))

    async def _visit_async(self, _: Any, run: Any) -> str | None:
        self.backends.append(await _value_async(await run("select pg_backend_pid()")))
        for each in self.todo:
            await run(each)
        return None if self.todo else str(await _value_async(await run(LOOKING)))


def _value(result: Any) -> Any:
    return result.fetchone()[0]


async def _value_async(result: Any) -> Any:
    row = result.fetchone()
    return (await row if asyncio.iscoroutine(row) else row)[0]


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_a_step_does_to_its_session_the_next_one_finds_it_as_it_was(
    lab: Lab, kind: str
) -> None:
    visitor = Visitor(kind)
    async with lab.engine(visitor.business.registry, connections=1):
        before = await lab.succeeded(await lab.enqueue(visitor.business.flow, {"follow": "nothing"}))
        visitor.todo = SPOILING
        await lab.succeeded(await lab.enqueue(visitor.business.flow, {"note": "spoilt", "follow": "nothing"}))
        visitor.todo = ()
        after = await lab.succeeded(
            await lab.enqueue(visitor.business.flow, {"note": "innocent", "follow": "nothing"})
        )
    assert after == before
    assert len(set(visitor.backends)) == 1, "it was the same session"
    assert (await notes(lab))[-1] == "innocent"


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["psycopg.Connection", "psycopg.AsyncConnection"])
async def test_how_a_step_has_its_rows_made_does_not_matter_and_the_next_one_has_them_as_always(
    lab: Lab, kind: str, fails: bool
) -> None:
    seen: list[Any] = []

    def then(given: Any, _: Any) -> None:
        seen.append((given.row_factory, given.cursor_factory))
        given.row_factory = dict_row
        given.cursor_factory = psycopg.AsyncClientCursor if "Async" in kind else psycopg.ClientCursor
        if fails and len(seen) == 1:
            raise RuntimeError("afterwards")

    business = Business(kind, then)
    async with lab.engine(business.registry, connections=1):
        run = await lab.enqueue(business.flow, {"note": "one", "follow": "nothing"})
        assert (await lab.ended(run)).state == ("failed" if fails else "succeeded")
        await lab.succeeded(await lab.enqueue(business.flow, {"note": "two", "follow": "nothing"}))
    assert business.executions == 2
    assert seen[0] == seen[1]
    assert await notes(lab) == (["two"] if fails else ["one", "two"])


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
@pytest.mark.parametrize("setting", ["set role", "set local role"])
async def test_a_step_may_act_as_another_role(lab: Lab, kind: str, setting: str) -> None:
    await lab.execute("drop role if exists somebody_else")
    await lab.execute("create role somebody_else")
    visitor = Visitor(kind)
    visitor.todo = (f"{setting} somebody_else", "select current_user")
    try:
        async with lab.engine(visitor.business.registry):
            assert await lab.succeeded(await lab.enqueue(visitor.business.flow)) == "saved x and went on"
    finally:
        await lab.execute("drop role somebody_else")


@pytest.mark.parametrize("kind", SYNC_AND_ASYNC)
async def test_a_step_cannot_have_its_completion_lost_by_a_commit_that_is_not_durable(
    lab: Lab, cluster: Cluster, kind: str
) -> None:
    """The next step has begun, so the one before is recorded for good, also if the server crashes now (I7)."""
    await lab.execute("alter system set wal_writer_delay = '10s'")
    await lab.execute("select pg_reload_conf()")
    visitor = Visitor(kind)
    visitor.todo = ("set local synchronous_commit = off",)
    try:
        async with lab.engine(visitor.business.registry):
            run = await lab.enqueue(visitor.business.flow)
            await wait_until_async(lambda: visitor.business.went_on)
            await asyncio.to_thread(cluster.restart, "immediate")
            assert await lab.succeeded(run) == "saved x and went on"
        assert visitor.business.executions == 1
        assert await notes(lab) == ["x"]
    finally:
        await lab.execute("alter system reset wal_writer_delay")
        await lab.execute("select pg_reload_conf()")


@pytest.mark.parametrize("loose", ["off", "local"])
def test_connections_commit_durably_whatever_the_database_has_for_its_default(
    database_url: str, loose: str
) -> None:
    with connect(database_url, application_name="test") as db:
        db.execute(
            f"do $$ begin execute format('alter database %I set synchronous_commit = {loose}', current_database()); end $$"
        )
    with connect(database_url, application_name="test") as db:
        assert db.execute("show synchronous_commit").fetchone() == ("on",)


async def test_a_step_that_renames_its_session_is_still_found_by_those_who_have_to_end_it(lab: Lab) -> None:
    """Where its process is frozen in it, the heir would wait for its locks as long as that lasts."""
    entered, left = asyncio.Event(), asyncio.Event()
    with collecting() as registry:

        @transaction
        async def rename(connection: psycopg.AsyncConnection[Any]) -> int:
            await connection.execute("set local application_name = 'my service'")
            if current_step().execution == 1:
                entered.set()
                await left.wait()
                await connection.execute("select 1")
            return current_step().execution

        @workflow
        async def renaming() -> int:
            return await rename()

    async with lab.engine(registry) as engine:
        run = await lab.enqueue(renaming)
        await entered.wait()
        async with await psycopg.AsyncConnection.connect(lab.url, autocommit=True) as observer:
            idle = "select count(*) from pg_stat_activity where application_name = 'my service'"
            assert await lab.execute(idle) == [(1,)]
            await end_backends(observer, engine.id)
            await wait_until_async(lambda: _is_gone(lab, idle))
        left.set()
        assert await lab.succeeded(run) == 1, "repeated, as after any lost connection"


async def _is_gone(lab: Lab, counting: str) -> bool:
    return await lab.execute(counting) == [(0,)]
