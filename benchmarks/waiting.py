"""What is measured of runs that wait, fan out, are cancelled, and live long."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

from psycopg import Connection

from benchmarks.machine import Bench, wait_for
from benchmarks.scenarios import children_of, start_latency
from benchmarks.workload import many_steps
from outbox import Client
from outbox.codec import fingerprint
from outbox.database import connect
from worker.replay.decisions import Finish
from worker.replay.driver import Replay
from worker.replay.records import Record, RunFacts

FALL_ASLEEP = """
update stepwell.tasks set attempt = 1, fresh = false, doing = '{1}', driven = 0, started_at = clock_timestamp()
"""
WAKE = """
update stepwell.tasks set due_at = clock_timestamp() + interval '2 seconds'
where id in (select id from stepwell.tasks order by id limit %s)
returning due_at
"""


def fan_out(bench: Bench, items: int) -> dict[str, float]:
    """Map one run over no-op steps, on two workers: how fast, and what part the lazier one had."""
    url = bench.fresh()
    with Client(url) as client, connect(url, application_name="bench") as db, bench.workers(url, 2):
        client.enqueue("fan_out", {"items": 500}).result(60)  # the workers have everything loaded
        started = time.monotonic()
        run = client.enqueue("fan_out", {"items": items})
        wait_for(lambda: _state(db, run.id) != "open", 120)
        seconds = time.monotonic() - started
        shares = db.execute(
            "select count(*) from stepwell.outbox where run_id = %s and kind = 'step' group by worker",
            (run.id,),
        ).fetchall()
        assert sum(each[0] for each in shares) == items
    return {"steps_per_second": items / seconds, "smaller_share": min(each[0] for each in shares) / items}


def cancel_latency(bench: Bench, samples: int) -> dict[str, float]:
    """Cancel runs that sleep for a day, one by one: how long until they are cancelled."""
    url = bench.fresh()
    with Client(url) as client, connect(url, application_name="bench") as db, bench.workers(url, 1):
        runs = [client.enqueue("nap", {"seconds": 86400.0, "word": f"c{n}"}) for n in range(samples)]
        wait_for(lambda: _count(db, "state = 'waiting'") == samples, 60)
        waits = []
        for run in runs:
            before = time.monotonic()
            client.cancel(run.id)
            while _state(db, run.id) != "cancelled":
                time.sleep(0.001)
            waits.append((time.monotonic() - before) * 1000)
            time.sleep(0.02)
    waits.sort()
    return {"p50_ms": waits[len(waits) // 2], "p99_ms": waits[int(len(waits) * 0.99) - 1]}


def sleepers(bench: Bench, sleeping: int, due: int) -> dict[str, float]:
    """Sleep so many runs, and wake some of them in one second: memory, latency beside them, and when the last starts."""
    beside_none = start_latency(bench, 110)
    log = bench.home / f"sleepers-{time.monotonic_ns()}"
    url = bench.fresh()
    with Client(url) as client, connect(url, application_name="bench") as db:
        inputs = ({"seconds": 86400.0, "word": "s"} for _ in range(sleeping))
        for _ in client.enqueue_many("nap", inputs, delay=86400.0):
            pass
        db.execute(FALL_ASLEEP)
        db.execute("vacuum analyze stepwell.tasks")
        db.execute("checkpoint")
        beside_many = start_latency(bench, 110, url=url)
        with bench.workers(url, 2, STEPWELL_BENCH_LOG=str(log)) as supervisor:
            pids = children_of(supervisor.pid)
            idle = max(_rss_mb(pid) for pid in pids)
            db.execute(WAKE, (due,))
            time.sleep(2.0)
            began = time.monotonic()
            # Seldom: reading it all the time would take a good part of a core from the workers.
            wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= due, 120, every=0.05)
            seconds = time.monotonic() - began
            busy = max(_rss_mb(pid) for pid in pids)
    return {
        "worker_rss_mb_idle": idle,
        "worker_rss_mb_busy": busy,
        "all_due_started_s": seconds,
        "start_p50_ms": beside_many["p50_ms"],
        "start_p50_ms_without": beside_none["p50_ms"],
    }


def long_run(bench: Bench, steps: int) -> dict[str, float]:
    """Make one run take very many steps: the rate at its beginning and at its end, and the memory that it adds."""
    url = bench.fresh()
    tenth = steps // 10
    with Client(url) as client, connect(url, application_name="bench") as db:
        with bench.workers(url, 1) as supervisor:
            (pid,) = children_of(supervisor.pid)
            client.enqueue("many_steps", {"steps": 100}).result(60)
            before = _rss_mb(pid)
            run = client.enqueue("many_steps", {"steps": steps})
            moments = []
            for reached in (0, tenth, steps - tenth, steps):
                wait_for(lambda reached=reached: _recorded(db, run.id) >= reached, 600)
                moments.append((time.monotonic(), _recorded(db, run.id)))
            after = _rss_mb(pid)
        (early, late) = (_rate(*moments[:2]), _rate(*moments[2:]))
    return {"steps_per_second_early": early, "late_by_early": late / early, "rss_mb_added": after - before}


def replay(_: Bench, steps: int) -> dict[str, float]:
    """Replay a history of so many steps, in this process, without a database."""
    moment = datetime.now(UTC)
    history = [
        Record(
            (n,), 0, "step", "first", "completed", str(n), None, fingerprint(f'{{"n":{n - 1}}}'), moment, n
        )
        for n in range(1, steps + 1)
    ]
    facts = RunFacts(UUID(int=1), "many_steps", moment, UUID(int=1))
    began = time.monotonic()
    decision = Replay(many_steps, f'{{"steps":{steps}}}', facts, history, driven=steps).start()
    seconds = time.monotonic() - began
    assert isinstance(decision, Finish), decision
    return {"seconds": seconds, "us_per_step": 1e6 * seconds / steps}


def _state(db: Connection[Any], run: UUID) -> str:
    row = db.execute("select state from stepwell.runs where id = %s", (run,)).fetchone()
    return str(row[0]) if row else ""


def _count(db: Connection[Any], condition: LiteralString) -> int:
    row = db.execute(f"select count(*) from stepwell.tasks where {condition}").fetchone()  # noqa: S608 - text of this file
    return int(row[0]) if row else 0


def _recorded(db: Connection[Any], run: UUID) -> int:
    row = db.execute("select max(seq) from stepwell.outbox where run_id = %s", (run,)).fetchone()
    return int(row[0] or 0) if row else 0


def _rate(before: tuple[float, int], after: tuple[float, int]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def _rss_mb(pid: int) -> float:
    line = next(
        each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024
