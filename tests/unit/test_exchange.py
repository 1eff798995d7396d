"""What is decided about signals, state and streams without a database: names, positions, looks and pauses."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from outbox import ConfigError, PayloadError, Progress, ResultTimeout, RunNotFound, StreamItem
from outbox.exchange import PAGE, Following, emitted, progress, progress_of, signal, state
from outbox.statements import exchanged_name

RUN = UUID("019aa0c6-0000-7000-8000-000000000001")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
Row = tuple[Any, ...]


def row(n: int, value: str | None = "1", *, epoch: int = 0, state: str = "open", name: str = "log") -> Row:
    return (state, epoch, n, name, value, NOW)


NOTHING: Row = ("open", None, None, None, None, None)


def following(**options: Any) -> Following:
    settled: dict[str, Any] = {"name": None, "after": 0, "follow": True, "timeout": None}
    return Following(RUN, **{**settled, **options})


def look(it: Following, *rows: Row) -> list[Any]:
    return [item.value for item in it.take(it.statement().decode(rows))]


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "x" * 256, "é" * 128, "a\nb", "a\0", "\ud800", "stepwell:child:1", 7, None]
)
def test_a_name_that_cannot_be_is_refused_by_whoever_takes_it(name: Any) -> None:
    with pytest.raises(ValueError, match=r"emit\(\)"):
        exchanged_name(name, "emit")
    with pytest.raises(ConfigError, match=r"signal\(\)"):
        signal(RUN, name, None, 100)
    if name is not None:
        with pytest.raises(ConfigError, match=r"stream\(\)"):
            following(name=name)


@pytest.mark.parametrize("name", ["approved", "x" * 255, "Ä name with blanks", "stepwell"])
def test_a_printable_name_is_taken(name: str) -> None:
    exchanged_name(name, "emit")
    assert signal(RUN, name, None, 100).parameters["name"] == name


# -- signals -----------------------------------------------------------------------------------------


def test_a_payload_is_encoded_as_any_other() -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    assert signal(RUN, "s", {"at": at, "ids": [RUN]}, 200).parameters["payload"] == (
        f'{{"at":"2026-01-02T00:00:00Z","ids":["{RUN}"]}}'
    )
    assert signal(RUN, "s", None, 200).parameters["payload"] == "null"
    with pytest.raises(PayloadError, match="the payload of signal 's'"):
        signal(RUN, "s", {"at": object()}, 200)
    with pytest.raises(PayloadError, match="200"):
        signal(RUN, "s", "x" * 200, 200)


def test_a_signal_is_never_sent_twice_for_a_lost_answer() -> None:
    assert not signal(RUN, "s", None, 100).repeatable
    assert state(RUN).repeatable
    assert emitted(RUN, None, 0).repeatable


# -- state -------------------------------------------------------------------------------------------


def test_a_state_is_decoded_and_an_unknown_run_is_not_found() -> None:
    rows = [("phase", '"sending"'), ("progress", '{"done":3,"total":10}')]
    assert state(RUN).decode(rows) == {"phase": "sending", "progress": {"done": 3, "total": 10}}
    assert state(RUN).decode([(None, None)]) == {}
    for statement in (state(RUN), progress(RUN), emitted(RUN, None, 0)):
        with pytest.raises(RunNotFound, match="has not committed"):
            statement.decode([])


@pytest.mark.parametrize(
    ("value", "expected", "fraction"),
    [
        ({"done": 3, "total": 12}, Progress(3, 12), 0.25),
        ({"done": 0.5, "total": None}, Progress(0.5, None), None),
        ({"done": 0, "total": 0}, Progress(0, 0), 1.0),
        ({"done": 13, "total": 12}, Progress(13, 12), 1.0),
    ],
)
def test_progress_has_a_fraction_if_there_is_a_total(
    value: dict[str, Any], expected: Progress, fraction: float | None
) -> None:
    found = progress(RUN).decode([("progress", json.dumps(value))])
    assert found == expected
    assert found is not None
    assert found.fraction == fraction
    assert found.to_json() == value


@pytest.mark.parametrize("value", [None, 17, "half", [1], {}, {"done": "much"}, {"done": None, "total": 1}])
def test_a_state_of_that_name_that_is_no_progress_is_none(value: Any) -> None:
    assert progress_of(value) is None


# -- streams -----------------------------------------------------------------------------------------


def test_items_know_the_position_behind_them_over_the_epochs() -> None:
    page = emitted(RUN, None, 0).decode([row(1), row(2, '{"a": 1}'), row(1, epoch=3)])
    assert [item.position for item in page.items] == [1, 2, 3 << 32 | 1]
    assert page.items[1] == StreamItem(2, 2, "log", {"a": 1}, NOW)
    assert (page.position, page.full, page.ended) == (3 << 32 | 1, False, False)
    parameters = emitted(RUN, None, page.position).parameters
    assert (parameters["epoch"], parameters["n"]) == (3, 1)
    shown = page.items[1].to_json()
    assert json.loads(json.dumps(shown)) == shown


def test_items_of_other_names_count_for_the_position_only() -> None:
    page = emitted(RUN, "log", 0).decode([row(1), row(2, None, name="other")])
    assert ([item.n for item in page.items], page.position) == ([1], 2)


def test_it_is_over_when_a_look_sees_the_end_and_everything_before_it() -> None:
    it = following()
    full = [row(n, str(n), state="succeeded") for n in range(1, PAGE + 1)]
    assert look(it, *full) == list(range(1, PAGE + 1))
    assert not it.over
    assert it.pause() == 0
    assert it.statement().parameters["n"] == PAGE
    assert look(it, row(PAGE + 1, "0", state="succeeded")) == [0]
    assert it.over
    assert it.pause() == 0


@pytest.mark.parametrize("ended", ["succeeded", "failed", "cancelled", "blocked"])
def test_any_end_ends_it(ended: str) -> None:
    it = following()
    assert look(it, (ended, *NOTHING[1:])) == []
    assert it.over


def test_without_follow_it_ends_with_what_is_there() -> None:
    it = following(follow=False)
    assert look(it, row(1), row(2)) == [1, 1]
    assert it.over


def test_pauses_grow_from_20_milliseconds_to_half_a_second_and_begin_anew_after_an_item() -> None:
    it = following()
    look(it, NOTHING)
    waits = [it.pause() for _ in range(12)]
    assert waits[:3] == [0.02, 0.03, 0.045]
    assert waits[-1] == 0.5
    look(it, row(1))
    assert it.pause() == 0.02


def test_a_timeout_is_that_of_the_next_item() -> None:
    it = following(timeout=timedelta(0))
    assert look(it, row(1)) == [1]
    with pytest.raises(ResultTimeout, match=f"run {RUN} has emitted nothing"):
        it.pause()


@pytest.mark.parametrize(
    "wrong", [{"after": -1}, {"after": 1.5}, {"after": True}, {"after": 1 << 63}, {"timeout": -1}]
)
def test_a_stream_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        following(**wrong)
