"""The testing kit from inside a test: execute until idle, advance, assert, replay."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from random import Random

import pytest
from tenacity import stop_after_attempt, wait_fixed

import outbox
from outbox.database import connect
from outbox.errors import (
    ConfigError,
    DeadlineExceeded,
    PayloadError,
    ResultTimeout,
    RunBlocked,
    RunCancelled,
    RunFailed,
)
from tests.waiting import wait_until, wait_until_async
from worker import now, retrying, sleep, sleep_until, step, workflow
from worker.definitions import Registry, collecting
from worker.testing import NotIdle, StepwellTest

pytestmark = pytest.mark.direct("the kit refuses a pooler: its database is a test's own")

calls: list[str] = []
luck = Random(1)
patience = [600.0]


@dataclass(frozen=True)
class Lead:
    id: int
    worth: Decimal = Decimal("9.90")


with collecting() as REGISTRY:

    @step
    async def send(text: str) -> str:
        calls.append(text)
        return text.upper()

    @step
    def count(lead: Lead) -> int:
        calls.append(f"count {lead.id}")
        return lead.id

    @step(retry=retrying(stop=stop_after_attempt(3), wait=wait_fixed(3600)))
    async def failing() -> None:
        calls.append("failing")
        raise OSError("nobody answers")

    @step(retry=retrying(stop=stop_after_attempt(2), wait=wait_fixed(0.05)))
    async def failing_once() -> None:
        calls.append("once")
        if calls.count("once") == 1:
            raise OSError("a moment")

    @step
    async def endless() -> None:
        await asyncio.sleep(patience[0])

    @step
    async def blocking() -> None:
        time.sleep(min(8.0, patience[0]))  # noqa: ASYNC251 - what a step must not do, and does

    @step
    async def at(moment: datetime) -> datetime:
        return moment

    @step
    def order_elsewhere(url: str) -> None:
        with outbox.Client(url) as client:
            client.enqueue("welcome", {"lead": {"id": 7}}, queue="elsewhere")

    @workflow
    async def welcome(lead: Lead) -> int:
        await send(f"hello {lead.id}")
        return count(lead)

    @workflow(queue="other")
    async def impatient() -> None:
        await failing()

    @workflow
    async def lucky() -> None:
        await failing_once()

    @workflow(strict=True)
    async def monthly() -> float:
        started = now()
        await at(started)
        await sleep(timedelta(days=30))
        await send("a month later")
        await sleep_until(now() + timedelta(days=30))
        return (now() - started) / timedelta(days=1)

    @workflow
    async def stuck(how: str) -> None:
        await (endless() if how == "endless" else blocking())

    @workflow
    async def ordering(url: str) -> None:
        order_elsewhere(url)

    @workflow
    async def gambling() -> None:
        await send("head" if luck.random() < 0.5 else "tail")
        await sleep(60)

    @workflow
    async def unsteady() -> None:
        if luck.random() < 0.5:
            await send("head")
        else:
            count(Lead(1))
        await sleep(60)

    @workflow
    async def forgetful() -> None:
        send("never awaited")

    @workflow
    async def ticking() -> None:
        while True:
            await sleep(1)


@pytest.fixture
def stepwell_registry() -> Registry:
    calls.clear()
    luck.seed(1)
    patience[0] = 600.0
    return REGISTRY


@pytest.fixture
def stepwell_url(database_url: str) -> str:
    """The database is of our own cluster here; tests of the plugin take the plugin's."""
    return database_url


# -- executing


def test_what_is_enqueued_is_executed_when_the_test_says_so(stepwell: StepwellTest) -> None:
    runs = [stepwell.enqueue(welcome, Lead(n)) for n in range(50)]
    assert not calls
    with pytest.raises(ResultTimeout, match=r"has not ended: ready .* until it calls run_until_idle"):
        runs[0].result()
    stepwell.run_until_idle()
    assert [run.result() for run in runs] == list(range(50))
    assert len(calls) == 100
    stepwell.run_until_idle()
    assert len(calls) == 100


def test_nothing_stays_behind(stepwell: StepwellTest) -> None:
    stepwell.enqueue(welcome, Lead(1))
    stepwell.run_until_idle()
    left = "select (select count(*) from stepwell.workers), (select count(*) from stepwell.tasks)"
    assert stepwell.connection.execute(left).fetchone() == (0, 0)
    names = "select application_name from pg_stat_activity where datname = current_database()"
    wait_until(
        lambda: (
            {name for (name,) in stepwell.connection.execute(names)}
            == {"test", "stepwell testing", "stepwell client"}
        )
    )


def test_a_short_retry_is_waited_for(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(lucky)
    stepwell.run_until_idle()
    assert run.info().status == "succeeded"
    assert calls == ["once", "once"]


def test_a_long_retry_waits_for_the_time_to_be_advanced(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(impatient)
    stepwell.run_until_idle()
    assert calls == ["failing"]
    stepwell.advance(minutes=59)
    stepwell.run_until_idle()
    assert calls == ["failing"]
    stepwell.advance(minutes=1)
    stepwell.run_until_idle()
    assert calls == ["failing"] * 2
    stepwell.run_until_idle(advancing=True)
    with pytest.raises(RunFailed, match="nobody answers"):
        run.result()
    assert calls == ["failing"] * 3


def test_a_cancellation_is_applied(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(monthly)
    stepwell.run_until_idle()
    assert run.cancel()
    stepwell.run_until_idle()
    with pytest.raises(RunCancelled):
        run.result()


def test_every_queue_is_served_also_one_that_comes_up_on_the_way(stepwell: StepwellTest) -> None:
    somewhere = stepwell.enqueue(welcome, Lead(1), queue="somewhere")
    stepwell.enqueue(ordering, stepwell.url)
    stepwell.run_until_idle()
    assert somewhere.result() == 1
    [other] = stepwell.assert_enqueued(welcome, queue="elsewhere")
    assert other.result() == 7


def test_a_run_that_nobody_knows_is_an_error_that_names_it(stepwell: StepwellTest) -> None:
    known = stepwell.enqueue(welcome, Lead(1))
    stepwell.enqueue("farewell", {"lead": 1})
    with pytest.raises(
        NotIdle, match=r"nobody can execute, of: farewell\. Workflows that are known here: forgetful, "
    ):
        stepwell.run_until_idle()
    assert known.result() == 1


def test_a_time_limit_tells_what_each_run_is_doing(stepwell: StepwellTest) -> None:
    stuck_run = stepwell.enqueue(stuck, "endless", key="k")
    stepwell.enqueue(monthly)
    said = r"(?s)not idle after 2 s:\n  stuck key='k' .*: executing step endless \(call 1, execution 1\) for .*sleeping"
    with pytest.raises(NotIdle, match=said):
        stepwell.run_until_idle(timeout_seconds=2)
    assert stuck_run.info().status == "waiting"
    patience[0] = 0
    stepwell.run_until_idle()
    assert stuck_run.info().status == "succeeded"
    assert stepwell.client.history(stuck_run.id)[0].outcome == "interrupted"


def test_a_step_that_blocks_the_worker_does_not_block_the_test(
    stepwell: StepwellTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.testing.inline.STOP_SECONDS", 0.2)
    run = stepwell.enqueue(stuck, "blocking")
    started = time.monotonic()
    with pytest.raises(NotIdle, match="executing step blocking"):
        stepwell.run_until_idle(timeout_seconds=2)
    assert time.monotonic() - started < 8.0, "it blocks for longer"
    patience[0] = 0
    stepwell.run_until_idle()  # by another worker
    assert run.info().status == "succeeded"


async def test_an_async_test_goes_on_meanwhile(stepwell: StepwellTest) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    run = stepwell.enqueue(welcome, Lead(1))
    await stepwell.run_until_idle_async()
    ticking.cancel()
    assert run.result() == 1
    assert ticks > 5
    stepwell.enqueue(welcome, Lead(2))
    stepwell.run_until_idle()  # that is possible, too
    assert len(calls) == 4


async def test_one_worker_at_a_time(stepwell: StepwellTest) -> None:
    stepwell.enqueue(stuck, "endless")
    first = asyncio.create_task(stepwell.run_until_idle_async(timeout_seconds=1))
    claimed = "select from stepwell.tasks where state = 'claimed'"
    await wait_until_async(lambda: stepwell.connection.execute(claimed).rowcount)
    with pytest.raises(RuntimeError, match="at work already"):
        stepwell.advance(days=1)
    with pytest.raises(NotIdle):
        await first


# -- time


def test_time_that_is_advanced_has_passed_for_the_body(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(monthly)
    stepwell.run_until_idle()
    stepwell.advance(days=29, hours=23, minutes=59)
    stepwell.run_until_idle()
    assert calls == []
    stepwell.advance(seconds=60)
    stepwell.run_until_idle()
    assert calls == ["a month later"]
    stepwell.run_until_idle(advancing=True)
    assert run.result() == pytest.approx(60, abs=0.01)


def test_a_month_takes_no_time(stepwell: StepwellTest) -> None:
    started = time.monotonic()
    run = stepwell.enqueue(monthly)
    stepwell.run_until_idle(advancing=True)
    assert run.result() == pytest.approx(60, abs=0.01)
    assert time.monotonic() - started < 5


def test_a_delay_and_a_deadline_pass(stepwell: StepwellTest) -> None:
    later = stepwell.enqueue(welcome, Lead(1), delay=3600)
    late = stepwell.enqueue(monthly, deadline=86400)
    stepwell.run_until_idle()
    assert later.info().status == "pending"
    stepwell.advance(hours=1)
    stepwell.run_until_idle()
    assert later.result() == 1
    stepwell.advance(hours=23)
    stepwell.run_until_idle()
    with pytest.raises(RunFailed, match=DeadlineExceeded.__name__):
        late.result()


def test_all_stored_times_move_together(stepwell: StepwellTest) -> None:
    stepwell.enqueue(monthly, key=1, deadline=86400 * 90)
    stepwell.run_until_idle()
    times = (
        "select r.created_at, r.deadline_at, t.due_at, t.started_at, o.at from stepwell.runs r"
        " join stepwell.tasks t on t.run_id = r.id join stepwell.outbox o on o.run_id = r.id"
    )
    before = stepwell.connection.execute(times).fetchone()
    stepwell.advance(days=3, seconds=0.5)
    after = stepwell.connection.execute(times).fetchone()
    assert before is not None
    assert after is not None
    assert {b - a for b, a in zip(before, after, strict=True)} == {timedelta(days=3, seconds=0.5)}


def test_time_does_not_go_back(stepwell: StepwellTest) -> None:
    with pytest.raises(ValueError, match="does not go back"):
        stepwell.advance(days=-1)


def test_a_run_that_waits_for_ever_is_not_advanced_for_ever(
    stepwell: StepwellTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.testing.kit.MOST_ADVANCES", 3)
    stepwell.enqueue(ticking)
    with pytest.raises(NotIdle, match=r"advanced 3 times:\n  ticking"):
        stepwell.run_until_idle(advancing=True)


# -- asserting


def test_what_was_enqueued_is_found_by_what_is_given_of_it(stepwell: StepwellTest) -> None:
    stepwell.enqueue(welcome, Lead(1), key="one")
    stepwell.enqueue(welcome, Lead(2), queue="q")
    assert len(stepwell.assert_enqueued(welcome)) == 2
    assert len(stepwell.assert_enqueued("welcome", count=2)) == 2
    stepwell.assert_enqueued(welcome, key="one", input={"lead": Lead(1)}, count=1)
    stepwell.assert_enqueued(welcome, input={"lead": {"id": 2, "worth": "9.90"}}, queue="q")
    stepwell.assert_enqueued(monthly, count=0)
    stepwell.run_until_idle()
    [run] = stepwell.assert_enqueued(welcome, key="one")
    assert run.result() == 1


def test_what_was_not_enqueued_is_told_with_what_was(stepwell: StepwellTest) -> None:
    with pytest.raises(
        AssertionError, match=r"expected a run of welcome, found none\.\nNothing was enqueued"
    ):
        stepwell.assert_enqueued(welcome)
    stepwell.enqueue(welcome, Lead(1), key=17)
    with pytest.raises(
        AssertionError,
        match=r"(?s)expected a run of welcome key='18' input=\{.*\}, found none.*\n  welcome key='17' input=\{.*\} \(pending\)",
    ):
        stepwell.assert_enqueued(welcome, key=18, input={"lead": Lead(1)})
    with pytest.raises(AssertionError, match=r"expected 2 runs of welcome, found 1\."):
        stepwell.assert_enqueued(welcome, count=2)
    with pytest.raises(AssertionError, match=r"expected no run of welcome, found 1\."):
        stepwell.assert_enqueued(welcome, count=0)
    with pytest.raises(AssertionError, match="found none"):
        stepwell.assert_enqueued(welcome, input={"other": None})
    with pytest.raises(PayloadError):
        stepwell.assert_enqueued(welcome, input={"lead": object()})


def test_a_long_list_of_runs_is_cut(stepwell: StepwellTest) -> None:
    for n in range(25):
        stepwell.enqueue(welcome, Lead(n))
    with pytest.raises(AssertionError, match=r"… and 5 more$"):
        stepwell.assert_enqueued(monthly)


def test_a_body_that_calls_other_steps_when_it_is_replayed_is_told(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(unsteady)
    stepwell.run_until_idle()
    luck.seed(2)  # the other side of the coin
    with pytest.raises(
        AssertionError, match=r"(?s)1 runs would not survive .*unsteady .*recorded: step \w+ at 1"
    ):
        stepwell.check_replay(run)
    luck.seed(1)
    stepwell.check_replay()
    luck.seed(1)  # for the check at the end


def test_a_body_that_passes_other_arguments_when_it_is_replayed_is_told(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(gambling)
    stepwell.run_until_idle()
    luck.seed(2)
    with pytest.raises(AssertionError, match="other arguments"):
        stepwell.check_replay(run.id)
    luck.seed(1)


def test_a_blocked_run_must_be_looked_at(stepwell: StepwellTest) -> None:
    run = stepwell.enqueue(forgetful)
    stepwell.run_until_idle()
    with pytest.raises(
        AssertionError, match=r"(?s)1 runs are blocked, and the test has not.*forgetful.*never awaited"
    ):
        stepwell.check_end()
    with pytest.raises(RunBlocked):
        run.result()
    stepwell.check_end()


def test_what_has_become_of_each_run_is_described(stepwell: StepwellTest) -> None:
    stepwell.enqueue(welcome, Lead(1))
    stepwell.enqueue(impatient)
    asleep = stepwell.enqueue(monthly)
    stepwell.run_until_idle()
    told = stepwell.describe().splitlines()
    assert told[0].startswith("welcome input={")
    assert told[0].endswith("(succeeded)")
    assert told[1] == "impatient queue='other' input={} (waiting)"
    assert told[2] == "    1 failing failed (execution 1): OSError: nobody answers"
    assert told[3].startswith("    waiting until ")
    assert told[4:6] == ["monthly input={} (waiting)", "    1 at completed"]
    assert told[6].startswith("    sleeping until ")
    asleep.cancel()


# -- its own database


def test_the_app_finds_the_database_by_itself(
    stepwell: StepwellTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWELL_DATABASE_URL", stepwell.url)  # the plugin's own stepwell_url does so
    with outbox.Client() as client:
        client.enqueue(welcome, Lead(3))
    stepwell.assert_enqueued(welcome, count=1)


def test_what_is_enqueued_in_a_transaction_counts_when_it_commits(stepwell: StepwellTest) -> None:
    with connect(stepwell.url, application_name="test", autocommit=False) as tx:
        stepwell.enqueue(welcome, Lead(1), tx=tx)
        stepwell.assert_enqueued(welcome, count=0)
        stepwell.run_until_idle()
        tx.commit()
    stepwell.run_until_idle()
    [run] = stepwell.assert_enqueued(welcome)
    assert run.result() == 1


def test_settings_are_those_of_a_worker(database_url: str) -> None:
    with StepwellTest(database_url, registry=REGISTRY, max_payload_bytes=10) as small:
        run = small.enqueue(welcome, Lead(100))
        small.run_until_idle()
        with pytest.raises(RunBlocked, match="max_payload_bytes"):
            run.result()
    with pytest.raises(TypeError, match="no_such_setting"):
        StepwellTest(database_url, no_such_setting=1)
    small.close()


def test_definitions_of_a_block_are_known_in_it(database_url: str) -> None:
    with collecting(), StepwellTest(database_url) as kit:

        @workflow
        async def local() -> str:
            return "here"

        run = kit.enqueue(local)
        kit.run_until_idle()
        assert run.result() == "here"


def test_a_mistaken_crash_is_told_of(stepwell: StepwellTest) -> None:
    with (
        pytest.raises(ConfigError, match=r"no step 'sent'; there are at, blocking"),
        stepwell.crash_at("sent", "after"),
    ):
        pass
    with pytest.raises(ConfigError, match="before, after or recording"), stepwell.crash_at(send, "during"):  # type: ignore[arg-type]
        pass
