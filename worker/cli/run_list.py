"""A list of runs, one line for each: on a terminal what fits, into a pipe all of it, however long that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from outbox.history import RunInfo
from worker.cli.rendering import fault_text, made_at, moment_text, one_line, plain, span_text, status_text

_GAP = 2
_NARROW = {"workflow": 20, "": 12}  # what may be shortened, and to what before whole columns are left out
_LEFT_OUT = ("", "queue", "created")
_SHORT_ID = 23  # holds the time and 26 random bits


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
    took = span_text(run.started_at, run.finished_at) if run.finished_at else ""
    return {
        "id": Text(str(run.id)),
        "workflow": plain(one_line(run.workflow)),
        "status": status_text(run.status),
        "queue": plain(one_line(run.queue)),
        "created": Text(moment_text(made_at(run))),
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
        return plain(one_line(fault_text(run.error)), "red")
    if run.status == "waiting" and run.due_at is not None:
        return Text(f"until {moment_text(run.due_at)}")
    labels = plain(one_line(" ".join(f"{name}={value}" for name, value in run.labels.items())), "dim")
    if run.progress is None or run.finished_at is not None:
        return labels
    whole = "" if run.progress.total is None else f" of {run.progress.total:,}"
    return Text.assemble(f"{run.progress.done:,}{whole}", "  " if labels else "", labels)
