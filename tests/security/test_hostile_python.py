"""What a service may hand to `Client` and `AsyncClient`: it is taken as it is, or refused before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import AsyncClient, Client, ConfigError, PayloadError, RunNotFound
from outbox.database import connect
from tests.postgres import Cluster
from tests.security.hostile import bounded, texts, values

REFUSALS = (ConfigError, PayloadError)


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[str]:
    with cluster.database() as url:
        yield url


@pytest.fixture(scope="module")
def client(shared: str) -> Iterator[Client]:
    with Client(shared) as opened:
        yield opened


@pytest.fixture(scope="module")
def tx(shared: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction of the caller's: a refusal must not abort it, so that it must not come from the database."""
    with connect(shared, application_name="test", autocommit=False) as connection:
        connection.execute("select 1")
        yield connection


def is_alive(tx: psycopg.Connection[Any]) -> bool:
    return tx.info.transaction_status is psycopg.pq.TransactionStatus.INTRANS


def is_json(value: Any) -> bool:
    """Tell whether Python's own writer and Postgres can carry a value; the limits are those of the codec."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):
        return False
    return "\\u0000" not in text


@bounded(150)
@given(value=values)
def test_a_payload_comes_back_as_it_was_or_is_refused(
    client: Client, tx: psycopg.Connection[Any], value: Any
) -> None:
    try:
        run = client.enqueue("w", {"a": value}, tx=tx)
    except PayloadError as error:
        refusal = error
    else:
        found = tx.execute("select input::text from stepwell.runs where id = %s", [run.id]).fetchone()
        assert found is not None
        assert is_json(value)
        assert repr(json.loads(found[0])["a"]) == repr(value)
        return
    assert is_alive(tx)
    assert "\n" not in str(refusal).replace(repr(value), "")
    assert not is_json(value) or "digits" in str(refusal) or "Stepwell's own" in str(refusal), refusal


@bounded(150)
@given(
    name=texts,
    key=texts | st.integers() | st.floats() | st.none() | st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "queue": texts, "lane": texts, "tenant": texts, "version": texts,
            "labels": st.dictionaries(texts, values, max_size=3) | values,
            "priority": st.integers() | texts | st.floats(),
            "delay": st.floats() | st.integers() | texts,
            "deadline": st.floats() | st.integers(),
            "at": st.datetimes(timezones=st.just(UTC)) | st.datetimes() | texts,
        },
    ),
)  # fmt: skip
def test_names_keys_and_options_are_taken_or_refused_before_they_are_sent(
    client: Client, tx: psycopg.Connection[Any], name: str, key: Any, options: dict[str, Any]
) -> None:
    try:
        run = client.enqueue(name, {}, key=key, tx=tx, **options)
    except REFUSALS as error:
        refusal: Exception = error
    else:
        row = tx.execute(
            "select workflow, key, version from stepwell.runs where id = %s", [run.id]
        ).fetchone()
        assert row is not None
        assert row[:2] == (name, None if key is None else str(key))
        tx.rollback()
        tx.execute("select 1")
        return
    assert is_alive(tx), (refusal, options)
    refusal_text = str(refusal)
    assert refusal_text
    assert "SQL" not in refusal_text


@bounded(60)
@given(name=texts, payload=values)
def test_signals_are_taken_or_refused_before_they_are_sent(
    client: Client, tx: psycopg.Connection[Any], name: str, payload: Any
) -> None:
    run = client.enqueue("w", {}, tx=tx)
    try:
        sent = client.signal(run.id, name, payload, tx=tx)
    except REFUSALS:
        assert is_alive(tx)
        return
    row = tx.execute(
        "select name, payload::text from stepwell.signals where run_id = %s", [run.id]
    ).fetchone()
    assert sent
    assert row is not None
    assert row[0] == name
    assert repr(json.loads(row[1])) == repr(payload)


@bounded(60)
@given(text=texts)
def test_what_is_asked_for_by_any_text_is_found_or_refused(client: Client, text: str) -> None:
    for ask in (
        lambda: client.get(text),
        lambda: client.history(text),
        lambda: client.cancel(text),
        lambda: client.result(text, timeout=0.01),
        lambda: list(client.stream(text, follow=False)),
        lambda: client.retry(text),
    ):
        with pytest.raises(RunNotFound):
            ask()
    for ask_many in (
        lambda: client.list(workflow=text),
        lambda: client.list(status=text),
        lambda: list(client.find(workflow=text)),
        lambda: list(client.find(error_like=text)),
    ):
        with suppress(*REFUSALS):
            assert list(ask_many()) == []


@bounded(40)
@given(inputs=st.lists(st.tuples(texts, values), min_size=1, max_size=5), data=st.data())
def test_of_many_all_go_in_or_none(
    client: Client, tx: psycopg.Connection[Any], inputs: list[tuple[str, Any]], data: st.DataObject
) -> None:
    before = tx.execute("select count(*) from stepwell.runs").fetchone()
    try:
        runs = list(
            client.enqueue_many(
                "many", [{"k": k, "v": v} for k, v in inputs], key=lambda row: row["k"], tx=tx
            )
        )
    except REFUSALS:
        assert is_alive(tx)
        assert tx.execute("select count(*) from stepwell.runs").fetchone() == before
        return
    assert len(runs) == len(inputs)
    tx.rollback()
    tx.execute("select 1")


async def test_both_clients_refuse_alike(shared: str) -> None:
    wrong: list[dict[str, Any]] = [
        {"workflow": "step:x"}, {"workflow": "w@1"}, {"workflow": ""}, {"workflow": "\0"}, {"workflow": "\ud800"},
        {"key": "\0"}, {"key": ""}, {"key": "k" * 2**20}, {"key": 10**5000}, {"queue": "stepwell"}, {"queue": "\0"}, {"lane": "x" * 256},
        {"labels": {"a": 10**400}}, {"labels": {"a": [[[[[[[[[1]]]]]]]]]}}, {"labels": [1]}, {"labels": {"\ud800": 1}},
        {"at": datetime(9999, 1, 1, tzinfo=UTC)}, {"at": datetime(1, 1, 1, tzinfo=UTC)}, {"delay": 1e300},
        {"deadline": float("nan")}, {"priority": True}, {"version": "\0"}, {"input": {"a": 10**5000}},
        {"input": {"a\0": 1}},
    ]  # fmt: skip
    with Client(shared) as client:
        async with AsyncClient(shared) as aclient:
            for options in wrong:
                given_options = {"workflow": "w", "input": {}, **options}
                workflow, input_ = given_options.pop("workflow"), given_options.pop("input")
                with pytest.raises(REFUSALS) as one:
                    client.enqueue(workflow, input_, **given_options)
                with pytest.raises(REFUSALS) as other:
                    await aclient.enqueue(workflow, input_, **given_options)
                assert (type(one.value), str(one.value)) == (type(other.value), str(other.value))
                assert len(str(one.value)) < 1000, options
