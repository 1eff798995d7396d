"""A real Prometheus scrapes three real workers while one of them and a supervisor are killed.

Whatever a rule or a panel asks for is there, and what is counted is what the ledger, the database and a trigger of the test's
have seen: none of them knows of the metrics.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from uuid import UUID

import pytest

from tests import prometheus
from tests.crash import checker
from tests.crash.fleet import ROOT, Fleet, children_of
from tests.crash.ledger import Ledger
from tests.deploy.dashboards import queries
from tests.prometheus import Prometheus, metrics_in, needs_prometheus, rules
from tests.waiting import wait_until

pytestmark = [pytest.mark.crash, pytest.mark.slow, needs_prometheus]

APP = ROOT / "tests" / "crash" / "scrape_flows.py"
RUNS = {"short": 90, "plain": 60, "stumbling": 45, "fail": 5}
SLOTS = 8
END_SECONDS = 180.0
COUNTER = re.compile(r"(.+:)?stepwell_.+_(total|count|sum|bucket)(:max)?")

BURIALS = """
    create table witness.buried (worker bigint, at timestamptz default clock_timestamp());
    create function witness.note_burial() returns trigger language plpgsql security definer as $$
    begin
        insert into witness.buried (worker) values (new.id);
        return new;
    end
    $$;
    create trigger witness_notes after update on stepwell.workers
        for each row when (old.dead_at is null and new.dead_at is not null) execute function witness.note_burial();
"""


@dataclass
class Served:
    """A supervisor and where it serves its metrics."""

    pid: int
    processes: int
    port: int

    def exports_the_database(self) -> bool:
        return "\nstepwell_workers " in self.scrape()

    def scrape(self) -> str:
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            text: str = response.read().decode()
            return text


class Scraped:
    """A fleet, its ledger, and a Prometheus that scrapes whoever lives."""

    def __init__(self, fleet: Fleet, ledger: Ledger, server: Prometheus, targets: Path) -> None:
        self.fleet = fleet
        self.ledger = ledger
        self.prometheus = server
        self.supervisors: list[Served] = []
        self._targets = targets
        self._started = 0

    def start(self, processes: int, *, claiming: bool = True) -> Served:
        pid = self.fleet.start(processes, claiming=claiming).pid
        log = self.fleet.home / f"supervisor-{self._started}.log"
        self._started += 1
        (port,) = wait_until(lambda: re.findall(r"serving http://\S+:(\d+)/metrics", log.read_text()))
        served = Served(pid, processes, int(port))
        self.supervisors.append(served)
        self._tell()
        return served

    def lose(self, served: Served) -> None:
        """Kill a supervisor with its workers; nobody is to scrape it any more."""
        self.fleet.kill_tree(served.pid)
        self.supervisors.remove(served)
        self._tell()

    def enqueue(self, begin: float, end: float) -> list[UUID]:
        """Enqueue a part of the load: from which to which share of each workflow's runs."""
        return [
            self.fleet.enqueue(workflow, n=n)
            for workflow, count in RUNS.items()
            for n in range(round(count * begin), round(count * end))
        ]

    def ended(self) -> int:
        row = self.fleet.db.execute("select count(*) from stepwell.runs where state <> 'open'").fetchone()
        assert row is not None
        return int(row[0])

    def _tell(self) -> None:
        prometheus.write_targets(self._targets, [each.port for each in self.supervisors])


@pytest.fixture
def scraped(database_url: str, tmp_path: Path) -> Iterator[Scraped]:
    (tmp_path / "paid").mkdir()
    targets = tmp_path / "targets.json"
    prometheus.write_targets(targets, [])
    with Ledger(tmp_path / "facts") as ledger, prometheus.running(tmp_path, targets) as server:
        fleet = Fleet(
            database_url, tmp_path, app=APP, metrics=True, environment=ledger.environment, concurrency=SLOTS,
            lost_lock_seconds=2.0, grace_seconds=5.0,
        )  # fmt: skip
        try:
            checker.install(fleet.db)
            fleet.db.execute(BURIALS.encode())
            yield Scraped(fleet, ledger, server, targets)
        finally:
            fleet.stop()


def test_what_prometheus_has_scraped_is_what_has_happened(scraped: Scraped) -> None:
    runs = _under_fire(scraped)
    verdict = checker.check(scraped.fleet.db, scraped.ledger.facts(), enqueued=runs)
    assert verdict.clean, verdict
    _counted_exactly(scraped, runs)
    _nothing_was_forgotten(scraped)
    _everything_asked_for_is_there(scraped)
    _everything_is_documented(scraped)


def _under_fire(scraped: Scraped) -> list[UUID]:
    """Run the load; kill a worker on the way, then the supervisor that exports the database. Return the runs."""
    fleet = scraped.fleet
    both = [scraped.start(2), scraped.start(1)]
    (exporting,) = [each for each in both if each.exports_the_database()]
    (other,) = [each for each in both if each is not exporting]
    fleet.enqueue("short", n="a number that is none")  # blocks
    runs = scraped.enqueue(0.0, 0.7)
    claims = f'stepwell_claims_total{{instance="127.0.0.1:{other.port}"}}'
    wait_until(lambda: (scraped.prometheus.value(claims) or 0) > 0, what="claims to be scraped")
    wait_until(lambda: scraped.ended() >= len(runs) // 5, 120, what="a fifth of the runs to end")
    os.kill(children_of(other.pid)[0], signal.SIGKILL)
    obituaries = 'sum(job_detector:stepwell_reclaims_total:max{detector="obituary"})'
    wait_until(lambda: scraped.prometheus.value(obituaries) == 1, 60, what="the obituary to be scraped")
    scraped.lose(exporting)
    runs += scraped.enqueue(0.7, 1.0)
    scraped.start(exporting.processes, claiming=False)  # the dead are still counted
    wait_until(lambda: scraped.ended() > len(runs), END_SECONDS, what="all runs to end")
    return runs


def _counted_exactly(scraped: Scraped, runs: list[UUID]) -> None:
    """The ledger knows which steps took effect, the outbox what else became of them, the trigger who was buried."""
    effects = {(fact.run, fact.path): fact.step for fact in scraped.ledger.facts() if fact.what == "effect"}
    recorded = _rows(
        scraped, "select name, outcome, count(*) from stepwell.outbox where kind = 'step' group by 1, 2"
    )
    steps = {(name, outcome): count for name, outcome, count in recorded}
    in_the_ledger = {(name, "completed"): count for name, count in Counter(effects.values()).items()}
    assert {each: count for each, count in steps.items() if each[1] == "completed"} == in_the_ledger
    _becomes(scraped, "max by (step, outcome) (stepwell_steps_total)", ("step", "outcome"), steps)
    _becomes(scraped, "job_step_outcome:stepwell_steps_total:max", ("step", "outcome"), steps)

    assert len(runs) == sum(RUNS.values())
    ends: dict[tuple[str, ...], int] = {("short", "blocked"): 1}
    ends |= {(name, "failed" if name == "fail" else "succeeded"): count for name, count in RUNS.items()}
    _becomes(scraped, "job_workflow_outcome:stepwell_runs_total:max", ("workflow", "outcome"), ends)

    ((buried,),) = _rows(scraped, "select count(*) from witness.buried")
    assert buried >= 2  # the worker, and one for each that the supervisor had
    _becomes(scraped, "sum(job_detector:stepwell_reclaims_total:max)", (), {(): buried})
    _becomes(scraped, "job:stepwell_runs_blocked:max", (), {(): 1})
    _becomes(scraped, "job:stepwell_workers:max", (), {(): 3})


def _nothing_was_forgotten(scraped: Scraped) -> None:
    """No counter has ever fallen: not with the worker that was killed, nor when another supervisor exported."""
    counters = [name for name in scraped.prometheus.names() if COUNTER.fullmatch(name)]
    assert len(counters) > 15
    for name in counters:
        assert scraped.prometheus.query(f"resets({name}[1h]) > 0") == [], name
    exporters = scraped.prometheus.query("count by (instance) (count_over_time(stepwell_workers[1h]))")
    assert len(exporters) == 2, "the database was exported by one only, so nothing was handed over"


def _everything_asked_for_is_there(scraped: Scraped) -> None:
    """Each metric of a rule or a panel exists, each rule can be evaluated, and each panel shows something."""
    asked = [rule["expr"] for kind in ("record", "alert") for rule in rules(kind).values()]
    asked += [expression for _, expression in queries()]
    wanted = {name for expression in asked for name in metrics_in(expression)} | rules("record").keys()
    assert wanted - scraped.prometheus.names() == set()
    for rule in scraped.prometheus.rules():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
    assert [where for where, expression in queries() if not scraped.prometheus.query(expression)] == []
    assert {target["health"] for target in scraped.prometheus.targets()} == {"up"}
    waiting_for_a_person = 'ALERTS{alertname="StepwellRunsBlocked", alertstate="pending"}'
    assert scraped.prometheus.value(waiting_for_a_person) == 1


def _everything_is_documented(scraped: Scraped) -> None:
    """The chapter lists what is served, no more and no less."""
    served = {
        name
        for each in scraped.supervisors
        for name in re.findall(r"^# TYPE (stepwell_\w+)", each.scrape(), re.MULTILINE)
    }
    chapter = (ROOT / "docs" / "operations.md").read_text()
    listed = set(re.findall(r"^\| `(stepwell_\w+)`", chapter, re.MULTILINE))
    assert listed == served


def _becomes(
    scraped: Scraped, expression: str, labels: tuple[str, ...], wanted: dict[tuple[str, ...], int]
) -> None:
    """Wait until a query has these values: the next scrape and the next evaluation bring them."""
    seen: dict[tuple[str, ...], float] = {}

    def agree() -> bool:
        seen.clear()
        for found, value in scraped.prometheus.query(expression):
            seen[tuple(found[label] for label in labels)] = value
        return seen == wanted

    try:
        wait_until(agree, 60)
    except AssertionError:
        assert seen == wanted, expression
        raise


def _rows(scraped: Scraped, statement: str) -> list[tuple[Any, ...]]:
    return scraped.fleet.db.execute(statement.encode()).fetchall()
