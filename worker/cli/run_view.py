"""One run as people see it: what it is, what has happened, what it is at, what it shows and what it waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from outbox.exchange import PROGRESS, progress_of
from outbox.history import HistoryRecord, RunInfo
from outbox.reasons import after_the_fix
from worker.cli.rendering import (
    compact,
    fault_text,
    made_at,
    moment_text,
    plain,
    progress_text,
    shortened,
    span_text,
    status_text,
    table,
)
from worker.cli.run_calls import call_rows
from worker.cli.run_details import Details
from worker.cli.traces import trace_of

_LONGEST_INPUT = 400
_OPENED = {
    "retry": "retried",
    "resolve": "resolved anew",
    "rewind": "rewound",
    "continue": "started anew",
    "fork": "forked",
}


def run_view(details: Details) -> RenderableType:
    """Return everything about one run."""
    run, history, why = details.run, details.history, details.why
    parts: list[RenderableType] = [*_header(run, history), "", _calls(details)]
    if details.state:
        parts += ["", *state_view(details.state)]
    if run.status == "succeeded":
        parts += ["", plain(f"output  {shortened(compact(run.output), _LONGEST_INPUT)}")]
    if run.error is not None:
        parts += ["", plain(f"error   {fault_text(run.error)}", "red")]
        if trace := trace_of(run, history):
            parts.append(plain(trace, "dim"))
    if why is not None:
        if run.status == "blocked" and run.error is not None:
            why = f"blocked; {after_the_fix(run.id)}"  # by the error that stands above
        title = "partly stuck" if run.status == "running" else "not running"
        parts += ["", Text.assemble((f"{title}  ", "bold"), plain(why))]
    return Group(*parts)


def state_view(state: Mapping[str, Any], longest: int | None = _LONGEST_INPUT) -> Iterator[Text]:
    """Yield what a run shows of itself, its progress first."""
    shown = dict(state)
    progress = progress_of(shown.get(PROGRESS))
    width = max(8, *(len(name) + 2 for name in shown)) if shown else 8
    if progress is not None:
        del shown[PROGRESS]
        yield Text.assemble(f"{PROGRESS:<{width}}", progress_text(progress))
    for name, value in shown.items():
        text = compact(value) if longest is None else shortened(compact(value), longest)
        yield Text.assemble(plain(f"{name:<{width}}"), plain(text))


def _header(run: RunInfo, history: Sequence[HistoryRecord]) -> Iterator[Text]:
    yield Text.assemble(plain(run.workflow, "bold"), "  ", plain(str(run.id)), "  ", status_text(run.status))
    facts = [f"version {run.version}"] if run.version else []
    facts += [f"queue {run.queue}", f"priority {run.priority}"]
    if run.key is not None:
        facts.append(f"key {run.key}")
    if run.labels:
        facts.append("labels " + " ".join(f"{name}={value}" for name, value in run.labels.items()))
    if run.parent is not None:
        facts.append(f"child of {run.parent}")
    opened = Counter(record.outcome for record in history if record.kind == "epoch")
    facts += [f"{_OPENED.get(how, how)} {times}×" for how, times in opened.items()]
    yield plain(" · ".join(facts))
    made = made_at(run)
    times = [f"created {moment_text(made)}"]
    if run.started_at is not None:
        times.append(f"started after {span_text(made, run.started_at)}")
    if run.finished_at is not None:
        times.append(
            f"ended {moment_text(run.finished_at)}, took {span_text(run.started_at, run.finished_at)}"
        )
    if run.deadline_at is not None:
        times.append(f"deadline {moment_text(run.deadline_at)}")
    yield Text(" · ".join(times))
    yield plain(f"input   {shortened(compact(run.input), _LONGEST_INPUT)}", "dim")


def _calls(details: Details) -> RenderableType:
    run = details.run
    rows = call_rows(run, details.history, details.tasks, details.children)
    if not rows:
        untouched = run.status == "pending" and run.started_at is None and not run.attempt
        return Text("nothing has happened yet" if untouched else "no step is recorded", style="dim")
    drawn = table("path", "step", "outcome", "took", "")
    for row in rows:
        drawn.add_row(*row)
    return drawn
