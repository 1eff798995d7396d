"""What comes by SQL may have any size: a worker does not read what is larger than its limit, and says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest
import pytest_asyncio

from outbox.sealing import Keyring
from tests import protocol
from tests.engines import Lab
from tests.protocol import APPLIED, Db, TaskRow
from worker import call, continue_as, gather, step, wait_signal, workflow
from worker.definitions import Registry, collecting
from worker.queries import load

SMALL = 1_000
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@pytest_asyncio.fixture
async def engines(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


def listening() -> Registry:
    with collecting() as registry:

        @step
        async def length(text: str) -> int:
            return len(text)

        @workflow
        async def measure(text: str) -> int:
            return await length(text)

        @workflow
        async def hear(name: str) -> int:
            return await length(await wait_signal(name, type=str))

    return registry


async def reason(lab: Lab, run: UUID) -> dict[str, Any]:
    ended = await lab.ended(run)
    assert ended.state == "blocked", ended
    error: dict[str, Any] = ended.error
    return error


# -- inputs --------------------------------------------------------------------------------------------


async def test_an_input_that_is_too_large_blocks_its_run_and_nobody_else(engines: Lab) -> None:
    async with engines.engine(listening()):
        large = await engines.enqueue("measure", {"text": "x" * 2_000_000})
        small = await engines.enqueue("measure", {"text": "x" * 1_000_000})
        assert await engines.succeeded(small) == 1_000_000
        said = await reason(engines, large)
    assert said["type"] == "outbox.errors.PayloadError"
    assert said["reason"] == "a payload is too large: the input of workflow 'measure'"
    assert "2,000,012 bytes" in said["message"]
    assert "(max_payload_bytes) is 1,048,576" in said["message"]
    task = await engines.task(large)
    assert task is None


async def test_a_worker_with_a_higher_limit_takes_it_after_a_retry(engines: Lab) -> None:
    async with engines.engine(listening(), max_payload_bytes=SMALL):
        run = await engines.enqueue("measure", {"text": "x" * 5_000})
        assert "is 1,000" in (await reason(engines, run))["message"]
        assert await engines.retry(run) == 1
        assert "too large" in (await reason(engines, run))["reason"]
    assert await engines.retry(run) == 2
    async with engines.engine(listening(), max_payload_bytes=10_000):
        assert await engines.succeeded(run) == 5_000


async def test_what_bodies_pass_is_measured_when_they_pass_it(engines: Lab) -> None:
    """A replay knows no settings: the limit of a call is the default, whatever the worker's is."""
    with collecting() as registry:

        @step
        async def length(text: str) -> int:
            return len(text)

        @workflow
        async def child(text: str) -> str:
            return text

        @workflow
        async def parent(n: int, given: str = "") -> int:
            if not given:
                continue_as(n, "x" * n)
            lengths = await gather(call(length, given), call(length, given))
            return sum(lengths) + len(await child(given))

    async with engines.engine(registry, max_payload_bytes=SMALL):
        run = await engines.enqueue(parent, {"n": 20_000})
        assert await engines.succeeded(run) == 60_000


# -- signals -------------------------------------------------------------------------------------------


async def test_a_signal_that_is_too_large_blocks_the_run_that_would_take_it(engines: Lab) -> None:
    async with engines.engine(listening()):
        run = await engines.enqueue("hear", {"name": "go"})
        await engines.waits(run)
        await engines.execute("select stepwell.signal(%s, %s, %s)", [run, "go", json.dumps("x" * 2_000_000)])
        said = await reason(engines, run)
        assert said["reason"] == "a payload is too large: the payload of signal 'go'"
        assert "2,000,002 bytes" in said["message"]
        assert "(max_payload_bytes) is 1,048,576" in said["message"]
        ((row,),) = await engines.execute("select id from stepwell.signals where run_id = %s", [run])
        assert f"delete row {row} of stepwell.signals" in said["message"]

        # What the advice says.
        await engines.execute("delete from stepwell.signals where id = %s", [row])
        await engines.execute("select stepwell.signal(%s, %s, %s)", [run, "go", '"short"'])
        assert await engines.retry(run) == 1
        assert await engines.succeeded(run) == 5


async def test_a_signal_that_is_too_large_waits_for_a_worker_with_a_higher_limit(engines: Lab) -> None:
    run = await engines.enqueue("hear", {"name": "go"})
    await engines.execute("select stepwell.signal(%s, 'go', %s)", [run, json.dumps("x" * 5_000)])
    async with engines.engine(listening(), max_payload_bytes=SMALL):
        assert "too large" in (await reason(engines, run))["reason"]
    assert await engines.retry(run) == 1
    async with engines.engine(listening(), max_payload_bytes=10_000):
        assert await engines.succeeded(run) == 5_000


async def test_a_signal_that_nobody_waits_for_is_of_no_account(engines: Lab) -> None:
    async with engines.engine(listening(), max_payload_bytes=SMALL):
        run = await engines.enqueue("hear", {"name": "go"})
        await engines.execute("select stepwell.signal(%s, 'other', %s)", [run, json.dumps("x" * 5_000)])
        await engines.execute("select stepwell.signal(%s, 'go', '\"here\"')", [run])
        assert await engines.succeeded(run) == 4


async def test_the_result_of_a_child_is_taken_whatever_the_limit_of_signals_is(engines: Lab) -> None:
    with collecting() as registry:

        @workflow
        async def child() -> str:
            return "x" * 20_000

        @workflow
        async def parent() -> int:
            return len(await child())

    async with engines.engine(registry, max_payload_bytes=SMALL):
        assert await engines.succeeded(await engines.enqueue(parent)) == 20_000


# -- what the database does not hand out ---------------------------------------------------------------


@pytest.mark.parametrize("limit", [30, 3_000, 300_000])
def test_the_limit_is_exact_and_nothing_beyond_it_is_read(lab: protocol.Lab, limit: int) -> None:
    worker = lab.worker()
    for size in (limit, limit + 1):
        text = json.dumps({"t": "x" * (size - len('{"t": ""}'))})
        assert len(text) == size
        lab.one("select stepwell.enqueue('w', %s)", text)
    fits, too_large = worker.claim(2, limits=(limit, None))
    assert len(fits.claim.input or "") == limit
    assert fits.claim.oversize is None
    assert too_large.claim.input is None
    # Of a short value the few bytes of its header are counted as well.
    assert limit + 1 <= (too_large.claim.oversize or 0) <= limit + 5


@pytest.mark.parametrize("size", [1, 100, 5_000, 1_048_576])
def test_a_value_that_was_sealed_is_measured_as_what_it_was(lab: protocol.Lab, size: int) -> None:
    """Sealed, it is a third larger."""
    ring = Keyring.of(f"{'k' * 40}:{KEY}")
    worker = lab.worker()
    plain = json.dumps({"t": "x" * size})
    sealed = ring.seal(plain, "input", "w")
    assert len(sealed) > len(plain) * 4 / 3
    lab.one("select stepwell.enqueue('w', %s)", sealed)
    assert worker.take(limits=(len(plain), None)).claim.input == sealed
    lab.one(
        "select stepwell.enqueue('w', %s)",
        ring.seal(json.dumps({"t": "x" * 2 * size + "x" * 300}), "input", "w"),
    )
    assert worker.take(limits=(len(plain), None)).claim.input is None


def test_arguments_that_are_too_large_are_not_read(lab: protocol.Lab) -> None:
    worker = lab.worker("w", "step:send")
    lab.enqueue()
    held = worker.take()
    args = msgspec.Raw(json.dumps({"t": "x" * 5_000}).encode())
    row = TaskRow(kind="step", path=(1, 1, 1), name="step:send", wakes=1, args=args)
    assert worker.flush(held.park(extras=[row])) == [APPLIED]
    assert worker.take(limits=(1, 4_000)).claim.args is None
    lab.db.execute("update stepwell.tasks set state = 'ready', claimed_by = null where kind = 'step'")
    assert len(worker.take(limits=(1, 6_000)).claim.args or "") == len(bytes(args))


async def test_arguments_that_are_too_large_block_their_run(
    engines: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.claims.DEFAULT_MAX_BYTES", SMALL)
    with collecting() as registry:

        @step
        async def length(text: str) -> int:
            return len(text)

        @workflow
        async def both(n: int) -> list[int]:
            return list(await gather(call(length, "x" * n), call(length, "x")))

    async with engines.engine(registry, max_payload_bytes=SMALL):
        said = await reason(engines, await engines.enqueue(both, {"n": 5_000}))
    assert said["reason"] == "a payload is too large: the arguments of step 'length'"
    assert "5,011 bytes" in said["message"]


def test_a_payload_that_was_compressed_in_a_table_of_somebodys_is_measured_as_text(lab: protocol.Lab) -> None:
    """Such a value is stored as it comes, and 300 MB of one letter are 4 MB then."""
    (run,) = lab.enqueue()
    lab.db.execute("create temp table archive (payload json)")
    lab.one(
        "with a as (insert into archive values (%s) returning 1) select * from a", json.dumps("x" * 500_000)
    )
    lab.db.execute(
        "insert into stepwell.signals (run_id, name, payload) select %s, 'go', payload from archive", [run]
    )
    assert lab.one("select pg_column_size(payload) < 10000 from stepwell.signals"), "else it proves nothing"
    assert mail(lab.db, run, 499_999) == [("go", None, 500_002)]
    assert mail(lab.db, run, 500_002) == [("go", json.dumps("x" * 500_000), None)]


def mail(db: Db, run: UUID, max_bytes: int) -> list[tuple[Any, ...]]:
    return [row[2:5] for row in db.execute(load("mail"), {"runs": [run], "max_bytes": max_bytes})]


def test_labels_have_a_bound_that_sql_cannot_pass(lab: protocol.Lab) -> None:
    """Every claim reads them."""
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="65,536 bytes"):
        lab.one("select stepwell.enqueue('w', labels => %s)", json.dumps({"l": "x" * 65_536}))
    lab.one("select stepwell.enqueue('w', labels => %s)", json.dumps({"l": "x" * 65_000}))
