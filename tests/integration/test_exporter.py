"""What /metrics, /healthz and /readyz answer, and which of several supervisors exports the database."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from outbox.database import connect
from outbox.errors import ConfigError
from tests.postgres import Cluster
from tests.waiting import wait_until
from worker.telemetry import exporter as exporter_module
from worker.telemetry.exporter import Exporter
from worker.telemetry.files import VARIABLE, ProcessFiles, shared_directory
from worker.telemetry.snapshot import Totals, read_totals

Db = psycopg.Connection[Any]
WORKER = 4711


@contextmanager
def serving(
    url: str,
    directory: Path,
    not_ready: Callable[[], list[str]] = list,
    is_alive: Callable[[], bool] = lambda: True,
) -> Iterator[Exporter]:
    with Exporter(
        url, directory=directory, host="127.0.0.1", port=0, not_ready=not_ready, is_alive=is_alive
    ) as exporter:
        yield exporter


def get(exporter: Exporter, path: str) -> tuple[int, str]:
    try:
        with urlopen(exporter.address + path, timeout=10) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def samples(exporter: Exporter) -> dict[tuple[str, ...], float]:
    """Return (sample name, label values in the order of their labels' names) → value of one scrape."""
    status, text = get(exporter, "/metrics")
    assert status == 200
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def exports_database(exporter: Exporter) -> bool:
    return ("stepwell_workers",) in samples(exporter)


def register(db: Db) -> None:
    db.execute("select stepwell.register_v1(%s, 1, 'here', 1, '', array['default'], array['w'])", [WORKER])


def enqueue(db: Db, count: int = 1, **options: Any) -> None:
    settings = "".join(f", {name} => %({name})s" for name in options)
    db.execute(
        f"select stepwell.enqueue('w', '{{}}'{settings}) from generate_series(1, {count})".encode(), options
    )


def claim(db: Db, at_most: int = 100) -> list[tuple[Any, ...]]:
    floors = [0] * 20
    statement = "select task, attempt, position, run_id, epoch from stepwell.claim_v1(%s, 'default', array['w'], %s, %s)"
    return db.execute(statement, [WORKER, at_most, floors]).fetchall()


def finish(db: Db, claimed: list[tuple[Any, ...]], state: str = "succeeded") -> None:
    """End claimed runs in one flush, each with one step."""
    transitions, records, ends = [], [], []
    for i, (task, attempt, position, run_id, epoch) in enumerate(claimed, 1):
        run = {"i": i, "task": task, "run_id": str(run_id), "epoch": epoch}
        transitions.append({**run, "attempt": attempt, "position": position, "then": "finish", "records": 2})
        step = {"kind": "step", "name": "s", "path": [1], "outcome": "completed"}
        records += [
            {**run, **step, "k": 1, "n": 0, "at": "2026-11-22T12:00:00Z"},
            {
                **run,
                "kind": "run",
                "name": "w",
                "path": [],
                "outcome": state,
                "k": 2,
                "n": 0,
                "at": "2026-11-22T12:00:00Z",
            },
        ]
        ends.append({**run, "state": state, "output": None, "error": None})
    texts = [json.dumps(each) for each in (transitions, records, ends)]
    verdicts = db.execute("select stepwell.flush_v1(%s, %s, %s, %s)", [WORKER, *texts]).fetchone()
    assert verdicts == ([1] * len(claimed),)


def test_totals_are_those_of_the_history_at_the_time_of_the_scrape(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    register(db)
    with serving(database_url, tmp_path) as exporter:
        samples(exporter)
        for ended, state in ((3, "succeeded"), (1, "failed"), (2, "succeeded")):
            enqueue(db, ended)
            finish(db, claim(db), state)
            seen = samples(exporter)
            history = db.execute(
                "select kind, outcome, name, count(*) from stepwell.outbox group by 1, 2, 3"
            ).fetchall()
            exported = {
                (name.removeprefix("stepwell_").removesuffix("s_total"), *rest, value)
                for (name, *rest), value in seen.items()
                if name in ("stepwell_runs_total", "stepwell_steps_total")
            }
            assert exported == set(history)


def test_queues_are_exported_with_all_states_and_the_age_of_the_oldest_ready_task(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    register(db)
    enqueue(db, 3)
    enqueue(db, 2, queue="slow")
    enqueue(db, 1, delay="1 hour")
    claim(db, 1)
    db.execute("update stepwell.runs set created_at = created_at - interval '100 s' where queue = 'slow'")
    with serving(database_url, tmp_path) as exporter:
        seen = samples(exporter)
    counts = {key[1:]: value for key, value in seen.items() if key[0] == "stepwell_queue_tasks"}
    assert counts["default", "ready"] == 2
    assert counts["default", "claimed"] == counts["default", "waiting"] == 1
    assert counts["slow", "ready"] == 2
    assert counts["slow", "suspect"] == 0
    assert 100 <= seen["stepwell_queue_oldest_ready_seconds", "slow"] < 200
    assert 0 <= seen["stepwell_queue_oldest_ready_seconds", "default"] < 60
    assert counts["slow", "paused"] == 0
    assert seen["stepwell_workers",] == 1
    assert seen["stepwell_runs_blocked",] == 0


def test_each_queue_is_exported_with_the_workers_that_claim_from_it(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    for worker, queues in ((1, ["default"]), (2, ["default", "slow"]), (3, ["slow", "slow"]), (4, ["slow"])):
        db.execute("select stepwell.register_v1(%s, 1, 'here', 1, '', %s, array['w'])", [worker, queues])
    db.execute("select stepwell.bury_v1(4)")
    enqueue(db, 1, queue="forgotten")
    with serving(database_url, tmp_path) as exporter:
        seen = samples(exporter)
    serving_it = {key[1]: value for key, value in seen.items() if key[0] == "stepwell_queue_workers"}
    assert serving_it == {"default": 2, "slow": 2, "forgotten": 0}
    assert seen["stepwell_queue_tasks", "forgotten", "ready"] == 1


def test_a_worker_that_several_declare_dead_is_counted_once_under_what_noticed_it_first(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    register(db)
    with serving(database_url, tmp_path) as exporter:
        seen = samples(exporter)
        assert [seen["stepwell_reclaims_total", each] for each in ("obituary", "lost_lock", "lease")] == [
            0,
            0,
            0,
        ]
        for detector in ("lost_lock", "lease", "lost_lock"):
            assert db.execute("select stepwell.bury_v1(%s, %s)", [WORKER, detector]).fetchone() == (True,)
        assert db.execute("select stepwell.bury_v1(%s, 'lease')", [WORKER + 1]).fetchone() == (False,)
        seen = samples(exporter)
        assert [seen["stepwell_reclaims_total", each] for each in ("obituary", "lost_lock", "lease")] == [
            0,
            1,
            0,
        ]


def test_tables_are_exported_with_their_size_and_what_vacuum_has_not_removed(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    register(db)
    enqueue(db, 500)
    db.execute("delete from stepwell.tasks")
    with serving(database_url, tmp_path) as exporter:
        wait_until(lambda: samples(exporter)["stepwell_table_dead_rows", "tasks"] >= 500)
        seen = samples(exporter)
    assert seen["stepwell_table_bytes", "runs"] > 500 * 50
    assert {"outbox", "tasks", "workers"} <= {key[1] for key in seen if key[0] == "stepwell_table_bytes"}


def test_an_exporter_that_nobody_scrapes_looks_after_its_lock_only(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "REFRESH_SECONDS", 0.01)
    looks: list[None] = []
    reads: list[None] = []

    def read(connection: Db) -> Totals:
        reads.append(None)
        return read_totals(connection)

    monkeypatch.setattr(exporter_module, "read_totals", read)
    metrics = exporter_module.DatabaseMetrics(database_url, on_refresh=lambda: looks.append(None))
    metrics.start()
    try:
        wait_until(lambda: len(looks) >= 10)
        assert reads == []
        for scrapes in (1, 2):
            assert "stepwell_workers" in {family.name for family in metrics.collect()}
            before = len(looks)
            wait_until(lambda: len(looks) >= before + 10)  # noqa: B023 - called before the next round
            assert len(reads) == scrapes
    finally:
        metrics.stop()


def test_a_retried_run_of_long_ago_does_not_look_like_a_long_wait(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    register(db)
    enqueue(db)
    finish(db, claim(db), "failed")
    db.execute("update stepwell.runs set created_at = created_at - interval '1 day'")
    db.execute("select stepwell.retry(id) from stepwell.runs")
    with serving(database_url, tmp_path) as exporter:
        assert samples(exporter)["stepwell_queue_oldest_ready_seconds", "default"] < 60


def test_blocked_runs_are_counted_until_they_are_retried(db: Db, database_url: str, tmp_path: Path) -> None:
    register(db)
    enqueue(db, 2)
    finish(db, claim(db), "blocked")
    with serving(database_url, tmp_path) as exporter:
        assert samples(exporter)["stepwell_runs_blocked",] == 2
        db.execute("select stepwell.retry(id) from stepwell.runs limit 1")
        wait_until(lambda: samples(exporter)["stepwell_runs_blocked",] == 1)


def test_the_oldest_open_transaction_is_seen(db: Db, database_url: str, tmp_path: Path) -> None:
    with connect(database_url, application_name="hog", autocommit=False) as hog:
        hog.execute("select 1")
        with serving(database_url, tmp_path) as exporter:
            first = samples(exporter)["stepwell_oldest_transaction_seconds",]
            assert 0 < first < 60
            wait_until(lambda: samples(exporter)["stepwell_oldest_transaction_seconds",] > first)


def test_one_of_two_exports_the_database_and_the_other_takes_over(database_url: str, tmp_path: Path) -> None:
    with serving(database_url, tmp_path) as second_to_be, serving(database_url, tmp_path) as first:
        one, other = (first, second_to_be) if exports_database(first) else (second_to_be, first)
        assert exports_database(one)
        assert not exports_database(other)
        assert get(other, "/readyz")[0] == 200
        one.stop()
        wait_until(lambda: exports_database(other))
        one.stop()


def test_the_exporter_comes_back_after_the_database_restarts(
    cluster: Cluster, database_url: str, tmp_path: Path
) -> None:
    with serving(database_url, tmp_path) as exporter:
        assert exports_database(exporter)
        cluster.stop("immediate")
        assert not exports_database(exporter)
        status, text = get(exporter, "/readyz")
        assert status == 503
        assert len(json.loads(text)["reasons"]) == 1
        assert get(exporter, "/healthz")[0] == 200
        cluster.start()
        wait_until(lambda: exports_database(exporter))
        assert get(exporter, "/readyz")[0] == 200


def test_a_supervisor_whose_loop_hangs_is_not_alive(database_url: str, tmp_path: Path) -> None:
    turning = [True]
    with serving(database_url, tmp_path, is_alive=lambda: turning[0]) as exporter:
        assert get(exporter, "/healthz") == (200, '{"status": "alive"}\n')
        turning[0] = False
        assert get(exporter, "/healthz")[0] == 503


def test_a_database_that_does_not_answer_does_not_hold_up_a_scrape(
    db: Db, database_url: str, tmp_path: Path
) -> None:
    with serving(database_url, tmp_path) as exporter:
        assert exports_database(exporter)
        with db.transaction():
            db.execute("lock table stepwell.counters")
            assert not exports_database(exporter)
            assert "not answered" in get(exporter, "/readyz")[1]
        wait_until(lambda: exports_database(exporter))


def test_readiness_says_what_the_supervisor_and_the_schema_lack(
    empty_database_url: str, tmp_path: Path
) -> None:
    with serving(empty_database_url, tmp_path, lambda: ["worker 1 is starting"]) as exporter:
        status, text = get(exporter, "/readyz")
    assert status == 503
    missing, starting = json.loads(text)["reasons"]
    assert "stepwell migrate" in missing
    assert starting == "worker 1 is starting"


def test_unknown_pages_say_what_there_is(database_url: str, tmp_path: Path) -> None:
    with serving(database_url, tmp_path) as exporter:
        status, text = get(exporter, "/")
    assert status == 404
    assert "/metrics" in text


def test_every_metric_has_a_help_text(database_url: str, tmp_path: Path) -> None:
    count_in_a_process(tmp_path)
    with serving(database_url, tmp_path) as exporter:
        families = list(text_string_to_metric_families(get(exporter, "/metrics")[1]))
    assert {"stepwell_claims", "stepwell_workers", "stepwell_reclaims"} <= {
        family.name for family in families
    }
    assert [family.name for family in families if not family.documentation.endswith(".")] == []


def test_a_port_that_is_taken_is_said_in_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--metrics-port"):
            Exporter(
                "postgresql:///x",
                directory=tmp_path,
                host="127.0.0.1",
                port=port,
                not_ready=list,
                is_alive=lambda: True,
            )


# -- the files of processes ----------------------------------------------------------------------------


def count_in_a_process(directory: Path, code: str = "", *, kill: bool = False) -> None:
    """Claim three tasks and observe one commit in a process that then ends, or is killed."""
    counting = (
        "import os, signal\nfrom worker.telemetry import metrics\nmetrics.CLAIMS.inc(3)\nmetrics.COMMIT_SECONDS.observe(0.003)\n"
        "metrics.SLOTS.labels('busy').set(7)\n"
    )
    ending = "os.kill(os.getpid(), signal.SIGKILL)\n" if kill else ""
    done = subprocess.run(
        [sys.executable, "-c", counting + code + ending],
        env={**os.environ, VARIABLE: str(directory)},
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if kill else 0)


def values(directory: Path) -> dict[str, float]:
    return {
        sample.name: sample.value
        for metric in ProcessFiles(directory).collect()
        for sample in metric.samples
        if not sample.labels
    }


def test_what_killed_processes_counted_stays_and_their_slots_go(tmp_path: Path) -> None:
    for _ in range(3):
        count_in_a_process(tmp_path, kill=True)
    for _ in range(2):  # folding twice adds nothing
        seen = values(tmp_path)
        assert seen["stepwell_claims_total"] == 9
        assert seen["stepwell_commit_seconds_count"] == 3
        assert seen["stepwell_commit_seconds_sum"] == pytest.approx(0.009)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["counter_dead.db", "histogram_dead.db"]


def test_slots_of_living_processes_are_added_up(tmp_path: Path) -> None:
    waiting = "import sys\nprint(flush=True)\nsys.stdin.read()\n"
    command = [
        sys.executable,
        "-c",
        f"from worker.telemetry import metrics\nmetrics.SLOTS.labels('busy').set(7)\n{waiting}",
    ]
    environment = {**os.environ, VARIABLE: str(tmp_path)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        for process in (one, other):
            assert process.stdout is not None
            process.stdout.readline()

        def busy() -> float:
            slots = [m for m in ProcessFiles(tmp_path).collect() if m.name == "stepwell_slots"]
            return sum(sample.value for metric in slots for sample in metric.samples)

        assert busy() == 14
        one.kill()
        one.wait()
        assert busy() == 7
        other.kill()


def test_a_file_that_is_just_being_created_does_not_break_a_scrape(tmp_path: Path) -> None:
    count_in_a_process(tmp_path, kill=True)
    (tmp_path / "counter_999999999.db").touch()  # its process died before it had written anything
    assert values(tmp_path)["stepwell_claims_total"] == 3


def test_the_shared_directory_goes_with_its_supervisor_and_killed_ones_are_swept() -> None:
    code = (
        "import os, signal\nfrom worker.telemetry.files import shared_directory\n"
        "with shared_directory() as directory:\n"
        "    (directory / 'counter_1.db').touch()\n    print(directory, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    abandoned = Path(killed.stdout.strip())
    assert abandoned.exists()
    before = os.environ.get(VARIABLE)
    with shared_directory() as outer:
        assert not abandoned.exists()
        (outer / "counter_1.db").touch()
        with shared_directory() as inner:
            assert inner != outer
            assert os.environ[VARIABLE] == str(inner)
            assert outer.exists()
        assert not inner.exists()
    assert not outer.exists()
    assert os.environ.get(VARIABLE) == before
