"""What a statement reads: with a backlog of 200,000 tasks and whatever the planner believes, a few rows per task.

Not the plans are compared but what they do: the rows that each table and index gave away within the transaction.
A sequential scan, a sort of the backlog, a join the wrong way round or a walk along an index for a filter all read
thousands of rows where a hundred are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from outbox import queries
from tests.postgres import Cluster
from tests.protocol import ALREADY, APPLIED, FENCED, Lab, Worker, child_at, step_at, timer_at
from worker.engine.transitions import Dropped, Extra, TaskRow
from worker.queries import load

BACKLOG = 200_000
BATCH = 100
PER_TASK = 20
"""Rows read for each task of a batch, over all tables and indexes; an unlucky plan reads thousands."""

FILL = f"""
insert into stepwell.runs (id, workflow, input)
select md5(i::text)::uuid, 'w', '{{}}' from generate_series(1, {BACKLOG + 58_010}) i;

insert into stepwell.tasks (run_id, name, state, due_at, claimed_by, fresh, interruptions)
select md5(i::text)::uuid,
       case when state = 'shelved' then 'stranger' else 'w' end, state,
       case when state = 'waiting' then clock_timestamp() + interval '1 day' end,
       case when state = 'claimed' then 1 end, state = 'ready', case when state = 'suspect' then 2 else 0 end
from (select i, case when i <= {BACKLOG} then 'ready' when i <= {BACKLOG + 50_000} then 'waiting'
                     when i <= {BACKLOG + 54_000} then 'claimed' when i <= {BACKLOG + 58_000} then 'shelved'
                     else 'suspect' end as state
      from generate_series(1, {BACKLOG + 58_010}) i) s;

insert into stepwell.outbox (run_id, epoch, path, n, seq, kind, name, outcome)
select md5(i::text)::uuid, 0, '{{1}}', 0, 1, 'step', 'send', 'completed' from generate_series(1, 100000) i;

insert into stepwell.signals (run_id, name, payload)
select md5(i::text)::uuid, 'late', '1' from generate_series({BACKLOG}, {BACKLOG + 50_000}) i;
"""

GROWING = "array['stepwell.tasks', 'stepwell.runs', 'stepwell.outbox', 'stepwell.signals']::regclass[]"
FORGET = f"set allow_system_table_mods = on; delete from pg_statistic where starelid = any ({GROWING})"


def believe(tuples: int, pages: str, tables: str) -> str:
    return f"""
    set allow_system_table_mods = on;
    update pg_class set reltuples = {tuples}, relpages = {pages}
    where oid = any ({tables}) or oid in (select indexrelid from pg_index where indrelid = any ({tables}))
    """


ANALYZE = "analyze stepwell.tasks, stepwell.runs, stepwell.outbox, stepwell.signals"
BELIEFS = {
    "what the installation left": [believe(-1, "0", GROWING)],
    "nothing": [FORGET, believe(-1, "0", GROWING)],
    # A queue that was worked off, and was vacuumed then, before the next burst: its file still has its pages.
    "that nothing is left": [believe(0, "pg_relation_size(oid) / 8192", GROWING)],
    "that one is left": [ANALYZE, believe(1, "pg_relation_size(oid) / 8192", GROWING)],
    "that a few are left": [ANALYZE, believe(5, "pg_relation_size(oid) / 8192", GROWING)],
    "what is": [ANALYZE],
}


@pytest.fixture(scope="module")
def backlog_url(cluster: Cluster) -> Iterator[str]:
    """A database with a backlog that was never analysed; its tests roll back what they do."""
    with cluster.database() as url:
        with Lab(url) as lab:
            for table in ("tasks", "runs", "outbox", "signals"):
                lab.db.execute(f"alter table stepwell.{table} set (autovacuum_enabled = off)".encode())
            lab.db.execute("set statement_timeout = 0")
            lab.db.execute(FILL.encode())
        yield url


@pytest.fixture(params=BELIEFS)
def reading(backlog_url: str, request: pytest.FixtureRequest) -> Iterator[Reading]:
    with believing(backlog_url, request.param) as opened:
        yield opened


@contextmanager
def believing(backlog_url: str, belief: str) -> Iterator[Reading]:
    """Have the planner believe something of the tables that grow; what is done meanwhile is rolled back."""
    lab = Lab(backlog_url, emptied=False)
    lab.db.execute(
        "vacuum (index_cleanup on) stepwell.tasks, stepwell.signals"
    )  # what the tests before have rolled back
    with lab, lab.db.transaction(force_rollback=True):
        for statement in {**BELIEFS, **MORE_BELIEFS}[belief]:
            lab.db.execute(statement.encode())
        yield Reading(lab)


class Reading:
    """Measures, within one transaction, what was read of the four tables that grow."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.worker: Worker = lab.worker()
        self._before = self._read()

    def within(self, rows: int, what: str) -> None:
        """Fail unless at most so many rows were read since the last call, none of them by a sequential scan."""
        read = self._since()
        assert not [name for name in read if name.startswith("sequential")], f"{what}: {read}"
        assert sum(read.values()) <= rows, f"{what}: {read}"

    def more_than(self, rows: int, what: str) -> None:
        """Fail unless more rows than that were read since the last call."""
        read = self._since()
        assert sum(read.values()) > rows, f"{what}: {read}"

    def _since(self) -> dict[str, int]:
        after = self._read()
        read = {name: after[name] - self._before[name] for name in after if after[name] != self._before[name]}
        self._before = self._read()
        return read

    def _read(self) -> dict[str, int]:
        return dict(
            self.lab.rows(
                """
                select 'index ' || s.indexrelname, pg_stat_get_xact_tuples_returned(s.indexrelid)
                from pg_stat_user_indexes s where s.schemaname = 'stepwell' and s.relname in ('tasks', 'runs', 'outbox', 'signals')
                union all
                select 'sequential ' || s.relname, pg_stat_get_xact_numscans(s.relid) from pg_stat_user_tables s
                where s.schemaname = 'stepwell' and s.relname in ('tasks', 'runs', 'outbox', 'signals')
                """
            )
        )


def test_a_statement_reads_what_it_needs(reading: Reading) -> None:
    lab, worker = reading.lab, reading.worker

    held = worker.claim(BATCH)
    assert len(held) == BATCH
    reading.within(PER_TASK * BATCH, "claim")

    quarter = BATCH // 4
    moved, parked, released, ended = (held[start : start + quarter] for start in range(0, BATCH, quarter))
    writings = [each.move(each.record(2), doing=(3,)) for each in moved]
    writings += [each.park(each.record(2), delay=0.0) for each in parked]
    writings += [each.release() for each in released]
    writings += [each.finish(each.record(2)) for each in ended]
    assert worker.flush(*writings) == [APPLIED] * BATCH
    reading.within(PER_TASK * BATCH, "flush")

    assert worker.flush(*writings) == [ALREADY] * BATCH
    reading.within(PER_TASK * BATCH, "a resent flush")

    for each in released:
        each.attempt += 1
    stale = [each.finish(each.record(9)) for each in released]
    assert worker.flush(*stale) == [FENCED] * quarter
    reading.within(PER_TASK * quarter, "a stale flush")

    assert lab.promote() == quarter
    reading.within(PER_TASK * quarter, "promote")
    assert lab.promote() == 0
    reading.within(PER_TASK + BATCH, "promote with nothing due")

    runs = [each.run for each in parked + released]
    for run in runs:
        assert lab.cancel(run)
    assert worker.apply_wakes() == len(runs)
    reading.within(4 * PER_TASK * len(runs), "cancel")

    (suspect,) = worker.claim(alone=True)
    worker.apply(suspect, suspect.finish(state="failed"))
    assert lab.retry(suspect.run) == 1
    reading.within(PER_TASK + BATCH, "a suspect, and retry")

    assert lab.die(worker) == quarter
    reading.within(PER_TASK * quarter, "reclaim")


def family() -> list[Extra]:
    """Return calls of every kind."""
    return [
        TaskRow(kind="window", path=(1,), name="window", released=1),
        step_at(1, 1, 1, windowed=True),
        step_at(1, 2, 1, windowed=True, held=True),
        step_at(2),
        timer_at(3),
        child_at(4, counted=True),
        child_at(5),
    ]


def test_calls_side_by_side_read_what_they_need(reading: Reading) -> None:
    lab = reading.lab
    worker = lab.worker("w", "step:send", "child")
    half, quarter = BATCH // 2, BATCH // 4
    parents = worker.claim(half)
    reading.within(PER_TASK * BATCH, "claim")

    spreading = [each.park(extras=family()) for each in parents]
    assert worker.flush(*spreading) == [APPLIED] * half
    reading.within(PER_TASK * half * len(family()), "spread")
    assert worker.flush(*spreading) == [ALREADY] * half
    reading.within(PER_TASK * half, "a resent spread")

    claimed = worker.claim(4 * half)
    steps = [each for each in claimed if each.claim.kind == "step"]
    children = [each for each in claimed if each.claim.kind == "run"]
    assert (len(steps), len(children)) == (2 * half, 2 * half)
    reading.within(PER_TASK * 4 * half, "a claim of calls")
    parked, released, done = steps[:quarter], steps[quarter:half], steps[half:]
    writings = [
        each.park(each.record(*each.claim.path, n=1, outcome="failed"), delay=60.0) for each in parked
    ]
    writings += [each.release() for each in released]
    writings += [each.done(each.record(*each.claim.path)) for each in done]
    assert worker.flush(*writings) == [APPLIED] * 2 * half
    reading.within(3 * PER_TASK * half, "a flush of steps")  # each concerns two tasks
    assert [code % 4 for code in worker.flush(*writings[:quarter], *writings[half:])] == [ALREADY] * (
        quarter + half
    )
    reading.within(PER_TASK * 2 * half, "a resent flush of steps")

    assert lab.promote() == half
    timers = worker.claim(0)
    assert worker.flush(*(each.done(each.record(3)) for each in timers)) == [APPLIED] * half
    reading.within(3 * PER_TASK * half, "timers")

    ends = [each.finish(state="failed", family=True) for each in children]
    assert worker.flush(*ends) == [APPLIED] * 2 * half
    reading.within(PER_TASK * 2 * half, "ends of children")
    assert worker.apply_wakes() == 2 * half
    reading.within(4 * PER_TASK * half, "results of children")

    for each in parents[:quarter]:
        assert lab.one("select stepwell.signal(%s, 'go')", each.run)
    assert worker.apply_wakes() == quarter
    reading.within(4 * PER_TASK * quarter, "signals")

    again = [each for each in worker.claim(BATCH) if each.run in {parent.run for parent in parents}]
    runs = [each for each in again if each.claim.kind == "run"]
    reading.within(PER_TASK * BATCH, "a claim of runs that are woken")
    assert len(runs) > quarter
    ending, going_on = runs[:quarter], runs[quarter:]
    writings = [each.finish(each.record(9), family=True) for each in ending]
    writings += [each.move(extras=[Dropped(path=(1,)), Dropped(path=(4,))], doing=(6,)) for each in going_on]
    assert worker.flush(*writings) == [APPLIED] * len(runs)
    reading.within(4 * PER_TASK * len(runs), "ends of parents, and calls that are dropped")


def test_the_next_of_a_window_is_found_without_reading_the_others(reading: Reading) -> None:
    lab, items = reading.lab, 2_000
    worker = lab.worker("w", "step:send")
    held = worker.take()
    window = TaskRow(kind="window", path=(1,), name="window", released=1)
    rows = [step_at(1, k, 1, windowed=True, held=k > 1) for k in range(1, items + 1)]
    assert worker.flush(held.park(extras=[window, *rows])) == [APPLIED]
    reading.within(PER_TASK * items, "a large spread")
    for n in range(3):
        step = worker.take()
        assert step.claim.path == [1, n + 1, 1]
        worker.apply(step, step.done(step.record(*step.claim.path)))
        reading.within(5 * PER_TASK, "a completion")


def test_what_is_done_beside_the_work_reads_what_it_needs(reading: Reading) -> None:
    lab = reading.lab
    assert lab.one("select stepwell.shelve_v1('default', %s)", BATCH) == 0
    reading.within(PER_TASK * BATCH, "shelve that finds nothing")

    assert lab.one("select stepwell.unshelve_v1(array['default'], array['stranger'], %s)", BATCH) == BATCH
    reading.within(PER_TASK * BATCH, "unshelve")
    assert lab.one("select stepwell.shelve_v1('default', %s)", BATCH) == BATCH
    reading.within(PER_TASK * BATCH, "shelve")

    lab.enqueue(BATCH)
    lab.enqueue(BATCH, key="k")
    reading.within(PER_TASK * BATCH, "enqueue")

    (held,) = reading.worker.claim(1)
    reading.within(PER_TASK + 2 * BATCH, "a claim of one")
    assert lab.one("select stepwell.signal(%s, 'go')", held.run)
    given = {"run": held.run, "worker": reading.worker.id}
    for name, parameters in STATEMENTS.items():
        rows = lab.db.execute(load(name), parameters(**given)).fetchall()
        assert bool(rows) == (name not in NOTHING_RECORDED), name
        reading.within(PER_TASK, name)
    assert lab.state(held.run) == "running"
    reading.within(PER_TASK, "run_status")


STATEMENTS: dict[str, Callable[..., Any]] = {
    "audit": lambda run, worker: (worker,),
    "history": lambda run, worker: ([run],),
    "history_since": lambda run, worker: (run, 1),
    "step_history": lambda run, worker: {"run": run, "path": [1, 2, 1], "base": 0, "epoch": 2},
    "mail": lambda run, worker: {"runs": [run], "max_bytes": 1_048_576},
    "suspects": lambda run, worker: (["default"], ["w"]),
}
NOTHING_RECORDED = ("history_since", "step_history")


# -- what the guards are for, and what the statistics are for ------------------------------------------
#
# The claimants' functions read the same whatever there is for statistics, none at all included, as the tests above show:
# their planner settings are pinned, and for them the representative rows that an installation analyses change nothing.
# Those are for the statements that pin nothing: what people ask.

MORE_BELIEFS = {
    # Nothing has vacuumed the tables yet: a few thousand rows were seen, with everything that is known of them.
    "what the installation left, just now": [believe(3000, "100", GROWING)],
}
MISLEADING = [
    "what the installation left, just now",
    "that nothing is left",
    "that one is left",
    "that a few are left",
]
UNGUARDED = """
do $$ begin
    execute format('alter function %s reset all', 'stepwell.claim_v1'::regproc::oid::regprocedure);
    execute format('alter function %s set search_path = pg_catalog, stepwell, pg_temp',
                   'stepwell.claim_v1'::regproc::oid::regprocedure);
end $$
"""


@pytest.mark.parametrize("belief", MISLEADING)
def test_without_its_guards_a_claim_reads_the_whole_backlog(backlog_url: str, belief: str) -> None:
    with believing(backlog_url, belief) as reading:
        assert len(reading.worker.claim(BATCH)) == BATCH
        reading.within(PER_TASK * BATCH, "claim")
    with believing(backlog_url, belief) as reading:
        reading.lab.db.execute(UNGUARDED.encode())
        assert len(reading.worker.claim(BATCH)) == BATCH
        reading.more_than(BACKLOG // 2, "claim")


PAGE = 50
PENDING = {"status": "pending", "workflow": None, "before": None, "limit": PAGE}


def test_on_tables_that_were_never_analysed_a_list_reads_a_page_thanks_to_what_the_installation_left(
    backlog_url: str,
) -> None:
    asked = queries.load("list_runs")
    with believing(backlog_url, "what the installation left") as reading:
        assert len(reading.lab.db.execute(asked, PENDING).fetchall()) == PAGE
        reading.within(PER_TASK * PAGE, "pending runs")
    with believing(backlog_url, "nothing") as reading:
        assert len(reading.lab.db.execute(asked, PENDING).fetchall()) == PAGE
        with pytest.raises(AssertionError, match="sequential tasks"):
            reading.within(BACKLOG, "pending runs")


def test_a_measurement_sees_a_bad_plan(reading: Reading) -> None:
    lab = reading.lab
    lab.one("select count(*) from stepwell.tasks where name = 'nobody'")
    with pytest.raises(AssertionError, match="sequential"):
        reading.within(BACKLOG, "a scan")
    lab.db.execute("set enable_seqscan = off; set enable_bitmapscan = off")
    lab.one(
        "select count(*) from stepwell.tasks where queue = 'default' and state = 'ready' and name = 'nobody'"
    )
    with pytest.raises(AssertionError, match="index"):
        reading.within(PER_TASK * BATCH, "a walk along the index")
