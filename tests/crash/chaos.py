"""`python -m tests.crash.chaos`: a mixed load, random faults at random moments, and a verdict at the end.

A seed chooses the load and the faults; what they meet is up to the machine. Everything that the workers do goes by way
of the proxy; what the load enqueues does not, but its server is restarted and frozen like theirs.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Json

from tests import postgres
from tests.crash import checker
from tests.crash.checker import Verdict
from tests.crash.faults import FAULTS, Aim, Fault, Scene, survives
from tests.crash.fleet import ROOT, Fleet, Held
from tests.crash.ledger import Ledger
from tests.crash.plans import PLANS, SHARES
from tests.crash.proxy import Proxy
from tests.waiting import wait_until

APP = ROOT / "tests" / "crash" / "chaos_flows.py"
SUPERVISORS, PROCESSES = 3, 2
SETTINGS = {
    "concurrency": 40, "lost_lock_seconds": 1.0, "lease_seconds": 4.0, "stopped_after_seconds": 1.0,
    "hang_after_seconds": 20.0, "grace_seconds": 3.0, "poison_after": 1_000_000,
}  # fmt: skip
OPEN_AT_MOST = 120
BATCH = 3
EVERY_SECONDS = 0.15
BETWEEN_FAULTS_SECONDS = (0.2, 4.0)
SECOND_FAULT = 0.2
"""How often a second fault strikes before the first is healed."""
INSTANT = ("kill_child", "kill_tree", "cut_all", "cut_before", "cut_after")
"""What can be a second fault: it asks the database nothing."""
CUTS = ("cut_before", "cut_after")
STATEMENTS = ("claim_v1", "flush_v1", "flush_v1", "commit_step_v1", "promote_v1", "idle_v1", "_v1")
SPRUNG_SECONDS = 2.0
END_SECONDS = 180.0


class Load(threading.Thread):
    """A service that enqueues, sends signals, and does what a person does about held steps."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(name="load", daemon=True)
        self.runs: list[UUID] = []
        self.retried = 0
        self.outages = 0
        self.ending = False
        self.failure: BaseException | None = None
        self._url = url
        self._dice = random.Random(seed)
        self._numbers = iter(range(10**9))
        self._db: psycopg.Connection[Any] | None = None
        self._unsignalled: list[tuple[float, UUID]] = []
        self._batch: list[tuple[str, int]] = []
        self._done = threading.Event()

    def run(self) -> None:
        try:
            while not self._done.wait(EVERY_SECONDS):
                try:
                    self._work(self._connected())
                except psycopg.OperationalError:
                    self.outages += 1
                    self._db = None
        except BaseException as error:  # raised by `stop`
            self.failure = error

    def stop(self) -> None:
        self._done.set()
        self.join(30)
        if self._db is not None:
            self._db.close()
        if self.failure is not None:
            raise self.failure

    def _connected(self) -> psycopg.Connection[Any]:
        if self._db is None:
            self._db = psycopg.connect(self._url, autocommit=True, connect_timeout=5)
        return self._db

    def _work(self, db: psycopg.Connection[Any]) -> None:
        row = db.execute("select count(*) from stepwell.runs where state = 'open'").fetchone()
        if not self.ending and row is not None and row[0] < OPEN_AT_MOST:
            # What may have been committed unheard is sent again with its keys.
            self._batch = self._batch or [
                (self._dice.choices(list(SHARES), list(SHARES.values()))[0], next(self._numbers))
                for _ in range(BATCH)
            ]
            with db.transaction():
                made = [(name, self._enqueue(db, name, number)) for name, number in self._batch]
            self._batch = []
            self.runs += [run for _, run in made]
            now = time.monotonic()
            self._unsignalled += [
                (now + self._dice.uniform(0.0, 2.0), run) for name, run in made if name == "waiting"
            ]
        for each in [each for each in self._unsignalled if each[0] <= time.monotonic() or self.ending]:
            db.execute("select stepwell.signal(%s, 'go', %s)", (each[1], Json({"at": each[0]})))
            self._unsignalled.remove(each)
        held = db.execute(
            "select id from stepwell.runs where state = 'blocked' and error ->> 'reason' like 'held%'"
        ).fetchall()
        for (run,) in held:
            db.execute("select stepwell.retry(%s)", (run,))
            self.retried += 1

    def _enqueue(self, db: psycopg.Connection[Any], workflow: str, number: int) -> UUID:
        row = db.execute(
            "select stepwell.enqueue(%s, %s, key => %s)", (workflow, Json({"n": number}), str(number))
        ).fetchone()
        assert row is not None
        run: UUID = row[0]
        return run


@dataclass
class Chaos:
    """Strikes at a scene until the time is over."""

    scene: Scene
    dice: random.Random
    struck: Counter[str] = field(default_factory=Counter)

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self.dice.uniform(*BETWEEN_FAULTS_SECONDS))
            self._strike(deadline)

    def _strike(self, deadline: float) -> None:
        victim = self._victim()
        first = self.dice.choice(sorted(FAULTS))
        second = self.dice.choice(INSTANT) if self.dice.random() < SECOND_FAULT else None
        faults = [FAULTS[name]() for name in (first, second) if name is not None]
        try:
            for fault in faults:
                self._begin(fault, victim)
        finally:
            for fault in faults:
                fault.heal(self.scene, victim)
            wait_until(lambda: survives(self.scene), 60, what="the database to answer")
        for _ in range(self.scene.supervisors - len(self.scene.fleet.living)):
            self.scene.fleet.start(self.scene.processes, claiming=False)

    def _begin(self, fault: Fault, victim: Held) -> None:
        fault.strike(self.scene, victim, Aim(self.dice.choice(STATEMENTS)))
        if fault.name in CUTS:
            trap = fault.trap  # type: ignore[attr-defined]  # the two cuts have one
            with contextlib.suppress(AssertionError):
                trap.wait(SPRUNG_SECONDS)
            if not trap.times:
                return  # nobody came by, so nothing has happened
        self.struck[fault.name] += 1

    def _victim(self) -> Held:
        def found() -> list[Held]:
            return self.scene.workers() if survives(self.scene) else []

        return self.dice.choice(wait_until(found, 60, what="a worker that lives"))


@contextlib.contextmanager
def scene(version: int, home: Path) -> Iterator[Scene]:
    """Yield everything that is needed, started."""
    with postgres.running(version) as cluster:
        cluster.make_template()
        with cluster.database() as url, Proxy(cluster) as proxy, Ledger(home / "ledger") as ledger:
            (home / "paid").mkdir()
            fleet = Fleet(
                url, home, app=APP, workers_url=proxy.url(str(conninfo_to_dict(url)["dbname"])),
                environment=ledger.environment, **SETTINGS,
            )  # fmt: skip
            checker.install(fleet.db)
            made = Scene(cluster, fleet, proxy, ledger, SUPERVISORS, PROCESSES)
            try:
                made.replenish()
                yield made
            finally:
                cluster.thaw()
                wait_until(lambda: survives(made), 60, what="the database to answer")
                fleet.stop()


def unleash(version: int, home: Path, minutes: float, seed: int) -> tuple[Chaos, Load, Verdict]:
    """Run it all; return what has struck, what was asked for, and the verdict."""
    dice = random.Random(seed)
    with scene(version, home) as made:
        url = str(made.fleet.db.info.dsn)
        load = Load(url, dice.randrange(2**32))
        chaos = Chaos(made, dice)
        load.start()
        try:
            chaos.run(minutes * 60)
            load.ending = True
            with contextlib.suppress(AssertionError):  # the verdict says what is stuck
                wait_until(lambda: _quiet(made, load), END_SECONDS, what="every run to end")
        finally:
            load.stop()
        for each in made.fleet.living:
            each.terminate()
        for each in made.fleet.living:
            each.wait(60)
        verdict = checker.check(made.fleet.db, made.ledger.facts(), plans=PLANS, fenced=made.fenced())
        _find_lost_keys(made, load, verdict)
        for run, workflow, state, said in made.fleet.db.execute(
            "select id, workflow, state, error ->> 'message' from stepwell.runs where state not in ('succeeded', 'open')"
        ).fetchall():
            verdict.find("lost", f"run {run} of {workflow} is {state}: {said}")
        return chaos, load, verdict


def _find_lost_keys(made: Scene, load: Load, verdict: Verdict) -> None:
    """Whatever `enqueue` has answered is there, and each key once."""
    known = {row[0] for row in made.fleet.db.execute("select id from stepwell.runs").fetchall()}
    for run in load.runs:
        if run not in known:
            verdict.find("lost", f"run {run} was enqueued and is not there")
    twice = made.fleet.db.execute(
        "select key from stepwell.runs where parent_id is null group by key having count(*) > 1"
    ).fetchall()
    for (key,) in twice:
        verdict.find("repeated", f"the key {key} has several runs")


def _quiet(made: Scene, load: Load) -> bool:
    if load.failure is not None:
        return True
    row = made.fleet.db.execute(
        "select count(*) from stepwell.runs where state = 'open' or state = 'blocked' and error ->> 'reason' like 'held%'"
    ).fetchone()
    return row is not None and row[0] == 0


def table(chaos: Chaos, load: Load, verdict: Verdict, minutes: float, seed: int) -> list[str]:
    """Return the report as lines of Markdown."""
    struck = chaos.struck
    faults = f"{struck.total()} faults of {len(struck)} kinds"
    lines = [
        f"{minutes:g} minutes, seed {seed}: {faults}, {verdict.runs:,} runs, {verdict.completed:,} completed steps.",
        "",
        "| fault | times |", "|---|---|",
        *(f"| {name.replace('_', ' ')} | {times} |" for name, times in sorted(struck.items())),
        "",
        "| found | |", "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value:,} |" for name, value in verdict.figures.items()),
        f"| held steps that were retried | {load.retried:,} |",
        f"| connections that the load has lost | {load.outages:,} |",
        "",
        "Verdict: clean." if verdict.clean else "Verdict: NOT CLEAN.",
    ]  # fmt: skip
    return lines + verdict.complaints


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="How long faults strike.")
@click.option("--seed", type=int, help="What chooses load and faults; by default the time.")
@click.option("--postgres", "version", default=18, show_default=True, help="Major version: 15, 16 or 18.")
def main(minutes: float, seed: int | None, version: int) -> None:
    """Let everything go wrong, and see whether the promise was kept."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    seed = int(time.time()) if seed is None else seed
    home = Path(tempfile.mkdtemp(prefix="stepwell-chaos-"))
    click.echo(f"chaos for {minutes:g} minutes, seed {seed}; logs and ledger in {home}")
    chaos, load, verdict = unleash(version, home, minutes, seed)
    for line in table(chaos, load, verdict, minutes, seed):
        click.echo(line)
    if not verdict.clean:
        sys.exit(1)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
