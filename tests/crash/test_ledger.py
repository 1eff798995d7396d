"""The instruments of the crash tests: a checker that never finds anything would prove nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.crash import checker, ledger
from tests.crash.checker import Verdict, check
from tests.crash.ledger import Fact, Ledger
from worker.context import StepInfo, executing
from worker.replay.records import RunFacts

DB = psycopg.Connection[Any]


# -- the ledger


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    with Ledger(tmp_path / "facts") as running:
        monkeypatch.setenv(ledger.ADDRESS_VARIABLE, running.address)
        yield running
        ledger.disconnect()


def _in_step(run: UUID, path: tuple[int, ...] = (1,), fence: int = 7) -> executing:
    now = time.time()
    facts = RunFacts(id=run, workflow="w", created_at=now, seed=run, epoch=0, labels={}, key_epoch=0)  # type: ignore[arg-type]
    return executing(facts, StepInfo(run, path, 1, fence))


def test_what_is_reported_is_in_the_file_when_the_step_goes_on(book: Ledger) -> None:
    run = uuid4()
    with _in_step(run, (3, 1, 2), fence=9):
        ledger.report("start", "charge")
        said = json.loads(book.path.read_text().splitlines()[0])
        ledger.report("effect", "charge", transactional=True)

    assert str(run) in said
    first, second = book.facts()
    assert (first.what, first.step, first.run, first.path, first.key) == (
        "start", "charge", str(run), "3.1.2", f"{run}:3.1.2",
    )  # fmt: skip
    assert (second.what, second.fence, second.pid, second.transactional) == ("effect", 9, os.getpid(), True)
    assert first.at <= second.at <= time.time()
    assert first.clock <= second.clock <= time.monotonic()


async def test_async_steps_report_as_well(book: Ledger) -> None:
    with _in_step(uuid4()):
        await ledger.report_async("start", "charge")
        assert [fact.what for fact in book.facts()] == ["start"]


def test_it_tells_whether_a_call_has_taken_effect(book: Ledger) -> None:
    run = uuid4()
    with _in_step(run):
        ledger.report("start", "charge")
        assert not ledger.has_taken_effect()
        ledger.report("effect", "charge")
        assert ledger.has_taken_effect()
    with _in_step(run, (2,)):
        assert not ledger.has_taken_effect()


def test_many_report_at_once_and_every_fact_is_there_once(book: Ledger) -> None:
    run = uuid4()

    def work(number: int) -> None:
        with _in_step(run, (number,)):
            ledger.report("start", "charge")

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(work, range(300)))
        for _ in range(20):
            pool.submit(ledger.disconnect)
    assert sorted(int(fact.path) for fact in book.facts()) == list(range(300))


def test_a_ledger_that_was_killed_is_continued_without_what_was_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts"
    run = uuid4()
    with Ledger(path) as first, _in_step(run):
        monkeypatch.setenv(ledger.ADDRESS_VARIABLE, first.address)
        ledger.report("effect", "charge")
        os.kill(first._process.pid, signal.SIGKILL)
        first._process.wait()
    with path.open("ab") as file:
        file.write(b'["torn')
    with Ledger(path) as second, _in_step(run):
        monkeypatch.setenv(ledger.ADDRESS_VARIABLE, second.address)
        assert ledger.has_taken_effect()
        ledger.report("effect", "refund")
        assert [fact.step for fact in second.facts()] == ["charge", "refund"]
        ledger.disconnect()


def test_a_report_that_was_sent_twice_counts_once(book: Ledger) -> None:
    with _in_step(uuid4()):
        line = ledger._line("effect", "charge", False)
    ledger._send(line)
    ledger._send(line)
    assert len(book.path.read_text().splitlines()) == 2
    assert len(book.facts()) == 1


# -- the checker


class World:
    """A run with two steps that ended as it should, and the facts that go with it; tests then spoil something."""

    def __init__(self, db: DB) -> None:
        self.db = db
        checker.install(db)
        self.run = self._one("select stepwell.enqueue('w', '{}')")
        self.worker = 17
        self.facts: list[Fact] = []
        db.execute(
            "insert into stepwell.workers (id, host, pid, queues, names) values (17, 'h', 1, '{default}', '{w}')"
        )
        db.execute(
            "update stepwell.tasks set state = 'claimed', claimed_by = 17 where run_id = %s", (self.run,)
        )
        self.executed("1", "plain", fence=1)
        self.executed("2", "book", fence=2, transactional=True)
        self.record("{}", 0, "run", "w", "succeeded")
        db.execute("delete from stepwell.tasks where run_id = %s", (self.run,))
        db.execute(
            "update stepwell.runs set state = 'succeeded', finished_at = now() where id = %s", (self.run,)
        )
        db.execute(
            "insert into stepwell.counters select 0, kind, name, outcome, count(*) from stepwell.outbox group by 2, 3, 4"
        )

    def executed(self, path: str, step: str, *, fence: int, transactional: bool = False) -> None:
        self.say("start", path, step, fence, transactional)
        if transactional:
            self.book(path, fence)
        self.say("effect", path, step, fence, transactional)
        self.record(f"{{{path}}}", 0, "step", step, "completed")

    def say(
        self, what: str, path: str, step: str, fence: int, transactional: bool = False, pid: int = 1
    ) -> None:
        self.facts.append(
            Fact(
                uuid4().hex, what, step, str(self.run), path, 1, f"{self.run}:{path}", fence, transactional, pid,
                time.time(), time.monotonic(),
            )
        )  # fmt: skip

    def book(self, path: str, fence: int) -> None:
        self.db.execute(
            "insert into witness.booked (run, path, step, fence) values (%s, %s, 'book', %s)",
            (self.run, path, fence),
        )

    def record(self, path: str, n: int, kind: str, name: str, outcome: str, epoch: int = 0) -> None:
        self.db.execute(
            """
            insert into stepwell.outbox (run_id, epoch, path, n, seq, kind, name, outcome, worker)
            select %(run)s, %(epoch)s, %(path)s, %(n)s, count(*) + 1, %(kind)s, %(name)s, %(outcome)s, %(worker)s
            from stepwell.outbox where run_id = %(run)s
            """,
            {
                "run": self.run, "epoch": epoch, "path": path, "n": n, "kind": kind, "name": name,
                "outcome": outcome, "worker": self.worker,
            },
        )  # fmt: skip

    def verdict(self, **options: Any) -> Verdict:
        return check(self.db, self.facts, **options)

    def _one(self, statement: str) -> Any:
        row = self.db.execute(statement.encode()).fetchone()
        assert row is not None
        return row[0]


@pytest.fixture
def world(db: DB) -> World:
    return World(db)


def test_nothing_is_found_where_everything_is_as_it_should_be(world: World) -> None:
    verdict = world.verdict(enqueued=[world.run], plans={"w": lambda _: ["plain", "book"]})
    assert verdict.clean, str(verdict)
    assert (verdict.runs, verdict.completed, verdict.effects) == (1, 2, 2)


def test_a_run_that_is_not_there_is_lost(world: World) -> None:
    assert world.verdict(enqueued=[world.run, uuid4()]).lost == 1


def test_a_run_without_a_task_is_lost_and_one_that_waits_is_stuck(world: World) -> None:
    for _ in range(2):
        world._one("select stepwell.enqueue('w', '{}')")
    world.db.execute("delete from stepwell.tasks where id = (select max(id) from stepwell.tasks)")
    verdict = world.verdict()
    assert (verdict.lost, verdict.stuck) == (1, 1)


def test_a_completed_step_without_an_effect_is_lost(world: World) -> None:
    world.facts = [fact for fact in world.facts if (fact.what, fact.path) != ("effect", "1")]
    assert world.verdict().lost == 1
    assert world.verdict(silent={"plain"}).lost == 0


def test_a_step_that_a_succeeded_run_leaves_out_is_lost(world: World) -> None:
    assert world.verdict(plans={"w": lambda _: ["plain", "plain", "book"]}).lost == 1


def test_a_transactional_step_without_its_row_is_lost(world: World) -> None:
    world.db.execute("delete from witness.booked")
    assert world.verdict().lost == 1


@pytest.mark.parametrize("fence", [1, 3], ids=["by the same claim", "by another"])
def test_an_execution_that_was_granted_after_the_end_is_found(world: World, fence: int) -> None:
    world.say("start", "1", "plain", fence=fence)
    verdict = world.verdict()
    assert (verdict.repeated, verdict.stale_starts) == (1, 0)


def test_an_older_claim_that_begins_after_the_end_is_counted_and_allowed(world: World) -> None:
    world.say("start", "1", "plain", fence=0, pid=2)
    world.say("effect", "1", "plain", fence=0, pid=2)
    verdict = world.verdict()
    assert (verdict.repeated, verdict.stale_starts, verdict.repeated_in_flight) == (0, 1, 1)
    assert verdict.clean


def test_a_step_that_had_failed_for_good_may_begin_again_only_when_its_run_is_retried(world: World) -> None:
    world.say("start", "3", "plain", fence=4)
    world.record("{3}", 0, "step", "plain", "failed")
    world.say("start", "3", "plain", fence=5)
    assert world.verdict().repeated == 1
    world.record("{}", 1, "epoch", "w", "retry", epoch=1)
    assert world.verdict().repeated == 0


def test_one_row_too_many_was_accepted_from_a_stale_claim(world: World) -> None:
    world.book("2", 1)
    assert world.verdict().stale_accepted == 1


def test_a_row_without_a_record_was_accepted_from_a_stale_claim(world: World) -> None:
    world.book("5", 1)
    assert world.verdict().stale_accepted == 1


def test_two_final_outcomes_of_a_call_are_found(world: World) -> None:
    world.record("{1}", 0, "step", "plain", "completed", epoch=1)
    verdict = world.verdict()
    assert any("2 final outcomes" in each for each in verdict.complaints), str(verdict)


def test_a_record_of_a_worker_without_a_claim_is_found_when_it_is_written(world: World) -> None:
    world.worker = 18
    world.record("{3}", 1, "step", "plain", "failed")
    assert world.verdict().stale_accepted == 1


def test_a_gap_in_a_history_is_found(world: World) -> None:
    world.db.execute("update stepwell.outbox set seq = 9 where kind = 'run'")
    assert world.verdict().disorder == 1


def test_a_step_that_begins_before_the_one_before_it_is_durable_is_found(world: World) -> None:
    at = min(fact.at for fact in world.facts)
    world.facts = [dataclasses.replace(fact, at=at) for fact in world.facts]
    assert world.verdict().disorder == 1


def test_a_fence_that_two_processes_have_is_found(world: World) -> None:
    fact = next(fact for fact in world.facts if fact.path == "1")
    world.facts.append(dataclasses.replace(fact, id="other", pid=2))
    assert world.verdict().disorder == 1


def test_a_key_that_changes_or_is_not_that_of_its_call_is_found(world: World) -> None:
    first = world.facts[0]
    world.facts.append(dataclasses.replace(first, id="x", key=f"{first.key}:1"))
    assert world.verdict().unstable_keys == 1
    world.facts[-1] = dataclasses.replace(first, id="x", key="another")
    assert world.verdict().unstable_keys == 2


def test_a_total_that_is_not_that_of_the_outbox_is_found(world: World) -> None:
    world.db.execute("update stepwell.counters set value = value + 1 where kind = 'run'")
    assert world.verdict().miscounted == 1


def test_facts_are_what_is_written(tmp_path: Path) -> None:
    fact = Fact("i", "start", "s", "r", "1", 1, "r:1", 2, False, 3, 4.0, 5.0)
    (tmp_path / "facts").write_text(f"{json.dumps(astuple(fact))}\n[1]\n")
    with pytest.raises(TypeError):
        list(ledger.read(tmp_path / "facts"))
    (tmp_path / "facts").write_text(f"{json.dumps(astuple(fact))}\n")
    assert list(ledger.read(tmp_path / "facts")) == [fact]
