"""Compares what steps have said to the ledger with what the database says, and judges.

Three witnesses that know nothing of each other: the ledger (see `tests.crash.ledger`), the tables of Stepwell, and a
business table that transactional steps write to. A fourth, a trigger on the outbox, asks at each insert whether the
writer holds a claim on that run, whatever the statement that inserts has tested.

Was a finished step repeated? The time at which its record was committed is `pg_xact_commit_timestamp` of the row, by the
wall clock of the machine that also stamps the facts. An execution that began later than that ran after the end. One of
two things it then was: a claim that was older than the one that finished (a worker that was frozen, and began when it
woke up), which nobody can prevent and which is counted as *stale*; or one that Stepwell has granted after the end, which
is what must never happen. The fence tells: it grows with every claim and every transition, and the execution that finished
had the highest of all that had begun before the end. What has a lower one is an older claim's.

What `check` wants of the workflows: each step reports ``start`` first and ``effect`` when it has taken effect, under its
own name; a transactional step says so, and inserts one row into `witness.booked` with its run, path and fence.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any
from uuid import UUID

import psycopg

from tests.crash.ledger import Fact

Call = tuple[str, str]
"""A run and a path, as text."""
Plan = Callable[[dict[str, Any]], Sequence[str]]
"""Which steps a succeeded run of a workflow has completed, by its input: their names, each as often as it comes."""

CLOCK_SECONDS = 0.000_01
"""By how much two readings of one clock may differ that were rounded."""
COMPLAINTS_MAX = 40

INSTRUMENTS = """
    create schema if not exists witness;
    create table if not exists witness.booked (run uuid, path text, step text, fence bigint, pid int);
    create table if not exists witness.unclaimed (run uuid, path int[], n int, worker bigint, at timestamptz default clock_timestamp());
    create or replace function witness.ask() returns trigger language plpgsql security definer as $$
    begin
        if not exists (select from stepwell.tasks t where t.run_id = new.run_id and t.claimed_by = new.worker
                       and (t.path = new.path or t.path = '{}')) then
            insert into witness.unclaimed (run, path, n, worker) values (new.run_id, new.path, new.n, new.worker);
        end if;
        return new;
    end
    $$;
    create or replace trigger witness_asks before insert on stepwell.outbox
        for each row when (new.worker is not null and new.kind in ('step', 'sleep', 'signal', 'child'))
        execute function witness.ask();
"""

_RUNS = """
    with recursive known as (
        select id from stepwell.runs where %(all)s or id = any (%(ids)s)
        union
        select r.id from stepwell.runs r join known k on r.parent_id = k.id)
    select r.id::text, r.workflow, r.input, r.state, r.error ->> 'message', r.epoch,
           (select count(*) from stepwell.tasks t where t.run_id = r.id),
           (select string_agg(distinct t.state, ', ') from stepwell.tasks t where t.run_id = r.id)
    from stepwell.runs r where r.id in (select id from known)
"""
_RECORDS = """
    select o.run_id::text, array_to_string(o.path, '.'), o.epoch, o.n, o.seq, o.kind, o.name, o.outcome,
           extract(epoch from pg_xact_commit_timestamp(o.xmin))::float8
    from stepwell.outbox o where %(all)s or o.run_id = any (%(ids)s) order by o.run_id, o.seq
"""


@dataclass(frozen=True, slots=True)
class Record:
    """A row of the outbox. `committed` is the time of its transaction's commit."""

    run: str
    path: str
    epoch: int
    n: int
    seq: int
    kind: str
    name: str
    outcome: str
    committed: float


@dataclass
class Verdict:
    """What was found. The first part must be zero; the second is allowed, and counted."""

    lost: int = 0
    """A run that is not there or that nobody would ever go on with, a completed step without an effect, a succeeded run
    without one of its steps, a transactional step without its row."""
    stuck: int = 0
    """A run that has not ended by now."""
    repeated: int = 0
    """An execution that was granted after its step was recorded as completed."""
    stale_accepted: int = 0
    """A business row, a record or a final outcome of somebody who did not hold the claim, or one too many."""
    disorder: int = 0
    """A history with a gap, a step that began before the one before it was durable, a fence that was given twice."""
    unstable_keys: int = 0
    """A call with more than one idempotency key, or a key of another call."""
    miscounted: int = 0
    """A total that is not that of the outbox."""

    runs: int = 0
    completed: int = 0
    effects: int = 0
    blocked: int = 0
    repeated_in_flight: int = 0
    """An effect that came again because nobody knew that it had come before."""
    stale_starts: int = 0
    """An execution of an older claim that began after the end: of a process that was frozen or cut off."""
    fenced: int = 0
    """Writes that were refused, as counted by the workers."""
    complaints: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Tell whether nothing was found that must not be."""
        return not any(getattr(self, each.name) for each in fields(self)[:7])

    @property
    def figures(self) -> dict[str, int]:
        """Return every figure by its name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "complaints"}

    def find(self, what: str, complaint: str) -> None:
        """Count one finding."""
        setattr(self, what, getattr(self, what) + 1)
        if len(self.complaints) < COMPLAINTS_MAX:
            self.complaints.append(f"{what}: {complaint}")

    def __str__(self) -> str:
        return "\n".join([str(self.figures), *self.complaints])


def install(db: psycopg.Connection[Any]) -> None:
    """Create the business table and the trigger in a test's database."""
    row = db.execute("show track_commit_timestamp").fetchone()
    assert row == ("on",), "the checker goes by the times of commits: set track_commit_timestamp"
    db.execute(INSTRUMENTS.encode())


def check(
    db: psycopg.Connection[Any], facts: Iterable[Fact], *, enqueued: Sequence[UUID] | None = None,
    plans: Mapping[str, Plan] | None = None, silent: Container[str] = (), fenced: int = 0,
) -> Verdict:  # fmt: skip
    """Judge the runs that were `enqueued` with their children, or all; no worker may be at one of them any more.

    `plans` says by workflow which steps a succeeded run has completed. Steps that are `silent` do not report. `fenced` is
    what the workers counted.
    """
    verdict = Verdict(fenced=fenced)
    runs = _runs(db, enqueued, plans or {}, verdict)
    which = {"all": enqueued is None, "ids": [UUID(each) for each in runs]}
    records = [Record(*row) for row in db.execute(_RECORDS, which).fetchall()]
    booked = [
        (run, path, fence) for run, path, fence in db.execute(
            "select run::text, path, fence from witness.booked where %(all)s or run = any (%(ids)s)", which
        ).fetchall()
    ]  # fmt: skip
    said = [fact for fact in facts if fact.run in runs]
    _check_effects(records, said, silent, verdict)
    _check_repeats(records, said, verdict)
    _check_fences(records, said, verdict)
    _check_rows(records, said, booked, verdict)
    _check_histories(records, said, verdict)
    _check_plans(runs, records, plans or {}, verdict)
    _check_witness(db, which, verdict)
    _check_totals(db, verdict)
    return verdict


def _runs(
    db: psycopg.Connection[Any], enqueued: Sequence[UUID] | None, plans: Mapping[str, Plan], verdict: Verdict
) -> dict[str, tuple[Any, ...]]:
    rows = db.execute(_RUNS, {"all": enqueued is None, "ids": list(enqueued or ())}).fetchall()
    runs = {row[0]: row for row in rows}
    for run in enqueued or ():
        if str(run) not in runs:
            verdict.find("lost", f"run {run} was enqueued and is not there")
    for run, workflow, _, state, message, _, tasks, states in rows:
        verdict.runs += 1
        if state == "blocked":
            verdict.blocked += 1
            if workflow in plans:
                verdict.complaints.append(f"blocked: run {run} of {workflow}: {message}")
        elif state == "open" and not tasks:
            verdict.find("lost", f"run {run} of {workflow} is open, and has no task")
        elif state == "open":
            verdict.find("stuck", f"run {run} of {workflow} is open with {tasks} tasks ({states})")
    return runs


def _completed(records: Iterable[Record]) -> dict[Call, list[Record]]:
    found: dict[Call, list[Record]] = defaultdict(list)
    for each in records:
        if each.kind == "step" and each.n == 0 and each.outcome == "completed":
            found[each.run, each.path].append(each)
    return found


def _again(records: Iterable[Record]) -> Counter[str]:
    """Return how often each run gave calls a new key: by a rewind or a fresh start."""
    return Counter(
        each.run for each in records if each.kind == "epoch" and each.outcome in ("rewind", "continue")
    )


def _check_effects(
    records: list[Record], facts: list[Fact], silent: Container[str], verdict: Verdict
) -> None:
    effects = Counter((fact.run, fact.path) for fact in facts if fact.what == "effect")
    verdict.effects = effects.total()
    for call, ends in _completed(records).items():
        verdict.completed += 1
        if call not in effects and ends[0].name not in silent:
            verdict.find("lost", f"step {ends[0].name} at {call} is completed without an effect")
    keys = {fact.key for fact in facts if fact.what == "effect" and not fact.transactional}
    plain = sum(1 for fact in facts if fact.what == "effect" and not fact.transactional)
    verdict.repeated_in_flight = plain - len(keys)


def _check_repeats(records: list[Record], facts: list[Fact], verdict: Verdict) -> None:
    starts: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.what == "start":
            starts[f"{fact.run}:{fact.path}"].append(fact)
    again = {each.run for each in records if each.kind == "epoch"}
    final: dict[Call, list[Record]] = defaultdict(list)
    for each in records:
        # What was rewound is executed again, under another key; what had failed, when its run is retried.
        if each.kind == "step" and each.n == 0 and (each.outcome == "completed" or each.run not in again):
            final[each.run, each.path].append(each)
    rewound = _again(records)
    for (run, path), ends in final.items():
        if rewound[run]:
            continue
        committed = min(each.committed for each in ends)
        begun = starts[f"{run}:{path}"]
        highest = max((fact.fence for fact in begun if fact.at <= committed + CLOCK_SECONDS), default=-1)
        for fact in begun:
            if fact.at <= committed + CLOCK_SECONDS:
                continue
            if fact.fence >= highest:
                verdict.find(
                    "repeated",
                    f"step {fact.step} at {run}:{path} began {fact.at - committed:.3f} s after it was recorded, "
                    f"with fence {fact.fence:x} after {highest:x}",
                )
            else:
                verdict.stale_starts += 1


def _check_fences(records: list[Record], facts: list[Fact], verdict: Verdict) -> None:
    """No two processes may have the same fence for a call, and a call has one key."""
    holders: dict[tuple[Call, int], set[int]] = defaultdict(set)
    keys: dict[Call, set[str]] = defaultdict(set)
    for fact in facts:
        call = (fact.run, fact.path)
        holders[call, fact.fence].add(fact.pid)
        keys[call].add(fact.key)
        if not fact.key.startswith(f"{fact.run}:{fact.path}"):
            verdict.find("unstable_keys", f"step {fact.step} at {call} had the key {fact.key}")
    for (call, fence), pids in holders.items():
        if len(pids) > 1:
            verdict.find(
                "disorder", f"the fence {fence:x} of {call} was given to the processes {sorted(pids)}"
            )
    again = _again(records)
    for call, different in keys.items():
        if len(different) > 1 + again[call[0]]:
            verdict.find("unstable_keys", f"the call {call} had the keys {sorted(different)}")


def _check_rows(
    records: list[Record], facts: list[Fact], booked: list[tuple[str, str, int]], verdict: Verdict
) -> None:
    """Compare the business rows of transactional steps with their records."""
    transactional = {fact.step for fact in facts if fact.transactional}
    rows = Counter((run, path) for run, path, _ in booked)
    again = _again(records)
    completed = _completed(records)
    for call, ends in completed.items():
        if ends[0].name in transactional and not rows[call]:
            verdict.find("lost", f"the transactional step at {call} is completed and has no row")
        if len(ends) > 1 + again[call[0]]:
            verdict.find("stale_accepted", f"the call {call} has {len(ends)} final outcomes")
    for call, count in rows.items():
        if count > len(completed.get(call, ())):
            verdict.find(
                "stale_accepted",
                f"the transactional step at {call} has {count} rows and {len(completed.get(call, ()))} records",
            )


def _check_histories(records: list[Record], facts: list[Fact], verdict: Verdict) -> None:
    """Histories are numbered 1, 2, 3, …; a step began when the one before it was durable (I7)."""
    by_run: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_run[record.run].append(record)
    began: dict[Call, float] = {}
    for fact in facts:
        if fact.what == "start":
            call = (fact.run, fact.path)
            began[call] = min(began.get(call, fact.at), fact.at)
    for run, history in by_run.items():
        if [each.seq for each in history] != list(range(1, len(history) + 1)):
            verdict.find("disorder", f"run {run} has the history {[each.seq for each in history]}")
        # Calls of the body itself come one after the other; those of its branches have longer paths.
        row = sorted(
            (each for each in history if each.kind == "step" and each.n == 0 and each.path.isdigit()),
            key=lambda each: (each.epoch, int(each.path)),
        )
        for before, after in pairwise(row):
            at = began.get((run, after.path))
            if at is not None and before.epoch == after.epoch and at < before.committed - CLOCK_SECONDS:
                verdict.find(
                    "disorder",
                    f"step {after.name} of run {run} began {before.committed - at:.6f} s before {before.name} was durable",
                )


def _check_plans(
    runs: Mapping[str, tuple[Any, ...]], records: list[Record], plans: Mapping[str, Plan], verdict: Verdict
) -> None:
    done: dict[str, Counter[str]] = defaultdict(Counter)
    for (run, _), ends in _completed(records).items():
        done[run][ends[0].name] += 1
    for run, (_, workflow, given, state, *_) in runs.items():
        if state == "succeeded" and workflow in plans:
            missing = Counter(plans[workflow](given)) - done[run]
            if missing:
                verdict.find("lost", f"run {run} of {workflow} has succeeded without {dict(missing)}")


def _check_witness(db: psycopg.Connection[Any], which: dict[str, Any], verdict: Verdict) -> None:
    for run, path, n, worker in db.execute(
        "select run, path, n, worker from witness.unclaimed where %(all)s or run = any (%(ids)s)", which
    ).fetchall():
        verdict.find(
            "stale_accepted", f"worker {worker} has recorded {path}, {n} of run {run} without a claim"
        )


def _check_totals(db: psycopg.Connection[Any], verdict: Verdict) -> None:
    """The sharded counters are exactly what the outbox holds."""
    rows = db.execute(
        """
        with counted as (select kind, name, outcome, sum(value)::int as many from stepwell.counters
                         where kind in ('run', 'step') group by 1, 2, 3),
             recorded as (select kind, name, outcome, count(*)::int as many from stepwell.outbox
                          where kind in ('run', 'step') group by 1, 2, 3)
        select kind, name, outcome, coalesce(c.many, 0), coalesce(r.many, 0)
        from counted c full join recorded r using (kind, name, outcome) where c.many is distinct from r.many
        """
    ).fetchall()
    for kind, name, outcome, counted, recorded in rows:
        verdict.find("miscounted", f"{counted} {kind}s {name} {outcome} are counted, {recorded} recorded")
