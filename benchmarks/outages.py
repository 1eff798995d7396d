"""What outages cost: a network that falls silent, and a database that is restarted under load."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.island import Island, island
from benchmarks.machine import ROOT, SETTINGS, Bench, living, wait_for
from benchmarks.scenarios import told
from outbox import Client, embedded
from outbox.database import connect
from outbox.schema import migrate


def silence(bench: Bench, samples: int) -> dict[str, float]:
    """Drop the packets of a tree that executes a step, and see when the step runs elsewhere."""
    log = bench.home / f"silence-{time.monotonic_ns()}"
    waits = []
    with island() as ground, _reachable(bench, ground) as url, Client(url) as client, connect(url, application_name="bench") as db:  # fmt: skip
        environment = {"STEPWELL_BENCH_LOG": str(log), "STEPWELL_POISON_AFTER": "1000"}
        for n in range(samples):
            islanders = subprocess.Popen(
                ground.inside(sys.executable, "-m", "worker.cli", "worker", "benchmarks.workload", "--processes", "1"),
                env={**os.environ, "STEPWELL_DATABASE_URL": url, "PYTHONPATH": str(ROOT), **environment},
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=(bench.home / "workers.log").open("ab"),
            )  # fmt: skip
            wait_for(lambda: living(db) == 1, 60)
            client.enqueue("lingering", {"word": f"q{n}"})
            _, pid = told(log, f"q{n}")
            others = bench.start(url, 1, **environment)
            ground.fall_silent()
            began = time.monotonic_ns()
            at, _ = told(log, f"q{n}", other_than=pid)
            waits.append((at - began) / 1e9)
            ground.be_heard()
            bench.end(others)
            islanders.terminate()
            islanders.wait(60)
            wait_for(lambda: living(db) == 0, 60)
    waits.sort()
    return {"p50_s": waits[len(waits) // 2], "slowest_s": waits[-1]}


def restarts(bench: Bench, times: int) -> dict[str, float]:
    """Restart the database again and again, as after a crash, while two trees are at work: nobody is taken for dead."""
    url = bench.fresh()
    fleet = [bench.start(url, 2) for _ in range(2)]
    waits = []
    with Client(url) as client:
        with connect(url, application_name="bench") as db:
            before = _workers(db)
        for _ in range(times):
            for _ in client.enqueue_many("ten_steps", ({"n": n} for n in range(2000))):
                pass
            bench.server.stop("immediate")
            bench.server.start()
            waits.append(_goes_on(url))
        with connect(url, application_name="bench") as db:
            wait_for(lambda: _ended(db) == times * 2000, 120)
            after = _workers(db)
            row = db.execute("select count(*) from stepwell.outbox where outcome = 'interrupted'").fetchone()
    for each in fleet:
        bench.end(each)
    waits.sort()
    return {
        "workers_taken_for_dead": float(len(before - after)),
        "executions_interrupted": float(row[0] if row else 0),
        "goes_on_after_p50_s": waits[len(waits) // 2],
        "goes_on_after_slowest_s": waits[-1],
    }


def _goes_on(url: str) -> float:
    """Return in how many seconds the next run ends."""
    began = time.monotonic()
    with connect(url, application_name="bench") as db:
        ended = _ended(db)
        wait_for(lambda: _ended(db) > ended, 60)
    return time.monotonic() - began


@contextlib.contextmanager
def _reachable(bench: Bench, ground: Island) -> Iterator[str]:
    """Run a server that the island reaches, with the schema in it, and yield its URL."""
    home = bench.home / f"reachable-{time.monotonic_ns()}"
    home.mkdir()
    home.chmod(0o755)
    server = embedded.Server(
        home, bench.bin_dir, {**embedded.SERVER_SETTINGS, **SETTINGS, "listen_addresses": ground.host}
    )
    server.start()
    try:
        rules = Path(home) / "postgres" / "pg_hba.conf"
        with rules.open("a") as file:
            file.write(f"host all all {ground.host}/30 trust\n")
        with connect(server.running_url() or "", application_name="bench") as admin:
            admin.execute("select pg_reload_conf()")
            migrate(admin)
        yield f"postgresql://postgres@{ground.host}:{embedded.PORT}/postgres"
    finally:
        server.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


def _workers(db: psycopg.Connection[Any]) -> set[int]:
    return {int(row[0]) for row in db.execute("select id from stepwell.workers where dead_at is null")}


def _ended(db: psycopg.Connection[Any]) -> int:
    row = db.execute(
        "select coalesce(sum(value), 0)::int from stepwell.counters where kind = 'run'"
    ).fetchone()
    return int(row[0]) if row else 0
