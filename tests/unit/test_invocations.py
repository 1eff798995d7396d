"""From a call to what is enqueued: names, inputs, keys, options, batches. No database."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import count as counting
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from outbox.errors import ConfigError, PayloadError, RunNotFound, UnknownWorkflow
from outbox.invocations import (
    MAX_BATCH_BYTES,
    Target,
    any_needs_names,
    batches,
    chunks,
    chunks_async,
    parameters_of,
)
from outbox.outcomes import pauses
from outbox.statements import Options, key_text, run_uuid
from tests.flows import Flow, Lead, count, welcome

LIMIT = 1_000_000


def encoded(workflow: Any, *args: Any, published: Any = None, **kwargs: Any) -> Any:
    return json.loads(Target.of(workflow).knowing(published).encode(args, kwargs, LIMIT))


# -- arguments ---------------------------------------------------------------------------------------


def test_by_function_defaults_are_filled_in() -> None:
    expected = {"lead": {"id": 1, "name": "Ada"}, "greeting": "Hello"}
    assert encoded(welcome, Lead(1)) == expected
    assert encoded(welcome, lead=Lead(1)) == expected


@pytest.mark.parametrize(
    ("args", "said"),
    [((), "lead"), ((Lead(1), "a", "b"), "too many"), ((Lead(float("nan")),), "lead.id")],  # type: ignore[arg-type]  # wrong on purpose
)
def test_by_function_arguments_that_do_not_fit_are_named(args: tuple[Any, ...], said: str) -> None:
    with pytest.raises(PayloadError, match=said):
        encoded(welcome, *args)


def test_by_name_one_mapping_is_the_input() -> None:
    assert encoded("w", {"lead": {"id": 1}}) == {"lead": {"id": 1}}
    with pytest.raises(PayloadError, match="nothing can be added by keyword"):
        encoded("w", {"lead": {"id": 1}}, greeting="Hello")


def test_by_name_keywords_are_parameters() -> None:
    assert encoded("w", lead=Lead(1), n=2) == {"lead": {"id": 1, "name": "Ada"}, "n": 2}
    assert encoded("w") == {}


def test_by_name_positional_arguments_need_a_published_schema() -> None:
    schema = welcome.signature.json_schema()
    assert encoded("w", Lead(1), "Hi", published=schema) == {
        "lead": {"id": 1, "name": "Ada"},
        "greeting": "Hi",
    }
    assert encoded("w", Lead(1), greeting="Hi", published=schema)["greeting"] == "Hi"
    with pytest.raises(UnknownWorkflow, match="no worker has published the parameters of workflow 'w'"):
        encoded("w", Lead(1))
    with pytest.raises(PayloadError, match=r"takes 2 arguments \(lead, greeting\), got 3"):
        encoded("w", 1, 2, 3, published=schema)
    with pytest.raises(PayloadError, match="multiple values for 'lead'"):
        encoded("w", 1, lead=2, published=schema)


def test_parameter_names_keep_the_order_of_the_function() -> None:
    def many(zebra: int, apple: Lead, *, middle: str = "") -> None: ...

    assert parameters_of(Flow(many).signature.json_schema()) == ("zebra", "apple", "middle")
    assert parameters_of({"type": "object", "properties": {"b": {}, "a": {}}}) == ("b", "a")
    assert parameters_of({}) == ()


def test_too_large_an_input_is_refused() -> None:
    with pytest.raises(PayloadError, match="too large"):
        Target.of("w").encode((), {"text": "x" * 2000}, 1000)


@pytest.mark.parametrize("workflow", [None, 17, len, Lead, "", "x" * 256, "a\0b", "\ud800"])
def test_what_is_no_workflow_is_refused(workflow: Any) -> None:
    with pytest.raises(ConfigError):
        Target.of(workflow)


def test_an_undecorated_function_is_told_so() -> None:
    def plain() -> None: ...

    with pytest.raises(ConfigError, match=r"plain is no workflow: decorate it with @workflow"):
        Target.of(plain)  # type: ignore[arg-type]  # wrong on purpose


# -- keys, ids, options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (None, None),
        ("order 1", "order 1"),
        (17, "17"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ("é" * 256, "é" * 256),
    ],
)
def test_a_key_is_text(key: Any, text: str | None) -> None:
    assert key_text(key) == text


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (True, "must be a str, an int or a UUID, got `bool`"),
        (1.5, "got `float`"),
        (b"x", "got `bytes`"),
        (("a",), "got `tuple`"),
        ("", "must not be empty"),
        ("é" * 257, "at most 512 bytes, this one has 514"),
        ("a\0", "NUL"),
        ("\ud800", "surrogate"),
    ],
)
def test_what_is_no_key_is_refused_in_one_sentence(key: Any, said: str) -> None:
    with pytest.raises(PayloadError, match=said):
        key_text(key)


@pytest.mark.parametrize("run", ["", "17", "no-uuid", None, 17])
def test_what_is_no_id_is_the_id_of_no_run(run: Any) -> None:
    with pytest.raises(RunNotFound, match="is not the id of a run"):
        run_uuid(run)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"priority": -1}, "priority"),
        ({"priority": 10}, "priority"),
        ({"priority": 1.0}, "priority"),
        ({"priority": True}, "priority"),
        ({"delay": -1}, "delay"),
        ({"delay": float("nan")}, "delay"),
        ({"delay": float("inf")}, "delay"),
        ({"delay": "1 s"}, "delay"),
        ({"delay": True}, "delay"),
        ({"delay": timedelta(seconds=-1)}, "delay"),
        ({"delay": 1e12}, "thousand years"),
        ({"deadline": -1}, "deadline"),
        ({"at": datetime(2026, 1, 1)}, "time zone"),
        ({"at": "tomorrow"}, "time zone"),
        ({"delay": 1, "at": datetime(2026, 1, 1, tzinfo=UTC)}, "delay or at"),
        ({"queue": ""}, "queue"),
        ({"queue": "stepwell"}, "internal"),
        ({"queue": 17}, "queue"),
        ({"lane": "\0"}, "lane"),
        ({"tenant": "x" * 256}, "tenant"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Options.of(**options)


@pytest.mark.parametrize("labels", ["text", {"a": float("nan")}, {1: "a"}, {"a": "\0"}, {"a": object()}])
def test_labels_that_cannot_be_carried_are_named(labels: Any) -> None:
    with pytest.raises(PayloadError, match="labels"):
        Options.of(labels=labels)


def test_durations_are_seconds_or_timedeltas() -> None:
    assert Options.of(delay=timedelta(minutes=1), deadline=90).delay == 60.0
    assert Options.of(deadline=90).deadline == 90.0


# -- many --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    id: int
    name: str


def test_chunks_read_no_further_ahead_than_one_chunk() -> None:
    numbers = counting()
    reading = chunks(numbers, 3)
    assert [next(reading), next(reading)] == [[0, 1, 2], [3, 4, 5]]
    assert next(numbers) == 6


async def test_chunks_of_an_asynchronous_source() -> None:
    async def source() -> Any:
        for number in range(5):
            yield number

    assert [chunk async for chunk in chunks_async(source(), 2)] == [[0, 1], [2, 3], [4]]
    assert [chunk async for chunk in chunks_async(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert [chunk async for chunk in chunks_async(range(0), 2)] == []


def inputs_of(workflow: Any, items: list[Any], **options: Any) -> list[Any]:
    found = batches(Target.of(workflow), items, 0, options.get("key"), LIMIT)
    return [json.loads(text) for batch in found for text in batch.texts]


def test_an_item_is_the_argument_and_a_tuple_is_all_of_them() -> None:
    assert inputs_of(count, [1, (2,)]) == [{"n": 1}, {"n": 2}]
    assert [each["greeting"] for each in inputs_of(welcome, [Lead(1), (Lead(2), "Hi")])] == ["Hello", "Hi"]
    assert inputs_of("w", [{"n": 1}]) == [{"n": 1}]


def test_a_named_tuple_is_a_value() -> None:
    def take(row: list[Any]) -> None: ...

    assert inputs_of(Flow(take), [Row(1, "Ada")]) == [{"row": [1, "Ada"]}]


def test_only_names_need_a_schema() -> None:
    assert any_needs_names(Target.of("w"), [{"a": 1}, 17])
    assert not any_needs_names(Target.of("w"), [{"a": 1}])
    assert not any_needs_names(Target.of(count), [17])


def test_a_batch_is_bounded_in_bytes() -> None:
    text = "x" * (MAX_BATCH_BYTES // 4)
    found = list(batches(Target.of("w"), [{"text": text}] * 10, 0, lambda item: "k", 2 * MAX_BATCH_BYTES))
    assert [len(batch.texts) for batch in found] == [3, 3, 3, 1]
    assert [batch.keys for batch in found] == [["k"] * 3, ["k"] * 3, ["k"] * 3, ["k"]]


def test_one_item_larger_than_a_batch_goes_alone() -> None:
    text = "x" * (MAX_BATCH_BYTES + 1)
    found = list(batches(Target.of("w"), [{"n": 1}, {"text": text}, {"n": 2}], 0, None, 2 * MAX_BATCH_BYTES))
    assert [len(batch.texts) for batch in found] == [1, 1, 1]


def test_the_item_at_fault_is_named_by_its_number() -> None:
    target = Target.of(count)
    with pytest.raises(PayloadError, match=r"inputs\[1003\] of workflow 'count'.*too many"):
        list(batches(target, [1, 2, 3, (4, "one too many")], 1000, None, LIMIT))
    with pytest.raises(PayloadError, match=r"inputs\[1002\] of workflow 'count': a key must be"):
        list(batches(target, [1, 2, 3], 1000, lambda item: item if item < 3 else 1.5, LIMIT))  # type: ignore[arg-type, return-value]  # wrong on purpose


# -- waiting -----------------------------------------------------------------------------------------


def test_pauses_grow_to_half_a_second_and_end_with_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("outbox.outcomes.time.monotonic", lambda: clock[0])
    taken = []
    for pause in pauses(3):
        taken.append(pause)
        clock[0] += pause
    assert taken[0] == 0.02
    assert max(taken) == 0.5
    assert taken == sorted(taken[:-1]) + taken[-1:]
    assert sum(taken) == pytest.approx(3)


def test_no_timeout_waits_for_ever_and_zero_not_at_all() -> None:
    assert next(pauses(None)) == 0.02
    assert list(pauses(0)) == []
    with pytest.raises(ConfigError, match="timeout"):
        next(pauses(-1))
