"""Show how far the demo is: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_PERCENT = 10


class Display:
    """The progress of `total` runs. Enter it, then `show` how many have ended and `say` what happens."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._last_line = 0
        self._progress = Progress(
            TextColumn("runs ended"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total)

    def show(self, ended: int) -> None:
        """Show how many runs have ended."""
        self._progress.update(self._task, completed=ended)
        if self._console.is_terminal or self._total == 0:
            return
        line = ended * 100 // self._total // LINE_EVERY_PERCENT
        if line > self._last_line:
            self._last_line = line
            self.say(f"{ended:,} of {self._total:,} runs have ended")

    def say(self, text: str) -> None:
        """Print one line, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
