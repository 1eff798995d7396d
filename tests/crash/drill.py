"""`python -m tests.crash.drill`: the primary of a highly available Postgres is killed under load, and nothing may be lost.

Three nodes under Patroni (`tests.crash.patroni`), two supervisors with their workers that reach whichever is the primary by
way of HAProxy, and services that enqueue and note what was acknowledged. In each round the primary dies as a machine does,
Patroni and every process of Postgres at once, after its log has not come through to the standbys for a moment. Then the
dead node comes back, as a standby.

What was acknowledged and what steps have done is written down outside of the database (`tests.crash.ledger`), and compared
with it at the end (`tests.crash.checker`). Where replication is synchronous nothing may be missing and no finished step may
have been executed again. Where it is asynchronous what had not come through is lost, and the drill says how much.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psycopg
from psycopg_pool import PoolTimeout

from outbox import Client, schema
from outbox.database import connect
from tests.crash import checker
from tests.crash.checker import Verdict
from tests.crash.faults import FENCED
from tests.crash.fleet import ROOT, Fleet
from tests.crash.ledger import Fact, Ledger
from tests.crash.patroni import FAILED_OVER_SECONDS, HighlyAvailable, Replication, Unavailable, held_back
from tests.crash.plans import PLANS, SHARES
from tests.waiting import wait_until

APP = ROOT / "tests" / "crash" / "chaos_flows.py"
SUPERVISORS, PROCESSES, SERVICES = 2, 2, 4
SETTINGS = {"concurrency": 40}
WORKFLOWS = {name: share for name, share in SHARES.items() if name != "waiting"}  # nobody sends signals here
STEADY = 40
"""So many enqueues are acknowledged, and so many steps completed, between two rounds."""
END_SECONDS = 300.0
BEGUN_SECONDS = 3.0
EXAMPLES = 5
"""So many of what is lost are told one by one where it is no surprise."""


@dataclass(frozen=True)
class Acknowledged:
    """An enqueue that a service was told of as done. `at` is the wall clock."""

    key: str
    run: UUID
    at: float


class Service(threading.Thread):
    """A service that enqueues, so many times a second at the most, and writes each acknowledgement down."""

    _numbers = itertools.count()

    def __init__(self, url: str, book: Path, per_second: float) -> None:
        super().__init__(name="service", daemon=True)
        self.acknowledged: list[Acknowledged] = []
        self.refused = 0
        self.failure: BaseException | None = None
        self._book = book
        self._pause_seconds = 1 / per_second
        self._client = Client(url)
        self._done = threading.Event()

    def run(self) -> None:
        try:
            with self._client as client, self._book.open("a") as book:
                while not self._done.wait(self._pause_seconds):
                    self._enqueue(client, book)
        except BaseException as error:  # raised by `stop`
            self.failure = error

    def _enqueue(self, client: Client, book: Any) -> None:
        number = next(self._numbers)
        name = _workflow(number)
        try:
            run = client.enqueue(name, {"n": number}, key=str(number))
        except (psycopg.OperationalError, PoolTimeout):
            self.refused += 1  # not acknowledged: it may be there, or not
            return
        noted = Acknowledged(str(number), run.id, time.time())
        book.write(json.dumps([noted.key, str(noted.run), noted.at]) + "\n")
        book.flush()
        self.acknowledged.append(noted)

    def stop(self) -> None:
        self._done.set()
        self.join(120)
        if self.failure is not None:
            raise self.failure


def _workflow(number: int) -> str:
    """Return the workflow of one number: each as often as its share says, mixed."""
    place = number * 37 % sum(WORKFLOWS.values())  # 37 has no divisor in common with that sum
    for name, share in WORKFLOWS.items():
        place -= share
        if place < 0:
            return name
    raise AssertionError(number)


@dataclass
class Round:
    """What one failover took: seconds from the kill, or of silence around it."""

    killed: str
    promoted: str
    killed_at: float
    promoted_seconds: float
    enqueue_seconds: float = 0.0
    step_seconds: float = 0.0


@dataclass
class Drill:
    """Everything that runs."""

    cluster: HighlyAvailable
    fleet: Fleet
    ledger: Ledger
    services: list[Service]
    rounds: list[Round] = field(default_factory=list)
    _read: int = 0
    _effects: list[float] = field(default_factory=list)

    def fail_over(self, lag_seconds: float) -> None:
        """Kill the primary under load, wait until everybody goes on, and have the dead node come back."""
        self._wait_for_load(time.time())
        victim = self.cluster.primary()
        assert victim is not None, "there is no primary"
        with held_back(victim, lag_seconds):
            victim.kill()
        killed_at, started = time.time(), time.monotonic()
        click.echo(f"killed {victim.name}, the primary, with everything that runs on it")
        promoted = self.cluster.wait_for_other_primary(victim)
        done = Round(victim.name, promoted.name, killed_at, time.monotonic() - started)
        self.rounds.append(done)
        self._wait_for_load(killed_at)
        click.echo(
            f"{promoted.name} is the primary after {done.promoted_seconds:.1f} s, and work goes on there"
        )
        self.cluster.revive(victim)
        self.cluster.wait_until_whole()

    def acknowledged(self) -> list[Acknowledged]:
        return [each for service in self.services for each in service.acknowledged]

    def reconnected(self) -> psycopg.Connection[Any]:
        """Return a connection to whichever node is the primary."""

        def answers() -> bool:
            try:
                if self.fleet.db.closed:
                    self.fleet.reconnect()
                self.fleet.db.execute("select 1")
            except psycopg.OperationalError:
                self.fleet.db.close()
                return False
            return True

        wait_until(answers, FAILED_OVER_SECONDS, what="the database to answer", every=0.25)
        return self.fleet.db

    def _wait_for_load(self, since: float) -> None:
        """Wait until enough has happened after a moment that it is no accident."""

        def enough() -> bool:
            for service in self.services:
                if service.failure is not None:
                    raise service.failure
            effects = sum(at > since for at in self._seen_effects())
            return effects >= STEADY and sum(each.at > since for each in self.acknowledged()) >= STEADY

        wait_until(enough, FAILED_OVER_SECONDS, what="work to go on", every=0.25)

    def _seen_effects(self) -> list[float]:
        """Return when steps have taken effect so far; of the ledger, only what is new is read."""
        with self.ledger.path.open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self._read += sum(map(len, whole))
        facts = [Fact(*json.loads(line)) for line in whole]
        self._effects += [fact.at for fact in facts if fact.what == "effect"]
        return self._effects


@contextlib.contextmanager
def running(home: Path, replication: Replication, per_second: float) -> Iterator[Drill]:
    """Yield a drill whose services enqueue."""
    with HighlyAvailable(home, replication) as cluster, Ledger(home / "ledger") as ledger:
        with connect(cluster.url("postgres"), application_name="drill") as admin:
            admin.execute("create database drill")
        url = cluster.url("drill")
        with connect(url, application_name="drill") as owner:
            schema.migrate(owner)
        (home / "paid").mkdir()
        fleet = Fleet(url, home, app=APP, environment=ledger.environment, **SETTINGS)
        drill = Drill(cluster, fleet, ledger, [])
        try:
            checker.install(fleet.db)
            for _ in range(SUPERVISORS):
                fleet.start(PROCESSES)
            for number in range(SERVICES):
                service = Service(url, home / f"acknowledged-{number}", per_second / SERVICES)
                drill.services.append(service)
                service.start()
            yield drill
        finally:
            for supervisor in fleet.living:
                fleet.kill_tree(supervisor.pid)
            for supervisor in fleet.living:
                supervisor.wait(20)
            fleet.db.close()


# -- the ledger


@dataclass
class Account:
    """What was found at the end."""

    rounds: Sequence[Round]
    acknowledged: int
    refused: int
    lost: list[Acknowledged]
    verdict: Verdict
    executed_again: int
    reclaims: Counter[str]

    @property
    def clean(self) -> bool:
        """Tell whether nothing is missing, and no finished step was executed again."""
        return not self.lost and self.verdict.clean and not self.verdict.blocked


def conclude(drill: Drill) -> Account:
    """Let everything that was enqueued end, stop, and compare."""
    for service in drill.services:
        service.stop()
    db = drill.reconnected()

    def ended() -> bool:
        row = db.execute("select count(*) from stepwell.runs where state = 'open'").fetchone()
        return row == (0,)

    with contextlib.suppress(AssertionError):  # the verdict says what is stuck
        wait_until(ended, END_SECONDS, what="every run to end", every=0.5)
    for supervisor in drill.fleet.living:
        supervisor.send_signal(signal.SIGTERM)
    for supervisor in drill.fleet.living:
        supervisor.wait(90)
    facts = drill.ledger.facts()
    verdict = checker.check(db, facts, plans=PLANS, fenced=fenced(drill.fleet.home))
    known = {row[0] for row in db.execute("select id from stepwell.runs").fetchall()}
    acknowledged = drill.acknowledged()
    recorded = [
        row[0]
        for row in db.execute(
            "select extract(epoch from pg_xact_commit_timestamp(xmin))::float8 from stepwell.outbox"
            " where kind = 'step' and n = 0 and outcome = 'completed'"
        ).fetchall()
    ]
    for each in drill.rounds:
        each.enqueue_seconds = silence((noted.at for noted in acknowledged), each.killed_at)
        each.step_seconds = silence(recorded, each.killed_at)
    reclaims = db.execute(
        "select name, sum(value)::int from stepwell.counters where kind = 'worker' group by name"
    ).fetchall()
    return Account(
        drill.rounds, len(acknowledged), sum(service.refused for service in drill.services),
        [each for each in acknowledged if each.run not in known], verdict, executed_again(facts), Counter(dict(reclaims)),
    )  # fmt: skip


def fenced(home: Path) -> int:
    """Return how many writes were refused, by what the workers have logged."""
    return sum(log.read_text(errors="replace").count(FENCED) for log in home.glob("supervisor-*.log"))


def silence(times: Iterable[float], around: float) -> float:
    """Return the longest time without an event that goes on after a moment and began about then at the latest.

    What was under way may still have come for a moment. Without any event after it: infinity.
    """
    gaps = [
        after - before
        for before, after in pairwise(sorted(times))
        if before < around + BEGUN_SECONDS and after > around
    ]
    return max(gaps, default=float("inf"))


def executed_again(facts: Iterable[Fact]) -> int:
    """Return how many effects came once more, of steps outside of the database."""
    effects = Counter(fact.key for fact in facts if fact.what == "effect" and not fact.transactional)
    return effects.total() - len(effects)


def report(account: Account, replication: Replication) -> list[str]:
    """Return the ledger as lines of Markdown."""
    verdict = account.verdict
    mode = (
        "asynchronous"
        if not replication.synchronous
        else "synchronous, strict"
        if replication.strict
        else "synchronous"
    )
    lines = [
        f"Replication: {mode}. {len(account.rounds)} failovers, {verdict.runs:,} runs, {verdict.completed:,} completed steps.",
        "",
        "| round | killed | promoted | new primary after | no enqueue acknowledged for | no step recorded for |",
        "|---|---|---|---|---|---|",
        *(
            f"| {number} | {each.killed} | {each.promoted} | {each.promoted_seconds:.1f} s | {each.enqueue_seconds:.1f} s"
            f" | {each.step_seconds:.1f} s |"
            for number, each in enumerate(account.rounds, 1)
        ),
        *_summary(account.rounds),
        "",
        "| ledger | |",
        "|---|---|",
        f"| acknowledged enqueues | {account.acknowledged:,} |",
        f"| … of which lost | {len(account.lost):,} |",
        f"| enqueues that were not acknowledged, so nobody counts on them | {account.refused:,} |",
        f"| effects that came once more | {account.executed_again:,} |",
        *(f"| {name.replace('_', ' ')} | {value:,} |" for name, value in verdict.figures.items()),
        f"| workers declared dead, by detector | {_told(account.reclaims)} |",
        "",
    ]  # fmt: skip
    if replication.synchronous:
        lines.append("Verdict: clean." if account.clean else "Verdict: NOT CLEAN.")
    else:
        lines.append(
            "What replication had not shipped when the primary died is lost: that is what asynchronous means, and no verdict."
        )
    lost = [f"lost: the acknowledged run {each.run} with the key {each.key}" for each in account.lost]
    complaints = [*lost, *verdict.complaints]
    return lines + (complaints if replication.synchronous else complaints[:EXAMPLES])


def _summary(rounds: Sequence[Round]) -> list[str]:
    if not rounds:
        return []
    columns = [
        [each.promoted_seconds for each in rounds],
        [each.enqueue_seconds for each in rounds],
        [each.step_seconds for each in rounds],
    ]
    return [
        f"| {name} | | | " + " | ".join(f"{of(column):.1f} s" for column in columns) + " |"
        for name, of in (("p50", statistics.median), ("max", max))
    ]


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


@click.command()
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="How often the primary is killed."
)
@click.option(
    "--asynchronous",
    is_flag=True,
    help="Let commits be acknowledged by the primary alone, and count what is lost.",
)
@click.option(
    "--strict", is_flag=True, help="Acknowledge nothing while there is no standby (synchronous_mode_strict)."
)
@click.option(
    "--ttl", default=20, show_default=True, help="Seconds until a primary that is silent is replaced."
)
@click.option(
    "--lag",
    default=1.0,
    show_default=True,
    help="Seconds for which the log does not come through before the kill.",
)
@click.option("--rate", default=15.0, show_default=True, help="Enqueues for each second.")
@click.option("--keep", is_flag=True, help="Keep logs and data.")
def main(
    rounds: int, asynchronous: bool, strict: bool, ttl: int, lag: float, rate: float, keep: bool
) -> None:
    """Kill the primary of a highly available Postgres under load, and see whether anything was lost."""
    if asynchronous and strict:
        raise click.UsageError("give --asynchronous or --strict, not both")
    logging.getLogger("psycopg.pool").setLevel(
        logging.ERROR
    )  # that nobody answers for a while is what is meant
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    replication = Replication(synchronous=not asynchronous, strict=strict, ttl_seconds=ttl)
    home = Path(tempfile.mkdtemp(prefix="stepwell-drill-", dir="/var/tmp"))
    home.chmod(0o755)  # the account of Postgres passes through
    try:
        click.echo(f"starting three nodes, etcd and HAProxy; logs, ledger and data in {home}")
        with running(home, replication, rate) as drill:
            for _ in range(rounds):
                drill.fail_over(lag)
            click.echo("waiting for every run to end")
            account = conclude(drill)
        for line in report(account, replication):
            click.echo(line)
        keep |= not (account.clean or asynchronous)
    except Unavailable as error:
        raise click.ClickException(str(error)) from None
    except AssertionError as error:
        keep = True
        raise click.ClickException(f"{error}; the logs are in {home}") from None
    finally:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)
    if not (account.clean or asynchronous):
        sys.exit(1)


if __name__ == "__main__":
    main()
