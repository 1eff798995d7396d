"""The calls of a run as a tree of rows: what has happened, what is under way, the branches of joins below their join.

Calls of the body itself come in the order in which they were first recorded, those of a join in the order of their
paths. A child that was begun, and is not awaited yet, stands where it was begun. A large join is one line with numbers, and the few calls of it that somebody may have to look at. A retry or a
rewind begins a new part, in which calls may come again. What a fresh start has left behind is only counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from rich.text import Text

from outbox.history import HistoryRecord, RunInfo, TaskInfo, dotted
from outbox.reasons import ANY_CHILD
from worker.cli.rendering import (
    compact,
    fault_text,
    moment_text,
    path_text,
    plain,
    shortened,
    span_text,
    status_text,
)
from worker.cli.run_details import Child

LISTED = 20
"""Calls of a join that are all shown; of more only those that are not simply done."""
NOTABLE = 10

_ORDER = ("completed", "failed", "running", "waiting")
_QUIET = ("completed", "succeeded", "waiting", "pending")
Path = tuple[int, ...]


class Row(NamedTuple):
    """One line of the table."""

    path: Text
    name: Text
    outcome: Text
    took: str = ""
    note: Text = Text()


@dataclass(slots=True)
class _Call:
    """A call, or a join if calls are below it. `outcome` is what it has come to so far."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    name: str = ""
    outcome: str = ""
    below: dict[Path, _Call] = field(default_factory=dict)
    is_map: bool = False
    awaits: str = ""

    def everything_below(self) -> Iterator[_Call]:
        for call in self.below.values():
            if call.below:
                yield from call.everything_below()
            else:
                yield call


def call_rows(
    run: RunInfo, history: Sequence[HistoryRecord], tasks: Sequence[TaskInfo], children: Sequence[Child] = ()
) -> list[Row]:
    """Return a row for each thing that has happened or is left to do."""
    rows: list[Row] = []
    history = _since_fresh_start(history, rows)
    of_another = (
        bool(history) and run.started_at is not None and history[0].at < run.started_at
    )  # it is a fork
    part = _Part(run, None if rows or of_another else run.started_at, children)
    unplaced = [child for child in children if not _is_recorded(child, history)]
    for record in history:
        if record.kind == "epoch":
            for child in unplaced:
                if child.created_at is not None and child.created_at <= record.at:
                    part.child(child)
            unplaced = [each for each in unplaced if each.created_at is None or each.created_at > record.at]
            rows += [*part.rows(), _opening(record)]
            part = _Part(run, record.at, children)
        else:
            part.record(record)
    last = history[-1].at if history else run.started_at
    for child in unplaced:
        part.child(child)
    awaited = next((_signals(task) for task in tasks if task.kind == "run"), "")
    for task in sorted(tasks, key=lambda task: (task.kind == "wake", task.kind == "run", task.path)):
        part.task(task, last, awaited)
    return rows + part.rows()


class _Part:
    """What happened within one epoch. `took` counts from what came before in the same branch."""

    def __init__(self, run: RunInfo, begun: datetime | None, children: Sequence[Child]) -> None:
        self._run = run
        self._calls: dict[Path, _Call] = {}
        self._top: list[_Call | Row] = []
        self._clocks: dict[Path, datetime | None] = {(): begun}
        self._joins: dict[Path, datetime | None] = {}
        self._children = {child.path: child for child in children}

    # -- what has happened

    def record(self, record: HistoryRecord) -> None:
        """Take a record, in the order of the history."""
        took = self._took(record)
        match record.kind:
            case "run" if record.epoch == self._run.epoch:
                pass  # the run's end stands in the header
            case "run":
                ended = Text("(end)", style="dim")
                self._top.append(Row(Text(), ended, status_text(record.outcome), "", _result(record)))
            case "cancel":
                why = "its deadline has passed" if record.error else "the run was cancelled"
                note = Text(f"{why}, {moment_text(record.at)}", style="dim")
                self._top.append(Row(Text(), Text("(cancel)", style="dim"), Text(), took, note))
            case "patch":
                name = plain(f"(patch) {record.name}", "dim")
                self._top.append(Row(Text(), name, Text("taken", style="dim")))
            case _ if record.n:
                call = self._call(record.path)
                call.name = _label(record)
                name = plain(f"{_indent(record.path)}  execution {record.n}", "dim")
                call.rows.append(
                    Row(Text(), name, status_text(record.outcome), took, _result(record, at=True))
                )
                call.outcome = record.outcome
            case _:
                call = self._call(record.path)
                call.rows.append(
                    Row(_shown_path(record.path), self._name(record.path, _label(record)),
                        status_text(record.outcome), took, self._note(record))
                )  # fmt: skip
                call.outcome = record.outcome

    def _took(self, record: HistoryRecord) -> str:
        """Return how long ago the record before it in its branch was, which is when its turn had come."""
        branch = record.path[:-1] if record.path and record.path[-1] else ()
        before = self._begin_of(branch)
        self._clocks[branch] = record.at
        while branch:  # what comes behind the join counts from its last record
            branch = branch[:-2]
            self._clocks[branch] = record.at
        return span_text(before, record.at)

    def _begin_of(self, branch: Path) -> datetime | None:
        if branch in self._clocks:
            return self._clocks[branch]
        join = branch[:-1]
        if join not in self._joins:
            self._joins[join] = self._begin_of(join[:-1])
        return self._joins[join]

    def _note(self, record: HistoryRecord) -> Text:
        child = self._children.get(record.path) if record.kind == "child" else None
        result = _result(record)
        if child is None or not _is_of(record, child):
            return result
        return Text.assemble(result, "  " if result else "", (f"run {child.id}", "dim"))

    # -- what is left to do

    def child(self, child: Child) -> None:
        """Take a child whose result is not taken yet."""
        call = self._call(child.path, in_order=True)
        call.outcome = child.status
        name = self._name(child.path, f"child {child.workflow}")
        call.rows.append(
            Row(_shown_path(child.path), name, status_text(child.status), "", Text(f"run {child.id}", "dim"))
        )

    def task(self, task: TaskInfo, last: datetime | None, awaited: str) -> None:
        """Take a task. `last`: when something was recorded last. `awaited`: the signals that the run waits for."""
        match task.kind:
            case "wake":
                self._top.append(
                    Row(Text(), plain(f"({task.name})"), Text(_WAKES.get(task.name, "asked"), style="yellow"))
                )
            case "window":
                self._call(task.path).is_map = True
            case "run" if not task.doing:
                self._own_task(task)
            case "run" if (call := self._calls.get(task.doing or ())) and call.outcome in _QUIET:
                pass  # its time-out stands there
            case _:
                self._task_of_call(task, last, awaited)

    def _own_task(self, task: TaskInfo) -> None:
        """Take the run's own task where it is at no call: it waits for a join, for a child, or is driven."""
        joins = [each for each in self._top if isinstance(each, _Call) and each.below]
        if task.state == "claimed":
            self._top.append(Row(Text(), Text("…"), _doing(task)))
        elif (signals := _signals(task)) and joins:
            joins[-1].awaits = signals

    def _task_of_call(self, task: TaskInfo, last: datetime | None, awaited: str) -> None:
        path = (task.doing or ()) if task.kind == "run" else task.path
        call = self._call(path)
        since = span_text(last, datetime.now(UTC)) if task.kind == "run" and task.state == "claimed" else ""
        name = self._name(path, call.name or _untried(task, awaited))
        call.rows.append(Row(_shown_path(path), name, _doing(task), since, _due(task)))
        call.outcome = _doing(task).plain

    # -- the tree

    def _call(self, path: Path, *, in_order: bool = False) -> _Call:
        """Return the call at a path, with the joins above it. A new one comes last, or by its path."""
        call = self._calls.get(path)
        if call is None:
            call = self._calls[path] = _Call(path)
            if len(path) >= 3 and path[-1]:
                self._call(path[:-2], in_order=in_order).below[path] = call
            else:
                self._top.insert(self._place_of(path) if in_order else len(self._top), call)
        return call

    def _place_of(self, path: Path) -> int:
        """Return where a call stands among those of the body: before the first of a higher path, else behind the others."""
        calls = [
            (at, each.path) for at, each in enumerate(self._top) if isinstance(each, _Call) and each.path[-1]
        ]
        higher = next((at for at, other in calls if other > path), None)
        if higher is not None:
            return higher
        return calls[-1][0] + 1 if calls else len(self._top)

    def rows(self) -> list[Row]:
        """Return the rows of this part."""
        return [row for each in self._top for row in ([each] if isinstance(each, Row) else self._drawn(each))]

    def _drawn(self, call: _Call) -> Iterator[Row]:
        yield from call.rows
        if not call.below:
            return
        below = list(call.everything_below())
        name = self._name(call.path, "map" if call.is_map else "map/gather")
        yield Row(_shown_path(call.path), name, Text(), "", Text(_summary(below, call.awaits), style="dim"))
        if len(below) <= LISTED:
            for each in sorted(call.below.values(), key=lambda each: each.path):
                yield from self._drawn(each)
            return
        notable = [each for each in below if each.outcome not in _QUIET]
        for each in notable[:NOTABLE]:
            yield from each.rows
        if len(notable) > NOTABLE:
            more = plain(f"{_indent(call.path)}  … and {len(notable) - NOTABLE:,} more", "dim")
            yield Row(Text(), more, Text())

    def _name(self, path: Path, label: str) -> Text:
        return plain(_indent(path) + label)


# -- words ---------------------------------------------------------------------------------------------

_WAKES = {"cancel": "asked", "signal": "sent", "poison": "to be blocked"}


def _since_fresh_start(history: Sequence[HistoryRecord], rows: list[Row]) -> Sequence[HistoryRecord]:
    """Return the records from the last fresh start on, and add a row that counts those before."""
    starts = [
        at for at, record in enumerate(history) if record.kind == "epoch" and record.outcome == "continue"
    ]
    if not starts:
        return history
    times = f"{len(starts):,} fresh start{'' if len(starts) == 1 else 's'}"
    before = sum(record.kind != "epoch" for record in history[: starts[-1]])
    told = f"{before:,} records of before {'it' if len(starts) == 1 else 'the last of them'} are left out"
    rows.append(Row(Text(), Text("…", style="dim"), Text(), "", Text(f"{times}; {told}", style="dim")))
    return history[starts[-1] :]


def _is_recorded(child: Child, history: Sequence[HistoryRecord]) -> bool:
    return any(
        record.kind == "child" and record.path == child.path and _is_of(record, child) for record in history
    )


def _is_of(record: HistoryRecord, child: Child) -> bool:
    """Tell whether the result at a child's path is its own, and not that of the one before a rewind."""
    return child.created_at is None or child.created_at <= record.at


def _opening(record: HistoryRecord) -> Row:
    """Return the row of a record that opens an epoch."""
    value = record.value if isinstance(record.value, dict) else {}
    when = moment_text(record.at)
    match record.outcome:
        case "retry":
            told = f"retried {when}: what failed is tried anew"
        case "resolve":
            told = f"resolved anew {when}: what was said of call {dotted(value.get('at') or ())} before does not count"
        case "rewind":
            told = (
                f"rewound {when} to call {dotted(value.get('to') or ())}: it and what came after is made anew"
            )
        case "continue":
            told = f"started anew {when} with {shortened(compact(record.value))}"
        case "fork":
            told = f"forked {when}: what stands above happened in the run that it was forked from"
        case other:
            told = f"{other} {when}"
    return Row(Text(), plain(f"({record.outcome})", "dim"), Text(), "", plain(told, "dim"))


def _label(record: HistoryRecord) -> str:
    if record.path and not record.path[-1]:
        return f"undo of {dotted(record.path[:-1])}: {record.name.removesuffix('.undo')}"
    return f"{record.kind} {record.name}" if record.kind in ("signal", "child") else record.name


def _untried(task: TaskInfo, awaited: str) -> str:
    """Return what a task is at, where no record names it yet: it waits for a time only to sleep or to try again."""
    if task.kind == "timer":
        return f"signal {awaited}" if task.name == "timeout" else task.name
    if task.kind != "run":
        return task.name.removeprefix("step:")
    if awaited:
        return f"signal {awaited}"
    return "sleep" if task.state == "waiting" and task.due_at is not None else "…"


def _signals(task: TaskInfo) -> str:
    return ", ".join(name for name in task.awaits if name != ANY_CHILD)


def _doing(task: TaskInfo) -> Text:
    return status_text({"claimed": "running", "ready": "waiting"}.get(task.state, task.state))


def _due(task: TaskInfo) -> Text:
    said = []
    if task.due_at is not None and task.state == "waiting":
        said.append(f"until {moment_text(task.due_at)}")
    if task.kind == "step" and task.queue != "default":
        said.append(f"queue {task.queue}")
    if task.interruptions:
        said.append(f"interrupted {task.interruptions}×")
    if task.claimed_by is not None:
        said.append(f"worker {task.claimed_by}")
    return plain(", ".join(said), "dim")


def _result(record: HistoryRecord, *, at: bool = False) -> Text:
    when = f"{moment_text(record.at)}  " if at else ""
    if record.error is not None:
        return Text.assemble((when, "dim"), plain(shortened(fault_text(record.error)), "red"))
    if record.kind == "sleep" or record.value is None:
        return Text(when.rstrip(), style="dim")
    return Text.assemble((when, "dim"), plain(shortened(compact(record.value))))


def _summary(calls: Sequence[_Call], awaits: str) -> str:
    counts = Counter(each.outcome or "waiting" for each in calls)
    ordered = sorted(counts, key=lambda each: (_ORDER.index(each) if each in _ORDER else len(_ORDER), each))
    told = ", ".join(f"{counts[each]:,} {each}" for each in ordered)
    return f"{told}; waits for signal {awaits}" if awaits else told


def _shown_path(path: Path) -> Text:
    return path_text(path) if path and path[-1] else Text()


def _indent(path: Path) -> str:
    return "  " * ((len(path) - 1) // 2) if path and path[-1] else ""
