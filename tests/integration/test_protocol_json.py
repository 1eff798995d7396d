"""Payloads come back as the very text that was sent: from enqueue to claim, from record to history."""

from __future__ import annotations

import json

import psycopg
import pytest

from tests.protocol import APPLIED, Held, Lab, Worker

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
