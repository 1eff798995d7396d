"""The traceback of a run: where it went wrong, without the frames of Stepwell itself."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import outbox
import worker
from outbox.history import HistoryRecord, RunInfo
from worker.cli.rendering import fault_text

_FRAME = re.compile(r'( *(?:\| +)?)File "([^"]+)", line \d+, in ')
_PACKAGES = tuple(f"{Path(each.__path__[0])}{os.sep}" for each in (outbox, worker))
_INSTALLED = re.compile(r"[/\\](?:site|dist)-packages[/\\](?:outbox|worker)[/\\]")
_DEMO = re.compile(r"[/\\]worker[/\\]demo[/\\]")


def trace_of(run: RunInfo, history: Sequence[HistoryRecord]) -> str:
    """Return where it went wrong: in the step whose error ended the run, if there is one, else in the body."""
    error = run.error or {}
    steps = (
        record.error
        for record in reversed(history)
        if run.status == "failed" and record.kind == "step" and record.epoch == run.epoch and record.error
    )
    same = (each for each in steps if each.get("trace") and fault_text(each) == fault_text(error))
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
