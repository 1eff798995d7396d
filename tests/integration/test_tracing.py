"""Traces of runs on engines of the test's own process, some of which die: which spans there are, and what is below what."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg
import pytest
import pytest_asyncio
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from tenacity import stop_after_attempt, wait_fixed

from outbox import AsyncClient, Client
from tests import effects
from tests.effects import Gate
from tests.engines import Lab, at, counted, until
from tests.spans import Memory, Span, Spans
from tests.waiting import wait_until_async
from worker import (
    call,
    continue_as,
    gather,
    retrying,
    sleep,
    start,
    step,
    transaction,
    wait_signal,
    workflow,
)
from worker.definitions import collecting
from worker.engine.claims import DeclaredDead
from worker.testing import StepwellTest

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = SAMPLED.removesuffix("01") + "00"
TRACE, PARENT = SAMPLED.split("-")[1:3]


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> Any:
    """What an application that has set up OpenTelemetry makes spans with, for as long as the test."""
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", memory.provider)
    return memory.provider.get_tracer("application")


def below(spans: Spans, parent: Span) -> list[str]:
    return sorted(span.name for span in spans if span.parent == parent.span_id)


def two_steps() -> Any:
    with collecting() as registry:

        @step
        async def greet(name: str) -> str:
            return f"hello {name}"

        @step
        def count(text: str) -> int:
            return len(text)

        @workflow(version="7")
        async def flow(name: str) -> int:
            return count(await greet(name))

    return registry


# -- one run ---------------------------------------------------------------------------------------------


async def test_a_run_is_one_trace_from_claim_to_commit(lab: Lab, memory: Memory) -> None:
    async with lab.engine(two_steps(), tracing=memory.tracing()) as engine:
        run = await lab.enqueue("flow", {"name": "Ada"}, version="7")
        assert await lab.succeeded(run) == 9
        worker = str(engine.id)
    spans = memory.spans
    spans.check_whole()
    assert spans.names() == {"claim flow": 1, "step greet": 1, "step count": 1, "commit": 2, "run flow": 1}
    root = spans.one("run flow")
    assert (root.parent, root.kind, root.failed, root.outcome) == ("", "CONSUMER", False, "succeeded")
    assert below(spans, root) == ["claim flow", "commit", "commit", "step count", "step greet"]
    assert root.attributes["messaging.system"] == "stepwell"
    assert root.attributes["messaging.operation.type"] == "process"
    assert root.attributes["messaging.destination.name"] == "default"
    assert root.attributes["messaging.message.id"] == str(run)
    assert root.attributes["stepwell.workflow.version"] == "7"
    executed = spans.one("step count")
    told = {
        "step": "count",
        "path": "2",
        "execution": 1,
        "attempt": 1,
        "outcome": "completed",
        "worker": worker,
    }
    assert {f"stepwell.{name}": value for name, value in told.items()}.items() <= executed.attributes.items()
    assert spans.one("claim flow").attributes["messaging.operation.type"] == "receive"
    assert spans.one("commit", then="finish").attributes["messaging.operation.type"] == "settle"
    assert all(root.start <= span.start <= span.end <= root.end for span in spans)


async def test_the_trace_of_a_run_can_be_told_without_its_spans(lab: Lab, memory: Memory) -> None:
    async with lab.engine(two_steps(), tracing=memory.tracing()):
        derived = await lab.enqueue("flow", {"name": "Ada"}, version="7")
        given = await lab.enqueue("flow", {"name": "Ada"}, version="7", trace=SAMPLED)
        await lab.succeeded(derived)
        await lab.succeeded(given)
    with Client(lab.url) as client:
        assert client.get(derived).trace_id == memory.spans.of_run(derived)[0].trace_id
        assert client.get(given).trace_id == TRACE == memory.spans.of_run(given)[0].trace_id
        assert {run.trace_id for run in client.list()} == {span.trace_id for span in memory.spans}


async def test_a_run_goes_on_with_the_context_that_it_was_enqueued_in(lab: Lab, memory: Memory) -> None:
    async with lab.engine(two_steps(), tracing=memory.tracing()):
        run = await lab.enqueue("flow", {"name": "Ada"}, version="7", trace=f"{SAMPLED} vendor=1,other=2")
        await lab.succeeded(run)
    assert {span.trace_id for span in memory.spans} == {TRACE}
    assert memory.spans.one("run flow").parent == PARENT


async def test_what_the_caller_does_not_sample_is_not_traced(lab: Lab, memory: Memory) -> None:
    """Nor is what it calls: the decision is handed on to children."""
    with collecting() as registry:

        @workflow
        async def child() -> int:
            return 7

        @workflow
        async def parent() -> int:
            return await child()

    async with lab.engine(registry, tracing=memory.tracing()):
        run = await lab.enqueue(parent, trace=NOT_SAMPLED)
        assert await lab.succeeded(run) == 7
    assert memory.spans == []
    rows = await lab.execute("select trace from stepwell.runs where parent_id = %s", [run])
    assert rows[0][0].startswith(f"00-{TRACE}-")
    assert rows[0][0].endswith("-00")
    assert PARENT not in rows[0][0]


async def test_the_sampler_of_the_provider_decides_about_a_whole_run(lab: Lab) -> None:
    kept = Memory(ParentBased(TraceIdRatioBased(0.5)))
    async with lab.engine(two_steps(), tracing=kept.tracing()):
        runs = [await lab.enqueue("flow", {"name": "Ada"}, version="7") for _ in range(40)]
        for run in runs:
            await lab.succeeded(run)
    sizes = [len(kept.spans.of_run(run)) for run in runs]
    assert set(sizes) == {0, 6}, "each run is traced wholly, or not at all"
    assert 5 < sizes.count(6) < 35
    nothing = Memory(ALWAYS_OFF)
    async with lab.engine(two_steps(), tracing=nothing.tracing()):
        await lab.succeeded(await lab.enqueue("flow", {"name": "Ada"}, version="7"))
    assert nothing.spans == []


async def test_replayed_steps_have_no_second_span(lab: Lab, memory: Memory) -> None:
    with collecting() as registry:

        @step
        async def note(n: int) -> int:
            return n

        @workflow
        async def resting() -> int:
            before = await note(1)
            await sleep(0.05)
            return before + await note(2)

    async with lab.engine(registry, tracing=memory.tracing()):
        assert await lab.succeeded(await lab.enqueue(resting)) == 3
    memory.spans.check_whole()
    names = memory.spans.names()
    assert (names["claim resting"], names["step note"], names["run resting"]) == (2, 2, 1)
    assert [span.attributes["stepwell.path"] for span in memory.spans.named("step note")] == ["1", "3"]


async def test_each_try_of_a_step_has_a_span(lab: Lab, memory: Memory) -> None:
    tries: list[int] = []
    with collecting() as registry:

        @step(retry=retrying(stop=stop_after_attempt(3), wait=wait_fixed(0)))
        async def flaky() -> int:
            tries.append(1)
            if len(tries) < 3:
                raise ConnectionError("nobody answers")
            return len(tries)

        @step
        def broken() -> None:
            raise ValueError("the secret number is 4711")

        @workflow
        async def trying() -> None:
            await flaky()
            broken()

    async with lab.engine(registry, tracing=memory.tracing()):
        run = await lab.enqueue(trying)
        assert (await lab.ended(run)).state == "failed"
    spans = memory.spans
    spans.check_whole()
    said = [
        (span.failed, span.outcome, span.attributes["stepwell.execution"])
        for span in spans.named("step flaky")
    ]
    assert said == [(True, "failed", 1), (True, "failed", 2), (False, "completed", 3)]
    failure = spans.one("step broken")
    ((name, told),) = failure.events
    assert (name, told["exception.type"], told["exception.message"]) == (
        "exception", "ValueError", "the secret number is 4711",
    )  # fmt: skip
    root = spans.one("run trying")
    assert (root.failed, root.outcome) == (True, "failed")


async def test_whatever_a_step_raises_can_be_sent_and_is_not_large(lab: Lab, memory: Memory) -> None:
    """What is told of an error is what is recorded of it: a collector is sent neither megabytes nor what is no text."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("this error says nothing")

    errors = {
        "no text": lambda: ValueError("a lone \ud800 surrogate"),
        "large": lambda: ValueError("x" * 5_000_000),
        "mute": Mute,
        "exit": lambda: SystemExit(3),
    }
    with collecting() as registry:

        @step
        def broken(kind: str) -> None:
            error = errors[kind]()
            raise error

        @workflow
        async def trying(kind: str) -> None:
            broken(kind)

    async with lab.engine(registry, tracing=memory.tracing()):
        runs = {kind: await lab.enqueue(trying, {"kind": kind}) for kind in errors}
        for run in runs.values():
            assert (await lab.ended(run)).state == "failed"
    sent = {kind: memory.spans.of_run(run).one("step broken") for kind, run in runs.items()}
    for kind, span in sent.items():
        assert (span.failed, [name for name, _ in span.events]) == (True, ["exception"]), kind
        told = span.events[0][1]
        assert sum(len(text.encode()) for text in told.values()) < 20_000, kind
        assert told["exception.type"] == span.attributes["error.type"]
    assert sent["no text"].events[0][1]["exception.message"] == "a lone ? surrogate"
    assert sent["large"].events[0][1]["exception.stacktrace"].startswith("…")
    assert sent["mute"].attributes["error.type"].endswith("Mute")
    assert sent["exit"].attributes["error.type"] == "SystemExit"


async def test_what_sealed_runs_raise_is_sent_by_its_type_only(lab: Lab, memory: Memory) -> None:
    keys = f"a:{base64.b64encode(bytes(32)).decode()}"
    with collecting() as registry:

        @step
        async def broken() -> None:
            raise ValueError("the secret number is 4711")

        @workflow
        async def trying() -> None:
            await broken()

    async with lab.engine(registry, tracing=memory.tracing(), encryption_keys=keys):
        run = await lab.enqueue(trying)
        assert (await lab.ended(run)).state == "failed"
    memory.spans.check_whole()
    assert memory.spans.one("step broken").events == (("exception", {"exception.type": "ValueError"}),)
    assert "4711" not in repr([vars(span) for span in memory.spans])


async def test_spans_of_a_step_are_below_its_execution(lab: Lab, memory: Memory, application: Any) -> None:
    """In the loop, in a thread and in transactions: there the execution is the current span."""
    with collecting() as registry:

        @step
        async def in_loop() -> None:
            with application.start_as_current_span("in the loop"):
                await asyncio.sleep(0)

        @step
        def in_thread() -> None:
            with application.start_as_current_span("in a thread"):
                pass

        @transaction
        def saving(connection: psycopg.Connection) -> None:
            with application.start_as_current_span("saving"):
                connection.execute("select 1")

        @transaction
        async def saving_async(connection: psycopg.AsyncConnection) -> None:
            with application.start_as_current_span("saving async"):
                await connection.execute("select 1")

        @workflow
        async def flow() -> None:
            await in_loop()
            in_thread()
            saving()
            await saving_async()
            await gather(in_loop(), call(in_thread))

    async with lab.engine(registry, tracing=memory.tracing()):
        await lab.succeeded(await lab.enqueue(flow))
    spans = memory.spans
    spans.check_whole()
    above = {span.span_id: span.name for span in spans}
    for name, parent, times in (
        ("in the loop", "step in_loop", 2),
        ("in a thread", "step in_thread", 2),
        ("saving", "step saving", 1),
        ("saving async", "step saving_async", 1),
    ):
        assert [above[span.parent] for span in spans.named(name)] == [parent] * times


async def test_steps_that_are_tasks_of_their_own_are_below_the_run(lab: Lab, memory: Memory) -> None:
    """Also on another worker, which knows nothing of the run but its id."""
    with collecting() as registry:

        @step(queue="far")
        async def work(n: int) -> int:
            return n

        @workflow
        async def spread() -> list[int]:
            return [*await gather(*[work(n) for n in range(3)])]

    async with (
        lab.engine(registry, tracing=memory.tracing()) as near,
        lab.engine(registry, queues=["far"], tracing=memory.tracing()) as far,
    ):
        assert await lab.succeeded(await lab.enqueue(spread)) == [0, 1, 2]
    spans = memory.spans
    spans.check_whole()
    names = spans.names()
    assert (names["step work"], names["claim work"], names["run spread"]) == (3, 3, 1)
    assert {span.worker for span in spans.named("step work")} == {str(far.id)}
    assert {span.attributes["messaging.destination.name"] for span in spans.named("claim work")} == {"far"}
    assert spans.one("run spread").worker == str(near.id)


# -- when a process dies ---------------------------------------------------------------------------------


async def test_an_interrupted_execution_is_told_by_whoever_takes_over(
    lab: Lab, memory: Memory, application: Any
) -> None:
    """Under the id that it had in the process that died: what was sent from inside of it is below it."""
    gate = Gate()
    with collecting() as registry:

        @step
        async def first() -> int:
            return 1

        @step
        async def second(n: int) -> int:
            with application.start_as_current_span("asking somebody"):
                pass
            await gate.passed()
            return n + 1

        @workflow
        async def flow() -> int:
            return await second(await first())

    async with lab.engine(registry, tracing=memory.tracing()) as dying:
        run = await lab.enqueue(flow)
        await gate.reached()
        await dying.crash()
    assert memory.spans.names() == {"claim flow": 1, "step first": 1, "commit": 1, "asking somebody": 1}
    gate.open()
    async with lab.engine(registry, tracing=memory.tracing()) as other:
        assert await lab.succeeded(run) == 2
    spans = memory.spans
    spans.check_whole()
    names = spans.names()
    assert (names["step first"], names["step second"], names["run flow"], names["claim flow"]) == (1, 2, 1, 2)
    died, done = spans.one("step second", execution=1), spans.one("step second", execution=2)
    assert (died.failed, died.outcome, died.end - died.start) == (True, "interrupted", 0)
    assert (done.failed, done.outcome, done.worker) == (False, "completed", str(other.id))
    assert [span.parent for span in spans.named("asking somebody")] == [died.span_id, done.span_id]
    assert spans.named("claim flow")[1].attributes["stepwell.interruptions"] == 1


async def test_an_execution_that_is_cut_short_is_interrupted(lab: Lab, memory: Memory) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def slow() -> str:
            await gate.passed()
            return "done"

        @workflow
        async def flow() -> str:
            return await slow()

    async with lab.engine(registry, tracing=memory.tracing(), grace_seconds=0.05):
        run = await lab.enqueue(flow)
        await gate.reached()
    gate.open()
    async with lab.engine(registry, tracing=memory.tracing()):
        assert await lab.succeeded(run) == "done"
    memory.spans.check_whole()
    cut = memory.spans.one("step slow", execution=1)
    assert (cut.outcome, cut.failed) == ("interrupted", True)
    assert cut.end > cut.start
    assert memory.spans.one("step slow", execution=2).outcome == "completed"


async def test_what_was_not_recorded_is_told_once(lab: Lab, memory: Memory) -> None:
    """The first worker has executed the step, and dies before that is recorded: its record is that of an interruption."""
    with collecting() as registry:

        @step
        async def only() -> str:
            return "done"

        @workflow
        async def flow() -> str:
            return await only()

    async with lab.engine(registry, tracing=memory.tracing()) as dying:
        lost = dying.lose_writes(at(1))
        run = await lab.enqueue(flow)
        await wait_until_async(lost.is_set)
        await dying.crash()
    async with lab.engine(registry, tracing=memory.tracing()):
        assert await lab.succeeded(run) == "done"
    memory.spans.check_whole()
    assert [span.outcome for span in memory.spans.named("step only")] == ["interrupted", "completed"]


async def test_a_worker_that_thaws_too_late_tells_nothing_that_another_one_tells(
    lab: Lab, memory: Memory
) -> None:
    gate, executed = Gate(), list[str]()
    registry, two = effects.two_steps(gate, executed)
    fenced = counted("stepwell_fenced_writes_total")
    async with lab.engine(registry, tracing=memory.tracing()) as frozen:
        run = await lab.enqueue(two)
        await gate.reached()
        await frozen.engine._claimant._lock.acquire()  # it does not notice that it was taken for dead
        await lab.reclaim(frozen.id)
        async with lab.engine(registry, tracing=memory.tracing()) as other:
            await gate.reached(2)
            gate.open()
            assert await lab.succeeded(run) == "done"
        await wait_until_async(lambda: counted("stepwell_fenced_writes_total") > fenced)
        frozen.engine._claimant._lock.release()
        with pytest.raises(DeclaredDead):
            await frozen.ended(10)
    assert executed == ["first", "first", "second"]
    memory.spans.check_whole()
    told = [(span.outcome, span.worker) for span in memory.spans.named("step first")]
    assert told == [("interrupted", str(other.id)), ("completed", str(other.id))]


async def test_a_step_that_nobody_waits_for_any_more_is_told_by_who_executes_it(
    lab: Lab, memory: Memory
) -> None:
    gate = Gate()
    with collecting() as registry:

        @step
        async def slow() -> None:
            await gate.passed()

        @step
        async def bad() -> None:
            await wait_until_async(lambda: gate.entered)
            raise ValueError("no")

        @workflow
        async def flow() -> None:
            await gather(slow(), bad())

    async with lab.engine(registry, tracing=memory.tracing()):
        run = await lab.enqueue(flow)
        assert (await lab.ended(run)).state == "failed"
        gate.open()
        await wait_until_async(lambda: memory.spans.named("step slow"))
    spans = memory.spans
    spans.check_whole()
    late = spans.one("step slow")
    assert (late.outcome, late.failed) == ("refused", True)
    assert late.end > spans.one("run flow").end


# -- epochs ----------------------------------------------------------------------------------------------


async def test_a_retried_run_has_a_span_for_each_epoch(lab: Lab, memory: Memory) -> None:
    broken = True
    with collecting() as registry:

        @step
        async def fickle() -> str:
            if broken:
                raise ValueError("no")
            return "done"

        @workflow
        async def flow() -> str:
            return await fickle()

    async with lab.engine(registry, tracing=memory.tracing()):
        run = await lab.enqueue(flow)
        assert (await lab.ended(run)).state == "failed"
        broken = False
        await lab.retry(run)
        assert await lab.succeeded(run) == "done"
    memory.spans.check_whole(roots=2)
    assert [(span.outcome, span.attributes["stepwell.epoch"]) for span in memory.spans.named("run flow")] == [
        ("failed", 0), ("succeeded", 1),
    ]  # fmt: skip
    assert [span.outcome for span in memory.spans.named("step fickle")] == ["failed", "completed"]


async def test_the_span_of_an_epoch_that_was_rewound_is_sent_by_the_next(lab: Lab, memory: Memory) -> None:
    with collecting() as registry:

        @step
        async def note(n: int) -> int:
            return n

        @workflow
        async def flow() -> int:
            return await note(1) + await wait_signal("go", type=int)

    async with lab.engine(registry, tracing=memory.tracing()), AsyncClient(lab.url) as client:
        run = await client.enqueue(flow, trace=SAMPLED)
        await lab.waits(run.id)
        await run.pause()
        await run.rewind(1)
        await lab.waits(run.id)
        await run.signal("go", 2)
        assert await run.result(20) == 3
    spans = memory.spans
    assert [span.outcome for span in spans.named("run flow")] == ["rewound", "succeeded"]
    assert {span.parent for span in spans.named("run flow")} == {PARENT}
    (before, after) = spans.named("run flow")
    assert [span.parent for span in spans.named("step note")] == [before.span_id, after.span_id]
    assert before.start < before.end


async def test_a_fresh_start_ends_the_span_and_begins_another(lab: Lab, memory: Memory) -> None:
    with collecting() as registry:

        @workflow
        async def counting(n: int = 0) -> int:
            if n < 2:
                continue_as(n + 1)
            return n

    async with lab.engine(registry, tracing=memory.tracing()):
        assert await lab.succeeded(await lab.enqueue(counting)) == 2
    memory.spans.check_whole(roots=3)
    assert [span.outcome for span in memory.spans.named("run counting")] == [
        "continued",
        "continued",
        "succeeded",
    ]


# -- callers, children, messages -------------------------------------------------------------------------


async def test_a_producer_is_the_root(lab: Lab, memory: Memory, application: Any) -> None:
    registry = two_steps()
    flow = registry.workflows["flow@7"]
    async with lab.engine(registry, tracing=memory.tracing()), AsyncClient(lab.url) as client:
        with application.start_as_current_span("request"):
            run = await client.enqueue(flow, "Ada", key=17)
        assert await run.result(20) == 9
    spans = memory.spans
    spans.check_whole()
    sent = spans.one("enqueue flow")
    assert (spans.roots[0].name, sent.kind) == ("request", "PRODUCER")
    assert sent.parent == spans.roots[0].span_id
    assert spans.one("run flow").parent == sent.span_id
    assert sent.attributes["messaging.message.id"] == str(run.id)
    assert sent.attributes["messaging.operation.type"] == "send"
    assert sent.attributes["stepwell.created"] is True


def test_a_span_is_begun_where_there_is_none(database_url: str, memory: Memory, application: Any) -> None:
    with Client(database_url) as client:
        run = client.enqueue("flow", name="Ada", key=1)
        again = client.enqueue("flow", name="Ada", key=1)
        info = client.get(run)
    assert run.id == again.id
    first, second = memory.spans.named("enqueue flow")
    assert (first.parent, first.trace_id) == ("", info.trace_id)
    assert second.trace_id != info.trace_id
    assert [span.attributes["stepwell.created"] for span in (first, second)] == [True, False]


def test_a_context_that_is_given_is_passed_on(database_url: str, memory: Memory, application: Any) -> None:
    with Client(database_url) as client, application.start_as_current_span("request"):
        run = client.enqueue("flow", name="Ada", trace=SAMPLED)
        (many,) = client.enqueue_many("flow", [{"name": "Bob"}], trace=SAMPLED)
        assert {client.get(run).trace_id, client.get(many).trace_id} == {TRACE}
    assert memory.spans.names() == {"request": 1}


@pytest.mark.parametrize("within", [True, False])
def test_a_batch_goes_on_with_the_span_around_it(
    database_url: str, memory: Memory, application: Any, within: bool
) -> None:
    """Without one each run has a trace of its own."""
    inputs = [{"name": name} for name in ("Ada", "Bob", "Eve")]
    with Client(database_url) as client:
        if within:
            with application.start_as_current_span("import"):
                runs = list(client.enqueue_many("flow", inputs, chunk=2))
        else:
            runs = list(client.enqueue_many("flow", inputs, chunk=2))
        traces = {client.get(run).trace_id for run in runs}
    if within:
        memory.spans.check_whole()
        assert [
            s.attributes["messaging.batch.message_count"] for s in memory.spans.named("enqueue flow")
        ] == [2, 1]
        assert traces == {memory.spans[0].trace_id}
    else:
        assert memory.spans == []
        assert len(traces) == 3


def test_what_cannot_be_enqueued_fails_its_span(database_url: str, memory: Memory, application: Any) -> None:
    with Client(database_url) as client, psycopg.connect(database_url) as connection:
        with suppress(psycopg.Error):
            connection.execute("select 1 / 0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            client.enqueue("flow", name="the secret number is 4711", tx=connection)
    failed = memory.spans.one("enqueue flow")
    assert failed.failed
    assert "4711" not in repr(vars(failed))


def test_without_a_provider_nothing_is_stored(database_url: str) -> None:
    with Client(database_url) as client:
        client.signal(client.enqueue("flow", name="Ada"), "go")
    with psycopg.connect(database_url) as connection:
        assert connection.execute("select trace from stepwell.runs").fetchall() == [(None,)]
        assert connection.execute("select trace from stepwell.signals").fetchall() == [(None,)]


async def test_children_are_in_the_trace_of_their_parent(lab: Lab, memory: Memory) -> None:
    with collecting() as registry:

        @step
        async def note(n: int) -> int:
            return n

        @workflow
        async def child(n: int) -> int:
            return await note(n)

        @workflow
        async def parent() -> int:
            begun = start(child, 1)
            called = await child(2)
            return called + await begun + sum(await gather(child(3), child(4)))

    async with lab.engine(registry, tracing=memory.tracing()):
        run = await lab.enqueue(parent)
        assert await lab.succeeded(run) == 10
    spans = memory.spans
    spans.check_whole()
    assert spans.names()["run child"] == 4
    assert {span.parent for span in spans.named("run child")} == {spans.one("run parent").span_id}


async def test_a_run_that_a_step_enqueues_is_below_that_step(
    lab: Lab, memory: Memory, application: Any
) -> None:
    with Client(lab.url) as client:
        with collecting() as registry:

            @workflow
            async def other() -> str:
                return "done"

            @step
            def enqueueing() -> str:
                return str(client.enqueue(other).id)

            @workflow
            async def flow() -> str:
                return enqueueing()

        async with lab.engine(registry, tracing=memory.tracing()):
            made = await lab.succeeded(await lab.enqueue(flow))
            await lab.succeeded(UUID(made))
    spans = memory.spans
    spans.check_whole()
    assert spans.one("enqueue other").parent == spans.one("step enqueueing").span_id
    assert spans.one("run other").parent == spans.one("enqueue other").span_id


async def test_who_takes_a_signal_links_to_who_sent_it(lab: Lab, memory: Memory, application: Any) -> None:
    with collecting() as registry:

        @workflow
        async def flow() -> list[Any]:
            return [await wait_signal("go") for _ in range(3)]

    async with lab.engine(registry, tracing=memory.tracing()), AsyncClient(lab.url) as client:
        run = await lab.enqueue(flow)
        with application.start_as_current_span("approving"):
            await client.signal(run, "go", 1)
        await lab.execute("select stepwell.signal(%s, 'go', '2', trace => %s)", [run, SAMPLED])
        await lab.execute("select stepwell.signal(%s, 'go', '3')", [run])
        assert await lab.succeeded(run) == [1, 2, 3]
    spans = memory.spans
    sent = next(span for span in spans.named("signal go") if span.kind == "PRODUCER")
    taken = [span for span in spans.named("signal go") if span.kind == "CONSUMER"]
    assert [span.links for span in taken] == [((sent.trace_id, sent.span_id),), ((TRACE, PARENT),), ()]
    assert sent.parent == spans.one("approving").span_id
    assert {span.parent for span in taken} == {spans.one("run flow").span_id}
    assert sent.trace_id != taken[0].trace_id


# -- around it -------------------------------------------------------------------------------------------


async def test_an_engine_that_cannot_trace_works_all_the_same(
    lab: Lab, memory: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = memory.tracing()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a processor that is broken")

    monkeypatch.setattr(tracing._tracer, "start_span", refuse)
    registry, told = two_steps(), []
    registry.add_hook(told.append)
    async with lab.engine(registry, tracing=tracing):
        assert await lab.succeeded(await lab.enqueue("flow", {"name": "Ada"}, version="7")) == 9
    assert any("could not be watched" in record.getMessage() for record in caplog.records)
    assert [type(each).__name__ for each in told] == ["RunStarted", "StepStarted", "StepStarted", "RunEnded"]


async def test_without_tracing_and_hooks_nothing_is_watched(lab: Lab) -> None:
    async with lab.engine(two_steps()) as engine:
        run = await lab.enqueue("flow", {"name": "Ada"}, version="7", trace=SAMPLED)
        await until(lambda: _is(lab, run, "succeeded"))
        assert engine.engine._watcher is None


async def _is(lab: Lab, run: Any, state: str) -> bool:
    return (await lab.run(run)).state == state


@pytest.mark.direct("the kit refuses a pooler: its database is a test's own")
def test_the_testing_kit_traces_with_the_provider_of_the_test(
    database_url: str, memory: Memory, application: Any
) -> None:
    with StepwellTest(database_url, registry=two_steps()) as kit, application.start_as_current_span("test"):
        run = kit.enqueue("flow", name="Ada", version="7")
        kit.run_until_idle()
        assert run.result() == 9
    memory.spans.check_whole()
    assert memory.spans.roots[0].name == "test"
