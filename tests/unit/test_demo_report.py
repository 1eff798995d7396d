"""The demo's verdict: green only if every lead was welcomed once and saved once."""

from __future__ import annotations

import json
from dataclasses import replace
from uuid import UUID

import pytest
from rich.console import Console

from worker.demo.maildir import Message
from worker.demo.report import Facts, Kill, Unanswered, report_of, show

RUNS = {1: UUID(int=1), 2: UUID(int=2)}


def message(lead: int, *, execution: int = 1) -> Message:
    return Message(f"<{RUNS[lead]}_1@stepwell.example>", f"lead{lead}@example.com", execution)


GOOD = Facts(
    rows=4,
    rejected=["row 3: column email is empty"],
    duplicates=1,
    leads={1: "lead1@example.com", 2: "lead2@example.com"},
    ends={1: (RUNS[1], "succeeded"), 2: (RUNS[2], "succeeded")},
    messages=[message(1), message(2)],
    crm_rows={1: 1, 2: 1},
    unanswered={},
    tasks_left=0,
    seconds=0.5,
    kills=[Kill("a worker", 3, 0.2), Kill("the tree", 5, 4.125)],
)


def test_all_is_well_when_each_lead_has_one_message_and_one_row() -> None:
    report = report_of(GOOD)

    assert report.ok
    assert report.problems == []


def test_the_json_has_exactly_the_promised_keys() -> None:
    assert json.loads(report_of(GOOD).to_json()) == {
        "leads": 4,
        "rejected": 1,
        "duplicates": 1,
        "succeeded": 2,
        "messages": 2,
        "duplicate_messages": 0,
        "crm_rows": 2,
        "kills": 2,
        "recovery_seconds": 4.125,
        "runs_per_second": 4.0,
    }


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (replace(GOOD, messages=[message(1)]), "1 lead (2) without a message"),
        (replace(GOOD, messages=[message(1), message(2), message(2)]), "1 lead (2) with several messages"),
        (
            replace(GOOD, messages=[*GOOD.messages, Message("<x@y>", "stranger@example.com", 1)]),
            "1 addresses with a message that are no lead's: stranger@example.com",
        ),
        (replace(GOOD, crm_rows={1: 1}), "1 lead (2) without a row in crm.leads"),
        (replace(GOOD, crm_rows={1: 1, 2: 2}), "1 lead (2) with several rows in crm.leads"),
        (replace(GOOD, crm_rows={1: 1, 2: 1, 9: 1}), "1 lead (9) in crm.leads that were never enqueued"),
        (
            replace(GOOD, ends={**GOOD.ends, 2: (RUNS[2], "open")}),
            "1 lead (2) with a run that is open, not succeeded",
        ),
        (replace(GOOD, ends={1: GOOD.ends[1]}), "1 lead (2) with a run that is missing, not succeeded"),
        (replace(GOOD, tasks_left=3), "3 tasks are left over"),
        (
            replace(GOOD, kills=[Kill("a worker", 3, None)]),
            "tasks are still claimed by a worker that was killed",
        ),
    ],
)
def test_whatever_is_missing_too_much_or_stuck_is_a_problem(facts: Facts, problem: str) -> None:
    report = report_of(facts)

    assert not report.ok
    assert problem in report.problems


def test_a_problem_of_the_scenario_itself_counts_too() -> None:
    assert report_of(GOOD, ["the workers have ended by themselves"]).problems == [
        "the workers have ended by themselves"
    ]


def test_a_send_was_found_when_its_message_is_of_an_execution_that_never_answered() -> None:
    unanswered = {RUNS[1]: Unanswered(sends=1, interrupted=1), RUNS[2]: Unanswered(sends=1, interrupted=2)}
    messages = [message(1, execution=1), message(2, execution=2)]

    report = report_of(replace(GOOD, unanswered=unanswered, messages=messages))

    assert report.interrupted == 3
    assert report.found_sent == 1


def test_the_printed_report_names_each_problem() -> None:
    console = Console(record=True, width=160, file=None, quiet=False)
    with console.capture() as capture:
        show(report_of(replace(GOOD, tasks_left=3)), console)

    assert "3 tasks are left over" in capture.get()
    assert "welcomed once" not in capture.get()
