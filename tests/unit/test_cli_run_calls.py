"""The calls of a run as a tree: joins, children, signals, patches, cancellations, epochs, and that it stays short."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from outbox.history import HistoryRecord, TaskInfo
from tests.unit.test_cli_rendering import RUN, after, drawn, record, run_info, task
from worker.cli.rendering import moment_text
from worker.cli.run_calls import LISTED, NOTABLE, call_rows
from worker.cli.run_details import Child, Details
from worker.cli.run_list import run_table
from worker.cli.run_view import run_view

OPEN = run_info(status="waiting", finished_at=None, output=None)
CHILD = UUID("0193a000-0000-7000-8000-0000000000c1")


def lines(
    history: list[HistoryRecord], tasks: list[TaskInfo] | None = None, *children: Child, run: Any = OPEN
) -> list[str]:
    """Return path, name, outcome and note of each row; the name with its indentation."""
    rows = call_rows(run, history, tasks or [], children)
    return [
        f"{row.path.plain:<6}|{row.name.plain}|{row.outcome.plain}|{row.note.plain}".rstrip("|")
        for row in rows
    ]


def step_task(*path: int, **changes: Any) -> TaskInfo:
    settled: dict[str, Any] = {
        "kind": "step", "path": path, "name": "step:charge", "state": "ready", "doing": None, "claimed_by": None,
    }  # fmt: skip
    return task(**{**settled, **changes})


def parked(*doing: int, **changes: Any) -> TaskInfo:
    return task(**{"state": "waiting", "doing": doing, "claimed_by": None, **changes})


def test_the_calls_of_a_join_stand_below_it_in_the_order_of_their_paths() -> None:
    history = [
        record(1, (1,), "reserve", 1),
        record(2, (2, 3, 1), "charge", 2),
        record(3, (2, 1, 1), "charge", 3, value=7),
        record(4, (2, 2, 1, 1, 1), "deep", 4),
        record(5, (3,), "ship", 5),
        record(6, (2, 4, 1), "late", 6),  # nobody waited for it any more
    ]
    assert lines(history) == [
        "1     |reserve|completed",
        "2     |map/gather||4 completed",
        "2.1.1 |  charge|completed|7",
        "2.2.1 |  map/gather||1 completed",
        "2.2.1.1.1|    deep|completed",
        "2.3.1 |  charge|completed",
        "2.4.1 |  late|completed",
        "3     |ship|completed",
    ]


def test_what_took_how_long_counts_within_a_branch() -> None:
    history = [
        record(1, (1,), "reserve", 1),
        record(2, (2, 1, 1), "a", 3),
        record(3, (2, 2, 1), "b", 4),
        record(4, (2, 1, 2), "c", 9),
        record(5, (3,), "ship", 10),
    ]
    took = {row.path.plain: row.took for row in call_rows(OPEN, history, [])}
    assert took == {
        "1": "750 ms", "2": "", "2.1.1": "2.0 s", "2.2.1": "3.0 s", "2.1.2": "6.0 s", "3": "1.0 s"
    }  # fmt: skip


def test_what_is_left_to_do_stands_at_its_call() -> None:
    tasks = [
        parked(awaits=("approved", "stepwell:child")),
        step_task(2, 1, 1, state="claimed", claimed_by=9),
        step_task(2, 2, 1, queue="gpu"),
        step_task(2, 3, 1, state="paused"),
        step_task(2, 4, 1, kind="timer", name="sleep", state="waiting", due_at=after(60), queue="stepwell"),
        step_task(2, 5, 1, kind="timer", name="timeout", state="waiting", due_at=after(60), queue="stepwell"),
    ]
    history = [record(1, (2, 2, 1), "charge", 1, n=1, outcome="interrupted")]
    found = lines(history, tasks, Child(CHILD, "pack", "running", (2, 6, 1)))
    assert found[0] == "2     |map/gather||2 running, 3 waiting, 1 paused; waits for signal approved"
    assert found[1:4] == [
        "2.1.1 |  charge|running|worker 9",
        found[2],
        "2.2.1 |  charge|waiting|queue gpu",
    ]
    assert found[2].startswith("      |    execution 1|interrupted|")
    assert found[4] == "2.3.1 |  charge|paused"
    assert found[5].startswith("2.4.1 |  sleep|waiting|until ")
    assert found[6].startswith("2.5.1 |  signal approved|waiting|until ")
    assert found[7:] == [f"2.6.1 |  child pack|running|run {CHILD}"]


@pytest.mark.parametrize(
    ("waiting", "said"),
    [
        (parked(4, awaits=("approved",)), "4     |signal approved|waiting"),
        (parked(4, state="paused"), "4     |…|paused"),
        (parked(), ""),
        (parked(awaits=("stepwell:child",)), ""),
    ],
)
def test_a_body_that_waits_for_one_thing(waiting: TaskInfo, said: str) -> None:
    assert lines([], [waiting]) == ([said] if said else [])


def test_a_time_out_and_the_wait_for_the_signal_are_one() -> None:
    limit = step_task(1, 2, 1, kind="timer", name="timeout", state="waiting", due_at=after(60))
    for own in (parked(1, 2, 1, awaits=("approved",)), parked(awaits=("approved",))):
        found = lines([record(1, (1, 1, 1), "charge", 1)], [own, limit])
        assert found[2].startswith("1.2.1 |  signal approved|waiting|until ")
        assert len(found) == 3


def test_a_child_is_shown_until_its_result_is_and_with_it() -> None:
    child = Child(CHILD, "pack", "succeeded", (1,))
    assert lines([], [parked(awaits=("stepwell:child",))], child) == [
        f"1     |child pack|succeeded|run {CHILD}"
    ]
    taken = record(1, (1,), "pack", 1, kind="child", value={"boxes": 2})
    assert lines([taken], [], child) == [f'1     |child pack|completed|{{"boxes": 2}}  run {CHILD}']


def test_a_child_that_was_begun_stands_where_it_was_begun() -> None:
    child = Child(CHILD, "report", "running", (2,), after(1.5))
    history = [record(1, (1,), "a", 1), record(2, (3,), "b", 2), record(3, (), "w", 3, kind="cancel", n=2)]
    shown = f"2     |child report|running|run {CHILD}"
    assert [line.split("|")[1] for line in lines(history, [], child)] == [
        "a",
        "child report",
        "b",
        "(cancel)",
    ]
    assert lines(history[:1], [], child)[-1] == shown
    assert lines([], [], child) == [shown]
    # It was made before the retry, and stands in the part of that time.
    opened = record(4, (), "w", 4, kind="epoch", n=1, outcome="retry", epoch=1)
    later = record(5, (3,), "b", 5, epoch=1)
    found = [line.split("|")[1] for line in lines([history[0], opened, later], [], child)]
    assert found == ["a", "child report", "(retry)", "b"]


def test_after_a_rewind_the_record_of_a_child_does_not_show_the_new_one() -> None:
    taken = record(1, (1,), "pack", 1, kind="child", value=1)
    rewound = record(2, (), "w", 2, kind="epoch", n=1, outcome="rewind", epoch=1, value={"to": [1]})
    anew = Child(CHILD, "pack", "running", (1,), after(3))
    found = lines([taken, rewound], [], anew)
    assert found[0] == "1     |child pack|completed|1"
    assert found[2] == f"1     |child pack|running|run {CHILD}"
    again = record(3, (1,), "pack", 4, kind="child", value=2, epoch=1)
    assert lines([taken, rewound, again], [], anew)[2:] == [f"1     |child pack|completed|2  run {CHILD}"]


def test_a_fork_was_created_when_it_was_made() -> None:
    made = after(60)
    fork = UUID(int=int(made.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62)
    info = run_info(id=fork, started_at=after(60.5), finished_at=after(61))
    opened = record(2, (), "w", 60, kind="epoch", n=1, outcome="fork", epoch=1)
    view = drawn(run_view(Details(info, [record(1, (1,), "a", 5), opened, record(3, (2,), "b", 61)], [])))
    assert f"created {moment_text(made)} · started after 500 ms" in view
    assert moment_text(made) in run_table([info]).plain
    first = next(row for row in call_rows(info, [record(1, (1,), "a", 5), opened], []))
    assert first.took == ""


def test_a_large_join_is_a_line_with_numbers_and_what_somebody_may_have_to_look_at() -> None:
    history = [record(n, (3, n, 1), "charge", n / 1000) for n in range(1, 9_999)]
    tasks = [
        task(kind="window", path=(3,), name="window", state="waiting", doing=None, claimed_by=None),
        step_task(3, 9_999, 1, state="claimed", claimed_by=7),
        step_task(3, 10_000, 1, state="claimed", claimed_by=8),
        *(step_task(3, n, 1, state="waiting") for n in range(10_001, 10_101)),
    ]
    assert lines(history, tasks) == [
        "3     |map||9,998 completed, 2 running, 100 waiting",
        "3.9999.1|  charge|running|worker 7",
        "3.10000.1|  charge|running|worker 8",
    ]
    view = drawn(run_view(Details(OPEN, history, tasks)))
    assert view.count("\n") < 15


def test_of_many_failures_the_first_are_shown() -> None:
    error = {"type": "E", "message": "no"}
    history = [
        record(n, (1, n, 1), "charge", n, outcome="failed", error=error) for n in range(1, LISTED + 11)
    ]
    found = lines(history)
    assert found[0] == f"1     |map/gather||{LISTED + 10} failed"
    assert found[1] == "1.1.1 |  charge|failed|E: no"
    assert found[-1] == f"      |  … and {LISTED + 10 - NOTABLE} more"
    assert len(found) == NOTABLE + 2


def test_signals_patches_cancellations_and_undo_are_named() -> None:
    history = [
        record(1, (0, 1), "new-way", 1, kind="patch"),
        record(2, (1,), "charge", 1),
        record(3, (2,), "approved", 2, kind="signal", value={"by": "Ada"}),
        record(4, (3,), "more", 3, kind="signal", outcome="failed", error={"type": "TimeoutError"}),
        record(5, (), "w", 4, kind="cancel", n=2, outcome="cancelled"),
        record(6, (2, 1, 1, 0), "charge.undo", 5, n=1, outcome="failed", error={"type": "E"}),
        record(7, (2, 1, 1, 0), "charge.undo", 5),
        record(8, (1, 0), "refund", 6),
        record(9, (), "w", 7, kind="run", outcome="cancelled"),
    ]
    found = lines(history, run=run_info(status="cancelled", output=None))
    assert found[:4] == [
        "      |(patch) new-way|taken",
        "1     |charge|completed",
        '2     |signal approved|completed|{"by": "Ada"}',
        "3     |signal more|failed|TimeoutError",
    ]
    assert found[4].startswith("      |(cancel)||the run was cancelled, 2026-")
    assert found[5].startswith("      |  execution 1|failed|")
    assert found[6:] == ["      |undo of 2.1.1: charge|completed", "      |undo of 1: refund|completed"]
    late = record(1, (), "w", 4, kind="cancel", n=2, outcome="cancelled", error={"type": "DeadlineExceeded"})
    assert "its deadline has passed" in lines([late])[0]


def test_epochs_begin_new_parts_in_which_calls_may_come_again() -> None:
    def opened(seq: int, outcome: str, value: Any = None) -> HistoryRecord:
        return record(seq, (), "w", seq, kind="epoch", n=1, outcome=outcome, epoch=seq, value=value)

    history = [
        record(1, (1, 1, 1), "a", 1),
        record(2, (), "w", 2, kind="run", outcome="failed", error={"type": "E"}),
        opened(3, "retry"),
        record(4, (1, 2, 1), "b", 4, epoch=3),
        opened(5, "rewind", {"to": [1, 2]}),
        record(6, (1, 2, 1), "b", 6, epoch=5),
        opened(7, "fork"),
        opened(8, "later kind"),
    ]
    info = run_info(status="waiting", finished_at=None, output=None, epoch=8)
    found = lines(history, [step_task(1, 3, 1)], run=info)
    assert [line.split("|")[:3] for line in found if not line.startswith("1")] == [
        ["      ", "(end)", "failed"], ["      ", "(retry)", ""], ["      ", "(rewind)", ""], ["      ", "(fork)", ""],
        ["      ", "(later kind)", ""],
    ]  # fmt: skip
    assert found[0:2] == ["1     |map/gather||1 completed", "1.1.1 |  a|completed"]
    assert "to call 1.2:" in next(line for line in found if "(rewind)" in line)
    assert found[-2:] == ["1     |map/gather||1 waiting", "1.3.1 |  charge|waiting"]
    text = drawn(run_view(Details(info, history, [])))
    assert "retried 1× · rewound 1× · forked 1×" in text


def test_what_a_fresh_start_has_left_behind_is_counted() -> None:
    history = [record(n, (n,), "s", n) for n in range(1, 501)]
    for seq in (501, 503):
        history += [
            record(seq, (), "w", seq, kind="epoch", n=1, outcome="continue", value={"n": seq}, epoch=seq),
            record(seq + 1, (1,), "s", seq + 1, epoch=seq),
        ]
    found = lines(history)
    assert found[0] == "      |…||2 fresh starts; 501 records of before the last of them are left out"
    assert found[1].startswith("      |(continue)||started anew ")
    assert found[1].endswith('{"n": 503}')
    assert found[2:] == ["1     |s|completed"]


def test_facts_that_are_under_way_are_named() -> None:
    wakes = [
        task(kind="wake", name=name, state="ready", doing=None, claimed_by=None)
        for name in ("cancel", "signal", "poison")
    ]
    assert lines([], wakes) == [
        "      |(cancel)|asked", "      |(signal)|sent", "      |(poison)|to be blocked"
    ]  # fmt: skip


def test_state_and_progress_are_shown() -> None:
    state = {"phase": {"name": "first"}, "progress": {"done": 3, "total": 12}, "note": "x" * 1000}
    text = drawn(run_view(Details(OPEN, [], [], state=state)))
    assert "3 of 12 (25%)" in text
    assert "██████░░" in text
    assert 'phase     {"name": "first"}' in text
    assert "x" * 1000 not in text
    assert "17 \n" not in text
    assert "progress  1,700" in drawn(run_view(Details(OPEN, [], [], state={"progress": {"done": 1700}})))
    assert 'progress  "half"' in drawn(run_view(Details(OPEN, [], [], state={"progress": "half"})))


def test_the_header_says_version_and_parent() -> None:
    text = drawn(run_view(Details(run_info(version="2", parent=CHILD), [], [])))
    assert f"version 2 · queue default · priority 5 · child of {CHILD}" in text
    assert str(RUN) in text


def test_json_has_state_and_children() -> None:
    child = Child(CHILD, "pack", "running", (2, 1, 1))
    shown = Details(OPEN, [], [], [child], {"a": 1}, "because").to_json()
    assert list(shown) == ["run", "history", "tasks", "children", "state", "why"]
    assert shown["children"] == [{"id": str(CHILD), "workflow": "pack", "status": "running", "path": "2.1.1"}]
    assert (shown["state"], shown["why"]) == ({"a": 1}, "because")
