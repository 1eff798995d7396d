"""What is measured. Each function takes one measurement and returns its figures."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.machine import Bench, living, wait_for
from outbox import Client
from outbox.database import connect

PGBENCH_SCRIPT = """\\set run random(1, 100000)
begin;
insert into floor_steps (run, step, value) values (:run, 1, '"one"');
update floor_runs set step = 1 where id = :run;
commit;
begin;
insert into floor_steps (run, step, value) values (:run, 2, '"two"');
update floor_runs set step = 2 where id = :run;
commit;
"""


PGBENCH_BATCHES = """insert into floor_rows (n, value)
select n, '"a value"' from generate_series(1, 500) n;
"""


def floor(bench: Bench, seconds: int, *, clients: int = 8) -> dict[str, float]:
    """Postgres itself: a two-step workflow as two transactions, by pgbench."""
    url = bench.fresh()
    with connect(url, application_name="bench") as db:
        db.execute("create table floor_steps (run int, step int, value json, at timestamptz default now())")
        db.execute(
            "create table floor_runs (id int primary key, step int not null default 0) with (fillfactor = 70)"
        )
        db.execute("insert into floor_runs (id) select generate_series(1, 100000)")
    return {"runs_per_second": _pgbench(bench, url, PGBENCH_SCRIPT, seconds, clients)}


def ceiling(bench: Bench, seconds: int, *, clients: int = 8) -> dict[str, float]:
    """Postgres itself: rows inserted in batches of 500, each batch a transaction, by pgbench."""
    url = bench.fresh()
    with connect(url, application_name="bench") as db:
        db.execute(
            "create table floor_rows (id bigint generated always as identity primary key, n int, value json,"
            " at timestamptz default now())"
        )
    return {"rows_per_second": 500 * _pgbench(bench, url, PGBENCH_BATCHES, seconds, clients)}


def _pgbench(bench: Bench, url: str, script: str, seconds: int, clients: int) -> float:
    """Return the transactions of a script that so many clients make in a second."""
    file = bench.home / "pgbench.sql"
    file.write_text(script)
    said = subprocess.run(
        [
            bench.bin_dir / "pgbench", "-n", "-M", "prepared", "-c", str(clients), "-j", str(min(2, clients)),
            "-T", str(seconds), "-f", file, url,
        ],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    line = next(line for line in said.splitlines() if line.startswith("tps = "))
    return float(line.split()[2])


def enqueue_in_bulk(bench: Bench, runs: int) -> dict[str, float]:
    """Enqueue from one Python client, in chunks of 1,000, each committed."""
    with Client(bench.fresh()) as client:
        started = time.monotonic()
        count = sum(1 for _ in client.enqueue_many("two_steps", ({"n": n} for n in range(runs))))
        return {"runs_per_second": count / (time.monotonic() - started)}


def throughput(bench: Bench, workflow: str, processes: int, runs: int) -> dict[str, float]:
    """Drain runs that were enqueued beforehand, and count what each cost."""
    url = bench.fresh()
    with Client(url) as client, connect(url, application_name="bench") as db:
        for _ in client.enqueue_many(workflow, ({"n": n} for n in range(runs))):
            pass
        db.execute("vacuum analyze")
        db.execute("checkpoint")

        def done() -> int:
            row = db.execute(
                "select coalesce(sum(value), 0)::int from stepwell.counters where kind = 'run'"
            ).fetchone()
            return int(row[0]) if row else 0

        cost = _Cost(url)
        with bench.workers(url, processes) as supervisor:
            wait_for(done, 60)
            started, early = time.monotonic(), done()
            while (now := done()) < runs:
                time.sleep(0.05)
            seconds = time.monotonic() - started
            cpu = _cpu_seconds(supervisor.pid)
        figures = {"runs_per_second": (now - early) / seconds, "worker_cpu_ms_per_run": 1000 * cpu / runs}
        return figures | cost.per_run(runs)


def start_latency(bench: Bench, samples: int, *, url: str | None = None) -> dict[str, float]:
    """Enqueue on an idle worker, one by one, and see when the step starts."""
    log = bench.home / f"latency-{time.monotonic_ns()}"
    url = url or bench.fresh()
    with Client(url) as client, bench.workers(url, 1, STEPWELL_BENCH_LOG=str(log)):
        waits = []
        for n in range(samples):
            before = time.monotonic_ns()
            client.enqueue("start", {"word": f"s{n}"})
            waits.append((told(log, f"s{n}")[0] - before) / 1e6)
            time.sleep(0.05)
    waits = sorted(waits[10:])
    return {"p50_ms": waits[len(waits) // 2], "p99_ms": waits[int(len(waits) * 0.99) - 1]}


def recovery(bench: Bench, victim: str, samples: int) -> dict[str, float]:
    """SIGKILL what executes a step, and see when it runs elsewhere."""
    log = bench.home / f"recovery-{victim}-{time.monotonic_ns()}"
    url = bench.fresh()
    environment = {"STEPWELL_BENCH_LOG": str(log), "STEPWELL_POISON_AFTER": "1000"}
    fleet = [bench.start(url, 2, **environment) for _ in range(2)]
    waits = []
    try:
        with Client(url) as client, connect(url, application_name="bench") as db:
            for n in range(samples):
                wait_for(lambda: living(db) == 4, 60)  # each kill meets the whole fleet
                client.enqueue("lingering", {"word": f"r{n}"})
                _, pid = told(log, f"r{n}")
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                killed = time.monotonic_ns()
                if victim == "worker":
                    os.kill(pid, signal.SIGKILL)
                else:
                    _kill_tree(parent)
                at, _ = told(log, f"r{n}", other_than=pid)
                waits.append((at - killed) / 1e9)
                if victim == "tree":
                    dead = next(each for each in fleet if each.pid == parent)
                    dead.wait(10)
                    wait_for(lambda: living(db) == 2, 60)  # its other worker is buried a moment later
                    fleet = [each for each in fleet if each is not dead] + [
                        bench.start(url, 2, **environment)
                    ]
    finally:
        for each in fleet:
            _kill_tree(each.pid)
            each.wait(10)
    waits.sort()
    return {"p50_s": waits[len(waits) // 2], "p99_s": waits[-1]}  # of so few, the slowest


class _Cost:
    """What the database did since this was made: commits, statements where the server can say, WAL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = self._read()

    def per_run(self, runs: int) -> dict[str, float]:
        after = self._read()
        return {name: (after[name] - self._before[name]) / runs for name in after}

    def _read(self) -> dict[str, float]:
        with connect(self._url, application_name="bench") as db:
            db.execute("select pg_stat_force_next_flush()")
            row = db.execute(
                "select xact_commit, pg_current_wal_lsn() - '0/0'::pg_lsn from pg_stat_database"
                " where datname = current_database()"
            ).fetchone()
            assert row is not None
            figures = {"commits_per_run": float(row[0]), "wal_bytes_per_run": float(row[1])}
            if db.execute("select to_regclass('pg_stat_statements')").fetchone() != (None,):
                calls = db.execute(
                    "select sum(calls) from pg_stat_statements where toplevel and dbid = (select oid from pg_database"
                    " where datname = current_database())"
                ).fetchone()
                figures["statements_per_run"] = float(calls[0] or 0) if calls else 0.0
        return figures


def told(log: Path, word: str, other_than: int | None = None) -> tuple[int, int]:
    """Wait for a line of the workload; return its time (ns) and process."""
    for _ in itertools.count():
        if log.exists():
            for line in log.read_text().splitlines():
                said, at, pid = line.split()
                if said == word and int(pid) != other_than:
                    return int(at), int(pid)
        time.sleep(0.001)
    raise AssertionError


def children_of(pid: int) -> list[int]:
    """Return the workers of a supervisor."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _kill_tree(pid: int) -> None:
    for each in (pid, *children_of(pid)):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _cpu_seconds(supervisor: int) -> float:
    """Return the CPU time of a supervisor's workers so far."""
    ticks = 0
    for pid in children_of(supervisor):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
