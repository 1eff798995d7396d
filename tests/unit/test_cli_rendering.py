"""How runs are drawn: what is shown, in how much space, and that a value cannot drive the terminal."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from rich.console import Console, RenderableType

from outbox import Progress, faults
from outbox.history import HistoryRecord, RunInfo, TaskInfo
from worker.cli.rendering import console
from worker.cli.run_details import Details
from worker.cli.run_list import run_table
from worker.cli.run_view import run_view
from worker.replay import driver as replay

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
RUN = UUID("0193a000-0000-7000-8000-000000000001")


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def run_info(**changes: Any) -> RunInfo:
    settled: dict[str, Any] = {
        "id": RUN, "workflow": "welcome_lead", "status": "succeeded", "queue": "default", "priority": 5, "labels": {},
        "epoch": 0, "created_at": START, "started_at": after(0.25), "finished_at": after(3), "deadline_at": None,
        "input": {"lead": {"id": 1}}, "output": 7, "error": None, "attempt": None, "doing": None, "due_at": None,
        "task_state": None, "claimed_by": None, "interruptions": None,
    }  # fmt: skip
    return RunInfo(**{**settled, **changes})


def record(seq: int, path: tuple[int, ...], name: str, at: float, **changes: Any) -> HistoryRecord:
    settled: dict[str, Any] = {
        "seq": seq, "epoch": 0, "path": path, "n": 0, "kind": "step", "name": name, "outcome": "completed",
        "value": None, "error": None, "fingerprint": None, "worker": 1, "at": after(at),
    }  # fmt: skip
    return HistoryRecord(**{**settled, **changes})


def task(**changes: Any) -> TaskInfo:
    settled: dict[str, Any] = {
        "id": 1, "kind": "run", "path": (), "name": "welcome_lead", "queue": "default", "priority": 5,
        "state": "claimed", "due_at": None, "attempt": 1, "doing": (2,), "interruptions": 0, "cancelling": False,
        "claimed_by": 99,
    }  # fmt: skip
    return TaskInfo(**{**settled, **changes})


def view_of(
    info: RunInfo, history: list[HistoryRecord], tasks: list[TaskInfo], **more: Any
) -> RenderableType:
    return run_view(Details(info, history, tasks, **more))


def drawn(view: RenderableType, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(view)
    return out.getvalue()


def test_a_finished_run_shows_steps_executions_durations_and_output() -> None:
    history = [
        record(
            1,
            (1,),
            "send_welcome",
            1.25,
            n=1,
            outcome="failed",
            error={"type": "OSError", "message": "refused"},
        ),
        record(2, (1,), "send_welcome", 2.25, value="<id@x>"),
        record(3, (2, 1), "save", 2.75, value=7),
        record(4, (), "welcome_lead", 3, kind="run", outcome="succeeded", value=7),
    ]
    text = drawn(view_of(run_info(labels={"source": "web"}, key="20419"), history, [], why=None))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == f"welcome_lead {RUN} succeeded"
    assert "key 20419" in text
    assert "labels source=web" in text
    assert "started after 250 ms" in text
    assert any(line.startswith("execution 1 failed 1.0 s") and "OSError: refused" in line for line in lines)
    assert '1 send_welcome completed 1.0 s "<id@x>"' in lines
    assert "2.1 save completed 500 ms 7" in lines
    assert lines[-1] == "output 7"
    assert not any(line.startswith("welcome_lead succeeded") for line in lines)


def test_an_open_run_shows_what_it_is_at_and_why_it_is_not_running() -> None:
    info = run_info(status="waiting", finished_at=None, output=None)
    waiting = task(state="waiting", claimed_by=None, due_at=after(60), interruptions=2)
    history = [record(1, (2,), "save", 1, n=1, outcome="interrupted")]
    text = drawn(view_of(info, history, [waiting], why="it waits for its next try"))
    assert "interrupted 2×" in text
    assert "until 2026-11-22" in text
    assert "not running  it waits for its next try" in text
    assert text.count("save") == 1


def test_a_failed_run_shows_its_error_with_the_trace() -> None:
    error = {
        "type": "ValueError",
        "message": "no [bold]markup[/]",
        "trace": "Traceback\n  File x\nValueError",
    }
    text = drawn(view_of(run_info(status="failed", output=None, error=error), [], [], why=None))
    assert "ValueError: no [bold]markup[/]" in text
    assert "  File x" in text


def trace_of(*files: str) -> str:
    frames = "".join(
        f'  File "{file}", line 3, in f\n    call({i})\n    ^^^^\n' for i, file in enumerate(files)
    )
    return f"Traceback (most recent call last):\n{frames}ValueError: no\n"


def failed_view(run_trace: str, *history: HistoryRecord) -> str:
    error = {"type": "ValueError", "message": "no", "trace": run_trace}
    return drawn(view_of(run_info(status="failed", output=None, error=error), history, [], why=None))


def test_a_run_that_a_step_ended_shows_the_trace_of_the_step() -> None:
    caught = {"type": "KeyError", "message": "other", "trace": trace_of("/app/caught.py")}
    ending = {"type": "ValueError", "message": "no", "trace": trace_of("/app/step.py")}
    steps = [
        record(1, (1,), "s", 1, outcome="failed", error=ending),
        record(2, (2,), "t", 2, outcome="failed", error=caught),
    ]
    text = failed_view(trace_of("/app/body.py"), *steps)
    assert "/app/step.py" in text
    assert "body.py" not in text
    assert "caught.py" not in text
    assert "/app/body.py" in failed_view(trace_of("/app/body.py"), steps[1])


def test_a_trace_leaves_out_our_own_frames() -> None:
    ours = (replay.__file__, "/other/site-packages/worker/replay/driver.py", faults.__file__)
    text = failed_view(trace_of(*ours, "/app/worker/body.py", ours[1]))
    assert [line for line in text.splitlines() if "File" in line] == [
        '  File "/app/worker/body.py", line 3, in f'
    ]
    assert "call(3)" in text
    assert text.count("call(") == 1
    assert text.rstrip().endswith("ValueError: no")
    assert replay.__file__ in failed_view(trace_of(replay.__file__))
    assert "demo/app.py" in failed_view(trace_of(replay.__file__, "/x/site-packages/worker/demo/app.py"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "pending", "started_at": None, "attempt": 0}, "nothing has happened yet"),
        ({"status": "pending", "started_at": None, "attempt": 2}, "no step is recorded"),
        ({"status": "succeeded"}, "no step is recorded"),
        ({"status": "blocked"}, "no step is recorded"),
    ],
)
def test_without_records_only_an_untouched_run_has_nothing_behind_it(
    changes: dict[str, Any], said: str
) -> None:
    text = drawn(view_of(run_info(**changes), [], [], why=None))
    assert [
        line for line in text.splitlines() if line in ("nothing has happened yet", "no step is recorded")
    ] == [said]


def test_a_blocked_run_says_its_error_once() -> None:
    info = run_info(status="blocked", output=None, error={"type": "E", "message": "it is so"})
    text = drawn(view_of(info, [], [], why="blocked: E: it is so; after the fix, …"), width=200)
    assert text.count("it is so") == 1
    assert f"not running  blocked; after the fix, `stepwell runs retry {RUN}` resumes it" in text


def test_a_retry_is_shown_between_the_epochs() -> None:
    history = [
        record(1, (), "w", 1, kind="run", outcome="failed", error={"type": "E", "message": "m"}),
        record(2, (), "w", 2, kind="epoch", n=1, outcome="retry", epoch=1),
        record(3, (), "w", 3, kind="run", outcome="succeeded", epoch=1),
    ]
    lines = drawn(view_of(run_info(epoch=1), history, [], why=None)).splitlines()
    assert any("(end)" in line and "failed" in line for line in lines)
    assert any("(retry)" in line and "what failed is tried anew" in line for line in lines)
    assert "retried 1×" in lines[1]


@pytest.mark.parametrize("poison", ["\x1b[2J", "\x9b31m", "\u202e", "\x07"])
def test_control_characters_of_values_are_spelled_out(poison: str) -> None:
    history = [record(1, (1,), f"s{poison}", 1, value=f"v{poison}")]
    info = run_info(
        labels={"a": poison},
        key=poison,
        error={"type": "E", "message": poison, "trace": poison},
        status="failed",
    )
    text = drawn(view_of(info, history, [], why=poison)) + drawn(run_table([info]))
    assert poison not in text


def test_names_in_joined_scripts_stay_as_they_are() -> None:
    name = "نرگس محمدی‌پور"
    assert name in drawn(view_of(run_info(input={"lead": name}), [], [], why=None))


def test_long_values_are_shortened() -> None:
    history = [record(1, (1,), "s", 1, value="x" * 10_000)]
    text = drawn(view_of(run_info(input={"a": "y" * 10_000}), history, [], why=None))
    assert len(text) < 2_000
    assert "…" in text


def listed(width: int | None) -> list[str]:
    other = UUID("0193a000-0001-7000-8000-000000000002")
    runs = [
        run_info(labels={"a": "b"}, finished_at=after(0.344)),
        run_info(
            id=other, workflow="a_workflow_with_quite_a_long_name", status="failed",
            error={"type": "ValueError", "message": "no\nlead " + "x" * 300 + " end"},
        ),
    ]  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=width or 80).print(run_table(runs, width), soft_wrap=True)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", range(50, 240, 5))
def test_a_list_of_runs_fits_and_never_cuts_ids_statuses_and_durations(width: int) -> None:
    heading, first, second = listed(width)
    assert max(len(line) for line in (heading, first, second)) <= width
    assert "succeeded" in first
    assert "94 ms" in first
    assert "failed" in second
    assert "2.8 s" in second
    assert first.split()[0] != second.split()[0]
    assert str(RUN).startswith(first.split()[0])
    assert "a_workflow_with_quite_a_long_name" in second or "…" in second


def test_the_beginnings_of_ids_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    ids = [RUN, UUID("0193a000-0000-7000-8000-000200000001")]
    lines = run_table([run_info(id=each) for each in ids], 50).plain.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [str(each)[:28] for each in ids]


def test_a_narrow_list_of_runs_leaves_out_error_then_queue_then_created() -> None:
    headings = [listed(width)[0].split() for width in range(50, 240)]
    shown = [("created" in names, "queue" in names) for names in headings]
    assert shown == sorted(shown)
    assert set(shown) == {(False, False), (True, False), (True, True)}
    assert "ValueError" not in listed(110)[2]
    assert "ValueErr" in listed(150)[2]
    assert all(str(RUN) in listed(width)[1] for width in range(80, 240))


def test_a_list_shows_the_progress_of_open_runs() -> None:
    open_run = run_info(status="running", finished_at=None, progress=Progress(300, 1200), labels={"a": "b"})
    lines = run_table(
        [open_run, run_info(progress=Progress(1, 1)), run_info(progress=None)]
    ).plain.splitlines()
    assert lines[1].endswith("300 of 1,200  a=b")
    assert not lines[2].endswith("1 of 1")


def test_a_list_of_runs_without_a_width_shows_everything_on_one_line_each() -> None:
    heading, first, second = listed(None)
    assert heading.split() == ["id", "workflow", "status", "queue", "created", "took"]
    assert first.endswith("a=b")
    assert "a_workflow_with_quite_a_long_name" in second
    assert second.endswith("ValueError: no lead " + "x" * 300 + " end")


def test_a_pipe_gets_no_colours_and_a_sane_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    made = console()
    if not made.is_terminal:
        assert made.width == 160
        assert made.color_system is None
    monkeypatch.setenv("COLUMNS", "90")
    assert console().width == 90
