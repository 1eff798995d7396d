"""A run that was interrupted and resumed by another process is one trace, and logs and hooks tell of the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from outbox import Client
from tests.crash.fleet import ROOT, Fleet
from tests.spans import Collector, collecting_spans
from tests.waiting import wait_until

pytestmark = pytest.mark.crash

APP = ROOT / "tests" / "crash" / "trace_flows.py"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting_spans() as running:
        yield running


@contextmanager
def fleet(url: str, home: Path, environment: dict[str, str]) -> Iterator[Fleet]:
    started = Fleet(url, home, app=APP, environment=environment, lost_lock_seconds=1.0, grace_seconds=5.0)
    try:
        yield started
    finally:
        started.stop()


def events(home: Path) -> list[dict[str, Any]]:
    path = home / "events"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines(home: Path) -> list[dict[str, Any]]:
    """Return what the supervisors and their workers have logged: every line is JSON."""
    return [json.loads(line) for log in sorted(home.glob("*.log")) for line in log.read_text().splitlines()]


@pytest.fixture
def enqueued(
    database_url: str, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], UUID]]:
    """Enqueues a run as a service does that has set up OpenTelemetry, below a span of its own."""
    provider = TracerProvider(shutdown_on_exit=False)
    endpoint = f"{collector.environment['OTEL_EXPORTER_OTLP_ENDPOINT']}/v1/traces"
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)

    def enqueue() -> UUID:
        with Client(database_url) as client, provider.get_tracer("shop").start_as_current_span("request"):
            return client.enqueue("ship", order=7).id

    yield enqueue
    provider.shutdown()


@pytest.mark.parametrize("by_whom", ["a service that traces", "SQL"])
def test_a_run_that_was_interrupted_and_resumed_on_another_worker_is_one_trace(
    database_url: str, tmp_path: Path, collector: Collector, enqueued: Callable[[], UUID], by_whom: str
) -> None:
    with fleet(database_url, tmp_path, collector.environment) as workers:
        workers.start()
        workers.start()
        with workers.gate("before-pack"):
            run = workers.enqueue("ship", order=7) if by_whom == "SQL" else enqueued()
            workers.reached("before-pack")
            # What a process has not exported yet dies with it.
            wait_until(
                lambda: {"claim ship", "step pick", "commit"} <= collector.spans.names().keys(),
                what="the spans of the first step",
            )
            held = workers.holder(run)
            workers.kill(held, "tree")
        workers.wait_for(run, "succeeded")
    spans = collector.spans
    spans.check_whole()
    names = {"run ship": 1, "claim ship": 2, "step pick": 1, "step pack": 2, "commit": 3}
    above = {"request": 1, "enqueue ship": 1}
    assert spans.names() == (names if by_whom == "SQL" else names | above)
    died, done = spans.one("step pack", execution=1), spans.one("step pack", execution=2)
    assert (died.outcome, died.failed, done.outcome, done.failed) == ("interrupted", True, "completed", False)
    first, other = spans.one("step pick").worker, done.worker
    assert first == str(held.worker) != other
    assert [span.worker for span in spans.named("claim ship")] == [first, other]
    root = spans.one("run ship")
    assert (root.worker, root.outcome) == (other, "succeeded")
    assert {span.parent for span in spans if span.name.startswith(("step", "claim", "commit"))} == {
        root.span_id
    }
    assert root.parent == ("" if by_whom == "SQL" else spans.one("enqueue ship").span_id)
    assert spans.roots[0].name == ("run ship" if by_whom == "SQL" else "request")
    assert {span.resource["service.name"] for span in spans.of_run(run) if span.worker} == {"stepwell"}


def test_lines_of_json_tell_of_which_run_and_step_they_are(
    database_url: str, tmp_path: Path, collector: Collector
) -> None:
    with fleet(database_url, tmp_path, collector.environment | {"STEPWELL_LOG_FORMAT": "json"}) as workers:
        workers.start()
        run = workers.enqueue("ship", order=7)
        workers.wait_for(run, "succeeded")
        ((worker,),) = workers.db.execute("select id from stepwell.workers").fetchall()
    said = {line["message"]: line for line in lines(tmp_path)}
    root, pack = collector.spans.one("run ship"), collector.spans.one("step pack")
    about = {
        "run_id": str(run),
        "workflow": "ship",
        "worker": worker,
        "logger": "shop",
        "trace_id": root.trace_id,
    }
    step = {"step": "pack", "path": "2", "execution": 1, "attempt": 1, "span_id": pack.span_id}
    packing = about | step | {"level": "WARNING", "order": 7}
    assert packing.items() <= said["packing"].items()
    assert (about | {"step": "pick", "path": "1"}).items() <= said["picked 7"].items()
    body = said["shipping"]
    assert (about | {"span_id": root.span_id}).items() <= body.items()
    assert "step" not in body
    assert all(
        {"timestamp", "level", "logger", "message", "process"} <= line.keys() for line in lines(tmp_path)
    )
    claiming = next(line for line in lines(tmp_path) if line["message"].startswith("claiming"))
    assert (claiming["worker"], "run_id" in claiming) == (worker, False)


def test_hooks_are_told_in_the_processes_in_which_it_happens(database_url: str, tmp_path: Path) -> None:
    with fleet(database_url, tmp_path, {}) as workers:
        workers.start()
        with workers.gate("before-pack"):
            run = workers.enqueue("ship", order=7)
            workers.reached("before-pack")
            held = workers.holder(run)
            wait_until(lambda: any(each["step"] == "pack" for each in events(tmp_path)))
            workers.kill(held, "worker")
        workers.wait_for(run, "succeeded")
        wait_until(lambda: any(each["event"] == "WorkerReclaimed" for each in events(tmp_path)))
        wait_until(lambda: any(each["event"] == "RunEnded" for each in events(tmp_path)))
    told = events(tmp_path)
    before = [(each["event"], each["step"], each["execution"]) for each in told if each["pid"] == held.pid]
    assert before == [("RunStarted", None, None), ("StepStarted", "pick", 1), ("StepStarted", "pack", 1)]
    after = [each for each in told if each["pid"] != held.pid]
    assert len({each["pid"] for each in after}) == 1
    assert [(each["event"], each["step"], each["execution"]) for each in after if each["dead"] is None] == [
        ("StepInterrupted", "pack", 1), ("StepStarted", "pack", 2), ("RunEnded", None, None),
    ]  # fmt: skip
    (reclaimed,) = [each for each in after if each["dead"]]
    assert (reclaimed["dead"], reclaimed["detector"], reclaimed["tasks"]) == (held.worker, "obituary", 1)
    assert [each["state"] for each in after if each["state"]] == ["succeeded"]
    logged = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert logged.count("the hook failing failed at RunEnded") == 1, (
        "a hook that fails is told of, and nothing else happens"
    )


def test_without_an_endpoint_nothing_of_opentelemetry_is_loaded(database_url: str, tmp_path: Path) -> None:
    with fleet(database_url, tmp_path, {}) as workers:
        for name in [each for each in workers.environment if each.startswith("OTEL_")]:
            del workers.environment[name]
        workers.start()
        run = workers.enqueue("looking")
        workers.wait_for(run, "succeeded")
        assert workers.db.execute("select output from stepwell.runs").fetchall() == [([],)]
