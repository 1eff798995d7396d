from __future__ import annotations

from typing import Any

import pytest

from outbox.errors import HistoryMismatch
from tests.unit.drives import record
from worker.replay.records import VOIDED, Record, dotted, visible

FAULT = {"type": "ValueError", "message": "x"}


def retry(seq: int, epoch: int = 1) -> Record:
    return record((), "flow", kind="epoch", n=1, outcome="retry", seq=seq, epoch=epoch)


def end(seq: int, epoch: int = 0) -> Record:
    return record((), "flow", kind="run", outcome="failed", seq=seq, epoch=epoch)


def shown(history: list[Record]) -> list[tuple[str, Any, str]]:
    return [
        (dotted(each.path), each.n if each.n < 100 else "last", each.outcome) for each in visible(history)
    ]


def test_records_come_in_the_order_in_which_they_happened_without_those_of_the_run():
    assert shown([end(3), record(2, seq=2), record(1, "a", seq=1)]) == [
        ("1", 0, "completed"),
        ("2", 0, "completed"),
    ]


def test_a_retry_voids_the_failed_outcome_and_its_executions_but_forgets_none_of_them():
    history = [
        record(1, "a", value=1, seq=1),
        record(2, "b", n=1, error=FAULT, seq=2),
        record(2, "b", error=FAULT, seq=3),
        end(4),
        retry(5),
    ]
    assert shown(history) == [("1", 0, "completed"), ("2", 1, VOIDED), ("2", "last", VOIDED)]


def test_what_was_interrupted_or_failed_without_a_final_outcome_stands_after_a_retry():
    history = [record(1, "a", n=1, outcome="interrupted", seq=1), end(2), retry(3)]
    assert shown(history) == [("1", 1, "interrupted")]


@pytest.mark.parametrize(
    "after",
    [record(2, "b", value=1, seq=2), record(2, seq=2), record(2, "b", n=1, outcome="interrupted", seq=2)],
    ids=["a step", "a sleep", "a step under way"],
)
def test_a_failure_that_the_body_got_past_stands_after_a_retry(after: Record):
    history = [record(1, "a", error=FAULT, seq=1), after, end(3), retry(4)]
    assert shown(history)[0] == ("1", 0, "failed")


def test_a_failure_that_only_failures_came_after_is_voided_with_them():
    history = [record(1, "a", error=FAULT, seq=1), record(2, "b", error=FAULT, seq=2), end(3), retry(4)]
    assert shown(history) == [("1", "last", VOIDED), ("2", "last", VOIDED)]


def test_branches_of_a_join_do_not_get_past_each_other():
    history = [
        record((1, 1, 1), "a", error=FAULT, seq=1),
        record((1, 2, 1), "b", value=1, seq=2),
        record((1, 2, 2), "c", value=1, seq=3),
        end(4),
        retry(5),
    ]
    assert shown(history)[0] == ("1.1.1", "last", VOIDED)
    history.insert(3, record(2, "after the join", value=1, seq=3))
    assert shown(history)[0] == ("1.1.1", 0, "failed")


def test_what_a_retry_executed_anew_counts_and_a_second_retry_voids_it_again():
    history = [
        record(1, "a", error=FAULT, seq=1),
        end(2),
        retry(3),
        record(1, "a", error=FAULT, seq=4, epoch=1),
        end(5, epoch=1),
    ]
    assert shown(history) == [("1", "last", VOIDED), ("1", 0, "failed")]
    assert shown([*history, retry(6, epoch=2)]) == [("1", "last", VOIDED), ("1", "last", VOIDED)]


def test_an_epoch_of_an_unknown_kind_is_refused_and_named():
    opening = record((), "flow", kind="epoch", n=1, outcome="merge", seq=1, epoch=1)
    with pytest.raises(HistoryMismatch, match="merge"):
        visible([opening])


def test_a_rewind_forgets_the_call_that_it_goes_back_to_and_all_that_happened_after_it():
    history = [
        record(1, "a", value=1, seq=1),
        record((2, 2, 1), "b", value=1, seq=2),
        record((2, 1, 1), "c", value=1, seq=3),
        record(3, "d", value=1, seq=4),
        end(5),
    ]
    for to, left in ([2], ["1"]), ([2, 1], ["1", "2.2.1"]), ([3], ["1", "2.2.1", "2.1.1"]):
        opening = record((), "flow", kind="epoch", n=1, outcome="rewind", value={"to": to}, seq=6, epoch=1)
        assert [path for path, *_ in shown([*history, opening])] == left


def test_a_fresh_start_forgets_everything_and_a_fork_nothing():
    history = [record(1, "a", value=1, seq=1), record(2, "b", n=1, error=FAULT, seq=2)]
    for outcome, left in ("continue", []), ("fork", ["1", "2"]):
        opening = record((), "flow", kind="epoch", n=1, outcome=outcome, seq=3, epoch=1)
        assert [path for path, *_ in shown([*history, opening])] == left


def test_what_is_said_anew_of_a_step_voids_what_was_said_before_and_its_executions_stand():
    history = [
        record(1, "a", value=1, seq=1),
        record(2, "b", n=1, outcome="interrupted", seq=2),
        end(3),
        retry(4),
        record(2, "b", value=17, seq=5, epoch=1),
        end(6, 1),
    ]
    opening = record((), "flow", kind="epoch", n=1, outcome="resolve", value={"at": [2]}, seq=7, epoch=2)
    left = [("1", 0, "completed"), ("2", 1, "interrupted")]
    assert shown([*history, opening]) == left
    anew = record(2, "b", value="17", seq=8, epoch=2)
    assert shown([*history, opening, anew]) == [*left, ("2", 0, "completed")]


def test_a_retry_voids_a_cancellation_and_what_the_body_did_to_clean_up():
    history = [
        record(1, "a", value=1, seq=1),
        record((), "flow", kind="cancel", n=2, outcome="cancelled", seq=2),
        record(2, "tidy", value=1, seq=3),
        end(4),
        retry(5),
    ]
    assert shown(history) == [("1", 0, "completed")]


def test_once_the_undo_has_begun_a_retry_goes_on_with_it():
    history = [
        record(1, "a", value=1, seq=1),
        record(2, "b", error=FAULT, seq=2),
        record((1, 0), "undo a", error=FAULT, seq=3),
        end(4),
        retry(5),
    ]
    assert shown(history) == [("1", 0, "completed"), ("2", 0, "failed"), ("1.0", "last", VOIDED)]


def test_once_the_undo_has_begun_a_retry_goes_on_with_it_also_after_a_cancellation():
    undo = record((2, 0), "undo", value=1, seq=4)
    history = [
        record(1, "a", value=1, seq=1),
        record(2, "b", value=1, seq=2),
        record((), "flow", kind="cancel", n=2, outcome="cancelled", seq=3),
        undo,
        record((1, 0), "undo", error=FAULT, seq=5),
        end(6),
        retry(7),
    ]
    assert [(each.path, each.outcome) for each in visible(history)][2:] == [
        ((), "cancelled"), ((2, 0), "completed"), ((1, 0), VOIDED),
    ]  # fmt: skip
