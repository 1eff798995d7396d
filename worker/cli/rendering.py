"""How anything is shown: the console, JSON for programs, and the pieces of text that views are made of.

On a terminal with colours and as wide as it is; into a pipe without them, wide enough that nothing is cut that
a terminal would show. Whatever comes from payloads or errors is printed with its control characters spelled out, so
that a value cannot drive the terminal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outbox.exchange import Progress
from outbox.history import RunInfo, dotted
from outbox.sealing import Sealed
from worker.cli.mistakes import KEPT, spelled_out

_PIPED_COLUMNS = 160
_LONGEST_VALUE = 80
_BAR = 24
_LATER = timedelta(seconds=1)

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
    "paused": "magenta",
}


def console(*, stderr: bool = False) -> Console:
    """Return a console for stdout (or stderr) of a sane width. Colours: on a terminal, unless NO_COLOR is set."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPED_COLUMNS
    return made


def print_json(content: Any) -> None:
    """Print `content` as JSON, readable by people as well."""
    click.echo(json_text(content, indent=2))


def json_text(content: Any, indent: int | None = None) -> str:
    """Return `content` as JSON text, in which what is invisible is escaped: JSON itself lets much of it through."""
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in KEPT else json.dumps(c)[1:-1] for c in text)


# -- pieces of text -----------------------------------------------------------------------------------


def table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_edge=False)
    for name in columns:
        last = name == ""
        table.add_column(
            name, no_wrap=not last, overflow="fold", justify="right" if name == "took" else "left"
        )
    return table


def status_text(status: str) -> Text:
    return Text(status, style=_STYLES.get(status, ""))


def path_text(path: Sequence[int]) -> Text:
    return Text(dotted(path), style="dim")


def fault_text(error: Mapping[str, Any]) -> str:
    parts = [str(error[part]) for part in ("type", "message") if error.get(part)]
    return ": ".join(parts) or "unknown"


def compact(value: Any) -> str:
    if isinstance(value, Sealed):
        return str(value)
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def shortened(text: str, longest: int = _LONGEST_VALUE) -> str:
    text = one_line(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def one_line(text: str) -> str:
    return " ".join(text.split())


def plain(text: str, style: str = "") -> Text:
    """Return `text` with control and other invisible characters spelled out."""
    return Text(spelled_out(text), style=style)


def made_at(run: RunInfo) -> datetime:
    """Return when a run was made. A fork begins when the run began that it was made of; its id has its own time."""
    if run.id.version != 7:
        return run.created_at
    drawn = datetime.fromtimestamp((run.id.int >> 80) / 1000, UTC)
    return drawn if drawn - run.created_at > _LATER else run.created_at


def moment_text(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def span_text(start: datetime | None, end: datetime) -> str:
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


def progress_text(progress: Progress) -> Text:
    """Return a bar, and the figures behind it; only the figure where the whole is not known."""
    done = f"{progress.done:,}"
    if progress.fraction is None:
        return Text(done)
    filled = int(progress.fraction * _BAR)
    return Text.assemble(
        ("█" * filled, "green"),
        ("░" * (_BAR - filled), "dim"),
        f" {done} of {progress.total:,} ({progress.fraction:.0%})",
    )
