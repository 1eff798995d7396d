"""What people see of runs, and JSON for programs.

On a terminal with colours and as wide as it is; into a pipe without them, wide enough that nothing is cut that
a terminal would show. Whatever comes from payloads or errors is printed with its control characters spelled
out, so that a value cannot drive the terminal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from outbox.history import HistoryRecord, RunInfo, TaskInfo, dotted

_PIPED_COLUMNS = 160
_LONGEST_VALUE = 80
_LONGEST_INPUT = 400
_JOINERS = "\u200c\u200d"  # invisible, but part of how names are written in several scripts

_STYLES = {
    "pending": "cyan",
    "running": "bold blue",
    "waiting": "cyan",
    "succeeded": "green",
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "interrupted": "yellow",
    "blocked": "bold magenta",
}


def console(*, stderr: bool = False) -> Console:
    """Return a console for stdout (or stderr) of a sane width. Colours: on a terminal, unless NO_COLOR is set."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPED_COLUMNS
    return made


def print_json(content: Any) -> None:
    """Print `content` as JSON, readable by people as well."""
    click.echo(json.dumps(content, ensure_ascii=False, indent=2))


# -- a list of runs ------------------------------------------------------------------------------------


def run_table(runs: Sequence[RunInfo]) -> Table:
    """Return one line for each run."""
    table = _table("id", "workflow", "status", "queue", "created", "took", "")
    for run in runs:
        took = _span(run.started_at, run.finished_at) if run.finished_at else ""
        table.add_row(
            _plain(str(run.id)), _plain(run.workflow), _status(run.status), _plain(run.queue), _moment(run.created_at),
            took, _remark(run),
        )  # fmt: skip
    return table


def _remark(run: RunInfo) -> Text:
    if run.error is not None:
        return _plain(_shortened(_fault(run.error)), "red")
    if run.status == "waiting" and run.due_at is not None:
        return Text(f"until {_moment(run.due_at)}")
    return _plain(_shortened(" ".join(f"{name}={value}" for name, value in run.labels.items())), "dim")


# -- one run -------------------------------------------------------------------------------------------


def run_view(
    run: RunInfo,
    history: Sequence[HistoryRecord],
    tasks: Sequence[TaskInfo],
    *,
    key: str | None,
    why: str | None,
) -> RenderableType:
    """Return everything about one run: what it is, what has happened, what it is at and what it waits for."""
    parts: list[RenderableType] = [*_header(run, key), ""]
    parts.append(_steps(run, history, tasks))
    if run.status == "succeeded":
        parts += ["", _plain(f"output  {_shortened(_json(run.output), _LONGEST_INPUT)}")]
    if run.error is not None:
        parts += ["", _plain(f"error   {_fault(run.error)}", "red")]
        if run.error.get("trace"):
            parts.append(_plain(str(run.error["trace"]).rstrip(), "dim"))
    if why is not None:
        parts += ["", Text.assemble(("not running  ", "bold"), _plain(why))]
    return Group(*parts)


def _header(run: RunInfo, key: str | None) -> Iterator[Text]:
    yield Text.assemble(_plain(run.workflow, "bold"), "  ", _plain(str(run.id)), "  ", _status(run.status))
    facts = [f"queue {run.queue}", f"priority {run.priority}"]
    if key is not None:
        facts.append(f"key {key}")
    if run.labels:
        facts.append("labels " + " ".join(f"{name}={value}" for name, value in run.labels.items()))
    if run.epoch:
        facts.append(f"retried {run.epoch}×")
    yield _plain(" · ".join(facts))
    times = [f"created {_moment(run.created_at)}"]
    if run.started_at is not None:
        times.append(f"started after {_span(run.created_at, run.started_at)}")
    if run.finished_at is not None:
        times.append(f"ended {_moment(run.finished_at)}, took {_span(run.started_at, run.finished_at)}")
    if run.deadline_at is not None:
        times.append(f"deadline {_moment(run.deadline_at)}")
    yield Text(" · ".join(times))
    yield _plain(f"input   {_shortened(_json(run.input), _LONGEST_INPUT)}", "dim")


def _steps(run: RunInfo, history: Sequence[HistoryRecord], tasks: Sequence[TaskInfo]) -> RenderableType:
    """Return what has happened in its order, then what is under way."""
    rows = [*_past(run, history), *_present(run, history, tasks)]
    if not rows:
        return Text("nothing has happened yet", style="dim")
    table = _table("path", "step", "outcome", "took", "")
    for row in rows:
        table.add_row(*row)
    return table


Cells = tuple[Text, Text, Text, str, Text]


def _past(run: RunInfo, history: Sequence[HistoryRecord]) -> Iterator[Cells]:
    """Yield a row for each record. `took` counts from the record before, which is when it became this one's turn."""
    before = run.started_at
    for record in history:
        took = _span(before, record.at) if record.kind != "epoch" else ""
        before = record.at
        match record.kind:
            case "run" if record.epoch == run.epoch:
                continue  # the run's end stands in the header
            case "run":
                yield Text(""), Text("(end)", style="dim"), _status(record.outcome), "", _result(record)
            case "epoch":
                text = f"retried {_moment(record.at)}: what failed is tried anew"
                yield Text(""), Text("(retry)", style="dim"), Text(""), "", Text(text, style="dim")
            case _ if record.n:
                what = _plain(f"{'  ' * len(record.path)}execution {record.n}", "dim")
                yield Text(""), what, _status(record.outcome), took, _result(record, at=True)
            case _:
                yield (
                    _path(record.path),
                    _name(record.path, record.name),
                    _status(record.outcome),
                    took,
                    _result(record),
                )


def _present(run: RunInfo, history: Sequence[HistoryRecord], tasks: Sequence[TaskInfo]) -> Iterator[Cells]:
    """Yield a row for each thing that is left to do."""
    tried = {record.path: record.name for record in history if record.n}
    for task in tasks:
        path = task.doing if task.kind == "run" else task.path
        if task.kind == "wake":
            yield Text(""), _plain(f"({task.name})"), Text("asked", style="yellow"), "", Text("")
        elif path:
            name = tried.get(path) or _untried(task)
            yield _path(path), _name(path, name), _doing(task), _since(run, history, task), _due(task)
        elif task.state == "claimed":
            yield Text(""), Text("…"), _doing(task), "", Text("")


def _untried(task: TaskInfo) -> str:
    """Return what a task is at, where no record names it yet: it waits for a time only to sleep or to try again."""
    if task.kind != "run":
        return task.name
    return "sleep" if task.state == "waiting" and task.due_at is not None else "…"


def _doing(task: TaskInfo) -> Text:
    return _status({"claimed": "running", "ready": "waiting"}.get(task.state, task.state))


def _since(run: RunInfo, history: Sequence[HistoryRecord], task: TaskInfo) -> str:
    if task.state != "claimed":
        return ""
    return _span(history[-1].at if history else run.started_at, datetime.now(UTC))


def _due(task: TaskInfo) -> Text:
    said = []
    if task.due_at is not None and task.state == "waiting":
        said.append(f"until {_moment(task.due_at)}")
    if task.interruptions:
        said.append(f"interrupted {task.interruptions}×")
    if task.claimed_by is not None:
        said.append(f"worker {task.claimed_by}")
    return Text(", ".join(said), style="dim")


def _result(record: HistoryRecord, *, at: bool = False) -> Text:
    when = f"{_moment(record.at)}  " if at else ""
    if record.error is not None:
        return Text.assemble((when, "dim"), _plain(_shortened(_fault(record.error)), "red"))
    if record.kind == "sleep" or record.value is None:
        return Text(when.rstrip(), style="dim")
    return Text.assemble((when, "dim"), _plain(_shortened(_json(record.value))))


# -- parts ---------------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_edge=False)
    for name in columns:
        last = name == ""
        table.add_column(
            name, no_wrap=not last, overflow="fold", justify="right" if name == "took" else "left"
        )
    return table


def _status(status: str) -> Text:
    return Text(status, style=_STYLES.get(status, ""))


def _path(path: Sequence[int]) -> Text:
    return Text(dotted(path), style="dim")


def _name(path: Sequence[int], name: str) -> Text:
    return _plain("  " * (len(path) - 1) + name)


def _fault(error: Mapping[str, Any]) -> str:
    parts = [str(error[part]) for part in ("type", "message") if error.get(part)]
    return ": ".join(parts) or "unknown"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def _shortened(text: str, longest: int = _LONGEST_VALUE) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _plain(text: str, style: str = "") -> Text:
    """Return `text` with control and other invisible characters spelled out."""
    shown = (
        c if c.isprintable() or c in _JOINERS or c == "\n" else c.encode("unicode_escape").decode()
        for c in text
    )
    return Text("".join(shown), style=style)


def _moment(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _span(start: datetime | None, end: datetime) -> str:
    """Return the time between in the unit that reads best."""
    if start is None:
        return ""
    seconds = max(timedelta(0), end - start).total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    first = next((at for at, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])
