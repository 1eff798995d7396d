"""Recorded runs against changed code: what would be blocked is told, whatever else changes is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.codec import encode
from outbox.errors import HistoryMismatch, Suspended
from tests.unit.drives import CREATED, FACTS, Run, record
from worker import sleep, step, workflow
from worker.definitions import Workflow
from worker.replay.decisions import DoStep, Finish
from worker.replay.driver import Replay
from worker.replay.records import Record
from worker.replay.rehearsal import Mismatch, RecordedCall, RecordedRun, rehearse


@step
async def one(n: int) -> int:
    return n + 1


@step
async def two(n: int) -> int:
    return n * 2


@workflow(name="sums")
async def sums(n: int) -> int:
    return await two(await one(n))


def changed(body: Callable[..., Any]) -> Workflow[..., Any]:
    return Workflow(body, "sums")


async def reordered(n: int) -> int:
    return await one(await two(n))


async def shorter(n: int) -> int:
    return await one(n)


async def longer(n: int) -> int:
    done = await two(await one(n))
    await sleep(1)
    return done


async def renamed_variables(number: int = 0, *, n: int = 5) -> int:
    return await two(await one(n))


def recorded(run: Run, state: str = "succeeded") -> RecordedRun:
    return RecordedRun(
        id=FACTS.id, workflow="sums", state=state, created_at=CREATED, input=msgspec.Raw(encode({"n": 5}, where="")),
        history=[RecordedCall.of(each) for each in run.history],
    )  # fmt: skip


@pytest.fixture
def finished() -> RecordedRun:
    run = Run(sums, n=5)
    assert isinstance(run.finish(), Finish)
    return recorded(run)


@pytest.mark.parametrize("body", [longer, renamed_variables])
def test_what_fits_or_goes_further_is_no_mismatch(finished: RecordedRun, body: Callable[..., Any]) -> None:
    assert rehearse(finished, sums) is None
    assert rehearse(finished, changed(body)) is None


def test_another_order_names_the_call_and_both_sides(finished: RecordedRun) -> None:
    mismatch = rehearse(finished, changed(reordered))
    assert isinstance(mismatch, Mismatch)
    assert (mismatch.run, mismatch.workflow, mismatch.reason) == (FACTS.id, "sums", "history mismatch")
    assert mismatch.expected == f"step {one.name} at 1 (completed)"
    assert mismatch.got == f"step {two.name} at 1"
    assert "test_rehearsal.py" in mismatch.message


def test_a_call_that_is_gone_is_a_mismatch_where_it_is_recorded(finished: RecordedRun) -> None:
    mismatch = rehearse(finished, changed(shorter))
    assert mismatch is not None
    assert mismatch.expected == f"step {two.name} at 2 (completed)"
    before = msgspec.structs.replace(finished, state="open", history=finished.history[:1])
    assert rehearse(before, changed(shorter)) is None


def test_an_input_that_no_longer_fits_is_a_mismatch(finished: RecordedRun) -> None:
    async def other(name: str) -> None: ...

    mismatch = rehearse(finished, changed(other))
    assert mismatch is not None
    assert mismatch.reason == "input cannot be decoded"


def test_an_epoch_of_an_unknown_kind_is_a_mismatch(finished: RecordedRun) -> None:
    epoch = RecordedCall.of(record((), "later", kind="epoch", n=1, outcome="later", seq=9))
    mismatch = rehearse(msgspec.structs.replace(finished, history=[*finished.history, epoch]), sums)
    assert mismatch is not None
    assert mismatch.got == "later"


async def drifting(n: int) -> int:
    return await two(await one(n + 1) + 1)


async def drifting_and_shorter(n: int) -> int:
    return await one(n + 1)


def test_other_arguments_would_drift_and_both_fingerprints_are_told(finished: RecordedRun) -> None:
    mismatch = rehearse(finished, changed(drifting))
    assert mismatch is not None
    assert (mismatch.drift, mismatch.reason) == (True, "would drift")
    first = finished.history[0].fingerprint
    assert first is not None
    call = f"step {one.name} at 1, arguments #"
    assert mismatch.expected == f"{call}{first & (1 << 64) - 1:016x}"
    assert mismatch.got is not None
    assert mismatch.got.startswith(call)
    assert mismatch.got != mismatch.expected
    assert mismatch.arguments == '{"n":6}'
    line = drifting.__code__.co_firstlineno + 1
    assert f"test_rehearsal.py:{line}: " in mismatch.message
    assert "other arguments; so does it in 1 later call" in mismatch.message


def test_a_drift_in_a_step_that_is_to_be_executed_again_is_told() -> None:
    run = Run(sums, n=5)
    asked = run.start()
    assert isinstance(asked, DoStep)
    run.history.append(record(1, one.name, n=1, outcome="interrupted", fingerprint=asked.fingerprint, seq=1))
    mismatch = rehearse(recorded(run, "open"), changed(drifting))
    assert mismatch is not None
    assert mismatch.drift
    assert rehearse(recorded(run, "open"), sums) is None


def test_a_run_that_drifts_and_would_be_blocked_is_told_as_blocked(finished: RecordedRun) -> None:
    mismatch = rehearse(finished, changed(drifting_and_shorter))
    assert mismatch is not None
    assert (mismatch.drift, mismatch.reason) == (False, "history mismatch")
    assert mismatch.expected == f"step {two.name} at 2 (completed)"


def test_a_drift_blocks_a_strict_workflow(finished: RecordedRun) -> None:
    mismatch = rehearse(finished, Workflow(drifting, "sums", strict=True))
    assert mismatch is not None
    assert (mismatch.drift, mismatch.reason) == (False, "history mismatch")


@pytest.mark.parametrize(
    "error", [Suspended("elsewhere"), HistoryMismatch("left over", expected="a", got="b"), ValueError("bad")]
)
def test_whatever_comes_out_of_a_drive_is_a_mismatch_of_its_run(
    finished: RecordedRun, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(Replay, "close", fail)
    mismatch = rehearse(finished, sums)
    assert mismatch is not None
    assert not mismatch.drift
    assert str(error) in mismatch.message


def test_an_interruption_from_the_terminal_is_none(
    finished: RecordedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Replay, "close", fail)
    with pytest.raises(KeyboardInterrupt):
        rehearse(finished, sums)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)  # fmt: skip


@given(
    value=st.none() | JSON.map(lambda each: msgspec.json.encode(each).decode()),
    error=st.none() | st.dictionaries(st.text(), JSON),
    fingerprint=st.none() | st.integers(-(2**63), 2**63 - 1),
    at=st.datetimes(timezones=st.just(CREATED.tzinfo)),
)
def test_a_record_comes_back_from_an_export_as_it_went_in(
    value: str | None, error: dict[str, Any] | None, fingerprint: int | None, at: Any
) -> None:
    before = Record((1, 2), 0, "step", "one", "completed", value, error, fingerprint, at, 3, 1)
    line = msgspec.json.encode(RecordedCall.of(before))
    assert msgspec.json.decode(line, type=RecordedCall).to_record() == before
