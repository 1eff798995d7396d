"""Payloads come back as the very text that was sent: from enqueue to claim, from signal to record to history.

jsonb would sort keys, drop those that come twice, and turn 1e16 into a whole number: a replay would then see something
else than the run did.
"""

from __future__ import annotations

import json

import msgspec
import psycopg
import pytest

from outbox import Client
from tests.protocol import APPLIED, Held, Lab, Worker, child_at, step_at
from worker.engine.transitions import Continued, EmittedRow, StateRow, Taken

TEXTS = [
    '{"b": 1, "a": {"z": [], "y": {}}}',
    '{"twice": 1, "other": 0, "twice": 2}',
    "1e16",
    "-0.0",
    "1E+400",
    "123456789012345678901234567890.10",
    "[1,  2 ,[ ] ]",
    r'["\u00e9\/", "\ud83d\ude00", "é😀"]',
    r'{"\u0061": "\t\u001f\"\\"}',
    "true",
    '""',
    '"é😀\x7f\u2028"',
]


def claimed(lab: Lab) -> tuple[Worker, Held]:
    worker = lab.worker()
    return worker, worker.take()


@pytest.mark.parametrize("text", [*TEXTS, "null", r'"\u00e9"'])
def test_an_input_reaches_its_claimant_as_it_was_enqueued(lab: Lab, text: str) -> None:
    sent = '{ "value" : ' + text + " }"
    lab.db.execute("select stepwell.enqueue('w', %s::json)", [sent])
    assert claimed(lab)[1].claim.input == sent


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_recorded_and_put_out_as_it_was_sent(lab: Lab, text: str) -> None:
    lab.enqueue()
    worker, held = claimed(lab)
    assert worker.flush(held.finish(held.record(1, value=text), output=text)) == [APPLIED]
    assert lab.rows("select value::text from stepwell.outbox where kind = 'step'") == [(text,)]
    assert lab.rows("select output::text from stepwell.runs") == [(text,)]


@pytest.mark.parametrize("text", [*TEXTS, "null", r'"\u00e9"'])
def test_a_signal_is_kept_as_it_was_sent(lab: Lab, text: str) -> None:
    (run,) = lab.enqueue()
    lab.db.execute("select stepwell.signal(%s, 'go', %s::json)", [run, text])
    assert lab.rows("select payload::text from stepwell.signals") == [(text,)]


@pytest.mark.parametrize("text", TEXTS)
def test_a_signal_that_is_taken_is_recorded_as_it_was_sent(lab: Lab, text: str) -> None:
    (run,) = lab.enqueue()
    lab.db.execute("select stepwell.signal(%s, 'go', %s::json)", [run, text])
    worker = lab.worker()
    worker.apply_wakes()
    held = worker.take()
    (signal, payload) = lab.rows("select id, payload::text from stepwell.signals")[0]
    record = held.record(1, value=payload, name="go")
    record.kind = "signal"
    worker.apply(held, held.move(record, extras=[Taken(signal=signal)], took=1))
    assert lab.rows("select from stepwell.signals") == []
    assert lab.rows("select value::text from stepwell.outbox") == [(text,)]


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_run_passes_on_arrives_as_it_was_sent(lab: Lab, text: str) -> None:
    """To a step of its own, to a run that it calls, to those who look on, and to itself in its next epoch."""
    lab.enqueue()
    worker, held = claimed(lab)
    value, given = msgspec.Raw(text.encode()), '{ "value" : ' + text + " }"
    step, child = step_at(1, wakes=0), child_at(2)
    step.args, child.input = value, msgspec.Raw(given.encode())
    shown, emitted = StateRow(key="progress", value=value), EmittedRow(n=1, name="line", value=value)
    worker.apply(held, held.move(extras=[step, child, shown, emitted]))
    (called,) = lab.worker("step:send").claim(1)
    assert called.claim.args == text
    calls = lab.worker("child")
    child_run = calls.take()
    assert child_run.claim.input == given
    assert lab.rows("select value::text from stepwell.state") == [(text,)]
    assert lab.rows("select value::text from stepwell.stream") == [(text,)]

    calls.apply(child_run, child_run.finish(output=text, family=True))
    assert f'"output" : {text},' in lab.one("select payload::text from stepwell.signals")

    assert worker.flush(held.continue_(extras=[Continued(input=child.input)])) == [APPLIED]
    again = [each for each in worker.claim(5) if each.claim.kind == "run"]
    assert [each.claim.input for each in again] == [given]


@pytest.mark.parametrize("text", TEXTS)
def test_a_fork_copies_the_text(lab: Lab, text: str) -> None:
    given = '{ "value" : ' + text + " }"
    lab.db.execute("select stepwell.enqueue('w', %s::json)", [given])
    worker, held = claimed(lab)
    worker.apply(held, held.move(held.record(1, value=text)))
    assert lab.one("select stepwell.fork(%s, '{2}')", held.run) is not None
    assert lab.rows("select input::text from stepwell.runs") == [(given,)] * 2
    copies = "select value::text from stepwell.outbox where kind = 'step'"
    assert lab.rows(copies) == [(text,)] * 2


def test_through_a_client_keys_keep_their_order_and_large_numbers_stay_fractions(lab: Lab) -> None:
    value = {"b": 1e16, "a": {"z": 1.0, "y": 2}}
    text = '{"b":1e16,"a":{"z":1.0,"y":2}}'
    with Client(lab.url) as client:
        run = client.enqueue("w", {"value": value}, key="k")
        many = list(client.enqueue_many("w", [{"value": value}]))
        assert client.signal(run.id, "go", value)
        assert len(many) == 1
    assert lab.rows("select input::text from stepwell.runs") == [(f'{{"value":{text}}}',)] * 2
    assert lab.rows("select payload::text from stepwell.signals") == [(text,)]


@pytest.mark.parametrize("text", [r'"caf\u00e9 \/"', r'"\ud83d\ude00"'])
def test_of_a_bare_string_the_characters_are_kept_but_not_how_they_were_escaped(lab: Lab, text: str) -> None:
    """json_to_recordset decodes a string and escapes it anew. No encoder of ours escapes what need not be."""
    lab.enqueue()
    worker, held = claimed(lab)
    assert worker.flush(held.finish(held.record(1, value=text))) == [APPLIED]
    kept = lab.one("select value::text from stepwell.outbox where kind = 'step'")
    assert kept != text
    assert json.loads(kept) == json.loads(text)


def test_a_null_is_recorded_as_no_value(lab: Lab) -> None:
    lab.enqueue()
    worker, held = claimed(lab)
    assert worker.flush(held.finish(held.record(1, value="null"), output="null")) == [APPLIED]
    assert lab.rows("select value, outcome from stepwell.outbox where kind = 'step'") == [(None, "completed")]
    assert lab.rows("select output, state from stepwell.runs") == [(None, "succeeded")]


@pytest.mark.parametrize("text", [r'"\u0000"', r'{"a": ["\u0000"]}', r'{"\u0000": 1}', r'"\ud800"'])
def test_what_no_text_can_hold_is_refused_as_bad_data_and_nothing_is_written(lab: Lab, text: str) -> None:
    lab.enqueue()
    worker, held = claimed(lab)
    before = lab.snapshot()
    with pytest.raises(psycopg.DataError) as refused:
        worker.flush(held.move(held.record(1, value=text)))
    assert (refused.value.sqlstate or "").startswith("22")
    assert lab.snapshot() == before


def test_labels_are_searchable_and_nobody_relies_on_their_text(lab: Lab) -> None:
    lab.enqueue(labels='{"b": 1, "a": 2}')
    assert lab.one("select labels @> '{\"a\": 2}' from stepwell.runs")
    assert json.loads(lab.worker().take().claim.labels or "") == {"a": 2, "b": 1}
