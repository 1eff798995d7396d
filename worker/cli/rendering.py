"""What people see of runs, and JSON for programs.

On a terminal with colours and as wide as it is; into a pipe without them, wide enough that nothing is cut that
a terminal would show, and a list with one line for each run, however long that is. Whatever comes from payloads or errors is printed with its control characters spelled
out, so that a value cannot drive the terminal.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

import outbox
import worker
from outbox.history import HistoryRecord, RunInfo, TaskInfo, dotted
from outbox.reasons import after_the_fix

_PIPED_COLUMNS = 160
_LONGEST_VALUE = 80
_LONGEST_INPUT = 400
_GAP = 2
_NARROW = {"workflow": 20, "": 12}  # what may be shortened, and to what before whole columns are left out
_LEFT_OUT = ("", "queue", "created")
_SHORT_ID = 23  # holds the time and 26 random bits
_FRAME = re.compile(r'( *(?:\| +)?)File "([^"]+)", line \d+, in ')
_PACKAGES = tuple(f"{Path(each.__path__[0])}{os.sep}" for each in (outbox, worker))
_INSTALLED = re.compile(r"[/\\](?:site|dist)-packages[/\\](?:outbox|worker)[/\\]")
_DEMO = re.compile(r"[/\\]worker[/\\]demo[/\\]")
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


def run_table(runs: Sequence[RunInfo], width: int | None = None) -> Text:
    """Return one line for each run, under a heading: all of it, or what fits into `width`.

    Whole columns give way first, then the end of the ids. An id, a status and a duration are never cut.
    """
    cells = [_listed(run) for run in runs]
    widths = {name: max(len(name), *(row[name].cell_len for row in cells)) for name in cells[0]}
    if width is not None:
        widths = _fitting(widths, width)
        if _taken(widths) > width:
            widths["id"] = _unique_length([str(run.id) for run in runs])
            widths["workflow"] = max(1, min(widths["workflow"], widths["workflow"] + width - _taken(widths)))
    heading = {name: Text(name, style="dim") for name in widths}
    return Text("\n").join(_line(row, widths) for row in [heading, *cells])


def _listed(run: RunInfo) -> dict[str, Text]:
    took = _span(run.started_at, run.finished_at) if run.finished_at else ""
    return {
        "id": Text(str(run.id)),
        "workflow": _plain(_one_line(run.workflow)),
        "status": _status(run.status),
        "queue": _plain(_one_line(run.queue)),
        "created": Text(_moment(run.created_at)),
        "took": Text(took),
        "": _remark(run),
    }


def _fitting(widths: dict[str, int], width: int) -> dict[str, int]:
    """Return the columns that have room in `width`, the workflow and then the error as wide as that allows."""
    kept = dict(widths)
    for leaving in (None, *_LEFT_OUT):
        if leaving is not None:
            del kept[leaving]
        least = {name: min(size, _NARROW.get(name, size)) for name, size in kept.items()}
        if _taken(least) <= width:
            for name in (each for each in _NARROW if each in kept):
                spare = width - _taken(least)
                least[name] = min(kept[name], least[name] + spare)
            return least
    return kept


def _taken(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)


def _unique_length(ids: Sequence[str]) -> int:
    """Return how much of the ids tells them apart."""
    return next(
        (n for n in range(_SHORT_ID, 36) if len({each[:n] for each in ids}) == len(set(ids))), len(ids[0])
    )


def _line(row: Mapping[str, Text], widths: Mapping[str, int]) -> Text:
    line = Text()
    for name, size in widths.items():
        cell = row[name].copy()
        cell.truncate(size, overflow="crop" if name == "id" else "ellipsis")
        room = " " * (size - cell.cell_len)
        gap = " " * _GAP if line.cell_len else ""
        line = Text.assemble(line, gap, *((room, cell) if name == "took" else (cell, room)))
    line.rstrip()
    return line


def _remark(run: RunInfo) -> Text:
    if run.error is not None:
        return _plain(_one_line(_fault(run.error)), "red")
    if run.status == "waiting" and run.due_at is not None:
        return Text(f"until {_moment(run.due_at)}")
    return _plain(_one_line(" ".join(f"{name}={value}" for name, value in run.labels.items())), "dim")


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
        if trace := _trace(run, history):
            parts.append(_plain(trace, "dim"))
    if why is not None:
        if run.status == "blocked" and run.error is not None:
            why = f"blocked; {after_the_fix(run.id)}"  # by the error that stands above
        parts += ["", Text.assemble(("not running  ", "bold"), _plain(why))]
    return Group(*parts)


def _trace(run: RunInfo, history: Sequence[HistoryRecord]) -> str:
    """Return where it went wrong: in the step whose error ended the run, if there is one, else in the body."""
    error = run.error or {}
    steps = (
        record.error
        for record in reversed(history)
        if run.status == "failed" and record.kind == "step" and record.epoch == run.epoch and record.error
    )
    same = (each for each in steps if each.get("trace") and _fault(each) == _fault(error))
    return _without_us(str(next(same, error).get("trace") or "").rstrip())


def _without_us(trace: str) -> str:
    """Return `trace` without the frames of Stepwell itself; as it is if it has no others."""
    kept: list[str] = []
    indent: str | None = None  # of the frame that is being left out
    others = False
    for line in trace.splitlines():
        if frame := _FRAME.match(line):
            indent = frame[1] if _is_ours(frame[2]) else None
            others = others or indent is None
        elif indent is not None and not line.startswith((f"{indent}  ", f"{indent}[Previous line repeated")):
            indent = None
        if indent is None:
            kept.append(line)
    return "\n".join(kept) if others else trace


def _is_ours(file: str) -> bool:
    """Tell whether a file is Stepwell's, here or where the worker was installed. The demo is a user's app."""
    ours = file.startswith(_PACKAGES) or _INSTALLED.search(file) is not None
    return ours and not _DEMO.search(file)


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
        untouched = run.status == "pending" and run.started_at is None and not run.attempt
        return Text("nothing has happened yet" if untouched else "no step is recorded", style="dim")
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
    text = _one_line(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _one_line(text: str) -> str:
    return " ".join(text.split())


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
