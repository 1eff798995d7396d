"""How processes log: lines for people, or JSON for programs, each with the run and the step that it is about.

What code says while it works for a run, a step's own log lines among them, is marked with that run by a filter: it looks
at where the code stands (`worker.context`) and at the current span, so whoever logs has to know of nothing. What is logged
here never holds a payload; what a step logs is its author's business.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from outbox.producing import opentelemetry_in_use
from worker.context import whereabouts
from worker.replay.records import dotted

LogFormat = Literal["text", "json"]

_LINE = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"

# What every record has; anything else was added, by `extra=…` or by a filter.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}


def set_up_logs(level: int | str, form: LogFormat = "text", *, worker: int | None = None) -> None:
    """Have the root logger write to stderr; nothing happens if it has handlers already. `worker` is this process's id."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_LINE))
    if form == "json":
        handler.addFilter(Whereabouts(worker))
    logging.basicConfig(level=level, handlers=[handler])


class Whereabouts(logging.Filter):
    """Marks each record with the run and step that the code which logs works for, and with the current span."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._worker = worker

    def filter(self, record: logging.LogRecord) -> bool:
        """Mark the record; what it says of itself stays."""
        marks: dict[str, Any] = {} if self._worker is None else {"worker": self._worker}
        facts, step = whereabouts()
        if facts is not None:
            marks |= {"run_id": str(facts.id), "workflow": facts.workflow}
        if step is not None:
            marks |= {
                "step": step.name,
                "path": dotted(step.path),
                "execution": step.execution,
                "attempt": (step.fence >> 24) & 0xFFFFFF,  # as `Standing.fence` puts it there
            }
        marks |= _current_span()
        for name, value in marks.items():
            if name not in vars(record):
                setattr(record, name, value)
        return True


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON, with everything that was added to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message_of(record),
            "process": record.process,
        }
        for name, value in vars(record).items():
            if name not in _OWN and name not in line:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        try:
            return _encode(line).decode()
        except Exception:  # noqa: BLE001 - values that a caller has added, whose text may raise
            return _encode({name: _plain(value) for name, value in line.items()}).decode()


_encode = msgspec.json.Encoder(enc_hook=repr).encode


def _message_of(record: logging.LogRecord) -> str:
    """Return what a record says; as it was given where the arguments do not fit: `logging` would write no line."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - of the arguments' own text
        return f"{_plain(record.msg)} {_plain(record.args)}"


def _plain(value: object) -> str | int | None:
    """Return a value as something that can be written for certain."""
    if value is None or (type(value) is int and abs(value) < 1 << 63):
        return value
    try:
        return str(value).encode(errors="backslashreplace").decode()
    except Exception:  # noqa: BLE001 - see above
        return f"<{type(value).__qualname__}>"


def _current_span() -> dict[str, str]:
    """Return the ids of the current span, if this process uses OpenTelemetry and there is one."""
    otel = opentelemetry_in_use()
    if otel is None:
        return {}
    known = otel.get_current_span().get_span_context()
    if not known.is_valid:
        return {}
    return {"trace_id": f"{known.trace_id:032x}", "span_id": f"{known.span_id:016x}"}
